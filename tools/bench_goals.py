# SPDX-License-Identifier: Apache-2.0
"""The goals of the benchmarks, and what a file of results says of each (tools/bench.py report)."""

import re

# Mixers whose decoding of a long context is measured.
STREAMED = ("gated_delta_net", "kimi_delta_attention", "titans_lmm", "titans_mac")


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
            peak = bf16 if row["peer"] == VLLM else fp32
            least_ms = 1e-6 * OP_FLOP[row["mode"]] * row["T"] * row["H"] / peak
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


VLLM = "vLLM (bf16)"  # the peer of bench/peers.py that both sides' q, k and v are in bf16 for

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
    yield from vllm_rows(f)


def vllm_rows(f: Figures):
    """Both sides in bf16, on whatever products of bf16 the machine has; what is said of AMX is no goal elsewhere."""
    what, about = "bf16 {}: times vLLM's kernel for CPUs", "- (about 3.3x with AMX)"
    found = False
    for mode, T in (("forward", 512), ("forward", 4096), ("decode step", 1)):
        rows = [row for t in f.threads if (row := f.peer_row(mode, t, T, 16, VLLM))]
        if rows:
            found = True
            figure = " / ".join(f"{row['peer_ms'] / row['gdn_ms']:.1f}x" for row in rows)
            name = f"{mode} T={T} H=16" if mode == "forward" else "decode step from Python, fp32 state, H=16"
            yield what.format(name), about if mode == "forward" else "-", figure, "printed"
    if not found:
        yield what.format("forward"), about, "-", "not in this run, whose GDN_PEERS_VLLM named no sources of it"
