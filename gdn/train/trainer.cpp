// SPDX-License-Identifier: Apache-2.0
#include "gdn/train/trainer.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <ostream>
#include <sstream>

#include "gdn/base/check.h"
#include "gdn/base/file.h"
#include "gdn/model/checkpoint.h"
#include "gdn/train/machine.h"
#include "gdn/train/metrics.h"
#include "gdn/train/optimizer.h"
#include "gdn/train/run_folder.h"
#include "gdn/train/schedule.h"
#include "gdn/train/signals.h"
#include "gdn/train/step.h"

namespace gdn {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

at::ScalarType compute_dtype(const RunConfig& config) {
  return config.train.dtype == "bf16" ? at::kBFloat16 : at::kFloat;
}

// Replaces dtype "auto" by the resumed run's, else by what this machine is faster in, so that the
// saved configuration names it. Most of a step is matrix products, but not all: a small gain there
// does not pay for the casts.
void choose_dtype(RunConfig& config, bool resume) {
  if (config.train.dtype != "auto") return;
  const std::string saved = config.train.out_dir + "/config.toml";
  if (resume && fs::exists(saved)) {
    config.train.dtype = parse_run_config(read_text_file(saved), saved).train.dtype;
    return;
  }
  const double gain = measure_gemm_peak(at::kBFloat16) / measure_gemm_peak(at::kFloat);
  config.train.dtype = gain >= 1.3 ? "bf16" : "fp32";
}

std::string default_cache_dir() {
  if (const char* cache = std::getenv("XDG_CACHE_HOME"); cache && *cache)
    return str_cat(cache, "/gdn");
  if (const char* home = std::getenv("HOME"); home && *home) return str_cat(home, "/.cache/gdn");
  return "";
}

// torch's generator, which initial weights and any random layer draw from, as text.
std::string generator_state() {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  std::lock_guard<std::mutex> lock(generator.mutex());
  const at::Tensor state = generator.get_state();
  const auto* bytes = state.const_data_ptr<uint8_t>();
  std::string hex;
  for (int64_t i = 0; i < state.numel(); ++i) {
    hex += "0123456789abcdef"[bytes[i] >> 4];
    hex += "0123456789abcdef"[bytes[i] & 15];
  }
  return hex;
}

void set_generator_state(const std::string& hex) {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  std::lock_guard<std::mutex> lock(generator.mutex());
  GDN_CHECK(static_cast<int64_t>(hex.size()) == 2 * generator.get_state().numel(),
            "[train] the random generator's state has ", hex.size() / 2, " bytes, expected ",
            generator.get_state().numel(), ": the checkpoint was made by another version of torch");
  at::Tensor state = at::empty({static_cast<int64_t>(hex.size() / 2)}, at::kByte);
  for (size_t i = 0; i < hex.size() / 2; ++i)
    state.mutable_data_ptr<uint8_t>()[i] =
        static_cast<uint8_t>(std::stoi(hex.substr(2 * i, 2), nullptr, 16));
  generator.set_state(state);
}

// Weights that a token's forward pass multiplies with: all but an embedding that is only looked up.
int64_t matmul_parameters(const CausalLM& model, const NamedTensors& parameters) {
  int64_t count = 0;
  for (const auto& [name, p] : parameters) count += p.numel();
  const ModelConfig& c = model.config();
  return c.tie_word_embeddings ? count : count - c.vocab_size * c.hidden_size;
}

int64_t count_parameters(const NamedTensors& parameters) {
  int64_t count = 0;
  for (const auto& [name, p] : parameters) count += p.numel();
  return count;
}

std::shared_ptr<CausalLM> make_model(const RunConfig& config, const BatchSource& source) {
  const ModelConfig model_config =
      make_model_config(config, source.tokenizer().vocab_size(), source.tokenizer().eos_id());
  model_config.validate();
  at::manual_seed(static_cast<uint64_t>(config.train.seed));
  auto model = std::make_shared<CausalLM>(model_config);
  model->set_compute_dtype(compute_dtype(config));
  model->set_gradient_checkpointing(config.train.gradient_checkpointing);
  return model;
}

std::string join_lines(std::string text) {
  // "[model]\na = 1\nb = 2\n\n[data]\n..." as one line per table.
  std::string out;
  bool first = true;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.empty()) continue;
    if (line[0] == '[') {
      out += (out.empty() ? "" : "\n") + line;
      first = true;
    } else {
      out += (first ? " " : ", ") + line;
      first = false;
    }
  }
  return out;
}

class Trainer {
 public:
  Trainer(const RunConfig& config, bool resume, std::ostream& log);
  TrainResult run();

 private:
  void resume_from(const std::string& checkpoint, const json& state);
  void find_checkpoint();
  void step();
  void report(bool force);
  bool validate(int64_t batches);  // false: interrupted
  void save();
  Progress progress() const;
  double elapsed() const {
    return begin_ ? seconds_before_ + seconds_since(*begin_) : seconds_before_;
  }

  RunConfig config_;
  std::ostream& log_;
  RunLock lock_;
  std::unique_ptr<BatchSource> source_;
  std::shared_ptr<CausalLM> model_;
  std::unique_ptr<AdamW> optimizer_;
  std::unique_ptr<MetricsWriter> metrics_;
  Schedule schedule_;

  int64_t step_ = 0;
  int64_t next_batch_ = 0;
  int64_t resumed_step_ = -1;
  int64_t saved_step_ = -1;
  int64_t reported_step_ = -1;
  std::optional<double> best_val_loss_;
  TrainResult result_;
  Metrics now_;
  double gemm_peak_ = 0;
  double flops_per_token_ = 0;
  std::optional<Clock::time_point> begin_;  // of training: after the first validation
  double seconds_before_ = 0;

  // Since the last progress line, without validation and saving.
  double busy_seconds_ = 0;
  int64_t busy_steps_ = 0, busy_tokens_ = 0;
};

Trainer::Trainer(const RunConfig& config, bool resume, std::ostream& log)
    : config_(config), log_(log), lock_(config.train.out_dir) {
  const RunConfig::Train& t = config_.train;
  if (!resume && has_run(t.out_dir))
    throw UsageError(str_cat(
        "[train] ", t.out_dir,
        " holds a run already: go on with it by --resume, choose another --out-dir, or delete it"));
  prune_checkpoints(t.out_dir, 0);  // what an interrupted save left behind
  choose_dtype(config_, resume);
  source_ = make_source(config_);
  log_ << "data: " << source_->describe() << "\n";
  model_ = make_model(config_, *source_);
  optimizer_ = std::make_unique<AdamW>(
      parameters_of(*model_), AdamWOptions{t.beta1, t.beta2, t.eps, t.weight_decay, t.grad_clip});
  schedule_ = {t.lr, t.min_lr, t.warmup_iters, t.max_iters, t.max_seconds};
  result_.parameters = count_parameters(optimizer_->parameters());
  if (resume) {
    find_checkpoint();
  } else if (t.init_from != "scratch") {
    load_weights(*model_, t.init_from);
    log_ << "weights: " << t.init_from << "\n";
  }
  flops_per_token_ =
      6.0 * static_cast<double>(matmul_parameters(*model_, optimizer_->parameters()));
  gemm_peak_ = measure_gemm_peak(compute_dtype(config_));
  log_ << "model: " << format_count(static_cast<double>(result_.parameters)) << " parameters, "
       << model_->config().blocks.size() << " blocks, " << at::get_num_threads()
       << " threads, GEMM peak " << format_count(gemm_peak_) << "FLOP/s in " << t.dtype << "\n";
  atomic_write_file(t.out_dir + "/config.toml", to_toml(config_));
  metrics_ = std::make_unique<MetricsWriter>(t.out_dir, resumed_step_, t.tensorboard);
}

void Trainer::find_checkpoint() {
  const std::string& folder = config_.train.out_dir;
  const auto checkpoints = list_checkpoints(folder);
  for (const CheckpointEntry& entry : checkpoints) {
    json state;
    try {
      state = verify_checkpoint(entry.path);
    } catch (const Error& e) {
      log_ << "warning: skipping the damaged checkpoint " << entry.path << ": " << e.what() << "\n";
      continue;
    }
    return resume_from(entry.path, state);
  }
  GDN_CHECK(
      checkpoints.empty(), "[train] all ", checkpoints.size(), " checkpoints in ", folder,
      " are damaged: delete the folder and start again, or start from a copy with --init-from");
  if (!has_run(folder))
    throw UsageError(
        str_cat("[train] there is no run to resume in ", folder, ": start one without --resume"));
  log_ << "warning: the run in " << folder
       << " ended before its first checkpoint; starting at step 0\n";
}

void Trainer::resume_from(const std::string& checkpoint, const json& state) {
  // As files, since reading one writes out the options that were left to their defaults.
  if (to_json(load_model_config(checkpoint)) != to_json(model_->config()))
    throw UsageError(
        str_cat("[train] ", checkpoint,
                " holds a model of another shape than the configuration describes: resume with the "
                "configuration of the run, or choose another --out-dir"));
  load_weights(*model_, checkpoint);
  step_ = state.at("step").get<int64_t>();
  optimizer_->load_state(load_tensors(checkpoint + "/optimizer.safetensors").tensors,
                         state.at("optimizer_steps").get<int64_t>());
  next_batch_ = state.at("data_position").get<int64_t>();
  seconds_before_ = state.at("seconds").get<double>();
  set_generator_state(state.at("rng").get<std::string>());
  if (state.contains("best_val_loss")) best_val_loss_ = state["best_val_loss"].get<double>();
  if (state.contains("loss")) result_.loss = state["loss"].get<double>();
  if (state.contains("val_loss")) result_.val_loss = state["val_loss"].get<double>();
  result_.checkpoint = checkpoint;
  resumed_step_ = saved_step_ = step_;
  RunConfig before =
      parse_run_config(state.at("config").get<std::string>(), checkpoint + "/state.json");
  before.data.path =
      config_.data.path;  // a text may have moved; its tokens are checked by the vocabulary
  before.data.cache_dir = config_.data.cache_dir;
  if (!(before.data == config_.data) || before.train.seed != config_.train.seed)
    log_ << "warning: the settings of the data differ from the run's, so the order of batches does "
            "too\n";
  log_ << "resuming " << checkpoint << " at step " << step_ << "\n";
}

void Trainer::step() {
  const RunConfig::Train& t = config_.train;
  const Clock::time_point start = Clock::now();
  std::vector<TensorBatch> batches;
  for (int64_t i = 0; i < t.grad_accum; ++i)
    batches.push_back(to_tensors(source_->train_batch(t.overfit_one_batch ? i : next_batch_ + i)));
  const double lr = schedule_.lr_at(step_, elapsed());
  const double loss = accumulate_gradients(*model_, batches);
  const double norm = optimizer_->grad_norm();
  if (!std::isfinite(loss) || !std::isfinite(norm)) {
    const std::string bad = first_bad_tensor(*model_, optimizer_->parameters(), batches);
    const double value = std::isfinite(loss) ? norm : loss;
    throw Error(str_cat(
        "[train] step ", step_ + 1, ": the ", std::isfinite(loss) ? "gradient norm" : "loss",
        " is ", std::isnan(value) ? "nan" : "infinite", "; the first bad tensor is ",
        bad.empty() ? "none (the norm itself overflows)" : bad, "; lower --lr or --grad-clip",
        result_.checkpoint.empty() ? "" : " and --resume from " + result_.checkpoint));
  }
  optimizer_->step(lr, norm);
  optimizer_->zero_grad();
  ++step_;
  next_batch_ += t.grad_accum;
  now_ = {};
  now_.step = step_;
  now_.loss = loss;
  now_.grad_norm = norm;
  now_.lr = lr;
  result_.loss = loss;
  busy_seconds_ += seconds_since(start);
  ++busy_steps_;
  for (const TensorBatch& batch : batches) busy_tokens_ += batch.ids.numel();
}

Progress Trainer::progress() const {
  Progress p;
  p.max_iters = schedule_.max_iters;
  const double done = schedule_.progress(step_, elapsed());
  const double by_steps = schedule_.max_iters > 0 ? static_cast<double>(step_) /
                                                        static_cast<double>(schedule_.max_iters)
                                                  : 1.0;
  if (done > by_steps && step_ > 0) {
    p.estimated = true;
    p.max_iters = std::llround(static_cast<double>(step_) / done);
  }
  if (busy_steps_ > 0) {
    p.step_seconds = busy_seconds_ / static_cast<double>(busy_steps_);
    p.mfu = flops_per_token_ * static_cast<double>(busy_tokens_) / busy_seconds_ / gemm_peak_;
    p.eta_seconds = p.step_seconds * static_cast<double>(schedule_.max_iters - step_);
    if (p.estimated) p.eta_seconds = schedule_.max_seconds - elapsed();
  }
  p.memory = resident_memory();
  return p;
}

void Trainer::report(bool force) {
  now_.seconds = elapsed();
  const bool line =
      busy_steps_ > 0 && (force || step_ % config_.train.log_interval == 0 || step_ == 1);
  if (line) {
    now_.tokens_per_second = static_cast<double>(busy_tokens_) / busy_seconds_;
    log_ << progress_line(now_, progress()) << "\n" << std::flush;
    busy_seconds_ = 0;
    busy_steps_ = busy_tokens_ = 0;
  }
  if (now_.val_loss) log_ << validation_line(now_, progress()) << "\n" << std::flush;
  if (line || now_.val_loss) {
    if (!line) now_.loss = now_.lr = now_.grad_norm = std::nullopt;
    metrics_->write(now_);
    reported_step_ = step_;
  }
}

bool Trainer::validate(int64_t batches) {
  const auto loss = validation_loss(*model_, *source_, batches);
  if (StopSignals::received() != 0) return false;
  if (!loss) return true;
  if (!std::isfinite(*loss))
    throw Error(str_cat(
        "[train] step ", step_, ": the validation loss is ", *loss, "; the first bad tensor is ",
        first_bad_tensor(*model_, optimizer_->parameters(), {to_tensors(source_->val_batch(0))}),
        "; lower --lr or --grad-clip"));
  now_.step = step_;
  now_.val_loss = result_.val_loss = loss;
  if (!best_val_loss_ || *loss < *best_val_loss_) best_val_loss_ = loss;
  return true;
}

void Trainer::save() {
  if (saved_step_ == step_) return;
  json state = {{"optimizer_steps", optimizer_->steps()},
                {"data_position", next_batch_},
                {"seconds", elapsed()},
                {"rng", generator_state()},
                {"config", to_toml(config_)}};
  if (result_.loss) state["loss"] = *result_.loss;
  if (result_.val_loss) state["val_loss"] = *result_.val_loss;
  if (best_val_loss_) state["best_val_loss"] = *best_val_loss_;
  result_.checkpoint =
      write_checkpoint(config_.train.out_dir, step_, state, [&](const std::string& folder) {
        save_model(folder, *model_, &source_->tokenizer());
        save_tensors(folder + "/optimizer.safetensors", optimizer_->state());
      });
  saved_step_ = step_;
  prune_checkpoints(config_.train.out_dir, config_.train.keep_checkpoints);
}

TrainResult Trainer::run() {
  const RunConfig::Train& t = config_.train;
  const StopSignals signals;
  const auto stopped = [&] { return StopSignals::received() != 0; };
  if (resumed_step_ < 0 && validate(t.eval_iters)) report(false);
  begin_ = Clock::now();
  // Decided once per step, so that the clock cannot end a run between its last step and that step's
  // report.
  bool last = schedule_.done(step_, elapsed());
  while (!stopped() && !last) {
    step();
    last = schedule_.done(step_, elapsed());
    if (last) break;  // the closing validation below covers more than the regular one
    if (t.eval_interval > 0 && step_ % t.eval_interval == 0) validate(t.eval_iters);
    report(false);
    if (t.save_interval > 0 && step_ % t.save_interval == 0) save();
  }
  const bool trained = step_ > std::max<int64_t>(resumed_step_, 0);
  if (!stopped() && trained) validate(t.final_eval_iters);
  if (trained && reported_step_ != step_) report(true);
  save();
  result_.stopped_by = StopSignals::received();
  result_.step = step_;
  result_.seconds = elapsed();
  return result_;
}

}  // namespace

std::unique_ptr<BatchSource> make_source(const RunConfig& config) {
  const RunConfig::Data& d = config.data;
  const auto seed = static_cast<uint64_t>(config.train.seed);
  if (d.kind == "stories") {
    StoryDataOptions options;
    options.batch_size = d.batch_size;
    options.seq_len = d.seq_len;
    options.seed = seed;
    options.val_stories = d.val_stories;
    options.text_fraction = d.text_fraction;
    return make_story_source(options);
  }
  TextDataOptions options;
  options.path = d.path;
  options.cache_dir = !d.cache_dir.empty() ? d.cache_dir : default_cache_dir();
  if (options.cache_dir.empty()) options.cache_dir = config.train.out_dir + "/tokens";
  options.tokenizer = d.tokenizer;
  options.max_words = d.max_words;
  options.val_fraction = d.val_fraction;
  options.batch_size = d.batch_size;
  options.seq_len = d.seq_len;
  options.seed = seed;
  options.pack_documents = d.pack_documents;
  return make_text_source(options);
}

std::optional<double> validation_loss(CausalLM& model, const BatchSource& source, int64_t batches) {
  const int64_t available = source.num_val_batches();
  const int64_t count = batches > 0 ? std::min(batches, available) : available;
  const bool training = model.is_training();
  c10::NoGradGuard no_grad;
  model.eval();
  double sum = 0;
  int64_t scored = 0;
  for (int64_t i = 0; i < count && StopSignals::received() == 0; ++i) {
    const TensorBatch batch = to_tensors(source.val_batch(i * available / count));
    if (batch.scored == 0) continue;
    sum += model.loss(batch.ids, batch.targets, batch.context()).item<double>() *
           static_cast<double>(batch.scored);
    scored += batch.scored;
  }
  model.train(training);
  if (scored == 0) return std::nullopt;
  return sum / static_cast<double>(scored);
}

TrainResult train(const RunConfig& config, bool resume, std::ostream& log) {
  validate(config);
  if (config.train.threads > 0) at::set_num_threads(static_cast<int>(config.train.threads));
  log << join_lines(to_toml(config)) << "\n";
  return Trainer(config, resume, log).run();
}

void dry_run(const RunConfig& given, std::ostream& out) {
  validate(given);
  RunConfig config = given;
  choose_dtype(config, /*resume=*/false);
  if (config.train.threads > 0) at::set_num_threads(static_cast<int>(config.train.threads));
  const auto source = make_source(config);
  const auto model = make_model(config, *source);
  const NamedTensors parameters = parameters_of(*model);
  out << "data        " << source->describe() << "\n";
  for (const auto& [name, p] : parameters)
    out << "parameter   " << name << " " << p.sizes() << "\n";
  const auto count = static_cast<double>(count_parameters(parameters));
  const auto tokens = static_cast<double>(config.data.batch_size * config.data.seq_len);
  out << "parameters  " << format_count(count) << " (" << count_parameters(parameters) << ")\n"
      << "batch       [" << config.data.batch_size << ", " << config.data.seq_len << "], "
      << config.train.grad_accum
      << " per step: " << format_count(tokens * static_cast<double>(config.train.grad_accum))
      << " tokens per step\n"
      << "memory      " << format_bytes(16 * count) << " for weights, gradients and optimizer\n"
      << std::flush;
  const std::vector<TensorBatch> batches = {to_tensors(source->train_batch(0))};
  reset_peak_memory();
  const int64_t before = resident_memory();
  accumulate_gradients(*model, batches);  // the first call allocates and warms up
  const double peak = static_cast<double>(std::max<int64_t>(0, peak_resident_memory() - before));
  const Clock::time_point start = Clock::now();
  accumulate_gradients(*model, batches);
  const double seconds = seconds_since(start);
  out << "            " << format_bytes(peak)
      << " for activations and gradients of one batch (measured)\n"
      << "speed       " << format_count(tokens / seconds)
      << " tok/s (one forward and backward pass: " << format_count(1e3 * seconds) << " ms)\n";
}

}  // namespace gdn
