// SPDX-License-Identifier: Apache-2.0
#include "gdn/kernels/cross_entropy.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "gdn/ops/cross_entropy.h"

namespace gdn::ops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What the kernel reads, kept alive while it runs.
struct Call {
  CrossEntropyParams params;
  Rows logits;
  Tensor targets;
};

Call prepare(const char* op, const Tensor& logits, const Tensor& targets, int64_t ignore_index) {
  GDN_CHECK(logits.dim() >= 1 && logits.size(-1) >= 1, "[", op,
            "] logits must be [..., vocab] with vocab >= 1, got ", shape_str(logits));
  check_shape(op, "targets", targets, logits.sizes().slice(0, logits.dim() - 1),
              "logits without the last dimension");
  GDN_CHECK(targets.scalar_type() == at::kLong, "[", op, "] targets must be int64, got ",
            c10::toString(targets.scalar_type()));
  Call call;
  CrossEntropyParams& p = call.params;
  p.dtype = dtype_of(op, "logits", logits);
  p.vocab = logits.size(-1);
  p.rows = targets.numel();
  p.ignore_index = ignore_index;
  call.logits = rows_of(logits);
  p.logits = call.logits.tensor.const_data_ptr();
  p.logits_layout = call.logits.layout;
  call.targets = targets.contiguous();
  p.targets = call.targets.const_data_ptr<int64_t>();
  return call;
}

std::tuple<Tensor, Tensor> cross_entropy_cpu(const Tensor& logits, const Tensor& targets,
                                             int64_t ignore_index) {
  const Call call = prepare("cross_entropy", logits, targets, ignore_index);
  const auto options = logits.options().dtype(acc_type(logits.scalar_type()));
  Tensor loss = at::empty(targets.sizes(), options),
         logsumexp = at::empty(targets.sizes(), options);
  cross_entropy_forward(call.params, loss.mutable_data_ptr(), logsumexp.mutable_data_ptr());
  return {loss, logsumexp};
}

Tensor cross_entropy_bwd_cpu(const Tensor& dloss, const Tensor& logits, const Tensor& targets,
                             const Tensor& logsumexp, int64_t ignore_index) {
  const char* op = "cross_entropy_bwd";
  const Call call = prepare(op, logits, targets, ignore_index);
  const at::ScalarType acc = acc_type(logits.scalar_type());
  check_shape(op, "dloss", dloss, targets.sizes(), "of the shape of targets");
  check_shape(op, "logsumexp", logsumexp, targets.sizes(), "of the shape of targets");
  const Tensor dloss_dense = dloss.to(acc).contiguous(), lse_dense = logsumexp.to(acc).contiguous();
  Tensor dlogits = at::empty(logits.sizes(), logits.options());
  cross_entropy_backward(call.params, lse_dense.const_data_ptr(), dloss_dense.const_data_ptr(),
                         dlogits.mutable_data_ptr());
  return dlogits;
}

std::tuple<Tensor, Tensor> cross_entropy_meta(const Tensor& logits, const Tensor& targets,
                                              int64_t) {
  const auto options = logits.options().dtype(acc_type(logits.scalar_type()));
  return {at::empty_symint(targets.sym_sizes(), options),
          at::empty_symint(targets.sym_sizes(), options)};
}

Tensor cross_entropy_bwd_meta(const Tensor&, const Tensor& logits, const Tensor&, const Tensor&,
                              int64_t) {
  return like(logits);
}

Tensor cross_entropy_bwd(const Tensor& dloss, const Tensor& logits, const Tensor& targets,
                         const Tensor& logsumexp, int64_t ignore_index) {
  static const auto op =
      typed_op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t)>(
          "gdn::cross_entropy_bwd");
  return op.call(dloss, logits, targets, logsumexp, ignore_index);
}

struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  static constexpr bool is_traceable = true;
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& targets,
                               int64_t ignore_index) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, logsumexp] = cross_entropy(logits, targets, ignore_index);
    ctx->save_for_backward({logits, targets, logsumexp});
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->mark_non_differentiable({logsumexp});
    return {loss, logsumexp};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const int64_t ignore_index = ctx->saved_data["ignore_index"].toInt();
    return {cross_entropy_bwd(grads[0], saved[0], saved[1], saved[2], ignore_index), Tensor(),
            Tensor()};
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(gdn, m) {
  m.def(
      "cross_entropy(Tensor logits, Tensor targets, int ignore_index=-100) -> (Tensor loss, Tensor "
      "logsumexp)");
  m.def(
      "cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor targets, Tensor logsumexp, int "
      "ignore_index) -> Tensor");
}

TORCH_LIBRARY_IMPL(gdn, CPU, m) {
  m.impl("cross_entropy", cross_entropy_cpu);
  m.impl("cross_entropy_bwd", cross_entropy_bwd_cpu);
}

TORCH_LIBRARY_IMPL(gdn, Meta, m) {
  m.impl("cross_entropy", cross_entropy_meta);
  m.impl("cross_entropy_bwd", cross_entropy_bwd_meta);
}

TORCH_LIBRARY_IMPL(gdn, Autograd, m) {
  m.impl("cross_entropy", with_autograd<CrossEntropy, &cross_entropy>);
  m.impl("cross_entropy_bwd", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace gdn::ops
