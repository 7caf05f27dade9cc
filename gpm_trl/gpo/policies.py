"""Policies by name: how `GRPOTrainer` loads them, and adapters that are trained on."""

import os
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import cached_file, find_adapter_config_file
from trl.trainer.utils import create_model_from_path

from ..models.peft_gpm import HUB_ARGUMENTS, of_base
from .config import GPOConfig


def init_kwargs(args: GPOConfig, quantization_config: BitsAndBytesConfig | None) -> dict[str, Any]:
    """How `GRPOTrainer` loads a policy that is given by name."""
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {}), "use_safetensors": True}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    return kwargs


def _hub_kwargs(kwargs: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (kwargs or {}).items() if name in HUB_ARGUMENTS}


def is_adapter(model: str | PreTrainedModel | PeftModel, args: GPOConfig) -> bool:
    """Whether a policy, or what its directory or repository of the Hub holds, is an adapter of another."""
    if not isinstance(model, str):
        return isinstance(model, PeftModel)
    return find_adapter_config_file(model, **_hub_kwargs(args.model_init_kwargs)) is not None


def check_adapter(model: str | PeftModel, peft_config: PeftConfig | None, args: GPOConfig) -> None:
    """Raise `ValueError` for an adapter that cannot be trained on."""
    if peft_config is not None:
        raise ValueError("The policy is an adapter, and `peft_config` would be a second: leave out the latter.")
    if isinstance(model, PeftModel):
        if "default" not in model.peft_config:
            raise ValueError(
                f'The adapters of the policy are {sorted(model.peft_config)}, but the one called "default" is '
                "trained: load it by that name."
            )
        return
    hub_kwargs = _hub_kwargs(args.model_init_kwargs)
    # PEFT would fall back to a pickle.
    if not cached_file(model, SAFETENSORS_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs):
        raise ValueError(f"The adapter {model} has no {SAFETENSORS_WEIGHTS_NAME}: save it anew.")
    config = PeftConfig.from_pretrained(model, **hub_kwargs)
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(
            f"The adapter {model} names no base model in its adapter_config.json: put it on the base yourself, by "
            "`PeftModel.from_pretrained(base, ..., is_trainable=True)`, and pass that."
        )
    # Which transformers would put on the base before this one.
    if find_adapter_config_file(base, **of_base(hub_kwargs), revision=config.revision) is not None:
        raise ValueError(
            f"The base model of the adapter {model} is {base}, where an adapter is, too: move the files of the "
            "adapter to a directory of their own."
        )


def load_adapter(name: str, kwargs: dict[str, Any]) -> PeftModel:
    """
    An adapter to be trained on, by its directory or Hub id, with its base loaded as `kwargs` say.

    The base has the revision that the adapter names, or else that of `kwargs`, if it is not the adapter's own.
    """
    hub_kwargs = _hub_kwargs(kwargs)
    config = PeftConfig.from_pretrained(name, **hub_kwargs)
    revision = config.revision or (kwargs.get("revision") if os.path.isdir(name) else None)
    base = create_model_from_path(config.base_model_name_or_path, **of_base(kwargs), revision=revision)
    return PeftModel.from_pretrained(base, name, is_trainable=True, **hub_kwargs)
