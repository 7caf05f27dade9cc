"""From the rows of a preference dataset to groups: a prompt, its distinct responses, the comparisons between them."""

import hashlib
from array import array
from typing import Any

from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers.utils import logging

from .formats import comparisons_and_targets, per_comparison, prompt_and_responses, template_kwargs
from .renderer import Renderer

__all__ = ["prepare_dataset"]

logger = logging.get_logger(__name__)

# Indices are in `pairs`: a column called `comparisons`, like that of K-way rows, would keep the type of theirs.
GROUP_FEATURES = {
    "prompt_ids": List(Value("int32")),
    "response_ids": List(List(Value("int32"))),
    "pairs": List(List(Value("int32"))),
    "targets": List(Value("float64")),
    "length": Value("int32"),
    "margins": List(Value("float64")),
}
COUNTS = {
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
) -> Dataset | IterableDataset:
    r"""
    Tokenize a preference dataset into groups. A dataset that already is one is returned as it is.

    A row is one of

    - a pair in any preference format of TRL: `chosen` and `rejected`, with the `prompt` apart (explicit) or as what
      both begin with (implicit), as plain text or as messages;
    - K-way: `prompt`, `responses` (a list) and `comparisons`, a list of `[i, j]` or `[i, j, label]`, where i is the
      response preferred, or compared, to j.

    Other columns: `label` (`P(chosen > rejected)` in [0, 1]; 1 where absent), `score` (the log-odds to regress on),
    `margin`; one number a row, or, K-way, a list with one a comparison. `tools` and `chat_template_kwargs` go to the
    chat template.

    Identical responses of a prompt become one. Comparisons of identical responses are dropped, as are those with a
    response too long (`long_rows="filter"`), and rows left without any; how many is logged, except for a stream. Only
    responses that are compared count for `max_length`; prompts are cut (`long_rows="truncate_prompt"`) after grouping.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): The rows.
        renderer ([`Renderer`]): Turns texts into tokens.
        target (`str`, defaults to `"label"`): `"label"` or `"score"`: what the comparisons' `targets` are.
        group_by_prompt (`bool`, defaults to `False`): Whether the rows of a prompt become one group. A stream is
            grouped within windows of 1,000 rows.
        name (`str`, defaults to `"train"`): What progress bars and messages call the dataset.
        num_proc (`int`, *optional*): Processes that tokenize; not for a stream.

    Returns:
        A dataset of the type given, with the columns `prompt_ids`, `response_ids`, `pairs`, `targets` and, if
        the rows have any, `margins`: see [`DataCollatorForGroups`]; and `length`, the tokens of prompt and responses,
        by which [`~transformers.TrainingArguments`] can sample (`train_sampling_strategy`).

    Raises:
        ValueError: For an empty dataset, or one whose rows were all dropped; and, with the row's number, for a row in
            no known format, a label outside [0, 1] or NaN, an index out of range, a comparison of a response with
            itself, an empty prompt, a conversation without a chat template.
    """
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if {"prompt_ids", "response_ids", "pairs", "targets"} <= set(columns):
        return dataset
    if not columns or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError(f"The {name} dataset is empty.")
    _check_columns(columns, target, name)
    # Rows are grouped by their whole prompt, which is then cut for the responses of all.
    fit = not (group_by_prompt and renderer.long_rows == "truncate_prompt")
    converter = RowConverter(renderer, target, with_margins="margin" in columns, fit=fit)
    features = Features({**GROUP_FEATURES, **{name: Value("int32") for name in COUNTS}})
    if not converter.with_margins:
        del features["margins"]
    if isinstance(dataset, IterableDataset):
        dataset = dataset.map(converter, with_indices=True, remove_columns=columns, features=features)
        if group_by_prompt:
            logger.info(f"The {name} dataset is a stream: prompts are grouped within windows of 1,000 rows.")
            settings = {"batched": True, "batch_size": 1000, "features": features}
            dataset = dataset.map(_group_window, fn_kwargs={"renderer": renderer}, **settings)
        dataset = dataset.filter(_has_pairs)
        if next(iter(dataset), None) is None:
            raise ValueError(_all_dropped(f"rows of the {name} dataset", renderer))
        return dataset.remove_columns(list(COUNTS))
    size = len(dataset)
    dataset = dataset.map(
        converter,
        with_indices=True,
        remove_columns=columns,
        features=features,
        num_proc=num_proc,
        desc=f"Tokenizing {name} dataset",
    )
    if group_by_prompt:
        dataset = _group_rows(dataset, renderer, features, name, num_proc)
    _report_counts(dataset, size, name)
    dataset = dataset.filter(_has_pairs, num_proc=num_proc, desc=f"Filtering {name} dataset")
    if len(dataset) == 0:
        raise ValueError(_all_dropped(f"{size} rows of the {name} dataset", renderer))
    return dataset.remove_columns(list(COUNTS))


class RowConverter:
    """Maps a row and its index to a group; picklable, so that [`~datasets.Dataset.map`] can cache and fork it."""

    def __init__(self, renderer: Renderer, target: str, with_margins: bool, fit: bool):
        self.renderer = renderer
        self.target = target
        self.with_margins = with_margins
        self.fit = fit

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            return self._convert(row)
        except ValueError as error:
            raise ValueError(f"Row {index}: {error}") from error

    def _convert(self, row: dict[str, Any]) -> dict[str, Any]:
        prompt, responses = prompt_and_responses(row)
        comparisons, targets = comparisons_and_targets(row, len(responses), self.target)
        margins = per_comparison(row, "margin", len(comparisons)) if self.with_margins else None
        prompt_ids, response_ids = self.renderer.encode(prompt, responses, **template_kwargs(row))
        group = _make_group(prompt_ids, response_ids, comparisons, targets, margins)
        counts = dict.fromkeys(COUNTS, 0)
        counts["identical"] = len(comparisons) - len(group["pairs"])
        counts["empty"] = sum(_is_empty(response) for response in responses)
        group |= counts
        return _fit_group(group, self.renderer) if self.fit else group


def _check_columns(columns: list[str], target: str, name: str) -> None:
    if not ({"chosen", "rejected"} <= set(columns) or {"prompt", "responses", "comparisons"} <= set(columns)):
        raise ValueError(
            f"The {name} dataset has the columns {sorted(columns)}, but a preference dataset has `chosen` and "
            "`rejected` (and maybe `prompt`), or `prompt`, `responses` and `comparisons`. Rename its columns."
        )
    if target == "score" and "score" not in columns:
        raise ValueError(
            f"The {name} dataset has no column `score`, the log-odds that the regression loss is fitted to; it has "
            f'{sorted(columns)}. Add it, or use `loss_type="cross_entropy"`.'
        )


def _is_empty(response: str | list) -> bool:
    if isinstance(response, str):
        return not response.strip()
    return not any(message.get("content") or message.get("tool_calls") for message in response)


def _make_group(
    prompt_ids: list[int],
    response_ids: list[list[int]],
    comparisons: list[list[int]],
    targets: list[float],
    margins: list[float] | None,
    kept: list[bool] | None = None,
) -> dict[str, Any]:
    """A group with each distinct response once, and none that is not compared."""
    names: dict[tuple[int, ...], int] = {}
    group: dict[str, Any] = {"prompt_ids": prompt_ids, "response_ids": [], "pairs": [], "targets": []}
    if margins is not None:
        group["margins"] = []
    for index, (i, j) in enumerate(comparisons):
        if (kept is not None and not kept[index]) or response_ids[i] == response_ids[j]:
            continue
        pair = [names.setdefault(tuple(response_ids[k]), len(names)) for k in (i, j)]
        group["pairs"].append(pair)
        group["targets"].append(targets[index])
        if margins is not None:
            group["margins"].append(margins[index])
    group["response_ids"] = [list(ids) for ids in names]
    group["length"] = len(prompt_ids) + sum(map(len, names))
    return group


def _fit_group(group: dict[str, Any], renderer: Renderer) -> dict[str, Any]:
    """A group without the comparisons that are too long, its prompt cut for those that are left."""
    response_ids, pairs = group["response_ids"], group["pairs"]
    _, fits = renderer.fit(group["prompt_ids"], response_ids)
    kept = [fits[i] and fits[j] for i, j in pairs]
    compared = {index for pair, keep in zip(pairs, kept, strict=True) if keep for index in pair}
    prompt_ids, _ = renderer.fit(group["prompt_ids"], [response_ids[index] for index in compared])
    fitting = _make_group(prompt_ids, response_ids, pairs, group["targets"], group.get("margins"), kept)
    return {**group, **fitting, "long": group["long"] + kept.count(False)}


def _has_pairs(group: dict[str, Any]) -> bool:
    return len(group["pairs"]) > 0


def _all_dropped(rows: str, renderer: Renderer) -> str:
    return (
        f"All {rows} were dropped: their responses are identical, or longer than `max_length` = {renderer.max_length} "
        'tokens. Raise `max_length`, or choose `long_rows="truncate_prompt"`.'
    )


def _report_counts(dataset: Dataset, size: int, name: str) -> None:
    for count, meaning in COUNTS.items():
        total = sum(sum(batch[count]) for batch in dataset.select_columns([count]).iter(batch_size=10_000))
        if total and PartialState().is_main_process:
            logger.warning(f"{name} dataset of {size} rows: {total} {meaning}.")


def _merge_groups(groups: list[dict[str, Any]], renderer: Renderer) -> dict[str, Any]:
    """One group from several of the same prompt, which is cut for the responses of all."""
    response_ids, comparisons = [], []
    for group in groups:
        comparisons += [[len(response_ids) + i, len(response_ids) + j] for i, j in group["pairs"]]
        response_ids += group["response_ids"]
    targets = [target for group in groups for target in group["targets"]]
    margins = [margin for group in groups for margin in group["margins"]] if "margins" in groups[0] else None
    merged = _make_group(groups[0]["prompt_ids"], response_ids, comparisons, targets, margins)
    counts = {name: sum(group[name] for group in groups) for name in COUNTS}
    return _fit_group(merged | counts, renderer)


def _prompt_key(prompt_ids: list[int]) -> bytes:
    return hashlib.blake2b(array("q", prompt_ids).tobytes(), digest_size=16).digest()


def _rows_by_prompt(prompts: Any) -> list[list[int]]:
    rows: dict[bytes, list[int]] = {}
    for index, prompt_ids in enumerate(prompts):
        rows.setdefault(_prompt_key(prompt_ids), []).append(index)
    return list(rows.values())


def _group_window(batch: dict[str, list], renderer: Renderer) -> dict[str, list]:
    columns = list(batch)
    groups = [dict(zip(columns, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    by_prompt = _rows_by_prompt(batch["prompt_ids"])
    merged = [_merge_groups([groups[index] for index in rows], renderer) for rows in by_prompt]
    return {column: [group[column] for group in merged] for column in columns}


def _merge_selected(selection: dict[str, list[int]], dataset: Dataset, renderer: Renderer) -> dict[str, Any]:
    return _merge_groups([dataset[index] for index in selection["rows"]], renderer)


def _group_rows(dataset: Dataset, renderer: Renderer, features: Features, name: str, num_proc: int | None) -> Dataset:
    prompts = (ids for batch in dataset.select_columns(["prompt_ids"]).iter(1000) for ids in batch["prompt_ids"])
    return Dataset.from_dict({"rows": _rows_by_prompt(prompts)}).map(
        _merge_selected,
        fn_kwargs={"dataset": dataset, "renderer": renderer},
        remove_columns=["rows"],
        features=features,
        num_proc=num_proc,
        desc=f"Grouping {name} dataset by prompt",
    )
