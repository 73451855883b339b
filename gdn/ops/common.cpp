// SPDX-License-Identifier: Apache-2.0
#include "gdn/ops/common.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <sstream>
#include <vector>

#include "gdn/base/parallel.h"

#ifndef _OPENMP
#error "this file must be compiled with OpenMP, or at::parallel_for is serial"
#endif

namespace gdn::ops {
namespace {

void torch_run(int64_t begin, int64_t end, int64_t grain, const RangeFn& fn) {
  at::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) { fn(b, e); });
}

int torch_num_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

const bool backend_installed = [] {
  set_parallel_backend({&torch_run, &torch_num_threads});
  return true;
}();

// Copies a 1-D int32 or int64 tensor to an int64 host tensor.
at::Tensor host_int64(const char* op, const char* name, const at::Tensor& t) {
  GDN_CHECK(t.dim() == 1 && (t.scalar_type() == at::kInt || t.scalar_type() == at::kLong), "[", op,
            "] ", name, " must be a 1-D int32 or int64 tensor, got ",
            c10::toString(t.scalar_type()), " ", shape_str(t));
  return t.to(at::kCPU, at::kLong).contiguous();
}

}  // namespace

DType dtype_of(const char* op, const char* name, const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::kF32;
    case at::kDouble:
      return DType::kF64;
    case at::kBFloat16:
      return DType::kBF16;
    case at::kHalf:
      return DType::kF16;
    default:
      throw Error(str_cat("[", op, "] ", name,
                          " must be float32, float64, bfloat16 or float16, got ",
                          c10::toString(t.scalar_type())));
  }
}

at::ScalarType acc_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

std::string shape_str(const at::Tensor& t) {
  std::ostringstream out;
  out << t.sym_sizes();
  return out.str();
}

void check_shape(const char* op, const char* name, const at::Tensor& t, at::IntArrayRef sizes,
                 const char* layout) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = sizes[i] < 0 || t.size(i) == sizes[i];
  if (same) return;
  std::ostringstream wanted;
  for (size_t i = 0; i < sizes.size(); ++i) {
    wanted << (i ? ", " : "");
    if (sizes[i] < 0) {
      wanted << "any";
    } else {
      wanted << sizes[i];
    }
  }
  throw Error(str_cat("[", op, "] ", name, " must be ", layout, " = [", wanted.str(), "], got ",
                      shape_str(t)));
}

void check_dim(const char* op, const char* name, const at::Tensor& t, int64_t dim,
               const char* layout) {
  GDN_CHECK(t.dim() == dim, "[", op, "] ", name, " must be ", layout, ", got ", shape_str(t));
}

void check_same(const char* op, const char* name, const at::Tensor& t, const char* like_name,
                const at::Tensor& like) {
  GDN_CHECK(t.scalar_type() == like.scalar_type(), "[", op, "] ", name, " must have the dtype of ",
            like_name, " (", c10::toString(like.scalar_type()), "), got ",
            c10::toString(t.scalar_type()));
  GDN_CHECK(t.device() == like.device(), "[", op, "] ", name, " must be on the device of ",
            like_name, " (", like.device().str(), "), got ", t.device().str());
}

at::Tensor host_cu_seqlens(const char* op, const std::optional<at::Tensor>& cu_seqlens,
                           int64_t total_tokens) {
  if (!has(cu_seqlens)) return {};
  const at::Tensor host = host_int64(op, "cu_seqlens", *cu_seqlens);
  const int64_t n = host.numel();
  GDN_CHECK(n >= 2, "[", op, "] cu_seqlens must have at least 2 entries, got ", n);
  const int64_t* cu = host.const_data_ptr<int64_t>();
  GDN_CHECK(cu[0] == 0, "[", op, "] cu_seqlens must start with 0, got ", cu[0]);
  for (int64_t i = 1; i < n; ++i) {
    GDN_CHECK(cu[i] >= cu[i - 1], "[", op, "] cu_seqlens must never decrease, got ", cu[i - 1],
              " then ", cu[i], " at index ", i);
  }
  GDN_CHECK(cu[n - 1] == total_tokens, "[", op, "] cu_seqlens must end with the number of tokens, ",
            total_tokens, ", got ", cu[n - 1]);
  return host;
}

at::Tensor host_slots(const char* op, const std::optional<at::Tensor>& slots, int64_t num_sequences,
                      int64_t num_slots) {
  if (!has(slots)) return {};
  const at::Tensor host = host_int64(op, "slots", *slots);
  GDN_CHECK(host.numel() == num_sequences, "[", op, "] slots must be [N] = [", num_sequences,
            "], got ", shape_str(host));
  const int64_t* s = host.const_data_ptr<int64_t>();
  std::vector<int64_t> sorted(s, s + num_sequences);
  std::sort(sorted.begin(), sorted.end());
  for (int64_t i = 0; i < num_sequences; ++i) {
    GDN_CHECK(sorted[i] < num_slots, "[", op, "] slots must be below the number of slots, ",
              num_slots, ", got ", sorted[i]);
    GDN_CHECK(i == 0 || sorted[i] < 0 || sorted[i] != sorted[i - 1], "[", op,
              "] slots must differ from each other, got ", sorted[i], " twice");
  }
  return host;
}

at::Tensor like(const at::Tensor& t) { return at::empty_symint(t.sym_sizes(), t.options()); }

std::optional<at::Tensor> contiguous_as(const std::optional<at::Tensor>& t, at::ScalarType dtype) {
  if (!has(t)) return std::nullopt;
  return t->to(dtype).contiguous();
}

Rows rows_of(const at::Tensor& t) {
  GDN_CHECK(t.dim() >= 1,
            "[rows_of] a tensor of rows must have at least 1 dimension, got a scalar");
  if (t.is_contiguous()) return {t, {1, t.size(-1)}};
  const int64_t dim = t.size(-1);
  bool fits = dim == 1 || t.stride(-1) == 1;
  int64_t group = 1;        // rows that follow each other densely
  int64_t i = t.dim() - 2;  // the dimensions right of i lie within a group
  while (fits && i >= 0 && (t.size(i) == 1 || t.stride(i) == group * dim)) group *= t.size(i--);
  while (i >= 0 && t.size(i) == 1) --i;
  const int64_t stride = i >= 0 ? t.stride(i) : group * dim;
  int64_t span = 1;  // groups that lie `stride` apart
  for (; fits && i >= 0; --i) {
    fits = t.size(i) == 1 || t.stride(i) == span * stride;
    span *= t.size(i);
  }
  if (fits && stride > 0) return {t, {group, stride}};
  return {t.contiguous(), {1, dim}};
}

}  // namespace gdn::ops
