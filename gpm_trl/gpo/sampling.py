"""The first half of an iteration by itself: completions of a policy and their scores, in a file."""

import copy
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from torch.utils.data import Sampler
from trl.trainer.utils import RepeatSampler

from .config import GPOConfig, whole_groups
from .trainer import GPOTrainer

__all__ = ["CompletionSampler"]


class CompletionSampler(GPOTrainer):
    r"""
    Samples K completions of each prompt and compares them, as [`GPOTrainer`] does, and writes them down instead of
    training on them.

    Args:
        args ([`GPOConfig`]): `num_generations`, `temperature`, `seed`, ... The completions of all processes' batches
            of `per_device_eval_batch_size`, rounded to whole groups of K, are sampled together.
        kwargs: The other arguments of [`GPOTrainer`]; `train_dataset` are the prompts.

    Example:

    ```python
    sampler = CompletionSampler(model="path/to/policy", reward_funcs="path/to/gpm", args=args, train_dataset=prompts)
    rows = sampler.sample("samples.jsonl")
    trainer = GPOTrainer(model="path/to/policy", args=args, train_dataset=rows)
    ```
    """

    _uses_reference = False

    def __init__(self, *, args: GPOConfig, **kwargs):
        args = copy.copy(args)
        args.per_device_eval_batch_size = whole_groups(
            args.per_device_eval_batch_size, args.num_generations, args.world_size
        )
        args.num_generations_eval = args.num_generations
        super().__init__(args=args, **kwargs)
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage != 3:
            self.is_deepspeed_enabled = False  # which without training, where nothing is sharded, is refused

    def sample(self, path: str | Path) -> Dataset:
        """
        Sample for the prompts that `path` does not hold yet, and append a line for each: its columns, `completions`,
        `completion_ids` and `scores`, the K x K log-odds.

        The file is written batch by batch. What was not written when a process was stopped is sampled the next time,
        and so is the rest of its batch. Each batch has a random seed of its own, made of `args.seed`, so that all is
        sampled that would have been without the stop, unless the number of processes or the batch size has changed
        or vLLM samples.

        Returns:
            [`~datasets.Dataset`]: The lines of the file, in the order of the prompts.

        Raises:
            ValueError: If the file holds samples of other prompts, or more or fewer than K.
        """
        path = Path(path)
        prompts = self.train_dataset
        check_samples(path, prompts, self.num_generations)
        size = self.args.per_device_eval_batch_size * self.args.world_size // self.num_generations
        batches = [range(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)]
        done = read_samples(path)
        left = [row for batch in batches if not all(row in done for row in batch) for row in batch]
        for row in left:
            done.pop(row, None)
        # Every process must have read the file before it changes.
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_samples(path, done.values())
        if left:
            self._path, self._written = path, set(done)
            self.evaluate(prompts.add_column("row", list(range(len(prompts)))).select(left))
        self.accelerator.wait_for_everyone()
        done = read_samples(path)
        return Dataset.from_list(
            [{name: done[row][name] for name in done[row] if name != "row"} for row in sorted(done)]
        )

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler:
        return RepeatSampler(eval_dataset, mini_repeat_count=self.num_generations, shuffle=False)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        prompts, size = [row["prompt"] for row in inputs], self.num_generations
        set_seed(self.args.seed + inputs[0]["row"] * self.args.world_size, device_specific=True)
        _, completion_ids, _, completions, *_ = self._generate(prompts)
        _, log_odds, _ = self._compare(inputs, prompts, completions, completion_ids, size)
        samples = gather_object(list(zip(inputs, completions, completion_ids, strict=True)))
        if self.accelerator.is_main_process:
            groups = [samples[start : start + size] for start in range(0, len(samples), size)]
            lines = []
            for group, scores in zip(groups, log_odds.tolist(), strict=True):
                rows, texts, ids = zip(*group, strict=True)
                # Where the last batch is too small for all processes, some prompts come again.
                if rows[0]["row"] not in self._written:
                    self._written.add(rows[0]["row"])
                    row = {**rows[0], "completions": texts, "completion_ids": ids, "scores": scores}
                    lines.append(_line(row))
            with open(self._path, "a") as file:
                file.write("".join(lines))
        return torch.zeros((), device=self.accelerator.device), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Nothing: what there is to say is in the file, and there is no loss."""
        self._metrics["eval"].clear()


def read_samples(path: Path) -> dict[int, dict[str, Any]]:
    """The whole lines of a file of samples, by the number of their prompt."""
    rows: dict[int, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            rows[row["row"]] = row
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, default=str) + "\n"  # columns may hold what JSON does not, such as dates


def write_samples(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace a file of samples as a whole: a process that is stopped leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text("".join(map(_line, rows)))
    os.replace(new, path)


def check_samples(path: Path, prompts: Dataset, num_generations: int) -> None:
    """Raise `ValueError` unless the samples that a file may hold are of these prompts, and so many for each."""
    for row, sample in read_samples(path).items():
        if row >= len(prompts) or sample["prompt"] != prompts[row]["prompt"]:
            reason = "of other prompts"
        elif len(sample["completions"]) != num_generations:
            reason = f"{len(sample['completions'])} to a prompt, but `num_generations` is {num_generations}"
        else:
            continue
        raise ValueError(f"The samples in {path} are {reason}: remove the file, or choose another `output_dir`.")
