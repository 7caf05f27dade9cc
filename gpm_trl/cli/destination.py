"""Where the commands that write a model write it."""

import os
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..saving import whole_files

__all__ = ["check_destination", "write_model"]


def check_destination(path: Path) -> None:
    """Raise `ValueError` unless `path` is an empty directory, or is not there and can be made."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} is there already and not empty: remove it, or write to another directory.")
    path = path.resolve()
    there = next(directory for directory in (path, *path.parents) if directory.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"{path} cannot be written, since {there} is no directory that you may write to: choose another."
        )


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write a model and its tokenizer to a directory, whose files have their names only once all are whole."""
    with whole_files(path.resolve()) as whole:  # of a link, what it points to
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
