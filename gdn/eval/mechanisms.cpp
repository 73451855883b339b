// SPDX-License-Identifier: Apache-2.0
#include "gdn/eval/mechanisms.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>
#include <iomanip>
#include <optional>
#include <sstream>

#include "gdn/ops/delta_rule.h"

namespace gdn {
namespace {

constexpr int64_t kDim = 64, kCodes = 512;
constexpr int64_t kTrials = 100;
constexpr double kForget = -1e4;  // a log decay that leaves nothing

struct Memory {
  std::string name;
  bool erase;
  double alpha = 1;    // what is left of the state per token
  double filler = 1;   // strength with which filler is written
  bool reset = false;  // forget everything where the text says so
};

// Pairs to write, [trials,tokens] of keys [.., kDim] and of codes' numbers.
struct Pairs {
  at::Tensor keys, codes;

  Pairs then(const Pairs& more) const {
    return {at::cat({keys, more.keys}, 1), at::cat({codes, more.codes}, 1)};
  }
  // The pairs numbered `order` [trials,n] of each trial.
  Pairs picked(const at::Tensor& order) const {
    return {keys.gather(1, order.unsqueeze(2).expand({-1, -1, kDim})), codes.gather(1, order)};
  }
  int64_t count() const { return codes.size(1); }
};

class Bench {
 public:
  explicit Bench(uint64_t seed)
      : generator_(at::make_generator<at::CPUGeneratorImpl>(seed)),
        codebook_(unit(at::randn({kCodes, kDim}, generator_))) {}

  Pairs pairs(int64_t n) {
    return {unit(at::randn({kTrials, n, kDim}, generator_)),
            at::randint(kCodes, {kTrials, n}, generator_)};
  }
  // A random order of n pairs for each trial.
  at::Tensor shuffled(int64_t n) {
    return at::rand({kTrials, n}, generator_).argsort(/*stable=*/false, 1);
  }
  // One number below n for each trial.
  at::Tensor places(int64_t n) { return at::randint(n, {kTrials, 1}, generator_); }

  // Writes `text` into an empty memory and asks for the codes of `asked`: the share of right
  // answers. strength and log decay, [trials,tokens], stand where the memory has none of its own.
  double recall(const Memory& memory, const Pairs& text, const Pairs& asked,
                const std::optional<at::Tensor>& strength = {},
                const std::optional<at::Tensor>& log_decay = {}) const {
    const at::Tensor k = text.keys.unsqueeze(2);
    const at::Tensor v = codebook_.index_select(0, text.codes.flatten()).view(k.sizes());
    std::optional<at::Tensor> g, beta;
    if (memory.alpha < 1 || log_decay) {
      g = at::full({kTrials, text.count(), 1}, std::log(memory.alpha));
      if (log_decay) g = *g + log_decay->unsqueeze(2);
    }
    if (strength) beta = strength->unsqueeze(2);
    const auto [o, state, saved] =
        ops::delta_rule(k, k, v, g, beta, {}, {}, 1.0, {}, {}, /*output_final_state=*/true,
                        memory.erase ? "key" : "none", "chunk", 0, /*save=*/false);
    const at::Tensor read = asked.keys.matmul(state.squeeze(1));  // [trials,asked,kDim]
    const at::Tensor answers = read.matmul(codebook_.t()).argmax(2);
    return (answers == asked.codes).to(at::kDouble).mean().item<double>();
  }

 private:
  static at::Tensor unit(const at::Tensor& x) { return x / x.norm(2, -1, /*keepdim=*/true); }

  at::Generator generator_;
  at::Tensor codebook_;  // [kCodes,kDim]
};

// Runs `score` for each memory and size.
template <typename Score>
MechanismTable table(std::string name, std::string question, std::string column,
                     std::vector<int64_t> sizes, const std::vector<Memory>& memories,
                     const Score& score) {
  MechanismTable result{
      std::move(name), std::move(question), std::move(column), std::move(sizes), {}};
  for (const Memory& memory : memories)
    result.rows.emplace_back(memory.name, std::vector<double>());
  for (const int64_t size : result.sizes) {
    const auto of = score(size);  // one text for all memories
    for (size_t i = 0; i < memories.size(); ++i) result.rows[i].second.push_back(of(memories[i]));
  }
  return result;
}

MechanismTable once(Bench& bench) {
  return table("once", "Every pair is written once; all are asked.", "pairs", {16, 32, 64, 128},
               {{"additive", false},
                {"additive, decay 0.98", false, 0.98},
                {"delta", true},
                {"gated delta, decay 0.98", true, 0.98}},
               [&bench](int64_t n) {
                 const Pairs text = bench.pairs(n);
                 return [&bench, text](const Memory& m) { return bench.recall(m, text, text); };
               });
}

MechanismTable overwrite(Bench& bench) {
  return table("overwrite", "Every key is written three times; the latest value is asked.", "keys",
               {8, 16, 32, 64},
               {{"additive", false},
                {"additive, decay 0.98", false, 0.98},
                {"delta", true},
                {"gated delta, decay 0.98", true, 0.98}},
               [&bench](int64_t n) {
                 const Pairs first = bench.pairs(n);
                 Pairs latest = first, text = first;
                 for (int round = 1; round < 3; ++round) {
                   latest = {first.keys, bench.pairs(n).codes};
                   text = text.then(latest.picked(bench.shuffled(n)));
                 }
                 return [&bench, text, latest](const Memory& m) {
                   return bench.recall(m, text, latest);
                 };
               });
}

MechanismTable repeated_filler(Bench& bench) {
  return table(
      "repeated_filler", "One pair, then 20 others again and again; the first one is asked.",
      "tokens", {256, 1024, 4096, 8192},
      {{"additive", false},
       {"additive, decay 0.998", false, 0.998},
       {"delta", true},
       {"gated delta, decay 0.998", true, 0.998},
       {"gated delta, decay 0.9999", true, 0.9999}},
      [&bench](int64_t length) {
        const Pairs needle = bench.pairs(1), filler = bench.pairs(20);
        const at::Tensor order =
            at::arange(length - 1, at::kLong).remainder(20).expand({kTrials, length - 1});
        const Pairs text = needle.then(filler.picked(order));
        return [&bench, text, needle](const Memory& m) { return bench.recall(m, text, needle); };
      });
}

MechanismTable distinct_filler(Bench& bench) {
  return table("distinct_filler",
               "One pair among others that never repeat, at a random place; it is asked.", "tokens",
               {32, 128, 512},
               {{"delta", true},
                {"gated delta, decay 0.99", true, 0.99},
                {"delta, filler written at 0.1", true, 1, 0.1},
                {"gated delta, decay 0.998, filler at 0.1", true, 0.998, 0.1}},
               [&bench](int64_t length) {
                 const Pairs text = bench.pairs(length);
                 const at::Tensor place = bench.places(length);
                 return [&bench, text, place](const Memory& m) {
                   const at::Tensor strength =
                       at::full({kTrials, text.count()}, m.filler).scatter(1, place, 1.0);
                   return bench.recall(m, text, text.picked(place), strength);
                 };
               });
}

MechanismTable stale_context(Bench& bench) {
  constexpr int64_t kNew = 24;
  return table("stale_context", "Old pairs, then 24 new ones; the new ones are asked.", "old pairs",
               {256, 1024},
               {{"additive", false},
                {"additive, reset between", false, 1, 1, true},
                {"delta", true},
                {"gated delta, reset between", true, 1, 1, true}},
               [&bench](int64_t old) {
                 const Pairs fresh = bench.pairs(kNew), text = bench.pairs(old).then(fresh);
                 return [&bench, text, fresh, old](const Memory& m) {
                   std::optional<at::Tensor> log_decay;
                   if (m.reset) {
                     log_decay = at::zeros({kTrials, text.count()});
                     log_decay->select(1, old).fill_(kForget);
                   }
                   return bench.recall(m, text, fresh, {}, log_decay);
                 };
               });
}

// A state of one number that starts as 1 and a key that is always 1: S <- (1 - beta) S + beta v.
MechanismTable parity(uint64_t seed) {
  MechanismTable result{
      "parity",
      "Bits; at every place, whether an odd number of ones has come (chance 0.5).",
      "bits",
      {64, 1024, 16384},
      {{"delta, beta = 2 bit (eigenvalue -1)", {}},
       {"delta, beta = bit (eigenvalue 0)", {}},
       {"delta, beta = bit / 2 (eigenvalue 0.5)", {}}}};
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  for (const int64_t length : result.sizes) {
    const at::Tensor bits = at::randint(2, {8, length, 1}, generator).to(at::kFloat);
    const at::Tensor odd = bits.cumsum(1).remainder(2);
    const at::Tensor one = at::ones({8, length, 1, 1}), start = at::ones({8, 1, 1, 1});
    for (size_t i = 0; i < result.rows.size(); ++i) {
      const double strengths[] = {2, 1, 0.5};
      const auto [o, state, saved] = ops::delta_rule(
          one, one, at::zeros_like(one), {}, bits * strengths[i], {}, {}, 1.0, start, {},
          /*output_final_state=*/false, "key", "chunk", 0, /*save=*/false);
      // Even while the state is nearer to where it started than to the other end it can reach.
      const double threshold = i == 0 ? 0 : 0.5;
      const at::Tensor answers = (o.squeeze(3) < threshold).to(at::kFloat);
      result.rows[i].second.push_back((answers == odd).to(at::kDouble).mean().item<double>());
    }
  }
  return result;
}

}  // namespace

std::vector<MechanismTable> run_mechanisms(uint64_t seed) {
  const c10::InferenceMode inference;
  Bench bench(seed);
  return {once(bench),          overwrite(bench), repeated_filler(bench), distinct_filler(bench),
          stale_context(bench), parity(seed)};
}

std::string mechanisms_text(const std::vector<MechanismTable>& tables) {
  std::ostringstream out;
  out << std::fixed << std::setprecision(2);
  for (const MechanismTable& table : tables) {
    out << table.name << ": " << table.question << "\n";
    size_t width = table.column.size();
    for (const auto& row : table.rows) width = std::max(width, row.first.size());
    const auto label = [&](const std::string& text) {
      out << "  " << std::left << std::setw(static_cast<int>(width)) << text << std::right;
    };
    label(table.column);
    for (const int64_t size : table.sizes) out << std::setw(8) << size;
    out << "\n";
    for (const auto& [name, recall] : table.rows) {
      label(name);
      for (const double value : recall) out << std::setw(8) << value;
      out << "\n";
    }
    out << "\n";
  }
  return out.str();
}

}  // namespace gdn
