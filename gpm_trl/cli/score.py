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
import glob
import gzip
import hashlib
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import FileLock, Timeout
from transformers.utils import logging

from ..data.formats import prompt_and_responses, template_kwargs
from ..data.renderer import EncodedGroup
from ..preference import preference_matrix
from ..scorer import RANKING_METHODS, NotFiniteError, PreferenceScorer, ResponseEmbeddings, rank_scores
from .arguments import add_model_arguments, load_scorer, run_command, start_processes

CHUNK_ROWS = 256
SETTINGS = ("model", "revision", "input", "method", "dtype", "attn_implementation", "device", "batch_tokens")
SETTINGS += ("max_length", "long_rows")
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
        help="whether a row that cannot be used ends the run, or is reported and left out (default: %(default)s)",
    )
    add_model_arguments(parser)
    return parser


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers, which begin at 1."""
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


def score_chunk(scorer: PreferenceScorer, lines: list[tuple[int, bytes]], args: argparse.Namespace) -> dict[str, Any]:
    """The rows of numbered lines with their results, and counts. Bad rows are reported, or end the run."""
    rows, groups, errors = [], [], []
    for number, line in lines:
        try:
            row = parse_row(line)
            groups.append(scorer.encode(*prompt_and_responses(row), template_kwargs(row)))
            rows.append({"input_line": number, **row})
        except (ValueError, TypeError, RecursionError) as error:  # a tokenizer or a template refuses the content
            errors.append((number, str(error)))
    scored = []
    for row, embedded in zip(rows, embed_or_explain(scorer, groups), strict=True):
        try:
            if isinstance(embedded, NotFiniteError):
                raise ValueError(embedded.reason)
            ranking = rank_scores(preference_matrix(*embedded), scorer.temperature, args.method)
        except ValueError as error:
            errors.append((row["input_line"], str(error)))
        else:
            scored.append({**row, **ranking.to_dict()})
    for number, error in sorted(errors):
        if args.on_error == "fail":
            raise ValueError(f"{args.input}:{number}: {error} (--on_error skip leaves such rows out)")
        print(f"{args.input}:{number}: skipped: {error}", file=sys.stderr)
    return {"rows": scored, "skipped": len(errors), "truncated": sum(group.truncated for group in groups)}


def embed_or_explain(
    scorer: PreferenceScorer, groups: list[EncodedGroup]
) -> list[ResponseEmbeddings | NotFiniteError]:
    """Embeddings of the groups; for a group in which one is not finite, the error that says so."""
    try:
        return scorer.embed_encoded(groups, show_progress=False)
    except NotFiniteError as error:
        if len(groups) == 1:
            return [error]
        return [result for group in groups for result in embed_or_explain(scorer, [group])]


class Run:
    """
    One process's share of a run: every `num_processes`-th chunk of the input, written to a part file.

    The first line of a part says what the run is. Each other line is a chunk: its number, a digest of its lines in the
    input, its rows with their results, and counts. A killed run leaves whole lines and maybe the beginning of one,
    which is dropped. What whole lines hold is not scored again, by however many processes.
    """

    def __init__(self, args: argparse.Namespace, state: PartialState):
        self.args = args
        self.state = state
        self.part = Path(f"{args.output}.part-{state.process_index}")
        # Size and time of its files tell a model from another of the same name.
        files = sorted(path for path in Path(args.model).glob("*") if path.suffix in (".safetensors", ".json"))
        files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        settings = {"model_files": files, **{name: str(getattr(args, name)) for name in SETTINGS}}
        self.first_line = json.dumps(settings).encode() + b"\n"

    def parts(self) -> list[Path]:
        """The part files of all processes."""
        return sorted(self.args.output.parent.glob(f"{glob.escape(self.args.output.name)}.part-*"))

    def done(self) -> dict[int, tuple[str, Path, int]]:
        """The chunks that parts hold, by number: a digest, the part, and where in it the chunk begins."""
        chunks: dict[int, tuple[str, Path, int]] = {}
        for part in self.parts():
            with open(part, "rb") as file:
                line = file.readline()
                if line.endswith(b"\n") and line != self.first_line:
                    began = line.decode(errors="replace").strip()
                    raise ValueError(f"{part} is of another run; it begins with {began}. Remove it.")
                start = file.tell()
                while (line := file.readline()).endswith(b"\n"):
                    chunk = json.loads(line)
                    chunks[chunk["number"]] = (chunk["digest"], part, start)
                    start = file.tell()
        return chunks

    def check_start(self) -> None:
        """Raise an error if there is no input, or if there is an output, or parts of it that are not to be used."""
        with open(self.args.input, "rb"):
            pass
        if self.args.output.exists():
            raise ValueError(f"{self.args.output} is there already: remove it, or write to another file.")
        if not self.args.resume and (parts := self.parts()):
            raise ValueError(f"{parts[0]} is there, from a run that was stopped: go on with --resume, or remove it.")

    def score(self, scorer: PreferenceScorer, done: dict[int, tuple[str, Path, int]]) -> None:
        """Score those of this process's chunks that are not done."""
        is_main = self.state.is_main_process
        with open(self.part, "ab+") as file, logging.tqdm(desc="Scoring", unit="row", disable=not is_main) as progress:
            file.seek(0)
            size = sum(len(line) for line in file if line.endswith(b"\n"))
            file.truncate(size)
            if not size:
                file.write(self.first_line)
            for number, numbered in groupby(read_lines(self.args.input), lambda line: (line[0] - 1) // CHUNK_ROWS):
                if number % self.state.num_processes != self.state.process_index:
                    continue
                lines = list(numbered)
                digest = hashlib.sha256(repr(lines).encode()).hexdigest()
                if number not in done:
                    chunk = {"number": number, "digest": digest, **score_chunk(scorer, lines, self.args)}
                    file.write(json.dumps(chunk, ensure_ascii=False).encode() + b"\n")
                    file.flush()
                elif done[number][0] != digest:
                    raise ValueError(
                        f"{self.args.input}:{lines[0][0]}-{lines[-1][0]} has changed since it was scored: remove "
                        f"{done[number][1]}."
                    )
                progress.update(len(lines))

    def merge(self) -> Counter:
        """Write the output from all parts, in the order of the input; returns the counts of rows."""
        counts: Counter = Counter()
        with open(f"{self.args.output}.tmp", "wb") as output:
            for _, (_, part, start) in sorted(self.done().items()):
                with open(part, "rb") as file:
                    file.seek(start)
                    chunk = json.loads(file.readline())
                output.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in chunk["rows"])
                counts.update(rows=len(chunk["rows"]), skipped=chunk["skipped"], truncated=chunk["truncated"])
        expected = sum(1 for _ in read_lines(self.args.input))
        if counts["rows"] + counts["skipped"] != expected:
            raise ValueError(
                f"{self.args.input} has {expected} rows, but {counts['rows'] + counts['skipped']} were scored: it has "
                f"changed, or the processes do not write to one folder. Remove {self.part}, and begin anew."
            )
        os.replace(f"{self.args.output}.tmp", self.args.output)
        for part in self.parts():
            part.unlink()
        return counts


def score(args: argparse.Namespace) -> None:
    """Score a file; raises `ValueError` or `OSError` for what it cannot use."""
    state = start_processes(args)
    if args.resume and args.output.exists():
        state.print(f"{args.output} is there: nothing is left to resume, if it is of this run.")
        return
    run = Run(args, state)
    lock = FileLock(f"{args.output}.lock", timeout=0)  # of the process: the system frees it, however the process ends
    try:
        with lock if state.is_main_process else nullcontext():
            run.check_start()
            done = run.done()
            state.wait_for_everyone()  # before any process writes
            run.score(load_scorer(args.model, args), done)
            state.wait_for_everyone()
            if state.is_main_process:
                counts = run.merge()
                print(f"Scored {counts['rows']:,} rows to {args.output}.")
                if counts["skipped"] or counts["truncated"]:
                    print(f"Rows skipped: {counts['skipped']:,}; prompts cut: {counts['truncated']:,}.")
    except Timeout as error:
        raise ValueError(f"Another run is writing {args.output}: wait for it, or write to another file.") from error
    state.wait_for_everyone()  # and leave together


def main(argv: list[str] | None = None) -> int:
    """Score a file; returns 0, or 2 with one line on stderr for arguments or data it cannot use."""
    return run_command(make_parser(), score, argv)


if __name__ == "__main__":
    sys.exit(main())
