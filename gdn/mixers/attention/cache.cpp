// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/attention/cache.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

namespace gdn {
namespace {

constexpr int64_t kFirstCapacity = 16;

}  // namespace

void KvCache::make(State& state, int64_t sequences, const std::vector<CacheEntry>& entries,
                   const at::TensorOptions& options) {
  for (const CacheEntry& entry : entries)
    state.set(entry.name, at::zeros({sequences, 0, entry.heads, entry.head_dim}, options));
  state.set("position", at::zeros({sequences}, at::kLong));
}

int64_t KvCache::position(int64_t row) const {
  return state_["position"].const_data_ptr<int64_t>()[row];
}

at::Tensor KvCache::last(const std::string& name, int64_t row, int64_t rows, int64_t count) const {
  const at::Tensor all = state_[name].narrow(0, row, rows);
  if (count == 0) return all.narrow(1, 0, 0);
  const int64_t begin = (position(row) - count) % capacity();
  if (begin + count <= capacity()) return all.narrow(1, begin, count);
  const int64_t head = capacity() - begin;
  return at::cat({all.narrow(1, begin, head), all.narrow(1, 0, count - head)}, 1);
}

at::Tensor KvCache::stored(const std::string& name, int64_t row, int64_t rows) const {
  return state_[name].narrow(0, row, rows).narrow(1, 0, std::min(position(row), capacity()));
}

void KvCache::reserve(int64_t tokens) {
  const int64_t needed = kept(tokens), old = capacity();
  if (needed <= old) return;
  // A ring is never moved: the capacity only grows while every position is below it.
  int64_t size = std::max({needed, 2 * old, kFirstCapacity});
  if (window_ > 0) size = std::min(size, window_);
  for (const std::string& name : names_) {
    const at::Tensor& from = state_[name];
    at::Tensor to = at::zeros({from.size(0), size, from.size(2), from.size(3)}, from.options());
    to.narrow(1, 0, old).copy_(from);
    state_.set(name, to);
  }
}

void KvCache::append(int64_t row, int64_t rows, const std::vector<at::Tensor>& fresh) {
  const int64_t T = fresh[0].size(1), count = std::min(T, capacity());
  int64_t begin = (position(row) + T - count) % std::max<int64_t>(capacity(), 1);
  for (int64_t done = 0; done < count;) {
    const int64_t part = std::min(count - done, capacity() - begin);
    const int64_t from = T - count + done;
    for (size_t i = 0; i < names_.size(); ++i) {
      const at::Tensor entry = state_[names_[i]].narrow(0, row, rows);
      entry.narrow(1, begin, part).copy_(fresh[i].narrow(1, from, part));
    }
    done += part;
    begin = 0;
  }
  state_["position"].narrow(0, row, rows).add_(T);
}

}  // namespace gdn
