# SPDX-License-Identifier: Apache-2.0
"""The ops of gdn/ops that are blocks of many mixers, as PyTorch sees them: schema, fake tensors, gradients, compile."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
torch.ops.load_library(os.environ.get("GDN_LIBRARY", str(ROOT / "build" / "libgdn.so")))
gdn = torch.ops.gdn


def normal(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, dtype=torch.float64, requires_grad=True)


def rates(*sizes: int) -> torch.Tensor:
    """Negative, as logarithms of decays are."""
    return torch.rand(*sizes, dtype=torch.float64).neg().sub(0.1).requires_grad_()


def wkv_states(n: int, channels: int) -> torch.Tensor:
    """States that have seen something: the denominator, row 1, is at least 1."""
    state = torch.randn(n, 3, channels, dtype=torch.float64)
    state[:, 1].abs_().add_(1)
    return state.requires_grad_()


@dataclass
class Case:
    """One way to call one op. `args` makes float64 arguments, those to be differentiated requiring gradients."""

    name: str
    op: Callable[..., Any]
    args: Callable[[], tuple]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("l2norm", gdn.l2norm, lambda: (normal(2, 3, 5),), {}),
    Case("rms_norm", gdn.rms_norm, lambda: (normal(2, 3, 5), normal(5)), {"eps": 1e-3}),
    Case("add_rms_norm", gdn.add_rms_norm, lambda: (normal(2, 3, 5), normal(2, 3, 5), normal(5)), {"scale": 0.5}),
    Case("rms_norm_gated", gdn.rms_norm_gated, lambda: (normal(2, 3, 5), normal(5), normal(2, 3, 5)), {}),
    Case(
        "rms_norm_gated-sigmoid",
        gdn.rms_norm_gated,
        lambda: (normal(4, 5), normal(5), normal(4, 5)),
        {"activation": "sigmoid"},
    ),
    Case("causal_conv1d", gdn.causal_conv1d, lambda: (normal(2, 6, 3), normal(3, 4)), {}),
    Case(
        "causal_conv1d-packed",
        gdn.causal_conv1d,
        lambda: (normal(1, 7, 3), normal(3, 4), normal(3), normal(3, 3, 4), torch.tensor([0, 2, 2, 7])),
        {"output_final_state": True, "activation": "silu"},
    ),
    Case("gdn_gate", gdn.gdn_gate, lambda: (normal(2, 5, 3), normal(3), normal(3)), {}),
    Case("kda_gate", gdn.kda_gate, lambda: (normal(2, 2, 3, 4), normal(3), normal(12)), {}),
    Case("kda_gate-safe", gdn.kda_gate, lambda: (normal(2, 2, 3, 4), normal(3)), {"lower_bound": -5.0}),
    Case("beta_sigmoid", gdn.beta_sigmoid, lambda: (normal(2, 5, 3),), {"allow_neg_eigval": True}),
    Case("cross_entropy", gdn.cross_entropy, lambda: (normal(2, 3, 5), torch.tensor([[0, 4, -100], [2, 2, 1]])), {}),
    Case("swiglu", gdn.swiglu, lambda: (normal(2, 3, 5), normal(2, 3, 5)), {}),
    Case(
        "selective_scan",
        gdn.selective_scan,
        lambda: (normal(2, 5, 3), normal(2, 5, 3), rates(3, 2), normal(2, 5, 2), normal(2, 5, 2)),
        {},
    ),
    Case(
        "selective_scan-packed-signed",
        gdn.selective_scan,
        lambda: (
            *(normal(1, 7, 3), normal(1, 7, 3), rates(3, 2), normal(1, 7, 2), normal(1, 7, 2), normal(3), normal(3)),
            *(normal(3, 3, 2), torch.tensor([0, 2, 2, 7])),
        ),
        {"output_final_state": True, "signed_transition": True},
    ),
    Case("wkv", gdn.wkv, lambda: (rates(3), normal(3), normal(2, 5, 3), normal(2, 5, 3)), {}),
    Case(
        "wkv-packed",
        gdn.wkv,
        lambda: (rates(3), normal(3), normal(1, 7, 3), normal(1, 7, 3), wkv_states(3, 3), torch.tensor([0, 2, 2, 7])),
        {"output_final_state": True},
    ),
    Case("rotary", gdn.rotary, lambda: (normal(2, 3, 2, 6), torch.arange(3)), {"rotary_dim": 4}),
]


def as_float32(x: Any) -> Any:
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return x.detach().float().requires_grad_(x.requires_grad)
    return x


def tensors(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: Case) -> None:
    args = tuple(as_float32(a) for a in case.args())
    torch.library.opcheck(case.op, args, {k: as_float32(v) for k, v in case.kwargs.items()})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(case: Case) -> None:
    def differentiable(*args: Any) -> tuple[torch.Tensor, ...]:
        return tuple(t for t in tensors(case.op(*args, **case.kwargs)) if t.requires_grad)

    assert torch.autograd.gradcheck(differentiable, case.args(), nondet_tol=0.0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_double_backward_raises_clearly(case: Case) -> None:
    args = case.args()
    loss = sum(t.square().sum() for t in tensors(case.op(*args, **case.kwargs)) if t.requires_grad)
    leaf = next(a for a in args if isinstance(a, torch.Tensor) and a.requires_grad)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative for gdn::\w+_bwd is not implemented"):
        grad.sum().backward()


# One op of each kind: a plain one, and those whose outputs have sizes of their own.
COMPILED = ["rms_norm_gated", "causal_conv1d-packed"]


@pytest.mark.parametrize("case", [c for c in CASES if c.name in COMPILED], ids=str)
def test_compiles_as_a_full_graph_with_dynamic_shapes(case: Case) -> None:
    def step(*args: Any) -> torch.Tensor:
        return sum(t.square().sum() for t in tensors(case.op(*args, **case.kwargs)) if t.is_floating_point())

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    args = case.args()
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    expected = torch.autograd.grad(step(*args), leaves)
    actual = torch.autograd.grad(compiled(*args), leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_the_in_place_convolution_step() -> None:
    x, state, weight = torch.randn(2, 8), torch.randn(4, 8, 4), torch.randn(8, 4)
    slots = torch.tensor([3, 0])
    torch.library.opcheck(gdn.causal_conv1d_update_, (x, state, weight, None, slots, "silu"))
    before = state.clone()
    gdn.causal_conv1d_update_(x, state, weight, slots=slots)
    torch.testing.assert_close(state[slots], torch.cat([before[slots][..., 1:], x[..., None]], -1))
    torch.testing.assert_close(state[1:3], before[1:3], rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="no gradient"):
        gdn.causal_conv1d_update_(x.requires_grad_(), state, weight)


def test_errors_are_one_line_and_name_the_value() -> None:
    with pytest.raises(RuntimeError, match=r"^\[rms_norm\] weight must be \[D\] = \[4\], got \[3\]$"):
        gdn.rms_norm(torch.ones(2, 4), torch.ones(3))
