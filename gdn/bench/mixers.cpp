// SPDX-License-Identifier: Apache-2.0
// gdn bench mixers: every registered mixer at one width.
#include <ATen/ops/randn.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <exception>
#include <iostream>
#include <memory>

#include "gdn/base/check.h"
#include "gdn/bench/report.h"
#include "gdn/mixers/mixer.h"

namespace gdn::bench {
namespace {

constexpr int64_t kTokens = 8192;  // per call, whatever the length

std::string first_line(const std::exception& error) {
  const std::string what = error.what();
  return what.substr(0, what.find('\n'));
}

class MixerBench {
 public:
  MixerBench(Report& report, const Options& options, int threads, const MixerInfo& info)
      : report_(report), options_(options), threads_(threads), name_(info.name) {
    MixerArgs args;
    args.hidden_size = options.hidden_size;
    args.num_layers = 12;
    mixer_ = make_mixer(info.name, args);
  }

  void run() {
    for (const int64_t T : {512, 8192}) {
      attempt(str_cat("forward T=", T), [&] { forward(T); });
      attempt(str_cat("forward+backward T=", T), [&] { forward_backward(T); });
    }
    attempt("decode", [&] { decode(); });
  }

 private:
  // Runs a part; what the mixer cannot do becomes a note.
  template <typename Run>
  void attempt(const std::string& what, const Run& run) {
    try {
      run();
    } catch (const std::exception& error) {
      report_.note(str_cat(name_, ", ", what, ": skipped: ", first_line(error)));
    }
  }

  at::Tensor input(int64_t B, int64_t T) const { return at::randn({B, T, options_.hidden_size}); }

  void add(const std::string& what, double seconds, double tokens,
           std::vector<std::pair<std::string, nlohmann::ordered_json>> extra = {}) {
    Row row{name_ + " " + what, threads_, seconds, tokens / seconds, "tok/s"};
    row.extra = std::move(extra);
    report_.add(std::move(row));
  }

  void forward(int64_t T) {
    const c10::NoGradGuard no_grad;
    const at::Tensor x = input(kTokens / T, T);
    const double seconds = median_seconds(
        [&] {
          Context ctx;
          Shared shared;
          ctx.shared = &shared;
          mixer_->forward(x, ctx);
        },
        options_.seconds);
    add(str_cat("forward T=", T), seconds, kTokens);
  }

  void forward_backward(int64_t T) {
    const at::Tensor x = input(kTokens / T, T).requires_grad_(true), dy = input(kTokens / T, T);
    const double seconds = median_seconds(
        [&] {
          Context ctx;
          Shared shared;
          ctx.shared = &shared;
          mixer_->forward(x, ctx).backward(dy);
          x.mutable_grad().reset();
          for (const at::Tensor& p : mixer_->parameters()) p.mutable_grad().reset();
        },
        options_.seconds);
    add(str_cat("forward+backward T=", T), seconds, kTokens);
  }

  // One token of one sequence, after one token and after 8192.
  void decode() {
    const c10::InferenceMode inference;
    State state = mixer_->zero_state(1, at::kFloat);
    const int64_t empty = state.bytes();
    Context ctx;
    Shared shared;
    ctx.state = &state;
    ctx.shared = &shared;
    const at::Tensor token = input(1, 1);
    const double first =
        median_seconds([&] { mixer_->forward(token, ctx); }, std::min(options_.seconds, 0.1));
    state = mixer_->zero_state(1, at::kFloat);
    for (int64_t t = 0; t < kTokens; t += 512) mixer_->forward(input(1, 512), ctx);
    const int64_t filled = state.bytes();
    const double later =
        median_seconds([&] { mixer_->forward(token, ctx); }, std::min(options_.seconds, 0.1));
    add("decode B=1 after 8192 tokens", later, 1,
        {{"us at the start", 1e6 * first},
         {"state KiB", empty / 1024},
         {"after 8192 tokens", filled / 1024}});
  }

  Report& report_;
  const Options& options_;
  int threads_;
  std::string name_;
  std::shared_ptr<Mixer> mixer_;
};

}  // namespace

int run_mixers(const Options& options) {
  Report report("mixers", options, std::cout);
  for (const int64_t threads : options.threads) {
    use_threads(threads);
    report.heading(str_cat("one layer of width ", options.hidden_size, ", fp32, ", kTokens,
                           " tokens per call"));
    for (const MixerInfo& info : mixers()) {
      if (!report.wanted(info.name)) continue;
      try {
        MixerBench(report, options, static_cast<int>(threads), info).run();
      } catch (const std::exception& error) {
        report.note(str_cat(info.name, ": skipped: ", first_line(error)));
      }
    }
  }
  report.finish();
  return 0;
}

}  // namespace gdn::bench
