# SPDX-License-Identifier: Apache-2.0
"""Causal softmax attention with rotary positions, as the hybrids of flash-linear-attention have it."""

from typing import Any

import torch
from torch import Tensor, nn

from gdn import ops
from gdn.layers._common import cached, recent_mask
from gdn.layers.cache import Cache


class Attention(nn.Module):
    """Causal attention with the constructor and the parameter names of flash-linear-attention's layer.

    Args:
        hidden_size: D. num_heads: query heads of size D / num_heads.
        num_kv_heads: key and value heads; num_heads where None.
        qkv_bias: give the projections a bias. qk_norm: is not supported.
        window_size: how many tokens, itself included, a token sees; all where None.
        rope_theta: base of the rotary positions (the halves of a head are rotated against each other).
        layer_idx: which entry of the cache is this layer's.

    Raises:
        ValueError: sizes that do not fit each other, or qk_norm.
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        num_heads: int = 32,
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        window_size: int | None = None,
        rope_theta: float | None = 10000.0,
        max_position_embeddings: int | None = None,
        layer_idx: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if hidden_size % num_heads or num_heads % self.num_kv_heads:
            raise ValueError(
                "[Attention] num_heads must divide hidden_size and be a multiple of num_kv_heads, got "
                f"num_heads={num_heads}, hidden_size={hidden_size}, num_kv_heads={self.num_kv_heads}"
            )
        if qk_norm:
            raise ValueError("[Attention] qk_norm=True is not supported")
        self.hidden_size, self.num_heads, self.head_dim = hidden_size, num_heads, hidden_size // num_heads
        self.window_size, self.rope_theta, self.layer_idx = window_size, rope_theta, layer_idx
        kv_dim = self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, kv_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

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
        B, T = hidden_states.shape[:2]
        cu_seqlens = kwargs.get("cu_seqlens")
        last = cached(self, past_key_values)
        before = past_key_values.get_seq_length(self.layer_idx) if past_key_values is not None else 0
        device = hidden_states.device
        q, k, v = (
            proj(hidden_states).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        segment = None
        if cu_seqlens is not None:
            attention_mask = None
            starts = cu_seqlens[:-1].long()
            segment = torch.bucketize(torch.arange(T, device=device), cu_seqlens[1:].long(), right=True)
            positions = (torch.arange(T, device=device) - starts[segment])[None]
        elif attention_mask is not None:
            recent = recent_mask(hidden_states, attention_mask)
            positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        else:
            positions = torch.arange(before, before + T, device=device)[None].expand(B, T)
        if self.rope_theta:
            q, k = (ops.rotary(x, positions[:, -T:], self.rope_theta) for x in (q, k))
        if last is not None:
            k, v = (torch.cat([old, new], 1) for old, new in zip(last["attn_state"], (k, v)))
        S = k.shape[1]
        rows, columns = torch.arange(S - T, S, device=device)[:, None], torch.arange(S, device=device)[None]
        seen = (columns <= rows)[None]
        distance = (rows - columns)[None]
        if segment is not None:
            seen = seen & (segment[:, None] == segment[None])[None]
        elif attention_mask is not None:
            seen = seen & attention_mask[:, None, -S:].bool()
            distance = positions[:, -T:, None] - positions[:, None, -S:]
        if self.window_size is not None:
            seen = seen & (distance < self.window_size)
        if attention_mask is not None:
            seen = seen | (columns == rows)[None]  # a masked query would see nothing: let it see itself
        if use_cache and past_key_values is not None and self.layer_idx is not None:
            kept = slice(-self._kept(attention_mask, S), None)
            past_key_values.update(self.layer_idx, offset=T, attn_state=(k[:, kept], v[:, kept]))
        o = nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen[:, None], enable_gqa=True
        )
        o = self.o_proj(o.transpose(1, 2).flatten(-2))
        if attention_mask is not None:
            o = o * recent[..., None].to(o.dtype)
        return o, None, past_key_values

    def _kept(self, attention_mask: Tensor | None, columns: int) -> int:
        """How many of the last columns hold what later tokens may still see."""
        if self.window_size is None:
            return columns
        if attention_mask is None:
            return min(columns, self.window_size)
        filled = attention_mask[:, -columns:].long().flip(1).cumsum(1) < self.window_size
        return min(columns, int(filled.sum(1).amax()) + 1)
