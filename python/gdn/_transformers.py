# SPDX-License-Identifier: Apache-2.0
"""Makes the hybrid models of the installed transformers run on gdn's operators.

The layers of these models call functions of their modelling module (``torch_chunk_gated_delta_rule``,
``causal_conv1d_fn`` ...), so putting others in the module's place reaches models built before and after alike. What
gdn does not do (another device, an activation it lacks) still goes to the function that was there.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_gdn = torch.ops.gdn

# Up to this many tokens, and without gradients, the token recurrence is faster than the chunk form.
_RECURRENT_UP_TO = 64

GATED_DELTA_RULE = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "olmo_hybrid")
KDA = ("kimi_linear", "bailing_hybrid", "glm5_next")

Original = Callable[..., Any]


def _same_sequences(kwargs: dict[str, Any], like: Tensor, tokens: int) -> Tensor | None:
    """cu_seqlens of a packed call, however the caller says it; None for a plain batch."""
    for name in ("cu_seqlens", "cu_seq_lens_q"):
        if kwargs.get(name) is not None:
            return kwargs[name]
    seq_idx = kwargs.get("seq_idx")
    if seq_idx is None or seq_idx.shape[-1] != tokens:
        return None
    if seq_idx.shape[0] != 1:
        raise ValueError(f"[patch_transformers] seq_idx must be [1,T] with packed sequences, got {list(seq_idx.shape)}")
    starts = torch.nonzero(seq_idx[0, 1:] != seq_idx[0, :-1]).flatten() + 1
    return torch.cat([starts.new_zeros(1), starts, starts.new_full((1,), tokens)]).to(like.device)


def _ours(*tensors: Tensor | None) -> bool:
    """Whether gdn has kernels for these."""
    return all(t is None or (t.device.type in ("cpu", "meta") and t.is_floating_point()) for t in tensors)


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _owned_by_a_cache(state: Tensor) -> bool:
    """Whether transformers' cache holds this very tensor: it marks its states so, and copies the new state into it."""
    return hasattr(state, "_dynamo_static_input_type")


def _delta_rule(per_channel: bool, recurrent: bool) -> Callable[[Original], Original]:
    def make(original: Original) -> Original:
        def run(
            q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunk_size: int | None, kwargs: dict[str, Any]
        ):
            initial_state = kwargs.get("initial_state")
            output_final_state = bool(kwargs.get("output_final_state", False))
            l2norm = bool(kwargs.get("use_qk_l2norm_in_kernel", False))
            if not _ours(q, k, v, g, beta, initial_state):
                if chunk_size is not None:
                    kwargs["chunk_size"] = chunk_size
                return original(q, k, v, g=g, beta=beta, **kwargs)
            tokens = q.shape[1]
            cu_seqlens = _same_sequences(kwargs, q, tokens)
            k, v = k.to(q.dtype), v.to(q.dtype)
            differentiable = _wants_grad(q, k, v, g, beta, initial_state)
            if (
                tokens == 1
                and not differentiable
                and output_final_state
                and cu_seqlens is None
                and initial_state is not None
                and not torch.compiler.is_compiling()
                and _owned_by_a_cache(initial_state)
                and initial_state.is_contiguous()
                and initial_state.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
            ):
                token = (t[:, 0] for t in (q, k, v, g, beta))
                o = _gdn.gated_delta_rule_step_(*token, initial_state, use_qk_l2norm_in_kernel=l2norm)
                return o.unsqueeze(1), initial_state
            common = dict(
                initial_state=initial_state,
                output_final_state=output_final_state,
                use_qk_l2norm_in_kernel=l2norm,
                cu_seqlens=cu_seqlens,
            )
            if recurrent or (tokens <= _RECURRENT_UP_TO and not differentiable):
                gate = {"gk": g} if per_channel else {"g": g}
                o, state = _gdn.fused_recurrent_gated_delta_rule(q, k, v, beta=beta, **gate, **common)
            else:
                op = _gdn.chunk_kda if per_channel else _gdn.chunk_gated_delta_rule
                o, state = op(q, k, v, g, beta, **common)
            return o, state if output_final_state else None

        # Two signatures: what is given by position must mean what it means in transformers.
        def chunk_form(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            g: Tensor,
            beta: Tensor,
            chunk_size: int = 64,
            initial_state: Tensor | None = None,
            output_final_state: bool = False,
            use_qk_l2norm_in_kernel: bool = False,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor | None]:
            kwargs["initial_state"], kwargs["output_final_state"] = initial_state, output_final_state
            kwargs["use_qk_l2norm_in_kernel"] = use_qk_l2norm_in_kernel
            return run(query, key, value, g, beta, chunk_size, kwargs)

        def recurrent_form(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            g: Tensor,
            beta: Tensor,
            initial_state: Tensor | None = None,
            output_final_state: bool = False,
            use_qk_l2norm_in_kernel: bool = False,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor | None]:
            kwargs["initial_state"], kwargs["output_final_state"] = initial_state, output_final_state
            kwargs["use_qk_l2norm_in_kernel"] = use_qk_l2norm_in_kernel
            return run(query, key, value, g, beta, None, kwargs)

        return recurrent_form if recurrent else chunk_form

    return make


def _conv_fn(original: Original) -> Original:
    def causal_conv1d_fn(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if activation not in (None, "silu", "swish") or weight.shape[-1] > 8 or not _ours(hidden_states, weight, bias):
            return original(hidden_states, weight, bias, activation, **kwargs)
        x = hidden_states.transpose(1, 2)  # [B,T,C]
        cu_seqlens = _same_sequences(kwargs, x, x.shape[1])
        if cu_seqlens is not None and not torch.compiler.is_compiling() and int(cu_seqlens[-1]) != x.shape[1]:
            # The cache puts the tail of what came before in front: it belongs to the first sequence.
            cu_seqlens = cu_seqlens + (x.shape[1] - cu_seqlens[-1])
            cu_seqlens[0] = 0
        y, _ = _gdn.causal_conv1d(x, weight, bias, None, cu_seqlens, False, activation)
        return y.transpose(1, 2)

    return causal_conv1d_fn


def _conv_update(original: Original) -> Original:
    def causal_conv1d_update(
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        if (
            activation not in (None, "silu", "swish")
            or hidden_states.shape[-1] != 1
            or conv_state.shape[-1] != weight.shape[-1]
            or weight.shape[-1] > 8
            or conv_state.dtype != hidden_states.dtype
            or not conv_state.is_contiguous()
            or _wants_grad(hidden_states, conv_state, weight, bias)
            or not _ours(hidden_states, conv_state, weight, bias)
        ):
            return original(hidden_states, conv_state, weight, bias, activation)
        return _gdn.causal_conv1d_update_(hidden_states[:, :, 0], conv_state, weight, bias, None, activation).unsqueeze(
            -1
        )

    return causal_conv1d_update


# function: (its parameters as transformers 5.23 has them, what makes the replacement from the original)
Replacement = tuple[str, Callable[[Original], Original]]
_CONVOLUTION: dict[str, Replacement] = {
    "causal_conv1d_fn": ("hidden_states weight bias activation kwargs", _conv_fn),
    "causal_conv1d_update": ("hidden_states conv_state weight bias activation", _conv_update),
}
_CHUNK = "query key value g beta chunk_size initial_state output_final_state use_qk_l2norm_in_kernel kwargs"
_RECURRENT = "query key value g beta initial_state output_final_state use_qk_l2norm_in_kernel kwargs"
_GDN: dict[str, Replacement] = {
    "torch_chunk_gated_delta_rule": (_CHUNK, _delta_rule(per_channel=False, recurrent=False)),
    "torch_recurrent_gated_delta_rule": (_RECURRENT, _delta_rule(per_channel=False, recurrent=True)),
}
_KDA: dict[str, Replacement] = {
    "chunk_kimi_delta_attention": (_CHUNK, _delta_rule(per_channel=True, recurrent=False)),
    "recurrent_kimi_delta_attention": (_RECURRENT, _delta_rule(per_channel=True, recurrent=True)),
}
FUNCTIONS: dict[str, dict[str, Replacement]] = {
    **{name: _GDN | _CONVOLUTION for name in GATED_DELTA_RULE},
    **{name: _KDA | _CONVOLUTION for name in KDA},
}

# (module, function name): (the original, what stands in its place)
_patched: dict[tuple[str, str], tuple[Original, Original]] = {}


def _modules() -> dict[str, ModuleType]:
    """The modelling modules of the model types that are installed."""
    found = {}
    for name in FUNCTIONS:
        path = f"transformers.models.{name}.modeling_{name}"
        try:
            known = importlib.util.find_spec(path) is not None
        except ModuleNotFoundError:
            known = False
        if known:
            found[name] = importlib.import_module(path)
    return found


def _misfits(modules: dict[str, ModuleType]) -> list[str]:
    """What in these modules is not as this code expects it."""
    complaints = []
    for name, module in modules.items():
        for function, (parameters, _) in FUNCTIONS[name].items():
            original = getattr(module, function, None)
            if original is None:
                complaints.append(f"{name}.{function} is missing")
                continue
            actual = " ".join(inspect.signature(inspect.unwrap(original)).parameters)
            if actual != parameters:
                complaints.append(f"{name}.{function} has the parameters ({actual}) instead of ({parameters})")
    return complaints


def patch_transformers() -> tuple[str, ...]:
    """Lets the installed transformers (5.x) use gdn for the gated delta rule, KDA and the causal convolution.

    It serves the model types qwen3_next, qwen3_5, qwen3_5_moe, qwen4_exp, olmo_hybrid, kimi_linear, bailing_hybrid and
    glm5_next, as far as they are installed, on CPU; models built before and after the call; prefill, decoding and
    training; and packed sequences (``cu_seq_lens_q`` or ``seq_idx``), which transformers itself refuses without a GPU
    library. Calling it again changes nothing; :func:`unpatch_transformers` undoes it.

    Returns:
        The model types that now use gdn.

    Raises:
        ImportError: transformers is not installed.
        RuntimeError: this version of transformers is not one that gdn knows; then nothing was changed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("gdn.patch_transformers() needs transformers 5: pip install transformers") from error
    version = transformers.__version__
    if version.split(".")[0] != "5":
        raise RuntimeError(f"[patch_transformers] transformers must be 5.x, got {version}; nothing was changed")
    if _patched:
        return tuple(dict.fromkeys(module.split(".")[2] for module, _ in _patched))
    modules = _modules()
    complaints = _misfits(modules)
    if not modules:
        complaints = ["none of the model types is there"]
    if complaints:
        more = f" (and {len(complaints) - 1} more)" if len(complaints) > 1 else ""
        raise RuntimeError(
            f"[patch_transformers] transformers {version} is not a version that gdn knows: {complaints[0]}{more}; "
            "nothing was changed; install transformers 5.23 or a newer gdn"
        )
    for name, module in modules.items():
        for function, (_, make) in FUNCTIONS[name].items():
            original = getattr(module, function)
            replacement = make(original)
            replacement.__name__ = replacement.__qualname__ = function
            replacement.__doc__ = f"gdn's {function}; gdn.unpatch_transformers() restores the original."
            setattr(module, function, replacement)
            _patched[module.__name__, function] = (original, replacement)
    return tuple(modules)


def unpatch_transformers() -> None:
    """Undoes :func:`patch_transformers`; does nothing where that was not called."""
    for (path, function), (original, replacement) in _patched.items():
        module = importlib.import_module(path)
        if getattr(module, function) is replacement:
            setattr(module, function, original)
    _patched.clear()
