# SPDX-License-Identifier: Apache-2.0
"""The package gdn: loading the library, its version, and the program in a Python process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import LIBRARY, ROOT


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT / "python")} | environment
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=120)


def test_version_is_the_one_of_the_file():
    result = python("-c", "import gdn; print(gdn.__version__)")
    assert result.stdout.strip() == (ROOT / "VERSION").read_text().strip(), result.stderr


def test_module_runs_the_program(program: Path):
    expected = subprocess.run([program, "info", "--json"], capture_output=True, text=True, timeout=120)
    actual = python("-m", "gdn", "info", "--json")
    assert (actual.returncode, actual.stdout) == (0, expected.stdout), actual.stderr


def test_module_passes_the_exit_status_on():
    result = python("-m", "gdn", "no-such-command")
    assert result.returncode == 2
    assert "no-such-command" in result.stderr


def test_missing_library_says_what_to_do(tmp_path: Path):
    shutil.copytree(ROOT / "python" / "gdn", tmp_path / "python" / "gdn")
    result = python("-c", "import gdn", PYTHONPATH=str(tmp_path / "python"), GDN_LIBRARY="")
    assert result.returncode == 1
    assert "make build" in result.stderr.splitlines()[-1]


def test_broken_library_is_named(tmp_path: Path):
    broken = tmp_path / "libgdn.so"
    broken.write_bytes(b"not a library")
    result = python("-c", "import gdn", GDN_LIBRARY=str(broken))
    assert result.returncode == 1
    assert str(broken) in result.stderr.splitlines()[-1]


def test_another_minor_version_of_torch_is_refused():
    code = "import torch; torch.__version__ = '2.12.1'; import gdn"
    result = python("-c", code, GDN_LIBRARY=str(LIBRARY))
    assert result.returncode == 1
    assert "this is torch 2.12.1" in result.stderr.splitlines()[-1]
