"""
A policy that learns online from a general preference model, in a minute on a CPU and without a download.

The policy is a tiny decoder that writes up to six of the letters A, B, C and D. A general preference model is trained
to prefer the text with more letters A, and GPO aligns the policy with it.

    python recipes/letters_policy/run.py --output_dir outputs/letters_policy
"""

import argparse
import random
import sys
import warnings
from pathlib import Path

from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback
from transformers.utils import logging

from gpm_trl import GPMConfig, GPMTrainer, GPOConfig, GPOTrainer
from gpm_trl.cli.quickstart import byte_tokenizer, save_tiny_decoder

PROMPT = "ABCD:"  # its letters are all that the policy's tokenizer has
SETTINGS = {
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
}


def more_as(count: int, seed: int) -> Dataset:
    """Pairs of texts of up to six letters, of which the one with more letters A is preferred."""
    draw = random.Random(seed)
    rows = []
    while len(rows) < count:
        texts = ["".join(draw.choices("ABCD", k=draw.randint(0, 6))) for _ in range(2)]
        chosen, rejected = sorted(texts, key=lambda text: -text.count("A"))
        if chosen.count("A") > rejected.count("A"):
            rows.append({"prompt": PROMPT, "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(rows)


def train_preference_model(directory: Path, decoder: Path, seed: int) -> None:
    """Train a general preference model that prefers more letters A, and save it."""
    settings = {**SETTINGS, "logging_strategy": "no", "num_train_epochs": 10, "learning_rate": 1e-3, "seed": seed}
    args = GPMConfig(str(directory), per_device_train_batch_size=32, **settings)
    trainer = GPMTrainer(model=str(decoder), args=args, train_dataset=more_as(400, seed))
    trainer.train()
    trainer.save_model()


def letters_a(completions: list[str], **kwargs) -> list[float]:
    """Letters A in each completion, for the table. Its weight is 0: the policy does not learn from it."""
    return [float(completion.count("A")) for completion in completions]


def align(directory: Path, policy: Path, preference_model: Path, seed: int) -> list[dict]:
    """Train the policy and save it to `directory`; returns the logs of its evaluations."""
    prompts = Dataset.from_list([{"prompt": PROMPT}] * 64)
    args = GPOConfig(
        str(directory),
        **SETTINGS,
        max_steps=150,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=10,
        eval_on_start=True,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        optim="adamw_torch",
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
    judges = [str(preference_model), letters_a]
    data = {"train_dataset": prompts, "eval_dataset": prompts.select(range(16))}
    trainer = GPOTrainer(model=str(policy), reward_funcs=judges, args=args, **data)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    return [entry for entry in trainer.state.log_history if "eval_win_rate" in entry]


def draw_curves(evaluations: list[dict], path: Path) -> None:
    """Draw the columns of the table over the steps, if matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:  # an extra
        return
    figure = Figure(figsize=(10, 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3), ("win_rate", "rewards/letters_a/mean", "objective/kl"), strict=True):
        axes.plot([entry["step"] for entry in evaluations], [entry[f"eval_{name}"] for entry in evaluations])
        axes.set(title=name, xlabel="step")
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/letters_policy"), help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, rows and samples (default: %(default)s)")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    warnings.simplefilter("ignore")
    names = ("letters decoder", "GPM-A", "initial policy")
    decoder, model, policy = (args.output_dir / name for name in names)
    save_tiny_decoder(decoder, args.seed)
    print("Training a GPM that prefers more letters A", flush=True)
    train_preference_model(model, decoder, args.seed)
    save_tiny_decoder(policy, args.seed, byte_tokenizer(PROMPT))
    print("Training a policy on what the GPM prefers", flush=True)
    evaluations = align(args.output_dir / "policy", policy, model, args.seed)
    print("\nA policy that writes up to six of the letters A, B, C, D; the GPM prefers more letters A\n")
    print("step   win rate against the initial policy   letters A   KL, nats")
    for entry in evaluations[::3]:
        rate = f"{entry['eval_win_rate']:.3f} +- {entry['eval_win_rate_ci']:.3f}"
        letters, kl = entry["eval_rewards/letters_a/mean"], entry["eval_objective/kl"]
        print(f"{entry['step']:4}   {rate:>35}   {letters:9.2f}   {kl:8.2f}")
    draw_curves(evaluations, args.output_dir / "gpo.png")
    if evaluations[-1]["eval_win_rate"] > evaluations[0]["eval_win_rate"] + 0.1:
        return 0
    print("\nThe policy did not learn what the GPM prefers: try another --seed.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
