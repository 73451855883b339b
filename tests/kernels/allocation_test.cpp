// SPDX-License-Identifier: Apache-2.0
// How often kernels ask for memory: a decoding step never, a call on whole sequences a fixed number
// of times, however many tokens and heads they have.
#ifdef __has_feature
#define GDN_HAS_FEATURE(x) __has_feature(x)
#else
#define GDN_HAS_FEATURE(x) 0
#endif

// AddressSanitizer replaces operator new itself.
#if !defined(__SANITIZE_ADDRESS__) && !GDN_HAS_FEATURE(address_sanitizer)

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <functional>
#include <limits>
#include <new>

#include "gdn/base/parallel.h"
#include "gdn/kernels/attend_step.h"
#include "gdn/kernels/cross_entropy.h"
#include "gdn/kernels/gate.h"
#include "gdn/kernels/matvec.h"
#include "gdn/kernels/norm.h"
#include "gdn/kernels/short_conv.h"
#include "gdn/kernels/swiglu.h"
#include "tests/kernels/delta_rule_problem.h"
#include "tests/kernels/support.h"

namespace {

std::atomic<int64_t> allocations{0};

void* allocate(size_t bytes, size_t alignment) {
  ++allocations;
  void* p = std::aligned_alloc(alignment, (bytes + alignment) / alignment * alignment);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

}  // namespace

// The other forms of new and delete call these.
void* operator new(size_t bytes) { return allocate(bytes, alignof(std::max_align_t)); }
void* operator new(size_t bytes, std::align_val_t alignment) {
  return allocate(bytes, static_cast<size_t>(alignment));
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { std::free(p); }

namespace gdn {
namespace {

using delta_rule_test::Buffer;

// Of a call: the least of several, because a thread may join, and get its scratch memory, late.
int64_t allocations_of(const std::function<void()>& call) {
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int i = 0; i < 20; ++i) {
    const int64_t before = allocations;
    call();
    least = std::min<int64_t>(least, allocations - before);
  }
  return least;
}

struct Sizes {
  DType dtype;
  int64_t tokens, heads;
};

// All kernels on one set of buffers; names with what each of them does.
class Calls {
 public:
  explicit Calls(const Sizes& sizes)
      : T(sizes.tokens),
        H(sizes.heads),
        C(kDim * H),
        dtype(sizes.dtype),
        rule(delta_rule_case(sizes)),
        results(rule.poisoned()),
        saved(Buffer::poisoned(rule.acc(), delta_rule_saved_size(rule.params))),
        x(testing::random_normal<float>(T * C, 1)),
        weight(testing::random_normal<float>(4 * C, 2)),
        rates(C, -1.0f),
        y(T * C),
        z(T * C),
        d_weight(4 * C),
        d_bias(4 * C),
        history(T * C * 4),
        targets(T, 1) {}

  using List = std::vector<std::pair<std::string, std::function<void()>>>;

  // Sequences of T tokens.
  List sequences() {
    delta_rule_chunk_forward(rule.params, outputs());
    List list = rows(T);
    const auto add = [&](const char* what, std::function<void()> call) {
      list.emplace_back(what, std::move(call));
    };
    add("delta_rule_chunk_forward", [this] { delta_rule_chunk_forward(rule.params, outputs()); });
    add("delta_rule_chunk_backward", [this] {
      DeltaRuleGrads grads;
      grads.d_o = rule.d_o.data();
      grads.d_final_state = rule.d_final.data();
      grads.dq = results.dq.data();
      grads.dk = results.dk.data();
      grads.dv = results.dv.data();
      grads.dg = results.dg.data();
      grads.dbeta = results.dbeta.data();
      grads.d_initial_state = results.d_initial.data();
      delta_rule_chunk_backward(rule.params, saved.data(), grads);
    });
    add("delta_rule_recurrent_forward", [this] {
      delta_rule_recurrent_forward(rule.params,
                                   {results.o.data(), results.final_state.data(), nullptr});
    });
    add("short_conv_forward", [this] { short_conv_forward(conv(1, T), y.data(), history.data()); });
    add("short_conv_backward", [this] {
      ShortConvGrads grads;
      grads.dy = x.data();
      grads.dx = y.data();
      grads.dweight = d_weight.data();
      grads.dbias = d_bias.data();
      short_conv_backward(conv(1, T), grads);
    });
    add("norm_backward", [this] {
      norm_backward(norm(T), {x.data(), {}, y.data(), z.data(), d_weight.data()});
    });
    add("gate_backward", [this] {
      gate_backward(gate(T), {x.data(), y.data(), d_weight.data(), d_bias.data()});
    });
    add("swiglu_backward", [this] { swiglu_backward(swiglu(T), x.data(), y.data(), z.data()); });
    add("cross_entropy_backward",
        [this] { cross_entropy_backward(cross_entropy(T), d_weight.data(), x.data(), y.data()); });
    return list;
  }

  // One token of `sequences` sequences each, at most T.
  List steps(int64_t sequences) {
    List list = rows(sequences);
    const auto add = [&](const char* what, std::function<void()> call) {
      list.emplace_back(what, std::move(call));
    };
    add("delta_rule_step", [this, sequences] {
      DeltaRuleParams params = rule.params;
      params.num_sequences = params.total_tokens = sequences;
      delta_rule_step(params, {states.data(), T}, results.o.data());
    });
    add("short_conv_step", [this, sequences] {
      short_conv_step(conv(sequences, sequences), history.data(), T, nullptr, y.data());
    });
    add("attend_step", [this] {
      AttendStepParams p;
      p.B = 1;
      p.S = T;
      p.H = p.HK = H;
      p.K = p.V = kDim;
      p.dtype = dtype;
      p.q = p.k = p.v = x.data();
      p.k_stride = p.v_stride = C;
      p.k_batch = p.v_batch = T * C;
      attend_step(p, y.data());
    });
    add("matvec", [this] {
      const MatvecWeight w = {weight.data(), nullptr, 4, y.data(), 4};
      MatvecParams p;
      p.rows = 1;
      p.in = p.x_stride = C;
      p.dtype = dtype;
      p.x = x.data();
      p.weights = {&w, 1};
      matvec(p);
    });
    return list;
  }

 private:
  static constexpr int64_t kDim = 32;

  static delta_rule_test::Case delta_rule_case(const Sizes& sizes) {
    delta_rule_test::Case c;
    c.dtype = sizes.dtype;
    c.H = c.HV = sizes.heads;
    c.K = c.V = kDim;
    c.lengths = {sizes.tokens};
    c.chunk_size = 0;
    return c;
  }

  // What works on rows of tokens, in sequences and in steps.
  List rows(int64_t n) {
    return {{"norm_forward", [this, n] { norm_forward(norm(n), y.data()); }},
            {"gate_forward", [this, n] { gate_forward(gate(n), y.data()); }},
            {"beta_forward",
             [this, n] {
               BetaParams p;
               p.rows = n;
               p.dim = H;
               p.dtype = dtype;
               p.b = x.data();
               beta_forward(p, y.data());
             }},
            {"swiglu_forward", [this, n] { swiglu_forward(swiglu(n), y.data()); }},
            {"cross_entropy_forward",
             [this, n] { cross_entropy_forward(cross_entropy(n), y.data(), z.data()); }}};
  }

  DeltaRuleOutputs outputs() {
    return {results.o.data(), results.final_state.data(), saved.data()};
  }
  ShortConvParams conv(int64_t sequences, int64_t tokens) const {
    ShortConvParams p;
    p.num_sequences = sequences;
    p.total_tokens = tokens;
    p.channels = C;
    p.dtype = dtype;
    p.x = x.data();
    p.weight = weight.data();
    return p;
  }
  NormParams norm(int64_t n) const {
    NormParams p;
    p.rows = n;
    p.dim = C;
    p.dtype = dtype;
    p.x = p.gate = x.data();
    p.weight = weight.data();
    p.eps = 1e-6;
    return p;
  }
  GateParams gate(int64_t n) const {
    GateParams p;
    p.rows = n;
    p.heads = H;
    p.channels = kDim;
    p.dtype = dtype;
    p.a = x.data();
    p.A_log = rates.data();
    return p;
  }
  SwigluParams swiglu(int64_t n) const {
    SwigluParams p;
    p.rows = n;
    p.dim = C;
    p.dtype = dtype;
    p.gate = p.up = x.data();
    return p;
  }
  CrossEntropyParams cross_entropy(int64_t n) const {
    CrossEntropyParams p;
    p.rows = n;
    p.vocab = C;
    p.dtype = dtype;
    p.logits = x.data();
    p.targets = targets.data();
    return p;
  }

  const int64_t T, H, C;
  const DType dtype;
  delta_rule_test::Problem rule;
  delta_rule_test::Results results;
  Buffer saved;
  // For bf16 the same bytes, half of them used.
  std::vector<float> x, weight, rates, y, z, d_weight, d_bias, history;
  std::vector<float> states = std::vector<float>(T * H * kDim * kDim);
  std::vector<int64_t> targets;
};

class Allocations : public ::testing::TestWithParam<DType> {
 protected:
  void TearDown() override { set_num_threads(before_); }
  const int before_ = num_threads();
};

TEST_P(Allocations, StepsDoWithoutAny) {
  Calls calls({GetParam(), 300, 4});
  for (const int threads : {1, 2}) {
    set_num_threads(threads);
    for (const int64_t sequences : {1, 40}) {
      for (const auto& [name, call] : calls.steps(sequences)) {
        // Norms put their weight into the order of bf16 lanes: one row.
        const int64_t most = name == "norm_forward" && GetParam() == DType::kBF16 ? 1 : 0;
        EXPECT_LE(allocations_of(call), most) << name << " of " << sequences;
      }
    }
  }
}

// One thread: each of several has some of its own.
TEST_P(Allocations, SequencesNeedAFixedNumber) {
  set_num_threads(1);
  Calls small({GetParam(), 128, 2}), longer({GetParam(), 1024, 2}), wider({GetParam(), 128, 8});
  const auto base = small.sequences(), by_tokens = longer.sequences(), by_heads = wider.sequences();
  for (size_t i = 0; i < base.size(); ++i) {
    const int64_t count = allocations_of(base[i].second);
    EXPECT_LE(count, 5) << base[i].first;
    EXPECT_EQ(allocations_of(by_tokens[i].second), count) << base[i].first;
    EXPECT_EQ(allocations_of(by_heads[i].second), count) << base[i].first;
  }
}

INSTANTIATE_TEST_SUITE_P(Dtypes, Allocations, ::testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& info) {
                           return std::string(info.param == DType::kF32 ? "fp32" : "bf16");
                         });

}  // namespace
}  // namespace gdn

#endif
