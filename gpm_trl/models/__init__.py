"""The model: configuration, backbone with heads, output."""

from transformers import AutoConfig, AutoModel

from .configuration_gpm import GPMModelConfig
from .modeling_gpm import GPMForPreference, GPMOutput

__all__ = ["GPMForPreference", "GPMModelConfig", "GPMOutput"]

AutoConfig.register(GPMModelConfig.model_type, GPMModelConfig)
AutoModel.register(GPMModelConfig, GPMForPreference)
# Saved models carry their code, so that `AutoModel.from_pretrained(..., trust_remote_code=True)` loads them anywhere.
GPMModelConfig.register_for_auto_class()
GPMForPreference.register_for_auto_class()
