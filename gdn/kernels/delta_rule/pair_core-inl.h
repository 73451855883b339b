// SPDX-License-Identifier: Apache-2.0
// What forward and backward of the chunk form with bf16 products share: the operands of one chunk
// of one head. Formulas and names: README.md. Include inside the foreach_target pattern.
#if defined(GDN_KERNELS_DELTA_RULE_PAIR_CORE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GDN_KERNELS_DELTA_RULE_PAIR_CORE_INL_H_
#undef GDN_KERNELS_DELTA_RULE_PAIR_CORE_INL_H_
#else
#define GDN_KERNELS_DELTA_RULE_PAIR_CORE_INL_H_
#endif

#include "gdn/kernels/delta_rule/core-inl.h"
#include "gdn/kernels/delta_rule/plan.h"
#include "gdn/kernels/simd-inl.h"
#include "gdn/kernels/simd/pairs.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {

inline constexpr size_t kPairPanel = 32;  // columns of values that go together
inline constexpr float kOne = 1.0f;

// dst[cols/2][rows] pairs of src[rows][cols]^T; ld_src counts bf16, ld_dst pairs.
HWY_INLINE void transpose_to_pairs(size_t rows, size_t cols, const BFloat16* src, size_t ld_src,
                                   uint32_t* dst, size_t ld_dst) {
  transpose(rows, cols / 2, reinterpret_cast<const uint32_t*>(src), ld_src / 2, dst, ld_dst);
}

// dst[2 rows][n], the rows that the pairs src[rows][n] are made of.
HWY_INLINE void split_pairs(size_t rows, size_t n, const uint32_t* src, size_t ld_src,
                            BFloat16* dst, size_t ld_dst) {
  const hn::ScalableTag<uint32_t> d;
  const hn::Rebind<uint16_t, decltype(d)> d16;
  for (size_t i = 0; i < rows; ++i) {
    uint16_t* even = &dst[2 * i * ld_dst].bits;
    for (size_t j = 0; j < n; j += hn::Lanes(d)) {
      const auto pairs = hn::LoadU(d, src + i * ld_src + j);
      hn::StoreU(hn::TruncateTo(d16, pairs), d16, even + j);
      hn::StoreU(hn::TruncateTo(d16, hn::ShiftRight<16>(pairs)), d16, even + ld_dst + j);
    }
  }
}

// dst[rows/2][n] pairs of the rows src[rows][n].
HWY_INLINE void pair_rows(size_t rows, size_t n, const BFloat16* src, size_t ld_src, uint32_t* dst,
                          size_t ld_dst) {
  const hn::ScalableTag<uint32_t> d;
  const hn::Rebind<uint16_t, decltype(d)> d16;
  for (size_t i = 0; i < rows; i += 2) {
    const uint16_t* even = &src[i * ld_src].bits;
    for (size_t j = 0; j < n; j += hn::Lanes(d)) {
      const auto lower = hn::PromoteTo(d, hn::LoadU(d16, even + j));
      const auto upper = hn::PromoteTo(d, hn::LoadU(d16, even + ld_src + j));
      hn::StoreU(hn::Or(lower, hn::ShiftLeft<16>(upper)), d, dst + i / 2 * ld_dst + j);
    }
  }
}

// Merged forms only: one write key per token. A scalar gate multiplies rows of products in fp32, as
// do the lengths of queries and keys, so the keys are operands as they came; a channel gate has to
// multiply the keys, which are rounded after it.
struct PairCore : Core<float> {
  static constexpr bool kPairs = true;
  static Layout<float> layout(const DeltaRuleParams& x) {
    return Layout<float>(x, delta_rule::pair_chunk_size(x), kPairPanel, 32);
  }

  PairCore(const DeltaRuleParams& params, Carver& carve)
      : Core(params, layout(params), carve, /*keys=*/params.gate == DeltaGate::kChannel),
        kernels(*pair_kernels()) {
    const size_t C = L.C, Kp = L.Kp;
    readers = carve.take<BFloat16>(2 * C * Kp);
    // The erase key is the write key unless their decays differ.
    const bool same = x.erase == DeltaErase::kKey && !L.channel;
    writers = same ? readers : carve.take<BFloat16>(C * Kp);
    writers_pairs = carve.take<uint32_t>(C * Kp / 2);
    writersT = carve.take<BFloat16>(C * Kp);
    rounded_Z = carve.take<BFloat16>(2 * C * C);
    read = carve.take<float>(2 * C);
    write = carve.take<float>(C);
    scoresT = carve.take<BFloat16>(2 * C * C);
    key_pairs = carve.take<uint32_t>(C * Kp);
    if (L.channel) sub = carve.take<BFloat16>(2 * kSub * Kp + C * Kp);
  }

  struct Scope {  // of a thread that multiplies
    explicit Scope(const PairKernels& k) : kernels(k) { kernels.begin(); }
    ~Scope() { kernels.end(); }
    Scope(const Scope&) = delete;
    const PairKernels& kernels;
  };

  // Rows of C that go into a call of the product: four tiles of AMX share their operands.
  size_t product_rows() const { return kernels.backend == PairBackend::kAmx ? 32 : kSub; }

  // C = keep * C + A B by blocks of rows, with some prefetches between.
  HWY_INLINE void multiply(PairProduct p) {
    const size_t m = p.m, rows = product_rows();
    for (size_t i = 0; i < m; i += rows) {
      p.m = std::min(rows, m - i);
      kernels.product(p);
      ahead.some_lines();
      p.a += p.m * p.lda;
      p.c += p.m * p.ldc;
      if (p.keep != nullptr) p.keep += p.m * p.keep_step;
    }
  }

  void load_keys(int64_t t, size_t n, int64_t h, bool with_readers = true) {
    if (L.channel) return Core::load_keys(t, n, h, with_readers);
    const size_t half = L.C * L.Kp;
    if (with_readers) {
      load_bf16(x.q, t, n, h, readers + half);
      if (x.erase == DeltaErase::kOwn) load_bf16(x.a, t, n, h, readers);
      if (x.l2norm_qk) find_norms(n, readers + half, q_norm);
    }
    load_bf16(x.k, t, n, h, writers);
    if (x.l2norm_qk) find_norms(n, writers, k_norm);
  }

  void load_gate(int64_t t, size_t n, int64_t hv) {
    const size_t C = L.C, Kp = L.Kp;
    Core::load_gate(t, n, hv);
    if (L.channel) {
      kernels.round({C, Kp, wEh, Kp}, writers, Kp);
      std::fill_n(write, C, 1.0f);
    } else {
      if (x.l2norm_qk) fold_norms();
      std::copy_n(Eh, C, write);
    }
    transpose_to_pairs(C, Kp, writers, Kp, writers_pairs, C);
    split_pairs(Kp / 2, C, writers_pairs, C, writersT, C);
  }

  void decay_readers() {
    const size_t C = L.C, first = L.first * L.Kp;
    if (L.channel) {
      Core::decay_readers();
      kernels.round({2 * C - L.first, L.Kp, bqE + first, L.Kp}, readers + first, L.Kp);
      std::fill_n(read, 2 * C, 1.0f);
      return;
    }
    for (size_t i = 0; i < C; ++i) {
      read[i] = f[i] * erase_decay()[i];
      read[C + i] = f[C + i] * query_decay()[i];
    }
  }

  void scores() {
    const size_t C = L.C, Kp = L.Kp, rows = product_rows();
    if (L.channel) {
      for (size_t r = 0; r < C; r += kSub) channel_scores(r);
    } else {
      for (size_t half = L.first; half < 2 * C; half += C) {
        for (size_t r = 0; r < C; r += rows) {
          kernels.product({rows, r + rows, Kp, readers + (half + r) * Kp, Kp, writers_pairs, C,
                           Z + (half + r) * C, C});
        }
      }
    }
    for (size_t i = L.first; i < 2 * C; ++i) apply_decay(i, f[i], Z + i * C);
    kernels.round({2 * C - L.first, C, Z + L.first * C, C}, rounded_Z + L.first * C, C);
  }

  // Scalar gates: d_bq += dZ w, d_w += dZ^T bq, from the gradient of the scores.
  void score_grads(const float* dZ, float* d_bq, float* d_w) {
    const size_t C = L.C, Kp = L.Kp, first = L.first, n = 2 * C - first;
    kernels.round({n, C, dZ + first * C, C}, rounded_Z + first * C, C);
    pair_rows(C, Kp, writers, Kp, key_pairs, Kp);
    multiply({n, Kp, C, rounded_Z + first * C, C, key_pairs, Kp, d_bq + first * Kp, Kp, &kOne, 0});
    transpose_rows(n, C, rounded_Z + first * C, C, scoresT + first, 2 * C);
    pair_rows(n, Kp, readers + first * Kp, Kp, key_pairs, Kp);
    multiply({C, Kp, n, scoresT + first, 2 * C, key_pairs, Kp, d_w, Kp, &kOne, 0});
  }
  // dst[cols][rows] = src[rows][cols]^T by way of key_pairs.
  void transpose_rows(size_t rows, size_t cols, const BFloat16* src, size_t ld_src, BFloat16* dst,
                      size_t ld_dst) {
    transpose_to_pairs(rows, cols, src, ld_src, key_pairs, rows);
    split_pairs(cols / 2, rows, key_pairs, rows, dst, ld_dst);
  }

  // Products of fp32 rows with the keys as they came.
  float dot_reader(size_t i, const float* y) const {
    return L.channel ? Core::dot_reader(i, y) : dot_bf16(readers + i * L.Kp, y);
  }
  float dot_writer(size_t i, const float* y) const {
    return L.channel ? Core::dot_writer(i, y) : dot_bf16(writers + i * L.Kp, y);
  }
  void add_writer_product(size_t i, const float* y, float* sum) const {
    if (L.channel) return Core::add_writer_product(i, y, sum);
    const hn::ScalableTag<float> d;
    const BFloat16* row = writers + i * L.Kp;
    for (size_t j = 0; j < L.Kp; j += hn::Lanes(d)) {
      hn::Store(hn::MulAdd(load_as(d, row + j), hn::Load(d, y + j), hn::Load(d, sum + j)), d,
                sum + j);
    }
  }
  // Gradients of normalised rows already hold one over their length: what is left is to take out
  // their part along the row.
  void query_norm_grads(size_t n, float* dy) const {
    if (L.channel) return Core::query_norm_grads(n, dy);
    for (size_t i = 0; i < n; ++i) project(readers + (L.C + i) * L.Kp, q_norm[i], dy + i * L.Kp);
  }
  void key_norm_grads(size_t n, float* dy) const {
    if (L.channel) return Core::key_norm_grads(n, dy);
    for (size_t i = 0; i < n; ++i) project(writers + i * L.Kp, k_norm[i], dy + i * L.Kp);
  }

  const PairKernels& kernels;
  BFloat16* readers;        // [2C][Kp] erase keys, then queries; with a channel gate, decayed
  BFloat16* writers;        // [C][Kp] write keys; with a channel gate, decayed to the chunk's end
  uint32_t* writers_pairs;  // [Kp/2][C] their transpose, in pairs
  BFloat16* writersT;       // [Kp][C] their transpose, in rows
  BFloat16* rounded_Z;      // [2C][C] scores
  BFloat16* scoresT;        // [2][C][C] scores transposed; then [C][2C] their gradient transposed
  uint32_t* key_pairs;      // [2C/2][Kp] keys of neighbouring tokens in pairs; scratch
  float *read, *write;      // [2C], [C] what is left to multiply readers and writers by, rows

 private:
  void load_bf16(const void* src, int64_t t, size_t n, int64_t h, BFloat16* dst) const {
    const BFloat16* from = static_cast<const BFloat16*>(src) + (t * x.H + h) * x.K;
    for (size_t i = 0; i < n; ++i, from += x.H * x.K) {
      uint16_t* row = &dst[i * L.Kp].bits;
      copy_row(&from->bits, L.K, row);
      std::fill(row + L.K, row + L.Kp, uint16_t{0});
    }
    std::fill(dst + n * L.Kp, dst + L.C * L.Kp, BFloat16{0});
  }
  // One over the lengths of rows, 1 past them.
  void find_norms(size_t n, const BFloat16* rows, float* factors) const {
    const hn::ScalableTag<float> d;
    std::fill_n(factors, L.C, 1.0f);
    for (size_t i = 0; i < n; ++i) {
      auto sum = hn::Zero(d);
      for (size_t j = i * L.Kp; j < (i + 1) * L.Kp; j += hn::Lanes(d)) {
        const auto v = load_as(d, rows + j);
        sum = hn::MulAdd(v, v, sum);
      }
      const float square = hn::GetLane(hn::SumOfLanes(d, sum));
      factors[i] = 1.0f / std::sqrt(square + static_cast<float>(delta_rule::kL2NormEps));
    }
  }
  // One over the lengths goes where the decays are, which keeps the keys themselves exact.
  void fold_norms() {
    const size_t C = L.C;
    for (size_t i = 0; i < C; ++i) {
      if (x.erase == DeltaErase::kKey) f[i] *= k_norm[i];
      f[C + i] *= q_norm[i];
      Eh[i] *= k_norm[i];
      for (size_t j = 0; j <= i; ++j) D[i * C + j] *= k_norm[j];
    }
  }

  // See Core::channel_scores. The diagonal block stays in fp32: it has most of the weight where
  // keys decay fast, and costs little.
  void channel_scores(size_t r) {
    const size_t C = L.C, Kp = L.Kp;
    decay_sub_block(r, bq, w);
    const bool factors = divide_sub_block(r, w);
    if (r > 0) {
      BFloat16* keys = sub + 2 * kSub * Kp;
      uint32_t* pairs = reinterpret_cast<uint32_t*>(sub_wT);
      kernels.round({2 * kSub, Kp, sub_bq, Kp}, sub, Kp);
      kernels.round({r, Kp, sub_w, Kp}, keys, Kp);
      transpose_to_pairs(r, Kp, keys, Kp, pairs, C);
      for (size_t half = L.first; half < 2 * C; half += C) {
        kernels.product(
            {kSub, r, Kp, sub + (half == 0 ? 0 : kSub * Kp), Kp, pairs, C, Z + (half + r) * C, C});
      }
    }
    if (!factors) return diagonal_scores(r, w, Z);
    transpose(kSub, Kp, sub_w + r * Kp, Kp, sub_wT, kSub);
    for (size_t half = L.first; half < 2 * C; half += C) {
      gemm<Into::kSet, false>(kSub, kSub, Kp, sub_bq + (half == 0 ? 0 : kSub * Kp), Kp, sub_wT,
                              kSub, Z + (half + r) * C + r, C);
    }
  }

  float dot_bf16(const BFloat16* row, const float* y) const {
    const hn::ScalableTag<float> d;
    auto sum = hn::Zero(d);
    for (size_t j = 0; j < L.Kp; j += hn::Lanes(d)) {
      sum = hn::MulAdd(load_as(d, row + j), hn::Load(d, y + j), sum);
    }
    return hn::GetLane(hn::SumOfLanes(d, sum));
  }
  // dy -= y (y.dy) for y = factor * row
  void project(const BFloat16* row, float factor, float* dy) const {
    const hn::ScalableTag<float> d;
    const auto along = hn::Set(d, factor * factor * dot_bf16(row, dy));
    for (size_t j = 0; j < L.Kp; j += hn::Lanes(d)) {
      hn::Store(hn::NegMulAdd(along, load_as(d, row + j), hn::Load(d, dy + j)), d, dy + j);
    }
  }

  BFloat16* sub = nullptr;  // [2 kSub + C][Kp] see channel_scores
};

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();
#endif
