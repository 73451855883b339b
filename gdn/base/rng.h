// SPDX-License-Identifier: Apache-2.0
// Random numbers whose sequence is part of the product: the same seed gives the same corpus, data
// order and samples on every machine, which std:: distributions do not promise.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>

namespace gdn {

// SplitMix64 (Steele, Lea, Flood 2014): 64 bits of state, so saving and restoring it is trivial.
class Rng {
 public:
  explicit Rng(uint64_t seed = 0, uint64_t stream = 0)
      : state_(seed + 0x632be59bd9b4e019ull * (stream + 1)) {}

  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  // Uniform in [0, n), n >= 1, without modulo bias beyond 2^-64.
  uint64_t below(uint64_t n) {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(next()) * n) >> 64);
  }
  // Uniform in [0, 1).
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  double uniform(double low, double high) { return low + (high - low) * uniform(); }
  // Standard normal by Box-Muller; draws two numbers per call.
  double normal() {
    const double u = 1.0 - uniform(), v = uniform();
    return std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * std::numbers::pi * v);
  }
  uint64_t state() const { return state_; }
  void set_state(uint64_t state) { state_ = state; }

 private:
  uint64_t state_;
};

}  // namespace gdn
