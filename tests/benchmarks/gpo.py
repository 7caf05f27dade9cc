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
import platform
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, set_seed
from trl import GRPOConfig, GRPOTrainer

from gpm_trl import GPMForPreference, GPMModelConfig, GPOConfig, GPOTrainer
from gpm_trl.cli.quickstart import byte_tokenizer

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer


def save_models(directory: Path, hidden_size: int) -> None:
    """A policy, a reward model and a general preference model with the same backbone."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    set_seed(0)
    models = {
        "policy": LlamaForCausalLM(config),
        "reward model": LlamaForSequenceClassification(config),
        "gpm": GPMForPreference(GPMModelConfig(text_config=config)),
    }
    for name, model in models.items():
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)


def settings(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "output_dir": str(directory / "output"),
        "max_steps": args.steps,
        "learning_rate": 1e-6,
        "generation_kwargs": {"min_new_tokens": args.completion},
        "temperature": 1.0,
        "top_p": 1.0,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }


def grpo(directory: Path, args: argparse.Namespace) -> GRPOTrainer:
    batch = {"per_device_train_batch_size": args.batch, "num_generations": args.generations}
    config = GRPOConfig(**settings(directory, args), **batch, max_completion_length=args.completion, beta=0.04)
    return GRPOTrainer(str(directory / "policy"), str(directory / "reward model"), config, prompts(args))


def gpo(directory: Path, args: argparse.Namespace) -> GPOTrainer:
    batch = {"per_device_train_batch_size": args.batch, "num_generations": args.generations}
    config = GPOConfig(**settings(directory, args), **batch, max_completion_length=args.completion)
    return GPOTrainer(str(directory / "policy"), None, str(directory / "gpm"), config, prompts(args))


def online_dpo(directory: Path, args: argparse.Namespace) -> OnlineDPOTrainer:
    config = OnlineDPOConfig(
        **settings(directory, args),
        per_device_train_batch_size=args.batch // 2,
        max_new_tokens=args.completion,
        max_length=args.prompt + args.completion + 8,
    )
    policy = LlamaForCausalLM.from_pretrained(directory / "policy")
    tokenizer = byte_tokenizer()
    return OnlineDPOTrainer(
        model=policy,
        reward_funcs=str(directory / "reward model"),
        args=config,
        train_dataset=prompts(args),
        processing_class=tokenizer,
    )


def gpo_of_two(directory: Path, args: argparse.Namespace) -> GPOTrainer:
    config = GPOConfig(
        **settings(directory, args),
        per_device_train_batch_size=args.batch,
        num_generations=2,
        loss_type="sigmoid",
        max_completion_length=args.completion,
    )
    return GPOTrainer(str(directory / "policy"), None, str(directory / "gpm"), config, prompts(args))


def prompts(args: argparse.Namespace) -> Dataset:
    return Dataset.from_list([{"prompt": f"{number:03}" * (args.prompt // 3)} for number in range(64)])


def seconds(make: Callable[..., Any], directory: Path, args: argparse.Namespace) -> float:
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
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}"
    print(
        f"hidden {args.hidden_size}, 4 layers, {args.batch} completions of {args.completion} tokens to prompts of "
        f"{args.prompt}, {args.steps} steps, {torch.get_num_threads()} threads, {versions}, Python "
        f"{platform.python_version()}, {args.rounds} rounds\n"
    )
    pairs = {
        f"GRPOTrainer, K = {args.generations}": (grpo, gpo),
        "OnlineDPOTrainer, K = 2": (online_dpo, gpo_of_two),
    }
    print("| other trainer | its median, s | GPOTrainer, s | GPOTrainer / it, median [range] |")
    print("| --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        save_models(directory, args.hidden_size)
        for name, makers in pairs.items():
            times: list[list[float]] = [[], []]
            for _ in range(args.rounds + 1):
                for own, make in zip(times, makers, strict=True):
                    own.append(seconds(make, directory, args))
            theirs, ours = (own[1:] for own in times)  # the first warms up
            ratios = [own / other for own, other in zip(ours, theirs, strict=True)]
            spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
            print(
                f"| {name} | {statistics.median(theirs):.2f} | {statistics.median(ours):.2f} | {spread} |", flush=True
            )


if __name__ == "__main__":
    main()
