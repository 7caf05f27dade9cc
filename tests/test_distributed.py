"""Two real processes (gloo) do what one does."""

import json
from pathlib import Path

import pytest
import torch
from launching import launch, sharding_config
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("distributed_run.py")
pytestmark = pytest.mark.multiprocess


def run(sharding: str | None, per_device_batch_size: int, output_dir: Path) -> tuple[dict, dict]:
    output_dir.mkdir()
    config = sharding_config(sharding, output_dir) if sharding else None
    result = launch(config, SCRIPT, output_dir, per_device_batch_size)
    assert result.returncode == 0, result.stderr
    return load_file(output_dir / "final" / "model.safetensors"), json.loads((output_dir / "report.json").read_text())


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return run(None, 4, tmp_path_factory.mktemp("ranks") / "one")


@pytest.mark.parametrize(
    ("sharding", "wrapper"),
    [("ddp", "DistributedDataParallel"), pytest.param("zero3", "DeepSpeedEngine", marks=pytest.mark.smoke)],
)
def test_two_ranks_do_what_one_does(one_rank, tmp_path, sharding, wrapper):
    """In weights and logs, with prompts of unequal numbers of comparisons and an odd number of rows."""
    (one, of_one), (two, of_two) = one_rank, run(sharding, 2, tmp_path / "two")
    assert (of_one["ranks"], of_two["ranks"], of_two["wrapper"]) == (1, 2, wrapper)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=2e-6, rtol=1e-4)
    timing = ("runtime", "per_second", "preparation_time", "flos")
    compared = 0
    for first, second in zip(of_one["logs"], of_two["logs"], strict=True):
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
