# SPDX-License-Identifier: Apache-2.0
"""Functions of flash-linear-attention 0.6 that :mod:`gdn._fla` puts in their place on CPUs, with their signatures.

Those that gdn.ops has under the same name are not here. What only helps a GPU (chunk_indices, inplace) is ignored.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn import ops
from gdn.ops._call import call, check, legacy, no_context_parallelism, run

_gdn = torch.ops.gdn


def _comba(
    op: str,
    form: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor | None,
    g: Tensor,
    beta: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """S <- exp(g) S + k u^T with u = beta (v - S^T p) from the state before its decay."""
    p = k if p is None else p
    check(op, q=q, k=k, v=v, p=p, g=g, beta=beta, initial_state=initial_state)
    if use_qk_l2norm_in_kernel:
        q, k, p = ops.l2norm(q), ops.l2norm(k), ops.l2norm(p)
    groups = v.shape[2] // q.shape[2]
    q, k, p = (t.repeat_interleave(groups, 2) for t in (q, k, p))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if beta is None:
        beta = g.new_ones(g.shape)
    strength = (beta if beta.dim() == 4 else beta[..., None]).to(wide)
    if strength.shape[-1] != 1:
        raise ValueError(f"[{op}] beta must be [B,T,HV], got {list(beta.shape)}")
    tensors: dict[str, Tensor | None] = dict(q=q, k=k, v=(strength * v).to(q.dtype), a=p, p=(-strength * k).to(q.dtype))
    tensors["g"] = g.to(wide)[..., None].expand(*g.shape, k.shape[-1])
    tensors["initial_state"] = None if initial_state is None else initial_state.to(wide)
    return run(op, _gdn.delta_rule, tensors, cu_seqlens, output_final_state, scale=scale, erase="separate", form=form)


def chunk_comba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor | None,
    g: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    flags = (scale, initial_state, output_final_state, use_qk_l2norm_in_kernel)
    cu_seqlens = cu_seqlens if cu_seqlens is not None else cu_seqlens_cpu
    return _comba("chunk_comba", "chunk", q, k, v, p, g, beta, *flags, cu_seqlens)


def fused_recurrent_comba(
    q: Tensor,
    k: Tensor,
    p: Tensor | None,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    flags = (scale, initial_state, output_final_state, use_qk_l2norm_in_kernel)
    return _comba("fused_recurrent_comba", "recurrent", q, k, v, p, g, beta, *flags, cu_seqlens)


def fused_gdn_gate(
    g: Tensor, A_log: Tensor, dt_bias: Tensor | None = None, output_dtype: torch.dtype = torch.float32
) -> Tensor:
    check("fused_gdn_gate", g=g, A_log=A_log, dt_bias=dt_bias)
    return call(_gdn.gdn_gate, g, A_log, dt_bias).to(output_dtype)


def fused_kda_gate(
    g: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """g [...,HV,K]; any number of dimensions before these."""
    check("fused_kda_gate", g=g, A_log=A_log, dt_bias=dt_bias)
    if A_log is None:
        if lower_bound is None:
            raise ValueError("[fused_kda_gate] A_log or lower_bound must be given")
        A_log = g.new_zeros(g.shape[-2], dtype=torch.float32)
    rows = g.reshape(1, -1, *g.shape[-2:])
    dt_bias = None if dt_bias is None else dt_bias.flatten()
    return call(_gdn.kda_gate, rows, A_log.flatten(), dt_bias, lower_bound).view(g.shape).to(output_dtype)


def _gdn2(
    op: str,
    form: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool,
    use_gate_in_kernel: bool,
    lower_bound: float | None,
    state_v_first: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """u = w v - S^T (b k), with gates b per key channel and w per value channel, each of a value head."""
    check(op, q=q, k=k, v=v, g=g, b=b, w=w, initial_state=initial_state)
    if use_gate_in_kernel:
        g = fused_kda_gate(g, A_log, dt_bias, lower_bound)
    if use_qk_l2norm_in_kernel:
        q, k = ops.l2norm(q), ops.l2norm(k)
    groups = v.shape[2] // q.shape[2]
    q, k = q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if initial_state is not None:
        initial_state = (initial_state.transpose(2, 3) if state_v_first else initial_state).to(wide)
    tensors = dict(q=q, k=k, v=(w * v).to(q.dtype), g=g.to(wide), a=(b * k).to(q.dtype), initial_state=initial_state)
    o, state = run(op, _gdn.delta_rule, tensors, cu_seqlens, output_final_state, scale=scale, erase="own", form=form)
    return o, state.transpose(2, 3).contiguous() if state is not None and state_v_first else state


def chunk_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cp_context: None = None,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int = 64,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    op = "chunk_gdn2"
    state_v_first = legacy(op, kwargs, state_v_first)
    no_context_parallelism(op, cp_context)
    if return_intermediate_states:
        raise ValueError(f"[{op}] return_intermediate_states=True is not supported on CPUs")
    flags = (scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel, lower_bound)
    cu_seqlens = cu_seqlens if cu_seqlens is not None else cu_seqlens_cpu
    return _gdn2(op, "chunk", q, k, v, g, b, w, A_log, dt_bias, *flags, state_v_first, cu_seqlens)


def fused_recurrent_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    op = "fused_recurrent_gdn2"
    state_v_first = legacy(op, kwargs, state_v_first)
    flags = (scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel, lower_bound)
    return _gdn2(op, "recurrent", q, k, v, g, b, w, A_log, dt_bias, *flags, state_v_first, cu_seqlens)


def chunk_gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    num_householder: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: None = None,
) -> tuple[Tensor, Tensor | None]:
    """num_householder writes per token: as many tokens, the first of which decays, the last of which is read."""
    if cp_context is not None:
        raise ValueError("[chunk_gated_delta_product] cp_context (context parallelism) is not supported on CPUs")
    n = num_householder
    cu_seqlens = cu_seqlens if cu_seqlens is not None else cu_seqlens_cpu
    reads = F.pad(q[:, :, None], (0, 0, 0, 0, n - 1, 0)).flatten(1, 2)
    common: dict[str, Any] = dict(
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens * n,
    )
    if g is None:
        o, state = ops.chunk_delta_rule(reads, k, v, beta, **common)
    else:
        decays = F.pad(g[:, :, None], (0, 0, 0, n - 1)).flatten(1, 2)
        o, state = ops.chunk_gated_delta_rule(reads, k, v, decays, beta, **common)
    return o[:, n - 1 :: n].contiguous(), state


def parallel_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Also the matrices of attention [B,H,T,T] where they are asked for."""
    o, _ = ops.chunk_simple_gla(q, k, v, g, scale=scale, cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu)
    if not output_attentions:
        return o, None
    if cu_seqlens is not None or cu_seqlens_cpu is not None:
        raise ValueError("[parallel_simple_gla] output_attentions=True does not go with cu_seqlens")
    scores = torch.einsum("bthk,bshk->bhts", q.float(), k.float()) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if g is not None:
        total = g.float().cumsum(1).transpose(1, 2)
        scores = scores * (total[..., None] - total[..., None, :]).tril().exp()
    return o, scores.tril()


def parallel_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    decays = torch.log1p(-(2.0 ** (-5.0 - torch.arange(q.shape[2], device=q.device)))).expand(q.shape[:3])
    return parallel_simple_gla(q, k, v, decays, scale, output_attentions, cu_seqlens)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Softmax attention for q [B,T,H,K], k [B,S,HKV,K], v [B,S,HKV,V]; the last query stands at the last key."""
    T, S = q.shape[1], k.shape[1]
    ahead = torch.arange(S, device=q.device) - torch.arange(S - T, S, device=q.device)[:, None]
    seen = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    left, right = window_size
    if left >= 0:
        seen = seen & (ahead >= -left)
    if right >= 0:
        seen = seen & (ahead <= right)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, seen, dropout_p, scale=softmax_scale, enable_gqa=True)
    return o.transpose(1, 2)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """:func:`flash_attn_func` for packed sequences: q [T,H,K], k [S,HKV,K], v [S,HKV,V]."""
    outs = [q.new_zeros(0, q.shape[1], v.shape[-1])]
    bounds = (itertools.pairwise(cu.tolist()) for cu in (cu_seqlens_q, cu_seqlens_k))
    for (q0, q1), (k0, k1) in zip(*bounds):
        one = (q[None, q0:q1], k[None, k0:k1], v[None, k0:k1])
        outs.append(flash_attn_func(*one, dropout_p, softmax_scale, causal, window_size)[0])
    return torch.cat(outs)


def _positions(x: Tensor, offsets: int | Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Of the tokens of x [B,T,H,D]: int64 [B,T]; offsets: one, or one per sequence [N]."""
    batch, tokens = x.shape[:2]
    positions = torch.arange(tokens, device=x.device)[None]
    if cu_seqlens is None:
        return positions.expand(batch, -1) + (offsets[:, None] if isinstance(offsets, Tensor) else offsets)
    sequence = torch.bucketize(positions[0], cu_seqlens[1:].long(), right=True)
    return (
        positions - cu_seqlens[:-1].long()[sequence] + (offsets[sequence] if isinstance(offsets, Tensor) else offsets)
    )


def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
) -> Tensor:
    """The first 2 R channels of x [B,T,H,D] turned by the angles of cos and sin [positions,R]."""
    positions = _positions(x, seqlen_offsets, cu_seqlens)
    cos, sin = (table[positions].float()[:, :, None] for table in (cos, sin))
    size = 2 * cos.shape[-1]
    turned, rest = x[..., :size].float(), x[..., size:]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pair = (a * cos - b * sin, a * sin + b * cos)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned.to(x.dtype), rest], -1)


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    num_groups: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm, or RMSNorm, over each of num_groups parts of the last dimension of x + residual."""
    if residual is not None:
        total = x.float() + residual.float() if residual_in_fp32 else x + residual
    else:
        total = x.float() if residual_in_fp32 else x
    wide = total.unflatten(-1, (num_groups, -1)).to(torch.promote_types(total.dtype, torch.float32))
    if not is_rms_norm:
        wide = wide - wide.mean(-1, keepdim=True)
    y = (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(-2)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return (y.to(x.dtype), total) if prenorm else y.to(x.dtype)


def group_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    num_groups: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    y, total = group_norm(x, norm_weight, norm_bias, residual, eps, True, residual_in_fp32, is_rms_norm, num_groups)
    y = F.linear(y.to(linear_weight.dtype), linear_weight, linear_bias)
    return (y, total) if prenorm else y


def rms_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    flags = (residual, eps, prenorm, residual_in_fp32)
    return group_norm_linear(x, norm_weight, norm_bias, linear_weight, linear_bias, *flags, is_rms_norm=True)


def layer_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    y, total = group_norm(x, weight, bias, residual, eps, True, residual_in_fp32)
    y = y * (torch.sigmoid(g) if activation == "sigmoid" else F.silu(g)).to(y.dtype)
    return (y, total) if prenorm else y


def sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


def swish(x: Tensor) -> Tensor:
    return F.silu(x)


def layer_norm_swish_gate_linear(
    x: Tensor,
    g: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    y, total = layer_norm_gated(x, g, norm_weight, norm_bias, "swish", residual, True, residual_in_fp32, eps)
    y = F.linear(y.to(linear_weight.dtype), linear_weight, linear_bias)
    return (y, total) if prenorm else y


def rms_norm_swish_gate_linear(
    x: Tensor,
    g: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    y, total = ops.rms_norm_gated(
        x, g, norm_weight, norm_bias, "swish", residual, prenorm=True, residual_in_fp32=residual_in_fp32, eps=eps
    )
    y = F.linear(y.to(linear_weight.dtype), linear_weight, linear_bias)
    return (y, total) if prenorm else y


def logsigmoid(x: Tensor, temperature: float = 1.0) -> Tensor:
    return F.logsigmoid(x) / temperature


def elu_p1(x: Tensor) -> Tensor:
    return F.elu(x) + 1.0


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    return ops.swiglu(x, y)


def swiglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(ops.swiglu(x, y), weight, bias)


def cross_entropy_loss(
    logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    logit_softcapping: float | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: None = None,
) -> tuple[Tensor, Tensor]:
    if process_group is not None:
        raise ValueError("[cross_entropy_loss] process_group is not supported on CPUs")
    if logit_scale != 1.0 or logit_softcapping is not None:
        logits = logits.float() * logit_scale
        if logit_softcapping is not None:
            logits = logit_softcapping * torch.tanh(logits / logit_softcapping)
    loss, logsumexp = ops.cross_entropy(logits, target, ignore_index)
    scored = target != ignore_index
    if label_smoothing:
        mean = (logsumexp - logits.float().mean(-1)) * scored
        loss = (1 - label_smoothing) * loss + label_smoothing * mean
    z_loss = lse_square_scale * logsumexp.square() * scored
    return loss + z_loss, z_loss.detach()


def fused_linear_cross_entropy_loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    logit_softcapping: float | None = None,
    num_chunks: int = 8,
    reduction: str = "mean",
    use_l2warp: bool = False,
    l2_penalty_factor: float = 1e-4,
    accumulate_grad_in_fp32: bool = True,
    process_group: None = None,
) -> Tensor:
    if use_l2warp:
        raise ValueError("[fused_linear_cross_entropy_loss] use_l2warp=True is not supported on CPUs")
    logits = F.linear(x.flatten(0, -2), weight, bias)
    target = target.flatten()
    loss, _ = cross_entropy_loss(
        logits, target, label_smoothing, logit_scale, 0.0, logit_softcapping, ignore_index, False, process_group
    )
    return loss.sum() if reduction == "sum" else loss.sum() / (target != ignore_index).sum().clamp(min=1)


def cross_entropy_module(module: Any, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """FusedCrossEntropyLoss.forward, which itself refuses CPU tensors."""
    losses = cross_entropy_loss(
        input,
        target,
        module.label_smoothing,
        module.logit_scale,
        module.lse_square_scale,
        module.logit_softcapping,
        module.ignore_index,
        False,
        module.process_group,
    )
    if module.reduction != "none":
        total = (target != module.ignore_index).sum() if module.reduction == "mean" else 1
        losses = losses[0].sum() / total, losses[1].sum() / total
    return losses if module.return_z_loss else losses[0]
