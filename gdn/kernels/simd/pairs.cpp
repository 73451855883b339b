// SPDX-License-Identifier: Apache-2.0
#include "gdn/kernels/simd/pairs.h"

#include <atomic>
#include <cstdio>
#include <cstring>
#include <string_view>
#include <vector>

#include "gdn/kernels/simd/targets.h"
#include "hwy/base.h"

#if defined(__x86_64__) && defined(__linux__)
#define GDN_PAIRS_X86 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define GDN_PAIRS_X86 0
#endif

namespace gdn {
namespace {

void nothing() {}

// --- emulated ---

void emulated_product(const PairProduct& p) {
  for (size_t i = 0; i < p.m; ++i) {
    float* c = p.c + i * p.ldc;
    for (size_t j = 0; j < p.n; ++j) {
      c[j] = p.keep != nullptr ? p.keep[i * p.keep_step] * c[j] : 0.0f;
    }
    for (size_t l = 0; l < p.k / 2; ++l) {
      const float even = to_float(p.a[i * p.lda + 2 * l]);
      const float odd = to_float(p.a[i * p.lda + 2 * l + 1]);
      const uint32_t* b = p.b + l * p.ldb;
      for (size_t j = 0; j < p.n; ++j) {
        c[j] += odd * std::bit_cast<float>(b[j] & 0xffff0000u);
        c[j] += even * std::bit_cast<float>(b[j] << 16);
      }
    }
  }
}

float factor(const PairRows& x, size_t i) { return x.factors != nullptr ? x.factors[i] : 1.0f; }

void emulated_round(const PairRows& x, BFloat16* dst, size_t ld) {
  for (size_t i = 0; i < x.rows; ++i) {
    const float f = factor(x, i);
    for (size_t j = 0; j < x.n; ++j) dst[i * ld + j] = to_bf16(f * x.src[i * x.ld + j]);
  }
}

void emulated_pack(const PairRows& x, uint32_t* dst, size_t ld) {
  for (size_t i = 0; i < x.rows; i += 2) {
    const float even = factor(x, i), odd = factor(x, i + 1);
    const float *upper = x.src + i * x.ld, *lower = upper + x.ld;
    for (size_t j = 0; j < x.n; ++j) {
      dst[i / 2 * ld + j] =
          uint32_t{to_bf16(even * upper[j]).bits} | uint32_t{to_bf16(odd * lower[j]).bits} << 16;
    }
  }
}

constexpr PairKernels kEmulated = {PairBackend::kEmulated, emulated_product, emulated_round,
                                   emulated_pack,          nothing,          nothing};

#if GDN_PAIRS_X86
#define GDN_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))

// --- vdpbf16ps ---

// 8 rows and kVectors vectors of columns. Eight rows by two vectors are enough sums to hide the
// latency, and use a row of B eight times.
template <size_t kVectors>
GDN_AVX512_BF16 inline void avx512_tile(const PairProduct& p, size_t i0, size_t j0) {
  // Unrolled by order: or GCC keeps the sums in memory before and after the loop over the depth.
  constexpr size_t kRows = 8;
  const size_t lda = p.lda, ldb = p.ldb, ldc = p.ldc;
  float* c = p.c + i0 * ldc + j0;
  __m512 sum[kRows][kVectors];
  HWY_UNROLL(8)
  for (size_t i = 0; i < kRows; ++i) {
    HWY_UNROLL(2)
    for (size_t j = 0; j < kVectors; ++j) {
      sum[i][j] = p.keep == nullptr ? _mm512_setzero_ps()
                                    : _mm512_mul_ps(_mm512_set1_ps(p.keep[(i0 + i) * p.keep_step]),
                                                    _mm512_loadu_ps(c + i * ldc + 16 * j));
    }
  }
  const BFloat16* a = p.a + i0 * lda;
  const uint32_t* b = p.b + j0;
  for (size_t l = 0; l < p.k; l += 2, b += ldb) {
    __m512bh row[kVectors];
    HWY_UNROLL(2)
    for (size_t j = 0; j < kVectors; ++j) row[j] = (__m512bh)_mm512_loadu_si512(b + 16 * j);
    HWY_UNROLL(8)
    for (size_t i = 0; i < kRows; ++i) {
      int32_t pair;
      std::memcpy(&pair, a + i * lda + l, sizeof(pair));
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      HWY_UNROLL(2)
      for (size_t j = 0; j < kVectors; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], x, row[j]);
    }
  }
  HWY_UNROLL(8)
  for (size_t i = 0; i < kRows; ++i) {
    HWY_UNROLL(2)
    for (size_t j = 0; j < kVectors; ++j) _mm512_storeu_ps(c + i * ldc + 16 * j, sum[i][j]);
  }
}

GDN_AVX512_BF16 void avx512_product(const PairProduct& p) {
  size_t j = 0;
  for (; j + 32 <= p.n; j += 32) {
    for (size_t i = 0; i < p.m; i += 8) avx512_tile<2>(p, i, j);
  }
  if (j == p.n) return;
  for (size_t i = 0; i < p.m; i += 8) avx512_tile<1>(p, i, j);
}

GDN_AVX512_BF16 void avx512_round(const PairRows& x, BFloat16* dst, size_t ld) {
  for (size_t i = 0; i < x.rows; ++i) {
    const __m512 f = _mm512_set1_ps(factor(x, i));
    for (size_t j = 0; j < x.n; j += 16) {
      const __m512 v = _mm512_mul_ps(f, _mm512_loadu_ps(x.src + i * x.ld + j));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i * ld + j),
                          (__m256i)_mm512_cvtneps_pbh(v));
    }
  }
}

GDN_AVX512_BF16 void avx512_pack(const PairRows& x, uint32_t* dst, size_t ld) {
  // Two rounded rows, one after the other in a register, to pairs.
  const __m512i interleave = _mm512_add_epi16(
      _mm512_set1_epi32(16 << 16),
      _mm512_mullo_epi32(_mm512_set1_epi32(0x10001),
                         _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)));
  for (size_t i = 0; i < x.rows; i += 2) {
    const float* src = x.src + i * x.ld;
    const __m512 even = _mm512_set1_ps(factor(x, i)), odd = _mm512_set1_ps(factor(x, i + 1));
    for (size_t j = 0; j < x.n; j += 16) {
      const __m512 upper = _mm512_mul_ps(even, _mm512_loadu_ps(src + j));
      const __m512 lower = _mm512_mul_ps(odd, _mm512_loadu_ps(src + x.ld + j));
      const __m512i rows = (__m512i)_mm512_cvtne2ps_pbh(lower, upper);
      _mm512_storeu_si512(dst + i / 2 * ld + j, _mm512_permutexvar_epi16(interleave, rows));
    }
  }
}

constexpr PairKernels kAvx512 = {PairBackend::kAvx512, avx512_product, avx512_round,
                                 avx512_pack,          nothing,        nothing};

// --- AMX ---

#define GDN_AMX __attribute__((target("amx-tile,amx-bf16")))

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// Not on the stack: GCC's _tile_loadconfig tells the compiler of the first 8 bytes it reads only,
// so the stores of the others would go.
constexpr TileConfig kTileConfig;

GDN_AMX void amx_begin() { _tile_loadconfig(&kTileConfig); }
GDN_AMX void amx_end() { _tile_release(); }

// kRows x kColumns tiles of C, 1 or 2 each, in tiles 0 to 3 over the whole depth.
template <size_t kRows, size_t kColumns>
GDN_AMX void amx_tiles(const PairProduct& p, const BFloat16* a, const uint32_t* b, float* c) {
  constexpr bool kBelow = kRows == 2, kRight = kColumns == 2;
  const size_t ldc = p.ldc * 4, lda = p.lda * 2, ldb = p.ldb * 4;
  float* below = c + 16 * p.ldc;
  if (p.keep != nullptr) {
    _tile_loadd(0, c, ldc);
    if constexpr (kRight) _tile_loadd(1, c + 16, ldc);
    if constexpr (kBelow) _tile_loadd(2, below, ldc);
    if constexpr (kBelow && kRight) _tile_loadd(3, below + 16, ldc);
  } else {
    _tile_zero(0);
    if constexpr (kRight) _tile_zero(1);
    if constexpr (kBelow) _tile_zero(2);
    if constexpr (kBelow && kRight) _tile_zero(3);
  }
  for (size_t l = 0; l < p.k; l += 32, a += 32, b += 16 * p.ldb) {
    _tile_loadd(4, a, lda);
    _tile_loadd(6, b, ldb);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kRight) {
      _tile_loadd(7, b + 16, ldb);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kBelow) {
      _tile_loadd(5, a + 16 * p.lda, lda);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kBelow && kRight) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, ldc);
  if constexpr (kRight) _tile_stored(1, c + 16, ldc);
  if constexpr (kBelow) _tile_stored(2, below, ldc);
  if constexpr (kBelow && kRight) _tile_stored(3, below + 16, ldc);
}

GDN_AVX512_BF16 void scale_rows(const PairProduct& p) {
  for (size_t i = 0; i < p.m; ++i) {
    const __m512 f = _mm512_set1_ps(p.keep[i * p.keep_step]);
    float* c = p.c + i * p.ldc;
    for (size_t j = 0; j < p.n; j += 16) {
      _mm512_storeu_ps(c + j, _mm512_mul_ps(f, _mm512_loadu_ps(c + j)));
    }
  }
}

void amx_product(const PairProduct& p) {
  if (p.keep != nullptr && (p.keep_step != 0 || *p.keep != 1.0f)) scale_rows(p);
  // GCC's _tile_loadd does not say that it reads memory: what was stored before must be there.
  asm volatile("" ::: "memory");
  for (size_t i = 0; i < p.m; i += 32) {
    const BFloat16* a = p.a + i * p.lda;
    const bool below = i + 32 <= p.m;
    for (size_t j = 0; j < p.n; j += 32) {
      const bool right = j + 32 <= p.n;
      const auto tiles = below   ? right ? amx_tiles<2, 2> : amx_tiles<2, 1>
                           : right ? amx_tiles<1, 2>
                                 : amx_tiles<1, 1>;
      tiles(p, a, p.b + j, p.c + i * p.ldc + j);
    }
  }
}

constexpr PairKernels kAmx = {PairBackend::kAmx, amx_product, avx512_round,
                              avx512_pack,       amx_begin,   amx_end};

bool has_avx512_bf16() { return __builtin_cpu_supports("avx512bf16"); }

// CPUID's bits for AMX tiles with bf16, and Linux's permission to use the tile registers, which is
// asked for once per process.
bool has_amx() {
  static const bool has = [] {
    uint32_t a = 7, b = 0, c = 0, d = 0;
    asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    constexpr uint32_t kBf16 = 1u << 22, kTile = 1u << 24;
    if ((d & kBf16) == 0 || (d & kTile) == 0 || !has_avx512_bf16()) return false;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return false;
    if (agrees_with_emulation(kAmx)) return true;
    std::fprintf(stderr, "gdn: AMX multiplies wrongly on this processor; not using it\n");
    return false;
  }();
  return has;
}

const PairKernels* fastest() {
  if (has_amx()) return &kAmx;
  return has_avx512_bf16() && __builtin_cpu_is("amd") ? &kAvx512 : nullptr;
}
#else
const PairKernels* fastest() { return nullptr; }
#endif  // GDN_PAIRS_X86

// Stands for the default, which is looked up at the first use: Linux is asked for AMX's registers
// only by processes that multiply bf16.
constexpr PairKernels kDefault = {};
std::atomic<const PairKernels*> chosen{&kDefault};

const bool chosen_at_start = choose_pairs(std::getenv("GDN_BF16"));

}  // namespace

const PairKernels* find_pair_kernels(std::string_view name) {
#if GDN_PAIRS_X86
  if (name == "amx") return has_amx() ? &kAmx : nullptr;
  if (name == "avx512") return has_avx512_bf16() ? &kAvx512 : nullptr;
#else
  static_cast<void>(name);
#endif
  return nullptr;
}

bool agrees_with_emulation(const PairKernels& kernels) {
  // Blocks of four tiles and of one; a wider row of C than is written, to see what lies beside.
  constexpr size_t kM = 48, kN = 48, kK = 64, kLdc = kN + 16;
  std::vector<float> rows(kM * kK), columns(kK * kN), keep(kM), expected(kM * kLdc), c;
  const auto small = [](size_t i, size_t step) { return static_cast<float>(i * step % 9) - 4.0f; };
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = small(i, 7);
  for (size_t i = 0; i < columns.size(); ++i) columns[i] = small(i, 5);
  for (size_t i = 0; i < kM; ++i) keep[i] = 0.5f * static_cast<float>(i % 3);
  for (size_t i = 0; i < expected.size(); ++i) expected[i] = small(i, 2);
  c = expected;
  std::vector<BFloat16> a(rows.size());
  std::vector<uint32_t> b(kK / 2 * kN);
  emulated_round({kM, kK, rows.data(), kK}, a.data(), kK);
  emulated_pack({kK, kN, columns.data(), kN}, b.data(), kN);
  PairProduct p = {kM, kN, kK, a.data(), kK, b.data(), kN, expected.data(), kLdc};
  const auto both = [&](const PairKernels& k, float* out) {
    p.c = out;
    p.keep = nullptr;
    k.product(p);
    p.keep = keep.data();
    p.keep_step = 1;
    k.product(p);
    p.keep = keep.data() + 1;
    p.keep_step = 0;
    k.product(p);
  };
  both(kEmulated, expected.data());
  kernels.begin();
  both(kernels, c.data());
  kernels.end();
  return c == expected;
}

bool choose_pairs(const char* name) {
  const std::string_view wanted = name == nullptr ? "" : name;
  if (wanted == "off" || wanted == "emulated") {
    chosen = wanted == "off" ? nullptr : &kEmulated;
    return true;
  }
  chosen = &kDefault;
  if (wanted.empty() || wanted == "auto") return true;
  if (wanted != "amx" && wanted != "avx512") {
    std::fprintf(stderr,
                 "gdn: GDN_BF16 must be auto, amx, avx512, emulated or off, got %s; ignored\n",
                 name);
    return false;
  }
  if (const PairKernels* found = find_pair_kernels(wanted)) {
    chosen = found;
    return true;
  }
  std::fprintf(stderr, "gdn: this processor has no %s for bf16 (GDN_BF16); using %s\n", name,
               pair_backend());
  return false;
}

const PairKernels* pair_kernels() {
  const PairKernels* kernels = chosen.load(std::memory_order_relaxed);
  if (kernels == &kDefault) kernels = fastest();
  if (kernels == nullptr || kernels->backend == PairBackend::kEmulated) return kernels;
  return std::strcmp(simd_target(), "avx512") == 0 ? kernels : nullptr;
}

const char* pair_backend() {
  const PairKernels* kernels = pair_kernels();
  if (kernels == nullptr) return "off";
  return kernels->backend == PairBackend::kAmx      ? "amx"
         : kernels->backend == PairBackend::kAvx512 ? "avx512"
                                                    : "emulated";
}

namespace internal {

bool choose_unchecked_amx() {
#if GDN_PAIRS_X86
  if (!has_avx512_bf16()) return false;
  chosen = &kAmx;
  return true;
#else
  return false;
#endif
}

}  // namespace internal
}  // namespace gdn
