"""Evaluation of a scorer on rows of preferences: pairs of any kind, RewardBench and RewardBench 2."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers.utils import logging

from ..data.formats import RowError, comparisons_and_labels, find_layout, prompt_and_responses, template_kwargs
from ..data.renderer import RowTooLongError
from ..preference import mean_preference, preference_matrix
from ..scorer import NotFiniteError, PreferenceScorer
from .metrics import cyclicity_metrics, length_metrics, pairwise_metrics, rate_interval, ties_score

__all__ = ["BENCHMARKS", "evaluate_pairs", "evaluate_reward_bench", "evaluate_reward_bench_2"]

Rows = Dataset | Sequence[dict[str, Any]]
Reader = Callable[[dict[str, Any]], "Question"]

CHUNK_ROWS = 256
COLUMNS = {
    "reward_bench": {"prompt", "chosen", "rejected", "subset"},
    "reward_bench_2": {"prompt", "chosen", "rejected", "subset", "id"},
}

# RewardBench: the subsets of each section, and the counts that weigh them (math-prm has 447 rows, weighted up to 984).
SECTIONS = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        **{f"hep-{language}": 164 for language in ("cpp", "go", "java", "js", "python", "rust")},
    },
}


@dataclass
class Question:
    """What a row asks of a scorer and, once scored, the log-odds of its K responses, `(K, K)`."""

    prompt: Any
    responses: Sequence[Any]
    subset: str | None
    name: str  # of the cluster: the prompt, or else the benchmark's name of the row, or else its number
    pairs: Sequence[Sequence[int]] = ()
    labels: Sequence[float] = ()  # one a pair; in RewardBench 2, which has no pairs, one a response: 1 if correct
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    number: int | None = None  # of the row
    truncated: bool = False
    lengths: Sequence[int] = ()  # of the responses, in tokens
    log_odds: torch.Tensor | None = None


def _score_rows(
    scorer: PreferenceScorer, rows: Rows, read: Reader, shard: bool
) -> tuple[list[Question], dict[str, int]]:
    """
    Scores what `read` makes of the rows; returns it in their order, without rows too long, and counts for the report.
    With `shard`, each process scores its share, every row once, and all get all answers.
    """
    state = PartialState()
    shared = shard and state.num_processes > 1
    indices = range(state.process_index, len(rows), state.num_processes) if shared else range(len(rows))
    scored, errors = [], []
    with logging.tqdm(total=len(indices), desc="Evaluating", disable=not state.is_main_process) as progress:
        for start in range(0, len(indices), CHUNK_ROWS):
            chunk = indices[start : start + CHUNK_ROWS]
            try:
                scored += _score_chunk(scorer, rows, chunk, read)
            except ValueError as error:
                if not shared:
                    raise
                errors.append(error)  # for all processes: the others would wait for this one
                break
            progress.update(len(chunk))
    if shared:
        scored, errors = gather_object(scored), gather_object(errors)
        if errors:
            raise errors[0]
    if not scored:
        raise ValueError(f"All rows are longer than {scorer.renderer.max_length} tokens: raise `max_length`.")
    truncated = sum(question.truncated for question in scored)
    counts = {"rows": len(rows), "truncated": truncated, "left_out": len(rows) - len(scored)}
    return sorted(scored, key=lambda question: question.number), counts


def _score_chunk(scorer: PreferenceScorer, rows: Rows, numbers: Sequence[int], read: Reader) -> list[Question]:
    """Some rows, scored, but for those too long."""
    questions, groups = [], []
    for number in numbers:
        try:
            question = read(rows[number])
            groups.append(scorer.encode(question.prompt, question.responses, question.template_kwargs))
        except ValueError as error:
            if isinstance(error, RowTooLongError) and scorer.renderer.long_rows != "error":
                continue
            raise RowError(f"Row {number + 1}: {error}") from error
        question.number, question.name = number, question.name or str(number)
        questions.append(question)
    try:
        embedded = scorer.embed_encoded(groups, show_progress=False)
    except NotFiniteError as error:
        raise RowError(f"Row {questions[error.prompt].number + 1}: {error.reason}") from error
    for question, encoded, group in zip(questions, groups, embedded, strict=True):
        question.truncated, question.lengths = encoded.truncated, [len(ids) for ids in encoded.response_ids]
        question.log_odds = preference_matrix(*group) / scorer.temperature
        question.prompt = question.responses = None  # not to be sent to other processes
    return questions


def check_rows(rows: Rows, benchmark: str, column_mapping: dict[str, str | None] | None = None) -> None:
    """Raise `ValueError` if there are no rows, or the columns of the first are not what the benchmark reads."""
    if len(rows) == 0:
        raise ValueError(f"There are no rows to evaluate on ({benchmark}).")
    needed = COLUMNS.get(benchmark, set())
    if missing := sorted(needed - set(rows[0])):
        raise ValueError(f"{benchmark} needs the columns {sorted(needed)}, but the rows lack {missing}.")
    if benchmark == "pairs":
        layout = find_layout(rows[0], column_mapping)
        if PartialState().is_main_process:
            logging.get_logger(__name__).warning_once(f"{len(rows):,} rows {layout}.")
    elif column_mapping:
        raise ValueError(f"`column_mapping` is for the benchmark pairs: {benchmark} has columns of its own.")


def evaluate_pairs(
    scorer: PreferenceScorer,
    rows: Rows,
    shard: bool = True,
    column_mapping: dict[str, str | None] | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    r"""
    Accuracy and calibration on rows of any layout of [`~gpm_trl.data.formats.find_layout`].

    Args:
        scorer ([`PreferenceScorer`]): The model.
        rows ([`~datasets.Dataset`] or list of `dict`): The rows; those with a `subset` are also reported by subset.
        shard (`bool`, defaults to `True`): Whether the processes share the rows, each of which counts once. Where all
            must call the model in step (ZeRO-3, FSDP), each scores all rows instead.
        column_mapping, chat: See [`~gpm_trl.data.formats.find_layout`].

    Returns:
        `dict` with `rows`, `truncated` (prompts cut to the maximum length), `left_out` (rows too long even so),
        `overall` and `subsets`: their `rows`, the metrics of [`~gpm_trl.evaluation.pairwise_metrics`], clustered by
        prompt (a row without one by itself), `length` ([`~gpm_trl.evaluation.length_metrics`], in the model's tokens)
        and `cyclicity` ([`~gpm_trl.evaluation.cyclicity_metrics`]); and `outcomes`, for
        [`~gpm_trl.evaluation.accuracy_difference`]: of each comparison with a preference its cluster and whether it is
        a hit. Identical responses count as a tie.

    Raises:
        ValueError: If there are no rows, a column is missing, or a row cannot be used; the message gives its number.
    """
    check_rows(rows, "pairs", column_mapping)

    def read(row: dict[str, Any]) -> Question:
        subset, row = row.get("subset"), find_layout(row, column_mapping, chat=chat).read(row)
        prompt, responses = prompt_and_responses(row)
        pairs, labels = comparisons_and_labels(row, len(responses))
        is_apart = row.get("prompt") is not None or isinstance(prompt, list)  # else texts that may begin alike
        name = repr(prompt) if prompt and is_apart else ""
        subset = None if subset is None else str(subset)
        return Question(prompt, responses, subset, name, pairs, labels, template_kwargs(row))

    return _evaluate_comparisons(scorer, rows, read, shard)


def evaluate_reward_bench(scorer: PreferenceScorer, rows: Rows, shard: bool = True) -> dict[str, Any]:
    r"""
    RewardBench (Lambert et al., 2024): accuracy by subset; the score of a section is the mean of its subsets weighted
    by the benchmark's counts, and the average that of the four sections, as in Table 2 of the paper.

    The prompt of a row becomes a user message, where the tokenizer has a chat template, else it is plain text.

    Args:
        scorer, shard: See [`evaluate_pairs`].
        rows ([`~datasets.Dataset`] or list of `dict`): `allenai/reward-bench`, split `filtered`, or some of it:
            `prompt`, `chosen`, `rejected`, `subset`.

    Returns:
        `dict` as of [`evaluate_pairs`], and `sections`, `average` (a section or average lacking subsets is that of
        those there) and `missing_subsets`. Errors as of [`evaluate_pairs`].
    """
    check_rows(rows, "reward_bench")

    def read(row: dict[str, Any]) -> Question:
        if row["subset"] not in counts:
            raise ValueError(f"RewardBench has no subset {row['subset']!r}; it has {sorted(counts)}.")
        prompt, responses = row["prompt"], [row["chosen"], row["rejected"]]
        return Question(scorer.as_prompt(prompt), responses, row["subset"], repr(prompt), [[0, 1]], [1.0])

    counts = {subset: count for subsets in SECTIONS.values() for subset, count in subsets.items()}
    report = _evaluate_comparisons(scorer, rows, read, shard)
    report["sections"] = {}
    for section, subsets in SECTIONS.items():
        weights = {subset: count for subset, count in subsets.items() if subset in report["subsets"]}
        if weights:
            total = sum(count * report["subsets"][subset]["accuracy"] for subset, count in weights.items())
            report["sections"][section] = total / sum(weights.values())
    report["average"] = float(np.mean(list(report["sections"].values())))
    report["missing_subsets"] = sorted(set(counts) - set(report["subsets"]))
    return report


def evaluate_reward_bench_2(scorer: PreferenceScorer, rows: Rows, shard: bool = True) -> dict[str, Any]:
    r"""
    RewardBench 2 (Malik et al., 2025). It needs one number for each response: here the mean preference s_hat over the
    responses of the row (Equation 5.2), for a reward model the same as its reward up to a constant.

    In all subsets but `Ties` ([`ties_score`]), a row counts 1 if a correct response has the highest number, the share
    of correct ones if several have it, else 0.

    Args:
        scorer, shard: See [`evaluate_pairs`].
        rows ([`~datasets.Dataset`] or list of `dict`): `allenai/reward-bench-2`, split `test`, or some of it:
            `prompt`, `chosen` and `rejected` (lists), `subset`, `id`.

    Returns:
        `dict` with `rows`, `truncated`, `left_out`, `subsets` (`rows`, `accuracy` and, but for `Ties`, its interval
        `accuracy_ci`), `average`, the mean of the subsets, and `outcomes` as of [`evaluate_pairs`], without `Ties`.
        Errors as of [`evaluate_pairs`].
    """
    check_rows(rows, "reward_bench_2")

    def read(row: dict[str, Any]) -> Question:
        if not all(isinstance(row[column], list) and row[column] for column in ("chosen", "rejected")):
            raise ValueError("`chosen` and `rejected` are lists in RewardBench 2, with at least one response each.")
        if not isinstance(row["subset"], str):
            raise ValueError(f"`subset` is {row['subset']!r}, but every row is of one.")
        labels = [1.0] * len(row["chosen"]) + [0.0] * len(row["rejected"])
        responses = [*row["chosen"], *row["rejected"]]
        return Question(scorer.as_prompt(row["prompt"]), responses, row["subset"], str(row["id"]), labels=labels)

    questions, counts = _score_rows(scorer, rows, read, shard)
    by_subset = defaultdict(list)
    for question in questions:
        means = mean_preference(question.log_odds).tolist()
        num_correct = question.labels.count(1.0)
        by_subset[question.subset].append((question, means[:num_correct], means[num_correct:]))
    subsets, outcomes = {}, {}
    for subset, members in by_subset.items():
        if subset.lower() == "ties":
            score = ties_score([(question.name, *means) for question, *means in members])
            subsets[subset] = {"rows": len(members), "accuracy": score}
            continue
        hits = np.array([_best_of_n(*means) for _, *means in members])
        outcomes |= {str(row.number): (row.name, hit) for (row, *_), hit in zip(members, hits.tolist(), strict=True)}
        interval = rate_interval(hits, np.ones_like(hits))
        subsets[subset] = {"rows": len(members), "accuracy": float(hits.mean()), "accuracy_ci": interval}
    average = float(np.mean([part["accuracy"] for part in subsets.values()]))
    return {**counts, "subsets": subsets, "average": average, "outcomes": outcomes}


def _best_of_n(correct: Sequence[float], incorrect: Sequence[float]) -> float:
    """Of the responses with the highest number, the share that is correct."""
    best = max(*correct, *incorrect)
    return correct.count(best) / (correct.count(best) + incorrect.count(best))


def _evaluate_comparisons(scorer: PreferenceScorer, rows: Rows, read: Reader, shard: bool) -> dict[str, Any]:
    """Metrics of the rows' comparisons, of all together and by subset."""
    questions, counts = _score_rows(scorer, rows, read, shard)
    by_subset, outcomes = defaultdict(list), {}
    for question in questions:
        pairs = zip(question.pairs, question.labels, strict=True)
        lengths, log_odds = question.lengths, question.log_odds.tolist()
        comparisons = [(log_odds[i][j], label, question.name, lengths[i] - lengths[j]) for (i, j), label in pairs]
        for subset in {None, question.subset} if comparisons else ():  # None is of all rows
            by_subset[subset].append((log_odds, comparisons))
        for index, (value, label, cluster, _) in enumerate(comparisons):
            if label != 0.5:
                outcomes[f"{question.number}:{index}"] = (cluster, value * (label - 0.5) > 0)
    if not by_subset:
        raise ValueError("No row compares two responses: all of `comparisons` or of the ranks are empty.")
    metrics = {}
    for subset, members in by_subset.items():
        games, comparisons = zip(*members, strict=True)
        *columns, excess = zip(*chain(*comparisons), strict=True)
        metrics[subset] = {
            "rows": len(members),
            **pairwise_metrics(*columns),
            "length": length_metrics(*columns, excess),
            "cyclicity": cyclicity_metrics(games),
        }
    return {**counts, "overall": metrics.pop(None), "subsets": metrics, "outcomes": outcomes}


BENCHMARKS = {
    "pairs": evaluate_pairs,
    "reward_bench": evaluate_reward_bench,
    "reward_bench_2": evaluate_reward_bench_2,
}
