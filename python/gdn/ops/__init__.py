# SPDX-License-Identifier: Apache-2.0
"""Operators for CPUs with the names, argument order, defaults and layouts of flash-linear-attention 0.6.

All take float32, float64, bfloat16 or float16 tensors, contiguous or not; compute in float32 (float64 for float64);
have gradients; pass ``torch.library.opcheck``; and compile with ``torch.compile(fullgraph=True, dynamic=True)``. A
wrong shape or value is a ``ValueError``, a wrong type or dtype a ``TypeError``, each naming the operator, the rule and
the value.

What this module does not define is taken from ``torch.ops.gdn``: the operators as libgdn registers them.
"""

from typing import Any

import torch

from gdn.ops._blocks import causal_conv1d, causal_conv1d_update, l2_norm, l2norm, rms_norm, rms_norm_gated
from gdn.ops._delta_rule import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    chunk_gdn,
    chunk_kda,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_gdn,
    fused_recurrent_kda,
    gated_delta_rule_step_,
)
from gdn.ops._linear import (
    chunk_gla,
    chunk_linear_attn,
    chunk_retention,
    chunk_simple_gla,
    fused_recurrent_gla,
    fused_recurrent_linear_attn,
    fused_recurrent_retention,
    fused_recurrent_simple_gla,
)

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "chunk_gla",
    "chunk_kda",
    "chunk_linear_attn",
    "chunk_retention",
    "chunk_simple_gla",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "fused_recurrent_gla",
    "fused_recurrent_kda",
    "fused_recurrent_linear_attn",
    "fused_recurrent_retention",
    "fused_recurrent_simple_gla",
    "gated_delta_rule_step_",
    "l2_norm",
    "l2norm",
    "rms_norm",
    "rms_norm_gated",
]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(torch.ops.gdn, name)
