"""
The update of a policy alone: log-probabilities and entropies of K completions of r tokens to a prompt of p tokens,
forward and backward, as TRL's GRPOTrainer computes them (K rows, by its fused head) and packed.

    python tests/benchmarks/policy.py                                     # a Llama-shaped decoder, random weights
    python tests/benchmarks/policy.py --model HuggingFaceTB/SmolLM2-135M  # a model by its name or directory

The bound is the ratio of tokens, padding not counted. With `--ragged 1`, the completions have r/K, 2r/K, ... r tokens.
Memory is by how much an update raises the peak of a process of its own.
"""

import argparse
import contextlib
import inspect
import multiprocessing
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measuring import header, interleaved, llama, parser, ratios, row
from shared_prefix import peak
from torch import nn
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

from gpm_trl.gpo.reference import add_fused_lm_head
from gpm_trl.gpo.shared_prefix import shared_prefix_log_probs
from gpm_trl.models.shared_prefix import enable_shared_prefix

LENGTHS = [(8, 128), (32, 128), (128, 128), (256, 64), (512, 64)]
SHAPES = [(size, *lengths) for size in (4, 8, 16) for lengths in LENGTHS]


def log_probs_by_trl(model: nn.Module, *batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """By TRL's own code, without its profiling."""
    trainer = SimpleNamespace(accelerator=SimpleNamespace(autocast=contextlib.nullcontext))
    compute = inspect.unwrap(GRPOTrainer._get_per_token_logps_and_entropies)
    return compute(trainer, model, *batch, compute_entropy=True)[:2]


class Update:
    """An update by K completions in each way."""

    def __init__(self, shape: tuple[int, int, int], args: argparse.Namespace):
        size, prompt, completion = shape
        config = llama(args.hidden_size, args.layers, heads=8)
        config.vocab_size = args.vocabulary
        if args.model is None:
            self.model = AutoModelForCausalLM.from_config(config)
        else:
            self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        self.model.train()
        add_fused_lm_head(self.model, temperature=0.7, outputs=("log_probs", "entropy"))
        enable_shared_prefix(self.model.base_model)
        draw = torch.Generator().manual_seed(0)
        prompts = torch.randint(3, args.vocabulary, (1, prompt), generator=draw).expand(size, -1)
        completions = torch.randint(3, args.vocabulary, (size, completion), generator=draw)
        lengths = torch.arange(1, size + 1) * completion // size if args.ragged else torch.tensor([completion] * size)
        self.ids, self.completion = torch.cat([prompts, completions], dim=1), completion
        self.mask = (torch.arange(prompt + completion) < prompt + lengths[:, None]).long()
        self.bound = int(self.mask.sum()) / (prompt + int(lengths.sum()))

    def log_probs(self, way: str) -> tuple[torch.Tensor, torch.Tensor]:
        if way == "packed":
            return shared_prefix_log_probs(self.model, self.ids, self.mask, self.completion)
        return log_probs_by_trl(self.model, self.ids, self.mask, self.completion)

    def seconds(self, way: str) -> float:
        start = time.perf_counter()
        log_probs, _ = self.log_probs(way)
        log_probs.sum().backward()
        self.model.zero_grad()
        return time.perf_counter() - start


def peak_growth(shape: tuple[int, int, int], way: str, args: argparse.Namespace) -> int:
    """MiB by which an update raises the peak; to be called in a process of its own."""
    update = Update(shape, args)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak("cpu")
    update.seconds(way)
    return round(peak("cpu") - before)


def main() -> None:
    options = parser(
        __doc__, hidden_size=512, layers=8, vocabulary=32000, rounds=3, ragged=0, smallest=4, largest=16, memory=1
    )
    options.add_argument("--model", help="of a causal LM whose vocabulary has as many tokens, instead of a random one")
    args = options.parse_args()
    header(args, "(K, p, r)", "bound", "TRL / packed", "of the bound", "largest difference", "MiB: TRL, packed")
    for shape in SHAPES:
        if not args.smallest <= shape[0] <= args.largest:
            continue
        update = Update(shape, args)
        with torch.no_grad():
            differences = [(a - b).abs().max().item() for a, b in zip(*map(update.log_probs, WAYS), strict=True)]
        times = interleaved(WAYS, update.seconds, args.rounds)
        ratio = statistics.median(a / b for a, b in zip(times["TRL"], times["packed"], strict=True))
        memory = "not measured"
        if args.memory:
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                memory = ", ".join(str(pool.apply(peak_growth, (shape, way, args))) for way in WAYS)
        cells = [f"{update.bound:.2f}", ratios(times["TRL"], times["packed"]), f"{ratio / update.bound:.2f}"]
        row(shape, *cells, f"{max(differences):.1e}", memory)


WAYS = ("TRL", "packed")

if __name__ == "__main__":
    main()
