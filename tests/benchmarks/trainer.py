"""
Training by `GPMTrainer` with padded rows against `trl.RewardTrainer`, on the same pairs and backbone.

    python tests/benchmarks/trainer.py

Whole training runs, interleaved, by the trainers' own clock (`train_runtime`): what the collator, the loss and the
metrics of `GPMTrainer` cost. With packed rows (`shared_prefix="auto"`), the gain comes on top.
"""

import argparse
import platform
import random
import statistics
import tempfile

import torch
import transformers
import trl
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification, set_seed
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
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    with tempfile.TemporaryDirectory() as directory:
        settings = {
            "output_dir": directory,
            "max_steps": args.steps,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-5,
            "max_length": None,
            "gradient_checkpointing": False,
            "logging_steps": 5,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
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
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for index in range(args.rounds + 1):
        for way in WAYS[:: -1 if index % 2 else 1]:  # each way comes as often before another as after it
            seconds[way].append(train(way, rows, args))
    print(
        f"\nhidden {args.hidden_size}, 4 layers, {args.steps} steps of 4 pairs, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}, Python "
        f"{platform.python_version()}, {args.rounds} rounds\n"
    )
    print("| trainer | median, s | RewardTrainer / it, median [range] |\n| --- | ---: | ---: |")
    for way in WAYS:
        ratios = [other / own for other, own in zip(seconds[WAYS[0]][1:], seconds[way][1:], strict=True)]
        spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        print(f"| {way} | {statistics.median(seconds[way][1:]):.2f} | {spread} |")


if __name__ == "__main__":
    main()
