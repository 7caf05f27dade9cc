"""
`gpm-trl gpo`: align a policy with a general preference model, online. Takes what `trl grpo` takes, with [`GPOConfig`]
for its `GRPOConfig`; the preference model is `reward_model_path`.

    gpm-trl gpo --model_name_or_path path/to/policy --reward_model_path path/to/gpm --dataset_name prompts.jsonl

With `--iterations N`, the prompts are divided among N iterations, each of which samples from the policy of the last,
scores, and trains (the authors' protocol). Every stage is a file or a directory under `output_dir`; a run that was
stopped goes on where it was.
"""

import copy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers.trainer_utils import get_last_checkpoint
from trl import ScriptArguments, TrlParser

from ..trainer import GPOConfig, GPOTrainer
from ..trainer.sampling import CompletionSampler
from .training import finish, make_training_parser, run_training, train_and_save, trainer_arguments

DONE = "done"  # a file that says that an iteration is complete


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
        ValueError: If the prompts cannot be divided among the iterations, or an argument would be ignored.
    """

    def __init__(self, arguments: dict[str, Any], count: int):
        prompts = arguments["train_dataset"]
        if count < 1:
            raise ValueError(f"`iterations` is {count}; choose at least 1, or leave it out to sample while training.")
        if not isinstance(prompts, Dataset):
            raise ValueError("`iterations` divides the prompts, which a stream does not allow: leave one of them out.")
        if len(prompts) < count:
            raise ValueError(f"There are {len(prompts)} prompts for {count} `iterations`: choose fewer.")
        if arguments["eval_dataset"] is not None:
            raise ValueError("`eval_strategy` would be ignored: with `iterations`, evaluate the policies afterwards.")
        self.arguments = arguments
        self.parts = [prompts.shard(count, index, contiguous=True) for index in range(count)]

    def run(self, script_args: ScriptArguments) -> None:
        """Run the iterations that are left."""
        arguments = dict(self.arguments)
        output_dir = Path(arguments["args"].output_dir)
        for number, prompts in enumerate(self.parts, start=1):
            directory = output_dir / f"iteration-{number}"
            if not (directory / DONE).exists():
                trainer = self._iterate(arguments, prompts, directory)
                finish(trainer, script_args)
                if trainer.accelerator.is_main_process:
                    (directory / DONE).touch()
                trainer.accelerator.wait_for_everyone()
                trainer.accelerator.free_memory()
            arguments |= _policy_arguments(directory / "policy")
            arguments["args"] = copy.copy(arguments["args"])
            arguments["args"].model_init_kwargs = {**arguments["args"].model_init_kwargs, "revision": None}
        print_once(f"The policy of the last iteration is {directory / 'policy'}.")

    @staticmethod
    def _iterate(arguments: dict[str, Any], prompts: Dataset, directory: Path) -> GPOTrainer:
        args = copy.copy(arguments["args"])
        args.output_dir = str(directory / "policy")
        print_once(f"{directory.name}: {args.num_generations} completions of {len(prompts)} prompts")
        sampler = CompletionSampler(**{**arguments, "args": args, "train_dataset": prompts})
        samples = sampler.sample(directory / "samples.jsonl")
        sampler.accelerator.free_memory()
        print_once(f"{directory.name}: training")
        trainer = GPOTrainer(**{**arguments, "args": args, "train_dataset": samples, "reward_funcs": None})
        trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output_dir))
        return trainer


def _policy_arguments(directory: Path) -> dict[str, Any]:
    """The policy of an iteration as that of the next: an adapter goes on as it is."""
    if (directory / "adapter_config.json").exists():
        model = AutoPeftModelForCausalLM.from_pretrained(directory, is_trainable=True)
        return {"model": model, "peft_config": None, "quantization_config": None}
    return {"model": str(directory)}


def print_once(text: str) -> None:
    PartialState().print(text, flush=True)


def make_parser(prog: str = "gpm-trl gpo") -> TrlParser:
    """The parser of the command's arguments and YAML file."""
    return make_training_parser(GPOConfig, prog, GPOScriptArguments)


def build(script_args: GPOScriptArguments, training_args: GPOConfig, *rest) -> GPOTrainer | Iterations:
    """What the parsed arguments describe; raises `ValueError` or `OSError` for what cannot be used."""
    arguments = trainer_arguments(script_args, training_args, *rest)
    if training_args.reward_model_path is None:
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
