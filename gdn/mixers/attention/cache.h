// SPDX-License-Identifier: Apache-2.0
// The key-value cache of attention: entries "k" and "v" [N,capacity,HKV,D] and "position" (int64
// [N], tokens seen). The token at position p lies in row p % capacity. Without a window the
// capacity grows by doubling; with one it stops at the window, from where on the cache is a ring.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "gdn/mixers/mixer.h"

namespace gdn {

class KvCache {
 public:
  // Views the entries of `state`; window 0: keep everything.
  KvCache(State& state, int64_t window) : state_(state), window_(window) {}

  static void make(State& state, int64_t sequences, int64_t heads, int64_t head_dim,
                   const at::TensorOptions& options);

  int64_t position(int64_t row) const;

  // The last `count` tokens of rows [row, row + rows), which must all be at the same position,
  // oldest first, as [rows,count,HKV,D].
  at::Tensor last(const char* name, int64_t row, int64_t rows, int64_t count) const;
  // All that is stored for those rows, in any order: a view.
  at::Tensor stored(const char* name, int64_t row, int64_t rows) const;

  // Makes room for `tokens` tokens in all, in place; keeps what is there.
  void reserve(int64_t tokens);
  // Appends k, v [rows,T,HKV,D] to rows at the same position, in place; room must be reserved.
  void append(int64_t row, int64_t rows, const at::Tensor& k, const at::Tensor& v);

  int64_t kept(int64_t tokens) const { return window_ > 0 && tokens > window_ ? window_ : tokens; }

 private:
  int64_t capacity() const { return state_["k"].size(1); }

  State& state_;
  int64_t window_;
};

}  // namespace gdn
