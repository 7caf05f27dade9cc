"""
The authors' released checkpoints: recognised by the names of their heads, described by the heads' shapes.

This file travels with every saved model, to load it where gpm_trl is not installed: it imports nothing of the package.
"""

import json
import os
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    has_file,
)

from .checkpoint_gpm import reading_weights

EMBEDDING_HEAD = "value_head.weight"
SCALE_GATE = "prompt_head.weight"
RELEASED_KEY_MAPPING = {r"^value_head\.": "embedding_head.", r"^prompt_head\.": "scale_gate."}

# What the authors' example does with texts; 4096 is its `max_length`.
RELEASED_RENDERER = {"max_length": 4096, "long_rows": "truncate_end", "convention": "released"}


def read_released_fields(
    name_or_path: str | os.PathLike, config: PreTrainedConfig, hub_kwargs: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """
    How a checkpoint of the authors' layout is used: that of a causal LM, with `value_head.weight`, `(2k, hidden)`,
    and, if it has a gate, `prompt_head.weight`, `(k, hidden)`, beside the backbone's weights.

    Only names and shapes are read, from a directory or from the files that a later load takes from the Hub's cache.

    Args:
        name_or_path (`str` or `os.PathLike`): Directory or Hub id.
        config ([`~transformers.PreTrainedConfig`]): The checkpoint's.
        hub_kwargs (`dict`, *optional*): `revision`, `token`, `cache_dir`, ...

    Returns:
        `dict` or `None`: Fields of [`GPMModelConfig`], all that the authors' example sets; `None` for a checkpoint
        without such heads.

    Raises:
        ValueError: If a head is missing or has another shape, or the weights are there as a pickle only.

    Example:

    ```python
    >>> from transformers import AutoConfig
    >>> from gpm_trl.models.released import read_released_fields
    >>> name = "general-preference/GPM-Gemma-2B"
    >>> read_released_fields(name, AutoConfig.from_pretrained(name))["embedding_dim"]  # doctest: +SKIP
    6

    ```
    """
    shapes = _head_shapes(name_or_path, hub_kwargs or {})
    if not shapes:
        return None
    if EMBEDDING_HEAD not in shapes:
        raise ValueError(
            f"{name_or_path} has `{SCALE_GATE}`, but not the `{EMBEDDING_HEAD}` that the authors' checkpoints have "
            "beside it: it is incomplete, so download it again."
        )
    num_blocks = max((shapes[EMBEDDING_HEAD][0] + 1) // 2, 1)
    expected = {
        EMBEDDING_HEAD: [2 * num_blocks, config.hidden_size],
        SCALE_GATE: [num_blocks, config.hidden_size],
    }
    for head, shape in shapes.items():
        if shape != expected[head]:
            raise ValueError(
                f"`{head}` of {name_or_path} has the shape {shape}, expected {expected[head]}: the heads of the "
                f"authors' checkpoints are (2k, hidden) and (k, hidden), with the backbone's hidden = "
                f"{config.hidden_size}. Download it again, or take a checkpoint of a general preference model."
            )
    return {
        "embedding_dim": 2 * num_blocks,
        "use_scale_gate": SCALE_GATE in shapes,
        "gate_activation": "softmax",
        "normalize_embeddings": True,
        "temperature": 0.1,
        "renderer": {**RELEASED_RENDERER},
    }


def _head_shapes(name_or_path: str | os.PathLike, hub_kwargs: dict[str, Any]) -> dict[str, list[int]]:
    """The shapes of the released heads that a checkpoint has, by name."""

    def find(file: str) -> str | None:
        return cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False, **hub_kwargs)

    single = find(SAFE_WEIGHTS_NAME)
    if single is not None:
        files = dict.fromkeys((EMBEDDING_HEAD, SCALE_GATE), single)
    else:
        index = find(SAFE_WEIGHTS_INDEX_NAME)
        if index is None:
            refuse_pickles(name_or_path, hub_kwargs)
            return {}
        with open(index, encoding="utf-8") as file:
            shards = json.load(file).get("weight_map", {})
        files = {
            head: cached_file(name_or_path, shards[head], **hub_kwargs)
            for head in (EMBEDDING_HEAD, SCALE_GATE)
            if head in shards
        }
    shapes = {}
    for head, path in files.items():
        with reading_weights(name_or_path), safe_open(path, framework="pt") as weights:
            if head in weights.keys():  # noqa: SIM118 (it is no mapping)
                shapes[head] = list(weights.get_slice(head).get_shape())
            elif single is None:
                raise ValueError(
                    f"{name_or_path} lacks `{head}`, which its index says is in {os.path.basename(path)}."
                )
    return shapes


def refuse_pickles(name_or_path: str | os.PathLike, hub_kwargs: dict[str, Any]) -> None:
    """Raise `ValueError` for a checkpoint without safetensors that has its weights as a pickle."""
    where = {name: value for name, value in hub_kwargs.items() if name not in ("force_download", "subfolder")}

    def exists(file: str) -> bool:
        return has_file(name_or_path, os.path.join(hub_kwargs.get("subfolder") or "", file), **where)

    if exists(SAFE_WEIGHTS_NAME) or exists(SAFE_WEIGHTS_INDEX_NAME):
        return
    for file in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        if exists(file):
            raise ValueError(
                f"{name_or_path} has its weights in {file}, a pickle, which can run any code and is never loaded: "
                f"take a revision with safetensors, or make them, where that does no harm, by `save_file(torch.load("
                f"'{WEIGHTS_NAME}', weights_only=True), '{SAFE_WEIGHTS_NAME}', metadata={{'format': 'pt'}})` of "
                "`safetensors.torch`."
            )
