// SPDX-License-Identifier: Apache-2.0
// The program is gdn_main of libgdn. Two libraries read their settings before main or while they
// are loaded, so the program sets them, starts anew for the first and opens libgdn for the second:
// - glibc's malloc, which is to ask for huge pages: the rows of a long sequence lie pages apart.
// - libgomp, whose idle threads spin for milliseconds by default. Where another process wants the
//   core too, a training step then takes ten times as long.
// What the user has set stays.
#include <dlfcn.h>
#include <limits.h>
#ifdef __GLIBC__
#include <sys/auxv.h>
#endif
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

// Tens of microseconds: longer than the gap between two parallel loops, shorter than a time slice.
constexpr const char* kSpinCount = "10000";

void use_huge_pages([[maybe_unused]] char** argv) {
#ifdef __GLIBC__
  constexpr const char* kVariable = "GLIBC_TUNABLES";
  constexpr const char* kTunable = "glibc.malloc.hugetlb";
  // glibc takes the variable away from a program with privileges: it would start anew for ever.
  if (getauxval(AT_SECURE) != 0) return;
  const char* given = std::getenv(kVariable);
  if (given != nullptr && std::strstr(given, kTunable) != nullptr) return;
  const std::string before = given != nullptr && *given != '\0' ? std::string(given) + ":" : "";
  if (setenv(kVariable, (before + kTunable + "=1").c_str(), /*overwrite=*/1) != 0) return;
  // By its own name, which `ps` shows. Where that fails the program goes on without huge pages.
  char self[PATH_MAX];
  const ssize_t length = readlink("/proc/self/exe", self, sizeof(self) - 1);
  if (length <= 0) return;
  self[length] = '\0';
  execv(self, argv);
#endif
}

}  // namespace

int main(int argc, char** argv) {
  use_huge_pages(argv);
  if (std::getenv("OMP_WAIT_POLICY") == nullptr) {
    setenv("GOMP_SPINCOUNT", kSpinCount, /*overwrite=*/0);
  }
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
