"""The README's snippets run as they stand, on a tiny model and dataset under the names that they use."""

import re
import shlex
from pathlib import Path

import pytest

from gpm_trl.cli.main import main

README = (Path(__file__).parent.parent / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    command.replace("\\\n", " ")
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for command in re.findall(r"^gpm-trl (?:.*\\\n)*.*$", block, re.MULTILINE)
]


@pytest.fixture(scope="module")
def directory(decoder, letters, tmp_path_factory):
    """Where the names of the README are directories."""
    directory = tmp_path_factory.mktemp("readme")
    (directory / "Qwen").mkdir()
    (directory / "Qwen/Qwen3-0.6B").symlink_to(decoder)
    data = directory / "trl-lib/ultrafeedback_binarized"
    data.mkdir(parents=True)
    for split in ("train", "test"):
        letters.to_json(data / f"{split}.jsonl")
    return directory


def test_training_then_scoring_then_lora(directory, monkeypatch, capsys):
    monkeypatch.chdir(directory)
    train, score, lora = PYTHON
    for snippet in (train, score, lora):
        exec(compile(snippet, "README.md", "exec"), {})
    assert "tensor([[0.5000" in capsys.readouterr().out
    assert any((directory / "qwen3-gpm-lora").glob("checkpoint-*/adapter_model.safetensors"))


def test_command_trains(directory, monkeypatch):
    monkeypatch.chdir(directory)
    (command,) = COMMANDS
    assert main(shlex.split(command)[1:]) == 0
    assert (directory / "qwen3-gpm/model.safetensors").exists()
