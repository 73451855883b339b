// SPDX-License-Identifier: Apache-2.0
#include "gdn/train/allocator.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace gdn {

void keep_freed_memory() {
#ifdef __GLIBC__
  // glibc learns to keep blocks of up to 32 MiB by itself, but always maps larger ones anew: every
  // logits or activation tensor above that size would be faulted in and zeroed page by page in
  // every step. Without mappings and without trimming, the page faults of a run are those of its
  // largest step, once.
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, -1);
#endif
}

}  // namespace gdn
