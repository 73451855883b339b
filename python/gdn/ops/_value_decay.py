# SPDX-License-Identifier: Apache-2.0
"""A decay per value channel, folded into the values and the outputs of a recurrence that has none."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gdn.ops._call import check, check_cu_seqlens, check_rank, run

# The columns of the state do not meet, so with G[t] = gv[1] + ... + gv[t] and S = S' exp(G) the recurrence of S' has no
# gv, but the values v exp(-G), and its outputs times exp(G) are the true ones. Both exponentials must stay finite in
# float32, and so must their products with what they scale; where |G| would pass this bound a new stretch begins at 0.
_LARGEST_EXPONENT = 40.0
# exp of this is 0 in every type, and the differences of its sums are finite, which those of -inf are not.
_ALL_GONE = -1e4
_WINDOW = 256


def _stretches(gv: Tensor) -> list[tuple[int, int]]:
    """Where to begin again, for gv [B,T,HV,V]: the ranges of tokens."""
    tokens = gv.shape[1]
    if torch.compiler.is_compiling():  # where the data are not known, each token is one
        return [(t, t + 1) for t in range(tokens)]
    total = gv.detach().double().cumsum(1)
    begin, result = 0, []
    while begin < tokens:
        window = total[:, begin : begin + _WINDOW]
        inside = (window - window[:, :1]).abs().amax((0, 2, 3)) <= _LARGEST_EXPONENT
        count = max(1, int(inside.long().cumprod(0).sum()))
        result.append((begin, begin + count))
        begin += count
    return result


def _packed(op: str, cu_seqlens: Tensor, tokens: int) -> list[tuple[int, int]]:
    bounds = cu_seqlens.tolist()
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
        raise ValueError(f"[{op}] cu_seqlens must rise from 0 to {tokens}, got {bounds}")
    return list(itertools.pairwise(bounds))


def with_value_decay(
    op: str,
    function: Callable[..., tuple[Tensor, ...]],
    gv: Tensor,
    tensors: dict[str, Tensor | None],
    cu_seqlens: Tensor | None,
    output_final_state: bool,
    state_v_first: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`function` with a further decay gv [B,T,HV,V]; the rest as in :func:`gdn.ops._call.run`."""
    v = tensors["v"]
    assert v is not None
    check(op, gv=gv, **tensors)
    check_rank(op, "v", v, 4, "[B,T,HV,V]")
    if gv.shape != v.shape:
        raise ValueError(f"[{op}] gv must be {list(v.shape)}, got {list(gv.shape)}")
    per_token = ("q", "k", "v", "g", "gk", "beta")

    def cut(source: dict[str, Tensor | None], begin: int, end: int) -> dict[str, Tensor | None]:
        return {n: t[:, begin:end] if n in per_token and t is not None else t for n, t in source.items()}

    if cu_seqlens is not None:
        check_cu_seqlens(op, cu_seqlens, v)
        if v.shape[0] != 1:
            raise ValueError(f"[{op}] B must be 1 with cu_seqlens, got {v.shape[0]}")
        parts, start = [], tensors["initial_state"]
        for n, (begin, end) in enumerate(_packed(op, cu_seqlens, v.shape[1])):
            part = cut(tensors, begin, end)
            part["initial_state"] = None if start is None else start[n : n + 1]
            part_gv = gv[:, begin:end]
            parts.append(
                with_value_decay(op, function, part_gv, part, None, output_final_state, state_v_first, **options)
            )
        o = torch.cat([part_o for part_o, _ in parts], 1)
        states = [state for _, state in parts if state is not None]
        return o, torch.cat(states) if output_final_state else None

    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    tensors = {n: t.to(wide) if n in ("q", "k", "v") and t is not None else t for n, t in tensors.items()}
    gv, v = gv.to(wide).clamp(min=_ALL_GONE), v.to(wide)

    state = tensors["initial_state"]
    if state is not None and state_v_first:
        check_rank(op, "initial_state", state, 4, "[N,HV,V,K]")
        state = state.transpose(2, 3)
    outs = []
    for begin, end in _stretches(gv) or [(0, 0)]:
        part = cut(tensors, begin, end)
        if begin < end:
            total = gv[:, begin:end].cumsum(1)
            total = total - total[:, :1]
            part["v"] = v[:, begin:end] * (-total).exp()
            if state is not None:
                state = state * gv[:, begin].exp()[:, :, None]
        part["initial_state"] = state
        o, state = run(op, function, part, None, True, **options)
        assert state is not None
        if begin < end:
            o, state = o * total.exp(), state * total[:, -1].exp()[:, :, None]
        outs.append(o)
    if state is not None and state_v_first:
        state = state.transpose(2, 3).contiguous()
    return torch.cat(outs, 1), state if output_final_state else None
