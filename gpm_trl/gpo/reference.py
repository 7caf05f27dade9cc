"""The reference policy pi_t: where it comes from, and how it becomes the policy at the start of an iteration."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, disable_dropout_in_model, get_config_model_id

from ..models.loading import whole_models

REFERENCE_DIRECTORY = "reference"  # of a checkpoint
ADAPTER_FILE = "adapter.safetensors"  # in it
REFERENCE_ADAPTER = "ref"  # the name by which `GRPOTrainer` looks for it


def initial_reference(model: str | PreTrainedModel, init_kwargs: dict[str, Any]) -> PreTrainedModel:
    """
    A copy of the policy as it is before training: loaded anew from its name, or copied from a model in memory.

    Raises:
        ValueError: For a model in memory that ZeRO-3 has partitioned and that has no name to load it by.
    """
    if isinstance(model, str):
        return create_model_from_path(model, **init_kwargs)
    if not is_deepspeed_zero3_enabled():
        reference = copy.deepcopy(model)
        if "_hf_hook" not in vars(reference):  # accelerate's own, for a model on several devices
            # Forwards that an earlier trainer gave to this object would go on calling the policy's.
            for name in ("forward", "_original_forward"):
                vars(reference).pop(name, None)
        return reference
    name = get_config_model_id(model.config)
    if not name:
        raise ValueError(
            "Under ZeRO-3, a model in memory cannot be copied, and this one has no name to load a reference by: pass "
            "the policy by name, or a `ref_model`."
        )
    return create_model_from_path(name, dtype=model.dtype, attn_implementation=model.config._attn_implementation)


def prepare_reference(
    reference: PreTrainedModel,
    accelerator: Accelerator,
    temperature: float,
    disable_dropout: bool,
    cast_lm_head_to_fp32: bool,
) -> nn.Module:
    """The reference, frozen, giving log-probabilities like the policy's, and distributed as the policy is."""
    reference.requires_grad_(False).eval()
    if disable_dropout:
        disable_dropout_in_model(reference)
    add_fused_lm_head(reference, temperature=temperature, cast_lm_head_to_fp32=cast_lm_head_to_fp32)
    if accelerator.state.deepspeed_plugin is not None:
        return prepare_deepspeed(reference, accelerator)
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        return prepare_fsdp(reference, accelerator)
    return accelerator.prepare_model(reference, evaluation_mode=True)


def disable_reference_dropout(model: nn.Module) -> None:
    """Take the dropout out of the adapter that is the reference, if there is one: it is never trained."""
    for module in model.modules():
        dropouts = getattr(module, "lora_dropout", {})
        if REFERENCE_ADAPTER in dropouts:
            dropouts[REFERENCE_ADAPTER] = nn.Identity()


def add_reference_adapter(model: PeftModel) -> None:
    """An adapter that stays what the trained one is now, if there is none yet."""
    if not has_reference_adapter(model):
        model.add_adapter(REFERENCE_ADAPTER, model.peft_config["default"])
        for parameter, trained in zip(_reference_adapter(model).values(), _trained_adapter(model), strict=True):
            parameter.data = trained.data.clone()
            parameter.requires_grad_(False)


class ReferenceUpdate(TrainerCallback):
    """
    Makes the reference `alpha * policy + (1 - alpha) * reference` at the start of each iteration but the first.

    Args:
        reference (`nn.Module`, *optional*): The reference model. `None` if it is the adapter called `"ref"`.
        accelerator ([`~accelerate.Accelerator`]): The trainer's.
        alpha (`float`): alpha, 1 for pi_t.
        steps (`int`, *optional*): Optimizer steps of an iteration; `None` is an epoch.
    """

    def __init__(self, reference: nn.Module | None, accelerator: Accelerator, alpha: float, steps: int | None):
        self.reference = reference
        self.accelerator = accelerator
        self.alpha = alpha
        self.steps = steps
        self.num_updates = 0
        self._resumes_within_epoch = False

    # Not at the end of an iteration: its evaluation, which comes later, is against its own reference.

    def on_train_begin(self, args, state, control, **kwargs):
        self._resumes_within_epoch = not float(state.epoch or 0).is_integer()

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        if self.steps is None and state.global_step > 0 and not self._resumes_within_epoch:
            self.update(model)
        self._resumes_within_epoch = False

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.steps is not None and state.global_step > 0 and state.global_step % self.steps == 0:
            self.update(model)

    def update(self, policy: nn.Module) -> None:
        self.num_updates += 1
        policy = self.accelerator.unwrap_model(policy)
        if self.reference is not None:
            SyncRefModelCallback.sync_target_model(policy, self.reference, self.alpha)
            return
        # As models, which is what TRL can gather under ZeRO-3.
        trained, adapter = _trained_adapter(policy), _reference_adapter(policy).values()
        SyncRefModelCallback.sync_target_model(nn.ParameterList(trained), nn.ParameterList(adapter), self.alpha)

    def save(self, checkpoint: Path, policy: nn.Module) -> None:
        """Write the reference beside a checkpoint of the policy, also an adapter: under DeepSpeed, PEFT's is wrong."""
        directory = checkpoint / REFERENCE_DIRECTORY
        if self.reference is not None:
            weights = self.accelerator.get_state_dict(self.reference)
            if self.accelerator.is_main_process:
                self.accelerator.unwrap_model(self.reference).save_pretrained(directory, state_dict=weights)
        else:
            adapter = _reference_adapter(self.accelerator.unwrap_model(policy))
            with _gathered(adapter):
                weights = {name: _whole(parameter) for name, parameter in adapter.items()}
            if self.accelerator.is_main_process:
                directory.mkdir(parents=True, exist_ok=True)
                save_file(weights, directory / ADAPTER_FILE)
        self.accelerator.wait_for_everyone()

    def load(self, checkpoint: Path, policy: nn.Module) -> None:
        """Take the reference from a checkpoint, if it was updated before; else it is the initial one."""
        directory = checkpoint / REFERENCE_DIRECTORY
        if not directory.exists():
            return
        self.num_updates += 1
        if self.reference is None:
            parameters = _reference_adapter(self.accelerator.unwrap_model(policy))
            weights = load_file(directory / ADAPTER_FILE)
        else:
            unwrapped = self.accelerator.unwrap_model(self.reference)
            parameters = dict(unwrapped.named_parameters())
            with whole_models():
                saved = type(unwrapped).from_pretrained(directory, dtype=unwrapped.dtype)
            weights = dict(saved.named_parameters())
        with _gathered(parameters), torch.no_grad():
            for name, parameter in parameters.items():
                _copy(weights[name], parameter)


def has_reference_adapter(model: nn.Module) -> bool:
    """Whether a model has an adapter that is the reference of another."""
    return isinstance(model, PeftModel) and REFERENCE_ADAPTER in model.peft_config


def _reference_adapter(policy: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in policy.named_parameters() if f".{REFERENCE_ADAPTER}." in name}


def _trained_adapter(policy: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained, in the order of the reference's."""
    names = (name.replace(f".{REFERENCE_ADAPTER}.", ".default.") for name in _reference_adapter(policy))
    return [policy.get_parameter(name) for name in names]


def _gathered(parameters: dict[str, nn.Parameter]) -> contextlib.AbstractContextManager:
    """Within, parameters that ZeRO-3 partitions are whole; what was written to them is kept."""
    if not is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters.values()), modifier_rank=0)


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return value.detach().cpu().clone().contiguous()


def _copy(value: torch.Tensor, parameter: nn.Parameter) -> None:
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)
