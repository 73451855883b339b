// SPDX-License-Identifier: Apache-2.0
#include "gdn/ops/linear_cross_entropy.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <tuple>

#include "gdn/ops/common.h"
#include "gdn/ops/cross_entropy.h"
#include "gdn/ops/linear.h"

namespace gdn::ops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Logits that exist at a time: a few megabytes, but rows enough for an efficient product.
constexpr int64_t kChunkLogits = int64_t{1} << 21, kMinRows = 256;

Tensor cross_entropy_bwd(const Tensor& dloss, const Tensor& logits, const Tensor& targets,
                         const Tensor& logsumexp) {
  static const auto op =
      typed_op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t)>(
          "gdn::cross_entropy_bwd");
  return op.call(dloss, logits, targets, logsumexp, /*ignore_index=*/-100);
}

struct Result {
  Tensor loss, dhidden, dweight;  // gradients of the mean; undefined where not wanted
};

// Runs without recording.
Result compute(const Tensor& hidden, const Tensor& weight, const Tensor& targets, bool want_hidden,
               bool want_weight) {
  const int64_t N = hidden.size(0), V = weight.size(0), D = hidden.size(1);
  const at::ScalarType acc = acc_type(hidden.scalar_type());
  const Tensor w = weight.to(hidden.scalar_type()).contiguous();
  Result r;
  Tensor turned, dloss;
  if (want_hidden) {
    r.dhidden = at::empty({N, D}, hidden.options());
    turned = w.t().contiguous();
  }
  if (want_weight) r.dweight = at::zeros({V, D}, hidden.options().dtype(acc));
  r.loss = at::zeros({}, hidden.options().dtype(acc));
  const int64_t rows = std::max(kMinRows, kChunkLogits / V);
  for (int64_t begin = 0; begin < N; begin += rows) {
    const int64_t count = std::min(rows, N - begin);
    const Tensor h = hidden.narrow(0, begin, count), t = targets.narrow(0, begin, count);
    const Tensor logits = ops::linear(h, w);
    const auto [loss, logsumexp] = cross_entropy(logits, t);
    r.loss += loss.sum();
    if (!want_hidden && !want_weight) continue;
    dloss = at::full({count}, 1.0 / static_cast<double>(N), loss.options());
    const Tensor dlogits = cross_entropy_bwd(dloss, logits, t, logsumexp);
    if (want_hidden) r.dhidden.narrow(0, begin, count).copy_(ops::linear(dlogits, turned));
    if (!want_weight) continue;
    if (acc == hidden.scalar_type()) {
      r.dweight.addmm_(dlogits.t(), h);
    } else {
      r.dweight += at::mm(dlogits.t(), h);
    }
  }
  r.loss /= static_cast<double>(N);
  return r;
}

struct LinearCrossEntropy : torch::autograd::Function<LinearCrossEntropy> {
  static Tensor forward(AutogradContext* ctx, const Tensor& hidden, const Tensor& weight,
                        const Tensor& targets) {
    const Result r =
        compute(hidden, weight, targets, hidden.requires_grad(), weight.requires_grad());
    ctx->save_for_backward({r.dhidden, r.dweight});
    ctx->saved_data["dtype"] = static_cast<int64_t>(weight.scalar_type());
    return r.loss;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    GDN_CHECK(
        !c10::GradMode::is_enabled(),
        "[linear_cross_entropy] has no second derivative; call backward without create_graph");
    const variable_list saved = ctx->get_saved_variables();
    const double scale = grads[0].item<double>();
    const auto scaled = [scale](const Tensor& t) {
      return t.defined() && scale != 1 ? t * scale : t;
    };
    Tensor dweight = scaled(saved[1]);
    if (dweight.defined()) {
      dweight = dweight.to(static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt()));
    }
    return {scaled(saved[0]), dweight, Tensor()};
  }
};

}  // namespace

Tensor linear_cross_entropy(const Tensor& hidden, const Tensor& weight, const Tensor& targets) {
  const char* op = "linear_cross_entropy";
  check_dim(op, "hidden", hidden, 2, "[N,D]");
  check_shape(op, "weight", weight, {-1, hidden.size(1)}, "[V,D]");
  check_shape(op, "targets", targets, {hidden.size(0)}, "[N]");
  GDN_CHECK(hidden.size(0) > 0, "[", op, "] hidden must have rows, got ", shape_str(hidden));
  if (wants_grad(hidden, weight)) return LinearCrossEntropy::apply(hidden, weight, targets);
  return compute(hidden, weight, targets, false, false).loss;
}

}  // namespace gdn::ops
