"""What the benchmarks share: a backbone, interleaved rounds, ratios within a round, and what it all ran on."""

import argparse
import platform
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
import trl
from transformers import LlamaConfig, set_seed


def llama(hidden_size: int, layers: int = 4, heads: int = 4) -> LlamaConfig:
    """Of a decoder over bytes, so that a character is a token; seeds its random weights."""
    set_seed(0)
    return LlamaConfig(
        vocab_size=259,
        hidden_size=hidden_size,
        intermediate_size=int(2.75 * hidden_size),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        pad_token_id=0,
        num_labels=1,
    )


def interleaved(ways: Iterable[str], seconds: Callable[[str], float], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round: every other one goes backwards, and the first warms up."""
    measured: dict[str, list[float]] = {way: [] for way in ways}
    for index in range(rounds + 1):
        for way in list(measured)[:: -1 if index % 2 else 1]:
            measured[way].append(seconds(way))
    return {way: times[1:] for way, times in measured.items()}


def ratios(times: list[float], by: list[float]) -> str:
    """Median and range of the ratios within rounds."""
    values = [time / other for time, other in zip(times, by, strict=True)]
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def row(*cells: Any) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def header(args: argparse.Namespace, *columns: str) -> None:
    settings = ", ".join(f"{name} {value}" for name, value in vars(args).items())
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}"
    print(f"\n{settings}, {torch.get_num_threads()} threads, {versions}, Python {platform.python_version()}\n")
    row(*columns)
    row("---", *["---:"] * (len(columns) - 1))


def parser(documentation: str, **numbers: int) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=documentation.split("\n\n")[0])
    for name, default in numbers.items():
        made.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    return made
