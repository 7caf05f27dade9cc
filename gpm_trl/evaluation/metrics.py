"""
Numbers made of scores: accuracy and calibration with confidence intervals, the score of Ties. NumPy only.

The trainers' accuracy is counted a second time, in `gpm/metrics.py`: there as sums of tensors that ranks can add up,
here comparison by comparison, as the bootstrap needs them. A test compares the two.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from scipy.special import expit

__all__ = ["bootstrap_interval", "pairwise_metrics", "ties_score"]

NUM_BINS = 10  # of confidences, which are between 1/2 and 1
NUM_RESAMPLES = 1000


def pairwise_metrics(
    log_odds: Sequence[float], labels: Sequence[float], clusters: Sequence[Hashable], seed: int = 0
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
    - `calibration`: these bins, `confidence`, `accuracy` (the mean outcome) and `count`.

    Each but the last comes with an interval (`accuracy_ci`, ...), see [`bootstrap_interval`]; whole clusters are
    drawn, since comparisons of one prompt are not independent. The interval of `ece` lies too high: noise adds to it.

    Args:
        log_odds (sequence of C `float`): s / tau of the first response over the second.
        labels (sequence of C `float`): Probability that the first is preferred, in [0, 1].
        clusters (sequence of C hashable): What each comparison belongs to, its prompt.
        seed (`int`, defaults to `0`): Of the intervals.

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
    preferred = np.sign(labels - 0.5)
    confidence = expit(np.abs(log_odds))
    outcome = 0.5 + np.sign(log_odds) * (labels - 0.5)
    bins = np.minimum(((confidence - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)
    in_bin = np.eye(NUM_BINS)[bins]  # (C, NUM_BINS)
    hits = (preferred != 0) & (np.sign(log_odds) == preferred)
    columns = [np.ones_like(log_odds), preferred != 0, hits, log_odds == 0, (expit(log_odds) - labels) ** 2]
    statistics = np.column_stack([*columns, in_bin * (outcome - confidence)[:, None]])
    numbers: dict[Hashable, int] = {}
    members = [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]
    sums = np.zeros((len(numbers), statistics.shape[1]))
    np.add.at(sums, members, statistics)

    estimates = _pairwise_means(sums.sum(0)[None])[0]
    intervals = bootstrap_interval(sums, _pairwise_means, seed)
    report: dict[str, Any] = {"comparisons": len(log_odds)}
    for name, estimate, interval in zip(("accuracy", "tie_rate", "brier", "ece"), estimates, intervals, strict=True):
        defined = np.isfinite(estimate)
        report[name] = float(estimate) if defined else None
        report[f"{name}_ci"] = interval if defined else None
    report["calibration"] = []
    for members in (bins == index for index in range(NUM_BINS)):
        if members.any():
            means = {"confidence": float(confidence[members].mean()), "accuracy": float(outcome[members].mean())}
            report["calibration"].append({**means, "count": int(members.sum())})
    return report


def _pairwise_means(totals: np.ndarray) -> np.ndarray:
    """Accuracy, tie rate, Brier score and calibration error from sums over comparisons, `(R, M)` -> `(R, 4)`."""
    count, decided, hits, ties, squares = totals[:, :5].T
    with np.errstate(invalid="ignore"):
        accuracy = hits / decided
    return np.column_stack([accuracy, ties / count, squares / count, np.abs(totals[:, 5:]).sum(1) / count])


def bootstrap_interval(
    sums: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0
) -> list[list[float]]:
    """
    95 % percentile bootstrap intervals of functions of sums over clusters, from 1,000 draws of as many clusters as
    there are, with replacement.

    Args:
        sums (`np.ndarray`): M sums over each of G clusters, `(G, M)`.
        statistic (`Callable`): From R vectors of total sums, `(R, M)`, to n estimates of each, `(R, n)`.
        seed (`int`, defaults to `0`): Of the draws.

    Returns:
        n pairs `[low, high]`.
    """
    generator = np.random.default_rng(seed)
    size = len(sums)
    draws = (np.bincount(generator.integers(size, size=size), minlength=size) for _ in range(NUM_RESAMPLES))
    estimates = statistic(np.stack([draw @ sums for draw in draws]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an estimate that no draw defines has a NaN interval
        return np.nanpercentile(estimates, [2.5, 97.5], axis=0).T.tolist()


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
    gaps: dict[str, dict[str, float]] = {"ref": {}, "tied": {}}
    spreads = {}
    for name, correct, incorrect in members:
        kind, _, prompt = name.partition(":")
        if kind not in gaps or not prompt:
            raise ValueError(f'The id {name!r} of a Ties row is not "ref:n" or "tied:n".')
        if prompt in gaps[kind]:
            raise ValueError(f"There are two Ties rows with the id {name!r}.")
        gaps[kind][prompt] = min(correct) - max(incorrect)
        if kind == "tied":
            spreads[prompt] = max(correct) - min(correct)

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values)) if len(values) else 0.0

    both = [prompt for prompt in gaps["tied"] if prompt in gaps["ref"]]
    tied, ref = (np.array([gaps[kind][prompt] for prompt in both]) for kind in ("tied", "ref"))
    spread = np.array([spreads[prompt] for prompt in both])
    with np.errstate(divide="ignore", invalid="ignore"):
        margins = np.nan_to_num(np.tanh(np.minimum(tied, ref) / spread - 1))  # 0 / 0 is NaN
    return (
        0.30 * mean([gap > 0 for gap in gaps["tied"].values()])
        + 0.30 * mean([gap > 0 for gap in gaps["ref"].values()])
        + 0.20 * mean(tied > spread)
        + 0.20 * mean(np.minimum(tied, ref) > spread)
        + 0.01 * mean(margins)
    )
