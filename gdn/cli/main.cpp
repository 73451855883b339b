// SPDX-License-Identifier: Apache-2.0
// The program is gdn_main of libgdn. The library is opened here, not linked, because libgomp reads
// its settings while it is loaded: by default its idle threads spin for milliseconds, and where
// another process wants the core too a training step takes ten times as long. So does torch: with
// tensors on huge pages, long sequences, whose rows lie pages apart, go up to a tenth faster.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

namespace {

// Tens of microseconds: longer than the gap between two parallel loops, shorter than a time slice.
constexpr const char* kSpinCount = "10000";

}  // namespace

int main(int argc, char** argv) {
  if (std::getenv("OMP_WAIT_POLICY") == nullptr) {
    setenv("GOMP_SPINCOUNT", kSpinCount, /*overwrite=*/0);
  }
  setenv("THP_MEM_ALLOC_ENABLE", "1", /*overwrite=*/0);
  void* library = dlopen("libgdn.so", RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) {
    std::fprintf(stderr, "gdn: cannot load libgdn.so: %s\n", dlerror());
    return 1;
  }
  const auto run = reinterpret_cast<int (*)(int, char**)>(dlsym(library, "gdn_main"));
  if (run == nullptr) {
    std::fprintf(stderr, "gdn: libgdn.so has no gdn_main: %s\n", dlerror());
    return 1;
  }
  return run(argc, argv);
}
