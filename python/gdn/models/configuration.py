# SPDX-License-Identifier: Apache-2.0
"""Configurations with the fields, defaults and model types of flash-linear-attention's."""

from typing import Any

from transformers import PreTrainedConfig

AttentionSpec = dict[str, Any] | list[dict[str, Any]] | None
_COMMON = (
    "attn_mode hidden_size expand_v use_short_conv allow_neg_eigval conv_size num_heads max_position_embeddings "
    "hidden_ratio intermediate_size hidden_act num_hidden_layers norm_eps attn use_cache initializer_range fuse_norm "
    "fuse_swiglu fuse_cross_entropy use_l2warp vocab_size attnres_block_size"
).split()
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")


class _Config(PreTrainedConfig):
    keys_to_ignore_at_inference = ["past_key_values"]

    def _set(self, values: dict[str, Any], names: str, kwargs: dict[str, Any]) -> None:
        for name in (*_COMMON, *names.split()):
            setattr(self, name, values[name])
        super().__init__(**{name: values[name] for name in _TOKENS}, **kwargs)
        self._validate()

    def _validate(self) -> None:
        def require(condition: bool, rule: str, value: Any) -> None:
            if not condition:
                raise ValueError(f"[{type(self).__name__}] {rule}, got {value!r}")

        require(
            self.attnres_block_size is None,
            "attnres_block_size (attention residuals) is not supported",
            self.attnres_block_size,
        )
        require(self.hidden_act in ("swish", "silu"), "hidden_act must be 'swish'", self.hidden_act)
        require(not self.use_l2warp, "use_l2warp is not supported", self.use_l2warp)
        linear_ce = getattr(self, "fuse_linear_cross_entropy", False)
        require(
            not (self.fuse_cross_entropy and linear_ce),
            "fuse_cross_entropy and fuse_linear_cross_entropy cannot both be True",
            (self.fuse_cross_entropy, linear_ce),
        )
        taken: set[int] = set()
        for spec in self.attention_specs():
            require("num_heads" in spec and "layers" in spec, "attn must have num_heads and layers", spec)
            for layer in spec["layers"]:
                require(
                    0 <= layer < self.num_hidden_layers, f"attn layers must be in [0,{self.num_hidden_layers})", layer
                )
                require(layer not in taken, "a layer must stand in one attn only", layer)
                taken.add(layer)

    def attention_specs(self) -> list[dict[str, Any]]:
        """`attn` as a list, empty where there is none."""
        if self.attn is None:
            return []
        return [self.attn] if isinstance(self.attn, dict) else list(self.attn)


class GatedDeltaNetConfig(_Config):
    """Of a Gated DeltaNet language model; see flash-linear-attention's class of this name for the fields.

    ``attn``: which layers are softmax attention: None, or {"layers": [..], "num_heads": .., "num_kv_heads": ..,
    "qkv_bias": .., "window_size": .., "rope_theta": ..}, or a list of those. The ``fuse_*`` fields are for GPUs and
    have no effect.
    """

    model_type = "gated_deltanet"

    def __init__(
        self,
        attn_mode: str = "chunk",
        hidden_size: int = 2048,
        expand_v: float = 2.0,
        use_gate: bool = True,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        head_dim: int = 256,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        max_position_embeddings: int = 2048,
        hidden_ratio: int | None = 4,
        intermediate_size: int | None = None,
        hidden_act: str = "swish",
        num_hidden_layers: int = 21,
        norm_eps: float = 1e-6,
        attn: AttentionSpec = None,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        tie_word_embeddings: bool = False,
        initializer_range: float = 0.02,
        fuse_norm: bool = True,
        fuse_swiglu: bool = True,
        fuse_cross_entropy: bool = True,
        fuse_linear_cross_entropy: bool = False,
        use_l2warp: bool = False,
        vocab_size: int = 32000,
        attnres_block_size: int | None = None,
        output_gate_activation: str = "swish",
        **kwargs: Any,
    ) -> None:
        self._set(locals(), "use_gate head_dim num_v_heads fuse_linear_cross_entropy output_gate_activation", kwargs)


class DeltaNetConfig(_Config):
    """Of a DeltaNet language model; fields as in flash-linear-attention, see :class:`GatedDeltaNetConfig`."""

    model_type = "delta_net"

    def __init__(
        self,
        attn_mode: str = "chunk",
        hidden_size: int = 2048,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        use_gate: bool = False,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        use_beta: bool = True,
        use_output_norm: bool = True,
        num_heads: int = 16,
        qk_norm: str = "l2",
        qk_activation: str = "silu",
        max_position_embeddings: int = 2048,
        hidden_ratio: int | None = 4,
        intermediate_size: int | None = None,
        hidden_act: str = "swish",
        num_hidden_layers: int = 24,
        norm_eps: float = 1e-6,
        attn: AttentionSpec = None,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        tie_word_embeddings: bool = False,
        initializer_range: float = 0.02,
        fuse_norm: bool = True,
        fuse_swiglu: bool = True,
        fuse_cross_entropy: bool = True,
        fuse_linear_cross_entropy: bool = False,
        use_l2warp: bool = False,
        vocab_size: int = 32000,
        attnres_block_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        self._set(
            locals(),
            "expand_k use_gate use_beta use_output_norm qk_norm qk_activation fuse_linear_cross_entropy",
            kwargs,
        )


class KDAConfig(_Config):
    """Of a Kimi Delta Attention language model; fields as in flash-linear-attention."""

    model_type = "kda"

    def __init__(
        self,
        attn_mode: str = "chunk",
        hidden_size: int = 2048,
        expand_v: float = 1.0,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        safe_gate: bool = False,
        lower_bound: float | None = None,
        conv_size: int = 4,
        head_dim: int = 128,
        num_heads: int = 16,
        num_v_heads: int | None = None,
        max_position_embeddings: int = 2048,
        hidden_ratio: int | None = 4,
        intermediate_size: int | None = None,
        hidden_act: str = "swish",
        num_hidden_layers: int = 24,
        norm_eps: float = 1e-6,
        attn: AttentionSpec = None,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        tie_word_embeddings: bool = False,
        initializer_range: float = 0.02,
        fuse_norm: bool = True,
        fuse_swiglu: bool = True,
        fuse_cross_entropy: bool = True,
        use_l2warp: bool = False,
        vocab_size: int = 32000,
        attnres_block_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        self._set(locals(), "head_dim num_v_heads safe_gate lower_bound", kwargs)


class GdnConfig(PreTrainedConfig):
    """Of a model from a list of blocks, any mixer of libgdn's registry in each.

    It is what ``gdn train`` writes for models that none of the configurations above can express. ``blocks`` is the list
    of config.json; the other fields are those of :class:`GatedDeltaNetConfig`.
    """

    model_type = "gdn"
    keys_to_ignore_at_inference = ["past_key_values"]
    FIELDS = frozenset(
        "vocab_size hidden_size hidden_ratio intermediate_size norm_eps initializer_range tie_word_embeddings "
        "max_position_embeddings bos_token_id eos_token_id pad_token_id blocks".split()
    )

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 2048,
        blocks: list[dict[str, Any]] | None = None,
        hidden_ratio: int = 4,
        intermediate_size: int | None = None,
        norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        max_position_embeddings: int = 2048,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.blocks = [{}] if blocks is None else blocks
        self.hidden_ratio, self.intermediate_size = hidden_ratio, intermediate_size
        self.norm_eps, self.initializer_range = norm_eps, initializer_range
        self.max_position_embeddings, self.use_cache = max_position_embeddings, use_cache
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved: only what libgdn knows, which refuses other keys."""
        known = self.FIELDS | {"model_type", "architectures", "dtype"}
        return {key: value for key, value in self.to_dict().items() if key in known}

    @property
    def num_hidden_layers(self) -> int:
        return len(self.blocks)
