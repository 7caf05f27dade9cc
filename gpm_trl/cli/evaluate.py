"""
`gpm-trl evaluate`: accuracy and calibration of preference models, on rows of your own or on RewardBench 1 or 2.

Takes general preference models and Bradley-Terry reward models, one or several, so that they are compared on the same
rows by one command. Prints Markdown tables, and writes a JSON report. On several processes: `accelerate launch -m
gpm_trl.cli.evaluate ...`; every row counts once.
"""

import argparse
import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data.formats import RowError
from ..evaluation import BENCHMARKS, accuracy_difference, describe_model, describe_run, to_markdown
from ..evaluation.benchmarks import check_rows
from ..saving import check_writable, write_whole
from ..scorer import load_config
from .arguments import add_model_arguments, command_parser, load_scorer, run_command, start_processes
from .rows import load_rows, split_of

HUB_DATASETS = {
    "reward_bench": ("allenai/reward-bench", "filtered"),
    "reward_bench_2": ("allenai/reward-bench-2", "test"),
}


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("evaluate", __doc__)
    parser.add_argument(
        "--model", required=True, nargs="+", help="directories or Hub ids of general preference or reward models"
    )
    parser.add_argument(
        "--benchmark", choices=tuple(BENCHMARKS), default="pairs", help="what to evaluate on (default: %(default)s)"
    )
    parser.add_argument(
        "--dataset", help="Hub id, directory or JSON, JSON Lines or Parquet file (default: the benchmark's on the Hub)"
    )
    parser.add_argument("--split", help="split of the dataset (default: the benchmark's, or the only one)")
    parser.add_argument("--output", type=Path, help="JSON file for the report")
    add_model_arguments(parser, with_rows=True)
    return parser


def load_benchmark(args: argparse.Namespace) -> tuple[Dataset, dict[str, Any]]:
    """The rows to evaluate on, and what the report says of them; raises `ValueError` or `OSError` without any."""
    hub_name, hub_split = HUB_DATASETS.get(args.benchmark, (None, None))
    name = args.dataset or hub_name
    if name is None:
        raise ValueError("Name the rows to evaluate on by `--dataset`.")
    splits = load_rows(name)
    split = args.split or (next(iter(splits)) if len(splits) == 1 else hub_split)
    rows = split_of(splits, split, "--split")
    return rows, {"dataset": name, "split": split, "rows": len(rows)}


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate the models one after the other, write the report and print the tables."""
    state = start_processes(args)
    if args.output is not None:
        if args.output.is_dir():
            raise ValueError(f"{args.output} is a directory: give `--output` the name of a file.")
        check_writable(args.output.parent)
    rows, data = load_benchmark(args)
    check_rows(rows, args.benchmark, args.column_mapping)  # before a model is loaded
    if args.chat and args.benchmark != "pairs":
        raise ValueError(f"`--chat` is of `--benchmark pairs`: {args.benchmark} makes messages itself. Leave it out.")
    options = {"column_mapping": args.column_mapping, "chat": args.chat} if args.benchmark == "pairs" else {}
    for name in args.model:  # a wrong name must not wait for the models before it
        load_config(name, revision=args.revision, trust_remote_code=args.trust_remote_code)
    models, differences, outcomes = [], [], []
    try:
        for name in args.model:
            scorer = load_scorer(name, args, long_rows="truncate_prompt")
            try:
                results = BENCHMARKS[args.benchmark](scorer, rows, **options)
            except RowError as error:
                raise ValueError(f"{data['dataset']}: {error}") from error
            outcomes.append(results.pop("outcomes"))
            models.append({**describe_model(scorer, name), **results})
            del scorer  # or two models would be in memory
            differences[:] = (
                {"first": first, "second": second, **accuracy_difference(of_first, of_second)}
                for (first, of_first), (second, of_second) in combinations(zip(args.model, outcomes, strict=False), 2)
            )
            if args.output is not None and state.is_main_process:
                report = {"benchmark": args.benchmark, **data, **describe_run()}
                report |= {"models": models, "differences": differences}
                write_whole(args.output, json.dumps(report, indent=2) + "\n")
    finally:  # also if a later model fails
        if models and state.is_main_process:
            same_rows = all(own.keys() == outcomes[0].keys() for own in outcomes)
            print_report(args.benchmark, models, differences, same_rows)
    state.wait_for_everyone()  # and leave together


def print_report(
    benchmark: str, models: list[dict[str, Any]], differences: list[dict[str, Any]], same_rows: bool
) -> None:
    """Print Markdown tables, and what is missing in them."""
    print(to_markdown(benchmark, models, differences))
    for model in models:
        for count, what in (("truncated", "prompts were cut"), ("left_out", "rows were left out as too long")):
            if model[count]:
                print(f"\n{model['name']}: {model[count]} {what}, for {model['max_length']} tokens a row.")
        if model.get("missing_subsets"):
            print(f"\n{model['name']}: no rows of {', '.join(model['missing_subsets'])}.")
    if not same_rows:
        print("\nSo the models were not evaluated on the same rows: a lower --max_length for all makes them so.")


def main(argv: list[str] | None = None) -> int:
    return run_command(make_parser(), evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
