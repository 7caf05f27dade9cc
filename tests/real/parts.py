"""Where the real parts are, and which of them are missing."""

from functools import cache
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .fetch import FOLDER


def part(name: str) -> Path:
    """The directory of a real model or tokenizer; a test that asks for one that is not there is skipped."""
    if not (FOLDER / name).is_dir():
        pytest.skip(f"{FOLDER} has no {name}: `make test-real` brings it, or `python tests/real/fetch.py`")
    return FOLDER / name


@cache
def real_tokenizer(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(part(name))
