# SPDX-License-Identifier: Apache-2.0
"""The delta rule and its relatives, with flash-linear-attention's signatures.

Sizes: B batch, T tokens, H query and key heads, HV value heads (a multiple of H; value head j reads query and key head
j // (HV / H)), K and V the sizes of a key and of a value, N sequences (B, or len(cu_seqlens) - 1). Per token:

    S <- exp(g) S;  u = beta (v - S^T k);  S <- S + k u^T;  o = scale S^T q    (Gated DeltaNet, arXiv 2412.06464)
"""

from typing import Any

import torch
from torch import Tensor

from gdn.ops._call import call, check, check_rank, chunk, legacy, no_context_parallelism, of_one_dtype, run
from gdn.ops._value_decay import with_value_decay

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
    return run(
        op,
        _gdn.chunk_gated_delta_rule,
        dict(q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state, A_log=A_log, dt_bias=dt_bias),
        cu_seqlens if cu_seqlens is not None else cu_seqlens_cpu,
        output_final_state,
        scale=scale,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        chunk_size=chunk(op, chunk_size),
    )


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
            channel. Decays multiply, their logarithms add. gv is folded into v and o over stretches of tokens in
            which it stays in the range of float32's exponentials, so strong decays take more, shorter calls.
        beta: [B,T,HV] or None (1); [B,T,HV,V] is a write strength per value channel.
        The rest is as in :func:`chunk_gated_delta_rule`, but that q, k and v may have different dtypes.

    Returns:
        o [B,T,HV,V] in the dtype of v, and the final state (float32, float64 for float64 q) or None.

    Raises:
        ValueError, TypeError: as in :func:`chunk_gated_delta_rule`.
    """
    op = "fused_recurrent_gated_delta_rule"
    state_v_first = legacy(op, kwargs, state_v_first)
    q, k, v, dtype = of_one_dtype(op, q, k, v)
    options: dict[str, Any] = dict(
        scale=scale,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
    )
    tensors = dict(q=q, k=k, v=v, g=g, gk=gk, beta=beta, initial_state=initial_state, A_log=A_log, dt_bias=dt_bias)
    function = _gdn.fused_recurrent_gated_delta_rule
    if gv is not None:
        o, final_state = with_value_decay(op, function, gv, tensors, cu_seqlens, output_final_state, **options)
    else:
        o, final_state = run(op, function, tensors, cu_seqlens, output_final_state, **options)
    return o.to(dtype), final_state


def _kda(
    op: str,
    function: Any,
    gate: str,
    g: Tensor,
    tensors: dict[str, Tensor | None],
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    use_gate_in_kernel: bool,
    cu_seqlens: Tensor | None,
    output_final_state: bool,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """What both forms share; `gate` is the name that the operator `function` has for g."""
    check(op, g=g, A_log=A_log, dt_bias=dt_bias)
    check_rank(op, "g", g, 4, "[B,T,HV,K]")
    if use_gate_in_kernel:
        if A_log is None:
            if lower_bound is None:
                raise ValueError(f"[{op}] use_gate_in_kernel=True needs A_log or lower_bound")
            A_log = g.new_zeros(g.shape[2], dtype=torch.float64 if g.dtype == torch.float64 else torch.float32)
        # Checkpoints have them in several shapes.
        dt_bias = None if dt_bias is None else dt_bias.flatten()
        g = call(_gdn.kda_gate, g, A_log.flatten(), dt_bias, lower_bound, name=op)
    return run(op, function, {**tensors, gate: g}, cu_seqlens, output_final_state, **options)


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
        A_log: [HV], or so many numbers in another shape, may be None with lower_bound (then 0). dt_bias: the same with
            HV*K numbers, or None.
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
    if use_gate_in_kernel and safe_gate:
        if lower_bound is None:
            raise ValueError(f"[{op}] safe_gate=True with use_gate_in_kernel=True needs lower_bound")
        if not -5 <= lower_bound < 0:
            raise ValueError(f"[{op}] lower_bound must be in [-5,0), got {lower_bound}")
    return _kda(
        op,
        _gdn.chunk_kda,
        "g",
        g,
        dict(q=q, k=k, v=v, beta=beta, initial_state=initial_state),
        A_log,
        dt_bias,
        lower_bound,
        use_gate_in_kernel,
        cu_seqlens if cu_seqlens is not None else cu_seqlens_cpu,
        output_final_state,
        scale=scale,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        chunk_size=chunk(op, chunk_size, (32, 64)),
    )


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
    q, k, v, dtype = of_one_dtype(op, q, k, v)
    o, final_state = _kda(
        op,
        _gdn.fused_recurrent_gated_delta_rule,
        "gk",
        g,
        dict(q=q, k=k, v=v, beta=beta, initial_state=initial_state),
        A_log,
        dt_bias,
        lower_bound,
        use_gate_in_kernel,
        cu_seqlens,
        output_final_state,
        scale=scale,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
    )
    return o.to(dtype), final_state


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
    return run(
        op,
        _gdn.chunk_delta_rule,
        dict(q=q, k=k, v=v, beta=beta, initial_state=initial_state),
        cu_seqlens if cu_seqlens is not None else cu_seqlens_cpu,
        output_final_state,
        scale=scale,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        chunk_size=chunk(op, chunk_size),
    )


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
