// SPDX-License-Identifier: Apache-2.0
#include "gdn/ops/common.h"

#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <mutex>
#include <set>
#include <thread>

#include "gdn/base/parallel.h"
#include "tests/ops/support.h"

namespace gdn::ops {
namespace {

using ::testing::ElementsAre;
using testing::error_of;
using ::testing::HasSubstr;

TEST(Common, TorchThreadsRuleParallelFor) {
  const int before = at::get_num_threads();
  at::set_num_threads(2);
  EXPECT_EQ(num_threads(), 2);
  std::set<std::thread::id> ids;
  std::mutex mutex;
  std::atomic<int> arrived{0};
  parallel_for(0, 2, 1, [&](int64_t, int64_t) {
    // Both ranges must be running at once for either to go on; a serial backend would hand over one
    // range only.
    ++arrived;
    while (arrived < 2) std::this_thread::yield();
    std::lock_guard lock(mutex);
    ids.insert(std::this_thread::get_id());
    EXPECT_EQ(num_threads(), 1);  // nested calls are serial
  });
  EXPECT_EQ(ids.size(), 2u);
  at::set_num_threads(1);
  EXPECT_EQ(num_threads(), 1);
  at::set_num_threads(before);
}

TEST(Common, CuSeqlensAreMovedAndChecked) {
  const at::Tensor cu = at::tensor({0, 3, 3, 7}, at::kInt);
  const at::Tensor host = host_cu_seqlens("op", cu, 7);
  EXPECT_EQ(host.scalar_type(), at::kLong);
  EXPECT_THAT(std::vector<int64_t>(data_or_null(host), data_or_null(host) + 4),
              ElementsAre(0, 3, 3, 7));
  EXPECT_EQ(data_or_null(host_cu_seqlens("op", std::nullopt, 7)), nullptr);
  auto error = [](const at::Tensor& t) { return error_of([&] { host_cu_seqlens("op", t, 7); }); };
  EXPECT_THAT(error(cu.to(at::kFloat)),
              HasSubstr("[op] cu_seqlens must be a 1-D int32 or int64 tensor, got Float"));
  EXPECT_THAT(error(cu.view({2, 2})), HasSubstr("got Int [2, 2]"));
  EXPECT_THAT(error(at::tensor({0, 8}, at::kInt)),
              HasSubstr("must end with the number of tokens, 7, got 8"));
  EXPECT_THAT(error(at::tensor({1, 7}, at::kInt)), HasSubstr("must start with 0, got 1"));
  EXPECT_THAT(error(at::tensor({0, 5, 4, 7}, at::kInt)),
              HasSubstr("never decrease, got 5 then 4 at index 2"));
  EXPECT_THAT(error(at::tensor({0}, at::kInt)), HasSubstr("at least 2 entries, got 1"));
}

TEST(Common, SlotsAreChecked) {
  const at::Tensor slots = at::tensor({4, -1, 0, -1}, at::kInt);
  EXPECT_EQ(data_or_null(host_slots("op", slots, 4, 5))[1], -1);
  EXPECT_THAT(error_of([&] { host_slots("op", slots, 4, 4); }),
              HasSubstr("below the number of slots, 4, got 4"));
  EXPECT_THAT(error_of([&] { host_slots("op", slots, 3, 5); }),
              HasSubstr("slots must be [N] = [3], got [4]"));
  EXPECT_THAT(error_of([&] {
                host_slots("op", at::tensor({2, 2}, at::kLong), 2, 5);
              }),
              HasSubstr("got 2 twice"));
}

// Reads every element through the layout and compares with torch's own indexing.
void expect_rows(const at::Tensor& t, bool copied) {
  const Rows rows = rows_of(t);
  EXPECT_EQ(rows.tensor.data_ptr() != t.data_ptr(), copied);
  const int64_t dim = t.size(-1);
  const at::Tensor dense = t.contiguous();
  const int64_t* expected = dense.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < t.numel() / dim; ++row) {
    for (int64_t i = 0; i < dim; ++i) {
      EXPECT_EQ(rows.tensor.const_data_ptr<int64_t>()[rows.layout.offset(row, dim) + i],
                expected[row * dim + i]);
    }
  }
}

TEST(Common, RowsKeepTheirMemoryWhereALayoutFits) {
  const at::Tensor wide = at::arange(2 * 3 * 12).view({2, 3, 12});
  expect_rows(wide, false);
  expect_rows(wide.slice(-1, 2, 6), false);
  expect_rows(wide.slice(-1, 2, 10).unflatten(-1, {2, 4}), false);  // heads inside tokens
  expect_rows(wide.slice(-1, 2, 10).unflatten(-1, {2, 1, 4}), false);
  expect_rows(wide.slice(0, 0, 1).slice(-1, 0, 4), false);
  expect_rows(wide.slice(1, 0, 1), false);
  expect_rows(wide.slice(1, 0, 2), false);  // two dense rows per group
  expect_rows(wide.slice(1, 0, 2).slice(-1, 0, 4), true);
  expect_rows(wide.transpose(1, 2), true);
  expect_rows(wide.slice(-1, 0, 1), false);
  expect_rows(at::arange(3).view({3, 1}).expand({3, 4}), true);
  expect_rows(at::arange(4).expand({3, 4}), true);
}

TEST(Common, ShapeAndTypeErrorsNameTheValue) {
  const at::Tensor t = at::empty({2, 3}, at::kLong);
  EXPECT_EQ(error_of([&] {
              check_shape("op", "x", t, {2, -1, 4}, "[B,T,D]");
            }),
            "[op] x must be [B,T,D] = [2, any, 4], got [2, 3]");
  EXPECT_EQ(error_of([&] { dtype_of("op", "x", t); }),
            "[op] x must be float32, float64, bfloat16 or float16, got Long");
  EXPECT_NO_THROW(check_shape("op", "x", t, {2, -1}, "[B,T]"));
}

}  // namespace
}  // namespace gdn::ops
