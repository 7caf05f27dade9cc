"""
Training by `GPMTrainer` with padded rows against `trl.RewardTrainer`, on the same pairs and backbone.

    python tests/benchmarks/trainer.py

Whole training runs, interleaved, by the trainers' own clock (`train_runtime`): what the collator, the loss and the
metrics of `GPMTrainer` cost. With packed rows (`shared_prefix="auto"`), the gain comes on top.
"""

import argparse
import random
import statistics
import tempfile
from functools import partial

import transformers
from common import TRAINING, backbone, interleaved, print_header, print_row, print_setting, ratios
from datasets import Dataset
from transformers import LlamaForSequenceClassification, set_seed
from trl import RewardConfig, RewardTrainer

from gpm_trl import GPMConfig, GPMForPreference, GPMModelConfig, GPMTrainer
from gpm_trl.cli.quickstart import byte_tokenizer

WAYS = ("RewardTrainer", "GPMTrainer, padded", "GPMTrainer, packed")


def pairs(count: int) -> Dataset:
    draw = random.Random(0)

    def text(median: int) -> str:
        return "".join(draw.choices("abcdefgh ", k=max(8, min(400, round(median * draw.lognormvariate(0, 0.5))))))

    rows = [{"prompt": text(100), "chosen": text(120), "rejected": text(120)} for _ in range(count)]
    return Dataset.from_list(rows)


def train(way: str, rows: Dataset, args: argparse.Namespace) -> float:
    """Seconds of a run."""
    tokenizer = byte_tokenizer()
    set_seed(0)
    config = backbone(args.hidden_size)
    with tempfile.TemporaryDirectory() as directory:
        settings = {
            **TRAINING,
            "output_dir": directory,
            "max_steps": args.steps,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-5,
            "max_length": None,
            "logging_steps": 5,
        }
        if way == "RewardTrainer":
            model = LlamaForSequenceClassification(config)
            trainer = RewardTrainer(model, RewardConfig(**settings), train_dataset=rows, processing_class=tokenizer)
        else:
            model = GPMForPreference(GPMModelConfig(text_config=config))
            gpm_args = GPMConfig(**settings, shared_prefix=way.endswith("packed"))
            trainer = GPMTrainer(model, gpm_args, rows, processing_class=tokenizer)
        return trainer.train().metrics["train_runtime"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    rows = pairs(4 * args.steps)
    seconds = interleaved({way: partial(train, way, rows, args) for way in WAYS}, args.rounds)
    print_setting(f"hidden {args.hidden_size}, 4 layers, {args.steps} steps of 4 pairs", args.rounds)
    print_header("trainer", "median, s", "RewardTrainer / it, median [range]")
    for way, times in seconds.items():
        print_row(way, f"{statistics.median(times):.2f}", ratios(seconds["RewardTrainer"], times))


if __name__ == "__main__":
    main()
