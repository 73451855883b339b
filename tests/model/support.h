// SPDX-License-Identifier: Apache-2.0
// Small models for tests.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/randint.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <vector>

#include "gdn/model/causal_lm.h"

namespace gdn::testing {

inline void seed(uint64_t value) {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  generator.set_current_seed(value);
}

inline BlockConfig gdn_block() {
  BlockConfig block;
  block.mixer = "gated_delta_net";
  block.mixer_options = {{"head_dim", 8}, {"num_heads", 2}, {"num_v_heads", 4}, {"expand_v", 1.5}};
  return block;
}

inline BlockConfig attention_block() {
  BlockConfig block;
  block.mixer = "attention";
  block.mixer_options = {{"num_heads", 4}, {"num_kv_heads", 2}, {"window_size", 6}};
  return block;
}

inline ModelConfig tiny_config(std::vector<BlockConfig> blocks = {gdn_block(), gdn_block()}) {
  ModelConfig config;
  config.vocab_size = 37;
  config.hidden_size = 32;
  config.intermediate_size = 48;
  config.initializer_range = 0.2;  // large enough that every term of the model matters
  config.blocks = std::move(blocks);
  return config;
}

inline at::Tensor random_ids(int64_t B, int64_t T, int64_t vocab = 37) {
  return at::randint(vocab, {B, T}, at::kLong);
}

class TempFolder {
 public:
  TempFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "gdn_test_XXXXXX").string();
    if (mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
    path_ = pattern;
  }
  ~TempFolder() { std::filesystem::remove_all(path_); }
  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

}  // namespace gdn::testing
