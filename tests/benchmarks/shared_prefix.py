"""
Shared prefixes against padded rows: a training step, and scoring, of K responses to prompts.

    python tests/benchmarks/shared_prefix.py
    python tests/benchmarks/shared_prefix.py --lengths rows.jsonl.gz    # lengths of real rows too
    python tests/benchmarks/shared_prefix.py --device cuda --dtype bfloat16 --attn_implementation flash_attention_2 \\
        --hidden_size 2048 --layers 28    # a GPU

Three ways with the same backbone (Llama-shaped, random weights): the collator and loss of TRL's RewardTrainer, on
K / 2 disjoint pairs, which are the fewest rows; `GPMTrainer`'s padded batch, and its packed one. Rounds are
interleaved, ratios are within a round. The bound is the ratio of tokens, padding not counted. Memory is by how much
the peak of a process of its own is above what it held before one training step.
"""

import argparse
import gzip
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Times, backbone, interleaved, print_header, print_row, print_setting, ratios, timed
from transformers import LlamaForSequenceClassification, set_seed
from trl.trainer.reward_trainer import DataCollatorForPreference

from gpm_trl import GPMForPreference, GPMModelConfig
from gpm_trl.cli.quickstart import byte_tokenizer
from gpm_trl.data import DataCollatorForGroups
from gpm_trl.models.shared_prefix import enable_shared_prefix
from gpm_trl.preference import preference_cross_entropy, preference_score

FIXED = [(2, 256, 256), (2, 768, 256), (2, 1024, 128), (8, 256, 256), (8, 768, 256), (8, 1024, 128), (2, 16, 64)]
# Medians of prompt and response, and responses a prompt, of ragged data; drawn log-normally around them.
RAGGED = {"UltraFeedback-like": (4, 90, 280), "HH-like": (2, 160, 60), "HelpSteer-like": (2, 120, 230)}
WAYS = ("trl", "padded", "packed")


def ragged_groups(num_responses: int, prompt: int, response: int) -> list[tuple[int, list[int]]]:
    draw = random.Random(0)

    def length(median: int) -> int:
        return max(2, min(1024, round(median * draw.lognormvariate(0, 0.7))))

    return [(length(prompt), [length(response) for _ in range(num_responses)]) for _ in range(16 // num_responses)]


def real_groups(path: str) -> list[tuple[int, list[int]]]:
    """Lengths of the first four prompts of a file of conversational pairs, a token for every four characters."""
    prompts: dict[str, list[str]] = {}
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as file:
        for row in map(json.loads, file):
            responses = prompts.setdefault(row["prompt"][-1]["content"], [])
            responses += [row[column][-1]["content"] for column in ("chosen", "rejected")]
    texts = [(prompt, list(dict.fromkeys(responses))) for prompt, responses in prompts.items()][:4]
    return [(len(prompt) // 4 + 1, [len(text) // 4 + 2 for text in responses]) for prompt, responses in texts]


class Step:
    """A training step, and scoring, on the same groups in each way."""

    def __init__(self, groups: list[tuple[int, list[int]]], args: argparse.Namespace):
        self.device, self.autocast = args.device, args.dtype == "bfloat16"
        self.tokenizer = byte_tokenizer()
        set_seed(0)
        config = backbone(args.hidden_size, args.layers, heads=8, expansion=2.75)
        config._attn_implementation = args.attn_implementation
        self.models = {"trl": LlamaForSequenceClassification(config).to(self.device).train()}
        for way in ("padded", "packed"):
            self.models[way] = GPMForPreference(GPMModelConfig(text_config=config)).to(self.device).train()
        enable_shared_prefix(self.models["packed"].model)
        generator = torch.Generator().manual_seed(0)

        def ids(count: int) -> list[int]:
            return torch.randint(3, len(self.tokenizer), (count,), generator=generator).tolist()

        self.groups = []
        for prompt, responses in groups:
            pairs = [[index, index + 1] for index in range(0, len(responses) - 1, 2)]
            rows = [ids(length) for length in responses]
            group = {"prompt_ids": ids(prompt), "response_ids": rows, "pairs": pairs, "targets": [1.0] * len(pairs)}
            self.groups.append(group)

    def loss(self, way: str) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            return self._reward_loss() if way == "trl" else self._gpm_loss(way)

    def _reward_loss(self) -> torch.Tensor:
        rows = []
        for group in self.groups:
            texts = [group["prompt_ids"] + ids for ids in group["response_ids"]]
            rows += [{"chosen_ids": texts[i], "rejected_ids": texts[j]} for i, j in group["pairs"]]
        batch = DataCollatorForPreference(pad_token_id=0)(rows)
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        chosen, rejected = self.models["trl"](**batch, use_cache=False).logits.squeeze(-1).chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()

    def _gpm_loss(self, way: str) -> torch.Tensor:
        batch = DataCollatorForGroups(self.tokenizer, shared_prefix=way == "packed")(self.groups)
        batch = {name: value.to(self.device) if torch.is_tensor(value) else value for name, value in batch.items()}
        inputs = ("input_ids", "attention_mask", "prompt_lengths", "shared_prefix_layout")
        output = self.models[way](**{name: batch[name] for name in inputs if name in batch})
        compared = batch["labels"] != -100
        first, second = output.embeddings[batch["comparisons"][compared]].unbind(1)
        scales = output.scales[batch["group_rows"][compared.nonzero()[:, 0]]]
        scores = preference_score(first, second, scales)
        return preference_cross_entropy(scores, batch["labels"][compared], output.temperature).mean()

    def train(self, way: str) -> None:
        self.loss(way).backward()
        self.models[way].zero_grad()
        self._synchronize()

    def score(self, way: str) -> None:
        with torch.no_grad():
            self.loss(way)
        self._synchronize()

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def rounds_of(function: Callable[[str], None], rounds: int) -> Times:
    return interleaved({way: partial(timed, partial(function, way)) for way in WAYS}, rounds)


def cases(args: argparse.Namespace) -> Iterator[tuple[str, list[tuple[int, list[int]]]]]:
    for num_responses, prompt, response in FIXED:
        yield str((num_responses, prompt, response)), [(prompt, [response] * num_responses)]
    for name, shape in RAGGED.items():
        yield name, ragged_groups(*shape)
    if args.lengths:
        yield "real lengths", real_groups(args.lengths)


def peak_growth(name: str, way: str) -> int:
    """MiB by which the peak memory of a process of its own grows in a training step."""
    command = [sys.executable, *sys.argv, f"--case={name}", f"--way={way}"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def peak(device: str) -> float:
    """MiB. On the CPU by Linux's own count, as `getrusage` of a child starts at its parent's peak."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--attn_implementation", default="sdpa")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", help="JSON Lines of conversational pairs, for the lengths of its rows")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        step = Step(dict(cases(args))[args.case], args)
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        before = peak(args.device)
        step.train(args.way)
        print(round(peak(args.device) - before))
        return
    print_setting(f"hidden {args.hidden_size}, {args.layers} layers, {args.device}, {args.dtype}", args.rounds)
    columns = ["(K, p, r)", "bound", "training: TRL / packed", "padded / packed", "scoring: TRL / packed"]
    print_header(*columns, "padded / packed", "MiB: TRL, ours")
    for name, groups in cases(args):
        rows = sum(len(responses) * prompt + sum(responses) for prompt, responses in groups)
        tokens = sum(prompt + sum(responses) for prompt, responses in groups)
        step = Step(groups, args)
        training, scoring = rounds_of(step.train, args.rounds), rounds_of(step.score, args.rounds)
        memory = ", ".join(str(peak_growth(name, way)) for way in ("trl", "packed"))
        cells = [name, f"{rows / tokens:.2f}"]
        cells += [ratios(times[way], times["packed"]) for times in (training, scoring) for way in ("trl", "padded")]
        print_row(*cells, memory)


if __name__ == "__main__":
    main()
