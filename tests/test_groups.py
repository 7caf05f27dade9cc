"""Rows of a preference dataset to groups."""

import json
from collections import Counter

import pytest
from conftest import CHAT_TEMPLATE
from datasets import Dataset, IterableDataset, load_from_disk
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from gpm_trl import Renderer, prepare_dataset
from gpm_trl.cli.quickstart import byte_tokenizer

NAN = float("nan")
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds."}}
SETTINGS_TEMPLATE = "{{ tools | tojson if tools }}{{ mood }}" + CHAT_TEMPLATE


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def tokenizer_with(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def renderer():
    return Renderer(tokenizer_with(CHAT_TEMPLATE))


def prepare(rows, renderer, **settings):
    return prepare_dataset(Dataset.from_list(rows), renderer, **settings).to_list()


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


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Two and two?", "chosen": " 4", "rejected": " Five"},
        {"chosen": "Two and two? 4", "rejected": "Two and two? Five"},
        {"prompt": None, "chosen": "Two and two? 4", "rejected": "Two and two? Five"},
        {"prompt": "Two and two?", "responses": [" 4", " Five"], "comparisons": [[0, 1]]},
        {"prompt": "Two and two?", "responses": [" Five", " 4"], "comparisons": [[1, 0, 1.0]]},
    ],
    ids=["explicit", "implicit", "prompt is None", "K-way", "K-way, other order"],
)
def test_plain_formats_give_the_same_group(renderer, row):
    groups = prepare([row], renderer)
    assert texts(groups, renderer.tokenizer) == [("Two and two?", [(" 4</s>", " Five</s>", 1.0)])]
    assert groups[0]["pairs"] == [[0, 1]]


CONVERSATION = [{"role": "system", "content": "s"}, user("q"), assistant("a"), user("r")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": CONVERSATION, "chosen": [assistant("b")], "rejected": [assistant("c")]},
        {"chosen": [*CONVERSATION, assistant("b")], "rejected": [*CONVERSATION, assistant("c")]},
        {"prompt": "r", "chosen": [*CONVERSATION, assistant("b")], "rejected": [*CONVERSATION, assistant("c")]},
        {"prompt": None, "chosen": [*CONVERSATION, assistant("b")], "rejected": [*CONVERSATION, assistant("c")]},
        {
            "prompt": CONVERSATION,
            "chosen": [*CONVERSATION, assistant("b")],
            "rejected": [*CONVERSATION, assistant("c")],
        },
        {"prompt": CONVERSATION, "chosen": "b", "rejected": "c"},
        {"prompt": CONVERSATION, "responses": ["b", "c"], "comparisons": [[0, 1]]},
        {"prompt": CONVERSATION, "responses": [[assistant("b")], [assistant("c")]], "comparisons": [[0, 1]]},
        {"prompt": CONVERSATION, "responses": [assistant("b"), assistant("c")], "comparisons": [[0, 1]]},
    ],
    ids=[
        "explicit",
        "implicit",
        "string prompt beside implicit",
        "prompt is None",
        "repeated",
        "explicit, strings",
        "K-way strings",
        "K-way lists of messages",
        "K-way messages",
    ],
)
def test_conversational_formats_give_the_same_group(renderer, row):
    assert texts(prepare([row], renderer), renderer.tokenizer) == [
        (
            "<s><system>\ns</s>\n<user>\nq</s>\n<assistant>\na</s>\n<user>\nr</s>\n",
            [("<assistant>\nb</s>", "<assistant>\nc</s>", 1.0)],
        )
    ]


@pytest.mark.parametrize("tools", [json.dumps([TOOL]), [TOOL]], ids=["JSON", "list"])
def test_tools_reach_the_template(tools):
    renderer = Renderer(tokenizer_with(SETTINGS_TEMPLATE))
    row = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")], "tools": tools}
    ((prompt, _),) = texts(prepare([row], renderer), renderer.tokenizer)
    assert prompt == '[{"type": "function", "function": {"name": "add", "description": "Adds."}}]<s><user>\nq</s>\n'


def test_chat_template_kwargs_of_each_row_reach_the_template():
    renderer = Renderer(tokenizer_with(SETTINGS_TEMPLATE))
    row = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    rows = [{**row, "chat_template_kwargs": {"mood": mood}} for mood in ("calm", "wild")]
    prompts = [prompt for prompt, _ in texts(prepare(rows, renderer), renderer.tokenizer)]
    assert prompts == ["calm<s><user>\nq</s>\n", "wild<s><user>\nq</s>\n"]


def test_an_implicit_plain_prompt_ends_with_a_word(renderer):
    row = {"chosen": "It is true", "rejected": "It is trying"}
    assert texts(prepare([row], renderer), renderer.tokenizer) == [("It is", [(" true</s>", " trying</s>", 1.0)])]


def test_an_implicit_plain_prompt_leaves_a_response_to_the_shorter_text(renderer):
    row = {"chosen": "It is true", "rejected": "It is"}
    assert texts(prepare([row], renderer), renderer.tokenizer) == [("It", [(" is true</s>", " is</s>", 1.0)])]


def test_implicit_conversations_that_diverge_early_have_several_messages_in_their_responses(renderer):
    row = {
        "chosen": [user("q"), assistant("a"), user("r"), assistant("b")],
        "rejected": [user("q"), assistant("c"), user("r"), assistant("d")],
    }
    assert texts(prepare([row], renderer), renderer.tokenizer) == [
        (
            "<s><user>\nq</s>\n",
            [
                (
                    "<assistant>\na</s>\n<user>\nr</s>\n<assistant>\nb</s>",
                    "<assistant>\nc</s>\n<user>\nr</s>\n<assistant>\nd</s>",
                    1.0,
                )
            ],
        )
    ]


def test_the_last_message_of_the_shorter_implicit_conversation_is_a_response(renderer):
    row = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("a"), assistant("b")]}
    assert texts(prepare([row], renderer), renderer.tokenizer) == [
        ("<s><user>\nq</s>\n", [("<assistant>\na</s>", "<assistant>\na</s>\n<assistant>\nb</s>", 1.0)])
    ]


# Targets and margins


def test_a_label_is_the_target_of_a_pair(renderer):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "label": 0.75}
    assert prepare([row], renderer)[0]["targets"] == [0.75]


def test_the_target_is_one_without_a_label(renderer):
    group = prepare([{"prompt": "q", "chosen": "a", "rejected": "b"}], renderer)[0]
    assert group["targets"] == [1.0]
    assert sorted(group) == ["length", "pairs", "prompt_ids", "response_ids", "targets"]


def test_scores_are_targets_where_asked_for(renderer):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "label": 1.0, "score": -3.5}
    assert prepare([row], renderer, target="score")[0]["targets"] == [-3.5]
    assert prepare([row], renderer)[0]["targets"] == [1.0]


def test_margins_are_kept(renderer):
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b", "margin": margin} for margin in (2.5, -1.0)]
    assert [group["margins"] for group in prepare(rows, renderer)] == [[2.5], [-1.0]]


def test_labels_of_k_way_rows_stand_in_the_comparisons(renderer):
    row = {"prompt": "q", "responses": ["a", "b", "c"], "comparisons": [[0, 1], [2, 1, 0.25], [2, 0, 0.5]]}
    assert texts(prepare([row], renderer), renderer.tokenizer) == [
        ("q", [("a</s>", "b</s>", 1.0), ("c</s>", "b</s>", 0.25), ("c</s>", "a</s>", 0.5)])
    ]


def test_indices_are_whole_numbers_beside_labels_that_are_not(renderer):
    row = {"prompt": "q", "responses": ["a", "b"], "comparisons": [[1, 0, 0.5]]}
    assert repr(prepare([row], renderer)[0]["pairs"]) == "[[0, 1]]"


@pytest.mark.parametrize("target", ["label", "score"])
def test_targets_and_margins_of_k_way_rows_may_be_lists(renderer, target):
    row = {"prompt": "q", "responses": ["a", "b", "c"], "comparisons": [[0, 1], [1, 2]], "margin": [1.5, 2.5]}
    group = prepare([{**row, target: [0.25, 0.5]}], renderer, target=target)[0]
    assert (group["targets"], group["margins"]) == ([0.25, 0.5], [1.5, 2.5])


# Responses that are the same, empty or too long


def test_identical_responses_become_one(renderer):
    row = {"prompt": "q", "responses": ["a", "b", "a"], "comparisons": [[0, 1], [1, 2]]}
    assert prepare([row], renderer) == [
        {
            "prompt_ids": renderer.tokenizer("q").input_ids,
            "response_ids": [renderer.tokenizer(text).input_ids for text in ("a</s>", "b</s>")],
            "pairs": [[0, 1], [1, 0]],
            "targets": [1.0, 1.0],
            "length": 5,
        }
    ]


def test_a_response_that_is_not_compared_is_dropped(renderer):
    row = {"prompt": "q", "responses": ["a", "b", "c"], "comparisons": [[2, 0]]}
    group = prepare([row], renderer)[0]
    assert [renderer.tokenizer.decode(ids) for ids in group["response_ids"]] == ["c</s>", "a</s>"]
    assert group["pairs"] == [[0, 1]]


def test_comparisons_of_identical_responses_are_dropped_and_counted(renderer, caplog):
    rows = [
        {"prompt": "q", "responses": ["a", "b", "a"], "comparisons": [[0, 2], [0, 1]], "label": [0.0, 0.75]},
        {"prompt": "r", "responses": ["a", "a", "b"], "comparisons": [[0, 1]], "label": [1.0]},
    ]
    assert texts(prepare(rows, renderer, name="eval"), renderer.tokenizer) == [("q", [("a</s>", "b</s>", 0.75)])]
    assert "eval dataset of 2 rows: 2 comparisons of identical responses" in caplog.text


@pytest.mark.parametrize("group_by_prompt", [False, True])
def test_the_first_thousand_rows_may_all_be_dropped(renderer, group_by_prompt):
    """`datasets` writes a thousand rows at a time, and would take the types of all from the first."""
    rows = [{"prompt": "q", "chosen": "a", "rejected": "a"}] * 1000 + [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    groups = prepare(rows, renderer, group_by_prompt=group_by_prompt)
    assert texts(groups, renderer.tokenizer) == [("q", [("a</s>", "b</s>", 1.0)])]


def test_comparisons_with_a_long_response_are_dropped_and_counted(caplog):
    renderer = Renderer(byte_tokenizer(), max_length=4)
    rows = [
        {
            "prompt": "q",
            "responses": ["a", "long", "bc"],
            "comparisons": [[0, 1], [2, 0], [1, 2]],
            "margin": [1, 2, 3],
        },
        {"prompt": "q", "responses": ["long", "a"], "comparisons": [[0, 1]], "margin": [4]},
    ]
    groups = prepare(rows, renderer)
    assert texts(groups, renderer.tokenizer) == [("q", [("bc</s>", "a</s>", 1.0)])]
    assert groups[0]["margins"] == [2.0]
    assert "train dataset of 2 rows: 3 comparisons with a response too long" in caplog.text
    assert "identical" not in caplog.text


def test_truncated_prompts_fit(caplog):
    renderer = Renderer(byte_tokenizer(), max_length=4, long_rows="truncate_prompt")
    rows = [{"prompt": "question", "chosen": "a", "rejected": "b"}]
    assert texts(prepare(rows, renderer), renderer.tokenizer) == [("on", [("a</s>", "b</s>", 1.0)])]
    assert "too long" not in caplog.text


LONG_PROMPT = "abcdefghijklmnopqrstuvwxyz0123"


def test_a_response_that_is_not_compared_does_not_cut_the_prompt():
    renderer = Renderer(byte_tokenizer(), max_length=20, long_rows="truncate_prompt")
    row = {"prompt": LONG_PROMPT, "responses": [" a", " b", "x" * 17], "comparisons": [[0, 1]]}
    assert texts(prepare([row], renderer), renderer.tokenizer) == [(LONG_PROMPT[-17:], [(" a</s>", " b</s>", 1.0)])]


def test_a_response_whose_comparisons_are_all_dropped_does_not_cut_the_prompt():
    """The second is compared to one that leaves no room for a prompt alone, the last to itself."""
    renderer = Renderer(byte_tokenizer(), max_length=20, long_rows="truncate_prompt")
    row = {
        "prompt": LONG_PROMPT,
        "responses": [" a", "x" * 17, "y" * 30, " b", "z" * 12, "z" * 12],
        "comparisons": [[0, 3], [1, 2], [4, 5]],
    }
    assert texts(prepare([row], renderer), renderer.tokenizer) == [(LONG_PROMPT[-17:], [(" a</s>", " b</s>", 1.0)])]


@pytest.mark.parametrize("long_rows", ["error", "filter"])
def test_a_long_response_that_is_not_compared_is_no_error(caplog, long_rows):
    renderer = Renderer(byte_tokenizer(), max_length=4, long_rows=long_rows)
    row = {"prompt": "q", "responses": ["a", "b", "x" * 17], "comparisons": [[0, 1]]}
    assert texts(prepare([row], renderer), renderer.tokenizer) == [("q", [("a</s>", "b</s>", 1.0)])]
    assert "too long" not in caplog.text


def test_a_row_of_identical_responses_is_dropped_by_the_error_policy():
    renderer = Renderer(byte_tokenizer(), max_length=4, long_rows="error")
    rows = [{"prompt": "q", "chosen": "a", "rejected": rejected} for rejected in "ab"]
    assert texts(prepare(rows, renderer), renderer.tokenizer) == [("q", [("a</s>", "b</s>", 1.0)])]


def test_the_error_policy_names_the_row():
    renderer = Renderer(byte_tokenizer(), max_length=3, long_rows="error")
    rows = [{"prompt": "q", "chosen": chosen, "rejected": "b"} for chosen in ("a", "long")]
    with pytest.raises(ValueError, match=r"Row 1: A row has 6 tokens, more than `max_length` = 3"):
        prepare(rows, renderer)


@pytest.mark.parametrize(
    ("row", "empty"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "</s>"),
        ({"prompt": "q", "chosen": "a", "rejected": " \n"}, " \n</s>"),
        ({"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("")]}, "<assistant>\n</s>"),
    ],
    ids=["nothing", "white space", "message"],
)
def test_empty_responses_are_kept_and_counted(renderer, caplog, row, empty):
    ((_, [(_, rejected, _)]),) = texts(prepare([row], renderer), renderer.tokenizer)
    assert rejected == empty
    assert "train dataset of 1 rows: 1 empty responses, kept" in caplog.text


def test_nothing_is_logged_about_clean_rows(renderer, caplog):
    prepare([{"prompt": "q", "chosen": "a", "rejected": "b"}], renderer)
    assert "dataset" not in caplog.text


# Grouping by prompt


def test_rows_of_a_prompt_become_one_group_with_each_response_once(renderer):
    pairs = [("q", "a", "b", 1.0), ("r", "a", "b", 0.5), ("q", "b", "c", 0.75), ("q", "c", "a", 0.25)]
    rows = [dict(zip(("prompt", "chosen", "rejected", "label"), pair, strict=True)) for pair in pairs]
    groups = prepare(rows, renderer, group_by_prompt=True)
    assert texts(groups, renderer.tokenizer) == [
        ("q", [("a</s>", "b</s>", 1.0), ("b</s>", "c</s>", 0.75), ("c</s>", "a</s>", 0.25)]),
        ("r", [("a</s>", "b</s>", 0.5)]),
    ]
    assert [len(group["response_ids"]) for group in groups] == [3, 2]


def test_contradicting_rows_of_a_prompt_are_both_kept(renderer):
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "b", "rejected": "a"}]
    assert prepare(rows, renderer, group_by_prompt=True)[0]["pairs"] == [[0, 1], [1, 0]]


def test_pairs_and_k_way_rows_of_a_prompt_are_merged(renderer):
    rows = [
        {"prompt": "q", "responses": ["a", "b", "c"], "comparisons": [[0, 1], [1, 2]]},
        {"prompt": "q", "responses": ["d", "c"], "comparisons": [[1, 0]]},
    ]
    assert texts(prepare(rows, renderer, group_by_prompt=True), renderer.tokenizer) == [
        ("q", [("a</s>", "b</s>", 1.0), ("b</s>", "c</s>", 1.0), ("c</s>", "d</s>", 1.0)])
    ]


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
    assert ("dataset of 3 rows: 1 comparisons with a response too long" in caplog.text) != as_stream


def test_a_prompt_none_of_whose_responses_fit_is_dropped():
    renderer = Renderer(byte_tokenizer(), max_length=20, long_rows="truncate_prompt")
    rows = [{"prompt": LONG_PROMPT, "chosen": "x" * 20, "rejected": " a"}, {**CUT_APART[0], "prompt": "q"}]
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    assert texts(prepare(rows, renderer, group_by_prompt=True), renderer.tokenizer) == [
        ("q", [(" a</s>", " b</s>", 1.0)])
    ]
    with pytest.raises(ValueError, match="All 1 rows of the train dataset were dropped"):
        prepare(rows[:1], renderer, group_by_prompt=True)


@pytest.mark.multiprocess
def test_several_processes_cut_a_prompt_alike():
    renderer = Renderer(byte_tokenizer(), max_length=20, long_rows="truncate_prompt")
    rows = [{**row, "prompt": letter + LONG_PROMPT} for letter in "pqr" for row in CUT_APART]
    alone = prepare(rows, renderer, group_by_prompt=True)
    assert prepare(rows, renderer, group_by_prompt=True, num_proc=2) == alone
    assert len(alone) == 3


def test_rows_are_not_merged_unless_asked_for(renderer):
    rows = [{"prompt": "q", "chosen": "a", "rejected": rejected} for rejected in "bc"]
    assert len(prepare(rows, renderer)) == 2


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.sampled_from("pqr"),
            "responses": st.lists(st.sampled_from("abcd"), min_size=3, max_size=3),
            "comparisons": st.just([[0, 1], [2, 0]]),
            "label": st.lists(st.floats(0, 1), min_size=2, max_size=2),
            "margin": st.lists(st.integers(-9, 9).map(float), min_size=2, max_size=2),
        }
    ),
    min_size=1,
    max_size=8,
)


@settings(deadline=None, max_examples=20, phases=[Phase.reuse, Phase.generate])  # an example is slow to shrink
@given(rows=ROWS)
def test_grouping_keeps_every_comparison_with_its_target_and_margin(renderer, rows):
    different = sum(row["responses"][i] != row["responses"][j] for row in rows for i, j in row["comparisons"])
    assume(different)
    apart, together = prepare(rows, renderer), prepare(rows, renderer, group_by_prompt=True)
    assert comparisons_of(together) == comparisons_of(apart)
    assert comparisons_of(apart).total() == different
    prompts = [tuple(group["prompt_ids"]) for group in together]
    assert len(prompts) == len(set(prompts))
    for group in together:
        assert len(group["response_ids"]) == len(set(map(tuple, group["response_ids"])))


# Streams, processes, caches


def as_generator_stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows.to_list()))


@pytest.mark.parametrize("group_by_prompt", [False, True])
@pytest.mark.parametrize("stream", [Dataset.to_iterable_dataset, as_generator_stream])
def test_a_stream_gives_the_same_groups(renderer, letters, stream, group_by_prompt):
    in_memory = prepare_dataset(letters, renderer, group_by_prompt=group_by_prompt)
    streamed = prepare_dataset(stream(letters), renderer, group_by_prompt=group_by_prompt)
    assert isinstance(streamed, IterableDataset)
    assert list(streamed) == in_memory.to_list()
    assert len(in_memory) == (6 if group_by_prompt else 24)


def test_a_stream_keeps_margins(renderer):
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": rejected, "label": 0.5, "margin": margin}
        for rejected, margin in (("b", 1.0), ("a", 2.0), ("c", 3.0))
    ]
    (group,) = prepare_dataset(Dataset.from_list(rows).to_iterable_dataset(), renderer, group_by_prompt=True)
    assert texts([group], renderer.tokenizer) == [("q", [("a</s>", "b</s>", 0.5), ("a</s>", "c</s>", 0.5)])]
    assert group["margins"] == [1.0, 3.0]


@pytest.mark.parametrize("group_by_prompt", [False, True])
def test_a_stream_drops_identical_responses(renderer, group_by_prompt):
    rows = [{"prompt": prompt, "chosen": "a", "rejected": rejected} for prompt, rejected in ("qa", "qb", "ra")]
    stream = prepare_dataset(as_generator_stream(Dataset.from_list(rows)), renderer, group_by_prompt=group_by_prompt)
    assert texts(stream, renderer.tokenizer) == [("q", [("a</s>", "b</s>", 1.0)])]


@pytest.mark.multiprocess
@pytest.mark.parametrize("group_by_prompt", [False, True])
def test_several_processes_give_the_same_groups(renderer, letters, group_by_prompt):
    alone = prepare_dataset(letters, renderer, group_by_prompt=group_by_prompt)
    shared = prepare_dataset(letters, renderer, group_by_prompt=group_by_prompt, num_proc=2)
    assert shared.to_list() == alone.to_list()


@pytest.mark.parametrize("as_stream", [False, True])
def test_a_prepared_dataset_is_returned_as_it_is(renderer, letters, as_stream):
    prepared = prepare_dataset(letters, renderer)
    prepared = prepared.to_iterable_dataset() if as_stream else prepared
    assert prepare_dataset(prepared, renderer) is prepared


@pytest.mark.parametrize("group_by_prompt", [False, True])
def test_a_dataset_on_disk_is_tokenized_once(letters, tmp_path, group_by_prompt):
    letters.save_to_disk(tmp_path)

    def prepare_from_disk():
        renderer = Renderer(tokenizer_with(CHAT_TEMPLATE), max_length=100)
        prepare_dataset(load_from_disk(tmp_path), renderer, group_by_prompt=group_by_prompt)
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache-*.arrow")}

    first = prepare_from_disk()
    assert first
    assert prepare_from_disk() == first


# Bad input


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
K_WAY = {"prompt": "q", "responses": ["a", "b", "c"], "comparisons": [[0, 1], [1, 2]]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PAIR, "label": 1.5}, r"`label` is 1\.5.*probability"),
        ({**PAIR, "label": -0.5}, r"`label` is -0\.5.*probability"),
        ({**PAIR, "label": NAN}, r"`label` is nan.*finite number"),
        ({**PAIR, "label": None}, r"`label` is None"),
        ({**PAIR, "label": "0.5"}, r"`label` is '0\.5'.*number"),
        ({**PAIR, "label": [0.5, 0.5]}, r"`label` has 2 values for 1 comparisons"),
        ({**PAIR, "margin": None}, r"`margin` is None.*finite number"),
        ({**PAIR, "margin": NAN}, r"`margin` is nan.*finite number"),
        ({**K_WAY, "label": [0.5, 1.5]}, r"`label` is 1\.5.*probability"),
        ({**K_WAY, "label": [0.5, None]}, r"`label` is \[0\.5, None\].*finite number"),
        ({**K_WAY, "label": [0.5]}, r"`label` has 1 values for 2 comparisons: give one for each"),
        ({**K_WAY, "margin": 1.0}, r"`margin` has 1 values for 2 comparisons: give one for each"),
        ({**K_WAY, "comparisons": [[0, 1, 1.5]]}, r"`label` is 1\.5.*probability"),
        ({**K_WAY, "comparisons": [[0, 1, NAN]]}, r"`label` is nan.*finite number"),
        ({**K_WAY, "comparisons": [[0, 1, None]]}, r"`label` is None in the comparison \[0, 1, None\].*finite number"),
        ({**K_WAY, "comparisons": [[0, 1, 1.0], [1, 2]], "label": [1, 1]}, r"given twice.*keep one"),
        ({**K_WAY, "comparisons": []}, r"`comparisons` is empty: give at least one \[i, j\]"),
        ({**K_WAY, "comparisons": None}, r"`comparisons` is empty: give at least one \[i, j\]"),
        ({**K_WAY, "comparisons": [[0]]}, r"\[i, j\] or \[i, j, label\], got \[0\]"),
        ({**K_WAY, "comparisons": [[0, 1, 1, 1]]}, r"\[i, j\] or \[i, j, label\], got \[0, 1, 1, 1\]"),
        ({**K_WAY, "comparisons": [None]}, r"\[i, j\] or \[i, j, label\], got None"),
        ({**K_WAY, "comparisons": [[0, 3]]}, r"\[0, 3\].*there are 3: indices go from 0 to 2"),
        ({**K_WAY, "comparisons": [[-1, 0]]}, r"\[-1, 0\].*indices go from 0 to 2"),
        ({**K_WAY, "comparisons": [[0.5, 1]]}, r"\[0\.5, 1\.0\].*indices go from 0 to 2"),
        ({**K_WAY, "comparisons": [[None, 1]]}, r"\[None, 1\].*indices go from 0 to 2"),
        ({**K_WAY, "comparisons": [[NAN, 1]]}, r"\[nan, 1\.0\].*indices go from 0 to 2"),
        ({**K_WAY, "comparisons": [[1, 1]]}, r"\[1, 1\] is of a response with itself"),
        ({**K_WAY, "responses": ["a", None, "b"]}, r"response"),
        ({**K_WAY, "responses": [[assistant("a")], [assistant("b")], [assistant("c")]]}, r"response"),
        ({**PAIR, "prompt": ""}, r"The prompt is empty.*give a prompt"),
        ({"chosen": "a", "rejected": "b"}, r"The prompt is empty.*give a prompt"),
        ({**PAIR, "chosen": None}, r"`chosen` and `rejected` must be strings or lists of messages"),
        ({**PAIR, "rejected": assistant("b")}, r"`chosen` and `rejected` must be strings or lists of messages"),
        ({**PAIR, "rejected": [assistant("b")]}, r"`chosen` and `rejected`"),
        ({"chosen": "a", "rejected": [assistant("b")]}, r"`chosen` and `rejected`"),
        ({"chosen": [assistant("b")], "rejected": "a"}, r"`chosen` and `rejected`"),
        (
            {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")], "tools": "["},
            r"`tools` is '\['",
        ),
        (
            {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")], "tools": ""},
            r"`tools` is ''",
        ),
        ({"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]}, r"`prompt`"),
    ],
)
def test_a_bad_row_is_refused_with_its_number_and_the_rule(renderer, row, message):
    with pytest.raises(ValueError, match=f"^Row 0: .*{message}"):
        prepare([row], renderer)


@pytest.mark.parametrize("prompt", [[user("q")], [user("q"), assistant("a"), user("r")]])
def test_conversations_without_a_chat_template_are_refused(prompt):
    with pytest.raises(ValueError, match=r"Row 0: .*no chat template: set `tokenizer\.chat_template`"):
        prepare(
            [{"prompt": prompt, "chosen": [assistant("a")], "rejected": [assistant("b")]}], Renderer(byte_tokenizer())
        )


def test_a_conversation_that_the_template_refuses_is_named_by_its_row():
    renderer = Renderer(tokenizer_with("{{ raise_exception('No.') }}"))
    with pytest.raises(ValueError, match=r"Row 0: .*\['user', 'assistant'\]: No\."):
        prepare([{"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}], renderer)


@pytest.mark.parametrize("expression", ["m.content + 1", "m.size + 1"], ids=["TypeError", "TemplateError"])
def test_a_template_that_fails_on_a_row_names_it(expression):
    renderer = Renderer(tokenizer_with("{% for m in messages %}{{ " + expression + " }}{% endfor %}"))
    with pytest.raises(ValueError, match="Row 0: "):
        prepare([{"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}], renderer)


def test_conversations_with_no_message_in_common_are_refused_where_the_template_needs_a_user():
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('No user.') }}{% endif %}" + CHAT_TEMPLATE
    row = {"chosen": [user("q"), assistant("a")], "rejected": [user("r"), assistant("b")]}
    with pytest.raises(ValueError, match="Row 0: "):
        prepare([row], Renderer(tokenizer_with(template)))


@pytest.mark.parametrize("settings", [{}, pytest.param({"num_proc": 2}, marks=pytest.mark.multiprocess)])
def test_the_number_of_a_bad_row_is_its_place_in_the_dataset(renderer, settings):
    rows = [PAIR, PAIR, PAIR, {**PAIR, "prompt": ""}]
    with pytest.raises(ValueError, match="Row 3: The prompt is empty"):
        prepare(rows, renderer, **settings)


def test_the_number_of_a_bad_row_in_a_stream_is_its_place(renderer):
    stream = as_generator_stream(Dataset.from_list([PAIR, PAIR, {**PAIR, "prompt": ""}]))
    with pytest.raises(ValueError, match="Row 2: The prompt is empty"):
        list(prepare_dataset(stream, renderer))


def test_a_missing_score_is_refused_with_its_row(renderer):
    rows = [{**PAIR, "score": score} for score in (1.0, None)]
    with pytest.raises(ValueError, match=r"Row 1: `score` is None.*finite number"):
        prepare(rows, renderer, target="score")


@pytest.mark.parametrize("score", [None, [1.0, -2.0]])
def test_labels_in_comparisons_are_no_scores(renderer, score):
    row = {**K_WAY, "comparisons": [[0, 1], [1, 2, 0.25]], "score": score}
    with pytest.raises(ValueError, match=r"Row 0: `comparisons` has labels.*from `score`: write \[i, j\] alone"):
        prepare([row], renderer, target="score")


def test_a_streamed_row_without_a_score_is_refused(renderer):
    rows = [{**PAIR, "score": 2.0}, PAIR]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(ValueError, match="Row 1: `score` is None"):
        list(prepare_dataset(stream, renderer, target="score"))


@pytest.mark.parametrize("score", [NAN, float("inf")])
def test_a_score_must_be_finite(renderer, score):
    with pytest.raises(ValueError, match=r"Row 0: `score` is (nan|inf).*finite number"):
        prepare([{**PAIR, "score": score}], renderer, target="score")


def test_a_score_that_marks_padding_is_refused(renderer):
    with pytest.raises(ValueError, match=r"Row 0: `score` is -100\.0.*padding: give -99\.5"):
        prepare([{**PAIR, "score": -100}], renderer, target="score")


def test_a_dataset_without_scores_is_refused(renderer):
    with pytest.raises(ValueError, match=r"The eval dataset has no column `score`.*`loss_type=\"cross_entropy\"`"):
        prepare([PAIR], renderer, target="score", name="eval")


@pytest.mark.parametrize(
    "row", [{"prompt": "q", "completion": "a"}, {"chosen": "a"}, {"prompt": "q", "responses": ["a", "b"]}]
)
def test_unknown_columns_are_refused(renderer, row):
    with pytest.raises(ValueError, match=r"has the columns .*`chosen` and `rejected`.*Rename its columns"):
        prepare([row], renderer)


@pytest.mark.parametrize(
    "dataset",
    [
        Dataset.from_list([]),
        Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}),
        IterableDataset.from_generator(lambda: iter([])),
    ],
    ids=["no columns", "no rows", "stream"],
)
def test_an_empty_dataset_is_refused(renderer, dataset):
    with pytest.raises(ValueError, match="The eval dataset is empty"):
        prepare_dataset(dataset, renderer, name="eval")


def test_a_dataset_whose_rows_were_all_dropped_is_refused():
    renderer = Renderer(byte_tokenizer(), max_length=3)
    rows = [{**PAIR, "chosen": "long"}, {**PAIR, "chosen": "b"}]
    with pytest.raises(ValueError, match=r"All 2 rows of the train dataset.*`max_length` = 3.*Raise `max_length`"):
        prepare(rows, renderer)


@pytest.mark.parametrize("group_by_prompt", [False, True])
def test_a_stream_whose_rows_are_all_dropped_is_refused(renderer, group_by_prompt):
    stream = as_generator_stream(Dataset.from_list([{**PAIR, "chosen": "b"}] * 2))
    with pytest.raises(ValueError, match="All rows of the eval dataset were dropped: their responses are identical"):
        prepare_dataset(stream, renderer, group_by_prompt=group_by_prompt, name="eval")
