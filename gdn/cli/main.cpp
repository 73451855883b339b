// SPDX-License-Identifier: Apache-2.0
#include "gdn/cli/cli.h"

int main(int argc, char** argv) { return gdn::run_main(argc, argv); }
