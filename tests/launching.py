"""Real processes on CPUs, for tests: how they are launched, and what they leave."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

LAUNCHED = Path(__file__).with_name("launched.py")
ACCELERATE_CONFIGS = Path(__file__).parents[1] / "recipes" / "accelerate_configs"
# Sharding that leaves no weight whole, however small.
ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), "auto"),
    **dict.fromkeys(("gradient_accumulation_steps", "gradient_clipping"), "auto"),
    "bf16": {"enabled": "auto"},
}


def cpu_config(name: str, directory: Path, num_processes: int = 2, **changes: Any) -> Path:
    """
    The accelerate config of the recipes of that name, on CPUs of this machine.

    (`use_cpu` must be said in the file: with `accelerate launch --cpu`, and with MULTI_CPU, one process is started and
    nothing said.)
    """
    config = yaml.safe_load((ACCELERATE_CONFIGS / f"{name}.yaml").read_text())
    config |= {"use_cpu": True, "num_processes": num_processes, "num_machines": 1, "main_process_port": 0, **changes}
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return path


def sharding_config(name: str, directory: Path) -> Path:
    """`cpu_config` for comparisons with one process: in float32, and with ZeRO-3 of every weight."""
    changes: dict[str, Any] = {"mixed_precision": "no"}
    if name == "zero3":
        (directory / "deepspeed.json").write_text(json.dumps(ZERO3))
        changes["mixed_precision"] = None  # accelerate refuses what DeepSpeed's own file could say
        changes["deepspeed_config"] = {
            "deepspeed_config_file": str(directory / "deepspeed.json"),
            "zero3_init_flag": True,
        }
    return cpu_config(name, directory, **changes)


def launch(
    config: Path | None, *arguments: Any, timeout: int = 300, **environment: str
) -> subprocess.CompletedProcess:
    """Run a script, or `-m` and a module, by `accelerate launch`, or in one process without a config."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config)] if config else []
    return subprocess.run(
        [sys.executable, *launcher, str(LAUNCHED), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            **environment,
        },
    )


def once(directory: Path, run: Callable[[], subprocess.CompletedProcess]) -> Path:
    """`directory`, for which `run`, which must succeed, runs once for all tests, of all workers of pytest."""
    result = directory / "result.json"
    with FileLock(f"{directory}.lock"):
        if not result.exists():
            directory.mkdir()
            finished = run()
            result.write_text(json.dumps([finished.returncode, finished.stderr]))
    code, errors = json.loads(result.read_text())
    assert code == 0, errors
    return directory


def shared_directory(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """A directory that the workers of pytest share."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    directory.mkdir(exist_ok=True)
    return directory


def reports(directory: Path, num_ranks: int) -> list[dict]:
    """What each rank has written to `<rank>.json`."""
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(num_ranks)]
