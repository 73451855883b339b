// SPDX-License-Identifier: Apache-2.0
#include "gdn/bench/ceilings.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <thread>
#include <tuple>

#include "gdn/kernels/simd/pairs.h"
#include "gdn/kernels/simd/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gdn/bench/ceilings.cpp"
// clang-format off
#include "hwy/foreach_target.h"  // must precede highway.h
// clang-format on
#include "gdn/kernels/simd-inl.h"
#include "gdn/kernels/simd/activations-inl.h"
#include "gdn/kernels/simd/gemm-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

// Each does its work `rounds` times and returns how much that was: operations or bytes.

double fma_work(int64_t rounds, float* sink) {
  // Enough sums to hide the latency on two ports; with 16 registers, two hold the factors.
  constexpr int kSums = HWY_TARGET <= HWY_AVX3 ? 16 : 12;
  const hn::ScalableTag<float> d;
  const auto x = hn::Set(d, 1.0f + *sink), y = hn::Set(d, 1e-9f + *sink);
  hn::Vec<decltype(d)> sum[kSums];
  for (int i = 0; i < kSums; ++i) sum[i] = hn::Set(d, static_cast<float>(i));
  for (int64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < kSums; ++i) sum[i] = hn::MulAdd(sum[i], x, y);
  }
  float total = 0.0f;
  for (int i = 0; i < kSums; ++i) total += hn::GetLane(sum[i]);
  *sink = total > 1e30f ? 1.0f : 0.0f;
  return 2.0 * kSums * static_cast<double>(rounds) * static_cast<double>(hn::Lanes(d));
}

double exp_work(int64_t rounds, float* data, int64_t n) {
  for (int64_t r = 0; r < rounds; ++r) {
    for_lanes<float>(n, [&](auto d, int64_t i) HWY_ATTR {
      // In place, so that no round can be left out; x <- exp(-|x|) stays within (0, 1].
      hn::StoreU(exp_of(d, hn::Neg(hn::Abs(hn::LoadU(d, data + i)))), d, data + i);
    });
  }
  return static_cast<double>(rounds * n);
}

double gemm_work(int64_t rounds, int64_t m, int64_t n, int64_t k, int64_t batch, float* data) {
  const int64_t size = m * k + k * n + m * n;
  for (int64_t r = 0; r < rounds; ++r) {
    for (int64_t b = 0; b < batch; ++b) {
      float* a = data + b * size;
      gemm<Into::kAdd, false>(m, n, k, a, k, a + m * k, n, a + m * k + k * n, n);
    }
  }
  return 2.0 * static_cast<double>(rounds * batch * m * n * k);
}

double read_work(int64_t rounds, float* data, int64_t n) {
  float total = 0;
  for (int64_t r = 0; r < rounds; ++r) {
    total +=
        sum_lanes<float>(n, [&](auto d, int64_t i) HWY_ATTR { return hn::LoadU(d, data + i); });
  }
  data[0] = total > 1e30f ? 1.0f : 0.0f;
  return 4.0 * static_cast<double>(rounds * n);
}

double rmw_work(int64_t rounds, float* data, int64_t n) {
  for (int64_t r = 0; r < rounds; ++r) {
    for_lanes<float>(n, [&](auto d, int64_t i) HWY_ATTR {
      hn::StoreU(hn::MulAdd(hn::LoadU(d, data + i), hn::Set(d, 0.5f), hn::Set(d, 1.0f)), d,
                 data + i);
    });
  }
  return 8.0 * static_cast<double>(rounds * n);
}

double copy_work(int64_t rounds, float* data, int64_t n) {
  const int64_t half = n / 2;
  for (int64_t r = 0; r < rounds; ++r) {
    for_lanes<float>(half, [&](auto d, int64_t i) HWY_ATTR {
      hn::StoreU(hn::Add(hn::LoadU(d, data + i), hn::Set(d, 1.0f)), d, data + half + i);
    });
  }
  return 8.0 * static_cast<double>(rounds * half);
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <sched.h>

#include <fstream>

#include "gdn/base/pages.h"
#include "gdn/base/parallel.h"

#if HWY_ARCH_X86 && defined(__GNUC__)
#include <immintrin.h>
#define GDN_BENCH_X86 1
#else
#define GDN_BENCH_X86 0
#endif

namespace gdn::bench {
namespace {

HWY_EXPORT(fma_work);
HWY_EXPORT(exp_work);
HWY_EXPORT(gemm_work);
HWY_EXPORT(read_work);
HWY_EXPORT(rmw_work);
HWY_EXPORT(copy_work);

using Clock = std::chrono::steady_clock;
using Buffer = PageVector<float>;

Buffer make_buffer(int64_t n) { return Buffer(static_cast<size_t>(n), 0.5f); }

// Work per second of all threads together: the best of several runs. `work(rounds)` is called in
// each thread with the function that `make()` gave it there, so that a thread touches its own
// memory first.
using Work = std::function<double(int64_t rounds)>;
double best_rate(int threads, const std::function<Work()>& make) {
  constexpr int kRuns = 7;
  constexpr double kSecondsPerRun = 0.015;
  std::vector<double> rates(static_cast<size_t>(threads) * kRuns);
  std::atomic<int> arrived{0};
  const auto thread = [&](int i) {
    pin_this_thread(i);
    const Work work = make();
    int64_t rounds = 1;
    for (double seconds = 0; seconds < kSecondsPerRun / 2;) {  // also warms up
      const auto start = Clock::now();
      work(rounds);
      seconds = std::chrono::duration<double>(Clock::now() - start).count();
      if (seconds < kSecondsPerRun / 2) {
        const double more = seconds > 1e-6 ? kSecondsPerRun / seconds : 1000;
        rounds = std::max<int64_t>(
            rounds + 1, static_cast<int64_t>(static_cast<double>(rounds) * std::min(more, 1000.0)));
      }
    }
    for (int run = 0; run < kRuns; ++run) {
      arrived.fetch_add(1);
      while (arrived.load() < (run + 1) * threads) std::this_thread::yield();
      const auto start = Clock::now();
      const double done = work(rounds);
      rates[static_cast<size_t>(run * threads + i)] =
          done / std::chrono::duration<double>(Clock::now() - start).count();
    }
  };
  std::vector<std::thread> pool;
  for (int i = 0; i < threads; ++i) pool.emplace_back(thread, i);
  for (auto& t : pool) t.join();
  double best = 0;
  for (int run = 0; run < kRuns; ++run) {
    double total = 0;
    for (int i = 0; i < threads; ++i) total += rates[static_cast<size_t>(run * threads + i)];
    best = std::max(best, total);
  }
  return best;
}

template <typename FmaFunction>
double fma_rate(int threads, FmaFunction* function) {
  return 1e-9 * best_rate(threads, [&] {
           return [function](int64_t rounds) {
             float sink = 0;
             return function(rounds * 1000, &sink);
           };
         });
}

#if GDN_BENCH_X86
__attribute__((target("avx512f,avx512bf16"))) double bf16_work(int64_t rounds) {
  constexpr int kSums = 16;
  __m512 sum[kSums];
  for (auto& s : sum) s = _mm512_setzero_ps();
  const __m512bh x = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1e-3f), _mm512_set1_ps(1e-3f));
  for (int64_t r = 0; r < rounds; ++r) {
    for (auto& s : sum) {
      s = _mm512_dpbf16_ps(s, x, x);
      // Keeps the compiler from merging equal sums.
      asm volatile("" : "+v"(s));
    }
  }
  return 4.0 * 16 * kSums * static_cast<double>(rounds);
}

// Eight times the instructions `a 0 b`, with the number of a register in place of 0: they depend on
// themselves of the round before, if on anything. Register 15 holds ones.
#define GDN_EIGHT(a, b) a "0" b a "1" b a "2" b a "3" b a "4" b a "5" b a "6" b a "7" b
#define GDN_UNIT(name, a, b)                                                                     \
  {                                                                                              \
    name, [](int64_t rounds) {                                                                   \
      alignas(64) float ones[16];                                                                \
      std::fill(ones, ones + 16, 1.0f);                                                          \
      for (int64_t r = 0; r < rounds; ++r) {                                                     \
        asm volatile("vmovaps (%0), %%zmm15\n" GDN_EIGHT(a, b) GDN_EIGHT(a, b) GDN_EIGHT(a, b)   \
                         GDN_EIGHT(a, b)::"r"(ones)                                              \
                     : "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", \
                       "xmm14", "xmm15");                                                        \
      }                                                                                          \
      return 32.0 * static_cast<double>(rounds);                                                 \
    }                                                                                            \
  }
#define GDN_FMA "vfmadd213ps %%zmm15, %%zmm15, %%zmm"
#define GDN_ADD "vaddps %%zmm15, %%zmm15, %%zmm14\n"
#define GDN_ROUND "vcvtne2ps2bf16 %%zmm15, %%zmm15, %%zmm"
using UnitWork = double (*)(int64_t rounds);
const std::pair<const char*, UnitWork> kUnits[] = {
    GDN_UNIT("multiply-add", GDN_FMA, "\n"),
    GDN_UNIT("addition", "vaddps %%zmm15, %%zmm15, %%zmm", "\n"),
    GDN_UNIT("multiply-add and addition", GDN_ADD GDN_FMA, "\n"),
    GDN_UNIT("addition and maximum", GDN_ADD "vmaxps %%zmm15, %%zmm15, %%zmm", "\n"),
    GDN_UNIT("addition and shift", GDN_ADD "vpslld $16, %%zmm15, %%zmm", "\n"),
    GDN_UNIT("logic", "vpandd %%zmm15, %%zmm15, %%zmm", "\n"),
    GDN_UNIT("permutation", "vpermps %%zmm15, %%zmm15, %%zmm", "\n"),
    GDN_UNIT("division", "vdivps %%zmm15, %%zmm15, %%zmm", "\n"),
    GDN_UNIT("division and eight multiply-adds",
             "vdivps %%zmm15, %%zmm15, %%zmm14\n" GDN_EIGHT(GDN_FMA, "\n") "# ", "\n"),
    GDN_UNIT("rounding of 32 to bf16", GDN_ROUND, "\n"),
    GDN_UNIT("rounding of 32 to bf16 and addition", GDN_ADD GDN_ROUND, "\n"),
    GDN_UNIT("rounding of 32 to bf16 and multiply-add",
             "vcvtne2ps2bf16 %%zmm15, %%zmm15, %%zmm14\n" GDN_FMA, "\n"),
    GDN_UNIT("load", "vmovaps (%0), %%zmm", "\n"),
    GDN_UNIT("store", "vmovaps %%zmm15, (%0) # ", "\n"),
};
#undef GDN_ROUND
#undef GDN_ADD
#undef GDN_FMA
#undef GDN_UNIT
#undef GDN_EIGHT

__attribute__((target("amx-tile,amx-bf16"))) double amx_work(const PairKernels& amx,
                                                             int64_t rounds) {
  amx.begin();
  alignas(64) static const uint16_t zeros[16 * 32] = {};
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, zeros, 64);
  _tile_loadd(5, zeros, 64);
  _tile_loadd(6, zeros, 64);
  _tile_loadd(7, zeros, 64);
  for (int64_t r = 0; r < rounds; ++r) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  amx.end();
  return 4.0 * 2 * 16 * 16 * 32 * static_cast<double>(rounds);
}
#endif  // GDN_BENCH_X86

template <typename Measure>
double once(const std::string& key, const Measure& measure) {
  static std::map<std::string, double> known;
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  return known[key] = measure();
}

}  // namespace

void pin_this_thread(int i) {
  const std::vector<int>& cpus = allowed_cpus();
  cpu_set_t set;
  CPU_ZERO(&set);
  if (static_cast<size_t>(i) < cpus.size()) {
    CPU_SET(cpus[static_cast<size_t>(i)], &set);
  } else {
    for (const int cpu : cpus) CPU_SET(cpu, &set);
  }
  sched_setaffinity(0, sizeof(set), &set);
}

double fma_gflops(int threads) { return fma_rate(threads, HWY_DYNAMIC_DISPATCH(fma_work)); }

std::optional<double> avx2_fma_gflops(int threads) {
#if HWY_ARCH_X86 && (HWY_TARGETS & HWY_AVX2)
  if ((hwy::SupportedTargets() & HWY_AVX2) != 0) return fma_rate(threads, &N_AVX2::fma_work);
#endif
  static_cast<void>(threads);
  return std::nullopt;
}

std::optional<double> bf16_gflops(int threads) {
#if GDN_BENCH_X86
  if (find_pair_kernels("avx512") != nullptr) {
    return 1e-9 * best_rate(threads,
                            [] { return [](int64_t rounds) { return bf16_work(rounds * 1000); }; });
  }
#endif
  static_cast<void>(threads);
  return std::nullopt;
}

std::optional<double> amx_gflops(int threads) {
#if GDN_BENCH_X86
  if (const PairKernels* amx = find_pair_kernels("amx")) {
    return 1e-9 * best_rate(threads, [amx] {
             return [amx](int64_t rounds) { return amx_work(*amx, rounds * 1000); };
           });
  }
#endif
  static_cast<void>(threads);
  return std::nullopt;
}

std::vector<std::pair<std::string, double>> unit_rates(int threads) {
  std::vector<std::pair<std::string, double>> rates;
#if GDN_BENCH_X86
  if (find_pair_kernels("avx512") == nullptr) return rates;
  for (const auto& [name, work] : kUnits) {
    const UnitWork run = work;
    rates.emplace_back(name, 1e-9 * best_rate(threads, [run] {
                               return [run](int64_t rounds) { return run(rounds * 100); };
                             }));
  }
#endif
  static_cast<void>(threads);
  return rates;
}

double small_gemm_gflops(int threads, int64_t m, int64_t n, int64_t k, int64_t batch) {
  return 1e-9 * best_rate(threads, [=] {
           const auto data = std::make_shared<Buffer>(make_buffer(batch * (m * k + k * n + m * n)));
           return [=](int64_t rounds) {
             // Small factors keep the growing sums finite.
             const int64_t inputs = m * k;
             std::fill(data->data(), data->data() + inputs, 1e-6f);
             return HWY_DYNAMIC_DISPATCH(gemm_work)(rounds, m, n, k, batch, data->data());
           };
         });
}

double exp_grate(int threads) {
  constexpr int64_t kCount = 2048;
  return 1e-9 * best_rate(threads, [] {
           const auto data = std::make_shared<Buffer>(make_buffer(kCount));
           return [=](int64_t rounds) {
             return HWY_DYNAMIC_DISPATCH(exp_work)(rounds, data->data(), kCount);
           };
         });
}

double bandwidth_gbs(int threads, Access access, int64_t bytes) {
  const int64_t n = std::max<int64_t>(64, bytes / threads / static_cast<int64_t>(sizeof(float)));
  const auto work = access == Access::kRead              ? HWY_DYNAMIC_DISPATCH(read_work)
                    : access == Access::kReadModifyWrite ? HWY_DYNAMIC_DISPATCH(rmw_work)
                                                         : HWY_DYNAMIC_DISPATCH(copy_work);
  return 1e-9 * best_rate(threads, [=] {
           const auto data = std::make_shared<Buffer>(make_buffer(n));
           return [=](int64_t rounds) { return work(rounds, data->data(), n); };
         });
}

double Ceilings::fma() {
  return once("fma" + std::to_string(threads_), [this] { return fma_gflops(threads_); });
}

double Ceilings::products(bool bf16) {
  if (!bf16) return fma();
  return once("bf16" + std::to_string(threads_), [this] {
    if (const auto amx = amx_gflops(threads_)) return *amx;
    const auto avx512 = bf16_gflops(threads_);
    return avx512 ? *avx512 : fma();
  });
}

double Ceilings::exp() {
  return once("exp" + std::to_string(threads_), [this] { return exp_grate(threads_); });
}

double Ceilings::rate(Access access, int64_t bytes) {
  // To two significant bits: neighbouring sizes share a measurement.
  int64_t size = 4096;
  while (size * 5 / 4 < bytes) size = size * 3 / 2;
  const std::string key = std::to_string(static_cast<int>(access)) + "/" +
                          std::to_string(threads_) + "/" + std::to_string(size);
  return once(key, [&] { return bandwidth_gbs(threads_, access, size); });
}

double Ceilings::memory_seconds(int64_t read_bytes, int64_t written_bytes) {
  const int64_t all = read_bytes + written_bytes, both = 2 * std::min(read_bytes, written_bytes);
  double seconds = 0;
  if (both > 0) seconds += 1e-9 * static_cast<double>(both) / rate(Access::kCopy, all);
  if (all > both) seconds += 1e-9 * static_cast<double>(all - both) / rate(Access::kRead, all);
  return seconds;
}

double Ceilings::step_seconds(int64_t weight_bytes, int64_t state_bytes) {
  const int64_t all = weight_bytes + state_bytes;
  return 1e-9 * static_cast<double>(weight_bytes) / rate(Access::kRead, all) +
         2e-9 * static_cast<double>(state_bytes) / rate(Access::kReadModifyWrite, all);
}

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "unknown CPU";
}

}  // namespace gdn::bench
#endif  // HWY_ONCE
