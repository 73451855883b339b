// SPDX-License-Identifier: Apache-2.0
// Kernels that touch far more than the caches hold write past them. Their rows must come out as in
// calls on a few rows each, which do not.
#include <cstring>
#include <functional>

#include "gdn/base/pages.h"
#include "gdn/kernels/cross_entropy.h"
#include "gdn/kernels/gate.h"
#include "gdn/kernels/norm.h"
#include "gdn/kernels/swiglu.h"
#include "tests/kernels/support.h"

namespace gdn {
namespace {

constexpr int64_t kRows = 2050, kDim = 4096, kElements = kRows * kDim;

PageVector<float> inputs(uint64_t seed) {
  const std::vector<float> some = testing::random_normal<float>(8191, seed);
  PageVector<float> x(kElements);
  for (int64_t i = 0; i < kElements; ++i) x[i] = some[i % some.size()];
  return x;
}

// run(first, rows, out): rows [first, first + rows) to `outputs` tensors from out[0], out[1] on, of
// which the second does not begin with a line of the caches.
using Run = std::function<void(int64_t, int64_t, float**)>;

void expect_rows_alone(const char* what, int outputs, const Run& run) {
  PageVector<float> whole[2], parts[2];
  float *all[2] = {}, *some[2] = {};
  for (int i = 0; i < outputs; ++i) {
    whole[i].assign(kElements + i, -7.0f);
    parts[i].assign(kElements + i, -9.0f);
    all[i] = whole[i].data() + i;
  }
  run(0, kRows, all);
  for (int64_t first = 0; first < kRows; first += 205) {
    for (int i = 0; i < outputs; ++i) some[i] = parts[i].data() + i + first * kDim;
    run(first, 205, some);
  }
  for (int i = 0; i < outputs; ++i) {
    EXPECT_EQ(std::memcmp(all[i], parts[i].data() + i, kElements * sizeof(float)), 0)
        << what << ", output " << i;
  }
}

TEST(Output, PastTheCachesAsThroughThem) {
  const PageVector<float> x = inputs(1), z = inputs(2), dy = inputs(3);
  const std::vector<float> weight = testing::random_normal<float>(kDim, 4);
  std::vector<float> sums(2 * kDim);

  const auto norm = [&](int64_t first, int64_t rows, const float* gate) {
    NormParams p;
    p.rows = rows;
    p.dim = kDim;
    p.eps = 1e-5;
    p.x = x.data() + first * kDim;
    p.weight = weight.data();
    p.gate = gate == nullptr ? nullptr : gate + first * kDim;
    return p;
  };
  for (const float* gate : {static_cast<const float*>(nullptr), z.data()}) {
    expect_rows_alone("norm", 1, [&](int64_t first, int64_t rows, float** out) {
      norm_forward(norm(first, rows, gate), out[0]);
    });
    expect_rows_alone("norm's gradients", gate == nullptr ? 1 : 2,
                      [&](int64_t first, int64_t rows, float** out) {
                        NormGrads grads;
                        grads.dy = dy.data() + first * kDim;
                        grads.dx = out[0];
                        grads.dgate = out[1];
                        grads.dweight = sums.data();
                        norm_backward(norm(first, rows, gate), grads);
                      });
  }

  const auto swiglu = [&](int64_t first, int64_t rows) {
    SwigluParams p;
    p.rows = rows;
    p.dim = kDim;
    p.gate = x.data() + first * kDim;
    p.up = z.data() + first * kDim;
    return p;
  };
  expect_rows_alone("swiglu", 1, [&](int64_t first, int64_t rows, float** out) {
    swiglu_forward(swiglu(first, rows), out[0]);
  });
  expect_rows_alone("swiglu's gradients", 2, [&](int64_t first, int64_t rows, float** out) {
    swiglu_backward(swiglu(first, rows), dy.data() + first * kDim, out[0], out[1]);
  });

  const auto gate = [&](int64_t first, int64_t rows) {
    GateParams p;
    p.rows = rows;
    p.heads = 32;
    p.channels = kDim / p.heads;
    p.a = x.data() + first * kDim;
    p.A_log = weight.data();
    return p;
  };
  expect_rows_alone("gate", 1, [&](int64_t first, int64_t rows, float** out) {
    gate_forward(gate(first, rows), out[0]);
  });
  expect_rows_alone("gate's gradients", 1, [&](int64_t first, int64_t rows, float** out) {
    gate_backward(gate(first, rows), {dy.data() + first * kDim, out[0], sums.data(), nullptr});
  });

  std::vector<int64_t> targets(kRows);
  for (int64_t i = 0; i < kRows; ++i) targets[i] = i % 7 == 0 ? -100 : i * 31 % kDim;
  std::vector<float> loss(kRows), logsumexp(kRows), dloss(kRows, 0.5f);
  expect_rows_alone("cross-entropy's gradient", 1, [&](int64_t first, int64_t rows, float** out) {
    CrossEntropyParams p;
    p.rows = rows;
    p.vocab = kDim;
    p.logits = x.data() + first * kDim;
    p.targets = targets.data() + first;
    cross_entropy_forward(p, loss.data(), logsumexp.data());
    cross_entropy_backward(p, logsumexp.data(), dloss.data(), out[0]);
  });
}

}  // namespace
}  // namespace gdn
