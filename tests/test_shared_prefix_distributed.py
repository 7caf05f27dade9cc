"""Packed rows on two real processes, replicated or sharded, train what padded rows train in one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from filelock import FileLock
from peft import PeftModel
from safetensors.torch import load_file
from shared_prefix_run import fixed_rows

from gpm_trl import GPMForPreference

SCRIPT = Path(__file__).with_name("shared_prefix_run.py")
pytestmark = pytest.mark.multiprocess

CASES = {
    "one": ("full", "lora", "bf16"),
    "ddp": ("full", "lora", "checkpointing", "reentrant", "bf16"),
    "fsdp2": ("full", "checkpointing"),
    "zero3": ("full", "lora", "checkpointing", "reentrant"),
}
WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPGPMForPreference", "zero3": "DeepSpeedEngine"}
ALL = [(distribution, case) for distribution in WRAPPERS for case in CASES[distribution]]
# Sharding that leaves no weight whole, however small.
ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), "auto"),
    **dict.fromkeys(("gradient_accumulation_steps", "gradient_clipping"), "auto"),
}
FSDP2 = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_transformer_layer_cls_to_wrap": "Qwen3DecoderLayer",
    "fsdp_reshard_after_forward": True,
    "fsdp_state_dict_type": "FULL_STATE_DICT",
    "fsdp_cpu_ram_efficient_loading": False,
}


def launcher(distribution: str, directory: Path) -> list[str]:
    """`accelerate launch` with a config file. (With MULTI_CPU, it would start one process and not say so.)"""
    (directory / "deepspeed.json").write_text(json.dumps(ZERO3))
    deepspeed = {"deepspeed_config_file": str(directory / "deepspeed.json"), "zero3_init_flag": True}
    particular = {
        "ddp": {"distributed_type": "MULTI_GPU"},
        "fsdp2": {"distributed_type": "FSDP", "fsdp_config": FSDP2},
        "zero3": {"distributed_type": "DEEPSPEED", "deepspeed_config": deepspeed},
    }[distribution]
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "use_cpu": True,
        "num_processes": 2,
        "num_machines": 1,
        "machine_rank": 0,
        "main_process_port": 0,
        **particular,
    }
    (directory / "accelerate.json").write_text(json.dumps(config))
    return ["-m", "accelerate.commands.launch", "--config_file", str(directory / "accelerate.json")]


def run(distribution: str, root: Path) -> Path:
    """Where `shared_prefix_run.py` writes what came out; it runs once for all tests, of all workers of pytest."""
    directory = root / distribution
    result = directory / "result.json"
    with FileLock(root / f"{distribution}.lock"):
        if not result.exists():
            directory.mkdir()
            model = directory / "model"
            tiny_model().save_pretrained(model)
            alone = distribution == "one"
            launch = [] if alone else launcher(distribution, directory)
            rows = "padded" if alone else "packed"
            finished = subprocess.run(
                [sys.executable, *launch, str(SCRIPT), str(model), str(directory), rows, *CASES[distribution]],
                capture_output=True,
                text=True,
                timeout=300,
                env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
            )
            result.write_text(json.dumps([finished.returncode, finished.stderr[-3000:]]))
    code, errors = json.loads(result.read_text())
    assert code == 0, errors
    return directory


def reports(directory: Path, num_ranks: int) -> list[dict]:
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(num_ranks)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory that the workers of pytest share."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared_prefix_distributed"
    directory.mkdir(exist_ok=True)
    return directory


@pytest.mark.parametrize("distribution", WRAPPERS)
def test_two_processes_run_under_the_wrapper_that_was_asked_for(root, distribution):
    whole = reports(run("one", root) / "full", 1)[0]["held"]
    for report in reports(run(distribution, root) / "full", 2):
        assert report["world_size"] == 2
        assert report["wrapper"] == WRAPPERS[distribution]
        share = report["held"] / whole
        assert share == 1 if distribution == "ddp" else 0.45 < share < 0.55


@pytest.mark.parametrize("distribution", WRAPPERS)
def test_ranks_and_accumulated_batches_have_unequal_numbers_of_comparisons(root, distribution):
    """Or the means of ranks or batches could stand for that of the step."""
    (one,) = reports(run("one", root) / "full", 1)
    first, second = reports(run(distribution, root) / "full", 2)
    assert not any(one["packed"])
    assert all(first["packed"])
    assert all(second["packed"])
    pairs = list(zip(first["comparisons"], second["comparisons"], strict=True))
    assert [sum(pair) for pair in pairs] == one["comparisons"]
    assert sum(a != b for a, b in pairs) >= 6
    assert sum(a != b for a, b in zip(one["comparisons"][::2], one["comparisons"][1::2], strict=True)) >= 4


@pytest.mark.parametrize(("distribution", "case"), ALL)
def test_packed_rows_on_two_ranks_train_as_padded_rows_in_one_process(root, distribution, case):
    reference = run("one", root) / (case if case in ("lora", "bf16") else "full")
    directory = run(distribution, root) / case
    tolerance = 0.03 if case == "bf16" else 1e-4
    (one,) = reports(reference, 1)
    for rank, two in enumerate(reports(directory, 2)):
        assert len(two["logs"]) == 6
        for expected, found in zip(one["logs"], two["logs"], strict=True):
            assert found["loss"] == pytest.approx(expected["loss"], abs=tolerance)
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2 * tolerance)
            assert found["num_tokens"] == expected["num_tokens"]
        torch.testing.assert_close(
            load_file(directory / f"{rank}.safetensors")["embeddings"],
            load_file(reference / "0.safetensors")["embeddings"],
            atol=tolerance,
            rtol=0,
        )


@pytest.mark.parametrize(("distribution", "case"), [pair for pair in ALL if pair[1] in ("full", "lora")])
def test_the_saved_model_has_the_embeddings_of_the_run(root, distribution, case):
    directory = run(distribution, root)
    model = GPMForPreference.from_pretrained(directory / ("model" if case == "lora" else case))
    untrained = GPMForPreference.from_pretrained(directory / "model")
    if case == "lora":
        model = PeftModel.from_pretrained(model, directory / case).eval()
    with torch.no_grad():
        found, before = model(**fixed_rows()).embeddings, untrained(**fixed_rows()).embeddings
    expected = load_file(directory / case / "0.safetensors")["embeddings"]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert (found - before).abs().max() > 0.05
