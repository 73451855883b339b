#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs every benchmark into one file per machine, and writes the tables and pictures of docs/performance.md from it.

    tools/bench.py run      [--build build] [--quick]   -> bench/results/<machine>.json (about 12 minutes)
    tools/bench.py report   [--results FILE]            -> docs/performance.md between its markers, docs/images/*.png

`run` goes on when a part fails, and says so in the file; what needs transformers is left out where it is not installed
(GDN_PEERS_PYTHON names another interpreter that has it). Threads: 1, and all that this process may use.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"


def threads() -> list[str]:
    count = len(os.sched_getaffinity(0))
    return ["1"] if count == 1 else ["1", str(count)]


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def parts(build: pathlib.Path, quick: bool) -> list[tuple[str, list[str]]]:
    """Name and command of each part; {out} is the file it writes its JSON to."""
    program = str(build / "bin" / "gdn")
    seconds = "0.1" if quick else "0.4"
    t = ["--threads", *threads()]
    long = "2000" if quick else "131072"
    list_ = [
        ("ceilings", [program, "bench", "ceilings", *t, "--out", "{out}"]),
        ("ops", [program, "bench", "ops", *t, "--seconds", seconds, "--out", "{out}"]),
        ("mixers", [program, "bench", "mixers", "--threads", t[-1], "--seconds", seconds, "--out", "{out}"]),
        ("train", [program, "bench", "train", *t, "--seconds", seconds, "--out", "{out}"]),
        ("decode", [program, "bench", "decode", *t, "--tokens", "1000", "--out", "{out}"]),
        (
            "long decode",
            [program, "bench", "decode", "--threads", "1", "--dtype", "fp32", "--tokens", long, "--out", "{out}"],
        ),
    ]
    python = os.environ.get("GDN_PEERS_PYTHON", sys.executable)
    found = subprocess.run([python, "-c", "import torch, transformers"], capture_output=True)
    if found.returncode == 0:
        peers = [python, str(ROOT / "bench" / "peers.py"), "--seq-len", "512", "4096", "--heads", "16", "32", *t]
        list_.append(("peers", [*peers, "--seconds", "0.5" if quick else "2.5", "--json", "{out}"]))
    else:
        print("peers: left out, transformers is not installed (pip install transformers)", file=sys.stderr)
    return list_


def run(build: pathlib.Path, quick: bool) -> int:
    result = {"date": time.strftime("%Y-%m-%d"), "quick": quick, "parts": {}, "failed": {}}
    environment = dict(os.environ, GDN_LIBRARY=str(build / "libgdn.so"))
    with tempfile.TemporaryDirectory() as folder:
        for name, command in parts(build, quick):
            out = pathlib.Path(folder) / f"{slug(name)}.json"
            print(f"== {name}", flush=True)
            start = time.monotonic()
            try:
                done = subprocess.run([word.format(out=out) for word in command], env=environment, timeout=900)
                if done.returncode != 0:
                    raise RuntimeError(f"exit status {done.returncode}")
                result["parts"][name] = json.loads(out.read_text())
            except (OSError, RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
                result["failed"][name] = str(error)
                print(f"{name}: failed: {error}", file=sys.stderr)
            print(f"== {name} took {time.monotonic() - start:.0f} seconds", flush=True)
    if not result["parts"]:
        print("no benchmark ran", file=sys.stderr)
        return 1
    for part in result["parts"].values():
        if isinstance(part.get("machine"), dict):
            result["machine"], result["versions"] = part["machine"], part["versions"]
            break
    machine = result.get("machine", {"cpu": "unknown", "cores": len(os.sched_getaffinity(0))})
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{slug(machine['cpu'])}-{machine['cores']}-cpus.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
    return 1 if result["failed"] else 0


# --- the report -------------------------------------------------------------------------------------------------------


class Figures:
    """The rows of a result by part, name and threads."""

    def __init__(self, result: dict):
        self.result = result
        self.threads = sorted({row["threads"] for part in result["parts"].values() for row in part["rows"]})

    def row(self, part: str, name: str, t: int) -> dict | None:
        rows = self.result["parts"].get(part, {}).get("rows", [])
        found = [row for row in rows if row.get("name", row.get("mode")) == name and row["threads"] == t]
        return found[0] if found else None

    def ms(self, name: str, t: int, part: str = "ops") -> float | None:
        row = self.row(part, name, t)
        return row["ms"] if row else None

    def peer(self, mode: str, t: int, T: int | None = None, H: int | None = None) -> float | None:
        """How many times as fast as the peer."""
        for row in self.result["parts"].get("peers", {}).get("rows", []):
            if row["mode"] == mode and row["threads"] == t and row.get("T") == T and row.get("H") == H:
                return row["peer_ms"] / row["gdn_ms"]
        return None

    def each(self, value, form: str) -> tuple[str, list[float]]:
        """`value(t)` for each number of threads, as text and as a list; "-" where it is missing."""
        texts, numbers = [], []
        for t in self.threads:
            number = value(t)
            texts.append("-" if number is None else form.format(number))
            if number is not None:
                numbers.append(number)
        return " / ".join(texts), numbers


def divide(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def percent(figures: Figures, part: str, name: str, t: int) -> float | None:
    row = figures.row(part, name, t)
    return None if row is None or "of_ceiling" not in row else 100 * row["of_ceiling"]


def verdict(numbers: list[float], goal: float, at_least: bool) -> str:
    if not numbers:
        return "not measured"
    good = [n >= goal if at_least else n <= goal for n in numbers]
    return "met" if all(good) else "not met" if not any(good) else "partly"


def goal_rows(f: Figures):
    """(what, goal, figure, verdict) for each goal; figures are for 1 thread / all threads."""

    def row(what, value, form, goal, at_least=True, unit=""):
        text, numbers = f.each(value, form)
        sign = "at least" if at_least else "at most"
        return what, f"{sign} {goal:g}{unit}", text, verdict(numbers, goal, at_least)

    for T in (512, 4096):
        for H in (16, 32):
            name = f"forward GDN fp32 T={T} H={H}"
            yield row(
                f"forward, T={T} H={H}: of the FMA peak",
                lambda t, n=name: percent(f, "ops", n, t),
                "{:.0f} %",
                70,
                unit=" %",
            )
    for T, goal in ((512, 5.5), (4096, 6)):
        for H in (16, 32):
            yield row(
                f"forward, T={T} H={H}: times the fallback",
                lambda t, T=T, H=H: f.peer("forward", t, T, H),
                "{:.1f}x",
                goal,
                unit="x",
            )
    for T in (512, 4096):
        for H in (16, 32):
            name = f"GDN fp32 T={T} H={H}"
            yield row(
                f"forward + backward, T={T} H={H}: of our forward",
                lambda t, n=name: divide(f.ms(f"forward+backward {n}", t), f.ms(f"forward {n}", t)),
                "{:.1f}x",
                4,
                at_least=False,
                unit="x",
            )
    for T, goal in ((512, 5), (4096, 15)):
        yield row(
            f"forward + backward, T={T} H=16: times the fallback",
            lambda t, T=T: f.peer("forward + backward", t, T, 16),
            "{:.1f}x",
            goal,
            unit="x",
        )
    for B, H in ((1, 16), (1, 32), (4, 16), (16, 16), (16, 32)):
        yield row(
            f"decode step in place, B={B} H={H}: of the read-and-write rate",
            lambda t, B=B, H=H: percent(f, "ops", f"decode step fp32 B={B} H={H}", t),
            "{:.0f} %",
            85,
            unit=" %",
        )
    for i, (t, goal) in enumerate(((1, 8), (2, 5))):
        if t in f.threads:
            value = f.peer("decode step", t, 1, 16)
            yield (
                f"decode step from Python, H=16, {t} thread{'s' * i}: times the fallback",
                f"at least {goal}x",
                "-" if value is None else f"{value:.1f}x",
                verdict([] if value is None else [value], goal, True),
            )
    for kind, goal in (("forward", 1.5), ("forward+backward", 1.7)):
        yield row(
            f"KDA, T=512 H=16: {kind.replace('+', ' + ')}, of GDN's time",
            lambda t, k=kind: divide(f.ms(f"{k} KDA fp32 T=512 H=16", t), f.ms(f"{k} GDN fp32 T=512 H=16", t)),
            "{:.2f}x",
            goal,
            at_least=False,
            unit="x",
        )
    lengths = [512, 2048, 4096, 8192, 16384, 65536]

    def spread(t):
        per_token = [f.ms(f"forward GDN fp32 T={T} H=16", t) for T in lengths]
        per_token = [ms / T for ms, T in zip(per_token, lengths) if ms]
        return 100 * (max(per_token) / min(per_token) - 1) if per_token else None

    yield row(
        "forward, T=512 ... 65,536 H=16: spread of the time per token",
        spread,
        "{:.0f} %",
        10,
        at_least=False,
        unit=" %",
    )
    for size in (64, 96, 100, 192, 200, 256):

        def per_flop(t, size=size):
            name = f"forward GDN fp32 T=512 H=16 K={size} V={size}"
            a, b = f.row("ops", name, t), f.row("ops", "forward GDN fp32 T=512 H=16", t)
            return None if a is None or b is None else b["rate"] / a["rate"]

        yield row(
            f"K=V={size}: time per flop, of 128",
            per_flop,
            "{:.2f}x",
            1.25 if size % 16 == 0 else 1.5,
            at_least=False,
            unit="x",
        )
    for group in (2, 4):

        def per_head(t, group=group):
            a, b = f.ms(f"forward GDN fp32 T=512 H=8 HV={8 * group}", t), f.ms("forward GDN fp32 T=512 H=16", t)
            return None if a is None or b is None else a / b * 16 / (8 * group)

        yield row(f"HV={group}H: time per value head, of HV=H", per_head, "{:.2f}x", 1.25, at_least=False, unit="x")
    if f.threads[-1] >= 2:
        for heads in (1, 2, 3):
            name = f"forward GDN fp32 T=4096 H={heads}"
            value = divide(f.ms(name, 1), f.ms(name, 2))
            yield (
                f"{heads} head{'s' * (heads > 1)}, T=4096: 2 threads against 1",
                "at least 1.7x",
                "-" if value is None else f"{value:.2f}x",
                verdict([] if value is None else [value], 1.7, True),
            )
    for kind in ("forward", "forward+backward"):
        yield row(
            f"packed, mixed lengths against equal ones: {kind.replace('+', ' + ')}",
            lambda t, k=kind: divide(
                f.ms(f"{k} GDN fp32 T=4096 H=16 packed, 8 mixed", t),
                f.ms(f"{k} GDN fp32 T=4096 H=16 packed, 8 equal", t),
            ),
            "{:.2f}x",
            1.15,
            at_least=False,
            unit="x",
        )
    for dtype, goal in (("fp32", 2.5), ("bf16", 4)):
        yield row(
            f"training step of the model, {dtype}: times transformers",
            lambda t, d=dtype: f.peer(f"train {d}", t),
            "{:.1f}x",
            goal,
            unit="x",
        )
    for dtype in ("fp32", "bf16"):
        yield row(
            f"decoding of the model, B=1, {dtype}: times transformers",
            lambda t, d=dtype: f.peer(f"decode {d}", t),
            "{:.1f}x",
            5,
            unit="x",
        )
    yield "bf16 with AMX: all rows", "see the issue", "-", "no machine with AMX was at hand"


SMALL = ("short conv", "RMS norm", "gated RMS norm", "L2 norm", "SwiGLU", "channel gate", "cross-entropy")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def small_kernels(f: Figures) -> str:
    rows = []
    for row in f.result["parts"].get("ops", {}).get("rows", []):
        if row["name"].startswith(SMALL) and row["threads"] == f.threads[0]:
            again = f.row("ops", row["name"], f.threads[-1])

            def pair(key, scale, form, a=row, b=again):
                return " / ".join(form.format(scale * r[key]) for r in ([a] if a is b else [a, b]))

            rows.append(
                [
                    row["name"],
                    pair("ms", 1, "{:.2f}"),
                    pair("of_ceiling", 100, "{:.0f} %"),
                    row["bound by"],
                    pair("torch/ours", 1, "{:.1f}x"),
                ]
            )
    return table(["kernel", "ms", "of what memory or exp allows", "bound", "times the torch composition"], rows)


def products(f: Figures) -> str:
    rows = []
    for row in f.result["parts"].get("ops", {}).get("rows", []):
        if row["name"].startswith("linear "):
            share = f"{100 * row['of_ceiling']:.0f} %" if "of_ceiling" in row else "-"
            cells = [f"{row['rate']:.0f}", share, f"{row['torch/ours']:.2f}x"]
            rows.append([row["name"], str(row["threads"]), *cells])
    return table(["product", "threads", "GFLOP/s", "of the peak", "times at::linear"], rows)


def plain(f: Figures, part: str, columns: list[tuple[str, str, str]]) -> str:
    rows = []
    for row in f.result["parts"].get(part, {}).get("rows", []):
        cells = [form.format(row[key]) if key in row else "-" for _, key, form in columns]
        rows.append([row["name"], str(row["threads"]), *cells])
    return table(["", "threads", *[title for title, _, _ in columns]], rows)


def peers(f: Figures) -> str:
    rows = []
    for row in f.result["parts"].get("peers", {}).get("rows", []):
        shape = f"T={row['T']} H={row['H']}" if "T" in row else "model"
        rows.append(
            [
                row["mode"],
                shape,
                str(row["threads"]),
                f"{row['gdn_ms']:.3g}",
                f"{row['peer_ms']:.3g}",
                f"{row['peer_ms'] / row['gdn_ms']:.1f}x",
            ]
        )
    return table(["", "shape", "threads", "gdn, ms", "transformers, ms", "ratio"], rows)


def sections(f: Figures) -> dict[str, str]:
    r = f.result
    machine = r.get("machine", {})
    heading = (
        f"{machine.get('cpu')}, {machine.get('cores')} CPUs, SIMD {machine.get('simd')}; "
        f"{r.get('versions', {}).get('gdn')}; compiler {r.get('versions', {}).get('compiler')}; {r['date']}."
    )
    if r["failed"]:
        heading += " Failed: " + ", ".join(f"{k} ({v})" for k, v in r["failed"].items()) + "."
    goals = table(["what (1 thread / all)", "goal", "figure", ""], [list(row) for row in goal_rows(f)])
    rate = ("rate", "rate", "{:.4g}")
    return {
        "machine": heading,
        "goals": goals,
        "small": small_kernels(f),
        "peers": peers(f),
        "products": products(f),
        "ceilings": plain(f, "ceilings", [rate, ("unit", "unit", "{}")]),
        "mixers": plain(
            f,
            "mixers",
            [
                ("tok/s", "rate", "{:.0f}"),
                ("state KiB", "state KiB", "{}"),
                ("after 8192 tokens", "after 8192 tokens", "{}"),
            ],
        ),
        "train": plain(
            f,
            "train",
            [
                ("ms", "ms", "{:.0f}"),
                ("tok/s", "rate", "{:.0f}"),
                ("mixer op %", "mixer op %", "{:.1f}"),
                ("GEMM %", "GEMM %", "{:.1f}"),
                ("small kernels %", "small kernels %", "{:.1f}"),
                ("optimizer %", "optimizer %", "{:.1f}"),
                ("rest %", "rest %", "{:.1f}"),
            ],
        ),
        "decode": plain(
            f, "decode", [("ms", "ms", "{:.3f}"), ("tok/s", "rate", "{:.0f}"), ("state KiB", "state KiB", "{}")]
        ),
        "long": plain(
            f,
            "long decode",
            [
                ("ms", "ms", "{:.3f}"),
                ("tok/s", "rate", "{:.0f}"),
                ("state KiB", "state KiB", "{}"),
                ("process MiB", "process MiB", "{}"),
            ],
        ),
    }


def draw(f: Figures, folder: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    t = f.threads[-1]
    # Time against T.
    lengths = [512, 2048, 4096, 8192, 16384, 65536]
    figure, axes = plt.subplots(figsize=(5.6, 3.4), dpi=90)
    for kind, label in (("forward", "gdn, forward"), ("forward+backward", "gdn, forward + backward")):
        points = [(T, f.ms(f"{kind} GDN fp32 T={T} H=16", t)) for T in lengths]
        points = [(T, 1e3 * ms / T) for T, ms in points if ms]
        axes.plot(*zip(*points), marker="o", label=label)
    for mode in ("forward", "forward + backward"):
        points = [
            (row["T"], 1e3 * row["peer_ms"] / row["T"])
            for row in f.result["parts"].get("peers", {}).get("rows", [])
            if row["mode"] == mode and row["threads"] == t and row.get("H") == 16
        ]
        if points:
            axes.plot(*zip(*sorted(points)), marker="s", linestyle="--", label=f"transformers, {mode}")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens",
        ylabel="microseconds per token",
        title=f"B=1 H=16 K=V=128, fp32, {t} threads",
    )
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(folder / "time-against-tokens.png")

    # Roofline: fp32 peak and the rates of memory, with what the kernels reach.
    def rate(name):
        row = f.row("ceilings", name, t)
        return row["rate"] if row else None

    simd = f.result.get("machine", {}).get("simd", "")
    peak, far, near = (
        rate(f"fp32 multiply-add, {simd}"),
        rate("read and write in place 256 MiB"),
        rate("read and write in place 1 MiB"),
    )
    if peak and far:
        figure, axes = plt.subplots(figsize=(5.6, 3.4), dpi=90)
        xs = [2**i / 16 for i in range(14)]
        for bandwidth, label in ((far, "DRAM"), (near, "1 MiB")):
            if bandwidth:
                axes.plot(xs, [min(peak, x * bandwidth) for x in xs], label=f"{label}, {bandwidth:.0f} GB/s")
        marks = []
        for kind, name in (("forward", "forward GDN fp32 T=4096 H=16"), ("step", "decode step fp32 B=16 H=32")):
            row = f.row("ops", name, t)
            if row and kind == "forward":
                marks.append((114688 / (4 * 128 * 4), row["rate"], "GDN forward T=4096"))
            elif row:
                marks.append((7 / 8, row["rate"] * 7 / 8, "decode step B=16 H=32"))
        for x, y, label in marks:
            axes.plot([x], [y], "ko", markersize=5)
            axes.annotate(label, (x, y), textcoords="offset points", xytext=(6, -11), fontsize=7)
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="flop per byte of memory",
            ylabel="GFLOP/s",
            title=f"fp32 peak {peak:.0f} GFLOP/s, {t} threads",
        )
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3, which="both")
        figure.tight_layout()
        figure.savefig(folder / "roofline.png")


def report(path: pathlib.Path) -> int:
    figures = Figures(json.loads(path.read_text()))
    text = DOCUMENT.read_text()
    for name, content in sections(figures).items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if begin not in text or end not in text:
            print(f"{DOCUMENT.name} lacks the markers of {name}", file=sys.stderr)
            return 1
        head, rest = text.split(begin, 1)
        text = head + begin + "\n" + content + "\n" + end + rest.split(end, 1)[1]
    DOCUMENT.write_text(text)
    draw(figures, ROOT / "docs" / "images")
    print(f"wrote {DOCUMENT.relative_to(ROOT)} from {path.name}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("run", help="run the benchmarks")
    measure.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    measure.add_argument("--quick", action="store_true", help="short measurements: to see that everything works")
    write = commands.add_parser("report", help="write the document's tables and pictures")
    write.add_argument("--results", type=pathlib.Path, help="default: the newest in bench/results")
    args = parser.parse_args()
    if args.command == "run":
        return run(args.build.resolve(), args.quick)
    results = args.results or max(RESULTS.glob("*.json"), key=lambda p: p.stat().st_mtime, default=None)
    if results is None:
        print("no results yet: tools/bench.py run", file=sys.stderr)
        return 1
    return report(results)


if __name__ == "__main__":
    sys.exit(main())
