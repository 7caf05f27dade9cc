"""
The tables of docs/results.md, and its pictures, from the report: no number in them is typed by hand.

    python recipes/smollm2-135m/tables.py docs/results/smollm2-135m.json \\
        --pictures docs/images --samples docs/samples.md
"""

import argparse
import html
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from gpm_trl.cli.arguments import run_command
from gpm_trl.evaluation.report import markdown_table, with_interval
from gpm_trl.saving import write_whole

KINDS = {"bt": "BT", "bt_gated": "BT, gate and 6 rewards", "gpm": "GPM, 2k = 6", "hrc": "HRC 4+1"}
TEST_SETS = {"alpaca": "AlpacaEval", "hh": "HH harmless", "llmbar": "LLMBar"}
POLICIES = {
    "initial": "SmolLM2, as it is",
    "gpo": "GPO, by the GPM",
    "ln_gpo": "LN-GPO, by the GPM",
    "sppo": "SPPO, by the GPM",
    "gprl": "GPRL, by the GPM",
    "gprl_unwatched": "GPRL without its monitor",
    "dsppo": "DSPPO, by the HRC",
    "gpo_bt": "GPO, by BT",
    "grpo_bt": "GRPO, by BT",
}
SIDE_BY_SIDE = ("initial", "gpo", "gprl", "gpo_bt")
JUDGE_OF = {"dsppo": "hrc", "gpo_bt": "bt_gated", "grpo_bt": "bt_gated"}  # the others: the GPM


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("tables.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("report", type=Path, help="what report.py wrote")
    parser.add_argument("--pictures", type=Path, help="directory to draw the pictures to")
    parser.add_argument("--samples", type=Path, help="page to write the answers of the policies to")
    return parser


def print_tables(args: argparse.Namespace) -> None:
    report = json.loads(args.report.read_text())
    print("\n\n".join(make_tables(report)))
    if args.pictures is not None:
        draw(report, args.pictures)
    if args.samples is not None:
        write_whole(args.samples, samples_page(report["samples"]))


def make_tables(report: dict[str, Any]) -> list[str]:
    """The tables, in Markdown."""
    return [accuracy_table(report["models"]), detail_table(report["models"]), policy_table(report["policies"])]


def accuracy_table(models: dict[str, Any]) -> str:
    """Accuracy of each kind, and its difference from the fair baseline."""
    lines = [["the longer answer", *(longer(models, rows) for rows in TEST_SETS), "", "", ""]]
    for kind, name in known(KINDS, models):
        found = [models[kind][rows] for rows in TEST_SETS]
        differences = [with_interval(one["difference"], "accuracy", "+.1%") for one in found]
        accuracies = [with_interval(one, "accuracy", ".1%") for one in found]
        lines.append([name, *accuracies, *(differences if kind != "bt_gated" else [""] * 3)])
    head = ["model", *TEST_SETS.values(), *(f"{name}, minus baseline" for name in TEST_SETS.values())]
    return markdown_table([head, *lines])


def longer(models: dict[str, Any], rows: str) -> str:
    length = next(iter(models.values()))[rows]["seeds"][0]["overall"]["length"]
    return with_interval(length, "longer_is_right", ".1%")


def known(names: dict[str, str], found: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key, name) for key, name in names.items() if key in found]


def detail_table(models: dict[str, Any]) -> str:
    """Calibration, length and cycles: means over seeds."""
    columns: dict[str, Callable[[dict], float]] = {
        "Brier": lambda overall: overall["brier"],
        "ECE": lambda overall: overall["ece"],
        "prefers the longer": lambda overall: overall["length"]["prefers_longer"],
        "right where the longer is": lambda overall: overall["length"]["accuracy_longer"],
        "right where the shorter is": lambda overall: overall["length"]["accuracy_shorter"],
    }
    lines = []
    for rows, where in TEST_SETS.items():
        for kind, name in known(KINDS, models):
            overalls = [seed["overall"] for seed in models[kind][rows]["seeds"]]
            values = [[read(overall) for overall in overalls] for read in columns.values()]
            forms = [".3f"] * 2 + [".1%"] * 3
            cells = ["" if None in own else f"{mean(own):{form}}" for own, form in zip(values, forms, strict=True)]
            found = [overall["cyclicity"] for overall in overalls if overall["cyclicity"]]
            share = f"{mean(one['mean'] for one in found):.1%}" if found else ""
            cycles = f"{mean(one['cycles'] for one in found):.1f} of {found[0]['prompts']}" if found else ""
            lines.append([f"{where}: {name}", *cells, share, cycles])
    return markdown_table([["rows and model", *columns, "cyclic share", "prompts with a cycle"], *lines])


def policy_table(policies: dict[str, Any]) -> str:
    """The last step of each policy: what its judge and the others say, and what its answers are like."""
    lines = []
    for name, title in known(POLICIES, policies):
        found = policies[name][max(policies[name], key=int)]
        own, others = win_rates(found, name)
        values = [f"{mean(own):.2f}", f"{mean(others):.2f}"] if name != "initial" else ["", ""]
        tokens, divergence = found["tokens"], found["kl"]
        values += [f"{tokens[0]:.0f} [{tokens[1]:.0f}, {tokens[2]:.0f}]", f"{found['cut']:.0%}"]
        values += [f"{found['distinct_2']:.2f}", f"{divergence[0]:.1f} [{divergence[1]:.1f}, {divergence[2]:.1f}]"]
        lines.append([title, *values])
    head = ["policy", "win rate, own judge", "other judges", "tokens", "cut", "distinct pairs", "KL, nats"]
    return markdown_table([head, *lines])


def samples_page(samples: list[dict[str, Any]]) -> str:
    """What each policy answers to the first prompts of the test, side by side."""
    lines = [
        "# Twenty samples side by side",
        "",
        "The first 20 test prompts in the order of the file, their beginnings, and what policies of the",
        "[study](results.md) answer at their last step: one sample each, seed 0, temperature 1, at most 96 tokens.",
        "Answers of the other policies, and all win rates, are in [the report](results/smollm2-135m.json).",
    ]
    columns = {name: title for name, title in known(POLICIES, samples[0]["answers"]) if name in SIDE_BY_SIDE}
    lines += ["", f"| prompt | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    for sample in samples:
        cells = [sample["prompt"] + " ...", *(sample["answers"][name] for name in columns)]
        lines.append(f"| {' | '.join(map(as_cell, cells))} |")
    return "\n".join(lines) + "\n"


def as_cell(text: str) -> str:
    """A text as one line of a table, its markup shown and not obeyed."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", text)


def win_rates(found: dict[str, Any], name: str) -> tuple[list[float], list[float]]:
    """
    Win rates by the judge that trained a policy; and by those of other kinds (both Bradley-Terry models are one) and,
    where there is one, of another seed.
    """
    kind = JUDGE_OF.get(name, "gpm")
    rates = {tuple(judge.rsplit("-", 1)): rate[0] for judge, rate in found["win_rates"].items()}
    other = {key: rate for key, rate in rates.items() if key[0].split("_")[0] != kind.split("_")[0]}
    unseen = [rate for (_, seed), rate in other.items() if seed != "0"]
    return [rates[kind, "0"]], unseen or list(other.values())


def draw(report: dict[str, Any], directory: Path) -> None:
    """Accuracies with intervals; LLMBar by subset; what judges say of policies over the steps."""
    from matplotlib.figure import Figure

    models, policies = report["models"], report["policies"]
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for axes, (rows, title) in zip(figure.subplots(1, 3), TEST_SETS.items(), strict=True):
        names = known(KINDS, models)
        for place, (kind, _) in enumerate(names):
            found = models[kind][rows]
            axes.plot(found["accuracy_ci"], [place, place], color="C0")
            axes.plot([seed["overall"]["accuracy"] for seed in found["seeds"]], [place] * len(found["seeds"]), "|C0")
            axes.plot(found["accuracy"], place, "oC0")
        axes.axvline(0.5, color="gray", linewidth=0.8)
        length = models[names[0][0]][rows]["seeds"][0]["overall"]["length"]["longer_is_right"]
        axes.axvline(length, color="C1", linestyle=":", label="the longer answer")
        axes.set_yticks(
            range(len(names)), [name for _, name in names] if axes.get_subplotspec().is_first_col() else []
        )
        axes.set(title=title, xlabel="accuracy", ylim=(len(names) - 0.5, -0.5))
    axes.legend(fontsize="small")
    figure.savefig(directory / "smollm2_accuracy.png", dpi=120)

    figure = Figure(figsize=(9, 3), layout="constrained")
    axes, names = figure.subplots(), known(KINDS, models)
    subsets = list(models[names[0][0]]["llmbar"]["seeds"][0]["subsets"])
    for index, (kind, name) in enumerate(names):
        seeds = models[kind]["llmbar"]["seeds"]
        values = [mean(seed["subsets"][subset]["accuracy"] for seed in seeds) for subset in subsets]
        axes.bar([place + 0.2 * (index - 1.5) for place in range(len(subsets))], values, width=0.18, label=name)
    axes.axhline(0.5, color="gray", linewidth=0.8)
    axes.set_xticks(range(len(subsets)), [subset.removeprefix("llmbar-") for subset in subsets])
    axes.set(ylabel="accuracy, mean of seeds", title="LLMBar by subset", ylim=(0, 1))
    axes.legend(fontsize="small", ncols=4, loc="upper right")
    figure.savefig(directory / "smollm2_llmbar.png", dpi=120)

    trained = known(POLICIES, policies)[1:]
    figure = Figure(figsize=(11, 2.4 * ((len(trained) + 3) // 4)), layout="constrained")
    grid = figure.subplots((len(trained) + 3) // 4, min(len(trained), 4), squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(trained) :]:
        axes.set_axis_off()
    for axes, (name, title) in zip(grid.flat, trained, strict=False):
        steps = sorted(map(int, policies[name]))
        rates = [tuple(map(mean, win_rates(policies[name][str(step)], name))) for step in steps]
        for values, label in zip(zip((0.5, 0.5), *rates, strict=True), ("its own judge", "other judges"), strict=True):
            axes.plot([0, *steps], values, "o-", label=label)
        axes.axhline(0.5, color="gray", linewidth=0.8)
        axes.set_title(title, fontsize="medium")
        axes.set(xlabel="step", ylim=(0, 1))
    grid[0, 0].set_ylabel("win rate against SmolLM2")
    grid[0, 0].legend(fontsize="small")
    figure.savefig(directory / "smollm2_policies.png", dpi=120)


if __name__ == "__main__":
    sys.exit(run_command(make_parser(), print_tables, None))
