"""The prompts that a policy is trained on: what a dataset of them must hold."""

from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers.utils import logging
from trl import GRPOConfig

from .reward import TEMPLATE_COLUMNS

GIVEN = ("completions", "completion_ids")  # columns that hold samples, and are nothing to tell a judge

logger = logging.get_logger(__name__)


def check_prompts(dataset: Dataset | IterableDataset | None, name: str) -> list[str]:
    """The columns of a dataset, which has prompts."""
    if dataset is None:
        raise ValueError(f"`{name}` is missing: pass a dataset with a column `prompt`.")
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if "prompt" not in columns:
        raise ValueError(f"`{name}` has the columns {columns}, but no `prompt`.")
    return columns


def check_given(dataset: Any, args: Any, reward_funcs: Any, eval_dataset: Any) -> list[str]:
    """The columns of a training dataset, which may hold samples, if `args`, a [`GPOConfig`], can train on them."""
    columns = check_dataset(dataset, args)
    lone = [name for name in ("scores", "completion_ids") if name in columns and "completions" not in columns]
    if lone:
        raise ValueError(f"`train_dataset` has `{lone[0]}` but no `completions`, which it belongs to.")
    if "completions" in columns and args.remove_unused_columns:
        raise ValueError("`remove_unused_columns` would drop the given `completions`: leave it out.")
    given = {"reward_funcs": reward_funcs, "reward_model_path": args.reward_model_path, "eval_dataset": eval_dataset}
    ignored = [f"`{name}`" for name, value in given.items() if value is not None]
    if "scores" in columns and ignored:
        raise ValueError(f"`scores` are given, so nothing is scored: leave out {' and '.join(ignored)}.")
    is_listed = isinstance(dataset, Dataset) and "completions" in columns
    counts = {len(completions) for completions in dataset["completions"]} if is_listed else set()
    if not counts <= {args.num_generations}:
        raise ValueError(
            f"The rows of `train_dataset` have {sorted(counts)} completions, but `num_generations` is "
            f"{args.num_generations}: make them the same."
        )
    return columns


def check_dataset(dataset: Any, args: GRPOConfig) -> list[str]:
    """The columns of a training dataset, if it has as many prompts as `args` samples together."""
    columns = check_prompts(dataset, "train_dataset")
    unseen = [f"`{name}`" for name in TEMPLATE_COLUMNS if name in columns]
    if unseen and PartialState().is_main_process:
        logger.warning(
            f"`train_dataset` has {' and '.join(unseen)}: the judge reads them with the prompt, the policy does not "
            "(TRL renders the trainer's own for it)."
        )
    if not isinstance(dataset, Dataset):
        return columns
    together = args.generation_batch_size // args.num_generations
    if len(dataset) < together:
        raise ValueError(
            f"There are {len(dataset)} prompts, but {together} are sampled together (`generation_batch_size` = "
            f"{args.generation_batch_size}): give more prompts, or make batches smaller."
        )
    left_out = len(dataset) % together
    if left_out and PartialState().is_main_process:
        used = len(dataset) - left_out
        logger.warning(f"An epoch is of {used} of the {len(dataset)} prompts, since {together} are sampled together.")
    return columns
