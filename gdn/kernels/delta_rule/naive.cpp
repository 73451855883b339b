// SPDX-License-Identifier: Apache-2.0
// The oracle: the recurrence written down token by token in double precision, and its derivative by
// hand, token by token in reverse. Slow and obvious on purpose; every other path is tested against
// it.
#include <algorithm>
#include <cmath>
#include <vector>

#include "gdn/base/parallel.h"
#include "gdn/kernels/delta_rule/common.h"

namespace gdn {
namespace {

using Vec = std::vector<double>;

// A tensor [tokens, heads, width] read as double.
template <typename T>
Vec read_row(const void* base, int64_t token, int64_t heads, int64_t head, int64_t width) {
  Vec row(width);
  const T* p = static_cast<const T*>(base) + (token * heads + head) * width;
  for (int64_t i = 0; i < width; ++i) row[i] = load(p + i);
  return row;
}

double dot(const Vec& x, const Vec& y) {
  double sum = 0.0;
  for (size_t i = 0; i < x.size(); ++i) sum += x[i] * y[i];
  return sum;
}

Vec scaled(const Vec& x, double factor) {
  Vec y = x;
  for (double& e : y) e *= factor;
  return y;
}

// One token's inputs for one value head; absent ones take their neutral value.
struct Token {
  Vec q, k, v, a, p;
  Vec decay;  // [K]: exp(g), the same number in every channel for a scalar gate
  Vec beta;   // [V]
  double q_norm = 1.0, k_norm = 1.0;  // one over the length where q and k are normalised
};

template <typename T>
Token read_token(const DeltaRuleParams& x, int64_t t, int64_t hv) {
  using A = Acc<T>;
  const int64_t h = hv / (x.HV / x.H);
  Token r;
  r.q = read_row<T>(x.q, t, x.H, h, x.K);
  r.k = read_row<T>(x.k, t, x.H, h, x.K);
  r.v = read_row<T>(x.v, t, x.HV, hv, x.V);
  if (x.l2norm_qk) {
    r.q_norm = 1.0 / std::sqrt(dot(r.q, r.q) + delta_rule::kL2NormEps);
    r.k_norm = 1.0 / std::sqrt(dot(r.k, r.k) + delta_rule::kL2NormEps);
    r.q = scaled(r.q, r.q_norm);
    r.k = scaled(r.k, r.k_norm);
  }
  r.a.assign(x.K, 0.0);
  r.p.assign(x.K, 0.0);
  if (x.erase == DeltaErase::kKey) r.a = r.k;
  if (delta_rule::has_a(x.erase)) r.a = read_row<T>(x.a, t, x.H, h, x.K);
  if (x.erase == DeltaErase::kSeparate) r.p = read_row<T>(x.p, t, x.H, h, x.K);
  r.decay.assign(x.K, 1.0);
  if (x.gate == DeltaGate::kScalar) {
    r.decay.assign(x.K, std::exp(double{static_cast<const A*>(x.g)[t * x.HV + hv]}));
  } else if (x.gate == DeltaGate::kChannel) {
    r.decay = read_row<A>(x.g, t, x.HV, hv, x.K);
    for (double& d : r.decay) d = std::exp(d);
  }
  r.beta.assign(x.V, 1.0);
  if (x.beta != nullptr && x.channel_beta) {
    r.beta = read_row<A>(x.beta, t, x.HV, hv, x.V);
  } else if (x.beta != nullptr) {
    r.beta.assign(x.V, static_cast<const A*>(x.beta)[t * x.HV + hv]);
  }
  return r;
}

// x^T y products with a K x V matrix in row-major order.
Vec transposed_times(const Vec& s, const Vec& x, int64_t K, int64_t V) {
  Vec y(V, 0.0);
  for (int64_t i = 0; i < K; ++i)
    for (int64_t j = 0; j < V; ++j) y[j] += s[i * V + j] * x[i];
  return y;
}

Vec times(const Vec& s, const Vec& x, int64_t K, int64_t V) {
  Vec y(K, 0.0);
  for (int64_t i = 0; i < K; ++i)
    for (int64_t j = 0; j < V; ++j) y[i] += s[i * V + j] * x[j];
  return y;
}

void add_outer(Vec& s, const Vec& x, const Vec& y) {
  for (size_t i = 0; i < x.size(); ++i)
    for (size_t j = 0; j < y.size(); ++j) s[i * y.size() + j] += x[i] * y[j];
}

void scale_rows(Vec& s, const Vec& x) {
  const size_t columns = s.size() / x.size();
  for (size_t i = 0; i < x.size(); ++i)
    for (size_t j = 0; j < columns; ++j) s[i * columns + j] *= x[i];
}

// The gradient of a row from that of the normalised row y: factor (dy - y (y.dy)).
Vec through_norm(const DeltaRuleParams& x, const Vec& y, double factor, Vec dy) {
  if (!x.l2norm_qk) return dy;
  const double along = dot(y, dy);
  for (size_t i = 0; i < y.size(); ++i) dy[i] = factor * (dy[i] - along * y[i]);
  return dy;
}

// Everything a step leaves behind that its derivative wants.
struct Step {
  Vec before;   // the state before the step
  Vec decayed;  // after its decay
  Vec read;     // what the erase read: S^T a
  Vec u;        // what was written with k (merged form)
  Vec after;
};

Step advance(const DeltaRuleParams& x, const Token& token, const Vec& state) {
  Step s;
  s.before = state;
  s.decayed = state;
  scale_rows(s.decayed, token.decay);
  s.after = s.decayed;
  if (x.erase == DeltaErase::kSeparate) {
    s.read = transposed_times(s.before, token.a, x.K, x.V);
    s.u = token.v;
    add_outer(s.after, token.p, s.read);
  } else {
    s.read = transposed_times(s.decayed, token.a, x.K, x.V);
    s.u.resize(x.V);
    for (int64_t j = 0; j < x.V; ++j) s.u[j] = token.beta[j] * (token.v[j] - s.read[j]);
  }
  add_outer(s.after, token.k, s.u);
  return s;
}

template <typename A>
Vec read_state(const void* base, int64_t index, int64_t size) {
  Vec state(size, 0.0);
  if (base != nullptr) {
    const A* p = static_cast<const A*>(base) + index * size;
    std::copy(p, p + size, state.begin());
  }
  return state;
}

template <typename T>
void forward(const DeltaRuleParams& x, double* o, double* final_state) {
  const int64_t size = x.K * x.V;
  parallel_for(0, x.num_sequences * x.HV, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t hv = task % x.HV;
      const auto range = sequence_span(x, task / x.HV);
      Vec state = read_state<Acc<T>>(x.initial_state, task, size);
      for (int64_t t = range.begin; t < range.end; ++t) {
        const Token token = read_token<T>(x, t, hv);
        state = advance(x, token, state).after;
        const Vec y = scaled(transposed_times(state, token.q, x.K, x.V), x.scale);
        std::copy(y.begin(), y.end(), o + (t * x.HV + hv) * x.V);
      }
      if (final_state != nullptr) std::copy(state.begin(), state.end(), final_state + task * size);
    }
  });
}

void accumulate(double* base, int64_t row, const Vec& x) {
  if (base == nullptr) return;
  for (size_t i = 0; i < x.size(); ++i) base[row * static_cast<int64_t>(x.size()) + i] += x[i];
}

struct NaiveGrads {
  double *dq, *dk, *dv, *da, *dp, *dg, *dbeta;
};

// Turns ds from the gradient of the state after token t into that of the state before it.
void retreat(const DeltaRuleParams& x, const Token& token, const Step& s, int64_t t, int64_t hv,
             const double* d_o, const NaiveGrads& grads, Vec& ds) {
  const int64_t K = x.K, V = x.V, row = t * x.HV + hv, key_row = t * x.H + hv / (x.HV / x.H);
  Vec dy(V, 0.0);
  if (d_o != nullptr) dy.assign(d_o + row * V, d_o + (row + 1) * V);
  dy = scaled(dy, x.scale);
  const auto key_grad = [&](const Vec& dk) {
    accumulate(grads.dk, key_row, through_norm(x, token.k, token.k_norm, dk));
  };
  accumulate(grads.dq, key_row, through_norm(x, token.q, token.q_norm, times(s.after, dy, K, V)));
  add_outer(ds, token.q, dy);

  key_grad(times(ds, s.u, K, V));
  const Vec du = transposed_times(ds, token.k, K, V);
  Vec d_decayed = ds, d_before(ds.size(), 0.0), da(K, 0.0);
  if (x.erase == DeltaErase::kSeparate) {
    accumulate(grads.dv, row, du);
    const Vec d_read = transposed_times(ds, token.p, K, V);
    accumulate(grads.dp, key_row, times(ds, s.read, K, V));
    da = times(s.before, d_read, K, V);
    add_outer(d_before, token.a, d_read);
  } else {
    Vec dv = du, dbeta = du;
    for (int64_t j = 0; j < V; ++j) {
      dv[j] *= token.beta[j];
      dbeta[j] *= token.v[j] - s.read[j];
    }
    accumulate(grads.dv, row, dv);
    if (x.channel_beta) {
      accumulate(grads.dbeta, row, dbeta);
    } else if (grads.dbeta != nullptr) {
      grads.dbeta[row] += dot(dbeta, Vec(V, 1.0));
    }
    const Vec d_read = scaled(dv, -1.0);
    da = times(s.decayed, d_read, K, V);
    add_outer(d_decayed, token.a, d_read);
  }
  if (x.erase == DeltaErase::kKey) key_grad(da);
  if (delta_rule::has_a(x.erase)) accumulate(grads.da, key_row, da);

  if (grads.dg != nullptr && x.gate != DeltaGate::kNone) {
    Vec dg(K, 0.0);
    for (int64_t i = 0; i < K * V; ++i) dg[i / V] += s.decayed[i] * d_decayed[i];
    if (x.gate == DeltaGate::kChannel) {
      accumulate(grads.dg, row, dg);
    } else {
      grads.dg[row] += dot(dg, Vec(K, 1.0));
    }
  }
  scale_rows(d_decayed, token.decay);
  for (int64_t i = 0; i < K * V; ++i) ds[i] = d_decayed[i] + d_before[i];
}

template <typename T>
void backward(const DeltaRuleParams& x, const double* d_o, const double* d_final_state,
              const NaiveGrads& grads, double* d_initial_state) {
  const int64_t size = x.K * x.V, group = x.HV / x.H;
  // A task owns a key head of a sequence, so the value heads of a group add up in a fixed order.
  parallel_for(0, x.num_sequences * x.H, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin * group; task < end * group; ++task) {
      const int64_t hv = task % x.HV;
      const auto range = sequence_span(x, task / x.HV);
      std::vector<Token> tokens;
      std::vector<Step> steps;
      Vec state = read_state<Acc<T>>(x.initial_state, task, size);
      for (int64_t t = range.begin; t < range.end; ++t) {
        tokens.push_back(read_token<T>(x, t, hv));
        steps.push_back(advance(x, tokens.back(), state));
        state = steps.back().after;
      }
      Vec ds = read_state<double>(d_final_state, task, size);
      for (int64_t t = range.end - 1; t >= range.begin; --t) {
        retreat(x, tokens[t - range.begin], steps[t - range.begin], t, hv, d_o, grads, ds);
      }
      if (d_initial_state != nullptr)
        std::copy(ds.begin(), ds.end(), d_initial_state + task * size);
    }
  });
}

void zero(double* p, int64_t n) {
  if (p != nullptr) std::fill(p, p + n, 0.0);
}

}  // namespace

void delta_rule_naive_forward(const DeltaRuleParams& params, double* o, double* final_state) {
  delta_rule::check_params(params, "delta_rule_naive_forward");
  dispatch_dtype(params.dtype, [&](auto t) { forward<decltype(t)>(params, o, final_state); });
}

void delta_rule_naive_backward(const DeltaRuleParams& x, const double* d_o,
                               const double* d_final_state, double* dq, double* dk, double* dv,
                               double* da, double* dp, double* dg, double* dbeta,
                               double* d_initial_state) {
  delta_rule::check_params(x, "delta_rule_naive_backward");
  for (double* p : {dq, dk, da, dp}) zero(p, x.total_tokens * x.H * x.K);
  zero(dv, x.total_tokens * x.HV * x.V);
  zero(dbeta, x.total_tokens * x.HV * (x.channel_beta ? x.V : 1));
  zero(dg, x.total_tokens * x.HV * (x.gate == DeltaGate::kChannel ? x.K : 1));
  const NaiveGrads grads{dq, dk, dv, da, dp, dg, dbeta};
  dispatch_dtype(x.dtype, [&](auto t) {
    backward<decltype(t)>(x, d_o, d_final_state, grads, d_initial_state);
  });
}

}  // namespace gdn
