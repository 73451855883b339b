# SPDX-License-Identifier: Apache-2.0
"""Language models of delta-rule layers for transformers, with flash-linear-attention's parameter names."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from gdn import layers, ops
from gdn.layers._common import RMSNorm, initial_a_log, initial_dt_bias, without_decay
from gdn.layers.cache import Cache
from gdn.models.configuration import DeltaNetConfig, GatedDeltaNetConfig, KDAConfig, _Config


def causal_lm_loss(logits: Tensor, labels: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
    """Mean cross-entropy in nats of the next token; labels [B,T] are shifted here, -100 is not scored."""
    targets = nn.functional.pad(labels[:, 1:].to(logits.device), (0, 1), value=-100)
    loss, _ = ops.cross_entropy(logits.flatten(0, -2), targets.flatten(), -100)
    if num_items_in_batch is not None:
        return loss.sum() / num_items_in_batch
    return loss.sum() / (targets != -100).sum().clamp(min=1)


class SwiGLU(nn.Module):
    """down_proj(SiLU(gate_proj(x)) * up_proj(x))."""

    def __init__(self, hidden_size: int, hidden_ratio: int | None, intermediate_size: int | None) -> None:
        super().__init__()
        if intermediate_size is None:
            intermediate_size = 256 * ((int(hidden_size * (hidden_ratio or 4) * 2 / 3) + 255) // 256)
        self.intermediate_size = intermediate_size
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


def _mixer(config: _Config, layer_idx: int) -> nn.Module:
    for spec in config.attention_specs():
        if layer_idx in spec["layers"]:
            return layers.Attention(
                hidden_size=config.hidden_size,
                num_heads=spec["num_heads"],
                num_kv_heads=spec.get("num_kv_heads"),
                qkv_bias=spec.get("qkv_bias", False),
                window_size=spec.get("window_size"),
                rope_theta=spec.get("rope_theta", 10000.0),
                layer_idx=layer_idx,
            )
    common = dict(
        hidden_size=config.hidden_size,
        expand_v=config.expand_v,
        num_heads=config.num_heads,
        mode=config.attn_mode,
        use_short_conv=config.use_short_conv,
        allow_neg_eigval=config.allow_neg_eigval,
        conv_size=config.conv_size,
        layer_idx=layer_idx,
        norm_eps=config.norm_eps,
    )
    if isinstance(config, DeltaNetConfig):
        return layers.DeltaNet(
            expand_k=config.expand_k,
            use_beta=config.use_beta,
            use_gate=config.use_gate,
            qk_activation=config.qk_activation,
            qk_norm=config.qk_norm,
            **common,
        )
    common.update(head_dim=config.head_dim, num_v_heads=config.num_v_heads)
    if isinstance(config, KDAConfig):
        return layers.KimiDeltaAttention(safe_gate=config.safe_gate, lower_bound=config.lower_bound, **common)
    return layers.GatedDeltaNet(
        use_gate=config.use_gate, output_gate_activation=config.output_gate_activation, **common
    )


class Block(GradientCheckpointingLayer):
    """x += mixer(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: _Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = _mixer(config, layer_idx)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.hidden_ratio, config.intermediate_size)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden_states = hidden_states + self.attn(self.attn_norm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class _PreTrained(PreTrainedModel):
    config_class = _Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _is_stateful = True  # a recurrent state cannot go back, as assisted decoding wants
    _input_embed_layer = "embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The functions of transformers.initialization leave alone what was loaded from a checkpoint.
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, (layers.GatedDeltaNet, layers.KimiDeltaAttention)):
            heads = module.A_log.numel()
            if getattr(module, "safe_gate", False):
                init.zeros_(module.A_log)
            else:
                low = 1 if isinstance(module, layers.KimiDeltaAttention) else 0
                init.copy_(module.A_log, initial_a_log(heads, low).to(module.A_log))
            init.copy_(module.dt_bias, initial_dt_bias(module.dt_bias.numel()).to(module.dt_bias))
            without_decay(module.A_log, module.dt_bias)


class _Model(_PreTrained):
    """Embedding, blocks, final norm: the last hidden states."""

    def __init__(self, config: _Config) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """input_ids int64 [B,T] or inputs_embeds [B,T,D] -> last_hidden_state [B,T,D] and past_key_values.

        attention_mask: [B,S] of 0 and 1 over all tokens so far. cu_seqlens: packed sequences, with B = 1.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"[{type(self).__name__}] exactly one of input_ids and inputs_embeds must be given")
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = Cache()
        if cu_seqlens is None:
            cu_seqlens = kwargs.get("cu_seq_lens_q")
        seen: tuple[Tensor, ...] = ()
        for layer in self.layers:
            if output_hidden_states:
                seen = (*seen, x)
            x = layer(
                x,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                cu_seqlens=cu_seqlens,
            )
        x = self.norm(x)
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*seen, x) if output_hidden_states else None,
        )
        return output if return_dict in (None, True) else output.to_tuple()


class CausalLMBase(_PreTrained, GenerationMixin):
    """What every model with a language-modelling head shares: loss, logits and generation with gdn's cache."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the model makes its own cache

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        """The language-modelling head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor | None = 0,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """input_ids int64 [B,T] -> logits [B,T,vocab], past_key_values and, with labels [B,T], the mean loss in nats.

        labels are shifted here (labels = input_ids is right); -100 is not scored. logits_to_keep: only the last so many
        positions (0: all), or the positions of an index tensor.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        x = outputs.last_hidden_state
        if labels is None and logits_to_keep is not None:
            x = x[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else x[:, logits_to_keep]
        logits = self.lm_head(x)
        output = CausalLMOutputWithPast(
            loss=None if labels is None else causal_lm_loss(logits, labels, num_items_in_batch),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return output if return_dict in (None, True) else output.to_tuple()


class GatedDeltaNetModel(_Model):
    """Gated DeltaNet (arXiv 2412.06464) without a head."""

    config_class = GatedDeltaNetConfig


class DeltaNetModel(_Model):
    """DeltaNet (arXiv 2406.06484) without a head."""

    config_class = DeltaNetConfig


class KDAModel(_Model):
    """Kimi Delta Attention (arXiv 2510.26692) without a head."""

    config_class = KDAConfig


class _ForCausalLM(CausalLMBase):
    backbone: type[_Model]

    def __init__(self, config: _Config) -> None:
        super().__init__(config)
        self.model = self.backbone(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class GatedDeltaNetForCausalLM(_ForCausalLM):
    """Gated DeltaNet (arXiv 2412.06464) as a language model."""

    config_class = GatedDeltaNetConfig
    backbone = GatedDeltaNetModel


class DeltaNetForCausalLM(_ForCausalLM):
    """DeltaNet (arXiv 2406.06484) as a language model."""

    config_class = DeltaNetConfig
    backbone = DeltaNetModel


class KDAForCausalLM(_ForCausalLM):
    """Kimi Delta Attention (arXiv 2510.26692) as a language model."""

    config_class = KDAConfig
    backbone = KDAModel
