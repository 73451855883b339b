// SPDX-License-Identifier: Apache-2.0
#include "gdn/generate/sampler.h"

#include <algorithm>
#include <cmath>

#include "gdn/base/check.h"

namespace gdn {
namespace {

void require(bool condition, const char* name, const char* rule, double value) {
  if (!condition)
    throw UsageError(str_cat("[generate] ", name, " must be ", rule, ", got ", value));
}

// The more likely first, equals by id.
bool before(const std::pair<double, int64_t>& a, const std::pair<double, int64_t>& b) {
  return a.first != b.first ? a.first > b.first : a.second < b.second;
}

}  // namespace

void SamplingOptions::validate() const {
  require(std::isfinite(temperature) && temperature >= 0, "temperature", ">= 0", temperature);
  require(top_k >= 0, "top_k", ">= 0", static_cast<double>(top_k));
  require(top_p > 0 && top_p <= 1, "top_p", "in (0, 1]", top_p);
  require(min_p >= 0 && min_p <= 1, "min_p", "in [0, 1]", min_p);
  require(std::isfinite(repetition_penalty) && repetition_penalty > 0, "repetition_penalty", "> 0",
          repetition_penalty);
  require(std::isfinite(presence_penalty), "presence_penalty", "finite", presence_penalty);
  require(std::isfinite(frequency_penalty), "frequency_penalty", "finite", frequency_penalty);
}

Sampler::Sampler(const SamplingOptions& options, uint64_t stream)
    : options_(options), rng_(options.seed, stream) {
  options_.validate();
}

int64_t Sampler::next(std::span<const float> logits) {
  candidates_.clear();
  for (size_t i = 0; i < logits.size(); ++i) {
    GDN_CHECK(!std::isnan(logits[i]) && logits[i] != INFINITY, "[generate] the logit of token ", i,
              " is ", logits[i], ": the model's weights are broken or overflow");
    candidates_.emplace_back(logits[i], static_cast<int64_t>(i));
  }
  penalize();
  GDN_CHECK(std::any_of(candidates_.begin(), candidates_.end(),
                        [](const Candidate& c) { return std::isfinite(c.first); }),
            "[generate] no token has a finite logit");
  int64_t id;
  if (options_.temperature == 0) {
    id = std::min_element(candidates_.begin(), candidates_.end(), before)->second;
  } else {
    filter();
    id = draw();
  }
  seen_.insert(id);
  ++counts_[id];
  return id;
}

void Sampler::penalize() {
  const auto size = static_cast<int64_t>(candidates_.size());
  if (options_.repetition_penalty != 1.0) {
    for (const int64_t id : seen_) {
      if (id < 0 || id >= size) continue;
      double& logit = candidates_[static_cast<size_t>(id)].first;
      logit = logit > 0 ? logit / options_.repetition_penalty : logit * options_.repetition_penalty;
    }
  }
  if (options_.presence_penalty == 0 && options_.frequency_penalty == 0) return;
  for (const auto& [id, count] : counts_) {
    if (id >= size) continue;
    candidates_[static_cast<size_t>(id)].first -=
        options_.presence_penalty + options_.frequency_penalty * static_cast<double>(count);
  }
}

void Sampler::filter() {
  const auto k = static_cast<size_t>(options_.top_k);
  if (k > 0 && k < candidates_.size()) {
    std::nth_element(candidates_.begin(), candidates_.begin() + static_cast<long>(k),
                     candidates_.end(), before);
    candidates_.resize(k);
  }
  if (options_.top_p < 1.0) {
    std::sort(candidates_.begin(), candidates_.end(), before);
    const double largest = candidates_.front().first;
    double total = 0, sum = 0;
    for (const Candidate& c : candidates_) total += std::exp(c.first - largest);
    size_t kept = 0;
    while (kept < candidates_.size() && (kept == 0 || sum < options_.top_p * total)) {
      sum += std::exp(candidates_[kept++].first - largest);
    }
    candidates_.resize(kept);
  }
  if (options_.min_p > 0) {
    const double largest = std::min_element(candidates_.begin(), candidates_.end(), before)->first;
    const double lowest = largest + std::log(options_.min_p);
    std::erase_if(candidates_, [&](const Candidate& c) { return c.first < lowest; });
  }
}

int64_t Sampler::draw() {
  // By id, so that the draw does not depend on how the filters ordered the candidates.
  std::sort(candidates_.begin(), candidates_.end(),
            [](const Candidate& a, const Candidate& b) { return a.second < b.second; });
  const double largest = std::min_element(candidates_.begin(), candidates_.end(), before)->first;
  double total = 0;
  for (Candidate& c : candidates_) {
    c.first = std::exp((c.first - largest) / options_.temperature);
    total += c.first;
  }
  double rest = rng_.uniform() * total;
  int64_t last = candidates_.front().second;
  for (const auto& [weight, id] : candidates_) {
    if (weight == 0) continue;
    last = id;
    if (rest < weight) break;
    rest -= weight;
  }
  return last;
}

}  // namespace gdn
