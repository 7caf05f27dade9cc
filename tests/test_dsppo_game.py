"""DSPPO in games that are played exactly (`docs/images/dsppo_game.py`): its formula, and where it converges."""

import runpy
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import duality_gap
from scipy.special import expit, softmax

from gpm_trl.preference import response_loss

game = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "images" / "dsppo_game.py"))
DOMINANT, UNEQUAL, PURE = game["GAMES"]


def played(name: str, strength: float | None, steps: int = 60, beta: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    transitive, cyclic = game["parts"](*game["GAMES"][name])
    policies = game["self_play"](transitive, cyclic, strength, beta, steps).numpy()
    probabilities = expit((transitive + cyclic).numpy())
    return policies, np.array([duality_gap(probabilities, policy) for policy in policies])


@pytest.mark.parametrize("strength", [-1.5, 0.0, 1.0, None])
@pytest.mark.parametrize("name", game["GAMES"])
def test_policies_and_gaps_equal_their_formulas(name, strength):
    transitive, cyclic = (part.numpy() for part in game["parts"](*game["GAMES"][name]))
    policies, gaps = played(name, strength, steps=5)
    for t in range(1, 6):
        lam = 0 if strength is None else strength / np.sqrt(t)
        log_odds = (1 + lam) * transitive + (1 - lam) * cyclic
        gain = log_odds if strength is None else expit(log_odds) - 0.5
        expected = softmax(np.log(policies[t - 1]) + gain @ policies[t - 1] / 2)
        assert policies[t] == pytest.approx(expected, abs=1e-14)
    of_script = game["duality_gaps"](torch.from_numpy(transitive + cyclic), torch.from_numpy(policies))
    assert of_script.numpy() == pytest.approx(gaps, abs=1e-14)


def test_a_step_is_the_minimum_of_the_loss_that_policies_are_trained_by():
    """Up to log Z, the same for all responses, which the loss takes as 0."""
    transitive, cyclic = game["parts"](*game["GAMES"][UNEQUAL])
    before, after = game["self_play"](transitive, cyclic, 1.0, 2.0, 1)
    signal = game["expected_signal"](2 * transitive, before, "dsppo")  # t = 1: the weights are 2 and 0
    log_z = (before * (signal / 2.0).exp()).sum().log()
    assert response_loss((after / before).log() + log_z, signal, 2.0).max() < 1e-28


def test_with_a_dominant_response_all_converge_and_more_weight_on_rewards_is_quicker():
    gaps = [played(DOMINANT, strength, steps=300)[1] for strength in (1.0, 0.5, 0.0, -1.0)]
    for quicker, slower in pairwise(gaps):
        assert (quicker[1:200] < slower[1:200]).all()
        assert (np.diff(quicker[:200]) < 0).all()
        assert quicker[-1] < 1e-7
    assert gaps[0][100] < gaps[2][100] / 2


@pytest.mark.parametrize("strength", [-2.0, -1.0, 0.0, 1.0, 2.0])
def test_in_a_pure_cycle_no_policy_comes_nearer_to_the_winner(strength):
    """`KL(uniform || pi_t)` grows by `log E exp(signal / beta) >= 0`, whatever the weights are."""
    policies, gaps = played(PURE, strength, steps=300)
    divergence = -np.log(3 * policies).mean(-1)
    assert (np.diff(divergence) > -1e-12).all()
    assert gaps[-100:].max() > 2 * gaps[0]


@pytest.mark.parametrize("strength", [-1.0, 0.0, 1.0, None])
def test_in_a_cycle_with_unequal_rewards_the_mean_of_the_policies_converges_and_the_last_does_not(strength):
    """That of GPO to the winner of the log-odds, which is another game."""
    policies, gaps = played(UNEQUAL, strength, steps=2000)
    assert gaps[-1000:].max() > gaps[0]
    transitive, cyclic = game["parts"](*game["GAMES"][UNEQUAL])
    log_odds = (transitive + cyclic).numpy()
    won = log_odds if strength is None else expit(log_odds)
    assert duality_gap(won, policies.mean(0)) < duality_gap(won, policies[0]) / 4


def test_more_weight_on_rewards_leads_away_from_the_winner_of_a_cycle_with_unequal_rewards():
    transitive, cyclic = game["parts"](*game["GAMES"][UNEQUAL])
    far = {
        strength: game["distances"](transitive + cyclic, torch.from_numpy(played(UNEQUAL, strength)[0]))
        for strength in (-1.0, 0.0, 1.0)
    }
    assert (far[1.0][1:25] > far[0.0][1:25]).all()
    assert (far[-1.0][1:19] < far[0.0][1:19]).all()
