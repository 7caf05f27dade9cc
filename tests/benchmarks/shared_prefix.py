"""
Shared prefixes against padded rows: a training step, and scoring, of K responses to prompts.

    python tests/benchmarks/shared_prefix.py
    python tests/benchmarks/shared_prefix.py --device cuda --dtype bfloat16 --attn_implementation flash_attention_2 \\
        --hidden_size 2048 --layers 28 --heads 16

Three ways with the same backbone (Llama-shaped, random weights): the collator and loss of TRL's RewardTrainer, on
K / 2 disjoint pairs, which are the fewest rows; `GPMTrainer`'s padded batch, and its packed one. The bound is the
ratio of tokens, padding not counted. Memory is by how much a training step raises the peak of a process of its own.
"""

import argparse
import multiprocessing
import random
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from measuring import header, interleaved, llama, parser, ratios, row
from transformers import LlamaForSequenceClassification
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


def lengths(name: str) -> list[tuple[int, list[int]]]:
    """Tokens of each prompt, and of its responses."""
    if name not in RAGGED:
        num_responses, prompt, response = FIXED[[*map(str, FIXED)].index(name)]
        return [(prompt, [response] * num_responses)]
    draw = random.Random(0)
    num_responses, *medians = RAGGED[name]

    def length(median: int) -> int:
        return max(2, min(1024, round(median * draw.lognormvariate(0, 0.7))))

    prompt, response = medians
    return [(length(prompt), [length(response) for _ in range(num_responses)]) for _ in range(16 // num_responses)]


def random_groups(lengths: list[tuple[int, list[int]]]) -> list[dict]:
    """Of each prompt, disjoint pairs of its responses."""
    groups = []
    for prompt, responses in lengths:
        prompt_ids, *response_ids = [torch.randint(3, 259, (size,)).tolist() for size in (prompt, *responses)]
        pairs = [[index, index + 1] for index in range(0, len(responses) - 1, 2)]
        group = {"prompt_ids": prompt_ids, "response_ids": response_ids, "pairs": pairs, "targets": [1.0] * len(pairs)}
        groups.append(group)
    return groups


class Step:
    """A training step, and scoring, on the same groups in each way."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.device, self.autocast = args.device, args.dtype == "bfloat16"
        config = llama(args.hidden_size, args.layers, args.heads)
        config._attn_implementation = args.attn_implementation
        self.models = {"trl": LlamaForSequenceClassification(config)}
        self.models |= {way: GPMForPreference(GPMModelConfig(text_config=config)) for way in ("padded", "packed")}
        for model in self.models.values():
            model.to(self.device).train()
        enable_shared_prefix(self.models["packed"].model)
        self.groups = random_groups(lengths(name))

    def loss(self, way: str) -> torch.Tensor:
        model = self.models[way]
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            if way == "trl":
                rows = [
                    {"chosen_ids": texts[chosen], "rejected_ids": texts[rejected]}
                    for group in self.groups
                    for texts in [[group["prompt_ids"] + ids for ids in group["response_ids"]]]
                    for chosen, rejected in group["pairs"]
                ]
                batch = DataCollatorForPreference(pad_token_id=0)(rows)
                batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
                chosen, rejected = model(**batch, use_cache=False).logits.squeeze(-1).chunk(2)
                return -F.logsigmoid(chosen - rejected).mean()
            batch = DataCollatorForGroups(byte_tokenizer(), shared_prefix=way == "packed")(self.groups)
            batch = {name: value.to(self.device) if torch.is_tensor(value) else value for name, value in batch.items()}
            inputs = ("input_ids", "attention_mask", "prompt_lengths", "shared_prefix_layout")
            output = model(**{name: batch[name] for name in inputs if name in batch})
            compared = torch.ones_like(batch["labels"], dtype=torch.bool)  # all prompts have as many comparisons
            first, second = output.embeddings[batch["comparisons"][compared]].unbind(1)
            scales = output.scales[batch["group_rows"][compared.nonzero()[:, 0]]]
            scores = preference_score(first, second, scales)
            return preference_cross_entropy(scores, batch["labels"][compared], output.temperature).mean()

    def seconds(self, way: str, train: bool) -> float:
        start = time.perf_counter()
        with torch.set_grad_enabled(train):
            loss = self.loss(way)
        if train:
            loss.backward()
            self.models[way].zero_grad()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def peak(device: str) -> float:
    """MiB; on the CPU by Linux's own count."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def peak_growth(name: str, way: str, args: argparse.Namespace) -> int:
    """MiB by which a training step raises the peak; to be called in a process of its own."""
    step = Step(name, args)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    before = peak(args.device)
    step.seconds(way, train=True)
    return round(peak(args.device) - before)


def main() -> None:
    options = parser(__doc__, hidden_size=512, layers=4, heads=8, rounds=5)
    options.add_argument("--device", default="cpu")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options.add_argument("--attn_implementation", default="sdpa")
    args = options.parse_args()
    columns = ["(K, p, r)", "bound", "training: TRL / packed", "padded / packed", "scoring: TRL / packed"]
    header(args, *columns, "padded / packed", "MiB: TRL, ours", "tokens/s")
    for name in (*map(str, FIXED), *RAGGED):
        rows = sum(len(responses) * prompt + sum(responses) for prompt, responses in lengths(name))
        tokens = sum(prompt + sum(responses) for prompt, responses in lengths(name))
        step = Step(name, args)
        cells = [name, f"{rows / tokens:.2f}"]
        training, scoring = (
            interleaved(WAYS, lambda way, step=step, train=train: step.seconds(way, train), args.rounds)
            for train in (True, False)
        )
        cells += [ratios(times[way], times["packed"]) for times in (training, scoring) for way in ("trl", "padded")]
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            cells.append(", ".join(str(pool.apply(peak_growth, (name, way, args))) for way in ("trl", "packed")))
        row(*cells, f"{tokens / statistics.median(training['packed']):,.0f}")


if __name__ == "__main__":
    main()
