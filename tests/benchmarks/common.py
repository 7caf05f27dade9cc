"""What the benchmarks share: a backbone, settings of trainers, timing in turns, and tables of results."""

import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers
import trl
from transformers import LlamaConfig

Times = dict[str, list[float]]  # seconds of each way in each round
# Of trainers that are timed: nothing is saved or reported.
TRAINING = {
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def backbone(hidden_size: int, layers: int = 4, heads: int = 4, expansion: float = 3) -> LlamaConfig:
    """Llama-shaped, over the tokens of `byte_tokenizer`."""
    return LlamaConfig(
        vocab_size=259,
        hidden_size=hidden_size,
        intermediate_size=int(expansion * hidden_size),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        pad_token_id=0,
        num_labels=1,
    )


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(ways: dict[str, Callable[[], float]], rounds: int) -> Times:
    """Each way gives its seconds, and comes as often before another as after it. The first round warms up."""
    seconds: Times = {name: [] for name in ways}
    for index in range(rounds + 1):
        for name in list(ways)[:: -1 if index % 2 else 1]:
            seconds[name].append(ways[name]())
    return {name: times[1:] for name, times in seconds.items()}


def ratios(times: list[float], others: list[float]) -> str:
    """Median and range of `times / others` within a round."""
    values = [time / other for time, other in zip(times, others, strict=True)]
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def print_setting(text: str, rounds: int) -> None:
    print(
        f"\n{text}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, trl {trl.__version__}, Python {platform.python_version()}, {rounds} rounds\n"
    )


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def print_header(*columns: str) -> None:
    print_row(*columns)
    print(f"| --- |{' ---: |' * (len(columns) - 1)}")
