// SPDX-License-Identifier: Apache-2.0
#include "gdn/generate/engine.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <chrono>
#include <span>
#include <utility>

#include "gdn/base/check.h"
#include "gdn/generate/stop.h"
#include "gdn/text/utf8.h"

namespace gdn {
namespace {

using Clock = std::chrono::steady_clock;

// Tokens of the prompt that go through the model at once: long enough for the chunk form, short
// enough that a long prompt's activations stay small.
constexpr int64_t kPrefillTokens = 2048;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

void GenerateOptions::validate() const {
  sampling.validate();
  if (max_new_tokens < 0)
    throw UsageError(str_cat("[generate] max_new_tokens must be >= 0, got ", max_new_tokens));
}

Generator::Generator(CausalLM& model, const Tokenizer* tokenizer)
    : model_(model), tokenizer_(tokenizer) {
  GDN_CHECK(tokenizer == nullptr || tokenizer->vocab_size() <= model.config().vocab_size,
            "[generate] the tokenizer has ", tokenizer->vocab_size(), " tokens, the model only ",
            model.config().vocab_size, ": they do not belong together");
}

std::vector<int64_t> Generator::encode(std::string_view text) const {
  if (!text.empty()) {
    GDN_CHECK(tokenizer_ != nullptr,
              "[generate] the model has no tokenizer.json: give the prompt as token ids");
    const std::vector<int32_t> ids = tokenizer_->encode(text);
    return {ids.begin(), ids.end()};
  }
  const ModelConfig& config = model_.config();
  for (const auto& id : {config.bos_token_id, config.eos_token_id}) {
    if (id && *id < config.vocab_size) return {*id};
  }
  if (tokenizer_ != nullptr && tokenizer_->eos_id() >= 0) return {tokenizer_->eos_id()};
  throw UsageError(
      "[generate] the prompt is empty, and the model has no token to begin with: give a prompt");
}

bool Generator::is_eos(int64_t id) const {
  return id == model_.config().eos_token_id ||
         (tokenizer_ != nullptr && id == tokenizer_->eos_id());
}

at::Tensor Generator::last_logits(const at::Tensor& ids, ModelState& state) const {
  ModelContext ctx;
  ctx.state = &state;
  const at::Tensor hidden = model_.hidden(ids, ctx);  // [1,T,D]
  return model_.logits(hidden.select(1, hidden.size(1) - 1))
      .view({-1})
      .to(at::kCPU, at::kFloat)
      .contiguous();
}

Prefill Generator::prefill(std::vector<int64_t> ids, const SavedState* before) const {
  const c10::InferenceMode inference;
  GDN_CHECK(!ids.empty() || before != nullptr, "[generate] the prompt has no tokens");
  GDN_CHECK(before == nullptr || before->logits.size(0) == 1,
            "[generate] the state to go on from must hold 1 sequence, got ",
            before == nullptr ? 0 : before->logits.size(0));
  for (const int64_t id : ids) {
    GDN_CHECK(id >= 0 && id < model_.config().vocab_size, "[generate] prompt token ", id,
              " is outside the vocabulary [0, ", model_.config().vocab_size, ")");
  }
  const auto start = Clock::now();
  Prefill result;
  if (before != nullptr) {
    result.state = before->state.clone();
    result.logits = before->logits[0].contiguous();
  } else {
    result.state = model_.zero_state(1);
  }
  const at::Tensor all = at::tensor(ids, at::kLong).unsqueeze(0);  // [1,T]
  for (int64_t t = 0; t < all.size(1); t += kPrefillTokens) {
    const int64_t count = std::min(kPrefillTokens, all.size(1) - t);
    const at::Tensor part = all.narrow(1, t, count);
    if (t + count == all.size(1)) {
      result.logits = last_logits(part, result.state);
    } else {
      ModelContext ctx;
      ctx.state = &result.state;
      model_.hidden(part, ctx);
    }
  }
  result.ids = std::move(ids);
  result.seconds = seconds_since(start);
  return result;
}

Generation Generator::generate(const Prefill& prompt, const GenerateOptions& options,
                               uint64_t sample, const TextSink& sink) const {
  options.validate();
  const c10::InferenceMode inference;
  Generation result;
  result.finish_reason = "length";
  Sampler sampler(options.sampling, sample);
  for (const int64_t id : prompt.ids) sampler.add_prompt_token(id);
  Utf8Stream utf8;
  StopMatcher stops(options.stop);
  const auto show = [&](const std::string& text) {
    result.text += text;
    if (sink && !sink(text)) result.finish_reason = "interrupted";
  };
  // Rows beyond the tokenizer's vocabulary are padding of the embedding.
  const int64_t vocab =
      tokenizer_ != nullptr ? tokenizer_->vocab_size() : model_.config().vocab_size;

  const auto start = Clock::now();
  auto first = start;
  ModelState state = prompt.state.clone();
  at::Tensor logits = prompt.logits;
  const at::Tensor next = at::empty({1, 1}, at::kLong);
  for (int64_t n = 0; n < options.max_new_tokens && result.finish_reason == "length"; ++n) {
    if (n > 0) logits = last_logits(next, state);
    const int64_t id =
        sampler.next(std::span(logits.const_data_ptr<float>(), static_cast<size_t>(vocab)));
    result.ids.push_back(id);
    if (n == 0) first = Clock::now();
    if (!options.ignore_eos && is_eos(id)) {
      result.finish_reason = "stop";
      break;
    }
    next.fill_(id);
    if (tokenizer_ == nullptr) {
      show("");
      continue;
    }
    show(stops.push(utf8.push(tokenizer_->token_bytes(static_cast<int32_t>(id)))));
    if (stops.stopped() && result.finish_reason == "length") result.finish_reason = "stop";
  }
  if (tokenizer_ != nullptr && !stops.stopped()) {
    const std::string reason = result.finish_reason;
    const std::string rest = stops.push(utf8.flush());
    show(rest + stops.flush());
    result.finish_reason = stops.stopped() && reason == "length" ? "stop" : reason;
  }
  const auto end = Clock::now();
  result.first_token_seconds =
      prompt.seconds + std::chrono::duration<double>(first - start).count();
  result.decode_seconds = std::chrono::duration<double>(end - first).count();
  result.state_bytes = state.bytes();
  if (options.keep_state) {
    // The last token drawn has not been read yet.
    result.logits =
        result.ids.empty()
            ? logits
            : last_logits(at::tensor({result.ids.back()}, at::kLong).view({1, 1}), state);
    result.state = std::move(state);
  }
  return result;
}

}  // namespace gdn
