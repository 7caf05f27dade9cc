"""Evaluation of preference models: accuracy, calibration, RewardBench 1 and 2."""

from .benchmarks import BENCHMARKS, evaluate_pairs, evaluate_reward_bench, evaluate_reward_bench_2
from .callback import EvaluationCallback
from .metrics import accuracy_difference, cyclicity_metrics, length_metrics, pairwise_metrics
from .report import describe_model, describe_run, to_markdown

__all__ = [
    "BENCHMARKS",
    "EvaluationCallback",
    "accuracy_difference",
    "cyclicity_metrics",
    "describe_model",
    "describe_run",
    "evaluate_pairs",
    "evaluate_reward_bench",
    "evaluate_reward_bench_2",
    "length_metrics",
    "pairwise_metrics",
    "to_markdown",
]
