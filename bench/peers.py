#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times gdn's gated delta rule against the torch code that transformers falls back to on a CPU.

Both run interleaved in one process, pinned to the same threads, on the same random inputs, and the outputs are
compared first. Prints medians and ratios; needs `pip install transformers` beside torch (not a dependency of gdn).

    python bench/peers.py                              # B=1, H=16, K=V=128, T=512, all three modes
    python bench/peers.py --seq-len 512 4096 --threads 1 2 --json results.json
"""

import argparse
import inspect
import json
import os
import pathlib
import platform
import statistics
import sys
import time

# One malloc arena that keeps its pages: page faults would otherwise dominate the fallback's time, which is not
# what is to be compared.
TUNABLES = (
    "glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456"
)
if os.environ.get("GLIBC_TUNABLES") != TUNABLES:
    os.environ["GLIBC_TUNABLES"] = TUNABLES
    os.execv(sys.executable, [sys.executable, *sys.argv])

import torch  # noqa: E402  (after the restart above)
import transformers  # noqa: E402
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "python"))
import gdn  # noqa: E402, F401  (registers torch.ops.gdn)

FALLBACK_CHUNK = inspect.unwrap(qwen3_next.torch_chunk_gated_delta_rule)
FALLBACK_STEP = inspect.unwrap(qwen3_next.torch_recurrent_gated_delta_rule)


def make_inputs(tokens, heads, head_dim, grad):
    """q, k [1,T,H,K], v [1,T,H,V], g and beta [1,T,H]; g is a mild decay as a trained model has it."""
    torch.manual_seed(0)
    shape = (1, tokens, heads, head_dim)
    q, k, v = (torch.randn(shape) for _ in range(3))
    g = -torch.rand(shape[:3]) * 0.1
    beta = torch.rand(shape[:3])
    inputs = [q, k, v, g, beta]
    return [x.requires_grad_(grad) for x in inputs]


def ours(q, k, v, g, beta):
    return torch.ops.gdn.chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0]


def fallback(q, k, v, g, beta):
    return FALLBACK_CHUNK(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0]


def forward(fn, tokens, heads, head_dim):
    inputs = make_inputs(tokens, heads, head_dim, grad=False)

    def run():
        with torch.no_grad():
            return fn(*inputs)

    return run


def training(fn, tokens, heads, head_dim):
    inputs = make_inputs(tokens, heads, head_dim, grad=True)
    grad_out = torch.randn(1, tokens, heads, head_dim)

    def run():
        return torch.autograd.grad(fn(*inputs), inputs, grad_out)

    return run


def decode_ours(heads, head_dim):
    q, k, v, g, beta = (x.detach() for x in make_inputs(1, heads, head_dim, grad=False))
    token = [x[:, 0].contiguous() for x in (q, k, v, g, beta)]
    state = torch.zeros(1, heads, head_dim, head_dim)

    step = torch.ops.gdn.gated_delta_rule_step_.default

    def run():
        return step(*token, state, use_qk_l2norm_in_kernel=True)

    return run


def decode_fallback(heads, head_dim):
    q, k, v, g, beta = (x.detach() for x in make_inputs(1, heads, head_dim, grad=False))
    state = torch.zeros(1, heads, head_dim, head_dim)

    def run():
        nonlocal state
        out, state = FALLBACK_STEP(
            q, k, v, g, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        return out

    return run


def medians(functions, seconds):
    """Median milliseconds of each function, called in turn for about `seconds` in all (at least 5 rounds)."""
    times = [[] for _ in functions]
    for fn in functions:
        fn()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for fn, samples in zip(functions, times):
            start = time.perf_counter()
            fn()
            samples.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(samples) for samples in times]


def cpu_name():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def check_agreement(heads, head_dim):
    a, b = (training(fn, 200, heads, head_dim)() for fn in (ours, fallback))
    for name, x, y in zip(("dq", "dk", "dv", "dg", "dbeta"), a, b):
        error = ((x - y).norm() / y.norm()).item()
        if error > 1e-4:
            raise SystemExit(f"peers.py: gdn and the fallback disagree on {name}: relative error {error:.2e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, nargs="+", default=[512])
    parser.add_argument("--heads", type=int, nargs="+", default=[16])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--seconds", type=float, default=4.0, help="measuring time of each row")
    parser.add_argument("--json", help="write the rows and the machine to this file")
    args = parser.parse_args()

    check_agreement(min(args.heads), args.head_dim)
    machine = f"{cpu_name()}, {os.cpu_count()} CPUs, {torch.backends.cpu.get_cpu_capability()}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{machine}; {versions}; B=1, K=V={args.head_dim}, fp32, medians in ms\n")
    print("| mode | T | H | threads | gdn | transformers fallback | ratio |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for threads in dict.fromkeys(args.threads):
        torch.set_num_threads(threads)
        for heads in args.heads:
            cases = [("decode step", 1, decode_ours(heads, args.head_dim), decode_fallback(heads, args.head_dim))]
            for tokens in args.seq_len:
                shape = (tokens, heads, args.head_dim)
                cases.append(("forward", tokens, forward(ours, *shape), forward(fallback, *shape)))
                cases.append(("forward + backward", tokens, training(ours, *shape), training(fallback, *shape)))
            for mode, tokens, mine, theirs in cases:
                a, b = medians([mine, theirs], args.seconds)
                row = {"mode": mode, "T": tokens, "H": heads, "threads": threads, "gdn_ms": a, "fallback_ms": b}
                rows.append(row)
                print(f"| {mode} | {tokens} | {heads} | {threads} | {a:.3f} | {b:.3f} | {b / a:.1f}x |", flush=True)
    if args.json:
        result = {"machine": machine, "versions": versions, "head_dim": args.head_dim, "rows": rows}
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
