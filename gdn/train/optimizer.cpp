// SPDX-License-Identifier: Apache-2.0
#include "gdn/train/optimizer.h"

#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>

#include <optional>
#include <unordered_map>
#include <unordered_set>

#include "gdn/base/check.h"

namespace gdn {
namespace {

std::string sizes_text(const at::Tensor& t) { return str_cat(t.sizes()); }

}  // namespace

NamedTensors parameters_of(const torch::nn::Module& model) {
  NamedTensors out;
  std::unordered_set<const void*> seen;
  for (const auto& item : model.named_parameters())
    if (seen.insert(item.value().unsafeGetTensorImpl()).second)
      out.emplace_back(item.key(), item.value());
  return out;
}

bool decays(const std::string& name, const at::Tensor& parameter) {
  const std::string last = name.substr(name.rfind('.') + 1);
  static const std::unordered_set<std::string> kept = {
      "A_log",  "dt_bias",      "bias",           "log_A_real",
      "A_imag", "time_mix_key", "time_mix_value", "time_mix_receptance"};
  return parameter.dim() >= 2 && kept.count(last) == 0;
}

AdamW::AdamW(NamedTensors parameters, const AdamWOptions& options)
    : parameters_(std::move(parameters)), options_(options) {
  for (const auto& [name, p] : parameters_) {
    exp_avgs_.push_back(at::zeros_like(p));
    exp_avg_sqs_.push_back(at::zeros_like(p));
    step_counts_.push_back(at::zeros({}, p.options().dtype(at::kFloat).requires_grad(false)));
  }
}

double AdamW::grad_norm() const {
  c10::NoGradGuard no_grad;
  std::vector<at::Tensor> grads;
  for (const auto& [name, p] : parameters_)
    if (p.grad().defined()) grads.push_back(p.grad());
  if (grads.empty()) return 0;
  return at::linalg_vector_norm(at::stack(at::_foreach_norm(grads, 2)), 2).item<double>();
}

void AdamW::step(double lr, double grad_norm) {
  c10::NoGradGuard no_grad;
  ++steps_;
  // The fused kernel divides gradients by grad_scale as it reads them, so clipping costs no pass
  // over memory.
  std::optional<at::Tensor> grad_scale;
  if (options_.grad_clip > 0 && grad_norm > options_.grad_clip)
    grad_scale = at::full({}, grad_norm / options_.grad_clip, step_counts_.front().options());
  for (const bool decay : {true, false}) {
    std::vector<at::Tensor> params, grads, exp_avgs, exp_avg_sqs, step_counts;
    for (size_t i = 0; i < parameters_.size(); ++i) {
      const auto& [name, p] = parameters_[i];
      if (!p.grad().defined() || decays(name, p) != decay) continue;
      params.push_back(p);
      grads.push_back(p.grad());
      exp_avgs.push_back(exp_avgs_[i]);
      exp_avg_sqs.push_back(exp_avg_sqs_[i]);
      step_counts.push_back(step_counts_[i].fill_(static_cast<double>(steps_)));
    }
    if (params.empty()) continue;
    at::_fused_adamw_(params, grads, exp_avgs, exp_avg_sqs, /*max_exp_avg_sqs=*/{}, step_counts, lr,
                      options_.beta1, options_.beta2, decay ? options_.weight_decay : 0.0,
                      options_.eps, /*amsgrad=*/false,
                      /*maximize=*/false, grad_scale, /*found_inf=*/std::nullopt);
  }
}

void AdamW::zero_grad() {
  for (auto& [name, p] : parameters_) p.mutable_grad().reset();
}

NamedTensors AdamW::state() const {
  NamedTensors out;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    out.emplace_back("exp_avg." + parameters_[i].first, exp_avgs_[i]);
    out.emplace_back("exp_avg_sq." + parameters_[i].first, exp_avg_sqs_[i]);
  }
  return out;
}

void AdamW::load_state(const NamedTensors& state, int64_t steps) {
  std::unordered_map<std::string, at::Tensor> by_name(state.begin(), state.end());
  for (auto& [name, mine] : this->state()) {
    const auto found = by_name.find(name);
    GDN_CHECK(found != by_name.end(), "[train] the optimizer's state lacks ", name);
    GDN_CHECK(found->second.sizes() == mine.sizes(), "[train] the optimizer's ", name, " must be ",
              sizes_text(mine), ", got ", sizes_text(found->second));
    mine.copy_(found->second);
  }
  steps_ = steps;
}

}  // namespace gdn
