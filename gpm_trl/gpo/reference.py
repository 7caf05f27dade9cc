"""The reference policy pi_t: where it comes from, and how it becomes the policy at the start of an iteration."""

import contextlib
import copy
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import disable_dropout_in_model, get_config_model_id

from ..gpm.config import temporarily
from ..models.loading import whole_models
from ..models.modeling_gpm import load_whole
from .config import GPOConfig

try:
    from trl.trainer.utils import add_fused_lm_head
except ImportError:  # TRL < 1.15, where log-probabilities are read off whole logits
    add_fused_lm_head = None

REFERENCE_DIRECTORY = "reference"  # of a checkpoint
ADAPTER_FILE = "adapter.safetensors"  # in it
REFERENCE_ADAPTER = "ref"  # the name by which `GRPOTrainer` looks for it


def current_epoch(progress: float | None, training: bool) -> int:
    """The epoch or iteration, from 0, of the next step; in evaluation, which comes after, that of the last step."""
    progress = progress or 0
    return int(progress) if training else max(math.ceil(progress) - 1, 0)


class MovingReference:
    """
    Layer: the reference may be given, and becomes the policy at the start of each iteration (pi_t). Without it, the
    reference is the parent's: the policy as it is loaded by its name, or without its adapter.

    Overrides: `__init__`, `_save_optimizer_and_scheduler` and `_load_optimizer_and_scheduler` (a checkpoint holds a
    reference that is not the initial one), `_load_from_checkpoint` (the policy's adapter beside the reference's).
    """

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: GPOConfig,
        ref_model: PreTrainedModel | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs,
    ):
        uses_adapter = peft_config is not None or isinstance(model, PeftModel)
        if has_reference_adapter(model):  # an earlier trainer's
            model.delete_adapter(REFERENCE_ADAPTER)
        if ref_model is None and not uses_adapter and not isinstance(model, str):
            ref_model = copied_policy(model)
        # GRPOTrainer (TRL 1.16) takes no reference: unless `beta` is 0, it loads one by the policy's name, or copies
        # an adapter, but not of every kind. And it refuses to synchronise adapters, and others where evaluation comes
        # after: see `ReferenceUpdate`.
        with temporarily(args, sync_ref_model=False, beta=0.0 if uses_adapter or ref_model is not None else args.beta):
            super().__init__(model=model, args=args, peft_config=peft_config, **kwargs)
        self.beta = args.beta
        if ref_model is not None:
            if args.sync_ref_model:
                check_same_shapes(self.model, ref_model)
            self.ref_model = prepare_reference(ref_model, self.accelerator, self.temperature, args)
        # A new adapter that starts at zero is the reference when it is off.
        if uses_adapter and (args.sync_ref_model or isinstance(model, PeftModel) or _changes_base(peft_config)):
            add_reference_adapter(self.model)
        self._update: ReferenceUpdate | None = None
        if args.sync_ref_model:
            if args.renews_reference and args.save_strategy != "no" and not args.save_only_model:
                check_saveable(self.ref_model)
            self._update = ReferenceUpdate(self.ref_model, self.accelerator, args)
            self.add_callback(self._update)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self._update is not None and self._update.num_updates:
            self._update.save(Path(output_dir), self.model)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if model is None and has_reference_adapter(self.model):  # forgotten before transformers 5.23
            self.model.load_adapter(resume_from_checkpoint, "default", is_trainable=True)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._update is not None and checkpoint is not None:
            self._update.load(Path(checkpoint), self.model)


def copied_policy(model: PreTrainedModel) -> PreTrainedModel | None:
    """
    A copy of a policy in memory, or `None` under ZeRO-3, where the parent loads one by the policy's name.

    Raises:
        ValueError: For a model that ZeRO-3 has partitioned and that has no name to load it by.
    """
    if is_deepspeed_zero3_enabled():
        if not get_config_model_id(model.config):
            raise ValueError("ZeRO-3 copies a model by its name: pass the policy by name, or a `ref_model`.")
        return None
    reference = copy.deepcopy(model)
    if "_hf_hook" not in vars(reference):  # accelerate's own, for a model on several devices
        # Forwards that an earlier trainer gave to this object would go on calling the policy's.
        for name in ("forward", "_original_forward"):
            vars(reference).pop(name, None)
    return reference


def check_same_shapes(policy: nn.Module, reference: nn.Module) -> None:
    """Raise `ValueError` for a reference that cannot become the policy."""
    # Of what ZeRO-3 has partitioned, the whole shape.
    shapes, others = (
        {name: tuple(getattr(value, "ds_shape", value.shape)) for name, value in model.named_parameters()}
        for model in (policy, reference)
    )
    if shapes != others:
        name, shape = min(shapes.items() ^ others.items())
        raise ValueError(
            f"`ref_model` cannot become the policy: {name} of shape {shape} is in one of them alone. Give a reference "
            "of the policy's architecture, or set `sync_ref_model=False` to keep it."
        )


def prepare_reference(
    reference: PreTrainedModel, accelerator: Accelerator, temperature: float, args: GPOConfig
) -> nn.Module:
    """The reference, frozen, giving log-probabilities like the policy's, and distributed as the policy is."""
    reference.requires_grad_(False).eval()
    if args.disable_dropout:
        disable_dropout_in_model(reference)
    if add_fused_lm_head is not None:
        add_fused_lm_head(reference, temperature=temperature, cast_lm_head_to_fp32=args.cast_lm_head_to_fp32)
    elif args.cast_lm_head_to_fp32:
        raise ValueError(
            "`cast_lm_head_to_fp32` is not done to a reference before TRL 1.15: run `pip install --upgrade trl`."
        )
    if accelerator.state.deepspeed_plugin is not None:
        return prepare_deepspeed(reference, accelerator)
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        return prepare_fsdp(reference, accelerator)
    return accelerator.prepare_model(reference, evaluation_mode=True)


def check_saveable(reference: nn.Module | None) -> None:
    """Raise `ValueError` for a reference that ZeRO-3 has partitioned, and would not gather for a checkpoint."""
    gathers = getattr(reference, "zero_gather_16bit_weights_on_model_save", None)
    if is_deepspeed_zero3_enabled() and gathers is not None and not gathers():
        raise ValueError(
            "ZeRO-3 would not gather the renewed reference for a checkpoint: set `zero3_save_16bit_model: true` in "
            "the accelerate config, or `save_strategy='no'`."
        )


def add_reference_adapter(model: PeftModel) -> None:
    """An adapter that stays what the trained one is now."""
    config = copy.deepcopy(model.peft_config["default"])
    if _changes_base(config):
        config.init_lora_weights = True  # or the base would be changed a second time
    try:
        model.add_adapter(REFERENCE_ADAPTER, config)
    except ValueError as error:  # PEFT's, for kinds of which a model can hold one
        raise ValueError(
            f"The reference is a second adapter, {REFERENCE_ADAPTER!r}, which PEFT refuses. Set `sync_ref_model=False`"
            f" to do without, if the policy's adapter is new. {error}"
        ) from error
    for parameter, trained in zip(_reference_adapter(model).values(), _trained_adapter(model), strict=True):
        parameter.data = trained.data.clone()
        parameter.requires_grad_(False)
    for module in model.modules():  # it is never trained, so nothing is dropped
        for name, value in {**vars(module), **dict(module.named_children())}.items():
            if name.endswith("dropout") and isinstance(value, (dict, nn.ModuleDict)) and REFERENCE_ADAPTER in value:
                is_module = isinstance(value[REFERENCE_ADAPTER], nn.Module)
                value[REFERENCE_ADAPTER] = nn.Identity() if is_module else 0.0


def _changes_base(config: PeftConfig) -> bool:
    """Whether the base of a new adapter is no longer the model that it was: PiSSA and others take a part out."""
    init = getattr(config, "init_lora_weights", None)
    return isinstance(init, str) and init not in ("gaussian", "orthogonal")


class ReferenceUpdate(TrainerCallback):
    """
    Makes the reference `alpha * policy + (1 - alpha) * reference` at the start of each iteration but the first. (Not
    at the end of one, as TRL's own callback: its evaluation, which comes later, is against its own reference.)

    Args:
        reference (`nn.Module`, *optional*): The reference model. `None` if it is the adapter called `"ref"`.
        accelerator ([`~accelerate.Accelerator`]): The trainer's.
        args ([`GPOConfig`]): For alpha, `ref_model_mixup_alpha`, and `ref_model_sync_steps`, the optimizer steps of an
            iteration; `None` is an epoch.
    """

    def __init__(self, reference: nn.Module | None, accelerator: Accelerator, args: GPOConfig):
        self.reference = reference
        self.accelerator = accelerator
        self.alpha = args.ref_model_mixup_alpha
        self.steps = args.ref_model_sync_steps
        self.num_updates = 0
        self._last_step = 0  # with which the reference was renewed, or for which it was loaded

    def on_train_begin(self, args, state, control, **kwargs):
        self._last_step = 0 if float(state.epoch or 0).is_integer() else state.global_step

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        if self.steps is None and state.global_step > self._last_step:  # a resumed stream begins epochs without steps
            self._last_step = state.global_step
            self.update(model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.steps is not None and state.global_step > 0 and state.global_step % self.steps == 0:
            self.update(model)

    def count(self, state: TrainerState, training: bool) -> int:
        """How many updates came before this step of the whole run; in evaluation, before the step just done."""
        return current_epoch(state.epoch if self.steps is None else state.global_step / self.steps, training)

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
            if self.num_updates:
                raise ValueError(f"{checkpoint} has the initial reference, which is renewed here: make a new trainer.")
            return
        self.num_updates += 1
        if self.reference is None:
            parameters = _reference_adapter(self.accelerator.unwrap_model(policy))
            weights = load_file(directory / ADAPTER_FILE)
        else:
            unwrapped = self.accelerator.unwrap_model(self.reference)
            parameters = dict(unwrapped.named_parameters())
            with whole_models():
                saved, _ = load_whole(type(unwrapped).from_pretrained, directory, dtype=unwrapped.dtype)
            weights = dict(saved.named_parameters())
        with _gathered(parameters), torch.no_grad():
            for name, parameter in parameters.items():
                value = weights[name].to(parameter.device)
                if isinstance(parameter, DTensor):
                    value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
                parameter.copy_(value)


def has_reference_adapter(model: Any) -> bool:
    """Whether a model has an adapter that is the reference of another."""
    return isinstance(model, PeftModel) and REFERENCE_ADAPTER in model.peft_config


def _reference_adapter(policy: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in policy.named_parameters() if REFERENCE_ADAPTER in name.split(".")}


def _trained_adapter(policy: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained, in the order of the reference's."""
    parameters = dict(policy.named_parameters())
    names = (name.split(".") for name in _reference_adapter(policy))
    return [parameters[".".join("default" if part == REFERENCE_ADAPTER else part for part in name)] for name in names]


def _gathered(parameters: dict[str, nn.Parameter]) -> contextlib.AbstractContextManager:
    """Within, parameters that ZeRO-3 partitions are whole; what was written to them is kept."""
    if not is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters.values()), modifier_rank=0)


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return value.detach().cpu().clone().contiguous()
