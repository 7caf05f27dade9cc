"""
The one reader of rows: from a layout of preference data to a prompt, responses to it and comparisons between these.

A row is a pair (`chosen`, `rejected` and maybe `prompt`) or K-way (`prompt`, `responses`, `comparisons`). Another
layout is read by one more function like `_read_pair`, and named in the error of `_read_k_way`.
"""

import json
import math
from typing import Any

__all__ = ["comparisons_and_targets", "per_comparison", "prompt_and_responses", "template_kwargs"]


def prompt_and_responses(row: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The prompt of a row, and the responses to it."""
    return _read_pair(row) if _is_pair(row) else _read_k_way(row)


def _is_pair(row: dict[str, Any]) -> bool:
    return "chosen" in row and "rejected" in row


def _read_k_way(row: dict[str, Any]) -> tuple[Any, list[Any]]:
    if row.get("prompt") is None or not isinstance(row.get("responses"), list):
        raise ValueError(
            "A preference row has `chosen` and `rejected` (and maybe `prompt`), or `prompt`, `responses` (a list) "
            f"and `comparisons`; this one has {sorted(row)}: rename its columns."
        )
    return row["prompt"], [[response] if isinstance(response, dict) else response for response in row["responses"]]


def _read_pair(row: dict[str, Any]) -> tuple[Any, list[Any]]:
    prompt, pair = row.get("prompt"), [row["chosen"], row["rejected"]]
    if not (all(isinstance(text, str) for text in pair) or all(isinstance(text, list) for text in pair)):
        raise ValueError("`chosen` and `rejected` must be strings or lists of messages, both of one kind.")
    # Beside conversations that begin with the prompt, datasets may repeat it as a string, or as messages.
    if prompt is None or (isinstance(prompt, str) and isinstance(pair[0], list)):
        shared, responses = _split_implicit_prompt(*pair)
        if prompt and not shared:
            raise ValueError("`prompt` is a string beside messages that do not begin with it: make it messages, too.")
        return shared, responses
    if isinstance(prompt, list) and prompt and all(text[: len(prompt)] == prompt for text in pair):
        return prompt, [text[len(prompt) :] for text in pair]
    return prompt, pair


def _split_implicit_prompt(chosen: str | list, rejected: str | list) -> tuple[Any, list[Any]]:
    """The prompt is what both begin with: whole messages, all but the last, or text up to the end of a word."""
    most = min(len(chosen), len(rejected))
    if not isinstance(chosen, str):
        most = max(most - 1, 0)
    shared = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    if isinstance(chosen, str):
        while shared > 0 and not chosen[shared - 1].isspace():
            shared -= 1
        shared = len(chosen[:shared].rstrip())
    return chosen[:shared], [chosen[shared:], rejected[shared:]]


def comparisons_and_targets(
    row: dict[str, Any], num_responses: int, target: str
) -> tuple[list[list[int]], list[float]]:
    """The comparisons of a row, `[i, j]`, and for each its `target`: a label or a score."""
    given = [[0, 1]] if _is_pair(row) else row.get("comparisons")
    if not given or not isinstance(given, list):
        raise ValueError(f"`comparisons` is {given!r}: give a list of at least one [i, j].")
    comparisons = [_response_indices(comparison, num_responses) for comparison in given]
    if any(len(comparison) == 3 for comparison in given):
        if target != "label":
            raise ValueError(f"`comparisons` has labels, but the targets come from `{target}`: write [i, j] alone.")
        if row.get(target) is not None:
            raise ValueError("Labels are given twice, in `comparisons` and in `label`: keep one.")
        inline = [comparison[2] if len(comparison) == 3 else 1.0 for comparison in given]
        targets = per_comparison({target: inline}, target, len(comparisons))
    elif target == "label" and target not in row:
        targets = [1.0] * len(comparisons)
    else:
        targets = per_comparison(row, target, len(comparisons))
    for value in targets:
        if target == "label" and not 0 <= value <= 1:
            raise ValueError(f"`label` is {value}, but it is the probability that the first response is preferred.")
    return comparisons, targets


def _response_indices(comparison: list, num_responses: int) -> list[int]:
    if not isinstance(comparison, list) or len(comparison) not in (2, 3):
        raise ValueError(f"A comparison is [i, j] or [i, j, label], got {comparison}.")
    # Beside labels, Arrow stores indices as floats.
    indices = [int(index) for index in comparison[:2] if index in range(num_responses)]
    if len(indices) < 2:
        raise ValueError(
            f"The comparison {comparison} is of responses, but there are {num_responses}: indices go from 0 to "
            f"{num_responses - 1}."
        )
    if indices[0] == indices[1]:
        raise ValueError(f"The comparison {comparison} is of a response with itself.")
    return indices


def per_comparison(row: dict[str, Any], column: str, count: int) -> list[float]:
    """The numbers of a column, one for each of `count` comparisons."""
    value = row.get(column)
    values = value if isinstance(value, list) else [value]
    if len(values) != count:
        raise ValueError(f"`{column}` has {len(values)} values for {count} comparisons: give one for each.")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise ValueError(f"`{column}` is {value!r}, but every comparison needs a finite number.")
    return [float(value) for value in values]


def template_kwargs(row: dict[str, Any]) -> dict[str, Any]:
    """What the chat template gets beside the messages of a row."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"`tools` is {tools!r}, which is no JSON ({error}): give a list or null.") from error
    given = row.get("chat_template_kwargs") or {}
    if not isinstance(given, dict):
        raise ValueError(f"`chat_template_kwargs` is {given!r}, but it is a dictionary.")
    return {"tools": tools or None, **given}
