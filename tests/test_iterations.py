"""The recipe `iterations`: samples, scores, policies, and runs that were killed or divided among processes."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import digest
from launching import launch, sharding_config
from safetensors.torch import load_file

from gpm_trl import PreferenceScorer
from gpm_trl.cli.quickstart import byte_tokenizer
from gpm_trl.cli.training import run_training

SCRIPT = Path(__file__).parents[1] / "recipes" / "iterations" / "run.py"
K = 4
# The process kills itself when it comes to a method for the n-th time.
KILLED = """
import importlib.util, os, signal, sys
import conftest
spec = importlib.util.spec_from_file_location("iterations", sys.argv[1])
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)
owner = {"sample_and_score": recipe.Sampler, "training_step": recipe.GPOTrainer}[sys.argv[2]]
original, left = getattr(owner, sys.argv[2]), [int(sys.argv[3])]

def killed(*args, **kwargs):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(owner, sys.argv[2], killed)
recipe.run_training(recipe.make_parser(), recipe.check, sys.argv[4:], recipe.run)
"""


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("recipe_iterations", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for its types
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def command(decoder, gpm, tmp_path_factory):
    """A command line without `output_dir`; later arguments win. Two iterations of six prompts, sampled in pairs."""
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [{"prompt": f"Question {index}", "topic": chr(97 + index)} for index in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [f"--model_name_or_path={decoder}", f"--reward_model_path={gpm}", f"--dataset_name={path}"]
    sizes = [f"--num_generations={K}", f"--per_device_train_batch_size={K}", f"--per_device_eval_batch_size={2 * K}"]
    more = ["--max_completion_length=6", "--learning_rate=1e-3", "--use_cpu=True", "--report_to=none"]
    more += ["--logging_steps=5", "--disable_tqdm=True", "--gradient_checkpointing=False"]
    return [*names, *sizes, *more, "--iterations=2", "--save_strategy=steps", "--save_steps=3"]


def run(recipe, *arguments: str) -> int:
    return run_training(recipe.make_parser(), recipe.check, list(arguments), recipe.run)


@pytest.fixture(scope="module")
def whole(recipe, command, tmp_path_factory):
    """The directory of two iterations that nothing interrupted."""
    output_dir = tmp_path_factory.mktemp("whole")
    assert run(recipe, *command, f"--output_dir={output_dir}") == 0
    return output_dir


def contents(output_dir: Path) -> dict[str, str]:
    """Digests of the samples and policies of all iterations, and which of them are done."""
    names = ("*/samples/*.jsonl", "*/policy/*.safetensors", "*/done")
    return {str(path.relative_to(output_dir)): digest(path) for name in names for path in output_dir.glob(name)}


def samples(directory: Path) -> list[dict]:
    paths = sorted((directory / "samples").glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def test_samples_are_completions_of_the_last_policy_with_their_scores(whole, gpm):
    tokenizer, scorer = byte_tokenizer(), PreferenceScorer.from_pretrained(gpm)
    rows = [row for number in (1, 2) for row in samples(whole / f"iteration-{number}")]
    assert [(row["prompt"], row["topic"]) for row in rows] == [(f"Question {i}", chr(97 + i)) for i in range(12)]
    for row in rows:
        assert len(set(map(tuple, row["completion_ids"]))) > 1
        assert tokenizer.batch_decode(row["completion_ids"], skip_special_tokens=True) == row["completions"]
        assert all(len(ids) == 6 or ids[-1] == tokenizer.eos_token_id for ids in row["completion_ids"])
        expected = scorer.matrix([row["prompt"]], [row["completions"]])[0] / scorer.temperature
        assert expected.shape == (K, K)
        torch.testing.assert_close(torch.tensor(row["scores"]), expected.float(), atol=1e-4, rtol=1e-4)


def test_each_iteration_begins_with_the_policy_of_the_last(recipe, command, decoder, whole, tmp_path, monkeypatch):
    """With an adapter, whose reference then is itself; and each samples with the policy that it trains."""
    seen = []

    def sampler(self, arguments):
        init(self, arguments)
        seen.append((arguments["model"], {name: value.clone() for name, value in self.policy.state_dict().items()}))

    init = recipe.Sampler.__init__
    monkeypatch.setattr(recipe.Sampler, "__init__", sampler)
    assert run(recipe, *command, f"--output_dir={tmp_path}", "--use_peft", "--lora_r=4") == 0
    policy = tmp_path / "iteration-1" / "policy"
    assert [name for name, _ in seen] == [str(decoder), str(policy)]
    adapters = [load_file(tmp_path / f"iteration-{number}/policy/adapter_model.safetensors") for number in (1, 2)]
    assert any(not torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    loaded = {name: value for name, value in seen[1][1].items() if "lora_" in name}
    assert len(loaded) == len(adapters[0]) > 0
    for name, value in adapters[0].items():
        (other,) = [key for key in loaded if key.replace(".default", "") in name]
        assert torch.equal(loaded[other], value)
    weights = load_file(whole / "iteration-1" / "policy" / "model.safetensors")
    assert any(not torch.equal(value, load_file(decoder / "model.safetensors")[key]) for key, value in weights.items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("--iterations=3", "`iterations` = 2, not 3"),
        ("--temperature=0.9", "`temperature` = 0.7, not 0.9"),
        ('--chat_template_kwargs={"a": 1}', "`chat_template_kwargs` = None, not {'a': 1}"),
        ("--loss_type=dsppo", "samples do not keep"),
        ("--iterations=13", "`iterations` is 13 for 12 prompts"),
        ("--use_vllm=True", "`use_vllm`"),
        ("--resume_from_checkpoint=true", "`resume_from_checkpoint`"),
        ("--dataset_streaming=True", "no stream"),
        ("--remove_unused_columns=True", "would drop the sampled `completions`"),
    ],
)
def test_settings_that_cannot_be_used_are_one_line(recipe, command, whole, capsys, changed, message):
    before = contents(whole)
    assert run(recipe, *command, f"--output_dir={whole}", changed, "--max_steps=9") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert message in line
    assert contents(whole) == before


def test_a_prompt_beyond_the_context_is_told_before_any_is_sampled(recipe, command, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(recipe.Sampler, "sample_and_score", None)
    assert run(recipe, *command, f"--output_dir={tmp_path / 'out'}", "--max_completion_length=600") == 2
    assert "beyond the policy's context: lower it" in capsys.readouterr().err


def test_what_is_missing_is_made_again_and_nothing_else(recipe, command, whole, capsys, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    batch = whole / "iteration-2" / "samples" / "batch-00001.jsonl"
    (whole / "iteration-2" / "done").unlink()
    text = batch.read_text()
    batch.unlink()
    (batch.parent / "_saving-x").mkdir()  # as a killed process may have left it
    (batch.parent / "_saving-x" / batch.name).write_text(text[:40])
    assert run(recipe, *command, f"--output_dir={whole}") == 0
    assert batch.read_text() == text
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert {path.parent.name for path in before} >= {"policy", "samples"}
    assert batch.name in changed
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if "iteration-1" in str(path))
    monkeypatch.setattr(recipe, "train", lambda *args: pytest.fail("an iteration that is done was trained"))
    monkeypatch.setattr(recipe, "Sampler", lambda *args: pytest.fail("a model was loaded"))
    capsys.readouterr()
    assert run(recipe, *command, f"--output_dir={whole}") == 0
    assert capsys.readouterr().out == f"The policy of the last iteration is {whole}/iteration-2/policy.\n"


def kill(name: str, calls: int, arguments: list[str]) -> None:
    command = [sys.executable, "-c", KILLED, str(SCRIPT), name, str(calls), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent)
    assert finished.returncode == -9, finished.stderr


@pytest.mark.multiprocess
@pytest.mark.parametrize(("stage", "calls", "left"), [("sample_and_score", 2, 2), ("training_step", 6 + 4, 6 + 2 + 1)])
def test_a_killed_run_ends_as_an_uninterrupted_one(recipe, command, whole, tmp_path, stage, calls, left):
    """To the last bit, in the first samples and in the second training after a checkpoint."""
    arguments = [*command, f"--output_dir={tmp_path}"]
    kill(stage, calls, arguments)
    before = contents(tmp_path)
    assert len(before) == left - (stage == "training_step")
    assert before.items() <= contents(whole).items()
    assert run(recipe, *arguments) == 0
    assert contents(tmp_path) == contents(whole)


@pytest.mark.multiprocess
@pytest.mark.parametrize("distribution", ["ddp", "zero3"])
def test_two_processes_sample_what_one_does(command, whole, tmp_path, distribution):
    """Three batches an iteration: in the last round, one process has none."""
    config = sharding_config(distribution, tmp_path)
    finished = launch(config, SCRIPT, *command, f"--output_dir={tmp_path / 'out'}")
    assert finished.returncode == 0, finished.stderr
    assert sum(line.startswith(("Iteration", "Model", "The policy")) for line in finished.stdout.splitlines()) == 7
    for row, expected in zip(samples(tmp_path / "out/iteration-1"), samples(whole / "iteration-1"), strict=True):
        assert {**row, "scores": None} == {**expected, "scores": None}
        torch.testing.assert_close(torch.tensor(row["scores"]), torch.tensor(expected["scores"]), atol=1e-4, rtol=1e-4)
    for number in (1, 2):
        assert len(samples(tmp_path / f"out/iteration-{number}")) == 6
        assert (tmp_path / f"out/iteration-{number}/done").exists()
        state = tmp_path / f"out/iteration-{number}/policy/checkpoint-3/trainer_state.json"
        assert json.loads(state.read_text())["global_step"] == 3  # of two prompts
