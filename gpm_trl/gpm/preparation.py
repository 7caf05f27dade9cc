"""The model and the adapter that [`GPMTrainer`] is given, made ready for training."""

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging
from trl.trainer.utils import create_model_from_path

from ..data.renderer import check_token_ids, count_embeddings, within_context
from ..models import GPMForPreference, GPMModelConfig
from ..models.loading import hub_arguments
from ..models.modeling_gpm import HEAD_NAMES
from .config import GPMConfig

logger = logging.get_logger(__name__)


def loading_arguments(args: TrainingArguments, quantization_config: BitsAndBytesConfig | None) -> dict[str, Any]:
    """What TRL's trainers load a model of a name with."""
    init_kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if quantization_config is not None:
        if "quantization_config" in init_kwargs:
            raise ValueError("`quantization_config` is given twice, also in `args.model_init_kwargs`: keep one.")
        init_kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        init_kwargs["device_map"] = None
    return init_kwargs


def load_tokenizer(name: str | None, args: GPMConfig, is_named: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, from where the model is loaded if that is named; `ValueError` without a name."""
    if not name:
        raise ValueError("The model has no name to load a tokenizer by: pass `processing_class`.")
    given = loading_arguments(args, None) if is_named else {"trust_remote_code": args.trust_remote_code}
    return AutoTokenizer.from_pretrained(name, trust_remote_code=given["trust_remote_code"], **hub_arguments(given))


def load_model(name: str, args: GPMConfig, quantization_config: BitsAndBytesConfig | None) -> GPMForPreference:
    """The model of a name: a causal LM gets new heads, which the seed of `args` draws."""
    init_kwargs = loading_arguments(args, quantization_config)
    if args.sft_loss_coef > 0:
        init_kwargs["use_lm_head"] = True
    init_kwargs["is_trainable"] = True  # of an adapter
    set_seed(args.seed)
    return create_model_from_path(name, GPMForPreference, **args.model_settings(), **init_kwargs)


def checked_base(model: Any, args: GPMConfig) -> GPMForPreference:
    """The model without its adapter, if it is of the right class and `args` does not contradict it."""
    base = model.get_base_model() if is_peft_model(model) else model
    if not isinstance(base, GPMForPreference):
        raise TypeError(f"`model` is a {type(base).__name__}: pass a GPMForPreference, or a model's name.")
    for name, value in args.model_settings().items():
        if (own := getattr(base.config, name)) != value:
            raise ValueError(f"`{name}` is {value} in the config but {own} in the model: leave it out, or load it so.")
    if base.config.use_lm_head and not args.sft_loss_coef and not base.config.tie_word_embeddings:
        base.lm_head.requires_grad_(False)  # or DDP would wait for its gradient
    if args.sft_loss_coef > 0 and not base.config.use_lm_head:
        raise ValueError("`sft_loss_coef` needs a language-model head: load the model with `use_lm_head=True`.")
    return base


def check_base_is_elsewhere(base: GPMForPreference, output_dir: str) -> None:
    """Raise `ValueError` if an adapter or one of its checkpoints would be saved over the base that it needs."""
    name, directory = base.name_or_path, Path(output_dir).resolve()
    if name and Path(name).resolve() in (directory, *directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        raise ValueError(
            f"`output_dir` is {output_dir}, but the base model of the adapter is there ({name}): its config.json "
            "would be replaced, and neither could be loaded again. Choose another directory."
        )


def set_renderer(config: GPMModelConfig, args: GPMConfig, conversational: bool | None) -> None:
    """Save with the model how its texts are rendered from now on, and whether they are messages, if that is known."""
    convention = config.renderer.get("convention", "gpm")
    if convention != "gpm":
        logger.warning(f"This model's texts were rendered by the convention {convention!r}; from now on, by 'gpm'.")
    # An adapter's settings are merged into those of its base, so a base with another convention needs to hear of it.
    said = {"convention": "gpm"} if "convention" in config.renderer else {}
    said |= {} if conversational is None else {"conversational": conversational}
    max_length = within_context(args.max_length, config)
    if max_length != args.max_length:
        logger.warning(
            f"Rows have at most {max_length} tokens, the model's context; `max_length` is {args.max_length}"
        )
    config.renderer = {**said, "max_length": max_length, "long_rows": args.long_rows}


def check_pad_token(tokenizer: PreTrainedTokenizerBase, args: GPMConfig, base: GPMForPreference) -> None:
    """Raise `ValueError` for a pad token beyond the embedding; for one that is unknown, TRL does."""
    token = args.pad_token or tokenizer.pad_token or args.eos_token or tokenizer.eos_token
    index = None if token is None else tokenizer.convert_tokens_to_ids(token)
    if index is not None:
        check_token_ids([index], tokenizer, count_embeddings(base))


def prepare_peft_config(peft_config: PeftConfig, base: GPMForPreference, revision: str | None) -> PeftConfig:
    """A copy that trains the heads, too."""
    if peft_config.is_prompt_learning:
        raise ValueError(
            f"{type(peft_config).__name__} puts virtual tokens before the prompt, which moves its end: use LoRA, say."
        )
    peft_config = copy.deepcopy(peft_config)
    # PEFT's classes for task types expect what such a model has: a causal LM's generation, a classifier's labels.
    peft_config.task_type = None
    peft_config.revision = revision or peft_config.revision  # of the base, to load it by
    heads = [name for name in HEAD_NAMES if hasattr(base, name)]
    peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or []), *heads})
    if peft_config.target_modules is None and getattr(peft_config, "target_parameters", None) is None:
        logger.info('`peft_config` has no target modules: it gets "all-linear".')
        peft_config.target_modules = "all-linear"
    return peft_config


def _trained_heads(base: GPMForPreference) -> dict[str, list[nn.Parameter]]:
    heads = {name: getattr(base, name) for name in HEAD_NAMES if hasattr(base, name)}
    return {name: [weight for weight in head.parameters() if weight.requires_grad] for name, head in heads.items()}


def copied_heads(base: GPMForPreference) -> dict[str, list[torch.Tensor]]:
    """The weights of the heads that are trained, as they are given, for [`keep_heads_trainable`]."""
    return {name: [weight.detach().clone() for weight in own] for name, own in _trained_heads(base).items()}


def keep_heads_trainable(model: PeftModel, given: dict[str, list[torch.Tensor]]) -> None:
    """See to it that no head is frozen, and that heads beside a quantized backbone are what was given, in float32."""
    trained = _trained_heads(model.get_base_model())
    if getattr(model, "quantization_method", None) is not None:
        # The parent has rounded all trained weights to bfloat16, like QLoRA's authors.
        for name, weights in trained.items():
            for weight, value in zip(weights, given[name], strict=True):
                weight.data = value.to(weight.device)
    frozen = [name for name, weights in trained.items() if not weights]
    if frozen:
        raise ValueError(f"The adapter leaves {' and '.join(frozen)} frozen: make it with `modules_to_save={frozen}`.")
