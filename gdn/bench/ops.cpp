// SPDX-License-Identifier: Apache-2.0
// gdn bench ops: every kernel against what the machine allows and against its composition from
// torch's own operations.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/conv1d.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/pad.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <array>
#include <functional>
#include <iostream>

#include "gdn/base/check.h"
#include "gdn/bench/ceilings.h"
#include "gdn/bench/report.h"
#include "gdn/bench/small_kernels.h"
#include "gdn/kernels/simd/pairs.h"
#include "gdn/ops/cross_entropy.h"
#include "gdn/ops/delta_rule.h"
#include "gdn/ops/gate.h"
#include "gdn/ops/linear.h"
#include "gdn/ops/norm.h"
#include "gdn/ops/short_conv.h"
#include "gdn/ops/swiglu.h"

namespace gdn::bench {
namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;

const char* name_of(at::ScalarType dtype) {
  return dtype == at::kFloat ? "fp32" : dtype == at::kBFloat16 ? "bf16" : "fp64";
}

// The delta rule.

struct DeltaShape {
  int64_t B, T, H, HV, K, V;
  bool channel_gate = false;
  at::ScalarType dtype = at::kFloat;

  std::string text() const {
    std::string s = str_cat(channel_gate ? "KDA" : "GDN", " ", name_of(dtype), " T=", T, " H=", H);
    if (HV != H) s += str_cat(" HV=", HV);
    if (B != 1) s += str_cat(" B=", B);
    if (K != 128 || V != 128) s += str_cat(" K=", K, " V=", V);
    return s;
  }
  // Three products with the state and the triangles of a chunk of 32.
  double flops() const {
    return static_cast<double>(B * T * HV) *
           (6.0 * static_cast<double>(K * V) + 4.0 * 32 * static_cast<double>(std::max(K, V)));
  }
};

Tensors delta_inputs(const DeltaShape& s, bool grad) {
  const auto unit = [](Tensor x) { return x / x.norm(2, {-1}, /*keepdim=*/true); };
  const auto g_sizes = s.channel_gate ? std::vector<int64_t>{s.B, s.T, s.HV, s.K}
                                      : std::vector<int64_t>{s.B, s.T, s.HV};
  Tensors inputs = {unit(at::randn({s.B, s.T, s.H, s.K})).to(s.dtype),
                    unit(at::randn({s.B, s.T, s.H, s.K})).to(s.dtype),
                    at::randn({s.B, s.T, s.HV, s.V}).to(s.dtype), at::rand(g_sizes) * -0.1,
                    at::rand({s.B, s.T, s.HV})};
  for (Tensor& t : inputs) t.set_requires_grad(grad);
  return inputs;
}

Tensor delta_forward(const Tensors& x) {
  return std::get<0>(ops::delta_rule(x[0], x[1], x[2], x[3], x[4], {}, {}, {}, {}, {},
                                     /*output_final_state=*/false, "key", "chunk",
                                     /*chunk_size=*/0, /*save=*/false));
}

void bench_delta(Report& report, Ceilings& ceilings, const Options& options, int threads,
                 const DeltaShape& shape) {
  const std::string forward = "forward " + shape.text(), both = "forward+backward " + shape.text();
  if (!report.wanted(forward) && !report.wanted(both)) return;
  const Tensors plain = delta_inputs(shape, false), wanted = delta_inputs(shape, true);
  const Tensor d_o = at::randn({shape.B, shape.T, shape.HV, shape.V}).to(shape.dtype);
  const std::vector<double> seconds =
      median_seconds(std::vector<std::function<void()>>{
                         [&] {
                           const c10::NoGradGuard no_grad;
                           delta_forward(plain);
                         },
                         [&] { torch::autograd::grad({delta_forward(wanted)}, wanted, {d_o}); }},
                     options.seconds);
  const double tokens = static_cast<double>(shape.B * shape.T);
  Row row{forward, threads, seconds[0], 1e-9 * shape.flops() / seconds[0], "GFLOP/s"};
  row.ceiling = ceilings.products(shape.dtype == at::kBFloat16);
  row.extra = {{"tok/s", tokens / seconds[0]}};
  report.add(row);
  row = Row(both, threads, seconds[1]);
  row.extra = {{"tok/s", tokens / seconds[1]}, {"of forward", seconds[1] / seconds[0]}};
  report.add(row);
}

// Forward only: what backward keeps of so many tokens would not fit everywhere.
void bench_long(Report& report, Ceilings& ceilings, const Options& options, int threads,
                const DeltaShape& shape) {
  const std::string name = "forward " + shape.text();
  if (!report.wanted(name)) return;
  const c10::NoGradGuard no_grad;
  const Tensors x = delta_inputs(shape, false);
  const double seconds = median_seconds([&] { delta_forward(x); }, options.seconds);
  Row row(name, threads, seconds, 1e-9 * shape.flops() / seconds, "GFLOP/s");
  row.ceiling = ceilings.fma();
  row.extra = {{"tok/s", static_cast<double>(shape.T) / seconds}};
  report.add(row);
}

void bench_step(Report& report, Ceilings& ceilings, const Options& options, int threads, int64_t B,
                int64_t H) {
  constexpr int64_t K = 128, V = 128;
  const std::string name = str_cat("decode step fp32 B=", B, " H=", H);
  if (!report.wanted(name)) return;
  const c10::NoGradGuard no_grad;
  const DeltaShape shape{B, 1, H, H, K, V};
  const Tensors x = delta_inputs(shape, false);
  const auto token = [](const Tensor& t) { return t.select(1, 0); };
  Tensor state = at::zeros({B, H, K, V});
  const Tensor slots = at::arange(B, at::kLong).flip(0);
  const double seconds = median_seconds(
      [&] {
        ops::delta_rule_step_(token(x[0]), token(x[1]), token(x[2]), token(x[3]), token(x[4]), {},
                              {}, state, slots, {}, "key");
      },
      options.seconds / 2);
  const int64_t bytes = static_cast<int64_t>(state.nbytes());
  Row row{name, threads, seconds, 2e-9 * static_cast<double>(bytes) / seconds, "GB/s"};
  row.ceiling = ceilings.rate(Access::kReadModifyWrite, bytes);
  report.add(row);
}

// Products with weights.

void bench_linear(Report& report, Ceilings& ceilings, const Options& options, int threads,
                  at::ScalarType dtype, int64_t rows, int64_t in, int64_t out) {
  const std::string name = str_cat("linear ", name_of(dtype), " ", rows, "x", in, " to ", out);
  if (!report.wanted(name + " forward") && !report.wanted(name + " backward")) return;
  const Tensor x = at::randn({rows, in}).to(dtype).set_requires_grad(true),
               w = at::randn({out, in}).to(dtype).set_requires_grad(true),
               dy = at::randn({rows, out}).to(dtype);
  const double flops = 2.0 * static_cast<double>(rows * in * out);
  const double ceiling = ceilings.products(dtype == at::kBFloat16);
  const auto add = [&](const std::string& what, const std::vector<double>& seconds, double work) {
    Row row(name + what, threads, seconds[0], 1e-9 * work / seconds[0], "GFLOP/s");
    row.ceiling = ceiling;
    row.extra = {{"torch/ours", seconds[1] / seconds[0]}};
    report.add(row);
  };
  const auto without_grad = [](const auto& f) {
    const c10::NoGradGuard no_grad;
    f();
  };
  using Functions = std::vector<std::function<void()>>;
  add(" forward",
      median_seconds(Functions{[&] { without_grad([&] { ops::linear(x, w); }); },
                               [&] { without_grad([&] { at::linear(x, w); }); }},
                     options.seconds / 2),
      flops);
  const Tensor ours = ops::linear(x, w), torch = at::linear(x, w);
  const auto backward = [&](const Tensor& y) {
    torch::autograd::grad({y}, {x, w}, {dy}, /*retain_graph=*/true);
  };
  add(" backward",
      median_seconds(Functions{[&] { backward(ours); }, [&] { backward(torch); }},
                     options.seconds / 2),
      2 * flops);
}

// One token by weights [out,in], one after the other of many that take `bytes` in all: what
// decoding spends its time on.
void bench_few_rows(Report& report, Ceilings& ceilings, const Options& options, int threads,
                    at::ScalarType dtype, int64_t in, int64_t out, int64_t bytes) {
  const std::string name = str_cat("linear ", name_of(dtype), " 1x", in, " to ", out, ", ",
                                   bytes >> 20, " MiB of weights");
  if (!report.wanted(name)) return;
  const c10::NoGradGuard no_grad;
  const Tensor x = at::randn({1, in}).to(dtype);
  const int64_t each = in * out * static_cast<int64_t>(c10::elementSize(dtype));
  const Tensor weights = at::ones({bytes / each, out, in}, x.options());
  Tensors each_weight;
  for (int64_t i = 0; i < weights.size(0); ++i) each_weight.push_back(weights[i]);
  const auto all = [&](const auto& product) {
    for (const Tensor& w : each_weight) product(w);
  };
  const std::vector<double> seconds = median_seconds(
      std::vector<std::function<void()>>{[&] {
                                           all([&](const Tensor& w) {
                                             ops::few_rows(x, std::array{ops::Projection{w, {}}});
                                           });
                                         },
                                         [&] { all([&](const Tensor& w) { at::linear(x, w); }); }},
      options.seconds / 2, /*warm=*/true);
  Row row(name, threads, seconds[0], 1e-9 * static_cast<double>(weights.nbytes()) / seconds[0],
          "GB/s");
  row.ceiling = ceilings.rate(Access::kRead, static_cast<int64_t>(weights.nbytes()));
  row.extra = {{"torch/ours", seconds[1] / seconds[0]}};
  report.add(row);
}

// The small kernels.

// One kernel: ours and torch's composition of the same, and what they have to do at least.
struct Small {
  std::string name;
  SmallKernel kernel;
  Tensors inputs;         // all differentiable ones first
  size_t differentiable;  // how many
  std::function<Tensor(const Tensors&)> ours, torch;
  // Bytes per call that must come from and go to memory, and exponentials.
  int64_t read, written, read_backward, written_backward;
  double exps, exps_backward;
  // What occupies the multipliers, per call: multiplications and multiply-adds, those of
  // exponentials and logarithms included, comparisons, and divisions as two.
  double products, products_backward;
};

void bench_small(Report& report, Ceilings& ceilings, const Options& options, int threads,
                 const Small& small) {
  if (!report.wanted(small.name + " forward") && !report.wanted(small.name + " backward")) return;
  Tensors inputs = small.inputs;
  const auto set_grad = [&](bool on) {
    for (size_t i = 0; i < small.differentiable; ++i) inputs[i].set_requires_grad(on);
  };
  const SmallKernelTimes in_cache = in_l1(
      small.kernel, inputs[0].scalar_type() == at::kFloat ? DType::kF32 : DType::kBF16, threads);
  const double per_thread = static_cast<double>(inputs[0].numel()) / threads;
  const auto add = [&](const std::string& what, double seconds, double torch_seconds, int64_t read,
                       int64_t written, double exps, double products, double per_element) {
    const double memory = ceilings.memory_seconds(read, written);
    const double exp = 1e-9 * exps / ceilings.exp(), least = std::max(memory, exp);
    const double multipliers = 2e-9 * products / ceilings.fma(), own = per_element * per_thread;
    const double bytes = 1e-9 * static_cast<double>(read + written);
    Row row{small.name + what, threads, seconds, bytes / seconds, "GB/s"};
    row.ceiling = bytes / least;
    row.extra = {{"torch/ours", torch_seconds / seconds},
                 {"bound by", memory >= least ? "memory" : "exp"},
                 {"of memory or multipliers", std::max(memory, multipliers) / seconds},
                 {"of memory or own", std::max(memory, own) / seconds},
                 {"in L1 ms", 1e3 * own}};
    report.add(row);
  };
  set_grad(false);
  const std::vector<double> forward = median_seconds(
      std::vector<std::function<void()>>{[&] { small.ours(inputs); }, [&] { small.torch(inputs); }},
      options.seconds, /*warm=*/true);
  add(" forward", forward[0], forward[1], small.read, small.written, small.exps, small.products,
      in_cache.forward);
  set_grad(true);
  const Tensors wanted(inputs.begin(), inputs.begin() + static_cast<long>(small.differentiable));
  const Tensor ours = small.ours(inputs), torch = small.torch(inputs);
  const Tensor dy = at::randn(ours.sizes()).to(ours.scalar_type());
  const auto backward = [&](const Tensor& y) {
    torch::autograd::grad({y}, wanted, {dy}, /*retain_graph=*/true);
  };
  const std::vector<double> back = median_seconds(
      std::vector<std::function<void()>>{[&] { backward(ours); }, [&] { backward(torch); }},
      options.seconds, /*warm=*/true);
  add(" backward", back[0], back[1], small.read_backward, small.written_backward,
      small.exps_backward, small.products_backward, in_cache.backward);
}

std::vector<Small> small_kernels(at::ScalarType dtype) {
  constexpr int64_t kTokens = 4096, kWidth = 2048, kHead = 128, kVocab = 8192, kRows = 1024;
  const int64_t n = kTokens * kWidth, bytes = n * static_cast<int64_t>(c10::elementSize(dtype));
  const auto elements = static_cast<double>(n);
  const std::string suffix = std::string(" ") + name_of(dtype);
  // A SiLU takes 8 products for each element, or 6 to what bf16 needs; with its derivative 10 or 8.
  const double saved =
      dtype == at::kBFloat16 && find_pair_kernels("avx512") != nullptr ? 2 * elements : 0;
  const auto normal = [&](at::IntArrayRef sizes) { return at::randn(sizes).to(dtype); };
  const Tensor x = normal({1, kTokens, kWidth}), z = normal({1, kTokens, kWidth});
  const std::vector<int64_t> heads = {1, kTokens, kWidth / kHead, kHead};
  const auto rms = [](const Tensor& t, const Tensor& w) {
    const Tensor f = t.to(at::kFloat);
    return (f * at::rsqrt((f * f).mean(-1, true) + 1e-5) * w).to(t.scalar_type());
  };
  std::vector<Small> list;
  list.push_back({"short conv W=4 + SiLU" + suffix,
                  SmallKernel::kShortConv,
                  {x, normal({kWidth, 4}).to(at::kFloat)},
                  2,
                  [](const Tensors& t) {
                    return std::get<0>(ops::causal_conv1d(t[0], t[1], {}, {}, {}, false, "silu"));
                  },
                  [](const Tensors& t) {
                    const Tensor padded = at::pad(t[0].transpose(1, 2), {3, 0});
                    const Tensor w = t[1].unsqueeze(1).to(t[0].scalar_type());
                    const int64_t one = 1, none = 0;
                    return at::silu(at::conv1d(padded, w, {}, at::IntArrayRef(one),
                                               at::IntArrayRef(none), at::IntArrayRef(one), kWidth))
                        .transpose(1, 2)
                        .contiguous();
                  },
                  bytes,
                  bytes,
                  2 * bytes,
                  bytes,
                  elements,
                  elements,
                  12 * elements - saved,
                  23 * elements});
  list.push_back({"RMS norm" + suffix,
                  SmallKernel::kRmsNorm,
                  {x, at::ones({kWidth})},
                  2,
                  [](const Tensors& t) { return ops::rms_norm(t[0], t[1]); },
                  [rms](const Tensors& t) { return rms(t[0], t[1]); },
                  bytes,
                  bytes,
                  2 * bytes,
                  bytes,
                  0,
                  0,
                  3 * elements,
                  7 * elements});
  list.push_back({"gated RMS norm of heads" + suffix,
                  SmallKernel::kGatedNorm,
                  {x.view(heads), at::ones({kHead}), z.view(heads)},
                  3,
                  [](const Tensors& t) { return ops::rms_norm_gated(t[0], t[1], t[2]); },
                  [rms](const Tensors& t) { return rms(t[0], t[1]) * at::silu(t[2]); },
                  2 * bytes,
                  bytes,
                  3 * bytes,
                  2 * bytes,
                  elements,
                  elements,
                  12 * elements - saved,
                  22 * elements});
  list.push_back(
      {"L2 norm of heads" + suffix,
       SmallKernel::kL2Norm,
       {x.view(heads)},
       1,
       [](const Tensors& t) { return ops::l2norm(t[0]); },
       [](const Tensors& t) { return t[0] * at::rsqrt((t[0] * t[0]).sum(-1, true) + 1e-6); },
       bytes,
       bytes,
       2 * bytes,
       bytes,
       0,
       0,
       2 * elements,
       4 * elements});
  list.push_back({"SwiGLU" + suffix,
                  SmallKernel::kSwiglu,
                  {x, z},
                  2,
                  [](const Tensors& t) { return ops::swiglu(t[0], t[1]); },
                  [](const Tensors& t) { return at::silu(t[0]) * t[1]; },
                  2 * bytes,
                  bytes,
                  3 * bytes,
                  2 * bytes,
                  elements,
                  elements,
                  9 * elements - saved,
                  13 * elements - saved});
  // The gates' results are always fp32; softplus takes a logarithm beside the exponential.
  const int64_t gate_bytes = n * 4;
  list.push_back({"channel gate" + suffix,
                  SmallKernel::kGate,
                  {x.view(heads), at::zeros({kWidth / kHead}), at::zeros({kWidth})},
                  3,
                  [](const Tensors& t) { return ops::kda_gate(t[0], t[1], t[2]); },
                  [](const Tensors& t) {
                    const Tensor bias = t[2].view({kWidth / kHead, kHead});
                    return t[1].exp().neg().unsqueeze(-1) *
                           at::softplus(t[0].to(at::kFloat) + bias);
                  },
                  bytes,
                  gate_bytes,
                  bytes + gate_bytes,
                  bytes,
                  2 * elements,
                  3 * elements,
                  12 * elements,
                  17 * elements});
  const int64_t logits = kRows * kVocab,
                logit_bytes = logits * static_cast<int64_t>(c10::elementSize(dtype));
  list.push_back({"cross-entropy of 8192" + suffix,
                  SmallKernel::kCrossEntropy,
                  {normal({kRows, kVocab}), at::randint(kVocab, {kRows}, at::kLong)},
                  1,
                  [](const Tensors& t) { return std::get<0>(ops::cross_entropy(t[0], t[1])); },
                  [](const Tensors& t) {
                    return at::cross_entropy_loss(t[0], t[1], {}, /*reduction: none*/ 0);
                  },
                  logit_bytes,
                  0,
                  logit_bytes,
                  logit_bytes,
                  static_cast<double>(logits),
                  static_cast<double>(logits),
                  7 * static_cast<double>(logits),
                  8 * static_cast<double>(logits)});
  return list;
}

}  // namespace

int run_ops(const Options& options) {
  Report report("ops", options, std::cout);
  const bool fp32 = options.dtype != "bf16", bf16 = options.dtype != "fp32";
  for (const int64_t n : options.threads) {
    const int threads = static_cast<int>(n);
    report.use_threads(n);
    Ceilings ceilings(threads);
    report.heading(
        "delta rule, K=V=128 unless said; ceiling: multiply-adds of fp32, products of bf16");
    std::vector<DeltaShape> shapes;
    if (fp32) {
      for (const int64_t T : {512, 4096}) {
        for (const int64_t H : {16, 32}) shapes.push_back({1, T, H, H, 128, 128});
      }
      for (const int64_t T : {512, 4096}) shapes.push_back({1, T, 16, 16, 128, 128, true});
      for (const int64_t T : {2048, 8192, 16384}) shapes.push_back({1, T, 16, 16, 128, 128});
    }
    if (bf16) shapes.push_back({1, 512, 16, 16, 128, 128, false, at::kBFloat16});
    for (const DeltaShape& shape : shapes) bench_delta(report, ceilings, options, threads, shape);
    if (fp32) bench_long(report, ceilings, options, threads, {1, 65536, 16, 16, 128, 128});
    if (fp32) {
      report.heading("decode step in place; ceiling: read and write in place of the states");
      for (const auto& [B, H] :
           {std::pair<int, int>{1, 16}, {1, 32}, {4, 16}, {16, 16}, {16, 32}}) {
        bench_step(report, ceilings, options, threads, B, H);
      }
    }
    report.heading("products with weights; ceiling: multiply-adds of fp32, products of bf16");
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      if (!(dtype == at::kFloat ? fp32 : bf16)) continue;
      for (const auto& [rows, in, out] : {std::tuple<int, int, int>{4096, 256, 256},
                                          {4096, 256, 768},
                                          {4096, 768, 256},
                                          {2048, 2048, 2048}}) {
        bench_linear(report, ceilings, options, threads, dtype, rows, in, out);
      }
    }
    report.heading("products of one token with weights in turn; ceiling: reading them");
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      if (!(dtype == at::kFloat ? fp32 : bf16)) continue;
      for (const auto& [in, out] : {std::pair<int, int>{256, 768}, {768, 256}, {2048, 2048}}) {
        for (const int64_t mib : {16, 256}) {
          bench_few_rows(report, ceilings, options, threads, dtype, in, out, mib << 20);
        }
      }
    }
    report.heading("small kernels; ceiling: memory or exp, whichever takes longer");
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      if (!(dtype == at::kFloat ? fp32 : bf16)) continue;
      for (const Small& small : small_kernels(dtype)) {
        bench_small(report, ceilings, options, threads, small);
      }
    }
  }
  report.finish();
  return 0;
}

}  // namespace gdn::bench
