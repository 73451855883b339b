// SPDX-License-Identifier: Apache-2.0
// Small matrix products of bf16 operands with fp32 sums, for chunk kernels, by whichever
// instruction the CPU has for them. They all take B as pairs: rows 2l and 2l+1 of B side by side,
// [k/2][n][2], so that one 32-bit lane of a register or tile holds two products of a sum.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "gdn/base/dtype.h"

namespace gdn {

enum class PairBackend : uint8_t {
  kOff,       // none: kernels compute in fp32
  kEmulated,  // plain loops, on any CPU: the layouts and roundings of the others, for tests
  kAvx512,    // vdpbf16ps
  kAmx,       // tiles of AMX-BF16
};

// C[m,n] = keep * C + A B: m and n are multiples of 16, k of 32; 32 columns and pairs of 16 rows at
// a time run best.
struct PairProduct {
  size_t m, n, k;
  const BFloat16* a;  // [m][lda]
  size_t lda;
  const uint32_t* b;  // [k/2][ldb] pairs
  size_t ldb;
  float* c;  // [m][ldc]
  size_t ldc;
  const float* keep = nullptr;  // row i of C is first multiplied by keep[i * keep_step]; null: C is
                                // only written
  size_t keep_step = 0;
};

// fp32 rows on their way to becoming operands: row i times factors[i] (null: 1), n a multiple
// of 16.
struct PairRows {
  size_t rows, n;
  const float* src;  // [rows][ld]
  size_t ld;
  const float* factors = nullptr;
};

// All round to nearest even. Numbers below the normal range count as 0 on the instructions.
struct PairKernels {
  PairBackend backend;
  void (*product)(const PairProduct&);
  void (*round)(const PairRows&, BFloat16* dst, size_t ld);  // dst[rows][ld]
  void (*pack)(const PairRows&, uint32_t* dst, size_t ld);   // dst[rows/2][ld] pairs, rows even
  // Called by a thread before its first product and after its last one.
  void (*begin)();
  void (*end)();
};

// What bf16 inputs are computed with now; null: fp32. Without a choice: AMX where there is one,
// vdpbf16ps on AMD (Intel's runs at half the rate of fp32 multiply-adds). Instructions that
// GDN_SIMD leaves out are not used.
const PairKernels* pair_kernels();

// The backend "amx" or "avx512" where this CPU has it and Linux grants its registers, else null.
const PairKernels* find_pair_kernels(std::string_view name);

// Whether its product of small whole numbers, which no rounding touches, is that of the emulation.
// AMX is only used where it passes this at its first use.
bool agrees_with_emulation(const PairKernels& kernels);

// Chooses by name: amx, avx512, emulated, off; null, "" or auto: the default. Says so on stderr,
// falls back to the default and returns false where the name is unknown or this CPU lacks what it
// needs. Loading the kernels calls it with GDN_BF16 of the environment.
bool choose_pairs(const char* name);

// "amx", "avx512", "emulated" or "off", after pair_kernels().
const char* pair_backend();

namespace internal {
// For tests that execute AMX's instructions themselves where the CPU lacks them: chooses AMX
// without asking CPUID, Linux or agrees_with_emulation. False without AVX512_BF16, which the
// backend uses beside its tiles.
bool choose_unchecked_amx();
}  // namespace internal

}  // namespace gdn
