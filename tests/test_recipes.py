"""
Every recipe is parsed, and run under its own accelerate config on CPUs, with a tiny model and tiny data.

What a run replaces, on the command line: the model (by a tiny one of the same architecture), the data, the number of
steps and tokens to sample, and the attention that needs a GPU. All else is the recipe's.
"""

import copy
import importlib
import json
import math
import os
import re
import runpy
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import BACKBONES, tiny_model
from launching import ACCELERATE_CONFIGS, cpu_config, launch, once, shared_directory
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
    set_seed,
)
from trl import TrlParser

from gpm_trl import GPMForPreference
from gpm_trl.cli import gpm, gpo, gprl
from gpm_trl.cli.launch import config_file

ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).with_name("recipes_run.py")
FILES = sorted((ROOT / "recipes").glob("*/*.yaml"))
OTHERS = {ACCELERATE_CONFIGS.name, "smollm2-135m"}  # the latter has tests of its own
RECIPES = [path for path in FILES if path.parent.name not in OTHERS]
ARCHITECTURES = {
    "gemma-2b-it": "gemma",
    "gemma-2-9b-it": "gemma2",
    "llama-3-8b-instruct": "llama",
    "llama-3.1-8b-instruct": "llama",
    "qwen3-4b": "qwen3",
}
DISTRIBUTED = dict.fromkeys(("zero2", "zero3", "zero3_offload", "zero3_multinode"), "DEEPSPEED")
DISTRIBUTED |= {"fsdp2": "FSDP", "ddp": "MULTI_CPU"}
ITERATIONS = "recipes/iterations/run.py"


@dataclass
class Recipe:
    """What the header of a recipe says of it: the command that runs it, and its global batch."""

    path: Path

    def __post_init__(self):
        header = self.path.read_text().split("\nmodel_name_or_path")[0].replace("\n#", "").replace("\\", "")
        command = re.search(r"accelerate launch --config_file (\S+) (?:-m )?(\S+)\s+--config (\S+)", header)
        config, self.module, self.named = command.groups()
        self.config = Path(config).stem
        batch = r"(\d+) GPUs x (\d+) \w+ x (\d+) steps? = global batch of (\d+)"
        self.batch = list(map(int, re.search(batch, " ".join(header.split())).groups()))

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}-{self.path.stem}"

    @property
    def parser(self) -> TrlParser:
        if self.module == ITERATIONS:
            return runpy.run_path(str(ROOT / ITERATIONS))["make_parser"]()
        return importlib.import_module(self.module).make_parser()

    def parse(self, *overrides: str) -> tuple:
        return self.parser.parse_args_and_config(["--config", str(self.path), *overrides], fail_with_unknown_args=True)


ALL = {recipe.name: recipe for recipe in map(Recipe, RECIPES)}
recipes = pytest.mark.parametrize("name", ALL)


@recipes
def test_the_header_tells_the_command_and_the_global_batch(name, tmp_path):
    recipe = ALL[name]
    assert ROOT / recipe.named == recipe.path
    script_args, args, model_args, *_ = recipe.parse(f"--output_dir={tmp_path}", "--bf16=False", "--use_cpu=True")
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", script_args.dataset_name)
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", model_args.model_name_or_path)
    assert yaml.safe_load(recipe.path.read_text())["output_dir"] == f"outputs/{name.replace('_', '-')}"
    gpus, rows, steps, total = recipe.batch
    assert (rows, steps) == (args.per_device_train_batch_size, args.gradient_accumulation_steps)
    assert gpus == yaml.safe_load((ACCELERATE_CONFIGS / f"{recipe.config}.yaml").read_text())["num_processes"]
    assert gpus * rows * steps == total


DOCUMENTS = sorted((ROOT / "recipes").rglob("README.md"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_commands_of_the_documents_are_known(path):
    text = path.read_text().replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("gpm-trl ")]
    for _, name, *arguments in commands:
        if "--config" in arguments:
            assert (ROOT / arguments[arguments.index("--config") + 1]).exists()
            assert config_file(arguments[arguments.index("--accelerate_config") + 1]).exists()
        else:
            importlib.import_module(f"gpm_trl.cli.{name}").make_parser().parse_args(arguments)


def test_the_ablation_has_the_sixteen_models_of_the_paper(tmp_path):
    script = ROOT / "recipes" / "gemma-2b-it" / "ablation.sh"
    done = tmp_path / "outputs" / "gemma-2b-it-ablation" / "dim2-gate_true-l2_true"
    done.mkdir(parents=True)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    environment, parser = {**os.environ, "LAUNCH": "echo"}, gpm.make_parser()
    for times in range(2):
        told = subprocess.run(["bash", script], cwd=tmp_path, env=environment, capture_output=True, check=True)
        commands = [shlex.split(line)[2:] for line in told.stdout.decode().splitlines()]
        commands = [[*command, "--bf16=False", "--use_cpu=True"] for command in commands]
        models = [parser.parse_args_and_config(command, fail_with_unknown_args=True)[1] for command in commands]
        assert len({args.output_dir for args in models}) == 16 - times  # what is done is passed over
        (done / "config.json").touch()
        assert all(args.resume_from_checkpoint == "true" for args in models)
        combinations = {(args.embedding_dim, args.use_scale_gate, args.normalize_embeddings) for args in models}
        assert len(combinations) == 16 - times
        assert {dim for dim, *_ in combinations} == {2, 4, 6, 8}


def test_the_slurm_script_starts_a_launcher_on_each_machine(tmp_path):
    for name, text in {
        "scontrol": "echo node-a; echo node-b",
        "srun": 'shift; for rank in 0 1; do SLURM_NODEID=$rank "$@"; done',
        "accelerate": 'printf "%s\\n" "$*"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "nodes", "SLURM_NNODES": "2"}
    command = ["bash", ACCELERATE_CONFIGS / "slurm.sh", "gpm_trl.cli.gpm", "--config", "recipe.yaml"]
    told = subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout.splitlines()
    assert len(told) == 2
    for rank, line in enumerate(told):
        arguments = launch_command_parser().parse_args(line.split()[1:])
        assert ROOT / arguments.config_file == ACCELERATE_CONFIGS / "zero3_multinode.yaml"
        assert (arguments.num_machines, arguments.num_processes, arguments.machine_rank) == (2, 16, rank)
        assert arguments.main_process_ip == "node-a"
        assert [arguments.training_script, *arguments.training_script_args] == command[2:]


# --- Runs ------------------------------------------------------------------------------------------------------------


def save_decoder(directory: Path, architecture: str, tokenizer: PreTrainedTokenizerBase) -> None:
    set_seed(0)
    config = copy.deepcopy(BACKBONES[architecture])
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16  # bitsandbytes packs by 64
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def save_data(directory: Path, count: int) -> None:
    """Pairs of conversations, as in Skywork's data, and prompts, each as the training split of a data set."""
    rows = []
    for index in range(count):
        prompt = [{"role": "user", "content": f"Question {index}?"}]
        answers = [[{"role": "assistant", "content": text}] for text in ("Yes, indeed.", "N" + "o" * (index % 5))]
        rows.append({"prompt": prompt, "chosen": prompt + answers[0], "rejected": prompt + answers[1]})
    for name, columns in (("pairs", ("chosen", "rejected")), ("prompts", ("prompt",))):
        path = directory / name / "train.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps({column: row[column] for column in columns}) + "\n" for row in rows))


def overrides(recipe: Recipe, directory: Path) -> list[str]:
    samples = recipe.module in (gpo.__name__, gprl.__name__, ITERATIONS)
    architecture = ARCHITECTURES[recipe.path.parent.name]
    changed = {
        "model_name_or_path": directory / architecture,
        "dataset_name": directory / ("prompts" if samples else "pairs"),
        "output_dir": directory / recipe.name,
        "attn_implementation": "eager" if architecture == "gemma2" else "sdpa",
        "max_steps": 1 if samples else 2,
        "use_cpu": True,
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
    if samples:
        changed |= {"reward_model_path": directory / "reward", "max_completion_length": 8}
    return [f"--{name}={value}" for name, value in changed.items()]


def module(recipe: Recipe) -> list[str]:
    return [str(ROOT / recipe.module)] if recipe.module == ITERATIONS else ["-m", recipe.module]


def run(config: str, root: Path, chat_tokenizer: PreTrainedTokenizerBase, num_processes: int = 2) -> Path:
    """Where the recipes of an accelerate config have been run, one after the other."""
    directory = root / f"{config}_{num_processes}"

    def start():
        for architecture in set(ARCHITECTURES.values()):
            save_decoder(directory / architecture, architecture, chat_tokenizer)
        tiny_model("llama").save_pretrained(directory / "reward")
        chat_tokenizer.save_pretrained(directory / "reward")
        save_data(directory, 3 * 8 * num_processes)
        jobs = [
            (recipe.name, module(recipe), ["--config", str(recipe.path), *overrides(recipe, directory)])
            for recipe in of_config(config)
        ]
        (directory / "jobs.json").write_text(json.dumps(jobs))
        # What DeepSpeed compiles, not where an earlier run that was killed may have left a lock, which is waited for.
        extensions = {"TORCH_EXTENSIONS_DIR": str(directory / "extensions")}
        accelerate_config = cpu_config(config, directory, num_processes)
        return launch(accelerate_config, SCRIPT, directory / "jobs.json", timeout=1800, **extensions)

    return once(directory, start)


def of_config(config: str) -> list[Recipe]:
    return [ALL[name] for other, name in RUNS + OTHERS if other == config]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return shared_directory(tmp_path_factory, "recipes")


def check_run(directory: Path, recipe: Recipe, config: str, num_processes: int) -> None:
    for rank in range(num_processes):
        report = json.loads((directory / f"{recipe.name}.{rank}.json").read_text())
        assert report["world_size"] == num_processes
        assert report["distributed_type"].endswith(DISTRIBUTED[config])
    output_dir = directory / recipe.name
    if yaml.safe_load(recipe.path.read_text()).get("iterations"):
        output_dir = output_dir / "iteration-3" / "policy"
    state = json.loads(max(output_dir.glob("checkpoint-*/trainer_state.json")).read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses
    assert all(map(math.isfinite, losses))
    assert state["global_step"] == state["max_steps"]
    check_saved(directory, recipe, output_dir)


def check_saved(directory: Path, recipe: Recipe, output_dir: Path) -> None:
    """What was saved loads as what it is, and is not what it was."""
    base = directory / ARCHITECTURES[recipe.path.parent.name]
    if (output_dir / "adapter_config.json").exists():
        dim = yaml.safe_load(recipe.path.read_text())["embedding_dim"]
        PeftModel.from_pretrained(GPMForPreference.from_pretrained(base, embedding_dim=dim), output_dir)
        weights = load_file(output_dir / "adapter_model.safetensors")
        assert any("embedding_head" in name for name in weights)
        assert max(value.abs().max() for name, value in weights.items() if "lora_B" in name) > 0
        return
    classes = {gpm.__name__: GPMForPreference, "trl.scripts.reward": AutoModelForSequenceClassification}
    model = classes.get(recipe.module, AutoModelForCausalLM).from_pretrained(output_dir)
    saved = {name: weight for name, weight in model.state_dict().items() if weight.numel() > 1}
    assert all(weight.abs().max() > 0 for weight in saved.values())


RUNS = [(recipe.config, recipe.name) for recipe in ALL.values()]
# For the first, DeepSpeed compiles an optimizer; the second is `zero3`, if it is on one machine.
OTHERS = [("zero3_offload", "gemma-2b-it-gpm"), ("zero3_multinode", "gemma-2b-it-gpm")]


@pytest.mark.multiprocess
@pytest.mark.parametrize(("config", "name"), RUNS)
def test_recipes_run_on_two_processes(root, chat_tokenizer, config, name):
    check_run(run(config, root, chat_tokenizer), ALL[name], config, 2)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(("config", "name"), OTHERS + [pair for pair in RUNS if pair[0] in ("zero3", "fsdp2")])
def test_sharded_recipes_run_on_eight_processes(root, chat_tokenizer, config, name):
    check_run(run(config, root, chat_tokenizer, 8), ALL[name], config, 8)


def test_every_accelerate_config_is_run():
    configs = {path.stem for path in ACCELERATE_CONFIGS.glob("*.yaml")}
    assert configs == {config for config, _ in RUNS + OTHERS} == set(DISTRIBUTED)
