// SPDX-License-Identifier: Apache-2.0
// What Python builds on beside the operators, as TorchBind classes (torch.classes.gdn.*), so that
// no binding library is needed: the language model, its states, a sampler, and any mixer of the
// registry.
//
// Parameters are handed out as the tensors that the C++ modules hold, not as copies: Python
// registers them in its own modules, and optimizers, checkpoints and autograd see one set of
// weights.
#include <ATen/core/Dict.h>
#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "gdn/base/check.h"
#include "gdn/generate/sampler.h"
#include "gdn/mixers/mixer.h"
#include "gdn/model/causal_lm.h"
#include "gdn/model/checkpoint.h"
#include "gdn/ops/common.h"

namespace gdn {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using TensorDict = c10::Dict<std::string, at::Tensor>;

at::ScalarType dtype_named(const std::string& name) {
  if (name == "float32") return at::kFloat;
  if (name == "bfloat16") return at::kBFloat16;
  GDN_CHECK(name == "float64", "[gdn] dtype must be float32, bfloat16 or float64, got ", name);
  return at::kDouble;
}

nlohmann::json parse(const char* what, const std::string& text) {
  try {
    return nlohmann::json::parse(text);
  } catch (const nlohmann::json::exception& error) {
    throw Error(str_cat("[", what, "] not valid JSON: ", error.what()));
  }
}

TensorDict parameters_of(const torch::nn::Module& module) {
  TensorDict result;
  for (const auto& item : module.named_parameters()) result.insert(item.key(), item.value());
  return result;
}

TensorDict buffers_of(const torch::nn::Module& module) {
  TensorDict result;
  for (const auto& item : module.named_buffers()) result.insert(item.key(), item.value());
  return result;
}

TensorDict to_dict(const State& state) {
  TensorDict result;
  for (const auto& [name, value] : state.entries()) result.insert(name, value);
  return result;
}

State from_dict(const TensorDict& dict) {
  State state;
  for (const auto& item : dict) state.set(item.key(), item.value());
  return state;
}

Sequences sequences_of(const char* op, const OptionalTensor& cu_seqlens, int64_t tokens) {
  return {ops::host_cu_seqlens(op, cu_seqlens, tokens)};
}

class BoundState : public torch::CustomClassHolder {
 public:
  explicit BoundState(ModelState s) : state(std::move(s)) {}
  c10::intrusive_ptr<BoundState> clone() const {
    return c10::make_intrusive<BoundState>(state.clone());
  }
  c10::intrusive_ptr<BoundState> index(const at::Tensor& sequences) const {
    return c10::make_intrusive<BoundState>(state.index(sequences));
  }
  TensorDict tensors() const {
    TensorDict result;
    const auto add = [&](const char* part, const std::vector<State>& states) {
      for (size_t i = 0; i < states.size(); ++i) {
        for (const auto& [name, value] : states[i].entries())
          result.insert(str_cat(i, ".", part, ".", name), value);
      }
    };
    add("mixer", state.mixer);
    add("feed_forward", state.feed_forward);
    return result;
  }
  int64_t num_sequences() const { return state.num_sequences(); }
  int64_t bytes() const { return state.bytes(); }

  ModelState state;
};

class BoundCausalLM : public torch::CustomClassHolder {
 public:
  // From a model folder, or where that is empty from the text of a config.json.
  BoundCausalLM(const std::string& folder, const std::string& config) {
    if (folder.empty()) {
      model_ = std::make_shared<CausalLM>(model_config_from_json(parse("config.json", config)));
      return;
    }
    LoadedModel loaded = load_model(folder);
    model_ = std::move(loaded.model);
    tokenizer_ = std::move(loaded.tokenizer);
  }

  std::string config() const { return to_json(model_->config()).dump(); }
  TensorDict parameters() const { return parameters_of(*model_); }
  TensorDict buffers() const { return buffers_of(*model_); }
  void set_compute_dtype(const std::string& dtype) {
    model_->set_compute_dtype(dtype_named(dtype));
  }
  void set_gradient_checkpointing(bool on) { model_->set_gradient_checkpointing(on); }
  void save(const std::string& folder) const { save_model(folder, *model_, tokenizer_.get()); }
  c10::intrusive_ptr<BoundState> zero_state(int64_t sequences) const {
    GDN_CHECK(sequences >= 1, "[zero_state] sequences must be at least 1, got ", sequences);
    return c10::make_intrusive<BoundState>(model_->zero_state(sequences));
  }

  // ids int64 [B,T] -> the final norm's output [B,T,D] and, where blocks have one, the sum of their
  // auxiliary losses; changes `state` where one is given.
  std::tuple<at::Tensor, OptionalTensor> hidden(
      const at::Tensor& ids, const OptionalTensor& cu_seqlens,
      const std::optional<c10::intrusive_ptr<BoundState>>& state) {
    GDN_CHECK(ids.dim() == 2, "[causal_lm] ids must be int64 [B,T], got ", ops::shape_str(ids));
    ModelContext ctx;
    ctx.seqs = sequences_of("causal_lm", cu_seqlens, ids.numel());
    if (state) ctx.state = &(*state)->state;
    if (ids.scalar_type() == at::kLong && ids.numel() > 0) {
      const int64_t low = ids.min().item<int64_t>(), high = ids.max().item<int64_t>();
      GDN_CHECK(low >= 0 && high < model_->config().vocab_size, "[causal_lm] ids must be in [0, ",
                model_->config().vocab_size, "), got ", low < 0 ? low : high);
    }
    Shared shared;
    ctx.shared = &shared;
    at::Tensor x = model_->hidden(ids, ctx);
    return {std::move(x),
            shared.auxiliary_loss.defined() ? OptionalTensor(shared.auxiliary_loss) : std::nullopt};
  }
  at::Tensor logits(const at::Tensor& hidden) { return model_->logits(hidden); }

  bool has_tokenizer() const { return tokenizer_ != nullptr; }
  std::vector<int64_t> encode(const std::string& text) const {
    const std::vector<int32_t> ids = tokenizer().encode(text);
    return {ids.begin(), ids.end()};
  }
  std::string decode(const std::vector<int64_t>& ids) const {
    const Tokenizer& t = tokenizer();
    std::string text;
    Utf8Stream utf8;
    for (const int64_t id : ids) {
      GDN_CHECK(id >= 0 && id < t.vocab_size(), "[decode] ids must be in [0, ", t.vocab_size(),
                "), got ", id);
      text += utf8.push(t.token_bytes(static_cast<int32_t>(id)));
    }
    return text + utf8.flush();
  }
  // The token that ends a sequence; -1: none.
  int64_t eos_id() const {
    if (model_->config().eos_token_id) return *model_->config().eos_token_id;
    return tokenizer_ ? tokenizer_->eos_id() : -1;
  }
  // Ids that may be drawn; rows beyond the tokenizer's vocabulary are padding of the embedding.
  int64_t num_tokens() const {
    return tokenizer_ ? tokenizer_->vocab_size() : model_->config().vocab_size;
  }

 private:
  const Tokenizer& tokenizer() const {
    GDN_CHECK(tokenizer_ != nullptr, "[causal_lm] the model folder holds no tokenizer.json");
    return *tokenizer_;
  }

  std::shared_ptr<CausalLM> model_;
  std::unique_ptr<Tokenizer> tokenizer_;
};

class BoundSampler : public torch::CustomClassHolder {
 public:
  BoundSampler(double temperature, int64_t top_k, double top_p, double min_p,
               double repetition_penalty, double presence_penalty, double frequency_penalty,
               int64_t seed, int64_t stream)
      : sampler_(checked({temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
                          frequency_penalty, static_cast<uint64_t>(seed)}),
                 static_cast<uint64_t>(stream)) {}

  void add_prompt(const at::Tensor& ids) {
    const at::Tensor flat = ids.to(at::kCPU, at::kLong).contiguous();
    const int64_t* id = flat.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < flat.numel(); ++i) sampler_.add_prompt_token(id[i]);
  }
  int64_t next(const at::Tensor& logits) {
    const at::Tensor row = logits.to(at::kCPU, at::kFloat).contiguous();
    return sampler_.next(std::span(row.const_data_ptr<float>(), static_cast<size_t>(row.numel())));
  }

 private:
  static SamplingOptions checked(SamplingOptions options) {
    options.validate();
    return options;
  }
  Sampler sampler_;
};

class BoundMixer : public torch::CustomClassHolder {
 public:
  BoundMixer(std::string name, int64_t hidden_size, const std::string& options, int64_t layer_idx,
             int64_t num_layers, double norm_eps)
      : name_(std::move(name)) {
    MixerArgs args;
    args.hidden_size = hidden_size;
    args.layer_idx = layer_idx;
    args.num_layers = num_layers;
    args.norm_eps = norm_eps;
    args.options = parse(name_.c_str(), options);
    mixer_ = make_mixer(name_, std::move(args));
  }

  TensorDict parameters() const { return parameters_of(*mixer_); }
  TensorDict buffers() const { return buffers_of(*mixer_); }
  std::string options() const { return mixer_->options().dump(); }

  TensorDict zero_state(int64_t sequences, const std::string& dtype) const {
    return to_dict(mixer_->zero_state(sequences, at::TensorOptions().dtype(dtype_named(dtype))));
  }

  // x [B,T,D] -> (y [B,T,D], the state after the last token); without a state the second is empty.
  // Without gradients the tensors of `state` are changed in place.
  std::tuple<at::Tensor, TensorDict> forward(const at::Tensor& x, const OptionalTensor& cu_seqlens,
                                             const std::optional<TensorDict>& state) {
    GDN_CHECK(x.dim() == 3, "[", name_, "] x must be [B,T,D], got ", ops::shape_str(x));
    Context ctx;
    Shared shared;
    ctx.shared = &shared;
    ctx.seqs = sequences_of(name_.c_str(), cu_seqlens, x.size(0) * x.size(1));
    State carried;
    if (state) {
      carried = from_dict(*state);
      ctx.state = &carried;
    }
    at::Tensor y = mixer_->forward(x, ctx);
    return {std::move(y), to_dict(carried)};
  }

 private:
  std::string name_;
  std::shared_ptr<Mixer> mixer_;
};

// The registry, for Python to make its layers from.
std::string registry() {
  nlohmann::json list = nlohmann::json::array();
  for (const MixerInfo& info : mixers()) {
    nlohmann::json options = nlohmann::json::array();
    for (const MixerOption& option : info.options) {
      options.push_back(
          {{"name", option.name}, {"default", option.default_value}, {"help", option.help}});
    }
    list.push_back({{"name", info.name},
                    {"title", info.title},
                    {"paper", info.paper},
                    {"options", std::move(options)}});
  }
  return list.dump();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gdn, m) {
  m.def("mixer_registry() -> str", &registry);
  m.class_<BoundState>("State")
      .def("clone", &BoundState::clone)
      .def("index", &BoundState::index)
      .def("tensors", &BoundState::tensors)
      .def("num_sequences", &BoundState::num_sequences)
      .def("bytes", &BoundState::bytes);
  m.class_<BoundCausalLM>("CausalLM")
      .def(torch::init<const std::string&, const std::string&>())
      .def("config", &BoundCausalLM::config)
      .def("parameters", &BoundCausalLM::parameters)
      .def("buffers", &BoundCausalLM::buffers)
      .def("set_compute_dtype", &BoundCausalLM::set_compute_dtype)
      .def("set_gradient_checkpointing", &BoundCausalLM::set_gradient_checkpointing)
      .def("save", &BoundCausalLM::save)
      .def("zero_state", &BoundCausalLM::zero_state)
      .def("hidden", &BoundCausalLM::hidden)
      .def("logits", &BoundCausalLM::logits)
      .def("has_tokenizer", &BoundCausalLM::has_tokenizer)
      .def("encode", &BoundCausalLM::encode)
      .def("decode", &BoundCausalLM::decode)
      .def("eos_id", &BoundCausalLM::eos_id)
      .def("num_tokens", &BoundCausalLM::num_tokens);
  m.class_<BoundSampler>("Sampler")
      .def(torch::init<double, int64_t, double, double, double, double, double, int64_t, int64_t>())
      .def("add_prompt", &BoundSampler::add_prompt)
      .def("next", &BoundSampler::next);
  m.class_<BoundMixer>("Mixer")
      .def(torch::init<std::string, int64_t, const std::string&, int64_t, int64_t, double>())
      .def("parameters", &BoundMixer::parameters)
      .def("buffers", &BoundMixer::buffers)
      .def("options", &BoundMixer::options)
      .def("zero_state", &BoundMixer::zero_state)
      .def("forward", &BoundMixer::forward);
}

}  // namespace gdn
