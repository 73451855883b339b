# SPDX-License-Identifier: Apache-2.0
"""The delta rule and its relatives, with flash-linear-attention's signatures.

Sizes: B batch, T tokens, H query and key heads, HV value heads (a multiple of H; value head j reads query and key head
j // (HV / H)), K and V the sizes of a key and of a value, N sequences (B, or len(cu_seqlens) - 1). Per token:

    S <- exp(g) S;  u = beta (v - S^T k);  S <- S + k u^T;  o = scale S^T q    (Gated DeltaNet, arXiv 2412.06464)
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from gdn.ops._call import call, check, check_cu_seqlens, check_rank, chunk, legacy, no_context_parallelism, wanted

_gdn = torch.ops.gdn


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: None = None,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int = 64,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule over whole sequences, chunk by chunk.

    Args:
        q, k: [B,T,H,K].
        v: [B,T,HV,V], of the dtype of q.
        g: [B,T,HV], the natural logarithm of the decay, <= 0; with use_gate_in_kernel the raw input of the gate.
        beta: [B,T,HV], the write strength; with use_beta_sigmoid_in_kernel its logit.
        scale: of the queries; K ** -0.5 where None.
        initial_state: [N,HV,K,V], any floating dtype, read as float32; [N,HV,V,K] with state_v_first.
        output_final_state: return the state after the last token.
        use_qk_l2norm_in_kernel: divide q and k by sqrt(sum x^2 + 1e-6) first.
        use_beta_sigmoid_in_kernel: beta <- sigmoid(beta); allow_neg_eigval: twice that.
        cu_seqlens: int32 or int64 [N+1] with B = 1: sequence n is the tokens cu_seqlens[n] to cu_seqlens[n+1]. Also
            taken from cu_seqlens_cpu; chunk_indices is not needed and ignored.
        use_gate_in_kernel: g <- -exp(A_log) softplus(g + dt_bias) with A_log [HV] and, where given, dt_bias [HV].
        chunk_size: 16 or 32; 64, fla's default, leaves the choice to the kernel. Results differ by rounding only.

    Returns:
        o [B,T,HV,V] in the dtype of q, and the final state (float32, float64 for float64 q) or None.

    Raises:
        ValueError: shapes or values that break a rule above. TypeError: not a floating tensor, dtypes that differ.

    Source: arXiv 2412.06464, section 3.3; the formulas are in gdn/kernels/delta_rule/README.md.
    """
    op = "chunk_gated_delta_rule"
    state_v_first = legacy(op, kwargs, state_v_first)
    no_context_parallelism(op, cp_context)
    cu_seqlens = cu_seqlens if cu_seqlens is not None else cu_seqlens_cpu
    check(op, q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state, A_log=A_log, dt_bias=dt_bias)
    check_cu_seqlens(op, cu_seqlens, q)
    o, final_state = call(
        _gdn.chunk_gated_delta_rule,
        q,
        k,
        v,
        g,
        beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        A_log=A_log,
        dt_bias=dt_bias,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk(op, chunk_size),
    )
    return o, wanted(final_state, output_final_state)


def _of_one_dtype(op: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    """fla's recurrent forms take q, k and v of different dtypes and return o in that of v."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        check(op, **{name: t})
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    return q.to(dtype), k.to(dtype), v.to(dtype), v.dtype


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule token by token: faster than the chunk form up to some 64 tokens. It has gradients.

    Args:
        g: [B,T,HV] or None (no decay); gk: [B,T,HV,K], a decay per key channel; gv: [B,T,HV,V], a decay per value
            channel, for which there is no kernel: torch computes it, slowly. Decays multiply, their logarithms add.
        beta: [B,T,HV] or None (1); [B,T,HV,V] is a write strength per value channel.
        The rest is as in :func:`chunk_gated_delta_rule`, but that q, k and v may have different dtypes.

    Returns:
        o [B,T,HV,V] in the dtype of v, and the final state (float32, float64 for float64 q) or None.

    Raises:
        ValueError, TypeError: as in :func:`chunk_gated_delta_rule`.
    """
    op = "fused_recurrent_gated_delta_rule"
    state_v_first = legacy(op, kwargs, state_v_first)
    q, k, v, dtype = _of_one_dtype(op, q, k, v)
    check(op, q=q, k=k, v=v, g=g, gk=gk, gv=gv, beta=beta, initial_state=initial_state, A_log=A_log, dt_bias=dt_bias)
    check_cu_seqlens(op, cu_seqlens, q)
    if gv is not None:
        if use_gate_in_kernel:
            if A_log is None or g is None:
                raise ValueError(f"[{op}] use_gate_in_kernel=True needs g and A_log")
            g = call(_gdn.gdn_gate, g, A_log, dt_bias)
        if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
            raise ValueError(f"[{op}] allow_neg_eigval=True needs use_beta_sigmoid_in_kernel=True")
        if use_beta_sigmoid_in_kernel and beta is not None:
            beta = beta.float().sigmoid() * (2.0 if allow_neg_eigval else 1.0)
        if use_qk_l2norm_in_kernel:
            q, k = call(_gdn.l2norm, q), call(_gdn.l2norm, k)
        if state_v_first and initial_state is not None:
            initial_state = initial_state.transpose(2, 3)
        o, final_state = _with_value_decay(op, q, k, v, g, gk, gv, beta, scale, initial_state, cu_seqlens)
        final_state = final_state.transpose(2, 3).contiguous() if state_v_first else final_state
        return o.to(dtype), wanted(final_state, output_final_state)
    o, final_state = call(
        _gdn.fused_recurrent_gated_delta_rule,
        q,
        k,
        v,
        g=g,
        gk=gk,
        beta=beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        A_log=A_log,
        dt_bias=dt_bias,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )
    return o.to(dtype), wanted(final_state, output_final_state)


def _with_value_decay(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gk: Tensor | None,
    gv: Tensor,
    beta: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence with a decay per value channel, which the kernels do not have: token by token in torch."""
    check_rank(op, "v", v, 4, "[B,T,HV,V]")
    for name, t, shape in (
        ("g", g, v.shape[:3]),
        ("gk", gk, (*v.shape[:3], q.shape[-1])),
        ("gv", gv, v.shape),
    ):
        if t is not None and t.shape != torch.Size(shape):
            raise ValueError(f"[{op}] {name} must be {list(shape)}, got {list(t.shape)}")
    if cu_seqlens is not None:
        if q.shape[0] != 1:
            raise ValueError(f"[{op}] B must be 1 with cu_seqlens, got {q.shape[0]}")
        outs, states = [], []
        for n, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            part = (None if t is None else t[:, begin:end] for t in (q, k, v, g, gk, gv, beta))
            start = None if initial_state is None else initial_state[n : n + 1]
            o, state = _with_value_decay(op, *part, scale, start, None)
            outs.append(o)
            states.append(state)
        return torch.cat(outs, 1), torch.cat(states)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = v.shape[2] // q.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = (t.to(wide).repeat_interleave(groups, 2) for t in (q, k))
    decay = torch.zeros((), dtype=wide)
    for t, layout in ((g, (..., None, None)), (gk, (..., None)), (gv, (..., None, slice(None)))):
        if t is not None:
            decay = decay + t.to(wide)[layout]
    beta = torch.ones_like(v[..., :1]) if beta is None else beta if beta.dim() == 4 else beta[..., None]
    state = (
        v.new_zeros((*v.shape[:1], *v.shape[2:3], q.shape[-1], v.shape[-1]), dtype=wide)
        if initial_state is None
        else initial_state.to(wide)
    )
    outs = [v.new_zeros((v.shape[0], 0, *v.shape[2:]), dtype=wide)]
    for t in range(v.shape[1]):
        state = state * decay[:, t].exp()
        u = beta[:, t].to(wide) * (v[:, t].to(wide) - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + k[:, t, :, :, None] * u[:, :, None]
        outs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t] * scale)[:, None])
    return torch.cat(outs, 1), state


def _kda_gate(op: str, g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    if A_log is None:
        if lower_bound is None:
            raise ValueError(f"[{op}] use_gate_in_kernel=True needs A_log or lower_bound")
        A_log = g.new_zeros(g.shape[2], dtype=torch.float64 if g.dtype == torch.float64 else torch.float32)
    return call(_gdn.kda_gate, g, A_log, dt_bias, lower_bound)


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: None = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int = 64,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Kimi Delta Attention: the gated delta rule with a decay per key channel.

    Args:
        g: [B,T,HV,K], the natural logarithm of the decay, <= 0; with use_gate_in_kernel the raw input of the gate:
            -exp(A_log) softplus(g + dt_bias), or with lower_bound: lower_bound sigmoid(exp(A_log) (g + dt_bias)).
        A_log: [HV], may be None with lower_bound (then 0). dt_bias: [HV*K] or None.
        safe_gate: with use_gate_in_kernel it demands a lower_bound in [-5, 0); else it changes nothing here.
        disable_recompute, use_graph, max_num_seqs: for GPUs, accepted and without effect.
        return_intermediate_states: not supported.
        chunk_size: 32; 64 leaves the choice to the kernel.
        The rest is as in :func:`chunk_gated_delta_rule`.

    Returns:
        o [B,T,HV,V] in the dtype of q, and the final state (float32, float64 for float64 q) or None.

    Raises:
        ValueError, TypeError: as in :func:`chunk_gated_delta_rule`.

    Source: Kimi Linear, arXiv 2510.26692.
    """
    op = "chunk_kda"
    state_v_first = legacy(op, kwargs, state_v_first)
    no_context_parallelism(op, cp_context)
    if return_intermediate_states:
        raise ValueError(f"[{op}] return_intermediate_states=True is not supported")
    cu_seqlens = cu_seqlens if cu_seqlens is not None else cu_seqlens_cpu
    check(op, q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state, A_log=A_log, dt_bias=dt_bias)
    check_cu_seqlens(op, cu_seqlens, q)
    check_rank(op, "g", g, 4, "[B,T,HV,K]")
    if use_gate_in_kernel:
        if safe_gate and lower_bound is None:
            raise ValueError(f"[{op}] safe_gate=True with use_gate_in_kernel=True needs lower_bound")
        if safe_gate and not -5 <= lower_bound < 0:
            raise ValueError(f"[{op}] lower_bound must be in [-5,0), got {lower_bound}")
        g = _kda_gate(op, g, A_log, dt_bias, lower_bound)
    o, final_state = call(
        _gdn.chunk_kda,
        q,
        k,
        v,
        g,
        beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk(op, chunk_size, (32, 64)),
    )
    return o, wanted(final_state, output_final_state)


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Kimi Delta Attention token by token, with gradients; arguments as in :func:`chunk_kda`.

    Returns:
        o [B,T,HV,V] in the dtype of v, and the final state (float32, float64 for float64 q) or None.

    Raises:
        ValueError, TypeError: as in :func:`chunk_gated_delta_rule`.
    """
    op = "fused_recurrent_kda"
    state_v_first = legacy(op, kwargs, state_v_first)
    q, k, v, dtype = _of_one_dtype(op, q, k, v)
    check(op, q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state, A_log=A_log, dt_bias=dt_bias)
    check_cu_seqlens(op, cu_seqlens, q)
    check_rank(op, "g", g, 4, "[B,T,HV,K]")
    if use_gate_in_kernel:
        g = _kda_gate(op, g, A_log, dt_bias, lower_bound)
    o, final_state = call(
        _gdn.fused_recurrent_gated_delta_rule,
        q,
        k,
        v,
        gk=g,
        beta=beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )
    return o.to(dtype), wanted(final_state, output_final_state)


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    chunk_size: int = 64,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule without decay (DeltaNet, arXiv 2406.06484); arguments as in :func:`chunk_gated_delta_rule`.

    float32, which fla refuses here, is welcome.

    Returns:
        o [B,T,HV,V] in the dtype of q, and the final state [N,HV,K,V] or None.

    Raises:
        ValueError, TypeError: as in :func:`chunk_gated_delta_rule`.
    """
    op = "chunk_delta_rule"
    legacy(op, kwargs)
    cu_seqlens = cu_seqlens if cu_seqlens is not None else cu_seqlens_cpu
    check(op, q=q, k=k, v=v, beta=beta, initial_state=initial_state)
    check_cu_seqlens(op, cu_seqlens, q)
    o, final_state = call(
        _gdn.chunk_delta_rule,
        q,
        k,
        v,
        beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk(op, chunk_size),
    )
    return o, wanted(final_state, output_final_state)


def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_delta_rule` token by token, with gradients; beta None means 1.

    Returns:
        o [B,T,HV,V] in the dtype of q, and the final state [N,HV,K,V] or None.

    Raises:
        ValueError, TypeError: as in :func:`chunk_gated_delta_rule`.
    """
    return fused_recurrent_gated_delta_rule(
        q,
        k,
        v,
        beta=beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
    )


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
        o [B,T,HV,V] in the dtype of q, and the final state [N,HV,K,V] ([N,HV,V,K] with state_v_first) or None.

    Raises:
        ValueError, TypeError: as in :func:`chunk_gated_delta_rule`.
    """
    op = "chunk_simple_gla"
    state_v_first = legacy(op, kwargs, state_v_first)
    if chunk_size is not None and (chunk_size < 1 or chunk_size & (chunk_size - 1)):
        raise ValueError(f"[{op}] chunk_size must be a power of 2, got {chunk_size}")
    cu_seqlens = cu_seqlens if cu_seqlens is not None else cu_seqlens_cpu
    check(op, q=q, k=k, v=v, g=g, g_gamma=g_gamma, initial_state=initial_state)
    check_cu_seqlens(op, cu_seqlens, q)
    if g_gamma is not None:
        check_rank(op, "v", v, 4, "[B,T,HV,V]")
        if g_gamma.shape != v.shape[2:3]:
            raise ValueError(f"[{op}] g_gamma must be [HV] = [{v.shape[2]}], got {list(g_gamma.shape)}")
        fixed = g_gamma.expand(v.shape[:3])
        g = fixed if g is None else g + fixed
    if state_v_first and initial_state is not None:
        initial_state = initial_state.transpose(-1, -2)
    common = dict(
        scale=scale, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens
    )
    if g is None:
        o, final_state = call(_gdn.chunk_linear_attn, q, k, v, normalize=False, **common)
    else:
        o, final_state = call(_gdn.chunk_simple_gla, q, k, v, g, **common)
    if state_v_first and output_final_state:
        final_state = final_state.transpose(-1, -2).contiguous()
    return o, wanted(final_state, output_final_state)


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple[Tensor, Tensor] | None = None,
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
        o [B,T,H,V] in the dtype of q, and the final state: S or None; with normalize (S or None, z), as fla has it.

    Raises:
        ValueError, TypeError: as in :func:`chunk_gated_delta_rule`.
    """
    op = "chunk_linear_attn"
    z0: Tensor | None = None
    if isinstance(initial_state, (tuple, list)):
        if not normalize:
            raise ValueError(f"[{op}] with normalize=False initial_state must be one tensor, got a pair")
        initial_state, z0 = initial_state
    check(op, q=q, k=k, v=v, initial_state=initial_state, z=z0)
    check_cu_seqlens(op, cu_seqlens, q)
    common = dict(scale=scale, normalize=False, cu_seqlens=cu_seqlens)
    o, final_state = call(
        _gdn.chunk_linear_attn, q, k, v, initial_state=initial_state, output_final_state=output_final_state, **common
    )
    final = wanted(final_state, output_final_state)
    if not normalize:
        return o, final
    # scale q . z is the attention to values of 1; its state is z itself.
    ones = v.new_ones((*v.shape[:3], 1))
    if z0 is not None:
        check_rank(op, "z of initial_state", z0, 4, "[N,1,H,K]")
        z0 = z0.squeeze(1).unsqueeze(-1)
    sums, z = call(_gdn.chunk_linear_attn, q, k, ones, initial_state=z0, output_final_state=True, **common)
    return o / (sums + 1e-10), (final, z.squeeze(-1).unsqueeze(1))


def gated_delta_rule_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    slots: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
) -> Tensor:
    """One token for each of N sequences, in place on a pool of states; for decoding, without gradients.

    Args:
        q, k: [N,H,K]; v: [N,HV,V]; beta: [N,HV] or None.
        g: [N,HV], or [N,HV,K] for Kimi Delta Attention, or None.
        state: [S,HV,K,V], contiguous, float32 (float64 for float64 q); changed in place.
        slots: int32 or int64 [N], all different: sequence n uses state[slots[n]]. A negative slot is no sequence: its
            output is 0 and nothing is changed. None: sequence n uses state[n].
        The rest is as in :func:`chunk_gated_delta_rule`.

    Returns:
        o [N,HV,V] in the dtype of q.

    Raises:
        ValueError, TypeError: as in :func:`chunk_gated_delta_rule`.
    """
    op = "gated_delta_rule_step_"
    check(op, q=q, k=k, v=v, g=g, beta=beta, state=state, A_log=A_log, dt_bias=dt_bias)
    return call(
        _gdn.gated_delta_rule_step_,
        q,
        k,
        v,
        g,
        beta,
        state,
        slots=slots,
        scale=scale,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        A_log=A_log,
        dt_bias=dt_bias,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
    )


chunk_gdn = chunk_gated_delta_rule
fused_recurrent_gdn = fused_recurrent_gated_delta_rule
