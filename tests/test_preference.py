"""Scores, losses of models, signals and losses of policies against the specification's formulas in float64."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpm_trl.preference import (
    LOSS_TYPES,
    PAIRINGS,
    block_advantages,
    block_scores,
    group_signal,
    mean_preference,
    policy_loss,
    preference_cross_entropy,
    preference_matrix,
    preference_probability,
    preference_regression,
    preference_score,
)

LOSSES = [preference_cross_entropy, preference_regression]
SQUARED = ["gpo", "sppo", "dsppo"]
NEED_A_WINNER = ["sigmoid", "ipo"]
on_losses = pytest.mark.parametrize("loss_type", LOSS_TYPES)
on_pairings = pytest.mark.parametrize("pairing", PAIRINGS)


class Group(NamedTuple):
    embeddings: torch.Tensor  # (K, 2k)
    scales: torch.Tensor | None  # (k,)


@st.composite
def groups(draw) -> Group:
    num_responses, num_blocks = draw(st.integers(2, 7)), draw(st.integers(1, 8))
    dtype = draw(st.sampled_from((torch.float32, torch.float64)))
    magnitude = 10.0 ** draw(st.integers(-3, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    embeddings = torch.randn(num_responses, 2 * num_blocks, generator=generator, dtype=dtype) * magnitude
    scales = torch.rand(num_blocks, generator=generator, dtype=dtype) if draw(st.booleans()) else None
    return Group(embeddings, scales)


def on_groups(function):
    return settings(deadline=None, derandomize=True, max_examples=60)(given(groups())(function))


def pairwise(group: Group) -> torch.Tensor:
    """`preference_score` of each pair, one call a pair, `(K, K)`."""
    rows = [[preference_score(v_i, v_j, group.scales) for v_j in group.embeddings] for v_i in group.embeddings]
    return torch.stack([torch.stack(row) for row in rows])


def random_tensors(*shapes, seed: int = 0, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def bilinear_form(num_blocks: int, scales: torch.Tensor | None) -> torch.Tensor:
    """`D R^T D`, so that `s(i, j) = v_i^T (D R^T D) v_j`, of Definition 4.2 and Section 4.2, `(2k, 2k)`."""
    operator = torch.block_diag(*[torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)] * num_blocks)
    gate = torch.ones(num_blocks) if scales is None else scales
    gate = gate.double().sqrt().repeat_interleave(2).diag()
    return gate @ operator.T @ gate


def random_skew_symmetric(size: int, seed: int) -> torch.Tensor:
    (matrix,) = random_tensors((size, size), seed=seed)
    return matrix - matrix.T


def log_sigmoid(values: torch.Tensor) -> torch.Tensor:
    return -torch.logaddexp(torch.zeros_like(values), -values)


def reference_loss(loss, scores, targets, temperature, margins):
    """Values, and derivatives with respect to z = (s - margin) / tau, of the formulas of Appendix A.2 in float64."""
    z = (scores.double() - margins.double()) / temperature
    if loss is preference_regression:
        return (z - targets) ** 2, 2 * (z - targets)
    cross_entropy = -(targets * log_sigmoid(z) + (1 - targets) * log_sigmoid(-z))
    return cross_entropy, 1 / (1 + torch.exp(-z)) - targets


class Comparisons(NamedTuple):
    v_i: torch.Tensor  # (C, 2k)
    v_j: torch.Tensor  # (C, 2k)
    scales: torch.Tensor  # (C, k)
    temperature: torch.Tensor  # ()
    margins: torch.Tensor  # (C,)
    targets: torch.Tensor  # (C,), in [0, 1]


def random_comparisons() -> Comparisons:
    v_i, v_j, scales, margins, targets = random_tensors((5, 6), (5, 6), (5, 3), (5,), (5,))
    targets = targets.sigmoid()
    targets[:3] = torch.tensor([1.0, 0.0, 0.5])
    temperature = torch.tensor(0.7, dtype=torch.float64)
    leaves = [v_i, v_j, scales.abs(), temperature, margins]
    return Comparisons(*(leaf.requires_grad_() for leaf in leaves), targets)


@on_groups
def test_score_is_antisymmetric_bitwise(group):
    scores = pairwise(group)
    assert torch.equal(scores, -scores.T)


@on_groups
def test_matrix_equals_pairwise_scores_bitwise(group):
    assert torch.equal(preference_matrix(*group), pairwise(group))


@pytest.mark.parametrize("num_blocks", [1, 4, 8, 32])
def test_matrix_equals_pairwise_scores_in_any_memory_layout(num_blocks):
    (embeddings,) = random_tensors((6, 2 * num_blocks), dtype=torch.float32)
    columns = embeddings.T.contiguous().T
    every_other = embeddings.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]
    for laid_out in (embeddings, columns, every_other):
        assert torch.equal(preference_matrix(laid_out), pairwise(Group(laid_out, None)))


@on_groups
def test_scores_equal_the_bilinear_form_of_the_specification(group):
    embeddings = group.embeddings.double()
    expected = embeddings @ bilinear_form(embeddings.shape[-1] // 2, group.scales) @ embeddings.T
    tolerance = 1e-13 if group.embeddings.dtype == torch.float64 else 1e-6
    tolerance *= embeddings.norm(dim=-1).max().item() ** 2
    torch.testing.assert_close(preference_matrix(*group).double(), expected, rtol=0, atol=tolerance)


@on_groups
def test_block_scores_are_antisymmetric_and_add_up_to_the_scores(group):
    blocks = block_scores(*group)
    assert torch.equal(blocks, -blocks.transpose(-2, -3))
    tolerance = 1e-13 if group.embeddings.dtype == torch.float64 else 1e-6
    tolerance *= group.embeddings.double().norm(dim=-1).max().item() ** 2
    torch.testing.assert_close(blocks.sum(-1), preference_matrix(*group), rtol=0, atol=tolerance)
    for block, pair in enumerate(group.embeddings.split(2, dim=-1)):  # each alone is a model of k = 1
        scale = None if group.scales is None else group.scales[..., block : block + 1]
        assert torch.equal(blocks[..., block], preference_matrix(pair, scale))


def test_bradley_terry_is_a_constant_second_coordinate():
    rewards, constant = torch.tensor([-1.0, 0.5, 3.0], dtype=torch.float64), 2.0
    embeddings = torch.stack([rewards, torch.full_like(rewards, constant)], dim=-1)
    expected = constant * (rewards[:, None] - rewards[None, :])
    torch.testing.assert_close(preference_matrix(embeddings), expected)


@pytest.mark.parametrize("size", [2, 4, 6, 12])
def test_any_skew_symmetric_matrix_of_even_size_in_its_size(size):
    """
    Theorem 4.5, from the real Schur form.

    `iP` is Hermitian with eigenvalues +-w; for its eigenvectors u = a + ib of w >= 0, P = sum 2w (b a^T - a b^T).
    """
    preferences = random_skew_symmetric(size, seed=size)
    eigenvalues, eigenvectors = torch.linalg.eigh(1j * preferences)
    vectors = eigenvectors[:, size // 2 :] * (2 * eigenvalues[size // 2 :].clamp(min=0)).sqrt()
    embeddings = torch.stack([vectors.imag, vectors.real], dim=-1).flatten(1)
    torch.testing.assert_close(preference_matrix(embeddings), preferences, rtol=0, atol=1e-10)


def test_batched_matrix_equals_a_matrix_for_each_prompt():
    embeddings, scales = random_tensors((2, 3, 5, 6), (2, 3, 3))
    matrices = preference_matrix(embeddings, scales)
    assert matrices.shape == (2, 3, 5, 5)
    for prompt in itertools.product(range(2), range(3)):
        assert torch.equal(matrices[prompt], preference_matrix(embeddings[prompt], scales[prompt]))


def test_probability_is_the_sigmoid_of_the_score_in_units_of_tau():
    scores = torch.tensor([-0.3, 0.0, 0.2], dtype=torch.float64)
    expected = 1 / (1 + torch.exp(-scores / 0.25))
    torch.testing.assert_close(preference_probability(scores, 0.25), expected)
    torch.testing.assert_close(preference_probability(scores, torch.tensor(0.25, dtype=torch.float64)), expected)


def test_mean_preference_divides_by_all_responses():
    matrix = random_skew_symmetric(5, seed=0)
    expected = [sum(matrix[i, k].item() for k in range(5)) / 5 for i in range(5)]
    assert mean_preference(matrix).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_equal_their_formulas(loss):
    comparisons = random_comparisons()
    v_i, v_j, scales, temperature, margins, targets = comparisons
    losses = loss(preference_score(v_i, v_j, scales), targets, temperature, margins)
    losses.sum().backward()

    with torch.no_grad():
        forms = torch.stack([bilinear_form(scales.shape[-1], gate) for gate in scales])  # (C, 2k, 2k)
        reference_scores = torch.einsum("ca,cab,cb->c", v_i, forms, v_j)
        reference_losses, derivative = reference_loss(loss, reference_scores, targets, temperature, margins)
        by_score = derivative / temperature
        blocks = v_i[:, 0::2] * v_j[:, 1::2] - v_i[:, 1::2] * v_j[:, 0::2]  # (C, k)
        expected = {
            "v_i": by_score[:, None] * torch.einsum("cab,cb->ca", forms, v_j),
            "v_j": by_score[:, None] * torch.einsum("cab,ca->cb", forms, v_i),
            "scales": by_score[:, None] * blocks,
            "temperature": -(derivative * (reference_scores - margins)).sum() / temperature**2,
            "margins": -by_score,
        }
    torch.testing.assert_close(losses.detach(), reference_losses)
    for name, gradient in expected.items():
        torch.testing.assert_close(getattr(comparisons, name).grad, gradient)


def test_gradients_of_the_matrix_pass_gradcheck():
    embeddings, scales = random_tensors((2, 4, 6), (2, 3))
    assert torch.autograd.gradcheck(preference_matrix, [embeddings.requires_grad_(), scales.requires_grad_()])


@pytest.mark.parametrize("label", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("score", [-1e6, 1e6])
def test_large_scores_give_finite_losses_and_gradients(score, label):
    scores = torch.tensor([score], requires_grad=True)
    loss = preference_cross_entropy(scores, torch.tensor([label]), temperature=0.1)
    loss.sum().backward()
    z = 10 * score
    assert loss.item() == pytest.approx(label * max(-z, 0) + (1 - label) * max(z, 0))
    assert torch.isfinite(scores.grad).all()


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


def random_groups(num_responses: int, masked: bool = False, ties: bool = False) -> Groups:
    generator = torch.Generator().manual_seed(num_responses)
    shape = (12, num_responses)
    log_ratios, signals = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
    if ties:
        signals = (signals * 0.7).round()
        signals[0] = 0.0
    valid = torch.ones(shape, dtype=torch.bool)
    if masked:
        valid = torch.rand(shape, generator=generator) < 0.6
        valid[:4] = torch.tensor([False, False, True, True])[:, None]
        valid[1, -1], valid[2, 0] = True, False  # a prompt without any response, with one, without one, with all
    return Groups(log_ratios.requires_grad_(), signals.requires_grad_(), valid)


def reference(groups: Groups, loss_type: str, beta: float, pairing: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses `(G,)` and the gradient of their sum `(G, K)`, in float64."""
    rows = zip(*(tensor.tolist() for tensor in groups), strict=True)
    prompts = [reference_prompt(row[0], row[1], loss_type, beta, pairing, row[2]) for row in rows]
    losses, gradients = zip(*prompts, strict=True)
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(gradients, dtype=torch.float64)


def loss_and_gradient(groups: Groups, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    losses = policy_loss(groups.log_ratios, groups.signals, *args, **kwargs)
    leaves = (groups.log_ratios, groups.signals)
    gradient, none = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    assert none is None  # signals are constants
    return losses.detach(), gradient


@on_losses
@pytest.mark.parametrize("num_responses", [1, 2, 3, 5])
def test_signal_equals_its_formula(num_responses, loss_type):
    log_odds = 3 * random_skew_symmetric(num_responses, seed=0)
    terms = 1 / (1 + torch.exp(-log_odds)) - 0.5 if "sppo" in loss_type else log_odds
    expected = [sum(row) / num_responses for row in terms.tolist()]
    assert group_signal(log_odds, loss_type).tolist() == pytest.approx(expected, abs=1e-12)


def advantages_reference(embeddings, scales, weights, tau):
    """The formulas of GPRL, one number after the other."""
    groups, size, width = embeddings.shape
    parts = torch.zeros(groups, size, width // 2, dtype=torch.float64)
    for group, block in itertools.product(range(groups), range(width // 2)):
        a, b = embeddings[group, :, 2 * block], embeddings[group, :, 2 * block + 1]
        u = [sum((a[i] * b[j] - b[i] * a[j]).item() / tau for j in range(size)) / size for i in range(size)]
        mean = sum(u) / size
        std = math.sqrt(sum((value - mean) ** 2 for value in u) / (size - 1))
        for i, value in enumerate(u):
            parts[group, i, block] = weights[block] * scales[group, block] * (value - mean) / (std + 1e-4)
    return parts


@pytest.mark.parametrize("size", [2, 3, 8])
def test_advantages_by_block_equal_their_formula(size):
    draw = torch.Generator().manual_seed(size)
    embeddings = torch.randn(4, size, 6, dtype=torch.float64, generator=draw)
    scales, weights = torch.rand(4, 3, dtype=torch.float64, generator=draw), torch.tensor([1.0, 0.5, 0.1]).double()
    blocks = block_scores(embeddings) / 0.1
    found = block_advantages(blocks, scales, weights)
    torch.testing.assert_close(found, advantages_reference(embeddings, scales, weights, 0.1), rtol=1e-10, atol=1e-10)
    assert torch.equal(block_advantages(blocks, scales), block_advantages(blocks, scales, torch.ones(3).double()))
    torch.testing.assert_close(found.sum(1), torch.zeros(4, 3).double(), rtol=0, atol=1e-9)
    # The size of a block's scores does not count, and the order of the completions is kept.
    larger = block_advantages(blocks * torch.tensor([1.0, 100.0, 1e4]).double(), scales, weights)
    torch.testing.assert_close(larger, found, rtol=1e-3, atol=1e-6)
    order = torch.randperm(size, generator=draw)
    moved = block_advantages(blocks[:, order][:, :, order], scales, weights)
    torch.testing.assert_close(moved, found[:, order], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [1, 4])
def test_a_block_in_which_all_are_equal_has_no_advantage(size):
    embeddings = torch.cat([torch.randn(1, 2).expand(size, 2), torch.randn(size, 2)], -1)
    advantages = block_advantages(block_scores(embeddings), torch.ones(2))
    assert not advantages[:, 0].any()
    assert advantages.isfinite().all()
    assert advantages[:, 1].any() == (size > 1)


@on_losses
def test_copies_of_a_response_tie_bitwise(loss_type):
    copies = torch.tensor([0, 1, 0, 2, 0, 3, 1])
    signals = group_signal((3 * random_skew_symmetric(4, seed=0)).float()[copies][:, copies], loss_type)
    assert all(torch.equal(signals[i], signals[j]) for i, j in [(0, 2), (0, 4), (1, 6)])
    assert len(signals.unique()) == 4


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
@pytest.mark.parametrize("valid", [[True] * 4, [False, True, True, False]])
def test_of_tied_responses_the_first_and_the_last_are_best_and_worst(valid, loss_type):
    log_ratios = torch.tensor([[0.3, -0.2, 0.7, 0.4]], requires_grad=True)
    policy_loss(log_ratios, torch.zeros(1, 4), loss_type, 0.4, "best_worst", torch.tensor([valid])).sum().backward()
    first, last = valid.index(True), 3 - valid[::-1].index(True)
    assert log_ratios.grad.nonzero()[:, 1].tolist() == ([] if loss_type in NEED_A_WINNER else [first, last])


@pytest.mark.parametrize("score", [preference_matrix, lambda rows, scales=None: preference_score(rows, rows, scales)])
def test_odd_or_empty_width_and_wrong_number_of_scales_raise(score):
    for width in (0, 1, 7):
        with pytest.raises(ValueError, match=rf"{width} coordinates.*an even number"):
            score(torch.ones(4, width))
    for num_scales in (1, 2, 6):
        with pytest.raises(ValueError, match=rf"has {num_scales} values, .* each of 3 blocks"):
            score(torch.ones(4, 6), torch.ones(num_scales))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "dpo"}, "`loss_type` is 'dpo'; choose one of .*'gpo'"),
        ({"pairing": "best"}, r"`pairing` is 'best'; choose one of .*'best_worst'"),
        ({"beta": 0.0}, "`beta` is 0.0, but must be positive and finite"),
        ({"beta": math.nan}, "`beta` is nan, but must be positive and finite"),
        ({"log_ratios": torch.zeros(3)}, r"`log_ratios` has the shape \(3,\).*must be \(G, K\).*K >= 2"),
        ({"log_ratios": torch.zeros(2, 1)}, r"`log_ratios` has the shape \(2, 1\).*K >= 2"),
        ({"signals": torch.zeros(2, 4)}, r"`signals` has the shape \(2, 4\), but must be \(2, 3\)"),
        ({"valid": torch.ones(3, dtype=torch.bool)}, r"`valid` has the shape \(3,\), but must be \(2, 3\)"),
        ({"signals": torch.tensor([[0, 0, 0], [0, 0, math.inf]])}, r"`signals\[1, 2\]` is inf, but must be finite"),
    ],
)
def test_what_is_no_group_or_loss_raises(settings, message):
    given = {"log_ratios": torch.zeros(2, 3), "signals": torch.zeros(2, 3), "loss_type": "gpo", "beta": 0.1}
    with pytest.raises(ValueError, match=message):
        policy_loss(**{**given, **settings})


def test_a_signal_of_an_unknown_loss_or_means_of_another_shape_raise():
    with pytest.raises(ValueError, match="`loss_type` is 'dpo'; choose one of"):
        group_signal(torch.zeros(2, 2), "dpo")
    for call in (mean_preference, lambda matrix: group_signal(matrix, "sppo")):
        for shape in ((3,), (2, 3), (4, 2, 3)):
            with pytest.raises(ValueError, match=r"must be \(\.\.\., K, K\)"):
                call(torch.zeros(shape))
