"""Groups to batches of about as many tokens each, before training."""

import random
from typing import Any

from datasets import Dataset, Features, IterableDataset, List

from .groups import GROUP_FEATURES, WINDOW, log_on_main

__all__ = ["fill_batches"]


def fill_batches(
    dataset: Dataset | IterableDataset, max_tokens: int, shared_prefix: bool, seed: int
) -> Dataset | IterableDataset:
    r"""
    Distribute groups over batches of at most so many tokens: a row of the result is a batch, with its `groups`.

    The groups are shuffled and, in windows of 1,000, each goes into the first batch that has room for it; then the
    batches of the window are shuffled. Where rows are padded, the longest go first, so that the rows of a batch are
    about equally long. Which groups share a batch is drawn once; a trainer shuffles the batches of each epoch. A
    stream is not shuffled over its windows.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): Groups, from
            [`~gpm_trl.data.prepare_dataset`].
        max_tokens (`int`): Most tokens of a batch: those of its packed row, or all of its padded rows.
        shared_prefix (`bool`): Whether batches are packed, see [`~gpm_trl.data.DataCollatorForGroups`].
        seed (`int`): Of the shuffles.

    Returns:
        A dataset of the type given, with the one column `groups`.

    Raises:
        ValueError: For a group of more tokens than a batch may have.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from gpm_trl.data.batches import fill_batches
    >>> rows = {"prompt_ids": [[5]] * 4, "response_ids": [[[6], [7, 1]]] * 4, "pairs": [[[0, 1]]] * 4}
    >>> groups = Dataset.from_dict({**rows, "targets": [[1.0]] * 4})
    >>> batches = fill_batches(groups, max_tokens=8, shared_prefix=True, seed=0)
    >>> [len(batch["groups"]) for batch in batches]
    [2, 2]

    ```
    """
    columns = dataset.column_names or list(next(iter(dataset)))
    settings = {
        "fn_kwargs": {"max_tokens": max_tokens, "shared_prefix": shared_prefix, "seed": seed},
        "batched": True,
        "batch_size": WINDOW,
        "remove_columns": columns,
        "features": Features(groups=List({name: GROUP_FEATURES[name] for name in GROUP_FEATURES if name in columns})),
    }
    if isinstance(dataset, IterableDataset):
        return dataset.map(_fill_window, **settings)
    batches = dataset.shuffle(seed=seed).map(_fill_window, desc="Filling batches", **settings)
    log_on_main(f"{len(dataset)} groups fill {len(batches)} batches of at most {max_tokens} tokens.")
    return batches


def _fill_window(columns: dict[str, list], max_tokens: int, shared_prefix: bool, seed: int) -> dict[str, list]:
    groups = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    batches = first_fit([_lengths(group) for group in groups], max_tokens, shared_prefix)
    random.Random(seed).shuffle(batches)
    return {"groups": [[groups[index] for index in batch] for batch in batches]}


def _lengths(group: dict[str, Any]) -> tuple[int, int, int]:
    """Tokens of a group, of its longest row, and the number of its rows."""
    prompt, responses = len(group["prompt_ids"]), [len(ids) for ids in group["response_ids"]]
    return prompt + sum(responses), prompt + max(responses), len(responses)


def first_fit(lengths: list[tuple[int, int, int]], max_tokens: int, shared_prefix: bool) -> list[list[int]]:
    """
    Indices of groups, batch by batch. A packed batch has room for `max_tokens` tokens. A padded one has room for
    `max_tokens // longest` rows; its longest row is in its first group, since groups are sorted.
    """
    order = range(len(lengths)) if shared_prefix else sorted(range(len(lengths)), key=lambda index: -lengths[index][1])
    batches: list[list[int]] = []
    room: list[int] = []
    for index in order:
        tokens, longest, rows = lengths[index]
        size = tokens if shared_prefix else rows
        fitting = next((batch for batch, free in enumerate(room) if size <= free), None)
        if fitting is None:
            fitting = len(batches)
            batches.append([])
            room.append(max_tokens if shared_prefix else max_tokens // longest)
            if size > room[-1]:
                raise ValueError(
                    f"A group of {tokens if shared_prefix else rows * longest} tokens does not fit in a batch: raise "
                    f"`max_tokens_per_batch` = {max_tokens}, or lower `max_length`, which cuts or drops long rows."
                )
        batches[fitting].append(index)
        room[fitting] -= size
    return batches
