"""Where the commands that write a model write it."""

import os
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.checkpoint_gpm import whole_files


def check_destination(path: Path) -> None:
    """Raise `ValueError` unless `path` is an empty directory, or does not exist and can be made."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} is there already and not empty: remove it, or write to another directory.")
    path = path.resolve()
    there = next(directory for directory in (path, *path.parents) if directory.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: {there} is no directory that you may write to.")


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write a model and its tokenizer to a directory. The files get their names once all are written."""
    with whole_files(path.resolve()) as whole:  # `path` may be a link
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
