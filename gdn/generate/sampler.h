// SPDX-License-Identifier: Apache-2.0
// From logits to the next token. The steps are, in this order:
//   1. repetition penalty (over prompt and output), presence and frequency penalties (over the
//   output)
//   2. top-k: the k most likely tokens
//   3. top-p: of these, the fewest most likely ones whose probabilities reach p
//   4. min-p: of these, the ones at least min_p times as likely as the most likely one
//   5. temperature, and a draw. Temperature 0 takes the most likely token after step 1.
// Steps 2 to 4 see the probabilities at temperature 1. Equal logits rank by token id.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "gdn/base/rng.h"

namespace gdn {

struct SamplingOptions {
  double temperature = 0.8;
  int64_t top_k = 0;   // 0: off
  double top_p = 1.0;  // 1: off
  double min_p = 0.0;  // 0: off
  double repetition_penalty =
      1.0;  // logits / penalty where positive, * penalty where negative (arXiv 1909.05858)
  double presence_penalty = 0.0;   // subtracted once
  double frequency_penalty = 0.0;  // subtracted once per occurrence
  uint64_t seed = 0;

  void validate() const;  // throws UsageError
};

// The sequence of draws is a function of (seed, stream) and the logits, on every machine.
class Sampler {
 public:
  Sampler(const SamplingOptions& options, uint64_t stream);

  void add_prompt_token(int64_t id) { seen_.insert(id); }
  // Draws a token and counts it as output. Throws Error when the logits hold NaN or no finite
  // value.
  int64_t next(std::span<const float> logits);

 private:
  using Candidate = std::pair<double, int64_t>;  // logit, token
  void penalize();
  void filter();
  int64_t draw();

  SamplingOptions options_;
  Rng rng_;
  std::unordered_set<int64_t> seen_;
  std::unordered_map<int64_t, int64_t> counts_;  // of the output
  std::vector<Candidate> candidates_;
};

}  // namespace gdn
