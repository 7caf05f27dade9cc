"""Loading of what is there: a saved GPM, an adapter, a released checkpoint, or a causal LM, which gets new heads."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import patch_environment
from safetensors import safe_open
from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedConfig
from transformers.integrations import deepspeed, is_fsdp_enabled
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
from .modeling_gpm import HEAD_NAMES, abbreviate, reading_weights

logger = logging.get_logger(__name__)

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
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
            heads = f"embedding head of {model.config.embedding_dim} dimensions and {gate}"
            logger.warning(
                f"{name_or_path} is no general preference model: its backbone got a new "
                f"{'reward head (Bradley-Terry)' if model.config.bradley_terry else heads}. Train it before use."
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
        if released is not None:
            renderer = merge_renderers(released["renderer"], gpm_fields.get("renderer"))
            gpm_fields = {**released, **gpm_fields, "renderer": renderer}
        if os.path.isdir(name_or_path):
            config.name_or_path = ""  # `text_config` is saved with it, and a local path is nobody else's business
        config = GPMModelConfig(text_config=config, **gpm_fields)
        # A causal LM may call its backbone otherwise (`transformer.*` in GPT-2).
        prefix = MODEL_MAPPING[type(config.text_config)].base_model_prefix
        renamed = {} if prefix in ("", "model") else {rf"^{prefix}\.": "model."}
        kwargs.setdefault("key_mapping", {**renamed, **RELEASED_KEY_MAPPING})
    elif gpm_fields:
        config = GPMModelConfig.from_dict(config.to_dict(), **gpm_fields)
    kwargs |= {"config": config, "of_causal_lm": of_causal_lm, "new_heads": has_new_heads}
    model, info = model_class._from_checkpoint(name_or_path, *args, **kwargs)
    if is_fsdp_enabled():
        leave_meta_device(model)
    if of_causal_lm:
        model._weight_conversions = None  # or saving would undo the key mapping, and write a causal LM's names
    return model, info, has_new_heads


def is_adapter(name_or_path: str | os.PathLike, hub_kwargs: dict[str, Any]) -> bool:
    """Whether a directory or a repository of the Hub holds a PEFT adapter."""
    return find_adapter_config_file(name_or_path, **hub_kwargs) is not None


def read_adapter(
    name_or_path: str | os.PathLike, hub_kwargs: dict[str, Any]
) -> tuple[str, set[str], str, dict[str, Any]]:
    """
    The directory of an adapter, of a preference model or of a policy; the names of its weights; its base; and where on
    the Hub that is: in the revision that the adapter names, or else that of `hub_kwargs`, if it is not the adapter's.

    Raises:
        ValueError: If the weights are damaged or a pickle, or the adapter names no base that is a model.
    """
    from peft import PeftConfig  # slow to import

    weights = _find(name_or_path, ADAPTER_SAFE_WEIGHTS_NAME, hub_kwargs)
    if weights is None:  # PEFT would fall back to a pickle
        raise ValueError(f"The adapter {name_or_path} has no {ADAPTER_SAFE_WEIGHTS_NAME}: save it anew.")
    with reading_weights(name_or_path), safe_open(weights, framework="pt") as file:
        names = set(file.keys())
    directory = os.path.dirname(weights)
    config = PeftConfig.from_pretrained(directory)
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(
            f"The adapter {name_or_path} names no base model in its adapter_config.json: put it on the base yourself."
        )
    base_kwargs = {name: value for name, value in hub_kwargs.items() if name != "subfolder"}
    base_kwargs["revision"] = config.revision or (base_kwargs.get("revision") if os.path.isdir(name_or_path) else None)
    with contextlib.suppress(OSError):  # if there is no base: that is said when it is loaded
        if is_adapter(base, base_kwargs):  # transformers would put it on the base before this one
            raise ValueError(
                f"The base model of the adapter {name_or_path} is {base}, where an adapter is, too: move the files of "
                "the adapter, and of a preference model's also config.json, to a directory of their own."
            )
    return directory, names, base, base_kwargs


def load_adapter(
    model_class: type, name_or_path: str | os.PathLike, is_trainable: bool, config: Any = None, **kwargs
) -> tuple[nn.Module, dict]:
    """
    An adapter of a GPM on the base that it names, and transformers' account of loading the base. `config`, by default
    the `config.json` beside the adapter, stands in for all settings of the base, how texts are rendered included.
    """
    from peft import PeftModel, get_peft_model_state_dict

    hub_kwargs = hub_arguments(kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in hub_kwargs}
    dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
    if dtype not in (None, "auto"):  # else that of the settings
        kwargs["dtype"] = dtype
    directory, saved, base_name, base_kwargs = read_adapter(name_or_path, hub_kwargs)
    settings = {}
    if config is not None or _find(name_or_path, "config.json", hub_kwargs):
        if not isinstance(config, PreTrainedConfig):
            config = AutoConfig.from_pretrained(config or name_or_path, trust_remote_code=False, **hub_kwargs)
        if config.model_type != GPMModelConfig.model_type:
            raise ValueError(
                f"{name_or_path} is an adapter of a {config.model_type}, not of a GPM: merge it (`merge_and_unload` "
                "of `PeftModel`), and load that model."
            )
        settings = {name: getattr(config, name) for name in GPM_FIELDS}
        if config.dtype is not None:
            settings["dtype"] = config.dtype
        # The convention is said even where it is the default, or the base's would be kept.
        settings["renderer"] = merge_renderers({"convention": "gpm", **config.renderer}, kwargs.pop("renderer", None))
    try:
        base, info, has_new_heads = load_model(model_class, base_name, **base_kwargs, **settings | kwargs)
    except OSError as error:
        raise OSError(
            f"The base model of the adapter {name_or_path} is {base_name}, by its adapter_config.json, and cannot "
            f"be loaded (a directory's name is relative to where the program runs): {error}"
        ) from error
    heads = {f"base_model.model.{name}" for name in base.state_dict() if has_new_heads and name.startswith(HEAD_NAMES)}
    _check_weights(heads, saved, name_or_path)
    if has_new_heads and not settings and "embedding_dim" not in kwargs:
        raise ValueError(
            f"{name_or_path} lacks the config.json that describes the adapter's heads, and its base has none: pass "
            "`embedding_dim`, `temperature` and what else the model was trained with."
        )
    try:
        model = PeftModel.from_pretrained(base, directory, is_trainable=is_trainable)
    except RuntimeError as error:  # of `load_state_dict`, a line for each weight
        raise ValueError(f"{name_or_path} does not fit its base model: {' '.join(str(error).split())}") from error
    _check_weights(set(get_peft_model_state_dict(model, save_embedding_layers=False)), saved, name_or_path)
    return model.eval(), info


def _check_weights(needed: set[str], saved: set[str], name_or_path: str | os.PathLike) -> None:
    missing = sorted(name.removeprefix("base_model.model.") for name in needed - saved)
    if missing:
        raise ValueError(
            f"{name_or_path} lacks {abbreviate(missing)}: the adapter was saved in part, or trained without the heads "
            "in `modules_to_save`. If it is one of a causal LM, merge it first (`merge_and_unload` of `PeftModel`)."
        )


def read_released_fields(name_or_path: str | os.PathLike, hub_kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """
    Fields of [`GPMModelConfig`] for a checkpoint of the authors' layout: a causal LM with `value_head.weight` and
    maybe `prompt_head.weight`. `None` for another. Only names and shapes are read; what else the authors' example sets
    is the default.

    Raises:
        ValueError: If the weights are damaged, or there as a pickle only.
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
    # A head that is missing or of another shape than the other's is told by the strict loading.
    gated = SCALE_GATE in shapes
    num_blocks = shapes[SCALE_GATE][0] if gated else max(shapes[EMBEDDING_HEAD][0] // 2, 1)
    return {"embedding_dim": 2 * num_blocks, "use_scale_gate": gated, "renderer": {**RELEASED_RENDERER}}


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
