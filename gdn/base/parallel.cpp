// SPDX-License-Identifier: Apache-2.0
#include "gdn/base/parallel.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "gdn/base/check.h"

namespace gdn {
namespace {

thread_local bool in_parallel_region = false;

int default_num_threads() {
  if (const char* env = std::getenv("OMP_NUM_THREADS")) {
    const int n = std::atoi(env);
    if (n >= 1) return n;
  }
  return std::max(1u, std::thread::hardware_concurrency());
}

std::atomic<int> builtin_threads{default_num_threads()};

// Threads start per call: this backend serves programs without torch and tests, where the simplest
// code that is right counts for more than the few microseconds of a start.
void builtin_run(int64_t begin, int64_t end, int64_t grain, const RangeFn& fn) {
  const int64_t pieces_wanted = (end - begin + grain - 1) / grain;
  const int64_t threads = std::min<int64_t>(builtin_threads.load(), pieces_wanted);
  std::atomic<int64_t> next{begin};
  const int64_t step = std::max(grain, (end - begin) / (4 * threads));
  std::exception_ptr error;
  std::mutex error_mutex;
  auto work = [&] {
    in_parallel_region = true;
    try {
      for (int64_t b = next.fetch_add(step); b < end; b = next.fetch_add(step)) {
        fn(b, std::min(end, b + step));
      }
    } catch (...) {
      std::lock_guard lock(error_mutex);
      if (!error) error = std::current_exception();
      next.store(end);
    }
    in_parallel_region = false;
  };
  std::vector<std::thread> pool;
  for (int64_t i = 1; i < threads; ++i) pool.emplace_back(work);
  work();
  for (auto& t : pool) t.join();
  if (error) std::rethrow_exception(error);
}

int builtin_num_threads() { return builtin_threads.load(); }

ParallelBackend backend{&builtin_run, &builtin_num_threads};

}  // namespace

void parallel_for(int64_t begin, int64_t end, int64_t grain, const RangeFn& fn) {
  if (begin >= end) return;
  grain = std::max<int64_t>(grain, 1);
  if (in_parallel_region || end - begin <= grain || backend.num_threads() == 1) {
    fn(begin, end);
    return;
  }
  backend.run(begin, end, grain, fn);
}

int num_threads() { return backend.num_threads(); }

void set_parallel_backend(ParallelBackend b) { backend = b; }

void set_num_threads(int n) {
  GDN_CHECK(n >= 1, "[set_num_threads] the number of threads must be at least 1, got ", n);
  builtin_threads.store(n);
}

}  // namespace gdn
