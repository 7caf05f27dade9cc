"""Batches of about as many tokens each: every group once, none over the budget, a shuffle all the same."""

import random

import pytest
import torch
from conftest import tiny_model
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from gpm_trl import DataCollatorForGroups, GPMConfig, GPMTrainer
from gpm_trl.data.batches import fill_batches, first_fit

LENGTHS = st.lists(
    st.tuples(st.integers(1, 60), st.integers(1, 5)).map(lambda pair: (pair[0] * pair[1], pair[0], pair[1])),
    min_size=1,
    max_size=60,
)


def groups_of(count: int, seed: int = 0) -> Dataset:
    """Pairs whose number is their prompt, longer and longer."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        lengths = [1 + number * 20 // count + draw.randrange(3) for _ in range(2)]
        responses = [[10 + index] * length for index, length in enumerate(lengths)]
        prompt = [3 + number // 200, 3 + number % 200]
        rows.append({"prompt_ids": prompt, "response_ids": responses, "pairs": [[0, 1]], "targets": [1.0]})
    return Dataset.from_list(rows)


def number_of(group: dict) -> int:
    high, low = group["prompt_ids"]
    return (high - 3) * 200 + low - 3


@settings(deadline=None, derandomize=True)
@given(lengths=LENGTHS, shared_prefix=st.booleans(), max_tokens=st.integers(300, 500))
def test_each_group_is_in_one_batch_and_no_batch_is_over_the_budget(lengths, shared_prefix, max_tokens):
    batches = first_fit(lengths, max_tokens, shared_prefix)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        tokens, longest, rows = zip(*(lengths[index] for index in batch), strict=True)
        assert (sum(tokens) if shared_prefix else sum(rows) * max(longest)) <= max_tokens
    if shared_prefix:  # all but one are more than half full
        assert sum(sum(lengths[index][0] for index in batch) * 2 <= max_tokens for batch in batches) <= 1


@pytest.mark.parametrize("shared_prefix", [False, True])
def test_the_batches_of_the_collator_keep_the_budget(shared_prefix, tokenizer):
    batches = fill_batches(groups_of(300), 200, shared_prefix, seed=0)
    collator = DataCollatorForGroups(tokenizer, shared_prefix=shared_prefix)
    sizes = [collator([batch])["input_ids"].numel() for batch in batches]
    assert max(sizes) <= 200
    assert sum(sizes) / len(sizes) > 150
    assert sorted(number_of(group) for batch in batches for group in batch["groups"]) == list(range(300))


def test_batches_are_a_shuffle_of_the_groups():
    """Neither the order of the dataset nor the length says where a group comes, within windows and over them."""
    batches = fill_batches(groups_of(3000), 120, shared_prefix=True, seed=0)
    numbers = torch.tensor([number_of(group) for batch in batches for group in batch["groups"]], dtype=torch.float)
    places = torch.arange(len(numbers), dtype=torch.float)
    assert abs(torch.corrcoef(torch.stack([places, numbers]))[0, 1]) < 0.06
    spread = [torch.tensor([number_of(group) for group in batch["groups"]]).float().std() for batch in batches]
    assert torch.tensor([value for value in spread if not value.isnan()]).mean() > 500  # of 866, drawn at random


def test_the_seed_says_which_groups_meet():
    first, again, other = (fill_batches(groups_of(100), 100, True, seed)["groups"][:] for seed in (0, 0, 1))
    assert first == again
    assert {tuple(map(number_of, batch)) for batch in first} != {tuple(map(number_of, batch)) for batch in other}


def test_a_stream_is_filled_window_by_window():
    groups = groups_of(2500)
    batches = list(fill_batches(groups.to_iterable_dataset(), 120, shared_prefix=True, seed=0))
    numbers = [number_of(group) for batch in batches for group in batch["groups"]]
    assert sorted(numbers) == list(range(2500))
    assert sorted(numbers[:1000]) == list(range(1000))
    assert numbers[:1000] != list(range(1000))


@pytest.mark.parametrize(("shared_prefix", "tokens"), [(True, 84), (False, 88)])
def test_a_group_over_the_budget_is_an_error(shared_prefix, tokens):
    group = {"prompt_ids": [1, 2], "response_ids": [[3] * 40, [4] * 42], "pairs": [[0, 1]], "targets": [1.0]}
    with pytest.raises(ValueError, match=rf"A group of {tokens} tokens.*`max_tokens_per_batch` = 80"):
        fill_batches(Dataset.from_list([group]), 80, shared_prefix, seed=0)
    assert len(fill_batches(Dataset.from_list([group]), tokens, shared_prefix, seed=0)) == 1


# The trainer


def config(directory, **changes) -> GPMConfig:
    settings = {"max_tokens_per_batch": 120, "num_train_epochs": 1, "learning_rate": 1e-3, "logging_steps": 1}
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    return GPMConfig(str(directory), **{**settings, **quiet, **changes})


def watch(trainer: GPMTrainer) -> list[list[dict]]:
    """The groups of each batch of the training, as it was collated."""
    seen, collate = [], trainer.data_collator
    trainer.data_collator = lambda rows: (
        seen.append([group for row in rows for group in row.get("groups", [row])]) or collate(rows)
    )
    trainer.train()
    return seen


@pytest.mark.parametrize("shared_prefix", [False, True])
def test_an_epoch_trains_on_each_group_once(shared_prefix, tokenizer, tmp_path):
    args = config(tmp_path, shared_prefix=shared_prefix, num_train_epochs=2, gradient_accumulation_steps=2)
    trainer = GPMTrainer(tiny_model(), args, groups_of(40), groups_of(9), processing_class=tokenizer)
    epochs = [sorted(map(number_of, batch)) for batch in watch(trainer)]
    half = len(epochs) // 2
    assert len({len(batch) for batch in epochs}) > 1
    for epoch in (epochs[:half], epochs[half:]):
        assert sorted(number for batch in epoch for number in batch) == list(range(40))
    assert epochs[:half] != epochs[half:]
    assert trainer.evaluate()["eval_loss"] > 0


def test_the_loss_is_the_mean_over_the_comparisons_of_a_step(tokenizer, tmp_path):
    """Two batches with different numbers of comparisons, accumulated, are one batch with all of them."""
    losses = []
    for name, changes in {
        "filled": {"gradient_accumulation_steps": 1000},
        "one": {"max_tokens_per_batch": None, "per_device_train_batch_size": 40},
    }.items():
        args = config(tmp_path / name, **changes)
        trainer = GPMTrainer(tiny_model(), args, groups_of(40), processing_class=tokenizer)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_stream_trains(tokenizer, tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(groups_of(20)))
    trainer = GPMTrainer(tiny_model(), config(tmp_path, max_steps=2), stream, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_the_trainers_own_sampling_by_length_has_the_lengths_it_needs(strategy, tokenizer, tmp_path):
    rows = [{"prompt": "x", "chosen": "a" * (number + 1), "rejected": "b" * (number + 1)} for number in range(32)]
    random.Random(0).shuffle(rows)
    args = config(tmp_path, max_tokens_per_batch=None, train_sampling_strategy=strategy, per_device_train_batch_size=4)
    trainer = GPMTrainer(tiny_model(), args, Dataset.from_list(rows), processing_class=tokenizer)
    lengths = [[group["length"] for group in batch] for batch in watch(trainer)]
    assert sorted(length for batch in lengths for length in batch) == sorted(2 * n + 5 for n in range(32))
    assert max(max(batch) - min(batch) for batch in lengths) < 2 * 31


def test_a_budget_replaces_the_batch_size(tmp_path):
    assert config(tmp_path).per_device_train_batch_size == 1
    with pytest.raises(ValueError, match="`per_device_train_batch_size` is 4, but `max_tokens_per_batch` replaces it"):
        config(tmp_path, per_device_train_batch_size=4)
    for strategy in ("group_by_length", "sequential"):
        with pytest.raises(ValueError, match=f"is '{strategy}', but batches are filled from rows in random order"):
            config(tmp_path, train_sampling_strategy=strategy)


def test_a_budget_needs_the_trainers_own_batches(tokenizer, tmp_path):
    given = {"processing_class": tokenizer, "data_collator": DataCollatorForGroups(tokenizer)}
    with pytest.raises(ValueError, match="leave it or `data_collator` out"):
        GPMTrainer(tiny_model(), config(tmp_path), groups_of(8), **given)
