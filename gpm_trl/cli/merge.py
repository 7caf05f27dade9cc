"""
`gpm-trl merge ADAPTER DESTINATION`: merge an adapter and its base model into one model.

The written model is loaded and compared with the adapter on sample rows; the largest change of a score is printed. In
float32 it is a rounding error; in bfloat16 the merged weights themselves are rounded.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model

from ..data.formats import find_layout, prompt_and_responses, template_kwargs
from ..scorer import PreferenceScorer
from .arguments import add_model_arguments, check_destination, command_parser, load_scorer, run_command, write_model
from .rows import load_rows

SAMPLE_ROWS = [
    {"prompt": "What is 2 + 2?", "responses": ["4", "5", "Two plus two is four."]},
    {"prompt": "Name a colour.", "responses": ["Red", "Seven", "I would rather not."]},
    {"prompt": "Translate to French: Good morning.", "responses": ["Bonjour.", "Bonne nuit.", "Good morning."]},
    {"prompt": "Write a haiku about the sea.", "responses": ["Waves fold into foam", "No.", "The sea is very big."]},
]


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("merge", __doc__)
    parser.add_argument("adapter", help="directory or Hub id of an adapter of a preference or reward model")
    parser.add_argument("destination", type=Path, help="directory to write the model to: a new or an empty one")
    rows = "Hub id, directory or file of preference rows, the first 16 of which are compared (default: a few built in)"
    parser.add_argument("--dataset_name", help=rows)
    add_model_arguments(parser)
    return parser


def read_sample(name: str) -> list[dict[str, Any]]:
    """The first rows of a dataset, to compare scores on."""
    rows = []
    for number, row in enumerate(itertools.islice(next(iter(load_rows(name).values())), 16), 1):
        try:
            rows.append(find_layout(row, compared=False).read(row))
            prompt_and_responses(rows[-1])
            prompt_and_responses(rows[-1]), template_kwargs(rows[-1])  # raise
        except ValueError as error:
            raise ValueError(f"{name}: Row {number}: {error}") from error
    if not rows:
        raise ValueError(f"{name} has no rows.")
    return rows


def score_rows(scorer: PreferenceScorer, rows: list[dict[str, Any]]) -> torch.Tensor:
    """The scores of all pairs of responses of all rows, in one vector."""
    prompts, responses = zip(*map(prompt_and_responses, rows), strict=True)
    matrices = scorer.matrix(prompts, responses, [template_kwargs(row) for row in rows])
    return torch.cat([matrix.flatten() for matrix in matrices])


def merge(args: argparse.Namespace) -> None:
    """Write the merged model, and print how far it is from the adapter on the sample rows."""
    check_destination(args.destination)
    given = None if args.dataset_name is None else read_sample(args.dataset_name)
    scorer = load_scorer(args.adapter, args, long_rows="truncate_prompt")
    if not is_peft_model(scorer.model):
        raise ValueError(f"{args.adapter} is no adapter, so there is nothing to merge.")
    rows = given or [{**row, "prompt": scorer.as_prompt(row["prompt"])} for row in SAMPLE_ROWS]
    expected = score_rows(scorer, rows)
    write_model(scorer.model.merge_and_unload(safe_merge=True), scorer.tokenizer, args.destination)
    args.revision = None  # it was the adapter's
    actual = score_rows(load_scorer(str(args.destination), args, long_rows="truncate_prompt"), rows)
    change, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    print(f"Model saved to {args.destination}.")
    print(f"Largest change of a score: {change:.2g}, of scores up to {largest:.2g}.")


def main(argv: list[str] | None = None) -> int:
    return run_command(make_parser(), merge, argv)
