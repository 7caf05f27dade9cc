"""
The study: preference models of four kinds, and policies aligned by them. data.py comes before, report.py after.

    python recipes/smollm2-135m/study.py models --output_dir outputs/smollm2-135m
    python recipes/smollm2-135m/study.py policies --output_dir outputs/smollm2-135m

Each run is a directory, whole once it has `done.json`. What is there is not made again, and a run that was killed goes
on from its last checkpoint, if the same command is given.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gpm_trl.cli.arguments import run_command
from gpm_trl.saving import write_whole

HERE = Path(__file__).parent
# The kinds of models: a recipe, and what is changed in it.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bt": ("bt.yaml", {}),
    "bt_gated": ("bt.yaml", {"reward_dim": 6}),
    "gpm": ("gpm.yaml", {}),
    "hrc": ("hrc.yaml", {}),
}

# The policies: what trains them, the kind of their judge, and what is changed in the recipe.
GPO, GPRL, GRPO = ("-m", "gpm_trl.cli.gpo"), ("-m", "gpm_trl.cli.gprl"), (str(HERE / "grpo.py"),)
POLICIES: dict[str, tuple[tuple[str, ...], str, dict[str, Any]]] = {
    "gpo": (GPO, "gpm", {}),
    "gprl": (GPRL, "gpm", {}),
    "grpo_bt": (GRPO, "bt_gated", {}),
    "gpo_bt": (GPO, "bt_gated", {}),
    "dsppo": (GPO, "hrc", {"loss_type": "dsppo", "sync_ref_model": True, "ref_model_sync_steps": 20}),
    "sppo": (GPO, "gpm", {"loss_type": "sppo"}),
    "ln_gpo": (GPO, "gpm", {"length_normalize": "true"}),
}


@dataclass(frozen=True)
class Plan:
    """How much is run. The same grids for each kind, and for each policy the setting that GPO's grid chose."""

    kinds: tuple[str, ...] = tuple(KINDS)
    rates: tuple[str, ...] = ("1e-3", "3e-4")
    seeds: tuple[int, ...] = (0, 1, 2)
    policies: tuple[str, ...] = tuple(POLICIES)
    policy_grid: tuple[tuple[str, float], ...] = (("1e-4", 0.1), ("5e-4", 0.1), ("1e-4", 0.02), ("5e-4", 0.02))
    policy_steps: int = 60
    policy_prompts: int = 96  # that they answer in the report

    @property
    def steps_shown(self) -> list[int]:
        """Steps of which the report has a policy's answers."""
        return [self.policy_steps * third // 3 for third in (1, 2, 3)]


SMALL = Plan(
    kinds=("bt_gated", "gpm"),
    rates=("1e-3",),
    seeds=(0,),
    policies=("gpo", "grpo_bt"),
    policy_grid=(("5e-4", 0.1),),
    policy_steps=6,
    policy_prompts=8,
)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("study.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("step", choices=("models", "policies"))
    add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What all steps take."""
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/smollm2-135m"), help="(default: %(default)s)")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores (default: 1)")
    parser.add_argument("--bf16", action="store_true", help="mixed precision: for GPUs, and CPUs with AVX512-BF16")
    what = "two kinds, two policies, one seed and setting, few steps"
    parser.add_argument("--small", dest="plan", action="store_const", const=SMALL, default=Plan(), help=what)


def run(directory: Path, command: Sequence[str], args: argparse.Namespace, **options: Any) -> dict[str, Any]:
    """Train by a command, or go on, unless it is done. Returns what was logged, and how long it took."""
    done = directory / "done.json"
    if args.bf16:
        options |= {"bf16": "true", "use_cpu": str(not torch.cuda.is_available()).lower()}
    settings = {name: value for name, value in options.items() if not isinstance(value, Path)} | {"model": args.model}
    if done.exists():
        if (was := {"model": args.model, **json.loads(done.read_text())["settings"]}) != settings:
            raise ValueError(f"{directory} is of {was}, not of {settings}: remove it, or take another directory.")
    else:
        options |= {"model_name_or_path": args.model, "output_dir": directory, "resume_from_checkpoint": "true"}
        command = [
            sys.executable,
            *command,
            *(text for item in options.items() for text in (f"--{item[0]}", str(item[1]))),
        ]
        print(f"\n$ {' '.join(command)}", flush=True)
        before = seconds_so_far(directory)
        code = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": threads(args)}).returncode
        if code:
            raise ValueError(f"{directory} is not done: the command above ended with {code}.")
        seconds = before + time.time() - (directory / "clock.json").stat().st_mtime
        last = max(directory.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        history = json.loads((last / "trainer_state.json").read_text())["log_history"]
        versions = {name: version(name) for name in ("gpm-trl", "trl", "transformers", "torch", "peft")}
        result = {"settings": settings, "date": time.strftime("%Y-%m-%d"), "seconds": round(seconds)}
        write_whole(done, json.dumps({**result, "versions": versions, "log": history}, indent=1) + "\n")
    return json.loads(done.read_text())


def threads(args: argparse.Namespace) -> str:
    """Of each job."""
    return str(max(len(os.sched_getaffinity(0)) // args.jobs, 1))


def seconds_so_far(directory: Path) -> float:
    """What runs that were killed have taken, up to the last file that they wrote. Starts the clock of the next."""
    clock, seconds = directory / "clock.json", 0.0
    directory.mkdir(parents=True, exist_ok=True)
    if clock.exists():
        last = max(path.stat().st_mtime for path in directory.rglob("*"))
        seconds = json.loads(clock.read_text()) + last - clock.stat().st_mtime
    clock.write_text(json.dumps(seconds))
    return seconds


# --- Preference models -----------------------------------------------------------------------------------------------


def model_directory(args: argparse.Namespace, kind: str, rate: str, seed: int) -> Path:
    return args.output_dir / "models" / f"{kind}-{rate}-{seed}"


def train_model(args: argparse.Namespace, kind: str, rate: str, seed: int) -> float:
    """The loss of a model on the validation rows, at the end."""
    recipe, changes = KINDS[kind]
    options = {
        **changes,
        "learning_rate": rate,
        "seed": seed,
        "dataset_name": args.output_dir / "data" / "preferences",
    }
    command = ("-m", "gpm_trl.cli.gpm", "--config", str(HERE / recipe))
    result = run(model_directory(args, kind, rate, seed), command, args, **options)
    losses = [entry["eval_loss"] for entry in result["log"] if "eval_loss" in entry]
    print(f"{kind}, {rate}, seed {seed}: loss {losses[-1]:.4f}, {result['seconds'] / 60:.0f} minutes", flush=True)
    return losses[-1]


def train_models(args: argparse.Namespace) -> None:
    """The grid with the first seed, for each kind; then the other seeds at its best."""
    plan = args.plan
    grid = [(kind, rate) for rate in plan.rates for kind in plan.kinds]
    with ThreadPoolExecutor(args.jobs) as pool:
        values = list(pool.map(lambda run: train_model(args, *run, plan.seeds[0]), grid))
        losses = {kind: {rate: values[grid.index((kind, rate))] for rate in plan.rates} for kind in plan.kinds}
        best = {kind: min(losses[kind], key=losses[kind].get) for kind in plan.kinds}
        write_whole(args.output_dir / "chosen.json", json.dumps({"losses": losses, "best": best}, indent=2) + "\n")
        others = [(kind, best[kind], seed) for seed in plan.seeds[1:] for kind in plan.kinds]
        list(pool.map(lambda run: train_model(args, *run), others))


# --- Policies --------------------------------------------------------------------------------------------------------


def policy_directory(args: argparse.Namespace, name: str) -> Path:
    return args.output_dir / "policies" / name


def train_policy(args: argparse.Namespace, directory: Path, name: str, rate: str, **options: Any) -> dict[str, Any]:
    command, kind, changes = POLICIES[name]
    best = json.loads((args.output_dir / "chosen.json").read_text())["best"]
    judge = model_directory(args, kind, best[kind], args.plan.seeds[0])
    recipe = HERE / ("gpo.yaml" if command is GPO else "gprl.yaml")
    options = {"reward_model_path": judge, "dataset_name": args.output_dir / "data" / "prompts", **changes, **options}
    return run(directory, (*command, "--config", str(recipe)), args, learning_rate=rate, **options)


def train_policies(args: argparse.Namespace) -> None:
    """One learning rate and beta, chosen by GPO's win rate after a third of the steps; then all policies."""
    path, third = args.output_dir / "policies" / "chosen.json", args.plan.steps_shown[0]
    with ThreadPoolExecutor(args.jobs) as pool:
        rates = list(pool.map(lambda setting: try_policy(args, *setting, third), args.plan.policy_grid))
    found = [(win_rate, *setting) for win_rate, setting in zip(rates, args.plan.policy_grid, strict=True)]
    _, rate, beta = max(found)
    write_whole(path, json.dumps({"found": found, "learning_rate": rate, "beta": beta}) + "\n")

    def train(name: str) -> None:
        options = {"max_steps": args.plan.policy_steps, "save_steps": third}
        if POLICIES[name][0] is GPO:  # GRPO's beta weighs a KL term instead
            options["beta"] = beta
        result = train_policy(args, policy_directory(args, name), name, rate, **options)
        print(f"{name}: {result['seconds'] / 60:.0f} minutes", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(train, args.plan.policies))


def try_policy(args: argparse.Namespace, rate: str, beta: float, steps: int) -> float:
    """The win rate of GPO against the initial policy, by its own judge, on the prompts to choose by."""
    options = {"beta": beta, "max_steps": steps, "eval_strategy": "steps", "eval_steps": steps}
    options |= {"num_generations_eval": 2, "per_device_eval_batch_size": 16}  # prompts tell more than completions
    log = train_policy(args, args.output_dir / "policies" / f"grid-{rate}-{beta}", "gpo", rate, **options)["log"]
    win_rate = next(entry["eval_win_rate"] for entry in log[::-1] if "eval_win_rate" in entry)
    print(f"GPO, learning rate {rate}, beta {beta}: win rate {win_rate:.3f}", flush=True)
    return win_rate


if __name__ == "__main__":
    steps = {"models": train_models, "policies": train_policies}
    sys.exit(run_command(make_parser(), lambda args: steps[args.step](args), None))
