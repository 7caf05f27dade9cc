"""
Training steps of `GPOTrainer` against TRL's trainers, with preference and reward models of the policy's size.

    python tests/benchmarks/gpo.py

Two comparisons, each with the same policy, prompts and number of sampled tokens (every completion has as many): with
`trl.GRPOTrainer` and a scalar reward model, at K completions a prompt and with a reference model on both sides; and
with TRL's OnlineDPOTrainer, at two completions a prompt and its loss. Whole runs, interleaved, by the trainers' own
clock.
"""

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from common import TRAINING, backbone, interleaved, print_header, print_row, print_setting, ratios
from datasets import Dataset
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, set_seed
from trl import GRPOConfig, GRPOTrainer

from gpm_trl import GPMForPreference, GPMModelConfig, GPOConfig, GPOTrainer
from gpm_trl.cli.quickstart import byte_tokenizer

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer


def save_models(directory: Path, hidden_size: int) -> None:
    """A policy, a reward model and a general preference model with the same backbone."""
    config = backbone(hidden_size)
    set_seed(0)
    models = {
        "policy": LlamaForCausalLM(config),
        "reward model": LlamaForSequenceClassification(config),
        "gpm": GPMForPreference(GPMModelConfig(text_config=config)),
    }
    for name, model in models.items():
        model.save_pretrained(directory / name)
        byte_tokenizer().save_pretrained(directory / name)


def settings(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    return {
        **TRAINING,
        "output_dir": str(directory / "output"),
        "max_steps": args.steps,
        "learning_rate": 1e-6,
        "generation_kwargs": {"min_new_tokens": args.completion},
        "temperature": 1.0,
        "top_p": 1.0,
        "logging_steps": 1,
    }


def grpo(directory: Path, args: argparse.Namespace) -> GRPOTrainer:
    batch = {"per_device_train_batch_size": args.batch, "num_generations": args.generations}
    config = GRPOConfig(**settings(directory, args), **batch, max_completion_length=args.completion, beta=0.04)
    return GRPOTrainer(str(directory / "policy"), str(directory / "reward model"), config, prompts(args))


def gpo(directory: Path, args: argparse.Namespace, num_generations: int, loss_type: str) -> GPOTrainer:
    batch = {"per_device_train_batch_size": args.batch, "num_generations": num_generations, "loss_type": loss_type}
    config = GPOConfig(**settings(directory, args), **batch, max_completion_length=args.completion)
    return GPOTrainer(str(directory / "policy"), None, str(directory / "gpm"), config, prompts(args))


def online_dpo(directory: Path, args: argparse.Namespace) -> OnlineDPOTrainer:
    config = OnlineDPOConfig(
        **settings(directory, args),
        per_device_train_batch_size=args.batch // 2,
        max_new_tokens=args.completion,
        max_length=args.prompt + args.completion + 8,
    )
    return OnlineDPOTrainer(
        model=LlamaForCausalLM.from_pretrained(directory / "policy"),
        reward_funcs=str(directory / "reward model"),
        args=config,
        train_dataset=prompts(args),
        processing_class=byte_tokenizer(),
    )


def prompts(args: argparse.Namespace) -> Dataset:
    return Dataset.from_list([{"prompt": f"{number:03}" * (args.prompt // 3)} for number in range(64)])


def seconds(make: Callable[[Path, argparse.Namespace], Any], directory: Path, args: argparse.Namespace) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        return make(directory, args).train().metrics["train_runtime"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=96, help="tokens")
    parser.add_argument("--completion", type=int, default=64, help="tokens")
    parser.add_argument("--batch", type=int, default=16, help="completions")
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    sampled = f"{args.batch} completions of {args.completion} tokens to prompts of {args.prompt}"
    print_setting(f"hidden {args.hidden_size}, 4 layers, {sampled}, {args.steps} steps", args.rounds)
    pairs = {
        f"GRPOTrainer, K = {args.generations}": (grpo, args.generations, "gpo"),
        "OnlineDPOTrainer, K = 2": (online_dpo, 2, "sigmoid"),
    }
    print_header("other trainer", "its median, s", "GPOTrainer, s", "GPOTrainer / it, median [range]")
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        save_models(directory, args.hidden_size)
        for name, (other, num_generations, loss_type) in pairs.items():
            own = partial(gpo, num_generations=num_generations, loss_type=loss_type)
            ways = {make: partial(seconds, make, directory, args) for make in (other, own)}
            theirs, ours = interleaved(ways, args.rounds).values()
            medians = (f"{statistics.median(times):.2f}" for times in (theirs, ours))
            print_row(name, *medians, ratios(ours, theirs))


if __name__ == "__main__":
    main()
