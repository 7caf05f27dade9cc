"""
`gpm-trl gpo`: align a policy with a general preference model, online. Takes what `trl grpo` takes, with [`GPOConfig`]
for its `GRPOConfig`; the preference model is `reward_model_path`.

    gpm-trl gpo --model_name_or_path path/to/policy --reward_model_path path/to/gpm --dataset_name prompts.jsonl

With `--iterations N`, the prompts are divided among N iterations, each of which samples from the policy of the last,
scores, and trains (the authors' protocol). Every stage is a file or a directory under `output_dir`:

    iterations.json             the settings of sampling
    iteration-1/samples.jsonl   a line for each prompt: completions, their token ids, and K x K scores
    iteration-1/policy          what was trained on them, with checkpoints
    iteration-1/done            says that the iteration is complete

A run that was stopped goes on where it was, if the same command is given: what is there is not made again. To start
anew, remove the directories.
"""

import copy
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from trl import ScriptArguments, TrlParser

from ..gpo import GPOConfig, GPOTrainer
from ..gpo.prompts import check_number
from ..gpo.sampling import CompletionSampler, check_samples
from ..saving import last_whole_checkpoint
from .training import make_training_parser, run_training, save_and_push, train_and_save, trainer_arguments

DONE = "done"  # a file that says that an iteration is complete
SETTINGS_FILE = "iterations.json"
# What the samples depend on, beside the prompts and the policy.
SAMPLING_SETTINGS = (
    *("reward_model_path", "num_generations", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("max_completion_length", "max_length", "score_clip", "missing_eos_penalty", "seed"),
)


@dataclass
class GPOScriptArguments(ScriptArguments):
    """
    Script arguments of `gpm-trl gpo`.

    Args:
        iterations (`int`, *optional*):
            Iterations, each on its own part of the prompts. Without, the policy samples as it trains.
    """

    iterations: int | None = field(
        default=None,
        metadata={"help": "Iterations of sampling, scoring and training, each on a part of the prompts (paper: 3)."},
    )


class Iterations:
    """
    Iterations of sampling, scoring and training, of which each is a directory: `samples.jsonl`, `policy`, and a file
    that says that it is done.

    Args:
        arguments (`dict`): Of [`GPOTrainer`], for the first iteration.
        count (`int`): Iterations.

    Raises:
        ValueError: If the prompts cannot be divided among the iterations, an argument would be ignored, or the next
            iteration cannot begin.
        OSError: If a model cannot be loaded.
    """

    def __init__(self, arguments: dict[str, Any], count: int):
        prompts, args = arguments["train_dataset"], arguments["args"]
        _check_iterations(arguments, count)
        output_dir = Path(args.output_dir)
        args.hub_model_id = args.hub_model_id or output_dir.name  # not that of the directory of an iteration
        self.arguments = arguments
        self.parts = [prompts.shard(count, index, contiguous=True) for index in range(count)]
        self.directories = [output_dir / f"iteration-{number}" for number in range(1, count + 1)]
        left = [index for index, directory in enumerate(self.directories) if not (directory / DONE).exists()]
        # As the main process sees it: file systems of others may be behind.
        (self.left,) = broadcast_object_list([left])
        settings = {"iterations": count, "model": arguments["model"]}
        self._check_settings(
            output_dir / SETTINGS_FILE, settings | {name: getattr(args, name) for name in SAMPLING_SETTINGS}
        )
        # Here rather than in `run`, since what cannot be used shows here.
        self._sampler = self._make_sampler(self.left[0]) if self.left else None

    def _check_settings(self, path: Path, settings: dict[str, Any]) -> None:
        """Raise `ValueError` if the iterations that are there were sampled with other settings; else write these."""
        begun = path.exists() and any(directory.exists() for directory in self.directories)
        (earlier,) = broadcast_object_list([json.loads(path.read_text()) if begun else settings])
        changed = [name for name in settings if earlier.get(name) != settings[name]]
        if changed:
            was = ", ".join(f"`{name}` = {earlier.get(name)}, not {settings[name]}" for name in changed)
            raise ValueError(
                f"The iterations in {path.parent} began with {was}: keep it, or choose another `output_dir`."
            )
        if PartialState().is_main_process and not begun:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings, indent=2) + "\n")

    def run(self, script_args: ScriptArguments) -> None:
        """Run the iterations that are left."""
        for index in self.left:
            samples = self._sample(index)
            clear_device_cache(garbage_collection=True)
            trainer = self._train(index, samples)
            save_and_push(trainer, script_args)
            if trainer.accelerator.is_main_process:
                (self.directories[index] / DONE).touch()
            trainer.accelerator.free_memory()
            del trainer
            clear_device_cache(garbage_collection=True)
        _print_once(f"The policy of the last iteration is {self._policy_directory(-1)}.")
        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()

    def _policy_directory(self, index: int) -> Path:
        return self.directories[index] / "policy"

    def _stage(self, index: int, what: str) -> None:
        _print_once(f"Iteration {index + 1} of {len(self.parts)}: {what}")

    def _arguments(self, index: int) -> dict[str, Any]:
        """Arguments of a trainer of an iteration, which begins with the policy of the last one."""
        AcceleratorState._reset_state()  # or, under DeepSpeed, accelerate refuses a second trainer
        arguments = {**self.arguments, "args": copy.copy(self.arguments["args"])}
        arguments["args"].output_dir = str(self._policy_directory(index))
        if index == 0:
            return arguments
        if arguments["peft_config"] is None:  # or else of the base, which stays
            arguments["args"].model_init_kwargs = {**arguments["args"].model_init_kwargs, "revision": None}
        return {**arguments, "model": str(self._policy_directory(index - 1)), "peft_config": None}

    def _make_sampler(self, index: int) -> CompletionSampler:
        check_samples(self._samples_file(index), self.parts[index], self.arguments["args"].num_generations)
        return CompletionSampler(**{**self._arguments(index), "train_dataset": self.parts[index]})

    def _samples_file(self, index: int) -> Path:
        return self.directories[index] / "samples.jsonl"

    def _sample(self, index: int) -> Dataset:
        path = self._samples_file(index)
        count, size = len(self.parts[index]), self.arguments["args"].num_generations
        self._stage(index, f"sampling {size} completions of each of {count} prompts, to {path}")
        sampler, self._sampler = self._sampler or self._make_sampler(index), None
        samples = sampler.sample(path)
        sampler.accelerator.free_memory()
        return samples

    def _train(self, index: int, samples: Dataset) -> GPOTrainer:
        arguments = {**self._arguments(index), "train_dataset": samples, "reward_funcs": None}
        arguments["args"].use_vllm = False  # nothing is sampled
        checkpoint = last_whole_checkpoint(self._policy_directory(index))
        resumed = f", from {checkpoint.name}" if checkpoint else ""
        self._stage(index, f"training on {len(samples)} prompts{resumed}, to {self._policy_directory(index)}")
        trainer = GPOTrainer(**arguments)
        trainer.train(resume_from_checkpoint=True)
        return trainer


def _check_iterations(arguments: dict[str, Any], count: int) -> None:
    prompts, args = arguments["train_dataset"], arguments["args"]
    if count < 1:
        raise ValueError(f"`iterations` is {count}; choose at least 1, or leave it out to sample while training.")
    if not isinstance(prompts, Dataset):
        raise ValueError("`iterations` divides the prompts, which a stream does not allow: leave one of them out.")
    taken = [name for name in ("completions", "completion_ids", "scores", "row") if name in prompts.column_names]
    if taken:
        raise ValueError(
            f"The prompts have the columns {taken}, which `iterations` writes: leave out the columns, or `iterations`."
        )
    if len(prompts) < count:
        raise ValueError(f"There are {len(prompts)} prompts for {count} `iterations`: choose fewer.")
    check_number(len(prompts) // count, args)
    if arguments["eval_dataset"] is not None:
        raise ValueError("`eval_strategy` would be ignored: with `iterations`, evaluate the policies afterwards.")
    if args.resume_from_checkpoint is not None:
        raise ValueError(
            "`resume_from_checkpoint` would be ignored: `iterations` go on where they were. Leave it out."
        )


def _print_once(text: str) -> None:
    PartialState().print(text, flush=True)


def make_parser(prog: str = "gpm-trl gpo") -> TrlParser:
    """The parser of the command's arguments and YAML file."""
    return make_training_parser(GPOConfig, prog, GPOScriptArguments)


def build(script_args: GPOScriptArguments, training_args: GPOConfig, *rest) -> GPOTrainer | Iterations:
    """What the parsed arguments describe; raises `ValueError` or `OSError` for what cannot be used."""
    arguments = trainer_arguments(script_args, training_args, *rest)
    columns = arguments["train_dataset"].column_names or []
    if training_args.reward_model_path is None and "scores" not in columns:
        raise ValueError("Name the preference model by `reward_model_path`.")
    if script_args.iterations is None:
        return GPOTrainer(**arguments)
    return Iterations(arguments, script_args.iterations)


def _run(built: GPOTrainer | Iterations, script_args: GPOScriptArguments) -> None:
    if isinstance(built, Iterations):
        built.run(script_args)
    else:
        train_and_save(built, script_args)


def main(argv: list[str] | None = None) -> int:
    """Train, save and, if asked, push; returns 0, or 2 with one line on stderr for arguments or data it cannot use."""
    return run_training(make_parser(), build, argv, _run)


if __name__ == "__main__":
    sys.exit(main())
