// SPDX-License-Identifier: Apache-2.0
// Building blocks of mixers, with fla's parameter names. Parameters stay in the dtype they were
// made in (fp32 master weights); each module computes in the dtype of its input.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <initializer_list>
#include <mutex>
#include <string_view>
#include <utility>
#include <vector>

#include "gdn/mixers/common/state_access.h"
#include "gdn/ops/linear.h"

namespace gdn {

// While one lives on this thread, modules leave the weights that they would draw at random as they
// are in memory: for models whose weights are read from a file next.
class SkipInitialization {
 public:
  SkipInitialization();
  ~SkipInitialization();
  SkipInitialization(const SkipInitialization&) = delete;
  SkipInitialization& operator=(const SkipInitialization&) = delete;
  static bool active();

 private:
  bool before_;
};

// Parameters in the dtype of the activations, for decoding: casting them costs more than
// multiplying one token by them, so a cast is kept until the parameter changes. Torch's fused
// optimizers change parameters without counting their version up. Therefore nothing is kept while a
// gradient waits to be applied, and who runs the layer for training calls clear().
class CastCache {
 public:
  ops::Projection get(const at::Tensor& weight, const at::Tensor& bias, at::ScalarType dtype);
  void clear();

 private:
  std::mutex mutex_;
  ops::Projection cast_;
  const void* of_ = nullptr;  // what it was made from: the weight's memory and version
  int64_t version_ = -1;
};

// y = x weight^T + bias; weight [out,in], bias [out]. Initialised like torch.nn.Linear.
class Linear : public torch::nn::Module {
 public:
  Linear(int64_t in_features, int64_t out_features, bool with_bias = false);
  at::Tensor forward(const at::Tensor& x /* [...,in] */);  // [...,out]

  at::Tensor weight, bias;
  // A mixer whose initialisation is part of its definition sets this; the model then leaves the
  // values alone.
  bool keeps_initialisation = false;
  void forget_casts() { cast_.clear(); }

 private:
  friend std::vector<at::Tensor> forward_all(const at::Tensor& x,
                                             std::initializer_list<Linear*> layers);
  CastCache cast_;
};

// What each of these layers makes of the same x; for a few rows without gradients, as in decoding,
// in one pass over all the weights.
std::vector<at::Tensor> forward_all(const at::Tensor& x /* [...,in] */,
                                    std::initializer_list<Linear*> layers);

enum class Activation : uint8_t { kNone, kSilu };

// A causal convolution per channel: y_t = act(sum_j weight[:,0,j] * x_{t-W+1+j} + bias). weight
// [channels,1,W], bias [channels].
// Its state [N,channels,W] holds the last W inputs, the newest in the last column.
class ShortConvolution : public torch::nn::Module {
 public:
  ShortConvolution(int64_t channels, int64_t width, bool with_bias, Activation activation);
  // x [B,T,channels]; continues from and leaves the entry `name` where the call has a state.
  at::Tensor forward(const at::Tensor& x, StateAccess& state, const char* name, bool naive);
  at::Tensor zero_state(int64_t sequences, const at::TensorOptions& options) const;

  at::Tensor weight, bias;

 private:
  at::Tensor forward_naive(const at::Tensor& x, StateAccess& state, const char* name);

  Activation activation_;
};

// x / sqrt(mean(x^2) + eps) * weight over the last dimension; with a gate, times act(gate).
class RmsNorm : public torch::nn::Module {
 public:
  RmsNorm(int64_t size, double eps);
  at::Tensor forward(const at::Tensor& x, bool naive);
  // x + scale * y, and the norm of that, in one pass over memory.
  std::pair<at::Tensor, at::Tensor> forward_added(const at::Tensor& x, const at::Tensor& y,
                                                  double scale, bool naive);
  at::Tensor forward_gated(const at::Tensor& x, const at::Tensor& gate, bool naive,
                           std::string_view activation = "silu");  // or "swish", "sigmoid"

  at::Tensor weight;

 private:
  double eps_;
};

// Literal forms, in the dtype of their inputs, from ATen's elementwise operations only.
namespace naive {
at::Tensor l2norm(const at::Tensor& x, double eps = 1e-6);
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);
// x [B,T,C], weight [C,1,W], history [B,C,W] of the tokens before x.
at::Tensor short_conv(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                      const at::Tensor& history);
// -exp(A_log) * log(1 + exp(a + dt_bias)), a [...,HV].
at::Tensor gdn_gate(const at::Tensor& a, const at::Tensor& A_log, const at::Tensor& dt_bias);
}  // namespace naive

}  // namespace gdn
