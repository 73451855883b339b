// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <vector>

#include "gdn/mixers/rwkv4/kernel.h"

namespace gdn {
namespace {

// One term of both sums: e^exponent times p or q.
struct Term {
  double exponent;
  double p, q;             // its factors in the numerator and the denominator
  double age = 0;          // d exponent / dw
  int64_t token = -1;      // whose k stands in the exponent; -1: the initial state
  bool has_bonus = false;  // whether u does
};

struct Naive {
  const WkvParams& p;

  double at(const void* data, int64_t i) const {
    return dispatch_dtype(
        p.dtype, [&](auto t) -> double { return load(static_cast<const decltype(t)*>(data) + i); });
  }
  double at_acc(const void* data, int64_t i) const {
    return p.dtype == DType::kF64 ? static_cast<const double*>(data)[i]
                                  : static_cast<const float*>(data)[i];
  }
  int64_t begin(int64_t n) const {
    return p.cu_seqlens != nullptr ? p.cu_seqlens[n] : p.total_tokens / p.num_sequences * n;
  }
  int64_t state(int64_t n, int64_t which, int64_t c) const {
    return (n * 3 + which) * p.channels + c;
  }

  // The terms of P and Q after `count` tokens of sequence n.
  std::vector<Term> sums(int64_t n, int64_t c, int64_t count) const {
    std::vector<Term> terms;
    const double w = at_acc(p.w, c);
    if (p.initial != nullptr && at_acc(p.initial, state(n, 1, c)) != 0) {
      const double age = static_cast<double>(count);
      terms.push_back({age * w + at_acc(p.initial, state(n, 2, c)),
                       at_acc(p.initial, state(n, 0, c)), at_acc(p.initial, state(n, 1, c)), age});
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = begin(n) + i;
      const double age = static_cast<double>(count - 1 - i);
      const double v = at(p.v, token * p.channels + c);
      terms.push_back({age * w + at(p.k, token * p.channels + c), v, 1, age, token});
    }
    return terms;
  }
  // Those of y at the token after.
  std::vector<Term> sums_with_bonus(int64_t n, int64_t c, int64_t count) const {
    std::vector<Term> terms = sums(n, c, count);
    const int64_t i = (begin(n) + count) * p.channels + c;
    const double v = at(p.v, i);
    terms.push_back({at_acc(p.u, c) + at(p.k, i), v, 1, 0, begin(n) + count, true});
    return terms;
  }
};

struct Sums {
  double P = 0, Q = 0, largest = -1e38;
  size_t argmax = 0;
};

Sums add_up(const std::vector<Term>& terms) {
  Sums s;
  for (size_t i = 0; i < terms.size(); ++i) {
    if (terms[i].exponent > s.largest) {
      s.largest = terms[i].exponent;
      s.argmax = i;
    }
  }
  for (const Term& t : terms) {
    s.P += std::exp(t.exponent - s.largest) * t.p;
    s.Q += std::exp(t.exponent - s.largest) * t.q;
  }
  return s;
}

}  // namespace

void wkv_naive_forward(const WkvParams& p, double* y, double* final_state) {
  const Naive in{p};
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    const int64_t length = in.begin(n + 1) - in.begin(n);
    for (int64_t c = 0; c < p.channels; ++c) {
      for (int64_t i = 0; i < length; ++i) {
        const Sums s = add_up(in.sums_with_bonus(n, c, i));
        y[(in.begin(n) + i) * p.channels + c] = s.P / s.Q;
      }
      if (final_state == nullptr) continue;
      const Sums s = add_up(in.sums(n, c, length));
      final_state[in.state(n, 0, c)] = s.P;
      final_state[in.state(n, 1, c)] = s.Q;
      final_state[in.state(n, 2, c)] = s.largest;
    }
  }
}

void wkv_naive_backward(const WkvParams& p, const WkvGrads& g) {
  const Naive in{p};
  const int64_t C = p.channels;
  const auto zero = [](void* out, int64_t count) {
    for (int64_t i = 0; out != nullptr && i < count; ++i) static_cast<double*>(out)[i] = 0;
  };
  const auto add = [](void* out, int64_t i, double value) {
    if (out != nullptr) static_cast<double*>(out)[i] += value;
  };
  const auto given = [](const void* values, int64_t i) {
    return values == nullptr ? 0.0 : static_cast<const double*>(values)[i];
  };
  for (void* out : {g.dk, g.dv}) zero(out, p.total_tokens * C);
  for (void* out : {g.dw, g.du}) zero(out, C);
  zero(g.d_initial, p.num_sequences * 3 * C);
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    const int64_t length = in.begin(n + 1) - in.begin(n);
    for (int64_t c = 0; c < C; ++c) {
      // Adds the gradients of one term whose weight is e^(exponent - shift), given those of its
      // shares in the two sums and of the exponent beyond them.
      const auto add_term = [&](const Term& t, double shift, double dP, double dQ, double extra) {
        const double weight = std::exp(t.exponent - shift);
        const double d_exponent = weight * (t.p * dP + t.q * dQ) + extra;
        add(g.dw, c, t.age * d_exponent);
        if (t.has_bonus) add(g.du, c, d_exponent);
        if (t.token >= 0) {
          add(g.dk, t.token * C + c, d_exponent);
          add(g.dv, t.token * C + c, weight * dP);
        } else {
          add(g.d_initial, in.state(n, 0, c), weight * dP);
          add(g.d_initial, in.state(n, 1, c), weight * dQ);
          add(g.d_initial, in.state(n, 2, c), d_exponent);
        }
      };
      for (int64_t i = 0; i < length; ++i) {
        const std::vector<Term> terms = in.sums_with_bonus(n, c, i);
        const Sums s = add_up(terms);
        const double dy = given(g.dy, (in.begin(n) + i) * C + c);
        for (const Term& t : terms) add_term(t, s.largest, dy / s.Q, -dy * s.P / (s.Q * s.Q), 0);
      }
      const std::vector<Term> terms = in.sums(n, c, length);
      const Sums s = add_up(terms);
      const double dp = given(g.d_final, in.state(n, 0, c));
      const double dq = given(g.d_final, in.state(n, 1, c));
      const double d_largest = given(g.d_final, in.state(n, 2, c)) - dp * s.P - dq * s.Q;
      for (size_t i = 0; i < terms.size(); ++i)
        add_term(terms[i], s.largest, dp, dq, i == s.argmax ? d_largest : 0);
    }
  }
}

}  // namespace gdn
