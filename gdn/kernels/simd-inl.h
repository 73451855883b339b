// SPDX-License-Identifier: Apache-2.0
// What the elementwise and row-wise kernels share on top of Highway: loads and stores that convert
// the storage types, loops over lanes with a tail, and the activations. Included once per SIMD
// target, hence the toggling guard.
#if defined(GDN_KERNELS_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GDN_KERNELS_SIMD_INL_H_
#undef GDN_KERNELS_SIMD_INL_H_
#else
#define GDN_KERNELS_SIMD_INL_H_
#endif

#include <array>
#include <cstdint>
#include <type_traits>

#include "gdn/base/dtype.h"
#include "gdn/base/pages.h"
#include "hwy/cache_control.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace gdn {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Calls f(d, i) for i = 0, N, 2N, ... with a full vector tag, then for each index that is left with
// a tag of one lane.
template <typename A, class F>
HWY_INLINE void for_lanes(int64_t n, F&& f) {
  const hn::ScalableTag<A> d;
  const int64_t lanes = hn::Lanes(d);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) f(d, i);
  const hn::CappedTag<A, 1> d1;
  for (; i < n; ++i) f(d1, i);
}

// Calls store(i, make(i)) for each whole step in [0, n), and returns where they end. What is made
// is stored two steps late: a load waits for an earlier store whose address has the same 12 lower
// bits, and large tensors that malloc cuts from one piece of memory lie whole pages and a line or
// two apart, so that what the next steps load from an input would meet the last stores to the
// output behind it.
template <class Make, class Store>
HWY_INLINE int64_t store_late(int64_t n, int64_t step, const Make& make, const Store& store) {
  const int64_t end = n - n % step;
  if (end < 2 * step) {
    if (end > 0) store(0, make(0));
    return end;
  }
  auto before = make(0), last = make(step);
  for (int64_t i = 2 * step; i < end; i += step) {
    const auto now = make(i);
    store(i - 2 * step, before);
    before = last;
    last = now;
  }
  store(end - 2 * step, before);
  store(end - step, last);
  return end;
}

// Sum over i of f(d, i) with four chains, so that the additions' latency is hidden.
template <typename A, class F>
HWY_INLINE A sum_lanes(int64_t n, F&& f) {
  const hn::ScalableTag<A> d;
  const int64_t lanes = hn::Lanes(d);
  auto s0 = hn::Zero(d), s1 = hn::Zero(d), s2 = hn::Zero(d), s3 = hn::Zero(d);
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    s0 = hn::Add(s0, f(d, i));
    s1 = hn::Add(s1, f(d, i + lanes));
    s2 = hn::Add(s2, f(d, i + 2 * lanes));
    s3 = hn::Add(s3, f(d, i + 3 * lanes));
  }
  for (; i + lanes <= n; i += lanes) s0 = hn::Add(s0, f(d, i));
  const hn::CappedTag<A, 1> d1;
  auto tail = hn::Zero(d1);
  for (; i < n; ++i) tail = hn::Add(tail, f(d1, i));
  const auto total = hn::SumOfLanes(d, hn::Add(hn::Add(s0, s1), hn::Add(s2, s3)));
  return hn::GetLane(total) + hn::GetLane(tail);
}

template <class D>
HWY_INLINE hn::Vec<D> load_as(D d, const double* p) {
  return hn::LoadU(d, p);
}
template <class D>
HWY_INLINE hn::Vec<D> load_as(D d, const float* p) {
  return hn::LoadU(d, p);
}
// fp32 from the 16 upper bits in each lane.
template <class D, class V16>
HWY_INLINE hn::Vec<D> widen_bf16(D d, V16 bits) {
  const hn::RebindToUnsigned<D> du;
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du, bits)));
}
template <class D>
HWY_INLINE hn::Vec<D> load_as(D d, const BFloat16* p) {
  const hn::Rebind<uint16_t, D> d16;
  return widen_bf16(d, hn::LoadU(d16, &p->bits));
}
template <class D>
HWY_INLINE hn::Vec<D> load_as(D d, const Float16* p) {
  const hn::Rebind<hwy::float16_t, D> d16;
  return hn::PromoteTo(d, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(p)));
}

// Rounds to nearest even; a NaN stays one.
template <class D, class V>
HWY_INLINE auto narrow_bf16(D d, V v) {
  const hn::RebindToUnsigned<D> du;
  const hn::RebindToSigned<D> di;
  const hn::Rebind<uint16_t, D> d16;
  const auto u = hn::BitCast(du, v);
  const auto odd = hn::And(hn::ShiftRight<16>(u), hn::Set(du, 1));
  const auto rounded = hn::Add(u, hn::Add(odd, hn::Set(du, 0x7fff)));
  const auto quiet = hn::Or(u, hn::Set(du, 0x400000));
  const auto is_nan = hn::RebindMask(du, hn::IsNaN(v));
  const auto upper = hn::ShiftRight<16>(hn::IfThenElse(is_nan, quiet, rounded));
  return hn::DemoteTo(
      d16, hn::BitCast(di, upper));  // saturates at 65535, which the 16 bits never exceed
}

template <class D, class V>
HWY_INLINE void store_as(D d, V v, double* p) {
  hn::StoreU(v, d, p);
}
template <class D, class V>
HWY_INLINE void store_as(D d, V v, float* p) {
  hn::StoreU(v, d, p);
}
template <class D, class V>
HWY_INLINE void store_as(D d, V v, BFloat16* p) {
  const hn::Rebind<uint16_t, D> d16;
  hn::StoreU(narrow_bf16(d, v), d16, &p->bits);
}
#if HWY_TARGET == HWY_AVX3
// bfloat16 that is rounded by an instruction (AVX512_BF16), where the portable way takes eight.
// Numbers below the normal range become 0.
struct HardwareBf16 : BFloat16 {};
template <class D, class V>
HWY_INLINE void store_as(D d, V v, HardwareBf16* p) {
  const hn::Rebind<uint16_t, D> d16;
  hn::Vec<decltype(d16)> half;
  asm("vcvtneps2bf16 %1, %0" : "=v"(half.raw) : "v"(v.raw));
  hn::StoreU(half, d16, &p->bits);
}
#endif

// Calls f(T{}) with the type by which kernels read and write elements of `dtype` here.
template <class F>
void dispatch_storage(DType dtype, F&& f) {
#if HWY_TARGET == HWY_AVX3
  if (dtype == DType::kBF16 && __builtin_cpu_supports("avx512bf16")) return f(HardwareBf16{});
#endif
  dispatch_dtype(dtype, f);
}

template <class D, class V>
HWY_INLINE void store_as(D d, V v, Float16* p) {
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3 || HWY_ARCH_ARM
  const hn::Rebind<hwy::float16_t, D> d16;
  hn::StoreU(hn::DemoteTo(d16, v), d16, reinterpret_cast<hwy::float16_t*>(p));
#else  // without an instruction for it, Highway truncates instead of rounding
  HWY_ALIGN float lanes[HWY_MAX_BYTES / sizeof(float)];
  hn::Store(v, d, lanes);
  for (size_t i = 0; i < hn::Lanes(d); ++i) p[i] = to_f16(lanes[i]);
#endif
}

// How a kernel writes an output. Where it touches far more than the caches hold, vectors that are
// whole lines go past them to memory: an ordinary store reads its line first and pushes another one
// out. Smaller vectors do not, since a line that is written in parts may go to memory in parts.
class Output {
 public:
  Output() : past_caches_(false) {}
  // `bytes`: all that the kernel reads and writes. Rows begin `row_bytes` apart from `first` on.
  Output(int64_t bytes, const void* first, int64_t row_bytes)
      : past_caches_(bytes >= kFarMoreThanCaches && row_bytes % 64 == 0 &&
                     reinterpret_cast<uintptr_t>(first) % 64 == 0) {}
  template <class D, class V, typename T>
  HWY_INLINE void store(D d, V v, T* p) const {
    if constexpr (std::is_same_v<D, hn::ScalableTag<float>> && std::is_same_v<T, float> &&
                  hn::MaxLanes(D()) == 16) {
      if (past_caches_) return hn::Stream(v, d, p);
    }
    store_as(d, v, p);
  }
  bool past_caches() const { return past_caches_; }
  // After the last store of a thread, so that others see all of them.
  void finish() const {
    if (past_caches_) hwy::FlushStream();
  }

 private:
  static constexpr int64_t kFarMoreThanCaches = int64_t{48} << 20;
  bool past_caches_;
};

// Like for_lanes(), for an f(d, i) that returns what goes to y[i]; late.
template <typename A, class F, typename T>
HWY_INLINE void map_lanes(int64_t n, const Output& to, T* y, F&& f) {
  const hn::ScalableTag<A> d;
  int64_t i = store_late(
      n, hn::Lanes(d), [&](int64_t i) HWY_ATTR { return f(d, i); },
      [&](int64_t i, auto v) HWY_ATTR { to.store(d, v, y + i); });
  const hn::CappedTag<A, 1> d1;
  for (; i < n; ++i) to.store(d1, f(d1, i), y + i);
}

// The elements of a row that a kernel takes at once, as kCount vectors. Kernels that work element
// by element or sum over rows do not care which lane an element is in: 32 elements of HardwareBf16
// become the even and the odd ones, one operation each, where widening them in order takes two
// each, and go back by one rounding and one permutation for both. Everything else is one vector in
// order.
template <class D, int kN>
struct Bundle {
  static constexpr int kCount = kN;
  struct Vectors {
    hn::Vec<D> v[kN];
    HWY_INLINE hn::Vec<D>& operator[](int j) { return v[j]; }
    HWY_INLINE const hn::Vec<D>& operator[](int j) const { return v[j]; }
  };
  D d;

  HWY_INLINE int64_t size() const { return kN * static_cast<int64_t>(hn::Lanes(d)); }
  HWY_INLINE Vectors zero() const {
    Vectors x;
    for (auto& v : x.v) v = hn::Zero(d);
    return x;
  }
  // Elements of storage type or, beside such, of accumulation type.
  template <typename T>
  HWY_INLINE Vectors load(const T* p) const {
    Vectors x;
    if constexpr (kN == 1) {
      x[0] = load_as(d, p);
    } else if constexpr (std::is_same_v<T, float>) {
      hn::LoadInterleaved2(d, p, x[0], x[1]);
    } else {
      const hn::RebindToUnsigned<D> du;
      const auto both = hn::LoadU(du, reinterpret_cast<const uint32_t*>(p));
      x[0] = hn::BitCast(d, hn::ShiftLeft<16>(both));
      x[1] = hn::BitCast(d, hn::And(both, hn::Set(du, 0xffff0000u)));
    }
    return x;
  }
  // Vector j of what load() gives.
  template <typename T>
  HWY_INLINE hn::Vec<D> load_part(const T* p, int j) const {
    return load(p)[j];
  }
  template <typename T>
  HWY_INLINE void store(const Output& to, const Vectors& x, T* p) const {
    if constexpr (kN == 1) {
      to.store(d, x[0], p);
    } else if constexpr (std::is_same_v<T, float>) {
      hn::StoreInterleaved2(x[0], x[1], d, p);
    } else {
      store_pair(to, x, p);
    }
  }
  // Rows of a kernel's own, in the order of the lanes.
  template <typename A>
  HWY_INLINE Vectors load_own(const A* p) const {
    Vectors x;
    for (int j = 0; j < kN; ++j) x[j] = hn::LoadU(d, p + j * hn::Lanes(d));
    return x;
  }
  template <typename A>
  HWY_INLINE void store_own(const Vectors& x, A* p) const {
    for (int j = 0; j < kN; ++j) hn::StoreU(x[j], d, p + j * hn::Lanes(d));
  }

 private:
  template <typename T>
  static HWY_INLINE void store_pair(const Output& to, const Vectors& x, T* p) {
#if HWY_TARGET == HWY_AVX3
    alignas(64) static constexpr uint16_t kInTurn[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                         21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                         11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i halves;  // the even ones, then the odd ones
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(halves) : "v"(x[0].raw), "v"(x[1].raw));
    halves = _mm512_permutexvar_epi16(_mm512_load_si512(kInTurn), halves);
    if (to.past_caches()) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(p), halves);
    } else {
      _mm512_storeu_si512(p, halves);
    }
#endif
  }
};

// Rows of T, in their main part.
#if HWY_TARGET == HWY_AVX3
template <typename T>
using WholeBundle = Bundle<hn::ScalableTag<Acc<T>>, std::is_same_v<T, HardwareBf16> ? 2 : 1>;
#else
template <typename T>
using WholeBundle = Bundle<hn::ScalableTag<Acc<T>>, 1>;
#endif

// Calls f(bundle, i) for the elements [i, i + bundle.size()) of a row of T, from `begin` on: for
// whole bundles as long as there are such, then for whole vectors, then for single elements.
template <typename T, class F>
HWY_INLINE void for_bundles(int64_t begin, int64_t n, F&& f) {
  const WholeBundle<T> whole{};
  int64_t i = begin;
  for (; i + whole.size() <= n; i += whole.size()) f(whole, i);
  if constexpr (whole.kCount > 1) {
    const Bundle<hn::ScalableTag<Acc<T>>, 1> vector{};
    for (; i + vector.size() <= n; i += vector.size()) f(vector, i);
  }
  const Bundle<hn::CappedTag<Acc<T>, 1>, 1> one{};
  for (; i < n; ++i) f(one, i);
}

// Rows of outputs, as what map_bundles() stores to.
template <typename T, int kOutputs>
struct OutputRows {
  const Output* to[kOutputs];
  T* row[kOutputs];

  template <class Bundle, class Results>
  HWY_INLINE void operator()(Bundle bundle, int64_t i, const Results& results) const {
    HWY_UNROLL(8)
    for (int o = 0; o < kOutputs; ++o) bundle.store(*to[o], results[o], row[o] + i);
  }
};

// Calls store(bundle, i, make(bundle, i)) where for_bundles() would call f(bundle, i). If kLate,
// what is made of whole bundles is stored late: not for more of it than registers can keep.
template <typename T, bool kLate = true, class Make, class Store>
HWY_INLINE void map_bundles(int64_t begin, int64_t n, const Make& make, const Store& store) {
  int64_t done = begin;
  if constexpr (kLate) {
    const WholeBundle<T> whole{};
    done += store_late(
        n - begin, whole.size(), [&](int64_t i) HWY_ATTR { return make(whole, begin + i); },
        [&](int64_t i, const auto& results) HWY_ATTR { store(whole, begin + i, results); });
  }
  for_bundles<T>(done, n,
                 [&](auto bundle, int64_t i) HWY_ATTR { store(bundle, i, make(bundle, i)); });
}

// kSums sums over a row of T, in parts that stand in the lanes of `totals`: f(bundle, i, sums) adds
// what elements [i, i + bundle.size()) give to each of sums[kSums]. Four chains per sum hide the
// additions' latency.
template <typename T, int kSums, class F>
HWY_INLINE void sum_bundles(int64_t n, hn::Vec<hn::ScalableTag<Acc<T>>> (&totals)[kSums], F&& f) {
  using A = Acc<T>;
  const WholeBundle<T> whole{};
  constexpr int kUnroll = 4 / whole.kCount;
  typename WholeBundle<T>::Vectors sums[kUnroll][kSums];
  for (auto& chain : sums) {
    for (auto& s : chain) s = whole.zero();
  }
  int64_t i = 0;
  for (; i + kUnroll * whole.size() <= n; i += kUnroll * whole.size()) {
    for (int u = 0; u < kUnroll; ++u) f(whole, i + u * whole.size(), sums[u]);
  }
  for (; i + whole.size() <= n; i += whole.size()) f(whole, i, sums[0]);
  const hn::ScalableTag<A> d;
  for (int s = 0; s < kSums; ++s) {
    totals[s] = sums[0][s][0];
    for (int u = 0; u < kUnroll; ++u) {
      for (int j = u == 0 ? 1 : 0; j < whole.kCount; ++j)
        totals[s] = hn::Add(totals[s], sums[u][s][j]);
    }
  }
  if constexpr (whole.kCount > 1) {
    using Vector = Bundle<hn::ScalableTag<A>, 1>;
    typename Vector::Vectors rest[kSums];
    for (int s = 0; s < kSums; ++s) rest[s][0] = totals[s];
    for (; i + Vector{}.size() <= n; i += Vector{}.size()) f(Vector{}, i, rest);
    for (int s = 0; s < kSums; ++s) totals[s] = rest[s][0];
  }
  if (i == n) return;
  using One = Bundle<hn::CappedTag<A, 1>, 1>;
  typename One::Vectors tail[kSums];
  for (auto& t : tail) t = One{}.zero();
  for (; i < n; ++i) f(One{}, i, tail);
  for (int s = 0; s < kSums; ++s) {
    HWY_ALIGN A first_lane[HWY_MAX_BYTES / sizeof(A)] = {hn::GetLane(tail[s][0])};
    totals[s] = hn::Add(totals[s], hn::Load(d, first_lane));
  }
}

#if HWY_TARGET != HWY_SCALAR
// The sum of the blocks of four lanes.
template <class D>
HWY_INLINE void store_block_sums(D d, hn::Vec<D> v, hn::TFromD<D>* sums) {
  if constexpr (hn::MaxLanes(D()) > 4) {
    const hn::Half<D> half;
    store_block_sums(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)), sums);
  } else {
    hn::StoreU(v, d, sums);
  }
}
#endif

// The sums of the lanes of kCount vectors.
template <class D, int kCount>
HWY_INLINE void sums_of_lanes(D d, const hn::Vec<D> (&v)[kCount], hn::TFromD<D>* sums) {
#if HWY_TARGET != HWY_SCALAR
  if constexpr (kCount == 4 && sizeof(hn::TFromD<D>) == 4) {
    // Together: in each block of four lanes first two of each vector's, then each one's sum.
    const hn::RepartitionToWide<hn::RebindToUnsigned<D>> pairs;
    const auto two_sums = [&](auto a, auto b) HWY_ATTR {
      return hn::BitCast(pairs,
                         hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b)));
    };
    const auto first = two_sums(v[0], v[1]), second = two_sums(v[2], v[3]);
    const auto lower = hn::BitCast(d, hn::InterleaveLower(pairs, first, second));
    const auto upper = hn::BitCast(d, hn::InterleaveUpper(pairs, first, second));
    return store_block_sums(d, hn::Add(lower, upper), sums);
  }
#endif
  for (int k = 0; k < kCount; ++k) sums[k] = hn::GetLane(hn::SumOfLanes(d, v[k]));
}

// Adds rows [count, n] up into the first of them, in their order.
template <typename A>
HWY_INLINE void add_rows_up(A* rows, int64_t count, int64_t n) {
  for (int64_t row = 1; row < count; ++row) {
    const A* more = rows + row * n;
    for_lanes<A>(n, [&](auto d, int64_t i) HWY_ATTR {
      hn::StoreU(hn::Add(hn::LoadU(d, rows + i), hn::LoadU(d, more + i)), d, rows + i);
    });
  }
}

// A row of weights beside rows of T, in the order of their lanes. Null stays null.
template <typename T>
class OwnOrder {
  using A = Acc<T>;

 public:
  OwnOrder(const A* row, int64_t n) : row_(row) {
    if constexpr (WholeBundle<T>::kCount > 1) {
      if (row == nullptr) return;
      copy_.resize(static_cast<size_t>(n));
      for_bundles<T>(0, n, [&](auto bundle, int64_t i) HWY_ATTR {
        bundle.store_own(bundle.load(row + i), copy_.data() + i);
      });
      row_ = copy_.data();
    }
  }
  OwnOrder(const OwnOrder&) = delete;
  OwnOrder& operator=(const OwnOrder&) = delete;
  const A* data() const { return row_; }

 private:
  const A* row_;
  PageVector<A> copy_;
};

// How near an activation comes to its value: to a few units in the last place of fp32, or to 2^-12
// of itself, an eighth of what rounding to bf16 may add. The latter for results that are rounded
// so, where instructions for bf16 make everything around it so cheap that exponentials and
// divisions are most of a kernel; not for gradients of weights, which stay fp32.
enum class Precision : uint8_t { kFull, kBf16 };
#if HWY_TARGET == HWY_AVX3
template <typename T>
inline constexpr Precision kPrecisionOf =
    std::is_same_v<T, HardwareBf16> ? Precision::kBf16 : Precision::kFull;
#else
template <typename T>
inline constexpr Precision kPrecisionOf = Precision::kFull;
#endif

// With fused products exponentials and what is made of them are built from parts that share what
// they can.
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2
#define GDN_SIMD_FUSED 1
#else
#define GDN_SIMD_FUSED 0
#endif

#if GDN_SIMD_FUSED
// Multiples of ln(2) between which exp keeps to numbers of the normal range and their inverses do:
// at the ends it is 0 and infinity.
inline constexpr float kExpZero = -88.0296919f, kExpInfinite = 88.7228391f;

#if HWY_TARGET == HWY_AVX3
// Entry index % 16 of a table, in each lane.
HWY_INLINE hn::Vec512<float> look_up(const void* table, hn::Vec512<uint32_t> index) {
  return hn::Vec512<float>{_mm512_permutexvar_ps(index.raw, _mm512_load_ps(table))};
}
HWY_INLINE hn::Vec256<float> look_up(const void* table, hn::Vec256<uint32_t> index) {
  const hn::Vec512<uint32_t> wide{_mm512_castsi256_si512(index.raw)};
  return hn::Vec256<float>{_mm512_castps512_ps256(look_up(table, wide).raw)};
}
template <size_t N>
HWY_INLINE hn::Vec128<float, N> look_up(const void* table, hn::Vec128<uint32_t, N> index) {
  const hn::Vec512<uint32_t> wide{_mm512_castsi128_si512(index.raw)};
  return hn::Vec128<float, N>{_mm512_castps512_ps128(look_up(table, wide).raw)};
}

// 2^(j/16), less what an exponent of 4 more bits adds to its bits for them.
alignas(64) inline constexpr uint32_t kPowers[16] = {
    0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
    0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
inline constexpr float kPowerSteps = 16;

// 2^(k/16) for the whole number k in the lower bits.
template <class D, class V>
HWY_INLINE V power_of(D d, V shifted) {
  const hn::RebindToUnsigned<D> du;
  const auto k = hn::BitCast(du, shifted);
  return hn::BitCast(d, hn::Add(hn::BitCast(du, look_up(kPowers, k)), hn::ShiftLeft<19>(k)));
}
// 2^f, |f| <= 1/32.
template <Precision kPrecision, class D, class V>
HWY_INLINE V small_power(D d, V f) {
  if constexpr (kPrecision == Precision::kBf16) {
    return hn::MulAdd(f, hn::Set(d, 0.6932f), hn::Set(d, 1.000117f));
  }
  auto p = hn::MulAdd(f, hn::Set(d, 0.0555021364f), hn::Set(d, 0.240234288f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.693147183f));
  return hn::MulAdd(p, f, hn::Set(d, 1.0f));
}
#else
inline constexpr float kPowerSteps = 1;

// 2^k for the whole number k in the lower bits.
template <class D, class V>
HWY_INLINE V power_of(D d, V shifted) {
  const hn::RebindToUnsigned<D> du;
  return hn::BitCast(d, hn::ShiftLeft<23>(hn::Add(hn::BitCast(du, shifted), hn::Set(du, 127))));
}
// 2^f, |f| <= 1/2.
template <Precision kPrecision, class D, class V>
HWY_INLINE V small_power(D d, V f) {
  auto p = hn::MulAdd(f, hn::Set(d, 0.0013276472f), hn::Set(d, 0.009675541f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.05550713f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.2402212f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.69314694f));
  return hn::MulAdd(p, f, hn::Set(d, 1.0f));
}
#endif

// exp(sign x) = fraction * power for kExpZero <= sign x <= kExpInfinite, in full to 2e-7 and
// 2e-8 |x| of itself: power is the nearest 2^(k / kPowerSteps), and the fraction, which hands on
// NaN, a polynomial.
template <class V>
struct ExpParts {
  V fraction, power;
};
template <int kSign, Precision kPrecision = Precision::kFull, class D, class V>
HWY_INLINE ExpParts<V> exp_parts(D d, V x) {
  const auto log2e = hn::Set(d, kSign * 1.44269504f);
  // Adding 1.5 * 2^23 steps rounds to a whole number of steps, which then stands in the lower bits.
  const auto shift = hn::Set(d, 12582912.0f / kPowerSteps);
  const auto shifted = hn::MulAdd(x, log2e, shift);
  const auto f = hn::MulSub(x, log2e, hn::Sub(shifted, shift));
  return {small_power<kPrecision>(d, f), power_of(d, shifted)};
}

// 1 + exp(-x). Min and Max return a NaN that comes second.
template <Precision kPrecision, class D, class V>
HWY_INLINE V one_plus_exp_of_negative(D d, V x) {
  x = hn::Min(hn::Set(d, -kExpZero - 1), hn::Max(hn::Set(d, -kExpInfinite), x));
  const auto e = exp_parts<-1, kPrecision>(d, x);
  return hn::MulAdd(e.fraction, e.power, hn::Set(d, 1.0f));
}

// y / x
template <Precision kPrecision, class V>
HWY_INLINE V quotient(V y, V x) {
#if HWY_TARGET == HWY_AVX3
  if constexpr (kPrecision == Precision::kBf16) {
    V inverse;
    asm("vrcp14ps %1, %0" : "=v"(inverse.raw) : "v"(x.raw));
    return hn::Mul(y, inverse);
  }
#endif
  return hn::Div(y, x);
}

// log(1 + e) for 0 <= e <= 1, to 1e-7 of itself.
#if HWY_TARGET == HWY_AVX3
template <class D, class V>
HWY_INLINE V log1p_of_fraction(D d, V e) {
  alignas(64) static constexpr float kInverses[16] = {
      1.0f,         0.941176474f, 0.888888896f, 0.842105269f, 0.800000012f, 0.761904776f,
      0.727272749f, 0.695652187f, 0.666666687f, 0.639999986f, 0.615384638f, 0.592592597f,
      0.571428597f, 0.551724136f, 0.533333361f, 0.516129017f};
  alignas(64) static constexpr float kLogs[16] = {
      0.0f,         0.0606246218f, 0.117783032f, 0.171850264f, 0.223143548f, 0.271933705f,
      0.318453729f, 0.362905502f,  0.405465096f, 0.446287096f, 0.485507816f, 0.523248136f,
      0.559615791f, 0.594707131f,  0.628608644f, 0.66139847f};
  // By way of the nearest j/16 up to 15/16: log(1 + j/16) + log(1 + r), r = (e - j/16) / (1 + j/16)
  // within 1/31.
  const hn::RebindToUnsigned<D> du;
  const auto shift = hn::Set(d, 786432.0f);
  const auto last = hn::BitCast(du, hn::Set(d, 786432.0f + 15.0f / 16));
  const auto j = hn::Min(last, hn::BitCast(du, hn::Add(e, shift)));
  const auto r = hn::Mul(hn::Sub(e, hn::Sub(hn::BitCast(d, j), shift)), look_up(kInverses, j));
  auto p = hn::MulAdd(r, hn::Set(d, -0.25018444f), hn::Set(d, 0.333505857f));
  p = hn::MulAdd(p, r, hn::Set(d, -0.49999997f));
  return hn::Add(look_up(kLogs, j), hn::MulAdd(p, hn::Mul(r, r), r));
}
#else
template <class D, class V>
HWY_INLINE V log1p_of_fraction(D d, V e) {
  auto p = hn::MulAdd(e, hn::Set(d, 0.005232694f), hn::Set(d, -0.029505238f));
  p = hn::MulAdd(p, e, hn::Set(d, 0.07822595f));
  p = hn::MulAdd(p, e, hn::Set(d, -0.13663246f));
  p = hn::MulAdd(p, e, hn::Set(d, 0.19106007f));
  p = hn::MulAdd(p, e, hn::Set(d, -0.24842982f));
  p = hn::MulAdd(p, e, hn::Set(d, 0.33319098f));
  p = hn::MulAdd(p, e, hn::Set(d, -0.49999493f));
  return hn::Mul(e, hn::MulAdd(p, e, hn::Set(d, 1.0f)));
}
#endif
#endif  // GDN_SIMD_FUSED

// exp(x) for x up to 80. Highway's Exp turns a NaN into 0; a kernel must hand it on, or a diverged
// model looks healthy. Far above 80 it may return garbage instead of infinity, so callers keep
// their arguments small. Results below the normal range may be 0.
template <class D, class V>
HWY_INLINE V exp_of(D d, V x) {
#if HWY_TARGET == HWY_AVX3
  if constexpr (sizeof(hn::TFromD<D>) == 4) {
    // 2^(k/16) e^r with |r| <= ln(2)/32, and e^r by a polynomial of degree 3. Min and Max return
    // their second operand where one is NaN.
    x = hn::Min(hn::Set(d, kExpInfinite), hn::Max(hn::Set(d, kExpZero), x));
    const auto shift = hn::Set(d, 12582912.0f / kPowerSteps);
    const auto shifted = hn::MulAdd(x, hn::Set(d, 1.44269504f), shift);
    const auto n = hn::Sub(shifted, shift);
    auto r = hn::NegMulAdd(n, hn::Set(d, 0.693359375f), x);  // ln(2) in two parts
    r = hn::NegMulAdd(n, hn::Set(d, -2.12194440e-4f), r);
    auto p = hn::MulAdd(r, hn::Set(d, 0.166660733f), hn::Set(d, 0.500016228f));
    p = hn::MulAdd(p, r, hn::Set(d, 1.0f));
    return hn::Mul(hn::MulAdd(p, r, hn::Set(d, 1.0f)), power_of(d, shifted));
  }
#endif
  return hn::IfThenElse(hn::IsNaN(x), x, hn::Exp(d, x));
}

// Results below the normal range may be 0.
template <Precision kPrecision = Precision::kFull, class D, class V>
HWY_INLINE V sigmoid(D d, V x) {
  const auto one = hn::Set(d, 1);
#if GDN_SIMD_FUSED
  if constexpr (sizeof(hn::TFromD<D>) == 4) {
    return quotient<kPrecision>(one, one_plus_exp_of_negative<kPrecision>(d, x));
  }
#endif
  // By exp(-|x|), which cannot overflow and keeps the relative precision of small results.
  const auto e = exp_of(d, hn::Neg(hn::Abs(x)));
  return hn::Div(hn::IfThenElse(hn::Lt(x, hn::Zero(d)), e, one), hn::Add(one, e));
}

// x sigmoid(x)
template <Precision kPrecision = Precision::kFull, class D, class V>
HWY_INLINE V silu(D d, V x) {
#if GDN_SIMD_FUSED
  if constexpr (sizeof(hn::TFromD<D>) == 4) {
    return quotient<kPrecision>(x, one_plus_exp_of_negative<kPrecision>(d, x));
  }
#endif
  return hn::Mul(x, sigmoid(d, x));
}

// sigmoid(x) and 1 - sigmoid(x); coarse ones of an x below the smallest are those of that.
inline constexpr float kSmallestForRest = -87.0f;
template <class V>
struct SigmoidParts {
  V s, rest;
};
template <Precision kPrecision, class D, class V>
HWY_INLINE SigmoidParts<V> sigmoid_parts(D d, V x) {
  const auto one = hn::Set(d, 1);
#if HWY_TARGET == HWY_AVX3
  if constexpr (kPrecision == Precision::kBf16) {
    // A coarse sigmoid cannot be taken from 1.
    x = hn::Min(hn::Set(d, -kSmallestForRest), hn::Max(hn::Set(d, kSmallestForRest), x));
    const auto parts = exp_parts<-1, kPrecision>(d, x);
    const auto e = hn::Mul(parts.fraction, parts.power);
    const auto s = quotient<kPrecision>(one, hn::Add(one, e));
    return {s, hn::Mul(s, e)};
  }
#endif
  const auto s = sigmoid(d, x);
  return {s, hn::Sub(one, s)};
}

// What an activation makes of x, and its derivative there.
template <class V>
struct Activation {
  V value, slope;
};

template <Precision kPrecision = Precision::kFull, class D, class V>
HWY_INLINE Activation<V> sigmoid_and_slope(D d, V x) {
  const auto parts = sigmoid_parts<kPrecision>(d, x);
  return {parts.s, hn::Mul(parts.s, parts.rest)};
}

template <Precision kPrecision = Precision::kFull, class D, class V>
HWY_INLINE Activation<V> silu_and_slope(D d, V x) {
  const auto parts = sigmoid_parts<kPrecision>(d, x);
  if constexpr (kPrecision == Precision::kBf16) x = hn::Max(hn::Set(d, kSmallestForRest), x);
  const auto value = hn::Mul(x, parts.s);
  return {value, hn::MulAdd(value, parts.rest, parts.s)};
}

// log(1 + exp(x)), which is x itself above 20, and its derivative, the sigmoid.
template <class D, class V>
HWY_INLINE Activation<V> softplus_and_slope(D d, V x) {
#if GDN_SIMD_FUSED
  if constexpr (sizeof(hn::TFromD<D>) == 4) {
    const auto one = hn::Set(d, 1), zero = hn::Zero(d);
    const auto parts = exp_parts<1>(d, hn::Max(hn::Set(d, kExpZero), hn::Neg(hn::Abs(x))));
    const auto e = hn::Mul(parts.fraction, parts.power);
    return {hn::Add(hn::Max(zero, x), log1p_of_fraction(d, e)),
            hn::Div(hn::IfThenElse(hn::Lt(x, zero), e, one), hn::Add(one, e))};
  }
#endif
  const auto limit = hn::Set(d, 20);
  const auto above = hn::Gt(x, limit);
  const auto soft = hn::Log1p(d, exp_of(d, hn::Min(x, limit)));
  return {hn::IfThenElse(hn::Or(above, hn::IsNaN(x)), x, soft),
          hn::IfThenElse(above, hn::Set(d, 1), sigmoid(d, x))};
}

template <class D, class V>
HWY_INLINE V softplus(D d, V x) {
  return softplus_and_slope(d, x).value;
}

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();

#undef GDN_SIMD_FUSED

#endif  // toggling include guard
