// SPDX-License-Identifier: Apache-2.0
// The delta-rule engine on this machine. Counters: GFLOP/s of the multiply-adds that the chunk form
// cannot avoid (2 each; recomputed states are not counted), and their share of the measured FMA
// peak.
//
//   OMP_NUM_THREADS=1 build/bench/bench_delta_rule --benchmark_filter=...
//   OMP_NUM_THREADS=2 build/bench/bench_delta_rule --table[=GROUP] [--json=FILE]     rows with
//   goals
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "bench/delta_rule_problem.h"
#include "bench/delta_rule_table.h"
#include "gdn/base/check.h"
#include "gdn/base/pages.h"
#include "gdn/base/parallel.h"
#include "gdn/bench/ceilings.h"
#include "gdn/kernels/simd/targets.h"

namespace gdn {
namespace {

using bench::Problem;
using bench::Shape;

void report(benchmark::State& state, double flops) {
  static const double peak = bench::fma_gflops(num_threads());
  state.counters["GFLOP/s"] =
      benchmark::Counter(flops * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["peak"] =
      benchmark::Counter(flops * 1e-9 / peak, benchmark::Counter::kIsIterationInvariantRate);
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
  PageVector<float> pool(size, 0.01f);
  for (auto _ : state) delta_rule_step(problem.x, {pool.data(), shape.B}, problem.o.data());
  state.counters["GB/s"] = benchmark::Counter(2.0 * size * sizeof(float) * 1e-9,
                                              benchmark::Counter::kIsIterationInvariantRate);
}

void fma_peak(benchmark::State& state) {
  double peak = 0.0;
  for (auto _ : state) peak = bench::fma_gflops(num_threads());
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
  for (const int chunk : {32, 64}) {
    for (const DeltaGate gate : {DeltaGate::kScalar, DeltaGate::kChannel}) {
      const Shape shape{1, 512, 16, 16, 128, 128, gate, DeltaErase::kKey, chunk, true};
      const std::string name = std::string("bf16_") +
                               (gate == DeltaGate::kChannel ? "channel_" : "") + "chunk" +
                               std::to_string(chunk);
      add("forward/" + name, forward, shape);
      add("forward_backward/" + name, forward_backward, shape);
    }
  }
  for (const int chunk : {16, 32, 64}) {
    for (const auto& [name, base] : {shapes[0], shapes[1], shapes[3], shapes[4]}) {
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
  bool table = false;
  std::string group, json;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "--table" || arg.starts_with("--table=")) {
      table = true;
      group = arg.substr(std::min(arg.size(), sizeof("--table=") - 1));
    } else if (arg.starts_with("--json=")) {
      json = arg.substr(sizeof("--json=") - 1);
    }
  }
  if (table) {
    try {
      return gdn::bench::print_delta_rule_table(group, json);
    } catch (const gdn::Error& error) {
      std::fprintf(stderr, "bench_delta_rule: %s\n", error.what());
      return 1;
    }
  }
  gdn::add_all();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::AddCustomContext("threads", std::to_string(gdn::num_threads()));
  benchmark::AddCustomContext("simd", gdn::simd_target());
  benchmark::RunSpecifiedBenchmarks();
}
