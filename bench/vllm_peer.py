# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule of vLLM's kernels for CPUs, in bf16, for bench/peers.py.

vLLM is no dependency of gdn: unpack its source distribution beside gdn and name the folder. The one file with the
kernels is compiled there when it is first asked for (a minute; needs ninja and a compiler that knows -mamx-bf16):

    pip install setuptools-scm setuptools-rust ninja
    VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=0.33.0 pip download vllm==0.33.0 --no-deps --no-binary vllm \\
        --no-build-isolation
    tar xf vllm-0.33.0.tar.gz
    python bench/peers.py --only op --vllm vllm-0.33.0

The kernels ask for AVX512_BF16 and do without AMX: their products are torch's brgemm, which takes AMX where there is
one. They are compiled with the macros that vLLM's own build of them has on such CPUs, which all run its library for
AMX, and for this CPU besides (-O3 -march=native; vLLM's build is generic). Both sides get q, k, v and beta in bf16, g
and the state in fp32, and norm q and k themselves; vLLM always writes the final state, so gdn is asked for it too.
vLLM's step makes its gates from their logits, which is H exponentials more.
"""

import pathlib

import torch

# vLLM's header leaves out its vectors and torch's brgemm where the compiler is not told of AMX.
FLAGS = ("-O3", "-march=native", "-mamx-tile", "-mamx-bf16", "-fopenmp", "-DVLLM_CPU_EXTENSION", "-w")
EPS = 1e-5  # of the norms; fixed in vLLM's step

# The schemas are made from the signatures.
BINDING = """
#include <ATen/core/Tensor.h>
#include <torch/library.h>

using at::Tensor;
std::tuple<Tensor, Tensor> chunk_gated_delta_rule_cpu(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                      const Tensor&, const Tensor&, bool, const Tensor&, bool, bool,
                                                      const Tensor&, double);
Tensor fused_sigmoid_gating_delta_rule_update_cpu(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                  const Tensor&, const Tensor&, const Tensor&, Tensor&,
                                                  const Tensor&, const Tensor&, bool, double, double);

TORCH_LIBRARY(gdn_vllm_peer, m) {
  m.def("chunk", &chunk_gated_delta_rule_cpu);
  m.def("step", &fused_sigmoid_gating_delta_rule_update_cpu);
}
"""


def operators(folder):
    """The operators of the unpacked source distribution in `folder`, compiled into it if they are not yet."""
    from torch.utils import cpp_extension  # looks for compilers, so only here

    if not hasattr(torch.ops.gdn_vllm_peer, "chunk"):
        kernels = pathlib.Path(folder).resolve() / "csrc" / "cpu" / "sgl-kernels" / "fla.cpp"
        if not kernels.exists():
            raise SystemExit(f"peers.py: {kernels} is missing; bench/vllm_peer.py says how to get it")
        if not torch.cpu._is_avx512_bf16_supported():
            raise SystemExit("peers.py: vLLM's kernels need a CPU with AVX512_BF16")
        build = pathlib.Path(folder).resolve() / "gdn-build"
        build.mkdir(exist_ok=True)
        binding = build / "binding.cpp"
        if not binding.exists() or binding.read_text() != BINDING:
            binding.write_text(BINDING)
        sources = [str(kernels), str(binding)]
        cpp_extension.load(
            "gdn_vllm_peer",
            sources,
            extra_cflags=list(FLAGS),
            extra_ldflags=["-fopenmp"],
            extra_include_paths=[str(kernels.parents[2])],
            build_directory=str(build),
            is_python_module=False,
        )
    return torch.ops.gdn_vllm_peer


def forward(folder, q, k, v, g, beta):
    """A function that returns o [1,T,H,V] and keeps the final state; inputs [1,T,H,..] in fp32, q and k not normed."""
    chunk = operators(folder).chunk.default
    _, T, H, K = q.shape
    inputs = [*(x.bfloat16() for x in (q, k, v)), g, beta.bfloat16()]
    state = torch.zeros(1, H, K, K)
    lengths, slots = torch.tensor([0, T], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)

    @torch.no_grad()
    def run():
        state.zero_()  # as vLLM does it for a sequence that is new in its slot
        return chunk(*inputs, state, True, lengths, False, True, slots, EPS)[0]

    return run


def step(folder, q, k, v, g, beta):
    """The same for steps of decoding, each from the state that the one before left; T is 1."""
    update = operators(folder).step.default
    _, T, H, K = q.shape
    tokens = [x.bfloat16() for x in (q, k, v)]
    gates = [x.reshape(1, H).bfloat16() for x in (g.neg().expm1().log(), beta.logit())]
    log_rate, bias = torch.zeros(H), torch.zeros(H, dtype=torch.bfloat16)  # g = -exp(log_rate) softplus(gate + bias)
    state = torch.zeros(1, H, K, K)
    lengths, slots = torch.tensor([0, T], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)

    @torch.no_grad()
    def run():
        return update(log_rate, bias, *tokens, *gates, state, slots, lengths, True, 1.0, 20.0)

    return run
