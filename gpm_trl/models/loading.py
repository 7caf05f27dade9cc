"""Loading of what is there: a saved GPM, an adapter, a released checkpoint, or a causal LM, which gets new heads."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from accelerate.utils import patch_environment
from safetensors import safe_open
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.integrations import deepspeed, is_fsdp_enabled
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    find_adapter_config_file,
    has_file,
    logging,
)

from .configuration_gpm import GPM_FIELDS, GPMModelConfig, merge_renderers
from .modeling_gpm import HEAD_NAMES, GPMForPreference, abbreviate, load_whole, reading_weights

logger = logging.get_logger(__name__)

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
PEFT_PREFIX = "base_model.model."  # of the names of an adapter's weights
CLASSIFIER = "ForSequenceClassification"
# The authors' checkpoints are causal LMs with these heads more, (2k, hidden) and (k, hidden).
EMBEDDING_HEAD, SCALE_GATE = "value_head.weight", "prompt_head.weight"
RELEASED_KEY_MAPPING = {r"^value_head\.": "embedding_head.", r"^prompt_head\.": "scale_gate."}
# What their example does with texts; 4096 is its `max_length`.
RELEASED_RENDERER = {"max_length": 4096, "long_rows": "truncate_end", "convention": "released"}


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments of a `from_pretrained` that say where on the Hub a model is."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}


def _find(name_or_path: str | os.PathLike, file: str, hub_kwargs: dict[str, Any]) -> str | None:
    """The path of a file of a model, downloaded if need be; `None` if there is no such file."""
    return cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False, **hub_kwargs)


def load(model_class: type, name_or_path: str | os.PathLike, *args, **kwargs) -> Any:
    """[`GPMForPreference.from_pretrained`], where the arguments are described."""
    wants_loading_info, is_trainable = kwargs.pop("output_loading_info", False), kwargs.pop("is_trainable", False)
    if is_adapter(name_or_path, hub_arguments(kwargs)):
        kwargs.pop("adapter_kwargs", None)  # of `AutoModel`
        model, info = load_adapter(model_class, name_or_path, is_trainable, **kwargs)
    else:
        model, info, has_new_heads = load_model(model_class, name_or_path, *args, **kwargs)
        if has_new_heads:
            gate = f"a {model.config.gate_activation} scale gate" if model.config.use_scale_gate else "no scale gate"
            width = model.config.reward_dim + model.config.embedding_dim
            logger.warning(
                f"{name_or_path} is no general preference model: its backbone got a new embedding head of {width} "
                f"dimensions and {gate} ({model.config.kind}). Train it before use."
            )
    return (model, info) if wants_loading_info else model


def load_model(
    model_class: type, name_or_path: str | os.PathLike, *args, config: Any = None, **kwargs
) -> tuple[nn.Module, dict, bool]:
    """A model, transformers' account of the loading, and whether its heads are new. Not for adapters."""
    kwargs["trust_remote_code"] = trust = bool(kwargs.get("trust_remote_code"))  # None asks on the terminal
    hub_kwargs = hub_arguments(kwargs)
    if not isinstance(config, PreTrainedConfig):
        config = AutoConfig.from_pretrained(config or name_or_path, trust_remote_code=trust, **hub_kwargs)
    gpm_fields = {name: kwargs.pop(name) for name in list(kwargs) if name in GPM_FIELDS}
    # By its type, since a checkpoint's own code is another class.
    of_causal_lm, has_new_heads = config.model_type != GPMModelConfig.model_type, False
    if of_causal_lm:
        if config.get_text_config() is not config:
            raise ValueError(
                f"{name_or_path} is a {config.model_type} model of several parts: save its decoder of text on its own."
            )
        released = read_released_fields(name_or_path, hub_kwargs)
        has_new_heads = released is None
        if os.path.isdir(name_or_path):
            config.name_or_path = ""  # `text_config` is saved with it, and a local path is nobody else's business
        text_config = _with_own_code(config, name_or_path, trust, hub_kwargs)
        config = GPMModelConfig.from_dict({"text_config": text_config, **(released or {})}, **gpm_fields)
        # A causal LM may call its backbone otherwise (`transformer.*` in GPT-2).
        prefix = MODEL_MAPPING[type(config.text_config)].base_model_prefix
        renamed = {} if prefix in ("", "model") else {rf"^{prefix}\.": "model."}
        kwargs.setdefault("key_mapping", {**renamed, **RELEASED_KEY_MAPPING})
    elif gpm_fields:
        if config.learn_temperature and gpm_fields.get("temperature", config.temperature) != config.temperature:
            raise ValueError(f"`temperature` would be ignored: {name_or_path} has a learned one. Leave it out.")
        config = GPMModelConfig.from_dict(config.to_dict(), **gpm_fields)
    config.text_config = _with_own_code(config.text_config, name_or_path, trust, hub_kwargs)
    kwargs |= {"config": config, "of_causal_lm": of_causal_lm, "new_heads": has_new_heads}
    model, info = load_whole(super(GPMForPreference, model_class).from_pretrained, name_or_path, *args, **kwargs)
    if is_fsdp_enabled():
        leave_meta_device(model)
    if of_causal_lm:
        model._weight_conversions = None  # or saving would undo the key mapping, and write a causal LM's names
    return model, info, has_new_heads


def _with_own_code(config: Any, name: str | os.PathLike, trust: bool, hub_kwargs: dict[str, Any]) -> PreTrainedConfig:
    """A backbone's configuration, by the checkpoint's own code if that is trusted; `AutoModel` then knows it."""
    code = getattr(config, "auto_map", None) or {}
    if trust and "AutoConfig" in code and type(config)._auto_class is None:
        config_class = get_class_from_dynamic_module(code["AutoConfig"], name, **hub_kwargs)
        config_class.register_for_auto_class()
        config = config_class.from_dict(config.to_dict())
    if type(config) in MODEL_MAPPING:
        return config
    reference = code.get("AutoModel") or code.get("AutoModelForCausalLM")
    if not trust or reference is None:
        raise ValueError(
            f"The backbone of {name} has code of its own: read it, and run it by `trust_remote_code=True`. It "
            "must be an `AutoModel` or `AutoModelForCausalLM` in `auto_map`."
        )
    with torch.device("meta"):
        backbone = get_class_from_dynamic_module(reference, name, **hub_kwargs)(config).base_model
    backbone.register_for_auto_class("AutoModel")
    AutoModel.register(type(config), type(backbone), exist_ok=True)
    return config


def check_saved(name_or_path: str | os.PathLike) -> None:
    """Raise `OSError` for the output directory of a run that has saved nothing but checkpoints; it names the last."""
    is_empty = os.path.isdir(name_or_path) and not {"config.json", "adapter_config.json"} & {*os.listdir(name_or_path)}
    if is_empty and (checkpoint := get_last_checkpoint(name_or_path)):
        raise OSError(f"{name_or_path} has no model, but checkpoints of one: name one of these, say {checkpoint}.")


def is_adapter(name_or_path: str | os.PathLike, hub_kwargs: dict[str, Any]) -> bool:
    """Whether a directory or a repository of the Hub holds a PEFT adapter."""
    check_saved(name_or_path)
    return find_adapter_config_file(name_or_path, **hub_kwargs) is not None


class Adapter(NamedTuple):
    """A PEFT adapter: its name, directory and weights' names; its base, and whether that is a reward model's."""

    name: str | os.PathLike
    directory: str
    weights: frozenset[str]
    base: str
    base_kwargs: dict[str, Any]
    base_config: PreTrainedConfig
    of_reward_model: bool


def read_adapter(name_or_path: str | os.PathLike, trust: bool, hub_kwargs: dict[str, Any]) -> Adapter:
    """
    An adapter of a preference model, a reward model or a policy. Its base is in the revision that it names, or else
    that of `hub_kwargs`, if it is not the adapter's.

    Raises:
        ValueError: If the weights are damaged or a pickle, or the adapter names no base that is a model; `OSError` if
            the base is not there.
    """
    from peft import PeftConfig  # slow to import

    weights = _find(name_or_path, ADAPTER_SAFE_WEIGHTS_NAME, hub_kwargs)
    if weights is None:  # PEFT would fall back to a pickle
        raise ValueError(f"The adapter {name_or_path} has no {ADAPTER_SAFE_WEIGHTS_NAME}: save it anew.")
    with reading_weights(name_or_path), safe_open(weights, framework="pt") as file:
        names = frozenset(name.removeprefix(PEFT_PREFIX) for name in file.keys())  # noqa: SIM118 (it is no mapping)
    directory = os.path.dirname(weights)
    config = PeftConfig.from_pretrained(directory)
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(f"{name_or_path} names no base model in its adapter_config.json: put it on the base.")
    base_kwargs = {name: value for name, value in hub_kwargs.items() if name != "subfolder"}
    base_kwargs["revision"] = config.revision or (base_kwargs.get("revision") if os.path.isdir(name_or_path) else None)
    try:
        if is_adapter(base, base_kwargs):  # transformers would put it on the base before this one
            raise ValueError(
                f"The base model of the adapter {name_or_path} is {base}, where an adapter is, too: move the files of "
                "the adapter, and of a preference model's also config.json, to a directory of their own."
            )
        base_config = AutoConfig.from_pretrained(base, trust_remote_code=trust, **base_kwargs)
    except OSError as error:
        raise OSError(
            f"The base model of the adapter {name_or_path} is {base}, by its adapter_config.json, and cannot be "
            f"loaded (a directory's name is relative to where the program runs): {error}"
        ) from error
    scored = config.task_type == "SEQ_CLS" or "score.weight" in names or CLASSIFIER in str(base_config.architectures)
    return Adapter(name_or_path, directory, names, base, base_kwargs, base_config, scored)


def put_adapter(base: nn.Module, adapter: Adapter, is_trainable: bool = False) -> nn.Module:
    """The [`~peft.PeftModel`] of an adapter on its base; raises `ValueError` if it does not fit, or lacks a weight."""
    from peft import PeftModel, get_peft_model_state_dict

    try:
        model = PeftModel.from_pretrained(base, adapter.directory, is_trainable=is_trainable)
        names = get_peft_model_state_dict(model, save_embedding_layers=False)
    except KeyError as error:  # a weight of `modules_to_save`
        _check_weights(adapter, (str(name).removeprefix(PEFT_PREFIX) for name in error.args))
        raise
    except RuntimeError as error:  # of `load_state_dict`, a line for each weight
        raise ValueError(f"{adapter.name} does not fit its base model: {' '.join(str(error).split())}") from error
    _check_weights(adapter, (name.removeprefix(PEFT_PREFIX) for name in names))
    return model


def _check_weights(adapter: Adapter, needed: Iterable[str]) -> None:
    missing = sorted(set(needed) - adapter.weights)
    if missing:
        raise ValueError(
            f"{adapter.name} lacks {abbreviate(missing)}: the adapter was saved in part, or trained without the heads "
            "in `modules_to_save`. If it is one of a causal LM, merge it first (`merge_and_unload` of `PeftModel`)."
        )


def load_adapted(
    from_pretrained: Callable, name_or_path: str | os.PathLike, is_trainable: bool = False, **kwargs
) -> nn.Module:
    """What a `from_pretrained` loads, with all its weights; of an adapter, the [`~peft.PeftModel`] on its base."""
    hub_kwargs = hub_arguments(kwargs)
    if not is_adapter(name_or_path, hub_kwargs):
        return load_whole(from_pretrained, name_or_path, **kwargs)[0]
    adapter = read_adapter(name_or_path, kwargs["trust_remote_code"], hub_kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in hub_kwargs} | adapter.base_kwargs
    base, _ = load_whole(from_pretrained, adapter.base, replaced=adapter.weights, **kwargs)
    return put_adapter(base, adapter, is_trainable)


def load_reward_model(name_or_path: str | os.PathLike, config: PreTrainedConfig, **kwargs) -> nn.Module:
    """A sequence classifier, or a [`~peft.PeftModel`] of one, with the configuration that [`load_config`] gives."""
    return load_adapted(
        AutoModelForSequenceClassification.from_pretrained, name_or_path, config=config, **kwargs
    ).eval()


def load_config(name_or_path: str | os.PathLike, trust_remote_code: bool = False, **hub_kwargs) -> PreTrainedConfig:
    """The configuration of a model that [`PreferenceScorer`] takes; raises `ValueError` for another's."""
    of_adapter = is_adapter(name_or_path, hub_kwargs)
    if not of_adapter or _find(name_or_path, "config.json", hub_kwargs):
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **hub_kwargs)
        if isinstance(config, GPMModelConfig):
            return config
    if of_adapter:
        adapter = read_adapter(name_or_path, trust_remote_code, hub_kwargs)
        if {"score.lora_A.weight", "score.lora_B.weight"} & adapter.weights and not adapter.of_reward_model:
            raise ValueError(
                f"{name_or_path} adapts a reward head that was new and is not saved: train it again with "
                "`modules_to_save=['score']` or `task_type='SEQ_CLS'`."
            )
        if not adapter.of_reward_model:
            raise ValueError(
                f"{name_or_path} is an adapter without the config.json that GPMTrainer writes: merge it, or load it "
                "by `GPMForPreference.from_pretrained` with what it was trained with (`embedding_dim`, ...)."
            )
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **hub_kwargs)
        # `trl.RewardTrainer` sets both, and saves neither.
        adapter.base_config.update({"num_labels": 1, "pad_token_id": tokenizer.pad_token_id})
        return adapter.base_config
    refuse_pickles(name_or_path, hub_kwargs)
    architecture = (config.architectures or ["a model without a named class"])[0]
    if not architecture.endswith(CLASSIFIER):
        released = read_released_fields(name_or_path, hub_kwargs)
        if released is not None:
            return GPMModelConfig(text_config=config, **released)
    check_reward_model(config, architecture, name_or_path)
    return config


def check_reward_model(config: PreTrainedConfig, architecture: str, name: str | os.PathLike) -> None:
    """Raise `ValueError` unless the model is a sequence classifier with one label."""
    if not architecture.endswith(CLASSIFIER):
        raise ValueError(
            f"{name} is {architecture} (model type {config.model_type}), neither a general preference model nor a "
            "reward model: train one from it, by `gpm-trl gpm` or `GPMTrainer`."
        )
    if config.num_labels != 1:
        raise ValueError(f"{name} has {config.num_labels} labels, but a reward model has one: the reward.")


def load_adapter(
    model_class: type, name_or_path: str | os.PathLike, is_trainable: bool, config: Any = None, **kwargs
) -> tuple[nn.Module, dict]:
    """
    An adapter of a GPM on the base that it names, and transformers' account of loading the base. `config`, by default
    the `config.json` beside the adapter, stands in for all settings of the base, how texts are rendered included.
    """
    hub_kwargs = hub_arguments(kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in hub_kwargs}
    dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
    if dtype not in (None, "auto"):  # else that of the settings
        kwargs["dtype"] = dtype
    adapter = read_adapter(name_or_path, bool(kwargs.get("trust_remote_code")), hub_kwargs)
    if not isinstance(config, PreTrainedConfig) and (config or _find(name_or_path, "config.json", hub_kwargs)):
        config = AutoConfig.from_pretrained(config or name_or_path, trust_remote_code=False, **hub_kwargs)
    settings = {}
    if config is not None and config.model_type == GPMModelConfig.model_type:
        settings = {name: getattr(config, name) for name in GPM_FIELDS}
        if config.dtype is not None:
            settings["dtype"] = config.dtype
        # The convention is said even where it is the default, or the base's would be kept.
        settings["renderer"] = merge_renderers({"convention": "gpm", **config.renderer}, kwargs.pop("renderer", None))
    elif config is not None or adapter.of_reward_model:
        raise ValueError(
            f"{name_or_path} is an adapter of a {config.model_type if config else 'Bradley-Terry model'}, not of a "
            "GPM: merge it (a Bradley-Terry model's by `gpm-trl merge`, else by `merge_and_unload` of `PeftModel`), "
            "and load that model."
        )
    base, info, has_new_heads = load_model(model_class, adapter.base, **adapter.base_kwargs, **settings | kwargs)
    _check_weights(adapter, (name for name in base.state_dict() if has_new_heads and name.startswith(HEAD_NAMES)))
    if has_new_heads and not settings and "embedding_dim" not in kwargs:
        raise ValueError(
            f"{name_or_path} lacks the config.json that describes the adapter's heads, and its base has none: pass "
            "`embedding_dim`, `temperature` and what else the model was trained with."
        )
    return put_adapter(base, adapter, is_trainable).eval(), info


def read_released_fields(name_or_path: str | os.PathLike, hub_kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """
    Fields of [`GPMModelConfig`] for a checkpoint of the authors' layout: a causal LM with `value_head.weight` and
    maybe `prompt_head.weight`, or, with one row in the former, a Bradley-Terry model. `None` for another. Only names
    and shapes are read; what else the authors' example sets is the default.

    Raises:
        ValueError: If the weights are damaged, or there as a pickle only, or the heads are of other shapes.
    """
    single, index = (_find(name_or_path, file, hub_kwargs) for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    files = dict.fromkeys((EMBEDDING_HEAD, SCALE_GATE), single)
    if single is None and index is None:
        refuse_pickles(name_or_path, hub_kwargs)
        return None
    if single is None:
        with open(index, encoding="utf-8") as file:
            shards = json.load(file).get("weight_map", {})
        files = {head: cached_file(name_or_path, shards[head], **hub_kwargs) for head in files if head in shards}
    shapes = {}
    for head, path in files.items():
        with reading_weights(name_or_path), safe_open(path, framework="pt") as weights:
            if single is None or head in weights.keys():  # noqa: SIM118 (it is no mapping)
                shapes[head] = weights.get_slice(head).get_shape()
    if not shapes:
        return None
    # A head that is missing is told by the strict loading.
    gated, hidden = SCALE_GATE in shapes, next(iter(shapes.values()))[-1]
    width = 2 * shapes[SCALE_GATE][0] if gated else shapes[EMBEDDING_HEAD][0]
    is_reward = shapes == {EMBEDDING_HEAD: [1, hidden]}
    if shapes.get(EMBEDDING_HEAD, [width, hidden]) != [width, hidden] or (width % 2 and not is_reward):
        raise ValueError(
            f"{name_or_path} has heads of the shapes {shapes}: the authors' have 2k rows in {EMBEDDING_HEAD} and, "
            f"with a gate, k in {SCALE_GATE}; or one row, the reward of a Bradley-Terry model, in the former alone."
        )
    widths = {"reward_dim": 1, "embedding_dim": 0} if is_reward else {"embedding_dim": width}
    # tau = 0.1 is that of their losses, also of a Bradley-Terry model's.
    return {**widths, "use_scale_gate": gated, "temperature": 0.1, "renderer": {**RELEASED_RENDERER}}


def refuse_pickles(name_or_path: str | os.PathLike, hub_kwargs: dict[str, Any]) -> None:
    """Raise `ValueError` for a checkpoint without safetensors that has its weights as a pickle."""
    where = {name: value for name, value in hub_kwargs.items() if name not in ("force_download", "subfolder")}
    subfolder = hub_kwargs.get("subfolder") or ""
    files = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    found = next((file for file in files if has_file(name_or_path, os.path.join(subfolder, file), **where)), None)
    if found in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        raise ValueError(
            f"{name_or_path} has its weights in {found}, a pickle, which can run any code and is never loaded: take a "
            "revision with safetensors, or make them, where that does no harm, by `safetensors.torch.save_file("
            "torch.load('pytorch_model.bin', weights_only=True), 'model.safetensors', {'format': 'pt'})`."
        )


def leave_meta_device(model: nn.Module) -> None:
    """
    Give new weights that are on the meta device room on the CPU. Under FSDP, transformers leaves them there on all
    processes but the first, whose weights the others get; but accelerate tells weights apart by their address, so that
    two without one are the same to it, and the optimizers of the processes differ.
    """
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            module, _, own_name = name.rpartition(".")
            empty = nn.Parameter(torch.zeros_like(parameter, device="cpu"), parameter.requires_grad)
            setattr(model.get_submodule(module), own_name, empty)


@contextlib.contextmanager
def whole_models() -> Iterator[None]:
    """
    Within, `from_pretrained` returns whole models on all ranks: transformers neither partitions them, as it does under
    ZeRO-3, nor leaves their weights to the main process, as under FSDP.
    """
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
            yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference
