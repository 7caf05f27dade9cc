"""GPRLTrainer on two real processes trains what it trains in one, and its monitor acts alike on both."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from launching import cpu_config, launch, once, reports, shared_directory

from gpm_trl.cli.quickstart import byte_tokenizer, save_tiny_decoder

SCRIPT = Path(__file__).with_name("gprl_run.py")
pytestmark = pytest.mark.multiprocess


def run(num_ranks: int, tmp_path_factory) -> list[dict]:
    """What each rank has written."""
    directory = shared_directory(tmp_path_factory, "gprl_distributed") / str(num_ranks)

    def start():
        save_tiny_decoder(directory / "policy", 0)
        tiny_model().save_pretrained(directory / "gpm")
        byte_tokenizer().save_pretrained(directory / "gpm")
        return launch(
            None if num_ranks == 1 else cpu_config("ddp", directory, mixed_precision="no"), SCRIPT, directory
        )

    return reports(once(directory, start), num_ranks)


def test_two_ranks_are_one_and_resumed_is_uninterrupted(tmp_path_factory):
    (one,) = run(1, tmp_path_factory)
    assert min(one["whole"]["logs"][-1][f"drift/weight_{block}"] for block in (1, 2)) < 1
    assert one["whole"]["beta"] > 0.04
    ranks = run(2, tmp_path_factory)
    assert ranks[0]["whole"]["state"] == ranks[1]["whole"]["state"]
    for rank in [one, *ranks]:
        for name in ("whole", "resumed"):
            found, expected = rank[name], one["whole"]
            torch.testing.assert_close(
                torch.tensor(found["weights"]), torch.tensor(expected["weights"]), rtol=0, atol=1e-5
            )
            assert found["beta"] == pytest.approx(expected["beta"], rel=1e-9)
            assert len(found["logs"]) == len(expected["logs"]) == 4
            for entry, single in zip(found["logs"], expected["logs"], strict=True):
                for metric in ("loss", "drift/share_1", "drift/weight_1", "beta", "grad_norm"):
                    assert entry[metric] == pytest.approx(single[metric], rel=1e-4, abs=1e-5), metric
