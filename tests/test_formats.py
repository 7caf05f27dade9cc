"""Layouts of rows: which is found, what becomes of a row, and what is refused rather than guessed."""

import itertools
import json
import logging

import pytest
from conftest import CHAT_TEMPLATE, assistant, user
from datasets import Dataset, load_dataset

from gpm_trl import Renderer, prepare_dataset
from gpm_trl.cli.quickstart import byte_tokenizer
from gpm_trl.data.cyclic import ASPECTS
from gpm_trl.data.formats import (
    as_messages,
    comparisons_and_targets,
    find_layout,
    prompt_and_responses,
    template_kwargs,
)
from gpm_trl.data.renderer import ReleasedRenderer, RewardModelRenderer

SYSTEM = {"role": "system", "content": "Be terse."}


def chat_tokenizer(template=CHAT_TEMPLATE):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def read(row, column_mapping=None, **settings):
    """A row as a prompt, its responses and, for each comparison, P(first is preferred)."""
    row = find_layout(row, column_mapping, **settings).read(row)
    prompt, responses = prompt_and_responses(row)
    pairs, labels = comparisons_and_targets(row, len(responses), "label")
    return prompt, responses, dict(zip(map(tuple, pairs), labels, strict=True))


def rated(response, *ratings):
    annotations = {aspect: {"Rating": rating} for aspect, rating in zip(ASPECTS, ratings, strict=True)}
    return {"response": response, "annotations": annotations, "custom_system_prompt": "-", "overall_score": 1.0}


TWO = ("q", ["a", "b"])
NECTAR = [{"answer": "c", "model": "m", "rank": 2.0}, {"answer": "a", "model": "m", "rank": 1.0}]
RATED = [rated("a", "5", "1", "N/A", "3"), rated("b", "4", "4", "4", "4"), rated("c", *["N/A"] * 4)]
TURNS_A, TURNS_B = [user("q"), assistant("a")], [user("q"), assistant("b")]
WITH_SYSTEM = ([SYSTEM, user("q")], [[assistant("a")], [assistant("b")]], {(0, 1): 1.0})
# The columns of what is published, with some of those that are not read; and what becomes of a row.
PUBLISHED = {
    "explicit prompt": ({"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 3.0}, (*TWO, {(0, 1): 1.0})),
    "UltraFeedback binarized": (
        {"prompt": "q", "prompt_id": "7", "chosen": TURNS_A, "rejected": TURNS_B, "messages": TURNS_A},
        ([user("q")], [[assistant("a")], [assistant("b")]], {(0, 1): 1.0}),
    ),
    "Orca DPO": ({"system": "Be terse.", "question": "q", "chosen": "a", "rejected": "b"}, WITH_SYSTEM),
    "system and input": ({"system_prompt": "Be terse.", "input": "q", "chosen": "a", "rejected": "b"}, WITH_SYSTEM),
    "no system": (
        {"system": None, "instruction": "q", "chosen": "a", "rejected": "b"},
        ([user("q")], WITH_SYSTEM[1], {(0, 1): 1.0}),
    ),
    "a system and messages": (
        {"system": "Be terse.", "chosen": TURNS_A, "rejected": [SYSTEM, *TURNS_B][1:]},
        WITH_SYSTEM,
    ),
    "a system that is there": (
        {"system": "Be terse.", "chosen": [SYSTEM, *TURNS_A], "rejected": [SYSTEM, *TURNS_B]},
        WITH_SYSTEM,
    ),
    "ShareGPT": (
        {
            "conversations": [{"from": "system", "value": "Be terse."}, {"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        WITH_SYSTEM,
    ),
    "K responses": (
        {"prompt": "q", "responses": ["a", "b"], "comparisons": [[1, 0, 0.5]], "label": None},
        (*TWO, {(1, 0): 0.5}),
    ),
    "ranked responses": ({"prompt": "q", "responses": ["a", "b"], "ranks": [2, 1]}, (*TWO, {(1, 0): 1.0})),
    "tied ranks": ({"prompt": "q", "responses": ["a", "b"], "ranks": [1.5, 1.5]}, (*TWO, {(0, 1): 0.5})),
    "a response without a rank": (
        {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [2, None, 1]},
        ("q", ["a", "b", "c"], {(2, 0): 1.0}),
    ),
    "Nectar": (
        {"prompt": "q", "answers": NECTAR, "turns": 1, "num_responses": 2, "source": ["x"], "good_natured": True},
        ("q", ["c", "a"], {(1, 0): 1.0}),
    ),
    "UltraFeedback": (
        {"source": "x", "instruction": "q", "models": [], "completions": RATED, "correct_answers": []},
        ("q", ["a", "b", "c"], {(1, 0): 1.0}),
    ),
    "RewardBench": (
        {
            "prompt": "q",
            "chosen": "a",
            "chosen_model": "m",
            "rejected": "b",
            "rejected_model": "n",
            "subset": "s",
            "id": 1,
        },
        (*TWO, {(0, 1): 1.0}),
    ),
    "RewardBench 2": (
        {"id": "1", "prompt": "q", "chosen": ["a"], "rejected": ["b", "c"], "num_correct": 1, "subset": "Math"},
        ("q", ["a", "b", "c"], {(0, 1): 1.0, (0, 2): 1.0}),
    ),
    "Arena": (
        {
            "question_id": "1",
            "model_a": "m",
            "model_b": "n",
            "winner": "model_b",
            "judge": "j",
            "turn": 1,
            "conversation_a": TURNS_A,
            "conversation_b": TURNS_B,
        },
        ([user("q")], [[assistant("a")], [assistant("b")]], {(0, 1): 0.0}),
    ),
    "Arena, parts": (
        {
            "winner": "both_bad",
            "full_conversation": [],
            **{
                f"conversation_{side}": [
                    {"role": role, "content": [{"type": "text", "text": text, "image": None}]}
                    for role, text in (("user", "q"), ("assistant", side))
                ]
                for side in "ab"
            },
        },
        ([user("q")], [[assistant("a")], [assistant("b")]], {(0, 1): 0.5}),
    ),
    "PKU-SafeRLHF": (
        {
            "prompt": "q",
            "response_0": "a",
            "response_1": "b",
            "prompt_source": "x",
            "is_response_0_safe": False,
            "better_response_id": 1,
            "safer_response_id": 0,
        },
        (*TWO, {(0, 1): 0.0}),
    ),
    "WebGPT": (
        {
            "question": {"dataset": "d", "id": "1", "full_text": "q"},
            "quotes_0": {"title": []},
            "answer_0": "a",
            "tokens_0": {},
            "score_0": -0.5,
            "quotes_1": {},
            "answer_1": "b",
            "tokens_1": {},
            "score_1": 0.5,
        },
        (*TWO, {(0, 1): 0.0}),
    ),
    "WebGPT, tie": (
        {"question": {"full_text": "q"}, "answer_0": "a", "score_0": 0.0, "answer_1": "b", "score_1": 0.0},
        (*TWO, {(0, 1): 0.5}),
    ),
    "SHP": (
        {
            "post_id": "1",
            "domain": "d",
            "history": "q",
            "human_ref_A": "a",
            "human_ref_B": "b",
            "labels": 1,
            "score_A": 3,
        },
        (*TWO, {(0, 1): 1.0}),
    ),
    "HelpSteer2": (
        {
            "split": "train",
            "prompt": "q",
            "response_1": "a",
            "response_2": "b",
            "preference_strength": -2,
            "preference_statement": "s",
        },
        (*TWO, {(0, 1): 1.0}),
    ),
    "HelpSteer3": (
        {
            "domain": "general",
            "language": "en",
            "context": [user("q")],
            "response1": "a",
            "response2": "b",
            "overall_preference": 0,
        },
        ([user("q")], ["a", "b"], {(0, 1): 0.5}),
    ),
    "LLMBar": ({"input": "q", "output_1": "a", "output_2": "b", "label": 2}, (*TWO, {(0, 1): 0.0})),
}
WINNERS = {"model_a": 1.0, "A": 1.0, "model_b": 0.0, "b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_row_is_read(name):
    row, expected = PUBLISHED[name]
    assert read(row) == expected


@pytest.mark.parametrize(("winner", "label"), WINNERS.items())
def test_a_winner_is_a_label(winner, label):
    row = {"prompt": "q", "response_a": "a", "response_b": "b", "winner": winner}
    assert read(row) == (*TWO, {(0, 1): label})


@pytest.mark.parametrize(("rating", "pairs"), [("mean", {(1, 0): 1.0}), (ASPECTS[0], {(0, 1): 1.0}), (ASPECTS[2], {})])
def test_ultrafeedback_is_compared_by_an_aspect_or_their_mean(rating, pairs):
    row, (prompt, responses, _) = PUBLISHED["UltraFeedback"]
    assert read(row, {"rating": rating}) == (prompt, responses, pairs)
    assert rating in find_layout(row, {"rating": rating}).name


def test_the_columns_that_are_not_read_are_listed():
    layout = find_layout(PUBLISHED["Nectar"][0])
    assert str(layout) == "read as Nectar (ranked answers), without `good_natured`, `num_responses`, `source`, `turns`"


def test_columns_are_mapped_and_left_out():
    row = {"query": "q", "good": "a", "bad": "b", "context": "c"}
    mapping = {"prompt": "query", "chosen": "good", "rejected": "bad", "context": None}
    assert read(row, mapping) == (*TWO, {(0, 1): 1.0})
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert read(row, {"chosen": "rejected", "rejected": "chosen"}) == ("q", ["b", "a"], {(0, 1): 1.0})
    assert read({**PUBLISHED["PKU-SafeRLHF"][0]}, {"better_response_id": "safer_response_id"})[2] == {(0, 1): 1.0}


def test_a_row_without_a_mapped_column_is_refused():
    layout = find_layout({"query": "q", "chosen": "a", "rejected": "b"}, {"prompt": "query"})
    with pytest.raises(ValueError, match="not as in chosen and rejected: KeyError: 'query'"):
        layout.read({"chosen": "a", "rejected": "b"})


PAIR = {"chosen": "a", "rejected": "b"}
REFUSED_COLUMNS = [
    ({"query": "q", **PAIR}, None, r'`query` may be a part of the prompt.*no column is read.*{"prompt": "query"}'),
    (
        {"prompt": "q", "question": "p", **PAIR},
        None,
        r"`question` may be.*only `prompt` is read.*{\"question\": null}",
    ),
    *(
        ({"prompt": "q", name: "p", **PAIR}, None, f"`{name}` may be a part of the prompt")
        for name in (
            "context",
            "history",
            "post",
            "systemPrompt",
            "user_input",
            "Images",
            "system_message"[:6] + "_text",
        )
    ),
    *(({name: "q", **PAIR}, None, f"`{name}` may be a part of the prompt") for name in ("messages", "task", "q")),
    ({"prompt": "q", **PAIR}, [1], r"`column_mapping` is \[1\]: give a dictionary"),
    ({"prompt": "q", "answer": "a"}, None, "`answer`, `prompt` fit no layout.*Nectar"),
    ({"prompt": "q", **PAIR, "responses": [], "comparisons": []}, None, "fit several layouts.*K responses"),
    ({"prompt": "q", "responses": ["a"]}, None, "no `comparisons`"),
    ({"text": "q", "responses": ["a"], "ranks": [1]}, None, "None of .* is a prompt"),
    ({"prompt": "q", **PAIR}, {"prompt": "query"}, "`column_mapping` names `query`, but the columns are `chosen`"),
    ({"prompt": "q", **PAIR}, {"context": None}, "`column_mapping` names `context`"),
    (
        {"prompt": "q", **PAIR, "good": "a"},
        {"choosen": "good"},
        "`column_mapping` has `choosen`, which .* does not read",
    ),
    ({"prompt": "q", **PAIR}, {"rating": "honesty"}, "`rating`, which chosen and rejected does not read"),
    (PUBLISHED["UltraFeedback"][0], {"rating": "honest"}, "`rating` is 'honest': choose one of"),
]


@pytest.mark.parametrize(("row", "mapping", "message"), REFUSED_COLUMNS)
def test_columns_are_refused_rather_than_guessed(row, mapping, message):
    with pytest.raises(ValueError, match=message):
        find_layout(row, mapping)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "response_a": "a", "response_b": "b", "winner": None}, "`winner` is None: it is one of"),
        ({"prompt": "q", "answers": [{"answer": "a"}]}, "not as in Nectar .*KeyError: 'rank'"),
        ({"prompt": "q", "answers": "a"}, "not as in Nectar"),
        ({"prompt": "q", "responses": ["a", "b"], "ranks": [1]}, r"The ranks are \[1\]"),
        ({"prompt": "q", "responses": ["a", "b"], "ranks": [1, float("nan")]}, "differ by nan"),
        ({"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": "x"}, "not as in HelpSteer2"),
        ({"system": "s", **PAIR}, "have no prompt apart"),
        ({"system": "s", "prompt": [SYSTEM, user("q")], **PAIR}, "another system message"),
        ({"prompt": "q", "responses": ["a", "b"], "comparisons": 5}, "`comparisons` is 5: give a list"),
        ({"prompt": "q", "responses": 5, "comparisons": [[0, 1]]}, "a list of `responses`"),
        ({"prompt": 5, **PAIR}, "The prompt is 5, but"),
        ({"prompt": "q", "responses": ["a", "b"], "comparisons": [[0, "b"]]}, "is not of two of the responses 0 to 1"),
        ({"prompt": "q", "responses": ["a", "b"], "comparisons": [5]}, r"is \[i, j\] or"),
        ({"prompt": "q", **PAIR, "comparisons": [[1, 0]]}, '`comparisons` would be ignored, .* {"comparisons": null}'),
        ({"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2], "label": 0.3}, "`label` would be ignored"),
        (
            {"prompt": "q", "response_a": "a", "response_b": "b", "winner": "a", "label": 0.7},
            r"`label` would be ignored, since the layout \(two responses and a winner\) has its own",
        ),
    ],
)
def test_a_row_that_is_not_as_its_layout_has_it_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        read(row)


def test_texts_become_messages_if_asked():
    prompt, responses, _ = read({"prompt": "q", **PAIR}, chat=True)
    assert (prompt, responses) == ([user("q")], [[assistant("a")], [assistant("b")]])
    row = {"prompt": "q", "responses": ["a"]}
    row = find_layout(row, chat=True, compared=False).read(row)
    assert prompt_and_responses(row) == ([user("q")], [[assistant("a")]])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q: x A:", "chosen": "Q: x A: Seven.", "rejected": "Q: x A: Nine."},
        {"prompt": "Q: x A:", "responses": ["Q: x A: Seven.", "Q: x A: Nine."], "comparisons": [[0, 1]]},
        {"question": "Q: x A:", "chosen": ["Q: x A: Seven."], "rejected": ["Q: x A: Nine."]},
    ],
)
def test_a_prompt_that_texts_repeat_is_read_once(row, caplog):
    assert read(row) == ("Q: x A:", [" Seven.", " Nine."], {(0, 1): 1.0})
    prepare_dataset(Dataset.from_list([row]), Renderer(byte_tokenizer()))
    assert "1 rows repeat their prompt in all responses, which was read once" in caplog.text


@pytest.mark.parametrize(
    ("prompt", "endings"), [("Hello", ("! How are you?", " there.")), ("Is 1", ("0 a prime?", "1?"))]
)
def test_answers_that_begin_like_a_prompt_of_a_word_or_two_are_whole(prompt, endings):
    texts = [prompt + ending for ending in endings]
    assert read({"prompt": prompt, "chosen": texts[0], "rejected": texts[1]})[:2] == (prompt, texts)
    assert read({"prompt": prompt, "responses": texts, "comparisons": [[0, 1]]})[:2] == (prompt, texts)


@pytest.mark.parametrize("prompt", ["q", " q\n", "Human: q Assistant:"])
def test_a_string_beside_conversations_is_their_beginning(prompt):
    assert read({"prompt": prompt, "chosen": TURNS_A, "rejected": TURNS_B})[0] == [user("q")]


def test_a_string_beside_conversations_that_says_something_else_is_refused():
    row = {"prompt": "Be brief.", "chosen": TURNS_A, "rejected": TURNS_B}
    with pytest.raises(
        ValueError, match=r"'Be brief.' beside messages that do not begin with it: .* {\"prompt\": null}"
    ):
        read(row)
    assert read(row, {"prompt": None})[0] == [user("q")]


def test_a_prompt_that_conversations_repeat_is_read_once():
    expected = ([user("q")], [[assistant("a")], [assistant("b")]], {(0, 1): 1.0})
    assert read({"prompt": [user("q")], "chosen": TURNS_A, "rejected": TURNS_B}) == expected
    assert read({"prompt": [user("q")], "responses": [TURNS_A, TURNS_B], "comparisons": [[0, 1]]}) == expected


def test_one_response_that_begins_like_the_prompt_is_left_as_it_is():
    assert read({"prompt": "Hi", "chosen": "Hi there", "rejected": "No"})[1] == ["Hi there", "No"]


# Messages


def parts(role, *texts):
    return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}


SAME_MESSAGES = [
    ([parts("user", "Name", " one.")], [[parts("assistant", "Seven.")]]),
    ([{"from": "human", "value": "Name one."}], [[{"from": "gpt", "value": "Seven."}]]),
    ([{"from": "user", "value": "Name one."}], [[{"from": "model", "value": "Seven."}]]),
    ([{"role": "Human", "content": "Name one."}], [[{"role": "GPT", "content": "Seven."}]]),
    ([{"role": "prompter", "content": "Name one."}], [[{"role": "ai", "content": "Seven."}]]),
    ([user("Name one.") | {"tool_calls": None, "name": None}], [assistant("Seven.") | {"tool_calls": None}]),
]


@pytest.mark.parametrize("renderer", [Renderer, RewardModelRenderer, ReleasedRenderer])
@pytest.mark.parametrize(("prompt", "responses"), SAME_MESSAGES)
def test_spellings_of_messages_are_rendered_alike(prompt, responses, renderer):
    renderer = renderer(chat_tokenizer(CHAT_TEMPLATE + "{{ 'CALLS' if 'tool_calls' in messages[-1] }}"))
    assert renderer.encode(prompt, responses) == renderer.encode([user("Name one.")], ["Seven."])


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "user", "content": [{"type": "image"}]}, r"\{'type': 'image'\}, but only parts of text"),
        ({"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image", "text": ""}]}, "'image'"),
        ({"role": "user", "content": ["q"]}, "only parts of text"),
        ({"role": "user", "content": {"parts": ["q"]}}, "The content of a message is"),
        ({"role": "user", "content": 5}, "The content of a message is 5"),
        ({"role": "user", "content": None}, "The content of a message is None"),
        ({"role": "user", "text": "q"}, "The content of a message is None"),
        ({"content": "q"}, r"\['content'\], but it needs `role`"),
    ],
)
def test_messages_that_are_none_are_refused(message, error):
    with pytest.raises(ValueError, match=error):
        Renderer(chat_tokenizer()).encode([message], ["a"])


KNOWN_ROLES = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<{{ m.role }}>{{ m.content }}</s>{% endif %}"
    "{% endfor %}"
)


@pytest.mark.parametrize("renderer", [Renderer, RewardModelRenderer, ReleasedRenderer])
@pytest.mark.parametrize("responses", [["Seven.", "Nine."], ["Seven."], ["q", "r"]])
def test_a_template_that_writes_nothing_of_a_response_is_said(renderer, responses):
    renderer = renderer(chat_tokenizer(KNOWN_ROLES))
    critics = [[{"role": "critic", "content": text}] for text in responses]
    with pytest.raises(ValueError, match="writes nothing of the content of a message of the role 'critic'"):
        renderer.encode([user("q")], critics)
    renderer.encode([user("q")], responses)


@pytest.mark.parametrize("renderer", [Renderer, RewardModelRenderer, ReleasedRenderer])
def test_a_template_that_writes_nothing_of_a_prompts_message_is_said(renderer):
    prompt = [user("q"), {"role": "critic", "content": "Which?"}]
    with pytest.raises(ValueError, match="writes nothing of the content of a message of the role 'critic'"):
        renderer(chat_tokenizer(KNOWN_ROLES)).encode(prompt, ["a", "b"])


@pytest.mark.parametrize("content", [None, "Well."])
def test_a_template_that_writes_no_tool_calls_is_said(content):
    response = {**call(x=1), "content": content}
    no_calls = "{% for m in messages %}{{ m.content or '' }}</s>{% endfor %}"
    with pytest.raises(ValueError, match="writes nothing of the tool calls of a message"):
        Renderer(chat_tokenizer(no_calls)).encode([user("q")], [[response]])
    Renderer(chat_tokenizer(TOOLS_TEMPLATE)).encode([user("q")], [[response]])


def test_a_template_may_change_what_it_writes():
    template = KNOWN_ROLES.replace("m.content", "m.content.split('</think>')[-1] | trim | upper")
    _, (first, second) = Renderer(chat_tokenizer(template)).encode([user("q")], ["<think>x</think> b", "b "])
    assert first == second


@pytest.mark.parametrize(
    "name", ["chat_template", "tokenize", "add_generation_prompt", "continue_final_message", "return_tensors",
             "return_dict", "messages", "conversation", "eos_token", "max_length", "padding"],
)  # fmt: skip
def test_a_row_cannot_choose_how_its_template_is_called(name):
    row = {"prompt": [user("q")], **PAIR, "chat_template_kwargs": {name: "x", "mood": "calm"}}
    for renderer in (Renderer, RewardModelRenderer, ReleasedRenderer):
        with pytest.raises(ValueError, match=rf"`chat_template_kwargs` has \['{name}'\]"):
            renderer(chat_tokenizer()).encode(*prompt_and_responses(row), **template_kwargs(row))
    with pytest.raises(ValueError, match=f"Row 1: .*{name}"):
        prepare_dataset(Dataset.from_list([row]), Renderer(chat_tokenizer()))


def call(**arguments):
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


TOOLS_TEMPLATE = (
    "{{ tools | tojson if tools }}{% for m in messages %}<{{ m.role }}>{{ m.content if m.content }}"
    "{% if 'tool_calls' in m %}{{ m.tool_calls | tojson }}{% endif %}</s>{% endfor %}"
)


def test_nulls_that_arrow_adds_are_no_arguments(tmp_path):
    """The columns of a table have one type, so each call would get the arguments of all others."""
    tools = [
        [{"type": "function", "function": {"name": "f", "parameters": {"properties": {name: {"type": "integer"}}}}}]
        for name in "xy"
    ]
    rows = [
        {"prompt": [user("q")], "chosen": [call(x=1)], "rejected": [assistant("No.")], "tools": tools[0]},
        {"prompt": [user("q")], "chosen": [call(y=[2])], "rejected": [call(y=[3])], "tools": tools[1]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from_file = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=tmp_path)
    renderer = Renderer(chat_tokenizer(TOOLS_TEMPLATE))
    expected = [renderer.encode(*prompt_and_responses(row), **template_kwargs(row)) for row in rows]
    for dataset in (Dataset.from_list(rows), from_file):
        groups = prepare_dataset(dataset, renderer)
        assert [(group["prompt_ids"], group["response_ids"]) for group in groups] == expected


def test_a_null_prompt_is_an_error_where_nothing_else_can_be_it():
    layout = find_layout(["question", "chosen", "rejected"])
    with pytest.raises(ValueError, match="`question` is null, and the responses do not begin with a prompt"):
        layout.read({"question": None, "chosen": "Seven.", "rejected": "Nine."})
    both = {"question": None, "chosen": "Name a prime. Seven.", "rejected": "Name a prime. Nine."}
    assert prompt_and_responses(layout.read(both))[0] == "Name a prime."
    assert prompt_and_responses(layout.read({"question": None, "chosen": TURNS_A, "rejected": TURNS_B}))[0]


@pytest.mark.parametrize("role", ["User", "SYSTEM", "Tool", "Assistant"])
def test_roles_in_capitals_are_the_same(role):
    assert as_messages([{"role": role, "content": "x"}]) == [{"role": role.lower(), "content": "x"}]


def test_implicit_prompts_are_found_though_arrow_adds_nulls_to_one_column():
    rows = [
        {"chosen": [user("q"), call(x=1)], "rejected": [user("q"), assistant("No.")]},
        {"chosen": TURNS_A, "rejected": TURNS_B},
    ]
    renderer = Renderer(chat_tokenizer(TOOLS_TEMPLATE))
    for group in prepare_dataset(Dataset.from_list(rows), renderer):
        assert renderer.tokenizer.decode(group["prompt_ids"]) == "<user>q</s>"


# What was read, and how a model was trained


def test_the_reading_is_said_once_with_its_counts(caplog):
    rows = [
        {"prompt": "q", "answers": [{"answer": text, "rank": rank} for text, rank in zip("abc", ranks, strict=True)]}
        for ranks in ([1, 2, 3], [1, 1, 2], [1, 2, None])
    ]
    prepare_dataset(Dataset.from_list(rows), Renderer(byte_tokenizer()))
    expected = "train dataset read as Nectar (ranked answers): 3 rows: 6 comparisons, 1 ties, 1 responses that are"
    assert caplog.text.count(expected) == 1


def test_targets_of_the_other_loss_and_preparations_are_told(caplog):
    renderer = Renderer(byte_tokenizer())
    groups = prepare_dataset(Dataset.from_list([{"prompt": "q", **PAIR, "score": -1.0}]), renderer)
    assert "read as chosen and rejected, without `score`: 1 rows" in caplog.text
    assert prepare_dataset(groups, renderer, target="score") is groups
    assert "train dataset is tokenized already: it has the limits, targets and groups of its prepar" in caplog.text


@pytest.mark.parametrize("as_stream", [False, True])
def test_rows_without_a_comparison_are_left_out(as_stream, caplog):
    rows = [{"prompt": "q", "responses": ["a", "b"], "ranks": ranks} for ranks in ([1, 2], [None, None])]
    dataset = Dataset.from_list(rows)
    dataset = dataset.to_iterable_dataset() if as_stream else dataset
    assert len(list(prepare_dataset(dataset, Renderer(byte_tokenizer())))) == 1


@pytest.mark.parametrize(("trained", "given"), [*itertools.product((True, False, None), (True, False))])
def test_texts_of_another_kind_than_in_training_are_warned_of_once(trained, given, caplog):
    from transformers.utils import logging as transformers_logging

    transformers_logging.get_logger("transformers").warning_once.cache_clear()
    renderer = Renderer(chat_tokenizer(), conversational=trained)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            renderer.encode([user("q")] if given else "q", ["a"])
    assert caplog.text.count("The model is trained on") == (trained is not None and trained != given)
