// SPDX-License-Identifier: Apache-2.0
#include "gdn/train/step.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cstring>

#include "gdn/base/check.h"

namespace gdn {
namespace {

at::Tensor to_tensor(const std::vector<int64_t>& values, at::IntArrayRef sizes) {
  at::Tensor out = at::empty(sizes, at::kLong);
  std::memcpy(out.mutable_data_ptr<int64_t>(), values.data(), values.size() * sizeof(int64_t));
  return out;
}

// "NAME (3 of 192 values are not finite)", or "".
std::string if_bad(const std::string& name, const at::Tensor& t) {
  if (!t.defined()) return "";
  const int64_t bad = t.numel() - at::isfinite(t.detach()).sum().item<int64_t>();
  return bad == 0 ? "" : str_cat(name, " (", bad, " of ", t.numel(), " values are not finite)");
}

}  // namespace

ModelContext TensorBatch::context() const {
  ModelContext ctx;
  ctx.seqs.cu_seqlens = cu_seqlens;
  return ctx;
}

TensorBatch to_tensors(const Batch& batch) {
  TensorBatch out;
  out.ids = to_tensor(batch.ids, {batch.B, batch.T});
  out.targets = to_tensor(batch.targets, {batch.B, batch.T});
  if (!batch.cu_seqlens.empty())
    out.cu_seqlens = to_tensor(batch.cu_seqlens, {static_cast<int64_t>(batch.cu_seqlens.size())});
  out.scored = std::count_if(batch.targets.begin(), batch.targets.end(),
                             [](int64_t t) { return t != -100; });
  return out;
}

double accumulate_gradients(CausalLM& model, const std::vector<TensorBatch>& batches) {
  int64_t scored = 0;
  for (const TensorBatch& batch : batches) scored += batch.scored;
  GDN_CHECK(scored > 0, "[train] a batch must have targets, got none");
  double total = 0;
  for (const TensorBatch& batch : batches) {
    if (batch.scored == 0) continue;
    at::Tensor loss = model.loss(batch.ids, batch.targets, batch.context());
    if (batch.scored != scored)
      loss = loss * (static_cast<double>(batch.scored) / static_cast<double>(scored));
    loss.backward();
    total += loss.item<double>();
  }
  return total;
}

std::string first_bad_tensor(CausalLM& model, const NamedTensors& parameters,
                             const std::vector<TensorBatch>& batches) {
  c10::NoGradGuard no_grad;
  for (const auto& [name, p] : parameters)
    if (const std::string bad = if_bad("parameter " + name, p); !bad.empty()) return bad;
  for (const TensorBatch& batch : batches) {
    const at::Tensor hidden = model.hidden(batch.ids, batch.context());
    if (const std::string bad = if_bad("activation \"hidden\", the final norm's output", hidden);
        !bad.empty())
      return bad;
    if (const std::string bad = if_bad("activation \"logits\"", model.logits(hidden)); !bad.empty())
      return bad;
    if (const std::string bad =
            if_bad("the loss", model.loss(batch.ids, batch.targets, batch.context()));
        !bad.empty())
      return bad;
  }
  // Backward runs from the last layer to the first.
  for (auto item = parameters.rbegin(); item != parameters.rend(); ++item)
    if (const std::string bad = if_bad("gradient of " + item->first, item->second.grad());
        !bad.empty())
      return bad;
  return "";
}

}  // namespace gdn
