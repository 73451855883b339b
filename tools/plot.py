# SPDX-License-Identifier: Apache-2.0
"""Draws the training and validation loss of runs from their metrics.jsonl as a PNG; `gdn plot` runs this file."""

import argparse
import json
import math
import sys
from pathlib import Path


def read_rows(run: Path) -> list[dict]:
    rows = []
    for number, line in enumerate((run / "metrics.jsonl").read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"gdn: warning: {run}/metrics.jsonl:{number} is not JSON and is left out", file=sys.stderr)
    return rows


def smooth(values: list[float], width: int) -> list[float]:
    """The mean of the last `width` values at each place."""
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def main() -> int:
    parser = argparse.ArgumentParser(prog="gdn plot", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--x", choices=["step", "seconds"], default="step")
    args = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        print(f"gdn: error: [plot] {sys.executable} has no matplotlib: pip install matplotlib", file=sys.stderr)
        return 1
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    drawn = False
    for index, run in enumerate(args.runs):
        rows = read_rows(run)
        color = f"C{index}"
        name = run.resolve().name
        train = [row for row in rows if "loss" in row]
        val = [row for row in rows if "val_loss" in row]
        if train:
            x = [row[args.x] for row in train]
            axes.plot(x, [row["loss"] for row in train], color=color, alpha=0.25, linewidth=1)
            window = max(1, len(train) // 50)
            axes.plot(x, smooth([row["loss"] for row in train], window), color=color, label=f"{name}, training")
        if val:
            axes.plot(
                [row[args.x] for row in val],
                [row["val_loss"] for row in val],
                color=color,
                linestyle="--",
                marker="o",
                markersize=4,
                label=f"{name}, validation (last {val[-1]['val_loss']:.3f})",
            )
        drawn = drawn or bool(train or val)
    if not drawn:
        print("gdn: error: [plot] no losses in the metrics.jsonl of these runs yet", file=sys.stderr)
        return 1
    axes.set_xlabel("step" if args.x == "step" else "seconds of training")
    axes.set_ylabel("loss, nats per token")
    low, high = axes.get_ylim()
    if low > 0 and math.log(high / low) > 1.5:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=[1, 1.5, 2, 3, 5, 7]))
    axes.grid(alpha=0.3)
    axes.legend()
    output = args.output or args.runs[0] / "loss.png"
    try:
        figure.savefig(output, dpi=120)
    except OSError as error:
        print(f"gdn: error: [plot] cannot write {output}: {error.strerror}", file=sys.stderr)
        return 1
    print(output)
    return 0


sys.exit(main())
