#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs every benchmark into one file per machine, and writes the tables and pictures of the documents from it.

    tools/bench.py run      [--build build] [--quick]   -> bench/results/<machine>.json (tens of minutes)
    tools/bench.py report   [--results FILE]            -> docs/performance.md and README.md between their markers, and
                                                           docs/images/*.png

`run` goes on when a part fails, and says so in the file; what needs transformers is left out where it is not installed
(GDN_PEERS_PYTHON names another interpreter that has it), ggml and ik_llama.cpp where GDN_PEERS_GGML and GDN_PEERS_IK do
not name the folders of their libraries. Threads: 1, and all that this process may use.
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
sys.path.insert(0, str(ROOT / "bench"))
from machine import cpu_name  # noqa: E402

RESULTS = ROOT / "bench" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"


# Mixers whose decoding of a long context is measured.
STREAMED = ("gated_delta_net", "kimi_delta_attention", "titans_lmm", "titans_mac")


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
    ]
    for mixer in STREAMED:
        model = ["--config", str(ROOT / "configs" / "demo.toml"), "--mixer", mixer]
        command = [program, "bench", "decode", "--threads", "1", "--dtype", "fp32", *model, "--tokens", long]
        list_.append((f"long decode {mixer}", [*command, "--out", "{out}"]))
    engine = build / "bench" / "bench_delta_rule"
    if engine.exists():
        for count in threads():
            command = ["env", f"OMP_NUM_THREADS={count}", str(engine), "--table", "--json={out}"]
            list_.append((f"engine {count}", command))
    else:
        print("engine: left out, not built (cmake --preset release -DGDN_BENCH=ON)", file=sys.stderr)
    python = os.environ.get("GDN_PEERS_PYTHON", sys.executable)
    memories = [python, str(ROOT / "bench" / "memory_peers.py"), *t, "--seconds", "0.5" if quick else "5"]
    list_.append(("memories", [*memories, "--json", "{out}"]))
    found = subprocess.run([python, "-c", "import torch, transformers"], capture_output=True)
    if found.returncode == 0:
        peers = [python, str(ROOT / "bench" / "peers.py"), "--seq-len", "512", "4096", "--heads", "16", "32", *t]
        for name in ("ggml", "ik"):  # folders of libraries, see bench/native_peers.py
            if folder := os.environ.get(f"GDN_PEERS_{name.upper()}"):
                peers += [f"--{name}", folder]
        models = [python, str(ROOT / "bench" / "transformers_models.py"), "--threads", t[-1]]
        list_.append(("transformers", [*models, "--repeats", "1" if quick else "3", "--json", "{out}"]))
        list_.append(("peers", [*peers, "--seconds", "0.5" if quick else "2.5", "--json", "{out}"]))
    else:
        print("peers: left out, transformers is not installed (pip install transformers)", file=sys.stderr)
    return list_


def run(build: pathlib.Path, quick: bool, only: list[str]) -> int:
    all_parts = parts(build, quick)
    names = [name for name, _ in all_parts]
    if unknown := [name for name in only if name not in names]:
        print(f"no such part: {', '.join(unknown)}; there are: {', '.join(map(repr, names))}", file=sys.stderr)
        return 2
    result = {"about": {}, "parts": {}, "failed": {}}
    environment = dict(os.environ, GDN_LIBRARY=str(build / "libgdn.so"))
    with tempfile.TemporaryDirectory() as folder:
        for name, command in all_parts:
            if only and name not in only:
                continue
            out = pathlib.Path(folder) / f"{slug(name)}.json"
            print(f"== {name}", flush=True)
            start = time.monotonic()
            try:
                about = {"date": time.strftime("%Y-%m-%d"), "quick": quick, "versions": {"gdn": version(build)}}
                done = subprocess.run([word.format(out=out) for word in command], env=environment, timeout=900)
                if done.returncode != 0:
                    raise RuntimeError(f"exit status {done.returncode}")
                part = json.loads(out.read_text())
                result["parts"][name], result["about"][name] = part, about | {"versions": versions(part, about)}
                save(result, keep=bool(only))  # so that a run that is stopped keeps what it has
            except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
                result["failed"][name] = str(error)
                print(f"{name}: failed: {error}", file=sys.stderr)
            print(f"== {name} took {time.monotonic() - start:.0f} seconds", flush=True)
    if not result["parts"]:
        print("no benchmark ran", file=sys.stderr)
        return 1
    print(f"wrote {save(result, keep=bool(only)).relative_to(ROOT)}")
    return 1 if result["failed"] else 0


def version(build: pathlib.Path) -> str:
    """What the program says of itself, with its commit: parts that name none use the libraries of the same build."""
    command = [str(build / "bin" / "gdn"), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def versions(part: dict | list, about: dict) -> dict:
    """The versions that a part names itself, above those of its build."""
    own = part.get("versions", {}) if isinstance(part, dict) else {}
    return about["versions"] | (own if isinstance(own, dict) else {"peers": own})


def load(path: pathlib.Path) -> dict:
    """A machine's file. Where date and versions stand for all of it, as they once did, each part gets them."""
    result = json.loads(path.read_text())
    if "about" not in result:
        about = {key: result.pop(key) for key in ("date", "quick", "versions")}
        result["about"] = {name: about | {"versions": versions(part, about)} for name, part in result["parts"].items()}
    return result


def save(result: dict, keep: bool) -> pathlib.Path:
    """Writes the machine's file; `keep`: with the parts of the file so far that were not measured now."""
    for part in result["parts"].values():
        if isinstance(part, dict) and isinstance(part.get("machine"), dict):
            result["machine"] = part["machine"]
            break
    machine = result.get("machine", {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))})
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{slug(machine['cpu'])}-{machine['cores']}-cpus.json"
    if keep and path.exists():
        old = load(path)
        merged = {key: old[key] | result[key] for key in ("about", "parts")}
        failed = {name: why for name, why in (old["failed"] | result["failed"]).items() if name not in result["parts"]}
        result = old | result | merged | {"failed": failed}
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


# --- the report -------------------------------------------------------------------------------------------------------


class Figures:
    """The rows of a result by part, name and threads."""

    def __init__(self, result: dict):
        self.result = result
        tables = [part for part in result["parts"].values() if isinstance(part, dict)]
        self.threads = sorted({row["threads"] for part in tables for row in part["rows"]})

    def row(self, part: str, name: str, t: int) -> dict | None:
        rows = self.result["parts"].get(part, {}).get("rows", [])
        found = [row for row in rows if row.get("name", row.get("mode")) == name and row["threads"] == t]
        return found[0] if found else None

    def ms(self, name: str, t: int, part: str = "ops") -> float | None:
        row = self.row(part, name, t)
        return row["ms"] if row else None

    def peer_row(self, mode: str, t: int, T: int | None, H: int | None, peer: str = "transformers") -> dict | None:
        for row in self.result["parts"].get("peers", {}).get("rows", []):
            found = row["mode"], row["threads"], row.get("T"), row.get("H"), row["peer"]
            if found == (mode, t, T, H, peer):
                return row
        return None

    def eighths(self, mixer: str) -> tuple[dict, dict] | None:
        """The first and the last eighth of a long decoding."""
        rows = self.result["parts"].get(f"long decode {mixer}", {}).get("rows", [])
        rows = [row for row in rows if "up to" in row["name"]]
        return (rows[0], rows[-1]) if rows else None

    def fp32_peak(self, t: int) -> float | None:
        row = self.row("ceilings", f"fp32 multiply-add, {self.result.get('machine', {}).get('simd')}", t)
        return row["rate"] if row else None

    def bf16_peak(self, t: int) -> float | None:
        rows = [self.row("ceilings", f"bf16 products, {name}", t) for name in ("AMX", "AVX512_BF16")]
        return max([row["rate"] for row in rows if row], default=self.fp32_peak(t))

    def possible(self, row: dict) -> float | None:
        """How many times as fast as the peer this row would be if it were nothing but its products, at the peak."""
        fp32, bf16 = self.fp32_peak(row["threads"]), self.bf16_peak(row["threads"])
        if fp32 is None:
            return None
        if row["mode"] in OP_FLOP:
            least_ms = 1e-6 * OP_FLOP[row["mode"]] * row["T"] * row["H"] / fp32
        elif row["mode"].startswith("train"):
            products = MODEL_PRODUCTS / (bf16 if row["mode"].endswith("bf16") else fp32)
            least_ms = 1e-6 * row["tokens"] * (products + MODEL_OP / fp32)
        else:
            return None
        return row["peer_ms"] / least_ms

    def mixer(self, name: str, what: str, key: str = "ms") -> float | None:
        """A figure of `gdn bench mixers`, which runs on all threads."""
        row = self.row("mixers", f"{name} {what}", self.threads[-1]) if self.threads else None
        return row.get(key) if row else None

    def mixer_names(self) -> list[str]:
        rows = self.result["parts"].get("mixers", {}).get("rows", [])
        return list(dict.fromkeys(row["name"].split(" ")[0] for row in rows))


# Operations that the chunk form cannot avoid, per token and head at K = V = 128 (docs/performance.md, Method).
OP_FLOP = {"forward": 114688, "forward + backward": 352256}
# The model of bench/peers.py per token of a training step: products with weights (6 for each of them), and the op.
MODEL_PRODUCTS = 6 * (4 * (5 * 256 * 256 + 2 * 256 * 4 + 3 * 256 * 768) + 512 * 256)
MODEL_OP = 4 * 4 * 102400

# Goals that only a machine with AMX can show: what, goal, and whether the engine's own benchmark measures it there.
AMX_GOALS = (
    ("bf16 forward, amx: times a rough AMX sketch", "at least 1.3x", False),
    ("bf16 forward, amx: times the fallback", "at least 18x", False),
    ("bf16 forward, amx", "at least 3 x our fp32", True),
    ("bf16 forward, amx: rms error against fp64", "at most 3.0e-3", False),
    ("bf16 forward + backward, amx", "at least 2.5 x our fp32", True),
    ("KDA bf16 forward, amx", "at least 2.5 x our fp32", True),
)

SMALL = ("short conv", "RMS norm", "gated RMS norm", "L2 norm", "SwiGLU", "channel gate", "cross-entropy")


def shown(value: float, goal: float | None, at_least: bool, form: str = "{:.2f}", scale: float = 1) -> str:
    """The value with as many digits as it takes for it to meet or miss its goal as it does unrounded."""

    def meets(number: float) -> bool:
        return number >= goal if at_least else number <= goal

    digits = int(re.search(r"\.(\d)f", form)[1])
    text = form.format(scale * value)
    for more in range(1, 4):
        if goal is None or meets(float(re.match(r"[-\d.]+", text)[0]) / scale) == meets(value):
            break
        text = form.replace(f".{digits}f", f".{digits + more}f").format(scale * value)
    return text


def verdict(numbers: list[float], goal: float, at_least: bool) -> str:
    if not numbers:
        return "not measured"
    good = [n >= goal if at_least else n <= goal for n in numbers]
    return "met" if all(good) else "not met" if not any(good) else "partly"


def engine_rows(f: Figures):
    """The rows that the engine's own benchmark measures and judges, 1 thread beside all."""
    tables = [f.result["parts"].get(f"engine {t}", []) for t in f.threads]
    names = list(dict.fromkeys(row["name"] for rows in tables for row in rows))
    for name in names:
        found = [row for rows in tables for row in rows if row["name"] == name]
        met = [row["met"] for row in found]
        first = found[0]
        yield (
            name,
            f"{first['goal_is']} {first['goal']:g} {first['unit']}",
            " / ".join(shown(row["figure"], row["goal"], row["goal_is"] == "at least") for row in found),
            "met" if all(met) else "partly" if any(met) else "not met",
        )


def mixer_goals(f: Figures):
    """The goals of whole layers of equal width: flat in T, and what one may cost beside another."""
    flat = {}
    for name in f.mixer_names():
        if f.mixer(name, "forward T=16384"):  # measured for the recurrent ones
            whats = ("forward T=8192", "forward T=16384", "forward+backward T=8192")
            flat[name] = max(f.mixer(name, what, "times T=512") or 0 for what in whats)
    if flat:
        above = ", ".join(f"{name} {shown(value, 1.15, False)}" for name, value in flat.items() if value > 1.15)
        yield (
            "recurrent mixers: time per token at T=8192 and 16384 beside T=512",
            "at most 1.15x",
            f"{sum(v <= 1.15 for v in flat.values())} of {len(flat)} mixers" + (f"; above: {above}" if above else ""),
            verdict(list(flat.values()), 1.15, False),
        )
    for name, base, goal in (
        ("kimi_delta_attention", "gated_delta_net", 1.5),
        ("delta_net", "gated_delta_net", 1),
        ("linear_attention", "gated_delta_net", 1),
        ("mamba2", "gated_delta_net", 1),
        ("dplr", "kimi_delta_attention", None),
        ("ttt_linear", "gated_delta_net", 4),
        ("titans_lmm", "gated_delta_net", 10),
    ):
        ratios = []
        for what in ("forward T=8192", "forward+backward T=8192"):
            times = f.mixer(name, what), f.mixer(base, what)
            if all(times):
                ratios.append(times[0] / times[1])
        if goal in (4, 10):  # of training
            ratios = ratios[1:]
        figure = " / ".join(shown(ratio, goal, False, "{:.2f}x") for ratio in ratios) or "-"
        what = "forward + backward" if goal in (4, 10) else "forward / forward + backward"
        judged = verdict(ratios, goal, False) if goal else "printed"
        yield f"layer of {name}: time of {base}, {what}", f"at most {goal}x" if goal else "-", figure, judged


def goal_rows(f: Figures):
    """(what, goal, figure, verdict) for each goal; figures are for 1 thread / all threads."""

    yield from engine_rows(f)

    def against(what, mode, goal, T=None, H=None, of=f.threads):
        rows = [r for r in (f.peer_row(mode, t, T, H) for t in of) if r]
        ratios = [r["peer_ms"] / r["gdn_ms"] for r in rows]
        limits = [limit for limit in map(f.possible, rows) if limit]
        text = " / ".join(shown(ratio, goal, True, "{:.1f}x") for ratio in ratios) or "-"
        if limits:
            text += "; the peak allows " + " / ".join(f"{limit:.1f}x" for limit in limits)
        judged = verdict(ratios, goal, True)
        if judged != "met" and limits and max(limits) < goal:
            judged = "beyond this machine"
        return f"{what}: times {'transformers' if T is None else 'the fallback'}", f"at least {goal:g}x", text, judged

    for T, goal in ((512, 5.5), (4096, 6)):
        for H in (16, 32):
            yield against(f"forward, T={T} H={H}", "forward", goal, T, H)
    for T, goal in ((512, 5), (4096, 15)):
        for H in (16, 32):
            yield against(f"forward + backward, T={T} H={H}", "forward + backward", goal, T, H)
    for t, goal in ((1, 8), (2, 5)):
        if t in f.threads:
            yield against(f"decode step from Python, H=16, threads: {t}", "decode step", goal, 1, 16, [t])
    for dtype, goal in (("fp32", 2.5), ("bf16", 4)):
        yield against(f"training step of the model, {dtype}", f"train {dtype}", goal)
    for dtype in ("fp32", "bf16"):
        yield against(f"decoding of the model, B=1, {dtype}", f"decode {dtype}", 5)
    yield from mixer_goals(f)
    for name in ("ttt_linear", "titans_lmm, depth 2"):
        memory = f.row("memories", name, f.threads[-1])
        times = [memory["peer_ms"] / memory["ms"]] if memory else []
        figure = shown(times[0], 3, True, "{:.1f}x") if times else "-"
        yield f"{name}, all threads: times plain PyTorch", "at least 3x", figure, verdict(times, 3, True)
    for key, goal, what, form in (
        ("of_ceiling", 0.8, "of what memory or exp allow", "{:.0f} %"),
        ("of memory or multipliers", 0.8, "of what memory or the multipliers allow", "{:.0f} %"),
        ("of memory or own", 0.8, "of what memory or their own instructions allow", "{:.0f} %"),
        ("torch/ours", 2, "times the torch composition", "{:.1f}x"),
    ):
        rows = [row for row in f.result["parts"].get("ops", {}).get("rows", []) if row["name"].startswith(SMALL)]
        values = sorted(row[key] for row in rows if key in row)
        if values:
            scale = 100 if "%" in form else 1
            low, middle = (shown(v, goal, True, form, scale) for v in (values[0], values[len(values) // 2]))
            good = sum(value >= goal for value in values)
            figure = f"{good} of {len(values)} rows; least {low}, median {middle}"
            yield f"small kernels: {what}", f"at least {form.format(scale * goal)}", figure, verdict(values, goal, True)
    measured = {row["name"] for t in f.threads for row in f.result["parts"].get(f"engine {t}", [])}
    amx = any(name.endswith(", amx") for name in measured)
    for what, goal, by_engine in AMX_GOALS:
        if not (amx and by_engine):
            yield what, goal, "-", "not measured" if amx else "no machine with AMX was at hand"
    reason = "not measured: part of a build of vLLM, which no benchmark here makes"
    yield "bf16 forward: times vLLM's kernel for CPUs", "- (about 3.3x with AMX)", "-", reason


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def small_kernels(f: Figures) -> str:
    rows = []
    for row in f.result["parts"].get("ops", {}).get("rows", []):
        if row["name"].startswith(SMALL) and row["threads"] == f.threads[0]:
            again = f.row("ops", row["name"], f.threads[-1])

            def pair(key, scale, form, a=row, b=again):
                return " / ".join(form.format(scale * r[key]) if key in r else "-" for r in ([a] if a is b else [a, b]))

            rows.append(
                [
                    row["name"],
                    pair("ms", 1, "{:.2f}"),
                    pair("of_ceiling", 100, "{:.0f} %"),
                    row["bound by"],
                    pair("of memory or multipliers", 100, "{:.0f} %"),
                    pair("of memory or own", 100, "{:.0f} %"),
                    pair("torch/ours", 1, "{:.1f}x"),
                ]
            )
    header = [
        "kernel",
        "ms",
        "of what memory or exp allows",
        "bound",
        "of what memory or the multipliers allow",
        "of what memory or its own instructions allow",
        "times the torch composition",
    ]
    return table(header, rows)


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
                row["peer"],
                row["mode"],
                shape,
                str(row["threads"]),
                f"{row['gdn_ms']:.3g}",
                f"{row['peer_ms']:.3g}",
                f"{row['peer_ms'] / row['gdn_ms']:.1f}x",
                f"{limit:.1f}x" if (limit := f.possible(row)) else "-",
            ]
        )
    return table(["peer", "", "shape", "threads", "gdn, ms", "peer, ms", "ratio", "the peak allows"], rows)


def mixers(f: Figures) -> str:
    """One row per mixer from its rows of `gdn bench mixers`."""
    rows = []
    for name in f.mixer_names():

        def cell(what, key, form, name=name):
            value = f.mixer(name, what, key)
            return "-" if value is None else form.format(value)

        decode = "decode B=1 after 8192 tokens"
        rows.append(
            [
                name,
                cell("forward T=512", "rate", "{:.0f}"),
                cell("forward T=8192", "times T=512", "{:.2f}"),
                cell("forward T=16384", "times T=512", "{:.2f}"),
                cell("forward+backward T=512", "rate", "{:.0f}"),
                cell("forward+backward T=8192", "times T=512", "{:.2f}"),
                cell(decode, "ms", "{:.3f}"),
                cell(decode, "state KiB", "{}"),
                cell(decode, "after 8192 tokens", "{}"),
            ]
        )
    header = ["mixer", "forward, tok/s at T=512", "time at T=8192", "at 16384", "forward + backward, tok/s at T=512"]
    return table([*header, "time at T=8192", "decode, ms", "state KiB", "after 8192 tokens"], rows)


def memories(f: Figures) -> str:
    columns = ["ms", "peer_ms"]
    rows = []
    for row in f.result["parts"].get("memories", {}).get("rows", []):
        cells = [f"{row[key]:.1f}" for key in columns]
        cells += [f"{row['peer_ms'] / row['ms']:.1f}x", f"{row['rate']:.0f}", f"{row['gflops']:.0f}"]
        rows.append([row["name"], str(row["threads"]), *cells])
    return table(["", "threads", "gdn, ms", "plain PyTorch, ms", "ratio", "gdn tok/s", "gdn GFLOP/s"], rows)


def long_decoding(f: Figures) -> str:
    rows = []
    for mixer in STREAMED:
        if (ends := f.eighths(mixer)) is None:
            continue
        first, last = ends
        cells = [last["name"].split()[-1], f"{1e3 * first['ms']:.1f}", f"{1e3 * last['ms']:.1f}"]
        for key in ("state KiB", "process MiB"):
            cells += [str(first[key]), str(last[key])]
        rows.append([mixer, *cells])
    header = ["", "tokens", "us per token, first eighth", "last eighth", "state KiB, first", "last"]
    return table([*header, "process MiB, first", "last"], rows)


def origin(result: dict) -> str:
    """Which build and day the figures are of: one for all parts, or each with the parts that are of it."""
    groups: dict[tuple, list[str]] = {}
    for name in result["parts"]:
        about = result["about"].get(name, {})
        gdn = about.get("versions", {}).get("gdn", "unknown version")
        groups.setdefault((gdn, about.get("date", "unknown date"), about.get("quick", False)), []).append(name)
    lines = []
    for (gdn, date, quick), names in groups.items():
        compilers = {result["about"].get(name, {}).get("versions", {}).get("compiler") for name in names} - {None}
        compiler = "".join(f"; compiler {text}" for text in sorted(compilers))
        lines.append(f"{gdn}{compiler}; {date}" + ("; short measurements (--quick)" if quick else ""))
        if len(groups) > 1:
            lines[-1] = f"{', '.join(names)}: {lines[-1]}"
    return lines[0] if len(lines) == 1 else "parts of different runs:\n\n- " + "\n- ".join(lines)


def sections(f: Figures) -> dict[str, str]:
    r = f.result
    machine = r.get("machine", {})
    heading = f"{machine.get('cpu')}, {machine.get('cores')} CPUs, SIMD {machine.get('simd')}; {origin(r)}."
    if r["failed"]:
        heading += "\n\nFailed: " + ", ".join(f"{k} ({v})" for k, v in r["failed"].items()) + "."
    goals = table(["what (1 thread / all)", "goal", "figure", ""], [list(row) for row in goal_rows(f)])
    rate = ("rate", "rate", "{:.4g}")
    return {
        "machine": heading,
        "goals": goals,
        "small": small_kernels(f),
        "peers": peers(f),
        "transformers": plain(
            f,
            "transformers",
            [
                ("transformers, ms", "transformers ms", "{:.1f}"),
                ("gdn, ms", "gdn ms", "{:.1f}"),
                ("speed-up", "speed-up", "{:.2f}x"),
                ("limit", "limit", "{:.2f}x"),
                ("of the limit", "of limit", "{:.2f}"),
                ("share before, %", "share before %", "{:.1f}"),
                ("share after, %", "share after %", "{:.1f}"),
            ],
        ),
        "products": products(f),
        "memories": memories(f),
        "ceilings": plain(f, "ceilings", [rate, ("unit", "unit", "{}")]),
        "mixers": mixers(f),
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
        "long": long_decoding(f),
    }


def readme(f: Figures) -> dict[str, str]:
    """The few rows of the README: 1 thread / all threads, from the same figures as docs/performance.md."""
    rows = []

    def ratios(mode, T, peer="transformers", H=16):
        found = [r for t in f.threads if (r := f.peer_row(mode, t, T, H, peer))]
        return " / ".join(f"{r['peer_ms'] / r['gdn_ms']:.1f}x" for r in found) if found else None

    def beside(mode, T):
        """Times of both, their ratio, and the ratios to the other peers."""
        found = [r for t in f.threads if (r := f.peer_row(mode, t, T, 16))]
        scale, unit = (1e3, "us") if T == 1 else (1, "ms")
        mine, theirs = (" / ".join(f"{scale * r[key]:.3g}" for r in found) for key in ("gdn_ms", "peer_ms"))
        text = f"{mine} {unit}; transformers {theirs} {unit}, **{ratios(mode, T)}**"
        if T == 512 and (longer := ratios(mode, 4096)):
            text += f" (T=4096 **{longer}**)"
        for peer in ("ggml", "ik_llama.cpp"):
            if other := ratios(mode, T, peer):
                text += f"; {peer} **{other}**"
                limits = [f.possible(r) for t in f.threads if (r := f.peer_row(mode, t, T, 16, peer))]
                if peer == "ik_llama.cpp" and all(limits):
                    text += f" (the peak of fp32 allows {' / '.join(f'{limit:.1f}x' for limit in limits)})"
        return text

    command = f"`python bench/peers.py --seq-len 512 4096 --threads {' '.join(map(str, f.threads))}`"
    for what, mode, T in (
        ("Gated delta rule forward, T=512, H=16, K=V=128, fp32", "forward", 512),
        ("the same, forward + backward", "forward + backward", 512),
        ("the same, one decoding step, from Python", "decode step", 1),
    ):
        if ratios(mode, T):
            rows.append([what, beside(mode, T), command])
            command = ""
    for backend, name in (("amx", "AMX"), ("avx512", "AVX512_BF16")):
        engine = [row for t in f.threads for row in f.result["parts"].get(f"engine {t}", [])]
        figures = [row["figure"] for row in engine if row["name"] == f"bf16 forward T=4096 H=16, {backend}"]
        if figures:
            text = f"**{' / '.join(f'{figure:.1f}x' for figure in figures)}** by {name}"
            command = "`build/bench/bench_delta_rule --table=bf16` (built with `cmake --preset release -DGDN_BENCH=ON`)"
            rows.append(["bf16 inputs, T=4096, against our own fp32: forward", text, command])
    texts = []
    for mode, what in (("train", "training step"), ("decode", "greedy decoding")):
        kinds = [(dtype, ratios(f"{mode} {dtype}", None, H=None)) for dtype in ("fp32", "bf16")]
        if kinds := [f"{dtype} **{text}**" for dtype, text in kinds if text]:
            texts.append(f"{what} " + ", ".join(kinds))
    if texts:
        what = "A model of 3.96 M parameters, against Qwen3NextForCausalLM"
        rows.append([what, "; ".join(texts), "`python bench/peers.py --only model`"])
    command = "`python bench/transformers_models.py`"
    for mode, what in (
        ("prefill", "A Qwen3-Next-like model of 104 M after `gdn.patch_transformers()`: prefill of 2,048 tokens"),
        ("train", "that model, training step"),
    ):
        texts = []
        for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16")):
            if row := f.row("transformers", f"{mode}, {dtype}", f.threads[-1]):
                share = f"their share falls from {row['share before %']:.0f} to {row['share after %']:.0f} %"
                limit = f"{row['limit']:.2f}x if the replaced functions took no time"
                texts.append(f"{short} **{row['speed-up']:.2f}x** ({limit}; {share})")
        if texts:
            rows.append([what, "; ".join(texts), command])
            command = ""
    texts, state, memory = [], 0, 0
    for mixer in STREAMED:
        if ends := f.eighths(mixer):
            first, last = ends
            texts.append(f"`{mixer}` **{last['ms'] / first['ms']:.2f}x**")
            state = max(state, last["state KiB"] - first["state KiB"])
            memory = max(memory, last["process MiB"] - first["process MiB"])
    if texts:
        tokens = int(last["name"].split()[-1])
        what = f"{tokens:,} tokens decoded: time per token in the last eighth over that in the first"
        texts.append(f"states grow by {state} KiB, the process by {memory} MiB at most")
        command = f"`gdn bench decode --threads 1 --dtype fp32 -n {tokens} --config configs/demo.toml --mixer NAME`"
        rows.append([what, "; ".join(texts), command])
    machine = f.result.get("machine", {})
    names = {about["versions"].get("peers") for about in f.result["about"].values()} - {None}
    with_ = f", with {names.pop()}" if len(names) == 1 else ""
    counts = " / ".join(f"{t} thread{'s' if t > 1 else ''}" for t in f.threads)
    head = f"{machine.get('cpu')}, {machine.get('cores')} CPUs, SIMD {machine.get('simd')}{with_}.\n"
    head += f"Two figures: {counts}; the model of 104 M parameters runs on {f.threads[-1]}, the long decoding on 1."
    return {"results": head + "\n\n" + table(["what", "figure", "command"], rows)}


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
            if (row["peer"], row["mode"], row["threads"], row.get("H")) == ("transformers", mode, t, 16)
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

    # Roofline: the fp32 peak, and the rate of memory for each working set, with what the kernels reach.
    peak, update = f.fp32_peak(t), "read and write in place "
    rates = [
        (row["name"].removeprefix(update), row["rate"])
        for row in f.result["parts"].get("ceilings", {}).get("rows", [])
        if row["threads"] == t and row["name"].startswith(update)
    ]
    if peak and rates:
        figure, axes = plt.subplots(figsize=(6.4, 3.8), dpi=90)
        xs = [2 ** (i / 4) / 16 for i in range(53)]
        for i, (size, bandwidth) in enumerate(rates):
            color = plt.cm.viridis(0.9 * i / len(rates))
            axes.plot(xs, [min(peak, x * bandwidth) for x in xs], color=color, label=f"{size}: {bandwidth:.0f} GB/s")
        marks = []
        if row := f.row("ops", "forward GDN fp32 T=4096 H=16", t):  # reads q, k and v and writes o
            marks.append((114688 / (4 * 128 * 4), row["rate"], "forward T=4096 H=16"))
        if row := f.row("ops", "decode step fp32 B=16 H=32", t):  # reads and writes states; 7 operations per element
            marks.append((7 / 8, row["rate"] * 7 / 8, "decode step B=16 H=32, 32 MiB of states"))
        for x, y, label in marks:
            axes.plot([x], [y], "ko", markersize=5)
            axes.annotate(label, (x, y), textcoords="offset points", xytext=(7, -10), fontsize=7)
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="flop per byte of memory",
            ylabel="GFLOP/s",
            title=f"fp32 peak {peak:.0f} GFLOP/s, {t} thread{'s' if t > 1 else ''}",
        )
        axes.legend(fontsize=7, title="memory read and written in place", title_fontsize=7)
        axes.grid(alpha=0.3, which="both")
        figure.tight_layout()
        figure.savefig(folder / "roofline.png")


def filled(text: str, contents: dict[str, str]) -> str:
    """The document's text with each content between its markers. KeyError: the name whose markers are missing."""
    for name, content in contents.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if begin not in text or end not in text:
            raise KeyError(name)
        head, rest = text.split(begin, 1)
        text = head + begin + "\n" + content + "\n" + end + rest.split(end, 1)[1]
    return text


def report(path: pathlib.Path) -> int:
    try:
        figures = Figures(load(path))
    except OSError as error:
        print(f"cannot read {path}: {error.strerror}; tools/bench.py run makes such a file", file=sys.stderr)
        return 1
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        print(f"{path} is not a file of results: {error}", file=sys.stderr)
        return 1
    texts = {}
    for document, contents in ((DOCUMENT, sections(figures)), (README, readme(figures))):
        try:
            texts[document] = filled(document.read_text(), contents)
        except KeyError as error:
            print(f"{document.name} lacks the markers of {error.args[0]}", file=sys.stderr)
            return 1
    for document, text in texts.items():
        document.write_text(text)
        print(f"wrote {document.relative_to(ROOT)} from {path.name}")
    draw(figures, ROOT / "docs" / "images")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("run", help="run the benchmarks")
    measure.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    measure.add_argument("--quick", action="store_true", help="short measurements: to see that everything works")
    only = "e.g. ceilings ops 'engine 1' peers; the other parts of the machine's file are kept"
    measure.add_argument("--only", nargs="+", default=[], metavar="PART", help=only)
    write = commands.add_parser("report", help="write the documents' tables and pictures")
    write.add_argument("--results", type=pathlib.Path, help="default: the newest in bench/results")
    args = parser.parse_args()
    if args.command == "run":
        return run(args.build.resolve(), args.quick, args.only)
    results = args.results or max(RESULTS.glob("*.json"), key=lambda p: p.stat().st_mtime, default=None)
    if results is None:
        print("no results yet: tools/bench.py run", file=sys.stderr)
        return 1
    return report(results)


if __name__ == "__main__":
    sys.exit(main())
