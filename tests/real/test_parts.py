"""Real parts are fetched whole or not at all, and where one is missing, tests say which and what brings it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .fetch import PARTS, fetch
from .parts import part

HERE = Path(__file__).parent


def test_what_is_there_is_not_fetched_again(tmp_path):
    made = []

    def make(directory, scratch):
        assert scratch.is_dir()
        directory.mkdir()
        made.append(directory.name)

    (tmp_path / "a").mkdir()
    for _ in range(2):
        fetch(tmp_path, {"a": make, "b": make})
    assert made == ["b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_what_could_not_be_fetched_leaves_nothing(tmp_path):
    def break_off(directory, scratch):
        directory.mkdir()
        (directory / "config.json").write_text("{")
        raise OSError("no network")

    with pytest.raises(OSError, match="no network"):
        fetch(tmp_path, {"a": break_off})
    assert not [*tmp_path.iterdir()]


def test_a_missing_part_is_named_with_what_brings_it(tmp_path, monkeypatch):
    monkeypatch.setattr("real.parts.FOLDER", tmp_path)
    (tmp_path / "qwen3").mkdir()
    assert part("qwen3") == tmp_path / "qwen3"
    with pytest.raises(pytest.skip.Exception) as skipped:
        part("llama2")
    brings = "`make test-real` brings it, or `python tests/real/fetch.py`"
    assert str(skipped.value) == f"{tmp_path} has no llama2: {brings}"


@pytest.mark.multiprocess
def test_without_parts_everything_is_skipped(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "real", "-p", "no:cacheprovider", str(HERE)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "GPM_TRL_REAL": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout
    assert "failed" not in done.stdout
    assert all(f"{tmp_path} has no {name}: `make test-real` brings it" in done.stdout for name in PARTS)
