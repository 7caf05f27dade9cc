"""
A reward hack that GPRL's drift monitor sees, in two minutes on a CPU and without a download.

The policy is a tiny decoder that writes up to six of the letters A, B, C and D. One block of the judge rewards letters
A, the other different letters; the first weighs 0.65 and the second 0.35. The same training without the monitor, with
it, and with a monitor of what is left after the normalisation.

    python recipes/drift_monitor/run.py --output_dir outputs/drift_monitor
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import LlamaConfig, PrinterCallback
from transformers.utils import logging

from gpm_trl import GPMForPreference, GPMModelConfig, GPRLConfig, GPRLTrainer, PreferenceReward
from gpm_trl.cli.quickstart import byte_tokenizer, save_tiny_decoder
from gpm_trl.gpo.reward import EmbeddedBatch

PROMPT = "ABCD:"  # its letters are all that the policy's tokenizer has
RUNS = {
    "no monitor": {"drift_threshold": math.inf},
    "monitor of the scores": {},
    "monitor of the advantages": {"drift_shares": "weighted"},
}
SETTINGS = {
    "max_steps": 60,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch",
    "num_generations": 8,
    "per_device_train_batch_size": 64,
    "max_completion_length": 6,
    "reward_weights": [1.0, 0.0, 0.0],
    "drift_baseline_steps": 4,
    "drift_threshold": 0.05,
    "drift_weight_speed": 1.25,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def letter(completions: list[str], **columns) -> list[float]:
    """How much of six letters is A. Its weight is 0: the policy does not learn from it."""
    return [text.count("A") / 6 for text in completions]


def different(completions: list[str], **columns) -> list[float]:
    """How many different letters there are. Its weight is 0, too."""
    return [float(len(set(text))) for text in completions]


class PlantedReward(PreferenceReward):
    """A judge by hand: its first block rewards letters A, its second different letters."""

    def __init__(self):
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        decoder = LlamaConfig(**sizes, vocab_size=300, pad_token_id=0)  # it reads nothing
        config = GPMModelConfig(text_config=decoder, embedding_dim=4, temperature=1.0)
        super().__init__(GPMForPreference(config), byte_tokenizer())
        self.__name__ = "planted"

    def _embed(self, prompts, completions, columns):
        rewards = zip(letter(completions), different(completions), strict=True)
        rows = torch.tensor([[6 * first, 1.0, second, 1.0] for first, second in rewards])
        scales = torch.tensor([[0.65, 0.35]] * len(rows))
        return EmbeddedBatch(rows, scales, [prompt.encode() for prompt in prompts], slice(0, len(rows)))


def make_trainer(directory: Path, seed: int = 0, **options: Any) -> GPRLTrainer:
    """A trainer of a new policy, the same for one seed."""
    save_tiny_decoder(directory / "policy", seed, byte_tokenizer(PROMPT))
    args = GPRLConfig(str(directory / "run"), **SETTINGS | options, seed=seed)
    functions: list[Callable] = [PlantedReward(), letter, different]
    return GPRLTrainer(str(directory / "policy"), functions, args, Dataset.from_list([{"prompt": PROMPT}] * 64))


def draw(logs: dict[str, list[dict]], path: Path) -> None:
    """Draw the columns of the table over the generations, if matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:  # an extra
        return
    figure = Figure(figsize=(11, 3), layout="constrained")
    titles = {"rewards/letter/mean": "share of the letter A", "drift/kl": "drift D(t), nats"}
    titles |= {"drift/weight_1": "m of the letter's block"}
    axes = figure.subplots(1, 3)
    for plot, (name, title) in zip(axes, titles.items(), strict=True):
        for run, entries in logs.items():
            known = [entry for entry in entries if name in entry]
            plot.plot([entry["step"] for entry in known], [entry[name] for entry in known], label=run)
        plot.set(title=title, xlabel="generation", ylim=(0, None))
    axes[0].legend(fontsize="small")
    axes[1].axhline(SETTINGS["drift_threshold"], color="gray", linestyle=":")
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/drift_monitor"), help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and samples (default: %(default)s)")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    warnings.simplefilter("ignore")
    logs, last = {}, {}
    for name, options in RUNS.items():
        trainer = make_trainer(args.output_dir, args.seed, **options)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        logs[name] = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = ("rewards/letter/mean", "rewards/different/mean", "drift/kl", "drift/share_1", "drift/weight_1", "beta")
    for name, entries in logs.items():
        print(f"\n{name}\n generation   letter A   different   D, nats   share_1      m_1     beta")
        for entry in [*entries[4::10], entries[-1]]:
            values = [f"{entry.get(column, math.nan):9.3f}" for column in names]
            print(f"{entry['step']:11}  {' '.join(values)}")
        last[name] = sum(entry["rewards/letter/mean"] for entry in entries[-20:]) / 20
    means = ", ".join(f"{value:.3f} ({run})" for run, value in last.items())
    print(f"\nletter A, mean of the last 20 generations: {means}")
    draw(logs, args.output_dir / "drift_monitor.png")
    if last["monitor of the scores"] < last["no monitor"] - 0.2:
        return 0
    print("\nThe monitor did not hold the hack back: try another --seed.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
