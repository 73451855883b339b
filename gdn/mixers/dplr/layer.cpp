// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/dplr/layer.h"

#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/sigmoid.h>

namespace gdn {
namespace {

constexpr const char* kName = "dplr";
constexpr double kKeyShare = 1.0;

}  // namespace

Dplr::Dplr(const MixerArgs& args) : DeltaMixer(kName, args) {
  const Options options(kName, args);
  const int64_t D = args.hidden_size;
  sizes_ = sizes_by_head_dim(options, D, kKeyShare);
  free_ = options.text("low_rank", {"tied", "free"}) == "free";

  add_qkv(D);
  decay_ = LowRankDecay(*this, sizes_, D);
  a_proj_ = add_linear(*this, "a_proj", D, sizes_.key_dim());
  b_proj_ = add_linear(*this, "b_proj", D, sizes_.key_dim());
  if (free_) s_proj_ = add_linear(*this, "s_proj", D, sizes_.H, /*with_bias=*/true);
  decay_.add_parameters(*this, options, sizes_);
  add_convolution(options);
  add_output(options, args, {"o_norm", options.flag("use_gate") ? "silu" : ""});
}

DeltaInputs Dplr::inputs(const at::Tensor& x, StateAccess& state) {
  DeltaInputs in = project(x, state);
  const auto sizes = in.k.sizes().vec();
  const at::ScalarType dtype = in.k.scalar_type(), acc = ops::acc_type(dtype);
  normalize_qk(in, naive_);
  in.g = decay_.forward(x, naive_);
  // S = (Diag(d) - a b^T) S + k v^T; the engine's erase key is b, and -a is what writes it.
  const at::Tensor b = l2norm(b_proj_->forward(x).view(sizes), naive_);
  const at::Tensor a = a_proj_->forward(x).view(sizes);
  in.erase = "separate";
  in.a = b;
  if (!free_) {
    in.p = -at::sigmoid(a) * b;
    return in;
  }
  // Two directions of length 1 and a strength s; d is made smaller by 1 - s, so that the norm of
  // the transition is at most (1 - s) + s.
  const at::Tensor raw = s_proj_->forward(x).to(acc);  // [B,T,H]
  in.p = -l2norm(a, naive_) * at::sigmoid(raw).to(dtype).unsqueeze(3);
  const at::Tensor rest = at::log_sigmoid(-raw).repeat_interleave(sizes_.HV / sizes_.H, 2);
  in.g = *in.g + rest.unsqueeze(3);
  return in;
}

MixerInfo dplr_info() {
  return {
      kName,
      "Diagonal plus low rank",
      "arXiv 2503.14456",
      {"naive", "chunk", "recurrent", "step"},
      {"cpu"},
      joined(
          {{mode_option()},
           head_dim_options(kKeyShare, 1.0),
           {{"low_rank", "tied",
             "the low-rank part a b^T: tied (a is b, each channel with a gate), free (two "
             "directions and a strength)"},
            {"use_gate", true, "multiply the normed output by SiLU of a projection of the input"}},
           conv_options(),
           safe_gate_options(),
           {norm_eps_option()}}),
      [](const MixerArgs& args) -> std::shared_ptr<Mixer> { return std::make_shared<Dplr>(args); },
  };
}

}  // namespace gdn
