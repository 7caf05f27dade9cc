"""The commands, end to end, on a real model: train an adapter, score, evaluate, merge, and align a policy with it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import assistant, user
from safetensors.torch import load_file

from .parts import part

pytestmark = pytest.mark.real

QUESTIONS = {"What is 2 + 2?": ("4", "5"), "The capital of France?": ("Paris", "Rome"), "Not hot?": ("Cold", "")}
TRAINING = (
    *("--use_cpu=True", "--report_to=none", "--disable_tqdm=True", "--save_strategy=no", "--logging_steps=1"),
    *("--gradient_checkpointing=False", "--use_peft", "--lora_r=4", "--learning_rate=1e-3", "--seed=1"),
)


def gpm_trl(*arguments: str | Path) -> str:
    """Run a command that must succeed; returns what it printed."""
    command = [sys.executable, "-m", "gpm_trl_cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{arguments[0]}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A directory with pairs to train and evaluate on, and the same questions with three responses each to score."""
    directory = tmp_path_factory.mktemp("data")
    pairs = [
        {"prompt": [user(question)], "chosen": [assistant(right)], "rejected": [assistant(wrong)]}
        for question, (right, wrong) in QUESTIONS.items()
    ]
    write_lines(directory / "pairs.jsonl", pairs)
    rows = [
        {"prompt": row["prompt"], "responses": [*pair, "No."]}
        for row, pair in zip(pairs, QUESTIONS.values(), strict=True)
    ]
    write_lines(directory / "rows.jsonl", rows)
    write_lines(directory / "prompts.jsonl", [{"prompt": row["prompt"]} for row in pairs])
    return directory


@pytest.fixture(scope="module")
def adapter(data, tmp_path_factory):
    """The directory of an adapter of SmolLM2, which `gpm-trl gpm` has trained for four steps."""
    directory = tmp_path_factory.mktemp("trained") / "adapter"
    names = (f"--model_name_or_path={part('smollm2-135m')}", f"--dataset_name={data / 'pairs.jsonl'}")
    batches = ("--per_device_train_batch_size=3", "--max_steps=4", "--lr_scheduler_type=constant")
    printed = gpm_trl("gpm", *names, *TRAINING, *batches, f"--output_dir={directory}")
    assert f"Model saved to {directory}." in printed
    assert printed.count("'loss'") == 4
    return directory


@pytest.fixture(scope="module")
def scored(adapter, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("scored") / "scores.jsonl"
    printed = gpm_trl("score", f"--model={adapter}", f"--input={data / 'rows.jsonl'}", f"--output={output}")
    assert "Scored 3 rows" in printed
    return read_lines(output)


def test_scores_are_antisymmetric_and_rank_the_responses(scored, data):
    for row, given in zip(scored, read_lines(data / "rows.jsonl"), strict=True):
        assert {name: row[name] for name in given} == given
        size, matrix = range(len(row["responses"])), row["matrix"]
        assert all(matrix[i][j] == -matrix[j][i] for i in size for j in size)
        assert all(abs(row["probabilities"][i][j] + row["probabilities"][j][i] - 1) < 1e-6 for i in size for j in size)
        assert row["ranking"] == sorted(size, key=lambda i: -row["values"][i])
        assert any(value != 0 for value in row["values"])


def test_what_was_trained_on_is_preferred(scored, adapter, data, tmp_path):
    """By the scores, and by the report of `evaluate`."""
    report_file = tmp_path / "report.json"
    dataset = f"--dataset={data / 'pairs.jsonl'}"
    printed = gpm_trl("evaluate", f"--model={adapter}", dataset, f"--output={report_file}")
    report = json.loads(report_file.read_text())
    (model,) = report["models"]
    assert report["rows"] == model["overall"]["comparisons"] == 3
    assert all(row["matrix"][0][1] > 0 for row in scored)
    assert model["overall"]["accuracy"] == 1
    assert str(adapter) in printed


def test_a_merged_model_scores_as_its_adapter(scored, adapter, data, tmp_path):
    merged, output = tmp_path / "merged", tmp_path / "scores.jsonl"
    assert f"Model saved to {merged}." in gpm_trl("merge", adapter, merged)
    assert (merged / "model.safetensors").exists()
    assert not (merged / "adapter_config.json").exists()
    gpm_trl("score", f"--model={merged}", f"--input={data / 'rows.jsonl'}", f"--output={output}")
    for row, expected in zip(read_lines(output), scored, strict=True):
        for actual, numbers in zip(row["matrix"], expected["matrix"], strict=True):
            assert actual == pytest.approx(numbers, abs=1e-5)


def test_a_policy_is_aligned_with_the_trained_model(adapter, data, tmp_path):
    directory = tmp_path / "policy"
    names = (f"--model_name_or_path={part('smollm2-135m')}", f"--dataset_name={data / 'prompts.jsonl'}")
    sampling = ("--num_generations=2", "--per_device_train_batch_size=2", "--max_completion_length=8", "--max_steps=2")
    judge = f"--reward_model_path={adapter}"
    printed = gpm_trl("gpo", *names, *TRAINING, *sampling, judge, f"--output_dir={directory}")
    assert f"Model saved to {directory}." in printed
    assert printed.count("'loss'") == 2
    trained = load_file(directory / "adapter_model.safetensors")
    assert any(weight.any() for name, weight in trained.items() if "lora_B" in name)  # they start at zero
