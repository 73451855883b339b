// SPDX-License-Identifier: Apache-2.0
// The cache of softmax attention: what it keeps of each token, by default entries "k" and "v"
// [N,capacity,H,D], and "position" (int64 [N], tokens seen). The token at position p lies in row
// p % capacity. Without a window the capacity grows by doubling; with one it stops at the window,
// from where on the cache is a ring.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "gdn/mixers/mixer.h"

namespace gdn {

struct CacheEntry {
  std::string name;
  int64_t heads, head_dim;
};

class KvCache {
 public:
  // Views the entries of `state`, all but "position"; window 0: keep everything.
  KvCache(State& state, std::vector<std::string> names, int64_t window)
      : state_(state), names_(std::move(names)), window_(window) {}

  static void make(State& state, int64_t sequences, const std::vector<CacheEntry>& entries,
                   const at::TensorOptions& options);

  int64_t position(int64_t row) const;
  const std::vector<std::string>& names() const { return names_; }

  // The last `count` tokens of rows [row, row + rows), which must all be at the same position,
  // oldest first, as [rows,count,H,D].
  at::Tensor last(const std::string& name, int64_t row, int64_t rows, int64_t count) const;
  // All that is stored for those rows, in any order: a view.
  at::Tensor stored(const std::string& name, int64_t row, int64_t rows) const;

  // Makes room for `tokens` tokens in all, in place; keeps what is there.
  void reserve(int64_t tokens);
  // Appends [rows,T,H,D] per name to rows at the same position, in place; room must be reserved.
  void append(int64_t row, int64_t rows, const std::vector<at::Tensor>& fresh);

  int64_t kept(int64_t tokens) const { return window_ > 0 && tokens > window_ ? window_ : tokens; }

 private:
  int64_t capacity() const { return state_[names_[0]].size(1); }

  State& state_;
  std::vector<std::string> names_;
  int64_t window_;
};

}  // namespace gdn
