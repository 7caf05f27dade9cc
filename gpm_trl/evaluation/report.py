"""What a report says beside its numbers, and how it is printed."""

import datetime
import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from ..models.shared_prefix.attention import base_attention
from ..scorer import PreferenceScorer
from .benchmarks import SECTIONS

__all__ = ["describe_model", "describe_run", "markdown_table", "to_markdown", "with_interval"]

LENGTH_RATES = ("longer_is_right", "prefers_longer", "accuracy_longer", "accuracy_shorter")
PACKAGES = ("gpm-trl", "torch", "transformers", "datasets", "accelerate", "numpy")


def describe_model(scorer: PreferenceScorer, name: str) -> dict[str, Any]:
    """What a score depends on beside the weights: class, backbone, dtype, attention, lengths, template."""
    model, template = scorer.model, scorer.tokenizer.chat_template
    text_config = model.config.get_text_config()
    return {
        "name": name,
        "class": type(model).__name__,
        "backbone": text_config.name_or_path or text_config.model_type,
        "embedding_dim": 2 * (scorer.num_blocks - scorer.reward_dim),
        "reward_dim": scorer.reward_dim,
        "temperature": round(scorer.temperature, 7),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "attn_implementation": base_attention(text_config),
        "shared_prefix": scorer.shared_prefix,
        "max_length": scorer.renderer.max_length,
        "long_rows": scorer.renderer.long_rows,
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None,
    }


def describe_run() -> dict[str, Any]:
    """When, and with what versions."""
    versions = {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
    return {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "versions": versions}


def to_markdown(benchmark: str, models: Sequence[dict[str, Any]], differences: Sequence[dict[str, Any]] = ()) -> str:
    """
    Tables of one or more models' results on a benchmark, in Markdown; percentages with 95 % intervals. Of each model
    its description ([`describe_model`]) and results; of the pairs of models, those of the first before others, the
    [`~gpm_trl.evaluation.accuracy_difference`].
    """
    subsets = list(dict.fromkeys(subset for model in models for subset in model["subsets"]))
    lines = [{"model": model["name"], **_cells(benchmark, model, subsets)} for model in models]
    if differences:
        for line, difference in zip(lines, [{}, *differences], strict=False):
            line["accuracy minus first's"] = with_interval(difference, "accuracy", "+.1%")
    tables = [[list(lines[0]), *(list(line.values()) for line in lines)]]
    if benchmark != "reward_bench_2":
        tables.append([["length", *(rate.replace("_", " ") for rate in LENGTH_RATES)]])
        tables.append([["cyclicity", "prompts", "mean", "max", "cycles"]])
        for name, overall in ((model["name"], model["overall"]) for model in models):
            if overall["length"]["comparisons"]:
                tables[1].append([name, *(with_interval(overall["length"], rate, ".1%") for rate in LENGTH_RATES)])
            if games := overall["cyclicity"]:
                means = (f"{games[mean]:.4f}" for mean in ("mean", "max"))
                tables[2].append([name, f"{games['prompts']:,}", *means, f"{games['cycles']:,}"])
        tables.append([["subset", *(f"accuracy, {model['name']}" for model in models)]])
        for subset in subsets:
            parts = (model["subsets"].get(subset, {}) for model in models)
            tables[3].append([subset, *(with_interval(part, "accuracy", ".1%") for part in parts)])
    return "\n\n".join(markdown_table(lines) for lines in tables if len(lines) > 1)


def _cells(benchmark: str, model: dict[str, Any], subsets: Sequence[str]) -> dict[str, str]:
    """What the first table says of a model, by column."""
    if benchmark == "pairs":
        overall = model["overall"]
        return {
            "comparisons": f"{overall['comparisons']:,}",
            "accuracy": with_interval(overall, "accuracy", ".1%"),
            "ties": with_interval(overall, "tie_rate", ".1%"),
            "Brier": with_interval(overall, "brier", ".3f"),
            "ECE": with_interval(overall, "ece", ".3f"),
        }
    if benchmark == "reward_bench":
        parts = {**model["sections"], "average": model["average"]}
        return {name: f"{parts[name]:.2%}"[:-1] if name in parts else "" for name in (*SECTIONS, "average")}
    parts = {subset: metrics["accuracy"] for subset, metrics in model["subsets"].items()}
    parts["average"] = model["average"]
    return {name: f"{parts[name]:.1%}" if name in parts else "" for name in (*subsets, "average")}


def with_interval(metrics: dict[str, Any], name: str, form: str) -> str:
    """A metric with its interval, or nothing where it is not defined."""
    if metrics.get(name) is None:
        return ""
    limits = ", ".join(f"{limit:{form}}" for limit in metrics[f"{name}_ci"] or ())
    return f"{metrics[name]:{form}}" + (f" [{limits}]" if limits else "")


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it can be read as it is; all columns but the first are right-aligned."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    padded = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
