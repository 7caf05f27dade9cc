"""Evaluation on a benchmark whenever a trainer evaluates."""

import re
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..preference import check_choice
from ..scorer import BATCH_TOKENS, PreferenceScorer
from .benchmarks import BENCHMARKS, Rows, check_rows

__all__ = ["EvaluationCallback"]

logger = logging.get_logger(__name__)


class EvaluationCallback(TrainerCallback):
    r"""
    Evaluates the model being trained on a benchmark, whenever the trainer evaluates. Metrics are logged as
    `eval_<name>_accuracy` and so on, and can choose the best model (`metric_for_best_model`). Add callbacks that read
    them, such as [`~transformers.EarlyStoppingCallback`], after this one. Prompts of rows that are too long are cut,
    and rows too long even so left out, with a warning. With several evaluation datasets, it runs after each.

    Args:
        trainer ([`~transformers.Trainer`]): It logs; its model is one that [`PreferenceScorer`] takes.
        rows ([`~datasets.Dataset`] or list of `dict`): The benchmark's rows.
        benchmark (`str`, defaults to `"pairs"`): `"pairs"`, `"reward_bench"` or `"reward_bench_2"`.
        name (`str`, *optional*): What the metrics are called; defaults to `benchmark`.
        options: Of the benchmark, for `"pairs"` `column_mapping` and `chat`, see [`evaluate_pairs`].

    Raises:
        ValueError: If there is no such benchmark, or the rows lack a column of its.

    Example:

    ```python
    >>> trainer.add_callback(EvaluationCallback(trainer, rows, "reward_bench"))  # doctest: +SKIP

    ```
    """

    def __init__(self, trainer: Trainer, rows: Rows, benchmark: str = "pairs", name: str | None = None, **options):
        check_choice("benchmark", benchmark, tuple(BENCHMARKS))
        check_rows(rows, benchmark, options.get("column_mapping"))
        self.trainer = trainer
        self.rows = rows
        self.benchmark = benchmark
        self.options = options
        self.name = name or benchmark

    def on_evaluate(self, args, state, control, processing_class=None, metrics=None, **kwargs):
        # As in training: packed or padded, and as many tokens together.
        tokens, packed = getattr(args, "max_tokens_per_batch", None), getattr(args, "shared_prefix", "auto")
        settings = {"batch_tokens": tokens or BATCH_TOKENS, "shared_prefix": packed, "long_rows": "truncate_prompt"}
        scorer = PreferenceScorer(self.trainer.model, processing_class, **settings)
        # Where several processes compute one model together, all must make the same passes.
        has_parts = self.trainer.accelerator.parallelism_config is not None
        in_step = self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled or has_parts
        with self.trainer.compute_loss_context_manager():
            report = BENCHMARKS[self.benchmark](scorer, self.rows, shard=not in_step, **self.options)
        if report["left_out"]:
            logger.warning(f"{report['left_out']} of {report['rows']} rows of {self.name} are too long: left out.")
        results = {f"eval_{self.name}_{name}": value for name, value in flat_metrics(report).items()}
        if metrics is not None:
            metrics.update(results)
        self.trainer.log(results)


def flat_metrics(report: dict[str, Any]) -> dict[str, float]:
    """The numbers of a report for a log: the overall metrics, or those of the parts and their average."""
    if "average" not in report:
        names = ("accuracy", "tie_rate", "brier", "ece")
        return {name: report["overall"][name] for name in names if report["overall"][name] is not None}
    parts = report.get("sections") or {name: metrics["accuracy"] for name, metrics in report["subsets"].items()}
    named = {re.sub(r"\W+", "_", name.lower()): value for name, value in parts.items()}
    return {**named, "average": report["average"]}
