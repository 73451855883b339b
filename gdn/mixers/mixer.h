// SPDX-License-Identifier: Apache-2.0
// The contract of every sequence mixer. A mixer maps x [B,T,D] to y [B,T,D] and may carry a State
// from call to call; generation, serving, training and evaluation never know which mixer they hold.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace gdn {

// How the token axis of x [B,T,D] is cut into sequences.
struct Sequences {
  at::Tensor
      cu_seqlens;  // int64 [N+1] on the CPU, requires B == 1; undefined: B sequences of length T

  int64_t count(const at::Tensor& x) const {
    return cu_seqlens.defined() ? cu_seqlens.size(0) - 1 : x.size(0);
  }
};

// What a mixer remembers: a few named tensors whose first dimension is the sequence (recurrent
// state, convolution history, KV cache, position). Copying a State copies handles, not memory;
// clone() copies memory.
class State {
 public:
  bool empty() const { return entries_.empty(); }
  bool has(std::string_view name) const;
  at::Tensor& operator[](std::string_view name);  // throws when absent
  const at::Tensor& operator[](std::string_view name) const;
  void set(std::string name, at::Tensor value);  // adds or replaces
  const std::vector<std::pair<std::string, at::Tensor>>& entries() const { return entries_; }

  int64_t num_sequences() const;  // 0 when empty
  int64_t bytes() const;          // of all sequences
  State clone() const;
  State detach() const;
  State index(const at::Tensor& sequences /* int64 [M] */) const;  // a new State of those sequences

 private:
  std::vector<std::pair<std::string, at::Tensor>> entries_;
};

// Values that layers of one model hand on during one forward call.
struct Shared {
  at::Tensor first_value;     // RWKV-7's value residual
  at::Tensor auxiliary_loss;  // balance losses of experts, summed
};

// What a block sees besides x; cheap to copy.
struct Context {
  Sequences seqs;
  at::Tensor
      slots;  // int64 [N]: the state of the pool that each sequence uses; undefined: n uses n
  State* state =
      nullptr;  // null: whole sequences.  Set: continue from it, leave it after the last token
  Shared* shared = nullptr;
};

// forward: T == 1 with a state is a decoding step, T > 1 with a state (a part of) a prefill.
// Without gradients the state's tensors are changed in place (with slots: rows of the pool); with
// gradients ctx.state gets new tensors that carry them, and slots must be undefined.
class Mixer : public torch::nn::Module {
 public:
  virtual at::Tensor forward(const at::Tensor& x /* [B,T,D] */, const Context& ctx) = 0;  // [B,T,D]

  // The state of `sequences` sequences that have seen nothing.
  virtual State zero_state(int64_t sequences, const at::TensorOptions& options) const = 0;

  // Computes by the naive token-by-token form of the formulas from now on: the oracle of the
  // contract test.
  void use_naive(bool on) { naive_ = on; }

  // The options it was made with by make_mixer, defaults and derived values filled in.
  const nlohmann::json& options() const { return options_; }

 protected:
  bool naive_ = false;

 private:
  friend std::shared_ptr<Mixer> make_mixer(std::string_view name, struct MixerArgs args);
  nlohmann::json options_ = nlohmann::json::object();
};

// What a mixer is made from. `options` holds the options given for it (all keys known, see
// MixerInfo::options).
struct MixerArgs {
  int64_t hidden_size = 0;
  int64_t layer_idx = 0;
  int64_t num_layers = 1;
  double norm_eps = 1e-6;
  nlohmann::json options = nlohmann::json::object();
  // Where Options notes the values it derived; set by make_mixer, which hands them to the mixer.
  std::shared_ptr<nlohmann::json> resolved;
};

struct MixerOption {
  std::string name;              // fla's name where it has one
  nlohmann::json default_value;  // null: derived, as `help` says
  std::string help;
};

// One line of the registry.
struct MixerInfo {
  std::string name;                  // as in configurations: "gated_delta_net"
  std::string title;                 // "Gated DeltaNet"
  std::string paper;                 // "arXiv 2412.06464"
  std::vector<std::string> forms;    // of "naive", "chunk", "convolution", "recurrent", "step"
  std::vector<std::string> devices;  // "cpu", "cuda"
  std::vector<MixerOption> options;
  std::shared_ptr<Mixer> (*make)(const MixerArgs&);
};

// Every mixer, in the order of registry.cpp.
const std::vector<MixerInfo>& mixers();

// The entry of that name; a UsageError with the nearest name when there is none.
const MixerInfo& find_mixer(std::string_view name);

// Checks the names of args.options against the entry's ("did you mean"), fills in defaults, and
// makes the mixer.
std::shared_ptr<Mixer> make_mixer(std::string_view name, MixerArgs args);

}  // namespace gdn
