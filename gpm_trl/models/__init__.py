"""The model: configuration, backbone with heads, output."""

from transformers import AutoConfig, AutoModel

from .configuration_gpm import GPMModelConfig
from .modeling_gpm import GPMForPreference, GPMOutput

__all__ = ["GPMForPreference", "GPMModelConfig", "GPMOutput"]

AutoConfig.register(GPMModelConfig.model_type, GPMModelConfig)
AutoModel.register(GPMModelConfig, GPMForPreference)
