"""
The one reader of rows: from a layout of preference data to a prompt, responses to it and comparisons between these.

[`find_layout`] recognises a layout by its columns, and reads a row into one of two: a pair (`chosen`, `rejected` and
maybe `prompt`), or K-way (`prompt`, `responses`, `comparisons`). Another published layout is one more line of
`LAYOUTS`.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from .cyclic import ASPECTS, RatedPrompt

__all__ = [
    "Layout",
    "comparisons_and_targets",
    "find_layout",
    "parse_column_mapping",
    "per_comparison",
    "prompt_and_responses",
    "template_kwargs",
]

PROMPTS = ("prompt", "question", "instruction", "input")
SYSTEMS = ("system", "system_prompt")
BESIDE = ("label", "score", "margin", "tools", "chat_template_kwargs")
# The last word of a column that may be a part of the prompt, and so is not passed over.
PROMPT_WORDS = re.compile(
    "(article|audio|context|document|history|human|image|input|instruction|passage|post|problem|"
    "prompt|query|question|request|system|text|user|video)s?"
)
CONVERSATION_WORDS = re.compile("(conversation|dialog|dialogue|message)s?")


@dataclass(frozen=True)
class _Published:
    """A layout as it is published: the columns that tell it, and what makes a pair or K-way row of them."""

    name: str
    columns: Sequence[str]
    read: Callable[[dict[str, Any]], dict[str, Any]]
    prompts: Sequence[str] = PROMPTS  # one of which it has
    implicit: bool = False  # responses may begin with the prompt instead


@dataclass(frozen=True)
class Layout:
    """
    How the rows of a dataset are read: what [`find_layout`] returns.

    Args:
        name (`str`): What it is, for "read as ...".
        unused (list of `str`): The columns that it does not read.
    """

    name: str
    unused: list[str]
    published: _Published
    mapping: dict[str, str]  # from the names that are read here to the dataset's; an empty one leaves a column out
    prompt: str | None
    system: str | None
    chat: bool

    def read(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row as a pair or K-way row; raises `ValueError` if it is not as the layout has it."""
        named = {name: value for name, value in row.items() if name not in (*self.mapping, *self.mapping.values())}
        named |= {name: row.get(column) for name, column in self.mapping.items() if column}
        try:
            read = self.published.read(named)
            prompt = named.get(self.prompt)
            prompt = prompt["full_text"] if isinstance(prompt, dict) else prompt  # as WebGPT has its question
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"The row is not as in {self.name}: {type(error).__name__}: {error}.") from error
        read = {name: named[name] for name in BESIDE if name in named} | {"prompt": prompt} | read
        return _as_conversation(read, named.get(self.system)) if self.system or self.chat else read


def find_layout(
    columns: Iterable[str],
    column_mapping: Mapping[str, str] | str | None = None,
    compared: bool = True,
    chat: bool = False,
) -> Layout:
    """
    Recognise the layout of preference data by its columns.

    Args:
        columns (iterable of `str`): The columns of the dataset, or of a row.
        column_mapping (`dict` or `str`, *optional*): Names that a layout reads, and the columns to read for them:
            `{"prompt": "query"}`, or `"prompt=query"`. An empty column leaves one out: `{"context": ""}`. `rating` is
            what UltraFeedback's completions are compared by: an aspect, `overall_score` or `mean`, the default.
        compared (`bool`, defaults to `True`): Whether K-way rows need `comparisons`.
        chat (`bool`, defaults to `False`): Whether texts become messages of a user and an assistant.

    Returns:
        [`Layout`]: Its `name`, and `read`, which makes a row a pair or K-way.

    Raises:
        ValueError: If the columns fit no layout or several; if one that may be a part of the prompt is not read; if
            the mapping names a column that is not there, or a name that is not read.

    Example:

    ```python
    >>> from gpm_trl.data.formats import find_layout
    >>> layout = find_layout(["question", "chosen", "rejected"])
    >>> layout.read({"question": "Name a prime.", "chosen": "Seven.", "rejected": "Nine."})
    {'prompt': 'Name a prime.', 'chosen': 'Seven.', 'rejected': 'Nine.'}

    ```
    """
    columns, mapping = list(columns), parse_column_mapping(column_mapping)
    rating = mapping.pop("rating", None)
    missing = sorted({column or name for name, column in mapping.items()} - set(columns))
    if missing:
        raise ValueError(f"`column_mapping` names {missing}, but the columns are {sorted(columns)}.")
    names = {name for name in columns if name not in (*mapping, *mapping.values())}
    names |= {name for name, column in mapping.items() if column}

    fitting = [layout for layout in LAYOUTS if names.issuperset(layout.columns)]
    # `responses` and `ranks` are a ranked list, not K responses with a column that is not read.
    fitting = [layout for layout in fitting if not any(set(layout.columns) < set(other.columns) for other in fitting)]
    if not fitting:
        known = "; ".join(" and ".join(layout.columns) for layout in LAYOUTS)
        raise ValueError(
            f"No layout has the columns {sorted(names)}: name those of one by `column_mapping`, as in "
            f"prompt=query,chosen=good,rejected=bad. Layouts are told by {known}."
        )
    if len(fitting) > 1:
        raise ValueError(
            f"The columns {sorted(names)} fit {' and '.join(layout.name for layout in fitting)}: leave those of one "
            f"out by `column_mapping`, as in {fitting[1].columns[-1]}= ."
        )
    (layout,) = fitting
    if compared and "responses" in layout.columns and not names & {"comparisons", "ranks"}:
        raise ValueError(
            f"The columns {sorted(names)} have `responses`, but neither `comparisons` nor `ranks`: add one."
        )
    prompt = _only("prompt", [name for name in layout.prompts if name in names])
    system = _only("system", [name for name in SYSTEMS if name in names])
    if prompt is None and not layout.implicit:
        raise ValueError(f"No column of {sorted(names)} is a prompt: name it by `column_mapping`, as in prompt=query.")
    read = {*layout.columns, *BESIDE, prompt, system, *(["comparisons"] if layout.name == K_WAY else [])}
    unused = sorted(names - read)
    # Conversations beside a prompt, or beside whole conversations, are copies.
    copies = prompt or not layout.prompts
    overlooked = [
        name
        for name, word in zip(unused, map(_last_word, unused), strict=True)
        if PROMPT_WORDS.fullmatch(word) or (not copies and CONVERSATION_WORDS.fullmatch(word))
    ]
    if overlooked:
        name = overlooked[0]
        raise ValueError(
            f"{_quote(overlooked)} may be a part of the prompt, but {layout.name} would be read without: map columns "
            f"by `column_mapping`, as in prompt={name}, or leave it out by {name}= ."
        )
    if ignored := sorted(set(mapping) & set(unused)):
        raise ValueError(f"`column_mapping` maps {_quote(ignored)}, which {layout.name} does not read: leave it out.")
    if layout.columns == ("completions",):
        layout = _ultrafeedback(rating or "mean")
    elif rating:
        raise ValueError(f"`rating` of `column_mapping` is about UltraFeedback, but the layout is {layout.name}.")
    return Layout(layout.name, unused, layout, mapping, prompt, system, chat)


def _only(what: str, names: list[str]) -> str | None:
    if len(names) > 1:
        raise ValueError(
            f"{_quote(names)} may each be the {what}: keep one by `column_mapping`, as in {names[1]}= , which leaves "
            f"`{names[1]}` out."
        )
    return names[0] if names else None


def _last_word(column: str) -> str:
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", column)
    return words[-1].lower() if words else ""


def _quote(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def parse_column_mapping(mapping: Mapping[str, str] | str | None) -> dict[str, str]:
    """A column mapping as a dictionary, from one, from JSON, or from `name=column,name=column`."""
    if isinstance(mapping, str):
        try:
            mapping = (
                json.loads(mapping)
                if mapping.lstrip().startswith("{")
                else dict(map(str.strip, pair.split("=")) for pair in mapping.split(","))
            )
        except ValueError as error:
            raise ValueError(
                f"`column_mapping` is {mapping!r}: give name=column,name=column, or a JSON object of these ({error})."
            ) from error
    mapping = {name: column or "" for name, column in (mapping or {}).items()}
    known = {
        *PROMPTS,
        *SYSTEMS,
        *BESIDE,
        "comparisons",
        "rating",
        *(name for item in LAYOUTS for name in item.columns),
    }
    unknown = sorted(name for name, column in mapping.items() if column and name not in known)
    if unknown:
        raise ValueError(f"`column_mapping` maps {_quote(unknown)}, which nothing reads; names are {sorted(known)}.")
    return mapping


def _as_conversation(row: dict[str, Any], system: str | None) -> dict[str, Any]:
    """A pair or K-way row as messages, with those of `system` before the prompt."""
    if row["prompt"] is None and isinstance(row.get("chosen"), str):
        raise ValueError("Plain texts without a prompt apart cannot become messages: give `prompt`, or messages.")
    prompt, responses = prompt_and_responses(row)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if system and prompt[:1] != [{"role": "system", "content": system}]:
        if prompt and prompt[0].get("role") == "system":
            raise ValueError("The prompt begins with another system message than `system` has: keep one.")
        prompt = [{"role": "system", "content": system}, *prompt]
    responses = [[{"role": "assistant", "content": text}] if isinstance(text, str) else text for text in responses]
    texts = {"chosen": responses[0], "rejected": responses[1]} if _is_pair(row) else {"responses": responses}
    return {**row, "prompt": prompt, **texts}


def _read_chosen(row: dict[str, Any]) -> dict[str, Any]:
    chosen, rejected = row["chosen"], row["rejected"]
    if all(isinstance(texts, list) and texts and isinstance(texts[0], str) for texts in (chosen, rejected)):
        pairs = [[i, len(chosen) + j] for i in range(len(chosen)) for j in range(len(rejected))]
        return {"responses": [*chosen, *rejected], "comparisons": pairs}
    one_message = [[text] if isinstance(text, dict) else text for text in (chosen, rejected)]
    return dict(zip(("chosen", "rejected"), one_message, strict=True))


def _read_ranked(responses: list, ranks: list[float | None]) -> dict[str, Any]:
    """All comparisons of ranked responses, the lowest rank the best; those without a rank are compared to none."""
    if not isinstance(responses, list) or not isinstance(ranks, list) or len(ranks) != len(responses):
        raise ValueError(f"The ranks are {ranks!r}: give a list with one for each response.")
    ranked = [number for number, rank in enumerate(ranks) if rank is not None]
    pairs = [sorted(pair, key=ranks.__getitem__) for pair in combinations(ranked, 2)]
    labels = [_preference(ranks[j] - ranks[i]) for i, j in pairs]
    return {"responses": responses, "comparisons": pairs, "label": labels}


def _preference(difference: float) -> float:
    """The label of a comparison by the sign of a number: 1, 0, or 0.5 for a tie."""
    if not math.isfinite(difference):
        raise ValueError(f"A comparison is by {difference}, which is no finite number.")
    return (1.0 + (difference > 0) - (difference < 0)) / 2


def _ultrafeedback(rating: str) -> _Published:
    """UltraFeedback with the `rating` that its completions are compared by."""
    if rating not in (*ASPECTS, "mean", "overall_score"):
        raise ValueError(f"`rating` is {rating!r}: choose one of {ASPECTS}, 'mean' or 'overall_score'.")

    def read(row: dict[str, Any]) -> dict[str, Any]:
        rated = RatedPrompt.from_row({"instruction": row[prompt], "completions": row["completions"]})
        if rating == "overall_score":
            values = [completion["overall_score"] for completion in row["completions"]]
        elif rating == "mean":
            values = [sum(given.values()) / len(given) if given else None for given in rated.ratings]
        else:
            values = [given.get(rating) for given in rated.ratings]
        return _read_ranked(rated.responses, [None if value is None else -value for value in values])

    (prompt,) = prompts = ("instruction",)
    return _Published(f"{ULTRAFEEDBACK}, by {rating}", ("completions",), read, prompts)


def _two(
    name: str, first: str, second: str, columns: str | Sequence[str], label: dict | Callable, **settings
) -> _Published:
    """Two responses and what tells the better: a table of the column's values, or a function of the columns."""
    columns = [columns] if isinstance(columns, str) else columns

    def read(row: dict[str, Any]) -> dict[str, Any]:
        values = [row[column] for column in columns]
        if callable(label):
            preferred = label(*values)
        else:
            preferred = label.get(values[0])
            if preferred is None:
                raise ValueError(f"`{columns[0]}` is {values[0]!r}, but {name} has one of {list(label)}.")
        return _read_chosen({"chosen": row[first], "rejected": row[second]}) | {"label": preferred}

    return _Published(name, (first, second, *columns), read, **settings)


TIES = dict.fromkeys(("tie", "tie (bothbad)", "both_bad"), 0.5)
WINNERS = {
    "model_a": 1.0,
    "response_a": 1.0,
    "a": 1.0,
    "A": 1.0,
    "model_b": 0.0,
    "response_b": 0.0,
    "b": 0.0,
    "B": 0.0,
}
WINNERS |= TIES
K_WAY, ULTRAFEEDBACK = "K responses and comparisons", "UltraFeedback (rated completions)"
LAYOUTS = (
    _Published(
        "chosen and rejected", ("chosen", "rejected"), _read_chosen, (*PROMPTS, "conversations"), implicit=True
    ),
    _Published(K_WAY, ("responses",), lambda row: {name: row.get(name) for name in ("responses", "comparisons")}),
    _Published("ranked responses", ("responses", "ranks"), lambda row: _read_ranked(row["responses"], row["ranks"])),
    _Published(
        "Nectar (ranked answers)",
        ("answers",),
        lambda row: _read_ranked(*([answer[key] for answer in row["answers"]] for key in ("answer", "rank"))),
    ),
    _ultrafeedback("mean"),
    _two("two responses and a winner", "response_a", "response_b", "winner", WINNERS),
    _two(
        "Arena (two conversations and a winner)",
        "conversation_a",
        "conversation_b",
        "winner",
        WINNERS,
        prompts=(),
        implicit=True,
    ),
    _two("PKU-SafeRLHF", "response_0", "response_1", "better_response_id", {0: 1.0, 1: 0.0}),
    _two("WebGPT", "answer_0", "answer_1", ("score_0", "score_1"), lambda first, second: _preference(first - second)),
    _two("SHP", "human_ref_A", "human_ref_B", "labels", {1: 1.0, 0: 0.0}, prompts=("history",)),
    _two("HelpSteer2", "response_1", "response_2", "preference_strength", lambda value: _preference(-value)),
    _two(
        "HelpSteer3",
        "response1",
        "response2",
        "overall_preference",
        lambda value: _preference(-value),
        prompts=("context",),
    ),
    _two("LLMBar", "output_1", "output_2", "label", {1: 1.0, 2: 0.0}),
)


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
