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

__all__ = ["describe_model", "describe_run", "to_markdown"]

PACKAGES = ("gpm-trl", "torch", "transformers", "datasets", "accelerate", "numpy")

# Table 2 of the paper (RewardBench, %): Chat, Chat Hard, Safety, Reasoning, average, by the embedding's width 2k; 1 is
# the Bradley-Terry model. Of Gemma-2-9B-it, its text gives some numbers only.
PAPER_TABLE_2 = {
    "Gemma-2B-it": {
        1: (67.32, 63.37, 85.68, 83.04, 74.85),
        2: (77.37, 73.46, 85.00, 85.50, 80.33),
        4: (78.77, 72.59, 85.54, 84.82, 80.43),
        6: (79.61, 75.66, 85.27, 88.61, 82.29),
        8: (78.49, 74.34, 84.19, 86.95, 81.00),
    },
    "Llama-3.1-8B-Instruct": {
        1: (88.55, 85.75, 91.49, 96.47, 90.56),
        2: (91.62, 88.38, 90.68, 94.82, 91.37),
        4: (93.30, 86.18, 91.22, 95.69, 91.60),
        6: (91.90, 87.50, 91.62, 96.40, 91.86),
        8: (93.58, 87.50, 91.08, 95.44, 91.90),
    },
    "Gemma-2-9B-it": {1: (91.62, 85.96, None, None, 91.46), 4: (93.58, 87.72, None, None, 92.33)},
}


def describe_model(scorer: PreferenceScorer, name: str) -> dict[str, Any]:
    """What a score depends on beside the weights: class, backbone, dtype, attention, lengths, template."""
    model, template = scorer.model, scorer.tokenizer.chat_template
    text_config = model.config.get_text_config()
    return {
        "name": name,
        "class": type(model).__name__,
        "backbone": text_config.name_or_path or text_config.model_type,
        "embedding_dim": model.config.embedding_dim if scorer.is_gpm else None,
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


def to_markdown(benchmark: str, models: Sequence[dict[str, Any]]) -> str:
    """
    Tables of one or more models' results on a benchmark.

    Args:
        benchmark (`str`): `"pairs"`, `"reward_bench"` or `"reward_bench_2"`.
        models (list of `dict`): Of each its description ([`describe_model`]) and results.

    Returns:
        `str`: Markdown; percentages with 95 % intervals.
    """
    if benchmark == "pairs":
        summary = _table(
            ["model", "comparisons", "accuracy", "ties", "Brier", "ECE"],
            [
                [
                    model["name"],
                    f"{model['overall']['comparisons']:,}",
                    *(_percent(model["overall"], name) for name in ("accuracy", "tie_rate")),
                    *(_number(model["overall"], name) for name in ("brier", "ece")),
                ]
                for model in models
            ],
        )
    elif benchmark == "reward_bench":
        lines = []
        for model in models:
            numbers = [*(model["sections"].get(section) for section in SECTIONS), model["average"]]
            lines.append([model["name"], *("" if value is None else f"{value:.2%}"[:-1] for value in numbers)])
            lines += _paper_line(model)
        summary = _table(["model", *SECTIONS, "average"], lines)
    else:
        subsets = list(dict.fromkeys(subset for model in models for subset in model["subsets"]))
        lines = [
            [
                model["name"],
                *(_percent(model["subsets"].get(subset, {}), "accuracy", interval=False) for subset in subsets),
                f"{model['average']:.1%}",
            ]
            for model in models
        ]
        return _table(["model", *subsets, "average"], lines)
    by_subset = _subset_table(models)
    return f"{summary}\n\n{by_subset}" if by_subset else summary


def _paper_line(model: dict[str, Any]) -> list[list[str]]:
    """The line of the paper's Table 2 for a model of the same backbone and width, if there is one."""
    known = {name.lower(): name for name in PAPER_TABLE_2}
    names = (model[field].rstrip("/").rsplit("/", 1)[-1].lower() for field in ("backbone", "name"))
    backbone = next((known[name] for name in names if name in known), None)
    width = model["embedding_dim"] or 1
    if backbone is None or width not in PAPER_TABLE_2[backbone]:
        return []
    kind = "BT" if width == 1 else f"GPM, 2k = {width}"
    numbers = ["" if value is None else f"{value:.2f}" for value in PAPER_TABLE_2[backbone][width]]
    return [[f"paper, Table 2: {backbone}, {kind}", *numbers]]


def _subset_table(models: Sequence[dict[str, Any]]) -> str:
    subsets = list(dict.fromkeys(subset for model in models for subset in model["subsets"]))
    if not subsets:
        return ""
    lines = [
        [subset, *(_percent(model["subsets"].get(subset, {}), "accuracy") for model in models)] for subset in subsets
    ]
    return _table(["subset", *(f"accuracy, {model['name']}" for model in models)], lines)


def _percent(metrics: dict[str, Any], name: str, interval: bool = True) -> str:
    if metrics.get(name) is None:
        return ""
    low_high = metrics.get(f"{name}_ci") if interval else None
    return f"{metrics[name]:.1%}" + (f" [{low_high[0]:.1%}, {low_high[1]:.1%}]" if low_high else "")


def _number(metrics: dict[str, Any], name: str) -> str:
    low, high = metrics[f"{name}_ci"]
    return f"{metrics[name]:.3f} [{low:.3f}, {high:.3f}]"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it can be read as it is; all columns but the first are right-aligned."""
    header, *lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, *lines)]
    widths = [max(len(line[column]) for line in (header, *lines)) for column in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def join(line: Sequence[str]) -> str:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        return f"| {' | '.join(cells)} |"

    return "\n".join(join(line) for line in (header, rule, *lines))
