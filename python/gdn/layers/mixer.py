# SPDX-License-Identifier: Apache-2.0
"""Any mixer of libgdn's registry as a torch module.

The parameters are the very tensors that the C++ module holds: optimizers, ``state_dict``, ``to`` and gradients see one
set of weights.
"""

import functools
import json
from typing import Any

import torch
from torch import Tensor, nn

from gdn.layers._common import cached, repad, unpad
from gdn.layers.cache import Cache
from gdn.ops._call import call, make


@functools.cache
def registry() -> dict[str, dict[str, Any]]:
    """Every mixer by name: its title, paper, and options with their defaults and meaning."""
    return {entry["name"]: entry for entry in json.loads(torch.ops.gdn.mixer_registry())}


def adopt(module: nn.Module, name: str, tensor: Tensor, *, buffer: bool = False) -> None:
    """Registers a tensor of a C++ module in `module` under a dotted name, making the modules on the way."""
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    if buffer:
        module.register_buffer(leaf, tensor)
        return
    # nn.Parameter(tensor) would be another tensor over the same memory, whose gradients C++ never sees.
    tensor._is_param = True
    module.register_parameter(leaf, tensor)  # type: ignore[arg-type]


def rejoin(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Gives the tensors of a C++ module the values of the parameters that were put in their place, and that place."""
    for name, ours in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        theirs = getattr(owner, leaf)
        if theirs is ours:
            continue
        with torch.no_grad():
            ours.data = theirs.detach().to(ours.device)
        ours.requires_grad_(theirs.requires_grad)
        del owner._parameters[leaf]
        adopt(module, name, ours)


class Mixer(nn.Module):
    """A mixer of the registry: ``Mixer("attention", hidden_size=64, num_heads=4)``.

    Args:
        name: as `gdn mixers` lists it. hidden_size: D.
        layer_idx: which entry of the cache is this layer's. num_layers: of the model, which some initialisations use.
        norm_eps: of the norms inside. options: as `gdn mixers NAME` lists them.

    Raises:
        ValueError: an unknown mixer or option, or a value that breaks a rule; the message names it.
    """

    def __init__(
        self,
        name: str,
        hidden_size: int,
        layer_idx: int | None = None,
        num_layers: int = 1,
        norm_eps: float = 1e-5,
        **options: Any,
    ) -> None:
        super().__init__()
        self.name, self.hidden_size, self.layer_idx = name, hidden_size, layer_idx
        self._arguments = (name, hidden_size, layer_idx, num_layers, norm_eps, dict(options))
        self._make()

    def _make(self) -> None:
        name, hidden_size, layer_idx, num_layers, norm_eps, options = self._arguments
        self._impl = make(
            torch.classes.gdn.Mixer, name, hidden_size, json.dumps(options), layer_idx or 0, num_layers, norm_eps
        )
        for parameter_name, tensor in self._impl.parameters().items():
            adopt(self, parameter_name, tensor)
        for buffer_name, tensor in self._impl.buffers().items():
            adopt(self, buffer_name, tensor, buffer=True)

    @property
    def options(self) -> dict[str, Any]:
        """Every option, defaults and derived values included."""
        return json.loads(self._impl.options())

    def zero_state(self, sequences: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The state of `sequences` sequences that have seen nothing."""
        return dict(call(self._impl.zero_state, sequences, str(dtype).removeprefix("torch.")))

    def run(
        self, x: Tensor, state: dict[str, Tensor] | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """x [B,T,D] -> (y [B,T,D], the state after the last token, or None where none was given).

        Without gradients the state's tensors are changed in place; with gradients the new state carries them.
        """
        y, after = call(self._impl.forward, x, cu_seqlens, state)
        return y, dict(after) if state is not None else None

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
        state: dict[str, Tensor] | None = None
        if past_key_values is not None:
            if last is None:
                sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
                state = self.zero_state(sequences, x.dtype)
            else:
                state = last["recurrent_state"]
                if not use_cache:  # it is changed in place
                    state = {name: t.clone() for name, t in state.items()}
        y, state = self.run(x, state, cu_seqlens)
        if past_key_values is not None and self.layer_idx is not None and use_cache:
            past_key_values.update(self.layer_idx, offset=tokens, recurrent_state=state)
        return repad(y, kept, batch, tokens), None, past_key_values

    def extra_repr(self) -> str:
        return f"{self.name!r}, hidden_size={self.hidden_size}"

    # The C++ module cannot be copied or pickled; another one is made and given the same values.
    def __getstate__(self) -> dict[str, Any]:
        return {
            "arguments": self._arguments,
            "training": self.training,
            "values": {name: t.detach() for name, t in self.state_dict().items()},
            "requires_grad": {name: p.requires_grad for name, p in self.named_parameters()},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        self._arguments = state["arguments"]
        self.name, self.hidden_size, self.layer_idx = self._arguments[:3]
        self._make()
        for name, p in self.named_parameters():
            p.data = state["values"][name].clone()
            p.requires_grad_(state["requires_grad"][name])
        for name, b in self.named_buffers():
            b.copy_(state["values"][name])
        self.train(state["training"])


def _class_name(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


@functools.cache
def mixer_class(class_name: str) -> type[Mixer]:
    """The class of a registered mixer by its Python name: "Attention", "Mamba2" ..."""
    entry = next((e for e in registry().values() if _class_name(e["name"]) == class_name), None)
    if entry is None:
        raise AttributeError(class_name)

    def init(
        self: Mixer,
        hidden_size: int,
        layer_idx: int | None = None,
        num_layers: int = 1,
        norm_eps: float = 1e-5,
        **options: Any,
    ) -> None:
        Mixer.__init__(self, entry["name"], hidden_size, layer_idx, num_layers, norm_eps, **options)

    options = "\n".join(f"        {o['name']} ({o['default']}): {o['help']}" for o in entry["options"])
    doc = f"{entry['title']} ({entry['paper']}), computed by libgdn.\n\n    Options (default):\n{options}\n"
    return type(class_name, (Mixer,), {"__init__": init, "__doc__": doc, "__module__": __name__})


def __getattr__(name: str) -> Any:
    """The classes of :func:`mixer_class`, for pickle to find them."""
    return mixer_class(name)


def class_names() -> list[str]:
    return [_class_name(name) for name in registry()]
