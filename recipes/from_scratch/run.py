"""
A real run that needs no download and no GPU: a decoder and its tokenizer from scratch, on a file of preference rows.

Splits the rows by prompt, trains a BPE tokenizer on the training prompts' texts, then a general preference model
(`GPMTrainer`) and a Bradley-Terry reward model (`trl.RewardTrainer`) from the same random decoder, and prints their
accuracy and Brier score on the unseen prompts beside the heuristic that takes the longer response.

    python recipes/from_scratch/run.py --data rows.jsonl.gz --output_dir outputs/from_scratch

Rows: `prompt`, `chosen` and `rejected` as messages, and `label`, the probability that `chosen` is preferred.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, set_seed
from trl import RewardConfig, RewardTrainer

from gpm_trl import GPMConfig, GPMTrainer

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}:\n{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="JSON Lines, maybe gzipped")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test_fraction", type=float, default=0.2, help="of the prompts (default: %(default)s)")
    parser.add_argument("--max_length", type=int, default=1024, help="longer rows are left out (default: %(default)s)")
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_layers", type=int, default=2)
    parser.add_argument("--embedding_dim", type=int, default=6)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    return parser.parse_args()


def text_of(messages: list[dict]) -> str:
    return messages[-1]["content"]


def split_by_prompt(rows: Dataset, test_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    prompts = sorted({json.dumps(prompt) for prompt in rows["prompt"]})
    random.Random(seed).shuffle(prompts)
    test_prompts = set(prompts[: round(test_fraction * len(prompts))])
    is_test = [json.dumps(prompt) in test_prompts for prompt in rows["prompt"]]
    indices = range(len(rows))
    return rows.select([i for i in indices if not is_test[i]]), rows.select([i for i in indices if is_test[i]])


def train_tokenizer(rows: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text_of(row[column]) for row in rows for column in ("prompt", "chosen", "rejected"))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **SPECIAL_TOKENS)


def save_decoder(directory: Path, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
    set_seed(args.seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=args.hidden_size // 4,
        max_position_embeddings=args.max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def usable(row: dict, tokenizer: PreTrainedTokenizerFast, max_length: int) -> bool:
    """Whether both trainers keep the row, so that they see the same ones."""
    if row["chosen"] == row["rejected"]:
        return False
    conversations = (row["prompt"] + row[column] for column in ("chosen", "rejected"))
    return all(len(tokenizer.apply_chat_template(c)["input_ids"]) < max_length for c in conversations)


def log_odds_of_gpm(trainer: GPMTrainer) -> list[float]:
    """One number a row of the evaluation set, in its order: rows of a prompt are contiguous, and so are groups."""
    values = []
    for batch in trainer.get_eval_dataloader():
        _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        values += outputs["log_odds"][batch["labels"] != -100].tolist()
    return values


def log_odds_of_bt(trainer: RewardTrainer) -> list[float]:
    values = []
    for batch in trainer.get_eval_dataloader():
        chosen, rejected = trainer.model(**batch).logits.squeeze(-1).chunk(2)
        values += (chosen - rejected).tolist()
    return values


def train(name: str, decoder: Path, train_rows: Dataset, test_rows: Dataset, args: argparse.Namespace) -> dict:
    is_gpm = name == "GPM"
    settings = {
        "num_train_epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "max_length": args.max_length,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 20,
        "save_strategy": "no",
        "report_to": "none",
        "seed": args.seed,
        # 4 prompts of 6 comparisons each, 24 comparisons a step for both.
        "per_device_train_batch_size": 4 if is_gpm else 24,
        "per_device_eval_batch_size": 4 if is_gpm else 24,
    }
    output_dir = str(args.output_dir / name)
    if is_gpm:
        trainer_class, config = (
            GPMTrainer,
            GPMConfig(output_dir, embedding_dim=args.embedding_dim, group_by_prompt=True, **settings),
        )
    else:
        trainer_class, config = RewardTrainer, RewardConfig(output_dir, **settings)
    trainer = trainer_class(model=str(decoder), args=config, train_dataset=train_rows, eval_dataset=test_rows)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.save_model()
    trainer.model.eval()
    with torch.no_grad():
        log_odds = (log_odds_of_gpm if is_gpm else log_odds_of_bt)(trainer)
    train_accuracy = [entry["accuracy"] for entry in trainer.state.log_history if "accuracy" in entry][-1]
    return {"log_odds": log_odds, "seconds": seconds, "train_accuracy": train_accuracy}


def confidence_interval(values: list[float], prompts: list[str], seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `values`, drawing prompts rather than rows."""
    by_prompt: dict[str, list[float]] = {}
    for value, prompt in zip(values, prompts, strict=True):
        by_prompt.setdefault(prompt, []).append(value)
    draw = random.Random(seed)
    groups = list(by_prompt.values())
    means = []
    for _ in range(2000):
        sample = [value for group in draw.choices(groups, k=len(groups)) for value in group]
        means.append(sum(sample) / len(sample))
    means.sort()
    return means[49], means[-50]


def report(name: str, hits: list[float], test_rows: Dataset, args: argparse.Namespace, rest: str = "") -> dict:
    low, high = confidence_interval(hits, [json.dumps(prompt) for prompt in test_rows["prompt"]], args.seed)
    accuracy = sum(hits) / len(hits)
    print(f"{name:16} {accuracy:8.1%}   [{low:.1%}, {high:.1%}]{rest}")
    return {"accuracy": accuracy, "interval": [low, high]}


def main() -> None:
    args = parse_arguments()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = load_dataset("json", data_files=str(args.data), split="train")
    train_rows, test_rows = split_by_prompt(rows, args.test_fraction, args.seed)
    tokenizer = train_tokenizer(train_rows, args.vocab_size)
    limits = {"tokenizer": tokenizer, "max_length": args.max_length}
    sizes = len(train_rows), len(test_rows)
    train_rows, test_rows = (part.filter(usable, fn_kwargs=limits) for part in (train_rows, test_rows))
    print(f"Training rows: {len(train_rows)} of {sizes[0]}; test rows: {len(test_rows)} of {sizes[1]}")
    decoder = args.output_dir / "decoder"
    save_decoder(decoder, tokenizer, args)
    runs = {name: train(name, decoder, train_rows, test_rows, args) for name in ("GPM", "Bradley-Terry")}

    labels = test_rows["label"]
    print("\nmodel            accuracy   95 % interval    Brier (winner)   Brier (label)   train accuracy   seconds")
    results = {}
    longer = [len(text_of(row["chosen"])) > len(text_of(row["rejected"])) for row in test_rows]
    results["longer"] = report("longer response", [float(hit) for hit in longer], test_rows, args)
    for name, run in runs.items():
        probabilities = [1 / (1 + math.exp(-value)) for value in run["log_odds"]]
        winner = sum((p - 1) ** 2 for p in probabilities) / len(probabilities)
        label = sum((p - q) ** 2 for p, q in zip(probabilities, labels, strict=True)) / len(probabilities)
        rest = f"   {winner:14.4f}   {label:13.4f}   {run['train_accuracy']:14.1%}   {run['seconds']:7.0f}"
        hits = [float(value > 0) for value in run["log_odds"]]
        results[name] = report(name, hits, test_rows, args, rest)
        results[name] |= {"brier_winner": winner, "brier_label": label, "train_accuracy": run["train_accuracy"]}
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
