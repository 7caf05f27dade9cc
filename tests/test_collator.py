"""Groups to padded batches."""

import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from gpm_trl import DataCollatorForGroups


class OnlyPadToken:
    """A tokenizer of which nothing but the pad token may be looked up."""

    pad_token_id = 7

    def __getattr__(self, name):
        raise AssertionError(f"The collator looked up `{name}`.")

    def __len__(self):
        raise AssertionError("The collator looked up the length.")


PAIR = {"prompt_ids": [1, 5], "response_ids": [[6, 2], [8, 9, 2]], "pairs": [[1, 0]], "targets": [0.25]}
TRIPLE = {
    "prompt_ids": [1],
    "response_ids": [[4, 2], [2], [3, 2]],
    "pairs": [[0, 1], [2, 1], [2, 0]],
    "targets": [1.0, 0.5, 0.0],
}
IDS = st.lists(st.integers(10, 20), min_size=1, max_size=6)
GROUPS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt_ids": IDS,
            "response_ids": st.lists(IDS, min_size=2, max_size=4),
            "pairs": st.just([[0, 1], [1, 0]]),
            "targets": st.just([1.0, 0.0]),
        }
    ),
    min_size=1,
    max_size=4,
)


def collate(*groups, **settings):
    return DataCollatorForGroups(OnlyPadToken(), **settings)(groups)


def test_rows_are_prompt_and_response_padded_on_the_right():
    assert collate(PAIR, TRIPLE)["input_ids"].tolist() == [
        [1, 5, 6, 2, 7],
        [1, 5, 8, 9, 2],
        [1, 4, 2, 7, 7],
        [1, 2, 7, 7, 7],
        [1, 3, 2, 7, 7],
    ]


def test_the_mask_covers_prompt_and_response():
    assert collate(PAIR, TRIPLE)["attention_mask"].sum(dim=-1).tolist() == [4, 5, 3, 2, 3]


def test_a_pad_token_inside_a_row_is_not_masked():
    group = {**PAIR, "prompt_ids": [7, 7], "response_ids": [[7], [7, 7]]}
    assert collate(group)["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_every_row_has_the_length_of_its_prompt():
    assert collate(PAIR, TRIPLE)["prompt_lengths"].tolist() == [2, 2, 1, 1, 1]


def test_group_rows_are_rows_of_the_groups_prompts():
    assert collate(PAIR, TRIPLE, {**PAIR, "prompt_ids": [9]})["group_rows"].tolist() == [0, 2, 5]


@pytest.mark.parametrize("shared_prefix", [False, True])
def test_prompts_and_responses_that_groups_share_are_one_row(shared_prefix):
    other = {"prompt_ids": [1, 5], "response_ids": [[8, 9, 2], [3, 2]], "pairs": [[0, 1]], "targets": [1.0]}
    batch = collate(PAIR, TRIPLE, other, PAIR, shared_prefix=shared_prefix)
    assert batch["comparisons"][:, 0].tolist() == [[1, 0], [3, 4], [1, 2], [1, 0]]
    assert batch["response_rows"].tolist() == [0, 1, 3, 4, 5, 1, 2, 0, 1]
    assert batch["response_groups"].tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3]
    assert batch["group_rows"].tolist() == [0, 3, 1, 0]
    if shared_prefix:
        assert batch["input_ids"].tolist() == [[1, 5, 6, 2, 8, 9, 2, 3, 2, 1, 4, 2, 2, 3, 2]]
    else:
        assert batch["attention_mask"].sum(-1).tolist() == [4, 5, 4, 3, 2, 3]


def test_a_row_may_hold_several_groups():
    together, apart = collate({"groups": [PAIR, TRIPLE]}), collate(PAIR, TRIPLE)
    assert all(torch.equal(together[name], apart[name]) for name in apart)


def test_comparisons_name_rows_of_the_batch():
    comparisons = collate(PAIR, TRIPLE)["comparisons"]
    assert comparisons.shape == (2, 3, 2)
    assert comparisons[0, :1].tolist() == [[1, 0]]
    assert comparisons[1].tolist() == [[2, 3], [4, 3], [4, 2]]


def test_padded_comparisons_name_rows_that_exist():
    comparisons = collate(TRIPLE, PAIR)["comparisons"]
    assert ((comparisons >= 0) & (comparisons < 5)).all()


def test_labels_are_padded_with_the_ignored_label():
    labels = collate(PAIR, TRIPLE)["labels"]
    assert labels.tolist() == [[0.25, -100, -100], [1, 0.5, 0]]
    assert labels.dtype == torch.float32


def test_targets_may_be_whole_numbers():
    assert collate({**PAIR, "targets": [1]})["labels"].dtype == torch.float32


def test_margins_are_padded_with_zero():
    groups = {**PAIR, "margins": [2.5]}, {**TRIPLE, "margins": [1.0, -1.0, 3]}
    assert collate(*groups)["margins"].tolist() == [[2.5, 0, 0], [1, -1, 3]]


def test_there_are_no_margins_where_groups_have_none():
    assert "margins" not in collate(PAIR)


@pytest.mark.parametrize(("multiple", "width"), [(None, 5), (1, 5), (4, 8), (5, 5), (64, 64)])
def test_the_width_is_a_multiple(multiple, width):
    batch = collate(PAIR, TRIPLE, pad_to_multiple_of=multiple)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (5, width)
    assert batch["attention_mask"].sum(dim=-1).tolist() == [4, 5, 3, 2, 3]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 7).all()


@given(groups=GROUPS, multiple=st.sampled_from([None, 4]))
def test_unpadded_rows_and_comparisons_are_those_of_the_groups(groups, multiple):
    batch = collate(*groups, pad_to_multiple_of=multiple)
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    responses = [(group, ids) for group in groups for ids in group["response_ids"]]
    assert len(rows) == len({(tuple(group["prompt_ids"]), tuple(ids)) for group, ids in responses})
    expected = [group["prompt_ids"] + ids for group, ids in responses]
    assert [rows[index] for index in batch["response_rows"]] == expected
    for index, group in enumerate(groups):
        assert rows[batch["group_rows"][index]][: len(group["prompt_ids"])] == group["prompt_ids"]
        for (i, j), (left, right) in zip(group["pairs"], batch["comparisons"][index].tolist(), strict=True):
            assert rows[left] == group["prompt_ids"] + group["response_ids"][i]
            assert rows[right] == group["prompt_ids"] + group["response_ids"][j]


def test_the_model_takes_a_batch():
    batch = collate(PAIR, TRIPLE)
    with torch.inference_mode():
        output = tiny_model()(**{name: batch[name] for name in ("input_ids", "attention_mask", "prompt_lengths")})
    assert output.embeddings.shape == (5, 4)
