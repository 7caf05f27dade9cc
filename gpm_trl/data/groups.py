"""From the rows of a preference dataset to groups: a prompt, its distinct responses, the comparisons between them."""

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from typing import Any

from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers.utils import logging

from . import formats
from .renderer import Renderer

__all__ = ["prepare_dataset"]

logger = logging.get_logger(__name__)

# Indices are in `pairs`, since a column called `comparisons` would keep the type of that of K-way rows.
GROUP_FEATURES = {
    "prompt_ids": List(Value("int32")),
    "response_ids": List(List(Value("int32"))),
    "pairs": List(List(Value("int32"))),
    "targets": List(Value("float64")),
    "length": Value("int32"),
    "margins": List(Value("float64")),
}
WINDOW = 1000  # rows of a stream that are grouped, or groups that are distributed over batches, together
COUNTS = {
    "comparisons": "comparisons",
    "ties": "ties",
    "repeated": "rows repeat their prompt in all responses, which was read once",
    "uncompared": "responses that are compared to none, left out",
    "long": "comparisons with a response too long for `max_length`",
    "identical": "comparisons of identical responses, which say nothing",
    "empty": "empty responses, kept: their row is the prompt and an EOS",
}


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    renderer: Renderer,
    target: str = "label",
    group_by_prompt: bool = False,
    name: str = "train",
    num_proc: int | None = None,
    column_mapping: dict[str, str | None] | None = None,
) -> Dataset | IterableDataset:
    r"""
    Tokenize a preference dataset into groups. A dataset that already is one is returned as it is.

    Rows are of any layout that [`~gpm_trl.data.formats.find_layout`] knows; which, and what was read, is logged.
    docs/data.md has a row of each, the other columns (`label`, `score`, `margin`, `tools`, `chat_template_kwargs`),
    and what becomes of rows that cannot be used.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): The rows.
        renderer ([`Renderer`]): Turns texts into tokens.
        target (`str`, defaults to `"label"`): `"label"` or `"score"`: what the comparisons' `targets` are.
        group_by_prompt (`bool`, defaults to `False`): Whether the rows of a prompt become one group. A stream is
            grouped within windows of 1,000 rows.
        name (`str`, defaults to `"train"`): What progress bars and messages call the dataset.
        num_proc (`int`, *optional*): Processes that tokenize; not for a stream.
        column_mapping (`dict`, *optional*): See [`~gpm_trl.data.formats.find_layout`].

    Returns:
        A dataset of the type given, with the columns that [`DataCollatorForGroups`] reads, and `length`, the tokens
        of prompt and responses, by which a trainer can sample (`train_sampling_strategy`).

    Raises:
        ValueError: For an empty dataset, one of no layout, or one whose rows were all dropped; and, with its number
            from 1, for a row that cannot be read or rendered.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from gpm_trl.cli.quickstart import byte_tokenizer
    >>> from gpm_trl.data import Renderer, prepare_dataset
    >>> rows = Dataset.from_list([{"prompt": "A fruit?", "chosen": " A pear.", "rejected": " A stone."}])
    >>> groups = prepare_dataset(rows, Renderer(byte_tokenizer()))
    >>> groups[0]["pairs"], groups[0]["targets"]
    ([[0, 1]], [1.0])

    ```
    """
    found = read_first(dataset, name, column_mapping)
    if found is None:
        log_on_main(f"{name} dataset is tokenized already: it has the limits, targets and groups of its preparation.")
        return dataset
    layout, first, _ = found
    columns = dataset.column_names or list(next(iter(dataset)))
    if (other := {"label": "score", "score": "label"}[target]) in columns and other not in layout.columns:
        layout = replace(layout, unused=(*layout.unused, other))
    features = Features({**GROUP_FEATURES, **{name: Value("int32") for name in COUNTS}})
    if "margin" not in first:
        del features["margins"]
    convert = {
        "function": _convert_row,
        "fn_kwargs": {"layout": layout, "renderer": renderer, "target": target, "cut": not group_by_prompt},
        "with_indices": True,
        "remove_columns": columns,
        "features": features,  # else they would be inferred from the first rows, of which none may be left
    }
    if isinstance(dataset, IterableDataset):
        log_on_main(f"{name} dataset {layout}.")
        dataset = dataset.map(**convert)
        if group_by_prompt:
            window = {"batched": True, "batch_size": WINDOW, "features": features}
            dataset = dataset.map(_group_window, fn_kwargs={"renderer": renderer}, **window)
        dataset = dataset.filter(bool, input_columns="pairs")
    else:
        size = len(dataset)
        dataset = dataset.map(**convert, num_proc=num_proc, desc=f"Tokenizing {name} dataset")
        if group_by_prompt:
            dataset = _group_rows(dataset, renderer, num_proc=num_proc, desc=f"Grouping {name} dataset by prompt")
        totals = dataset.select_columns(list(COUNTS)).to_pandas().sum()
        counted = [f"{totals[count]:,} {meaning}" for count, meaning in COUNTS.items() if totals[count]]
        log_on_main(f"{name} dataset {layout}: {size:,} rows: {', '.join(counted)}.")
        dataset = dataset.filter(bool, input_columns="pairs", num_proc=num_proc, desc=f"Filtering {name} dataset")
    if next(iter(dataset), None) is None:
        raise ValueError(
            f"All rows of the {name} dataset were dropped: their responses are identical, or longer than `max_length` "
            f'= {renderer.max_length} tokens. Raise `max_length`, or choose `long_rows="truncate_prompt"`.'
        )
    return dataset.remove_columns(list(COUNTS))


def read_first(
    dataset: Dataset | IterableDataset | None, name: str, column_mapping: dict[str, str | None] | None
) -> tuple[formats.Layout, dict[str, Any], bool] | None:
    """A dataset's layout, its first row as that reads it, and whether this is of messages; `None` for groups."""
    if dataset is None:
        return None
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The {name} dataset is empty.")
    if {"prompt_ids", "response_ids", "pairs", "targets"} <= set(first):
        return None
    layout = formats.find_layout(first, column_mapping)
    try:
        row = layout.read(first)
        return layout, row, isinstance(formats.prompt_and_responses(row)[0], list)
    except ValueError as error:
        raise formats.RowError(f"Row 1: {error}") from error


def _convert_row(
    row: dict[str, Any], index: int, layout: formats.Layout, renderer: Renderer, target: str, cut: bool
) -> dict[str, Any]:
    """A row as a group, with the counts of what is odd in it."""
    try:
        row = layout.read(row)
        prompt, responses = formats.prompt_and_responses(row)
        pairs, targets = formats.comparisons_and_targets(row, len(responses), target)
        comparisons: dict[str, list] = {"pairs": pairs, "targets": targets}
        if "margin" in row:
            comparisons["margins"] = formats.per_comparison(row, "margin", len(pairs))
        prompt_ids, response_ids = renderer.encode(prompt, responses, **formats.template_kwargs(row))
        given = row["responses"] if "responses" in row else [row["chosen"], row["rejected"]]
        ties = targets.count(0.5) if target == "label" else 0
        counts = {
            "comparisons": len(pairs) - ties,
            "ties": ties,
            "repeated": isinstance(prompt, str) and bool(row["prompt"]) and responses != given,
            "uncompared": len(responses) - len({*chain.from_iterable(pairs)}),
            "empty": sum(map(_is_empty, responses)),
        }
        return counts | _make_group(prompt_ids, response_ids, comparisons, renderer, cut)
    except ValueError as error:
        raise formats.RowError(f"Row {index + 1}: {error}") from error


def _is_empty(response: str | list) -> bool:
    messages = formats.as_messages(response)
    return not any((message["content"] or "").strip() or message.get("tool_calls") for message in messages)


def _make_group(
    prompt_ids: list[int], response_ids: list[list[int]], comparisons: dict[str, list], renderer: Renderer, cut: bool
) -> dict[str, Any]:
    """
    A group of the comparisons of different responses whose rows fit, with each of these responses once, and counts of
    the other comparisons. If `cut`, its prompt is cut for the responses that are left.
    """
    pairs = comparisons["pairs"]
    differ = [index for index, (i, j) in enumerate(pairs) if response_ids[i] != response_ids[j]]
    compared = {k for index in differ for k in pairs[index]}  # the others may be of any length
    _, fits = renderer.fit(prompt_ids, [ids if k in compared else [] for k, ids in enumerate(response_ids)])
    kept = [index for index in differ if all(fits[k] for k in pairs[index])]
    columns = {name: [values[index] for index in kept] for name, values in comparisons.items()}
    numbers: dict[tuple[int, ...], int] = {}
    columns["pairs"] = [
        [numbers.setdefault(tuple(response_ids[k]), len(numbers)) for k in pair] for pair in columns["pairs"]
    ]
    responses = list(map(list, numbers))
    if cut:
        prompt_ids, _ = renderer.fit(prompt_ids, responses)
    length = len(prompt_ids) + sum(map(len, responses))
    counts = {"long": len(differ) - len(kept), "identical": len(pairs) - len(differ)}
    return {"prompt_ids": prompt_ids, "response_ids": responses, **columns, "length": length, **counts}


def log_on_main(text: str) -> None:
    if PartialState().is_main_process:
        logger.warning(text)


def _merge_groups(groups: list[dict[str, Any]], renderer: Renderer) -> dict[str, Any]:
    """One group from several of the same prompt, which is cut for the responses of all."""
    response_ids, pairs = [], []
    for group in groups:
        pairs += [[len(response_ids) + i, len(response_ids) + j] for i, j in group["pairs"]]
        response_ids += group["response_ids"]
    columns = [name for name in ("targets", "margins") if name in groups[0]]
    comparisons = {name: list(chain.from_iterable(group[name] for group in groups)) for name in columns}
    merged = _make_group(groups[0]["prompt_ids"], response_ids, comparisons | {"pairs": pairs}, renderer, cut=True)
    return merged | {name: sum(group[name] for group in groups) for name in COUNTS}


def _rows_by_prompt(prompts: Iterable[list[int]]) -> list[list[int]]:
    rows: dict[bytes, list[int]] = {}
    for index, prompt_ids in enumerate(prompts):
        # A digest, since the prompts of a large dataset would fill the memory.
        key = hashlib.blake2b(array("q", prompt_ids).tobytes(), digest_size=16).digest()
        rows.setdefault(key, []).append(index)
    return list(rows.values())


def _group_window(batch: dict[str, list], renderer: Renderer) -> dict[str, list]:
    groups = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    by_prompt = _rows_by_prompt(batch["prompt_ids"])
    merged = [_merge_groups([groups[index] for index in rows], renderer) for rows in by_prompt]
    return {column: [group[column] for group in merged] for column in batch}


def _group_rows(dataset: Dataset, renderer: Renderer, **settings: Any) -> Dataset:
    # Unlike the windows of a stream: the rows of a prompt may stand anywhere, and the dataset may not fit in memory.
    # What is made of a selection of it goes where it is: into a cache file, which other processes read, or memory.
    rows = _rows_by_prompt(dataset["prompt_ids"])
    return dataset.select([own[0] for own in rows]).map(
        lambda _, index: _merge_groups([dataset[row] for row in rows[index]], renderer),
        with_indices=True,
        features=dataset.features,
        **settings,
    )
