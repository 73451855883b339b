// SPDX-License-Identifier: Apache-2.0
// libgdn from an installation: kernels run on torch's threads.
#include <ATen/Parallel.h>

#include <cstdio>

#include "gdn/base/parallel.h"

int main() {
  at::set_num_threads(2);
  std::printf("%d\n", gdn::num_threads());
  return gdn::num_threads() == 2 ? 0 : 1;
}
