"""
Numbers made of scores: accuracy, calibration and what length does, with confidence intervals; cyclicity; the score of
Ties. NumPy only.

The trainers' accuracy is counted a second time, in `gpm/metrics.py`: there as sums of tensors that ranks can add up,
here comparison by comparison, as the bootstrap needs them. A test compares the two.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse.csgraph import connected_components
from scipy.special import betaincinv, expit, stdtrit

from ..games import cyclicity

__all__ = [
    "accuracy_difference",
    "bootstrap_interval",
    "cyclicity_metrics",
    "length_metrics",
    "pairwise_metrics",
    "rate_interval",
    "ties_score",
]

NUM_BINS = 10  # of confidences, which are between 1/2 and 1
NUM_RESAMPLES = 1000


def pairwise_metrics(
    log_odds: Sequence[float], labels: Sequence[float], clusters: Sequence[Hashable]
) -> dict[str, Any]:
    r"""
    How well modelled preferences agree with given ones. C comparisons, each of a first response with a second:

    - `accuracy`: comparisons whose log-odds have the sign of the given preference, of those with a preference (label
      other than 1/2); log-odds of exactly 0 are no hit;
    - `tie_rate`: comparisons with log-odds of exactly 0;
    - `brier`: mean squared difference of `sigmoid(log_odds)` and the label;
    - `ece`: expected calibration error. With the response that the model prefers, whose probability is the confidence
      in [1/2, 1], and what the label says of it, the outcome: the mean over ten bins of equal width, weighted by their
      counts, of |mean outcome - mean confidence|;
    - `calibration`: these bins, `confidence`, `accuracy` (the mean outcome), its interval, and `count`.

    Each but the last comes with an interval (`accuracy_ci`, ...) by clusters, since comparisons of one prompt are not
    independent: a [`rate_interval`] for the first two, a [`bootstrap_interval`] for the others, which have none
    (`None`) with one cluster. The interval of `ece` lies too high: noise adds to it.

    Args:
        log_odds (sequence of C `float`): s / tau of the first response over the second.
        labels (sequence of C `float`): Probability that the first is preferred, in [0, 1].
        clusters (sequence of C hashable): What each comparison belongs to, its prompt.

    Returns:
        `dict` with the metrics, and `comparisons`, C; `accuracy` is `None` where no comparison has a preference.

    Raises:
        ValueError: If there is no comparison, or the lengths differ.

    Example:

    ```python
    >>> from gpm_trl.evaluation import pairwise_metrics
    >>> metrics = pairwise_metrics([2.0, -1.0, 0.0], [1.0, 1.0, 1.0], clusters=["a", "b", "c"])
    >>> round(metrics["accuracy"], 3), round(metrics["tie_rate"], 3), round(metrics["brier"], 3)
    (0.333, 0.333, 0.266)

    ```
    """
    log_odds, labels = np.asarray(log_odds, dtype=float), np.asarray(labels, dtype=float)
    if not len(log_odds) == len(labels) == len(clusters) or len(log_odds) == 0:
        numbers = f"{len(log_odds)} log-odds, {len(labels)} labels and {len(clusters)} clusters"
        raise ValueError(f"There are {numbers}: give one of each for each comparison, and at least one.")
    confidence = expit(np.abs(log_odds))
    outcome = 0.5 + np.sign(log_odds) * (labels - 0.5)
    bins = np.minimum(((confidence - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)
    in_bin = np.eye(NUM_BINS)[bins]  # (C, NUM_BINS)
    hits = log_odds * (labels - 0.5) > 0
    columns = [np.ones_like(log_odds), labels != 0.5, hits, log_odds == 0, (expit(log_odds) - labels) ** 2]
    sums = _cluster_sums(np.column_stack([*columns, in_bin * (outcome - confidence)[:, None]]), clusters)

    totals = sums.sum(0)
    report: dict[str, Any] = {"comparisons": len(log_odds)}
    for name, hit, counted in (("accuracy", 2, 1), ("tie_rate", 3, 0)):
        report |= _rate(name, sums[:, hit], sums[:, counted])
    intervals = bootstrap_interval(sums, _brier_and_ece) if len(sums) > 1 else [None, None]
    for name, mean, interval in zip(("brier", "ece"), _brier_and_ece(totals[None])[0], intervals, strict=True):
        report |= {name: float(mean), f"{name}_ci": interval}
    report["calibration"] = []
    for members in in_bin.T:
        if members.any():
            means = {"confidence": float(confidence @ members / members.sum()), "count": int(members.sum())}
            outcomes = _cluster_sums(np.column_stack([members * outcome, members]), clusters)
            report["calibration"].append({**means, **_rate("accuracy", *outcomes.T)})
    return report


def length_metrics(
    log_odds: Sequence[float], labels: Sequence[float], clusters: Sequence[Hashable], excess: Sequence[float]
) -> dict[str, Any]:
    r"""
    What the length of responses tells of the given preferences, and of the modelled ones. Of the comparisons with a
    preference (label other than 1/2) between responses of two lengths, `comparisons` of them:

    - `longer_is_right`: those whose preferred response is the longer one, so the accuracy of "the longer answer";
    - `prefers_longer`: those in which the model prefers the longer one;
    - `accuracy_longer`, `accuracy_shorter`: the model's accuracy where the longer one is right, and the shorter one.

    As in [`pairwise_metrics`], log-odds of exactly 0 prefer none, and each comes with its [`rate_interval`]; it is
    `None` where it has no comparisons.

    Args:
        log_odds, labels, clusters: See [`pairwise_metrics`].
        excess (sequence of C `float`): Length of the first response less that of the second.

    Example:

    ```python
    >>> from gpm_trl.evaluation import length_metrics
    >>> metrics = length_metrics([2.0, 1.0, -1.0], [1.0, 0.0, 1.0], clusters=["a", "b", "c"], excess=[5, 5, 5])
    >>> [round(metrics[name], 3) for name in ("longer_is_right", "prefers_longer", "accuracy_longer")]
    [0.667, 0.667, 0.5]

    ```
    """
    model, right, longer = (np.sign(values) for values in (log_odds, np.asarray(labels) - 0.5, excess))
    counted = right * longer != 0
    report: dict[str, Any] = {"comparisons": int(counted.sum())}
    for name, hits, among in (
        ("longer_is_right", longer == right, counted),
        ("prefers_longer", longer == model, counted),
        ("accuracy_longer", model == right, counted & (longer == right)),
        ("accuracy_shorter", model == right, counted & (longer != right)),
    ):
        report |= _rate(name, *_cluster_sums(np.column_stack([hits & among, among]), clusters).T)
    return report


def cyclicity_metrics(games: Sequence[ArrayLike]) -> dict[str, Any] | None:
    """
    How cyclic a model's own preferences are, among the responses to each prompt with three and more.

    Args:
        games (sequence of `array_like`): Log-odds between the K responses to each prompt, `(K, K)`, skew-symmetric.

    Returns:
        `dict`: `prompts`, those with K > 2; the `mean` and the `max` of their [`~gpm_trl.games.cyclicity`]; and
        `cycles`, in how many the model prefers some responses in a circle, so in no order. `None` if there are none.

    Example:

    ```python
    >>> from gpm_trl.evaluation import cyclicity_metrics
    >>> cyclicity_metrics([[[0, 1, -1], [-1, 0, 1], [1, -1, 0]], [[0, 1], [-1, 0]]])
    {'prompts': 1, 'mean': 1.0, 'max': 1.0, 'cycles': 1}

    ```
    """
    games = [np.asarray(game) for game in games if len(game) > 2]
    if not games:
        return None
    shares = [cyclicity(game) for game in games]
    # Of two responses one wins at most, so a strongly connected part of two or more holds a circle.
    cycles = sum(connected_components(game > 0, connection="strong")[0] < len(game) for game in games)
    return {"prompts": len(games), "mean": float(np.mean(shares)), "max": max(shares), "cycles": cycles}


def _cluster_sums(values: np.ndarray, clusters: Sequence[Hashable]) -> np.ndarray:
    """Sums over each of G clusters, `(C, M)` -> `(G, M)`."""
    numbers: dict[Hashable, int] = {}
    members = [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]
    sums = np.zeros((len(numbers), values.shape[1]))
    np.add.at(sums, members, values)
    return sums


def _brier_and_ece(totals: np.ndarray) -> np.ndarray:
    """Brier score and calibration error from sums over comparisons, `(R, M)` -> `(R, 2)`."""
    return np.column_stack([totals[:, 4], np.abs(totals[:, 5:]).sum(1)]) / totals[:, :1]


def bootstrap_interval(
    sums: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0
) -> list[list[float]]:
    """
    95 % percentile bootstrap intervals `[low, high]` of n functions of sums over clusters, from 1,000 draws of as many
    clusters as there are, with replacement: of M sums over each of G clusters, `(G, M)`, and a function from R vectors
    of total sums, `(R, M)`, to n estimates of each, `(R, n)`.
    """
    generator = np.random.default_rng(seed)
    size = len(sums)
    draws = (np.bincount(generator.integers(size, size=size), minlength=size) for _ in range(NUM_RESAMPLES))
    estimates = statistic(np.stack([draw @ sums for draw in draws]))
    return np.percentile(estimates, [2.5, 97.5], axis=0).T.tolist()


def _effective_count(residuals: np.ndarray, counts: np.ndarray, variance: float) -> float:
    """
    How many independent comparisons say as much as those of G clusters: their number, times the variance of the mean
    if all were independent, divided by its variance between clusters; and less where there are few (Korn and Graubard,
    1998). It is at most their number, and at least what it is if those of a cluster are all alike. The latter is taken
    with one cluster, or where all residuals are 0.
    """
    total, size = counts.sum(), len(counts)
    least, between = total**2 / (counts**2).sum(), (residuals**2).sum()
    if size < 2 or between == 0:
        return least
    few = (stdtrit(total - 1, 0.975) / stdtrit(size - 1, 0.975)) ** 2
    return float(np.clip(total**2 * variance / between * few, least, total))


def rate_interval(hits: np.ndarray, counts: np.ndarray) -> list[float] | None:
    """
    95 % interval of a rate from the hits and the comparisons of G clusters, `(G,)`: exact (Clopper and Pearson) where
    comparisons are independent, else that of as many independent ones as they are worth. `None` without any.
    """
    hits, counts = hits[counts > 0], counts[counts > 0]
    if not len(counts):
        return None
    rate = hits.sum() / counts.sum()
    size = _effective_count(hits - rate * counts, counts, rate * (1 - rate))
    low = betaincinv(rate * size, (1 - rate) * size + 1, 0.025) if rate > 0 else 0.0
    high = betaincinv(rate * size + 1, (1 - rate) * size, 0.975) if rate < 1 else 1.0
    return [float(low), float(high)]


def _rate(name: str, hits: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """The rate, and its interval, of the hits and the comparisons of G clusters; `None` without any."""
    rate = float(hits.sum() / counts.sum()) if counts.sum() else None
    return {name: rate, f"{name}_ci": rate_interval(hits, counts)}


def accuracy_difference(first: dict[str, tuple], second: dict[str, tuple]) -> dict[str, Any]:
    """
    Accuracy of a second model minus that of a first on the same comparisons, so that what is hard for both does not
    blur it; with the 95 % interval of Bonett and Price (2012) for paired rates, for as many independent comparisons as
    the clusters are worth.

    Args:
        first, second (`dict[str, tuple]`): The `outcomes` of a report of each, such as of [`evaluate_pairs`]: of each
            comparison, the cluster and whether the model is right, or how much of it.

    Returns:
        `dict`: `comparisons`, the number of those in both; `accuracy`, the difference; and `accuracy_ci`, its
        interval. Both are `None` without any comparison.

    Example:

    ```python
    >>> from gpm_trl.evaluation import accuracy_difference
    >>> first, second = {"1": ("a", 0), "2": ("b", 1)}, {"1": ("a", 1), "2": ("b", 1), "3": ("c", 0)}
    >>> difference = accuracy_difference(first, second)
    >>> difference["comparisons"], difference["accuracy"]
    (2, 0.5)

    ```
    """
    common = [comparison for comparison in first if comparison in second]
    if not common:
        return {"comparisons": 0, "accuracy": None, "accuracy_ci": None}
    changes = np.array([[float(second[comparison][1]) - first[comparison][1], 1] for comparison in common])
    sums = _cluster_sums(changes, [first[comparison][0] for comparison in common])
    rate, differ = changes[:, 0].mean(), np.abs(changes[:, 0]).mean()
    size = _effective_count(sums[:, 0] - rate * sums[:, 1], sums[:, 1], differ - rate**2)
    centre = rate * size / (size + 2)
    width = 1.959964 * np.sqrt(((differ * size + 2) / (size + 2) - centre**2) / (size + 2))
    limits = np.clip([centre - width, centre + width], -1, 1).tolist()
    return {"comparisons": len(common), "accuracy": float(rate), "accuracy_ci": limits}


def ties_score(members: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> float:
    r"""
    Score of the `Ties` subset of RewardBench 2, whose prompts have several correct responses, in two versions: rows
    `"tied:n"` have many of them, rows `"ref:n"` one. A row is accurate if its worst correct response is above its best
    incorrect one; the gap is by how much, the spread that between its best and worst correct response.

        0.30 accuracy of the tied rows + 0.30 accuracy of the ref rows
        + 0.20 mean(gap of tied > spread) + 0.20 mean(min(gap of tied, gap of ref) > spread)
        + 0.01 mean tanh(min(gap of tied, gap of ref) / spread - 1)

    with the spread of the tied row, over the prompts that have both, and 0 for the last where 0 / 0.

    Takes of each row its id, and the numbers of its correct and incorrect responses; the score is at most 1.01. Raises
    `ValueError` if an id is not `"ref:n"` or `"tied:n"`, or is there twice.
    """
    kinds: dict[str, dict[str, tuple[float, float]]] = {"ref": {}, "tied": {}}  # gap and spread of each prompt
    for name, correct, incorrect in members:
        kind, _, prompt = name.partition(":")
        if kind not in kinds or not prompt:
            raise ValueError(f'The id {name!r} of a Ties row is not "ref:n" or "tied:n".')
        if prompt in kinds[kind]:
            raise ValueError(f"There are two Ties rows with the id {name!r}.")
        kinds[kind][prompt] = min(correct) - max(incorrect), max(correct) - min(correct)

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values)) if len(values) else 0.0

    both = [(*kinds["tied"][prompt], kinds["ref"][prompt][0]) for prompt in kinds["tied"] if prompt in kinds["ref"]]
    tied, spread, ref = np.array(both).reshape(-1, 3).T
    with np.errstate(divide="ignore", invalid="ignore"):
        margins = np.nan_to_num(np.tanh(np.minimum(tied, ref) / spread - 1))  # 0 / 0 is NaN
    return (
        0.30 * mean([gap > 0 for gap, _ in kinds["tied"].values()])
        + 0.30 * mean([gap > 0 for gap, _ in kinds["ref"].values()])
        + 0.20 * mean(tied > spread)
        + 0.20 * mean(np.minimum(tied, ref) > spread)
        + 0.01 * mean(margins)
    )
