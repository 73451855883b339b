// SPDX-License-Identifier: Apache-2.0
#include "gdn/mixers/attention/core.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/einsum.h>
#include <ATen/ops/full.h>
#include <ATen/ops/roll.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "gdn/mixers/common/sequence_groups.h"
#include "gdn/ops/attend_step.h"

namespace gdn {
namespace {

// Zeros behind the last dimension up to `size`.
at::Tensor widened(const at::Tensor& x, int64_t size) {
  return x.size(3) == size ? x : at::constant_pad_nd(x, {0, size - x.size(3)});
}

// torch attends block by block, without the T x S scores, only where values are as wide as keys:
// the narrower ones are widened by zeros, which change nothing.
at::Tensor scaled_dot_product(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                              const std::optional<at::Tensor>& mask, bool is_causal) {
  const int64_t width = std::max(q.size(3), v.size(3));
  const double scale = 1.0 / std::sqrt(static_cast<double>(q.size(3)));
  return at::scaled_dot_product_attention(
             widened(q, width).transpose(1, 2), widened(k, width).transpose(1, 2),
             widened(v, width).transpose(1, 2), mask, /*dropout_p=*/0.0, is_causal, scale,
             /*enable_gqa=*/q.size(2) != k.size(2))
      .transpose(1, 2)
      .narrow(3, 0, v.size(3));
}

// The definition, token by token, in double.
at::Tensor naive_attention(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
                           int64_t window) {
  const int64_t T = q_in.size(1), S = k_in.size(1), group = q_in.size(2) / k_in.size(2);
  const at::Tensor q = q_in.to(at::kDouble);
  const at::Tensor k = k_in.to(at::kDouble).repeat_interleave(group, 2);
  const at::Tensor v = v_in.to(at::kDouble).repeat_interleave(group, 2);
  std::vector<at::Tensor> rows;
  for (int64_t t = 0; t < T; ++t) {
    const int64_t end = S - T + t + 1, begin = window > 0 ? std::max<int64_t>(end - window, 0) : 0;
    const at::Tensor scores =
        at::einsum("bhd,bshd->bhs", {q.select(1, t), k.slice(1, begin, end)}) /
        std::sqrt(static_cast<double>(q.size(3)));
    rows.push_back(at::einsum("bhs,bshd->bhd", {at::softmax(scores, -1), v.slice(1, begin, end)}));
  }
  if (rows.empty()) return at::zeros({q.size(0), 0, q.size(2), v.size(3)}, q_in.options());
  return at::stack(rows, 1).to(q_in.scalar_type());
}

// Sequences that stand at the same position: rows [row, row + rows) of the state's tensors.
struct Group {
  int64_t row, rows;
  int64_t past;  // tokens seen before
  at::Tensor q;
  std::vector<at::Tensor> fresh;
};

// What a group's rows of the cache hold after the call.
struct Kept {
  std::vector<at::Tensor> entries;  // [rows,capacity,..]
  int64_t position;
};

// The last tokens of the cache and then the fresh ones.
at::Tensor extended(const KvCache& cache, const Group& group, size_t i, int64_t count) {
  if (count == 0) return group.fresh[i];
  const at::Tensor old = cache.last(cache.names()[i], group.row, group.rows, count);
  return at::cat({old.to(group.fresh[i].scalar_type()), group.fresh[i]}, 1);
}

// Makes the cache anew, so that it carries gradients.
at::Tensor attend_anew(const AttentionCall& call, const Group& group, const KvCache& cache,
                       std::vector<Kept>& kept) {
  const int64_t total = group.past + group.q.size(1), count = cache.kept(total);
  std::vector<at::Tensor> seen, left;
  for (size_t i = 0; i < group.fresh.size(); ++i) {
    seen.push_back(extended(cache, group, i, cache.kept(group.past)));
    // The token at position p belongs into row p % capacity.
    left.push_back(at::roll(seen[i].narrow(1, seen[i].size(1) - count, count),
                            total > count ? total % count : 0, 1));
  }
  kept.push_back({left, total});
  return call.attend(group.q, seen);
}

// Appends to the cache in place.
at::Tensor attend_in_place(const AttentionCall& call, const Group& group, KvCache& cache) {
  const int64_t T = group.q.size(1);
  cache.reserve(group.past + T);
  std::vector<at::Tensor> seen;
  if (call.window > 0 && T > 1) {  // appending may overwrite what the first queries still see
    const int64_t count = std::min(group.past, call.window - 1);
    for (size_t i = 0; i < group.fresh.size(); ++i)
      seen.push_back(extended(cache, group, i, count));
    const at::Tensor o = call.attend(group.q, seen);
    cache.append(group.row, group.rows, group.fresh);
    return o;
  }
  cache.append(group.row, group.rows, group.fresh);
  for (const std::string& name : cache.names())
    seen.push_back(cache.stored(name, group.row, group.rows).to(group.q.scalar_type()));
  return call.attend(group.q, seen);
}

// Puts the groups, each of `rows` sequences, one after another into the state.
void replace(State& state, const std::vector<std::string>& names, const std::vector<Kept>& kept,
             int64_t rows) {
  if (kept.empty()) return;
  int64_t capacity = 0;
  for (const Kept& group : kept) capacity = std::max(capacity, group.entries[0].size(1));
  for (size_t i = 0; i < names.size(); ++i) {
    std::vector<at::Tensor> parts;
    for (const Kept& group : kept) {
      const int64_t missing = capacity - group.entries[i].size(1);
      parts.push_back(at::constant_pad_nd(group.entries[i], {0, 0, 0, 0, 0, missing}));
    }
    state.set(names[i], at::cat(parts, 0));
  }
  std::vector<at::Tensor> positions;
  for (const Kept& group : kept) positions.push_back(at::full({rows}, group.position, at::kLong));
  state.set("position", at::cat(positions, 0));
}

}  // namespace

at::Tensor softmax_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             int64_t window, bool naive) {
  const int64_t T = q.size(1), S = k.size(1);
  if (naive) return naive_attention(q, k, v, window);
  const bool windowed = window > 0 && S > window;
  if (T == 1 && !windowed) {
    if (!ops::can_attend_step(q, k, v)) return scaled_dot_product(q, k, v, std::nullopt, false);
    return ops::attend_step(q, k, v, 1.0 / std::sqrt(static_cast<double>(q.size(3))));
  }
  if (!windowed && S == T) return scaled_dot_product(q, k, v, std::nullopt, true);
  if (!windowed) return scaled_dot_product(q, k, v, visible_keys(T, S, 0, q), false);
  const std::vector<at::Tensor> queries = query_blocks(q, window), keys = key_blocks(k, T, window),
                                values = key_blocks(v, T, window);
  std::vector<at::Tensor> outs;
  for (size_t i = 0; i < queries.size(); ++i) {
    const at::Tensor visible = visible_keys(queries[i].size(1), keys[i].size(1), window, q);
    outs.push_back(scaled_dot_product(queries[i], keys[i], values[i], visible, false));
  }
  return at::cat(outs, 1);
}

at::Tensor attend_with_cache(const char* mixer, AttentionCall call, StateAccess& access,
                             const Context& ctx) {
  State none;
  KvCache cache(access.given() ? *ctx.state : none, call.names, call.window);
  const SequenceGroups groups(mixer, access, call.q.size(1), [&](int64_t, int64_t row) {
    return access.given() ? cache.position(row) : int64_t{0};
  });
  std::vector<at::Tensor> outs;
  std::vector<Kept> kept;
  for (const SequenceGroup& part : groups) {
    if (part.row < 0) {
      outs.push_back(
          at::zeros({1, call.q.size(1), call.q.size(2), call.out_dim}, call.q.options()));
      continue;
    }
    Group group{part.row, part.rows, part.past, groups.part(part, call.q), {}};
    for (const at::Tensor& t : call.fresh) group.fresh.push_back(groups.part(part, t));
    if (call.place) call.place(group.past, group.q, group.fresh);
    outs.push_back(!access.given()      ? call.attend(group.q, group.fresh)
                   : access.with_grad() ? attend_anew(call, group, cache, kept)
                                        : attend_in_place(call, group, cache));
  }
  if (access.given() && access.with_grad()) {
    replace(*ctx.state, call.names, kept, groups.together() ? access.num_sequences() : 1);
  }
  return groups.join(outs);
}

}  // namespace gdn
