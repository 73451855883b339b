// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/gated_write/layer.h"

namespace gdn {
namespace {

constexpr const char* kName = "gated_write";
constexpr double kKeyShare = 1.0;

}  // namespace

GatedWrite::GatedWrite(const MixerArgs& args) : DeltaMixer(kName, args) {
  const Options options(kName, args);
  const int64_t D = args.hidden_size;
  sizes_ = sizes_by_head_dim(options, D, kKeyShare);
  shape_ = options.text("gate_shape", {"scalar", "value", "key"});
  learning_rate_ = options.number("learning_rate");
  normalize_ = options.text("qk_norm", {"l2", "none"}) == "l2";
  options.check(learning_rate_ > 0, "learning_rate must be positive, got ", learning_rate_);
  if (!options.flag("allow_unstable")) {
    // A write of strength s scales what the key reads by 1 - s |k|^2.
    options.check(normalize_ || learning_rate_ <= 1,
                  "qk_norm \"none\" needs a learning_rate of at most 1, got ", learning_rate_,
                  " (allow_unstable = true to train it all the same)");
    options.check(learning_rate_ <= 2, "learning_rate must be at most 2, got ", learning_rate_,
                  " (allow_unstable = true to train it all the same)");
  }

  add_qkv(D);
  const int64_t width = shape_ == "scalar"  ? sizes_.HV
                        : shape_ == "value" ? sizes_.value_dim()
                                            : sizes_.key_dim();
  w_proj_ = add_linear(*this, "w_proj", D, width, /*with_bias=*/true);
  add_convolution(options);
  add_output(options, args, {"o_norm", options.flag("use_gate") ? "silu" : ""});
}

DeltaInputs GatedWrite::inputs(const at::Tensor& x, StateAccess& state) {
  DeltaInputs in = project(x, state);
  if (normalize_ && shape_ == "key") {  // k is written times its gate, and must be normal before
    in.q = l2norm(in.q, naive_);
    in.k = l2norm(in.k, naive_);
  } else if (normalize_) {
    normalize_qk(in, naive_);
  }
  const at::Tensor gate = write_strength(w_proj_->forward(x), false, naive_) * learning_rate_;
  if (shape_ == "key") {
    // dw = k (v - S^T k)^T, of which each key channel is let in by its own gate.
    in.erase = "own";
    in.a = in.k;
    in.k = in.k * gate.view(in.k.sizes()).to(in.k.scalar_type());
  } else {
    in.beta = shape_ == "value" ? gate.view(in.v.sizes()) : gate;
  }
  return in;
}

MixerInfo gated_write_info() {
  return {
      kName,
      "Gated write",
      "arXiv 2102.11174",
      {"naive", "chunk", "recurrent", "step"},
      {"cpu"},
      joined(
          {{mode_option()},
           head_dim_options(kKeyShare, 1.0),
           {{"gate_shape", "value",
             "what has a gate of its own: scalar (each head), value (each value channel), key "
             "(each key channel)"},
            {"learning_rate", 1.0,
             "eta of the update -eta grad that is gated, in (0,2]; at most 1 for keys without "
             "norm"},
            {"qk_norm", "l2", "norm of each head of q and k: l2, none"},
            {"allow_unstable", false, "accept a learning_rate with which the memory may diverge"},
            {"use_gate", false, "multiply the normed output by SiLU of a projection of the input"}},
           conv_options(),
           {norm_eps_option()}}),
      [](const MixerArgs& args) -> std::shared_ptr<Mixer> {
        return std::make_shared<GatedWrite>(args);
      },
  };
}

}  // namespace gdn
