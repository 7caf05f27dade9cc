"""GPOTrainer on two real processes, replicated or sharded, trains what it trains in one."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from gpo_run import CASES, fixed_ids
from launching import launch, once, reports, sharding_config, shared_directory
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gpm_trl.cli.quickstart import byte_tokenizer, save_tiny_decoder

SCRIPT = Path(__file__).with_name("gpo_run.py")
pytestmark = pytest.mark.multiprocess

GIVEN = [case for case in CASES if not case.startswith(("sampled", "rmsprop"))]
RUN = {
    "one": tuple(GIVEN),
    "ddp": (*GIVEN, "sampled"),
    "zero3": ("in_parts", "sync", "sync_lora", "resume_lora", "rmsprop", "sampled", "sampled_lora"),
    "fsdp2": ("in_parts", "sync", "sync_lora", "rmsprop", "rmsprop_lora", "sampled"),
}
WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp2": "FSDP", "zero3": "DeepSpeedEngine"}


def pairs(*cases: str) -> list[tuple[str, str]]:
    """Launchers of two processes, with those of the cases that they run."""
    return [(name, case) for name in WRAPPERS for case in RUN[name] if case in cases]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return shared_directory(tmp_path_factory, "gpo_distributed")


def run(name: str, root: Path) -> Path:
    """Where `gpo_run.py` writes what came out."""
    directory = root / name

    def start():
        save_tiny_decoder(directory / "policy", 0)
        tiny_model().save_pretrained(directory / "gpm")
        byte_tokenizer().save_pretrained(directory / "gpm")
        config = None if name == "one" else sharding_config(name, directory)
        return launch(config, SCRIPT, directory, *RUN[name])

    return once(directory, start)


def logps(directory: Path, rank: int = 0) -> torch.Tensor:
    return load_file(directory / f"{rank}.safetensors")["logps"]


def of_logits(model) -> torch.Tensor:
    """Log-probabilities of the fixed tokens at the temperature of the runs."""
    ids = fixed_ids()
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits[:, :-1] / 0.7
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


@pytest.mark.parametrize("name", WRAPPERS)
def test_reference_and_judge_are_sharded_where_the_policy_is_but_a_judge_under_fsdp(root, name):
    (whole,) = reports(run("one", root) / "sync", 1)
    for report in reports(run(name, root) / "sync", 2):
        assert report["world_size"] == 2
        assert report["wrapper"].startswith(WRAPPERS[name])
        for model in ("policy", "reference", "judge"):
            share = report["held"][model] / whole["held"][model]
            is_whole = name == "ddp" or (name == "fsdp2" and model == "judge")
            assert share == 1 if is_whole else 0.45 < share < 0.6


@pytest.mark.parametrize(("name", "case"), pairs(*GIVEN))
def test_two_ranks_train_as_one(root, name, case):
    """Also where a group ends neither with a rank nor with a batch: see `CASES`."""
    expected, directory = run("one", root) / case, run(name, root) / case
    (one,) = reports(expected, 1)
    untrained = of_logits(AutoModelForCausalLM.from_pretrained(run("one", root) / "policy"))
    assert (logps(expected) - untrained).abs().max() > 0.05
    for rank, two in enumerate(reports(directory, 2)):
        assert len(two["logs"]) == len(one["logs"]) >= 4
        for found, single in zip(two["logs"], one["logs"], strict=True):
            assert found["loss"] == pytest.approx(single["loss"], rel=1e-5, abs=1e-5)
            assert found["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-4)
        torch.testing.assert_close(logps(directory, rank), logps(expected), atol=1e-4, rtol=0)
        # Signals, in particular of a model that scores on two ranks, and of groups of which each rank has a part.
        assert torch.tensor(one["signals"][0]["advantages"]).abs().max() > 0.1
        for found, single in zip(two["signals"], one["signals"], strict=True):
            assert found.keys() == single.keys()
            for signal, values in single.items():
                torch.testing.assert_close(torch.tensor(found[signal]), torch.tensor(values), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", WRAPPERS)
def test_ranks_make_as_many_parts_of_a_batch(root, name):
    first, second = (report["num_parts"] for report in reports(run(name, root) / "in_parts", 2))
    assert [made for made, _ in first] == [made for made, _ in second]
    assert max(made for made, _ in first) > 1
    assert any(own != other for (_, own), (_, other) in zip(first, second, strict=True))


@pytest.mark.parametrize(("name", "case"), [("one", "sync"), ("one", "sync_lora"), *pairs("sync", "sync_lora")])
def test_the_reference_becomes_the_policy_every_two_steps_and_is_loaded_as_it_was_saved(root, name, case):
    for report in reports(run(name, root) / case, 1 if name == "one" else 2):
        divergences = [entry["objective/kl"] for entry in report["logs"]]
        assert report["updates"] == 2
        assert divergences[::2] == pytest.approx([0, 0, 0], abs=1e-5)
        assert all(abs(divergence) > 0.01 for divergence in divergences[1::2])
        assert report["reference"]["spoiled"] > 0.01
        assert report["reference"]["loaded"] == 0


@pytest.mark.parametrize(
    ("name", "case"),
    [("one", "resume"), ("one", "resume_lora"), *pairs("resume", "resume_lora", "rmsprop", "rmsprop_lora")],
)
def test_a_run_resumed_after_an_update_of_the_reference_is_the_uninterrupted_one(root, name, case):
    """In the middle of the second of three epochs, each of which has its own order and reference."""
    directory = run(name, root) / case
    num_ranks = 1 if name == "one" else 2
    for rank in range(num_ranks):
        whole, resumed = (reports(path, num_ranks)[rank] for path in (directory, directory / "resumed"))
        assert resumed["updates"] == whole["updates"] == 2
        assert len(resumed["signals"]) == len(whole["signals"]) - 5
        assert whole["signals"][:3] != whole["signals"][3:6] != whole["signals"][6:]
        for found, expected in zip(resumed["logs"], whole["logs"], strict=True):
            for metric in ("loss", "objective/kl", "grad_norm"):
                assert found[metric] == pytest.approx(expected[metric], rel=1e-5, abs=1e-6)
        torch.testing.assert_close(logps(directory / "resumed", rank), logps(directory, rank), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "case"), pairs("sampled", "sampled_lora"))
def test_policies_that_sample_are_evaluated_against_the_reference(root, name, case):
    for report in reports(run(name, root) / case, 2):
        (evaluation,) = report["evaluations"]
        assert 0.05 < evaluation["eval_win_rate"] < 0.95
        assert 0 < evaluation["eval_win_rate_ci"] < 1
        assert report["counted"][0] == 3  # of two rounds, the last of which has the first prompt again
        assert all(entry["completions/mean_length"] > 1 for entry in report["logs"])


@pytest.mark.parametrize(("name", "case"), pairs("sync", "sync_lora", "sampled", "sampled_lora"))
def test_the_saved_policy_is_that_of_the_run(root, name, case):
    directory = run(name, root)
    policy = AutoModelForCausalLM.from_pretrained(directory / "policy")
    before = of_logits(policy)
    if case.endswith("lora"):
        saved = PeftModel.from_pretrained(policy, directory / case)
    else:
        saved = AutoModelForCausalLM.from_pretrained(directory / case)
    found = of_logits(saved)
    torch.testing.assert_close(found, logps(directory / case), atol=1e-5, rtol=0)
    assert (found - before).abs().max() > 0.01
