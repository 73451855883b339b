// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/gated_delta_net/layer.h"

#include <vector>

namespace gdn {
namespace {

constexpr const char* kName = "gated_delta_net";
constexpr double kKeyShare = 0.75;  // with expand_v = 2 and the gate: about 6 D^2 parameters

}  // namespace

GatedDeltaNet::GatedDeltaNet(const MixerArgs& args) : DeltaMixer(kName, args) {
  const Options options(kName, args);
  const int64_t D = args.hidden_size;
  sizes_ = sizes_by_head_dim(options, D, kKeyShare);
  allow_neg_eigval_ = options.flag("allow_neg_eigval");
  erase_ = options.flag("erase");

  add_qkv(D);
  a_proj_ = add_linear(*this, "a_proj", D, sizes_.HV);
  b_proj_ = add_linear(*this, "b_proj", D, sizes_.HV);
  decay_ = ScalarDecay(*this, sizes_.HV);
  add_convolution(options);
  add_output(options, args,
             {"o_norm", options.flag("use_gate")
                            ? options.text("output_gate_activation", {"swish", "silu", "sigmoid"})
                            : ""});
}

DeltaInputs GatedDeltaNet::inputs(const at::Tensor& x, StateAccess& state) {
  DeltaInputs in = project(x, state);
  normalize_qk(in, naive_);
  const std::vector<at::Tensor> gates = forward_all(x, {a_proj_.get(), b_proj_.get()});
  in.g = decay_.forward(gates[0], naive_);
  in.beta = write_strength(gates[1], allow_neg_eigval_, naive_);
  in.erase = erase_ ? "key" : "none";
  return in;
}

MixerInfo gated_delta_net_info() {
  return {
      kName,
      "Gated DeltaNet",
      "arXiv 2412.06464",
      {"naive", "chunk", "recurrent", "step"},
      {"cpu"},
      joined(
          {{mode_option()},
           head_dim_options(kKeyShare, 2.0),
           {{"use_gate", true,
             "multiply the normed output by an activation of a projection of the input"},
            {"output_gate_activation", "swish", "that activation: swish (or silu), sigmoid"}},
           conv_options(),
           {neg_eigval_option(),
            norm_eps_option(),
            {"erase", true,
             "the delta rule's erase; false leaves S = exp(g) S + beta k v^T, for comparison"}}}),
      [](const MixerArgs& args) -> std::shared_ptr<Mixer> {
        return std::make_shared<GatedDeltaNet>(args);
      },
  };
}

}  // namespace gdn
