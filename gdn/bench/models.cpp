// SPDX-License-Identifier: Apache-2.0
// gdn bench train and gdn bench decode: whole models.
#include <ATen/ops/argmax.h>
#include <ATen/ops/randint.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <vector>

#include "gdn/base/check.h"
#include "gdn/bench/ceilings.h"
#include "gdn/bench/profile.h"
#include "gdn/bench/report.h"
#include "gdn/mixers/mixer.h"
#include "gdn/train/config.h"
#include "gdn/train/machine.h"
#include "gdn/train/optimizer.h"
#include "gdn/train/step.h"

namespace gdn::bench {
namespace {

using Clock = std::chrono::steady_clock;

struct Subject {
  std::string name;
  ModelConfig config;
  int64_t batch_size, seq_len;
};

// The model of a run's configuration; without one, the one that peers are compared with: 4 layers
// of Gated DeltaNet with 4 heads of 64, width 256, SwiGLU of 768, 512 tokens; 3.96 M parameters.
Subject make_subject(const Options& options) {
  std::vector<std::string> known;
  if (!options.mixer.empty()) {
    for (const MixerOption& option : find_mixer(options.mixer).options)
      known.push_back(option.name);
  }
  const std::string with = options.mixer.empty() ? "" : " with " + options.mixer;
  if (!options.config.empty()) {
    RunConfig run = load_run_config(options.config);
    if (!options.mixer.empty()) replace_mixer(run, options.mixer, known);
    return {options.config + with, make_model_config(run, run.model.vocab_size > 0 ? 0 : 256),
            run.data.batch_size, run.data.seq_len};
  }
  Subject subject{"3.96 M parameters" + with, {}, 8, 512};
  BlockConfig block;
  block.mixer_options = {{"head_dim", 64}, {"num_heads", 4}, {"expand_v", 1.0}};
  if (!options.mixer.empty()) {
    block.mixer = options.mixer;
    for (const char* key : {"head_dim", "num_heads", "expand_v"}) {
      if (std::find(known.begin(), known.end(), key) == known.end()) block.mixer_options.erase(key);
    }
  }
  subject.config.blocks.assign(4, block);
  subject.config.hidden_size = 256;
  subject.config.intermediate_size = 768;
  subject.config.vocab_size = 512;
  return subject;
}

std::vector<std::pair<const char*, at::ScalarType>> dtypes(const Options& options) {
  std::vector<std::pair<const char*, at::ScalarType>> list;
  if (options.dtype != "bf16") list.emplace_back("fp32", at::kFloat);
  if (options.dtype != "fp32") list.emplace_back("bf16", at::kBFloat16);
  return list;
}

std::vector<std::pair<std::string, nlohmann::ordered_json>> shares(const Profile& profile) {
  std::vector<std::pair<std::string, nlohmann::ordered_json>> list;
  double all = 0;
  const auto parts = profile.seconds_by_part();
  for (const auto& [part, seconds] : parts) all += seconds;
  for (const auto& [part, seconds] : parts) {
    list.emplace_back(str_cat(name_of(part), " %"), 100 * seconds / all);
  }
  return list;
}

// Elements of the matrices that each token is multiplied by: all but an embedding that is not the
// head's, too.
int64_t weights_in_products(const CausalLM& model) {
  int64_t elements = 0;
  for (const auto& named : model.named_parameters()) {
    const bool looked_up =
        named.key().ends_with("embeddings.weight") && !model.config().tie_word_embeddings;
    if (named.value().dim() == 2 && !looked_up) elements += named.value().numel();
  }
  return elements;
}

// The operations that take the most time, one line each.
void note_operations(Report& report, const Profile& profile, const std::string& what) {
  std::vector<std::pair<double, std::string>> list;
  double all = 0;
  for (const auto& [name, entry] : profile.operations()) {
    list.emplace_back(entry.seconds, name);
    all += entry.seconds;
  }
  std::sort(list.rbegin(), list.rend());
  std::string text = what + ", % of the time in operations (calls):";
  for (size_t i = 0; i < list.size() && i < 14; ++i) {
    char share[24];
    std::snprintf(share, sizeof(share), "%.1f", 100 * list[i].first / all);
    text += str_cat(i == 0 ? " " : ", ", list[i].second, " ", share, " (",
                    profile.operations().at(list[i].second).calls, ")");
  }
  report.note(text);
}

}  // namespace

int run_train(const Options& options) {
  Report report("train", options, std::cout);
  const Subject subject = make_subject(options);
  const int64_t tokens = subject.batch_size * subject.seq_len;
  for (const int64_t threads : options.threads) {
    report.use_threads(threads);
    Ceilings ceilings(static_cast<int>(threads));
    report.heading(str_cat("training step with AdamW, ", subject.name, ", B=", subject.batch_size,
                           " T=", subject.seq_len,
                           "; ceiling: its products with weights at the peak of multiply-adds"));
    for (const auto& [dtype_name, dtype] : dtypes(options)) {
      const std::string name = str_cat("train step ", dtype_name);
      if (!report.wanted(name)) continue;
      CausalLM model(subject.config);
      model.set_compute_dtype(dtype);
      AdamW optimizer(parameters_of(model), {});
      TensorBatch batch;
      batch.ids =
          at::randint(subject.config.vocab_size, {subject.batch_size, subject.seq_len}, at::kLong);
      batch.targets = batch.ids;
      batch.scored = tokens;
      const std::vector<TensorBatch> batches = {batch};
      std::vector<double> updates;
      const auto step = [&] {
        accumulate_gradients(model, batches);
        const auto start = Clock::now();
        optimizer.step(1e-4, optimizer.grad_norm());
        optimizer.zero_grad();
        updates.push_back(std::chrono::duration<double>(Clock::now() - start).count());
      };
      step();
      updates.clear();
      const double seconds = median_seconds(step, 4 * options.seconds);
      Row row{name, static_cast<int>(threads), seconds, static_cast<double>(tokens) / seconds,
              "tok/s"};
      // Forward, and backward by inputs and by weights.
      row.ceiling = 1e9 * ceilings.products(dtype == at::kBFloat16) /
                    (3 * 2 * static_cast<double>(weights_in_products(model)));
      row.extra = {{"optimizer ms", 1e3 * median(updates)}};
      {
        const Profile profile;
        step();
        for (auto& share : shares(profile)) row.extra.push_back(std::move(share));
        report.add(std::move(row));
        note_operations(report, profile, name);
      }
    }
  }
  report.finish();
  return 0;
}

int run_decode(const Options& options) {
  Report report("decode", options, std::cout);
  const Subject subject = make_subject(options);
  for (const int64_t threads : options.threads) {
    report.use_threads(threads);
    Ceilings ceilings(static_cast<int>(threads));
    report.heading(str_cat("greedy decoding, B=1, ", subject.name, ", ", options.tokens,
                           " tokens; ceiling: reading the weights and updating the state"));
    for (const auto& [dtype_name, dtype] : dtypes(options)) {
      const std::string name = str_cat("decode ", dtype_name);
      CausalLM model(subject.config);
      model.set_compute_dtype(dtype);
      model.eval();
      const c10::InferenceMode inference;
      ModelState state = model.zero_state(1);
      at::Tensor next = at::randint(subject.config.vocab_size, {1, 1}, at::kLong);
      const auto token = [&] {
        ModelContext ctx;
        ctx.state = &state;
        next.fill_(at::argmax(model.logits(model.hidden(next, ctx))));
      };
      for (int i = 0; i < 16; ++i) token();
      state = model.zero_state(1);
      const int64_t tokens = std::max<int64_t>(options.tokens, 1);
      const int64_t interval = std::clamp<int64_t>(
          options.interval > 0 ? options.interval : (tokens + 7) / 8, 1, tokens);
      std::vector<double> samples;
      for (int64_t t = 0; t < tokens; ++t) {
        const auto start = Clock::now();
        token();
        samples.push_back(std::chrono::duration<double>(Clock::now() - start).count());
        if ((t + 1) % interval != 0 && t + 1 != tokens) continue;
        if (options.interval == 0 && tokens <= 1024) continue;  // too short to show growth
        const auto part = static_cast<long>(std::min(interval, (t % interval) + 1));
        const double seconds = median(std::vector<double>(samples.end() - part, samples.end()));
        Row row{str_cat("decode ", dtype_name, " up to ", t + 1), static_cast<int>(threads),
                seconds, 1 / seconds, "tok/s"};
        row.extra = {{"state KiB", state.bytes() / 1024},
                     {"process MiB", resident_memory() / 1048576}};
        report.add(std::move(row));
      }
      const double seconds = median(samples);
      Row row{name, static_cast<int>(threads), seconds, 1 / seconds, "tok/s"};
      const int64_t weight_bytes =
          weights_in_products(model) * static_cast<int64_t>(c10::elementSize(dtype));
      row.ceiling = 1 / ceilings.step_seconds(weight_bytes, state.bytes());
      row.extra = {{"state KiB", state.bytes() / 1024}};
      const Profile profile;
      for (int i = 0; i < 64; ++i) token();
      for (auto& share : shares(profile)) row.extra.push_back(std::move(share));
      report.add(std::move(row));
      note_operations(report, profile, name);
    }
  }
  report.finish();
  return 0;
}

}  // namespace gdn::bench
