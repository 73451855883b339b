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
#include "gdn/kernels/simd/several-inl.h"
#include "hwy/cache_control.h"
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
// is stored kSteps steps (1 or 2) late: a load waits for an earlier store whose address has the
// same 12 lower bits, and large tensors that malloc cuts from one piece of memory lie whole pages
// and a line or two apart, so that what the next steps load from an input would meet the last
// stores to the output behind it.
template <int kSteps = 2, class Make, class Store>
HWY_INLINE int64_t store_late(int64_t n, int64_t step, const Make& make, const Store& store) {
  const int64_t end = n - n % step;
  if (end < kSteps * step) {
    if (end > 0) store(0, make(0));
    return end;
  }
  if constexpr (kSteps == 1) {
    auto last = make(0);
    for (int64_t i = step; i < end; i += step) {
      const auto now = make(i);
      store(i - step, last);
      last = now;
    }
    store(end - step, last);
  } else {
    auto before = make(0), last = make(step);
    for (int64_t i = 2 * step; i < end; i += step) {
      const auto now = make(i);
      store(i - 2 * step, before);
      before = last;
      last = now;
    }
    store(end - 2 * step, before);
    store(end - step, last);
  }
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

// Calls store(d, i, make(d, kN, i)) for kN vectors from i on at a time, then for single ones, then
// for each index that is left with a tag of one lane; kN comes as std::integral_constant. What is
// made of kN vectors is stored kSteps steps late, so registers hold (kSteps + 1) kN results.
template <typename A, int kN, int kSteps = 1, class Make, class Store>
HWY_INLINE void map_several(int64_t n, const Make& make, const Store& store) {
  const hn::ScalableTag<A> d;
  const hn::CappedTag<A, 1> d1;
  const std::integral_constant<int, kN> together;
  const std::integral_constant<int, 1> single;
  const int64_t lanes = hn::Lanes(d);
  int64_t i = store_late<kSteps>(
      n, kN * lanes, [&](int64_t i) GDN_INLINE_ATTR { return make(d, together, i); },
      [&](int64_t i, const auto& made) GDN_INLINE_ATTR { store(d, i, made); });
  for (; i + lanes <= n; i += lanes) store(d, i, make(d, single, i));
  for (; i < n; ++i) store(d1, i, make(d1, single, i));
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
        n - begin, whole.size(), [&](int64_t i) GDN_INLINE_ATTR { return make(whole, begin + i); },
        [&](int64_t i, const auto& results) GDN_INLINE_ATTR { store(whole, begin + i, results); });
  }
  for_bundles<T>(
      done, n, [&](auto bundle, int64_t i) GDN_INLINE_ATTR { store(bundle, i, make(bundle, i)); });
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

}  // namespace HWY_NAMESPACE
}  // namespace gdn
HWY_AFTER_NAMESPACE();

#endif  // toggling include guard
