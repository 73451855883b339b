// SPDX-License-Identifier: Apache-2.0
// Element types of the torch-free kernels and of files. bf16 and fp16 are storage types: kernels
// read them into fp32 (some multiply bf16: simd/pairs.h), add up there, round to even on store.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace gdn {

enum class DType : uint8_t { kF32, kF64, kBF16, kF16 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return 8;
    case DType::kF32:
      return 4;
    default:
      return 2;
  }
}

inline float to_float(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

inline BFloat16 to_bf16(float x) {
  uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u)
    return {static_cast<uint16_t>((u >> 16) | 0x40u)};  // quiet NaN
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

inline float to_float(Float16 h) {
  const uint32_t sign = (h.bits & 0x8000u) << 16;
  const uint32_t exponent = (h.bits >> 10) & 0x1fu, mantissa = h.bits & 0x3ffu;
  if (exponent == 0x1fu) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0)
    return std::bit_cast<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  const float subnormal = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

inline Float16 to_f16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude <
      0x38800000u) {  // below the smallest normal half: let an fp32 addition do the rounding
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

template <typename T>
inline constexpr DType kDTypeOf = std::is_same_v<T, double>     ? DType::kF64
                                  : std::is_same_v<T, float>    ? DType::kF32
                                  : std::is_same_v<T, BFloat16> ? DType::kBF16
                                                                : DType::kF16;

// The type a kernel accumulates in: double for double, float for everything else. Gates, beta and
// states are stored in it.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
inline Acc<T> load(const T* p) {
  if constexpr (std::is_floating_point_v<T>) {
    return *p;
  } else {
    return to_float(*p);
  }
}

template <typename T>
inline void store(T* p, Acc<T> x) {
  if constexpr (std::is_floating_point_v<T>) {
    *p = x;
  } else if constexpr (std::is_base_of_v<BFloat16, T>) {
    p->bits = to_bf16(x).bits;
  } else {
    *p = to_f16(x);
  }
}

// Calls f(T{}) with the C++ element type of `dtype`.
template <typename F>
decltype(auto) dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF64:
      return f(double{});
    case DType::kBF16:
      return f(BFloat16{});
    case DType::kF16:
      return f(Float16{});
    default:
      return f(float{});
  }
}

}  // namespace gdn
