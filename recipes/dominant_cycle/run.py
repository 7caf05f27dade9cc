"""
Who finds the dominant response, who the cycle, and when: one response that beats all others, which are a cycle.

Trains a Bradley-Terry model (BT), general preference models (GPM) and hybrid reward-cyclic models (HRC) from the same
decoder on the same prompts, batches and steps, each with the learning rate of a grid that is best for it, and reports
accuracy against steps, of the comparisons with the dominant response and of those in the cycle, apart.

    python recipes/dominant_cycle/run.py --output_dir outputs/dominant_cycle
    python recipes/dominant_cycle/run.py --model HuggingFaceTB/SmolLM2-135M --num_prompts 64 --num_steps 60 ...

The first line takes minutes on two CPU cores: tiny decoders from scratch. What is trained already, with the same
settings, is read from `output_dir/runs`.
"""

import argparse
import itertools
import json
import random
import re
import statistics
import warnings
from pathlib import Path

import matplotlib
import numpy as np
from datasets import Dataset, disable_progress_bars
from matplotlib.figure import Figure
from transformers import EvalPrediction, PrinterCallback
from transformers.utils import logging

from gpm_trl import GPMConfig, GPMTrainer
from gpm_trl.cli.quickstart import save_tiny_decoder
from gpm_trl.evaluation.report import markdown_table
from gpm_trl.plots import STYLE
from gpm_trl.saving import write_whole

KINDS = {
    "BT": {"embedding_dim": 0, "reward_dim": 1},
    "GPM 2": {"embedding_dim": 2},
    "GPM 4": {"embedding_dim": 4},
    "GPM 6": {"embedding_dim": 6},
    "HRC 2+1": {"embedding_dim": 2, "reward_dim": 1},
    "HRC 4+1": {"embedding_dim": 4, "reward_dim": 1},
    "HRC 2+1, any length": {"embedding_dim": 2, "reward_dim": 1, "normalize_embeddings": False},
}
SPLITS = ("train", "validation", "test")
PARTS = ("dominant", "cycle")
COLOURS = {"dominant": "#0072b2", "cycle": "#d55e00"}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/dominant_cycle"), help="(%(default)s)")
    parser.add_argument("--model", help="a causal LM, Hub id or directory (default: a tiny decoder from scratch)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="models (default: all)")
    parser.add_argument("--cycle_length", type=int, default=3, help="n, from 3 to 25 (default: %(default)s)")
    parser.add_argument("--num_prompts", type=int, default=256, help="to train on (default: %(default)s)")
    parser.add_argument("--num_unseen", type=int, default=48, help="of each other split (default: %(default)s)")
    parser.add_argument("--num_steps", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--eval_steps", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts a step (default: %(default)s)")
    parser.add_argument(
        "--learning_rates",
        type=float,
        nargs="+",
        default=[3e-4, 1e-3, 3e-3],
        help="the grid; each model gets the one with the best validation accuracy (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of decoder, prompts and order")
    args = parser.parse_args(argv)
    if not 3 <= args.cycle_length <= 25:
        parser.error(f"--cycle_length is {args.cycle_length}: from 3 to 25 letters beside the dominant one are there.")
    return args


def draw_rows(count: int, length: int, seed: int) -> list[dict]:
    """
    Distinct prompts that say who is who among the responses, the letters A, B, C, ...: of `47 C+:`, C beats all, and
    the others beat one another in the order of the alphabet, the last the first; of `47 C-:`, the other way round.
    The number says nothing. So a role is read from prompt and response together, and from neither alone.
    """
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: length + 1]
    prompts = list(itertools.product(range(10, 100), letters, "+-"))
    rows = []
    for number, best, sign in random.Random(seed).sample(prompts, count):
        cycle = [letter for letter in letters if letter != best][:: 1 if sign == "+" else -1]
        pairs = [(best, letter) for letter in cycle] + list(zip(cycle, cycle[1:] + cycle[:1], strict=True))
        comparisons = [[letters.index(winner), letters.index(loser)] for winner, loser in pairs]
        rows.append({"prompt": f"{number} {best}{sign}:", "responses": [*letters], "comparisons": comparisons})
    return rows


def accuracies(prediction: EvalPrediction) -> dict[str, float]:
    """Of the two halves of each prompt's comparisons, see [`draw_rows`]; equal scores are no hit, and are counted."""
    halves = dict(zip(PARTS, np.split(prediction.predictions, 2, axis=1), strict=True))
    parts = {part: float((log_odds > 0).mean()) for part, log_odds in halves.items()}
    return {**parts, "ties": float((prediction.predictions == 0).mean())}


def train(kind: str, learning_rate: float, seed: int, args: argparse.Namespace) -> list[dict]:
    """Accuracies of a model before training and every `eval_steps` steps: `step` and `split_part` for each."""
    model = args.model
    if model is None:
        model = str(args.output_dir / f"decoder-{seed}")
        save_tiny_decoder(Path(model), seed)
    rows = draw_rows(args.num_prompts + 2 * args.num_unseen, args.cycle_length, seed)
    unseen, train_rows = rows[: 2 * args.num_unseen], rows[2 * args.num_unseen :]
    evaluated = (train_rows[: args.num_unseen], unseen[: args.num_unseen], unseen[args.num_unseen :])
    config = GPMConfig(
        str(args.output_dir / "trainer"),
        **KINDS[kind],
        max_steps=args.num_steps,
        learning_rate=learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=0.05,
        adam_beta2=0.95,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.num_unseen,
        eval_strategy="steps",
        eval_steps=args.eval_steps,
        eval_on_start=True,
        gradient_checkpointing=False,
        bf16=False,
        shared_prefix=args.model is not None,  # of tiny models, padded rows are quicker
        use_cpu=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    trainer = GPMTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset={split: Dataset.from_list(rows) for split, rows in zip(SPLITS, evaluated, strict=True)},
        compute_metrics=accuracies,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    curve: dict[int, dict] = {}
    for entry in trainer.state.log_history:
        metrics = {name.removeprefix("eval_"): value for name, value in entry.items()}
        named = {f"{split}_{part}" for split in SPLITS for part in (*PARTS, "ties")}
        found = {name: metrics[name] for name in named & set(metrics)}
        curve.setdefault(entry["step"], {"step": entry["step"]}).update(found)
    return [point for point in curve.values() if len(point) > 1]


def train_or_read(kind: str, learning_rate: float, seed: int, args: argparse.Namespace) -> list[dict]:
    path = args.output_dir / "runs" / f"{re.sub('[ ,]+', '_', kind)}-{learning_rate:g}-{seed}.json"
    names = ("model", "cycle_length", "num_prompts", "num_unseen", "num_steps", "eval_steps", "batch_size")
    settings = {name: getattr(args, name) for name in names}
    if path.exists():
        saved = json.loads(path.read_text())
        if saved["settings"] == settings:
            return saved["curve"]
    print(f"{kind}, learning rate {learning_rate:g}, seed {seed}", flush=True)
    curve = train(kind, learning_rate, seed, args)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"settings": settings, "curve": curve}))
    return curve


def overall(point: dict, split: str) -> float:
    """Accuracy on all comparisons: there are as many in the cycle as with the dominant response."""
    return statistics.mean(point[f"{split}_{part}"] for part in PARTS)


def first_step(curve: list[dict], name: str, at_least: float = 0.95) -> int | None:
    """The first step from which on the accuracy stays there."""
    below = [index for index, point in enumerate(curve) if point[name] < at_least]
    after = below[-1] + 1 if below else 0
    return curve[after]["step"] if after < len(curve) else None


def compare(args: argparse.Namespace) -> dict[str, dict]:
    """For each kind: the learning rate that the first seed's validation chose, what from, and the seeds' curves."""
    first, results = args.seeds[0], {}
    for kind in args.kinds:
        curves = {rate: train_or_read(kind, rate, first, args) for rate in args.learning_rates}
        # The mean over the curve, so that of two that end alike the quicker is chosen.
        scores = {
            f"{rate:g}": statistics.mean(overall(point, "validation") for point in curve)
            for rate, curve in curves.items()
        }
        results[kind] = {"learning_rate": float(max(scores, key=scores.get)), "validation": scores}
    for kind, result in results.items():
        result["curves"] = [train_or_read(kind, result["learning_rate"], seed, args) for seed in args.seeds]
    return results


def table(results: dict[str, dict]) -> str:
    """Markdown: accuracies at the end, the mean over seeds and their range, and the steps when parts are found."""

    def values(curves: list[dict], name: str) -> str:
        ends = [100 * curve[-1][name] for curve in curves]
        return f"{statistics.mean(ends):.1f} ({min(ends):.1f} to {max(ends):.1f})"

    def steps(curves: list[dict], part: str) -> str:
        found = [first_step(curve, f"test_{part}") for curve in curves]
        return ", ".join("-" if step is None else str(step) for step in found)

    names = [f"{part}, {where}" for where in ("trained on", "unseen") for part in PARTS]
    lines = [["model", "learning rate", *names, *(f"{part} found at step" for part in PARTS)]]
    for kind, result in results.items():
        curves = result["curves"]
        ends = [values(curves, f"{split}_{part}") for split in ("train", "test") for part in PARTS]
        lines.append([kind, f"{result['learning_rate']:g}", *ends, *(steps(curves, part) for part in PARTS)])
    return markdown_table(lines)


def draw(results: dict[str, dict], path: Path) -> None:
    """Accuracy on unseen prompts against steps, a panel a kind, a thin line a seed and a thick one their mean."""
    columns = min(4, len(results))
    rows = -(-len(results) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1 + 2.4 * columns, 0.4 + 2.1 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for axes in panels.flat[len(results) :]:
            axes.set_axis_off()
        for axes, (kind, result) in zip(panels.flat, results.items(), strict=False):
            steps = [point["step"] for point in result["curves"][0]]
            for part in PARTS:
                curves = np.array([[100 * point[f"test_{part}"] for point in curve] for curve in result["curves"]])
                axes.plot(steps, curves.T, color=COLOURS[part], linewidth=0.6, alpha=0.5)
                axes.plot(steps, curves.mean(0), color=COLOURS[part], linewidth=1.8, label=part)
            axes.axhline(50, color="#999999", linewidth=0.6, linestyle=":")
            axes.set(title=kind, ylim=(0, 104))
        figure.supylabel("accuracy on unseen prompts, %", fontsize=9)
        figure.supxlabel("step", fontsize=9)
        panels[0, 0].legend(loc="lower right")
        figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    warnings.simplefilter("ignore")
    results = compare(args)
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=1))
    draw(results, args.output_dir / "dominant_cycle.png")
    print(
        f"\n{table(results)}\n\nAccuracies in %, at the end: mean over seeds (and range). Found: the step from which"
    )
    print("on 95% of the unseen comparisons are right, for each seed. Chance is 50%. The picture and all numbers")
    print(f"are in {args.output_dir}.")


if __name__ == "__main__":
    main()
