#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What recall loses when parts of a test-time memory are turned off, one by one.

Two tables. `rules`: the memory alone, untrained, is given random keys and values with constant gates and asked (the
tests of `gdn eval mechanisms`). `trained`: the demo's model with one mixer in every layer is trained on generated
stories, once as it is and once per part, and asked about held-out stories (gdn train, gdn eval recall).

    python bench/memory_ablations.py rules
    python bench/memory_ablations.py trained --mixer titans_lmm --max-iters 600
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent

# --- the rules, untrained ---------------------------------------------------------------------------------------------

DIM, CODES = 64, 512
TESTS = ("once", "overwrite", "repeated filler", "stale context")


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def stream(torch, test, trials):
    """Keys and codes' numbers to write, [trials,tokens(,DIM)], then those to ask for."""

    def pairs(n):
        return unit(torch.randn(trials, n, DIM)), torch.randint(CODES, (trials, n))

    def join(*parts):
        return tuple(torch.cat(x, 1) for x in zip(*parts))

    if test == "once":  # every pair once; all are asked
        all_ = pairs(32)
        return all_, all_
    if test == "overwrite":  # every key three times; the latest value is asked
        keys, _ = pairs(16)
        rounds = [(keys, torch.randint(CODES, (trials, 16))) for _ in range(3)]
        return join(*rounds), rounds[-1]
    if test == "repeated filler":  # one pair, then 21 others again and again; the first one is asked
        needle, filler = pairs(1), pairs(21)
        return join(needle, *[filler] * 19), needle
    fresh = pairs(24)  # stale context: 248 old pairs, then 24 new ones; the new ones are asked
    return join(pairs(248), fresh), fresh


class Rule:
    """A memory of one head with constant gates."""

    def __init__(self, kind="lmm", depth=2, momentum=0.5, forgetting=0.018, chunk=16, norm=None, bias=None):
        self.ttt, self.depth, self.chunk = kind == "ttt", depth, chunk
        self.momentum, self.forgetting = momentum, forgetting
        self.norm = self.ttt if norm is None else norm
        self.bias = self.ttt if bias is None else bias

    def layers(self, torch):
        """The learned start, here random: [in (+ 1), out] per layer."""
        sizes = [DIM] + [4 * DIM] * (self.depth - 1) + [DIM]
        std = [0.02 if self.ttt else n**-0.5 for n in sizes]
        weights = [torch.randn(a, b) * s for a, b, s in zip(sizes, sizes[1:], std)]
        return [torch.cat([w, torch.zeros(1, w.shape[1])]) if self.bias else w for w in weights]

    def recall(self, torch, test, rate, trials):
        F = torch.nn.functional
        (keys, codes), (asked, answers) = stream(torch, test, trials)
        size = DIM**0.5 if self.ttt else 1.0  # TTT does not normalise its keys
        book = unit(torch.randn(CODES, DIM))
        layers = self.layers(torch)
        start = torch.cat([w.flatten() for w in layers]).view(1, 1, -1)
        sequential = not self.ttt and self.depth == 1 and not self.norm

        def gate(value):
            return torch.full((*keys.shape[:2], 1), value)

        gain = torch.ones(1, DIM) if self.norm else None
        inputs = [
            *(x.unsqueeze(2) * size for x in (keys, keys, book[codes])),
            gate(rate / DIM if self.ttt else rate / 2),
            gate(self.momentum) if self.momentum and not self.ttt else None,
            gate(self.forgetting) if self.forgetting and not self.ttt else None,
            1 / torch.arange(1.0, self.chunk + 1) if self.ttt else None,
            start[0] if self.forgetting and not self.ttt and not sequential else None,
            gain,
            torch.zeros(1, DIM) if self.norm else None,
            (start * (not sequential)).expand(trials, 1, -1),
            *[None] * 4,
        ]
        clip = 0.0 if self.ttt or sequential else 10.0
        sizes = [self.depth, 4 * DIM * (self.depth > 1), int(self.bias), self.chunk, int(sequential), 0]
        op = torch.ops.gdn.test_time_memory
        scales = [1e-6, 1.0 if self.ttt else 2.0, clip]
        # The op takes whether the final memory is wanted last.
        memory = op(inputs, "ttt" if self.ttt else "lmm", "gelu" if self.ttt else "silu", sizes, scales, True)[1]
        # Streams end with a mini-batch: TTT's memory does not hold what an unfinished one has learned.
        x, at = asked * size, 0
        for i, w in enumerate(layers):
            W = memory[:, 0, at : at + w.numel()].view(trials, *w.shape)
            at += w.numel()
            x = x if i == 0 else (F.gelu(x, approximate="tanh") if self.ttt else F.silu(x))
            x = x @ W[:, :-1] + W[:, -1:] if self.bias else x @ W
        if self.norm:
            x = asked * size + F.layer_norm(x, (DIM,), eps=1e-6)
        return ((x @ book.T).argmax(-1) == answers).float().mean().item()


RULES = {
    "LMM, depth 2": Rule(),
    "no momentum": Rule(momentum=0),
    "no forgetting": Rule(forgetting=0),
    "neither": Rule(momentum=0, forgetting=0),
    "depth 1": Rule(depth=1),
    "depth 1, no momentum": Rule(depth=1, momentum=0),
    "depth 1, no forgetting": Rule(depth=1, forgetting=0),
    "depth 3": Rule(depth=3),
    "residual and LN": Rule(norm=True),
    "gradients of single tokens": Rule(chunk=1),
    "TTT-Linear": Rule("ttt", 1),
    "TTT-Linear, no LN": Rule("ttt", 1, norm=False),
    "TTT-Linear, no bias": Rule("ttt", 1, bias=False),
    "TTT-Linear, mini-batch 1": Rule("ttt", 1, chunk=1),
    "TTT-MLP": Rule("ttt", 2),
    "TTT-MLP, no LN": Rule("ttt", 2, norm=False),
    "TTT-MLP, no bias": Rule("ttt", 2, bias=False),
}
RATES = (0.03, 0.1, 0.2, 0.4, 0.7, 1.0, 2.0, 4.0)


def rules(args):
    import torch

    sys.path.insert(0, str(ROOT / "python"))
    import gdn  # noqa: F401  (registers torch.ops.gdn)

    print(
        f"recall of an untrained memory, head of {DIM}, {args.trials} trials; each with the best of the rates {RATES}\n"
    )
    print("| rule | rate | " + " | ".join(TESTS) + " |")
    print("|---|---|" + "---|" * len(TESTS))
    for name, rule in RULES.items():
        best = None
        for rate in RATES:
            torch.manual_seed(1)
            figures = [rule.recall(torch, test, rate, args.trials) for test in TESTS]
            if best is None or statistics.mean(figures) > statistics.mean(best[1]):
                best = rate, figures
        print(f"| {name} | {best[0]:g} | " + " | ".join(f"{x:.2f}" for x in best[1]) + " |", flush=True)


# --- trained ----------------------------------------------------------------------------------------------------------

COMMON = {"num_heads": 2, "head_dim": 16}
TITANS = {
    "as it is": {},
    "no momentum": {"momentum": False},
    "no forgetting": {"forgetting": False},
    "depth 1": {"memory_depth": 1},
    "no convolution": {"use_short_conv": False},
}
PERSISTENT = {"no persistent memory": {"persistent_tokens": 0}}
TTT = {
    "as it is": {},
    "no residual and LN": {"inner_norm": False},
    "no bias": {"inner_bias": False},
    "no positions": {"rope_theta": 0.0},
    "with convolutions (share_qk)": {"share_qk": True},
    "with gate": {"use_gate": True},
}
VARIANTS = {
    "ttt_linear": TTT,
    "ttt_mlp": TTT,
    "titans_lmm": TITANS,
    "titans_mag": {**TITANS, **PERSISTENT},
    "titans_mal": {**TITANS, **PERSISTENT},
    "titans_mac": {**TITANS, **PERSISTENT},
}


def recall(program, config, mixer, options, args, seed, folder):
    """Share of the questions about held-out stories that are answered rightly."""
    head, rest = config.split("[model.mixer]")
    tail = rest[rest.index("[data]") :]
    lines = [f"{key} = {json.dumps(value)}" for key, value in {"name": mixer, **COMMON, **options}.items()]
    path = pathlib.Path(folder) / "config.toml"
    path.write_text(head + "[model.mixer]\n" + "\n".join(lines) + "\n\n" + tail)
    out = pathlib.Path(folder) / "run"
    flags = ["--max-iters", args.max_iters, "--max-seconds", args.max_seconds, "--seq-len", args.seq_len]
    flags += ["--batch-size", args.batch_size, "--lr", args.lr, "--seed", seed, "--out-dir", out]
    command = [program, "train", "--config", path, *flags]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    result = subprocess.run(
        [program, "eval", "recall", "--model", str(out / "latest"), "--stories", str(args.stories), "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(result.stdout)["questions"][-1]["recall"]


def trained(args):
    config = (ROOT / "configs" / "demo.toml").read_text()
    print(
        f"recall of overwritten facts after {args.max_iters} steps of {args.batch_size} x {args.seq_len} tokens, "
        f"learning rate {args.lr}, seeds: {args.seeds}\n"
    )
    print("| mixer | part | recall |")
    print("|---|---|---|")
    for mixer in args.mixer:
        for name, options in VARIANTS[mixer].items():
            if args.part and name not in args.part:
                continue
            shares = []
            for seed in range(args.seeds):
                with tempfile.TemporaryDirectory() as folder:
                    shares.append(recall(args.program, config, mixer, options, args, seed, folder))
            print(f"| {mixer} | {name} | " + ", ".join(f"{100 * share:.1f} %" for share in shares) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tables = parser.add_subparsers(required=True)
    table = tables.add_parser("rules", help="the memory alone, untrained")
    table.add_argument("--trials", type=int, default=40)
    table.set_defaults(run=rules)
    table = tables.add_parser("trained", help="the demo's model, trained")
    table.add_argument("--mixer", choices=sorted(VARIANTS), nargs="+", default=["titans_lmm"])
    table.add_argument("--part", nargs="+", help="only these rows")
    table.add_argument("--max-iters", type=int, default=600)
    table.add_argument("--max-seconds", type=float, default=600.0, help="of each training")
    table.add_argument("--seq-len", type=int, default=256)
    table.add_argument("--batch-size", type=int, default=8)
    table.add_argument("--lr", type=float, default=5e-3)
    table.add_argument("--seeds", type=int, default=1)
    table.add_argument("--stories", type=int, default=200)
    table.add_argument("--program", default=str(ROOT / "build" / "bin" / "gdn"))
    table.set_defaults(run=trained)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
