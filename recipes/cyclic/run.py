"""
The paper's Table 1: a Bradley-Terry model and a general preference model on cyclic preferences.

For each of four sub-datasets, which leave out one aspect of UltraFeedback's ratings, trains `trl.RewardTrainer` and
`GPMTrainer` from the same decoder on the three comparisons of every cycle, and prints how many of them each gets
right. No scalar reward gets more than two of three.

    python recipes/cyclic/run.py
    python recipes/cyclic/run.py --model google/gemma-2b-it --dataset openbmb/UltraFeedback

The first line takes minutes on a CPU: tiny decoders from scratch, and made-up rows with random ratings. The second
takes the paper's model, data and settings, and a GPU.
"""

import argparse
import gc
import json
import random
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import write  # beside this file
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging
from trl import RewardConfig, RewardTrainer

from gpm_trl import GPMConfig, GPMTrainer
from gpm_trl.cli.quickstart import save_tiny_decoder
from gpm_trl.data.cyclic import ASPECTS

# Table 1: accuracies of BT and GPM in %. The paper does not say which aspect which of its sub-datasets leaves out.
PAPER_TABLE = ((62.4, 100.0), (61.6, 100.0), (50.0, 100.0), (62.9, 100.0))

# Table 9. Weights are in float32 and computations in bfloat16: steps of 1e-6 would be lost in bfloat16 weights.
PAPER_SETTINGS = {
    "num_train_epochs": 50,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "per_device_train_batch_size": 1,  # a comparison
    "max_length": 2048,
    "bf16": True,
    "gradient_checkpointing": True,
    "logging_steps": 50,
    "use_cpu": not torch.cuda.is_available(),  # for a try with a small model; else bf16 would be refused
}
TINY_SETTINGS = {
    "num_train_epochs": 200,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.03,
    "per_device_train_batch_size": 24,  # comparisons
    "max_length": 256,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_strategy": "no",
    "use_cpu": True,
}
# The comparisons of a cycle in one batch, which here takes fewer epochs; 8 prompts are 24 comparisons too.
TINY_GPM_SETTINGS = {"group_by_prompt": True, "per_device_train_batch_size": 8}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="a causal LM, trained as in Table 9 (default: a tiny decoder from scratch)")
    parser.add_argument("--dataset", help="rows in the format of UltraFeedback (default: made-up rows)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/cyclic"), help="(default: %(default)s)")
    parser.add_argument("--omit", choices=ASPECTS, nargs="+", default=ASPECTS, help="sub-datasets (default: all)")
    parser.add_argument("--max_cycles", type=int, help="the first so many of each sub-dataset (default: all)")
    parser.add_argument("--epochs", type=int, help="(default: 50 with a model, 200 without)")
    parser.add_argument("--learning_rate", type=float, help="(default: 1e-6 with a model, 1e-4 without)")
    parser.add_argument("--seed", type=int, default=0, help="of rows, weights and order (default: %(default)s)")
    return parser.parse_args(argv)


def made_up_rows(seed: int, num_prompts: int = 40) -> Iterator[dict]:
    """Rows in the format of UltraFeedback: four short responses a prompt, with random ratings."""
    draw = random.Random(seed)
    for number in range(num_prompts):
        completions = []
        for name in draw.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 4):
            annotations = {aspect: {"Rating": str(draw.randint(1, 5))} for aspect in ASPECTS}
            completions.append({"response": f" {name}", "annotations": annotations})
        yield {"instruction": f"Question {number}: which letter?", "completions": completions}


def write_sub_datasets(args: argparse.Namespace, is_conversational: bool) -> None:
    dataset = args.dataset
    if dataset is None:
        dataset = args.output_dir / "made_up.jsonl"
        dataset.write_text("".join(json.dumps(row) + "\n" for row in made_up_rows(args.seed)))
    command = [f"--dataset={dataset}", f"--output_dir={args.output_dir}", "--overwrite"]
    write.main([*command, *(["--conversational"] if is_conversational else [])])


def load_cycles(args: argparse.Namespace, omit: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """The rows of a sub-dataset. Trainers drop long rows, so cycles that would lose one are left out as a whole."""
    with open(args.output_dir / f"without_{omit}.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    cycles = [rows[start : start + 3] for start in range(0, len(rows), 3)]
    short = [cycle for cycle in cycles if all(num_tokens(row, tokenizer) < max_length for row in cycle)]
    print(f"Without {omit}: {len(short)} of {len(cycles)} cycles have fewer than {max_length} tokens", flush=True)
    if not short:
        raise SystemExit(f"Nothing to train on without {omit}: leave it out of --omit, or take other rows or a model.")
    return Dataset.from_list([row for cycle in short[: args.max_cycles] for row in cycle])


def num_tokens(row: dict, tokenizer: PreTrainedTokenizerBase) -> int:
    if isinstance(row["prompt"], str):
        return len(tokenizer(row["prompt"] + row["chosen"])["input_ids"])
    return len(tokenizer.apply_chat_template(row["prompt"] + row["chosen"])["input_ids"])


def accuracy(trainer_class: type, model: str, args: RewardConfig, rows: Dataset) -> float:
    """Train on the rows; returns the share of them that the model gets right afterwards."""
    trainer = trainer_class(model=model, args=args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    return trainer.evaluate()["eval_accuracy"]


def compare(model: str, settings: dict, gpm_settings: dict, rows: Dataset, output_dir: Path) -> dict[str, float]:
    """The accuracies of both models."""
    common = {
        **settings,
        "per_device_eval_batch_size": 3,  # divides the rows, so that the mean over batches is that over comparisons
        "save_strategy": "no",
        "report_to": "none",
    }
    accuracies = {}
    for name, trainer_class, config in (
        ("BT", RewardTrainer, RewardConfig(str(output_dir / "BT"), **common)),
        ("GPM", GPMTrainer, GPMConfig(str(output_dir / "GPM"), temperature=0.1, **{**common, **gpm_settings})),
    ):
        accuracies[name] = accuracy(trainer_class, model, config, rows)
        gc.collect()  # a trainer refers to itself, so its model would still be there when the next one comes
        torch.cuda.empty_cache()
    return accuracies


def print_table(results: dict[str, dict]) -> None:
    print("\n                       cycles       BT      GPM     paper, Table 1      BT      GPM")
    for number, (omit, (paper_bt, paper_gpm)) in enumerate(zip(ASPECTS, PAPER_TABLE, strict=True), start=1):
        result = results.get(omit)
        ours = f"{result['cycles']:6}   {result['BT']:6.1%}   {result['GPM']:6.1%}" if result else " " * 24
        print(f"{omit:21}  {ours}     Cyclic No. {number}     {paper_bt:5.1f}%   {paper_gpm:5.1f}%")
    print(
        "\nLeft: the aspect left out, and the accuracies measured here. Right: the paper's, for Gemma-2B-it on\n"
        "UltraFeedback; it does not say which aspect which number leaves out. A scalar reward gets 66.7% at most."
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of loading and saving; the trainers' own stay
    disable_progress_bars()
    warnings.simplefilter("ignore")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    model = args.model
    if model is None:
        model = str(args.output_dir / "decoder")
        save_tiny_decoder(Path(model), args.seed)
    settings, gpm_settings = (PAPER_SETTINGS, {}) if args.model else (TINY_SETTINGS, TINY_GPM_SETTINGS)
    settings = {**settings, "seed": args.seed}
    if args.epochs is not None:
        settings["num_train_epochs"] = args.epochs
    if args.learning_rate is not None:
        settings["learning_rate"] = args.learning_rate
    tokenizer = AutoTokenizer.from_pretrained(model)
    write_sub_datasets(args, is_conversational=tokenizer.chat_template is not None)
    results = {}
    for omit in args.omit:
        rows = load_cycles(args, omit, tokenizer, settings["max_length"])
        results[omit] = {"cycles": len(rows) // 3, **compare(model, settings, gpm_settings, rows, args.output_dir)}
    print_table(results)
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
