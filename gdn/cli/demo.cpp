// SPDX-License-Identifier: Apache-2.0
// gdn demo: trains two models of equal size on the generated stories, one as configured and one
// with the delta rule's erase turned off, and shows what each recalls of stories that neither has
// seen.
#include <ATen/Parallel.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "gdn/base/check.h"
#include "gdn/base/file.h"
#include "gdn/cli/cli.h"
#include "gdn/cli/text_plot.h"
#include "gdn/eval/recall.h"
#include "gdn/generate/engine.h"
#include "gdn/model/checkpoint.h"
#include "gdn/train/allocator.h"
#include "gdn/train/config.h"
#include "gdn/train/trainer.h"

namespace gdn {
namespace {

namespace fs = std::filesystem;

constexpr const char* kPrompt = "Anna entered the kitchen. The lamp came to Anna.";

struct DemoFlags {
  std::string config = "configs/demo.toml";
  std::string out_dir;
  int64_t stories = 1000;
  int64_t max_iters = 0;
  double max_seconds = 0;
  int64_t seed = -1;
  bool quiet = false;
};

struct Contestant {
  std::string name;
  RunConfig config;
  TrainResult result;
  std::vector<std::vector<int32_t>> answers;  // to the stories of the test
  std::vector<RecallScore> scores;
  std::vector<int32_t> sample_answers;  // to the sample story
  std::string generated;                // what it goes on with after kPrompt
};

RunConfig demo_config(const DemoFlags& flags) {
  RunConfig config = load_run_config(flags.config);
  apply_environment(config);
  if (config.data.kind != "stories") {
    throw UsageError(str_cat("[demo] ", flags.config, " must have data.kind = \"stories\", got \"",
                             config.data.kind, "\""));
  }
  if (!flags.out_dir.empty()) config.train.out_dir = flags.out_dir;
  if (flags.max_iters > 0) config.train.max_iters = flags.max_iters;
  if (flags.max_seconds > 0) config.train.max_seconds = flags.max_seconds;
  if (flags.seed >= 0) config.train.seed = flags.seed;
  return config;
}

// Trains in a fresh folder: the demo's own runs are made anew each time.
void run(Contestant& c, const std::vector<Story>& stories, const Story& sample, std::ostream& log) {
  log << "\n=== training: " << c.name << " ===\n";
  fs::remove_all(c.config.train.out_dir);
  c.result = train(c.config, /*resume=*/false, log);
  if (c.result.stopped_by != 0)
    throw Interrupted("[demo] stopped by a signal; nothing was measured");
  const LoadedModel loaded = load_model(c.result.checkpoint);
  c.answers = answer_stories(*loaded.model, stories);
  c.scores = score_recall(stories, c.answers);
  c.sample_answers = answer_stories(*loaded.model, {sample})[0];
  const auto tokenizer = make_story_tokenizer();
  const Generator generator(*loaded.model, tokenizer.get());
  GenerateOptions options;
  options.max_new_tokens = 64;
  options.sampling.seed = static_cast<uint64_t>(c.config.train.seed);
  c.generated = generator.generate(generator.prefill(generator.encode(kPrompt)), options).text;
}

// Mean training loss over pieces of the run, as metrics.jsonl has it.
TextCurve loss_curve(const Contestant& c, char mark) {
  TextCurve curve{c.name, mark, {}};
  std::ifstream file(c.config.train.out_dir + "/metrics.jsonl");
  for (std::string line; std::getline(file, line);) {
    const nlohmann::json entry = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (entry.is_object() && entry.contains("loss"))
      curve.points.emplace_back(entry["step"], entry["loss"]);
  }
  return curve;
}

// The story as lines, questions with the answer of each model.
std::string told(const Story& story, const std::vector<const Contestant*>& contestants) {
  const auto tokenizer = make_story_tokenizer();
  const auto words = [&](size_t begin, size_t end) {
    std::string text = tokenizer->decode(std::span(story.ids).subspan(begin, end - begin));
    text.erase(0, text.find_first_not_of(" \n"));
    return text.substr(0, text.find_last_not_of(" \n") + 1);
  };
  std::string out;
  size_t begin = 0;
  for (size_t q = 0; q < story.answers.size(); ++q) {
    const size_t at = static_cast<size_t>(story.answers[q].position);
    const std::string text = words(begin, at);
    const size_t line = text.rfind('\n');
    if (line != std::string::npos) out += "  " + text.substr(0, line) + "\n";
    std::string question = "    " + text.substr(line == std::string::npos ? 0 : line + 1);
    question.resize(std::max<size_t>(question.size(), 26), ' ');
    out += question;
    for (const Contestant* c : contestants) {
      const bool right = c->sample_answers[q] == story.ids[at];
      std::string answer =
          c->name + ":" + tokenizer->token_bytes(c->sample_answers[q]) + (right ? "" : " (wrong)");
      answer.resize(std::max<size_t>(answer.size(), 36), ' ');
      out += answer;
    }
    out.erase(out.find_last_not_of(' ') + 1);
    out += "\n";
    begin = at + 1;
  }
  return out;
}

// A generated text with its lines two spaces in.
std::string indented(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == ' ' && (out.empty() || out.back() == ' ')) continue;  // words bring their own spaces
    out += c;
    if (c == '\n') out += "  ";
  }
  return out;
}

nlohmann::ordered_json summary(const Contestant& model, const Contestant& erase_off) {
  const auto rounded = [](double x) { return std::round(x * 1e4) / 1e4; };
  const RecallScore& all = model.scores.back();
  nlohmann::ordered_json out = {{"recall", rounded(all.recall)},
                                {"recall_chance", rounded(all.chance)},
                                {"recall_erase_off", rounded(erase_off.scores.back().recall)},
                                {"recall_any_value_of_key", rounded(all.any_value_of_key)},
                                {"questions", all.asked},
                                {"train_seconds", rounded(model.result.seconds)},
                                {"train_seconds_erase_off", rounded(erase_off.result.seconds)},
                                {"steps", model.result.step},
                                {"steps_erase_off", erase_off.result.step},
                                {"val_loss", nullptr},
                                {"val_loss_erase_off", nullptr},
                                {"parameters", model.result.parameters},
                                {"seed", model.config.train.seed},
                                {"threads", at::get_num_threads()}};
  if (model.result.val_loss) out["val_loss"] = *model.result.val_loss;
  if (erase_off.result.val_loss) out["val_loss_erase_off"] = *erase_off.result.val_loss;
  for (size_t k = 0; k + 1 < model.scores.size(); ++k) {
    out["by_question"][model.scores[k].question] = {
        {"asked", model.scores[k].asked},
        {"recall", rounded(model.scores[k].recall)},
        {"recall_erase_off", rounded(erase_off.scores[k].recall)},
        {"recall_chance", rounded(model.scores[k].chance)}};
  }
  return out;
}

int run_demo(const DemoFlags& flags) {
  const RunConfig base = demo_config(flags);
  keep_freed_memory();
  Contestant model{base.model.mixer.name, base, {}, {}, {}, {}, {}},
      erase_off{"erase off", base, {}, {}, {}, {}, {}};
  model.config.train.out_dir = base.train.out_dir + "/model";
  erase_off.config.train.out_dir = base.train.out_dir + "/erase-off";
  set_mixer_option(erase_off.config, "erase=false");
  // The test's stories lie behind those that the runs validate on.
  const std::vector<Story> stories =
      held_out_stories(base.data.seq_len, base.data.val_stories, flags.stories);
  const Story sample =
      make_held_out_story(base.data.seq_len, base.data.val_stories + flags.stories);

  std::ostream silent(nullptr);
  std::ostream& log = flags.quiet ? silent : std::cerr;
  for (Contestant* c : {&model, &erase_off}) run(*c, stories, sample, log);

  std::cout
      << "\nTraining loss in nats per scored token:\n\n"
      << plot_text({loss_curve(model, '*'), loss_curve(erase_off, '.')}, "step") << "\nRecall on "
      << stories.size()
      << " stories that no training or validation step has seen (answers that need the latest "
      << "of several facts):\n\n"
      << recall_table({model.name, erase_off.name}, {model.scores, erase_off.scores})
      << "\nany old value: a guess among all that the person or thing ever had; chance: a guess "
         "among the words "
         "of the story so far.\n"
      << "\nOne more story, with the answers of both:\n\n"
      << told(sample, {&model, &erase_off}) << "\nA story that " << model.name
      << " makes up after \"" << kPrompt << "\":\n\n  " << indented(model.generated) << "\n";
  const std::string path = base.train.out_dir + "/summary.json";
  atomic_write_file(path, summary(model, erase_off).dump(2) + "\n");
  std::cout << "\n"
            << model.result.parameters << " parameters, " << model.result.step << " steps in "
            << std::llround(model.result.seconds) << " s (erase off: " << erase_off.result.step
            << " in " << std::llround(erase_off.result.seconds) << " s); " << path << "\n";
  return 0;
}

}  // namespace

void add_demo_command(CLI::App& app, Run& run) {
  auto flags = std::make_shared<DemoFlags>();
  CLI::App* command = app.add_subcommand("demo",
                                         "Train on generated stories, with and without the delta "
                                         "rule's erase, and compare what is recalled");
  command
      ->add_option("-c,--config", flags->config, "TOML file of the run; its data must be stories")
      ->type_name("FILE");
  command
      ->add_option("--out-dir", flags->out_dir, "Folder of both runs and summary.json (made anew)")
      ->type_name("FOLDER");
  command->add_option("--stories", flags->stories, "Held-out stories to ask about")
      ->check(CLI::Range(1, 1000000));
  command->add_option("--max-iters", flags->max_iters, "Steps of each run, if not as configured")
      ->check(CLI::PositiveNumber);
  command
      ->add_option("--max-seconds", flags->max_seconds,
                   "Time limit of each run, if not as configured")
      ->check(CLI::PositiveNumber);
  command->add_option("-s,--seed", flags->seed, "Seed, if not as configured")
      ->check(CLI::NonNegativeNumber);
  command->add_flag("-q,--quiet", flags->quiet, "No progress on stderr");
  command->callback([flags, &run] { run = [flags] { return run_demo(*flags); }; });
}

}  // namespace gdn
