// SPDX-License-Identifier: Apache-2.0
// Models and other sets of tensors in files. A model folder holds model.safetensors (or its shards
// and index), config.json, generation_config.json and tokenizer.json; fla and Hugging Face load the
// first three.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gdn/model/causal_lm.h"
#include "gdn/text/tokenizer.h"

namespace gdn {

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

// One safetensors file, written atomically.
void save_tensors(const std::string& path, const NamedTensors& tensors,
                  const std::map<std::string, std::string>& metadata = {});
struct LoadedTensors {
  NamedTensors tensors;  // copies
  std::map<std::string, std::string> metadata;
};
LoadedTensors load_tensors(const std::string& path);

// Writes the files of a model folder, each atomically; makes the folder where it does not exist.
// tokenizer may be null.
void save_model(const std::string& folder, const CausalLM& model, const Tokenizer* tokenizer);

struct LoadedModel {
  std::shared_ptr<CausalLM> model;
  std::unique_ptr<Tokenizer> tokenizer;  // null: the folder has none
};
LoadedModel load_model(const std::string& folder);

ModelConfig load_model_config(const std::string& folder);

// Copies the weights of a file or folder into `model`, converting floating dtypes. Throws an Error
// that names missing, unexpected and misshaped tensors before anything is copied.
void load_weights(CausalLM& model, const std::string& path);

}  // namespace gdn
