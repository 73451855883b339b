// SPDX-License-Identifier: Apache-2.0
#include "gdn/bench/small_kernels.h"

#include <algorithm>
#include <chrono>
#include <functional>
#include <list>
#include <memory>
#include <vector>

#include "gdn/base/pages.h"
#include "gdn/base/parallel.h"
#include "gdn/base/rng.h"
#include "gdn/kernels/cross_entropy.h"
#include "gdn/kernels/gate.h"
#include "gdn/kernels/norm.h"
#include "gdn/kernels/short_conv.h"
#include "gdn/kernels/swiglu.h"

namespace gdn::bench {
namespace {

// The arrays of a call.
class Arrays {
 public:
  // Normally distributed.
  void* random(int64_t n, DType dtype) {
    void* data = room(n * size_of(dtype));
    Rng rng(static_cast<uint64_t>(n));
    dispatch_dtype(dtype, [&](auto t) {
      using T = decltype(t);
      for (int64_t i = 0; i < n; ++i) {
        store(static_cast<T*>(data) + i, static_cast<Acc<T>>(rng.normal()));
      }
    });
    return data;
  }
  void* room(int64_t bytes) {
    return all_.emplace_back(static_cast<size_t>(bytes), uint8_t{0}).data();
  }

 private:
  std::list<PageVector<uint8_t>> all_;
};

struct Calls {
  int64_t elements;  // per call
  std::function<void()> forward, backward;
};

constexpr DType kWeights = DType::kF32;

Calls short_conv_calls(Arrays& arrays, DType dtype, int64_t times) {
  ShortConvParams p;
  p.num_sequences = 1;
  p.total_tokens = 8 * times;
  p.channels = 128;
  p.dtype = dtype;
  const int64_t n = p.total_tokens * p.channels;
  p.x = arrays.random(n, dtype);
  p.weight = arrays.random(p.channels * p.width, kWeights);
  ShortConvGrads g;
  g.dy = arrays.random(n, dtype);
  g.dx = arrays.random(n, dtype);
  g.dweight = arrays.random(p.channels * p.width, kWeights);
  return {n, [=] { short_conv_forward(p, g.dx, nullptr); }, [=] { short_conv_backward(p, g); }};
}

Calls norm_calls(Arrays& arrays, DType dtype, int64_t times, SmallKernel kernel) {
  NormParams p;
  p.kind = kernel == SmallKernel::kL2Norm ? NormKind::kL2 : NormKind::kRms;
  p.dim = kernel == SmallKernel::kRmsNorm ? 512 : 128;
  p.rows = (kernel == SmallKernel::kRmsNorm ? 2 : 4) * times;
  p.dtype = dtype;
  p.eps = 1e-5;
  const int64_t n = p.rows * p.dim;
  p.x = arrays.random(n, dtype);
  NormGrads g;
  g.dy = arrays.random(n, dtype);
  g.dx = arrays.random(n, dtype);
  if (kernel != SmallKernel::kL2Norm) {
    p.weight = arrays.random(p.dim, kWeights);
    g.dweight = arrays.random(p.dim, kWeights);
  }
  if (kernel == SmallKernel::kGatedNorm) {
    p.gate = arrays.random(n, dtype);
    g.dgate = arrays.random(n, dtype);
  }
  return {n, [=] { norm_forward(p, g.dx); }, [=] { norm_backward(p, g); }};
}

Calls swiglu_calls(Arrays& arrays, DType dtype, int64_t times) {
  SwigluParams p;
  p.rows = times;
  p.dim = 512;
  p.dtype = dtype;
  const int64_t n = p.rows * p.dim;
  p.gate = arrays.random(n, dtype);
  p.up = arrays.random(n, dtype);
  void *dy = arrays.random(n, dtype), *y = arrays.random(n, dtype), *dup = arrays.random(n, dtype);
  return {n, [=] { swiglu_forward(p, y); }, [=] { swiglu_backward(p, dy, y, dup); }};
}

Calls gate_calls(Arrays& arrays, DType dtype, int64_t times) {
  GateParams p;
  p.rows = 4 * times;
  p.heads = 1;
  p.channels = 128;
  p.dtype = dtype;
  const int64_t n = p.rows * p.channels;
  p.a = arrays.random(n, dtype);
  p.A_log = arrays.random(p.heads, kWeights);
  p.dt_bias = arrays.random(p.channels, kWeights);
  void* g = arrays.random(n, kWeights);
  GateGrads grads;
  grads.dg = arrays.random(n, kWeights);
  grads.da = arrays.random(n, dtype);
  grads.dA_log = arrays.random(p.heads, kWeights);
  grads.ddt_bias = arrays.random(p.channels, kWeights);
  return {n, [=] { gate_forward(p, g); }, [=] { gate_backward(p, grads); }};
}

Calls cross_entropy_calls(Arrays& arrays, DType dtype, int64_t times) {
  CrossEntropyParams p;
  p.rows = times;
  p.vocab = 1024;
  p.dtype = dtype;
  const int64_t n = p.rows * p.vocab;
  p.logits = arrays.random(n, dtype);
  p.targets = static_cast<const int64_t*>(arrays.room(p.rows * 8));  // zeros
  void *loss = arrays.random(p.rows, kWeights), *sums = arrays.random(p.rows, kWeights),
       *dlogits = arrays.random(n, dtype);
  return {n, [=] { cross_entropy_forward(p, loss, sums); },
          [=] { cross_entropy_backward(p, sums, loss, dlogits); }};
}

Calls make_calls(Arrays& arrays, SmallKernel kernel, DType dtype, int64_t times) {
  switch (kernel) {
    case SmallKernel::kShortConv:
      return short_conv_calls(arrays, dtype, times);
    case SmallKernel::kSwiglu:
      return swiglu_calls(arrays, dtype, times);
    case SmallKernel::kGate:
      return gate_calls(arrays, dtype, times);
    case SmallKernel::kCrossEntropy:
      return cross_entropy_calls(arrays, dtype, times);
    default:
      return norm_calls(arrays, dtype, times, kernel);
  }
}

// Seconds of one call: the best of many short runs of each, in turn.
std::vector<double> best_seconds(const std::vector<std::function<void()>>& functions) {
  using Clock = std::chrono::steady_clock;
  constexpr int kRuns = 60, kCalls = 40;
  std::vector<double> best(functions.size(), 1.0);
  for (int run = 0; run < kRuns; ++run) {
    for (size_t i = 0; i < functions.size(); ++i) {
      functions[i]();
      const auto start = Clock::now();
      for (int call = 0; call < kCalls; ++call) functions[i]();
      const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
      best[i] = std::min(best[i], seconds / kCalls);
    }
  }
  return best;
}

}  // namespace

SmallKernelTimes in_l1(SmallKernel kernel, DType dtype, int threads) {
  std::vector<SmallKernelTimes> times(static_cast<size_t>(threads));
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Arrays arrays;
      const Calls some = make_calls(arrays, kernel, dtype, 1),
                  twice = make_calls(arrays, kernel, dtype, 2);
      const std::vector<double> best =
          best_seconds({some.forward, twice.forward, some.backward, twice.backward});
      const auto per_element = [&](double of_some, double of_twice) {
        const double more = of_twice - of_some;
        return more > 0 ? more / static_cast<double>(twice.elements - some.elements)
                        : of_twice / static_cast<double>(twice.elements);
      };
      times[static_cast<size_t>(i)] = {per_element(best[0], best[1]),
                                       per_element(best[2], best[3])};
    }
  });
  SmallKernelTimes mean = {0, 0};
  for (const auto& t : times) {
    mean.forward += t.forward / threads;
    mean.backward += t.backward / threads;
  }
  return mean;
}

SmallCall small_call(SmallKernel kernel, DType dtype, bool backward, int64_t times) {
  const auto arrays = std::make_shared<Arrays>();
  const Calls calls = make_calls(*arrays, kernel, dtype, times);
  const auto& call = backward ? calls.backward : calls.forward;
  return {calls.elements, [arrays, call] { call(); }};
}

}  // namespace gdn::bench
