"""Where rows come from: the Hub, a directory or a file."""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from datasets.config import DATASET_STATE_JSON_FILENAME, DATASETDICT_JSON_FILENAME
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_rows(name: str, config: str | None = None, streaming: bool = False) -> DatasetDict | IterableDatasetDict:
    """
    Load a dataset by name.

    Args:
        name (`str`): A Hub id, a directory (of files, or written by `save_to_disk`), or a JSON, JSON Lines (maybe
            gzipped) or Parquet file.
        config (`str`, *optional*): Which configuration of a dataset of the Hub, or of a directory with a card.
        streaming (`bool`, defaults to `False`): Whether rows are read one by one, as they are needed.

    Returns:
        The dataset's splits. A file, or a dataset saved without splits, has one, `"train"`.

    Raises:
        ValueError: If a file is empty or has another format, or there is a `config` for what has none.
        DatasetGenerationError: If a file's content cannot be read.
        FileNotFoundError: If there is no such file, directory or dataset.
    """
    file_format = FILE_FORMATS.get(os.path.splitext(name.removesuffix(".gz"))[1])
    saved = (DATASET_STATE_JSON_FILENAME, DATASETDICT_JSON_FILENAME)  # by `save_to_disk`, which has its own reader
    is_saved = any(os.path.isfile(os.path.join(name, file)) for file in saved)
    if config is not None and (os.path.isfile(name) or is_saved):
        raise ValueError(f"{name} has no configurations, so no {config!r}: leave `dataset_config` out.")
    if os.path.isfile(name):
        if file_format is None:
            raise ValueError(f"{name} has no format that is read here; use one of {', '.join(FILE_FORMATS)}.")
        is_json = file_format == "json"
        if os.path.getsize(name) == 0 or (is_json and next(read_lines(Path(name)), None) is None):
            raise ValueError(f"The file {name} is empty.")
        try:
            return load_dataset(file_format, data_files={"train": name}, streaming=streaming)
        except (DatasetGenerationError, EOFError, TypeError, ValueError, zlib.error) as error:
            if is_json:
                _check_json(Path(name))
            raise DatasetGenerationError(f"{name}: {error}") from error.__cause__
    if file_format is not None:
        raise FileNotFoundError(f"There is no file {name}.")
    if is_saved:
        rows = load_from_disk(name)
        rows = rows if isinstance(rows, DatasetDict) else DatasetDict(train=rows)
        return IterableDatasetDict({key: rows[key].to_iterable_dataset() for key in rows}) if streaming else rows
    try:
        return load_dataset(name, name=config, streaming=streaming)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(f"There is no directory or Hub dataset {name}: {error}") from error


def split_of(rows: DatasetDict | IterableDatasetDict, name: str | None, option: str) -> Dataset | IterableDataset:
    """A split by its name, the value of `option`; raises `ValueError` if there is none."""
    if name not in rows:
        raise ValueError(f"`{option}` is {name!r}, but the dataset has the splits {sorted(rows)}: choose one.")
    return rows[name]


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers, from 1."""
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged after line {number}: {error}") from error


def _check_json(path: Path) -> None:
    """Raise `ValueError` with the number of the first line that is no JSON, if there is one."""
    lines = read_lines(path)
    first, text = next(lines)
    if text.lstrip().startswith(b"["):  # an array, over several lines
        text += b"".join(line for _, line in lines)
    for number, line in chain([(first, text)], lines):
        try:
            if not (row := json.loads(line)) or not isinstance(row, dict | list):
                raise ValueError("there are no rows in it")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
