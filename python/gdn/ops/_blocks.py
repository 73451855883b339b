# SPDX-License-Identifier: Apache-2.0
"""Short convolution and norms, with flash-linear-attention's signatures."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from gdn.ops._call import call, check, check_cu_seqlens, check_rank, legacy, no_context_parallelism, wanted

_gdn = torch.ops.gdn


def causal_conv1d(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool | None = False,
    activation: str | None = None,
    backend: str | None = "triton",
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """A causal convolution per channel: y[t] = act(sum_j weight[:,j] x[t-W+1+j] + bias) + residual.

    Args:
        x: [B,T,D]. weight: [D,W], W from 1 to 8. bias: [D]. residual: [B,T,D].
        initial_state: [N,D,W], the last W inputs of each sequence, the newest in the last column; column 0 is not used.
        activation: None, "silu" or "swish" (the same).
        backend, chunk_indices: for GPUs, accepted and without effect.
        cu_seqlens: int32 or int64 [N+1] with B = 1: sequences one after another; also taken from cu_seqlens_cpu.

    Returns:
        y [B,T,D] in the dtype of x, and the final state [N,D,W] or None.

    Raises:
        ValueError: shapes or values that break a rule above. TypeError: not a floating tensor.
    """
    op = "causal_conv1d"
    legacy(op, kwargs)
    no_context_parallelism(op, cp_context)
    if weight is None:
        raise ValueError(f"[{op}] weight must be given as [D,W], got None")
    cu_seqlens = cu_seqlens if cu_seqlens is not None else cu_seqlens_cpu
    check(op, x=x, weight=weight, bias=bias, residual=residual, initial_state=initial_state)
    check_cu_seqlens(op, cu_seqlens, x)
    if initial_state is not None:
        initial_state = initial_state.to(x.dtype)
    y, final_state = call(
        _gdn.causal_conv1d, x, weight, bias, initial_state, cu_seqlens, bool(output_final_state), activation
    )
    if residual is not None:
        y = y + residual
    return y, wanted(final_state, bool(output_final_state))


def causal_conv1d_update(
    x: Tensor,
    cache: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of :func:`causal_conv1d` for each of N sequences; changes `cache` in place, has no gradient.

    Args:
        x: [N,D], [N,1,D], or [1,N,D]: one token of each of N packed sequences.
        cache: [N,D,W], contiguous, of the dtype of x: the last W inputs, the newest in the last column.
        residual: of the shape of x. weight, bias, activation: as in :func:`causal_conv1d`.

    Returns:
        y of the shape of x, and the cache itself.

    Raises:
        ValueError, TypeError: as in :func:`causal_conv1d`. RuntimeError: gradients are asked for.
    """
    op = "causal_conv1d_update"
    if weight is None:
        raise ValueError(f"[{op}] weight must be given as [D,W], got None")
    check(op, x=x, cache=cache, residual=residual, weight=weight, bias=bias)
    if x.dim() not in (2, 3) or (x.dim() == 3 and 1 not in x.shape[:2]):
        raise ValueError(f"[{op}] x must be [N,D], [N,1,D] or [1,N,D], got {list(x.shape)}")
    check_rank(op, "cache", cache, 3, "[N,D,W]")
    rows = x.reshape(-1, x.shape[-1])
    y = call(_gdn.causal_conv1d_update_, rows, cache, weight, bias, None, activation).view(x.shape)
    return (y if residual is None else y + residual), cache


def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last dimension.

    Args:
        x: [..., D]. output_dtype: of the result; that of x where None.

    Raises:
        ValueError: eps is negative. TypeError: x is not a floating tensor.
    """
    check("l2norm", x=x)
    y = call(_gdn.l2norm, x, eps)
    return y if output_dtype is None else y.to(output_dtype)


def _with_residual(x: Tensor, residual: Tensor | None, in_fp32: bool, op: str) -> tuple[Tensor, Tensor]:
    """What is to be normed, and what goes on as the residual."""
    if residual is None:
        return x, x
    if residual.shape != x.shape:
        raise ValueError(f"[{op}] residual must have the shape of x, {list(x.shape)}, got {list(residual.shape)}")
    total = x.float() + residual.float() if in_fp32 else x + residual
    return total.to(x.dtype), total


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: Literal[False] = False,
    residual_in_fp32: bool = False,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    *,
    prenorm: Literal[True],
    residual_in_fp32: bool = False,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean x^2 + eps) * weight + bias over the last dimension, of x + residual where one is given.

    Args:
        x: [..., D]. weight, bias: [D] or None. residual: of the shape of x.
        prenorm: also return x + residual, in float32 with residual_in_fp32.

    Returns:
        y of the shape and dtype of x; with prenorm the pair (y, x + residual).

    Raises:
        ValueError: shapes that do not fit, a negative eps. TypeError: not a floating tensor.
    """
    op = "rms_norm"
    check(op, x=x, weight=weight, bias=bias, residual=residual)
    x, total = _with_residual(x, residual, residual_in_fp32, op)
    y = call(_gdn.rms_norm, x, x.new_ones(x.shape[-1]) if weight is None else weight, eps)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return (y, total) if prenorm else y


@overload
def rms_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: Literal[False] = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor: ...
@overload
def rms_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    activation: str = "swish",
    residual: Tensor | None = None,
    *,
    prenorm: Literal[True],
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]: ...
def rms_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """(x / sqrt(mean x^2 + eps) * weight + bias) * act(g) over the last dimension, of x + residual where one is given.

    Args:
        x, g: [..., D]. weight, bias: [D] or None. residual: of the shape of x.
        activation: "swish" or "silu" (the same), or "sigmoid".
        prenorm: also return x + residual, in float32 with residual_in_fp32.

    Returns:
        y of the shape and dtype of x; with prenorm the pair (y, x + residual).

    Raises:
        ValueError: shapes that do not fit, an unknown activation, a negative eps. TypeError: not a floating tensor.
    """
    op = "rms_norm_gated"
    check(op, x=x, g=g, weight=weight, bias=bias, residual=residual)
    if activation not in ("swish", "silu", "sigmoid"):
        raise ValueError(f"[{op}] activation must be 'silu', 'swish' or 'sigmoid', got {activation!r}")
    x, total = _with_residual(x, residual, residual_in_fp32, op)
    scale = x.new_ones(x.shape[-1]) if weight is None else weight
    if bias is None:
        y = call(_gdn.rms_norm_gated, x, scale, g.to(x.dtype), eps, activation)
    else:
        gate = torch.sigmoid(g) if activation == "sigmoid" else torch.nn.functional.silu(g)
        y = (call(_gdn.rms_norm, x, scale, eps) + bias.to(x.dtype)) * gate.to(x.dtype)
    return (y, total) if prenorm else y


l2_norm = l2norm
