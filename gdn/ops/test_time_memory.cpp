// SPDX-License-Identifier: Apache-2.0
#include "gdn/ops/test_time_memory.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "gdn/kernels/test_time_memory/memory.h"
#include "gdn/ops/common.h"
#include "gdn/ops/in_place.h"

namespace gdn::ops {
namespace {

using at::Tensor;
using std::optional;
using std::string_view;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using OptionalList = c10::List<optional<Tensor>>;

// The order of `inputs` in the schema.
enum Input {
  kQ,
  kK,
  kV,
  kRate,
  kEta,
  kAlpha,
  kTau,
  kAnchor,
  kNormWeight,
  kNormBias,
  kMemory,
  kMomentum,
  kGradientAt,
  kPosition,
  kCuSeqlens,
  kInputs
};
constexpr int kDifferentiable = kPosition;  // those before it

OptionalList to_list(const MemoryTensors& t) {
  OptionalList list;
  list.reserve(kInputs);
  for (const Tensor* x :
       {&t.q, &t.k, &t.v, &t.rate, &t.eta, &t.alpha, &t.tau, &t.anchor, &t.norm_weight,
        &t.norm_bias, &t.memory, &t.momentum, &t.gradient_at, &t.position, &t.cu_seqlens})
    list.push_back(given(*x));
  return list;
}

variable_list unpack(const OptionalList& list) {
  variable_list tensors;
  for (const optional<Tensor>& t : list) tensors.push_back(t.value_or(Tensor()));
  return tensors;
}

std::vector<int64_t> sizes_of(const MemoryConfig& c) {
  return {c.depth, c.hidden, c.bias, c.chunk, c.sequential, c.read_before};
}
std::vector<double> scales_of(const MemoryConfig& c) { return {c.norm_eps, c.loss_scale, c.clip}; }

MemoryConfig to_config(const char* op, string_view rule, string_view activation,
                       at::IntArrayRef sizes, at::ArrayRef<double> scales) {
  GDN_CHECK(rule == "ttt" || rule == "lmm", "[", op, "] rule must be ttt or lmm, got ", rule);
  GDN_CHECK(activation == "silu" || activation == "gelu", "[", op,
            "] activation must be silu or gelu, got ", activation);
  GDN_CHECK(sizes.size() == 6, "[", op,
            "] sizes must be [depth, hidden, bias, chunk, sequential, read_before], got ",
            sizes.size(), " numbers");
  GDN_CHECK(scales.size() == 3, "[", op, "] scales must be [norm_eps, loss_scale, clip], got ",
            scales.size(), " numbers");
  MemoryConfig c;
  c.rule = rule;
  c.activation = activation;
  c.depth = sizes[0];
  c.hidden = sizes[1];
  c.bias = sizes[2] != 0;
  c.chunk = sizes[3];
  c.sequential = sizes[4] != 0;
  c.read_before = sizes[5] != 0;
  c.norm_eps = scales[0];
  c.loss_scale = scales[1];
  c.clip = scales[2];
  return c;
}

// What the kernel reads, kept alive while it runs.
struct Call {
  MemoryParams params;
  variable_list inputs;  // of the schema's order, dense and in the dtype of the computation
  at::ScalarType acc;
  int64_t P = 0;
};

Call prepare(const char* op, const variable_list& given_inputs, const MemoryConfig& config,
             bool step = false) {
  GDN_CHECK(given_inputs.size() == kInputs, "[", op, "] inputs must be a list of ", int{kInputs},
            " tensors, got ", given_inputs.size());
  Call call;
  call.inputs = given_inputs;
  auto& in = call.inputs;
  for (const int i : {kQ, kK, kV, kRate, kMemory}) {
    GDN_CHECK(in[i].defined(), "[", op, "] q, k, v, rate and memory must be given");
  }
  check_dim(op, "q", in[kQ], 4, "[B,T,H,D]");
  MemoryParams& p = call.params;
  dtype_of(op, "q", in[kQ]);
  call.acc = acc_type(in[kQ].scalar_type());
  p.dtype = call.acc == at::kDouble ? DType::kF64 : DType::kF32;
  p.rule = config.rule == "ttt" ? MemoryRule::kTtt : MemoryRule::kLmm;
  p.activation = config.activation == "silu" ? MemoryActivation::kSilu : MemoryActivation::kGelu;
  const int64_t B = in[kQ].size(0), T = in[kQ].size(1);
  p.T = T;
  p.H = in[kQ].size(2);
  p.D = in[kQ].size(3);
  p.depth = config.depth;
  p.hidden = config.hidden;
  p.bias = config.bias;
  p.chunk = config.chunk;
  p.sequential = config.sequential;
  p.read_before = config.read_before;
  p.norm_eps = config.norm_eps;
  p.loss_scale = config.loss_scale;
  p.clip = config.clip;
  p.residual_norm = in[kNormWeight].defined();
  GDN_CHECK(!in[kCuSeqlens].defined() || B == 1, "[", op, "] B must be 1 with cu_seqlens, got ", B);
  in[kCuSeqlens] = host_cu_seqlens(op, given(in[kCuSeqlens]), T);
  p.num_sequences = in[kCuSeqlens].defined() ? in[kCuSeqlens].size(0) - 1 : B;
  p.cu_seqlens = data_or_null(in[kCuSeqlens]);
  const int64_t N = p.num_sequences, P = test_time_memory_size(p.D, p.depth, p.hidden, p.bias);
  call.P = P;
  auto check = [&](Input i, const char* name, at::IntArrayRef sizes, const char* layout) {
    if (in[i].defined()) check_shape(op, name, in[i], sizes, layout);
  };
  check(kK, "k", in[kQ].sizes(), "[B,T,H,D]");
  check(kV, "v", in[kQ].sizes(), "[B,T,H,D]");
  check(kRate, "rate", {B, T, p.H}, "[B,T,H]");
  check(kEta, "eta", {B, T, p.H}, "[B,T,H]");
  check(kAlpha, "alpha", {B, T, p.H}, "[B,T,H]");
  check(kTau, "tau", {p.chunk}, "[chunk]");
  check(kAnchor, "anchor", {p.H, P}, "[H,P]");
  check(kNormWeight, "norm_weight", {p.H, p.D}, "[H,D]");
  check(kNormBias, "norm_bias", {p.H, p.D}, "[H,D]");
  const int64_t rows = step ? -1 : N;
  check(kMemory, "memory", {rows, p.H, P}, "[N,H,P]");
  check(kMomentum, "momentum", {rows, p.H, P}, "[N,H,P]");
  check(kGradientAt, "gradient_at", {rows, p.H, P}, "[N,H,P]");
  check(kPosition, "position", {N}, "[N]");
  GDN_CHECK(!in[kPosition].defined() || in[kPosition].scalar_type() == at::kLong, "[", op,
            "] position must be int64, got ", c10::toString(in[kPosition].scalar_type()));
  const bool lmm = p.rule == MemoryRule::kLmm;
  GDN_CHECK(!in[kGradientAt].defined() || lmm, "[", op, "] the rule ttt has no gradient_at");
  GDN_CHECK(!in[kMomentum].defined() || !lmm || in[kEta].defined(), "[", op,
            "] momentum needs eta");
  for (int i = 0; i < kDifferentiable; ++i) {
    const bool pool = step && (i == kMemory || i == kMomentum || i == kGradientAt);
    if (!in[i].defined() || pool) continue;
    in[i] = in[i].to(call.acc).contiguous();
  }
  if (in[kPosition].defined()) in[kPosition] = in[kPosition].to(at::kCPU).contiguous();
  p.position = data_or_null(in[kPosition]);
  const void** fields[] = {&p.q,      &p.k,        &p.v,          &p.rate,        &p.eta,
                           &p.alpha,  &p.tau,      &p.anchor,     &p.norm_weight, &p.norm_bias,
                           &p.memory, &p.momentum, &p.gradient_at};
  for (int i = 0; i < kDifferentiable; ++i)
    *fields[i] = in[i].defined() ? in[i].const_data_ptr() : nullptr;
  return call;
}

// --- CPU
// -------------------------------------------------------------------------------------------------------------

Outputs memory_cpu(const OptionalList& inputs, string_view rule, string_view activation,
                   at::IntArrayRef sizes, at::ArrayRef<double> scales, bool output_final_state,
                   bool save) {
  const char* op = "test_time_memory";
  const MemoryConfig config = to_config(op, rule, activation, sizes, scales);
  const Call call = prepare(op, unpack(inputs), config);
  const MemoryParams& p = call.params;
  const auto options = call.inputs[kQ].options();
  auto state = [&](bool wanted) {
    return wanted && output_final_state ? at::empty({p.num_sequences, p.H, call.P}, options)
                                        : at::empty({0}, options);
  };
  Tensor o = at::empty(call.inputs[kQ].sizes(), options);
  Tensor memory = state(true), momentum = state(has_momentum(config, call.inputs[kEta].defined())),
         gradient_at = state(has_gradient_at(config));
  Tensor saved = at::empty({save ? test_time_memory_saved_size(p) : 0}, options);
  MemoryOutputs out;
  auto pointer = [](Tensor& t) { return t.numel() > 0 ? t.mutable_data_ptr() : nullptr; };
  out.o = o.mutable_data_ptr();
  out.memory = pointer(memory);
  out.momentum = pointer(momentum);
  out.gradient_at = pointer(gradient_at);
  out.saved = pointer(saved);
  test_time_memory_forward(p, out);
  return {o.to(inputs.get(kQ)->scalar_type()), memory, momentum, gradient_at, saved};
}

std::vector<Tensor> memory_bwd_cpu(const OptionalList& grads, const OptionalList& inputs,
                                   const Tensor& saved, string_view rule, string_view activation,
                                   at::IntArrayRef sizes, at::ArrayRef<double> scales) {
  const char* op = "test_time_memory_bwd";
  const MemoryConfig config = to_config(op, rule, activation, sizes, scales);
  const variable_list originals = unpack(inputs);
  const Call call = prepare(op, originals, config);
  const MemoryParams& p = call.params;
  const int64_t saved_size = test_time_memory_saved_size(p);
  GDN_CHECK(saved.numel() == saved_size || saved.numel() == 0, "[", op, "] saved must have ",
            saved_size, " numbers, or none to compute them again, got ", saved.numel());
  GDN_CHECK(grads.size() == 4, "[", op,
            "] grads must be those of o, memory, momentum and gradient_at, got ", grads.size());
  variable_list dense = unpack(grads);
  for (Tensor& t : dense)
    if (t.defined()) t = t.to(call.acc).contiguous();
  MemoryGrads g;
  auto in = [](const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; };
  g.o = in(dense[0]);
  g.memory_out = in(dense[1]);
  g.momentum_out = in(dense[2]);
  g.gradient_at_out = in(dense[3]);
  void** fields[] = {&g.q,      &g.k,        &g.v,          &g.rate,        &g.eta,
                     &g.alpha,  &g.tau,      &g.anchor,     &g.norm_weight, &g.norm_bias,
                     &g.memory, &g.momentum, &g.gradient_at};
  std::vector<Tensor> results;
  const auto options = call.inputs[kQ].options();
  Tensor kept = saved;
  if (kept.numel() == 0 && saved_size > 0) {
    kept = at::empty({saved_size}, options);
    Tensor o = at::empty(call.inputs[kQ].sizes(), options);
    MemoryOutputs again;
    again.o = o.mutable_data_ptr();
    again.saved = kept.mutable_data_ptr();
    test_time_memory_forward(p, again);
  }
  for (int i = 0; i < kDifferentiable; ++i) {
    const Tensor& x = call.inputs[i];
    Tensor result = at::empty({0}, options);
    if (x.defined()) {
      // Those of all sequences together come one by one.
      const bool summed = i >= kTau && i <= kNormBias;
      const int64_t size = i == kTau ? p.chunk : i == kAnchor ? call.P : p.D;
      result =
          summed ? at::empty({p.num_sequences, p.H, size}, options) : at::empty(x.sizes(), options);
      if (result.numel() > 0) *fields[i] = result.mutable_data_ptr();
    }
    results.push_back(result);
  }
  test_time_memory_backward(p, kept.const_data_ptr(), g);
  for (int i = 0; i < kDifferentiable; ++i) {
    if (!originals[i].defined()) continue;
    if (i == kTau) results[i] = results[i].sum(at::IntArrayRef{0, 1});
    if (i > kTau && i <= kNormBias)
      results[i] = p.num_sequences == 1 ? results[i][0] : results[i].sum(0);
    results[i] = results[i].to(originals[i].scalar_type());
  }
  return results;
}

Tensor memory_step_cpu(const OptionalList& inputs, Tensor& memory, Tensor& momentum,
                       Tensor& gradient_at, const optional<Tensor>& slots, string_view rule,
                       string_view activation, at::IntArrayRef sizes, at::ArrayRef<double> scales) {
  const char* op = "test_time_memory_step_";
  const MemoryConfig config = to_config(op, rule, activation, sizes, scales);
  variable_list all = unpack(inputs);
  GDN_CHECK(all.size() == kInputs, "[", op, "] inputs must be a list of ", int{kInputs},
            " tensors, got ", all.size());
  all[kMemory] = memory;
  all[kMomentum] = momentum.numel() > 0 ? momentum : Tensor();
  all[kGradientAt] = gradient_at.numel() > 0 ? gradient_at : Tensor();
  const Call call = prepare(op, all, config, /*step=*/true);
  const MemoryParams& p = call.params;
  GDN_CHECK(p.T == 1 && p.cu_seqlens == nullptr, "[", op, "] q must be [N,1,H,D], got ",
            shape_str(call.inputs[kQ]));
  GDN_CHECK(p.position != nullptr, "[", op, "] position is missing");
  const int64_t num_slots = memory.size(0);
  const Tensor host = host_slots(op, slots, p.num_sequences, num_slots);
  GDN_CHECK(host.defined() || p.num_sequences <= num_slots, "[", op,
            "] without slots memory must hold ", p.num_sequences, " sequences, got ", num_slots);
  auto pool = [&](const char* name, Tensor& t, bool wanted) -> void* {
    if (!wanted || p.num_sequences == 0) return nullptr;
    check_shape(op, name, t, {num_slots, p.H, call.P}, "[S,H,P]");
    GDN_CHECK(t.scalar_type() == call.acc && t.is_contiguous(), "[", op, "] ", name,
              " is changed in place and must be dense and ", c10::toString(call.acc));
    return t.mutable_data_ptr();
  };
  MemoryStep step;
  step.params = &p;
  step.memory = pool("memory", memory, true);
  step.momentum = pool("momentum", momentum, has_momentum(config, call.inputs[kEta].defined()));
  step.gradient_at = pool("gradient_at", gradient_at, has_gradient_at(config));
  step.position = p.position;
  step.slots = data_or_null(host);
  Tensor o = at::zeros(call.inputs[kQ].sizes(), call.inputs[kQ].options());
  step.o = o.mutable_data_ptr();
  if (p.num_sequences > 0) test_time_memory_step(step);
  return o.to(all[kQ].scalar_type());
}

// --- Meta
// ------------------------------------------------------------------------------------------------------------

Outputs memory_meta(const OptionalList& inputs, string_view rule, string_view activation,
                    at::IntArrayRef sizes, at::ArrayRef<double> scales, bool output_final_state,
                    bool save) {
  const char* op = "test_time_memory";
  const MemoryConfig config = to_config(op, rule, activation, sizes, scales);
  const Tensor q = inputs.get(kQ).value_or(Tensor());
  const Tensor start = inputs.get(kMemory).value_or(Tensor());
  GDN_CHECK(q.defined() && start.defined(), "[", op, "] q and memory must be given");
  check_dim(op, "q", q, 4, "[B,T,H,D]");
  const auto options = q.options().dtype(acc_type(q.scalar_type()));
  auto state = [&](bool wanted) {
    return wanted && output_final_state ? at::empty_symint(start.sym_sizes(), options)
                                        : at::empty({0}, options);
  };
  // How much is saved depends on positions and lengths, which have no values here; tracing never
  // asks for it (see the autograd kernel).
  GDN_CHECK(!save, "[", op, "] save=True is not for tensors without data");
  return {like(q), state(true), state(has_momentum(config, has(inputs.get(kEta)))),
          state(has_gradient_at(config)), at::empty({0}, options)};
}

std::vector<Tensor> memory_bwd_meta(const OptionalList&, const OptionalList& inputs, const Tensor&,
                                    string_view, string_view, at::IntArrayRef,
                                    at::ArrayRef<double>) {
  std::vector<Tensor> results;
  const Tensor q = inputs.get(kQ).value_or(Tensor());
  for (int i = 0; i < kDifferentiable; ++i) {
    const optional<Tensor> x = inputs.get(i);
    results.push_back(has(x) ? like(*x) : at::empty({0}, q.options()));
  }
  return results;
}

Tensor memory_step_meta(const OptionalList& inputs, Tensor&, Tensor&, Tensor&,
                        const optional<Tensor>&, string_view, string_view, at::IntArrayRef,
                        at::ArrayRef<double>) {
  return like(*inputs.get(kQ));
}

// --- Autograd
// --------------------------------------------------------------------------------------------------------

Outputs call_memory(const OptionalList& inputs, string_view rule, string_view activation,
                    at::IntArrayRef sizes, at::ArrayRef<double> scales, bool output_final_state,
                    bool save) {
  static const auto op =
      typed_op<Outputs(const OptionalList&, string_view, string_view, at::IntArrayRef,
                       at::ArrayRef<double>, bool, bool)>("gdn::test_time_memory");
  return op.call(inputs, rule, activation, sizes, scales, output_final_state, save);
}

OptionalList to_optional(const variable_list& tensors) {
  OptionalList list;
  for (const Tensor& t : tensors) list.push_back(given(t));
  return list;
}

// A list of defined tensors, and which of the schema's inputs they are.
struct Present {
  variable_list tensors;
  std::vector<int64_t> places;

  explicit Present(const OptionalList& inputs) {
    for (size_t i = 0; i < inputs.size(); ++i) {
      const optional<Tensor> t = inputs.get(i);
      if (!has(t)) continue;
      tensors.push_back(*t);
      places.push_back(static_cast<int64_t>(i));
    }
  }
};

OptionalList spread(at::TensorList tensors, at::IntArrayRef places, size_t size) {
  variable_list all(size);
  for (size_t i = 0; i < places.size(); ++i) all[places[i]] = tensors[i];
  return to_optional(all);
}

struct Memory : torch::autograd::Function<Memory> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, at::TensorList inputs, at::IntArrayRef places,
                               string_view rule, string_view activation, at::IntArrayRef sizes,
                               at::ArrayRef<double> scales, bool output_final_state) {
    at::AutoDispatchBelowADInplaceOrView guard;
    // Under a tracer sizes must follow from shapes alone, and that of what is saved does not:
    // backward computes it again there.
    bool traced = c10::impl::dispatch_mode_enabled();
    for (const Tensor& t : inputs) traced = traced || t.key_set().has(c10::DispatchKey::Python);
    auto [o, memory, momentum, gradient_at, kept] =
        call_memory(spread(inputs, places, kInputs), rule, activation, sizes, scales,
                    output_final_state, /*save=*/!traced);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({kept});
    variable_list saved = inputs.vec();
    saved.push_back(kept);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["places"] = places.vec();
    ctx->saved_data["rule"] = std::string(rule);
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["sizes"] = sizes.vec();
    ctx->saved_data["scales"] = scales.vec();
    return {o, memory, momentum, gradient_at, kept};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto op = typed_op<std::vector<Tensor>(
        const OptionalList&, const OptionalList&, const Tensor&, string_view, string_view,
        at::IntArrayRef, at::ArrayRef<double>)>("gdn::test_time_memory_bwd");
    variable_list inputs = ctx->get_saved_variables();
    const Tensor kept = inputs.back();
    inputs.pop_back();
    variable_list result(inputs.size() + 6);  // and those of the other arguments, none
    grads.resize(4);
    bool any = false;
    for (Tensor& g : grads) {
      if (g.defined() && g.sym_numel() == 0) g = Tensor();
      any = any || g.defined();
    }
    if (!any) return result;
    const auto places = ctx->saved_data["places"].toIntVector();
    const auto sizes = ctx->saved_data["sizes"].toIntVector();
    const auto scales = ctx->saved_data["scales"].toDoubleVector();
    const std::vector<Tensor> found =
        op.call(to_optional(grads), spread(inputs, places, kInputs), kept,
                ctx->saved_data["rule"].toStringRef(), ctx->saved_data["activation"].toStringRef(),
                sizes, scales);
    for (size_t i = 0; i < places.size(); ++i)
      if (places[i] < kDifferentiable) result[i] = found[places[i]];
    return result;
  }
};

Outputs memory_autograd(const OptionalList& inputs, string_view rule, string_view activation,
                        at::IntArrayRef sizes, at::ArrayRef<double> scales, bool output_final_state,
                        bool save) {
  const Present present(inputs);
  bool wanted = false;
  for (const Tensor& t : present.tensors) wanted = wanted || wants_grad(t);
  if (wanted) {
    const variable_list out =
        Memory::apply(at::TensorList(present.tensors), at::IntArrayRef(present.places), rule,
                      activation, sizes, scales, output_final_state);
    // What was saved is the graph's.
    return {out[0], out[1], out[2], out[3], at::empty({0}, out[1].options())};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_memory(inputs, rule, activation, sizes, scales, output_final_state, save);
}

Tensor call_step(const OptionalList& inputs, Tensor& memory, Tensor& momentum, Tensor& gradient_at,
                 const optional<Tensor>& slots, string_view rule, string_view activation,
                 at::IntArrayRef sizes, at::ArrayRef<double> scales) {
  static const auto op =
      typed_op<Tensor(const OptionalList&, Tensor&, Tensor&, Tensor&, const optional<Tensor>&,
                      string_view, string_view, at::IntArrayRef, at::ArrayRef<double>)>(
          "gdn::test_time_memory_step_");
  return op.call(inputs, memory, momentum, gradient_at, slots, rule, activation, sizes, scales);
}

Tensor memory_step_autograd(const OptionalList& inputs, Tensor& memory, Tensor& momentum,
                            Tensor& gradient_at, const optional<Tensor>& slots, string_view rule,
                            string_view activation, at::IntArrayRef sizes,
                            at::ArrayRef<double> scales) {
  bool wanted = wants_grad(memory, momentum, gradient_at);
  for (const Tensor& t : Present(inputs).tensors) wanted = wanted || wants_grad(t);
  return step_in_place("test_time_memory_step_", "test_time_memory", wanted,
                       {&memory, &momentum, &gradient_at}, [&] {
                         return call_step(inputs, memory, momentum, gradient_at, slots, rule,
                                          activation, sizes, scales);
                       });
}

}  // namespace

bool has_momentum(const MemoryConfig& config, bool eta_given) {
  return config.rule == "ttt" || eta_given;
}

bool has_gradient_at(const MemoryConfig& config) {
  return config.rule == "lmm" && config.chunk > 1 && !config.sequential;
}

MemoryResult test_time_memory(const MemoryTensors& inputs, const MemoryConfig& config,
                              bool output_final_state) {
  auto [o, memory, momentum, gradient_at, saved] =
      call_memory(to_list(inputs), config.rule, config.activation, sizes_of(config),
                  scales_of(config), output_final_state, /*save=*/false);
  MemoryResult result;
  result.o = o;
  if (!output_final_state) return result;
  result.memory = memory;
  if (has_momentum(config, inputs.eta.defined())) result.momentum = momentum;
  if (has_gradient_at(config)) result.gradient_at = gradient_at;
  return result;
}

Tensor test_time_memory_step_(const MemoryTensors& inputs, const MemoryConfig& config,
                              const Tensor& slots) {
  MemoryTensors others = inputs;
  Tensor memory = inputs.memory, none = at::empty({0}, inputs.memory.options());
  Tensor momentum = inputs.momentum.defined() ? inputs.momentum : none;
  Tensor gradient_at = inputs.gradient_at.defined() ? inputs.gradient_at : none.clone();
  others.memory = others.momentum = others.gradient_at = Tensor();
  return call_step(to_list(others), memory, momentum, gradient_at, given(slots), config.rule,
                   config.activation, sizes_of(config), scales_of(config));
}

}  // namespace gdn::ops

TORCH_LIBRARY_FRAGMENT(gdn, m) {
  // inputs: q, k, v, rate, eta, alpha, tau, anchor, norm_weight, norm_bias, memory, momentum,
  // gradient_at, position, cu_seqlens; sizes: depth, hidden, bias, chunk, sequential, read_before;
  // scales: norm_eps, loss_scale, clip.
  m.def(
      "test_time_memory(Tensor?[] inputs, str rule, str activation, int[] sizes, float[] scales, "
      "bool output_final_state=False, bool save=False) -> (Tensor o, Tensor memory, Tensor "
      "momentum, Tensor gradient_at, Tensor saved)");
  m.def(
      "test_time_memory_bwd(Tensor?[] grads, Tensor?[] inputs, Tensor saved, str rule, str "
      "activation, int[] sizes, float[] scales) -> Tensor[]");
  m.def(
      "test_time_memory_step_(Tensor?[] inputs, Tensor(a!) memory, Tensor(b!) momentum, Tensor(c!) "
      "gradient_at, Tensor? slots, str rule, str activation, int[] sizes, float[] scales) -> "
      "Tensor");
}

TORCH_LIBRARY_IMPL(gdn, CPU, m) {
  m.impl("test_time_memory", gdn::ops::memory_cpu);
  m.impl("test_time_memory_bwd", gdn::ops::memory_bwd_cpu);
  m.impl("test_time_memory_step_", gdn::ops::memory_step_cpu);
}

TORCH_LIBRARY_IMPL(gdn, Meta, m) {
  m.impl("test_time_memory", gdn::ops::memory_meta);
  m.impl("test_time_memory_bwd", gdn::ops::memory_bwd_meta);
  m.impl("test_time_memory_step_", gdn::ops::memory_step_meta);
}

TORCH_LIBRARY_IMPL(gdn, Autograd, m) {
  m.impl("test_time_memory", gdn::ops::memory_autograd);
  m.impl("test_time_memory_step_", gdn::ops::memory_step_autograd);
  m.impl("test_time_memory_bwd", torch::autograd::autogradNotImplementedFallback());
}
