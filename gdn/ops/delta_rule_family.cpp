// SPDX-License-Identifier: Apache-2.0
// The ops with fla's names, composed of gdn::delta_rule, the norms and the gates. They have no
// kernels and no gradients of their own.
#include <torch/library.h>

#include <string>

#include "gdn/ops/delta_rule.h"
#include "gdn/ops/gate.h"

namespace gdn::ops {
namespace {

using at::Tensor;
using Result = std::tuple<Tensor, Tensor>;

// Runs f; errors of the engine carry the name of the op that was called.
template <typename F>
auto named(const char* op, F&& f) {
  try {
    return f();
  } catch (const Error& e) {
    const std::string text = e.what();
    for (const char* inner : {"[delta_rule]", "[delta_rule_step_]"}) {
      if (text.starts_with(inner)) {
        throw Error(str_cat("[", op, "]", text.substr(std::string(inner).size())));
      }
    }
    throw;
  }
}

OptionalTensor to_acc(const OptionalTensor& t, const Tensor& q) {
  if (!has(t)) return std::nullopt;
  const at::ScalarType acc = acc_type(q.scalar_type());
  return t->scalar_type() == acc ? t : OptionalTensor(t->to(acc));
}

// How states lie in memory for the caller: [N,HV,K,V], or [N,HV,V,K] as in fla's caches.
Tensor flip(const Tensor& state, bool v_first) {
  return v_first && state.dim() == 4 ? state.transpose(2, 3).contiguous() : state;
}

// What every op of the family takes besides its tensors per token.
struct Common {
  std::optional<double> scale{};
  OptionalTensor initial_state{};
  bool output_final_state = false;
  OptionalTensor cu_seqlens{};
  int64_t chunk_size = 0;
  bool state_v_first = false;
};

// One call of the family.
struct Call {
  const char* op;
  Common common;
  Tensor q, k, v;
  OptionalTensor g{}, beta{}, a{}, p{};
  const char* erase = "key";
  const char* form = "chunk";
  bool qk_l2norm = false;

  Result run() const {
    return named(op, [&]() -> Result {
      OptionalTensor initial = to_acc(common.initial_state, q);
      if (has(initial)) initial = flip(*initial, common.state_v_first);
      auto [o, final_state, saved] =
          delta_rule(q, k, v, to_acc(g, q), to_acc(beta, q), a, p, common.scale, initial,
                     common.cu_seqlens, common.output_final_state, erase, form, common.chunk_size,
                     /*save=*/false, qk_l2norm);
      return {o, flip(final_state, common.state_v_first)};
    });
  }
};

// The transformations that fla calls "in kernel".
struct InKernel {
  bool qk_l2norm = false;
  bool gate = false;
  OptionalTensor A_log, dt_bias;
  std::optional<double> lower_bound;  // KDA's safe gate
  bool beta_sigmoid = false;
  bool allow_neg_eigval = false;
};

void apply(const InKernel& in, bool channel_gate, Call& call) {
  call.qk_l2norm = in.qk_l2norm;
  if (in.gate) {
    GDN_CHECK(has(in.A_log), "[", call.op, "] use_gate_in_kernel=True needs A_log");
    GDN_CHECK(has(call.g), "[", call.op, "] use_gate_in_kernel=True needs g");
    call.g = channel_gate ? kda_gate(*call.g, *in.A_log, in.dt_bias, in.lower_bound)
                          : gdn_gate(*call.g, *in.A_log, in.dt_bias);
  }
  GDN_CHECK(!in.allow_neg_eigval || in.beta_sigmoid, "[", call.op,
            "] allow_neg_eigval=True needs use_beta_sigmoid_in_kernel=True");
  if (in.beta_sigmoid) {
    GDN_CHECK(has(call.beta), "[", call.op, "] use_beta_sigmoid_in_kernel=True needs beta");
    call.beta = beta_sigmoid(*call.beta, in.allow_neg_eigval);
  }
}

Result chunk_gated_delta_rule(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                              const Tensor& beta, std::optional<double> scale,
                              const OptionalTensor& initial_state, bool output_final_state,
                              bool use_qk_l2norm_in_kernel, bool use_gate_in_kernel,
                              const OptionalTensor& A_log, const OptionalTensor& dt_bias,
                              bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval,
                              bool state_v_first, const OptionalTensor& cu_seqlens,
                              int64_t chunk_size) {
  const Common common{scale,      initial_state, output_final_state,
                      cu_seqlens, chunk_size,    state_v_first};
  Call call{"chunk_gated_delta_rule", common, q, k, v, g, beta};
  check_dim(call.op, "g", g, 3, "[B,T,HV]");
  apply({use_qk_l2norm_in_kernel, use_gate_in_kernel, A_log, dt_bias, std::nullopt,
         use_beta_sigmoid_in_kernel, allow_neg_eigval},
        /*channel_gate=*/false, call);
  return call.run();
}

Result fused_recurrent_gated_delta_rule(const Tensor& q, const Tensor& k, const Tensor& v,
                                        const OptionalTensor& g, const OptionalTensor& gk,
                                        const OptionalTensor& beta, std::optional<double> scale,
                                        const OptionalTensor& initial_state,
                                        bool output_final_state, bool use_qk_l2norm_in_kernel,
                                        bool use_gate_in_kernel, const OptionalTensor& A_log,
                                        const OptionalTensor& dt_bias,
                                        bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval,
                                        bool state_v_first, const OptionalTensor& cu_seqlens) {
  const Common common{scale, initial_state, output_final_state, cu_seqlens, 0, state_v_first};
  Call call{"fused_recurrent_gated_delta_rule", common, q, k, v, g, beta};
  if (has(g)) check_dim(call.op, "g", *g, 3, "[B,T,HV]");
  call.form = "recurrent";
  apply({use_qk_l2norm_in_kernel, use_gate_in_kernel, A_log, dt_bias, std::nullopt,
         use_beta_sigmoid_in_kernel, allow_neg_eigval},
        /*channel_gate=*/false, call);
  if (has(gk)) {  // decays multiply, so their logarithms add
    check_dim(call.op, "gk", *gk, 4, "[B,T,HV,K]");
    call.g = has(call.g) ? to_acc(call.g, q)->unsqueeze(-1).add(*to_acc(gk, q)) : gk;
  }
  return call.run();
}

Result chunk_kda(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                 const Tensor& beta, std::optional<double> scale,
                 const OptionalTensor& initial_state, bool output_final_state,
                 bool use_qk_l2norm_in_kernel, bool use_gate_in_kernel, const OptionalTensor& A_log,
                 const OptionalTensor& dt_bias, bool safe_gate, std::optional<double> lower_bound,
                 bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval, bool state_v_first,
                 const OptionalTensor& cu_seqlens, int64_t chunk_size) {
  const Common common{scale,      initial_state, output_final_state,
                      cu_seqlens, chunk_size,    state_v_first};
  Call call{"chunk_kda", common, q, k, v, g, beta};
  check_dim(call.op, "g", g, 4, "[B,T,HV,K]");
  if (lower_bound.has_value()) {
    GDN_CHECK(*lower_bound < 0 && *lower_bound >= -5,
              "[chunk_kda] lower_bound must be in [-5,0), got ", *lower_bound);
  }
  GDN_CHECK(!safe_gate || !use_gate_in_kernel || lower_bound.has_value(),
            "[chunk_kda] safe_gate=True with use_gate_in_kernel=True needs lower_bound");
  apply({use_qk_l2norm_in_kernel, use_gate_in_kernel, A_log, dt_bias,
         safe_gate ? lower_bound : std::nullopt, use_beta_sigmoid_in_kernel, allow_neg_eigval},
        /*channel_gate=*/true, call);
  return call.run();
}

Result chunk_delta_rule(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
                        std::optional<double> scale, const OptionalTensor& initial_state,
                        bool output_final_state, bool use_qk_l2norm_in_kernel,
                        const OptionalTensor& cu_seqlens, int64_t chunk_size) {
  const Common common{scale, initial_state, output_final_state, cu_seqlens, chunk_size};
  Call call{"chunk_delta_rule", common, q, k, v, std::nullopt, beta};
  InKernel in;
  in.qk_l2norm = use_qk_l2norm_in_kernel;
  apply(in, false, call);
  return call.run();
}

// The members without an erase. `layout`: what g must be; null: no gate.
Result linear(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
              const OptionalTensor& g, const char* layout, std::optional<double> scale,
              const OptionalTensor& initial_state, bool output_final_state,
              const OptionalTensor& cu_seqlens, int64_t chunk_size) {
  const Common common{scale, initial_state, output_final_state, cu_seqlens, chunk_size};
  Call call{op, common, q, k, v, g};
  if (has(g)) check_dim(op, "g", *g, std::string_view(layout).ends_with("K]") ? 4 : 3, layout);
  call.erase = "none";
  return call.run();
}

Result chunk_linear_attn(const Tensor& q, const Tensor& k, const Tensor& v,
                         std::optional<double> scale, const OptionalTensor& initial_state,
                         bool output_final_state, bool normalize, const OptionalTensor& cu_seqlens,
                         int64_t chunk_size) {
  constexpr const char* op = "chunk_linear_attn";
  auto [o, final_state] = linear(op, q, k, v, std::nullopt, nullptr, scale, initial_state,
                                 output_final_state, cu_seqlens, chunk_size);
  if (normalize) {
    // The sum of scale * q.k over a sequence's tokens up to this one: attention to values of 1. As
    // in fla, the initial state has no part in it.
    c10::SymDimVector sizes(v.sym_sizes().begin(), v.sym_sizes().end());
    sizes.back() = 1;
    const Tensor ones = v.new_ones_symint(sizes);
    const auto [sum, unused] = linear(op, q, k, ones, std::nullopt, nullptr, scale, std::nullopt,
                                      false, cu_seqlens, chunk_size);
    o = o.div(sum.add(1e-10));
  }
  return {o, final_state};
}

Result chunk_simple_gla(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                        std::optional<double> scale, const OptionalTensor& initial_state,
                        bool output_final_state, const OptionalTensor& cu_seqlens,
                        int64_t chunk_size) {
  return linear("chunk_simple_gla", q, k, v, g, "[B,T,HV]", scale, initial_state,
                output_final_state, cu_seqlens, chunk_size);
}

Result chunk_gla(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                 std::optional<double> scale, const OptionalTensor& initial_state,
                 bool output_final_state, const OptionalTensor& cu_seqlens, int64_t chunk_size) {
  return linear("chunk_gla", q, k, v, g, "[B,T,HV,K]", scale, initial_state, output_final_state,
                cu_seqlens, chunk_size);
}

Result chunk_dplr_delta_rule(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& a,
                             const Tensor& b, const Tensor& gk, std::optional<double> scale,
                             const OptionalTensor& initial_state, bool output_final_state,
                             const OptionalTensor& cu_seqlens, int64_t chunk_size) {
  const Common common{scale, initial_state, output_final_state, cu_seqlens, chunk_size};
  Call call{"chunk_dplr_delta_rule", common, q, k, v, gk, std::nullopt, a, b};
  check_dim(call.op, "gk", gk, 4, "[B,T,HV,K]");
  call.erase = "separate";
  return call.run();
}

Result naive_gated_delta_rule(const Tensor& q, const Tensor& k, const Tensor& v,
                              const OptionalTensor& g, const OptionalTensor& beta,
                              std::optional<double> scale, const OptionalTensor& initial_state,
                              bool output_final_state, const OptionalTensor& cu_seqlens) {
  const Common common{scale, initial_state, output_final_state, cu_seqlens};
  Call call{"naive_gated_delta_rule", common, q, k, v, g, beta};
  call.form = "naive";
  return call.run();
}

Tensor gated_delta_rule_step_(const Tensor& q, const Tensor& k, const Tensor& v,
                              const OptionalTensor& g, const OptionalTensor& beta, Tensor& state,
                              const OptionalTensor& slots, std::optional<double> scale,
                              bool use_qk_l2norm_in_kernel, bool use_gate_in_kernel,
                              const OptionalTensor& A_log, const OptionalTensor& dt_bias,
                              bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval) {
  const Common common{};
  Call call{"gated_delta_rule_step_", common, q, k, v, g, beta};
  apply({use_qk_l2norm_in_kernel, use_gate_in_kernel, A_log, dt_bias, std::nullopt,
         use_beta_sigmoid_in_kernel, allow_neg_eigval},
        /*channel_gate=*/has(g) && g->dim() == 3, call);
  return named(call.op, [&] {
    return delta_rule_step_(call.q, call.k, v, to_acc(call.g, q), to_acc(call.beta, q),
                            std::nullopt, std::nullopt, state, slots, scale, "key", call.qk_l2norm);
  });
}

}  // namespace

#define GDN_STATE_ARGS \
  "*, float? scale=None, Tensor? initial_state=None, bool output_final_state=False, "
#define GDN_IN_KERNEL_ARGS                                                                  \
  "bool use_qk_l2norm_in_kernel=False, bool use_gate_in_kernel=False, Tensor? A_log=None, " \
  "Tensor? dt_bias=None, "
#define GDN_BETA_ARGS "bool use_beta_sigmoid_in_kernel=False, bool allow_neg_eigval=False"
#define GDN_RESULT " -> (Tensor o, Tensor final_state)"

TORCH_LIBRARY_FRAGMENT(gdn, m) {
  m.def(
      "chunk_gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, " GDN_STATE_ARGS
          GDN_IN_KERNEL_ARGS GDN_BETA_ARGS
      ", bool state_v_first=False, Tensor? cu_seqlens=None, int chunk_size=0)" GDN_RESULT,
      &chunk_gated_delta_rule);
  m.def(
      "fused_recurrent_gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor? g=None, "
      "Tensor? gk=None, Tensor? beta=None, " GDN_STATE_ARGS GDN_IN_KERNEL_ARGS GDN_BETA_ARGS
      ", bool state_v_first=False, Tensor? cu_seqlens=None)" GDN_RESULT,
      &fused_recurrent_gated_delta_rule);
  m.def("chunk_kda(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, " GDN_STATE_ARGS
            GDN_IN_KERNEL_ARGS "bool safe_gate=False, float? lower_bound=None, " GDN_BETA_ARGS
        ", bool state_v_first=False, Tensor? cu_seqlens=None, int chunk_size=0)" GDN_RESULT,
        &chunk_kda);
  m.def("chunk_delta_rule(Tensor q, Tensor k, Tensor v, Tensor beta, " GDN_STATE_ARGS
        "bool use_qk_l2norm_in_kernel=False, Tensor? cu_seqlens=None, int chunk_size=0)" GDN_RESULT,
        &chunk_delta_rule);
  m.def("chunk_linear_attn(Tensor q, Tensor k, Tensor v, " GDN_STATE_ARGS
        "bool normalize=True, Tensor? cu_seqlens=None, int chunk_size=0)" GDN_RESULT,
        &chunk_linear_attn);
  m.def("chunk_simple_gla(Tensor q, Tensor k, Tensor v, Tensor g, " GDN_STATE_ARGS
        "Tensor? cu_seqlens=None, int chunk_size=0)" GDN_RESULT,
        &chunk_simple_gla);
  m.def("chunk_gla(Tensor q, Tensor k, Tensor v, Tensor g, " GDN_STATE_ARGS
        "Tensor? cu_seqlens=None, int chunk_size=0)" GDN_RESULT,
        &chunk_gla);
  m.def(
      "chunk_dplr_delta_rule(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, "
      "Tensor gk, " GDN_STATE_ARGS "Tensor? cu_seqlens=None, int chunk_size=0)" GDN_RESULT,
      &chunk_dplr_delta_rule);
  m.def(
      "naive_gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor? g=None, "
      "Tensor? beta=None, " GDN_STATE_ARGS "Tensor? cu_seqlens=None)" GDN_RESULT,
      &naive_gated_delta_rule);
  m.def(
      "gated_delta_rule_step_(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, "
      "Tensor(a!) state, *, Tensor? slots=None, float? scale=None, " GDN_IN_KERNEL_ARGS
          GDN_BETA_ARGS ") -> Tensor",
      &gated_delta_rule_step_);
}

}  // namespace gdn::ops
