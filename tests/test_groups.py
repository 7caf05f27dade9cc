"""Rows of a preference dataset to groups."""

import json
from collections import Counter

import pytest
from conftest import CHAT_TEMPLATE, assistant, user
from datasets import Dataset, IterableDataset, load_from_disk
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from gpm_trl import Renderer, prepare_dataset
from gpm_trl.cli.quickstart import byte_tokenizer

NAN = float("nan")
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds."}}
SETTINGS_TEMPLATE = "{{ tools | tojson if tools }}{{ mood }}" + CHAT_TEMPLATE


def tokenizer_with(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def renderer():
    return Renderer(tokenizer_with(CHAT_TEMPLATE))


def prepare(rows, renderer, **settings):
    return prepare_dataset(Dataset.from_list(rows), renderer, **settings).to_list()


def describe(rows, renderer, **settings):
    return texts(prepare(rows, renderer, **settings), renderer.tokenizer)


def texts(groups, tokenizer):
    """Each group as its prompt and its comparisons: (preferred response, other response, target)."""
    described = []
    for group in groups:
        responses = [tokenizer.decode(ids) for ids in group["response_ids"]]
        pairs = zip(group["pairs"], group["targets"], strict=True)
        comparisons = [(responses[i], responses[j], target) for (i, j), target in pairs]
        described.append((tokenizer.decode(group["prompt_ids"]), comparisons))
    return described


def comparisons_of(groups):
    """Everything that is compared, whatever the grouping."""
    return Counter(
        (tuple(group["prompt_ids"]), tuple(group["response_ids"][i]), tuple(group["response_ids"][j]), target, margin)
        for group in groups
        for (i, j), target, margin in zip(group["pairs"], group["targets"], group["margins"], strict=True)
    )


# Formats

CONVERSATION = [{"role": "system", "content": "s"}, user("q"), assistant("a"), user("r")]
FULL = {"chosen": [*CONVERSATION, assistant("b")], "rejected": [*CONVERSATION, assistant("c")]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Two and two?", "chosen": " 4", "rejected": " Five"},
        {"chosen": "Two and two? 4", "rejected": "Two and two? Five"},
        {"prompt": None, "chosen": "Two and two? 4", "rejected": "Two and two? Five"},
        {"prompt": "Two and two?", "responses": [" 4", " Five"], "comparisons": [[0, 1]]},
        {"prompt": "Two and two?", "responses": [" Five", " 4"], "comparisons": [[1, 0, 1.0]]},
    ],
)
def test_plain_formats_give_the_same_group(renderer, row):
    groups = prepare([row], renderer)
    assert texts(groups, renderer.tokenizer) == [("Two and two?", [(" 4</s>", " Five</s>", 1.0)])]
    assert groups[0]["pairs"] == [[0, 1]]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": CONVERSATION, "chosen": [assistant("b")], "rejected": [assistant("c")]},
        {"prompt": CONVERSATION, "chosen": "b", "rejected": "c"},
        FULL,
        {**FULL, "prompt": None},
        {**FULL, "prompt": "r"},
        {**FULL, "prompt": CONVERSATION},
        {"prompt": CONVERSATION, "responses": ["b", "c"], "comparisons": [[0, 1]]},
        {"prompt": CONVERSATION, "responses": [[assistant("b")], [assistant("c")]], "comparisons": [[0, 1]]},
        {"prompt": CONVERSATION, "responses": [assistant("b"), assistant("c")], "comparisons": [[0, 1]]},
    ],
)
def test_conversational_formats_give_the_same_group(renderer, row):
    assert describe([row], renderer) == [
        (
            "<s><system>\ns</s>\n<user>\nq</s>\n<assistant>\na</s>\n<user>\nr</s>\n",
            [("<assistant>\nb</s>", "<assistant>\nc</s>", 1.0)],
        )
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("It is true", "It is trying", ("It is", " true</s>", " trying</s>")),
        ("It is true", "It is", ("It", " is true</s>", " is</s>")),
        (
            [user("q"), assistant("a")],
            [user("q"), assistant("a"), assistant("b")],
            ("<s><user>\nq</s>\n", "<assistant>\na</s>", "<assistant>\na</s>\n<assistant>\nb</s>"),
        ),
    ],
    ids=["ends with a word", "leaves a response", "leaves the last message"],
)
def test_an_implicit_prompt(renderer, chosen, rejected, expected):
    ((prompt, comparisons),) = describe([{"chosen": chosen, "rejected": rejected}], renderer)
    assert (prompt, *comparisons[0][:2]) == expected


@pytest.mark.parametrize("tools", [json.dumps([TOOL]), [TOOL]], ids=["JSON", "list"])
def test_tools_and_template_arguments_of_each_row_reach_the_template(tools):
    renderer = Renderer(tokenizer_with(SETTINGS_TEMPLATE))
    row = {"prompt": [user("q")], "chosen": "a", "rejected": "b", "tools": tools}
    rows = [{**row, "chat_template_kwargs": {"mood": mood}} for mood in ("calm", "wild")]
    prompts = [prompt for prompt, _ in describe(rows, renderer)]
    assert prompts == [f"{json.dumps([TOOL])}{mood}<s><user>\nq</s>\n" for mood in ("calm", "wild")]


# Targets and margins

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
K_WAY = {"prompt": "q", "responses": ["a", "b", "c"], "comparisons": [[0, 1], [1, 2]]}


@pytest.mark.parametrize(
    ("row", "target", "targets"),
    [
        (PAIR, "label", [1.0]),
        ({**PAIR, "label": 0.75, "score": -3.5}, "label", [0.75]),
        ({**PAIR, "label": 0.75, "score": -3.5}, "score", [-3.5]),
        ({**K_WAY, "label": [0.25, 0.5]}, "label", [0.25, 0.5]),
        ({**K_WAY, "score": [-2, 0.5]}, "score", [-2.0, 0.5]),
        ({**K_WAY, "comparisons": [[0, 1], [2, 1, 0.25]]}, "label", [1.0, 0.25]),
    ],
)
def test_targets(renderer, row, target, targets):
    (group,) = prepare([row], renderer, target=target)
    assert group["targets"] == targets
    assert sorted(group) == ["length", "pairs", "prompt_ids", "response_ids", "targets"]


def test_margins_are_kept_and_indices_are_whole_numbers_beside_labels_that_are_not(renderer):
    (group,) = prepare([{**K_WAY, "comparisons": [[1, 0, 0.5], [1, 2]], "margin": [1.5, 2.5]}], renderer)
    assert group["margins"] == [1.5, 2.5]
    assert repr(group["pairs"]) == "[[0, 1], [0, 2]]"


# Responses that are the same, empty or too long


def test_identical_responses_become_one_and_those_not_compared_are_dropped(renderer):
    (group,) = prepare([{"prompt": "q", "responses": [*"xaba"], "comparisons": [[1, 2], [2, 3]]}], renderer)
    assert group["response_ids"] == [renderer.tokenizer(text).input_ids for text in ("a</s>", "b</s>")]
    assert (group["pairs"], group["targets"], group["length"]) == ([[0, 1], [1, 0]], [1.0, 1.0], 5)


AB = ("q", [("a</s>", "b</s>", 1.0)])


@pytest.mark.parametrize(
    ("rows", "expected", "message"),
    [
        ([PAIR], [AB], "1 rows: 1 comparisons."),
        (
            [{**K_WAY, "responses": [*"abb"]}] * 2,
            [AB, AB],
            "2 rows: 4 comparisons, 2 comparisons of identical",
        ),
        (
            [{**K_WAY, "responses": ["a", "b", "long"]}] * 2,
            [AB, AB],
            "2 rows: 4 comparisons, 2 comparisons with a",
        ),
        (
            [{**PAIR, "rejected": " \n"}],
            [("q", [("a</s>", " \n</s>", 1.0)])],
            "1 rows: 1 comparisons, 1 empty responses",
        ),
    ],
    ids=["clean", "identical", "long", "white space"],
)
def test_what_is_odd_is_counted(caplog, rows, expected, message):
    assert describe(rows, Renderer(byte_tokenizer(), max_length=4), name="eval") == expected
    layout = "K responses" if "responses" in rows[0] else "chosen and rejected"
    assert f"eval dataset read as {layout}: {message}" in caplog.text


def test_the_first_thousand_rows_may_all_be_dropped(renderer):
    """`datasets` writes a thousand rows at a time, and would take the types of all from the first."""
    assert describe([{**PAIR, "rejected": "a"}] * 1000 + [PAIR], renderer) == [AB]


LONG_PROMPT = "abcdefghijklmnopqrstuvwxyz0123"


@pytest.mark.parametrize(
    ("responses", "comparisons"),
    [
        ([" a", " b", "x" * 17], [[0, 1]]),  # not compared
        # The second is compared to one that leaves no room for a prompt alone, the last to itself.
        ([" a", "x" * 17, "y" * 30, " b", "z" * 12, "z" * 12], [[0, 3], [1, 2], [4, 5]]),
    ],
)
def test_a_prompt_is_cut_for_the_comparisons_that_are_left(responses, comparisons):
    renderer = Renderer(byte_tokenizer(), max_length=20, long_rows="truncate_prompt")
    row = {"prompt": LONG_PROMPT, "responses": responses, "comparisons": comparisons}
    assert describe([row], renderer) == [(LONG_PROMPT[-17:], [(" a</s>", " b</s>", 1.0)])]


def test_long_responses_without_a_comparison_are_no_error():
    row = {"prompt": "q", "responses": ["a", "b", "x" * 17, "y" * 9, "y" * 9], "comparisons": [[0, 1], [3, 4]]}
    assert describe([row], Renderer(byte_tokenizer(), max_length=4, long_rows="error")) == [AB]


@pytest.mark.parametrize("group_by_prompt", [False, True])
def test_the_error_policy_names_the_row(group_by_prompt):
    renderer = Renderer(byte_tokenizer(), max_length=3, long_rows="error")
    with pytest.raises(ValueError, match=r"Row 2: The row of response 0 has 6 tokens, more than `max_length` = 3"):
        prepare([PAIR, {**PAIR, "chosen": "long"}], renderer, group_by_prompt=group_by_prompt)


# Grouping by prompt


def test_rows_of_a_prompt_become_one_group_with_each_response_once(renderer):
    rows = [
        {"prompt": "q", "responses": ["a", "b", "c"], "comparisons": [[0, 1], [1, 2]]},
        {"prompt": "r", "responses": ["a", "b"], "comparisons": [[0, 1, 0.5]]},
        {"prompt": "q", "responses": ["d", "c", "a"], "comparisons": [[1, 0], [1, 2, 0.25]]},
        {"prompt": "q", "responses": ["b", "a"], "comparisons": [[0, 1]]},  # contradicts the first
    ]
    groups = prepare(rows, renderer, group_by_prompt=True)
    assert [group["pairs"] for group in groups] == [[[0, 1], [1, 2], [2, 3], [2, 0], [1, 0]], [[0, 1]]]
    assert [group["targets"] for group in groups] == [[1.0, 1.0, 1.0, 0.25, 1.0], [0.5]]
    assert groups[0]["response_ids"] == [renderer.tokenizer(f"{text}</s>").input_ids for text in "abcd"]
    assert len(prepare(rows, renderer)) == 4


CUT_APART = [  # to 17, 14 and no tokens, if each row were cut for itself
    {"prompt": LONG_PROMPT, "chosen": " a", "rejected": " b", "margin": 1.0},
    {"prompt": LONG_PROMPT, "chosen": " b", "rejected": "long!", "margin": 2.0},
    {"prompt": LONG_PROMPT, "chosen": " a", "rejected": "x" * 20, "margin": 3.0},
]


@pytest.mark.parametrize("as_stream", [False, True])
def test_a_prompt_is_cut_the_same_for_all_its_rows(caplog, as_stream):
    renderer = Renderer(byte_tokenizer(), max_length=20, long_rows="truncate_prompt")
    rows = Dataset.from_list(CUT_APART)
    rows = rows.to_iterable_dataset() if as_stream else rows
    (group,) = prepare_dataset(rows, renderer, group_by_prompt=True)
    assert texts([group], renderer.tokenizer) == [
        (LONG_PROMPT[-14:], [(" a</s>", " b</s>", 1.0), (" b</s>", "long!</s>", 1.0)])
    ]
    assert (group["margins"], group["length"]) == ([1.0, 2.0], 14 + 3 + 3 + 6)
    assert ("3 comparisons, 1 comparisons with a response too long" in caplog.text) != as_stream


ROW = st.tuples(st.sampled_from("pqr"), st.text("abcd", min_size=3, max_size=3), st.floats(0, 1), st.integers(-9, 9))


@settings(deadline=None, max_examples=10, phases=[Phase.reuse, Phase.generate])  # an example is slow to shrink
@given(rows=st.lists(ROW, min_size=1, max_size=8))
def test_grouping_keeps_every_comparison_with_its_target_and_margin(renderer, rows):
    rows = [
        {
            "prompt": prompt,
            "responses": [*responses],
            "comparisons": [[0, 1], [2, 0]],
            "label": [label, 1 - label],
            "margin": [margin, 2 * margin],
        }
        for prompt, responses, label, margin in rows
    ]
    different = sum(row["responses"][i] != row["responses"][j] for row in rows for i, j in row["comparisons"])
    assume(different)
    apart, together = prepare(rows, renderer), prepare(rows, renderer, group_by_prompt=True)
    assert comparisons_of(together) == comparisons_of(apart)
    assert comparisons_of(apart).total() == different
    assert len(together) == len({tuple(group["prompt_ids"]) for group in together})
    for group in together:
        assert len(group["response_ids"]) == len(set(map(tuple, group["response_ids"])))


# Streams, processes, caches

MIXED = [
    {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": float(number)}
    for number, (prompt, chosen, rejected) in enumerate(("qab", "raa", "qca", "rab", "qab", "sdd"))
]


def as_generator_stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows.to_list()))


@pytest.mark.parametrize("group_by_prompt", [False, True])
@pytest.mark.parametrize("stream", [Dataset.to_iterable_dataset, as_generator_stream])
def test_a_stream_gives_the_same_groups(renderer, stream, group_by_prompt):
    rows = Dataset.from_list(MIXED)
    in_memory = prepare_dataset(rows, renderer, group_by_prompt=group_by_prompt)
    streamed = prepare_dataset(stream(rows), renderer, group_by_prompt=group_by_prompt)
    assert isinstance(streamed, IterableDataset)
    assert list(streamed) == in_memory.to_list()
    assert len(in_memory) == (2 if group_by_prompt else 4)


@pytest.mark.multiprocess
def test_several_processes_give_the_same_groups():
    renderer = Renderer(byte_tokenizer(), max_length=20, long_rows="truncate_prompt")
    rows = [{**row, "prompt": letter + LONG_PROMPT} for letter in "pqr" for row in CUT_APART]
    alone = prepare(rows, renderer, group_by_prompt=True)
    assert prepare(rows, renderer, group_by_prompt=True, num_proc=2) == alone
    assert len(alone) == 3
    with pytest.raises(ValueError, match="Row 4: The prompt is empty"):
        prepare([PAIR, PAIR, PAIR, {**PAIR, "prompt": ""}], renderer, num_proc=2)


@pytest.mark.parametrize("as_stream", [False, True])
def test_a_prepared_dataset_is_returned_as_it_is(renderer, letters, as_stream):
    prepared = prepare_dataset(letters, renderer)
    prepared = prepared.to_iterable_dataset() if as_stream else prepared
    assert prepare_dataset(prepared, renderer) is prepared


def test_a_dataset_on_disk_is_tokenized_once_by_a_version(letters, tmp_path, monkeypatch):
    letters.save_to_disk(tmp_path)

    def prepare_from_disk():
        renderer = Renderer(tokenizer_with(CHAT_TEMPLATE), max_length=100)
        grouped = prepare_dataset(load_from_disk(tmp_path), renderer, group_by_prompt=True)
        assert grouped.cache_files, "in the memory of each process"
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache-*.arrow")}

    first = prepare_from_disk()
    assert first
    assert prepare_from_disk() == first
    monkeypatch.setattr("gpm_trl.data.renderer.version", lambda name: "0.0.1")
    assert len(prepare_from_disk()) == 2 * len(first)


# Bad input


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PAIR, "label": 1.5}, r"`label` is 1\.5.*probability"),
        ({**PAIR, "label": NAN}, r"`label` is nan.*finite number"),
        ({**PAIR, "label": [0.5, 0.5]}, r"`label` is \[0\.5, 0\.5\].*each of the 1 comparisons"),
        ({**PAIR, "margin": None}, r"`margin` is None.*finite number"),
        ({**K_WAY, "label": [0.5, None]}, r"`label` is \[0\.5, None\].*finite number"),
        ({**K_WAY, "label": [0.5]}, r"`label` is \[0\.5\].*each of the 2 comparisons"),
        ({**K_WAY, "comparisons": [[0, 1, 1.5]]}, r"`label` is 1\.5.*probability"),
        ({**K_WAY, "comparisons": [[0, 1, None]]}, r"`label` is \[None\].*finite number"),
        (
            {**K_WAY, "comparisons": [[0, 1, 1.0], [1, 2]], "label": [1, 1]},
            r"has labels, but .* from `label`",
        ),
        ({**K_WAY, "comparisons": []}, r"`comparisons` is .*: give a list of at least one \[i, j\]"),
        ({**K_WAY, "comparisons": [[0]]}, r"\[i, j\] or \[i, j, label\], got \[0\]"),
        ({**K_WAY, "comparisons": [[0, 3]]}, r"\[0, 3\] is not of two of the responses 0 to 2"),
        ({**K_WAY, "comparisons": [[0.5, 1]]}, r"\[0\.5, 1\.0\] is not of two of the responses 0 to 2"),
        ({**K_WAY, "comparisons": [[1, 1]]}, r"\[1, 1\] is not of two of the responses 0 to 2"),
        ({**K_WAY, "responses": ["a", None, "b"]}, r"response"),
        ({**PAIR, "prompt": ""}, r"The prompt is empty.*give a prompt"),
        ({**PAIR, "chosen": None}, r"`chosen` and `rejected` must be strings or lists of messages"),
        ({**PAIR, "rejected": [assistant("b")]}, r"`chosen` and `rejected`"),
        ({**PAIR, "prompt": [user("q")], "tools": "["}, r"`tools` is '\[', which is no JSON"),
        ({**PAIR, "prompt": [user("q")], "chat_template_kwargs": "x"}, r"`chat_template_kwargs` is 'x'.*a dictionary"),
        ({**PAIR, "prompt": [user("q")]}, r"no chat template: set `tokenizer\.chat_template`"),
        ({**K_WAY, "comparisons": 5}, r"`comparisons` is 5: give a list"),
        ({**K_WAY, "comparisons": None}, r"`comparisons` is None: give a list"),
        ({**K_WAY, "responses": 5}, r"a list of `responses`"),
        ({"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]}, r"`prompt`"),
    ],
)
def test_a_bad_row_is_refused_with_its_number_and_the_rule(tokenizer, row, message):
    with pytest.raises(ValueError, match=f"^Row 1: .*{message}"):
        prepare([row], Renderer(tokenizer))


def test_the_number_of_a_bad_row_is_its_place_in_the_dataset(renderer):
    rows = Dataset.from_list([PAIR, PAIR, {**PAIR, "prompt": ""}])
    with pytest.raises(ValueError, match="Row 3: The prompt is empty"):
        prepare_dataset(rows, renderer)
    with pytest.raises(ValueError, match="Row 3: The prompt is empty"):
        list(prepare_dataset(as_generator_stream(rows), renderer))


def test_a_missing_score_is_refused_with_its_row_and_labels_are_none(renderer):
    row = {**K_WAY, "comparisons": [[0, 1], [1, 2, 0.25]], "score": [1.0, -2.0]}
    with pytest.raises(ValueError, match=r"Row 1: `comparisons` has labels.*from `score`: write \[i, j\] alone"):
        prepare([row], renderer, target="score")
    with pytest.raises(ValueError, match=r"Row 2: `score` is None.*finite number"):
        prepare([{**PAIR, "score": score} for score in (1.0, None)], renderer, target="score")
    stream = IterableDataset.from_generator(lambda: iter([{**PAIR, "score": 2.0}, PAIR]))
    with pytest.raises(ValueError, match="Row 2: `score` is None"):
        list(prepare_dataset(stream, renderer, target="score"))


@pytest.mark.parametrize("stream", [False, True])
def test_an_empty_dataset_is_refused(renderer, stream):
    dataset = IterableDataset.from_generator(lambda: iter([])) if stream else Dataset.from_dict({"chosen": []})
    with pytest.raises(ValueError, match="The eval dataset is empty"):
        prepare_dataset(dataset, renderer, name="eval")


@pytest.mark.parametrize("group_by_prompt", [False, True])
def test_a_dataset_whose_rows_were_all_dropped_is_refused(group_by_prompt):
    renderer = Renderer(byte_tokenizer(), max_length=3)
    rows = Dataset.from_list([{**PAIR, "chosen": "long"}, {**PAIR, "chosen": "b"}])
    with pytest.raises(ValueError, match=r"All rows of the train dataset.*`max_length` = 3 tokens. Raise"):
        prepare_dataset(rows, renderer, group_by_prompt=group_by_prompt)
    with pytest.raises(ValueError, match="All rows of the eval dataset were dropped: their responses are identical"):
        prepare_dataset(as_generator_stream(rows), renderer, group_by_prompt=group_by_prompt, name="eval")
