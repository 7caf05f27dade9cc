"""Where the commands that write a model write it."""

import os
import tempfile
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["check_destination", "write_model"]


def check_destination(path: Path) -> None:
    """Raise `ValueError` unless `path` is not there, or is an empty directory."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} is there already and not empty: remove it, or write to another directory.")


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write a model and its tokenizer to a directory, which has its name only once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as temporary:
        whole = Path(temporary) / "model"
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        os.replace(whole, path)  # also where `path` is an empty directory
