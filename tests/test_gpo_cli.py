"""`gpm-trl gpo`: a run, and one line for what it cannot use."""

import contextlib
import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

from gpm_trl_cli import main as gpm_trl_main

K = 4
TINY_RUN = [
    *(f"--num_generations={K}", f"--per_device_train_batch_size={K}", f"--per_device_eval_batch_size={2 * K}"),
    *("--max_completion_length=6", "--learning_rate=1e-3", "--use_cpu=True", "--report_to=none"),
    *("--disable_tqdm=True", "--gradient_checkpointing=False"),
]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {index}"}) + "\n" for index in range(12)))
    return path


@pytest.fixture(scope="module")
def command(decoder, gpm, prompts):
    """A command line without `output_dir`; later arguments win."""
    names = [f"--model_name_or_path={decoder}", f"--reward_model_path={gpm}", f"--dataset_name={prompts}"]
    return ["gpo", *names, *TINY_RUN]


def test_gpo_trains_from_a_config_file_and_the_command_line_wins(decoder, gpm, prompts, tmp_path, capsys):
    config, output_dir = tmp_path / "gpo.yaml", tmp_path / "policy"
    names = f"model_name_or_path: {decoder}\nreward_model_path: {gpm}\ndataset_name: {prompts}\n"
    config.write_text(f"{names}loss_type: sppo\nbeta: [0.5]\npairing: best_worst\n")
    run = ["gpo", f"--config={config}", *TINY_RUN, f"--output_dir={output_dir}", "--max_steps=2"]
    assert gpm_trl_main([*run, "--pairing=all"]) == 0
    assert f"Model saved to {output_dir}." in capsys.readouterr().out
    args = torch.load(output_dir / "training_args.bin", weights_only=False)
    assert (args.loss_type, args.beta, args.pairing, args.num_generations) == ("sppo", 0.5, "all", K)
    before, after = load_file(decoder / "model.safetensors"), load_file(output_dir / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_several_betas_and_a_split_for_evaluation(command, prompts, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("".join(prompts.read_text().splitlines(keepends=True)[:2]))
    run = [*command, f"--output_dir={tmp_path}", f"--dataset_name={data}", "--beta", "0.5", "0.1"]
    assert gpm_trl_main([*run, "--num_train_epochs=2", "--logging_steps=2", "--eval_strategy=epoch"]) == 0
    printed = capsys.readouterr().out
    first, second = [line for line in printed.splitlines() if line.startswith("{'loss'")]
    assert "'beta': '0.1'" in second
    assert "'beta': '0.1'" not in first
    assert "eval_win_rate" in printed


REFUSED = {
    "no reward model": ([], "`reward_model_path`"),
    "a reward model that is nowhere": (["--reward_model_path=nowhere"], "nowhere"),
    "a reward model that is a policy": (["--reward_model_path={decoder}"], "neither a general preference model"),
    "data without prompts": (["--dataset_name={others}"], "no `prompt`"),
    "one completion": (["--num_generations=1"], "`num_generations` is 1"),
    "an option that would be ignored": (["--epsilon=0.3"], "`epsilon`"),
    "an unknown option": (["--reward_modell=x"], "did you mean --reward_model_path?"),
    "an unknown loss": (["--loss_type=dpo"], "dpo"),
}


def refusal(capsys, arguments: list[str]) -> str:
    """The one line that says why a command cannot run."""
    with contextlib.suppress(SystemExit):  # of `argparse`
        assert gpm_trl_main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return line


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_one_line(command, decoder, tmp_path, capsys, case):
    more, message = REFUSED[case]
    (tmp_path / "others.jsonl").write_text('{"question": "a"}\n')
    more = [text.format(decoder=decoder, others=tmp_path / "others.jsonl") for text in more]
    if case == "no reward model":
        command = [text for text in command if not text.startswith("--reward_model_path")]
    assert message in refusal(capsys, [*command, f"--output_dir={tmp_path / 'out'}", *more])


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_not_installed_is_one_line(command, tmp_path, capsys):
    assert "vllm" in refusal(capsys, [*command, f"--output_dir={tmp_path}", "--use_vllm=True"]).lower()
