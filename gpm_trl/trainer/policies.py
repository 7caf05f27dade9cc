"""Policies by name: how `GRPOTrainer` loads them, and adapters that are trained on."""

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME
from trl.trainer.utils import create_model_from_path

from .gpo_config import GPOConfig


def init_kwargs(args: GPOConfig, quantization_config: BitsAndBytesConfig | None) -> dict[str, Any]:
    """How `GRPOTrainer` loads a policy that is given by name."""
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {}), "use_safetensors": True}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    return kwargs


def is_adapter(model: str | PreTrainedModel | PeftModel) -> bool:
    """Whether a policy, or what a directory holds, is an adapter of another."""
    if not isinstance(model, str):
        return isinstance(model, PeftModel)
    return Path(model, ADAPTER_CONFIG_NAME).exists() and not Path(model, CONFIG_NAME).exists()


def check_adapter(model: str | PeftModel, peft_config: PeftConfig | None) -> None:
    """Raise `ValueError` for an adapter that cannot be trained on."""
    if peft_config is not None:
        raise ValueError("The policy is an adapter, and `peft_config` would be a second: leave out the latter.")
    if isinstance(model, str) and not Path(model, SAFETENSORS_WEIGHTS_NAME).exists():
        raise ValueError(f"The adapter {model} has no {SAFETENSORS_WEIGHTS_NAME}: save it anew.")
    if isinstance(model, PeftModel) and "default" not in model.peft_config:
        raise ValueError(
            f'The adapters of the policy are {sorted(model.peft_config)}, but the one called "default" is trained: '
            "load it by that name."
        )


def load_adapter(directory: str, kwargs: dict[str, Any]) -> PeftModel:
    """An adapter to be trained on, with its base loaded as `kwargs` say, in the revision that the adapter names."""
    config = PeftConfig.from_pretrained(directory)
    kwargs = {**kwargs, "revision": config.revision or kwargs.get("revision")}
    base = create_model_from_path(config.base_model_name_or_path, **kwargs)
    return PeftModel.from_pretrained(base, directory, is_trainable=True)
