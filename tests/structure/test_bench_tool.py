# SPDX-License-Identifier: Apache-2.0
"""tools/bench.py without a benchmark: files of results, and what the documents say of them."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "bench.py"
sys.path.insert(0, str(TOOL.parent))
import bench_goals  # noqa: E402
import bench_tables  # noqa: E402


@pytest.fixture
def bench(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


MACHINE = {"cpu": "A CPU", "cores": 2, "simd": "avx512"}


def part(commit: str) -> dict:
    return {"machine": MACHINE, "versions": {"gdn": f"gdn 1 (commit {commit})", "compiler": "12"}, "rows": []}


def about(commit: str, date: str) -> dict:
    return {"date": date, "quick": False, "versions": {"gdn": f"gdn 1 (commit {commit})"}}


def test_each_part_keeps_the_build_and_the_day_it_is_of(bench, tmp_path):
    old = {"date": "2026-01-01", "quick": False, "failed": {}, "machine": MACHINE}
    old |= {"versions": {"gdn": "gdn 1 (commit aaa)"}}
    parts = {"ops": part("aaa"), "peers": {"versions": "torch 2, transformers 5", "rows": []}, "engine 1": []}
    (tmp_path / "a-cpu-2-cpus.json").write_text(json.dumps(old | {"parts": parts}))
    loaded = bench.load(tmp_path / "a-cpu-2-cpus.json")
    assert bench_tables.origin(loaded) == "gdn 1 (commit aaa); compiler 12; 2026-01-01"
    assert loaded["about"]["peers"]["versions"] == {"gdn": "gdn 1 (commit aaa)", "peers": "torch 2, transformers 5"}

    new = {"about": {"ops": about("bbb", "2026-02-02")}, "parts": {"ops": part("bbb")}, "failed": {"peers": "why"}}
    path = bench.save(new, keep=True)
    merged = bench.load(path)
    assert set(merged["parts"]) == {"ops", "peers", "engine 1"} and merged["failed"] == {"peers": "why"}
    assert merged["about"]["ops"]["date"] == "2026-02-02" and merged["about"]["engine 1"]["date"] == "2026-01-01"
    text = bench_tables.origin(merged)
    assert "- ops: gdn 1 (commit bbb); 2026-02-02" in text
    assert "- peers, engine 1: gdn 1 (commit aaa); 2026-01-01" in text
    assert bench.save(new, keep=False) == path and set(bench.load(path)["parts"]) == {"ops"}


def test_a_part_names_its_own_versions(bench):
    known = about("aaa", "2026-01-01")
    assert bench.versions([], known) == {"gdn": "gdn 1 (commit aaa)"}
    assert bench.versions(part("bbb"), known) == {"gdn": "gdn 1 (commit bbb)", "compiler": "12"}


def test_rounding_does_not_contradict_the_verdict():
    assert bench_goals.shown(1.97, 2, True, "{:.1f}x") == "1.97x"
    assert bench_goals.shown(2.03, 2, True, "{:.1f}x") == "2.0x"
    assert bench_goals.shown(1.2, 2, True, "{:.1f}x") == "1.2x"
    assert bench_goals.shown(0.797, 0.8, True, "{:.0f} %", 100) == "79.7 %"
    assert bench_goals.shown(0.802, 0.8, True, "{:.0f} %", 100) == "80 %"
    assert bench_goals.shown(1.1504, 1.15, False) == "1.1504"
    assert bench_goals.shown(1.1504, None, False) == "1.15"


def test_goals_of_amx_stand_once_until_they_are_measured():
    def rows(engine):
        result = {
            "about": {},
            "machine": MACHINE,
            "failed": {},
            "parts": {"ops": {"rows": [{"name": "x", "threads": 1}]}},
        }
        result["parts"]["engine 1"] = engine
        return list(bench_goals.goal_rows(bench_goals.Figures(result)))

    without = [row for row in rows([]) if ", amx" in row[0]]
    assert [row[1].split()[2] for row in without] == ["1.3x", "18x", "3", "3.0e-3", "2.5", "2.5"]
    assert {row[3] for row in without} == {"no machine with AMX was at hand"}
    measured = {"name": "bf16 forward T=512 H=16, amx", "goal": 3.0, "goal_is": "at least", "figure": 3.1}
    with_ = rows([measured | {"unit": "x our fp32", "met": True, "threads": 1}])
    assert [row[3] for row in with_ if row[0] == measured["name"]] == ["met"]
    assert [row[3] for row in with_ if ", amx:" in row[0]] == ["not measured"] * 3
    assert not [row for row in with_ if row[0] == "bf16 forward, amx"]


def test_vllm_is_compared_where_it_was_measured():
    def rows(peers):
        parts = {"peers": {"rows": [{"threads": 1, "mode": "forward", "T": 4096, "H": 16} | row for row in peers]}}
        parts["ceilings"] = {"rows": [{"name": "fp32 multiply-add, avx512", "threads": 1, "rate": 100.0}]}
        parts["ceilings"]["rows"] += [{"name": "bf16 products, AVX512_BF16", "threads": 1, "rate": 200.0}]
        figures = bench_goals.Figures({"about": {}, "machine": MACHINE, "failed": {}, "parts": parts})
        found = [row for row in bench_goals.goal_rows(figures) if "vLLM" in row[0]]
        return found, [figures.possible(row) for row in parts["peers"]["rows"]]

    fp32 = {"peer": "ggml", "gdn_ms": 1.0, "peer_ms": 9.0}
    assert [row[2:] for row in rows([fp32])[0]] == [
        ("-", "not in this run, whose GDN_PEERS_VLLM named no sources of it")
    ]
    found, limits = rows([fp32, {"peer": "vLLM (bf16)", "gdn_ms": 2.0, "peer_ms": 9.0}])
    assert [row[2:] for row in found] == [("4.5x", "printed")]
    assert limits[1] == pytest.approx(2 * limits[0])  # against the peak of bf16


def test_the_documents_say_what_one_file_of_results_says(bench):
    said = [
        bench.filled(bench.DOCUMENT.read_text(), bench.sections(figures)) == bench.DOCUMENT.read_text()
        and bench.filled(bench.README.read_text(), bench.readme(figures)) == bench.README.read_text()
        for figures in (bench.Figures(bench.load(path)) for path in (ROOT / "bench" / "results").glob("*.json"))
    ]
    assert any(said), "run tools/bench.py report"


@pytest.mark.parametrize("missing", [True, False])
def test_report_of_no_results_is_one_line(tmp_path, missing):
    path = tmp_path / "results.json"
    if not missing:
        path.write_text("{")
    done = subprocess.run([sys.executable, TOOL, "report", "--results", path], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and str(path) in done.stderr


def test_an_unknown_part_is_named_with_the_parts_there_are(tmp_path):
    command = [sys.executable, TOOL, "run", "--build", tmp_path, "--only", "ops", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no such part: nothing; there are: 'ceilings', 'ops'" in done.stderr
