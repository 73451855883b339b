// SPDX-License-Identifier: Apache-2.0
// Mamba's selective scan and RWKV-4's wkv on one thread of this machine, fp32. Counters: 1e9
// exponentials per second that the recurrence cannot avoid in its forward pass (one per state, two
// per channel of wkv; backward's own are not counted), their share of the machine's measured rate,
// and nanoseconds per token.
//
//   build/bench/bench_scan
#include <benchmark/benchmark.h>

#include <cmath>
#include <vector>

#include "gdn/base/parallel.h"
#include "gdn/base/rng.h"
#include "gdn/bench/ceilings.h"
#include "gdn/mixers/mamba/kernel.h"
#include "gdn/mixers/rwkv4/kernel.h"

namespace gdn {
namespace {

constexpr int64_t kTokens = 16384;  // per call, whatever the length of a sequence

std::vector<float> normal(int64_t n, double scale, double mean = 0) {
  Rng rng(1);
  std::vector<float> v(n);
  for (float& e : v) e = static_cast<float>(mean + scale * rng.normal());
  return v;
}

void report(benchmark::State& state, double exponentials) {
  static const double peak = bench::exp_grate(/*threads=*/1);
  const double calls = static_cast<double>(state.iterations());
  using benchmark::Counter;
  const double rate = 1e-9 * exponentials * calls;
  state.counters["gexp/s"] = Counter(rate, Counter::kIsRate);
  state.counters["of_peak"] = Counter(rate / peak, Counter::kIsRate);
  state.counters["s/token"] =
      Counter(static_cast<double>(kTokens) * calls, Counter::kIsRate | Counter::kInvert);
}

// Argument 0: length of a sequence; 1: with the backward pass.
void selective_scan(benchmark::State& state) {
  set_num_threads(1);
  const int64_t C = 1536, S = 16, T = state.range(0);
  const auto x = normal(kTokens * C, 1), dt = normal(kTokens * C, 0.5, -3);
  const auto B = normal(kTokens * S, 1), Cs = normal(kTokens * S, 1), D = normal(C, 1);
  std::vector<float> A(C * S), y(x.size()), dx(x.size()), ddt(x.size()), dA(A.size());
  std::vector<float> dB(B.size()), dC(B.size()), dD(C);
  for (int64_t i = 0; i < C * S; ++i) A[i] = -static_cast<float>(i % S + 1);
  SelectiveScanParams p;
  p.num_sequences = kTokens / T;
  p.total_tokens = kTokens;
  p.channels = C;
  p.states = S;
  p.x = x.data();
  p.dt = dt.data();
  p.A = A.data();
  p.B = B.data();
  p.C = Cs.data();
  p.D = D.data();
  const bool backward = state.range(1) != 0;
  std::vector<float> saved(backward ? selective_scan_chunks(p) * S * C : 0);
  const SelectiveScanGrads grads = {y.data(),  nullptr,   dx.data(), ddt.data(), dA.data(),
                                    dB.data(), dC.data(), dD.data(), nullptr,    nullptr};
  for (auto _ : state) {
    selective_scan_forward(p, y.data(), nullptr, backward ? saved.data() : nullptr);
    if (backward) selective_scan_backward(p, saved.data(), grads);
  }
  report(state, static_cast<double>(kTokens * C * S));
}

void wkv(benchmark::State& state) {
  set_num_threads(1);
  const int64_t C = 768, T = state.range(0);
  const auto k = normal(kTokens * C, 1), v = normal(kTokens * C, 1), u = normal(C, 1);
  std::vector<float> w(C), y(k.size()), dk(k.size()), dv(k.size()), dw(C), du(C);
  for (int64_t c = 0; c < C; ++c) w[c] = -std::exp(-5.0f + 8.0f * c / C);
  WkvParams p;
  p.num_sequences = kTokens / T;
  p.total_tokens = kTokens;
  p.channels = C;
  p.w = w.data();
  p.u = u.data();
  p.k = k.data();
  p.v = v.data();
  const bool backward = state.range(1) != 0;
  std::vector<float> saved(backward ? wkv_chunks(p) * 3 * C : 0);
  const WkvGrads grads = {y.data(), nullptr, dw.data(), du.data(), dk.data(), dv.data(), nullptr};
  for (auto _ : state) {
    wkv_forward(p, y.data(), nullptr, backward ? saved.data() : nullptr);
    if (backward) wkv_backward(p, saved.data(), grads);
  }
  report(state, static_cast<double>(kTokens * C * 2));
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"T", "backward"})->Unit(benchmark::kMillisecond)->MinTime(0.3);
  for (const int64_t backward : {0, 1})
    for (const int64_t T : {512, 16384}) b->Args({T, backward});
}

BENCHMARK(selective_scan)->Apply(shapes);
BENCHMARK(wkv)->Apply(shapes);

}  // namespace
}  // namespace gdn

BENCHMARK_MAIN();
