"""Winners against linear programmes, decompositions against sums around triangles, self-play against its bound."""

from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import duality_gap
from scipy.optimize import linprog
from scipy.special import expit

from gpm_trl import games as games_module
from gpm_trl.games import copeland_scores, cyclicity, hodge_decomposition, reversals, von_neumann_winner

ROCK_PAPER_SCISSORS = np.array([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]])
ACCEPT_PROBABILITIES = [von_neumann_winner, copeland_scores]
SCORES_ONLY = [hodge_decomposition, cyclicity]


def skew(matrix: np.ndarray) -> np.ndarray:
    return matrix - matrix.T


@st.composite
def games(draw, max_size: int = 12, max_exponent: int = 6) -> np.ndarray:
    """Dense, with ties, of low rank, of ratings, or with duplicates; at all scales."""
    size = draw(st.integers(1, max_size))
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["dense", "ties", "rank 2", "ratings", "duplicates"]))
    normal = generator.normal(size=(size, size))
    copies = generator.integers(0, max(1, size // 2), size=size)
    game = {
        "dense": skew(normal),
        "ties": skew(generator.integers(-1, 2, size=(size, size))).astype(np.float64),
        "rank 2": skew(np.outer(normal[0], normal[-1])),
        "ratings": normal[0][:, None] - normal[0][None, :],
        "duplicates": skew(normal)[np.ix_(copies, copies)],
    }[kind]
    return game * 10.0 ** draw(st.integers(-max_exponent, max_exponent))


def on_games(max_examples: int = 60, **kwargs):
    chosen = settings(deadline=None, derandomize=True, max_examples=max_examples)
    return lambda function: chosen(given(games(**kwargs))(function))


def largest(matrix: np.ndarray) -> float:
    return float(np.abs(matrix).max()) or 1.0


def linear_programme(game: np.ndarray, objective: np.ndarray, value: float | None = None):
    """Minimise `objective @ (p, v)` over mixes p with `p^T game >= v`, for the given v or over all v."""
    size = len(game)
    gains = np.concatenate([-game.T, np.ones((size, 1))], axis=1)
    total = np.append(np.ones(size), 0.0)[None]
    return linprog(objective, gains, np.zeros(size), total, [1.0], bounds=[(0, None)] * size + [(value, value)])


@on_games()
def test_nothing_beats_the_winner_and_the_value_is_that_of_a_linear_programme(game):
    winner = von_neumann_winner(game)
    value = -linear_programme(game / largest(game), np.append(np.zeros(len(game)), -1.0)).fun
    assert winner.sum() == pytest.approx(1, abs=1e-14)
    assert (winner @ game).min() >= -2e-12 * largest(game)
    assert (winner @ game).min() / largest(game) == pytest.approx(value, abs=1e-7)
    assert duality_gap(game, winner) <= 4e-12 * largest(game)  # which also checks that it is a distribution


@on_games(max_exponent=0)
def test_winner_has_the_least_norm_of_all(game):
    """p is the point of least norm in a convex set if and only if `p . q >= p . p` for all of its points q."""
    winner = von_neumann_winner(game)
    least = linear_programme(game / largest(game), np.append(winner, 0.0), value=0.0)
    assert winner @ winner <= least.fun + 1e-6


@on_games(max_size=7)
def test_duplicates_share_equally(game):
    copies = np.arange(len(game)).repeat(1 + np.arange(len(game)) % 3)
    winner = von_neumann_winner(game[np.ix_(copies, copies)])
    for response in range(len(game)):
        assert np.ptp(winner[copies == response]) < 1e-11
    assert duality_gap(game, np.bincount(copies, winner)) <= 4e-12 * largest(game)


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_winner_of_a_game_of_ties_is_uniform(size):
    for tie in (0.0, 0.5):
        assert von_neumann_winner(np.full((size, size), tie)) == pytest.approx(np.full(size, 1 / size), abs=1e-15)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_winner_of_rock_paper_scissors_is_uniform_and_of_a_weighted_one_weighted(scale):
    assert von_neumann_winner(ROCK_PAPER_SCISSORS * scale) == pytest.approx(np.full(3, 1 / 3), abs=1e-14)
    weighted = skew(np.array([[0.0, 1, 0], [0, 0, 2], [5, 0, 0]]))
    # Each gets the weight of the comparison that it takes no part in.
    assert von_neumann_winner(weighted * scale) == pytest.approx(np.array([2, 5, 1]) / 8, abs=1e-11)


@pytest.mark.parametrize("kind", ["dense", "saturated", "ties", "rank 2", "wide", "circle"])
@pytest.mark.parametrize("size", [16, 63])
def test_winners_of_large_and_badly_conditioned_games(size, kind):
    generator = np.random.default_rng(size)
    normal = generator.normal(size=(size, size))
    game = {
        "dense": skew(normal),
        "saturated": np.sign(skew(normal)) / 2 + 0.5,
        "ties": skew(generator.choice([-1.0, 0, 0, 0], size=(size, size))),
        "rank 2": skew(np.outer(normal[0], normal[1]).astype(np.float32)),  # its rounding has full rank
        "wide": skew(np.triu(normal * 10 ** generator.uniform(-6, 6, size=normal.shape), 1)),
        "circle": np.sin(np.subtract.outer(np.arange(size), np.arange(size)) * 2 * np.pi / 5),
    }[kind]
    winner = von_neumann_winner(game)
    scores = game - 0.5 if kind == "saturated" else game
    assert (winner @ scores).min() >= -2e-12 * largest(scores)
    assert duality_gap(game, winner) <= 4e-12 * largest(scores)


def test_a_solution_that_is_beaten_is_an_error(monkeypatch):
    monkeypatch.setattr("gpm_trl.games.nnls", lambda constraints, ones, maxiter: (np.zeros(constraints.shape[1]), 0.0))
    assert von_neumann_winner(ROCK_PAPER_SCISSORS) == pytest.approx(np.full(3, 1 / 3))
    with pytest.raises(ValueError, match=r"not found: a response beats what was by 0\.5 of the largest score"):
        von_neumann_winner([[0, 1], [-1, 0]])

    def endless(*args, **kwargs):
        raise RuntimeError("Maximum number of iterations reached.")

    monkeypatch.setattr("gpm_trl.games.nnls", endless)
    with pytest.raises(ValueError, match=r"winner was not found: Maximum number .* Take another method"):
        von_neumann_winner(ROCK_PAPER_SCISSORS)


def test_ratings_have_the_mean_zero_in_each_part_also_where_weights_differ_much():
    generator = np.random.default_rng(0)
    parts = np.repeat(np.arange(4), 60)
    weights = np.where(parts[:, None] == parts, 10.0 ** generator.uniform(0, 4, size=(240, 240)), 0)
    ratings, _, _ = hodge_decomposition(skew(generator.normal(size=(240, 240))), weights + weights.T)
    assert np.abs(np.bincount(parts, ratings) / 60).max() < 1e-9


@on_games()
def test_decomposition_is_orthogonal_and_cyclicity_is_the_share_of_its_second_part(game):
    ratings, transitive, cyclic = hodge_decomposition(game)
    scale = largest(game)
    assert ratings.sum() / scale == pytest.approx(0, abs=1e-12)
    assert np.array_equal(transitive, ratings[:, None] - ratings[None, :])
    assert transitive + cyclic == pytest.approx(game, abs=1e-12 * scale)
    assert (transitive / scale * cyclic / scale).sum() == pytest.approx(0, abs=1e-12)
    assert cyclic.mean(axis=1) / scale == pytest.approx(np.zeros(len(game)), abs=1e-12)
    assert 0 <= cyclicity(game) <= 1
    triangles = game[:, :, None] + game[None, :, :] + game.T[:, None, :]  # s_ij + s_jk + s_ki
    assert cyclic / scale == pytest.approx(triangles.mean(axis=2) / scale, abs=1e-12)
    share = np.linalg.norm(transitive / scale) ** 2 + cyclicity(game) * np.linalg.norm(game / scale) ** 2
    assert share == pytest.approx(np.linalg.norm(game / scale) ** 2, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_cyclicity_of_known_games(scale):
    ratings = np.array([3.0, 1, 0, -4])
    assert cyclicity(ROCK_PAPER_SCISSORS * scale) == 1
    assert cyclicity((ratings[:, None] - ratings[None, :]) * scale) == pytest.approx(0, abs=1e-15)
    assert cyclicity(np.zeros((4, 4))) == 0
    assert cyclicity([[0.0]]) == 0
    # A third of one comparison is cyclic: 1^2 for each of the three sides, of 3^2 in all.
    assert cyclicity(np.array([[0, 3, 0], [-3, 0, 0], [0, 0, 0]]) * scale) == pytest.approx(1 / 3)


@on_games(max_exponent=0)
def test_weighted_decomposition_is_least_squares_on_the_pairs_that_are_compared(game):
    size = len(game)
    generator = np.random.default_rng(size)
    weights = np.triu(generator.integers(0, 4, size=(size, size)), 1)
    weights = weights + weights.T
    unseen = np.where(weights > 0, game, skew(np.full((size, size), 7.0).cumsum(axis=0)))  # what is not compared
    ratings, transitive, cyclic = hodge_decomposition(unseen, weights)
    assert transitive + cyclic == pytest.approx(unseen, abs=1e-9)
    i, j = np.nonzero(np.triu(weights))
    roots = np.sqrt(weights[i, j])[:, None]
    expected = np.linalg.lstsq(roots * (np.eye(size)[i] - np.eye(size)[j]), roots[:, 0] * game[i, j])[0]
    assert ratings == pytest.approx(expected, abs=1e-9)  # of least norm, so of mean zero in each part
    assert (weights * cyclic).sum(axis=1) == pytest.approx(np.zeros(size), abs=1e-9)
    for same, complete in zip(
        hodge_decomposition(game, np.full((size, size), 3)), hodge_decomposition(game), strict=True
    ):
        assert same == pytest.approx(complete, abs=1e-9)


def random_wins(size: int, seed: int) -> np.ndarray:
    """Sparse, with conflicts and pairs without a comparison."""
    generator = np.random.default_rng(seed)
    wins = generator.integers(1, 4, size=(size, size)) * (generator.random((size, size)) < generator.random())
    return wins * (1 - np.eye(size))


def wrong_in(order, wins: np.ndarray) -> float:
    return sum(wins[i, j] for place, j in enumerate(order) for i in order[place:])


@pytest.mark.parametrize("seed", range(60))
def test_no_order_gets_fewer_comparisons_wrong(seed):
    size = 1 + seed % 6
    wins = random_wins(size, seed)
    least = min(wrong_in(order, wins) for order in permutations(range(size)))
    assert reversals(wins) == (least, True)
    assert reversals(2 * wins) == (2 * least, True)
    turn = np.random.default_rng(seed).permutation(size)
    assert reversals(wins[np.ix_(turn, turn)]) == (least, True)
    assert reversals(np.tril(wins)) == (0, True)  # the last is the best
    assert games_module._packed_cycles(wins) <= least


@pytest.mark.parametrize("seed", range(12))
def test_rewards_that_tie_get_no_fewer_wrong(seed):
    wins = random_wins(4, seed)
    rewards = [np.array(reward) for reward in product(range(4), repeat=4)]
    wrong = [(wins * (1 + np.sign(reward - reward[:, None])) / 2).sum() for reward in rewards]  # a tie is half wrong
    assert min(wrong) == reversals(wins)[0]


@pytest.mark.parametrize("size", [13, 14])
@pytest.mark.parametrize("kind", ["ring", "tournament"])
def test_large_groups_have_a_bound(size, kind):
    tournament = np.triu(np.random.default_rng(size).random((size, size)) < 0.5, 1)
    wins = {
        "ring": np.roll(np.eye(size), 1, axis=1),
        "tournament": np.triu(tournament, 1) + np.tril(1 - tournament.T, -1) * 1.0,
    }[kind]
    exact = wins.sum() - games_module._most_in_order(wins)
    bound, is_exact = reversals(wins)
    assert not is_exact
    assert exact / 2 < bound <= exact  # half is what these have, not what all have
    if kind == "ring":
        assert bound == exact == 1
        assert reversals(np.kron(np.eye(3), np.roll(np.eye(4), 1, axis=1))) == (3, True)  # small ones, apart


@on_games(max_exponent=0)
def test_copeland_scores_count_wins_and_half_the_ties(game):
    wins = [[(score > 0) + (score == 0) / 2 for score in row] for row in game.tolist()]
    expected = [sum(row) - 0.5 for row in wins]  # without the tie of each response with itself
    assert copeland_scores(game).tolist() == expected
    assert copeland_scores(expit(game)).tolist() == expected


def test_tensors_and_float32_are_accepted_in_float64():
    scores = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    scores = scores - scores.T
    assert von_neumann_winner(torch.sigmoid(scores)).dtype == np.float64
    rounded = scores.double() + (scores.T.double() * 2e-7).triu()
    assert hodge_decomposition(rounded)[0] == pytest.approx(scores.mean(1).numpy(), abs=1e-6)


NOT_GAMES = [
    (np.zeros((0, 0)), r"shape \(0, 0\)"),
    (np.zeros((2, 3)), r"shape \(2, 3\), but a game is \(n, n\)"),
    ([[0, 1], [np.nan, 0]], r"`scores\[1, 0\]` is nan"),
    ([[0, np.inf], [-np.inf, 0]], r"`scores\[0, 1\]` is inf.*clip"),
    ([[0, 2.0], [2.5, 0]], r"`scores\[0, 1\]` is 2 and `scores\[1, 0\]` is 2\.5.*s\[i, j\] \+ s\[j, i\] = 0"),
    ([[0, 2.0], [-2.00001, 0]], r"is 2 and `scores\[1, 0\]` is -2\.00001"),
    ([[3.0, 2.0], [-2.0, 0]], r"`scores\[0, 0\]` is 3.*0 on the diagonal"),
    ([[0, 1.1, 2], [-1, 0, 3], [-2, -4, 0]], r"`scores\[1, 2\]` is 3"),  # not the first bad pair, but the worst
]


@pytest.mark.parametrize("function", SCORES_ONLY + ACCEPT_PROBABILITIES)
@pytest.mark.parametrize(("scores", "message"), NOT_GAMES)
def test_what_is_no_game_is_an_error(function, scores, message):
    with pytest.raises(ValueError, match=message):
        function(scores)


@pytest.mark.parametrize("function", SCORES_ONLY)
def test_probabilities_are_refused_where_log_odds_are_meant(function):
    with pytest.raises(ValueError, match=r"pass the log-odds, `scipy\.special\.logit\(P\)`"):
        function(expit(ROCK_PAPER_SCISSORS))


NOT_PROBABILITIES = [
    ([[0.5, 0.7], [0.2, 0.5]], r"`scores\[0, 1\]` is 0\.7 and `scores\[1, 0\]` is 0\.2.* P\[i, j\] \+ P\[j, i\] = 1"),
    ([[0.0, 0.7], [0.3, 0.0]], r"`scores\[0, 0\]` is 0 .*1/2 on the diagonal"),
]


@pytest.mark.parametrize("function", ACCEPT_PROBABILITIES)
@pytest.mark.parametrize(("probabilities", "message"), NOT_PROBABILITIES)
def test_what_are_no_probabilities_is_an_error(function, probabilities, message):
    with pytest.raises(ValueError, match=message):
        function(probabilities)
