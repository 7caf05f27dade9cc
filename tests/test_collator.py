"""Groups to padded batches."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpm_trl import DataCollatorForGroups

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
    return DataCollatorForGroups(SimpleNamespace(pad_token_id=7), **settings)(groups)


def test_rows_are_prompt_and_response_padded_on_the_right():
    batch = collate(PAIR, TRIPLE, {**PAIR, "prompt_ids": [7, 7], "response_ids": [[7], [7, 7]]})  # 7 is the pad token
    assert batch["input_ids"].tolist() == [
        [1, 5, 6, 2, 7],
        [1, 5, 8, 9, 2],
        [1, 4, 2, 7, 7],
        [1, 2, 7, 7, 7],
        [1, 3, 2, 7, 7],
        [7, 7, 7, 7, 7],
        [7, 7, 7, 7, 7],
    ]
    assert batch["attention_mask"].tolist() == [[1] * length + [0] * (5 - length) for length in (4, 5, 3, 2, 3, 3, 4)]
    assert batch["prompt_lengths"].tolist() == [2, 2, 1, 1, 1, 2, 2]
    assert batch["group_rows"].tolist() == [0, 2, 5]


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


def test_comparisons_name_rows_of_the_batch_and_are_padded():
    batch = collate({**PAIR, "margins": [2.5]}, {**TRIPLE, "margins": [1.0, -1.0, 3]})
    assert batch["comparisons"].tolist() == [[[1, 0], [0, 0], [0, 0]], [[2, 3], [4, 3], [4, 2]]]
    assert batch["comparison_mask"].tolist() == [[True, False, False], [True, True, True]]
    assert batch["labels"].tolist() == [[0.25, -100, -100], [1, 0.5, 0]]
    assert batch["margins"].tolist() == [[2.5, 0, 0], [1, -1, 3]]
    assert "margins" not in collate(PAIR)


@pytest.mark.parametrize("score", [-100, -100.0000001])
def test_a_score_that_would_mark_padding_is_counted(score):
    """The Trainer divides by the labels that are not -100."""
    batch = collate({**PAIR, "targets": [score]}, TRIPLE)
    assert batch["labels"].ne(-100).sum() == batch["comparison_mask"].sum() == 4
    assert batch["labels"][0, 0].item() == pytest.approx(-100, rel=1e-7)


@pytest.mark.parametrize(("multiple", "width"), [(4, 8), (5, 5)])
def test_the_width_is_a_multiple(multiple, width):
    batch = collate(PAIR, TRIPLE, pad_to_multiple_of=multiple)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (5, width)
    assert batch["attention_mask"].sum(dim=-1).tolist() == [4, 5, 3, 2, 3]


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
