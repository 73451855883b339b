#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times gdn's gated delta rule, and a whole model of it, against what transformers does on a CPU without extra kernels.

Both run interleaved in one process, on the same threads and random inputs, and the outputs of the op are compared
first. The model is Qwen3NextForCausalLM in plain PyTorch (3.96 M parameters: width 256, 4 linear-attention layers of 4
heads with 64, SwiGLU of 768, vocabulary of 512) against `gdn bench train` and `gdn bench decode` of the same shape.
Prints medians and ratios; needs `pip install transformers` beside torch (not a dependency of gdn).

    python bench/peers.py                              # B=1, H=16, K=V=128, T=512, and the model
    python bench/peers.py --seq-len 512 4096 --threads 1 2 --json results.json
    python bench/peers.py --only model
    python bench/peers.py --only op --ggml ggml/build --ik ik_llama.cpp/build   # see bench/native_peers.py
    python bench/peers.py --only op --vllm vllm-0.33.0   # bf16; see bench/vllm_peer.py
"""

import argparse
import contextlib
import inspect
import json
import math
import os
import pathlib
import statistics
import sys
import tempfile
import time

import steady_malloc  # beside this file, as are machine, native_peers and vllm_peer
from machine import cpu_name

# Nor are idle threads to spin beside those of the other's OpenMP.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
steady_malloc.restart()

import torch  # noqa: E402  (after the restart above)
import transformers  # noqa: E402
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "python"))
import native_peers  # noqa: E402
import vllm_peer  # noqa: E402

import gdn  # noqa: E402  (registers torch.ops.gdn)

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

    @torch.no_grad()
    def run():
        return step(*token, state, use_qk_l2norm_in_kernel=True)

    return run


def decode_fallback(heads, head_dim):
    q, k, v, g, beta = (x.detach() for x in make_inputs(1, heads, head_dim, grad=False))
    state = torch.zeros(1, heads, head_dim, head_dim)

    @torch.no_grad()
    def run():
        nonlocal state
        out, state = FALLBACK_STEP(
            q, k, v, g, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        return out

    return run


def native_rows(make, folder, threads, tokens, heads, head_dim, seconds):
    """One row per length of the forward, and of the decoding step, against a library of native_peers."""
    for T in (1, *tokens):
        q, k, v, g, beta = make_inputs(T, heads, head_dim, grad=False)
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
        inputs = (q, k, v, g, beta)
        theirs = make(folder, threads, *inputs)
        expected = torch.ops.gdn.chunk_gated_delta_rule(*inputs)[0]
        error = ((theirs() - expected).norm() / expected.norm()).item()
        if not error < 1e-4:
            raise SystemExit(f"peers.py: gdn and {make.__name__} disagree: relative error {error:.2e}")
        if T == 1:
            token, state = [x[:, 0].contiguous() for x in inputs], torch.zeros(1, heads, head_dim, head_dim)

            def mine(token=token, state=state):
                return torch.ops.gdn.gated_delta_rule_step_.default(*token, state)

        else:

            def mine(inputs=inputs):
                with torch.no_grad():
                    return torch.ops.gdn.chunk_gated_delta_rule(*inputs)

        a, b = medians([mine, theirs], seconds)
        mode = "decode step" if T == 1 else "forward"
        yield {"mode": mode, "T": T, "H": heads, "threads": threads, "gdn_ms": a, "peer_ms": b}


def vllm_rows(folder, threads, tokens, heads, head_dim, seconds):
    """One row per length of the forward, and of the decoding step, against vLLM's kernels; q, k, v in bf16 on both."""
    for T in (1, *tokens):
        inputs = make_inputs(T, heads, head_dim, grad=False)
        state = torch.zeros(1, heads, head_dim, head_dim)
        *half, g, beta = (x.bfloat16() if x is not inputs[3] else x for x in inputs)
        if T == 1:
            mode, theirs = "decode step", vllm_peer.step(folder, *inputs)
            token = [x[:, 0].contiguous() for x in (*half, g, beta)]
            op = torch.ops.gdn.gated_delta_rule_step_.default

            @torch.no_grad()
            def mine(op=op, token=token, state=state):
                return op(*token, state, use_qk_l2norm_in_kernel=True)

        else:
            mode, theirs = "forward", vllm_peer.forward(folder, *inputs)
            op = torch.ops.gdn.chunk_gated_delta_rule.default

            @torch.no_grad()
            def mine(op=op, inputs=(*half, g, beta), state=state):
                return op(*inputs, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)[0]

        for _ in range(3):  # a first step starts from zeros, which hides the gate and most of the state
            expected, o = mine().float().flatten(), theirs().float().flatten()
        error = ((o - expected).norm() / expected.norm()).item()
        if not error < 1e-2:  # what is left of products of numbers in bf16
            raise SystemExit(f"peers.py: gdn and vLLM disagree on the {mode}: relative error {error:.2e}")
        a, b = medians([mine, theirs], seconds)
        yield {"mode": mode, "T": T, "H": heads, "threads": threads, "gdn_ms": a, "peer_ms": b}


# Calls shorter than SHORT_MS are timed by as many in a row as take STRETCH_MS: each finds in the caches what it left
# there itself, not the other's.
SHORT_MS, STRETCH_MS = 1.0, 5.0


def medians(functions, seconds):
    """Median milliseconds of each function, called in turn for about `seconds` in all (at least 3 rounds)."""
    times = [[] for _ in functions]
    calls = []
    for fn in functions:
        fn()
        start = time.perf_counter()
        fn()
        ms = (time.perf_counter() - start) * 1e3
        calls.append(math.ceil(STRETCH_MS / ms) if ms < SHORT_MS else 1)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for fn, samples, count in zip(functions, times, calls):
            start = time.perf_counter()
            for _ in range(count):
                fn()
            samples.append((time.perf_counter() - start) * 1e3 / count)
    return [statistics.median(samples) for samples in times]


# --- whole models -----------------------------------------------------------------------------------------------------

BATCH, TOKENS, VOCAB = 8, 512, 512


def make_peer():
    config = qwen3_next.Qwen3NextConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        mlp_only_layers=[0, 1, 2, 3],
        layer_types=["linear_attention"] * 4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return qwen3_next.Qwen3NextForCausalLM(config)


def peer_training(dtype):
    """A function that takes one training step of the peer."""
    model = make_peer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, VOCAB, (BATCH, TOKENS))
    precision = (
        (lambda: torch.autocast("cpu", dtype=torch.bfloat16)) if dtype == "bf16" else (lambda: contextlib.nullcontext())
    )

    def step():
        with precision():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peer_decoding(dtype):
    """A function that decodes one token greedily with the peer and its cache."""
    model = make_peer().eval()
    if dtype == "bf16":
        model = model.to(torch.bfloat16)
    # A cache of linear-attention layers alone cannot tell its length, which only masks and positions are made from:
    # giving those also spares the peer the work.
    masks = {"full_attention": None, "linear_attention": None}
    cache, token, position = None, torch.zeros(1, 4, dtype=torch.long), torch.arange(4)[None]

    def step():
        nonlocal cache, token, position
        with torch.no_grad():
            out = model(
                input_ids=token, past_key_values=cache, position_ids=position, attention_mask=masks, use_cache=True
            )
        cache, token, position = out.past_key_values, out.logits[:, -1:].argmax(-1), position[:, -1:] + 1

    return step


def bench_ours(what, dtype, threads, seconds):
    """Milliseconds per step of `gdn bench WHAT`, run in this process."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file, open(os.devnull, "w") as null:
        # The program prints its table to stdout; what is wanted is in the file.
        sys.stdout.flush()
        keep = os.dup(1)
        os.dup2(null.fileno(), 1)
        try:
            arguments = ["bench", what, "--dtype", dtype, "--threads", str(threads), "--seconds", str(seconds)]
            status = gdn.main([*arguments, "--tokens", "200", "--out", file.name])
        finally:
            os.dup2(keep, 1)
            os.close(keep)
        if status != 0:
            raise SystemExit(f"peers.py: gdn bench {what} failed with status {status}")
        rows = json.loads(pathlib.Path(file.name).read_text())["rows"]
        return rows[-1]["ms"]


def model_rows(threads, seconds):
    """One row per kind of work and dtype: medians of rounds that alternate between the two."""
    for what, make in (("train", peer_training), ("decode", peer_decoding)):
        for dtype in ("fp32", "bf16"):
            peer = make(dtype)
            peer()
            mine, theirs = [], []
            for _ in range(3):
                mine.append(bench_ours(what, dtype, threads, seconds / 40))
                theirs.append(medians([peer], seconds / 3)[0])
            a, b = statistics.median(mine), statistics.median(theirs)
            tokens = 1 if what == "decode" else BATCH * TOKENS
            row = {"mode": f"{what} {dtype}", "threads": threads, "gdn_ms": a, "peer_ms": b, "tokens": tokens}
            yield {**row, "peer": "transformers"}


def check_agreement(heads, head_dim):
    a, b = (training(fn, 200, heads, head_dim)() for fn in (ours, fallback))
    for name, x, y in zip(("dq", "dk", "dv", "dg", "dbeta"), a, b):
        error = ((x - y).norm() / y.norm()).item()
        if error > 1e-4:
            raise SystemExit(f"peers.py: gdn and the fallback disagree on {name}: relative error {error:.2e}")


def add_op_row(rows, peer, row):
    rows.append({**row, "peer": peer})
    a, b = row["gdn_ms"], row["peer_ms"]
    cells = [row["mode"], row["T"], row["H"], row["threads"], f"{a:.3f}", peer, f"{b:.3f}", f"{b / a:.1f}x"]
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, nargs="+", default=[512])
    parser.add_argument("--heads", type=int, nargs="+", default=[16])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--seconds", type=float, default=4.0, help="measuring time of each row")
    parser.add_argument("--only", choices=["op", "model"], help="one of the two parts")
    parser.add_argument("--ggml", metavar="DIR", help="compare with ggml's libraries in this folder too")
    parser.add_argument("--ik", metavar="DIR", help="compare with ik_llama.cpp's libraries in this folder too")
    parser.add_argument("--vllm", metavar="DIR", help="compare with vLLM's kernels, in bf16, from this folder too")
    parser.add_argument("--json", help="write the rows and the machine to this file")
    args = parser.parse_args()

    check_agreement(min(args.heads), args.head_dim)
    machine = f"{cpu_name()}, {os.cpu_count()} CPUs, {torch.backends.cpu.get_cpu_capability()}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{machine}; {versions}; medians in ms\n")
    rows = []
    if args.only != "model":
        print(f"The op: B=1, K=V={args.head_dim}, fp32 but for the rows of vLLM\n")
        print("| mode | T | H | threads | gdn | peer | ms | ratio |")
        print("|---|---|---|---|---|---|---|---|")
    for threads in dict.fromkeys(args.threads if args.only != "model" else []):
        torch.set_num_threads(threads)
        for heads in args.heads:
            cases = [("decode step", 1, decode_ours(heads, args.head_dim), decode_fallback(heads, args.head_dim))]
            for tokens in args.seq_len:
                shape = (tokens, heads, args.head_dim)
                cases.append(("forward", tokens, forward(ours, *shape), forward(fallback, *shape)))
                cases.append(("forward + backward", tokens, training(ours, *shape), training(fallback, *shape)))
            for mode, tokens, mine, theirs in cases:
                a, b = medians([mine, theirs], args.seconds)
                row = {"mode": mode, "T": tokens, "H": heads, "threads": threads, "gdn_ms": a, "peer_ms": b}
                add_op_row(rows, "transformers", row)
            for peer, folder, make in (
                ("ggml", args.ggml, native_peers.ggml_delta_rule),
                ("ik_llama.cpp", args.ik, native_peers.ik_delta_rule),
            ):
                if folder:
                    for row in native_rows(make, folder, threads, args.seq_len, heads, args.head_dim, args.seconds):
                        add_op_row(rows, peer, row)
            if args.vllm:
                for row in vllm_rows(args.vllm, threads, args.seq_len, heads, args.head_dim, args.seconds):
                    add_op_row(rows, "vLLM (bf16)", row)
    if args.only != "op":
        print("\nThe model: 3.96 M parameters; training B=8 T=512 with AdamW (bf16: autocast), greedy decoding B=1\n")
        print("| mode | threads | gdn ms (tok/s) | Qwen3NextForCausalLM ms (tok/s) | ratio |")
        print("|---|---|---|---|---|")
    for threads in dict.fromkeys(args.threads if args.only != "op" else []):
        torch.set_num_threads(threads)
        for row in model_rows(threads, args.seconds):
            rows.append(row)
            a, b, n = row["gdn_ms"], row["peer_ms"], row["tokens"] * 1e3
            print(
                f"| {row['mode']} | {threads} | {a:.2f} ({n / a:.0f}) | {b:.2f} ({n / b:.0f}) | {b / a:.1f}x |",
                flush=True,
            )
    if args.json:
        result = {"bench": "peers", "machine": machine, "versions": versions, "head_dim": args.head_dim, "rows": rows}
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
