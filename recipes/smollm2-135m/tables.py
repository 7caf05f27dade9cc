"""
The tables of docs/results.md, and its pictures, from the two parts of the report: no number in them is typed by hand.

    python recipes/smollm2-135m/tables.py docs/results/smollm2-135m-*.json \\
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
    "dsppo": "DSPPO, by the HRC",
    "gpo_bt": "GPO, by gated BT",
    "grpo_bt": "GRPO, by gated BT",
}
SIDE_BY_SIDE = ("initial", "gpo", "gprl", "gpo_bt")
MIN_GROUPS = 10  # prompts with three answers and more, to speak of cycles


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("tables.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("reports", type=Path, nargs="+", help="what report.py wrote, one part or both")
    parser.add_argument("--pictures", type=Path, help="directory to draw the pictures to")
    parser.add_argument("--samples", type=Path, help="page to write the answers of the policies to")
    return parser


def print_tables(args: argparse.Namespace) -> None:
    for path in args.reports:
        report = json.loads(path.read_text())
        print("\n\n".join(make_tables(report)) + "\n")
        if args.pictures is not None:
            draw(report, args.pictures)
        if args.samples is not None and "samples" in report:
            write_whole(args.samples, samples_page(report["samples"]))


def make_tables(report: dict[str, Any]) -> list[str]:
    """The tables of a part of the report, in Markdown."""
    if "policies" in report:
        return [policy_table(report["policies"])]
    of_models = (accuracy_table, difference_table, subset_table, detail_table)
    return [table(report["models"]) for table in of_models]


def accuracy_table(models: dict[str, Any]) -> str:
    """Accuracy of each kind, all seeds together."""
    lines = [["the longer answer", *(longer(models, rows) for rows in TEST_SETS)]]
    for kind, name in known(KINDS, models):
        lines.append([name, *(with_interval(models[kind][rows], "accuracy", ".1%") for rows in TEST_SETS)])
    return markdown_table([["model", *TEST_SETS.values()], *lines])


def difference_table(models: dict[str, Any]) -> str:
    """How much more accurate each kind is than the fair baseline, all seeds together and seed by seed."""
    lines = []
    for kind, name in known(KINDS, models):
        if kind != "bt_gated":
            found = [models[kind][rows] for rows in TEST_SETS]
            by_seed = [", ".join(f"{difference:+.1%}" for difference in one["differences"]) for one in found]
            cells = [with_interval(one["difference"], "accuracy", "+.1%") for one in found]
            lines.append([name, *(f"{cell}; {seeds}" for cell, seeds in zip(cells, by_seed, strict=True))])
    return markdown_table([["minus BT with gate; by seed", *TEST_SETS.values()], *lines])


def longer(models: dict[str, Any], rows: str) -> str:
    length = next(iter(models.values()))[rows]["seeds"][0]["overall"]["length"]
    return with_interval(length, "longer_is_right", ".1%")


def known(names: dict[str, str], found: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key, name) for key, name in names.items() if key in found]


def detail_table(models: dict[str, Any]) -> str:
    """Calibration, length and cycles: means over seeds. Cycles where there are groups of answers."""
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
            found = [games for games in found if games["prompts"] >= MIN_GROUPS]
            share = f"{mean(one['mean'] for one in found):.1%}" if found else ""
            cycles = f"{mean(one['cycles'] for one in found):.1f} of {found[0]['prompts']}" if found else ""
            lines.append([f"{where}: {name}", *cells, share, cycles])
    return markdown_table([["rows and model", *columns, "cyclic share", "prompts with a cycle"], *lines])


def subset_table(models: dict[str, Any]) -> str:
    """Accuracy on the subsets of LLMBar."""
    names = known(KINDS, models)
    lines = []
    for subset in models[names[0][0]]["llmbar"]["subsets"]:
        parts = [models[kind]["llmbar"]["subsets"][subset] for kind, _ in names]
        lines.append([subset.removeprefix("llmbar-"), *(with_interval(part, "accuracy", ".1%") for part in parts)])
    return markdown_table([["LLMBar", *(name for _, name in names)], *lines])


def policy_table(policies: dict[str, Any]) -> str:
    """The last step of each policy: what its judge and the panel say, and what its answers are like."""
    lines = []
    for name, title in known(POLICIES, policies):
        found = policies[name][max(policies[name], key=int)]
        values = [spread(found[judges], ".1%") if found[judges] else "" for judges in ("own", "panel")]
        values.append(f"{found['panel_prefers']:.0%}")
        values += [f"{found['tokens'][0]:.0f}", f"{found['cut']:.0%}", f"{found['distinct_2']:.2f}"]
        lines.append([title, *values, spread(found["kl"], ".1f")])
    head = ["policy", "own judge", "panel", "prompts", "tokens", "cut", "distinct pairs", "KL, nats"]
    return markdown_table([head, *lines])


def spread(values: list[float], form: str) -> str:
    """A mean with its interval."""
    return f"{values[0]:{form}} [{values[1]:{form}}, {values[2]:{form}}]"


def samples_page(samples: list[dict[str, Any]]) -> str:
    """What each policy answers to the first prompts of the test, side by side."""
    lines = [
        "# Twenty samples side by side",
        "",
        "The first 20 test prompts in the order of the file, their beginnings, and what policies of the",
        "[study](results.md) answer at their last step: one sample each, temperature 1, at most 96 tokens. SmolLM2 is",
        "one with weights of four bits, see there. Answers of the other policies, and what judges say on average, are",
        "in [the report](results/smollm2-135m-policies.json).",
    ]
    columns = {name: title for name, title in known(POLICIES, samples[0]["answers"]) if name in SIDE_BY_SIDE}
    lines += ["", f"| prompt | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    for sample in samples:
        cells = [sample["prompt"], *(sample["answers"][name] for name in columns)]
        lines.append(f"| {' | '.join(map(as_cell, cells))} |")
    return "\n".join(lines) + "\n"


def as_cell(text: str) -> str:
    """A text as one line of a table, its markup shown and not obeyed."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", text)


def draw(report: dict[str, Any], directory: Path) -> None:
    if "policies" in report:
        draw_policies(report["policies"], directory)
    else:
        draw_models(report["models"], directory)


def draw_models(models: dict[str, Any], directory: Path) -> None:
    """Accuracies with intervals; LLMBar by subset."""
    from matplotlib.figure import Figure

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
    subsets = list(models[names[0][0]]["llmbar"]["subsets"])
    for index, (kind, name) in enumerate(names):
        values = [models[kind]["llmbar"]["subsets"][subset]["accuracy"] for subset in subsets]
        axes.bar([place + 0.2 * (index - 1.5) for place in range(len(subsets))], values, width=0.18, label=name)
    axes.axhline(0.5, color="gray", linewidth=0.8)
    axes.set_xticks(range(len(subsets)), [subset.removeprefix("llmbar-") for subset in subsets])
    axes.set(ylabel="accuracy", title="LLMBar by subset", ylim=(0, 1))
    axes.legend(fontsize="small", ncols=4, loc="upper right")
    figure.savefig(directory / "smollm2_llmbar.png", dpi=120)


def draw_policies(policies: dict[str, Any], directory: Path) -> None:
    """What judges say of policies over the steps."""
    from matplotlib.figure import Figure

    trained = known(POLICIES, policies)[1:]
    figure = Figure(figsize=(11, 2.4 * ((len(trained) + 3) // 4)), layout="constrained")
    grid = figure.subplots((len(trained) + 3) // 4, min(len(trained), 4), squeeze=False, sharey=True)
    for axes in grid.flat[len(trained) :]:
        axes.set_axis_off()
    for axes, (name, title) in zip(grid.flat, trained, strict=False):
        steps = sorted(map(int, policies[name]))
        for judges, label in (("own", "its own judge"), ("panel", "the panel")):
            found = [[0.5] * 3, *(policies[name][str(step)][judges] for step in steps)]
            means, low, high = zip(*found, strict=True)
            axes.plot([0, *steps], means, "o-", label=label)
            axes.fill_between([0, *steps], low, high, alpha=0.15, linewidth=0)
        axes.axhline(0.5, color="gray", linewidth=0.8)
        axes.set_title(title, fontsize="medium")
        axes.set(xlabel="step", xticks=[0, *steps])
    grid[0, 0].set_ylabel("P(preferred to SmolLM2's)")
    grid[0, 0].legend(fontsize="small")
    figure.savefig(directory / "smollm2_policies.png", dpi=120)


if __name__ == "__main__":
    sys.exit(run_command(make_parser(), print_tables, None))
