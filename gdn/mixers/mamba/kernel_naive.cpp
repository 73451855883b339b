// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <vector>

#include "gdn/mixers/mamba/kernel.h"

namespace gdn {
namespace {

// Reads of operands in double, and the recurrence of one sequence.
struct Naive {
  const SelectiveScanParams& p;

  double at(const void* data, int64_t i) const {
    return dispatch_dtype(
        p.dtype, [&](auto t) -> double { return load(static_cast<const decltype(t)*>(data) + i); });
  }
  double at_acc(const void* data, int64_t i) const {
    if (data == nullptr) return 0;
    return p.dtype == DType::kF64 ? static_cast<const double*>(data)[i]
                                  : static_cast<const float*>(data)[i];
  }
  int64_t begin(int64_t n) const {
    return p.cu_seqlens != nullptr ? p.cu_seqlens[n] : p.total_tokens / p.num_sequences * n;
  }
  double raw(int64_t t, int64_t c) const {
    return at(p.dt, t * p.channels + c) + at_acc(p.dt_bias, c);
  }
  double step_size(int64_t t, int64_t c) const {
    const double v = raw(t, c);
    return p.softplus && v <= 20 ? std::log1p(std::exp(v)) : v;
  }
  double transition(int64_t t, int64_t c, int64_t s) const {
    const double e = std::exp(step_size(t, c) * at_acc(p.A, c * p.states + s));
    return p.signed_transition ? 2 * e - 1 : e;
  }
  double x(int64_t t, int64_t c) const { return at(p.x, t * p.channels + c); }
  double B(int64_t t, int64_t s) const { return at(p.B, t * p.states + s); }
  double C(int64_t t, int64_t s) const { return at(p.C, t * p.states + s); }
};

// The states of channel c: before the sequence's first token and after each token.
std::vector<double> states_of(const Naive& in, int64_t n, int64_t c) {
  const SelectiveScanParams& p = in.p;
  const int64_t S = p.states;
  std::vector<double> h(static_cast<size_t>(S));
  for (int64_t s = 0; s < S; ++s) h[s] = in.at_acc(p.initial, (n * p.channels + c) * S + s);
  for (int64_t t = in.begin(n); t < in.begin(n + 1); ++t) {
    const int64_t row = (t - in.begin(n)) * S;
    for (int64_t s = 0; s < S; ++s) {
      h.push_back(in.transition(t, c, s) * h[row + s] +
                  in.step_size(t, c) * in.x(t, c) * in.B(t, s));
    }
  }
  return h;
}

}  // namespace

void selective_scan_naive_forward(const SelectiveScanParams& p, double* y, double* final_state) {
  const Naive in{p};
  const int64_t S = p.states;
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    for (int64_t c = 0; c < p.channels; ++c) {
      const std::vector<double> h = states_of(in, n, c);
      for (int64_t t = in.begin(n); t < in.begin(n + 1); ++t) {
        double sum = in.at_acc(p.D, c) * in.x(t, c);
        for (int64_t s = 0; s < S; ++s) sum += in.C(t, s) * h[(t - in.begin(n) + 1) * S + s];
        y[t * p.channels + c] = sum;
      }
      if (final_state == nullptr) continue;
      for (int64_t s = 0; s < S; ++s)
        final_state[(n * p.channels + c) * S + s] = h[h.size() - S + s];
    }
  }
}

void selective_scan_naive_backward(const SelectiveScanParams& p, const SelectiveScanGrads& g) {
  const Naive in{p};
  const int64_t S = p.states, C = p.channels;
  const auto zero = [](void* out, int64_t count) {
    for (int64_t i = 0; out != nullptr && i < count; ++i) static_cast<double*>(out)[i] = 0;
  };
  const auto add = [](void* out, int64_t i, double value) {
    if (out != nullptr) static_cast<double*>(out)[i] += value;
  };
  const auto given = [](const void* values, int64_t i) {
    return values == nullptr ? 0.0 : static_cast<const double*>(values)[i];
  };
  for (void* out : {g.dx, g.ddt}) zero(out, p.total_tokens * C);
  for (void* out : {g.dB, g.dC}) zero(out, p.total_tokens * S);
  zero(g.dA, C * S);
  for (void* out : {g.dD, g.ddt_bias}) zero(out, C);
  zero(g.d_initial, p.num_sequences * C * S);
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    for (int64_t c = 0; c < C; ++c) {
      const std::vector<double> h = states_of(in, n, c);
      std::vector<double> dh(static_cast<size_t>(S));
      for (int64_t s = 0; s < S; ++s) dh[s] = given(g.d_final, (n * C + c) * S + s);
      for (int64_t t = in.begin(n + 1) - 1; t >= in.begin(n); --t) {
        const double dy = given(g.dy, t * C + c), x = in.x(t, c), dt = in.step_size(t, c);
        const double* before = h.data() + (t - in.begin(n)) * S;
        double d_dt = 0, dx = in.at_acc(p.D, c) * dy;
        for (int64_t s = 0; s < S; ++s) {
          const double rate = in.at_acc(p.A, c * S + s), a = in.transition(t, c, s);
          const double slope = p.signed_transition ? a + 1 : a;  // of a by dt A
          add(g.dC, t * S + s, dy * before[S + s]);
          dh[s] += dy * in.C(t, s);
          add(g.dB, t * S + s, dh[s] * dt * x);
          add(g.dA, c * S + s, dh[s] * before[s] * slope * dt);
          d_dt += dh[s] * (before[s] * slope * rate + x * in.B(t, s));
          dx += dh[s] * dt * in.B(t, s);
          dh[s] *= a;
        }
        const double v = in.raw(t, c);
        if (p.softplus && v <= 20) d_dt *= 1 / (1 + std::exp(-v));
        add(g.dx, t * C + c, dx);
        add(g.ddt, t * C + c, d_dt);
        add(g.ddt_bias, c, d_dt);
        add(g.dD, c, dy * x);
      }
      for (int64_t s = 0; s < S; ++s) add(g.d_initial, (n * C + c) * S + s, dh[s]);
    }
  }
}

}  // namespace gdn
