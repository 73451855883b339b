# SPDX-License-Identifier: Apache-2.0
"""DeltaNet (arXiv 2406.06484)."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from gdn import ops
from gdn.layers._common import RECURRENT_UP_TO, DeltaLayer, GatedRMSNorm, RMSNorm, ShortConvolution, is_step, whole


class DeltaNet(DeltaLayer):
    """DeltaNet with the constructor and the parameter names of flash-linear-attention's layer.

    Args:
        mode: "chunk", or "fused_recurrent" (token by token); without gradients short inputs always take the latter.
        d_model: another name of hidden_size, which it overrides. hidden_size: D.
        expand_k, expand_v: widths of keys and values, all heads, divided by hidden_size. num_heads: H.
        use_beta: learn the write strength; else it is 1. allow_neg_eigval: write strength times 2.
        use_gate: multiply the normed output by SiLU of a projection.
        use_short_conv, conv_size, conv_bias: the causal convolutions of q, k and v.
        qk_activation: "silu", "relu", "elu" (plus 1) or "identity". qk_norm: "l2" or "sum".
        layer_idx: which entry of the cache is this layer's. norm_eps: of the output norm.

    Raises:
        ValueError: sizes that do not fit each other, an unknown choice.
    """

    def __init__(
        self,
        mode: str = "chunk",
        d_model: int | None = None,
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 4,
        use_beta: bool = True,
        use_gate: bool = False,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        allow_neg_eigval: bool = False,
        layer_idx: int | None = None,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        norm_eps: float = 1e-5,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("mode", mode, ("chunk", "fused_recurrent")),
            ("qk_activation", qk_activation, ("silu", "relu", "elu", "identity")),
            ("qk_norm", qk_norm, ("l2", "sum")),
        ):
            if value not in choices:
                raise ValueError(f"[DeltaNet] {name} must be one of {', '.join(choices)}, got {value!r}")
        hidden_size = hidden_size if d_model is None else d_model
        self.mode, self.hidden_size, self.num_heads, self.layer_idx = mode, hidden_size, num_heads, layer_idx
        self.qk_activation, self.qk_norm = qk_activation, qk_norm
        self.use_beta, self.use_gate, self.allow_neg_eigval = use_beta, use_gate, allow_neg_eigval
        self.use_short_conv, self.conv_size, self.conv_bias = use_short_conv, conv_size, conv_bias
        self.key_dim = whole(hidden_size * expand_k, "[DeltaNet] hidden_size * expand_k")
        self.value_dim = whole(hidden_size * expand_v, "[DeltaNet] hidden_size * expand_v")
        if self.key_dim % num_heads or self.value_dim % num_heads:
            raise ValueError(
                f"[DeltaNet] num_heads must divide the widths of keys and values ({self.key_dim} and "
                f"{self.value_dim}), got {num_heads}"
            )
        self.head_k_dim, self.head_v_dim = self.key_dim // num_heads, self.value_dim // num_heads
        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        if use_beta:
            self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)
        if use_short_conv:
            of_qk = "silu" if qk_activation == "silu" else None
            self.q_conv1d = ShortConvolution(self.key_dim, conv_size, conv_bias, of_qk)
            self.k_conv1d = ShortConvolution(self.key_dim, conv_size, conv_bias, of_qk)
            self.v_conv1d = ShortConvolution(self.value_dim, conv_size, conv_bias, "silu")
        else:
            warnings.warn("without its short convolutions this layer loses much of its quality", stacklevel=2)
        if use_gate:
            self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
            self.o_norm: RMSNorm = GatedRMSNorm(self.head_v_dim, norm_eps)
        else:
            self.o_norm = RMSNorm(self.head_v_dim, norm_eps)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def activate(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        silu = nn.functional.silu
        return (silu(q), silu(k), silu(v)) if self.qk_activation == "silu" else (q, k, silu(v))

    def _prepare(self, qk: Tensor) -> Tensor:
        if self.qk_activation == "relu":
            qk = qk.relu()
        elif self.qk_activation == "elu":
            qk = nn.functional.elu(qk) + 1.0
        if self.qk_norm == "sum":
            total = qk.sum(-1, keepdim=True)
            qk = qk / (total.clamp(min=1e-6) if self.qk_activation == "relu" else total)
        return qk

    def recurrence(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, keep: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        q, k = self._prepare(q), self._prepare(k)
        beta = self.b_proj(x).sigmoid() if self.use_beta else torch.ones_like(q[..., 0])
        if self.allow_neg_eigval:
            beta = beta * 2.0
        l2 = self.qk_norm == "l2"
        if state is not None and is_step(x, state, keep, cu_seqlens):
            q, k, v, beta = (t[:, 0] for t in (q, k, v, beta))
            o = ops.gated_delta_rule_step_(q, k, v, None, beta, state, use_qk_l2norm_in_kernel=l2)
            return o.unsqueeze(1), state
        short = q.shape[1] <= RECURRENT_UP_TO and not torch.is_grad_enabled()
        op = ops.fused_recurrent_delta_rule if self.mode == "fused_recurrent" or short else ops.chunk_delta_rule
        return op(
            q,
            k,
            v,
            beta,
            initial_state=state,
            output_final_state=keep,
            cu_seqlens=cu_seqlens,
            use_qk_l2norm_in_kernel=l2,
        )

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        return self.o_norm(o, self.g_proj(x).view_as(o)) if self.use_gate else self.o_norm(o)
