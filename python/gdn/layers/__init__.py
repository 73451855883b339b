# SPDX-License-Identifier: Apache-2.0
"""Sequence mixers as ``torch.nn.Module``, with flash-linear-attention's constructors and parameter names.

``layer(hidden_states, attention_mask, past_key_values, use_cache, **kwargs)`` returns ``(o, None, past_key_values)``,
so that weights and code written for flash-linear-attention fit; neither it nor Triton is needed. GatedDeltaNet,
KimiDeltaAttention, DeltaNet and Attention are Python modules over ``gdn.ops``; every other mixer of ``gdn mixers`` is
here under its name in CamelCase and computed by libgdn (see :class:`Mixer`).
"""

from typing import Any

from gdn.layers.attention import Attention
from gdn.layers.cache import Cache
from gdn.layers.delta_net import DeltaNet
from gdn.layers.gated_delta_net import GatedDeltaNet, KimiDeltaAttention
from gdn.layers.mixer import Mixer, class_names, mixer_class, registry

__all__ = ["Attention", "Cache", "DeltaNet", "GatedDeltaNet", "KimiDeltaAttention", "Mixer", "registry"]


def __getattr__(name: str) -> Any:
    try:
        return mixer_class(name)
    except AttributeError:
        raise AttributeError(f"module 'gdn.layers' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *class_names()})
