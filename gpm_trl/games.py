"""Skew-symmetric games: what a matrix of preferences among n responses says about them, in NumPy and float64.

A matrix is an array, or anything that `numpy.asarray` takes (a detached tensor on the CPU too), of one of two kinds:

- scores: `s[i, j] = -s[j, i]`, response i over response j, in log-odds or another unit that is zero for a tie;
- probabilities: `P[i, j] + P[j, i] = 1`, so 1/2 on the diagonal. They are read as the scores `P - 1/2`.

One preference model gives two games, that of its log-odds and that of its probabilities. They agree on who beats whom
(so on Condorcet winners and [`copeland_scores`]), but in general neither on mixed strategies nor on how cyclic they
are. Where a function takes scores only, it is because its meaning is in log-odds.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import nnls

__all__ = [
    "GameDecomposition",
    "copeland_scores",
    "cyclicity",
    "hodge_decomposition",
    "von_neumann_winner",
]

# Wide enough for a matrix computed in float32.
_INPUT_TOLERANCE = 1e-6


def _as_game(scores: ArrayLike, accept_probabilities: bool) -> np.ndarray:
    """The game as a float64 matrix that is exactly skew-symmetric, `(n, n)`."""
    matrix = np.asarray(scores, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise ValueError(
            f"`scores` has the shape {matrix.shape}, but a game is (n, n), n >= 1: one row and one column a response."
        )
    if not np.isfinite(matrix).all():
        i, j = np.argwhere(~np.isfinite(matrix))[0]
        raise ValueError(
            f"`scores[{i}, {j}]` is {matrix[i, j]}, but every entry must be finite. The log-odds of probabilities 0 "
            "and 1 are not: clip these probabilities first."
        )
    halves = matrix / 2  # so that the sum of two of the largest float64 numbers does not overflow
    sums = halves + halves.T
    if np.abs(sums).max() <= _INPUT_TOLERANCE * np.abs(halves).max():
        return halves - halves.T
    if matrix.min() >= -_INPUT_TOLERANCE and np.abs(sums - 0.5).max() <= _INPUT_TOLERANCE / 2:
        if accept_probabilities:
            return halves - halves.T
        raise ValueError(
            "`scores` holds probabilities, P + P.T = 1, but this function is about scores, s + s.T = 0: pass the "
            "log-odds, `scipy.special.logit(P)`, of probabilities strictly between 0 and 1."
        )
    as_probabilities = accept_probabilities and matrix.min() >= 0 and matrix.max() <= 1
    deviations = np.abs(sums - 0.5 if as_probabilities else sums)
    i, j = np.unravel_index(deviations.argmax(), deviations.shape)
    rule = "P[i, j] + P[j, i] = 1, so 1/2" if as_probabilities else "s[i, j] + s[j, i] = 0, so 0"
    remedy = "(P + 1 - P.T) / 2" if as_probabilities else "(s - s.T) / 2"
    raise ValueError(
        f"`scores[{i}, {j}]` is {matrix[i, j]:.7g} and `scores[{j}, {i}]` is {matrix[j, i]:.7g}, but the rule is "
        f"{rule} on the diagonal (within a relative {_INPUT_TOLERANCE:g}). If the difference is noise, `{remedy}` "
        "removes it."
    )


def _unit_scale(game: np.ndarray) -> tuple[np.ndarray, float]:
    """The game with a largest entry of 1, and the factor that gives it back; the zero game keeps its own."""
    scale = float(np.abs(game).max()) or 1.0
    return game / scale, scale


def von_neumann_winner(scores: ArrayLike, tolerance: float = 1e-12) -> np.ndarray:
    r"""
    The mix of responses that no response, and so no mix of them, beats on average:

        p >= 0,   sum_i p[i] = 1,   sum_i p[i] s[i, j] >= 0 for all j

    the equilibrium strategy of the symmetric zero-sum game. Several mixes may satisfy this; the one returned has the
    least Euclidean norm. It is unique, gives identical responses equal shares, and is uniform if all responses tie.

    The von Neumann winner of Dudik et al. (2015, arXiv 1502.06362) and of Theorem 5.1, where `max over pi of
    P(pi > p) = 1/2`, is that of the probabilities; the log-odds of the same model generally have another.

    Args:
        scores (`array_like`): Scores or probabilities, `(n, n)`.
        tolerance (`float`, *optional*, defaults to `1e-12`): What no response exceeds against the mix, as a fraction
            of the largest absolute score (of `P - 1/2` for probabilities); at least 1e-13. Smaller scores count as
            ties. Where the scores have many winners up to rounding only, e.g. float32 scores of more responses than
            embedding coordinates, the default leaves the choice to the rounding, and 1e-6 does not.

    Returns:
        `np.ndarray`: Probabilities of the responses, `(n,)`.

    Raises:
        ValueError: If `scores` is neither a skew-symmetric matrix nor one of probabilities, `tolerance` is out of
            range, or the solution fails its final check (a `numpy.linalg.LinAlgError`).

    Example:

    ```python
    >>> import numpy as np
    >>> from gpm_trl.games import von_neumann_winner
    >>> scores = np.array([[0, 1, -2, 3], [-1, 0, 1, 3], [2, -1, 0, 3], [-3, -3, -3, 0]])  # a cycle, and a loser
    >>> von_neumann_winner(scores).round(6).tolist()
    [0.25, 0.5, 0.25, 0.0]

    ```
    """
    if not 1e-13 <= tolerance < 1:
        raise ValueError(f"`tolerance` is {tolerance}, but must be at least 1e-13, for the rounding, and below 1.")
    game, _ = _unit_scale(_as_game(scores, accept_probabilities=True))
    size = len(game)
    # As sum(p) = 1, the winners are the rays of the cone p >= 0, (game - tolerance) p <= 0. On it, sum(p) / norm(p) is
    # largest at the projection of the vector of ones, which by Moreau is what is left of the ones after their
    # projection on the polar cone, generated by these constraints: non-negative least squares.
    ones = np.ones(size)
    constraints = np.concatenate([-np.eye(size), (game - tolerance).T], axis=1)  # (n, 2n), one column a constraint
    multipliers, _ = nnls(constraints, ones, maxiter=60 * size)
    # The multipliers may be large where winners are nearly many. The remainder is accurate from an orthonormal basis.
    basis, _ = np.linalg.qr(constraints[:, multipliers > 0])
    winner = (ones - basis @ (basis.T @ ones)).clip(min=0)
    winner[multipliers[:size] > 0] = 0
    winner /= winner.sum()
    exceeded = (game @ winner).max()
    if not exceeded <= 2 * tolerance:
        raise np.linalg.LinAlgError(
            f"A response beats the computed von Neumann winner by {exceeded:.3g} of the largest score, but the "
            f"tolerance is {tolerance:g}: the game is too badly conditioned. Raise `tolerance`, or SciPy to 1.16, as "
            "`scipy.optimize.nnls` is less accurate from 1.12 to 1.15."
        )
    return winner


class GameDecomposition(NamedTuple):
    """
    Parts of a game, from [`hodge_decomposition`]: `scores = transitive + cyclic`.

    Attributes:
        ratings (`np.ndarray`): Mean score of each response over all n, `(n,)`; they sum to zero.
        transitive (`np.ndarray`): `ratings[i] - ratings[j]`, `(n, n)`.
        cyclic (`np.ndarray`): The remainder, `(n, n)`; the mean of each row is zero.
    """

    ratings: np.ndarray
    transitive: np.ndarray
    cyclic: np.ndarray


def hodge_decomposition(scores: ArrayLike) -> GameDecomposition:
    r"""
    The transitive and the cyclic part of a game, its combinatorial Hodge decomposition on the complete graph:

        r[i] = mean_j s[i, j],   transitive[i, j] = r[i] - r[j],   cyclic = s - transitive

    The parts are orthogonal (in the Frobenius product), and the transitive one is the nearest game that ratings can
    express: a Bradley-Terry model can represent the transitive part only. The cyclic one is made of the sums around
    triangles, `cyclic[i, j] = mean_k (s[i, j] + s[j, k] + s[k, i])`.

    From Jiang, Lim, Yao and Ye, "Statistical ranking and combinatorial Hodge theory", Mathematical Programming 127
    (2011); for games among learning agents, Balduzzi et al., "Re-evaluating evaluation", NeurIPS 2018.

    Args:
        scores (`array_like`): Scores, `(n, n)`, skew-symmetric; log-odds if the ratings are to be those of a
            Bradley-Terry model. No probabilities.

    Returns:
        [`GameDecomposition`]: `ratings` `(n,)`, `transitive` `(n, n)` and `cyclic` `(n, n)`, in units of `scores`.

    Raises:
        ValueError: If `scores` is not a finite skew-symmetric matrix.

    Example:

    ```python
    >>> from gpm_trl.games import hodge_decomposition
    >>> game = hodge_decomposition([[0, 3, 0], [-3, 0, 0], [0, 0, 0]])
    >>> game.ratings.tolist(), game.cyclic.tolist()
    ([1.0, -1.0, 0.0], [[0.0, 1.0, -1.0], [-1.0, 0.0, 1.0], [1.0, -1.0, 0.0]])

    ```
    """
    game = _as_game(scores, accept_probabilities=False)
    ratings = game.mean(axis=1)
    transitive = ratings[:, None] - ratings[None, :]
    return GameDecomposition(ratings, transitive, game - transitive)


def cyclicity(scores: ArrayLike) -> float:
    r"""
    The share of a game that no ratings can express: `||cyclic||_F^2 / ||scores||_F^2`, see [`hodge_decomposition`].

    Args:
        scores (`array_like`): Scores, `(n, n)`, skew-symmetric. No probabilities.

    Returns:
        `float`: From 0, for a game of ratings (up to rounding) and for the zero game, to 1, for one in which every
        mean score is zero, such as rock-paper-scissors.

    Raises:
        ValueError: If `scores` is not a finite skew-symmetric matrix.

    Example:

    ```python
    >>> from gpm_trl.games import cyclicity
    >>> cyclicity([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    1.0
    >>> round(cyclicity([[0, 3, 0], [-3, 0, 0], [0, 0, 0]]), 6)
    0.333333

    ```
    """
    game, _ = _unit_scale(_as_game(scores, accept_probabilities=False))
    if not game.any():
        return 0.0
    cyclic = hodge_decomposition(game).cyclic
    return min(1.0, float((cyclic**2).sum() / (game**2).sum()))


def copeland_scores(scores: ArrayLike) -> np.ndarray:
    r"""
    How many of the other responses each one beats, a tie counting one half.

    Args:
        scores (`array_like`): Scores or probabilities, `(n, n)`; they give the same result.

    Returns:
        `np.ndarray`: From 0 to n - 1, `(n,)`; n - 1 is a Condorcet winner. They sum to n (n - 1) / 2.

    Raises:
        ValueError: If `scores` is neither a skew-symmetric matrix nor one of probabilities.

    Example:

    ```python
    >>> from gpm_trl.games import copeland_scores
    >>> copeland_scores([[0.5, 0.9, 0.6], [0.1, 0.5, 0.5], [0.4, 0.5, 0.5]]).tolist()
    [2.0, 0.5, 0.5]

    ```
    """
    game = _as_game(scores, accept_probabilities=True)
    return (np.sign(game).sum(axis=1) + len(game) - 1) / 2
