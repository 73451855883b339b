// SPDX-License-Identifier: Apache-2.0
#include "gdn/eval/adapt.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/tensor.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cstdio>

#include "gdn/base/check.h"
#include "gdn/ops/cross_entropy.h"

namespace gdn {
namespace {

// Losses of ids [1,T] -> targets [T], going on from `state`.
at::Tensor window_losses(CausalLM& model, const at::Tensor& ids, const at::Tensor& targets,
                         ModelState& state) {
  ModelContext ctx;
  ctx.state = &state;
  const at::Tensor hidden = model.hidden(ids, ctx).squeeze(0);  // [T,D]
  return std::get<0>(ops::cross_entropy(model.logits(hidden), targets)).to(at::kDouble);
}

}  // namespace

std::vector<AdaptBucket> adapt_losses(CausalLM& model, const std::vector<int64_t>& ids,
                                      int64_t window, int64_t buckets) {
  GDN_CHECK(window >= 1 && buckets >= 1, "[adapt] window and buckets must be at least 1, got ",
            window, " and ", buckets);
  const auto T = static_cast<int64_t>(ids.size()) - 1;
  GDN_CHECK(T >= 2 * window, "[adapt] the document must have at least ", 2 * window + 1,
            " tokens, two windows and one, got ", ids.size());
  const c10::InferenceMode inference;
  const at::Tensor all = at::tensor(ids, at::kLong);
  ModelState carried = model.zero_state(1), first;
  std::vector<at::Tensor> losses[3];
  for (int64_t t = 0; t < T; t += window) {
    const int64_t n = std::min(window, T - t);
    const at::Tensor part = all.narrow(0, t, n).unsqueeze(0), targets = all.narrow(0, t + 1, n);
    losses[0].push_back(window_losses(model, part, targets, carried));
    if (t == 0) {
      first = carried.clone();
      losses[1].push_back(losses[0][0]);
      losses[2].push_back(losses[0][0]);
      continue;
    }
    ModelState empty = model.zero_state(1), frozen = first.clone();
    losses[1].push_back(window_losses(model, part, targets, empty));
    losses[2].push_back(window_losses(model, part, targets, frozen));
  }
  at::Tensor kinds[3];
  for (int kind = 0; kind < 3; ++kind) kinds[kind] = at::cat(losses[kind], 0);
  const auto mean = [&](int64_t begin, int64_t end) {
    const auto of = [&](int kind) {
      return kinds[kind].slice(0, begin, end).mean().item<double>();
    };
    return AdaptBucket{begin, end, of(0), of(1), of(2)};
  };
  const int64_t windows = (T + window - 1) / window, unit = windows >= buckets ? window : 1;
  const int64_t units = (T + unit - 1) / unit, count = std::min(buckets, units);
  std::vector<AdaptBucket> result;
  for (int64_t i = 0; i < count; ++i) {
    result.push_back(
        mean(std::min(i * units / count * unit, T), std::min((i + 1) * units / count * unit, T)));
  }
  result.push_back(mean(0, T));
  return result;
}

std::string adapt_table(const std::vector<AdaptBucket>& losses) {
  std::string text = "          positions    carried      reset     frozen\n";
  for (size_t i = 0; i < losses.size(); ++i) {
    const AdaptBucket& b = losses[i];
    char line[128];
    std::snprintf(line, sizeof line, "%9lld-%-9lld %10.4f %10.4f %10.4f\n",
                  static_cast<long long>(b.begin), static_cast<long long>(b.end), b.carried,
                  b.reset, b.frozen);
    text += line;
  }
  return text;
}

}  // namespace gdn
