# SPDX-License-Identifier: Apache-2.0
"""What the layers of the delta-rule family share: convolution, norms, padding, and the way through a forward call."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from gdn import ops
from gdn.layers.cache import Cache

# Up to this many tokens, and without gradients, the token recurrence is faster than the chunk form.
RECURRENT_UP_TO = 64


class ShortConvolution(nn.Conv1d):
    """A causal convolution per channel; weight [channels,1,W], bias [channels]."""

    def __init__(self, hidden_size: int, kernel_size: int, bias: bool = False, activation: str | None = "silu") -> None:
        super().__init__(hidden_size, hidden_size, kernel_size, groups=hidden_size, bias=bias, padding=kernel_size - 1)
        self.hidden_size = hidden_size
        self.activation = activation

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        cache: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B,T,channels], cache [N,channels,W] -> (y, the cache after the last token or None).

        Where the new cache is asked for, one token without gradients changes the old one in place.
        """
        weight = self.weight.squeeze(1)
        if is_step(x, cache, output_final_state, cu_seqlens):
            assert cache is not None
            return ops.causal_conv1d_update(x, cache, weight=weight, bias=self.bias, activation=self.activation)
        return ops.causal_conv1d(
            x,
            weight,
            self.bias,
            initial_state=cache,
            output_final_state=output_final_state,
            activation=self.activation,
            cu_seqlens=cu_seqlens,
        )


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * weight."""

    def __init__(self, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class GatedRMSNorm(RMSNorm):
    """x / sqrt(mean x^2 + eps) * weight * act(gate)."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, activation: str = "swish") -> None:
        super().__init__(hidden_size, eps)
        self.activation = activation

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return ops.rms_norm_gated(x, gate, self.weight, activation=self.activation, eps=self.eps)


def initial_dt_bias(size: int) -> Tensor:
    """The bias whose softplus is a step size drawn log-uniformly from [0.001, 0.1]."""
    dt = torch.exp(torch.rand(size) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
    return dt + torch.log(-torch.expm1(-dt))


def initial_a_log(size: int, low: float) -> Tensor:
    """log A with A from U(low, 16); an exact 0, whose logarithm training never leaves, is avoided."""
    return torch.empty(size).uniform_(low, 16).clamp_(min=1e-4).log()


def without_decay(*parameters: nn.Parameter) -> None:
    """Marks what an optimizer should not decay, as flash-linear-attention does."""
    for parameter in parameters:
        parameter._no_weight_decay = True  # type: ignore[attr-defined]


def whole(value: float, what: str) -> int:
    result = round(value)
    if result < 1 or not math.isclose(value, result, rel_tol=1e-5):
        raise ValueError(f"{what} must be a whole number of at least 1, got {value}")
    return result


class DeltaLayer(nn.Module):
    """A layer with projections and convolutions for q, k and v, a recurrence over a state per head, and an output
    projection. Subclasses make the modules and implement :meth:`recurrence` and :meth:`output`."""

    layer_idx: int | None
    use_short_conv: bool
    head_k_dim: int
    head_v_dim: int
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_conv1d: ShortConvolution
    k_conv1d: ShortConvolution
    v_conv1d: ShortConvolution

    def recurrence(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, keep: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """x [B,T,D], q and k [B,T,H,K], v [B,T,HV,V] -> (o [B,T,HV,V], the new state)."""
        raise NotImplementedError

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        """Norm and gate: o [B,T,HV,V] -> the same."""
        raise NotImplementedError

    def activate(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What stands in the place of the convolutions where there are none."""
        silu = nn.functional.silu
        return silu(q), silu(k), silu(v)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Cache | None]:
        """hidden_states [B,T,D] -> (o [B,T,D], None, past_key_values).

        attention_mask: [B,S] of 0 and 1 over all tokens so far (S >= T); tokens with 0 are skipped, their output is 0.
        cu_seqlens (keyword): int32 or int64 [N+1] with B = 1, packed sequences; then the mask is ignored.
        """
        batch, tokens = hidden_states.shape[:2]
        last = cached(self, past_key_values)
        x, cu_seqlens, kept = unpad(hidden_states, attention_mask, kwargs.get("cu_seqlens"))
        keep = bool(use_cache) and past_key_values is not None
        conv_state: tuple[Tensor | None, ...] = (None, None, None)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.use_short_conv:
            if last is not None:
                conv_state = last["conv_state"]
            convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
            (q, cq), (k, ck), (v, cv) = (
                conv(y, old, keep, cu_seqlens) for conv, y, old in zip(convs, (q, k, v), conv_state)
            )
            conv_state = (cq, ck, cv)
        else:
            q, k, v = self.activate(q, k, v)
        q, k = (y.unflatten(-1, (-1, self.head_k_dim)) for y in (q, k))
        v = v.unflatten(-1, (-1, self.head_v_dim))
        state = last["recurrent_state"] if last is not None else None
        o, state = self.recurrence(x, q, k, v, state, keep, cu_seqlens)
        if keep and past_key_values is not None and self.layer_idx is not None:
            past_key_values.update(
                self.layer_idx,
                offset=tokens,
                recurrent_state=state,
                conv_state=conv_state if self.use_short_conv else None,
            )
        o = self.o_proj(self.output(o, x).flatten(-2))
        return repad(o, kept, batch, tokens), None, past_key_values


def is_step(x: Tensor, state: Tensor | None, keep: bool, cu_seqlens: Tensor | None) -> bool:
    """Whether this is one token of decoding, which works in place on the state."""
    return state is not None and keep and x.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled()


def recent_mask(x: Tensor, attention_mask: Tensor) -> Tensor:
    """Of attention_mask [B,S] over all tokens so far, the part of the tokens of x [B,T,D]: bool [B,T]."""
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask must be [B,S] of 0 and 1, got {list(attention_mask.shape)}")
    mask = attention_mask[:, -x.shape[1] :].bool()
    if mask.shape != x.shape[:2]:
        raise ValueError(
            f"attention_mask must be [B,S] with B = {x.shape[0]} and S >= {x.shape[1]}, "
            f"got {list(attention_mask.shape)}"
        )
    return mask


def cached(layer: nn.Module, past_key_values: Cache | None) -> dict[str, Any] | None:
    """What the layer remembers; None where nothing is."""
    if past_key_values is None:
        return None
    layer_idx: Any = layer.layer_idx
    if layer_idx is None:
        raise ValueError(f"[{type(layer).__name__}] layer_idx must be given to use past_key_values")
    return past_key_values[layer_idx]


def unpad(
    x: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(x, cu_seqlens, None) as they are; or all rows' unmasked tokens packed into one, with where they were."""
    if attention_mask is None or cu_seqlens is not None:
        return x, cu_seqlens, None
    mask = recent_mask(x, attention_mask)
    if mask.all():
        return x, None, None
    kept = mask.flatten().nonzero().flatten()
    cu_seqlens = nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    return x.flatten(0, 1).index_select(0, kept).unsqueeze(0), cu_seqlens, kept


def repad(o: Tensor, kept: Tensor | None, batch: int, tokens: int) -> Tensor:
    if kept is None:
        return o
    return o.new_zeros(batch * tokens, o.shape[-1]).index_copy(0, kept, o[0]).view(batch, tokens, -1)
