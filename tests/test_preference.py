"""Scores, probabilities, means and losses against the specification's formulas, in float64 references of their own."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpm_trl.preference import (
    mean_preference,
    preference_cross_entropy,
    preference_matrix,
    preference_probability,
    preference_regression,
    preference_score,
)

LOSSES = [preference_cross_entropy, preference_regression]
LAYOUTS = {
    "rows": lambda tensor: tensor,
    "columns": lambda tensor: tensor.T.contiguous().T,
    "slice": lambda tensor: tensor.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
}


class Group(NamedTuple):
    embeddings: torch.Tensor  # (K, 2k)
    scales: torch.Tensor | None  # (k,)


@st.composite
def groups(draw, min_responses: int = 2, dtypes=(torch.float32, torch.float64)) -> Group:
    num_responses, num_blocks = draw(st.integers(min_responses, 7)), draw(st.integers(1, 8))
    dtype = draw(st.sampled_from(dtypes))
    magnitude = 10.0 ** draw(st.integers(-3, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    embeddings = torch.randn(num_responses, 2 * num_blocks, generator=generator, dtype=dtype) * magnitude
    scales = torch.rand(num_blocks, generator=generator, dtype=dtype) if draw(st.booleans()) else None
    return Group(embeddings, scales)


def on_groups(max_examples: int = 60, **kwargs):
    def decorate(function):
        return settings(deadline=None, derandomize=True, max_examples=max_examples)(given(groups(**kwargs))(function))

    return decorate


def pairwise(group: Group) -> torch.Tensor:
    """`preference_score` of each pair, one call a pair, `(K, K)`."""
    rows = [[preference_score(v_i, v_j, group.scales) for v_j in group.embeddings] for v_i in group.embeddings]
    return torch.stack([torch.stack(row) for row in rows])


def random_tensors(*shapes, seed: int = 0, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def operator(num_blocks: int) -> torch.Tensor:
    """R of Definition 4.2, `(2k, 2k)`."""
    return torch.block_diag(*[torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)] * num_blocks)


def gate_matrix(scales: torch.Tensor) -> torch.Tensor:
    """D of Section 4.2, `(2k, 2k)`."""
    return torch.block_diag(*[math.sqrt(scale) * torch.eye(2, dtype=torch.float64) for scale in scales.double()])


def bilinear_form(num_blocks: int, scales: torch.Tensor | None) -> torch.Tensor:
    """`D R^T D`, so that `s(i, j) = v_i^T (D R^T D) v_j`."""
    gate = gate_matrix(torch.ones(num_blocks) if scales is None else scales)
    return gate @ operator(num_blocks).T @ gate


def random_skew_symmetric(size: int, seed: int) -> torch.Tensor:
    (matrix,) = random_tensors((size, size), seed=seed)
    return matrix - matrix.T


def embed_in_twice_the_size(preferences: torch.Tensor) -> torch.Tensor:
    """Theorem 4.4: v in R^{2n}; block l pairs the indicator of response l with half of row l."""
    size = len(preferences)
    embeddings = torch.zeros(size, 2 * size, dtype=preferences.dtype)
    embeddings[:, 0::2] = torch.eye(size, dtype=preferences.dtype)
    embeddings[:, 1::2] = preferences.T / 2
    return embeddings


def embed_in_the_size(preferences: torch.Tensor) -> torch.Tensor:
    """
    Theorem 4.5: v in R^n for even n, from the real Schur form.

    `iP` is Hermitian with eigenvalues +-w; for its eigenvectors u = a + ib of w >= 0, P = sum 2w (b a^T - a b^T).
    """
    size = len(preferences)
    eigenvalues, eigenvectors = torch.linalg.eigh(1j * preferences)
    largest = eigenvalues[size // 2 :].clamp(min=0)
    vectors = eigenvectors[:, size // 2 :] * (2 * largest).sqrt()
    return torch.stack([vectors.imag, vectors.real], dim=-1).flatten(1)


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


def random_comparisons(num_comparisons: int = 5, num_blocks: int = 3, dtype=torch.float64) -> Comparisons:
    v_i, v_j, scales, margins, targets = random_tensors(
        (num_comparisons, 2 * num_blocks),
        (num_comparisons, 2 * num_blocks),
        (num_comparisons, num_blocks),
        (num_comparisons,),
        (num_comparisons,),
        dtype=dtype,
    )
    targets = targets.sigmoid()
    targets[:3] = torch.tensor([1.0, 0.0, 0.5])
    temperature = torch.tensor(0.7, dtype=dtype)
    leaves = [v_i, v_j, scales.abs(), temperature, margins]
    return Comparisons(*(leaf.requires_grad_() for leaf in leaves), targets)


# Scores: exact properties


@on_groups()
def test_score_is_antisymmetric_bitwise(group):
    scores = pairwise(group)
    assert torch.equal(scores, -scores.T)


@on_groups()
def test_score_against_itself_is_zero(group):
    scores = preference_score(group.embeddings, group.embeddings, group.scales)
    assert torch.equal(scores, torch.zeros_like(scores))


@on_groups()
def test_matrix_is_antisymmetric_bitwise(group):
    matrix = preference_matrix(*group)
    assert torch.equal(matrix, -matrix.T)


@on_groups()
def test_matrix_equals_pairwise_scores_bitwise(group):
    assert torch.equal(preference_matrix(*group), pairwise(group))


@on_groups(min_responses=3)
def test_another_response_changes_no_other_score(group):
    fewer = preference_matrix(group.embeddings[:-1], group.scales)
    assert torch.equal(preference_matrix(*group)[:-1, :-1], fewer)


@on_groups()
def test_order_of_the_group_changes_no_score(group):
    order = torch.arange(len(group.embeddings)).flip(0)
    assert torch.equal(preference_matrix(group.embeddings[order], group.scales), preference_matrix(*group).flip(0, 1))


@pytest.mark.parametrize("num_blocks", [1, 4, 8, 32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matrix_equals_pairwise_scores_in_any_memory_layout(layout, num_blocks):
    (embeddings,) = random_tensors((6, 2 * num_blocks), dtype=torch.float32)
    laid_out = LAYOUTS[layout](embeddings)
    assert torch.equal(preference_matrix(laid_out), pairwise(Group(laid_out, None)))


@pytest.mark.parametrize("num_blocks", [1, 4, 8, 32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_response_changes_no_other_score_in_any_memory_layout(layout, num_blocks):
    (embeddings,) = random_tensors((6, 2 * num_blocks), dtype=torch.float32)
    laid_out = LAYOUTS[layout](embeddings)
    assert torch.equal(preference_matrix(laid_out)[:-1, :-1], preference_matrix(laid_out[:-1]))


# Scores: values


@on_groups(dtypes=(torch.float64,))
def test_scores_equal_the_bilinear_form_of_the_specification(group):
    form = bilinear_form(group.embeddings.shape[-1] // 2, group.scales)
    expected = group.embeddings @ form @ group.embeddings.T
    tolerance = 1e-13 * group.embeddings.norm(dim=-1).max().item() ** 2
    torch.testing.assert_close(preference_matrix(*group), expected, rtol=0, atol=tolerance)


@on_groups(dtypes=(torch.float32,))
def test_float32_scores_are_close_to_float64(group):
    form = bilinear_form(group.embeddings.shape[-1] // 2, group.scales)
    expected = group.embeddings.double() @ form @ group.embeddings.double().T
    tolerance = 1e-6 * group.embeddings.norm(dim=-1).max().item() ** 2
    torch.testing.assert_close(preference_matrix(*group).double(), expected, rtol=0, atol=tolerance)


def test_score_is_the_inner_product_of_definition_4_3():
    v_i, v_j = random_tensors((6,), (6,))
    torch.testing.assert_close(preference_score(v_i, v_j), (operator(3) @ v_i) @ v_j)


@on_groups(dtypes=(torch.float64,))
def test_scores_equal_the_complex_view(group):
    z = torch.view_as_complex(group.embeddings.unflatten(-1, (-1, 2)))
    blocks = (z.conj()[:, None, :] * z[None, :, :]).imag  # (K, K, k)
    expected = (blocks if group.scales is None else blocks * group.scales).sum(-1)
    tolerance = 1e-12 * expected.abs().max().item()
    torch.testing.assert_close(preference_matrix(*group), expected, rtol=1e-9, atol=tolerance)


def test_one_block_of_unit_length_scores_the_sine_of_the_angle():
    angles = torch.linspace(0, 6, 7, dtype=torch.float64)
    matrix = preference_matrix(torch.stack([angles.cos(), angles.sin()], dim=-1))
    torch.testing.assert_close(matrix, (angles[None, :] - angles[:, None]).sin())


def test_a_block_with_zero_scale_does_not_count():
    (embeddings,) = random_tensors((4, 6))
    matrix = preference_matrix(embeddings, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(matrix, preference_matrix(embeddings[:, [0, 1, 4, 5]]))


def test_unit_scales_are_no_gate():
    (embeddings,) = random_tensors((4, 6))
    gated = preference_matrix(embeddings, torch.ones(3, dtype=torch.float64))
    assert torch.equal(gated, preference_matrix(embeddings))


# What can be expressed


def test_bradley_terry_is_a_constant_second_coordinate():
    rewards, constant = torch.tensor([-1.0, 0.5, 3.0], dtype=torch.float64), 2.0
    embeddings = torch.stack([rewards, torch.full_like(rewards, constant)], dim=-1)
    expected = constant * (rewards[:, None] - rewards[None, :])
    torch.testing.assert_close(preference_matrix(embeddings), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_any_skew_symmetric_matrix_in_twice_its_size(size):
    preferences = random_skew_symmetric(size, seed=size)
    embeddings = embed_in_twice_the_size(preferences)
    assert embeddings.shape == (size, 2 * size)
    torch.testing.assert_close(preference_matrix(embeddings), preferences, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [2, 4, 6, 12])
def test_any_skew_symmetric_matrix_of_even_size_in_its_size(size):
    preferences = random_skew_symmetric(size, seed=size)
    embeddings = embed_in_the_size(preferences)
    assert embeddings.shape == (size, size)
    torch.testing.assert_close(preference_matrix(embeddings), preferences, rtol=0, atol=1e-10)


def test_a_cycle_of_four_in_its_size():
    successor = torch.eye(4, dtype=torch.float64).roll(1, dims=1)  # singular, with a repeated eigenvalue
    preferences = successor - successor.T
    torch.testing.assert_close(preference_matrix(embed_in_the_size(preferences)), preferences, rtol=0, atol=1e-10)


def test_rock_paper_scissors_beat_each_other_equally():
    angles = torch.arange(3, dtype=torch.float64) * 2 * math.pi / 3
    matrix = preference_matrix(torch.stack([angles.cos(), angles.sin()], dim=-1))
    expected = math.sqrt(3) / 2 * torch.tensor([[0, 1, -1], [-1, 0, 1], [1, -1, 0]], dtype=torch.float64)
    torch.testing.assert_close(matrix, expected)


# Batches


def test_batched_matrix_equals_a_matrix_for_each_prompt():
    embeddings, scales = random_tensors((2, 3, 5, 6), (2, 3, 3))
    matrices = preference_matrix(embeddings, scales)
    assert matrices.shape == (2, 3, 5, 5)
    for prompt in itertools.product(range(2), range(3)):
        assert torch.equal(matrices[prompt], preference_matrix(embeddings[prompt], scales[prompt]))


def test_matrix_broadcasts_one_gate_over_prompts():
    embeddings, scales = random_tensors((4, 5, 6), (3,))
    assert torch.equal(preference_matrix(embeddings, scales), preference_matrix(embeddings, scales.expand(4, 3)))


def test_matrix_broadcasts_gates_over_one_group():
    embeddings, scales = random_tensors((5, 6), (4, 3))
    expected = torch.stack([preference_matrix(embeddings, gate) for gate in scales])
    assert torch.equal(preference_matrix(embeddings, scales), expected)


def test_score_broadcasts_one_response_over_others():
    v_i, v_j, scales = random_tensors((6,), (4, 2, 6), (2, 3))
    scores = preference_score(v_i, v_j, scales)
    assert scores.shape == (4, 2)
    for row, column in itertools.product(range(4), range(2)):
        assert torch.equal(scores[row, column], preference_score(v_i, v_j[row, column], scales[column]))


# Probabilities and means


@on_groups()
def test_probabilities_of_both_directions_add_up_to_one(group):
    probabilities = preference_probability(preference_matrix(*group), temperature=0.1)
    total = probabilities + probabilities.T
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


def test_probability_is_the_sigmoid_of_the_score_in_units_of_tau():
    scores = torch.tensor([-0.3, 0.0, 0.2], dtype=torch.float64)
    expected = 1 / (1 + torch.exp(-scores / 0.25))
    torch.testing.assert_close(preference_probability(scores, 0.25), expected)
    torch.testing.assert_close(preference_probability(scores, torch.tensor(0.25, dtype=torch.float64)), expected)


@on_groups()
def test_mean_preferences_add_up_to_zero(group):
    matrix = preference_matrix(*group)
    total = mean_preference(matrix).sum().item()
    assert abs(total) <= 1e-6 * matrix.abs().sum().item()


def test_mean_preference_divides_by_all_responses():
    matrix = random_skew_symmetric(5, seed=0)
    expected = [sum(matrix[i, k].item() for k in range(5)) / 5 for i in range(5)]
    assert mean_preference(matrix).tolist() == pytest.approx(expected)


def test_mean_probability_counts_itself_as_a_tie():
    log_odds = random_skew_symmetric(4, seed=1)
    probabilities = 1 / (1 + torch.exp(-log_odds))
    others = [sum(probabilities[i, k].item() for k in range(4) if k != i) for i in range(4)]
    expected = [(0.5 + total) / 4 for total in others]
    means = mean_preference(preference_probability(log_odds, temperature=1.0))
    assert means.tolist() == pytest.approx(expected)
    assert means.mean().item() == pytest.approx(0.5)


def test_mean_preference_of_a_batch_is_one_for_each_prompt():
    matrices = torch.stack([random_skew_symmetric(4, seed) for seed in range(3)])
    expected = torch.stack([mean_preference(matrix) for matrix in matrices])
    torch.testing.assert_close(mean_preference(matrices), expected)


# Losses


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_equals_its_formula(loss):
    comparisons = random_comparisons()
    scores = torch.linspace(-2, 2, 5, dtype=torch.float64)
    actual = loss(scores, comparisons.targets, comparisons.temperature, comparisons.margins)
    expected, _ = reference_loss(loss, scores, comparisons.targets, comparisons.temperature, comparisons.margins)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_float32_loss_is_close_to_its_float64_formula(loss):
    comparisons = random_comparisons(dtype=torch.float32)
    scores = torch.linspace(-2, 2, 5)
    actual = loss(scores, comparisons.targets, 0.7, comparisons.margins)
    expected, _ = reference_loss(loss, scores, comparisons.targets.double(), 0.7, comparisons.margins)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_margin_is_a_margin_of_zero(loss):
    scores, targets = torch.linspace(-1, 1, 5), torch.linspace(0, 1, 5)
    assert torch.equal(loss(scores, targets, 0.1), loss(scores, targets, 0.1, torch.zeros(5)))


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_equal_their_formulas(loss):
    comparisons = random_comparisons()
    v_i, v_j, scales, temperature, margins, targets = comparisons
    scores = preference_score(v_i, v_j, scales)
    loss(scores, targets, temperature, margins).sum().backward()

    with torch.no_grad():
        forms = torch.stack([bilinear_form(scales.shape[-1], gate) for gate in scales])  # (C, 2k, 2k)
        reference_scores = torch.einsum("ca,cab,cb->c", v_i, forms, v_j)
        _, derivative = reference_loss(loss, reference_scores, targets, temperature, margins)
        by_score = derivative / temperature
        blocks = v_i[:, 0::2] * v_j[:, 1::2] - v_i[:, 1::2] * v_j[:, 0::2]  # (C, k)
        expected = {
            "v_i": by_score[:, None] * torch.einsum("cab,cb->ca", forms, v_j),
            "v_j": by_score[:, None] * torch.einsum("cab,ca->cb", forms, v_i),
            "scales": by_score[:, None] * blocks,
            "temperature": -(derivative * (reference_scores - margins)).sum() / temperature**2,
            "margins": -by_score,
        }
    for name, gradient in expected.items():
        torch.testing.assert_close(getattr(comparisons, name).grad, gradient)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_pass_gradcheck(loss):
    *leaves, targets = random_comparisons()

    def losses(v_i, v_j, scales, temperature, margins):
        return loss(preference_score(v_i, v_j, scales), targets, temperature, margins)

    assert torch.autograd.gradcheck(losses, leaves)


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


def test_large_scores_give_finite_squared_errors():
    loss = preference_regression(torch.tensor([-1e6, 1e6]), torch.zeros(2), temperature=0.1)
    torch.testing.assert_close(loss, torch.full((2,), 1e14))


def test_a_tie_is_best_predicted_by_a_score_of_zero():
    scores = torch.linspace(-1, 1, 21)
    losses = preference_cross_entropy(scores, torch.full_like(scores, 0.5), temperature=0.1)
    assert losses.argmin().item() == 10
    assert losses[10].item() == pytest.approx(math.log(2))


def test_soft_label_is_best_predicted_by_its_log_odds():
    label, tau = 0.8, 0.1
    scores = torch.tensor([tau * math.log(label / (1 - label))], requires_grad=True)
    preference_cross_entropy(scores, torch.tensor([label]), tau).sum().backward()
    assert scores.grad.item() == pytest.approx(0, abs=1e-5)


def test_label_of_the_other_direction_gives_the_same_loss():
    scores, labels = torch.linspace(-1, 1, 5), torch.linspace(0, 1, 5)
    forward = preference_cross_entropy(scores, labels, 0.1)
    torch.testing.assert_close(forward, preference_cross_entropy(-scores, 1 - labels, 0.1))


def test_integer_labels_are_taken():
    loss = preference_cross_entropy(torch.tensor([0.2, 0.2]), torch.tensor([1, 0]), temperature=0.1)
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-2)), math.log1p(math.exp(2))])


# Errors


@pytest.mark.parametrize("width", [0, 1, 3, 7])
def test_odd_or_empty_width_raises(width):
    embeddings = torch.ones(4, width)
    with pytest.raises(ValueError, match=rf"{width} coordinates.*must be even and at least 2"):
        preference_score(embeddings, embeddings)
    with pytest.raises(ValueError, match=rf"{width} coordinates.*must be even and at least 2"):
        preference_matrix(embeddings)


@pytest.mark.parametrize("num_scales", [1, 2, 6])
def test_wrong_number_of_scales_raises(num_scales):
    embeddings, scales = torch.ones(4, 6), torch.ones(num_scales)
    with pytest.raises(ValueError, match=rf"has {num_scales} values .* embeddings have 3 blocks"):
        preference_score(embeddings, embeddings, scales)
    with pytest.raises(ValueError, match=rf"has {num_scales} values .* embeddings have 3 blocks"):
        preference_matrix(embeddings, scales)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (4, 2, 3)])
def test_mean_preference_of_another_shape_raises(shape):
    with pytest.raises(ValueError, match="one row and one column a response"):
        mean_preference(torch.zeros(shape))
