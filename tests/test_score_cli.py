"""`gpm-trl score`: the scorer's values for every row, bad rows by their line, and runs that were killed go on."""

import gzip
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from conftest import CHAT_TEMPLATE, assistant, digest, save_to_cache, tiny_model, user
from launching import LAUNCHED

from gpm_trl import PreferenceScorer
from gpm_trl.cli import score
from gpm_trl.cli.quickstart import byte_tokenizer

CHUNK_ROWS = 4
RESULTS = ["input_line", "ranking", "winner", "values", "mean_preference", "matrix", "probabilities"]


def save(model, directory: Path) -> Path:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% if tools %}{{ tools[0].function.name }}{% endif %}" + CHAT_TEMPLATE
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def gpm(**settings):
    model = tiny_model(renderer={"max_length": 60}, **settings)
    with torch.no_grad():
        model.embedding_head.weight.mul_(10)
        model.scale_gate.weight.mul_(10)
    return model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save(gpm(), tmp_path_factory.mktemp("gpm"))


@pytest.fixture(scope="module")
def scorer(directory):
    return PreferenceScorer.from_pretrained(directory, device="cpu")


class Files:
    """The files of a run, and the run."""

    def __init__(self, root: Path, model: Path):
        self.model = model
        self.input, self.output = root / "rows.jsonl", root / "ranked.jsonl"
        self.parts = root / "ranked.jsonl.parts"

    def write(self, *rows) -> bytes:
        """Write rows, or lines as they are, and return what was written."""
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        self.input.write_bytes(b"".join(line + b"\n" for line in lines))
        return self.input.read_bytes()

    def arguments(self, *more: str) -> list[str]:
        return [f"--model={self.model}", f"--input={self.input}", f"--output={self.output}", "--device=cpu", *more]

    def run(self, *more: str) -> int:
        return score.main(self.arguments(*more))

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.output.read_bytes().splitlines()]

    def finish(self, *rows) -> str:
        """The digest of the output of a run that nothing interrupts; the output goes."""
        self.write(*rows)
        assert self.run("--on_error=skip") == 0
        expected = digest(self.output)
        self.output.unlink()
        return expected

    def check_output(self, expected: str) -> None:
        assert digest(self.output) == expected
        assert self.beside() == {"ranked.jsonl"}

    def chunks(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.parts.glob("chunk-*"))}

    def beside(self) -> set[str]:
        """Names of what there is beside the input."""
        return {path.name for path in self.input.parent.iterdir()} - {self.input.name}


@pytest.fixture
def files(tmp_path, directory):
    return Files(tmp_path, directory)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(score, "CHUNK_ROWS", CHUNK_ROWS)


def many_rows(count: int) -> list[dict]:
    return [
        {"id": f"é{index}", "prompt": f"Question {index}", "responses": ["a" * (1 + index % 7), "b", f"c{index}"]}
        for index in range(count)
    ]


def good_row(index: int = 0) -> dict:
    return {"prompt": f"q{index}", "responses": ["a", "b"]}


def error_line(capsys) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("gpm-trl score: error: ")
    return lines[0].removeprefix("gpm-trl score: error: ")


# Values

TOOLS = [{"type": "function", "function": {"name": "add"}}]
PROMPT, PAIR = [user("How many?")], [[assistant("Two")], [assistant("Three cats")]]
# Rows, and the group of responses that each is; the other layouts are tested with their reader.
KINDS = [
    ({"id": 7, "prompt": "q", "responses": ["a", "b", "a"], "nested": {"ü": [None, True, "a\u2028b"]}}, None),
    ({"chosen": "How many? Two", "rejected": "How many? Three"}, ("How many?", [" Two", " Three"])),
    ({"prompt": PROMPT, "responses": ["Two", "Three cats"]}, (PROMPT, PAIR)),
    ({"chosen": PROMPT + PAIR[0], "rejected": PROMPT + PAIR[1]}, (PROMPT, PAIR)),
    ({"prompt": "q", "responses": ["a"]}, None),
]


@pytest.mark.parametrize("method", ["mean", "von_neumann"])
def test_rows_of_every_kind_have_the_values_of_the_scorer(files, scorer, capsys, method):
    rows = [row for row, _ in KINDS]
    written = files.write(*rows)
    assert files.run(f"--method={method}") == 0
    assert f"Scored {len(rows)} rows to {files.output}." in capsys.readouterr().out
    assert len(files.output.read_text(encoding="utf-8").split("\n")) == len(rows) + 1
    for index, ((row, group), result) in enumerate(zip(KINDS, files.rows(), strict=True)):
        prompt, responses = group or (row["prompt"], row["responses"])
        expected = scorer.rank(prompt, responses, method=method).to_dict()
        assert result["input_line"] == index + 1
        assert (result["ranking"], result["winner"]) == (expected["ranking"], expected["winner"])
        for name in ("values", "mean_preference", "matrix", "probabilities"):
            torch.testing.assert_close(torch.tensor(result[name]), torch.tensor(expected[name]), rtol=1e-4, atol=2e-5)
        assert set(result) == {*row, *RESULTS}
        assert {name: result[name] for name in row} == row
    assert files.input.read_bytes() == written
    assert files.beside() == {"ranked.jsonl"}


def test_tools_and_template_arguments_of_a_row_reach_the_template(files, scorer):
    row = {"prompt": PROMPT, "responses": ["Two", "Three"]}
    files.write({**row, "tools": TOOLS}, {**row, "tools": json.dumps(TOOLS)}, row)
    assert files.run() == 0
    matrices = [result["matrix"] for result in files.rows()]
    (expected,) = scorer.matrix([PROMPT], [row["responses"]], [{"tools": TOOLS}])
    torch.testing.assert_close(torch.tensor(matrices[0]), expected, rtol=1e-4, atol=1e-5)
    assert matrices[0] == matrices[1]
    assert matrices[0] != matrices[2]


def test_columns_are_mapped_and_strings_made_messages(files, capsys):
    matrices = []
    for row, *more in (
        ({"query": "q", "responses": ["a", "b"]}, '--column_mapping={"prompt": "query"}', "--chat"),
        ({"prompt": [user("q")], "responses": ["a", "b"]},),
        ({"input": "q", "output_1": "a", "output_2": "b", "label": 2}, "--chat"),
        ({"prompt": "q", "response_a": "a", "response_b": "b", "winner": "tie"}, "--chat"),
        ({"prompt": "q", "responses": ["a", "b"]},),
    ):
        files.write(row)
        assert files.run(*more) == 0
        (result,) = files.rows()
        matrices.append(result["matrix"])
        files.output.unlink()
        assert result.get("input_winner") == row.get("winner")
    assert matrices[0] == matrices[1] == matrices[2] == matrices[3] != matrices[4]
    assert f"{files.input} read as LLMBar." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["[", json.dumps(good_row()), "]"], "rows.jsonl:1: The input is JSON Lines, an object on each line"),
        (["prompt,responses", "q,a"], "rows.jsonl:1: The input is JSON Lines, an object on each line"),
        ([json.dumps({**good_row(), "question": "p"})], "rows.jsonl:1: `question` may be a part of the prompt"),
    ],
    ids=["an array", "CSV", "an unread question"],
)
def test_what_is_read_is_checked_before_a_model_is_loaded(files, capsys, lines, message):
    files.write(*map(str.encode, lines))
    assert files.run("--model=nowhere") == 2
    assert message in error_line(capsys)


def test_blank_lines_of_a_gzipped_input_are_left_out_and_counted_as_lines(files, small_chunks):
    rows = [json.dumps(good_row(index)).encode() for index in range(2)]
    written = files.write(b"", rows[0], b"  \t", b"", b"", b"", b"\r", rows[1], b"")
    files.input = files.input.with_name("rows.jsonl.gz")
    files.input.write_bytes(gzip.compress(written))
    assert files.run() == 0
    assert [(row["input_line"], row["prompt"]) for row in files.rows()] == [(2, "q0"), (8, "q1")]


def test_an_empty_input_gives_an_empty_output(files, capsys):
    files.write()
    assert files.run() == 0
    assert files.output.read_bytes() == b""
    assert "Scored 0 rows" in capsys.readouterr().out


def test_options_of_the_model_reach_the_scorer(files, monkeypatch):
    loaded = []

    def from_pretrained(cls, name, device, **kwargs):
        loaded.append((name, str(device), kwargs))
        raise ValueError("enough")

    monkeypatch.setattr(PreferenceScorer, "from_pretrained", classmethod(from_pretrained))
    files.write(good_row())
    options = ["--dtype=bfloat16", "--attn_implementation=eager", "--batch_tokens=77", "--max_length=33"]
    assert files.run(*options, "--long_rows=truncate_prompt", "--revision=main", "--trust_remote_code") == 2
    settings = {"dtype": "bfloat16", "attn_implementation": "eager", "batch_tokens": 77, "max_length": 33}
    more = {"long_rows": "truncate_prompt", "revision": "main", "trust_remote_code": True}
    assert loaded == [(str(files.model), "cpu", {**settings, **more})]


# Rows that cannot be used

BAD_ROWS = {
    "bad json": (b'{"prompt": "q", ', "Expecting"),
    "bad utf-8": (b'{"prompt": "\xff", "responses": ["a"]}', "codec can't decode"),
    "missing responses": ({"prompt": "q", "text": "a"}, r"The columns `prompt`, `text` fit no layout"),
    "a response is a number": ({"prompt": "q", "responses": ["a", 5]}, "The response 1 is 5, but a text is"),
    "too long": ({"prompt": "q" * 50, "responses": ["a", "b" * 20]}, "The row of response 1 has 71 tokens"),
    "two taken names": ({**good_row(), "winner": 1, "input_line": 2}, "The row has input_line, winner, which"),
    "messages that are strings": ({"prompt": ["q"], "responses": ["a"]}, ""),
    "half a surrogate pair": ({"prompt": "\ud800", "responses": ["a"]}, "surrogates not allowed"),
    "template arguments with a taken name": ({**good_row(), "chat_template_kwargs": {"responses": 1}}, ""),
    "lists in lists in lists": (b'{"prompt": "q", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion"),
}


def test_a_row_that_cannot_be_used_is_one_line_with_its_place_and_can_be_mended(files, capsys, small_chunks):
    rows = many_rows(10)
    files.write(*rows[:5], b"", b"[1]", *rows[5:])
    assert files.run() == 2
    line = error_line(capsys)
    assert line.startswith(f"{files.input}:7: The input is JSON Lines, an object on each line; this one is a list.")
    assert "--on_error skip leaves such rows out" in line
    assert not files.output.exists()
    (chunk,) = files.chunks().values()  # the one before it
    assert [row["input_line"] for row in json.loads(chunk)["rows"]] == [1, 2, 3, 4]
    files.write(*rows[:5], b"", rows[0], *rows[5:])
    assert files.run("--resume") == 0
    assert [row["input_line"] for row in files.rows()] == [1, 2, 3, 4, 5, *range(7, 13)]


def test_bad_rows_are_skipped_if_told_and_each_is_reported(files, capsys, small_chunks):
    rows = [row for bad, _ in BAD_ROWS.values() for row in (good_row(), bad)]
    files.write(*rows)
    assert files.run("--on_error=skip") == 0
    printed = capsys.readouterr()
    assert [row["input_line"] for row in files.rows()] == list(range(1, len(rows), 2))
    lines = printed.err.splitlines()
    assert len(lines) == len(BAD_ROWS)
    for index, (line, (_, message)) in enumerate(zip(lines, BAD_ROWS.values(), strict=True)):
        assert line.startswith(f"{files.input}:{2 * index + 2}: skipped: ")
        assert message in line
    assert f"Scored {len(BAD_ROWS)} rows to {files.output}.\nRows skipped: {len(BAD_ROWS)};" in printed.out


def test_what_a_failed_run_says_is_done_and_goes_on_from_what_is_there(files, capsys, small_chunks, monkeypatch):
    rows = many_rows(10)
    for bad in (5, 1):  # with a chunk before it, and without
        files.write(*rows[:bad], b"{", *rows[bad:])
        assert files.run() == 2
        options = re.search(r"\(((?:--\w+ )+skip)", error_line(capsys))[1].split()
        assert options == ["--resume", "--on_error", "skip"]
        before = files.chunks()
        if not before:  # nothing to go on from
            options.remove("--resume")
        assert files.run(*options) == 0
        assert len(before) == bad // CHUNK_ROWS
        assert len(files.rows()) == 10
        capsys.readouterr()
        files.output.unlink()


def test_rows_that_were_skipped_end_a_resumed_run_that_does_not_skip(files, monkeypatch, capsys, small_chunks):
    files.write(b"{", *many_rows(10))
    stop_after(files, monkeypatch, 2, "--on_error=skip")
    capsys.readouterr()
    assert files.run("--resume") == 2
    assert error_line(capsys).startswith(f"{files.input}:1: ")
    assert files.run("--resume", "--on_error=skip") == 0
    assert len(files.rows()) == 10


def test_the_bar_counts_all_rows(files, monkeypatch, small_chunks):
    bars = {}
    monkeypatch.setattr(score.logging, "tqdm", lambda desc, **kwargs: bars.setdefault(desc, MagicMock(**kwargs)))
    files.write(*many_rows(10))
    assert files.run() == 0
    updates = bars["Scoring"].__enter__.return_value.update.call_args_list
    assert bars["Scoring"].total == sum(call.args[0] for call in updates) == 10


@pytest.mark.parametrize("where", ["rows.jsonl", "/proc"])
def test_an_output_that_cannot_be_written_is_said_before_the_model_is_loaded(files, monkeypatch, capsys, where):
    monkeypatch.setattr(score, "load_scorer", lambda *args: pytest.fail("loaded"))
    files.write(good_row())
    files.output = files.input.parent / where / "out.jsonl"
    assert files.run() == 2
    assert "cannot be written, since" in error_line(capsys)


@pytest.mark.parametrize("settings", [{"temperature": 1e-300}, {"normalize_embeddings": False}])
def test_scores_that_are_not_finite_are_told_as_embeddings_are(files, capsys, tmp_path, settings):
    model = gpm(**settings)
    with torch.no_grad():
        model.embedding_head.weight.mul_(1 if "temperature" in settings else 1e25)
    files.model = save(model, tmp_path / "model")
    files.write(good_row(), good_row(1))
    assert files.run() == 2
    assert re.match(f"{files.input}:1: A score of response 0 is not finite", error_line(capsys))
    assert files.run("--resume", "--on_error=skip") == 0
    assert files.rows() == []


@pytest.fixture
def nan_model(tmp_path):
    """A model that embeds what has a tilde as NaN."""
    model = gpm()
    with torch.no_grad():
        model.get_input_embeddings().weight[byte_tokenizer()("~").input_ids] = float("nan")
    return save(model, tmp_path / "nan")


def test_a_row_whose_embedding_is_not_finite_is_named_by_its_line(files, nan_model, capsys):
    files.model = nan_model
    files.write(good_row(), b"", {"prompt": "q", "responses": ["a", "~"]})
    assert files.run() == 2
    line = error_line(capsys)
    assert line.startswith(f"{files.input}:3: ")
    assert "is not finite" in line


# Arguments that cannot be used


UNUSABLE = {
    "a missing model": (["--model={root}/nowhere"], "nowhere"),
    "a causal LM": (["--model={decoder}"], "neither a general preference model nor a reward model"),
    "a missing input": (["--input=none.jsonl"], "none.jsonl"),
    "an input that is not gzipped": (["--input={root}/rows.gz"], "gzip"),
    "a gzipped input that breaks off": (["--input={root}/cut.gz"], "cut.gz is damaged after line"),
    "a batch without tokens": (["--batch_tokens=0"], "`batch_tokens` is 0"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_cannot_be_used_is_one_line(files, decoder, capsys, case):
    compressed = gzip.compress(files.write(*many_rows(20)))
    files.input.with_name("cut.gz").write_bytes(compressed[: len(compressed) // 2])
    files.input.with_name("rows.gz").write_bytes(files.input.read_bytes())
    options, message = UNUSABLE[case]
    assert files.run(*(option.format(decoder=decoder, root=files.input.parent) for option in options)) == 2
    assert message in error_line(capsys)
    assert not files.output.exists()


# What is there already


def test_an_output_is_not_overwritten_nor_a_complete_run_resumed(files, capsys):
    files.write(good_row())
    files.output.write_text("precious")
    assert files.run() == 2
    assert "is there already" in error_line(capsys)
    assert files.run("--resume") == 0
    assert "nothing is left to resume" in capsys.readouterr().out
    assert files.output.read_text() == "precious"
    assert files.beside() == {"ranked.jsonl"}


def stop_after(files, monkeypatch, chunks: int, *more: str) -> dict[str, bytes]:
    """A run that breaks off after some chunks; returns what it left."""
    done = []

    def score_chunk(*args):
        if len(done) == chunks:
            raise KeyboardInterrupt
        done.append(args)
        return original(*args)

    original = score.score_chunk
    monkeypatch.setattr(score, "score_chunk", score_chunk)
    with pytest.raises(KeyboardInterrupt):
        files.run(*more)
    monkeypatch.setattr(score, "score_chunk", original)
    assert len(files.chunks()) == chunks
    return files.chunks()


def change(name: str):
    """Changes a file of a model, or makes one."""

    def changed(files: Files) -> list[str]:
        path = files.model / name
        path.parent.mkdir(exist_ok=True)
        path.write_text((path.read_text() if path.exists() else "") + " ")
        return []

    return changed


OTHERS = {
    "": (lambda files: [], "is from a run that was stopped: go on with --resume"),
    "option": (lambda files: ["--resume", "--method=copeland"], "is of another run, with method = mean"),
    **{
        name: (change(name), f"is of another run, with .*{name} = .*: remove it")
        for name in ("chat_template.jinja", "tokenizer.json", "config.json", "code.py", "additional/new.jinja")
    },
    "base": (change("../base/tokenizer.json"), "is of another run, with .*base/tokenizer.json = "),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_run_is_not_resumed(files, monkeypatch, small_chunks, capsys, other, tmp_path):
    """Nor one of a model of which anything has changed."""
    files.model = shutil.copytree(files.model, tmp_path / "models" / "adapter")
    if other == "base":  # an adapter's
        shutil.copytree(files.model, tmp_path / "models" / "base")
        config = {"base_model_name_or_path": str(tmp_path / "models" / "adapter" / ".." / "base")}
        monkeypatch.setattr(score, "load_scorer", lambda name, args: PreferenceScorer.from_pretrained(base, "cpu"))
        base = tmp_path / "models" / "base"
        (files.model / "adapter_config.json").write_text(json.dumps(config))
    files.write(*many_rows(10))
    left = stop_after(files, monkeypatch, 1)
    spoil, message = OTHERS[other]
    more = spoil(files)
    assert files.run(*(more or ["--resume"] * bool(other))) == 2
    assert re.search(f"{files.parts} {message}", error_line(capsys))
    assert files.chunks() == left
    assert not files.output.exists()


def test_a_run_into_the_directory_of_its_model_goes_on(files, monkeypatch, small_chunks, tmp_path):
    files.model = shutil.copytree(files.model, tmp_path / "models" / "gpm")
    files.output, files.parts = files.model / "ranked.jsonl", files.model / "ranked.jsonl.parts"
    files.write(*many_rows(10))
    stop_after(files, monkeypatch, 1)
    assert files.run("--resume") == 0


def test_a_winner_that_is_not_found_is_a_row_that_cannot_be_used(files, monkeypatch, capsys):
    def endless(*args, **kwargs):
        raise RuntimeError("Maximum number of iterations reached.")

    monkeypatch.setattr("gpm_trl.games.nnls", endless)
    files.write(good_row())
    assert files.run("--method=von_neumann") == 2
    assert f"{files.input}:1: The von Neumann winner was not found" in error_line(capsys)


def test_what_a_training_leaves_beside_a_model_may_change(files, monkeypatch, small_chunks, tmp_path):
    """As where a disk is full, and old checkpoints are removed to go on."""
    files.model = shutil.copytree(files.model, tmp_path / "models" / "gpm")
    for name in ("checkpoint-10/model.safetensors", "runs/events", "_lock"):
        (files.model / name).parent.mkdir(exist_ok=True)
        (files.model / name).write_text("")
    files.write(*many_rows(10))
    stop_after(files, monkeypatch, 1)
    shutil.rmtree(files.model / "checkpoint-10")
    change("runs/events")(files)
    change("_lock")(files)
    assert files.run("--resume") == 0


def test_a_model_of_the_hub_is_known_by_its_commit(files, monkeypatch, small_chunks, capsys, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    save_to_cache(files.model, tmp_path / "cache", "someone/gpm")
    assert score.model_files("someone/gpm") == {"someone/gpm": "a" * 40}
    assert score.model_files("someone/none") == {}


def test_a_changed_input_is_not_resumed(files, monkeypatch, small_chunks, capsys):
    rows = many_rows(12)
    files.write(*rows)
    stop_after(files, monkeypatch, 2)
    files.write(*rows[:4], {**rows[4], "prompt": "Another?"}, *rows[5:])
    assert files.run("--resume") == 2
    assert f"{files.input}:5-8 has changed since it was scored: remove {files.parts}" in error_line(capsys)
    files.write(*rows[:4])
    assert files.run("--resume") == 2
    assert "has 4 rows, but the chunks have 8" in error_line(capsys)
    assert not files.output.exists()
    files.write(*rows)
    assert files.run("--resume") == 0
    assert len(files.rows()) == 12


def test_two_runs_do_not_write_one_output(files, monkeypatch, small_chunks, capsys):
    """The second begins while the first is at work, and leaves it alone."""
    files.write(*many_rows(10))
    codes = []
    original = score.score_chunk

    def score_chunk(*args):
        codes.append(files.run("--resume") if not codes else None)
        return original(*args)

    monkeypatch.setattr(score, "score_chunk", score_chunk)
    assert files.run() == 0
    assert codes[0] == 2
    assert f"Another run is writing {files.output}" in capsys.readouterr().err
    assert [row["input_line"] for row in files.rows()] == list(range(1, 11))


# Killed runs go on: the output is that of a run that was not


def test_what_is_whole_is_not_scored_again(files, monkeypatch, small_chunks):
    """Also a chunk without a row; whatever a kill has left of others."""
    rows = many_rows(18)
    expected = files.finish(*rows[:7], b"{", *[b"{"] * 4, *rows[7:])  # lines 9 to 12 are a chunk
    (*_, last) = stop_after(files, monkeypatch, 4, "--on_error=skip")
    (files.parts / last).rename(files.parts / "new-0")
    (files.parts / "output").write_text("{")
    scored, original = [], score.score_chunk

    def score_chunk(scorer, lines, args):
        scored.append(lines[0][0])
        return original(scorer, lines, args)

    monkeypatch.setattr(score, "score_chunk", score_chunk)
    assert files.run("--on_error=skip", "--resume") == 0
    assert scored == [13, 17, 21]
    files.check_output(expected)


KILLED = """
import os, signal, sys
from gpm_trl.cli import score

score.CHUNK_ROWS, original, left = 4, score.score_chunk, [2]

def score_chunk(*args):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)

score.score_chunk = score_chunk
score.main(sys.argv[1:])
"""


@pytest.mark.multiprocess
def test_a_run_killed_by_the_system_is_completed_to_the_byte(files, small_chunks):
    expected = files.finish(*many_rows(22))
    for more in ([], ["--resume"]):
        finished = subprocess.run([sys.executable, "-c", KILLED, *files.arguments(*more)], capture_output=True)
        assert finished.returncode == -signal.SIGKILL, finished.stderr
        assert not files.output.exists()
    assert len(files.chunks()) == 4
    assert files.run("--resume") == 0
    files.check_output(expected)


# Several processes


def share(files, scorer, num_processes: int, *more: str) -> list[score.Run]:
    """The runs of several processes, one after the other, as far as the merge."""
    args = score.make_parser().parse_args(files.arguments("--on_error=skip", *more))
    processes = [{"process_index": index, "is_main_process": index == 0} for index in range(num_processes)]
    runs = [score.Run(args, SimpleNamespace(num_processes=num_processes, **process)) for process in processes]
    files.parts.mkdir(exist_ok=True)
    for run in runs:
        run.check_start()
    for run in reversed(runs):
        run.score(scorer)
        if not more and run is runs[1]:
            assert list(files.chunks()) == [f"chunk-{number:08}.json" for number in (1, 3, 5)]
    return runs


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_several_processes_write_the_output_of_one_also_when_resumed(files, scorer, small_chunks, num_processes):
    """By as many processes as before, or by fewer, or more."""
    expected = files.finish(*many_rows(18), b"", b"{", *many_rows(3))
    share(files, scorer, 2)
    assert list(files.chunks()) == [f"chunk-{number:08}.json" for number in range(6)]
    for number in (1, 4):
        (files.parts / f"chunk-{number:08}.json").unlink()
    runs = share(files, scorer, num_processes, "--resume")
    assert runs[0].merge() == {"rows": 21, "skipped": 1, "truncated": 0}
    files.check_output(expected)


@pytest.mark.multiprocess
def test_two_launched_processes_write_the_output_of_one(files, capsys):
    rows = many_rows(600)  # three chunks
    expected = files.finish(*rows[:300], b"{", *rows[300:])
    # Not `accelerate launch --cpu`, which starts a single process whatever its `--num_processes`.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(LAUNCHED)]
    command = [sys.executable, *launcher, "-m", "gpm_trl.cli.score", *files.arguments("--on_error=skip")]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "Scored 600 rows" in finished.stdout
    assert "Rows skipped: 1;" in finished.stdout
    files.check_output(expected)
