"""
`gpm-trl cyclic`: write cyclic preference data, which no scalar reward can order, as JSON Lines files.

From the ratings of UltraFeedback, four files, each without one of the four aspects (`without_honesty.jsonl` and the
like): see [`~gpm_trl.data.cyclic.ultrafeedback_cycles`]. With `--letters N`, cycles of N letters instead: see
[`~gpm_trl.data.letter_cycles`].
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from ..data.cyclic import ASPECTS, RatedPrompt, as_conversation, letter_cycles
from .arguments import USER_ERRORS, report_error
from .rows import load_rows

COLUMNS = ("rows read", "too few rated", "with a cycle", "with several", "comparisons")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command's arguments."""
    parser = argparse.ArgumentParser(prog="gpm-trl cyclic", description=__doc__.split("\n\n")[0].split(": ", 1)[1])
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--dataset",
        default="openbmb/UltraFeedback",
        help="rows in the format of UltraFeedback, its split `train`: a Hub id, a directory, or a JSON, JSON Lines or "
        "Parquet file (default: %(default)s)",
    )
    source.add_argument("--letters", type=int, metavar="N", help="write cycles of N letters of the alphabet instead")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the files go")
    parser.add_argument(
        "--conversational",
        action="store_true",
        help="write messages for a chat template, which chat models need, instead of plain text",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    return parser


@contextmanager
def new_files(paths: list[Path], overwrite: bool) -> Iterator[list[TextIO]]:
    """Files to write, which get their names at the end, and only if nothing went wrong."""
    existing = [str(path) for path in paths if path.exists()]
    if existing and not overwrite:
        raise FileExistsError(f"{', '.join(existing)}: already there. Use --overwrite to replace.")
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=paths[0].parent, prefix=".cyclic-") as temporary:
        written = [Path(temporary) / path.name for path in paths]
        with ExitStack() as stack:
            yield [stack.enter_context(path.open("w", encoding="utf-8")) for path in written]
        for source, path in zip(written, paths, strict=True):
            os.replace(source, path)


def write_ultrafeedback(
    rows: Iterable[dict[str, Any]], files: list[TextIO], convert: Callable[[dict], dict]
) -> list[Counter]:
    """
    Write the comparisons without each of [`ASPECTS`] to its file; returns the counts of `COLUMNS` for each. Malformed
    rows are reported on stderr and left out.
    """
    counts = [Counter(dict.fromkeys(COLUMNS, 0)) for _ in ASPECTS]
    malformed = 0
    for number, row in enumerate(rows):
        try:
            rated = RatedPrompt.from_row(row)
        except ValueError as error:
            malformed += 1
            print(f"Row {number} is left out: {error}", file=sys.stderr)
            continue
        for omit, file, count in zip(ASPECTS, files, counts, strict=True):
            cycles = rated.cycles(omit)
            comparisons = rated.comparisons(cycles[0], omit) if cycles else []
            write_rows(({**comparison, "cycle": number} for comparison in comparisons), file, convert)
            count["rows read"] += 1
            count["too few rated"] += rated.num_comparable(omit) < 3
            count["with a cycle"] += len(cycles) > 0
            count["with several"] += len(cycles) > 1
            count["comparisons"] += len(comparisons)
    if malformed and not counts[0]["rows read"]:
        raise ValueError(f"All {malformed} rows are malformed: they are not UltraFeedback's.")
    return counts


def write_rows(rows: Iterable[dict[str, Any]], file: TextIO, convert: Callable[[dict], dict]) -> int:
    """Write rows as JSON Lines; returns their number."""
    number = 0
    for row in rows:
        file.write(json.dumps(convert(row), ensure_ascii=False) + "\n")
        number += 1
    return number


def print_counts(paths: list[Path], counts: list[Counter]) -> None:
    """Print a table with a line for each file."""
    width = max(len(path.name) for path in paths)
    print(" " * width, *(f"{column:>13}" for column in COLUMNS))
    for path, count in zip(paths, counts, strict=True):
        print(f"{path.name:{width}}", *(f"{count[column]:13,}" for column in COLUMNS))
    print(
        '\n"too few rated": rows in which fewer than three distinct responses are rated on two of the three aspects. '
        "A prompt with several cycles gives its first."
    )


def run(args: argparse.Namespace) -> None:
    """Write the files that `args` asks for; raises `ValueError` or `OSError` for what it cannot use."""
    convert = as_conversation if args.conversational else dict
    if args.letters is not None:
        path = args.output_dir / f"letters-{args.letters}.jsonl"
        with new_files([path], args.overwrite) as (file,):
            number = write_rows(letter_cycles(args.letters), file, convert)
        print(f"{path.name}: {number} comparisons")
        return
    paths = [args.output_dir / f"without_{aspect}.jsonl" for aspect in ASPECTS]
    dataset = load_rows(args.dataset, streaming=True)
    if "train" not in dataset:
        raise ValueError(f"{args.dataset} has no split 'train', only {sorted(dataset)}.")
    with new_files(paths, args.overwrite) as files:
        counts = write_ultrafeedback(dataset["train"], files, convert)
    print_counts(paths, counts)


def main(argv: list[str] | None = None) -> int:
    """Write the files; returns 0, or 2 with one line on stderr for arguments or data it cannot use."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        run(args)
    except USER_ERRORS as error:
        return report_error(parser.prog, error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
