"""
Whole training runs of our trainers against TRL's, with models of one size.

    python tests/benchmarks/training.py gpm    # GPMTrainer, padded and packed, against RewardTrainer; an HRC
    python tests/benchmarks/training.py gpo    # GPOTrainer against GRPOTrainer and OnlineDPOTrainer
    python tests/benchmarks/training.py gprl   # GPRLTrainer against GRPOTrainer, both with PreferenceReward
    python tests/benchmarks/training.py packed # policies with shared prefixes against padded ones

Runs are interleaved, by the trainers' own clock (`train_runtime`). For `gpm`, pairs of ragged lengths. For `gpo`,
sampling is in it, all completions have the same number of tokens, `GRPOTrainer` has a scalar reward model and a
reference, and `OnlineDPOTrainer`'s loss and two completions a prompt are `GPOTrainer`'s too.
"""

import argparse
import contextlib
import io
import os
import random
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset
from measuring import header, interleaved, llama, parser, ratios, row
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer

from gpm_trl import (
    GPMConfig,
    GPMForPreference,
    GPMModelConfig,
    GPMTrainer,
    GPOConfig,
    GPOTrainer,
    GPRLConfig,
    GPRLTrainer,
    PreferenceReward,
    SharedPrefixPolicy,
)
from gpm_trl.cli.quickstart import byte_tokenizer

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

# Ours are compared with the first of each line.
RUNS = {
    "gpm": [("RewardTrainer", "GPMTrainer, padded", "GPMTrainer, packed"), ("GPMTrainer, packed", "HRC, packed")],
    "gprl": [("GRPOTrainer, GPM", "GPRLTrainer")],
    "gpo": [("GRPOTrainer", "GPOTrainer as GRPO"), ("OnlineDPOTrainer", "GPOTrainer as OnlineDPO")],
    "packed": [(f"{name}, padded", f"{name}, packed") for name in ("GRPOTrainer", "GPOTrainer", "GPRLTrainer")],
}
SETTINGS = {"gradient_checkpointing": False, "save_strategy": "no", "report_to": "none", "learning_rate": 1e-6}
SETTINGS |= {"use_cpu": True, "bf16": False, "disable_tqdm": True, "logging_steps": 1}


def pairs(count: int) -> Dataset:
    draw = random.Random(0)

    def text(median: int) -> str:
        return "".join(draw.choices("abcdefgh ", k=max(8, min(400, round(median * draw.lognormvariate(0, 0.5))))))

    return Dataset.from_list([{"prompt": text(100), "chosen": text(120), "rejected": text(120)} for _ in range(count)])


class SharedPrefixGRPOTrainer(SharedPrefixPolicy, GRPOTrainer):
    pass


def preference_trainer(way: str, directory: Path, args: argparse.Namespace) -> RewardTrainer:
    rows, tokenizer = pairs(4 * args.steps), byte_tokenizer()
    settings = {**SETTINGS, "max_steps": args.steps, "per_device_train_batch_size": 4, "max_length": None}
    config = llama(args.hidden_size)
    if way == "RewardTrainer":
        model = LlamaForSequenceClassification(config)
        return RewardTrainer(model, RewardConfig(directory, **settings), None, rows, processing_class=tokenizer)
    gpm_args = GPMConfig(directory, **settings, shared_prefix=way.endswith("packed"))
    model = GPMForPreference(GPMModelConfig(text_config=config, reward_dim=int(way.startswith("HRC"))))
    return GPMTrainer(model, gpm_args, rows, processing_class=tokenizer)


def policy_trainer(way: str, directory: Path, args: argparse.Namespace) -> Any:
    config = llama(args.hidden_size)
    gpm = GPMForPreference(GPMModelConfig(text_config=config))
    models = {"policy": LlamaForCausalLM(config), "reward": LlamaForSequenceClassification(config), "gpm": gpm}
    for name, model in models.items():
        model.save_pretrained(directory / name)
        byte_tokenizer().save_pretrained(directory / name)
    policy, reward_model, gpm = (str(directory / name) for name in models)
    prompts = Dataset.from_list([{"prompt": f"{number:03}" * (args.prompt // 3)} for number in range(64)])
    sampling = {"temperature": 1.0, "top_p": 1.0, "generation_kwargs": {"min_new_tokens": args.completion}}
    settings = {**SETTINGS, **sampling, "max_steps": args.steps}
    if way == "OnlineDPOTrainer":
        lengths = {"max_new_tokens": args.completion, "max_length": args.prompt + args.completion + 8}
        dpo_args = OnlineDPOConfig(directory, per_device_train_batch_size=args.batch // 2, **settings, **lengths)
        data = {"train_dataset": prompts, "processing_class": byte_tokenizer()}
        return OnlineDPOTrainer(LlamaForCausalLM.from_pretrained(policy), None, reward_model, dpo_args, **data)
    settings |= {"per_device_train_batch_size": args.batch, "max_completion_length": args.completion}
    if way.endswith("OnlineDPO"):
        return GPOTrainer(policy, None, gpm, GPOConfig(directory, **settings, loss_type="sigmoid"), prompts)
    settings["num_generations"] = args.generations
    if args.model is not None:
        policy = args.model
    if way == "GRPOTrainer, packed":
        return SharedPrefixGRPOTrainer(policy, reward_model, GRPOConfig(directory, **settings, beta=0.04), prompts)
    if args.trainer == "packed" and way != "GRPOTrainer, padded":
        settings["shared_prefix"] = way.endswith("packed")
    if way == "GRPOTrainer, GPM":
        return GRPOTrainer(policy, PreferenceReward(gpm), GRPOConfig(directory, **settings, beta=0.04), prompts)
    if way.startswith("GPRLTrainer"):
        return GPRLTrainer(policy, gpm, GPRLConfig(directory, **settings), prompts)
    if way in ("GRPOTrainer", "GRPOTrainer, padded"):
        return GRPOTrainer(policy, reward_model, GRPOConfig(directory, **settings, beta=0.04), prompts)
    return GPOTrainer(policy, None, gpm, GPOConfig(directory, **settings), prompts)


def seconds(way: str, args: argparse.Namespace) -> float:
    make = preference_trainer if args.trainer == "gpm" else policy_trainer
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        return make(way, Path(directory), args).train().metrics["train_runtime"]


def main() -> None:
    # `batch` is a number of completions; `prompt` and `completion` are numbers of tokens.
    numbers = {"prompt": 96, "completion": 64, "batch": 16, "generations": 8}
    options = parser(__doc__, hidden_size=256, steps=4, rounds=5, **numbers)
    options.add_argument("trainer", choices=RUNS)
    options.add_argument("--model", help="a policy by its name or directory, instead of a random one")
    args = options.parse_args()
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    header(args, "trainer", "median, s", "TRL's / it, median [range]")
    for ways in RUNS[args.trainer]:
        measured = interleaved(ways, lambda way: seconds(way, args), args.rounds)
        for way, times in measured.items():
            row(way, f"{statistics.median(times):.2f}", ratios(measured[ways[0]], times))


if __name__ == "__main__":
    main()
