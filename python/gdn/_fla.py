# SPDX-License-Identifier: Apache-2.0
"""Makes the installed flash-linear-attention run on CPUs, its own layers and models included."""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from gdn import _fla_ops, ops

# (module, name, what stands in its place on a CPU)
FUNCTIONS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("fla.ops.gated_delta_rule.chunk", "chunk_gated_delta_rule", ops.chunk_gated_delta_rule),
    (
        "fla.ops.gated_delta_rule.fused_recurrent",
        "fused_recurrent_gated_delta_rule",
        ops.fused_recurrent_gated_delta_rule,
    ),
    ("fla.ops.gated_delta_rule.gate", "fused_gdn_gate", _fla_ops.fused_gdn_gate),
    ("fla.ops.kda.gate", "fused_kda_gate", _fla_ops.fused_kda_gate),
    ("fla.ops.kda.chunk", "chunk_kda", ops.chunk_kda),
    ("fla.ops.kda.fused_recurrent", "fused_recurrent_kda", ops.fused_recurrent_kda),
    ("fla.ops.delta_rule.chunk", "chunk_delta_rule", ops.chunk_delta_rule),
    ("fla.ops.delta_rule.fused_recurrent", "fused_recurrent_delta_rule", ops.fused_recurrent_delta_rule),
    ("fla.ops.gdn2.chunk", "chunk_gdn2", _fla_ops.chunk_gdn2),
    ("fla.ops.gdn2.fused_recurrent", "fused_recurrent_gdn2", _fla_ops.fused_recurrent_gdn2),
    ("fla.ops.comba.chunk", "chunk_comba", _fla_ops.chunk_comba),
    ("fla.ops.comba.fused_recurrent", "fused_recurrent_comba", _fla_ops.fused_recurrent_comba),
    ("fla.ops.gated_delta_product.chunk", "chunk_gated_delta_product", _fla_ops.chunk_gated_delta_product),
    ("fla.ops.simple_gla.chunk", "chunk_simple_gla", ops.chunk_simple_gla),
    ("fla.ops.simple_gla.fused_chunk", "fused_chunk_simple_gla", ops.chunk_simple_gla),
    ("fla.ops.simple_gla.fused_recurrent", "fused_recurrent_simple_gla", ops.fused_recurrent_simple_gla),
    ("fla.ops.simple_gla.parallel", "parallel_simple_gla", _fla_ops.parallel_simple_gla),
    ("fla.ops.retention.chunk", "chunk_retention", ops.chunk_retention),
    ("fla.ops.retention.fused_chunk", "fused_chunk_retention", ops.chunk_retention),
    ("fla.ops.retention.fused_recurrent", "fused_recurrent_retention", ops.fused_recurrent_retention),
    ("fla.ops.retention.parallel", "parallel_retention", _fla_ops.parallel_retention),
    ("fla.ops.gla.chunk", "chunk_gla", ops.chunk_gla),
    ("fla.ops.gla.fused_recurrent", "fused_recurrent_gla", ops.fused_recurrent_gla),
    ("fla.ops.linear_attn.chunk", "chunk_linear_attn", ops.chunk_linear_attn),
    ("fla.ops.linear_attn.fused_chunk", "fused_chunk_linear_attn", ops.chunk_linear_attn),
    ("fla.ops.linear_attn.fused_recurrent", "fused_recurrent_linear_attn", ops.fused_recurrent_linear_attn),
    ("fla.modules.causal_conv1d.ops", "causal_conv1d", ops.causal_conv1d),
    ("fla.modules.causal_conv1d.ops", "causal_conv1d_update", ops.causal_conv1d_update),
    ("fla.modules.norm.l2norm", "l2norm", ops.l2norm),
    ("fla.modules.norm.layernorm", "rms_norm", ops.rms_norm),
    ("fla.modules.norm.layernorm", "layer_norm", _fla_ops.group_norm),
    ("fla.modules.norm.layernorm", "group_norm", _fla_ops.group_norm),
    ("fla.modules.norm.layernorm", "rms_norm_linear", _fla_ops.rms_norm_linear),
    ("fla.modules.norm.layernorm", "layer_norm_linear", _fla_ops.group_norm_linear),
    ("fla.modules.norm.layernorm", "group_norm_linear", _fla_ops.group_norm_linear),
    ("fla.modules.norm.fused_norm_gate", "rms_norm_gated", ops.rms_norm_gated),
    ("fla.modules.norm.fused_norm_gate", "layer_norm_gated", _fla_ops.layer_norm_gated),
    ("fla.modules.norm.fused_norm_gate", "rms_norm_swish_gate_linear", _fla_ops.rms_norm_swish_gate_linear),
    ("fla.modules.norm.fused_norm_gate", "layer_norm_swish_gate_linear", _fla_ops.layer_norm_swish_gate_linear),
    ("fla.modules.rotary.ops", "rotary_embedding", _fla_ops.rotary_embedding),
    ("fla.modules.activations.ops", "sigmoid", _fla_ops.sigmoid),
    ("fla.modules.activations.ops", "swish", _fla_ops.swish),
    ("fla.modules.activations.ops", "logsigmoid", _fla_ops.logsigmoid),
    ("fla.modules.activations.ops", "elu_p1", _fla_ops.elu_p1),
    ("fla.modules.activations.ops", "swiglu", _fla_ops.swiglu),
    ("fla.modules.activations.ops", "swiglu_linear", _fla_ops.swiglu_linear),
    ("fla.modules.fused_cross_entropy.ops", "cross_entropy_loss", _fla_ops.cross_entropy_loss),
    (
        "fla.modules.fused_linear_cross_entropy.ops",
        "fused_linear_cross_entropy_loss",
        _fla_ops.fused_linear_cross_entropy_loss,
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

    Its operators for the gated delta rule, KDA, Gated DeltaNet-2, DeltaNet, Comba, gated DeltaProduct, simple GLA, GLA,
    retention and linear attention, its short convolution, norms, rotary positions, activations, SwiGLU and
    cross-entropy then work on CPUs, and with them the layers and models that are made of these: Gated DeltaNet, KDA,
    Gated DeltaNet-2, DeltaNet, Comba, gated DeltaProduct, simple GLA, GLA, HGRN2, RetNet and linear attention. Where
    flash-attn is not installed, softmax attention, and so hybrids, run on torch's.
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
        import fla  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            f"gdn.register_fla_backend() needs flash-linear-attention 0.6, which does not import: {error}"
        ) from error
    version = getattr(fla, "__version__", "unknown")
    if not version.startswith("0.6"):
        raise RuntimeError(
            f"[register_fla_backend] flash-linear-attention must be 0.6, got {version}; nothing was changed"
        )
    originals: list[Callable[..., Any]] = []
    for path, name, ours in FUNCTIONS:
        original = getattr(importlib.import_module(path), name, None)
        lacking = "it" if original is None else _misfit(original, ours)
        if original is None or lacking is not None:
            raise RuntimeError(
                f"[register_fla_backend] flash-linear-attention {version} is not a version that gdn knows: "
                f"{path}.{name} ({lacking}); nothing was changed"
            )
        originals.append(original)

    backends: Any = importlib.import_module("fla.backends")
    registries = getattr(backends, "_function_registries", {})

    backend = type("GdnBackend", (backends.BaseBackend,), {"backend_type": "gdn", "priority": 0})

    for (_, name, ours), original in zip(FUNCTIONS, originals):
        if inspect.unwrap(original) in registries:
            backends.register(original, backend=backend, verifier=_verifier)(ours)
        else:
            replacement = _by_device(original, ours)
            for module_name, module in list(sys.modules.items()):
                if module_name.split(".")[0] != "fla":
                    continue
                for attribute, value in list(vars(module).items()):
                    if value is original:
                        setattr(module, attribute, replacement)
                    elif attribute == "ACT2FN" and isinstance(value, dict):  # activations by name
                        value.update({key: replacement for key, function in value.items() if function is original})
        _registered.append(name)
    # Without flash-attn these are None, and its attention layers refuse to be made.
    for path in ("fla.layers.attn", "fla.layers.mla"):
        module = importlib.import_module(path)
        if module.flash_attn_func is None:
            module.flash_attn_func = _fla_ops.flash_attn_func
            module.flash_attn_varlen_func = _fla_ops.flash_attn_varlen_func
    criterion = importlib.import_module("fla.modules.fused_cross_entropy.ops").FusedCrossEntropyLoss
    criterion.forward = _by_device(criterion.forward, _fla_ops.cross_entropy_module)
    return tuple(_registered)
