// SPDX-License-Identifier: Apache-2.0
// Kernels in a process that may use one CPU only, and on more threads than there are CPUs.
#ifdef __linux__
#include <gtest/gtest.h>
#include <sched.h>

#include <chrono>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <iostream>
#include <string>
#include <thread>

#include "gdn/base/parallel.h"
#include "tests/kernels/delta_rule_problem.h"

namespace gdn::delta_rule_test {
namespace {

// A number for the bits of the chunk form, forward and backward, with heads for every thread and
// with one head that they share, and of a step.
std::string digest() {
  uint64_t hash = 14695981039346656037u;  // FNV-1a
  const auto add = [&](const Buffer& buffer) {
    for (const unsigned char byte : buffer.bytes()) hash = (hash ^ byte) * 1099511628211u;
  };
  Case c;
  c.dtype = DType::kF32;
  c.K = c.V = 48;
  for (const int64_t heads : {1, 4}) {
    c.H = c.HV = heads;
    c.lengths = {590, 9};
    Problem problem(c);
    const Results r = problem.chunk();
    for (const Buffer* x :
         {&r.o, &r.final_state, &r.dq, &r.dk, &r.dv, &r.dg, &r.dbeta, &r.d_initial}) {
      add(*x);
    }
    c.lengths.assign(40, 1);
    Problem tokens(c);
    Buffer o = Buffer::poisoned(c.dtype, tokens.value_size());
    delta_rule_step(tokens.params, {tokens.initial.data(), 40}, o.data());
    add(o);
    add(tokens.initial);
  }
  return str_cat("digest ", hash);
}

int threads_of_process() {
  int count = 0;
  for ([[maybe_unused]] const auto& task : std::filesystem::directory_iterator("/proc/self/task"))
    ++count;
  return count;
}

// The time that the process computes while this thread sleeps, as a share of it.
double share_of_cpu_when_idle() {
  using Clock = std::chrono::steady_clock;
  const std::clock_t cpu = std::clock();
  const auto start = Clock::now();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  const std::chrono::duration<double> wall = Clock::now() - start;
  return static_cast<double>(std::clock() - cpu) / CLOCKS_PER_SEC / wall.count();
}

// In a process of its own, which ends with 0 if all is well, and with the digest on stderr.
[[noreturn]] void run_on_one_cpu() {
  const auto require = [](bool holds, const char* what) {
    if (holds) return;
    std::cerr << "not so: " << what << "\n";
    std::exit(1);
  };
  require(allowed_cpus().size() == 1, "one CPU is allowed");
  require(num_threads() == 1, "that is one thread");
  const std::string one = digest();
  require(threads_of_process() == 1, "no thread was started");
  set_num_threads(4);
  require(digest() == one, "four threads give the same bits");
  require(threads_of_process() == 4, "when asked for, there are four threads");
  require(share_of_cpu_when_idle() < 0.1, "they sleep without work");
  std::cerr << one << "\n";
  std::exit(0);
}

TEST(OneCpu, KernelsRunOnOneThreadWithTheSameBits) {
  testing::GTEST_FLAG(death_test_style) = "threadsafe";  // a new process, which inherits the mask
  const int before = num_threads();
  set_num_threads(1);  // the new process comes by here, and shall have started no thread
  const std::string expected = digest();
  set_num_threads(before);

  const char* env = std::getenv("OMP_NUM_THREADS");
  const std::string omp_threads = env != nullptr ? env : "";
  unsetenv("OMP_NUM_THREADS");
  cpu_set_t all, one;
  ASSERT_EQ(sched_getaffinity(0, sizeof(all), &all), 0);
  CPU_ZERO(&one);
  CPU_SET(allowed_cpus()[0], &one);
  ASSERT_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
  EXPECT_EXIT(run_on_one_cpu(), testing::ExitedWithCode(0), expected);
  sched_setaffinity(0, sizeof(all), &all);
  if (!omp_threads.empty()) setenv("OMP_NUM_THREADS", omp_threads.c_str(), 1);
}

TEST(OneCpu, MoreThreadsThanCpusGiveTheSameBits) {
  const int before = num_threads();
  set_num_threads(1);
  const std::string one = digest();
  set_num_threads(2 * static_cast<int>(allowed_cpus().size()) + 1);
  EXPECT_EQ(digest(), one);
  set_num_threads(before);
}

}  // namespace
}  // namespace gdn::delta_rule_test
#endif
