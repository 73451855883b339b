// SPDX-License-Identifier: Apache-2.0
// The one way kernels use threads. Inside libgdn the backend is at::parallel_for, so
// torch.set_num_threads and OMP_NUM_THREADS rule; without torch it is a small pool of
// OMP_NUM_THREADS (default: all) threads.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace gdn {

using RangeFn = std::function<void(int64_t begin, int64_t end)>;

struct ParallelBackend {
  void (*run)(int64_t begin, int64_t end, int64_t grain, const RangeFn& fn);
  int (*num_threads)();
};

// Calls fn on disjoint ranges that cover [begin, end), each at least `grain` long but the last.
// Which thread gets which range is not fixed, so a kernel must give the same bits for every split.
// Exceptions reach the caller. A call from inside fn runs serially, unless fn has the whole range.
void parallel_for_ranges(int64_t begin, int64_t end, int64_t grain, const RangeFn& fn);
// By reference, so that a RangeFn of it takes no memory of its own.
template <typename Fn>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Fn& fn) {
  parallel_for_ranges(begin, end, grain, std::cref(fn));
}

// How many threads parallel_for may use (>= 1).
int num_threads();

// Replaces the backend; called once when libgdn is loaded.
void set_parallel_backend(ParallelBackend backend);

// The CPUs that this process could run on when the library was loaded: before any thread was
// pinned.
const std::vector<int>& allowed_cpus();

// Threads of the built-in backend; no effect on another backend. Takes n >= 1.
void set_num_threads(int n);

}  // namespace gdn
