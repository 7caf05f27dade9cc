"""What the commands that train share: from parsed arguments to a trainer, and a run from start to end."""

import argparse
import inspect
import os
import sys
import textwrap
from collections.abc import Callable
from itertools import chain
from typing import Any

import yaml
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from ..data.formats import RowError
from ..gpm.config import refuse_ignored
from ..saving import check_output_dir, check_whole
from .arguments import USER_ERRORS, check_options, report_error
from .rows import load_rows, split_of

EXAMPLES = {
    "gpm-trl gpm": "--model_name_or_path Qwen/Qwen3-0.6B --dataset_name pairs.jsonl --output_dir gpm",
    "gpm-trl gpo": "--model_name_or_path Qwen/Qwen3-0.6B --reward_model_path gpm --dataset_name prompts.jsonl "
    "--output_dir gpo",
    "gpm-trl gprl": "--model_name_or_path Qwen/Qwen3-0.6B --reward_model_path gpm --dataset_name prompts.jsonl "
    "--output_dir gprl",
}
USUAL = (
    *("model_name_or_path", "dataset_name", "dataset_train_split", "dataset_test_split", "output_dir", "seed"),
    *("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_length", "max_completion_length", "num_generations", "bf16", "gradient_checkpointing", "dtype"),
    *("attn_implementation", "use_peft", "lora_r", "lora_alpha", "lora_target_modules", "eval_strategy", "eval_steps"),
    *("save_steps", "logging_steps", "report_to", "push_to_hub"),
)
LAUNCHED = {
    "config": "YAML file with any of these options; the command line overrides it",
    "accelerate_config": "ddp, fsdp2, zero2, zero3, zero3_offload or a file: how to run on several processes",
    "num_processes": "with `accelerate_config`: how many, in place of the number in it",
    "resume_from_checkpoint": "true: from the last whole checkpoint, else from the start; or one by its directory",
}


class TrainingParser(TrlParser):
    """
    TRL's parser of a training command's arguments and YAML file, with a help that can be read: `--help` has what the
    command adds and what most runs set, `--help-all` every option. A mistyped field of the file is told with a similar
    one, as options are. It overrides `format_help` and `set_defaults_with_config`.
    """

    def __init__(
        self,
        config_class: type[TrainingArguments],
        prog: str,
        script_class: type[ScriptArguments] = ScriptArguments,
    ):
        super().__init__((script_class, config_class, ModelConfig, DatasetMixtureConfig), prog=prog)
        self.add_argument("--help-all", action=HelpAll, help="show every option, with those of TRL and transformers")
        ours = [
            parent for parent in (*script_class.__mro__, *config_class.__mro__) if parent.__module__.startswith("gpm")
        ]
        self.own = dict.fromkeys(name for parent in ours for name in inspect.get_annotations(parent))

    def set_defaults_with_config(self, **fields) -> list[str]:
        for name in fields:
            if name in LAUNCHED and f"--{name}" not in self._option_string_actions:
                raise ValueError(f"`{name}` starts the command, so it cannot be in its file: give `--{name}`.")
        check_options(self, [f"--{name}" for name in fields])
        return super().set_defaults_with_config(**fields)

    def format_help(self) -> str:
        usual = [name for name in USUAL if f"--{name}" in self._option_string_actions and name not in self.own]
        sections = {"options of this command": self.own, "options that most runs set, of TRL and transformers": usual}
        lines = [f"usage: {self.prog} [--config FILE] [--accelerate_config NAME] [--option value ...]", ""]
        lines += [f"for example: {self.prog} {EXAMPLES.get(self.prog, '--config FILE')}", "", "how it is run:"]
        lines += chain.from_iterable(_entry(name, what) for name, what in LAUNCHED.items())
        for title, names in sections.items():
            actions = (self._option_string_actions[f"--{name}"] for name in names)
            lines += ["", f"{title}:", *chain.from_iterable(_entry(one.dest, _describe(one)) for one in actions)]
        return "\n".join([*lines, "", "--help-all shows every option, with those of TRL and transformers."]) + "\n"


class HelpAll(argparse.Action):
    """Print the parent's help of every option, and exit."""

    def __init__(self, option_strings: list[str], dest: str, help: str):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: TrainingParser, *args):
        print(super(TrainingParser, parser).format_help())
        parser.exit()


def _describe(action: argparse.Action) -> str:
    choices = f" One of {', '.join(map(str, action.choices))}." if action.choices else ""
    default = "" if action.default in (None, argparse.SUPPRESS) else f" (default: {action.default})"
    return f"{action.help or ''}{choices}{default}".replace("%%", "%")


def _entry(name: str, what: str) -> list[str]:
    """An option and what it is, in lines."""
    first, *rest = textwrap.wrap(what, 84) or [""]
    return [f"  --{name:30} {first}", *(f"{'':34} {line}" for line in rest)]


def trainer_arguments(
    script_args: ScriptArguments,
    training_args: TrainingArguments,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> dict[str, Any]:
    """Arguments of a trainer; raises `ValueError` or `OSError` for what it cannot use."""
    if model_args.model_name_or_path is None:
        raise ValueError("Name the model to train by `model_name_or_path`.")
    check_output_dir(training_args.output_dir)
    try:
        for callback_class in get_reporting_integration_callbacks(training_args.report_to):
            callback_class()
    except RuntimeError as error:  # it is not installed
        raise ValueError(f"`report_to` is {', '.join(training_args.report_to)}: {error}") from error
    checkpoint = training_args.resume_from_checkpoint  # of YAML, it may be a bool; of the command line, that word
    checkpoint = {"true": True, "false": None}.get(str(checkpoint).lower(), checkpoint)
    if isinstance(checkpoint, str):
        check_whole(checkpoint)
    training_args.resume_from_checkpoint = checkpoint
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    if bool(script_args.dataset_name) == bool(dataset_args.datasets):
        raise ValueError("Name the training data by either `dataset_name` or `datasets`.")
    refuse_ignored(script_args, {"the models have no such buffers": "ignore_bias_buffers"})
    if not model_args.use_peft:
        refuse_ignored(model_args, {"`use_peft` is off": "lora_* use_rslora use_dora"})
    if not model_args.load_in_4bit:
        refuse_ignored(model_args, {"`load_in_4bit` is off": "*bnb_*"})
    if dataset_args.datasets:
        refuse_ignored(script_args, {"it is of `dataset_name`": "dataset_[cs]*"})
        dataset = get_dataset(dataset_args)
    else:
        refuse_ignored(dataset_args, {"it is of `datasets`": "streaming test_split_size"})
        dataset = load_rows(script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming)
    evaluates = training_args.eval_strategy != "no"
    return {
        "model": model_args.model_name_or_path,
        "args": training_args,
        "train_dataset": split_of(dataset, script_args.dataset_train_split, "dataset_train_split"),
        "eval_dataset": split_of(dataset, script_args.dataset_test_split, "dataset_test_split") if evaluates else None,
        "quantization_config": get_quantization_config(model_args),
        "peft_config": get_peft_config(model_args),
    }


def train_and_save(trainer: Trainer, script_args: ScriptArguments) -> None:
    """Train from the start or from a checkpoint, save, push if asked, and end."""
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    save_and_push(trainer, script_args)
    trainer.end()


def run_training(
    parser: TrlParser, prepare: Callable, argv: list[str] | None, run: Callable[..., None] = train_and_save
) -> int:
    """
    Parse, have `prepare` make a trainer of its arguments, and run that. Returns 0, or 2 with one line on stderr for
    arguments or data that cannot be used.
    """
    argv = sys.argv[1:] if argv is None else argv
    # TRL's parser knows the file only as a word of its own.
    argv = [*chain.from_iterable(one.split("=", 1) if one.startswith("--config=") else [one] for one in argv)]
    try:
        if argv[-1:] == ["--config"]:
            raise ValueError("`--config` has no value: give a YAML file.")
        check_options(parser, argv, ("--config",))
        script_args, *rest = parser.parse_args_and_config(argv, fail_with_unknown_args=True)
        try:
            prepared = prepare(trainer_arguments(script_args, *rest), script_args)
        except RowError as error:
            raise ValueError(f"{script_args.dataset_name or 'datasets'}: {error}") from error
        run(prepared, script_args)
    except (*USER_ERRORS, yaml.YAMLError) as error:
        return report_error(parser.prog, error)
    return 0


def save_and_push(trainer: Trainer, script_args: ScriptArguments) -> None:
    """Save the model, push it if asked, and wait for all processes."""
    if trainer.is_fsdp_enabled:  # the Trainer saves no model of shards, and says nothing
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    trainer.accelerator.print(f"Model saved to {trainer.args.output_dir}.")
    if trainer.args.push_to_hub:
        is_local = os.path.exists(script_args.dataset_name or "")  # a card is no place for a path of this machine
        trainer.push_to_hub(dataset_name=None if is_local else script_args.dataset_name)
    # On gloo, a process that ends right after a collective can hang: the model's reducer, holding the interpreter,
    # joins the communication thread, which needs the interpreter to let go of tensors. In this barrier it gets it.
    trainer.accelerator.wait_for_everyone()
