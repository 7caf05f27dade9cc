"""A cycle of preferences, which no scalar reward can order, is learned by a real model in a minute."""

from itertools import permutations

import pytest
from conftest import TRAINING, user
from datasets import Dataset

from gpm_trl import GPMConfig, GPMTrainer, PreferenceScorer

from .parts import part

pytestmark = pytest.mark.real

CYCLE = ((0, 1), (1, 2), (2, 0))
ROWS = [
    {"prompt": [user("Your move?")], "responses": ["Rock", "Scissors", "Paper"]},
    {"prompt": [user("Name a pet.")], "responses": ["A cat", "A dog", "A fish"]},
    {"prompt": [user("Where to?")], "responses": ["Rome", "Oslo", "Lima"]},
]


def cycle_accuracy(scores) -> float:
    """The share of the comparisons of a cycle of three that scores get right."""
    return sum(bool(scores[winner][loser] > 0) for winner, loser in CYCLE) / len(CYCLE)


def test_no_scalar_reward_gets_more_than_two_of_three_right():
    orders = [[[first - second for second in rewards] for first in rewards] for rewards in permutations(range(3))]
    assert max(map(cycle_accuracy, orders)) == 2 / 3


def test_cycles_are_learned(tmp_path):
    rows = [{**row, "comparisons": [list(pair) for pair in CYCLE]} for row in ROWS]
    args = GPMConfig(
        str(tmp_path),
        **{**TRAINING, "logging_steps": 20},
        learning_rate=1e-5,
        max_steps=60,
        per_device_train_batch_size=1,
    )
    trainer = GPMTrainer(str(part("smollm2-135m")), args, Dataset.from_list(rows))
    scorer = PreferenceScorer(trainer.model, trainer.processing_class)
    prompts, responses = [row["prompt"] for row in ROWS], [row["responses"] for row in ROWS]
    before = scorer.matrix(prompts, responses)
    trainer.train()
    after = scorer.matrix(prompts, responses)
    assert min(map(cycle_accuracy, before)) < 1
    assert min(map(cycle_accuracy, after)) == 1, [trainer.state.log_history, after]
