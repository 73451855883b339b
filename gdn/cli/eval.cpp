// SPDX-License-Identifier: Apache-2.0
// gdn eval TASK: scores of a trained model, and of the memories themselves.
#include <CLI/CLI.hpp>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "gdn/base/check.h"
#include "gdn/cli/cli.h"
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

}  // namespace

void add_eval_command(CLI::App& app, Run& run) {
  auto flags = std::make_shared<EvalFlags>();
  CLI::App* command =
      app.add_subcommand("eval", "Score a trained model, or what memories can do without training");
  command
      ->add_option(
          "task", flags->task,
          "recall: the generated stories of the demo; mechanisms: recall of random pairs and "
          "parity by untrained memories, without a model")
      ->check(CLI::IsMember({"recall", "mechanisms"}))
      ->type_name("TASK");
  command->add_option("-m,--model", flags->model, "Model folder or checkpoint (recall)")
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
  command->add_flag("--json", flags->json, "Print one JSON object");
  command->callback([flags, &run] {
    run = [flags] {
      return flags->task == "mechanisms" ? run_mechanisms_task(*flags) : run_recall(*flags);
    };
  });
}

}  // namespace gdn
