// SPDX-License-Identifier: Apache-2.0
// gdn bench mixers: every registered mixer at one width.
#include <ATen/ops/randn.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <exception>
#include <functional>
#include <initializer_list>
#include <iostream>
#include <memory>
#include <utility>
#include <vector>

#include "gdn/base/check.h"
#include "gdn/bench/ceilings.h"
#include "gdn/bench/report.h"
#include "gdn/mixers/mixer.h"

namespace gdn::bench {
namespace {

// Tokens per call, whatever the length: as much work at each.
constexpr int64_t kTokens = 8192;
constexpr int64_t kTokensOfFlatness = 16384;

std::string first_line(const std::exception& error) {
  const std::string what = error.what();
  return what.substr(0, what.find('\n'));
}

class MixerBench {
 public:
  MixerBench(Report& report, Ceilings& ceilings, const Options& options, int threads,
             const MixerInfo& info)
      : report_(report),
        ceilings_(ceilings),
        options_(options),
        threads_(threads),
        name_(info.name) {
    MixerArgs args;
    args.hidden_size = options.hidden_size;
    args.num_layers = 12;
    mixer_ = make_mixer(info.name, args);
    for (const at::Tensor& p : mixer_->parameters()) {
      if (p.dim() == 2) weights_ += p.numel();
    }
  }

  void run() {
    attempt("forward", {512, kTokens, kTokensOfFlatness}, [&] { forward(); });
    attempt("forward+backward", {512, kTokens}, [&] { forward_backward(); });
    attempt(kDecode, {}, [&] { decode(); });
  }

 private:
  // Runs a part, if one of its rows is wanted; what the mixer cannot do becomes a note.
  template <typename Run>
  void attempt(const std::string& what, std::initializer_list<int64_t> lengths, const Run& run) {
    const auto wanted = [&](int64_t T) { return report_.wanted(row_name(at_length(what, T))); };
    if (lengths.size() == 0 ? !report_.wanted(row_name(what))
                            : std::none_of(lengths.begin(), lengths.end(), wanted)) {
      return;
    }
    try {
      run();
    } catch (const std::exception& error) {
      report_.note(str_cat(name_, ", ", what, ": skipped: ", first_line(error)));
    }
  }

  at::Tensor input(int64_t B, int64_t T) const { return at::randn({B, T, options_.hidden_size}); }

  static std::string at_length(const std::string& what, int64_t T) {
    return str_cat(what, " T=", T);
  }
  std::string row_name(const std::string& what) const { return name_ + " " + what; }

  // Tokens per second of `products` multiply-adds with each weight, at the peak.
  double ceiling(int products) {
    return 1e9 * ceilings_.fma() / (2.0 * products * static_cast<double>(weights_));
  }

  void add(const std::string& what, double seconds, double tokens, double ceiling,
           std::vector<std::pair<std::string, nlohmann::ordered_json>> extra) {
    Row row{row_name(what), threads_, seconds, tokens / seconds, "tok/s"};
    row.ceiling = ceiling;
    row.extra = std::move(extra);
    report_.add(std::move(row));
  }

  at::Tensor call(const at::Tensor& x, State* state = nullptr) {
    Context ctx;
    Shared shared;
    ctx.state = state;
    ctx.shared = &shared;
    return mixer_->forward(x, ctx);
  }

  // A state that grows with the sequence belongs to attention, whose time per token grows too.
  bool recurrent() {
    const c10::InferenceMode inference;
    State state = mixer_->zero_state(1, at::kFloat);
    const int64_t empty = state.bytes();
    call(input(1, 256), &state);
    return state.bytes() == empty;
  }

  // The lengths are measured in turn, so that a disturbance meets all of them.
  void measure(const std::string& what, int64_t tokens, const std::vector<int64_t>& lengths,
               int products, const std::function<void(const at::Tensor&)>& run) {
    std::vector<std::function<void()>> calls;
    for (const int64_t T : lengths)
      calls.emplace_back([&run, x = input(tokens / T, T)] { run(x); });
    const std::vector<double> seconds =
        median_seconds(calls, options_.seconds * static_cast<double>(lengths.size()));
    for (size_t i = 0; i < lengths.size(); ++i) {
      add(at_length(what, lengths[i]), seconds[i], static_cast<double>(tokens), ceiling(products),
          {{"times T=512", seconds[i] / seconds[0]}});
    }
  }

  void forward() {
    const c10::NoGradGuard no_grad;
    const auto run = [&](const at::Tensor& x) { call(x); };
    if (recurrent()) {
      measure("forward", kTokensOfFlatness, {512, kTokens, kTokensOfFlatness}, 1, run);
    } else {
      measure("forward", kTokens, {512, kTokens}, 1, run);
    }
  }

  void forward_backward() {
    measure("forward+backward", kTokens, {512, kTokens}, 3, [&](const at::Tensor& data) {
      const at::Tensor x = data.detach().requires_grad_(true);
      call(x).backward(data);
      for (const at::Tensor& p : mixer_->parameters()) p.mutable_grad().reset();
    });
  }

  // One token of one sequence, after one token and after 8192.
  void decode() {
    const c10::InferenceMode inference;
    State state = mixer_->zero_state(1, at::kFloat);
    const int64_t empty = state.bytes();
    const at::Tensor token = input(1, 1);
    const auto step = [&] { call(token, &state); };
    const double seconds = std::min(options_.seconds, 0.1);
    const double first = median_seconds(step, seconds);
    state = mixer_->zero_state(1, at::kFloat);
    for (int64_t t = 0; t < kTokens; t += 512) call(input(1, 512), &state);
    const int64_t filled = state.bytes();
    const double later = median_seconds(step, seconds);
    // A state that has grown is not updated in place as a whole.
    add(kDecode, later, 1, filled == empty ? 1 / ceilings_.step_seconds(4 * weights_, filled) : 0,
        {{"us at the start", 1e6 * first},
         {"state KiB", empty / 1024},
         {"after 8192 tokens", filled / 1024}});
  }

  static constexpr const char* kDecode = "decode B=1 after 8192 tokens";

  Report& report_;
  Ceilings& ceilings_;
  const Options& options_;
  int threads_;
  int64_t weights_ = 0;  // elements of the matrices that tokens are multiplied by
  std::string name_;
  std::shared_ptr<Mixer> mixer_;
};

}  // namespace

int run_mixers(const Options& options) {
  Report report("mixers", options, std::cout);
  for (const int64_t threads : options.threads) {
    report.use_threads(threads);
    Ceilings ceilings(static_cast<int>(threads));
    report.heading(str_cat("one layer of width ", options.hidden_size, ", fp32, ",
                           kTokensOfFlatness, " tokens per call (forward) and ", kTokens,
                           "; ceiling: its products with weights at the peak of multiply-adds; "
                           "decoding: reading them and updating the state"));
    for (const MixerInfo& info : mixers()) {
      try {
        MixerBench(report, ceilings, options, static_cast<int>(threads), info).run();
      } catch (const std::exception& error) {
        report.note(str_cat(info.name, ": skipped: ", first_line(error)));
      }
    }
  }
  report.finish();
  return 0;
}

}  // namespace gdn::bench
