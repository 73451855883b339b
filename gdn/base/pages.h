// SPDX-License-Identifier: Apache-2.0
// Large arrays on huge pages: rows of tokens lie kilobytes apart, and with pages of 4 KiB nearly
// each of them costs a page lookup.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace gdn {

inline constexpr size_t kHugePage = size_t{2} << 20;

// An allocator of uninitialised, 64-byte aligned memory. From 2 MiB on it begins with a huge page,
// and Linux is asked for such pages, as far as its settings allow (`madvise`, the usual one).
template <typename T>
struct PageAllocator {
  using value_type = T;
  PageAllocator() = default;
  template <typename U>
  explicit PageAllocator(const PageAllocator<U>&) {}

  static std::align_val_t alignment(size_t n) {
    return std::align_val_t{n * sizeof(T) >= kHugePage ? kHugePage : 64};
  }
  T* allocate(size_t n) {
    void* p = ::operator new(n * sizeof(T), alignment(n));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // Without huge pages it is slower, nothing else.
    if (n * sizeof(T) >= kHugePage)
      madvise(p, n * sizeof(T) / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
    return static_cast<T*>(p);
  }
  void deallocate(T* p, size_t n) { ::operator delete(p, alignment(n)); }

  friend bool operator==(const PageAllocator&, const PageAllocator&) { return true; }
};

template <typename T>
using PageVector = std::vector<T, PageAllocator<T>>;

}  // namespace gdn
