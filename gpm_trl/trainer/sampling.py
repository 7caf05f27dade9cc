"""The first half of an iteration by itself: completions of a policy and their scores, in a file."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset

from .gpo_trainer import GPOTrainer

__all__ = ["CompletionSampler"]


class CompletionSampler(GPOTrainer):
    r"""
    Samples K completions of each prompt and compares them, as [`GPOTrainer`] does, and writes them down instead of
    training on them.

    Args:
        args ([`GPOConfig`]): `num_generations`, `temperature`, `per_device_eval_batch_size` (completions), ...
        kwargs: The other arguments of [`GPOTrainer`]; `train_dataset` are the prompts.

    Example:

    ```python
    sampler = CompletionSampler(model="path/to/policy", reward_funcs="path/to/gpm", args=args, train_dataset=prompts)
    rows = sampler.sample("samples.jsonl")
    trainer = GPOTrainer(model="path/to/policy", args=args, train_dataset=rows)
    ```
    """

    _uses_reference = False

    def sample(self, path: str | Path) -> Dataset:
        """
        Sample for the prompts that `path` does not hold yet, and append a line for each: its columns, `completions`,
        `completion_ids` and `scores`, the K x K log-odds.

        The file is written batch by batch, so that little is lost with a process. A line that is cut short is sampled
        again.

        Returns:
            [`~datasets.Dataset`]: The lines of the file, in the order of the prompts.
        """
        path = Path(path)
        done = read_samples(path)
        if self.accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in done.values()))
        self.accelerator.wait_for_everyone()
        numbered = self.train_dataset.add_column("row", list(range(len(self.train_dataset))))
        left = numbered.select([index for index in range(len(numbered)) if index not in done])
        if len(left):
            self._path = path
            self.evaluate(left)
        self.accelerator.wait_for_everyone()
        done = read_samples(path)
        return Dataset.from_list(
            [{name: done[row][name] for name in done[row] if name != "row"} for row in sorted(done)]
        )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        prompts, size = [row["prompt"] for row in inputs], self.num_generations_eval
        _, completion_ids, _, completions, *_ = self._generate(prompts)
        _, log_odds, _ = self._compare(inputs, prompts, completions, completion_ids, size)
        samples = gather_object(list(zip(inputs, completions, completion_ids, strict=True)))
        if self.accelerator.is_main_process:
            groups = [samples[start : start + size] for start in range(0, len(samples), size)]
            with open(self._path, "a") as file:
                for group, scores in zip(groups, log_odds.tolist(), strict=True):
                    rows, texts, ids = zip(*group, strict=True)
                    row = {**rows[0], "completions": texts, "completion_ids": ids, "scores": scores}
                    file.write(json.dumps(row) + "\n")
        return torch.zeros((), device=self.accelerator.device), None, None


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
