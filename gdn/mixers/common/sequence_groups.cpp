// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/common/sequence_groups.h"

#include <ATen/ops/cat.h>

#include <algorithm>

#include "gdn/ops/common.h"

namespace gdn {

SequenceGroups::SequenceGroups(const char* mixer, const StateAccess& state, int64_t T,
                               const std::function<int64_t(int64_t n, int64_t row)>& position)
    : cu_seqlens_(ops::host_cu_seqlens(mixer, state.cu_seqlens(), T)) {
  const int64_t N = state.num_sequences();
  const int64_t* slots = ops::data_or_null(state.slots());
  together_ = !cu_seqlens_.defined() && slots == nullptr;
  for (int64_t n = 1; together_ && n < N; ++n) together_ = position(n, n) == position(0, 0);
  if (together_) {
    groups_.push_back({0, N, 0, N > 0 ? position(0, 0) : 0});
    return;
  }
  for (int64_t n = 0; n < N; ++n) {
    const int64_t row = slots != nullptr ? slots[n] : n;
    groups_.push_back({n, 1, std::max<int64_t>(row, -1), row < 0 ? 0 : position(n, row)});
  }
}

at::Tensor SequenceGroups::part(const SequenceGroup& group, const at::Tensor& x) const {
  if (together_) return x;
  if (!cu_seqlens_.defined()) return x.narrow(0, group.first, 1);
  const int64_t* ends = cu_seqlens_.const_data_ptr<int64_t>();
  return x.slice(1, ends[group.first], ends[group.first + 1]);
}

at::Tensor SequenceGroups::join(const std::vector<at::Tensor>& parts) const {
  return parts.size() == 1 ? parts[0] : at::cat(parts, cu_seqlens_.defined() ? 1 : 0);
}

}  // namespace gdn
