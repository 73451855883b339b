// SPDX-License-Identifier: Apache-2.0
// gdn eval TASK: scores of a trained model, and of the memories themselves.
#include <CLI/CLI.hpp>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "gdn/base/check.h"
#include "gdn/base/file.h"
#include "gdn/cli/cli.h"
#include "gdn/eval/adapt.h"
#include "gdn/eval/mechanisms.h"
#include "gdn/eval/recall.h"
#include "gdn/model/checkpoint.h"

namespace gdn {
namespace {

struct EvalFlags {
  std::string task = "recall";
  std::string model;
  int64_t stories = 1000;
  int64_t first_story = 512;
  int64_t seq_len = 512;
  uint64_t seed = 1;
  std::string file;
  int64_t window = 512;
  int64_t buckets = 8;
  int64_t max_tokens = 0;
  bool json = false;
};

int run_recall(const EvalFlags& flags) {
  if (flags.model.empty()) throw UsageError("[eval] recall needs --model");
  const LoadedModel loaded = load_model(flags.model);
  const std::vector<Story> stories =
      held_out_stories(flags.seq_len, flags.first_story, flags.stories);
  const std::vector<RecallScore> scores =
      score_recall(stories, answer_stories(*loaded.model, stories));
  if (!flags.json) {
    std::cout << recall_table({"recall"}, {scores});
    return 0;
  }
  nlohmann::ordered_json out = {
      {"task", flags.task}, {"model", flags.model}, {"stories", flags.stories}};
  for (const RecallScore& score : scores) {
    out["questions"].push_back({{"question", score.question},
                                {"asked", score.asked},
                                {"recall", score.recall},
                                {"chance", score.chance},
                                {"any_value_of_key", score.any_value_of_key}});
  }
  std::cout << out.dump(2) << "\n";
  return 0;
}

int run_mechanisms_task(const EvalFlags& flags) {
  const std::vector<MechanismTable> tables = run_mechanisms(flags.seed);
  if (!flags.json) {
    std::cout << mechanisms_text(tables);
    return 0;
  }
  nlohmann::ordered_json out = {{"task", flags.task}, {"seed", flags.seed}};
  for (const MechanismTable& table : tables) {
    nlohmann::ordered_json rows = nlohmann::ordered_json::array();
    for (const auto& [memory, recall] : table.rows) {
      rows.push_back({{"memory", memory}, {"recall", recall}});
    }
    out["tables"].push_back({{"name", table.name},
                             {"question", table.question},
                             {table.column, table.sizes},
                             {"rows", rows}});
  }
  std::cout << out.dump(2) << "\n";
  return 0;
}

int run_adapt(const EvalFlags& flags) {
  if (flags.model.empty()) throw UsageError("adapt needs a model: --model FOLDER");
  if (flags.file.empty()) throw UsageError("adapt needs a document: --file FILE");
  const LoadedModel loaded = load_model(flags.model);
  GDN_CHECK(loaded.tokenizer != nullptr, "[adapt] ", flags.model, " has no tokenizer.json");
  const std::vector<int32_t> tokens = loaded.tokenizer->encode(read_text_file(flags.file));
  std::vector<int64_t> ids(tokens.begin(), tokens.end());
  if (flags.max_tokens > 0 && static_cast<int64_t>(ids.size()) > flags.max_tokens)
    ids.resize(static_cast<size_t>(flags.max_tokens));
  const std::vector<AdaptBucket> losses =
      adapt_losses(*loaded.model, ids, flags.window, flags.buckets);
  if (!flags.json) {
    std::cout << "loss in nats per token of " << flags.file << ", memory carried on, reset every "
              << flags.window << " tokens, frozen after the first " << flags.window << "\n"
              << adapt_table(losses);
    return 0;
  }
  nlohmann::ordered_json out = {{"task", flags.task},
                                {"model", flags.model},
                                {"file", flags.file},
                                {"tokens", ids.size()},
                                {"window", flags.window}};
  for (const AdaptBucket& bucket : losses) {
    out["buckets"].push_back({{"begin", bucket.begin},
                              {"end", bucket.end},
                              {"carried", bucket.carried},
                              {"reset", bucket.reset},
                              {"frozen", bucket.frozen}});
  }
  std::cout << out.dump(2) << "\n";
  return 0;
}

}  // namespace

void add_eval_command(CLI::App& app, Run& run) {
  auto flags = std::make_shared<EvalFlags>();
  CLI::App* command =
      app.add_subcommand("eval", "Score a trained model, or what memories can do without training");
  command
      ->add_option(
          "task", flags->task,
          "recall: the generated stories of the demo; mechanisms: recall of random pairs and "
          "parity by untrained memories, without a model; adapt: loss along a document with the "
          "memory carried on, reset and frozen")
      ->check(CLI::IsMember({"recall", "mechanisms", "adapt"}))
      ->type_name("TASK");
  command->add_option("-m,--model", flags->model, "Model folder or checkpoint (recall, adapt)")
      ->type_name("FOLDER");
  command->add_option("--seed", flags->seed, "Seed of the random pairs (mechanisms)");
  command->add_option("--stories", flags->stories, "Held-out stories to ask about")
      ->check(CLI::Range(1, 1000000));
  command
      ->add_option("--first-story", flags->first_story,
                   "Number of the first one (training validates on the first 512)")
      ->check(CLI::NonNegativeNumber);
  command->add_option("-t,--seq-len", flags->seq_len, "Longest story in tokens")
      ->check(CLI::Range(kMinStoryTokens, int64_t{1} << 20));
  command->add_option("-f,--file", flags->file, "adapt: the document, UTF-8 text")
      ->type_name("FILE");
  command->add_option("--window", flags->window, "adapt: tokens between resets")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20));
  command->add_option("--buckets", flags->buckets, "adapt: parts of the document to print")
      ->check(CLI::Range(1, 10000));
  command->add_option("--max-tokens", flags->max_tokens, "adapt: read no more; 0: all")
      ->check(CLI::NonNegativeNumber);
  command->add_flag("--json", flags->json, "Print one JSON object");
  command->callback([flags, &run] {
    run = [flags] {
      if (flags->task == "adapt") return run_adapt(*flags);
      return flags->task == "mechanisms" ? run_mechanisms_task(*flags) : run_recall(*flags);
    };
  });
}

}  // namespace gdn
