"""What `tests/gpu/run.sh` runs on a GPU: every line of it, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

GPU = Path(__file__).parent / "gpu"
PARTS = {"kernels", "policies", "tests", "training", "updates", "ranking", "runs", "memory"}


def run(*arguments: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", GPU / "run.sh", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_every_line_runs_on_a_cpu(tmp_path):
    result = run("--tiny", "--out", tmp_path / "gpu.json")
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    log = (tmp_path / "gpu.log").read_text()
    assert not [row for row in rows if row["status"].startswith("FAILED")], log
    assert {row["part"] for row in rows} == PARTS
    reasons = {row["status"] for row in rows} - {"ok", "measured"}
    assert reasons <= {"not run: not installed", "not run: needs a GPU"}
    assert result.returncode == 0
    assert all(row["what"] in result.stdout for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    result = run("--out", tmp_path / "gpu.json")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "no CUDA device" in result.stderr
