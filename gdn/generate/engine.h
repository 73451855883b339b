// SPDX-License-Identifier: Apache-2.0
// Generation: the prompt goes through the model in pieces (the chunk form), then token by token
// with the states changed in place, so memory does not grow with what was generated (but for mixers
// whose state grows).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "gdn/generate/sampler.h"
#include "gdn/model/causal_lm.h"
#include "gdn/model/state_file.h"
#include "gdn/text/tokenizer.h"

namespace gdn {

struct GenerateOptions {
  int64_t max_new_tokens = 256;
  SamplingOptions sampling;
  std::vector<std::string> stop;
  bool ignore_eos = false;
  bool keep_state = false;  // leave the state behind in Generation

  void validate() const;  // throws UsageError
};

// What a prompt leaves behind; continued by any number of samples.
struct Prefill {
  std::vector<int64_t> ids;
  ModelState state;
  at::Tensor logits;  // fp32 [vocab] after the last token
  double seconds = 0;
};

struct Generation {
  std::vector<int64_t> ids;        // the end-of-sequence token included, where one was drawn
  std::string text;                // empty without a tokenizer
  std::string finish_reason;       // "stop", "length" or "interrupted"
  double first_token_seconds = 0;  // from the start of the prefill
  double decode_seconds = 0;       // of all tokens but the first, which the prefill gave
  int64_t state_bytes = 0;
  // With keep_state: after the prompt and all of ids, and the logits there, fp32 [vocab].
  ModelState state;
  at::Tensor logits;
};

// Called with each piece of text as soon as it is sure (it may be empty); returns false to end the
// generation.
using TextSink = std::function<bool(std::string_view)>;

class Generator {
 public:
  // tokenizer may be null; both must outlive this object.
  Generator(CausalLM& model, const Tokenizer* tokenizer);

  // Tokens of a text; of an empty one the beginning-of-sequence (else end-of-sequence) token.
  std::vector<int64_t> encode(std::string_view text) const;

  // Goes on from `before`, which is left as it is, instead of from nothing; then ids may be empty.
  Prefill prefill(std::vector<int64_t> ids, const SavedState* before = nullptr) const;
  // Sample number `sample` of a prompt: equal arguments give equal results.
  Generation generate(const Prefill& prompt, const GenerateOptions& options, uint64_t sample = 0,
                      const TextSink& sink = {}) const;

 private:
  at::Tensor last_logits(const at::Tensor& ids, ModelState& state) const;
  bool is_eos(int64_t id) const;

  CausalLM& model_;
  const Tokenizer* tokenizer_;
};

}  // namespace gdn
