#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What recall loses when parts of a test-time memory are turned off, one by one.

Trains the demo's model on generated stories with one mixer in every layer, once as it is and once per part, and asks
each about held-out stories (gdn train, gdn eval recall). Prints a table.

    python bench/memory_ablations.py --mixer titans_lmm --max-iters 600
"""

import argparse
import json
import pathlib
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
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


def toml_value(value):
    return json.dumps(value)


def recall(program, config, mixer, options, args, folder):
    """Share of the questions about held-out stories that are answered rightly."""
    head, rest = config.split("[model.mixer]")
    tail = rest[rest.index("[data]") :]
    lines = [f"{key} = {toml_value(value)}" for key, value in {"name": mixer, **COMMON, **options}.items()]
    path = pathlib.Path(folder) / "config.toml"
    path.write_text(head + "[model.mixer]\n" + "\n".join(lines) + "\n\n" + tail)
    out = pathlib.Path(folder) / "run"
    flags = ["--max-iters", str(args.max_iters), "--max-seconds", str(args.max_seconds), "--out-dir", str(out)]
    subprocess.run([program, "train", "--config", str(path), *flags], check=True, stderr=subprocess.DEVNULL)
    result = subprocess.run(
        [program, "eval", "recall", "--model", str(out / "latest"), "--stories", str(args.stories), "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(result.stdout)["questions"][-1]["recall"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixer", choices=sorted(VARIANTS), nargs="+", default=["titans_lmm"])
    parser.add_argument("--max-iters", type=int, default=1500)
    parser.add_argument("--max-seconds", type=float, default=600.0, help="of each training")
    parser.add_argument("--stories", type=int, default=300)
    parser.add_argument("--program", default=str(ROOT / "build" / "bin" / "gdn"))
    args = parser.parse_args()
    config = (ROOT / "configs" / "demo.toml").read_text()
    print(f"recall of overwritten facts after {args.max_iters} steps of the demo's training\n")
    print("| mixer | part | recall |")
    print("|---|---|---|")
    for mixer in args.mixer:
        for name, options in VARIANTS[mixer].items():
            with tempfile.TemporaryDirectory() as folder:
                share = recall(args.program, config, mixer, options, args, folder)
            print(f"| {mixer} | {name} | {100 * share:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
