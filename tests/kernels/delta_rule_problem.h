// SPDX-License-Identifier: Apache-2.0
// A random problem of the delta-rule family in any dtype, the engine's paths run on it, and the
// oracle's answers.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "gdn/base/check.h"
#include "gdn/base/dtype.h"
#include "gdn/base/rng.h"
#include "gdn/kernels/delta_rule/delta_rule.h"

namespace gdn::delta_rule_test {

using Vec = std::vector<double>;

// Numbers in a storage type, as raw bytes.
class Buffer {
 public:
  Buffer() = default;
  Buffer(DType dtype, const Vec& values) : dtype_(dtype), bytes_(values.size() * size_of(dtype)) {
    dispatch_dtype(dtype, [&](auto t) {
      using T = decltype(t);
      for (size_t i = 0; i < values.size(); ++i) {
        store(reinterpret_cast<T*>(bytes_.data()) + i, static_cast<Acc<T>>(values[i]));
      }
    });
  }
  // All NaN, so that a missing write shows.
  static Buffer poisoned(DType dtype, int64_t n) {
    return Buffer(dtype, Vec(n, std::numeric_limits<double>::quiet_NaN()));
  }
  void* data() { return bytes_.empty() ? nullptr : bytes_.data(); }
  Vec values() const {
    Vec v(bytes_.size() / size_of(dtype_));
    dispatch_dtype(dtype_, [&](auto t) {
      using T = decltype(t);
      for (size_t i = 0; i < v.size(); ++i) {
        v[i] = load(reinterpret_cast<const T*>(bytes_.data()) + i);
      }
    });
    return v;
  }
  const std::vector<unsigned char>& bytes() const { return bytes_; }

 private:
  DType dtype_ = DType::kF32;
  std::vector<unsigned char> bytes_;
};

enum class GateRange { kMild, kStrong, kMixedExtreme };

struct Case {
  DeltaGate gate = DeltaGate::kScalar;
  DeltaErase erase = DeltaErase::kKey;
  DType dtype = DType::kF64;
  int64_t H = 2, HV = 2, K = 8, V = 8;
  std::vector<int64_t> lengths = {21};
  int chunk_size = 16;
  bool beta = true, initial = true, final_state = true;
  GateRange range = GateRange::kMild;
  uint64_t seed = 1;
  bool packed = true;  // by cu_seqlens, else by equal lengths
  bool channel_beta = false, l2norm_qk = false;
};

inline std::string name(const Case& c) {
  std::string s = str_cat("gate", int(c.gate), " erase", int(c.erase), " dtype", int(c.dtype), " H",
                          c.H, " HV", c.HV, " K", c.K, " V", c.V, " chunk", c.chunk_size, " beta",
                          c.beta + (c.beta && c.channel_beta), " l2norm", c.l2norm_qk, " initial",
                          c.initial, " final", c.final_state, " range", int(c.range), " T");
  for (int64_t t : c.lengths) s += str_cat(" ", t);
  return s;
}

struct Results {
  Buffer o, final_state, dq, dk, dv, da, dp, dg, dbeta, d_initial;
};

struct Problem {
  explicit Problem(const Case& c) : spec(c) {
    const DType acc = c.dtype == DType::kF64 ? DType::kF64 : DType::kF32;
    Rng rng(c.seed);
    cu_seqlens = {0};
    for (int64_t t : c.lengths) cu_seqlens.push_back(cu_seqlens.back() + t);
    const int64_t T = cu_seqlens.back(), N = c.lengths.size();
    params.num_sequences = N;
    params.total_tokens = T;
    params.cu_seqlens = c.packed ? cu_seqlens.data() : nullptr;
    params.H = c.H;
    params.HV = c.HV;
    params.K = c.K;
    params.V = c.V;
    params.dtype = c.dtype;
    params.gate = c.gate;
    params.erase = c.erase;
    params.l2norm_qk = c.l2norm_qk;
    params.scale = 1.0 / std::sqrt(static_cast<double>(c.K));
    params.chunk_size = c.chunk_size;
    const auto normal = [&](int64_t n, double scale) {
      Vec v(n);
      for (double& e : v) e = scale * rng.normal();
      return v;
    };
    const double unit = 1.0 / std::sqrt(static_cast<double>(c.K));
    q = Buffer(c.dtype, normal(T * c.H * c.K, 1.0));
    k = Buffer(c.dtype, normal(T * c.H * c.K, unit));
    v = Buffer(c.dtype, normal(T * c.HV * c.V, 1.0));
    params.q = q.data();
    params.k = k.data();
    params.v = v.data();
    if (c.erase == DeltaErase::kOwn || c.erase == DeltaErase::kSeparate) {
      a = Buffer(c.dtype, normal(T * c.H * c.K, 0.7 * unit));
      params.a = a.data();
    }
    if (c.erase == DeltaErase::kSeparate) {
      p = Buffer(c.dtype, normal(T * c.H * c.K, 0.7 * unit));
      params.p = p.data();
    }
    gate_size =
        c.gate == DeltaGate::kNone ? 0 : T * c.HV * (c.gate == DeltaGate::kChannel ? c.K : 1);
    if (gate_size > 0) {
      Vec values(gate_size);
      for (double& e : values) {
        e = c.range == GateRange::kStrong ? -8.0 * rng.uniform() : -0.3 * rng.uniform();
        if (c.range == GateRange::kMixedExtreme) {
          const double pick = rng.uniform();
          if (pick < 0.15) e = -1e5;
          if (pick > 0.85) e = pick > 0.95 ? -1e4 : 0.0;
        }
      }
      g = Buffer(acc, values);
      params.g = g.data();
    }
    if (c.beta && c.erase != DeltaErase::kSeparate) {
      beta_size = T * c.HV * (c.channel_beta ? c.V : 1);
      Vec values(beta_size);
      for (double& e : values) e = rng.uniform() < 0.1 ? 0.0 : 2.0 * rng.uniform();
      beta = Buffer(acc, values);
      params.beta = beta.data();
      params.channel_beta = c.channel_beta;
    }
    state_size = N * c.HV * c.K * c.V;
    if (c.initial) {
      initial = Buffer(acc, normal(state_size, 1.0));
      params.initial_state = initial.data();
    }
    d_o = Buffer(c.dtype, normal(T * c.HV * c.V, 1.0));
    if (c.final_state) d_final = Buffer(acc, normal(state_size, 1.0));
  }
  Problem(const Problem&) = delete;

  int64_t key_size() const { return params.total_tokens * params.H * params.K; }
  int64_t value_size() const { return params.total_tokens * params.HV * params.V; }
  DType acc() const { return params.dtype == DType::kF64 ? DType::kF64 : DType::kF32; }

  Results poisoned() const {
    Results r;
    r.o = Buffer::poisoned(params.dtype, value_size());
    if (spec.final_state) r.final_state = Buffer::poisoned(acc(), state_size);
    r.dq = Buffer::poisoned(params.dtype, key_size());
    r.dk = Buffer::poisoned(params.dtype, key_size());
    r.dv = Buffer::poisoned(params.dtype, value_size());
    if (params.a != nullptr) r.da = Buffer::poisoned(params.dtype, key_size());
    if (params.p != nullptr) r.dp = Buffer::poisoned(params.dtype, key_size());
    r.dg = Buffer::poisoned(acc(), gate_size);
    if (params.beta != nullptr) r.dbeta = Buffer::poisoned(acc(), beta_size);
    if (spec.initial) r.d_initial = Buffer::poisoned(acc(), state_size);
    return r;
  }

  Results chunk() {
    Results r = poisoned();
    Buffer saved = Buffer::poisoned(acc(), delta_rule_saved_size(params));
    delta_rule_chunk_forward(params, {r.o.data(), r.final_state.data(), saved.data()});
    DeltaRuleGrads grads;
    grads.d_o = d_o.data();
    grads.d_final_state = d_final.data();
    grads.dq = r.dq.data();
    grads.dk = r.dk.data();
    grads.dv = r.dv.data();
    grads.da = r.da.data();
    grads.dp = r.dp.data();
    grads.dg = r.dg.data();
    grads.dbeta = r.dbeta.data();
    grads.d_initial_state = r.d_initial.data();
    delta_rule_chunk_backward(params, saved.data(), grads);
    return r;
  }

  // The oracle's answers, in double whatever the problem's dtype.
  Results naive() {
    Results r;
    Vec o(value_size()), final_state(state_size), dq(key_size()), dk(dq), da(dq), dp(dq), dv(o),
        dg(gate_size), dbeta(beta_size), ds(state_size);
    delta_rule_naive_forward(params, o.data(), final_state.data());
    const Vec grad_o = d_o.values(), grad_state = d_final.values();
    delta_rule_naive_backward(
        params, grad_o.data(), grad_state.empty() ? nullptr : grad_state.data(), dq.data(),
        dk.data(), dv.data(), da.data(), dp.data(), dg.data(), dbeta.data(), ds.data());
    const auto keep = [](bool wanted, const Vec& x) {
      return Buffer(DType::kF64, wanted ? x : Vec());
    };
    r.o = keep(true, o);
    r.final_state = keep(spec.final_state, final_state);
    r.dq = keep(true, dq);
    r.dk = keep(true, dk);
    r.dv = keep(true, dv);
    r.da = keep(params.a != nullptr, da);
    r.dp = keep(params.p != nullptr, dp);
    r.dg = keep(true, dg);
    r.dbeta = keep(params.beta != nullptr, dbeta);
    r.d_initial = keep(spec.initial, ds);
    return r;
  }

  Case spec;
  DeltaRuleParams params;
  std::vector<int64_t> cu_seqlens;
  Buffer q, k, v, a, p, g, beta, initial, d_o, d_final;
  int64_t gate_size = 0, beta_size = 0, state_size = 0;
};

// ||x - y|| / ||y||, or ||x|| where y is zero; NaN if anything is.
inline double relative_error(const Buffer& x, const Buffer& y) {
  const Vec a = x.values(), b = y.values();
  EXPECT_EQ(a.size(), b.size());
  double error = 0.0, norm = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    error += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return std::sqrt(error) / (norm > 0.0 ? std::sqrt(norm) : 1.0);
}

inline std::vector<std::pair<const char*, double>> errors(const Results& x, const Results& y) {
  return {{"o", relative_error(x.o, y.o)},
          {"final_state", relative_error(x.final_state, y.final_state)},
          {"dq", relative_error(x.dq, y.dq)},
          {"dk", relative_error(x.dk, y.dk)},
          {"dv", relative_error(x.dv, y.dv)},
          {"da", relative_error(x.da, y.da)},
          {"dp", relative_error(x.dp, y.dp)},
          {"dg", relative_error(x.dg, y.dg)},
          {"dbeta", relative_error(x.dbeta, y.dbeta)},
          {"d_initial", relative_error(x.d_initial, y.d_initial)}};
}

inline void expect_close(const Results& x, const Results& y, double bound,
                         const std::string& what) {
  for (const auto& [tensor, error] : errors(x, y)) {
    EXPECT_LE(error, bound) << tensor << " of " << what;
    EXPECT_FALSE(std::isnan(error)) << tensor << " of " << what;
  }
}

inline void expect_same_bits(const Results& x, const Results& y, const std::string& what) {
  const auto list = [](const Results& r) {
    return std::vector<const Buffer*>{&r.o,  &r.final_state, &r.dq, &r.dk,    &r.dv,
                                      &r.da, &r.dp,          &r.dg, &r.dbeta, &r.d_initial};
  };
  const auto a = list(x), b = list(y);
  for (size_t i = 0; i < a.size(); ++i)
    EXPECT_TRUE(a[i]->bytes() == b[i]->bytes()) << i << " of " << what;
}

inline const DeltaGate kGates[] = {DeltaGate::kNone, DeltaGate::kScalar, DeltaGate::kChannel};
inline const DeltaErase kErases[] = {DeltaErase::kNone, DeltaErase::kKey, DeltaErase::kOwn,
                                     DeltaErase::kSeparate};

}  // namespace gdn::delta_rule_test
