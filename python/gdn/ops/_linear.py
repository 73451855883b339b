# SPDX-License-Identifier: Apache-2.0
"""Linear attention and its gated relatives, with flash-linear-attention's signatures; sizes as in _delta_rule.py.

Per token: S <- decay(S) + k v^T;  o = scale S^T q, without the delta rule's erase.
"""

from typing import Any

import torch
from torch import Tensor

from gdn.ops._call import check, check_rank, legacy, of_one_dtype, run
from gdn.ops._value_decay import with_value_decay

_gdn = torch.ops.gdn

State = Tensor | tuple[Tensor | None, Tensor | None] | list[Tensor | None] | None


def _recurrence(
    op: str,
    form: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    *,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    state_v_first: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """All members: g per head or gk per key channel, the form "chunk" or "recurrent", the tokens forwards or back."""
    q, k, v, dtype = of_one_dtype(op, q, k, v)
    check(op, q=q, g=g, gk=gk, gv=gv, initial_state=initial_state)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if gk is not None:
        check_rank(op, "gk", gk, 4, "[B,T,HV,K]")
        g = gk
    elif g is not None:
        check_rank(op, "g", g, 3, "[B,T,HV]")
    if initial_state is not None:
        initial_state = (initial_state.transpose(-1, -2) if state_v_first else initial_state).to(wide)
    if reverse:  # the same on tokens and sequences in the opposite order
        q, k, v = (t.flip(1) for t in (q, k, v))
        g, gv = (None if t is None else t.flip(1) for t in (g, gv))
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens[-1] - cu_seqlens.flip(0)
            initial_state = None if initial_state is None else initial_state.flip(0)
    tensors: dict[str, Tensor | None] = dict(
        q=q, k=k, v=v, g=None if g is None else g.to(wide), initial_state=initial_state
    )
    options: dict[str, Any] = dict(scale=scale, erase="none", form=form)
    if gv is not None:
        o, state = with_value_decay(op, _gdn.delta_rule, gv, tensors, cu_seqlens, output_final_state, **options)
    else:
        o, state = run(op, _gdn.delta_rule, tensors, cu_seqlens, output_final_state, **options)
    if reverse:
        o = o.flip(1)
        state = state.flip(0) if state is not None and cu_seqlens is not None else state
    if state is not None and state_v_first:
        state = state.transpose(-1, -2).contiguous()
    return o.to(dtype), state


def _with_gamma(op: str, v: Tensor, g: Tensor | None, g_gamma: Tensor | None) -> Tensor | None:
    """The decays of all tokens: those that are given, and those that are the same for every token."""
    if g_gamma is None:
        return g
    check(op, g_gamma=g_gamma)
    check_rank(op, "v", v, 4, "[B,T,HV,V]")
    if g_gamma.shape != v.shape[2:3]:
        raise ValueError(f"[{op}] g_gamma must be [HV] = [{v.shape[2]}], got {list(g_gamma.shape)}")
    fixed = g_gamma.expand(v.shape[:3])
    return fixed if g is None else g + fixed


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with a scalar decay per head: S <- exp(g) S + k v^T, o = scale S^T q.

    RetNet with g_gamma, Mamba-2's recurrence with g; arXiv 2312.06635, 2405.21060.

    Args:
        g: [B,T,HV], the natural logarithm of the decay, <= 0, or None.
        g_gamma: [HV], the same for every token; added to g.
        chunk_size: a power of two, which only a GPU would care about.
        The rest is as in :func:`chunk_gated_delta_rule`.

    Returns:
        o [B,T,HV,V] in the dtype of v, and the final state [N,HV,K,V] ([N,HV,V,K] with state_v_first) or None.

    Raises:
        ValueError, TypeError: as in :func:`chunk_gated_delta_rule`.
    """
    op = "chunk_simple_gla"
    state_v_first = legacy(op, kwargs, state_v_first)
    if chunk_size is not None and (chunk_size < 1 or chunk_size & (chunk_size - 1)):
        raise ValueError(f"[{op}] chunk_size must be a power of 2, got {chunk_size}")
    check(op, q=q, k=k, v=v, g=g)
    return _recurrence(
        op,
        "chunk",
        q,
        k,
        v,
        _with_gamma(op, v, g, g_gamma),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens if cu_seqlens is not None else cu_seqlens_cpu,
        state_v_first=state_v_first,
    )


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_simple_gla` token by token, with gradients.

    Args:
        reverse: from the last token to the first; the final state is then that after the first.
        The rest is as in :func:`chunk_simple_gla`; q, k and v may have different dtypes.

    Returns:
        o [B,T,HV,V] in the dtype of v, and the final state [N,HV,K,V] ([N,HV,V,K] with state_v_first) or None.

    Raises:
        ValueError, TypeError: as in :func:`chunk_gated_delta_rule`.
    """
    op = "fused_recurrent_simple_gla"
    state_v_first = legacy(op, kwargs, state_v_first)
    check(op, q=q, v=v, g=g)
    return _recurrence(
        op,
        "recurrent",
        q,
        k,
        v,
        _with_gamma(op, v, g, g_gamma),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        state_v_first=state_v_first,
        reverse=reverse,
    )


def _retention_gamma(q: Tensor) -> Tensor:
    """RetNet's decays log(1 - 2^-(5 + h)), float32 [H]."""
    return torch.log1p(-(2.0 ** (-5.0 - torch.arange(q.shape[2], dtype=torch.float32, device=q.device))))


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """RetNet's retention (arXiv 2307.08621): :func:`chunk_simple_gla` with the decay 1 - 2^-(5+h) in head h.

    Args:
        q, k: [B,T,H,K]; v: [B,T,H,V]. The rest is as in :func:`chunk_simple_gla`.

    Returns:
        o [B,T,H,V] in the dtype of v, and the final state [N,H,K,V] or None.

    Raises:
        ValueError, TypeError: as in :func:`chunk_gated_delta_rule`.
    """
    op = "chunk_retention"
    legacy(op, kwargs)
    check(op, q=q)
    check_rank(op, "q", q, 4, "[B,T,H,K]")
    return chunk_simple_gla(
        q,
        k,
        v,
        g_gamma=_retention_gamma(q),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
    )


def fused_recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_retention` token by token, with gradients; arguments as in :func:`fused_recurrent_simple_gla`.

    Returns:
        o [B,T,H,V] in the dtype of v, and the final state [N,H,K,V] ([N,H,V,K] with state_v_first) or None.

    Raises:
        ValueError, TypeError: as in :func:`chunk_gated_delta_rule`.
    """
    op = "fused_recurrent_retention"
    state_v_first = legacy(op, kwargs, state_v_first)
    check(op, q=q)
    check_rank(op, "q", q, 4, "[B,T,H,K]")
    return fused_recurrent_simple_gla(
        q,
        k,
        v,
        g_gamma=_retention_gamma(q),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention (arXiv 2312.06635): S <- Diag(exp(g)) S + k v^T, o = scale S^T q.

    Args:
        g: [B,T,HV,K], the natural logarithm of the decay per key channel, <= 0.
        The rest is as in :func:`chunk_gated_delta_rule`.

    Returns:
        o [B,T,HV,V] in the dtype of v, and the final state [N,HV,K,V] ([N,HV,V,K] with state_v_first) or None.

    Raises:
        ValueError, TypeError: as in :func:`chunk_gated_delta_rule`.
    """
    op = "chunk_gla"
    check(op, q=q, k=k, v=v, g=g)
    check_rank(op, "g", g, 4, "[B,T,HV,K]")
    return _recurrence(
        op,
        "chunk",
        q,
        k,
        v,
        gk=g,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens if cu_seqlens is not None else cu_seqlens_cpu,
        state_v_first=state_v_first,
    )


def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_gla` token by token, with gradients.

    Args:
        gk: [B,T,HV,K], a decay per key channel; gv: [B,T,HV,V], one per value channel; natural logarithms, or None.
        The rest is as in :func:`fused_recurrent_simple_gla`.

    Returns:
        o [B,T,HV,V] in the dtype of v, and the final state [N,HV,K,V] ([N,HV,V,K] with state_v_first) or None.

    Raises:
        ValueError, TypeError: as in :func:`chunk_gated_delta_rule`.
    """
    op = "fused_recurrent_gla"
    state_v_first = legacy(op, kwargs, state_v_first)
    return _recurrence(
        op,
        "recurrent",
        q,
        k,
        v,
        gk=gk,
        gv=gv,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        state_v_first=state_v_first,
        reverse=reverse,
    )


def _linear_attn(
    op: str,
    form: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    initial_state: State,
    output_final_state: bool,
    normalize: bool,
    cu_seqlens: Tensor | None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | tuple[Tensor | None, Tensor] | None]:
    z0: Tensor | None = None
    if isinstance(initial_state, (tuple, list)):
        if not normalize:
            raise ValueError(f"[{op}] with normalize=False initial_state must be one tensor, got a pair")
        initial_state, z0 = initial_state
    check(op, q=q, k=k, v=v, z=z0)
    common: dict[str, Any] = dict(scale=scale, cu_seqlens=cu_seqlens, reverse=reverse)
    o, final = _recurrence(
        op, form, q, k, v, initial_state=initial_state, output_final_state=output_final_state, **common
    )
    if not normalize:
        return o, final
    # scale q . z is the attention to values of 1; its state is z itself.
    ones = v.new_ones((*v.shape[:3], 1))
    if z0 is not None:
        check_rank(op, "z of initial_state", z0, 4, "[N,1,H,K]")
        z0 = z0.squeeze(1).unsqueeze(-1)
    sums, z = _recurrence(op, form, q, k, ones, initial_state=z0, output_final_state=True, **common)
    assert z is not None
    return o / (sums + 1e-10), (final, z.squeeze(-1).unsqueeze(1))


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: State = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | tuple[Tensor | None, Tensor] | None]:
    """Linear attention: S <- S + k v^T, o = scale S^T q (arXiv 2006.16236).

    Args:
        normalize: divide o by scale q . z + 1e-10, where z is the sum of the keys up to this token. Then the initial
            state may be a pair (S [N,H,K,V], z [N,1,H,K]), and the final state is such a pair.
        The rest is as in :func:`chunk_gated_delta_rule`.

    Returns:
        o [B,T,H,V] in the dtype of v, and the final state: S or None; with normalize (S or None, z), as fla has it.

    Raises:
        ValueError, TypeError: as in :func:`chunk_gated_delta_rule`.
    """
    return _linear_attn(
        "chunk_linear_attn", "chunk", q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens
    )


def fused_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: State = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | tuple[Tensor | None, Tensor] | None]:
    """:func:`chunk_linear_attn` token by token, with gradients; here normalize is off unless asked for.

    Args:
        reverse: from the last token to the first; the final state is then that after the first.
        The rest is as in :func:`chunk_linear_attn`.

    Returns:
        o [B,T,H,V] in the dtype of v, and the final state: S or None; with normalize (S or None, z), as fla has it.

    Raises:
        ValueError, TypeError: as in :func:`chunk_gated_delta_rule`.
    """
    return _linear_attn(
        "fused_recurrent_linear_attn",
        "recurrent",
        q,
        k,
        v,
        scale,
        initial_state,
        output_final_state,
        normalize,
        cu_seqlens,
        reverse,
    )
