"""
The rows of the study, split by prompt: 70 % to train on, 10 % to choose settings by, 20 % for the report.

    python recipes/smollm2-135m/data.py --output_dir outputs/smollm2-135m

A hash of the prompt decides, so that everybody has the same splits. Rows are fetched, or read from `--data`, a
directory with `alpaca_pairs.jsonl.gz`, `hh_harmless.jsonl.gz` and `llmbar.jsonl.gz`. Written are

    data/preferences/{train,valid}.jsonl  both sources together; of each prompt, its responses and their comparisons
    data/prompts/{train,valid}.jsonl      for policies
    data/test/*.jsonl                     alpaca, hh, llmbar and prompts, for report.py alone
    data/counts.json                      rows, prompts and tokens of each
"""

import argparse
import gzip
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from datasets import load_dataset
from transformers import AutoTokenizer

from gpm_trl.cli.arguments import run_command
from gpm_trl.saving import write_whole

Row = dict[str, Any]

# Most tokens of a prompt and a response: what two cores can train on in a quarter of an hour, and what is tested.
TRAIN_TOKENS = {"alpaca": 384, "hh": 160}
TEST_TOKENS = 384
PROMPT_TOKENS = 128  # of a policy's prompt
# AlpacaEval 2.0's public results: each model's answers were compared with one reference answer by a GPT-4 judge.
ALPACA_URL = "https://raw.githubusercontent.com/tatsu-lab/alpaca_eval/main/results/{}/weighted_alpaca_eval_gpt4_turbo/annotations.json"
ALPACA_MODELS = (
    "FuseChat-Gemma-2-9B-Instruct",
    "FuseChat-Llama-3.1-8B-Instruct",
    "FuseChat-Qwen-2.5-7B-Instruct",
    "FuseChat-Llama-3.2-3B-Instruct",
    "claude-2",
    "gemma-7b-it",
)


def message(role: str, text: str | list) -> list[dict[str, str]]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def alpaca_rows(directory: Path | None) -> Iterator[Row]:
    """A row a comparison, with the probability that the chosen answer is better."""
    if directory is not None:
        yield from read_gzip(directory / "alpaca_pairs.jsonl.gz")
        return
    for model in ALPACA_MODELS:
        with urlopen(ALPACA_URL.format(model)) as answer:
            annotations = json.load(answer)
        for row in annotations:  # `preference` is 1 for the first output, 2 for the second, or between
            answers = [message("assistant", row["output_1"]), message("assistant", row["output_2"])]
            second = row["preference"] - 1
            chosen, rejected = answers[::-1] if second > 0.5 else answers
            label = max(second, 1 - second)
            prompt = message("user", row["instruction"])
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected, "label": label}


def hh_rows(directory: Path | None) -> Iterator[Row]:
    """A row a human comparison, as messages."""
    if directory is not None:
        yield from read_gzip(directory / "hh_harmless.jsonl.gz")
        return
    for row in load_dataset("Anthropic/hh-rlhf", data_dir="harmless-base", split="test"):
        chosen, rejected = (transcript(row[name]) for name in ("chosen", "rejected"))
        if chosen[:-1] == rejected[:-1]:
            yield {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def transcript(text: str) -> list[dict[str, str]]:
    """The messages of "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = []
    for part in text.split("\n\n"):
        name, colon, rest = part.partition(":")
        if colon and name in roles:
            messages += message(roles[name], rest.strip())
        elif messages:  # a paragraph of the message before
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{part}".strip()
    return messages


def llmbar_rows(directory: Path | None) -> Iterator[Row]:
    if directory is not None:
        rows = read_gzip(directory / "llmbar.jsonl.gz")
    else:
        rows = load_dataset("allenai/reward-bench", split="filtered")
    for row in rows:
        if row["subset"].startswith("llmbar"):
            chosen, rejected = message("assistant", row["chosen"]), message("assistant", row["rejected"])
            prompt = message("user", row["prompt"])
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected, "subset": row["subset"]}


SOURCES = {"alpaca": alpaca_rows, "hh": hh_rows, "llmbar": llmbar_rows}


def read_gzip(path: Path) -> Iterator[Row]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def split_of(prompt: list[dict[str, str]]) -> str:
    """The split of a prompt, by a hash of it."""
    tenth = int(sha256(json.dumps(prompt).encode()).hexdigest(), 16) % 10
    return "test" if tenth < 2 else "valid" if tenth == 2 else "train"


class Group:
    """A prompt, its distinct responses with their tokens, and comparisons of these."""

    def __init__(self, row: Row, count: Callable):
        self.row = {name: row[name] for name in ("prompt", "subset") if name in row}
        self.count = count
        self.prompt_tokens = count(row["prompt"])
        self.responses: list[Any] = []
        self.tokens: list[int] = []
        self.comparisons: list[list[int]] = []
        self.labels: list[float] = []

    def add(self, row: Row, most: int) -> None:
        """Add a comparison, if both of its responses are short enough."""
        pair = [row["chosen"], row["rejected"]]
        tokens = [self.count(row["prompt"] + response) for response in pair]
        if max(tokens) > most or pair[0] == pair[1]:
            return
        for response, length in zip(pair, tokens, strict=True):
            if response not in self.responses:
                self.responses.append(response)
                self.tokens.append(length)
        self.comparisons.append([self.responses.index(response) for response in pair])
        self.labels.append(row.get("label", 1.0))

    @property
    def packed_tokens(self) -> int:
        """Tokens of the prompt, once, and of its responses."""
        return sum(self.tokens) - (len(self.tokens) - 1) * self.prompt_tokens

    def as_row(self, source: str) -> Row:
        compared = {"responses": self.responses, "comparisons": self.comparisons, "label": self.labels}
        return {**self.row, **compared, "source": source}


def make_groups(source: str, rows: Iterator[Row], count: Callable) -> dict[str, list[Group]]:
    """Groups of each split; those without a comparison that is short enough are empty."""
    by_prompt: dict[str, dict[str, Group]] = {"train": {}, "valid": {}, "test": {}}
    for row in rows:
        split = split_of(row["prompt"]) if source != "llmbar" else "test"
        most = TEST_TOKENS if split == "test" else TRAIN_TOKENS[source]
        key = json.dumps([row["prompt"], row.get("subset")])
        if key not in by_prompt[split]:
            by_prompt[split][key] = Group(row, count)
        by_prompt[split][key].add(row, most)
    return {split: list(groups.values()) for split, groups in by_prompt.items()}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("data.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/smollm2-135m"), help="(default: %(default)s)")
    parser.add_argument("--data", type=Path, help="directory with the three files (default: fetched)")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="whose tokens are counted")
    parser.add_argument("--share", type=float, default=1.0, help="of the rows, for a first look (default: all)")
    return parser


def make_data(args: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def count(messages: list[dict[str, str]]) -> int:
        return len(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))

    directory, counts, files = args.output_dir / "data", {}, defaultdict(list)
    for source, rows_of in SOURCES.items():
        for split, groups in make_groups(source, rows_of(args.data), count).items():
            groups = groups[: round(len(groups) * args.share)]
            if source == "alpaca":  # policies have these prompts, also those with long answers alone
                short = [group.row["prompt"] for group in groups if group.prompt_tokens <= PROMPT_TOKENS]
                name = "test/prompts" if split == "test" else f"prompts/{split}"
                files[name] = [{"prompt": prompt} for prompt in short]
            groups = [group for group in groups if group.labels]
            files[f"test/{source}" if split == "test" else f"preferences/{split}"] += [
                group.as_row(source) for group in groups
            ]
            if groups:
                comparisons, tokens = (
                    sum(numbers)
                    for numbers in zip(*((len(group.labels), group.packed_tokens) for group in groups), strict=True)
                )
                counts[f"{source}, {split}"] = {"prompts": len(groups), "comparisons": comparisons, "tokens": tokens}
    for name, rows in files.items():
        path = directory / f"{name}.jsonl"
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    write_whole(directory / "counts.json", json.dumps(counts, indent=2) + "\n")
    for name, numbers in counts.items():
        print(f"{name:16}" + "   ".join(f"{number:7,} {what}" for what, number in numbers.items()))


if __name__ == "__main__":
    sys.exit(run_command(make_parser(), make_data, None))
