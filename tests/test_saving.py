"""Files that are whole or not there, checkpoints that can be resumed from, and directories of one run at a time."""

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import Timeout
from safetensors.torch import save_file

from gpm_trl.saving import check_output_dir, locked, whole_checkpoints, whole_files, why_not_whole, write_whole


def test_a_text_has_its_name_only_once_it_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "new" / "text.txt"
    write_whole(path, "één\n")
    assert path.read_text(encoding="utf-8") == "één\n"
    with monkeypatch.context() as patched:
        write_text = Path.write_text
        patched.setattr(Path, "write_text", lambda *args, **kwargs: (write_text(*args, **kwargs), interrupt()))
        with pytest.raises(KeyboardInterrupt):
            write_whole(path, "half")
    assert path.read_text(encoding="utf-8") == "één\n"
    write_whole(path, "new")
    assert path.read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "text.txt"]


def interrupt():
    raise KeyboardInterrupt


def test_directories_are_written_into_those_there(tmp_path):
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "old").write_text("old")
    (tmp_path / "_saving-left").mkdir()  # by a process that was killed
    with whole_files(tmp_path) as partial:
        (Path(partial) / "templates").mkdir()
        (Path(partial) / "templates" / "new").write_text("new")
    assert sorted(path.name for path in (tmp_path / "templates").iterdir()) == ["new", "old"]
    assert [path.name for path in tmp_path.iterdir()] == ["templates"]


# One run a directory


def test_a_directory_is_of_one_run_at_a_time(tmp_path):
    directory = tmp_path / "a" / "b"
    check_output_dir(directory)
    assert not list(tmp_path.iterdir())  # nothing is made before it must be
    with locked(directory):
        for refused in (check_output_dir, lambda path: locked(path).__enter__()):
            with pytest.raises(ValueError, match=f"Another run is writing {directory}: wait for it"):
                refused(directory)
        (directory / "result").write_text("of the first")
    check_output_dir(directory)
    with locked(directory):
        pass
    assert [path.name for path in directory.iterdir()] == ["result"]  # the lock is no content
    with pytest.raises(Timeout), locked(directory):
        raise Timeout("of a dataset's cache, say")


HOLD = """
import sys, time
from multiprocessing import get_context
from gpm_trl.saving import locked

with locked(sys.argv[1]):
    get_context("fork").Process(target=time.sleep, args=(60,), daemon=True).start()  # a worker of a data loader
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.mark.multiprocess
def test_the_lock_of_a_killed_run_is_free_at_once(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match="Another run is writing"):
        check_output_dir(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("name", ["file", "file/below", "/proc/below"])
def test_a_directory_that_cannot_be_written_is_named_with_the_reason(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"{name} cannot be written, since") as error:
        check_output_dir(tmp_path / name)
    assert "\n" not in str(error.value)


# Checkpoints

LAYOUTS = {
    "one process": ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"],
    "ddp, sharded": [
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
        *("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"),
    ],
    "adapter": ["adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"],
    "zero3": [
        *("global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt", "global_step2/mp_rank_00_model_states.pt"),
        *("model.safetensors", "rng_state_0.pth", "rng_state_1.pth"),
    ],
    "fsdp": ["pytorch_model_fsdp.bin", "optimizer.bin", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"],
}
FREE = ("config.json", "rng_state_1.pth", "model.safetensors.index.json")


def write_checkpoint(directory: Path, layout: str) -> list[Path]:
    """The files of a checkpoint, as far as they are looked at."""
    paths = [directory / name for name in (*LAYOUTS[layout], "trainer_state.json")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file({"weight": torch.ones(9, 9)}, path)
        elif path.suffix == ".json":
            shards = {name: name for name in LAYOUTS[layout] if "-of-" in name}
            path.write_text(json.dumps({"log_history": [], "weight_map": shards}))
        else:
            torch.save({"state": torch.ones(9, 9)}, path)
    return paths


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_without_a_file_or_with_a_damaged_one_is_told_by_its_name(tmp_path, layout):
    for index, name in enumerate((*LAYOUTS[layout], "trainer_state.json")):
        for what, damage in {"gone": Path.unlink, "cut": cut, "garbage": lambda path: path.write_text("{,")}.items():
            directory = tmp_path / f"{index}-{what}"
            write_checkpoint(directory, layout)
            assert why_not_whole(directory) is None
            damage(directory / name)
            # Not all checkpoints have one; and DeepSpeed's own files have the weights, too.
            if what == "gone" and (name in FREE or "/" in name or (layout, name) == ("zero3", "model.safetensors")):
                continue
            named = name if what != "gone" else name[:9]
            assert named in (why_not_whole(directory) or ""), (name, what)


def test_the_last_checkpoint_that_reads_is_found_and_later_ones_are_named_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("gpm_trl"), "propagate", True)
    for step in (2, 10, 12):
        write_checkpoint(tmp_path / f"checkpoint-{step}", "one process")
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10", "checkpoint-12"]
    assert not caplog.messages
    cut(tmp_path / "checkpoint-12" / "optimizer.pt")
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]
    (message,) = caplog.messages
    assert "checkpoint-12, since its optimizer.pt is damaged" in message
