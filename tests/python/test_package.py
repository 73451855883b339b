# SPDX-License-Identifier: Apache-2.0
"""The package gdn: loading the library, its version, and the program in a Python process."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
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


def test_what_the_processor_lacks_is_named(tmp_path: Path):
    code = "import sys, pathlib, gdn._load as l; print(l.lacking_features(pathlib.Path(sys.argv[1])))"
    old = tmp_path / "cpuinfo"
    old.write_text("processor\t: 0\nflags\t\t: fpu sse sse2 avx fma\n")
    assert python("-c", code, str(old)).stdout.strip() == ("['avx2']" if platform.machine() == "x86_64" else "[]")
    assert python("-c", code, str(tmp_path / "nothing")).stdout.strip() == "[]"
    warned = "import platform, gdn._load as l; l.lacking_features = lambda: ['avx2']; l.load(l.find_library())"
    assert "this processor lacks avx2: gdn runs" in python("-c", warned).stderr


def test_pip_installs_the_built_library_without_compiling(tmp_path: Path):
    pytest.importorskip("scikit_build_core")
    source = tmp_path / "source"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if name.startswith(("python/", "cmake/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    target = tmp_path / "target"
    install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--target", str(target)]
    done = python(*install, f"--config-settings=cmake.define.GDN_PREBUILT={LIBRARY}", str(source))
    assert done.returncode == 0, done.stderr
    code = "import gdn, torch; print(gdn.library_path); gdn.ops.l2norm(torch.ones(2, 3))"
    done = python("-c", code, PYTHONPATH=str(target), GDN_LIBRARY="")
    assert done.stdout.strip() == str(target / "gdn" / "libgdn.so"), done.stderr
    script = (target / "bin" / "gdn").read_text()
    assert "from gdn.__main__ import main" in script
    version = (ROOT / "VERSION").read_text().strip()
    assert (target / f"gdn-{version}.dist-info" / "METADATA").is_file()
