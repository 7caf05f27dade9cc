"""Two real processes (gloo) do what one does."""

import json
from pathlib import Path

import distributed_run
import pytest
import torch
from launching import launch, sharding_config
from safetensors.torch import load_file

pytestmark = pytest.mark.multiprocess


def results(output_dir: Path) -> tuple[dict, dict]:
    return load_file(output_dir / "final" / "model.safetensors"), json.loads((output_dir / "report.json").read_text())


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    directory = tmp_path_factory.mktemp("one")
    distributed_run.main(directory, 4)
    return results(directory)


@pytest.mark.parametrize(
    ("sharding", "wrapper"),
    [("ddp", "DistributedDataParallel"), pytest.param("zero3", "DeepSpeedEngine", marks=pytest.mark.smoke)],
)
def test_two_ranks_do_what_one_does(one_rank, tmp_path, sharding, wrapper):
    """In weights and logs, with prompts of unequal numbers of comparisons and an odd number of rows."""
    launched = launch(sharding_config(sharding, tmp_path), distributed_run.__file__, tmp_path, 2)
    assert launched.returncode == 0, launched.stderr
    (one, of_one), (two, of_two) = one_rank, results(tmp_path)
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
