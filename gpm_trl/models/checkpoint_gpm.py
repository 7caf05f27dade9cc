"""
What the weights of a checkpoint are checked for, and files that get their names when they are whole.

This file travels with every saved model, to load it where gpm_trl is not installed: it imports nothing of the package.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, PreTrainedConfig

HEAD_NAMES = ("embedding_head", "scale_gate", "learned_temperature")
WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
PARTIAL = "_saving-"  # the Hub's uploads of a trainer leave out what begins so


def causal_lm_key_mapping(text_config: PreTrainedConfig) -> dict[str, str]:
    """How the backbone's weights are called in a causal LM (`transformer.*` in GPT-2) -> how they are called here."""
    prefix = AutoModel._model_mapping[type(text_config)].base_model_prefix
    return {} if prefix in ("", "model") else {rf"^{prefix}\.": "model."}


@contextmanager
def reading_weights(name_or_path: str | os.PathLike) -> Iterator[None]:
    """Name the checkpoint if its weights are not what safetensors wrote."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{name_or_path} has a damaged weight file ({error}): it was cut off, or is not in the safetensors "
            "format. Save or download it again."
        ) from error


def check_loading_info(info: dict, name_or_path: str | os.PathLike) -> None:
    """Raise `ValueError` for a checkpoint that lacks weights, or has them in another shape or to no use."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{name_or_path} lacks {abbreviate(missing)}: the checkpoint is incomplete, or was saved with other "
            "settings (`use_scale_gate`, `learn_temperature`, `use_lm_head`) than it is loaded with. For new heads on "
            "a causal LM, pass the settings as keyword arguments, without `config`."
        )
    empty = sorted(name for name, found, _ in info["mismatched_keys"] if 0 in found)
    if empty:
        raise ValueError(
            f"{name_or_path} has weights without values: {abbreviate(empty)}. ZeRO-3 leaves such where a model is "
            "saved without gathering it: save it by the trainer's `save_model`, which does."
        )
    mismatched = [f"{name} {list(found)}, expected {list(wanted)}" for name, found, wanted in info["mismatched_keys"]]
    if mismatched:
        raise ValueError(
            f"{name_or_path} has weights of another shape: {abbreviate(sorted(mismatched))}. The width of the heads "
            "is set by `embedding_dim`; leave it out to load a general preference model as it was saved."
        )
    unexpected = sorted(name for name in info["unexpected_keys"] if name.startswith((*HEAD_NAMES, "lm_head")))
    if unexpected:
        raise ValueError(
            f"{name_or_path} holds {abbreviate(unexpected)}, which the model it is loaded into would drop: load it "
            "with the settings it was saved with."
        )


def abbreviate(names: list[str], most: int = 3) -> str:
    """The first few of many names."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def leave_meta_device(model: nn.Module) -> None:
    """
    Give new weights that are on the meta device room on the CPU. Under FSDP, transformers leaves them there on all
    processes but the first, whose weights the others get; but accelerate tells weights apart by their address, so that
    two without one are the same to it, and the optimizers of the processes differ.
    """
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            module = model.get_submodule(name.rpartition(".")[0])
            empty = torch.zeros_like(parameter, device="cpu")
            setattr(module, name.rpartition(".")[2], nn.Parameter(empty, requires_grad=parameter.requires_grad))


def head_norms(model: nn.Module) -> str:
    """The heads of a model and the norms of their weights, for a log line."""
    heads = {name: getattr(model, name) for name in HEAD_NAMES if hasattr(model, name)}
    described = []
    for name, head in heads.items():
        # PEFT keeps a head as it was beside the one that it trains.
        used = [weight.detach() for key, weight in head.named_parameters() if "original_module" not in key]
        if any(weight.is_meta or weight.numel() == 0 for weight in used):
            described.append(f"{name} (not in this process)")  # sharded by ZeRO-3, or offloaded
        else:
            norm = sum(weight.float().square().sum().item() for weight in used) ** 0.5
            described.append(f"{name} (norm {norm:.4g})")
    return ", ".join(described)


@contextmanager
def whole_files(directory: str | os.PathLike) -> Iterator[str]:
    """
    Write files into a directory so that each has its name only once it is whole: they are written into a new directory
    inside, which is yielded, and renamed at the end, the weights first and `config.json` last. (A model of several
    files is a mixture for the moment of renaming.) A model's weights replace those of an earlier model or adapter,
    which would be read instead; an adapter's leave a model's, which are then not read. What a killed process has left
    is removed.
    """
    os.makedirs(directory, exist_ok=True)
    for name in os.listdir(directory):
        if name.startswith(PARTIAL):
            shutil.rmtree(os.path.join(directory, name), ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=PARTIAL) as partial:
        yield partial
        written = sorted(os.listdir(partial), key=lambda name: (name.endswith(".json"), name == "config.json", name))
        for name in written:
            source, target = os.path.join(partial, name), os.path.join(directory, name)
            if os.path.isdir(source):
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                os.replace(source, target)
        if any(WEIGHT_FILES.fullmatch(name) for name in written):
            for name in os.listdir(directory):
                if (WEIGHT_FILES.fullmatch(name) or name in ADAPTER_FILES) and name not in written:
                    os.remove(os.path.join(directory, name))
