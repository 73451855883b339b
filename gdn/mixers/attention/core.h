// SPDX-License-Identifier: Apache-2.0
// What the mixers with softmax attention share: the product itself, and the walk over sequences and
// their caches.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>
#include <vector>

#include "gdn/mixers/attention/cache.h"
#include "gdn/mixers/common/state_access.h"
#include "gdn/mixers/common/windows.h"

namespace gdn {

// q [B,T,H,K] over k [B,S,HKV,K] and v [B,S,HKV,V], whose last T tokens are those of q ->
// [B,T,H,V]. A token sees itself and those before it, with a window only `window` tokens; 0: all.
// Scores are divided by sqrt(K).
at::Tensor softmax_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             int64_t window, bool naive);

// One call of an attention mixer.
struct AttentionCall {
  at::Tensor q;                    // [B,T,H,D]
  std::vector<at::Tensor> fresh;   // what the cache keeps of each token, [B,T,heads,dim] each
  std::vector<std::string> names;  // their entries in the state
  int64_t window = 0;              // tokens that a token sees; 0: all before it
  int64_t out_dim = 0;             // V: of the result [B,T,H,V]
  // Changes q and fresh [rows,T,..] of sequences whose first token is at `position`, before they
  // are kept.
  std::function<void(int64_t position, at::Tensor& q, std::vector<at::Tensor>& fresh)> place;
  // q over what is seen, [rows,S,..] each, whose last tokens are those of q -> [rows,T,H,V].
  // Called with one query for all that is stored where a step decodes, in any order of keys.
  std::function<at::Tensor(const at::Tensor& q, const std::vector<at::Tensor>& seen)> attend;
};

// Takes the sequences of the call through `place` and `attend`, from and to the cache where it has
// one: together where all are at the same position, else one by one. Returns [B,T,H,V].
at::Tensor attend_with_cache(const char* mixer, AttentionCall call, StateAccess& access,
                             const Context& ctx);

}  // namespace gdn
