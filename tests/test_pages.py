"""
Every command and Python block of README and docs runs as it stands, page by page and in order, with tiny models and
data under the names that the pages use; a block that does not says why, in a comment above it.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import logging
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import trl
from conftest import BACKBONES, TINY, tiny_model, tiny_reward_model
from datasets import Dataset
from test_released import save_released
from transformers import AutoModelForCausalLM
from transformers.utils.logging import warning_once
from trl.experimental.online_dpo import OnlineDPOConfig

from gpm_trl import GPMConfig, GPMModelConfig, GPMTrainer, letter_cycles
from gpm_trl.cli.training import LAUNCHED
from gpm_trl_cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
PAGES = {page.stem: page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCK = re.compile(r"(<!-- not run: (?P<why>.+?) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.DOTALL | re.M)
PAIRS = [
    {"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "A chair."},
    {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5"},
] * 2
QUESTIONS = [{"prompt": "What is 2 + 2?", "responses": ["4", "5", "Four."]}]
PROMPTS = [{"prompt": "Name a fruit."}, {"prompt": "What is 2 + 2?"}] * 4
FILES = {"pairs": PAIRS, "preferences": PAIRS, "held_out": PAIRS, "demo/letters": PAIRS, "prompts": PROMPTS}
FILES |= {"questions": QUESTIONS, "rows": QUESTIONS, "letters-4": [*letter_cycles()]}
# Every word of the sources, and what they take from others: options, and names that only pages need.
FOLDERS = (ROOT / folder for folder in ("gpm_trl", "recipes", "tests"))
SOURCES = (path for folder in FOLDERS for kind in ("py", "yaml", "sh") for path in folder.rglob(f"*.{kind}"))
WORDS = set(re.findall(r"\w+", " ".join(path.read_text() for path in SOURCES)))
for config in (trl.GRPOConfig, trl.RewardConfig, OnlineDPOConfig, trl.ModelConfig, trl.ScriptArguments):
    WORDS |= {item.name for item in dataclasses.fields(config)}
WORDS |= {"adamw_torch_fused", "batch_rebalance", "group_by_length", "reward_std"}  # values and metrics of parents
WORDS |= {"gradient_accumulation_kwargs", "sync_each_batch"}  # of accelerate
WORDS |= {"group_size", "safer_response_id", "enable_thinking"}  # the authors' code, PKU-SafeRLHF, Qwen3

# Options of the benchmarks, of a recipe, and of OpenRLHF.
OTHERS = {"--rounds", "--steps", "--batch", "--prompt", "--completion", "--pretrain", "--max_len", "--prompt_key"}
OTHERS |= {"--data", "--chosen_key", "--rejected_key", "--micro_train_batch_size", "--apply_chat_template"}


def blocks(page: str, *languages: str) -> list[str]:
    """The blocks of a page in these languages that are run."""
    found = BLOCK.finditer(PAGES[page])
    return [block["code"] for block in found if block["language"] in languages and not block["why"]]


def as_messages(name: str, text: str) -> list[dict[str, str]]:
    return [{"role": "user" if name == "prompt" else "assistant", "content": text}]


def commands(block: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]


@pytest.fixture(scope="module")
def stand_ins(letters, tmp_path_factory, chat_tokenizer):
    """A directory where the names that the pages use are tiny models and a few rows."""
    directory = tmp_path_factory.mktemp("stand-ins")
    models = {"Qwen/Qwen3-0.6B": "qwen3", "HuggingFaceTB/SmolLM2-135M-Instruct": "llama"}
    for name, backbone in models.items():
        config = BACKBONES[backbone].__class__(**TINY | {"max_position_embeddings": 4096})
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            model.lm_head.weight[config.eos_token_id] *= 10  # completions end after some tokens
        model.save_pretrained(directory / name)
    kinds = {"hrc": {"reward_dim": 1}, "bt": {"embedding_dim": 0, "reward_dim": 1}}
    for name in ("gpm", "hrc", "bt", "qwen3-gpm", "path/to/gpm", "path/to/hrc", "demo/GPM", "demo/Bradley-Terry"):
        models[name] = tiny_model(**kinds.get(name.rpartition("/")[2], {})).save_pretrained(directory / name)
    for name in ("path/to/reward-model", "rm-tiny"):
        models[name] = tiny_reward_model().save_pretrained(directory / name)
    for name in models:
        chat_tokenizer.save_pretrained(directory / name)
    for name in ("general-preference/GPM-Gemma-2B", "GPM-Gemma-tiny"):
        (directory / name).parent.mkdir(exist_ok=True)
        save_released(directory / name)
    for name, rows in FILES.items():
        Dataset.from_list(rows).to_json(directory / f"{name}.jsonl")
    messages = letters.map(
        lambda row: {name: as_messages(name, row[name]) for name in ("prompt", "chosen", "rejected")}
    )
    for split in ("train", "test"):
        messages.to_json(directory / f"trl-lib/ultrafeedback_binarized/{split}.jsonl")
    Dataset.from_list(PAIRS).rename_column("prompt", "query").to_json(directory / "path/or/hub-id/test.jsonl")
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in PROMPTS])
    prompts.to_json(directory / "trl-lib/ultrafeedback-prompt/train.jsonl")
    (directory / "allenai/reward-bench/data").mkdir(parents=True)
    benchmark = letters.map(lambda row: {"subset": "donotanswer", "id": 1})
    benchmark.to_parquet(directory / "allenai/reward-bench/data/filtered-00000-of-00001.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        train = "gpm --model_name_or_path Qwen/Qwen3-0.6B --dataset_name pairs.jsonl --use_peft --max_steps 1"
        assert main([*train.split(), "--output_dir", "qwen3-gpm-lora"]) == 0
        evaluate = "evaluate --model demo/GPM --dataset demo/letters.jsonl --output report.json"
        assert main(evaluate.split()) == 0
    return directory


@pytest.fixture
def desk(stand_ins, tmp_path, monkeypatch):
    """A copy of the stand-ins to work in."""
    shutil.copytree(stand_ins, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    return tmp_path


RUN = [page for page in PAGES if blocks(page, "python", "bash")]


def test_the_page_on_inspecting_shows_what_is_printed(desk, capsys):
    assert main(["inspect", "letters-4.jsonl"]) == 0
    assert f"```\n{capsys.readouterr().out}```" in PAGES["inspect"]


SLOW = {"README", "quickstart", "gpo_trainer", "gprl_trainer", "training", "which_model"}


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page for page in RUN]
)
def test_the_blocks_of_a_page_run_one_after_the_other(page, desk, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("gpm_trl"), "propagate", True)  # so that `caplog` sees it
    warning_once.cache_clear()
    made = re.findall(r"""output_dir[ =]["']?([\w./-]+)""", "".join(blocks(page, "python", "bash")))
    for name in made:  # what the page makes itself
        shutil.rmtree(desk / name, ignore_errors=True)
    names: dict = {"__name__": page}
    if page == "evaluation":  # its block adds to a trainer of the reader's
        args = GPMConfig("run", max_steps=1, eval_strategy="steps", eval_steps=1)
        rows = Dataset.from_list(PAIRS)
        names["trainer"] = GPMTrainer("Qwen/Qwen3-0.6B", args=args, train_dataset=rows, eval_dataset=rows)
    for block in BLOCK.finditer(PAGES[page]):
        if block["why"]:
            continue
        if block["language"] == "python":
            exec(compile(block["code"], page, "exec"), names)
        elif block["language"] == "bash":
            for name, *arguments in commands(block["code"]):
                assert name == "gpm-trl", "not run by this test: say why above the block"
                assert main(arguments) == 0, arguments
    for name in made:
        assert (desk / name).is_dir(), name
    assert "rendered in another way" not in caplog.text  # text, of a model that was trained on messages
    CHECKS.get(page, lambda names: None)(names)


def check_readme(names):
    assert json.loads(Path("ranked.jsonl").read_text())["input_line"] == 1
    report = json.loads(Path("report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["qwen3-gpm", "path/to/reward-model"]
    assert Path("p.png").exists()
    assert any(Path("qwen3-gpo").glob("checkpoint-*/model.safetensors"))
    assert "rank  beats another  response" in str(names["ranking"])
    assert names["ranking"].probabilities.shape == (3, 3)
    assert names["ranking"].probabilities[0, 0] == 0.5


def check_judge(names):
    completions = ["a", "bb", "", "a"] * 2
    for matrix in names["judge"]([], completions, 4):
        assert matrix == [[0, -1, 1, 0], [1, 0, 1, 1], [-1, -1, 0, -1], [0, -1, 1, 0]]
    assert issubclass(names["SharedPrefixGRPOTrainer"], trl.GRPOTrainer)


def check_callback(names):
    names["trainer"].train()
    assert any("eval_reward_bench_average" in step for step in names["trainer"].state.log_history)


CHECKS = {"README": check_readme, "gpo_trainer": check_judge, "evaluation": check_callback}


@pytest.mark.slow
def test_the_notebook_runs_without_a_network_and_shows_a_cycle(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = json.loads((ROOT / "docs" / "cycles.ipynb").read_text())
    names: dict = {"__name__": "notebook"}
    for number, cell in enumerate(cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["ranking"].probabilities[[0, 1, 2, 3], [1, 2, 3, 0]].min() > 0.99
    assert names["ranking"].cyclicity > 0.99
    assert names["baseline"].evaluate()["eval_accuracy"] <= 0.75
    assert "rank  beats another  response" in capsys.readouterr().out
    assert any(
        "image/png" in output.get("data", {}) for cell in notebook["cells"] for output in cell.get("outputs", ())
    )


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    choices = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return set(parser._option_string_actions).union(*(options_of(one) for sub in choices for one in sub.values()))


def prose(page: str) -> str:
    """A page without its blocks, and without what it says of other libraries' names."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.M)
    return re.sub(r"^\|.*?(?<!\\)\|", "|", text, flags=re.M) if page == "coming_from" else text


@pytest.mark.parametrize("page", PAGES)
def test_the_json_of_a_page_is_json_and_its_commands_are_known(page):
    for block in BLOCK.finditer(PAGES[page]):
        if block["language"] == "json":
            for rows in re.split(r"\n(?=\{)", block["code"]):
                json.loads(rows)
        lines = commands(block["code"]) if block["language"] == "bash" else []
        for _, name, *arguments in (command for command in lines if command[:1] == ["gpm-trl"]):
            parser = importlib.import_module(f"gpm_trl.cli.{name}").make_parser()
            if "--accelerate_config" not in arguments:
                parser.parse_args(arguments)


@functools.cache
def known_options() -> set[str]:
    parsers = [importlib.import_module(f"gpm_trl.cli.{name}").make_parser() for name in COMMANDS]
    parsers.append(runpy.run_path(str(ROOT / "recipes/smollm2-135m/study.py"))["make_parser"]())
    return OTHERS.union(*map(options_of, parsers), (f"--{name}" for name in LAUNCHED))


@pytest.mark.parametrize("page", PAGES)
def test_options_and_names_in_prose_exist(page):
    spans = re.findall(r"`([^`\n]+)`", prose(page))
    for option in re.findall(r"(?<![\w-])--[\w-]+", " ".join(spans)):
        assert option in known_options(), option
    for name in re.findall(r"(?<![\w./-])([a-z]+(?:_[a-z0-9]+)+|[A-Z][a-z]*[A-Z]\w*)(?![\w/])", " ".join(spans)):
        assert name in WORDS, name


def test_the_defaults_of_the_training_page_are_the_configs():
    config, model = GPMConfig("out", use_cpu=True, bf16=False), GPMModelConfig()
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]+?) \|", PAGES["training"].split("\n## ")[0], re.M)
    told = {}
    for names, values in rows:
        told |= dict(zip(re.findall(r"\w+", names), values.split(", "), strict=True))
    fields, parents = ({item.name for item in dataclasses.fields(each)} for each in (GPMConfig, trl.RewardConfig))
    assert fields - parents <= told.keys()  # and a few of the parent's, with other defaults
    for name, value in told.items():
        found = getattr(config, name)
        found = getattr(model, name, None) if found is None else found
        assert value in ("none", "None") if found is None else value == str(found).removesuffix(".0"), name
