// SPDX-License-Identifier: Apache-2.0
// gdn generate: continue a prompt.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <charconv>
#include <csignal>
#include <filesystem>
#include <iomanip>
#include <iostream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "gdn/base/check.h"
#include "gdn/base/file.h"
#include "gdn/cli/cli.h"
#include "gdn/generate/engine.h"
#include "gdn/model/checkpoint.h"
#include "gdn/model/state_file.h"

namespace gdn {
namespace {

struct Options {
  std::string model, prompt, prompt_ids, file, state_in, state_out, dtype = "fp32";
  std::optional<int64_t> max_new_tokens, top_k;
  std::optional<double> temperature, top_p, min_p, repetition_penalty;
  double presence_penalty = 0, frequency_penalty = 0;
  uint64_t seed = 0;
  std::vector<std::string> stop;
  int64_t num_samples = 1;
  bool greedy = false, ignore_eos = false, json = false, echo = false, quiet = false;
  bool has_prompt = false;
};

std::vector<int64_t> parse_ids(const std::string& text) {
  std::vector<int64_t> ids;
  std::istringstream words(text);
  for (std::string word; std::getline(words, word, ',');) {
    const size_t begin = word.find_first_not_of(' '), end = word.find_last_not_of(' ') + 1;
    int64_t id = -1;
    const char* first = word.data() + (begin == std::string::npos ? 0 : begin);
    const auto [rest, error] = std::from_chars(first, word.data() + end, id);
    if (error != std::errc() || rest != word.data() + end || id < 0) {
      throw UsageError(
          str_cat("--prompt-ids must be token ids separated by commas, got \"", text, "\""));
    }
    ids.push_back(id);
  }
  if (ids.empty()) throw UsageError("--prompt-ids is empty");
  return ids;
}

std::string read_prompt(const Options& options) {
  if (options.has_prompt) return options.prompt;
  if (!options.file.empty()) return read_text_file(options.file);
  if (!options.state_in.empty()) return "";  // go on from there
  if (::isatty(STDIN_FILENO)) {
    throw UsageError(
        "no prompt: give --prompt TEXT, --prompt-ids 1,2,3, --file FILE, or text on standard "
        "input");
  }
  return {std::istreambuf_iterator<char>(std::cin), {}};
}

// Flags win over the model's generation_config.json, which wins over our defaults.
GenerateOptions resolve(const Options& options) {
  GenerateOptions result;
  SamplingOptions& sampling = result.sampling;
  const std::string path = options.model + "/generation_config.json";
  nlohmann::json config;
  if (std::filesystem::exists(path)) {
    config = nlohmann::json::parse(read_text_file(path), nullptr, /*allow_exceptions=*/false);
    GDN_CHECK(config.is_object(), "[generate] ", path, " is not a JSON object");
  }
  const auto pick = [&](const char* key, const auto& flag, auto& value) {
    if (flag) {
      value = *flag;
    } else if (config.contains(key) && !config[key].is_null()) {
      GDN_CHECK(config[key].is_number(), "[generate] ", path, ": ", key, " must be a number, got ",
                config[key].dump());
      value = config[key].get<std::decay_t<decltype(value)>>();
    }
  };
  pick("max_new_tokens", options.max_new_tokens, result.max_new_tokens);
  pick("temperature", options.temperature, sampling.temperature);
  pick("top_k", options.top_k, sampling.top_k);
  pick("top_p", options.top_p, sampling.top_p);
  pick("min_p", options.min_p, sampling.min_p);
  pick("repetition_penalty", options.repetition_penalty, sampling.repetition_penalty);
  const bool model_is_greedy =
      config.is_object() && config.value("do_sample", nlohmann::json()) == false;
  if (options.greedy || (model_is_greedy && !options.temperature)) sampling.temperature = 0;
  sampling.presence_penalty = options.presence_penalty;
  sampling.frequency_penalty = options.frequency_penalty;
  sampling.seed = options.seed;
  result.stop = options.stop;
  result.ignore_eos = options.ignore_eos;
  result.validate();
  return result;
}

std::atomic<bool> interrupted{false};

// While it lives, the first Ctrl-C sets `interrupted` and the second one ends the program.
class InterruptGuard {
 public:
  InterruptGuard() : before_(std::signal(SIGINT, &InterruptGuard::handle)) { interrupted = false; }
  ~InterruptGuard() { std::signal(SIGINT, before_); }
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;

 private:
  static void handle(int) {
    interrupted = true;
    std::signal(SIGINT, SIG_DFL);
  }
  void (*before_)(int);
};

std::string rate(size_t tokens, double seconds) {
  std::ostringstream out;
  out << tokens << " tokens in " << std::setprecision(3) << seconds * 1e3 << " ms";
  if (seconds > 0 && tokens > 0)
    out << " (" << std::llround(static_cast<double>(tokens) / seconds) << " tok/s)";
  return out.str();
}

void print_closing_line(const Prefill& prompt, const Generation& sample) {
  const size_t decoded = sample.ids.empty() ? 0 : sample.ids.size() - 1;
  std::cerr << "prefill " << rate(prompt.ids.size(), prompt.seconds) << " | first token after "
            << std::setprecision(3) << sample.first_token_seconds * 1e3 << " ms | decode "
            << rate(decoded, sample.decode_seconds) << " | state " << sample.state_bytes
            << " bytes | " << sample.finish_reason << std::endl;
}

int run_generate(const Options& options) {
  GenerateOptions settings = resolve(options);
  settings.keep_state = !options.state_out.empty();
  if (settings.keep_state && options.num_samples != 1)
    throw UsageError("--state-out is for one sample: leave --num-samples away");
  if (options.num_samples < 1) throw UsageError("--num-samples must be at least 1");
  LoadedModel loaded = load_model(options.model);
  if (options.dtype == "bf16") loaded.model->set_compute_dtype(at::kBFloat16);
  const Generator generator(*loaded.model, loaded.tokenizer.get());
  std::optional<SavedState> before;
  if (!options.state_in.empty()) before = load_state(options.state_in, *loaded.model);
  std::vector<int64_t> ids;
  if (!options.prompt_ids.empty()) {
    ids = parse_ids(options.prompt_ids);
  } else {
    const std::string text = read_prompt(options);
    if (!before || !text.empty()) ids = generator.encode(text);
  }

  const InterruptGuard guard;
  const Prefill prompt = generator.prefill(ids, before ? &*before : nullptr);
  const auto stream = [&](std::string_view text) {
    if (!options.json && !text.empty()) std::cout << text << std::flush;
    return !interrupted && std::cout.good();
  };
  for (int64_t i = 0; i < options.num_samples && !interrupted; ++i) {
    if (!options.json && i > 0) std::cout << "---\n";
    if (options.echo && !options.json && loaded.tokenizer) {
      std::cout << loaded.tokenizer->decode(std::vector<int32_t>(ids.begin(), ids.end()));
    }
    const Generation sample =
        generator.generate(prompt, settings, static_cast<uint64_t>(i), stream);
    if (options.json) {
      const nlohmann::json line = {{"prompt_ids", ids},
                                   {"ids", sample.ids},
                                   {"text", sample.text},
                                   {"finish_reason", sample.finish_reason}};
      std::cout << line.dump() << std::endl;
    } else if (loaded.tokenizer) {
      std::cout << std::endl;
    } else {  // nothing to decode with: the ids are the result
      for (size_t n = 0; n < sample.ids.size(); ++n) std::cout << (n ? "," : "") << sample.ids[n];
      std::cout << std::endl;
    }
    if (!options.quiet) print_closing_line(prompt, sample);
    if (settings.keep_state)
      save_state(options.state_out, *loaded.model, {sample.state, sample.logits.unsqueeze(0)});
  }
  if (interrupted) throw Interrupted("interrupted");
  return 0;
}

}  // namespace

void add_generate_command(CLI::App& app, Run& run) {
  auto o = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("generate", "Continue a prompt with a model");
  command
      ->add_option("-m,--model", o->model,
                   "Folder of the model (a checkpoint, or a fla model folder)")
      ->required();

  auto* prompt =
      command->add_option("-p,--prompt", o->prompt, "Text to continue; none: standard input");
  auto* prompt_ids =
      command->add_option("--prompt-ids", o->prompt_ids, "Token ids to continue: 1,2,3");
  auto* file = command->add_option("-f,--file", o->file, "File with the text to continue");
  for (auto* option : {prompt, prompt_ids, file}) option->group("Prompt");
  prompt->excludes(prompt_ids)->excludes(file);
  prompt_ids->excludes(file);

  const char* sampling = "Sampling (defaults: the model's generation_config.json, then these)";
  command->add_option("-n,--max-new-tokens", o->max_new_tokens, "Tokens to generate at most [256]")
      ->group(sampling);
  command->add_flag("--greedy", o->greedy, "Always the most likely token, as --temperature 0")
      ->group(sampling);
  command->add_option("-t,--temperature", o->temperature, "Spread of the draw; 0: greedy [0.8]")
      ->group(sampling);
  command->add_option("--top-k", o->top_k, "Only the k most likely tokens; 0: all [0]")
      ->group(sampling);
  command
      ->add_option("--top-p", o->top_p, "Only the most likely tokens that reach probability p [1]")
      ->group(sampling);
  command
      ->add_option("--min-p", o->min_p,
                   "Only tokens at least this times as likely as the likeliest [0]")
      ->group(sampling);
  command
      ->add_option("--repetition-penalty", o->repetition_penalty,
                   "Divides logits of tokens seen before [1]")
      ->group(sampling);
  command
      ->add_option("--presence-penalty", o->presence_penalty,
                   "Subtracted from logits of tokens generated before")
      ->group(sampling);
  command->add_option("--frequency-penalty", o->frequency_penalty, "The same, once per occurrence")
      ->group(sampling);
  command->add_option("-s,--seed", o->seed, "Equal seeds give equal texts")->group(sampling);
  command->footer("Filters apply in this order: penalties, top-k, top-p, min-p, temperature.\n");

  command->add_option("--stop", o->stop, "End before this text; may be given several times")
      ->allow_extra_args(false)
      ->group("Output");
  command->add_flag("--ignore-eos", o->ignore_eos, "Go on after the end-of-sequence token")
      ->group("Output");
  command->add_option("--num-samples", o->num_samples, "Continuations of the prompt")
      ->group("Output");
  command->add_flag("--echo", o->echo, "Print the prompt before each continuation")
      ->group("Output");
  command
      ->add_flag("--json", o->json,
                 "Print one JSON object per continuation: prompt_ids, ids, text, finish_reason")
      ->group("Output");
  command->add_flag("-q,--quiet", o->quiet, "No closing line with speeds on standard error")
      ->group("Output");
  command
      ->add_option("--state-in", o->state_in,
                   "Go on from the state in this file; the prompt may then be left away")
      ->type_name("FILE")
      ->group("State");
  command
      ->add_option("--state-out", o->state_out,
                   "Write there what the model remembers after the last token")
      ->type_name("FILE")
      ->group("State");
  command->add_option("--dtype", o->dtype, "What to compute in: fp32 or bf16")
      ->check(CLI::IsMember({"fp32", "bf16"}))
      ->group("Computation");
  command->callback([o, prompt, &run] {
    o->has_prompt = prompt->count() > 0;
    run = [o] { return run_generate(*o); };
  });
}

}  // namespace gdn
