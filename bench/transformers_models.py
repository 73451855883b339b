#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times a Qwen3-Next-like model of about 100 M parameters in transformers with and without gdn.patch_transformers().

Three tasks: a prefill, decoding, and a training step. Both sides run in turn in one process on the same inputs, and
their outputs are compared first. For each task it prints the medians, the share of the time that the patched functions
(gated delta rule, causal convolution) take before and after, the speed-up, and the most that Amdahl's law allows, which
is what would be reached if those functions took no time at all. Needs `pip install transformers` beside torch.

    python bench/transformers_models.py                                    # float32 and bfloat16, 2,048 tokens
    python bench/transformers_models.py --dtype bfloat16 --tasks prefill
"""

import argparse
import json
import logging
import os
import pathlib
import statistics
import sys
import time

import steady_malloc  # beside this file, as is machine
from machine import cpu_name

steady_malloc.restart()

import torch  # noqa: E402  (after the restart above)
import transformers  # noqa: E402
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "python"))
import gdn  # noqa: E402
from gdn import _transformers  # noqa: E402

FUNCTIONS = list(_transformers.FUNCTIONS["qwen3_next"])


def make_model(dtype: torch.dtype) -> torch.nn.Module:
    layers = 12
    config = transformers.Qwen3NextConfig(
        vocab_size=16384,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=128,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        mlp_only_layers=list(range(layers)),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return transformers.Qwen3NextForCausalLM(config).to(dtype)


class Timed:
    """Adds up the time spent in the functions of the modelling module that gdn replaces, while it is on."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> "Timed":
        self.originals = {name: getattr(qwen3_next, name) for name in FUNCTIONS}
        for name, function in self.originals.items():
            setattr(qwen3_next, name, self.wrap(function))
        return self

    def wrap(self, function):
        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return result

        return timed

    def __exit__(self, *_) -> None:
        for name, function in self.originals.items():
            setattr(qwen3_next, name, function)


def prefill(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=True, logits_to_keep=1)


def decode(model, ids, steps=24):
    """The time of one step after a short prompt."""
    with torch.no_grad():
        out = model(ids[:, :64], use_cache=True, logits_to_keep=1)
        cache, token = out.past_key_values, ids[:, :1]
        model(token, past_key_values=cache, use_cache=True)
        with Timed() as functions:
            start = time.perf_counter()
            for _ in range(steps):
                model(token, past_key_values=cache, use_cache=True)
            return (time.perf_counter() - start) / steps, functions.seconds / steps


def train(model, ids):
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()


def functions_alone(model, tokens, dtype):
    """Forward and backward of the functions that gdn replaces, for all linear layers, on inputs like the model's."""
    config = model.config
    H, HV, D = config.linear_num_key_heads, config.linear_num_value_heads, config.linear_key_head_dim
    q, k, v = (torch.randn(1, tokens, h, D, dtype=dtype, requires_grad=True) for h in (H, H, HV))
    beta = torch.rand(1, tokens, HV, dtype=dtype, requires_grad=True)
    g = (-torch.rand(1, tokens, HV)).requires_grad_()
    channels = (2 * H + HV) * D
    x = torch.randn(1, tokens, channels, dtype=dtype, requires_grad=True)
    weight = torch.randn(channels, config.linear_conv_kernel_dim, dtype=dtype, requires_grad=True)
    start = time.perf_counter()
    y = qwen3_next.causal_conv1d_fn(x.transpose(1, 2), weight, None, activation="silu")
    o, _ = qwen3_next.torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)
    torch.autograd.backward([y, o], [torch.ones_like(y), torch.ones_like(o)])
    return (time.perf_counter() - start) * config.layer_types.count("linear_attention")


def measure(task, model, ids, dtype):
    """(seconds, seconds in the functions) of one run."""
    if task == "decode":
        return decode(model, ids)
    if task == "train":
        start = time.perf_counter()
        train(model, ids)
        return time.perf_counter() - start, functions_alone(model, ids.shape[1], dtype)
    with Timed() as functions:
        start = time.perf_counter()
        prefill(model, ids)
        return time.perf_counter() - start, functions.seconds


def compare(model, ids, dtype, args) -> list[dict]:
    """Prints one row per task and returns them."""
    print(f"Qwen3-Next-like, {model.num_parameters() / 1e6:.0f} M parameters, {dtype}, {args.tokens} tokens")
    sides = {"transformers": gdn.unpatch_transformers, "gdn": gdn.patch_transformers}
    logits = []
    for switch in sides.values():  # also warms up
        switch()
        logits.append(prefill(model, ids).logits.float())
    error = ((logits[1] - logits[0]).norm() / logits[0].norm()).item()
    print(f"relative difference of the last logits: {error:.1e}")
    heads = ("transformers", "gdn", "speed-up", "limit", "of it", "share before", "after")
    print(f"{'task':10}" + "".join(f"{head:>14}" for head in heads))
    rows = []
    for task in args.tasks:
        runs = {side: [] for side in sides}
        for _ in range(args.repeats):
            for side, switch in sides.items():
                switch()
                runs[side].append(measure(task, model, ids, dtype))
        before, after = (tuple(statistics.median(column) for column in zip(*runs[side])) for side in sides)
        row = {
            "name": f"{task}, {str(dtype).removeprefix('torch.')}",
            "threads": args.threads,
            "transformers ms": before[0] * 1e3,
            "gdn ms": after[0] * 1e3,
            "speed-up": before[0] / after[0],
            "limit": before[0] / (before[0] - before[1]),
            "share before %": 100 * before[1] / before[0],
            "share after %": 100 * after[1] / after[0],
        }
        row["of limit"] = row["speed-up"] / row["limit"]
        rows.append(row)
        cells = [f"{row[key]:.1f} ms" for key in ("transformers ms", "gdn ms")]
        cells += [f"{row[key]:.2f}" for key in ("speed-up", "limit", "of limit")]
        cells += [f"{row[key]:.1f} %" for key in ("share before %", "share after %")]
        print(f"{task:10}" + "".join(f"{cell:>14}" for cell in cells), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=dtypes)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    tasks = ["prefill", "decode", "train"]
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks)
    parser.add_argument("--json", type=pathlib.Path, help="write the rows to this file as well")
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    print(f"{cpu_name()}, {args.threads} threads, torch {torch.__version__}, transformers {transformers.__version__}")
    rows = []
    for name in args.dtype:
        dtype = getattr(torch, name)
        model = make_model(dtype)
        ids = torch.randint(0, model.config.vocab_size, (1, args.tokens))
        rows += compare(model, ids, dtype, args)
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
