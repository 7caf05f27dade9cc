"""The policy as `GRPOTrainer` gets it: whole, and of an adapter the one that is trained on."""

from types import SimpleNamespace
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel
from trl import GRPOConfig
from trl.trainer.utils import create_model_from_path

from ..models.loading import HUB_ARGUMENTS, hub_arguments, is_adapter, put_adapter, read_adapter
from ..models.modeling_gpm import load_whole


def policy_arguments(
    model: "str | PreTrainedModel | PeftModel",
    args: GRPOConfig,
    quantization_config: BitsAndBytesConfig | None,
    peft_config: PeftConfig | None,
    ref_model: PreTrainedModel | None = None,
) -> tuple["str | PreTrainedModel | PeftModel", BitsAndBytesConfig | None, dict[str, Any]]:
    """
    What `GRPOTrainer` gets for a policy, so that no weight of it is made up: the model or its name, the quantisation,
    if it is not done, and what `args` must be meanwhile. Raises `ValueError` for models that contradict another.
    """
    by_name = isinstance(model, str) and is_adapter(model, hub_arguments(args.model_init_kwargs or {}))
    is_given = by_name or isinstance(model, PeftModel)
    if is_given and peft_config is not None:
        raise ValueError("The policy is an adapter, and `peft_config` would be a second: leave out the latter.")
    if isinstance(model, PeftModel) and "default" not in model.peft_config:
        raise ValueError(
            f'The adapters of the policy are {sorted(model.peft_config)}, but "default" is trained: call one so.'
        )
    if ref_model is not None and ref_model is model:
        raise ValueError("`ref_model` is the policy itself, so it would change with it: leave it out for a copy.")
    if ref_model is not None and (is_given or peft_config is not None):
        raise ValueError("With an adapter, the reference is the policy as it was: leave out `ref_model`.")
    if by_name:  # whose arguments are used up; the parent would say that it ignores them
        return load_policy_adapter(model, args, quantization_config), None, {"model_init_kwargs": None}
    if not isinstance(model, str):
        return model, quantization_config, {}
    # The parent's `create_model_from_path`, of the policy and, by default, its reference, takes a class.
    whole = SimpleNamespace(from_pretrained=lambda *a, **k: load_whole(create_model_from_path, *a, **k)[0])
    return model, quantization_config, {"model_init_kwargs": {**(args.model_init_kwargs or {}), "architecture": whole}}


def load_policy_adapter(name: str, args: GRPOConfig, quantization_config: BitsAndBytesConfig | None) -> PeftModel:
    """An adapter to be trained on, by its directory or Hub id, on its base, loaded as `GRPOTrainer` loads policies."""
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    adapter = read_adapter(name, kwargs["trust_remote_code"], hub_arguments(kwargs))
    if adapter.of_reward_model:
        raise ValueError(f"{name} is an adapter of a reward model, not of a policy: give it as `reward_funcs`.")
    kwargs = {key: value for key, value in kwargs.items() if key not in HUB_ARGUMENTS} | adapter.base_kwargs
    base, _ = load_whole(create_model_from_path, adapter.base, replaced=adapter.weights, **kwargs)
    return put_adapter(base, adapter, is_trainable=True)
