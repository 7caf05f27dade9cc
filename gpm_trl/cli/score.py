"""
`gpm-trl score`: compare and rank the responses of each row of a JSON Lines file.

A row has `prompt` and `responses`, or `chosen` and `rejected` (and maybe `prompt`), as text or as messages. It is
written with what it had and

- `input_line`: its line in the input;
- `ranking`: indices of the responses, the best first; `winner`: the first of them; `values`: what they are ranked by;
- `mean_preference`: s_hat of each response (Equation 5.2), in log-odds;
- `matrix`: scores of all pairs; `probabilities`: P(response i is preferred to response j).

Rows are read in chunks, so memory does not grow with their number. Each process writes its chunks to a part file
beside the output; when all are done, the parts are merged in the order of the input. `--resume` goes on from the
parts that a killed run left. On several processes: `accelerate launch -m gpm_trl.cli.score ...`.
"""

import argparse
import gzip
import heapq
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers.utils import logging

from ..data.formats import prompt_and_responses, template_kwargs
from ..data.renderer import EncodedGroup
from ..preference import preference_matrix
from ..scorer import RANKING_METHODS, NotFiniteError, PreferenceScorer, ResponseEmbeddings, rank_scores
from .arguments import USER_ERRORS, add_model_arguments, load_scorer, report_error, start_processes

logger = logging.get_logger(__name__)

CHUNK_ROWS = 256
SETTINGS = ("method", "dtype", "attn_implementation", "device", "batch_tokens", "max_length", "long_rows")
RESULTS = ("input_line", "ranking", "winner", "values", "mean_preference", "matrix", "probabilities")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="gpm-trl score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="directory or Hub id of a GPM, or of a reward model")
    parser.add_argument("--input", required=True, type=Path, help="JSON Lines file, maybe gzipped (.gz)")
    parser.add_argument("--output", required=True, type=Path, help="JSON Lines file to write")
    parser.add_argument(
        "--method", choices=RANKING_METHODS, default=RANKING_METHODS[0], help="ranking (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from what a killed run left")
    parser.add_argument(
        "--on_error",
        choices=("fail", "skip"),
        default="fail",
        help="what a row that cannot be used does, once it is reported (default: %(default)s)",
    )
    add_model_arguments(parser)
    return parser


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers, from 1."""
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged after line {number}: {error}") from error


def parse_row(line: bytes) -> dict[str, Any]:
    """A line as a row; raises `ValueError` if it is none."""
    row = json.loads(line)
    json.dumps(row, ensure_ascii=False).encode()  # raises for half of a surrogate pair, which is no text
    if not isinstance(row, dict):
        raise ValueError(f"A row is a JSON object, this one is a {type(row).__name__}.")
    taken = sorted(set(row) & set(RESULTS))
    if taken:
        raise ValueError(f"The row has {', '.join(taken)}, which the output would overwrite: rename.")
    return row


class ScoredChunk(NamedTuple):
    """Rows with their results, the numbers of the lines that cannot be used with what is wrong, and prompts cut."""

    rows: list[dict[str, Any]]
    errors: list[tuple[int, str]]
    truncated: int


def score_chunk(scorer: PreferenceScorer, lines: list[tuple[int, bytes]], method: str) -> ScoredChunk:
    """Score numbered lines of the input."""
    rows, groups, errors = [], [], []
    for number, line in lines:
        try:
            row = parse_row(line)
            groups.append(scorer.encode(*prompt_and_responses(row), template_kwargs(row)))
            rows.append({"input_line": number, **row})
        except (ValueError, TypeError, RecursionError) as error:  # whatever JSON a tokenizer or a template refuses
            errors.append((number, str(error)))
    scored, temperature = [], scorer.temperature
    for row, embedded in zip(rows, embed_or_explain(scorer, groups), strict=True):
        try:
            if isinstance(embedded, NotFiniteError):
                raise ValueError(embedded.reason)
            ranking = rank_scores(preference_matrix(*embedded), temperature, method)
        except ValueError as error:
            errors.append((row["input_line"], str(error)))
        else:
            scored.append({**row, **ranking.to_dict()})
    return ScoredChunk(scored, sorted(errors), sum(group.truncated for group in groups))


def embed_or_explain(
    scorer: PreferenceScorer, groups: list[EncodedGroup]
) -> list[ResponseEmbeddings | NotFiniteError]:
    """Embeddings of the groups, or, for those where one is not finite, the error that says so."""
    try:
        return scorer.embed_encoded(groups, show_progress=False)
    except NotFiniteError as error:
        if len(groups) == 1:
            return [error]
        return [result for group in groups for result in embed_or_explain(scorer, [group])]


class Run:
    """One process's share of a run: every `num_processes`-th chunk of the input, written to a part file."""

    def __init__(self, args: argparse.Namespace, state: PartialState):
        self.args = args
        self.state = state
        self.part = Path(f"{args.output}.part-{state.process_index}-of-{state.num_processes}")
        header = {
            "model": args.model,
            "model_files": _fingerprint(args.model),
            "revision": args.revision,
            "input": str(args.input),
            **{name: getattr(args, name) for name in SETTINGS},
        }
        self.first_line = json.dumps(header).encode() + b"\n"
        self.skipped = self.truncated = 0

    def parts(self) -> list[Path]:
        """Part files there are, of this or another number of processes."""
        pattern = re.compile(re.escape(self.args.output.name) + r"\.part-\d+-of-\d+")
        return sorted(path for path in self.args.output.parent.iterdir() if pattern.fullmatch(path.name))

    def check_start(self) -> None:
        """Raise an error if there is no input, or the run would overwrite an output, or go on from another run."""
        with open(self.args.input, "rb"):
            pass
        if self.args.output.exists():
            raise ValueError(f"{self.args.output} is there already: remove it, or write to another file.")
        parts = self.parts()
        if parts and not self.args.resume:
            raise ValueError(f"{parts[0]} is there, from a run that was stopped: go on with --resume, or remove it.")
        for part in parts:
            processes = int(part.name.rsplit("-", 1)[1])
            if processes != self.state.num_processes:
                raise ValueError(f"{part} is of a run on {processes} processes: resume on as many, or remove it.")
            with open(part, "rb") as file:
                line = file.readline()
            if line.endswith(b"\n") and line != self.first_line:
                began = line.decode(errors="replace").strip()
                raise ValueError(f"{part} is of another run, or no part at all; it begins with {began}. Remove it.")

    def first_chunk(self) -> int:
        """The chunk to begin with. Of a part that is there, its last chunk is dropped: it may be incomplete."""
        if not self.part.exists():
            self.part.write_bytes(self.first_line)
            return 0
        chunk, chunk_start, end = 0, 0, 0
        with open(self.part, "rb+") as file:
            for index, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break
                if index > 0:
                    row_chunk = _chunk_of(json.loads(line)["input_line"])
                    if row_chunk != chunk or index == 1:
                        chunk, chunk_start = row_chunk, end
                end += len(line)
            if chunk_start == 0:  # the header at most
                file.seek(0)
                file.write(self.first_line)
                file.truncate()
                return 0
            file.truncate(chunk_start)
        return chunk

    def check_done(self) -> None:
        """Raise `ValueError` if a row of the part is not that of the input any more."""
        lines = read_lines(self.args.input)
        with open(self.part, "rb") as file:
            next(file)  # the header
            for done in map(json.loads, file):
                number = done["input_line"]
                line = next((line for candidate, line in lines if candidate == number), b"null")
                row = {name: value for name, value in done.items() if name not in RESULTS}
                if json.dumps(json.loads(line)) != json.dumps(row):
                    raise ValueError(
                        f"{self.args.input}:{number} has changed since it was scored: remove {self.part}."
                    )

    def chunks(self, first: int) -> Iterator[list[tuple[int, bytes]]]:
        """This process's chunks, from number `first` on."""
        chunk, lines = None, []
        for number, line in read_lines(self.args.input):
            current = _chunk_of(number)
            if current < first or current % self.state.num_processes != self.state.process_index:
                continue
            if current != chunk and lines:
                yield lines
                lines = []
            chunk = current
            lines.append((number, line))
        if lines:
            yield lines

    def score(self, scorer: PreferenceScorer) -> None:
        """Score all chunks that are not done; raises `ValueError` for a row that cannot be used, if it is to."""
        first = self.first_chunk()
        self.check_done()
        is_main = self.state.is_main_process
        with open(self.part, "ab") as file, logging.tqdm(desc="Scoring", unit="row", disable=not is_main) as progress:
            for lines in self.chunks(first):
                rows, errors, truncated = score_chunk(scorer, lines, self.args.method)
                for number, error in errors:
                    if self.args.on_error == "fail":
                        raise ValueError(f"{self.args.input}:{number}: {error} (--on_error skip leaves such rows out)")
                    print(f"{self.args.input}:{number}: skipped: {error}", file=sys.stderr)
                self.skipped += len(errors)
                self.truncated += truncated
                file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
                file.flush()
                progress.update(len(rows))

    def merge(self) -> int:
        """Write the output from all parts, in the order of the input; returns the number of rows."""
        count = 0
        temporary = Path(f"{self.args.output}.tmp")
        parts = self.parts()
        if len(parts) != self.state.num_processes:
            raise ValueError(
                f"There are {len(parts)} parts of {self.args.output} for {self.state.num_processes} processes: they "
                "must all write to one folder."
            )
        with open(temporary, "wb") as output:
            for _, line in heapq.merge(*(_numbered_rows(part) for part in parts)):
                output.write(line)
                count += 1
        os.replace(temporary, self.args.output)
        for part in parts:
            part.unlink()
        return count


def _fingerprint(model: str) -> list:
    """Size and time of a directory's files, so that another model of the same name is told from it."""
    files = sorted(path for path in Path(model).glob("*") if path.suffix in (".safetensors", ".json"))
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _chunk_of(line_number: int) -> int:
    return (line_number - 1) // CHUNK_ROWS


def _numbered_rows(part: Path) -> Iterator[tuple[int, bytes]]:
    with open(part, "rb") as file:
        next(file)  # the header
        for line in file:
            yield json.loads(line)["input_line"], line


def main(argv: list[str] | None = None) -> int:
    """Score a file; returns 0, or 2 with one line on stderr for arguments or data it cannot use."""
    parser = make_parser()
    args = parser.parse_args(argv)
    state = start_processes(args)
    try:
        if args.resume and args.output.exists():
            state.print(f"{args.output} is there: nothing is left to resume, if it is of this run.")
            return 0
        run = Run(args, state)
        run.check_start()
        state.wait_for_everyone()  # before any process writes
        run.score(load_scorer(args.model, args))
    except USER_ERRORS as error:
        logger.debug("Traceback of the error below", exc_info=True)
        return report_error(parser.prog, error)
    state.wait_for_everyone()
    counts = gather_object([(run.skipped, run.truncated)])
    if state.is_main_process:
        skipped, truncated = map(sum, zip(*counts, strict=True))
        try:
            print(f"Scored {run.merge():,} rows to {args.output}.")
        except USER_ERRORS as error:
            return report_error(parser.prog, error)
        if skipped or truncated:
            print(f"Rows skipped: {skipped:,}; prompts cut: {truncated:,} (since the start or the last --resume).")
    state.wait_for_everyone()  # and leave together
    return 0


if __name__ == "__main__":
    sys.exit(main())
