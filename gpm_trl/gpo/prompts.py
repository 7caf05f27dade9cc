"""The prompts that a policy is trained on: what a dataset of them must hold."""

from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from .config import GPOConfig

logger = logging.get_logger(__name__)


def check_prompts(dataset: Dataset | IterableDataset | None, name: str) -> list[str]:
    """The columns of a dataset, if there is one, which has prompts."""
    if dataset is None:
        return []
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if "prompt" not in columns:
        raise ValueError(f"`{name}` has the columns {columns}, but no `prompt`.")
    return columns


def check_dataset(dataset: Dataset | IterableDataset | None, args: GPOConfig) -> list[str]:
    """The columns of the training dataset, if they can be trained on."""
    if dataset is None:
        raise ValueError("`train_dataset` is missing: pass a dataset with a column `prompt`.")
    columns = check_prompts(dataset, "train_dataset")
    lone = [name for name in ("scores", "completion_ids") if name in columns and "completions" not in columns]
    if lone:
        raise ValueError(f"`train_dataset` has `{lone[0]}` but no `completions`, which it belongs to.")
    if "completions" in columns and args.remove_unused_columns:
        raise ValueError("`remove_unused_columns` would drop the given `completions`: leave it out.")
    if isinstance(dataset, Dataset):
        _check_number(len(dataset), args)
    if "completions" in columns and isinstance(dataset, Dataset):
        counts = {len(completions) for completions in dataset["completions"]}
        if counts != {args.num_generations}:
            raise ValueError(
                f"The rows of `train_dataset` have {sorted(counts)} completions, but `num_generations` is "
                f"{args.num_generations}: make them the same."
            )
    return columns


def check_unscored(reward_funcs: Any, eval_dataset: Any) -> None:
    """Raise `ValueError` for what would score, where scores are given."""
    if reward_funcs is not None or eval_dataset is not None:
        raise ValueError(
            "`train_dataset` has `scores`, so nothing is scored: leave out `reward_funcs` and `eval_dataset`, or the "
            "column."
        )


def _check_number(count: int, args: GPOConfig) -> None:
    """Raise `ValueError` for fewer prompts than are sampled together, and warn of those that an epoch leaves out."""
    together = args.generation_batch_size // args.num_generations
    if count < together:
        raise ValueError(
            f"There are {count} prompts, but {together} are sampled together (`generation_batch_size` = "
            f"{args.generation_batch_size} completions, {args.num_generations} a prompt): give more prompts, or make "
            "batches smaller."
        )
    if count % together and PartialState().is_main_process:
        logger.warning(
            f"An epoch is of {count - count % together} of the {count} prompts, since {together} are sampled together."
        )
