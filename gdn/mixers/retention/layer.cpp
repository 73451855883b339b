// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/retention/layer.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <vector>

#include "gdn/mixers/common/positions.h"

namespace gdn {
namespace {

constexpr const char* kName = "retention";
constexpr double kRopeTheta = 10000;

// int64 [B,T]: how many tokens of its sequence stand before each; advances the entry "position".
at::Tensor advance_positions(const at::Tensor& x, StateAccess& state) {
  const int64_t T = x.size(1), N = state.num_sequences();
  const at::Tensor past =
      state.given() ? state.read("position") : at::zeros({N}, at::TensorOptions(at::kLong));
  const at::Tensor positions = token_positions(state, past, T);
  if (state.given()) state.write("position", past + sequence_lengths(state, T));
  return positions;
}

}  // namespace

Retention::Retention(const MixerArgs& args) : GatedLinearMixer(kName, args) {
  rope_theta_ = options_.number_or("rope_theta", sizes_.K % 2 == 0 ? kRopeTheta : 0);
  options_.check(rope_theta_ >= 0, "rope_theta must be positive, or 0 for no positions, got ",
                 rope_theta_);
  options_.check(rope_theta_ == 0 || sizes_.K % 2 == 0,
                 "rotary positions need keys of even size, got ", sizes_.K,
                 " (rope_theta = 0: no positions)");
  add_rest(args);
}

State Retention::zero_state(int64_t sequences, const at::TensorOptions& options) const {
  State state = DeltaMixer::zero_state(sequences, options);
  if (rope_theta_ > 0) state.set("position", at::zeros({sequences}, options.dtype(at::kLong)));
  return state;
}

at::Tensor Retention::decay(const at::Tensor& x) const {
  const auto options = x.options().dtype(ops::acc_type(x.scalar_type()));
  // 1 - 2^-5 for the first head, 1 - 2^-6 for the next one, ...
  const at::Tensor kept = 1 - (at::arange(sizes_.H, options.dtype(at::kDouble)) + 5).neg().exp2();
  return kept.log().to(options.dtype()).expand({x.size(0), x.size(1), sizes_.H});
}

DeltaInputs Retention::inputs(const at::Tensor& x, StateAccess& state) {
  DeltaInputs in = GatedLinearMixer::inputs(x, state);
  if (rope_theta_ == 0) return in;
  const at::Tensor positions = advance_positions(x, state);
  in.q = rotated(in.q, positions, rope_theta_, naive_);
  in.k = rotated(in.k, positions, rope_theta_, naive_);
  return in;
}

MixerInfo retention_info() {
  return {
      kName,
      "RetNet (multi-scale retention)",
      "arXiv 2307.08621",
      {"naive", "chunk", "recurrent", "step"},
      {"cpu"},
      gated_linear_options(
          expand_k_option(1.0), {2.0, false},
          {{"rope_theta", nullptr,
            "base of the rotary positions of queries and keys, 0: none; default: 10000, or 0 where "
            "the size of a key is odd"}}),
      [](const MixerArgs& args) -> std::shared_ptr<Mixer> {
        return std::make_shared<Retention>(args);
      },
  };
}

}  // namespace gdn
