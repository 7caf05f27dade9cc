"""
Adapters: a base model, the adapter trained on it, and the heads saved in the adapter.

This file travels with every saved model, to load it where gpm_trl is not installed: it imports nothing of the package.
"""

import os
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import cached_file, find_adapter_config_file

from .checkpoint_gpm import HEAD_NAMES, abbreviate, reading_weights
from .configuration_gpm import GPM_FIELDS, GPMModelConfig, merge_renderers

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def is_adapter(name_or_path: str | os.PathLike, hub_kwargs: dict[str, Any]) -> bool:
    """Whether a directory or a repository of the Hub holds a PEFT adapter."""
    return find_adapter_config_file(name_or_path, **hub_kwargs) is not None


def of_base(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What of the arguments that load an adapter holds for its base, too."""
    return {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}


def load_adapter(
    model_class: type,
    name_or_path: str | os.PathLike,
    config: PreTrainedConfig | str | None,
    is_trainable: bool,
    hub_kwargs: dict[str, Any],
    **kwargs,
) -> tuple[nn.Module, dict]:
    """
    Load an adapter on the base model that it names.

    Args:
        model_class (`type`): [`GPMForPreference`].
        name_or_path (`str` or `os.PathLike`): Directory or Hub id of the adapter.
        config ([`GPMModelConfig`] or `str`, *optional*): Of the model that was trained, or where it is; defaults to
            the `config.json` beside the adapter, which [`GPMTrainer`] writes. It stands in for all settings of the
            base, how texts are rendered included.
        is_trainable (`bool`): Whether the adapter and the heads can be trained further.
        hub_kwargs (`dict`): Where the adapter is on the Hub. The base's revision is the one that the adapter names.
        kwargs: How the base model is loaded: fields of `config` to change, and transformers' arguments.

    Returns:
        A [`~peft.PeftModel`] of a [`GPMForPreference`], in evaluation mode, and transformers' account of loading the
        base.

    Raises:
        ValueError: If the adapter lacks a weight, or does not fit its base.
        OSError: If the adapter or its base is not there.
    """
    try:
        from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ImportError(f"{name_or_path} is an adapter, which needs peft: `pip install peft`.") from error

    # PEFT falls back to a pickle where there is no such file.
    weights = cached_file(name_or_path, "adapter_model.safetensors", **hub_kwargs)
    directory = os.path.dirname(weights)
    with reading_weights(name_or_path), safe_open(weights, framework="pt") as file:
        saved = set(file.keys())
    peft_config = PeftConfig.from_pretrained(directory)
    settings = _settings(name_or_path, config, hub_kwargs)
    if settings and kwargs.get("renderer"):
        kwargs["renderer"] = merge_renderers(settings["renderer"], kwargs["renderer"])
    earlier_name = kwargs.pop("torch_dtype", None)
    dtype = kwargs.pop("dtype", None) or earlier_name
    if dtype not in (None, "auto"):  # else that of the settings
        kwargs["dtype"] = dtype
    base, info, new_heads = _load_base(model_class, name_or_path, peft_config, hub_kwargs, {**settings, **kwargs})
    if new_heads and not settings:
        _check_described(name_or_path, peft_config.base_model_name_or_path, saved, "embedding_dim" in kwargs)
    heads = HEAD_NAMES if new_heads else tuple(set(HEAD_NAMES) & set(peft_config.modules_to_save or ()))
    _check_weights(
        {f"base_model.model.{name}" for name in base.state_dict() if name.startswith(heads)}, saved, name_or_path
    )
    try:
        model = PeftModel.from_pretrained(base, directory, is_trainable=is_trainable, config=peft_config)
    except RuntimeError as error:  # of `load_state_dict`, a line for each weight
        raise ValueError(f"{name_or_path} does not fit its base model: {' '.join(str(error).split())}") from error
    _check_weights(set(get_peft_model_state_dict(model, save_embedding_layers=False)), saved, name_or_path)
    return model.eval(), info


def _check_described(name_or_path: str | os.PathLike, base: str, saved: set[str], by_hand: bool) -> None:
    """Raise `ValueError` unless an adapter without a `config.json`, of a causal LM, has heads that are described."""
    if not any(name.startswith(tuple(f"base_model.model.{head}" for head in HEAD_NAMES)) for name in saved):
        raise ValueError(
            f"{name_or_path} is an adapter of {base}, and neither has heads: it is one of a causal LM, not of a "
            "general preference model. Merge it first (`merge_and_unload` of `PeftModel`), save the model with its "
            "tokenizer, and load that."
        )
    if not by_hand:
        raise ValueError(
            f"{name_or_path} is an adapter of {base}, which has no heads, and lacks the config.json that describes "
            "the adapter's: pass `embedding_dim`, `temperature` and what else the model was trained with."
        )


def _check_weights(needed: set[str], saved: set[str], name_or_path: str | os.PathLike) -> None:
    missing = sorted(name.removeprefix("base_model.model.") for name in needed - saved)
    if missing:
        raise ValueError(
            f"{name_or_path} lacks {abbreviate(missing)}: the adapter was saved in part, or trained without the heads "
            "in its `modules_to_save`."
        )


def _settings(
    name_or_path: str | os.PathLike, config: PreTrainedConfig | str | None, hub_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The fields of a GPM's configuration and the dtype of its backbone, as saved beside an adapter."""
    if config is None:
        if cached_file(name_or_path, "config.json", _raise_exceptions_for_missing_entries=False, **hub_kwargs) is None:
            return {}
        config = name_or_path
    if not isinstance(config, PreTrainedConfig):
        config = AutoConfig.from_pretrained(config, trust_remote_code=False, **hub_kwargs)
    if config.model_type != GPMModelConfig.model_type:
        raise ValueError(
            f"{name_or_path} is, by its config.json, an adapter of a {config.model_type}, not of a GPM: merge it with "
            "its base first (`merge_and_unload` of `PeftModel`), and load that model."
        )
    settings = {name: getattr(config, name) for name in GPM_FIELDS}
    # Said even where it is the default, or the base's would be kept: the model was trained with texts of this one.
    settings["renderer"] = {"convention": "gpm", **config.renderer}
    return {**settings, "dtype": config.dtype} if config.dtype is not None else settings


def _load_base(
    model_class: type,
    name_or_path: str | os.PathLike,
    peft_config: Any,
    hub_kwargs: dict[str, Any],
    kwargs: dict[str, Any],
) -> tuple[nn.Module, dict, bool]:
    """The base model of an adapter, transformers' account of the loading, and whether the heads are new."""
    base = peft_config.base_model_name_or_path
    if not base:
        raise ValueError(
            f"{name_or_path} is an adapter that names no base model in its adapter_config.json: load the base by "
            "`GPMForPreference.from_pretrained`, and the adapter by `PeftModel.from_pretrained(base, ...)`."
        )
    hub_kwargs = {**of_base(hub_kwargs), "revision": peft_config.revision}
    try:
        if is_adapter(base, hub_kwargs):  # which transformers would put on the base before this one
            raise ValueError(
                f"The base model of the adapter {name_or_path} is {base}, where an adapter is, too: move its "
                "adapter_config.json and adapter_model.safetensors to a directory of their own, its config.json with "
                "them, and put the base's config.json back."
            )
        return model_class._load(base, None, **hub_kwargs, **kwargs)
    except OSError as error:
        raise OSError(
            f"The base model of the adapter {name_or_path} is {base}, by its adapter_config.json, and cannot be "
            f"loaded (a directory's name is relative to where the program runs): {error}"
        ) from error
