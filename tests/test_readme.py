"""The snippets of README and pages run as they stand, on a tiny model and dataset under the names that they use."""

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import BACKBONES, TINY
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForSequenceClassification

from gpm_trl.cli.main import main

README = (Path(__file__).parent.parent / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    command.replace("\\\n", " ")
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for command in re.findall(r"^gpm-trl (?:.*\\\n)*.*$", block, re.MULTILINE)
    if "--accelerate_config" not in command  # on eight GPUs: see `test_recipes.py`
]


@pytest.fixture(scope="module")
def directory(decoder, letters, tmp_path_factory):
    """Where the names of the README are directories."""
    directory = tmp_path_factory.mktemp("readme")
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    qwen = directory / "Qwen/Qwen3-0.6B"
    config = BACKBONES["qwen3"].__class__(**TINY | {"max_position_embeddings": 4096})
    AutoModelForCausalLM.from_config(config).save_pretrained(qwen)
    tokenizer.save_pretrained(qwen)
    prompts = [{"prompt": [{"role": "user", "content": f"Question {number}"}]} for number in range(4)]
    (directory / "trl-lib/ultrafeedback-prompt").mkdir(parents=True)
    Dataset.from_list(prompts).to_json(directory / "trl-lib/ultrafeedback-prompt/train.jsonl")
    data = directory / "trl-lib/ultrafeedback_binarized"
    data.mkdir(parents=True)
    for split in ("train", "test"):
        letters.to_json(data / f"{split}.jsonl")
    rows = [{"prompt": "2 + 2?", "responses": ["4", "5", "Four."]}]
    Dataset.from_list(rows).to_json(directory / "questions.jsonl")
    config = BACKBONES["qwen3"].__class__(**TINY, num_labels=1)
    Qwen3ForSequenceClassification(config).save_pretrained(directory / "path/to/reward-model")
    tokenizer.save_pretrained(directory / "path/to/reward-model")
    benchmark = directory / "allenai/reward-bench/data"
    benchmark.mkdir(parents=True)
    rows = letters.map(lambda row: {"subset": "donotanswer", "id": 1})
    rows.to_parquet(benchmark / "filtered-00000-of-00001.parquet")
    return directory


@pytest.mark.slow
def test_training_then_scoring_then_aligning(directory, monkeypatch, capsys):
    monkeypatch.chdir(directory)
    train, score, align = PYTHON
    for snippet in (train, score, align):
        exec(compile(snippet, "README.md", "exec"), {})
    output = capsys.readouterr().out
    assert "tensor([[0.5000" in output
    assert "rank  beats another  response" in output
    assert re.search(r"^tensor\(\[0\.\d+\]\)$", output, re.MULTILINE)
    assert any((directory / "qwen3-gpo").glob("checkpoint-*/model.safetensors"))


def test_the_commands_inspect_train_score_evaluate_and_plot(directory, monkeypatch, capsys):
    monkeypatch.chdir(directory)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    commands = [shlex.split(command)[1:] for command in COMMANDS]
    assert [name for name, *_ in commands] == ["inspect", "gpm", "score", "plot", "evaluate"]
    for command in commands:
        assert main(command) == 0
    assert (directory / "qwen3-gpm/model.safetensors").exists()
    assert json.loads((directory / "ranked.jsonl").read_text())["input_line"] == 1
    assert [model["name"] for model in json.loads((directory / "report.json").read_text())["models"]] == [
        "qwen3-gpm",
        "path/to/reward-model",
    ]
    assert (directory / "p.png").exists()
    assert "| qwen3-gpm" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("page", ["index", "lm_judge"])
def test_the_snippets_of_a_page_run_one_after_the_other(page, directory, monkeypatch):
    monkeypatch.chdir(directory)
    text = (Path(__file__).parent.parent / "docs" / f"{page}.md").read_text()
    names: dict = {"__name__": "page"}
    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(snippet, page, "exec"), names)


@pytest.mark.slow
def test_the_notebook_runs_without_a_network_and_shows_a_cycle(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = json.loads((Path(__file__).parent.parent / "docs" / "cycles.ipynb").read_text())
    names: dict = {"__name__": "notebook"}
    for number, cell in enumerate(cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
        assert not cell["outputs"]
    assert names["ranking"].probabilities[[0, 1, 2, 3], [1, 2, 3, 0]].min() > 0.99
    assert names["ranking"].cyclicity > 0.99
    assert names["baseline"].evaluate()["eval_accuracy"] <= 0.75
    assert "rank  beats another  response" in capsys.readouterr().out
