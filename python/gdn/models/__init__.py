# SPDX-License-Identifier: Apache-2.0
"""Language models as transformers' ``PreTrainedModel``, known to its Auto classes once this module is imported.

GatedDeltaNet, DeltaNet and KDA have flash-linear-attention's configurations and parameter names, so its checkpoints
load, on a CPU and without Triton; so do those that ``gdn train`` writes, and the reverse. GdnForCausalLM is any model
that libgdn can build. Needs transformers 5.
"""

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig  # noqa: F401
except ImportError as error:
    raise ImportError("gdn.models needs transformers 5: pip install transformers") from error

from gdn.models.blocks import EngineCache, GdnForCausalLM
from gdn.models.configuration import DeltaNetConfig, GatedDeltaNetConfig, GdnConfig, KDAConfig
from gdn.models.modeling import (
    DeltaNetForCausalLM,
    DeltaNetModel,
    GatedDeltaNetForCausalLM,
    GatedDeltaNetModel,
    KDAForCausalLM,
    KDAModel,
)

__all__ = [
    "DeltaNetConfig",
    "DeltaNetForCausalLM",
    "DeltaNetModel",
    "EngineCache",
    "GatedDeltaNetConfig",
    "GatedDeltaNetForCausalLM",
    "GatedDeltaNetModel",
    "GdnConfig",
    "GdnForCausalLM",
    "KDAConfig",
    "KDAForCausalLM",
    "KDAModel",
]

for _config, _model, _causal_lm in (
    (GatedDeltaNetConfig, GatedDeltaNetModel, GatedDeltaNetForCausalLM),
    (DeltaNetConfig, DeltaNetModel, DeltaNetForCausalLM),
    (KDAConfig, KDAModel, KDAForCausalLM),
    (GdnConfig, None, GdnForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    if _model is not None:
        AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal_lm, exist_ok=True)
