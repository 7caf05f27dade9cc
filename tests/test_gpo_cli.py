"""`gpm-trl gpo`: a run, iterations that go on after a kill, and one line for what it cannot use."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import digest, tiny_model
from launching import launch, sharding_config
from safetensors.torch import load_file

from gpm_trl import PreferenceScorer
from gpm_trl.cli.main import main as gpm_trl_main
from gpm_trl.cli.quickstart import byte_tokenizer
from gpm_trl.gpo.sampling import CompletionSampler
from gpm_trl.gpo.trainer import GPOTrainer

K = 4
TINY_RUN = [
    f"--num_generations={K}",
    f"--per_device_train_batch_size={K}",
    f"--per_device_eval_batch_size={2 * K}",
    "--max_completion_length=6",
    "--learning_rate=1e-3",
    "--use_cpu=True",
    "--report_to=none",
    "--logging_steps=5",
    "--disable_tqdm=True",
    "--gradient_checkpointing=False",
]
ITERATIONS = ["--iterations=2", "--save_strategy=steps", "--save_steps=3"]
# The process kills itself when it comes to a method for the n-th time, in the middle of it where that is a write.
KILLED = """
import os, signal, sys
from gpm_trl.cli.main import main
from gpm_trl.gpo.trainer import GPOTrainer
from gpm_trl.gpo.sampling import CompletionSampler

name, calls = sys.argv[1], int(sys.argv[2])
owner = CompletionSampler if name == "prediction_step" else GPOTrainer
original, count = getattr(owner, name), 0

def killed(self, *args, **kwargs):
    global count
    count += 1
    if count > calls:
        if name == "prediction_step":
            with open(self._path, "a") as file:
                file.write('{"prompt": "Question 4", "ro')
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)

setattr(owner, name, killed)
main(sys.argv[3:])
"""


@pytest.fixture(scope="module")
def gpm(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gpm")
    tiny_model().save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [{"prompt": f"Question {index}", "topic": chr(97 + index)} for index in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def command(decoder, gpm, prompts):
    """A command line without `output_dir`; later arguments win."""
    names = [f"--model_name_or_path={decoder}", f"--reward_model_path={gpm}", f"--dataset_name={prompts}"]
    return ["gpo", *names, *TINY_RUN]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The directory of two iterations that nothing interrupted."""
    output_dir = tmp_path_factory.mktemp("whole")
    assert gpm_trl_main([*command, *ITERATIONS, f"--output_dir={output_dir}"]) == 0
    return output_dir


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(output_dir: Path) -> dict[str, str]:
    """Digests of the samples and policies of all iterations, and which of them are done."""
    names = ("*/samples.jsonl", "*/policy/*.safetensors", "*/done")
    return {str(path.relative_to(output_dir)): digest(path) for name in names for path in output_dir.glob(name)}


def error_line(capsys) -> str:
    """What was printed on stderr by a command that refused its input: one line, and no traceback."""
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    lines = [line for line in printed.splitlines() if "error: " in line]
    assert len(lines) == 1
    return lines[0]


def kill(name: str, calls: int, arguments: list[str]) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", KILLED, name, str(calls), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == -9, finished.stderr


# --- A run -----------------------------------------------------------------------------------------------------------


def test_gpo_trains_from_a_config_file_and_the_command_line_wins(decoder, gpm, prompts, tmp_path, capsys):
    config, output_dir = tmp_path / "gpo.yaml", tmp_path / "policy"
    names = f"model_name_or_path: {decoder}\nreward_model_path: {gpm}\ndataset_name: {prompts}\n"
    config.write_text(f"{names}loss_type: sppo\nbeta: [0.5]\npairing: best_worst\n")
    run = ["gpo", "--config", str(config), *TINY_RUN, f"--output_dir={output_dir}", "--max_steps=2"]
    assert gpm_trl_main([*run, "--pairing=all"]) == 0
    assert f"Model saved to {output_dir}." in capsys.readouterr().out
    args = torch.load(output_dir / "training_args.bin", weights_only=False)
    assert (args.loss_type, args.beta, args.pairing, args.num_generations) == ("sppo", 0.5, "all", K)
    before, after = load_file(decoder / "model.safetensors"), load_file(output_dir / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_several_betas_are_one_for_each_epoch(command, tmp_path, capsys):
    run = [*command, f"--output_dir={tmp_path}", "--beta", "0.5", "0.1", "--num_train_epochs=2", "--logging_steps=12"]
    assert gpm_trl_main(run) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{'loss'")]
    assert len(lines) == 2
    assert "'beta': '0.1'" in lines[1]


def test_a_split_for_evaluation_gives_a_win_rate(command, prompts, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text(prompts.read_text())
    run = [*command, f"--output_dir={tmp_path}", f"--dataset_name={data}", "--max_steps=1"]
    assert gpm_trl_main([*run, "--eval_strategy=steps", "--eval_steps=1"]) == 0
    assert "eval_win_rate" in capsys.readouterr().out


# --- What it cannot use ----------------------------------------------------------------------------------------------

REFUSED = {
    "no reward model": (["--reward_model_path="], "`reward_model_path`"),
    "a reward model that is nowhere": (["--reward_model_path=nowhere"], "nowhere"),
    "a reward model that is a policy": (["--reward_model_path={decoder}"], "neither a general preference model"),
    "a policy that is nowhere": (["--model_name_or_path={config}-nowhere"], "nowhere"),
    "data that are nowhere": (["--dataset_name=nowhere.jsonl"], "There is no file"),
    "data without prompts": (["--dataset_name={others}"], "no `prompt`"),
    "one completion": (["--num_generations=1"], "`num_generations` is 1"),
    "an option that would be ignored": (["--epsilon=0.3"], "`epsilon`"),
    "an unknown option": (["--reward_modell=x"], "--reward_modell=x"),
    "an unknown loss": (["--loss_type=dpo"], "dpo"),
    "an unknown field": (["--config", "{config}"], "reward_modell"),
    "no iterations": (["--iterations=0"], "`iterations` is 0"),
    "more iterations than prompts": (["--iterations=13"], "12 prompts for 13"),
    "iterations of fewer prompts than are sampled together": (
        ["--iterations=12", "--per_device_train_batch_size=8"],
        "There are 1 prompts, but 2 are sampled together",
    ),
    "iterations of a stream": (["--iterations=2", "--dataset_streaming=True", "--max_steps=2"], "a stream"),
    "iterations and an evaluation": (
        ["--iterations=2", "--eval_strategy=steps", "--dataset_test_split=train"],
        "eval",
    ),
    "iterations of given completions": (["--iterations=1", "--dataset_name={given}"], "['completions']"),
    "iterations from a checkpoint": (
        ["--iterations=2", "--resume_from_checkpoint=true"],
        "`resume_from_checkpoint` would",
    ),
    "iterations with a reward model that is nowhere": (["--iterations=2", "--reward_model_path=nowhere"], "nowhere"),
    "iterations without prompts": (["--iterations=1", "--dataset_name={others}"], "no `prompt`"),
}


def refusal(command: list[str], tmp_path: Path, more: list[str], **names) -> int:
    """Exit code of a command that also had some other arguments, in which names of files may stand."""
    names["config"], names["others"], names["given"] = (tmp_path / name for name in ("a.yaml", "b.jsonl", "c.jsonl"))
    names["config"].write_text("reward_modell: x\n")
    names["others"].write_text('{"question": "a"}\n')
    names["given"].write_text(json.dumps({"prompt": "a", "completions": list("abcd")}) + "\n")
    arguments = [*command, f"--output_dir={tmp_path / 'out'}", *(text.format(**names) for text in more)]
    try:
        return gpm_trl_main(arguments)
    except SystemExit as stop:  # of `argparse`
        return stop.code


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_one_line(command, decoder, tmp_path, capsys, case):
    more, message = REFUSED[case]
    command = [text for text in command if not (text.startswith("--reward_model_path") and more[0].endswith("path="))]
    more = [text for text in more if text != "--reward_model_path="]
    assert refusal(command, tmp_path, more, decoder=decoder) == 2
    assert message in error_line(capsys)
    assert not (tmp_path / "out" / "iteration-1").exists()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
@pytest.mark.parametrize("more", [[], ["--iterations=2"]])
def test_vllm_that_is_not_installed_is_one_line(command, tmp_path, capsys, more):
    assert refusal(command, tmp_path, ["--use_vllm=True", *more]) == 2
    assert "vllm" in error_line(capsys).lower()


@pytest.mark.parametrize(
    ("row", "message"),
    [({"prompt": "Another", "completions": list("abcd")}, "other prompts"),
     ({"prompt": "Question 0", "completions": list("abc")}, "3 to a prompt, but `num_generations` is 4")],
)  # fmt: skip
def test_samples_that_are_not_of_this_run_are_one_line(command, tmp_path, capsys, row, message):
    path = tmp_path / "iteration-1" / "samples.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({**row, "row": 0}) + "\n")
    assert gpm_trl_main([*command, *ITERATIONS, f"--output_dir={tmp_path}"]) == 2
    assert message in error_line(capsys)
    assert len(rows_of(path)) == 1


# --- Iterations ------------------------------------------------------------------------------------------------------


def test_every_stage_of_an_iteration_is_a_file(whole, prompts):
    for number in (1, 2):
        directory = whole / f"iteration-{number}"
        assert sorted(path.name for path in directory.iterdir()) == ["done", "policy", "samples.jsonl"]
        part = rows_of(prompts)[:6] if number == 1 else rows_of(prompts)[6:]
        rows = rows_of(directory / "samples.jsonl")
        assert [{"prompt": row["prompt"], "topic": row["topic"]} for row in rows] == part
        assert (directory / "policy" / "model.safetensors").exists()


def test_samples_hold_completions_their_ids_and_what_the_model_says_of_them(whole, gpm):
    scorer = PreferenceScorer.from_pretrained(gpm)
    tokenizer = byte_tokenizer()
    for row in rows_of(whole / "iteration-2" / "samples.jsonl"):
        assert len(row["completions"]) == len(row["completion_ids"]) == K
        assert len(set(map(tuple, row["completion_ids"]))) > 1
        assert tokenizer.batch_decode(row["completion_ids"], skip_special_tokens=True) == row["completions"]
        scores = torch.tensor(row["scores"])
        assert scores.shape == (K, K)
        assert torch.equal(scores, -scores.T)
        expected = scorer.matrix([row["prompt"]], [row["completions"]])[0] / scorer.temperature
        torch.testing.assert_close(scores, expected.to(scores), atol=1e-4, rtol=1e-4)


def test_samples_can_be_trained_on_by_themselves(whole, decoder, tmp_path):
    names = [f"--model_name_or_path={decoder}", f"--dataset_name={whole / 'iteration-1' / 'samples.jsonl'}"]
    assert gpm_trl_main(["gpo", *names, *TINY_RUN, f"--output_dir={tmp_path}"]) == 0
    name = "model.safetensors"
    assert digest(tmp_path / name) == digest(whole / "iteration-1" / "policy" / name)


def spy(monkeypatch, owner: type, name: str, seen: list) -> None:
    """Remember the policy's weights whenever a method is called."""
    original = getattr(owner, name)

    def spied(self, *args, **kwargs):
        seen.append({key: value.detach().clone() for key, value in self.model.state_dict().items()})
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, spied)


def test_the_second_iteration_samples_and_starts_from_the_policy_of_the_first(
    command, decoder, whole, tmp_path, monkeypatch
):
    sampled, trained = [], []
    spy(monkeypatch, CompletionSampler, "sample", sampled)
    spy(monkeypatch, GPOTrainer, "train", trained)
    assert gpm_trl_main([*command, *ITERATIONS, f"--output_dir={tmp_path}"]) == 0
    first, second = (
        load_file(decoder / "model.safetensors"),
        load_file(tmp_path / "iteration-1" / "policy" / "model.safetensors"),
    )
    assert any(not torch.equal(first[name], second[name]) for name in first)
    for seen in (sampled, trained):
        for weights, expected in zip(seen, (first, second), strict=True):
            assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert contents(tmp_path) == contents(whole)  # deterministic given the seed


def test_an_adapter_goes_on_from_iteration_to_iteration(command, tmp_path, monkeypatch):
    sampled, trained = [], []
    spy(monkeypatch, CompletionSampler, "sample", sampled)
    spy(monkeypatch, GPOTrainer, "train", trained)
    run = [*command, *ITERATIONS, "--use_peft", "--lora_r=4", f"--output_dir={tmp_path}"]
    assert gpm_trl_main(run) == 0
    first, second = (load_file(tmp_path / f"iteration-{n}" / "policy" / "adapter_model.safetensors") for n in (1, 2))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    for name, weights in first.items():
        inserted = name.replace(".weight", ".default.weight")
        assert torch.equal(sampled[1][inserted], weights)
        assert torch.equal(trained[1][inserted], weights)
        # The reference of the second iteration is the adapter as it was, not the base model.
        assert torch.equal(trained[1][name.replace(".weight", ".ref.weight")], weights)


def test_default_batches_of_default_completions_are_rounded_to_whole_groups(decoder, gpm, prompts, tmp_path):
    names = [f"--model_name_or_path={decoder}", f"--reward_model_path={gpm}", f"--dataset_name={prompts}"]
    small = [text for text in TINY_RUN if "generations" not in text and "batch_size" not in text]
    assert gpm_trl_main(["gpo", *names, *small, "--iterations=1", f"--output_dir={tmp_path}"]) == 0
    assert {len(row["completions"]) for row in rows_of(tmp_path / "iteration-1" / "samples.jsonl")} == {5}


def test_every_stage_is_one_line(command, tmp_path, capsys):
    output_dir = tmp_path / "out"
    assert gpm_trl_main([*command, *ITERATIONS, f"--output_dir={output_dir}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("{")] == [
        f"Iteration 1 of 2: sampling 4 completions of each of 6 prompts, to {output_dir}/iteration-1/samples.jsonl",
        f"Iteration 1 of 2: training on 6 prompts, to {output_dir}/iteration-1/policy",
        f"Model saved to {output_dir}/iteration-1/policy.",
        f"Iteration 2 of 2: sampling 4 completions of each of 6 prompts, to {output_dir}/iteration-2/samples.jsonl",
        f"Iteration 2 of 2: training on 6 prompts, to {output_dir}/iteration-2/policy",
        f"Model saved to {output_dir}/iteration-2/policy.",
        f"The policy of the last iteration is {output_dir}/iteration-2/policy.",
    ]
    assert not any("eval_" in line for line in lines)


# --- Iterations that were stopped ------------------------------------------------------------------------------------


def test_a_run_killed_while_it_samples_ends_as_an_uninterrupted_one(command, whole, tmp_path):
    """To the last bit, the samples included: each batch of prompts has a random seed of its own."""
    arguments = [*command, *ITERATIONS, f"--output_dir={tmp_path}"]
    kill("prediction_step", 2, arguments)
    path = tmp_path / "iteration-1" / "samples.jsonl"
    complete, cut = path.read_text().splitlines()[:-1], path.read_text().splitlines()[-1]
    assert len(complete) == 4
    assert cut == '{"prompt": "Question 4", "ro'
    assert gpm_trl_main(arguments) == 0
    assert path.read_text().splitlines()[:4] == complete
    assert contents(tmp_path) == contents(whole)


def test_a_run_killed_while_it_trains_ends_as_an_uninterrupted_one(command, whole, tmp_path, capsys):
    """In the second iteration, after a checkpoint: the first is not touched, and nothing is sampled again."""
    arguments = [*command, *ITERATIONS, f"--output_dir={tmp_path}"]
    kill("training_step", 6 + 4, arguments)
    before = contents(tmp_path)
    assert sorted(before) == [
        "iteration-1/done",
        "iteration-1/policy/model.safetensors",
        "iteration-1/samples.jsonl",
        "iteration-2/samples.jsonl",
    ]
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in before if "iteration-1" in name}
    assert gpm_trl_main(arguments) == 0
    assert "training on 6 prompts, from checkpoint-3" in capsys.readouterr().out
    assert contents(tmp_path) == contents(whole)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in times} == times


def copy_samples(whole: Path, output_dir: Path, lines: list[str]) -> Path:
    path = output_dir / "iteration-1" / "samples.jsonl"
    path.parent.mkdir()
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize("cut", ["in the last line", "before the end of the last line", "in a batch", "at the start"])
def test_lines_that_are_missing_are_sampled_again(command, whole, tmp_path, cut):
    lines = (whole / "iteration-1" / "samples.jsonl").read_text().splitlines(keepends=True)
    kept = {
        "in the last line": [*lines[:5], lines[5][:40]],
        "before the end of the last line": [*lines[:5], lines[5].rstrip("\n")],
        "in a batch": lines[:3],
        "at the start": [],
    }[cut]
    copy_samples(whole, tmp_path, kept)
    assert gpm_trl_main([*command, *ITERATIONS, f"--output_dir={tmp_path}"]) == 0
    assert contents(tmp_path) == contents(whole)


def test_a_checkpoint_that_was_cut_short_is_passed_over(command, whole, tmp_path, capsys):
    arguments = [*command, *ITERATIONS, f"--output_dir={tmp_path}"]
    kill("training_step", 4, arguments)
    unfinished = tmp_path / "iteration-1" / "policy" / "checkpoint-4"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"")
    assert gpm_trl_main(arguments) == 0
    assert "training on 6 prompts, from checkpoint-3" in capsys.readouterr().out
    assert contents(tmp_path) == contents(whole)


def test_running_again_when_all_is_done_does_nothing(command, whole, capsys, monkeypatch):
    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in whole.rglob("*")}

    before = files()
    monkeypatch.setattr(GPOTrainer, "__init__", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    assert gpm_trl_main([*command, *ITERATIONS, f"--output_dir={whole}"]) == 0
    assert files() == before
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"The policy of the last iteration is {whole}/iteration-2/policy."]


@pytest.mark.parametrize(
    ("changed", "message"),
    [("--iterations=3", "`iterations` = 2, not 3"), ("--temperature=0.9", "`temperature` = 0.7, not 0.9")],
)
def test_iterations_are_not_mixed_with_those_of_other_settings(command, whole, tmp_path, capsys, changed, message):
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "iteration-2" / "done").unlink()
    assert gpm_trl_main([*command, *ITERATIONS, f"--output_dir={tmp_path / 'out'}", changed]) == 2
    assert message in error_line(capsys)
    assert contents(tmp_path / "out").keys() == contents(whole).keys() - {"iteration-2/done"}


def test_columns_that_json_does_not_have_are_written_as_text(command, prompts, tmp_path):
    rows = [{**row, "when": "2024-01-01T00:00:00"} for row in rows_of(prompts)]
    path = tmp_path / "dated.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = [*command, "--iterations=1", f"--output_dir={tmp_path / 'out'}", f"--dataset_name={path}", "--max_steps=1"]
    assert gpm_trl_main(run) == 0
    assert rows_of(tmp_path / "out" / "iteration-1" / "samples.jsonl")[0]["when"] == "2024-01-01 00:00:00"


# --- Two processes ---------------------------------------------------------------------------------------------------


@pytest.mark.multiprocess
@pytest.mark.parametrize("distribution", ["ddp", "zero3"])
def test_iterations_on_two_processes_sample_each_prompt_once(command, prompts, tmp_path, distribution):
    """Six prompts, of which two processes sample four at a time: the last batch is filled up with the first."""
    output_dir = tmp_path / "out"
    run = [*command, *ITERATIONS, f"--output_dir={output_dir}"]
    config = sharding_config(distribution, tmp_path)
    if distribution == "ddp":
        finished = launch(config, "-m", "gpm_trl.cli.gpo", *run[1:])
    else:
        script = Path(__file__).with_name("gpo_run.py")
        finished = launch(config, script, *run, "--use_peft", "--lora_r=4")
    assert finished.returncode == 0, finished.stderr
    stages = [line for line in finished.stdout.splitlines() if line.startswith(("Iteration", "Model", "The policy"))]
    assert len(stages) == 7
    for number, part in ((1, rows_of(prompts)[:6]), (2, rows_of(prompts)[6:])):
        directory = output_dir / f"iteration-{number}"
        rows = rows_of(directory / "samples.jsonl")
        assert [row["prompt"] for row in rows] == [row["prompt"] for row in part]
        assert all(torch.equal(torch.tensor(row["scores"]), -torch.tensor(row["scores"]).T) for row in rows)
        assert len({json.dumps(row["completion_ids"]) for row in rows}) == 6
        state = json.loads((directory / "policy" / "checkpoint-3" / "trainer_state.json").read_text())
        assert state["global_step"] == state["max_steps"] == 3  # of two prompts
        assert (directory / "done").exists()
