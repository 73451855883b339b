# SPDX-License-Identifier: Apache-2.0
"""Makes the installed flash-linear-attention run on CPUs, its own layers and models included."""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gdn import ops


def _swiglu(x: Tensor, y: Tensor) -> Tensor:
    return ops.swiglu(x, y)


def _swiglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(ops.swiglu(x, y), weight, bias)


def _cross_entropy_loss(
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


def _fused_linear_cross_entropy_loss(
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
    logits = torch.nn.functional.linear(x.flatten(0, -2), weight, bias)
    target = target.flatten()
    loss, _ = _cross_entropy_loss(
        logits, target, label_smoothing, logit_scale, 0.0, logit_softcapping, ignore_index, False, process_group
    )
    return loss.sum() if reduction == "sum" else loss.sum() / (target != ignore_index).sum().clamp(min=1)


def _cross_entropy_module(module: Any, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """FusedCrossEntropyLoss.forward, which itself refuses CPU tensors."""
    losses = _cross_entropy_loss(
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
        losses = tuple(loss.sum() / total for loss in losses)
    return losses if module.return_z_loss else losses[0]


# (module, name, what stands in its place on a CPU)
FUNCTIONS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("fla.ops.gated_delta_rule.chunk", "chunk_gated_delta_rule", ops.chunk_gated_delta_rule),
    (
        "fla.ops.gated_delta_rule.fused_recurrent",
        "fused_recurrent_gated_delta_rule",
        ops.fused_recurrent_gated_delta_rule,
    ),
    ("fla.ops.kda.chunk", "chunk_kda", ops.chunk_kda),
    ("fla.ops.kda.fused_recurrent", "fused_recurrent_kda", ops.fused_recurrent_kda),
    ("fla.ops.delta_rule.chunk", "chunk_delta_rule", ops.chunk_delta_rule),
    ("fla.ops.delta_rule.fused_recurrent", "fused_recurrent_delta_rule", ops.fused_recurrent_delta_rule),
    ("fla.ops.simple_gla.chunk", "chunk_simple_gla", ops.chunk_simple_gla),
    ("fla.ops.linear_attn.chunk", "chunk_linear_attn", ops.chunk_linear_attn),
    ("fla.modules.causal_conv1d.ops", "causal_conv1d", ops.causal_conv1d),
    ("fla.modules.causal_conv1d.ops", "causal_conv1d_update", ops.causal_conv1d_update),
    ("fla.modules.norm.l2norm", "l2norm", ops.l2norm),
    ("fla.modules.norm.layernorm", "rms_norm", ops.rms_norm),
    ("fla.modules.norm.fused_norm_gate", "rms_norm_gated", ops.rms_norm_gated),
    ("fla.modules.activations.ops", "swiglu", _swiglu),
    ("fla.modules.activations.ops", "swiglu_linear", _swiglu_linear),
    ("fla.modules.fused_cross_entropy.ops", "cross_entropy_loss", _cross_entropy_loss),
    (
        "fla.modules.fused_linear_cross_entropy.ops",
        "fused_linear_cross_entropy_loss",
        _fused_linear_cross_entropy_loss,
    ),
)

_registered: list[str] = []


def _on_cpu(*args: Any, **kwargs: Any) -> bool:
    first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    return first is not None and first.device.type == "cpu"


def _verifier(*args: Any, **kwargs: Any) -> tuple[bool, str | None]:
    return (True, None) if _on_cpu(*args, **kwargs) else (False, "gdn serves CPU tensors only")


def _by_device(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        return (ours if _on_cpu(*args, **kwargs) else original)(*args, **kwargs)

    # Without __wrapped__, by which fla would take the original for this one.
    functools.update_wrapper(function, original)
    function.__dict__.pop("__wrapped__", None)
    return function


def _misfit(original: Callable[..., Any], ours: Callable[..., Any]) -> str | None:
    """The first parameter of the original that ours does not take."""
    try:
        parameters = inspect.signature(inspect.unwrap(original)).parameters.values()
    except (TypeError, ValueError):  # a builtin: torch.autograd.Function.apply
        return None
    known = inspect.signature(ours).parameters
    return next(
        (p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in known), None
    )


def register_fla_backend() -> tuple[str, ...]:
    """Lets the installed flash-linear-attention (0.6) use gdn for tensors on the CPU.

    Its operators for the gated delta rule, KDA, DeltaNet, simple GLA and linear attention, its short convolution,
    norms, SwiGLU and cross-entropy then work on CPUs, and with them its layers and models of Gated DeltaNet, KDA and
    DeltaNet.
    Where flash-linear-attention has a registry of backends gdn registers there; the functions that it does not dispatch
    are replaced by ones that look at the device first. Tensors on other devices go where they went before.

    Returns:
        The names of the functions that gdn serves.

    Raises:
        ImportError: flash-linear-attention does not import.
        RuntimeError: another version than 0.6, or one with other functions; then nothing was changed.
    """
    if _registered:
        return tuple(_registered)
    try:
        import fla
    except ImportError as error:
        raise ImportError(
            f"gdn.register_fla_backend() needs flash-linear-attention 0.6, which does not import: {error}"
        ) from error
    version = getattr(fla, "__version__", "unknown")
    if not version.startswith("0.6"):
        raise RuntimeError(
            f"[register_fla_backend] flash-linear-attention must be 0.6, got {version}; nothing was changed"
        )
    originals = []
    for path, name, ours in FUNCTIONS:
        original = getattr(importlib.import_module(path), name, None)
        lacking = "it" if original is None else _misfit(original, ours)
        if lacking is not None:
            raise RuntimeError(
                f"[register_fla_backend] flash-linear-attention {version} is not a version that gdn knows: "
                f"{path}.{name} ({lacking}); nothing was changed"
            )
        originals.append(original)

    backends = importlib.import_module("fla.backends")
    registries = getattr(backends, "_function_registries", {})

    class GdnBackend(backends.BaseBackend):
        backend_type = "gdn"
        priority = 0

    for (_, name, ours), original in zip(FUNCTIONS, originals):
        if inspect.unwrap(original) in registries:
            backends.register(original, backend=GdnBackend, verifier=_verifier)(ours)
        else:
            replacement = _by_device(original, ours)
            for module_name, module in list(sys.modules.items()):
                if module_name.split(".")[0] != "fla":
                    continue
                for attribute, value in list(vars(module).items()):
                    if value is original:
                        setattr(module, attribute, replacement)
        _registered.append(name)
    criterion = importlib.import_module("fla.modules.fused_cross_entropy.ops").FusedCrossEntropyLoss
    criterion.forward = _by_device(criterion.forward, _cross_entropy_module)
    return tuple(_registered)
