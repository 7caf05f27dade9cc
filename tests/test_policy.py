"""Signals and losses of policies against the specification's formulas, in references of their own, and in games."""

import itertools
import math
import random
from typing import NamedTuple

import numpy as np
import pytest
import torch

from gpm_trl.games import duality_gap
from gpm_trl.preference import LOSS_TYPES, PAIRINGS, group_signal, policy_loss, preference_cross_entropy

SQUARED = ["gpo", "sppo"]
PAIRWISE = ["sigmoid", "ipo", "rebel"]
NEED_A_WINNER = ["sigmoid", "ipo"]
ROCK_PAPER_SCISSORS = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64)

on_losses = pytest.mark.parametrize("loss_type", LOSS_TYPES)
on_pairings = pytest.mark.parametrize("pairing", PAIRINGS)


# References: plain loops over one prompt


def reference_signals(log_odds: list[list[float]], loss_type: str) -> list[float]:
    size = len(log_odds)
    if loss_type == "sppo":
        return [sum(1 / (1 + math.exp(-s)) for s in row) / size - 1 / 2 for row in log_odds]
    return [sum(row) / size for row in log_odds]


def reference_responses(signals: list[float], pairing: str, valid: list[bool]) -> list[int]:
    remaining = [i for i in range(len(signals)) if valid[i]]
    if pairing == "best_worst" and len(remaining) > 2:
        best = worst = remaining[0]
        for i in remaining:
            best = i if signals[i] > signals[best] else best
            worst = i if signals[i] <= signals[worst] else worst
        return [best, worst]
    return remaining


def reference_pair(loss_type: str, beta: float, h: float, gap: float) -> tuple[float, float]:
    """Loss of a pair, and its derivative with respect to h."""
    if loss_type == "sigmoid":
        return math.log1p(math.exp(-beta * h)), -beta / (1 + math.exp(beta * h))
    if loss_type == "ipo":
        return (h - 1 / (2 * beta)) ** 2, 2 * (h - 1 / (2 * beta))
    return (beta * h - gap) ** 2, 2 * beta * (beta * h - gap)


def reference_prompt(log_ratios, signals, loss_type, beta, pairing, valid) -> tuple[float, list[float]]:
    """Loss of one prompt, and its gradient with respect to the log-ratios."""
    responses = reference_responses(signals, pairing, valid)
    values, gradient = [], [0.0] * len(log_ratios)
    if loss_type in SQUARED:
        for i in responses:
            error = log_ratios[i] - signals[i] / beta
            values.append(error**2)
            gradient[i] += 2 * error
    else:
        for i, j in itertools.combinations(responses, 2):
            if signals[i] == signals[j] and loss_type in NEED_A_WINNER:
                continue
            winner, loser = (i, j) if signals[i] > signals[j] else (j, i)
            h = log_ratios[winner] - log_ratios[loser]
            value, derivative = reference_pair(loss_type, beta, h, signals[winner] - signals[loser])
            values.append(value)
            gradient[winner] += derivative
            gradient[loser] -= derivative
    terms = max(len(values), 1)
    return sum(values) / terms, [entry / terms for entry in gradient]


class Groups(NamedTuple):
    log_ratios: torch.Tensor  # (G, K)
    signals: torch.Tensor  # (G, K)
    valid: torch.Tensor  # (G, K)


def random_groups(num_responses: int, masked: bool = False, ties: bool = False, num_prompts: int = 12, dtype=None):
    generator = torch.Generator().manual_seed(num_responses)
    shape = (num_prompts, num_responses)
    log_ratios, signals = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
    if ties:
        signals = (signals * 0.7).round()
        signals[0] = 0.0
    valid = torch.ones(shape, dtype=torch.bool)
    if masked:
        valid = torch.rand(shape, generator=generator) < 0.6
        valid[:4] = torch.tensor([False, False, True, True])[:, None]
        valid[1, -1], valid[2, 0] = True, False  # a prompt without any response, with one, without one, with all
    return Groups(log_ratios.to(dtype or torch.float64).requires_grad_(), signals.to(dtype or torch.float64), valid)


def reference(groups: Groups, loss_type: str, beta: float, pairing: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses `(G,)` and the gradient of their sum `(G, K)`, in float64."""
    rows = zip(*(tensor.tolist() for tensor in groups), strict=True)
    prompts = [reference_prompt(row[0], row[1], loss_type, beta, pairing, row[2]) for row in rows]
    losses, gradients = zip(*prompts, strict=True)
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(gradients, dtype=torch.float64)


def loss_and_gradient(groups: Groups, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    losses = policy_loss(groups.log_ratios, groups.signals, *args, **kwargs)
    (gradient,) = torch.autograd.grad(losses.sum(), groups.log_ratios)
    return losses.detach(), gradient


def random_log_odds(num_responses: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = scale * torch.randn((num_responses, num_responses), generator=generator, dtype=torch.float64)
    return matrix - matrix.T


def reward_log_odds(rewards: torch.Tensor) -> torch.Tensor:
    return rewards.unsqueeze(-1) - rewards.unsqueeze(-2)


# Signals


@on_losses
@pytest.mark.parametrize("num_responses", [1, 2, 3, 5])
def test_signal_equals_its_formula(num_responses, loss_type):
    log_odds = random_log_odds(num_responses)
    expected = reference_signals(log_odds.tolist(), loss_type)
    assert group_signal(log_odds, loss_type).tolist() == pytest.approx(expected, abs=1e-12)


@on_losses
def test_signals_of_a_group_add_up_to_zero(loss_type):
    signals = group_signal(random_log_odds(5).float(), loss_type)
    assert signals.abs().max() > 0.1
    assert signals.sum().item() == pytest.approx(0, abs=1e-6)


@on_losses
def test_signals_of_a_batch_are_those_of_each_prompt(loss_type):
    log_odds = torch.stack([random_log_odds(4, seed) for seed in range(6)]).unflatten(0, (2, 3))
    signals = group_signal(log_odds, loss_type)
    assert signals.shape == (2, 3, 4)
    for prompt in itertools.product(range(2), range(3)):
        torch.testing.assert_close(signals[prompt], group_signal(log_odds[prompt], loss_type))


def test_signal_of_rewards_is_what_they_exceed_their_mean_by():
    rewards = torch.tensor([[3.0, 1.0, -1.0, 0.5], [0.0, 0.0, 2.0, 7.0]], dtype=torch.float64)
    torch.testing.assert_close(group_signal(reward_log_odds(rewards), "gpo"), rewards - rewards.mean(-1, keepdim=True))


@on_losses
def test_a_constant_added_to_the_rewards_changes_nothing(loss_type):
    rewards = torch.tensor([3.0, 1.0, -1.0, 0.5])
    signals = group_signal(reward_log_odds(rewards), loss_type)
    assert torch.equal(group_signal(reward_log_odds(rewards + 64), loss_type), signals)


@on_losses
def test_rock_paper_scissors_give_a_uniform_group_no_signal(loss_type):
    assert torch.equal(group_signal(ROCK_PAPER_SCISSORS.float() * 0.3, loss_type), torch.zeros(3))


@on_losses
def test_copies_of_a_response_tie_bitwise(loss_type):
    copies = torch.tensor([0, 1, 0, 2, 0, 3, 1])
    signals = group_signal(random_log_odds(4).float()[copies][:, copies], loss_type)
    assert all(torch.equal(signals[i], signals[j]) for i, j in [(0, 2), (0, 4), (1, 6)])
    assert len(signals.unique()) == 4


def test_rock_paper_scissors_give_another_group_the_signal_that_rewards_cannot():
    rewards = torch.tensor([0.7, -0.2, 0.4], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([rewards], lr=1.0)
    winners, losers = (ROCK_PAPER_SCISSORS > 0).nonzero(as_tuple=True)
    for _ in range(200):
        optimizer.zero_grad()
        scores = rewards[winners] - rewards[losers]
        preference_cross_entropy(scores, torch.ones_like(scores), temperature=1.0).mean().backward()
        optimizer.step()
    group = torch.tensor([0, 0, 1, 2, 0])  # mostly rock: paper is the best response
    fitted = group_signal(reward_log_odds(rewards.detach()[group]), "gpo")
    torch.testing.assert_close(fitted, torch.zeros_like(fitted), rtol=0, atol=1e-12)
    true = group_signal(ROCK_PAPER_SCISSORS[group][:, group], "gpo")
    assert true.tolist() == pytest.approx([0.0, 0.0, 0.4, -0.4, 0.0])


def test_small_log_odds_give_sppo_a_quarter_of_the_signal_in_full_precision():
    log_odds = (1e-6 * random_log_odds(5)).float()
    torch.testing.assert_close(group_signal(log_odds, "sppo"), group_signal(log_odds, "gpo") / 4, rtol=1e-5, atol=0)


# Losses: values and gradients


@on_losses
@on_pairings
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("masked", [False, True], ids=["all_valid", "masked"])
@pytest.mark.parametrize("num_responses", [2, 3, 4, 5])
def test_losses_and_gradients_equal_the_reference(num_responses, masked, ties, pairing, loss_type):
    groups = random_groups(num_responses, masked, ties)
    actual = loss_and_gradient(groups, loss_type, 0.4, pairing, groups.valid if masked else None)
    expected = reference(groups, loss_type, 0.4, pairing)
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1])


@on_losses
@on_pairings
def test_gradients_pass_gradcheck(pairing, loss_type):
    groups = random_groups(4, masked=True, ties=True, num_prompts=6)

    def losses(log_ratios):
        return policy_loss(log_ratios, groups.signals, loss_type, 0.4, pairing, groups.valid)

    assert torch.autograd.gradcheck(losses, groups.log_ratios)


@on_losses
@on_pairings
@pytest.mark.parametrize("beta", [0.001, 0.1, 10.0])
def test_float32_losses_are_close_to_float64(beta, pairing, loss_type):
    groups = random_groups(5, masked=True, dtype=torch.float32)
    losses, gradient = loss_and_gradient(groups, loss_type, beta, pairing, groups.valid)
    expected = reference(groups, loss_type, beta, pairing)
    assert losses.dtype == gradient.dtype == torch.float32
    for actual, wanted in zip((losses, gradient), expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=2e-6 * wanted.abs().max().item())


@on_losses
@on_pairings
@pytest.mark.parametrize("beta", [0.001, 1.0])
def test_large_log_ratios_give_finite_losses_and_gradients(beta, pairing, loss_type):
    signals = torch.tensor([[-50.0, 0.0, 50.0]])
    groups = Groups(torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True), signals, torch.ones(1, 3, dtype=torch.bool))
    losses, gradient = loss_and_gradient(groups, loss_type, beta, pairing)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient[0, 0] > 0 > gradient[0, 2]  # what is likely and bad becomes less likely


def test_sigmoid_loss_of_a_hopeless_pair_is_its_log_odds():
    loss = policy_loss(torch.tensor([[-5e3, 5e3]]), torch.tensor([[1.0, 0.0]]), "sigmoid", beta=0.1)
    assert loss.item() == pytest.approx(1e3)


@on_losses
@on_pairings
def test_signals_are_constants(pairing, loss_type):
    groups = random_groups(4)
    signals = groups.signals.clone().requires_grad_()
    policy_loss(groups.log_ratios, signals, loss_type, 0.4, pairing).sum().backward()
    assert signals.grad is None


# Losses: what enters


@on_losses
@on_pairings
def test_every_prompt_has_the_loss_that_it_has_alone(pairing, loss_type):
    groups = random_groups(5, masked=True, ties=True)
    losses = policy_loss(groups.log_ratios, groups.signals, loss_type, 0.4, pairing, groups.valid)
    for i in range(len(losses)):
        responses = groups.valid[i]
        if responses.sum() >= 2:
            alone = (groups.log_ratios[i : i + 1, responses], groups.signals[i : i + 1, responses])
            torch.testing.assert_close(policy_loss(*alone, loss_type, 0.4, pairing), losses[i : i + 1])


@on_losses
@on_pairings
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_masked_responses_enter_no_term_whatever_their_values(value, pairing, loss_type):
    groups = random_groups(4, masked=True)
    losses, gradient = loss_and_gradient(groups, loss_type, 0.4, pairing, groups.valid)
    log_ratios = groups.log_ratios.detach().masked_fill(~groups.valid, value).requires_grad_()
    other = Groups(log_ratios, groups.signals.masked_fill(~groups.valid, value), groups.valid)
    other_losses, other_gradient = loss_and_gradient(other, loss_type, 0.4, pairing, groups.valid)
    assert torch.equal(other_losses, losses)
    assert torch.equal(other_gradient, gradient)
    assert not gradient[~groups.valid].any()


@on_losses
@on_pairings
def test_a_prompt_without_valid_responses_has_no_loss(pairing, loss_type):
    groups = random_groups(3)
    losses, gradient = loss_and_gradient(groups, loss_type, 0.4, pairing, torch.zeros_like(groups.valid))
    assert not losses.any()
    assert not gradient.any()


@on_losses
@on_pairings
def test_one_valid_response_is_enough_for_the_squared_errors_only(pairing, loss_type):
    valid = torch.tensor([[False, True, False]])
    loss = policy_loss(torch.zeros(1, 3), torch.tensor([[1.0, 2.0, -3.0]]), loss_type, 0.5, pairing, valid)
    assert loss.item() == (16.0 if loss_type in SQUARED else 0.0)


@on_losses
def test_of_best_and_worst_no_other_response_enters(loss_type):
    signals = torch.tensor([[0.5, -1.0, 2.0, 0.0, -1.5]])
    log_ratios = torch.tensor([[0.1, math.nan, 0.3, -math.inf, 0.2]], requires_grad=True)
    loss = policy_loss(log_ratios, signals, loss_type, 0.4, "best_worst")
    loss.sum().backward()
    torch.testing.assert_close(loss, policy_loss(log_ratios[:, [2, 4]], signals[:, [2, 4]], loss_type, 0.4))
    assert log_ratios.grad.nonzero()[:, 1].tolist() == [2, 4]


@on_losses
@pytest.mark.parametrize("valid", [[True] * 4, [False, True, True, False]])
def test_of_tied_responses_the_first_and_the_last_are_best_and_worst(valid, loss_type):
    log_ratios = torch.tensor([[0.3, -0.2, 0.7, 0.4]], requires_grad=True)
    policy_loss(log_ratios, torch.zeros(1, 4), loss_type, 0.4, "best_worst", torch.tensor([valid])).sum().backward()
    first, last = valid.index(True), 3 - valid[::-1].index(True)
    assert log_ratios.grad.nonzero()[:, 1].tolist() == ([] if loss_type in NEED_A_WINNER else [first, last])


@on_losses
def test_a_tied_pair(loss_type):
    log_ratios = torch.tensor([[0.5, -0.5, 1.0]], requires_grad=True)
    signals = torch.tensor([[1.0, 1.0, -2.0]])
    losses = policy_loss(log_ratios, signals, loss_type, beta=1.0)
    if loss_type in NEED_A_WINNER:  # the mean over the two other pairs
        others = [policy_loss(log_ratios[:, [i, 2]], signals[:, [i, 2]], loss_type, beta=1.0) for i in range(2)]
        torch.testing.assert_close(losses, sum(others) / 2)
    elif loss_type == "rebel":
        assert losses.item() == pytest.approx((1.0**2 + 3.5**2 + 4.5**2) / 3)
    else:
        assert losses.item() == pytest.approx((0.5**2 + 1.5**2 + 3.0**2) / 3)


@on_losses
@on_pairings
def test_order_of_the_responses_does_not_matter(pairing, loss_type):
    groups = random_groups(5, masked=True)
    losses, gradient = loss_and_gradient(groups, loss_type, 0.4, pairing, groups.valid)
    order = random.Random(0).sample(range(5), 5)
    permuted = Groups(*(tensor[:, order].detach() for tensor in groups))
    permuted.log_ratios.requires_grad_()
    other_losses, other_gradient = loss_and_gradient(permuted, loss_type, 0.4, pairing, permuted.valid)
    torch.testing.assert_close(other_losses, losses)
    torch.testing.assert_close(other_gradient, gradient[:, order])


@pytest.mark.parametrize("loss_type", PAIRWISE)
@on_pairings
def test_a_constant_added_to_the_log_ratios_does_not_change_pairwise_losses(pairing, loss_type):
    log_ratios, signals, _ = random_groups(4)
    shifted = policy_loss(log_ratios + 3.0, signals, loss_type, 0.4, pairing)
    torch.testing.assert_close(shifted, policy_loss(log_ratios, signals, loss_type, 0.4, pairing))


# Losses: where they lead


@on_pairings
@pytest.mark.parametrize("loss_type", [*SQUARED, "rebel"])
def test_regressions_are_zero_at_the_signal_over_beta(loss_type, pairing):
    _, signals, valid = random_groups(5)
    optimum = Groups((signals / 0.4).requires_grad_(), signals, valid)
    losses, gradient = loss_and_gradient(optimum, loss_type, 0.4, pairing)
    torch.testing.assert_close(losses, torch.zeros_like(losses), rtol=0, atol=1e-24)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    elsewhere = policy_loss(optimum.log_ratios + torch.arange(5.0) ** 2, signals, loss_type, 0.4, pairing)
    assert (elsewhere > 1e-6).all()


def test_ipo_is_zero_at_its_margin():
    loss = policy_loss(torch.tensor([[1.0, -1.5]]), torch.tensor([[0.3, 0.1]]), "ipo", beta=0.2)
    assert loss.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss_type", SQUARED)
def test_first_step_goes_along_the_signal(loss_type):
    _, signals, valid = random_groups(5)
    start = Groups(torch.zeros_like(signals, requires_grad=True), signals, valid)
    _, gradient = loss_and_gradient(start, loss_type, 0.4)
    torch.testing.assert_close(-gradient, 2 / (5 * 0.4) * signals)


def test_gradient_on_samples_of_the_policy_is_that_of_regularised_ascent():
    """The policy-gradient view of Section 5, exact for samples of pi_theta rather than of pi_t."""
    beta, scores = 0.4, random_log_odds(3)
    group = torch.tensor([0, 0, 0, 1, 1, 2])  # samples of pi_theta, as often as it gives them
    logits = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64).log().requires_grad_()
    start = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    log_ratios, signals = logits.log_softmax(-1) - start.log(), scores @ start
    loss = policy_loss(log_ratios[group][None], signals[group][None], "gpo", beta).sum()
    objective = (logits.softmax(-1) * (signals - beta * log_ratios)).sum()
    expected = -2 / beta * torch.autograd.grad(objective, logits, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)
    assert expected.abs().max() > 0.1


def minimising_log_ratios(signals: torch.Tensor, beta: float) -> torch.Tensor:
    """One Newton step on the quadratic loss of GPO, from a log-ratio of zero, `(n,)`."""
    log_ratios = torch.zeros_like(signals).requires_grad_()
    policy_loss(log_ratios[None], signals[None], "gpo", beta).sum().backward()
    return -log_ratios.grad * len(signals) / 2


def self_play(scores: torch.Tensor, policy: torch.Tensor, steps: int) -> np.ndarray:
    """Policies of `steps` exact iterations with the step size of Theorem 5.1, `1 / beta = 1 / sqrt(steps)`."""
    policies = [policy]
    for _ in range(steps - 1):
        signals = scores @ policies[-1]  # Equation 5.2 for infinitely many samples
        policy = policies[-1] * minimising_log_ratios(signals, steps**0.5).exp()
        policies.append(policy / policy.sum())
    return torch.stack(policies).numpy()


def test_duality_gap_of_the_averaged_policy_falls_with_the_root_of_the_iterations():
    start = torch.tensor([0.8, 0.1, 0.1], dtype=torch.float64)
    gaps = {}
    for steps in (100, 400, 1600):
        policies = self_play(ROCK_PAPER_SCISSORS, start, steps)
        gaps[steps] = duality_gap(ROCK_PAPER_SCISSORS, policies.mean(axis=0))
        assert gaps[steps] <= 2 * (math.log(10) + 1) / steps**0.5  # twice the mean regret
        assert duality_gap(ROCK_PAPER_SCISSORS, policies[-1]) > 0.5  # the last iterate cycles
    assert gaps[1600] < gaps[400] < gaps[100]
    assert gaps[1600] < gaps[100] / 3


def test_self_play_of_a_transitive_game_ends_at_the_best_answer():
    rewards = torch.tensor([0.1, -0.6, 0.9, 0.4], dtype=torch.float64)
    policies = self_play(reward_log_odds(rewards), torch.tensor([0.1, 0.7, 0.01, 0.19], dtype=torch.float64), 1600)
    assert policies[-1][2] > 0.999


@on_losses
@on_pairings
def test_sampled_training_on_a_transitive_game_finds_the_best_answer(pairing, loss_type):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.tensor([0.5, -1.0, 2.0, 0.0])
    logits = torch.tensor([0.0, 1.0, -1.0, 0.0], requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=0.5)
    for _ in range(150):
        policy = logits.detach().softmax(-1)
        groups = torch.multinomial(policy.expand(32, 4), 5, replacement=True, generator=generator)
        log_ratios = (logits.log_softmax(-1) - policy.log())[groups]
        signals = group_signal(reward_log_odds(rewards[groups]), loss_type)
        optimizer.zero_grad()
        policy_loss(log_ratios, signals, loss_type, 0.5, pairing).mean().backward()
        optimizer.step()
    assert logits.softmax(-1)[2] > 0.9


# Errors


@pytest.mark.parametrize("loss_type", ["dpo", "GPO", ""])
def test_unknown_loss_type_raises(loss_type):
    with pytest.raises(ValueError, match=f"`loss_type` is '{loss_type}'; choose one of .*'gpo'"):
        policy_loss(torch.zeros(1, 2), torch.zeros(1, 2), loss_type, 0.1)
    with pytest.raises(ValueError, match=f"`loss_type` is '{loss_type}'; choose one of .*'gpo'"):
        group_signal(torch.zeros(2, 2), loss_type)


def test_unknown_pairing_raises():
    with pytest.raises(ValueError, match=r"`pairing` is 'best'; choose one of .*'best_worst'"):
        policy_loss(torch.zeros(1, 2), torch.zeros(1, 2), "gpo", 0.1, "best")


@pytest.mark.parametrize("beta", [0, -0.1, math.inf, math.nan])
def test_beta_that_is_not_positive_and_finite_raises(beta):
    with pytest.raises(ValueError, match=f"`beta` is {beta}, but must be positive and finite"):
        policy_loss(torch.zeros(1, 2), torch.zeros(1, 2), "gpo", beta)


@pytest.mark.parametrize("shape", [(4,), (3, 1), (3, 0), (2, 3, 4)])
def test_log_ratios_of_another_shape_raise(shape):
    with pytest.raises(ValueError, match=r"`log_ratios` has the shape \(.*must be \(G, K\).*K >= 2"):
        policy_loss(torch.zeros(shape), torch.zeros(shape), "gpo", 0.1)


@pytest.mark.parametrize("shape", [(3,), (2, 4), (1, 3), (2, 1), (2, 3, 3)])
def test_signals_of_another_shape_raise(shape):
    with pytest.raises(ValueError, match=r"`signals` has the shape .* `log_ratios` \(2, 3\)"):
        policy_loss(torch.zeros(2, 3), torch.zeros(shape), "gpo", 0.1)


@pytest.mark.parametrize("valid", [torch.ones(3, dtype=torch.bool), torch.ones(2, 3), torch.ones(2, 1).bool()])
def test_a_mask_of_another_shape_or_type_raises(valid):
    with pytest.raises(ValueError, match=r"`valid` has the shape .* must be \(2, 3\) and torch.bool"):
        policy_loss(torch.zeros(2, 3), torch.zeros(2, 3), "gpo", 0.1, valid=valid)


@on_losses
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_signal_that_is_not_finite_raises(value, loss_type):
    signals = torch.zeros(2, 3)
    signals[1, 2] = value
    with pytest.raises(ValueError, match=rf"`signals\[1, 2\]` is {value}, .* must be finite"):
        policy_loss(torch.zeros(2, 3), signals, loss_type, 0.1)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (4, 2, 3)])
def test_log_odds_of_another_shape_raise(shape):
    with pytest.raises(ValueError, match="one row and one column a response"):
        group_signal(torch.zeros(shape), "sppo")
