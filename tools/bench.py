#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs every benchmark into one file per machine, and writes the tables and pictures of the documents from it.

    tools/bench.py run      [--build build] [--quick]   -> bench/results/<machine>.json (tens of minutes)
    tools/bench.py report   [--results FILE]            -> docs/performance.md and README.md between their markers, and
                                                           docs/images/*.png

`run` goes on when a part fails, and says so in the file; what needs transformers is left out where it is not installed
(GDN_PEERS_PYTHON names another interpreter that has it), ggml and ik_llama.cpp where GDN_PEERS_GGML and GDN_PEERS_IK do
not name the folders of their libraries, vLLM's kernels where GDN_PEERS_VLLM does not name that of its sources.
Threads: 1, and all that this process may use.
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
from bench_goals import STREAMED, Figures  # noqa: E402
from bench_tables import draw, readme, sections  # noqa: E402
from machine import cpu_name  # noqa: E402

RESULTS = ROOT / "bench" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"


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
        for name in ("ggml", "ik", "vllm"):  # folders, see bench/native_peers.py and bench/vllm_peer.py
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
