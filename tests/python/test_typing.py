# SPDX-License-Identifier: Apache-2.0
"""What is public is annotated and documented; a program that uses it passes a strict type check."""

import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python"))

from gdn.layers import cache  # noqa: E402

import gdn  # noqa: E402
from gdn import causal_lm, layers, ops  # noqa: E402

CONSUMER = """
from collections.abc import Iterator

import torch
from torch import Tensor

import gdn
from gdn import layers, models, ops
from gdn.causal_lm import CausalLM, State


def operators(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    o, state = ops.chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True)
    assert state is not None
    y: Tensor = ops.rms_norm(o, None)
    normed, total = ops.rms_norm_gated(y, o, None, prenorm=True)
    step: Tensor = ops.gated_delta_rule_step_(q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0], state)
    return normed + total + step


def engine(folder: str) -> Iterator[Tensor]:
    model: CausalLM = gdn.CausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    state: State = model.zero_state(2)
    logits: Tensor = model(torch.tensor([[1]]), state=state)
    tokens: list[int] = model.encode("x")
    print(logits, model.decode(tokens), state.clone().nbytes, model.state_dict()["lm_head.weight"])
    return model.stream(torch.tensor([[1]]), max_new_tokens=3)


def modules() -> int:
    model = models.GatedDeltaNetForCausalLM(models.GatedDeltaNetConfig(hidden_size=64))
    layer = layers.GatedDeltaNet(hidden_size=64, head_dim=16, num_heads=2)
    o, _, cache = layer(torch.zeros(1, 3, 64))
    names: tuple[str, ...] = gdn.patch_transformers()
    gdn.unpatch_transformers()
    print(model, o, cache, layer.q_proj.weight, names, gdn.register_fla_backend(), gdn.library_path.name)
    return gdn.main(["info"])
"""


def members(module: ModuleType) -> list[tuple[str, Any]]:
    """The public functions of a module and of its own classes, and these classes."""
    found: list[tuple[str, Any]] = []
    for name in module.__all__ if hasattr(module, "__all__") else [n for n in vars(module) if n[0] != "_"]:
        value = getattr(module, name)
        if not getattr(value, "__module__", "").startswith("gdn"):
            continue
        found.append((f"{module.__name__}.{name}", value))
        if inspect.isclass(value):
            for attribute, method in inspect.getmembers(value, lambda m: inspect.isfunction(m) or inspect.ismethod(m)):
                public = attribute[0] != "_" or attribute == "__init__"
                if public and (method.__module__ or "").startswith("gdn"):
                    found.append((f"{module.__name__}.{name}.{attribute}", method))
    return found


MODULES = [gdn, ops, layers, causal_lm, cache]
if importlib.util.find_spec("transformers") is not None:
    from gdn import models

    MODULES.append(models)
PUBLIC = dict(item for module in MODULES for item in members(module))


def test_everything_public_is_annotated_and_documented():
    assert len(PUBLIC) > 80
    for name, value in PUBLIC.items():
        if not name.endswith(("__init__", "reset_parameters")):
            assert inspect.getdoc(value), name
        if inspect.isclass(value):
            continue
        signature = inspect.signature(value)
        assert signature.return_annotation is not signature.empty, name
        for p in signature.parameters.values():
            assert p.annotation is not p.empty or p.name in ("self", "cls"), f"{name}: {p.name}"


@pytest.mark.parametrize("name", ops.__all__)
def test_operators_say_shapes_results_and_errors(name):
    text = getattr(ops, name).__doc__
    assert "Raises:" in text and ("Error" in text), name
    assert "Returns:" in text or "Args:" in text, name
    assert "[" in text, f"{name} names no shape"


@pytest.mark.slow
def test_a_consumer_passes_a_strict_check(tmp_path):
    if importlib.util.find_spec("mypy") is None or importlib.util.find_spec("transformers") is None:
        pytest.skip("mypy and transformers are needed")
    (tmp_path / "consumer.py").write_text(CONSUMER)
    wrong = CONSUMER.replace("state: State = model.zero_state(2)", "state: int = model.zero_state(2)")
    (tmp_path / "wrong.py").write_text(wrong)
    flags = ["--strict", "--follow-imports=silent", "--no-error-summary", "--cache-dir", str(tmp_path / "cache")]
    environment = os.environ | {"MYPYPATH": str(ROOT / "python")}
    for file, expected in (("consumer.py", 0), ("wrong.py", 1)):
        run = [sys.executable, "-m", "mypy", *flags, str(tmp_path / file)]
        done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == expected, done.stdout
    assert 'has type "State"' in done.stdout
