"""
`gpm-trl score`: compare and rank the responses of each row of a JSON Lines file.

A row is of any layout in docs/data.md, as text or as messages; `responses` need no comparisons. It is written with
what it had and

- `input_line`: its line in the input;
- `ranking`: indices of the responses, the best first; `winner`: the first of them; `values`: what they are ranked by;
- `mean_preference`: s_hat of each response (Equation 5.2), in log-odds;
- `matrix`: scores of all pairs; `probabilities`: P(response i is preferred to response j);
- with `--parts`, `transitive` and `cyclic`: what rewards and what cyclic blocks add to the scores.

Rows are read in chunks, so memory does not grow with their number. Chunks are written to files beside the output; when
all are done, they are merged in the order of the input. `--resume` goes on from the chunks that a killed run left. On
several processes: `accelerate launch -m gpm_trl.cli.score ...`.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from collections import Counter
from contextlib import nullcontext
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub import snapshot_download
from transformers.utils import logging

from ..data.formats import Layout, find_layout, prompt_and_responses, template_kwargs
from ..saving import check_output_dir, locked, write_whole
from ..scorer import RANKING_METHODS, NotFiniteError, PreferenceScorer
from .arguments import add_model_arguments, command_parser, load_scorer, run_command, start_processes
from .rows import read_lines

CHUNK_ROWS = 256
RENAMED = {"winner": "input_winner"}  # of layouts with a column of this name, which is the response ranked first
RESULTS = ("input_line", "ranking", "winner", "values", "mean_preference", "matrix", "probabilities")
PARTS = ("transitive", "cyclic")


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("score", __doc__)
    parser.add_argument("--model", required=True, help="directory or Hub id of a GPM, or of a reward model")
    parser.add_argument("--input", required=True, type=Path, help="JSON Lines file, maybe gzipped (.gz)")
    parser.add_argument("--output", required=True, type=Path, help="JSON Lines file to write")
    what = "what ranks the responses (default: %(default)s)"
    parser.add_argument("--method", choices=RANKING_METHODS, default=RANKING_METHODS[0], help=what)
    parser.add_argument("--parts", action="store_true", help="also write the transitive and the cyclic part of scores")
    parser.add_argument("--resume", action="store_true", help="go on from what a killed run left")
    what = "whether a row that cannot be used ends the run, or is reported and left out (default: %(default)s)"
    parser.add_argument("--on_error", choices=("fail", "skip"), default="fail", help=what)
    add_model_arguments(parser, with_rows=True)
    return parser


def read_row(line: bytes, args: argparse.Namespace) -> tuple[dict[str, Any], Layout]:
    """A line as a row, and the layout to read it by; raises `ValueError` if it has none."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"The input is JSON Lines, an object on each line; this is none ({error}).") from error
    json.dumps(row, ensure_ascii=False).encode()  # raises for half of a surrogate pair, which is no text
    if not isinstance(row, dict):
        raise ValueError(f"The input is JSON Lines, an object on each line; this one is a {type(row).__name__}.")
    layout = find_layout(row, args.column_mapping, compared=False, chat=args.chat)
    taken = sorted((set(row) & {*RESULTS, *(PARTS if args.parts else ())}) - set(layout.columns))
    if taken:
        raise ValueError(f"The row has {', '.join(taken)}, which the output would overwrite: rename.")
    return row, layout


def check_first_row(args: argparse.Namespace) -> Layout | None:
    """The layout of the first row that can be read, if there is one; raises `ValueError` if it cannot be read."""
    for number, line in read_lines(args.input):
        try:
            row, layout = read_row(line, args)
            prompt_and_responses(layout.read(row))
            return layout
        except ValueError as error:
            if args.on_error == "fail":
                raise ValueError(f"{args.input}:{number}: {error} (--on_error skip leaves such rows out)") from error
    return None


def score_chunk(scorer: PreferenceScorer, lines: list[tuple[int, bytes]], args: argparse.Namespace) -> dict[str, Any]:
    """The rows of numbered lines with their results, and counts. Bad rows are reported, or end the run."""
    rows, groups, errors = [], [], []
    for number, line in lines:
        try:
            row, layout = read_row(line, args)
            read = layout.read(row)
            groups.append(scorer.encode(*prompt_and_responses(read), template_kwargs(read)))
            rows.append({"input_line": number, **{RENAMED.get(name, name): value for name, value in row.items()}})
        except (ValueError, TypeError, RecursionError) as error:  # a tokenizer or a template refuses the content
            errors.append((number, str(error)))
    scored = []
    for row, embedded in zip(rows, scorer.embed_encoded(groups, False, raise_errors=False), strict=True):
        if isinstance(embedded, NotFiniteError):
            errors.append((row["input_line"], embedded.reason))
            continue
        try:
            scored.append({**row, **scorer.rank_embedded(embedded, args.method).to_dict(args.parts)})
        except ValueError as error:  # no von Neumann winner was found
            errors.append((row["input_line"], str(error)))
    for number, error in sorted(errors):
        if args.on_error == "fail":
            raise ValueError(f"{args.input}:{number}: {error} (--resume --on_error skip leaves such rows out)")
        print(f"{args.input}:{number}: skipped: {error}", file=sys.stderr)
    return {"rows": scored, "skipped": len(errors), "truncated": sum(group.truncated for group in groups)}


def model_files(name: str, revision: str | None = None, is_base: bool = False) -> dict[str, str]:
    """What a model is made of: its files, by size and time, or its commit on the Hub; of an adapter, its base too."""
    directory = Path(name)
    if directory.is_dir():
        # What a training leaves beside a model is none of it.
        paths = (path for path in directory.rglob("*") if path.is_file())
        left = re.compile(r"(_.*|checkpoint-\d+|runs)(/|$)")
        stats = {str(path): path.stat() for path in paths if not left.match(path.relative_to(directory).as_posix())}
        files = {path: f"{stat.st_size} bytes, {stat.st_mtime_ns} ns" for path, stat in stats.items()}
    else:
        try:
            directory = Path(snapshot_download(name, revision=revision, allow_patterns="*.json"))
        except (OSError, ValueError):  # loading says what is wrong
            return {}
        files = {name: directory.name}
    if not is_base and (directory / "adapter_config.json").exists():
        adapter = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        files |= model_files(adapter.get("base_model_name_or_path") or "", adapter.get("revision"), is_base=True)
    return files


class Run:
    """
    One process's share of a run: every `num_processes`-th chunk of the input.

    A chunk is a file in `<output>.parts`: a digest of its lines, its rows with their results, and counts. Files get
    their names once they are whole, so what a killed run leaves need not be scored again, by however many processes.
    """

    def __init__(self, args: argparse.Namespace, state: PartialState):
        self.args = args
        self.state = state
        self.parts = Path(f"{args.output}.parts")
        self.num_rows = sum(1 for _ in read_lines(args.input)) if state.is_main_process else 0
        self.settings = {name: str(value) for name, value in vars(args).items() if name not in ("resume", "on_error")}
        self.settings |= {name: version(name) for name in ("gpm-trl", "tokenizers", "torch", "transformers")}
        files, parts = model_files(args.model, args.revision), self.parts.resolve()
        self.settings |= {name: what for name, what in files.items() if parts not in Path(name).resolve().parents}

    def check_start(self) -> None:
        """Raise an error if there is an output, or chunks that are not to be used."""
        if self.args.output.exists():
            raise ValueError(f"{self.args.output} is there already: remove it, or write to another file.")
        if any(self.parts.glob("chunk-*.json")):
            if not self.args.resume:
                raise ValueError(f"{self.parts} is from a run that was stopped: go on with --resume, or remove it.")
            before = json.loads((self.parts / "settings.json").read_text())
            changed = sorted({name for name, _ in before.items() ^ self.settings.items()})
            if changed:
                was = ", ".join(f"{name} = {before.get(name, 'not there')}" for name in changed)
                raise ValueError(f"{self.parts} is of another run, with {was}: remove it.")

    def score(self, scorer: PreferenceScorer) -> None:
        """Score those of this process's chunks that are not there yet."""
        if self.state.is_main_process:
            write_whole(self.parts / "settings.json", json.dumps(self.settings))
        with logging.tqdm(desc="Scoring", total=self.num_rows, disable=not self.state.is_main_process) as progress:
            for number, numbered in groupby(read_lines(self.args.input), lambda line: (line[0] - 1) // CHUNK_ROWS):
                lines = list(numbered)
                if number % self.state.num_processes == self.state.process_index:
                    self.score_lines(scorer, self.parts / f"chunk-{number:08}.json", lines)
                progress.update(len(lines))  # also those of other processes, which are about as far

    def score_lines(self, scorer: PreferenceScorer, path: Path, lines: list[tuple[int, bytes]]) -> None:
        digest = hashlib.sha256(repr(lines).encode()).hexdigest()
        chunk = json.loads(path.read_text()) if path.exists() else None
        if chunk is not None and chunk["digest"] != digest:
            place = f"{self.args.input}:{lines[0][0]}-{lines[-1][0]}"
            raise ValueError(f"{place} has changed since it was scored: remove {path}.")
        if chunk is None or (chunk["skipped"] and self.args.on_error == "fail"):
            write_whole(path, json.dumps({"digest": digest, **score_chunk(scorer, lines, self.args)}))

    def merge(self) -> Counter:
        """Write the output from all chunks, in the order of the input; returns the counts of rows."""
        counts: Counter = Counter()
        with open(self.parts / "output", "wb") as output:
            for path in sorted(self.parts.glob("chunk-*.json")):
                chunk = json.loads(path.read_text())
                output.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in chunk["rows"])
                counts.update(rows=len(chunk["rows"]), skipped=chunk["skipped"], truncated=chunk["truncated"])
        done = counts["rows"] + counts["skipped"]
        if done != self.num_rows:
            raise ValueError(
                f"{self.args.input} has {self.num_rows} rows, but the chunks have {done}: it has changed, or the "
                f"processes do not write to one folder. Remove {self.parts}, and begin anew."
            )
        os.replace(self.parts / "output", self.args.output)
        shutil.rmtree(self.parts)
        return counts


def score(args: argparse.Namespace) -> None:
    state = start_processes(args)
    if args.resume and args.output.exists():
        state.print(f"{args.output} is there: nothing is left to resume, if it is of this run.")
        return
    run = Run(args, state)
    check_output_dir(run.parts)
    run.check_start()
    if layout := check_first_row(args):
        state.print(f"{args.input} {layout}.")
    scorer = load_scorer(args.model, args)
    with locked(run.parts) if state.is_main_process else nullcontext():
        run.check_start()  # again: another run may have begun meanwhile
        state.wait_for_everyone()  # before any process writes
        run.score(scorer)
        state.wait_for_everyone()
        if state.is_main_process:
            counts = run.merge()
            print(f"Scored {counts['rows']:,} rows to {args.output}.")
            if counts["skipped"] or counts["truncated"]:
                print(f"Rows skipped: {counts['skipped']:,}; prompts cut: {counts['truncated']:,}.")
    state.wait_for_everyone()  # and leave together


def main(argv: list[str] | None = None) -> int:
    return run_command(make_parser(), score, argv)


if __name__ == "__main__":
    sys.exit(main())
