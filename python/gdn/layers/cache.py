# SPDX-License-Identifier: Apache-2.0
"""What layers remember between calls, in the structure of flash-linear-attention's cache."""

from typing import Any

import torch
from torch import Tensor

_NAMES = ("recurrent_state", "attn_state", "conv_state", "ffn_state")


def _map(value: Any, function: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_map(item, function) for item in value)
    return value


class Cache:
    """The states of all layers of a model, by layer index; layers read and update it.

    ``cache[i]`` is a dict with ``recurrent_state`` (float32 [N,HV,K,V]), ``conv_state`` (a tuple of [N,channels,W]),
    ``attn_state`` (keys and values [N,S,heads,head_dim]) and ``ffn_state``; entries that a layer does not
    have are None. Without gradients a decoding step changes the tensors in place; :meth:`clone` keeps a state.
    """

    is_compileable = False

    def __init__(self, seen_tokens: int = 0) -> None:
        self.states: list[dict[str, Any] | None] = []
        self._seen: list[int] = []
        self._start = seen_tokens

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, layer_idx: int) -> dict[str, Any] | None:
        """The state of a layer; None where it has not run yet."""
        return self.states[layer_idx] if layer_idx < len(self.states) else None

    def update(self, layer_idx: int, offset: int = 1, **states: Any) -> dict[str, Any]:
        """Sets what `states` names for a layer that has seen `offset` more tokens."""
        while len(self.states) <= layer_idx:
            self.states.append(None)
            self._seen.append(self._start)
        entry = self.states[layer_idx]
        if entry is None:
            entry = self.states[layer_idx] = dict.fromkeys(_NAMES)
        for name, value in states.items():
            if name not in _NAMES:
                raise TypeError(f"[Cache] unknown state {name!r}: one of {', '.join(_NAMES)} is expected")
            if value is not None:
                entry[name] = value
        self._seen[layer_idx] += offset
        return entry

    def get_seq_length(self, layer_idx: int | None = 0, cache_position: Any = None) -> int:
        """How many tokens a layer has seen."""
        layer_idx = layer_idx or 0
        return self._seen[layer_idx] if layer_idx < len(self._seen) else self._start

    def get_max_cache_shape(self) -> int:
        """-1: any length fits."""
        return -1

    def _mapped(self, function: Any) -> list[Any]:
        return [None if state is None else _map(state, function) for state in self.states]

    def clone(self) -> "Cache":
        """A copy with its own memory."""
        copy = Cache(self._start)
        copy.states, copy._seen = self._mapped(torch.clone), list(self._seen)
        return copy

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence n becomes what sequence beam_idx[n] was."""
        self.states = self._mapped(lambda t: t.index_select(0, beam_idx.to(t.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times, one after the other."""
        self.states = self._mapped(lambda t: t.repeat_interleave(repeats, dim=0))

    def crop(self, max_length: int) -> None:
        """Raises NotImplementedError."""
        raise NotImplementedError(
            "[Cache] a recurrent state cannot go back to an earlier token: keep a clone() instead"
        )
