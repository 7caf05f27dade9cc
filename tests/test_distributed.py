"""Two real processes (gloo) do what one does."""

import json
from pathlib import Path

import pytest
import torch
from launching import launch, sharding_config
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("distributed_run.py")
pytestmark = pytest.mark.multiprocess


def run(num_processes: int, per_device_batch_size: int, output_dir: Path) -> tuple[dict, dict]:
    output_dir.mkdir()
    config = sharding_config("ddp", output_dir) if num_processes > 1 else None
    result = launch(config, SCRIPT, output_dir, per_device_batch_size)
    assert result.returncode == 0, result.stderr
    return load_file(output_dir / "weights.safetensors"), json.loads((output_dir / "report.json").read_text())


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    return run(1, 4, directory / "one"), run(2, 2, directory / "two")


def test_the_launcher_starts_as_many_processes_as_asked(one_and_two):
    assert [report["world_size"] for _, report in one_and_two] == [1, 2]


def test_two_ranks_end_in_the_weights_of_one(one_and_two):
    (one, _), (two, _) = one_and_two
    for name, weight in one.items():
        torch.testing.assert_close(
            two[name], weight, atol=2e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_two_ranks_log_the_numbers_of_one(one_and_two):
    """Training and evaluation, with prompts of unequal numbers of comparisons and an odd number of rows."""
    (_, one), (_, two) = one_and_two
    timing = ("runtime", "per_second", "preparation_time", "flos")
    compared = 0
    for first, second in zip(one["log_history"], two["log_history"], strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            if not name.endswith(timing):
                assert second[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, first, second)
                compared += 1
    assert compared > 50


def test_a_learned_temperature_may_be_sharded(tmp_path):
    """FSDP2 gives each rank a part of every parameter, of one with a single element too."""
    script = Path(__file__).with_name("temperature_run.py")
    launch(sharding_config("ddp", tmp_path), script, tmp_path).check_returncode()
    first, second = (tuple(map(float, (tmp_path / rank).read_text().split())) for rank in "01")
    assert first == second
    inside, outside, gradient = first
    assert inside == outside == pytest.approx(0.5)
    assert gradient != 0
