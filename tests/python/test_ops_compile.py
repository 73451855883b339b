# SPDX-License-Identifier: Apache-2.0
"""Every operator under torch.compile with dynamic shapes, and under torch.library.opcheck: none may be left out."""

import sys
from pathlib import Path
from typing import Any

import pytest
import test_ops_memory as memory
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python"))

from gdn import ops  # noqa: E402

gdn = torch.ops.gdn
B, H, HV, K, V = 2, 2, 4, 6, 5
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def normal(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, dtype=torch.float64, requires_grad=True)


def decays(*sizes: int) -> torch.Tensor:
    return (-torch.rand(*sizes, dtype=torch.float64)).requires_grad_()


def qkv(*lead: int, v_heads: int = HV) -> tuple[torch.Tensor, ...]:
    k = F.normalize(torch.randn(*lead, H, K, dtype=torch.float64), dim=-1).requires_grad_()
    return normal(*lead, H, K), k, normal(*lead, v_heads, V)


def calls(T: int) -> dict[str, Call]:
    """Public name -> one call with T tokens."""
    x, g, beta, gk = qkv(B, T), decays(B, T, HV), normal(B, T, HV), decays(B, T, HV, K)
    state = dict(initial_state=normal(B, HV, K, V), output_final_state=True)
    same = qkv(B, T, v_heads=H)
    gate = dict(use_gate_in_kernel=True, A_log=normal(HV), use_beta_sigmoid_in_kernel=True, allow_neg_eigval=True)
    channels, packed = normal(B, T, 8), torch.tensor([0, 2, 2, T])
    scan = (channels, normal(B, T, 8), decays(8, 2), normal(B, T, 2), normal(B, T, 2))
    pool = torch.randn(3, HV, K, V, dtype=torch.float64)
    token, slots = qkv(2), torch.tensor([2, 0])
    return {
        "chunk_gated_delta_rule": (ops.chunk_gated_delta_rule, (*x, g, beta), state | gate | dict(dt_bias=normal(HV))),
        "fused_recurrent_gated_delta_rule": (ops.fused_recurrent_gated_delta_rule, (*x, g, gk, None, beta), state),
        "chunk_kda": (ops.chunk_kda, (*x, gk, beta), state | gate | dict(lower_bound=-5.0, state_v_first=False)),
        "fused_recurrent_kda": (ops.fused_recurrent_kda, (*x, gk, beta), dict(use_qk_l2norm_in_kernel=True)),
        "chunk_delta_rule": (ops.chunk_delta_rule, (*x, beta), state),
        "fused_recurrent_delta_rule": (ops.fused_recurrent_delta_rule, (*x, beta), state),
        "chunk_simple_gla": (ops.chunk_simple_gla, (*x, g, decays(HV)), state),
        "fused_recurrent_simple_gla": (ops.fused_recurrent_simple_gla, (*x, g), state | dict(reverse=True)),
        "chunk_gla": (ops.chunk_gla, (*x, gk), state),
        "fused_recurrent_gla": (ops.fused_recurrent_gla, (*x, gk), state),
        "fused_recurrent_gla per value": (ops.fused_recurrent_gla, (*x, gk, decays(B, T, HV, V)), state),
        "chunk_retention": (ops.chunk_retention, same, {}),
        "fused_recurrent_retention": (ops.fused_recurrent_retention, same, {}),
        "chunk_linear_attn": (ops.chunk_linear_attn, same, dict(normalize=True)),
        "fused_recurrent_linear_attn": (ops.fused_recurrent_linear_attn, same, {}),
        "causal_conv1d": (ops.causal_conv1d, (channels, normal(8, 4), normal(8)), dict(activation="silu")),
        "causal_conv1d packed": (
            gdn.causal_conv1d,
            (normal(1, T, 8), normal(8, 4), None, normal(3, 8, 4), packed, True),
            {},
        ),
        "l2norm": (ops.l2norm, (channels,), {}),
        "rms_norm": (ops.rms_norm, (channels, normal(8), normal(8), normal(B, T, 8)), dict(prenorm=True)),
        "rms_norm_gated": (ops.rms_norm_gated, (channels, normal(B, T, 8), normal(8)), {}),
        "add_rms_norm": (gdn.add_rms_norm, (channels, normal(B, T, 8), normal(8)), {}),
        "gdn_gate": (gdn.gdn_gate, (beta, normal(HV)), {}),
        "kda_gate": (gdn.kda_gate, (gk, normal(HV), normal(HV * K)), {}),
        "beta_sigmoid": (gdn.beta_sigmoid, (beta,), {}),
        "swiglu": (gdn.swiglu, (channels, normal(B, T, 8)), {}),
        "rotary": (gdn.rotary, (x[0], torch.arange(T)), {}),
        "cross_entropy": (gdn.cross_entropy, (channels, torch.arange(B * T).view(B, T) % 8), {}),
        "selective_scan": (gdn.selective_scan, scan, dict(output_final_state=True)),
        "wkv": (gdn.wkv, (decays(8), normal(8), channels, normal(B, T, 8)), dict(output_final_state=True)),
        "delta_rule": (gdn.delta_rule, (*x, gk, beta, normal(B, T, H, K)), dict(erase="own", output_final_state=True)),
        "chunk_dplr_delta_rule": (
            gdn.chunk_dplr_delta_rule,
            (*x, normal(B, T, H, K), normal(B, T, H, K), gk),
            dict(output_final_state=True),
        ),
        "naive_gated_delta_rule": (gdn.naive_gated_delta_rule, (*x, g, beta), {}),
        "test_time_memory ttt": (gdn.test_time_memory, (memory.inputs(memory.TTT_MLP, T), *memory.TTT_MLP, True), {}),
        "test_time_memory lmm": (gdn.test_time_memory, (memory.inputs(memory.LMM_DEEP, T), *memory.LMM_DEEP, True), {}),
        # In place, without gradients; T sequences.
        "gated_delta_rule_step_": (
            ops.gated_delta_rule_step_,
            (*token, decays(2, HV), normal(2, HV), pool, slots),
            dict(use_qk_l2norm_in_kernel=True),
        ),
        "delta_rule_step_": (gdn.delta_rule_step_, (*token, None, None, None, None, pool.clone(), slots), {}),
        "causal_conv1d_update": (ops.causal_conv1d_update, (normal(T, 8), normal(T, 8, 4)), dict(weight=normal(8, 4))),
    }


NAMES = list(calls(3))


def leaves_of(arguments: Any) -> list[torch.Tensor]:
    flat = torch.utils._pytree.tree_leaves(arguments)
    return [t for t in flat if isinstance(t, torch.Tensor) and t.requires_grad]


def tensors_of(result: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def compare_compiled(name: str, backend: str) -> None:
    in_place = name.split()[0].endswith(("_", "_update"))
    op = calls(3)[name][0]

    def run(args: Any, kwargs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(tensors_of(op(*args, **kwargs)))

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
    for T in (2, 3) if name.endswith("per value") else (5, 18):  # a call per token, where data decide
        _, args, kwargs = calls(T)[name]
        with torch.set_grad_enabled(not in_place):
            if in_place:
                before = [t.detach().clone() if isinstance(t, torch.Tensor) else t for t in args]
                expected, actual = run(before, kwargs), compiled([*map(detached, args)], kwargs)
                for a, e in zip(tensors_of(list(map(detached, args))), tensors_of(before), strict=True):
                    torch.testing.assert_close(a, e)
            else:
                expected, actual = run(args, kwargs), compiled(args, kwargs)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)
        if in_place:
            continue
        leaves = leaves_of((args, kwargs))
        assert leaves
        sides = []
        for result in (actual, expected):
            loss = sum(t.square().sum() for t in result if t.requires_grad)
            sides.append(torch.autograd.grad(loss, leaves, allow_unused=True))
        for a, e in zip(*sides, strict=True):
            assert (a is None) == (e is None)
            if e is not None:
                torch.testing.assert_close(a, e)


def detached(x: Any) -> Any:
    return x.detach() if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("name", NAMES)
def test_compiles_as_a_full_graph_with_dynamic_shapes(name: str) -> None:
    compare_compiled(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chunk_kda", "test_time_memory lmm", "causal_conv1d packed"])
def test_compiles_with_inductor(name: str) -> None:
    compare_compiled(name, "inductor")


@pytest.mark.parametrize("name", [n for n in NAMES if hasattr(gdn, n.split()[0])])
def test_opcheck(name: str) -> None:
    kind = name.split()[0]
    recorded = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        """The registered operators that the call reaches, with what they are given."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "gdn":
                recorded.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    op, args, kwargs = calls(7)[name]
    with torch.no_grad(), Record():
        op(*map(detached, args), **{k: detached(v) for k, v in kwargs.items()})
    assert recorded, kind
    for func, given, named in recorded:
        torch.library.opcheck(func, given, named)


def test_no_operator_is_left_out() -> None:
    schemas = {s.name.removeprefix("gdn::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("gdn::")}
    tested = {n.split()[0] for n in NAMES} | {"causal_conv1d_update_", "mixer_registry"}
    elsewhere = {"test_time_memory_step_", "selective_scan_step_", "wkv_step_"}  # the tests of their mixers and states
    assert {s for s in schemas if not s.endswith("_bwd")} - elsewhere == tested & schemas
    assert set(ops.__all__) - {"chunk_gdn", "fused_recurrent_gdn", "l2_norm"} <= tested
