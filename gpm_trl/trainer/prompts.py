"""The prompts that a policy is trained on: what a dataset of them holds, and the order of an epoch."""

from collections.abc import Callable, Iterator

from datasets import Dataset, IterableDataset
from trl.trainer.utils import RepeatSampler


def check_dataset(dataset: Dataset | IterableDataset | None, num_generations: int) -> list[str]:
    """The columns of the training dataset, if they can be trained on."""
    if dataset is None:
        raise ValueError("`train_dataset` is missing: pass a dataset with a column `prompt`.")
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if "prompt" not in columns:
        raise ValueError(f"`train_dataset` has the columns {columns}, but no `prompt`.")
    if "scores" in columns and "completions" not in columns:
        raise ValueError("`train_dataset` has `scores` but no `completions` that they are about.")
    if "completions" in columns and isinstance(dataset, Dataset):
        counts = {len(completions) for completions in dataset["completions"]}
        if counts != {num_generations}:
            raise ValueError(
                f"The rows of `train_dataset` have {sorted(counts)} completions, but `num_generations` is "
                f"{num_generations}: make them the same."
            )
    return columns


class EpochSampler(RepeatSampler):
    """
    Orders each epoch by a seed of its own: the parent, after a resume, begins with the order of the first.

    Args:
        epoch (`Callable`): Gives the number of the epoch. (`set_epoch`, which the Trainer calls, does not get through
            to a sampler on several processes after a resume within an epoch.)
        kwargs: Of the parent.
    """

    def __init__(self, epoch: Callable[[], int], **kwargs):
        super().__init__(**kwargs)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed + self.epoch())
        return super().__iter__()
