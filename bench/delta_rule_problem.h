// SPDX-License-Identifier: Apache-2.0
// A problem of the delta rule for benchmarks: sizes, random inputs in fp32, outputs and gradients.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "gdn/base/pages.h"
#include "gdn/base/rng.h"
#include "gdn/kernels/delta_rule/delta_rule.h"

namespace gdn::bench {

struct Shape {
  int64_t B, T, H, HV, K, V;
  DeltaGate gate = DeltaGate::kScalar;
  DeltaErase erase = DeltaErase::kKey;
  int chunk_size = 0;
  bool bf16 = false;
};

// Sizes, random inputs and outputs in fp32 or bf16.
struct Problem {
  explicit Problem(const Shape& s, bool training = true) {
    Rng rng(1);
    const auto normal = [&](int64_t n, double scale) {
      PageVector<float> v(n);
      for (float& e : v) e = static_cast<float>(scale * rng.normal());
      return v;
    };
    const int64_t tokens = s.B * s.T, keys = tokens * s.H * s.K;
    const double unit = 1.0 / std::sqrt(static_cast<double>(s.K));
    q = normal(keys, unit);
    k = normal(keys, unit);
    if (s.erase == DeltaErase::kOwn || s.erase == DeltaErase::kSeparate) a = normal(keys, unit);
    if (s.erase == DeltaErase::kSeparate) p = normal(keys, unit);
    v = normal(tokens * s.HV * s.V, 1.0);
    if (training) d_o = v;
    g = normal(tokens * s.HV * (s.gate == DeltaGate::kChannel ? s.K : 1), 0.1);
    for (float& e : g) e = -std::abs(e);
    beta.assign(tokens * s.HV, 0.5f);
    x.num_sequences = s.B;
    x.total_tokens = tokens;
    x.H = s.H;
    x.HV = s.HV;
    x.K = s.K;
    x.V = s.V;
    x.gate = s.gate;
    x.erase = s.erase;
    x.scale = unit;
    x.chunk_size = s.chunk_size;
    x.q = q.data();
    x.k = k.data();
    x.v = v.data();
    x.a = a.data();
    x.p = p.data();
    x.g = g.data();
    if (s.erase != DeltaErase::kSeparate) x.beta = beta.data();
    o.resize(v.size());
    if (training) make_gradients(keys);
    if (s.bf16) round_to_bf16();
    // Rows that read (erase, query) and keys that write per token; a triangle of C x C counts as
    // half. C = 32 whatever the engine chooses: the usual yardstick, 114.7 k for K = V = 128.
    const double C = s.chunk_size != 0 ? s.chunk_size : 32;
    const double heads = static_cast<double>(tokens * s.HV);
    const double R = s.erase == DeltaErase::kNone ? 1 : 2,
                 W = s.erase == DeltaErase::kSeparate ? 2 : 1;
    const double state = 2.0 * s.K * s.V, key = C * s.K, value = C * s.V;
    forward_flops = heads * ((R + W) * state + R * W * (key + value));
    backward_flops = heads * (2 * (R + W) * state + R * W * (3 * key + 2 * value));
  }

  // Packs sequences that end at these tokens (the first entry is 0) instead of B equal ones.
  void cut(std::vector<int64_t> at) {
    ends = std::move(at);
    x.cu_seqlens = ends.data();
    x.num_sequences = static_cast<int64_t>(ends.size()) - 1;
    if (!saved.empty()) saved.resize(delta_rule_saved_size(x));
  }

  std::vector<int64_t> ends;
  PageVector<float> q, k, v, a, p, g, beta, o, saved, d_o, dq, dk, dv, da, dp, dg, dbeta;
  DeltaRuleParams x;
  DeltaRuleGrads grads;
  double forward_flops, backward_flops;  // of the multiply-adds that the chunk form cannot avoid

 private:
  // Rounds the inputs to bf16, in place; outputs and gradients of them fit where those of
  // fp32 were.
  void round_to_bf16() {
    for (auto* inputs : {&q, &k, &v, &a, &p, &d_o}) {
      auto* to = reinterpret_cast<BFloat16*>(inputs->data());
      for (size_t i = 0; i < inputs->size(); ++i) {
        const BFloat16 rounded = to_bf16((*inputs)[i]);
        std::memcpy(to + i, &rounded, sizeof(rounded));
      }
    }
    x.dtype = DType::kBF16;
  }

  void make_gradients(int64_t keys) {
    saved.resize(delta_rule_saved_size(x));
    for (auto* grad : {&dq, &dk, &da, &dp}) grad->resize(keys);
    dv.resize(v.size());
    dg.resize(g.size());
    dbeta.resize(beta.size());
    grads.d_o = d_o.data();
    grads.dq = dq.data();
    grads.dk = dk.data();
    grads.dv = dv.data();
    grads.da = da.data();
    grads.dp = dp.data();
    grads.dg = dg.data();
    grads.dbeta = dbeta.data();
  }
};

}  // namespace gdn::bench
