"""The recipe `dominant_cycle`: its rows, what a plane can express, and a run of a few steps."""

import importlib.util
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from gpm_trl.preference import preference_matrix

pytest.importorskip("matplotlib")
PATH = Path(__file__).parents[1] / "recipes" / "dominant_cycle" / "run.py"
lengths = pytest.mark.parametrize("length", [3, 4, 5])


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("recipe_dominant_cycle", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@lengths
def test_one_response_beats_all_and_the_others_are_one_cycle(recipe, length):
    rows = recipe.draw_rows(100, length, seed=0)
    assert len({row["prompt"] for row in rows}) == 100
    winners = defaultdict(set)
    for row in rows:
        pairs = [tuple(row["responses"][i] for i in pair) for pair in row["comparisons"]]
        _, role = row["prompt"].split()
        assert {winner for winner, _ in pairs[:length]} == {role[0]}
        losers = dict(pairs[length:])
        assert {loser for _, loser in pairs[:length]} == set(losers)
        letter, seen = pairs[length][0], []
        for _ in range(length):
            seen.append(letter)
            letter = losers[letter]
        assert letter == seen[0]
        assert sorted(seen) == sorted(losers)
        assert (sum(a < b for a, b in losers.items()) > 1) == (role[1] == "+")
        for winner, loser in pairs:
            winners[frozenset((winner, loser))].add(winner)
    # Of each pair of letters, either wins for some prompt: a response alone says nothing.
    assert all(len(winner) == 2 for winner in winners.values())
    assert recipe.draw_rows(100, length, seed=0) == rows != recipe.draw_rows(100, length, seed=1)


def expressed(embeddings: torch.Tensor) -> tuple[int, int]:
    """Of the first response above the others, and of the cycle of these: how many comparisons come out right."""
    wins = preference_matrix(embeddings) > 1e-9
    cycle = torch.arange(1, len(wins))
    return int(wins[0, 1:].sum()), int(wins[cycle, cycle.roll(-1)].sum())


@lengths
def test_a_plane_has_no_room_for_a_dominant_response_above_a_cycle_and_two_have(length):
    angles = -torch.arange(length) * 2 * torch.pi / length
    cycle = torch.stack([angles.sin(), angles.cos()], dim=-1)  # each beats the next
    generator = torch.Generator().manual_seed(0)
    most = 0
    for _ in range(3000):
        turns = 2 * torch.pi * torch.rand(length + 1, generator=generator)
        most = max(most, sum(expressed(torch.stack([turns.sin(), turns.cos()], dim=-1))))
    assert most == 2 * length - 1  # all but one: as many as a reward gets, which has no cycle
    rewards = torch.arange(length, -1, -1.0)
    assert sum(expressed(torch.stack([rewards, torch.ones(length + 1)], dim=-1))) == most
    below = torch.tensor([0.0, 0.6]).expand(length, 2)  # behind the dominant response, in a plane of their own
    unit = torch.cat([torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.cat([below, 0.8 * cycle], dim=-1)])
    assert unit.norm(dim=-1).numpy() == pytest.approx(1)
    assert expressed(unit) == (length, length)
    reward = torch.tensor([[1.0, 1.0]] + [[0.0, 1.0]] * length)
    hybrid = torch.cat([reward, torch.cat([cycle[:1], cycle])], dim=-1)
    hybrid[0, 0] = 3.0
    assert expressed(hybrid) == (length, length)


@lengths
def test_where_a_cycle_ties_is_a_minimum_in_one_plane_of_unit_lengths_and_else_a_saddle(length):
    """Why such a plane may never leave the tie: it would have to go through wrong comparisons."""

    def curvature(points, start: torch.Tensor) -> torch.Tensor:
        """Eigenvalues of the Hessian of the loss of a cycle, where its gradient is 0."""

        def loss(parameters: torch.Tensor) -> torch.Tensor:
            first = torch.arange(length)
            scores = preference_matrix(points(parameters))[first, first.roll(-1)]
            return torch.nn.functional.softplus(-scores / 0.1).mean()

        assert torch.autograd.functional.jacobian(loss, start).abs().max() < 1e-12
        hessian = torch.autograd.functional.hessian(loss, start)
        return torch.linalg.eigvalsh(hessian.reshape(start.numel(), start.numel()))

    def on_circle(angles: torch.Tensor) -> torch.Tensor:
        return torch.stack([angles.sin(), angles.cos()], dim=-1)

    in_plane = curvature(on_circle, torch.zeros(length, dtype=torch.float64))
    assert in_plane[0].abs() < 1e-12  # all may turn together
    assert in_plane[1] > 0.01
    assert curvature(lambda points: points, torch.zeros(length, 2, dtype=torch.float64))[0] < -0.01
    two_planes = torch.tensor([[1.0, 0, 0, 0]] * length, dtype=torch.float64)
    assert curvature(lambda points: torch.nn.functional.normalize(points, dim=-1), two_planes)[0] < -0.01


def test_accuracies_are_those_of_the_two_halves(recipe):
    log_odds = np.array([[1.0, 2, -1, 0, 3, 3], [1, 1, 1, -1, -1, 1]])
    found = recipe.accuracies(EvalPrediction(predictions=log_odds, label_ids=np.ones_like(log_odds)))
    assert found == {"dominant": 5 / 6, "cycle": 3 / 6, "ties": 1 / 12}


def test_found_is_the_step_from_which_on_the_accuracy_stays(recipe):
    curve = [{"step": 10 * index, "a": value} for index, value in enumerate((0.5, 1.0, 0.9, 0.96, 1.0))]
    assert recipe.first_step(curve, "a") == 30
    assert recipe.first_step(curve[:3], "a") is None


RUN = ["--num_steps=2", "--eval_steps=1", "--num_prompts=8", "--num_unseen=4", "--batch_size=4", "--seeds", "0", "1"]


@pytest.mark.slow
def test_a_run_writes_numbers_and_a_picture_and_goes_on(recipe, tmp_path, monkeypatch, capsys):
    run = [*RUN, f"--output_dir={tmp_path}", "--learning_rates", "1e-3", "1e-2", "--kinds", "BT", "HRC 2+1"]
    recipe.main(run)
    written = (tmp_path / "results.json").read_text()
    for kind in ("BT", "HRC 2+1"):
        result = json.loads(written)[kind]
        assert f"{result['learning_rate']:g}" in result["validation"]
        assert [[point["step"] for point in curve] for curve in result["curves"]] == [[0, 1, 2]] * 2
        assert all(
            set(point) == {"step", *(f"{s}_{p}" for s in recipe.SPLITS for p in (*recipe.PARTS, "ties"))}
            for curve in result["curves"]
            for point in curve
        )
    assert "| HRC 2+1 |" in capsys.readouterr().out
    assert (tmp_path / "dominant_cycle.png").stat().st_size > 10_000
    monkeypatch.setattr(recipe, "train", None)  # all is there
    recipe.main(run)
    assert (tmp_path / "results.json").read_text() == written
    with pytest.raises(TypeError):
        recipe.main([*run, "--num_steps=3"])  # which would be other numbers


@pytest.mark.slow
def test_a_reward_finds_the_dominant_response_and_no_cycle(recipe, tmp_path):
    run = ["--num_steps=60", "--eval_steps=60", "--seeds", "0", "--learning_rates", "1e-3", "--kinds", "BT"]
    recipe.main([*run, f"--output_dir={tmp_path}"])
    end = json.loads((tmp_path / "results.json").read_text())["BT"]["curves"][0][-1]
    assert end["test_dominant"] > 0.95
    assert end["test_cycle"] < 0.7
