# SPDX-License-Identifier: Apache-2.0
"""Models from a list of blocks with any mixer of libgdn's registry, computed by libgdn, for transformers.

The parameters are the tensors of the C++ model, so Trainer, generate, save_pretrained and optimizers work on them.
"""

import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from gdn.layers._common import repad, unpad
from gdn.layers.mixer import adopt, rejoin
from gdn.models.configuration import GdnConfig
from gdn.models.modeling import causal_lm_loss
from gdn.ops._call import call, make


class EngineCache:
    """The states of all blocks (``torch.classes.gdn.State``) and how many tokens they have seen."""

    is_compileable = False

    def __init__(self, state: Any, seen_tokens: int = 0) -> None:
        self.state, self.seen_tokens = state, seen_tokens

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """How many tokens the model has seen."""
        return self.seen_tokens

    def get_max_cache_shape(self) -> int:
        """-1: any length fits."""
        return -1

    def clone(self) -> "EngineCache":
        """A copy with its own memory."""
        return EngineCache(self.state.clone(), self.seen_tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence n becomes what sequence beam_idx[n] was."""
        self.state = self.state.index(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times, one after the other."""
        self.state = self.state.index(torch.arange(self.state.num_sequences()).repeat_interleave(repeats))


class GdnForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model from a list of blocks, with any mixer that ``gdn mixers`` lists."""

    config_class = GdnConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _is_stateful = True
    _tied_weights_keys = None

    def __init__(self, config: GdnConfig) -> None:
        super().__init__(config)
        fields = {key: value for key, value in config.to_dict().items() if key in config.FIELDS}
        fields["model_type"] = "gdn"
        fields["tie_word_embeddings"] = bool(config.tie_word_embeddings)
        self._impl = make(torch.classes.gdn.CausalLM, "", json.dumps(fields))
        self._compute_dtype: torch.dtype | None = None
        for name, tensor in self._impl.parameters().items():
            adopt(self, name, tensor)
        for name, tensor in self._impl.buffers().items():
            adopt(self, name, tensor, buffer=True)
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: libgdn has initialised its parameters."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Loading puts new parameters in the place of those that libgdn holds.
        rejoin(model, dict(model._impl.parameters()))
        return loaded

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> nn.Module:
        return self.get_submodule("model.embeddings")

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        self.gradient_checkpointing = enable
        self._impl.set_gradient_checkpointing(enable)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: EngineCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor | None = 0,
        num_items_in_batch: int | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """input_ids int64 [B,T] -> logits [B,T,vocab] in float32, past_key_values and, with labels, the mean loss.

        attention_mask: [B,S] of 0 and 1 over all tokens so far (S >= T); tokens with 0 are skipped, their logits are 0.
        cu_seqlens: packed sequences, with B = 1; then the mask is ignored.
        """
        batch, tokens = input_ids.shape
        ids, cu_seqlens, kept = unpad(input_ids[..., None], attention_mask, cu_seqlens)
        if self.dtype != self._compute_dtype:
            call(self._impl.set_compute_dtype, str(self.dtype).removeprefix("torch."))
            self._compute_dtype = self.dtype
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = EngineCache(self._impl.zero_state(batch if cu_seqlens is None else len(cu_seqlens) - 1))
        state = None
        if past_key_values is not None:  # reading on changes it
            state = past_key_values.state if use_cache else past_key_values.state.clone()
        hidden, auxiliary = call(self._impl.hidden, ids[..., 0], cu_seqlens, state)
        hidden = repad(hidden, kept, batch, tokens)
        if use_cache and past_key_values is not None:
            past_key_values.seen_tokens += tokens
        if labels is None and logits_to_keep is not None:
            hidden = hidden[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep]
        logits = self._impl.logits(hidden)
        loss = None if labels is None else causal_lm_loss(logits, labels, num_items_in_batch)
        if loss is not None and auxiliary is not None and torch.is_grad_enabled():
            loss = loss + auxiliary  # balance of experts
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
        )
        return output if return_dict in (None, True) else output.to_tuple()
