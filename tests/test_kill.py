"""A run of two processes, of which one is killed, ends in the same weights when it is started again."""

import random
from pathlib import Path

import pytest
import torch
from kill_run import SAVE_STEPS, STEPS
from launching import cpu_config, launch, reports
from safetensors.torch import load_file

from gpm_trl.saving import whole_checkpoints

SCRIPT = Path(__file__).with_name("kill_run.py")
pytestmark = pytest.mark.multiprocess
FILES = {
    0: ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "trainer_state.json"),
    1: ("rng_state_1.pth",),
}


def kills() -> list[tuple[int, str]]:
    """Ranks, with the step or file at which they are killed: five steps at random, and each file of a checkpoint."""
    draw = random.Random(0)
    steps = [(draw.randrange(2), str(draw.randrange(1, STEPS))) for _ in range(5)]
    checkpoints = range(SAVE_STEPS, STEPS + 1, SAVE_STEPS)
    files = [(rank, f"checkpoint-{draw.choice(checkpoints)}/{file}") for rank in FILES for file in FILES[rank]]
    return steps + files


def run(config: str, directory: Path, *arguments):
    return launch(cpu_config(config, directory, mixed_precision="no"), SCRIPT, directory, *arguments)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


CASES = [pytest.param("ddp", 1, "5", marks=pytest.mark.smoke), ("ddp", 0, "checkpoint-6/trainer_state.json")]
SLOW = [
    *(("ddp", *kill) for kill in kills() if kill != (1, "5")),
    ("zero3", 0, "3"),
    ("zero3", 1, "checkpoint-4/rng_state_1.pth"),
]


@pytest.mark.parametrize(
    ("config", "rank", "where"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(config, tmp_path, rank, where):
    assert run(config, tmp_path, rank, where).returncode != 0
    step = int(where.split("/")[0].removeprefix("checkpoint-"))
    complete = whole_checkpoints(tmp_path / "run")
    assert (int(complete[-1].name.split("-")[1]) if complete else 0) == (step - 1) // SAVE_STEPS * SAVE_STEPS
    if where.startswith("checkpoint-"):
        assert (tmp_path / "run" / where).parent.exists()
    again = run(config, tmp_path)
    assert again.returncode == 0, again.stderr
    assert ("training begins at the start" in again.stderr) == (not complete)
    expected = weights(tmp_path / "whole")
    for name, found in weights(tmp_path / "run").items():
        torch.testing.assert_close(found, expected[name], atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("config", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_all_processes_end_where_one_computes_what_is_not_finite(config, tmp_path):
    script = Path(__file__).with_name("finite_run.py")
    result = launch(cpu_config(config, tmp_path, mixed_precision="no"), script, tmp_path)
    assert result.returncode == 0, result.stderr
    assert all("not finite at step 3" in message for message in reports(tmp_path, 2))
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
