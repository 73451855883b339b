# SPDX-License-Identifier: Apache-2.0
"""Gated DeltaNet (arXiv 2412.06464) and Kimi Delta Attention (arXiv 2510.26692)."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from gdn import ops
from gdn.layers._common import (
    RECURRENT_UP_TO,
    DeltaLayer,
    GatedRMSNorm,
    RMSNorm,
    ShortConvolution,
    initial_a_log,
    initial_dt_bias,
    is_step,
    whole,
    without_decay,
)


class _Gated(DeltaLayer):
    """What the two have in common."""

    def _sizes(
        self, hidden_size: int, expand_v: float, head_dim: int, num_heads: int, num_v_heads: int | None, mode: str
    ) -> None:
        self.hidden_size, self.expand_v, self.head_dim, self.num_heads = hidden_size, expand_v, head_dim, num_heads
        self.num_v_heads = num_heads if num_v_heads is None else num_v_heads
        self.mode = mode
        self.head_k_dim = head_dim
        self.head_v_dim = whole(head_dim * expand_v, f"[{type(self).__name__}] head_dim * expand_v")
        self.key_dim = num_heads * head_dim
        self.value_dim = self.num_v_heads * self.head_v_dim
        if self.num_v_heads % num_heads != 0:
            raise ValueError(
                f"[{type(self).__name__}] num_v_heads must be a multiple of num_heads ({num_heads}), "
                f"got {self.num_v_heads}"
            )
        if mode not in ("chunk", "fused_recurrent"):
            raise ValueError(f"[{type(self).__name__}] mode must be 'chunk' or 'fused_recurrent', got {mode!r}")

    def _qkv(self, use_short_conv: bool, conv_size: int, conv_bias: bool) -> None:
        self.use_short_conv, self.conv_size, self.conv_bias = use_short_conv, conv_size, conv_bias
        self.q_proj = nn.Linear(self.hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(self.hidden_size, self.key_dim, bias=False)
        self.v_proj = nn.Linear(self.hidden_size, self.value_dim, bias=False)
        if use_short_conv:
            self.q_conv1d = ShortConvolution(self.key_dim, conv_size, conv_bias)
            self.k_conv1d = ShortConvolution(self.key_dim, conv_size, conv_bias)
            self.v_conv1d = ShortConvolution(self.value_dim, conv_size, conv_bias)
        else:
            warnings.warn("without its short convolutions this layer loses much of its quality", stacklevel=3)

    def _token_by_token(self, q: Tensor) -> bool:
        return self.mode == "fused_recurrent" or (q.shape[1] <= RECURRENT_UP_TO and not torch.is_grad_enabled())


class GatedDeltaNet(_Gated):
    """Gated DeltaNet with the constructor and the parameter names of flash-linear-attention's layer.

    Args:
        hidden_size: D. head_dim: K, the size of a key. num_heads: H. num_v_heads: HV, a multiple of H; H where None.
        expand_v: the size of a value is head_dim * expand_v.
        mode: "chunk", or "fused_recurrent" (token by token); without gradients short inputs always take the latter.
        use_gate: multiply the normed output by output_gate_activation ("swish", "silu" or "sigmoid") of a projection.
        use_short_conv, conv_size, conv_bias: the causal convolutions of q, k and v.
        allow_neg_eigval: write strength in (0,2) instead of (0,1).
        layer_idx: which entry of the cache is this layer's. norm_eps: of the output norm.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 2,
        head_dim: int = 256,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_gate: bool = True,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        output_gate_activation: str = "swish",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self._sizes(hidden_size, expand_v, head_dim, num_heads, num_v_heads, mode)
        if output_gate_activation not in ("swish", "silu", "sigmoid"):
            raise ValueError(
                "[GatedDeltaNet] output_gate_activation must be 'swish', 'silu' or 'sigmoid', "
                f"got {output_gate_activation!r}"
            )
        self.use_gate, self.allow_neg_eigval, self.layer_idx = use_gate, allow_neg_eigval, layer_idx
        self._qkv(use_short_conv, conv_size, conv_bias)
        self.a_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        self.b_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        self.A_log = nn.Parameter(initial_a_log(self.num_v_heads, 0))
        self.dt_bias = nn.Parameter(initial_dt_bias(self.num_v_heads))
        without_decay(self.A_log, self.dt_bias)
        if use_gate:
            self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
            self.o_norm: RMSNorm = GatedRMSNorm(self.head_v_dim, norm_eps, output_gate_activation)
        else:
            self.o_norm = RMSNorm(self.head_v_dim, norm_eps)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def recurrence(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, keep: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        flags: dict[str, Any] = dict(
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=self.allow_neg_eigval,
        )
        g, beta = self.a_proj(x), self.b_proj(x)
        if state is not None and is_step(x, state, keep, cu_seqlens):
            q, k, v, g, beta = (t[:, 0] for t in (q, k, v, g, beta))
            o = ops.gated_delta_rule_step_(q, k, v, g, beta, state, **flags)
            return o.unsqueeze(1), state
        op = ops.fused_recurrent_gated_delta_rule if self._token_by_token(q) else ops.chunk_gated_delta_rule
        return op(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=keep, cu_seqlens=cu_seqlens, **flags)

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.o_norm(o, self.g_proj(x).view_as(o)) if self.use_gate else self.o_norm(o)


class KimiDeltaAttention(_Gated):
    """Kimi Delta Attention with the constructor and the parameter names of flash-linear-attention's layer.

    The decay is per key channel: g = -exp(A_log) softplus(f_proj(x) + dt_bias), or with lower_bound
    lower_bound sigmoid(exp(A_log) (f_proj(x) + dt_bias)); the output gate is a sigmoid.

    Args:
        hidden_size, expand_v, head_dim, num_heads, num_v_heads, mode, use_short_conv, allow_neg_eigval, conv_size,
        conv_bias, layer_idx, norm_eps: as in :class:`GatedDeltaNet`.
        safe_gate: needs a lower_bound in [-5, 0); A_log then starts at 0.
        lower_bound: of the decay's logarithm.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 1,
        head_dim: int = 128,
        num_heads: int = 16,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        safe_gate: bool = False,
        lower_bound: float | None = None,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self._sizes(hidden_size, expand_v, head_dim, num_heads, num_v_heads, mode)
        if safe_gate and lower_bound is None:
            raise ValueError("[KimiDeltaAttention] safe_gate=True needs lower_bound (-5 is usual)")
        self.allow_neg_eigval, self.safe_gate, self.lower_bound = allow_neg_eigval, safe_gate, lower_bound
        self.layer_idx = layer_idx
        self._qkv(use_short_conv, conv_size, conv_bias)
        self.gate_dim = self.num_v_heads * self.head_k_dim
        self.f_proj = nn.Sequential(
            nn.Linear(hidden_size, self.head_v_dim, bias=False), nn.Linear(self.head_v_dim, self.gate_dim, bias=False)
        )
        self.b_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        self.A_log = nn.Parameter(torch.zeros(self.num_v_heads) if safe_gate else initial_a_log(self.num_v_heads, 1))
        self.dt_bias = nn.Parameter(initial_dt_bias(self.gate_dim))
        without_decay(self.A_log, self.dt_bias)
        self.g_proj = nn.Sequential(
            nn.Linear(hidden_size, self.head_v_dim, bias=False), nn.Linear(self.head_v_dim, self.value_dim, bias=True)
        )
        self.o_norm = GatedRMSNorm(self.head_v_dim, norm_eps, "sigmoid")
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def recurrence(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, keep: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        common: dict[str, Any] = dict(
            use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=self.allow_neg_eigval,
        )
        g = self.f_proj(x).unflatten(-1, (-1, self.head_k_dim))
        beta = self.b_proj(x)
        if state is not None and is_step(x, state, keep, cu_seqlens):
            g = ops.kda_gate(g, self.A_log, self.dt_bias, self.lower_bound)
            q, k, v, g, beta = (t[:, 0] for t in (q, k, v, g, beta))
            o = ops.gated_delta_rule_step_(q, k, v, g, beta, state, **common)
            return o.unsqueeze(1), state
        op = ops.fused_recurrent_kda if self._token_by_token(q) else ops.chunk_kda
        return op(
            q,
            k,
            v,
            g,
            beta,
            initial_state=state,
            output_final_state=keep,
            cu_seqlens=cu_seqlens,
            use_gate_in_kernel=True,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            lower_bound=self.lower_bound,
            **common,
        )

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.o_norm(o, self.g_proj(x).view_as(o))
