# SPDX-License-Identifier: Apache-2.0
"""The tables and pictures of docs/performance.md and README.md, from a file of results (tools/bench.py report)."""

import pathlib

from bench_goals import SMALL, STREAMED, Figures, goal_rows


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


def percent(row: dict) -> str:
    return f"{100 * row['of_ceiling']:.0f} %" if "of_ceiling" in row else "-"


SHARE = ("of the ceiling", "of_ceiling", "{:.0%}")


def products(f: Figures) -> str:
    rows = []
    for row in f.result["parts"].get("ops", {}).get("rows", []):
        if row["name"].startswith("linear "):
            cells = [f"{row['rate']:.0f} {row['unit']}", percent(row), f"{row['torch/ours']:.2f}x"]
            rows.append([row["name"], str(row["threads"]), *cells])
    return table(["product", "threads", "rate", "of the ceiling", "times at::linear"], rows)


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
                cell("forward T=512", "of_ceiling", "{:.0%}"),
                cell("forward T=8192", "times T=512", "{:.2f}"),
                cell("forward T=16384", "times T=512", "{:.2f}"),
                cell("forward+backward T=512", "rate", "{:.0f}"),
                cell("forward+backward T=512", "of_ceiling", "{:.0%}"),
                cell("forward+backward T=8192", "times T=512", "{:.2f}"),
                cell(decode, "ms", "{:.3f}"),
                cell(decode, "state KiB", "{}"),
                cell(decode, "after 8192 tokens", "{}"),
            ]
        )
    header = ["mixer", "forward, tok/s at T=512", "of the ceiling", "time at T=8192", "at 16384"]
    header += ["forward + backward, tok/s at T=512", "of the ceiling", "time at T=8192"]
    return table([*header, "decode, ms", "state KiB", "after 8192 tokens"], rows)


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
                SHARE,
                ("mixer op %", "mixer op %", "{:.1f}"),
                ("GEMM %", "GEMM %", "{:.1f}"),
                ("small kernels %", "small kernels %", "{:.1f}"),
                ("optimizer %", "optimizer %", "{:.1f}"),
                ("rest %", "rest %", "{:.1f}"),
            ],
        ),
        "decode": plain(
            f,
            "decode",
            [("ms", "ms", "{:.3f}"), ("tok/s", "rate", "{:.0f}"), SHARE, ("state KiB", "state KiB", "{}")],
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

    def save(figure, axes, name, **legend):
        axes.set(xscale="log", yscale="log")
        axes.legend(fontsize=7, **legend)
        axes.grid(alpha=0.3, which="both")
        figure.tight_layout()
        figure.savefig(folder / name)

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
    axes.set(xlabel="tokens", ylabel="microseconds per token", title=f"B=1 H=16 K=V=128, fp32, {t} threads")
    save(figure, axes, "time-against-tokens.png")

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
        title = f"fp32 peak {peak:.0f} GFLOP/s, {t} thread{'s' if t > 1 else ''}"
        axes.set(xlabel="flop per byte of memory", ylabel="GFLOP/s", title=title)
        save(figure, axes, "roofline.png", title="memory read and written in place", title_fontsize=7)
