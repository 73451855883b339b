# SPDX-License-Identifier: Apache-2.0
"""What all wrappers share: checks of types, errors of the right class, and fla's older keywords."""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check(op: str, **tensors: Tensor | None) -> None:
    """TypeError unless all are floating tensors, and q, k, v of one dtype; ValueError unless all are on one device."""
    first: tuple[str, torch.dtype] | None = None
    place: tuple[str, torch.device] | None = None
    for name, t in tensors.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"[{op}] {name} must be a torch.Tensor, got {type(t).__name__}")
        if t.dtype not in FLOATS:
            raise TypeError(f"[{op}] {name} must be float32, float64, bfloat16 or float16, got {t.dtype}")
        if place is None:
            place = (name, t.device)
        elif t.device != place[1]:
            raise ValueError(f"[{op}] {name} must be on the device of {place[0]} ({place[1]}), got {t.device}")
        if name in ("q", "k", "v"):
            if first is None:
                first = (name, t.dtype)
            elif t.dtype != first[1]:
                raise TypeError(f"[{op}] {name} must have the dtype of {first[0]} ({first[1]}), got {t.dtype}")


def check_rank(op: str, name: str, t: Tensor, rank: int, layout: str) -> None:
    if t.dim() != rank:
        raise ValueError(f"[{op}] {name} must be {layout}, got {list(t.shape)}")


def check_cu_seqlens(op: str, cu_seqlens: Tensor | None, like: Tensor | None) -> None:
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"[{op}] cu_seqlens must be a torch.Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"[{op}] cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if like is not None and cu_seqlens.is_meta != like.is_meta:
        raise ValueError(f"[{op}] cu_seqlens must be on a device with data, got {cu_seqlens.device}")


def call(function: Callable[..., T], *args: Any, name: str | None = None, **kwargs: Any) -> T:
    """Calls an operator; a broken rule of libgdn ("[op] rule, got value") is a ValueError here, of `name` where given.

    Everything else (no gradient, no kernel for a device, out of memory) stays what torch makes of it.
    """
    if torch.compiler.is_compiling():
        return function(*args, **kwargs)
    try:
        return function(*args, **kwargs)
    except RuntimeError as error:
        text = str(error)
        if text.startswith("[") and "no gradient" not in text and "not for gradients" not in text:
            text = text.splitlines()[0]
            raise ValueError(text if name is None else f"[{name}]{text[text.index(']') + 1 :]}") from None
        if "functorch" in text or "vmap" in text or "saved tensor hooks" in text:
            raise RuntimeError(
                "gdn's operators have gradients by torch.autograd only; torch.func transforms are not supported: "
                f"{text.splitlines()[0]}"
            ) from None
        raise


def run(
    op: str,
    function: Callable[..., tuple[Tensor, ...]],
    tensors: dict[str, Tensor | None],
    cu_seqlens: Tensor | None,
    output_final_state: bool,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Checks what a recurrence takes, calls its operator, and returns (o, the final state or None)."""
    check(op, **tensors)
    check_cu_seqlens(op, cu_seqlens, tensors["q"])
    o, final_state, *_ = call(
        function, **tensors, cu_seqlens=cu_seqlens, output_final_state=output_final_state, **options, name=op
    )
    return o, wanted(final_state, output_final_state)


def of_one_dtype(op: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    """fla's recurrent forms take q, k and v of different dtypes and return o in that of v, the last value here."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        check(op, **{name: t})
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    return q.to(dtype), k.to(dtype), v.to(dtype), v.dtype


def make(kind: Callable[..., T], *args: Any) -> T:
    """Makes an object of libgdn; it fails only for what it was asked for, so its errors are ValueErrors."""
    try:
        return kind(*args)
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[0]) from None


def legacy(op: str, kwargs: dict[str, Any], state_v_first: bool = False) -> bool:
    """Takes fla's older keywords out of `kwargs`, rejects what is left, and returns state_v_first."""
    if not kwargs:
        return state_v_first
    if "head_first" in kwargs:
        raise DeprecationWarning(f"[{op}] head_first has been removed: inputs must be [B,T,H,...]")
    if "transpose_state_layout" in kwargs:
        if state_v_first:
            raise ValueError(f"[{op}] state_v_first and the deprecated transpose_state_layout cannot both be given")
        warnings.warn(
            "`transpose_state_layout` is deprecated and renamed to `state_v_first`.", DeprecationWarning, stacklevel=3
        )
        state_v_first = bool(kwargs.pop("transpose_state_layout"))
    if kwargs:
        raise TypeError(f"[{op}] unexpected keyword argument {next(iter(kwargs))!r}")
    return state_v_first


def no_context_parallelism(op: str, cp_context: object) -> None:
    if cp_context is not None:
        raise ValueError(f"[{op}] cp_context (context parallelism) is not supported on CPUs: pass the whole sequence")


def chunk(op: str, chunk_size: int, choices: tuple[int, ...] = (16, 32, 64)) -> int:
    """The kernel's chunk size. 64 is fla's default, chosen for GPUs: it leaves the choice to the kernel (0)."""
    if chunk_size not in choices:
        allowed = ", ".join(map(str, choices[:-1])) + f" or {choices[-1]}"
        raise ValueError(f"[{op}] chunk_size must be {allowed}, got {chunk_size}")
    return 0 if chunk_size == 64 else chunk_size


def wanted(final_state: Tensor, output_final_state: bool) -> Tensor | None:
    return final_state if output_final_state else None
