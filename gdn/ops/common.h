// SPDX-License-Identifier: Apache-2.0
// What the torch side of every kernel family shares: element types, shape and cu_seqlens checks,
// operator handles, and the question whether a call takes part in differentiation. Loading the
// library also makes torch's threads (torch.set_num_threads, OMP_NUM_THREADS) those of
// gdn::parallel_for; see common.cpp.
//
// An op family is one file that registers, in this order:
//   schema  TORCH_LIBRARY_FRAGMENT(gdn, m):      x(...) and x_bwd(...), functional
//   CPU     TORCH_LIBRARY_IMPL(gdn, CPU, m):     check, allocate, call the kernel
//   Meta    TORCH_LIBRARY_IMPL(gdn, Meta, m):    shapes by SymInt
//   grad    TORCH_LIBRARY_IMPL(gdn, Autograd, m): with_autograd of a torch::autograd::Function
//   whose
//                                                backward calls x_bwd, and
//                                                autogradNotImplementedFallback() for x_bwd
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>

#include <concepts>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "gdn/base/check.h"
#include "gdn/base/dtype.h"
#include "gdn/kernels/rows.h"

namespace gdn::ops {

// The element type of `t`; throws "[op] name must be float32, float64, bfloat16 or float16, got
// ...".
DType dtype_of(const char* op, const char* name, const at::Tensor& t);

// What a kernel accumulates in and stores states, gates and beta in: float64 for float64, else
// float32.
at::ScalarType acc_type(at::ScalarType dtype);

// "[2, 16, 4]"; symbolic sizes print as expressions.
std::string shape_str(const at::Tensor& t);

// Throws "[op] name must be LAYOUT with sizes [..], got [..]" unless the sizes are these; -1
// matches anything.
void check_shape(const char* op, const char* name, const at::Tensor& t, at::IntArrayRef sizes,
                 const char* layout);

// Throws unless `t` has `dim` dimensions. Reads no sizes, so it is safe in Meta functions.
void check_dim(const char* op, const char* name, const at::Tensor& t, int64_t dim,
               const char* layout);

// Throws unless `t` has the dtype and the device of `like`.
void check_same(const char* op, const char* name, const at::Tensor& t, const char* like_name,
                const at::Tensor& like);

// cu_seqlens as the kernels want it: int64 [N+1], contiguous, on the host, checked (1-D int32 or
// int64, at least two entries, first 0, never decreasing, last == total_tokens). Undefined in,
// undefined out.
at::Tensor host_cu_seqlens(const char* op, const std::optional<at::Tensor>& cu_seqlens,
                           int64_t total_tokens);

// A 1-D tensor of state slots as int64 on the host, each in [.., num_slots), non-negative ones all
// different. Undefined in, undefined out.
at::Tensor host_slots(const char* op, const std::optional<at::Tensor>& slots, int64_t num_sequences,
                      int64_t num_slots);

inline const int64_t* data_or_null(const at::Tensor& int64_tensor) {
  return int64_tensor.defined() ? int64_tensor.const_data_ptr<int64_t>() : nullptr;
}
inline const void* data_or_null(const std::optional<at::Tensor>& t) {
  return t.has_value() && t->defined() ? t->const_data_ptr() : nullptr;
}
inline bool has(const std::optional<at::Tensor>& t) { return t.has_value() && t->defined(); }

inline std::optional<at::Tensor> given(const at::Tensor& t) {
  return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
}

// An uninitialised contiguous tensor with the sizes, which may be symbolic, and the options of `t`:
// Meta's "as t".
at::Tensor like(const at::Tensor& t);

// Contiguous `t` of dtype `dtype`, or nothing.
std::optional<at::Tensor> contiguous_as(const std::optional<at::Tensor>& t, at::ScalarType dtype);

// A tensor as rows of its last dimension for kernels that take a RowLayout; `tensor` keeps the
// memory alive.
struct Rows {
  at::Tensor tensor;
  RowLayout layout;
};

// `t` itself where its last dimension is dense and its rows fit a RowLayout (all slices of the last
// dimension do, and heads inside tokens), else a contiguous copy.
Rows rows_of(const at::Tensor& t);

// Handle of a gdn op. Keep it in a static: finding it takes a lock and a hash lookup.
//   static const auto op = typed_op<decltype(l2norm)>("gdn::l2norm");
template <typename Signature>
c10::TypedOperatorHandle<Signature> typed_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline bool differentiable(const at::Tensor& t) {
  return t.defined() && (t.requires_grad() || t._fw_grad(/*level=*/0).defined());
}
inline bool differentiable(const std::optional<at::Tensor>& t) {
  return has(t) && differentiable(*t);
}

// Whether any of these inputs makes the call differentiable; if not, an op skips its
// autograd::Function.
template <typename... Tensors>
bool wants_grad(const Tensors&... t) {
  return c10::GradMode::is_enabled() && (differentiable(t) || ...);
}

// The Autograd kernel of an op with the C++ entry `op`: Function::apply where an input is
// differentiable, else the kernel below, without the graph's bookkeeping.
//   m.impl("swiglu", with_autograd<Swiglu, &swiglu>);
template <typename Function, auto op>
struct AutogradKernel;

template <typename Function, typename Result, typename... Args, Result (*op)(Args...)>
struct AutogradKernel<Function, op> {
  static Result call(Args... args) {
    if (c10::GradMode::is_enabled() && (argument_is_differentiable(args) || ...)) {
      if constexpr (std::same_as<Result, at::Tensor>) {
        return Function::apply(args...);
      } else {
        return as_tuple(Function::apply(args...),
                        std::make_index_sequence<std::tuple_size_v<Result>>());
      }
    }
    at::AutoDispatchBelowADInplaceOrView below;
    return op(args...);
  }

 private:
  template <typename T>
  static bool argument_is_differentiable(const T& t) {
    if constexpr (std::same_as<T, at::Tensor> || std::same_as<T, std::optional<at::Tensor>>) {
      return differentiable(t);
    } else {
      return false;
    }
  }

  template <typename List, size_t... i>
  static Result as_tuple(const List& list, std::index_sequence<i...>) {
    return {list[i]...};
  }
};

template <typename Function, auto op>
inline constexpr auto* with_autograd = &AutogradKernel<Function, op>::call;

}  // namespace gdn::ops
