// SPDX-License-Identifier: Apache-2.0
// Whole layers against their formulas, written out from the parameters by name: what the naive form
// shares with the fast one (projections, gates, norms) is tested here.
#include <ATen/ops/cat.h>
#include <ATen/ops/complex.h>
#include <ATen/ops/einsum.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/randn_like.h>
#include <ATen/ops/real.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>
#include <torch/utils.h>

#include <cmath>

#include "gdn/mixers/mixer.h"

namespace gdn {
namespace {

using nlohmann::json;

// A mixer in double whose parameters all differ from their initial ones, zeros and ones included.
struct Layer {
  std::shared_ptr<Mixer> mixer;

  Layer(const char* name, int64_t hidden_size, const json& options) {
    torch::manual_seed(11);
    MixerArgs args;
    args.hidden_size = hidden_size;
    args.options = options;
    mixer = make_mixer(name, args);
    mixer->to(at::kDouble);
    c10::NoGradGuard no_grad;
    for (const auto& p : mixer->named_parameters())
      at::Tensor(p.value()).add_(at::randn_like(p.value()) * 0.2);
  }
  at::Tensor operator[](const std::string& name) const {
    return mixer->named_parameters()[name].detach();
  }
  at::Tensor map(const std::string& name, const at::Tensor& x) const {
    return at::einsum("...d,ed->...e", {x, (*this)[name + ".weight"]});
  }
  void expect(const at::Tensor& x, const at::Tensor& y) const {
    const at::Tensor actual = mixer->forward(x, {}).detach();
    ASSERT_EQ(actual.sizes(), y.sizes());
    EXPECT_GT(y.abs().max().item<double>(), 1e-3);
    EXPECT_LE((actual - y).abs().max().item<double>(), 1e-10);
  }
};

at::Tensor rms(const at::Tensor& x) { return x * (x.square().mean(-1, true) + 1e-6).rsqrt(); }

// Position by position: q, k [T,H,K], v [T,H,V].
at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  std::vector<at::Tensor> rows;
  for (int64_t t = 0; t < q.size(0); ++t) {
    const at::Tensor scores = at::einsum("hk,shk->hs", {q[t], k.slice(0, 0, t + 1)}) /
                              std::sqrt(static_cast<double>(q.size(2)));
    rows.push_back(at::einsum("hs,shv->hv", {scores.softmax(-1), v.slice(0, 0, t + 1)}));
  }
  return at::stack(rows, 0);
}

// Turns the pairs (i, i + R/2) of the first R of x [T,H,D] by t theta^(-2i/R).
at::Tensor rotated(const at::Tensor& x, int64_t R, double theta) {
  at::Tensor y = x.clone();
  for (int64_t t = 0; t < x.size(0); ++t) {
    for (int64_t i = 0; i < R / 2; ++i) {
      const double angle = static_cast<double>(t) *
                           std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(R));
      const at::Tensor a = x[t].select(1, i), b = x[t].select(1, i + R / 2);
      y[t].select(1, i).copy_(a * std::cos(angle) - b * std::sin(angle));
      y[t].select(1, i + R / 2).copy_(b * std::cos(angle) + a * std::sin(angle));
    }
  }
  return y;
}

TEST(LayerFormulas, GatedAttention) {
  const int64_t T = 19, H = 4, KV = 2, D = 8;
  const Layer layer("gated_attention", 10,
                    {{"num_heads", H},
                     {"num_kv_heads", KV},
                     {"head_dim", D},
                     {"partial_rotary_factor", 0.5},
                     {"rope_theta", 50.0}});
  const at::Tensor x = at::randn({T, 10}, at::kDouble);
  const at::Tensor both = layer.map("q_proj", x).view({T, H, 2 * D});
  const at::Tensor q = rms(both.slice(2, 0, D)) * (1 + layer["q_norm.weight"]);
  const at::Tensor k = rms(layer.map("k_proj", x).view({T, KV, D})) * (1 + layer["k_norm.weight"]);
  const at::Tensor v = layer.map("v_proj", x).view({T, KV, D});
  const at::Tensor o = attention(rotated(q, 4, 50.0), rotated(k, 4, 50.0).repeat_interleave(2, 1),
                                 v.repeat_interleave(2, 1));
  const at::Tensor gated = o * both.slice(2, D, 2 * D).sigmoid();
  layer.expect(x.unsqueeze(0), layer.map("o_proj", gated.reshape({T, H * D})).unsqueeze(0));
}

TEST(LayerFormulas, Mla) {
  const int64_t T = 17, H = 3, K = 4, shared = 2, V = 5, rank = 6;
  const Layer layer("mla", 9,
                    {{"num_heads", H},
                     {"qk_nope_head_dim", K},
                     {"qk_rope_head_dim", shared},
                     {"v_head_dim", V},
                     {"kv_lora_rank", rank},
                     {"q_lora_rank", 7}});
  const at::Tensor x = at::randn({T, 9}, at::kDouble);
  const at::Tensor down = rms(layer.map("q_a_proj", x)) * layer["q_a_layernorm.weight"];
  const at::Tensor q = layer.map("q_b_proj", down).view({T, H, K + shared});
  const at::Tensor kv = layer.map("kv_a_proj_with_mqa", x);
  const at::Tensor latent = rms(kv.slice(1, 0, rank)) * layer["kv_a_layernorm.weight"];
  const at::Tensor up = layer.map("kv_b_proj", latent).view({T, H, K + V});
  const at::Tensor common = kv.slice(1, rank).unsqueeze(1).expand({T, H, shared});
  const at::Tensor o = attention(q, at::cat({up.slice(2, 0, K), common}, 2), up.slice(2, K, K + V));
  layer.expect(x.unsqueeze(0), layer.map("o_proj", o.reshape({T, H * V})).unsqueeze(0));
}

TEST(LayerFormulas, Mamba) {
  const int64_t T = 21, D = 5, C = 10, S = 3, rank = 2;
  for (const bool is_signed : {false, true}) {
    const Layer layer(
        "mamba", D, {{"state_size", S}, {"time_step_rank", rank}, {"allow_neg_eigval", is_signed}});
    const at::Tensor x = at::randn({T, D}, at::kDouble), xz = layer.map("in_proj", x);
    const at::Tensor w = layer["conv1d.weight"];
    const at::Tensor padded = at::cat({at::zeros({3, C}, at::kDouble), xz.slice(1, 0, C)}, 0);
    at::Tensor conv = at::zeros({T, C}, at::kDouble) + layer["conv1d.bias"];
    for (int64_t j = 0; j < 4; ++j)
      conv = conv + padded.slice(0, j, j + T) * w.select(2, j).select(1, 0);
    conv = at::silu(conv);
    const at::Tensor parts = layer.map("x_proj", conv);
    const at::Tensor dt =
        at::softplus(layer.map("dt_proj", parts.slice(1, 0, rank)) + layer["dt_proj.bias"]);
    const at::Tensor A = -layer["A_log"].exp();
    at::Tensor h = at::zeros({C, S}, at::kDouble);
    std::vector<at::Tensor> rows;
    for (int64_t t = 0; t < T; ++t) {
      at::Tensor a = (dt[t].unsqueeze(1) * A).exp();
      if (is_signed) a = 2 * a - 1;
      h = a * h + at::einsum("c,s->cs", {dt[t] * conv[t], parts[t].slice(0, rank, rank + S)});
      rows.push_back(at::einsum("cs,s->c", {h, parts[t].slice(0, rank + S)}) +
                     layer["D"] * conv[t]);
    }
    const at::Tensor gated = at::stack(rows, 0) * at::silu(xz.slice(1, C));
    layer.expect(x.unsqueeze(0), layer.map("out_proj", gated).unsqueeze(0));
  }
}

TEST(LayerFormulas, S4d) {
  const int64_t T = 23, D = 4;
  const Layer layer("s4d", D, {{"state_size", 6}});
  const at::Tensor x = at::randn({T, D}, at::kDouble);
  const at::Tensor dt = layer["kernel.log_dt"].exp().unsqueeze(1);
  const at::Tensor A =
      at::complex(-layer["kernel.log_A_real"].exp(), layer["kernel.A_imag"]);  // [D,M]
  const at::Tensor C = layer["kernel.C"];
  const at::Tensor read = at::complex(C.select(2, 0), C.select(2, 1)) * ((dt * A).exp() - 1) / A;
  std::vector<at::Tensor> rows;
  for (int64_t t = 0; t < T; ++t) {
    at::Tensor y = layer["D"] * x[t];
    for (int64_t i = 0; i <= t; ++i) {
      const at::Tensor power = (dt * A * static_cast<double>(t - i)).exp();
      y = y + 2 * at::real((read * power).sum(1)) * x[i];
    }
    rows.push_back(y);
  }
  const at::Tensor out =
      layer.map("output_linear", at::gelu(at::stack(rows, 0))) + layer["output_linear.bias"];
  layer.expect(x.unsqueeze(0), (out.slice(1, 0, D) * out.slice(1, D).sigmoid()).unsqueeze(0));
}

}  // namespace
}  // namespace gdn
