"""
Writes cyclic preference data, which no scalar reward can order, as JSON Lines files.

From the ratings of UltraFeedback, four files, each without one of the four aspects (`without_honesty.jsonl` and the
like). With `--letters N`, cycles of N letters instead.

    python recipes/cyclic/write.py --output_dir cycles
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gpm_trl.cli.rows import load_rows
from gpm_trl.data.cyclic import ASPECTS, RatedPrompt, letter_cycles
from gpm_trl.saving import whole_files

COLUMNS = ("rows read", "too few rated", "with a cycle", "with several", "comparisons")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
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
    return parser.parse_args(argv)


def num_comparable(rated: RatedPrompt, omit: str) -> int:
    """How many distinct responses could be in a cycle: those rated on two of the aspects besides `omit`."""
    texts = zip(rated.responses, rated.ratings, strict=True)
    return len({text.strip() for text, ratings in texts if len({*ratings} - {omit}) >= 2})


def as_conversation(row: dict[str, Any]) -> dict[str, Any]:
    """A row of texts as messages of user and assistant, which a chat template can render; other columns are kept."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {**row, **{column: [{"role": role, "content": row[column]}] for column, role in roles.items()}}


def comparisons(rows: Iterable[dict[str, Any]], counts: list[Counter]) -> Iterable[tuple[int, dict[str, Any]]]:
    """The comparisons of the rows, each with the number of the aspect that it leaves out, counted by `COLUMNS`."""
    malformed = 0
    for number, row in enumerate(rows):
        try:
            rated = RatedPrompt.from_row(row)
        except ValueError as error:
            malformed += 1
            print(f"Row {number + 1} is left out: {error}", file=sys.stderr)
            continue
        for index, (omit, count) in enumerate(zip(ASPECTS, counts, strict=True)):
            cycles = rated.cycles(omit)
            found = rated.comparisons(cycles[0], omit) if cycles else []
            yield from ((index, {**comparison, "cycle": number}) for comparison in found)
            few = num_comparable(rated, omit) < 3
            values = (1, few, len(cycles) > 0, len(cycles) > 1, len(found))
            count.update(dict(zip(COLUMNS, values, strict=True)))
    if malformed and not counts[0]["rows read"]:
        raise ValueError(f"All {malformed} rows are malformed: they are not UltraFeedback's.")


def main(argv: list[str] | None = None) -> None:
    """Write the files; raises `ValueError` or `OSError` for what it cannot use."""
    args = parse_arguments(argv)
    convert = as_conversation if args.conversational else dict
    counts = [Counter(dict.fromkeys(COLUMNS, 0)) for _ in ASPECTS]
    if args.letters is not None:
        paths = [args.output_dir / f"letters-{args.letters}.jsonl"]
        rows = [(0, row) for row in letter_cycles(args.letters)]
    else:
        paths = [args.output_dir / f"without_{aspect}.jsonl" for aspect in ASPECTS]
        dataset = load_rows(args.dataset, streaming=True)
        if "train" not in dataset:
            raise ValueError(f"{args.dataset} has no split 'train', only {sorted(dataset)}.")
        rows = comparisons(dataset["train"], counts)
    existing = [str(path) for path in paths if path.exists()]
    if existing and not args.overwrite:
        raise FileExistsError(f"{', '.join(existing)}: already there: remove it, or set `--overwrite`.")
    with whole_files(args.output_dir) as partial, ExitStack() as stack:
        files = [stack.enter_context(Path(partial, path.name).open("w", encoding="utf-8")) for path in paths]
        for number, row in rows:
            files[number].write(json.dumps(convert(row), ensure_ascii=False) + "\n")
    if args.letters is not None:
        print(f"{paths[0].name}: {len(rows)} comparisons")
        return
    width = max(len(path.name) for path in paths)
    print(" " * width, *(f"{column:>13}" for column in COLUMNS))
    for path, count in zip(paths, counts, strict=True):
        print(f"{path.name:{width}}", *(f"{count[column]:13,}" for column in COLUMNS))
    print('\n"too few rated": fewer than three distinct responses are rated on two of the three aspects.')
    print("A prompt with several cycles gives its first.")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"write.py: error: {error}")
