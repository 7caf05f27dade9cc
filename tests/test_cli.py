"""The command line: a run, and one line for what it cannot use."""

import gzip
import json
import os
import re
import runpy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from datasets import DatasetDict
from launching import ACCELERATE_CONFIGS, cpu_config, launch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from transformers import AutoModel

from gpm_trl.cli import quickstart
from gpm_trl.cli.rows import load_rows
from gpm_trl.saving import locked
from gpm_trl_cli import COMMANDS
from gpm_trl_cli import main as gpm_trl_main

README = Path(__file__).parents[1] / "README.md"
TINY_RUN = ["--max_steps=2", "--per_device_train_batch_size=4", "--use_cpu=True", "--report_to=none"]
TINY_RUN += ["--disable_tqdm=True", "--save_strategy=no"]


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
    lines = "".join(json.dumps(row) + "\n" for row in letters).encode()
    if extension == ".parquet":
        letters.to_parquet(path)
    else:
        path.write_bytes(gzip.compress(lines) if extension.endswith(".gz") else lines)
    assert load_rows(str(path))["train"].to_list() == letters.to_list()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("with_splits", [False, True])
def test_saved_datasets_are_datasets(letters, tmp_path, with_splits, streaming):
    (DatasetDict(train=letters) if with_splits else letters).save_to_disk(tmp_path / "saved")
    assert list(load_rows(str(tmp_path / "saved"), streaming=streaming)["train"]) == letters.to_list()


def test_lora_from_the_command_line(decoder, rows_file, tmp_path):
    output_dir = tmp_path / "adapter"
    assert gpm_trl_main(arguments(decoder, rows_file, output_dir, "--use_peft", "--lora_r=4")) == 0
    adapter = json.loads((output_dir / "adapter_config.json").read_text())
    assert set(adapter["modules_to_save"]) == {"embedding_head", "scale_gate"}


ROW = '{"prompt": "q", "chosen": "a", "rejected": "b"}\n'
# What the data are, more arguments, and what the line says.
REFUSED = {
    "a missing file": (None, [], "There is no file"),
    "wrong columns": ('{"question": "a", "answer": "b"}\n', [], "`answer`, `question` fit no layout"),
    "an unread question": (ROW.replace("prompt", "query"), [], '{"query": null}'),
    "a mapping of what is not there": (
        ROW,
        ['--column_mapping={"prompt": "query"}'],
        "names `query`, but the columns",
    ),
    "a mapping that is no JSON": (ROW, ["--column_mapping=prompt=query"], "`column_mapping`"),
    "a bad value": (ROW + ROW.replace('"a"', "null"), [], "rows.jsonl: Row 2: `chosen` and `rejected` must be"),
    "blank lines": ("\n \n", [], "rows.jsonl is empty"),
    "an empty array": ("[]", [], "rows.jsonl:1: there are no rows"),
    "numbers": ("1\n2\n", [], "rows.jsonl:1: there are no rows"),
    "a damaged array": ("[\n" + ROW + ",\n{]", [], "rows.jsonl:"),
    "an empty file": ("", [], "empty"),
    "damaged JSON": (ROW + '\n{"prompt": "q", "chosen": \n', [], "rows.jsonl:3: Expecting value"),
    "no usable row": (ROW.replace('"b"', '"a"'), ["--dataset_streaming=True"], "All rows of the train dataset"),
    "an odd embedding_dim": (ROW, ["--embedding_dim=3"], "`embedding_dim` is 3"),
    "an unknown option": (ROW, ["--embeding_dim=4"], "did you mean --embedding_dim?"),
    "an unknown field": (ROW, ["--config", "{root}/gpm.yaml"], "--embeding_dim: did you mean --embedding_dim?"),
    "a config without a name": (ROW, ["--config"], "`--config` has no value"),
    "columns before the model": (ROW.replace("prompt", "query"), ["--model_name_or_path={root}/nowhere"], "`query`"),
    "a file that starts it": (ROW, ["--config", "{root}/launch.yaml"], "`accelerate_config` starts .* in its file"),
    "LoRA without it": (ROW, ["--lora_r=4"], "`lora_r` is 4, but would be ignored: `use_peft` is off"),
    "4 bits without them": (ROW, ["--use_bnb_nested_quant"], "ignored: `load_in_4bit` is off"),
    "a mixture's option": (ROW, ["--test_split_size=0.1"], "ignored: it is of `datasets`"),
    "a configuration of a file": (ROW, ["--dataset_config=default"], "no configurations, so no 'default'"),
    "a missing model": (ROW, ["--model_name_or_path={root}/nowhere"], "nowhere"),
    "a missing split": (
        ROW,
        ["--eval_strategy=steps"],
        "`dataset_test_split` is 'test', but the dataset has the splits ['train']",
    ),
    "no whole checkpoint": (
        ROW,
        ["--resume_from_checkpoint={root}"],
        "is no whole checkpoint: it has no",
    ),
    "an output that is a file": (ROW, ["--output_dir={root}/rows.jsonl"], "rows.jsonl cannot be written, since"),
    "an output below a file": (ROW, ["--output_dir={root}/rows.jsonl/x"], "/x cannot be written, since"),
    "a report without its package": (ROW, ["--report_to=wandb"], "`report_to` is wandb: .*pip install wandb"),
    "an unknown report": (ROW, ["--report_to=nowhere"], "nowhere is not supported"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_one_line(decoder, tmp_path, capsys, case):
    data, more, message = REFUSED[case]
    path = tmp_path / "rows.jsonl"
    if data is not None:
        path.write_text(data)
    (tmp_path / "gpm.yaml").write_text("embeding_dim: 4\n")
    (tmp_path / "launch.yaml").write_text("accelerate_config: zero2\n")
    more = [text.replace("{root}", str(tmp_path)) for text in more]
    assert gpm_trl_main(arguments(decoder, path, tmp_path / "model", *more)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert message in line or re.search(message, line)
    assert not (tmp_path / "model").exists()


def test_a_file_in_another_encoding_is_told_with_its_line(decoder, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes((ROW + ROW.replace("q", "caf\xe9")).encode("latin-1"))
    assert gpm_trl_main(arguments(decoder, path, tmp_path / "model")) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert re.search(r"rows.jsonl:( Row )?2: .*codec can't decode", line)


def test_a_damaged_gzipped_file_is_one_line(decoder, tmp_path, capsys):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("".join(ROW.replace("q", str(n)) for n in range(500)).encode())[:-30])
    assert gpm_trl_main(arguments(decoder, path, tmp_path / "model")) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "rows.jsonl.gz is damaged after line" in line


@pytest.mark.parametrize("more", [["--output_dir={root}/rows.jsonl"], ["--report_to=wandb"], ["--output_dir={root}"]])
def test_what_cannot_be_used_is_said_before_the_model_is_loaded(decoder, rows_file, tmp_path, monkeypatch, more):
    monkeypatch.setattr("gpm_trl.gpm.trainer.load_model", lambda *args: pytest.fail("loaded"))
    with locked(tmp_path):
        more = [text.format(root=tmp_path) for text in more]
        assert gpm_trl_main(arguments(decoder, rows_file, tmp_path / "model", *more)) == 2


def test_a_run_that_computes_nothing_finite_is_one_line(decoder, rows_file, tmp_path, capsys):
    more = ["--learning_rate=1e30", "--max_steps=4", "--warmup_steps=0"]
    assert gpm_trl_main(arguments(decoder, rows_file, tmp_path / "model", *more)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert re.search(r"not finite at step \d", line)
    assert not (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.multiprocess
def test_a_command_says_nothing_of_its_libraries(decoder, rows_file, tmp_path):
    """Not of bitsandbytes, DeepSpeed and names of options, which are nobody's concern here."""
    command = [
        sys.executable,
        "-m",
        "gpm_trl_cli",
        *arguments(decoder, rows_file, tmp_path / "model", "--use_peft"),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    for noise in ("gemm_4bit", "FutureWarning", "accelerator to"):
        assert noise not in result.stdout + result.stderr


def test_no_model_is_one_line(rows_file, tmp_path, capsys):
    assert gpm_trl_main(["gpm", f"--dataset_name={rows_file}", f"--output_dir={tmp_path}", "--use_cpu=True"]) == 2
    assert "error: Name the model to train by `model_name_or_path`." in capsys.readouterr().err


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("argument", "code", "printed"),
    [("--help", 0, COMMANDS), ("--version", 0, [f"gpm-trl {version('gpm-trl')}"]), ("scor", 2, ["'score'?", "usage"])],
)
def test_help_the_version_and_a_mistyped_command_import_neither_transformers_nor_torch(argument, code, printed):
    program = "import sys, gpm_trl_cli; code = gpm_trl_cli.main(sys.argv[1:]); print(*sys.modules); sys.exit(code)"
    result = subprocess.run([sys.executable, "-c", program, argument], capture_output=True, text=True)
    assert result.returncode == code
    assert all(text in (result.stderr if code else result.stdout) for text in printed)
    assert not {"torch", "transformers", "gpm_trl"} & set(result.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        gpm_trl_main([command, "--help"])
    assert stop.value.code == 0
    assert f"gpm-trl {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "own", "parents"),
    [("gpm", "embedding_dim", "adam_beta1"), ("gpo", "pairing", "top_k"), ("gprl", "drift_limit", "vllm_mode")],
)
def test_help_has_our_options_first_and_help_all_those_of_the_parents(command, own, parents, capsys):
    printed = []
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as stop:
            gpm_trl_main([command, option])
        assert stop.value.code == 0
        printed.append(capsys.readouterr().out)
    short, long = printed
    assert short.index("--accelerate_config") < short.index(f"--{own} ") < short.index("--model_name_or_path  ")
    assert parents not in short
    assert f"--{own} " in long
    assert f"--{parents} " in long
    assert max(map(len, short.splitlines())) < 140
    assert len(short.splitlines()) < 110


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["gpm", "--embeding_dim=6"], "there is no option --embeding_dim: did you mean --embedding_dim?"),
        (["score", "--modle", "x"], "there is no option --modle: did you mean --model?"),
        (["evaluate", "--xyz"], "there is no option --xyz."),
    ],
)
def test_a_mistyped_option_is_told_with_a_similar_one(arguments, hint, capsys):
    assert gpm_trl_main(arguments) == 2
    assert f"gpm-trl {arguments[0]}: error: {hint}" in capsys.readouterr().err


@pytest.mark.slow
def test_quickstart_prints_what_the_readme_says(tmp_path, capsys):
    assert quickstart.main([f"--output_dir={tmp_path}"]) == 0
    output = capsys.readouterr().out
    table = re.search(r"model            accuracy.*?\n```", README.read_text(), re.DOTALL)[0].removesuffix("\n```")
    assert table in output
    assert {path.name for path in tmp_path.glob("*.png")} == {"embedding_discs.png", "preference_matrix.png"}


@pytest.mark.slow
def test_the_letters_policy_prints_what_the_readme_says(tmp_path, capsys):
    recipe = runpy.run_path(str(README.parent / "recipes" / "letters_policy" / "run.py"))
    assert recipe["main"]([f"--output_dir={tmp_path}"]) == 0
    (table,) = re.findall(r"step   win rate.*?\n```", README.read_text(), re.DOTALL)
    assert table.removesuffix("\n```") in capsys.readouterr().out
    assert (tmp_path / "gpo.png").stat().st_size > 10_000


def test_a_run_may_be_told_to_resume_before_there_is_a_checkpoint(decoder, rows_file, tmp_path):
    more = ["--save_strategy=steps", "--save_steps=1", "--resume_from_checkpoint=true"]
    for steps in (1, 2):
        assert gpm_trl_main(arguments(decoder, rows_file, tmp_path / "model", *more, f"--max_steps={steps}")) == 0
    state = json.loads((tmp_path / "model/checkpoint-2/trainer_state.json").read_text())
    assert state["global_step"] == 2


@pytest.mark.multiprocess
def test_gpm_starts_the_processes_of_an_accelerate_config(decoder, rows_file, tmp_path):
    config = cpu_config("ddp", tmp_path, mixed_precision="no")
    more = ["--max_steps=-1", "--num_train_epochs=1", "--save_strategy=epoch", f"--accelerate_config={config}"]
    result = launch(None, "-m", "gpm_trl_cli", *arguments(decoder, rows_file, tmp_path / "model", *more))
    assert result.returncode == 0, result.stderr
    assert AutoModel.from_pretrained(tmp_path / "model").config.embedding_dim == 6
    assert (tmp_path / "model/checkpoint-3").exists()  # 24 rows in steps of 2 x 4


@pytest.mark.multiprocess
def test_a_model_in_shards_is_saved_whole_whatever_the_checkpoints_are(decoder, rows_file, tmp_path):
    """Of shards, the Trainer itself would save no model, and say nothing."""
    fsdp = yaml.safe_load((ACCELERATE_CONFIGS / "fsdp2.yaml").read_text())["fsdp_config"]
    fsdp["fsdp_state_dict_type"] = "SHARDED_STATE_DICT"
    config = cpu_config("fsdp2", tmp_path, mixed_precision="no", fsdp_config=fsdp)
    run = arguments(decoder, rows_file, tmp_path / "model")[1:]
    result = launch(config, "-m", "gpm_trl.cli.gpm", *run, "--gradient_checkpointing=False")
    assert result.returncode == 0, result.stderr
    assert AutoModel.from_pretrained(tmp_path / "model").config.embedding_dim == 6


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
@pytest.mark.parametrize("processes", [1, 2])
def test_a_launched_command_ends_with_its_one_line(decoder, tmp_path, processes):
    """Whether accelerate starts one process by itself, or torch several."""
    config = cpu_config("ddp", tmp_path, mixed_precision="no", num_processes=processes)
    run = arguments(decoder, tmp_path / "none.jsonl", tmp_path / "model", f"--accelerate_config={config}")
    result = launch(None, "-m", "gpm_trl_cli", *run)
    assert result.returncode == 2
    assert "There is no file" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_config_that_needs_what_is_not_installed_is_one_line(capsys, monkeypatch):
    def launch_command(args):
        raise ImportError("DeepSpeed is not installed => run `pip3 install deepspeed` or build it from source.")

    monkeypatch.setattr("gpm_trl.cli.launch.launch_command", launch_command)
    assert gpm_trl_main(["gpm", "--accelerate_config", "zero3"]) == 2
    assert capsys.readouterr().err.startswith("gpm-trl gpm: error: DeepSpeed is not installed")


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


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        # One of the machines would be started, and wait for the others.
        ("zero3_multinode", ["`accelerate_config` 'zero3_multinode' is for 2 machines", "accelerate launch --config"]),
        ("{root}/text", ["text' is no configuration of accelerate"]),
        ("{root}/yaml", ["yaml' is no configuration of accelerate"]),
        ("zero4", ["`accelerate_config` is 'zero4': give a file, or one of ddp, fsdp2, zero2, zero3"]),
    ],
)
def test_an_accelerate_config_that_cannot_be_used_is_one_line(tmp_path, capsys, monkeypatch, name, messages):
    monkeypatch.setattr("gpm_trl.cli.launch.launch_command", lambda args: pytest.fail("launched"))
    (tmp_path / "text").write_text("just text")
    (tmp_path / "yaml").write_text("[bad")
    assert gpm_trl_main(["gpm", "--accelerate_config", name.format(root=tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(message in line for message in messages)


def test_the_demo_says_where_it_cannot_write(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert gpm_trl_main(["quickstart", f"--output_dir={tmp_path / 'file' / 'demo'}"]) == 2
    assert "cannot be written, since" in capsys.readouterr().err
