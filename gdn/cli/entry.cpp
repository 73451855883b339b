// SPDX-License-Identifier: Apache-2.0
// Plain C entry points of libgdn for who loads it at run time: the Python package runs the program
// in its own process.
#include <torch/version.h>

#include "gdn/cli/build_info.h"
#include "gdn/cli/cli.h"

extern "C" {

int gdn_main(int argc, char** argv) { return gdn::run_main(argc, argv); }

// What was built, e.g. "0.1.0".
const char* gdn_version() { return GDN_VERSION; }

// The torch this library was built with, e.g. "2.13.0"; only the same minor version can load it.
// The Python package reads the text behind the marker from the file, for a library of another torch
// may not load at all.
const char gdn_torch_marker[] = "gdn-built-with-torch:" TORCH_VERSION;
const char* gdn_torch_version() { return gdn_torch_marker + sizeof("gdn-built-with-torch:") - 1; }

}  // extern "C"
