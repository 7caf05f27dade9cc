"""The command line: a run, and one line for what it cannot use."""

import gzip
import json
import subprocess
from pathlib import Path

import pytest
from datasets import DatasetDict
from launching import ACCELERATE_CONFIGS, cpu_config, launch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from transformers import AutoModel

from gpm_trl.cli import quickstart
from gpm_trl.cli.main import COMMANDS
from gpm_trl.cli.main import main as gpm_trl_main
from gpm_trl.cli.rows import load_rows

TINY_RUN = [
    "--max_steps=2",
    "--per_device_train_batch_size=4",
    "--use_cpu=True",
    "--report_to=none",
    "--disable_tqdm=True",
    "--save_strategy=no",
]


@pytest.fixture
def rows_file(letters, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in letters))
    return path


def arguments(decoder, data, output_dir, *more: str) -> list[str]:
    names = [f"--model_name_or_path={decoder}", f"--dataset_name={data}", f"--output_dir={output_dir}"]
    return ["gpm", *names, *TINY_RUN, *more]


def test_gpm_trains_from_a_config_file_and_the_command_line_wins(decoder, rows_file, tmp_path):
    config = tmp_path / "gpm.yaml"
    names = f"model_name_or_path: {decoder}\ndataset_name: {rows_file}\n"
    config.write_text(f"{names}embedding_dim: 8\ntemperature: 0.2\n")
    output_dir = tmp_path / "model"
    run = ["gpm", "--config", str(config), "--embedding_dim=2", f"--output_dir={output_dir}", *TINY_RUN]
    assert gpm_trl_main(run) == 0
    model = AutoModel.from_pretrained(output_dir)
    assert (model.config.embedding_dim, model.config.temperature) == (2, 0.2)


@pytest.mark.parametrize("extension", [".json", ".jsonl", ".jsonl.gz", ".parquet"])
def test_local_files_are_datasets(letters, tmp_path, extension):
    path = tmp_path / f"rows{extension}"
    lines = "".join(json.dumps(row) + "\n" for row in letters)
    if extension == ".parquet":
        letters.to_parquet(path)
    elif extension == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    assert load_rows(str(path))["train"].to_list() == letters.to_list()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("with_splits", [False, True])
def test_saved_datasets_are_datasets(letters, tmp_path, with_splits, streaming):
    (DatasetDict(train=letters) if with_splits else letters).save_to_disk(tmp_path / "saved")
    assert list(load_rows(str(tmp_path / "saved"), streaming=streaming)["train"]) == letters.to_list()


def test_a_directory_with_splits_is_evaluated(decoder, letters, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        letters.to_json(data / f"{split}.jsonl")
    run = arguments(decoder, data, tmp_path / "model", "--eval_strategy=steps", "--eval_steps=1")
    assert gpm_trl_main(run) == 0
    assert "eval_accuracy" in capsys.readouterr().out


def test_lora_from_the_command_line(decoder, rows_file, tmp_path):
    output_dir = tmp_path / "adapter"
    assert gpm_trl_main(arguments(decoder, rows_file, output_dir, "--use_peft", "--lora_r=4")) == 0
    adapter = json.loads((output_dir / "adapter_config.json").read_text())
    assert set(adapter["modules_to_save"]) == {"embedding_head", "scale_gate"}


def error_line(capsys) -> str:
    """What was printed on stderr by a command that refused its input: one line."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1
    return lines[0]


def test_a_missing_file_is_one_line(decoder, tmp_path, capsys):
    assert gpm_trl_main(arguments(decoder, tmp_path / "none.jsonl", tmp_path / "model")) == 2
    assert "There is no file" in error_line(capsys)


def test_wrong_columns_are_one_line(decoder, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n')
    assert gpm_trl_main(arguments(decoder, path, tmp_path / "model")) == 2
    line = error_line(capsys)
    assert "'answer', 'question'" in line
    assert "`chosen` and `rejected`" in line


def test_an_empty_dataset_is_one_line(decoder, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("")
    assert gpm_trl_main(arguments(decoder, path, tmp_path / "model")) == 2
    assert "empty" in error_line(capsys)


def test_damaged_json_is_one_line_with_the_file_and_the_place(decoder, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n{"prompt": "q", "chosen": \n')
    assert gpm_trl_main(arguments(decoder, path, tmp_path / "model")) == 2
    line = error_line(capsys)
    assert str(path) in line
    assert "JSON parse error: Invalid value. in row 1" in line


def test_a_stream_without_a_usable_row_is_one_line(decoder, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q", "chosen": "a", "rejected": "a"}\n')
    assert gpm_trl_main(arguments(decoder, path, tmp_path / "model", "--dataset_streaming=True")) == 2
    assert "All rows of the train dataset were dropped" in error_line(capsys)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("command", ["gpm", "gpo"])
def test_a_config_that_is_not_named_is_one_line(capsys, command):
    assert gpm_trl_main([command, "--config"]) == 2
    assert "`--config` has no value" in error_line(capsys)


def test_an_odd_embedding_dim_is_one_line(decoder, rows_file, tmp_path, capsys):
    assert gpm_trl_main(arguments(decoder, rows_file, tmp_path / "model", "--embedding_dim=3")) == 2
    assert "`embedding_dim` is 3" in error_line(capsys)


def test_an_unknown_option_is_one_line(decoder, rows_file, tmp_path, capsys):
    assert gpm_trl_main(arguments(decoder, rows_file, tmp_path / "model", "--embeding_dim=4")) == 2
    assert "--embeding_dim=4" in error_line(capsys)


def test_an_unknown_field_of_a_config_file_is_one_line(decoder, rows_file, tmp_path, capsys):
    config = tmp_path / "gpm.yaml"
    config.write_text("embeding_dim: 4\n")
    assert gpm_trl_main(arguments(decoder, rows_file, tmp_path / "model", "--config", str(config))) == 2
    assert "embeding_dim" in error_line(capsys)


def test_a_missing_model_is_one_line(rows_file, tmp_path, capsys):
    assert gpm_trl_main(arguments(tmp_path / "nowhere", rows_file, tmp_path / "model")) == 2
    assert "nowhere" in error_line(capsys)


def test_no_model_is_one_line(rows_file, tmp_path, capsys):
    assert gpm_trl_main(["gpm", f"--dataset_name={rows_file}", f"--output_dir={tmp_path}", "--use_cpu=True"]) == 2
    assert "model_name_or_path" in error_line(capsys)


def test_a_missing_split_names_those_there(decoder, rows_file, tmp_path, capsys):
    assert gpm_trl_main(arguments(decoder, rows_file, tmp_path / "model", "--eval_strategy=steps")) == 2
    line = error_line(capsys)
    assert "no split 'test'" in line
    assert "['train']" in line


def test_an_unknown_command_lists_the_commands(capsys):
    assert gpm_trl_main(["gmp"]) == 2
    printed = capsys.readouterr().err
    assert all(name in printed for name in COMMANDS)


def test_help_lists_the_commands(capsys):
    assert gpm_trl_main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        gpm_trl_main([command, "--help"])
    assert stop.value.code == 0
    assert f"gpm-trl {command}" in capsys.readouterr().out


def test_quickstart_separates_the_models(tmp_path, capsys):
    assert quickstart.main(["--seed=1", f"--output_dir={tmp_path}"]) == 0
    output = capsys.readouterr().out
    assert "GPM                100.0%" in output
    assert "P(D > A) = 0.99" in output


def test_quickstart_improves_a_policy(tmp_path, capsys):
    assert quickstart.main(["--stage=gpo", f"--output_dir={tmp_path}"]) == 0
    output = capsys.readouterr().out
    assert "win rate against the initial policy" in output
    assert (tmp_path / "gpo.png").stat().st_size > 10_000


@pytest.mark.parametrize("word", ["true", "False"])
def test_a_run_may_be_told_to_resume_before_there_is_a_checkpoint(decoder, rows_file, tmp_path, word):
    more = ["--save_strategy=steps", "--save_steps=1", f"--resume_from_checkpoint={word}"]
    for steps in (1, 2):
        assert gpm_trl_main(arguments(decoder, rows_file, tmp_path / "model", *more, f"--max_steps={steps}")) == 0
    state = json.loads((tmp_path / "model/checkpoint-2/trainer_state.json").read_text())
    assert state["global_step"] == 2


def test_a_directory_that_is_no_checkpoint_is_one_line(decoder, rows_file, tmp_path, capsys):
    run = arguments(decoder, rows_file, tmp_path / "model", f"--resume_from_checkpoint={decoder}")
    assert gpm_trl_main(run) == 2
    assert f"{decoder} is no whole checkpoint" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.multiprocess
def test_gpm_starts_the_processes_of_an_accelerate_config(decoder, rows_file, tmp_path):
    config = cpu_config("ddp", tmp_path, mixed_precision="no")
    more = ["--max_steps=-1", "--num_train_epochs=1", "--save_strategy=epoch", f"--accelerate_config={config}"]
    result = launch(None, "-m", "gpm_trl.cli.main", *arguments(decoder, rows_file, tmp_path / "model", *more))
    assert result.returncode == 0, result.stderr
    assert AutoModel.from_pretrained(tmp_path / "model").config.embedding_dim == 6
    assert (tmp_path / "model/checkpoint-3").exists()  # 24 rows in steps of 2 x 4


def test_an_accelerate_config_may_be_named(monkeypatch):
    launched = []
    monkeypatch.setattr("gpm_trl.cli.launch.launch_command", launched.append)
    command = ["gpo", "--accelerate_config", "zero3", "--config", "recipe.yaml", "--num_processes=4", "--beta", "0.1"]
    assert gpm_trl_main(command) == 0
    (args,) = launched
    assert Path(args.config_file).read_text() == (ACCELERATE_CONFIGS / "zero3.yaml").read_text()
    assert (args.module, args.training_script, args.num_processes) == (True, "gpm_trl.cli.gpo", 4)
    assert args.training_script_args == ["--config", "recipe.yaml", "--beta", "0.1"]


@pytest.mark.multiprocess
def test_a_launched_command_ends_with_its_one_line(decoder, tmp_path):
    """Whether accelerate starts one process by itself, or torch several."""
    for processes in (1, 2):
        config = cpu_config("ddp", tmp_path, mixed_precision="no", num_processes=processes)
        run = arguments(decoder, tmp_path / "none.jsonl", tmp_path / "model", f"--accelerate_config={config}")
        result = launch(None, "-m", "gpm_trl.cli.main", *run)
        assert result.returncode == 2
        assert "There is no file" in result.stderr
        assert "Traceback" not in result.stderr


def failed_child(exit_code):
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=exit_code, error_file="none")
    return ChildFailedError("gpm_trl.cli.gpm", {0: failure})


@pytest.mark.parametrize("error_of", [lambda code: subprocess.CalledProcessError(code, "python"), failed_child])
@pytest.mark.parametrize(
    ("exit_code", "reported", "printed"), [(2, 2, ""), (-9, 1, "a process was ended by signal 9")]
)
def test_the_exit_code_of_a_launched_process_is_passed_on(capsys, monkeypatch, error_of, exit_code, reported, printed):
    def fail(args):
        raise error_of(exit_code)

    monkeypatch.setattr("gpm_trl.cli.launch.launch_command", fail)
    assert gpm_trl_main(["gpm", "--accelerate_config", "ddp"]) == reported
    assert printed in capsys.readouterr().err


def test_an_accelerate_config_of_several_machines_is_one_line(capsys, monkeypatch):
    """Of which one would be started, and wait for the others."""
    monkeypatch.setattr("gpm_trl.cli.launch.launch_command", lambda args: pytest.fail("launched"))
    assert gpm_trl_main(["gpm", "--accelerate_config", "zero3_multinode"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "`accelerate_config` 'zero3_multinode' is of 2 machines" in line
    assert "accelerate launch --config_file" in line


def test_an_accelerate_config_that_is_not_there_is_one_line(capsys):
    assert gpm_trl_main(["gpm", "--accelerate_config", "zero4"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "`accelerate_config` is 'zero4': give a file, or one of ddp, fsdp2, zero2, zero3" in line
