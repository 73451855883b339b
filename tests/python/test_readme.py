# SPDX-License-Identifier: Apache-2.0
"""The Python examples of README.md, run one after the other as they stand there."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_examples_run_as_written(tmp_path):
    assert len(EXAMPLES) >= 4
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    outputs = []
    for example in EXAMPLES:
        assert len(example.strip().splitlines()) <= 12
        run = [sys.executable, "-W", "ignore", "-c", example]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "python")}
        done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{example}\n{done.stderr}"
        outputs.append(done.stdout)
    assert "[1, 100, 8, 32]" in outputs[0]
    counted = "5,  6,  7,  8,  9, 10, 11, 12, 13, 14, 15, 16"
    assert counted in outputs[1] and counted in outputs[3]
