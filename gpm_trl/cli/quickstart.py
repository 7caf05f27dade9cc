"""
`gpm-trl quickstart`: the point of the package in minutes, on a CPU and without a download.

Builds a tiny decoder and a byte-level tokenizer, trains a Bradley-Terry reward model and a general preference model on
the letters cycles (A > B > C > D > A), reloads the latter, and shows what each can express, in numbers and pictures.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, set_seed
from transformers.utils import logging
from trl import RewardConfig, RewardTrainer

from ..data import letter_cycles
from ..gpm import GPMConfig, GPMTrainer
from ..saving import check_writable
from ..scorer import PreferenceScorer
from .arguments import report_error

LENGTH = 4  # letters in a cycle


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
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    sizes |= {"initializer_range": 0.1}  # so that single letters move the hidden states of an untrained model
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = Qwen3Config(vocab_size=len(tokenizer), **sizes, **special)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def train(decoder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Train both models on the letters cycles; returns their accuracies on all comparisons."""
    rows = Dataset.from_list(list(letter_cycles(LENGTH)))
    rows.to_json(args.output_dir / "letters.jsonl")
    settings = {"num_train_epochs": args.epochs, "learning_rate": 1e-4, "lr_scheduler_type": "linear"}
    settings |= {"per_device_train_batch_size": 24, "per_device_eval_batch_size": 24, "seed": args.seed}
    settings |= {"gradient_checkpointing": False, "bf16": False, "use_cpu": True}
    settings |= {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": False}
    accuracies = {}
    classes = {"Bradley-Terry": (RewardTrainer, RewardConfig), "GPM": (GPMTrainer, GPMConfig)}
    for name, (trainer_class, config_class) in classes.items():
        print(f"Training the {name} model", flush=True)
        config = config_class(str(args.output_dir / name), **settings)
        trainer = trainer_class(model=str(decoder), args=config, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        trainer.save_model()
        accuracies[name] = trainer.evaluate()["eval_accuracy"]
    return accuracies


def show(directory: Path, output_dir: Path) -> str:
    """Draw the first cycle; returns P(A > B), P(B > C), P(C > D) and P(D > A) under the saved model."""
    scorer = PreferenceScorer.from_pretrained(directory, device="cpu")
    rows = list(letter_cycles(LENGTH))[:LENGTH]
    prompt, letters = rows[0]["prompt"], [row["chosen"] for row in rows]
    probabilities = scorer.rank(prompt, letters).probabilities
    try:
        from ..plots import plot_embedding_discs, plot_preference_heatmap, save_figure

        ((embeddings, scales),) = scorer.embed([prompt], [letters])
        save_figure(plot_embedding_discs(embeddings, scales, letters), output_dir / "embedding_discs.png")
        save_figure(plot_preference_heatmap(probabilities, letters), output_dir / "preference_matrix.png")
    except ImportError as error:  # matplotlib is an extra
        print(f"\nNo pictures: {error}")
    pairs = [(index, (index + 1) % LENGTH) for index in range(LENGTH)]
    return "   ".join(f"P({letters[i]} > {letters[j]}) = {probabilities[i, j]:.3f}" for i, j in pairs)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpm-trl quickstart", description=__doc__.split("\n\n")[1])
    parser.add_argument("--output_dir", type=Path, default=Path("quickstart"), help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=300, help="passes over all comparisons (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Train, print and draw; returns 0, or 1 if the models did not learn what they must."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        check_writable(args.output_dir)
    except OSError as error:
        return report_error(parser.prog, error)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    warnings.simplefilter("ignore")
    decoder = args.output_dir / "decoder"
    save_tiny_decoder(decoder, args.seed)
    accuracies = train(decoder, args)
    probabilities = show(args.output_dir / "GPM", args.output_dir)
    print(f"\nSix cycles of {LENGTH} letters, A > B > C > D > A and so on, 24 comparisons\n")
    print("model            accuracy   best possible")
    print(f"Bradley-Terry    {accuracies['Bradley-Terry']:8.1%}             75%")
    print(f"GPM              {accuracies['GPM']:8.1%}            100%\n")
    print(f"The GPM, saved and reloaded:  {probabilities}")
    print(f"\nThe models, the rows they were trained on and pictures are in {args.output_dir}.")
    if accuracies["GPM"] == 1 and accuracies["Bradley-Terry"] <= 0.75:
        return 0
    print("\nThe GPM did not learn every comparison: try more --epochs.", file=sys.stderr)
    return 1
