// SPDX-License-Identifier: Apache-2.0
// How the tokens of a call are cut for mixers whose work depends on how far a sequence has come:
// all sequences together where they stand at one position, else one after the other.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

#include "gdn/mixers/common/state_access.h"

namespace gdn {

struct SequenceGroup {
  int64_t first, rows;  // sequences of the call
  int64_t row;          // of the state's tensors, where `rows` of them begin; -1: no sequence here
  int64_t past;         // tokens that each of them has seen before
};

class SequenceGroups {
 public:
  // `position(n, row)` is what sequence n, in `row` of the state, has seen before. Throws where
  // cu_seqlens do not fit T tokens.
  SequenceGroups(const char* mixer, const StateAccess& state, int64_t T,
                 const std::function<int64_t(int64_t n, int64_t row)>& position);

  std::vector<SequenceGroup>::const_iterator begin() const { return groups_.begin(); }
  std::vector<SequenceGroup>::const_iterator end() const { return groups_.end(); }
  // Whether one group holds all sequences.
  bool together() const { return together_; }

  // A group's tokens [rows,t,...] of x [B,T,...].
  at::Tensor part(const SequenceGroup& group, const at::Tensor& x) const;
  // The parts of all groups, in their order, as one tensor [B,T,...].
  at::Tensor join(const std::vector<at::Tensor>& parts) const;

 private:
  at::Tensor cu_seqlens_;  // int64 on the host, or undefined
  bool together_;
  std::vector<SequenceGroup> groups_;
};

}  // namespace gdn
