// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/common/memory_state.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <string>

#include "gdn/kernels/test_time_memory/memory.h"
#include "gdn/mixers/common/positions.h"
#include "gdn/ops/common.h"

namespace gdn {
namespace {

// The rows of an entry, with what fresh sequences begin with.
at::Tensor rows_or_start(const at::Tensor& rows, const at::Tensor& fresh /* bool [N] */,
                         const at::Tensor& start /* [H,P] or undefined: zero */) {
  at::Tensor begin = start.defined() ? start.to(rows.scalar_type()).unsqueeze(0)
                                     : at::zeros({1, 1, 1}, rows.options());
  if (fresh.all().item<bool>()) return begin.expand_as(rows);
  if (!fresh.any().item<bool>()) return rows;
  return at::where(fresh.view({-1, 1, 1}), begin, rows);
}

}  // namespace

MemoryWeights::MemoryWeights(int64_t heads, int64_t head_dim, const ops::MemoryConfig& config,
                             double std) {
  for (int64_t l = 0; l < config.depth; ++l) {
    const int64_t in = l == 0 ? head_dim : config.hidden;
    const int64_t out = l + 1 == config.depth ? head_dim : config.hidden;
    const std::string number = std::to_string(l + 1);
    c10::NoGradGuard no_grad;
    const double spread = std > 0 ? std : 1 / std::sqrt(static_cast<double>(in));
    at::Tensor weight = at::empty({heads, in, out}, at::kFloat).normal_(0.0, spread);
    parameters_.push_back(register_parameter("W" + number, weight));
    if (config.bias)
      parameters_.push_back(register_parameter("b" + number, at::zeros({heads, 1, out})));
  }
}

at::Tensor MemoryWeights::flat() const {
  std::vector<at::Tensor> parts;
  for (const auto& parameter : named_parameters(/*recurse=*/false))
    parts.push_back(parameter.value().flatten(1));
  return at::cat(parts, 1);
}

void add_memory_state(State& state, int64_t sequences, int64_t heads, int64_t head_dim,
                      const ops::MemoryConfig& config, bool eta, const at::TensorOptions& options) {
  const int64_t P = test_time_memory_size(head_dim, config.depth, config.hidden, config.bias);
  const auto acc = options.dtype(ops::acc_type(c10::typeMetaToScalarType(options.dtype())));
  auto weights = [&] { return at::zeros({sequences, heads, P}, acc); };
  state.set("memory", weights());
  if (ops::has_momentum(config, eta)) state.set("momentum", weights());
  if (ops::has_gradient_at(config)) state.set("gradient_at", weights());
  state.set("tokens", at::zeros({sequences}, at::kLong));
}

at::Tensor tokens_before(const StateAccess& state) {
  if (!state.given()) return at::zeros({state.num_sequences()}, at::kLong);
  return state.read("tokens");
}

at::Tensor memory_with_state(ops::MemoryTensors inputs, const ops::MemoryConfig& config,
                             const MemoryStart& start, StateAccess& state, bool naive) {
  const int64_t T = inputs.q.size(1), N = state.num_sequences();
  const bool has_s = ops::has_momentum(config, inputs.eta.defined());
  const bool has_g = ops::has_gradient_at(config);
  inputs.position = tokens_before(state);
  inputs.cu_seqlens = state.cu_seqlens();
  const at::Tensor fresh = inputs.position == 0;

  if (state.step() && !naive) {
    inputs.memory = state.pool("memory");
    if (has_s) inputs.momentum = state.pool("momentum");
    if (has_g) inputs.gradient_at = state.pool("gradient_at");
    for (int64_t n = 0; n < N; ++n) {
      const int64_t slot = state.slots().defined() ? state.slots()[n].item<int64_t>() : n;
      if (slot < 0 || !fresh[n].item<bool>()) continue;
      inputs.memory.select(0, slot).copy_(start.memory);
      if (has_g) inputs.gradient_at.select(0, slot).copy_(start.memory);
      if (has_s && start.momentum.defined()) {
        inputs.momentum.select(0, slot).copy_(start.momentum);
      } else if (has_s) {
        inputs.momentum.select(0, slot).zero_();
      }
    }
    const at::Tensor o = ops::test_time_memory_step_(inputs, config, state.slots());
    state.write("tokens", inputs.position + 1);
    return o;
  }

  if (state.given()) {
    inputs.memory = rows_or_start(state.read("memory"), fresh, start.memory);
    if (has_s) inputs.momentum = rows_or_start(state.read("momentum"), fresh, start.momentum);
    if (has_g) inputs.gradient_at = rows_or_start(state.read("gradient_at"), fresh, start.memory);
  } else {
    const auto acc = ops::acc_type(inputs.q.scalar_type());
    auto all = [&](const at::Tensor& t) {
      return t.to(acc).unsqueeze(0).expand({N, t.size(0), t.size(1)});
    };
    inputs.memory = all(start.memory);
    if (start.momentum.defined()) inputs.momentum = all(start.momentum);
  }
  const ops::MemoryResult result = naive ? ops::naive::test_time_memory(inputs, config)
                                         : ops::test_time_memory(inputs, config, state.given());
  if (!state.given()) return result.o;
  state.write("memory", result.memory);
  if (has_s) state.write("momentum", result.momentum);
  if (has_g) state.write("gradient_at", result.gradient_at);
  state.write("tokens", inputs.position + sequence_lengths(state, T));
  return result.o;
}

}  // namespace gdn
