// SPDX-License-Identifier: Apache-2.0
// The delta-rule engine on this machine. Counters: GFLOP/s of the multiply-adds that the chunk form
// cannot avoid (2 each; recomputed states are not counted), and their share of the measured FMA
// peak.
//
//   OMP_NUM_THREADS=1 build/bench/bench_delta_rule --benchmark_filter=...
#include <benchmark/benchmark.h>

#include <cmath>
#include <string>
#include <vector>

#include "bench/fma_peak.h"
#include "gdn/base/parallel.h"
#include "gdn/base/rng.h"
#include "gdn/kernels/delta_rule/delta_rule.h"

namespace gdn {
namespace {

struct Shape {
  int64_t B, T, H, HV, K, V;
  DeltaGate gate = DeltaGate::kScalar;
  DeltaErase erase = DeltaErase::kKey;
  int chunk_size = 0;
};

// Sizes, random inputs and outputs in fp32.
struct Problem {
  explicit Problem(const Shape& s) {
    Rng rng(1);
    const auto normal = [&](int64_t n, double scale) {
      std::vector<float> v(n);
      for (float& e : v) e = static_cast<float>(scale * rng.normal());
      return v;
    };
    const int64_t tokens = s.B * s.T, keys = tokens * s.H * s.K;
    const double unit = 1.0 / std::sqrt(static_cast<double>(s.K));
    q = normal(keys, unit);
    k = normal(keys, unit);
    a = normal(keys, unit);
    p = normal(keys, unit);
    v = normal(tokens * s.HV * s.V, 1.0);
    d_o = v;
    g = normal(tokens * s.HV * (s.gate == DeltaGate::kChannel ? s.K : 1), 0.1);
    for (float& e : g) e = -std::abs(e);
    beta.assign(tokens * s.HV, 0.5f);
    x.num_sequences = s.B;
    x.total_tokens = tokens;
    x.H = s.H;
    x.HV = s.HV;
    x.K = s.K;
    x.V = s.V;
    x.gate = s.gate;
    x.erase = s.erase;
    x.scale = unit;
    x.chunk_size = s.chunk_size;
    x.q = q.data();
    x.k = k.data();
    x.v = v.data();
    x.a = a.data();
    x.p = p.data();
    x.g = g.data();
    if (s.erase != DeltaErase::kSeparate) x.beta = beta.data();
    o.resize(v.size());
    saved.resize(delta_rule_saved_size(x));
    dq.resize(keys);
    dk.resize(keys);
    da.resize(keys);
    dp.resize(keys);
    dv.resize(v.size());
    dg.resize(g.size());
    dbeta.resize(beta.size());
    grads.d_o = d_o.data();
    grads.dq = dq.data();
    grads.dk = dk.data();
    grads.dv = dv.data();
    grads.da = da.data();
    grads.dp = dp.data();
    grads.dg = dg.data();
    grads.dbeta = dbeta.data();
    // Rows that read (erase, query) and keys that write per token; a triangle of C x C counts as
    // half.
    const double C = s.chunk_size != 0 ? s.chunk_size : s.K <= 64 && s.V <= 64 ? 16 : 32;
    const double heads = static_cast<double>(tokens * s.HV);
    const double R = s.erase == DeltaErase::kNone ? 1 : 2,
                 W = s.erase == DeltaErase::kSeparate ? 2 : 1;
    const double state = 2.0 * s.K * s.V, key = C * s.K, value = C * s.V;
    forward_flops = heads * ((R + W) * state + R * W * (key + value));
    backward_flops = heads * (2 * (R + W) * state + R * W * (3 * key + 2 * value));
  }
  std::vector<float> q, k, v, a, p, g, beta, o, saved, d_o, dq, dk, dv, da, dp, dg, dbeta;
  DeltaRuleParams x;
  DeltaRuleGrads grads;
  double forward_flops, backward_flops;
};

void report(benchmark::State& state, double flops) {
  state.counters["GFLOP/s"] =
      benchmark::Counter(flops * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["peak"] = benchmark::Counter(flops * 1e-9 / bench::fma_peak_gflops(num_threads()),
                                              benchmark::Counter::kIsIterationInvariantRate);
}

void forward(benchmark::State& state, Shape shape) {
  Problem problem(shape);
  for (auto _ : state) delta_rule_chunk_forward(problem.x, {problem.o.data(), nullptr, nullptr});
  report(state, problem.forward_flops);
}

void forward_backward(benchmark::State& state, Shape shape) {
  Problem problem(shape);
  for (auto _ : state) {
    delta_rule_chunk_forward(problem.x, {problem.o.data(), nullptr, problem.saved.data()});
    delta_rule_chunk_backward(problem.x, problem.saved.data(), problem.grads);
  }
  report(state, problem.forward_flops + problem.backward_flops);
}

void recurrent(benchmark::State& state, Shape shape) {
  Problem problem(shape);
  for (auto _ : state)
    delta_rule_recurrent_forward(problem.x, {problem.o.data(), nullptr, nullptr});
  report(state, problem.forward_flops);
}

void step(benchmark::State& state, Shape shape) {
  Problem problem(shape);
  const int64_t size = shape.B * shape.HV * shape.K * shape.V;
  std::vector<float> pool(size, 0.01f);
  for (auto _ : state) delta_rule_step(problem.x, {pool.data(), shape.B}, problem.o.data());
  state.counters["GB/s"] = benchmark::Counter(2.0 * size * sizeof(float) * 1e-9,
                                              benchmark::Counter::kIsIterationInvariantRate);
}

void fma_peak(benchmark::State& state) {
  double peak = 0.0;
  for (auto _ : state) peak = bench::measure_fma_peak(num_threads());
  state.counters["GFLOP/s"] = peak;
}

void add(const std::string& name, void (*run)(benchmark::State&, Shape), Shape shape) {
  benchmark::RegisterBenchmark(name.c_str(), run, shape)
      ->Unit(benchmark::kMicrosecond)
      ->UseRealTime();
}

void add_all() {
  benchmark::RegisterBenchmark("fma_peak", fma_peak)->Iterations(1);
  const std::pair<const char*, Shape> shapes[] = {
      {"B1_T512_H16_K128_V128", {1, 512, 16, 16, 128, 128}},
      {"B1_T4096_H16_K128_V128", {1, 4096, 16, 16, 128, 128}},
      {"B1_T512_H16_HV32_K128_V128", {1, 512, 16, 32, 128, 128}},
      {"B32_T256_H4_K64_V64", {32, 256, 4, 4, 64, 64}},
      {"B64_T128_H4_K32_V32", {64, 128, 4, 4, 32, 32}}};
  for (const auto& [name, shape] : shapes) {
    add(std::string("forward/") + name, forward, shape);
    add(std::string("forward_backward/") + name, forward_backward, shape);
  }
  for (const int chunk : {16, 32, 64}) {
    for (const auto& [name, base] : {shapes[0], shapes[3], shapes[4]}) {
      Shape shape = base;
      shape.chunk_size = chunk;
      const std::string suffix = "chunk" + std::to_string(chunk) + "_" + name;
      add("forward/" + suffix, forward, shape);
      add("forward_backward/" + suffix, forward_backward, shape);
    }
  }
  const char* gates[] = {"none", "scalar", "channel"};
  const char* erases[] = {"none", "key", "own", "separate"};
  for (int gate = 0; gate < 3; ++gate) {
    for (int erase = 0; erase < 4; ++erase) {
      Shape shape = shapes[0].second;
      shape.gate = static_cast<DeltaGate>(gate);
      shape.erase = static_cast<DeltaErase>(erase);
      const std::string name = std::string("gate_") + gates[gate] + "_erase_" + erases[erase];
      add("forward/" + name, forward, shape);
      add("forward_backward/" + name, forward_backward, shape);
    }
  }
  add("recurrent/B1_T16_H16_K128_V128", recurrent, {1, 16, 16, 16, 128, 128});
  add("recurrent/B1_T512_H16_K128_V128", recurrent, {1, 512, 16, 16, 128, 128});
  add("step/B1_H16_K128_V128", step, {1, 1, 16, 16, 128, 128});
  add("step/B16_H16_K128_V128", step, {16, 1, 16, 16, 128, 128});
  add("step/B16_H32_K128_V128", step, {16, 1, 32, 32, 128, 128});
  add("step/B8_H4_K64_V64", step, {8, 1, 4, 4, 64, 64});
}

}  // namespace
}  // namespace gdn

int main(int argc, char** argv) {
  gdn::add_all();
  benchmark::Initialize(&argc, argv);
  benchmark::AddCustomContext("threads", std::to_string(gdn::num_threads()));
  benchmark::RunSpecifiedBenchmarks();
}
