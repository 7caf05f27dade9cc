"""
`gpm-trl quickstart`: the point of the package in minutes, on a CPU and without a download.

Builds a tiny decoder and a byte-level tokenizer, trains a Bradley-Terry reward model ([`~trl.RewardTrainer`]) and a
general preference model on the letters cycles (A > B > C > D > A), reloads the latter, and shows what each can
express, in numbers and pictures. With `--stage gpo`, a policy learns online from a general preference model that
prefers texts with more letters A.
"""

import argparse
import random
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen3Config,
    set_seed,
)
from transformers.utils import logging
from trl import RewardConfig, RewardTrainer

from ..data import letter_cycles
from ..gpm import GPMConfig, GPMTrainer
from ..gpo import GPOConfig, GPOTrainer
from ..scorer import PreferenceScorer

LENGTH = 4  # letters in a cycle
ALPHABET = "ABCD:"  # of the policy
SETTINGS = {
    "gradient_checkpointing": False,
    "bf16": False,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
}


def byte_tokenizer(alphabet: Sequence[str] | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, or of some letters, with BOS, EOS and padding tokens."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if alphabet is None else alphabet
    vocabulary = {token: index for index, token in enumerate([*special.values(), *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_tiny_decoder(directory: Path, seed: int, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
    """Write a causal LM of about 0.1 million random parameters, and its tokenizer, by default that of bytes."""
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    set_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.1,  # so that single letters move the hidden states of an untrained model
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command's arguments."""
    parser = argparse.ArgumentParser(prog="gpm-trl quickstart", description=__doc__.split("\n\n")[1])
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("quickstart"),
        help="for the models, the rows and the pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--stage",
        choices=("gpm", "gpo", "all"),
        default="gpm",
        help="gpm: the preference models; gpo: a policy that learns from one (default: %(default)s)",
    )
    parser.add_argument("--epochs", type=int, default=300, help="passes over all comparisons (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default: %(default)s)")
    return parser


def train(decoder: Path, output_dir: Path, epochs: int, seed: int) -> dict[str, float]:
    """Train both models on the letters cycles; returns their accuracies on all comparisons."""
    rows = Dataset.from_list(list(letter_cycles(LENGTH)))
    rows.to_json(output_dir / "letters.jsonl")
    settings = {
        **SETTINGS,
        "num_train_epochs": epochs,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 24,
        "per_device_eval_batch_size": 24,
        "seed": seed,
    }
    accuracies = {}
    for name, trainer_class, config_class in (
        ("Bradley-Terry", RewardTrainer, RewardConfig),
        ("GPM", GPMTrainer, GPMConfig),
    ):
        print(f"Training the {name} model", flush=True)
        args = config_class(str(output_dir / name), **settings)
        trainer = trainer_class(model=str(decoder), args=args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        trainer.save_model()
        accuracies[name] = trainer.evaluate()["eval_accuracy"]
    return accuracies


def show(directory: Path, output_dir: Path) -> dict[str, float]:
    """Draw the first cycle; returns P(A > B), P(B > C), P(C > D) and P(D > A) under the saved model."""
    scorer = PreferenceScorer.from_pretrained(directory, device="cpu")
    rows = list(letter_cycles(LENGTH))[:LENGTH]
    prompt, letters = rows[0]["prompt"], [row["chosen"] for row in rows]
    probabilities = scorer.rank(prompt, letters).probabilities
    try:
        from ..plots import plot_embedding_discs, plot_preference_heatmap, save_figure
    except ImportError as error:  # matplotlib is an extra
        print(f"\nNo pictures: {error}")
    else:
        ((embeddings, scales),) = scorer.embed([prompt], [letters])
        save_figure(plot_embedding_discs(embeddings, scales, letters), output_dir / "embedding_discs.png")
        save_figure(plot_preference_heatmap(probabilities, letters), output_dir / "preference_matrix.png")
    return {
        f"P({letters[i]} > {letters[j]})": probabilities[i, j].item()
        for i, j in ((index, (index + 1) % LENGTH) for index in range(LENGTH))
    }


def more_as(count: int, seed: int) -> Dataset:
    """Pairs of texts of up to six letters, of which the one with more letters A is preferred."""
    draw = random.Random(seed)
    rows = []
    while len(rows) < count:
        texts = ["".join(draw.choices("ABCD", k=draw.randint(0, 6))) for _ in range(2)]
        chosen, rejected = sorted(texts, key=lambda text: -text.count("A"))
        if chosen.count("A") > rejected.count("A"):
            rows.append({"prompt": "ABCD:", "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(rows)


def align(decoder: Path, output_dir: Path, seed: int) -> list[dict[str, Any]]:
    """Train a GPM on texts with more and fewer letters A, and a policy on what it prefers; returns the log history."""
    print("Training a GPM that prefers more letters A", flush=True)
    args = GPMConfig(
        str(output_dir / "GPM-A"),
        **SETTINGS,
        num_train_epochs=10,
        learning_rate=1e-3,
        per_device_train_batch_size=32,
        seed=seed,
    )
    trainer = GPMTrainer(model=str(decoder), args=args, train_dataset=more_as(400, seed))
    trainer.train()
    trainer.save_model()
    save_tiny_decoder(output_dir / "initial policy", seed, byte_tokenizer(ALPHABET))
    print("Training a policy on what the GPM prefers", flush=True)
    prompts = Dataset.from_list([{"prompt": "ABCD:"}] * 64)
    args = GPOConfig(
        str(output_dir / "policy"),
        **SETTINGS | {"logging_strategy": "steps"},
        max_steps=150,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=10,
        eval_on_start=True,
        learning_rate=3e-4,
        optim="adamw_torch",
        lr_scheduler_type="constant",
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        num_generations=8,
        max_completion_length=6,
        temperature=1.0,
        top_p=1.0,
        beta=[0.02],
        reward_weights=[1.0, 0.0],
        sync_ref_model=False,  # so that the win rate is against the initial policy
        seed=seed,
    )
    trainer = GPOTrainer(
        model=str(output_dir / "initial policy"),
        reward_funcs=[str(output_dir / "GPM-A"), letters_a],
        args=args,
        train_dataset=prompts,
        eval_dataset=prompts.select(range(16)),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


def letters_a(completions: list[str], **kwargs) -> list[float]:
    """Letters A in each completion: nothing that the policy learns from, its weight is 0."""
    return [float(completion.count("A")) for completion in completions]


def main(argv: list[str] | None = None) -> int:
    """Run the stages; returns 0, or 1 if the models did not learn what they must."""
    args = make_parser().parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of loading and saving; the trainers' own stay
    disable_progress_bars()
    warnings.simplefilter("ignore")
    save_tiny_decoder(args.output_dir / "decoder", args.seed)
    stages = {"gpm": [compare], "gpo": [improve], "all": [compare, improve]}[args.stage]
    learned = [stage(args.output_dir, args) for stage in stages]
    print(f"\nThe models, the rows they were trained on and pictures are in {args.output_dir}.")
    return 0 if all(learned) else 1


def compare(output_dir: Path, args: argparse.Namespace) -> bool:
    """The stage `gpm`: both preference models; returns whether they separated as they must."""
    accuracies = train(output_dir / "decoder", output_dir, args.epochs, args.seed)
    probabilities = show(output_dir / "GPM", output_dir)
    best_scalar = (LENGTH - 1) / LENGTH
    print(
        f"\nSix cycles of {LENGTH} letters, A > B > C > D > A and so on, {len(list(letter_cycles(LENGTH)))} "
        "comparisons\n"
    )
    print("model            accuracy   best possible")
    print(f"Bradley-Terry    {accuracies['Bradley-Terry']:8.1%}   {best_scalar:13.0%}")
    print(f"GPM              {accuracies['GPM']:8.1%}   {1:13.0%}\n")
    print(
        "The GPM, saved and reloaded:  " + "   ".join(f"{name} = {value:.3f}" for name, value in probabilities.items())
    )
    separated = accuracies["GPM"] == 1 and accuracies["Bradley-Terry"] <= best_scalar
    if not separated:
        print("\nThe GPM did not learn every comparison: try more --epochs.", file=sys.stderr)
    return separated


def improve(output_dir: Path, args: argparse.Namespace) -> bool:
    """The stage `gpo`: a policy that learns; returns whether its win rate rose."""
    history = align(output_dir / "decoder", output_dir, args.seed)
    evaluations = [entry for entry in history if "eval_win_rate" in entry]
    print("\nA policy that writes up to six of the letters A, B, C, D; the GPM prefers more letters A\n")
    print("step   win rate against the initial policy   letters A   KL, nats")
    for entry in evaluations[::3]:
        rate = f"{entry['eval_win_rate']:.3f} +- {entry['eval_win_rate_ci']:.3f}"
        letters, kl = entry["eval_rewards/letters_a/mean"], entry["eval_objective/kl"]
        print(f"{entry['step']:4}   {rate:>35}   {letters:9.2f}   {kl:8.2f}")
    try:
        from ..plots import plot_learning_curves, save_figure
    except ImportError as error:  # matplotlib is an extra
        print(f"\nNo picture: {error}")
    else:
        metrics = ["win_rate", "rewards/letters_a/mean", "objective/kl"]
        save_figure(plot_learning_curves({"GPO": evaluations}, metrics), output_dir / "gpo.png")
    rose = evaluations[-1]["eval_win_rate"] > evaluations[0]["eval_win_rate"] + 0.1
    if not rose:
        print("\nThe policy did not learn what the GPM prefers: try another --seed.", file=sys.stderr)
    return rose


if __name__ == "__main__":
    sys.exit(main())
