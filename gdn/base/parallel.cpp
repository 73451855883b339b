// SPDX-License-Identifier: Apache-2.0
#include "gdn/base/parallel.h"

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <functional>
#include <mutex>
#include <numeric>
#include <thread>
#include <vector>

#include "gdn/base/check.h"
#include "hwy/cache_control.h"

namespace gdn {
namespace {

thread_local bool in_parallel_region = false;
bool forked = false;  // since the pool of threads was made

std::vector<int> find_cpus() {
  std::vector<int> cpus;
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
    }
  }
#endif
  if (cpus.empty()) {
    cpus.resize(std::max(1u, std::thread::hardware_concurrency()));
    std::iota(cpus.begin(), cpus.end(), 0);
  }
  return cpus;
}

const std::vector<int> cpus_at_start = find_cpus();

int default_num_threads() {
  if (const char* env = std::getenv("OMP_NUM_THREADS")) {
    const int n = std::atoi(env);
    if (n >= 1) return n;
  }
  return static_cast<int>(cpus_at_start.size());
}

std::atomic<int> builtin_threads{default_num_threads()};

// Waits until `ready`, but not much longer than it takes to wake a thread: a kernel that calls
// parallel_for again and again does not pay for its threads' sleep, and nothing spins when idle.
template <typename Ready>
void spin_until(Ready ready) {
  using Clock = std::chrono::steady_clock;
  constexpr auto kLongest = std::chrono::microseconds(50);
  const auto start = Clock::now();
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return;
      hwy::Pause();
    }
  } while (Clock::now() - start < kLongest);
}

// Threads that sleep between calls: waking them takes tens of microseconds, starting them ten times
// that, which a decoding step would feel. One call at a time has them; a second, from another
// thread, runs alone, and so do those of a forked process, which has the object without its
// threads. Never destroyed, or such a process would wait for them.
class Pool {
 public:
#ifdef __linux__
  Pool() {
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
  }
#endif

  // Runs `work` on this thread and on up to `helpers` others, and returns when all that have begun
  // are through: who wakes too late to find work is not waited for.
  void run(int64_t helpers, const std::function<void()>& work) {
    if (forked) return work();
    std::unique_lock busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) return work();
    {
      std::lock_guard lock(mutex_);
      while (static_cast<int64_t>(threads_.size()) < helpers) {
        const int64_t index = static_cast<int64_t>(threads_.size());
        threads_.emplace_back([this, index, seen = call_.load()] { loop(index, seen); });
      }
      work_ = &work;
      helpers_ = helpers;
      ++call_;
    }
    wake_.notify_all();
    work();
    {
      std::lock_guard lock(mutex_);
      helpers_ = 0;
    }
    if (helpers < static_cast<int64_t>(cpus_at_start.size()))
      spin_until([this] { return running_ == 0; });
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void loop(int64_t index, uint64_t seen) {
    std::unique_lock lock(mutex_);
    while (true) {
      if (threads_.size() < cpus_at_start.size()) {
        lock.unlock();
        spin_until([&] { return call_ != seen; });
        lock.lock();
      }
      wake_.wait(lock, [&] { return call_ != seen; });
      seen = call_;
      if (index >= helpers_) continue;
      const std::function<void()>& work = *work_;
      ++running_;
      lock.unlock();
      work();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  const std::function<void()>* work_ = nullptr;
  int64_t helpers_ = 0;
  // Read without the lock, too.
  std::atomic<int64_t> running_{0};
  std::atomic<uint64_t> call_{0};
};

void builtin_run(int64_t begin, int64_t end, int64_t grain, const RangeFn& fn) {
  static Pool& pool = *new Pool;
  const int64_t pieces_wanted = (end - begin + grain - 1) / grain;
  const int64_t threads = std::min<int64_t>(builtin_threads.load(), pieces_wanted);
  std::atomic<int64_t> next{begin};
  const int64_t step = std::max(grain, (end - begin) / (4 * threads));
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto work = [&] {
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
  pool.run(threads - 1, std::cref(work));
  if (error) std::rethrow_exception(error);
}

int builtin_num_threads() { return builtin_threads.load(); }

ParallelBackend backend{&builtin_run, &builtin_num_threads};

}  // namespace

void parallel_for_ranges(int64_t begin, int64_t end, int64_t grain, const RangeFn& fn) {
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

const std::vector<int>& allowed_cpus() { return cpus_at_start; }

void set_num_threads(int n) {
  GDN_CHECK(n >= 1, "[set_num_threads] the number of threads must be at least 1, got ", n);
  builtin_threads.store(n);
}

}  // namespace gdn
