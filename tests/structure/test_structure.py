# SPDX-License-Identifier: Apache-2.0
"""The rules that keep the source tree what docs/architecture.md says it is.

Each rule is a function from (path, text) to a list of complaints; the tests run it over the tree, and also over small
examples that it must reject, so that a rule that has gone blind shows.
"""

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each layer may include itself and these. `text` stands beside the tensor layers and needs no more than base.
LOWER = {
    "base": set(),
    "text": {"base"},
    "kernels": {"base"},
    "ops": {"base", "kernels"},
    "mixers": {"base", "kernels", "ops"},
    "model": {"base", "kernels", "ops", "mixers", "text"},
}
LOWER["train"] = LOWER["generate"] = LOWER["eval"] = LOWER["model"] | {"model"}
LOWER["bench"] = LOWER["train"] | {"train", "generate"}
LOWER["cli"] = LOWER["python"] = LOWER["train"] | {"train", "generate", "eval", "bench"}

TORCH_HEADER = re.compile(r"(torch|ATen|c10|caffe2)/")
BANNED_HEADERS = {"torch/torch.h", "torch/extension.h", "torch/all.h", "ATen/ATen.h", "ATen/Functions.h"}
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
CPP = {".h", ".cpp", ".cu", ".cuh"}
SOURCE = CPP | {".py", ".sh", ".cmake"}
MAX_LINES = 800


def includes(text: str) -> list[str]:
    return INCLUDE.findall(text)


def layer_of(path: str) -> str | None:
    parts = path.split("/")
    return parts[1] if parts[0] == "gdn" and len(parts) > 2 else None


def is_torch_free(path: str) -> bool:
    """The sources of gdn_kernels and gdn_formats, as CMakeLists.txt selects them, and their headers."""
    patterns = (
        r"gdn/(base|kernels|text)/",
        r"gdn/mixers/[^/]+/kernel",
        r"gdn/bench/ceilings",
        r"gdn/model/(config|safetensors)[^/]*$",
        r"gdn/train/config[^/]*$",
        r"tests/(base|kernels|formats|text)/",
        r"fuzz/",
    )
    return any(re.match(pattern, path) for pattern in patterns)


def include_direction(path: str, text: str) -> list[str]:
    layer = layer_of(path)
    if layer is None:
        return []
    if layer not in LOWER:
        return [f"{path}: gdn/{layer}/ has no place in the order of layers"]
    allowed = LOWER[layer] | {layer}
    complaints = []
    for header in includes(text):
        other = layer_of(header)
        if other is not None and other not in allowed:
            complaints.append(f"{path}: {layer} must not include {other}: {header}")
    return complaints


def banned_headers(path: str, text: str) -> list[str]:
    found = [header for header in includes(text) if header in BANNED_HEADERS]
    return [f"{path}: <{header}> is slow to compile; include the exact headers" for header in found]


def torch_free(path: str, text: str) -> list[str]:
    if not is_torch_free(path):
        return []
    found = [header for header in includes(text) if TORCH_HEADER.match(header)]
    return [f"{path}: this file belongs to the torch-free part but includes {header}" for header in found]


def licence_line(path: str, text: str) -> list[str]:
    if not text.strip():
        return []
    head = text.splitlines()[:2]
    return (
        [] if any("SPDX-License-Identifier: Apache-2.0" in line for line in head) else [f"{path}: no SPDX line on top"]
    )


def file_length(path: str, text: str) -> list[str]:
    lines = text.count("\n")
    return [f"{path}: {lines} lines; split it by what it is about"] if lines > MAX_LINES else []


def unfinished(path: str, text: str) -> list[str]:
    marks = re.findall(r"\b(?:TO[D]O|FIX[M]E|X{3})\b", text)
    return [f"{path}: {mark} left behind" for mark in marks]


def machine_path(path: str, text: str) -> list[str]:
    """An absolute path of somebody's machine, which no other machine has."""
    found = re.findall(r"(?<![\w.~])/(?:home|root|work|Users|mnt|opt)/[\w.-]+", text)
    return [f"{path}: names the path {name} of one machine" for name in found]


Rule = Callable[[str, str], list[str]]
RULES: dict[Rule, tuple[set[str] | None, list[tuple[str, str]]]] = {
    # rule: (suffixes it looks at; None: all text files, examples that it must reject)
    include_direction: (
        CPP,
        [
            ("gdn/kernels/a.h", '#include "gdn/ops/b.h"\n'),
            ("gdn/text/a.cpp", '#include "gdn/model/config.h"\n'),
            ("gdn/mixers/attention/layer.cpp", '#  include "gdn/model/config.h"\n'),
            ("gdn/train/a.cpp", '#include "gdn/generate/sampler.h"\n'),
            ("gdn/elsewhere/a.h", ""),
        ],
    ),
    banned_headers: (CPP, [("gdn/ops/a.cpp", "#include <torch/torch.h>\n")]),
    torch_free: (
        CPP,
        [
            ("gdn/kernels/x/a.cpp", "#include <c10/util/BFloat16.h>\n"),
            ("gdn/mixers/x/kernel_cpu.cpp", "#include <ATen/ops/empty.h>\n"),
            ("gdn/model/safetensors.h", "#include <torch/types.h>\n"),
        ],
    ),
    licence_line: (SOURCE, [("gdn/base/a.h", "#pragma once\n")]),
    file_length: (SOURCE, [("gdn/base/a.h", "\n" * (MAX_LINES + 1))]),
    unfinished: (SOURCE, [("gdn/base/a.h", "// TO" + "DO: later\n")]),
    machine_path: (None, [("docs/a.md", "see /ho" + "me/ann/notes\n")]),
}


def tree() -> Iterator[tuple[str, str]]:
    """Every text file that is or would be committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for path in sorted(set(listed.splitlines())):
        file = ROOT / path
        if file.is_symlink() or not file.is_file():
            continue
        try:
            yield path, file.read_text()
        except UnicodeDecodeError:
            continue


FILES = list(tree())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_tree_obeys(rule: Rule):
    suffixes, _ = RULES[rule]
    files = [(path, text) for path, text in FILES if suffixes is None or Path(path).suffix in suffixes]
    assert files
    complaints = [complaint for path, text in files for complaint in rule(path, text)]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_rejects(rule: Rule):
    for path, text in RULES[rule][1]:
        assert rule(path, text), f"{rule.__name__} accepted {path}: {text!r}"


def test_every_mixer_has_its_mathematics_written_down():
    folders = {Path(path).parent for path, _ in FILES if re.match(r"gdn/mixers/[^/]+/layer\.(h|cpp)$", path)}
    missing = [str(folder / "README.md") for folder in folders if not (ROOT / folder / "README.md").is_file()]
    assert not missing, f"missing: {missing}"


def test_includes_of_this_project_exist():
    known = {path for path, _ in FILES}
    generated = {"gdn/cli/build_info.h"} | {path.removesuffix(".in") for path in known if path.endswith(".h.in")}
    missing = [
        f"{path}: {header}"
        for path, text in FILES
        if Path(path).suffix in CPP
        for header in includes(text)
        if header.startswith("gdn/") and header not in known | generated
    ]
    assert not missing, "\n".join(missing)
