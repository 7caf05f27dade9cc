"""
The one reader of rows: from a layout of preference data to a prompt, responses to it and comparisons between these.

[`find_layout`] recognises a layout by its columns, and reads its rows as one of two: a pair (`chosen`, `rejected` and
maybe `prompt`), or K-way (`prompt`, `responses`, `comparisons`). Another published layout is one more entry of
`LAYOUTS`.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

from .cyclic import ASPECTS, RatedPrompt

__all__ = [
    "Layout",
    "comparisons_and_labels",
    "comparisons_and_targets",
    "find_layout",
    "prompt_and_responses",
    "template_kwargs",
]

PROMPTS = ("prompt", "question", "instruction", "input")
SYSTEMS = ("system", "system_prompt")
EXTRA_COLUMNS = ("comparisons", "label", "score", "margin", "tools", "chat_template_kwargs")
# Last words of names of columns that may be a part of the prompt. OTHER_WORDS count where no prompt was found: beside
# one, such columns are often copies of it.
PROMPT_WORDS = (
    "article|audio|context|document|history|human|image|input|instruction|passage|post|problem|prompt|query|question|"
    "request|system|system_message|text|user|video"
)
OTHER_WORDS = "ask|conversation|dialog|dialogue|goal|inst|message|premise|q|scenario|statement|task|title|topic|turn"


class RowError(ValueError):
    """A row cannot be read or rendered; the message begins with its number, from 1."""


@dataclass(frozen=True)
class Layout:
    """How rows are read: what [`find_layout`] returns."""

    name: str
    columns: tuple[str, ...]  # by which it is recognised
    reader: Callable[[dict[str, Any]], dict[str, Any]]  # makes a pair or K-way row of one that has these
    prompts: tuple[str | None, ...] = PROMPTS  # one of which is the prompt; None where responses may begin with it
    unused: tuple[str, ...] = ()  # the columns that are not read
    mapping: Mapping[str, str | None] | None = None
    prompt: str | None = None  # its column, and that of a system message before it
    system: str | None = None
    chat: bool = False  # whether texts become messages

    def __str__(self) -> str:
        return f"read as {self.name}" + (f", without {_quote(self.unused)}" if self.unused else "")

    def read(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row as a pair or K-way row; raises `ValueError` if it is not as the layout has it."""
        mapping = {name: column for name, column in self.mapping.items() if column is not None}
        moved = {*self.mapping, *mapping.values()}
        try:
            mapped = {name: column if name == "rating" else row[column] for name, column in mapping.items()}
            row = {name: value for name, value in row.items() if name not in moved} | mapped
            prompt = row.get(self.prompt)
            prompt = prompt.get("full_text", prompt) if isinstance(prompt, dict) else prompt  # WebGPT's questions
            read = self.reader(row)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"The row is not as in {self.name}: {type(error).__name__}: {error}.") from error
        # A pair is one comparison; and what the layout itself says is not what a column beside it says.
        taken = {*read, *(("comparisons",) if "chosen" in read else ())} - {*self.columns}
        if clash := [name for name in ("comparisons", "label") if name in taken and row.get(name) is not None]:
            remedy = f'leave it out by `column_mapping`, {{"{clash[0]}": null}}'
            raise ValueError(f"`{clash[0]}` would be ignored, since the layout ({self.name}) has its own: {remedy}.")
        read = {"prompt": prompt} | {name: row[name] for name in EXTRA_COLUMNS if name in row} | read
        if self.prompt is not None and prompt is None and "chosen" in read and not prompt_and_responses(read)[0]:
            name = mapping.get(self.prompt, self.prompt)
            raise ValueError(f"`{name}` is null, and the responses do not begin with a prompt that they share.")
        return _as_conversation(read, row.get(self.system)) if self.system or self.chat else read


def find_layout(
    columns: Iterable[str],
    column_mapping: Mapping[str, str | None] | None = None,
    compared: bool = True,
    chat: bool = False,
) -> Layout:
    """
    Recognise the layout of preference data by its columns.

    Args:
        columns (iterable of `str`): The columns of the dataset, or of a row.
        column_mapping (`dict`, *optional*): Columns to read for those of a layout, as `{"prompt": "query"}`; `None`
            for one to leave out. `rating` is the aspect by which UltraFeedback's completions are compared, or
            `"mean"`, the default.
        compared (`bool`, defaults to `True`): Whether `responses` need `comparisons`, or are only to be ranked.
        chat (`bool`, defaults to `False`): Whether texts become messages of a user and an assistant.

    Raises:
        ValueError: If the columns fit no layout or several, if one that may be a part of the prompt would not be read,
            or if the mapping names a column that is not there or not read.

    Example:

    ```python
    >>> from gpm_trl.data.formats import find_layout
    >>> layout = find_layout(["question", "chosen", "rejected"])
    >>> layout.read({"question": "Name a prime.", "chosen": "Seven.", "rejected": "Nine."})
    {'prompt': 'Name a prime.', 'chosen': 'Seven.', 'rejected': 'Nine.'}

    ```
    """
    if not isinstance(column_mapping, dict | None):
        raise ValueError(f'`column_mapping` is {column_mapping!r}: give a dictionary, {{"prompt": "query"}}.')
    columns, mapping = set(columns), {**(column_mapping or {})}
    sources = {column or name for name, column in mapping.items() if name != "rating"}
    if missing := sorted(sources - columns):
        raise ValueError(f"`column_mapping` names {_quote(missing)}, but the columns are {_quote(columns)}.")
    columns = (columns - sources - {*mapping}) | {name for name, column in mapping.items() if column is not None}
    fitting = [layout for layout in LAYOUTS if columns.issuperset(layout.columns)]
    # A list with ranks is no K-way row with a column that is not read.
    fitting = [layout for layout in fitting if not any(set(layout.columns) < set(other.columns) for other in fitting)]
    if len(fitting) != 1:
        names = "; ".join(f"{layout.name}: {_quote(layout.columns)}" for layout in fitting or LAYOUTS)
        raise ValueError(
            f"The columns {_quote(columns)} fit {'several layouts' if fitting else 'no layout'}: choose one by "
            f'`column_mapping`, such as {{"chosen": "good"}}, or {{"chosen": null}} to leave a column out. {names}.'
        )
    (layout,) = fitting
    if compared and layout.columns == ("responses",) and "comparisons" not in columns:
        raise ValueError(f"The columns {_quote(columns)} have no `comparisons` of `responses`: add these, or `ranks`.")
    prompts, systems = ([name for name in names if name in columns] for names in (layout.prompts, SYSTEMS))
    if not prompts and None not in layout.prompts:
        raise ValueError(f'None of {_quote(columns)} is a prompt: map one by `column_mapping`, {{"prompt": "query"}}.')
    prompt, system = next(iter(prompts), None), next(iter(systems), None)
    rated = "completions" in layout.columns
    unused = columns - {*layout.columns, *EXTRA_COLUMNS, prompt, system, "rating" if rated else None}
    words = PROMPT_WORDS if prompt or layout.prompts == (None,) else f"{PROMPT_WORDS}|{OTHER_WORDS}"
    for name in sorted(unused):
        if name in mapping:
            raise ValueError(f"`column_mapping` has `{name}`, which {layout.name} does not read: leave it out.")
        if re.search(f"(^|[^a-z])({words})s?$", re.sub("([A-Z])", r"_\1", name).lower()):
            raise ValueError(
                f"`{name}` may be a part of the prompt, but {f'only `{prompt}`' if prompt else 'no column'} is read: "
                f'map it by `column_mapping`, {{"prompt": "{name}"}}, or leave it out, {{"{name}": null}}.'
            )
    if rated:
        mapping = {"rating": "mean", **mapping}
        if mapping["rating"] not in (*ASPECTS, "mean"):
            raise ValueError(f"`rating` is {mapping['rating']!r}: choose one of {(*ASPECTS, 'mean')}.")
        layout = replace(layout, name=f"{layout.name}, by {mapping['rating']}")
    return replace(layout, unused=tuple(sorted(unused)), mapping=mapping, prompt=prompt, system=system, chat=chat)


def _quote(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _as_conversation(row: dict[str, Any], system: str | None) -> dict[str, Any]:
    """A pair or K-way row as messages, with that of `system` before the prompt."""
    prompt, responses = prompt_and_responses(row)
    if isinstance(prompt, str):
        if row["prompt"] is None:
            raise ValueError("Texts become messages here, but these have no prompt apart: give it as `prompt`.")
        prompt = [{"role": "user", "content": prompt}]
    if system and prompt[:1] != [{"role": "system", "content": system}]:
        if prompt and prompt[0].get("role") == "system":
            raise ValueError("The prompt begins with another system message than that beside it: keep one.")
        prompt = [{"role": "system", "content": system}, *prompt]
    responses = list(map(as_messages, responses))
    texts = {"chosen": responses[0], "rejected": responses[1]} if "chosen" in row else {"responses": responses}
    return {**row, "prompt": prompt, **texts}


def _read_chosen(row: dict[str, Any]) -> dict[str, Any]:
    chosen, rejected = row["chosen"], row["rejected"]
    if not all(isinstance(texts, list) and texts and isinstance(texts[0], str) for texts in (chosen, rejected)):
        return {"chosen": chosen, "rejected": rejected}
    # As RewardBench 2 has them: each of the one is preferred to each of the other.
    pairs = product(range(len(chosen)), range(len(chosen), len(chosen) + len(rejected)))
    return {"responses": [*chosen, *rejected], "comparisons": list(map(list, pairs))}


def _read_ranked(responses: list, ranks: list[float | None]) -> dict[str, Any]:
    """All comparisons of ranked responses, of which the lowest is the best. Without a rank, they are in none."""
    if not isinstance(responses, list) or not isinstance(ranks, list) or len(ranks) != len(responses):
        raise ValueError(f"The ranks are {ranks!r}: give a list with one for each response.")
    ranked = [number for number, rank in enumerate(ranks) if rank is not None]
    pairs = [sorted(pair, key=ranks.__getitem__) for pair in combinations(ranked, 2)]
    return {"responses": responses, "comparisons": pairs, "label": [_sign(ranks[j] - ranks[i]) for i, j in pairs]}


def _read_rated(row: dict[str, Any]) -> dict[str, Any]:
    rated = RatedPrompt.from_row(row)
    aspects = ASPECTS if row["rating"] == "mean" else (row["rating"],)
    values = [[ratings[aspect] for aspect in aspects if aspect in ratings] for ratings in rated.ratings]
    return _read_ranked(rated.responses, [-sum(given) / len(given) if given else None for given in values])


def _sign(difference: float) -> float:
    """The label of a comparison by the sign of a number: 1, 0, or 0.5 for a tie."""
    if not math.isfinite(difference):
        raise ValueError(f"Responses differ by {difference}: give finite numbers.")
    return (1.0 + (difference > 0) - (difference < 0)) / 2


def _two(
    name: str, first: str, second: str, *by: str, label: dict | Callable, prompts: tuple[str | None, ...] = PROMPTS
) -> Layout:
    """Two responses, and the columns that compare them: `label` is a table of the first's values, or a function."""

    def read(row: dict[str, Any]) -> dict[str, Any]:
        values = [row[column] for column in by]
        if isinstance(label, dict) and values[0] not in label:
            raise ValueError(f"`{by[0]}` is {values[0]!r}: it is one of {list(label)} in {name}.")
        preferred = label[values[0]] if isinstance(label, dict) else label(*values)
        return {"chosen": row[first], "rejected": row[second], "label": preferred}

    return Layout(name, (first, second, *by), read, prompts)


WINNERS = {"model_a": 1.0, "model_b": 0.0, "a": 1.0, "b": 0.0, "A": 1.0, "B": 0.0}
WINNERS |= {"response_a": 1.0, "response_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5, "both_bad": 0.5}
LAYOUTS = (
    Layout("chosen and rejected", ("chosen", "rejected"), _read_chosen, (*PROMPTS, "conversations", None)),
    Layout("K responses", ("responses",), lambda row: {"responses": row["responses"]}),
    Layout("ranked responses", ("responses", "ranks"), lambda row: _read_ranked(row["responses"], row["ranks"])),
    Layout(
        "Nectar (ranked answers)",
        ("answers",),
        lambda row: _read_ranked(*([answer[key] for answer in row["answers"]] for key in ("answer", "rank"))),
    ),
    Layout("UltraFeedback (rated completions)", ("completions",), _read_rated, ("instruction",)),
    _two("two responses and a winner", "response_a", "response_b", "winner", label=WINNERS),
    _two("Arena (two conversations)", "conversation_a", "conversation_b", "winner", label=WINNERS, prompts=(None,)),
    _two("PKU-SafeRLHF", "response_0", "response_1", "better_response_id", label={0: 1.0, 1: 0.0}),
    _two("WebGPT", "answer_0", "answer_1", "score_0", "score_1", label=lambda first, second: _sign(first - second)),
    _two("SHP", "human_ref_A", "human_ref_B", "labels", label={1: 1.0, 0: 0.0}, prompts=("history",)),
    _two("HelpSteer2", "response_1", "response_2", "preference_strength", label=lambda value: _sign(-value)),
    _two(
        "HelpSteer3", "response1", "response2", "overall_preference", label=lambda v: _sign(-v), prompts=("context",)
    ),
    _two("LLMBar", "output_1", "output_2", "label", label={1: 1.0, 2: 0.0}, prompts=("input",)),
)


def prompt_and_responses(row: dict[str, Any]) -> tuple[Any, list[Any]]:
    """
    The prompt of a pair or K-way row, and the responses to it. A prompt that all responses repeat is read once (a
    text: of three words and more, since answers to "Hello" begin with it); messages become what [`as_messages`] makes
    of them.
    """
    prompt, is_pair = row.get("prompt"), "chosen" in row
    responses = [row["chosen"], row["rejected"]] if is_pair else row.get("responses")
    if not isinstance(responses, list) or (prompt is None and not is_pair):
        raise ValueError("A K-way row has a `prompt`, and a list of `responses`.")
    named = {"prompt": prompt} | {f"response {number}": text for number, text in enumerate(responses)}
    named = {what: text if isinstance(text, str | None) else as_messages(text, what) for what, text in named.items()}
    prompt, *responses = named.values()
    if is_pair:
        if None in responses or isinstance(responses[0], str) != isinstance(responses[1], str):
            raise ValueError("`chosen` and `rejected` must be strings or lists of messages, both of one kind.")
        # Beside conversations that begin with the prompt, datasets may repeat it as a string, or as messages.
        if prompt is None or (isinstance(prompt, str) and isinstance(responses[0], list)):
            shared, responses = _split_implicit_prompt(*responses)
            if prompt and not _tells(prompt, shared):
                raise ValueError(
                    f"`prompt` is {prompt!r:.80} beside messages that do not begin with it: make it messages, or "
                    'leave it out by `column_mapping`, {"prompt": null}.'
                )
            return shared, responses
    by_chance = isinstance(prompt, str) and len(prompt.split()) < 3
    if prompt and not by_chance and all(type(x) is type(prompt) and x[: len(prompt)] == prompt for x in responses):
        responses = [text[len(prompt) :] for text in responses]
    return prompt, responses


def _tells(prompt: str, messages: list[dict[str, Any]]) -> bool:
    """Whether a text is of the content of one of the messages, or holds it, as a transcript does; spaces aside."""
    prompt, *contents = (" ".join(text.split()) for text in (prompt, *(each["content"] or "" for each in messages)))
    return any(content and (content in prompt or prompt in content) for content in contents)


# The names of roles in ShareGPT's layout, and of what is seen for others; others are as they are.
ROLES = {role: role for role in ("system", "tool", "user")}
ROLES |= dict.fromkeys(("human", "prompter"), "user")
ROLES |= dict.fromkeys(("ai", "assistant", "bot", "chatgpt", "gpt", "model"), "assistant")
TOOL_ROLES = {"function": "tool", "function_response": "tool", "observation": "tool", "tool_response": "tool"}


def as_messages(text: str | dict | list[dict], what: str = "text") -> list[dict[str, Any]]:
    """
    A text as messages with `role` and `content`, which is a string, or `None` beside tool calls. A string is the
    content of an assistant's. ShareGPT's `from` and `value` and its names of roles are read, parts of text are joined,
    and what is null is left out, since Arrow fills rows up with it. `what` it is called in errors.
    """
    if isinstance(text, str):
        return [{"role": "assistant", "content": text}]
    text = [text] if isinstance(text, dict) else text
    if not isinstance(text, list) or not all(isinstance(message, dict) for message in text):
        raise ValueError(f"The {what} is {text!r:.50}, but a text is a string, or a list of messages (dictionaries).")
    return list(map(_as_message, text))


def _as_message(message: dict[str, Any]) -> dict[str, Any]:
    message = without_nulls(message)
    if "from" in message and "value" in message:
        role, content = message.pop("from"), message.pop("value")
        message = {"role": TOOL_ROLES.get(str(role).lower(), role), "content": content, **message}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise ValueError(f"A message has the keys {sorted(message)}, but it needs `role` and `content`.")
    if isinstance(content, list):
        for part in content:
            text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
            if not isinstance(text, str):
                raise ValueError(f"The content of a message has {part!r:.80}, but only parts of text can be read.")
        content = "".join(part["text"] for part in content)
    elif not isinstance(content, str) and (content is not None or "tool_calls" not in message):
        raise ValueError(f"The content of a message is {content!r:.80}: it is a string, or a list of parts of text.")
    return {**message, "role": ROLES.get(role.lower(), role), "content": content}


def without_nulls(value: Any) -> Any:
    """A value without the null entries of its dictionaries, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return list(map(without_nulls, value)) if isinstance(value, list) else value


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
    given = [[0, 1]] if "chosen" in row else row.get("comparisons")
    if not isinstance(given, list) or (not given and row.get("label") != []):  # ranks may all be missing
        raise ValueError(f"`comparisons` is {given!r}: give a list of at least one [i, j].")
    comparisons = []
    for comparison in given:
        if not isinstance(comparison, list) or len(comparison) not in (2, 3):
            raise ValueError(f"A comparison is [i, j] or [i, j, label], got {comparison}.")
        # Beside labels, Arrow stores indices as floats.
        pair = [int(index) for index in comparison[:2] if index in range(num_responses)]
        if len({*pair}) < 2:
            raise ValueError(f"The comparison {comparison} is not of two of the responses 0 to {num_responses - 1}.")
        comparisons.append(pair)
    inline = [comparison[2] if len(comparison) == 3 else 1.0 for comparison in given]
    if any(len(comparison) == 3 for comparison in given):
        if target != "label" or row.get(target) is not None:
            raise ValueError(f"`comparisons` has labels, but the targets come from `{target}`: write [i, j] alone.")
        row = {target: inline}
    targets = per_comparison({"label": inline, **row}, target, len(comparisons))
    for value in targets:
        if target == "label" and not 0 <= value <= 1:
            raise ValueError(f"`label` is {value}, but it is the probability that the first response is preferred.")
    return comparisons, targets


def comparisons_and_labels(row: dict[str, Any], num_responses: int) -> tuple[list[list[int]], list[float]]:
    """The comparisons of a row, and the probability that the first response is preferred; of scores, their sigmoid."""
    if row.get("label") is None and row.get("score") is not None:  # which are log-odds
        pairs, scores = comparisons_and_targets(row, num_responses, "score")
        return pairs, [(1 + math.tanh(score / 2)) / 2 for score in scores]
    return comparisons_and_targets(row, num_responses, "label")


def per_comparison(row: dict[str, Any], column: str, count: int) -> list[float]:
    """The numbers of a column, one for each of `count` comparisons."""
    value = row.get(column)
    values = value if isinstance(value, list) else [value]
    if len(values) != count or not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise ValueError(f"`{column}` is {value!r}: give a finite number for each of the {count} comparisons.")
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
    return {"tools": without_nulls(tools) or None, **without_nulls(given)}
