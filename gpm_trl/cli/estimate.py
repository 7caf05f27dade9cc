"""
`gpm-trl estimate`: memory of a GPU, time of a step and cost of a recipe, before anything is rented or loaded.

    gpm-trl estimate --config recipes/gemma-2b-it/gpm.yaml --accelerate_config zero3
    gpm-trl estimate --config recipe.yaml --accelerate_config zero3 --num_processes 64 --num_machines 8 --price 2.5

It takes the recipe and the overrides that `gpm-trl gpm` or `gpm-trl gpo` would take, and reads the configuration of
the model, but no weights. Memory and time are those of rows of full length: for those of your data, give
`--prompt_tokens` and `--response_tokens`. The formulas are in `gpm_trl.estimate`, what they were checked with in
docs/scaling.md.
"""

import argparse
import dataclasses
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.utils import logging as hub_logging
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.hf_argparser import string_to_bool
from transformers.utils import CONFIG_NAME, cached_file, find_adapter_config_file, logging
from trl import ModelConfig, RewardConfig, get_peft_config

from ..estimate import GIB, OPTIMIZERS, ModelShape, Sharding, gpu_hours
from ..models import GPMForPreference, GPMModelConfig
from ..trainer import GPMConfig, GPMTrainer, GPOConfig
from . import gpm, gpo
from .arguments import USER_ERRORS, report_error
from .estimate_runs import Hardware, Report, Rows, Run, estimate_gpm, estimate_gpo
from .launch import config_file
from .training import make_training_parser

PROG = "gpm-trl estimate"
PROMPT_TOKENS = 512  # of GPO's prompts, which have no limit of their own
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
POSITIVE = (
    *("num_processes", "num_machines", "prompt_tokens", "response_tokens"),
    *("gpu_memory", "peak_tflops", "mfu", "memory_bandwidth", "link_bandwidth", "price"),
)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command's own arguments; the others are the recipe's."""
    parser = argparse.ArgumentParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", help="the recipe, a YAML file; its fields may be given as arguments too")
    parser.add_argument("--accelerate_config", help="a file, or a name: zero3, fsdp2, ddp, ... (default: one GPU)")
    parser.add_argument("--num_processes", type=int, help="GPUs in all (default: the accelerate configuration's)")
    parser.add_argument("--num_machines", type=int, help="machines (default: the accelerate configuration's)")
    parser.add_argument(
        "--trainer",
        choices=("gpm", "gpo", "reward"),
        help="whose recipe it is (default: told by its fields, if it is gpm or gpo; reward is TRL's RewardTrainer)",
    )
    rows = parser.add_argument_group("rows")
    rows.add_argument("--prompt_tokens", type=int, help=f"(default: half of `max_length`; gpo: {PROMPT_TOKENS})")
    rows.add_argument("--response_tokens", type=int, help="(default: the rest; gpo: `max_completion_length`)")
    rows.add_argument("--responses", type=int, default=2, help="of a prompt, in a row of gpm (default: %(default)s)")
    hardware = parser.add_argument_group("hardware (defaults: H100 SXM of 80 GB, NVLink, 400 Gbit/s a GPU)")
    hardware.add_argument("--gpu_memory", type=float, default=79.6, help="GiB (default: %(default)s)")
    hardware.add_argument("--peak_tflops", type=float, default=989, help="dense, 16 bits (default: %(default)s)")
    hardware.add_argument(
        "--mfu", type=float, default=0.4, help="share of the peak that is assumed to be used (default: %(default)s)"
    )
    hardware.add_argument("--memory_bandwidth", type=float, default=3.35, help="TB/s (default: %(default)s)")
    hardware.add_argument(
        "--link_bandwidth", type=float, help="GB/s that a GPU sends (default: 300 in a machine, 40 between machines)"
    )
    hardware.add_argument("--price", type=float, help="of a GPU-hour, in any currency (default: none)")
    return parser


def check_positive(name: str, number: float | None) -> None:
    """`ValueError` for a number that is neither left out nor positive and finite."""
    if number is not None and not 0 < number < math.inf:
        raise ValueError(f"`{name}` is {number}, but must be positive and finite: change it, or leave it out.")


def choose_trainer(config: dict[str, Any], overrides: list[str]) -> str:
    """`"gpo"` if a field is one that only GPO has, `"gpm"` if one is GPM's; `ValueError` if a recipe has neither."""
    names = {*config, *(argument[2:].partition("=")[0] for argument in overrides if argument.startswith("--"))}
    configs = (GPOConfig, GPMConfig, RewardConfig)
    gpo_fields, gpm_fields, reward_fields = ({field.name for field in dataclasses.fields(one)} for one in configs)
    if names & (gpo_fields - gpm_fields | {"iterations"}):
        return "gpo"
    if config and not names & (gpm_fields - reward_fields):
        raise ValueError(
            "The recipe has no field that only GPMTrainer or GPOTrainer knows: say by `--trainer gpm` or `--trainer "
            "reward` whose it is."
        )
    return "gpm"


def read_early(config: dict[str, Any], overrides: list[str]) -> argparse.Namespace:
    """What must be known before a recipe is parsed: `fp16`, and that no size is 0, which configurations divide by."""
    parser = argparse.ArgumentParser(prog=PROG, add_help=False, allow_abbrev=False)
    parser.add_argument("--fp16", type=string_to_bool, nargs="?", const=True, default=config.get("fp16", False))
    sizes = ("per_device_train_batch_size", "gradient_accumulation_steps")
    for name in sizes:
        parser.add_argument(f"--{name}", type=int, default=config.get(name))
    given = parser.parse_known_args(overrides)[0]
    for name in sizes:
        check_positive(name, getattr(given, name))
    return given


def parse_recipe(args: argparse.Namespace, overrides: list[str]) -> tuple[str, list]:
    """The trainer, and the parsed arguments of its command."""
    config = {}
    if args.config is not None:
        config = yaml.safe_load(Path(args.config).read_text())
        if not isinstance(config, dict):
            raise ValueError(f"{args.config} holds a {type(config).__name__}, but a recipe is a mapping of fields.")
    trainer = args.trainer or choose_trainer(config, overrides)
    parsers = {
        "gpm": gpm.make_parser,
        "gpo": gpo.make_parser,
        "reward": lambda prog: make_training_parser(RewardConfig, prog),
    }
    parser = parsers[trainer](PROG)
    # A required argument of which nothing here depends; and what is the default on GPUs, without one at hand.
    parser.set_defaults(output_dir="unused")
    if not read_early(config, overrides).fp16:
        parser.set_defaults(bf16=True)
    recipe = [] if args.config is None else ["--config", args.config]
    parsed = parser.parse_args_and_config([*recipe, *overrides, "--use_cpu=True"])
    return trainer, list(parsed)


def read_sharding(args: argparse.Namespace) -> Sharding:
    """What an accelerate configuration says about dividing the model."""
    config: dict[str, Any] = {}
    if args.accelerate_config is not None:
        config = yaml.safe_load(config_file(args.accelerate_config).read_text())
    num_gpus = config.get("num_processes", 1) if args.num_processes is None else args.num_processes
    num_nodes = config.get("num_machines", 1) if args.num_machines is None else args.num_machines
    if num_gpus < 1 or num_nodes < 1 or num_gpus % num_nodes:
        raise ValueError(f"{num_gpus} GPUs are not the same number in each of {num_nodes} machines: change one.")
    kind = config.get("distributed_type", "NO")
    options = config.get({"DEEPSPEED": "deepspeed_config", "FSDP": "fsdp_config"}.get(kind, ""), {})
    if kind == "DEEPSPEED":
        if "deepspeed_config_file" in options:
            raise ValueError("`deepspeed_config_file` is not read: state `zero_stage` and the offloading in the YAML.")
        optimizer, weights = (
            options.get(f"offload_{what}_device", "none") != "none" for what in ("optimizer", "param")
        )
        return Sharding("zero", num_gpus, int(options.get("zero_stage", 2)), optimizer, weights, num_nodes)
    if kind == "FSDP":
        if int(options.get("fsdp_version", 1)) != 2 or not options.get("fsdp_reshard_after_forward", True):
            raise ValueError("Only FSDP2 that reshards is estimated: set `fsdp_version: 2`, or use ZeRO.")
        offloads = bool(options.get("fsdp_offload_params", False))
        return Sharding("fsdp2", num_gpus, 3, offloads, offloads, num_nodes)
    if kind not in ("NO", "MULTI_GPU"):
        raise ValueError(f"`distributed_type` is {kind}, which is not estimated: use DEEPSPEED, FSDP or MULTI_GPU.")
    return Sharding("ddp" if num_gpus > 1 else "single", num_gpus, num_nodes=num_nodes)


def read_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model, from a directory or the Hub."""
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"The configuration of {name} cannot be read ({reason}): name a directory with its `config.json` instead."
        ) from error


def read_adapter(name: str, revision: str | None = None) -> PeftConfig | None:
    """The configuration of an adapter that is trained further, or `None` for a model of its own."""
    if find_adapter_config_file(name, revision=revision) is None:
        return None
    adapter = PeftConfig.from_pretrained(name, revision=revision)
    adapter.inference_mode = False  # as `is_trainable` has it loaded
    return adapter


def read_model_config(
    model_args: ModelConfig, training_args: Any, adapter: PeftConfig | None, trainer: str
) -> PreTrainedConfig:
    """The configuration of the model that is trained, of an adapter's base where the adapter has none beside it."""
    name, revision = model_args.model_name_or_path, model_args.model_revision
    if adapter is not None:
        if model_args.use_peft:
            raise ValueError(f"{name} is an adapter, on which `use_peft` would put another: leave out `use_peft`.")
        if trainer == "reward":
            raise ValueError(f"{name} is an adapter, which TRL's RewardTrainer does not train: name its base model.")
        if cached_file(name, CONFIG_NAME, revision=revision, _raise_exceptions_for_missing_entries=False) is None:
            name, revision = adapter.base_model_name_or_path, adapter.revision
    return read_config(name, revision, training_args.trust_remote_code)


def build_model(config: PreTrainedConfig, training_args: Any, is_policy: bool) -> PreTrainedModel:
    """The model that would be trained, without weights."""
    with torch.device("meta"):
        if is_policy:
            return AutoModelForCausalLM.from_config(config)
        if not isinstance(config, GPMModelConfig):
            settings = training_args.model_settings() if isinstance(training_args, GPMConfig) else {}
            config = GPMModelConfig(text_config=config, use_lm_head=uses_lm_loss(training_args), **settings)
        return GPMForPreference(config)


def uses_lm_loss(training_args: Any) -> bool:
    """Whether a preference model is also trained on the tokens of the preferred responses."""
    return isinstance(training_args, GPMConfig) and training_args.sft_loss_coef > 0


def read_shape(model: PreTrainedModel, peft_config: PeftConfig | None = None) -> ModelShape:
    """What the formulas need to know of a model, with an adapter if there is a `peft_config`."""
    config = model.config.get_text_config()
    lacking = [name for name in NEEDED if getattr(config, name, None) is None]
    experts = [name for name in EXPERTS if getattr(config, name, None)]
    if lacking or experts:
        raise ValueError(
            f"A {config.model_type} model "
            + (f"has no {lacking[0]}" if lacking else f"has experts (`{experts[0]}`)")
            + ", but the estimate is for dense decoders of attention and MLP: measure it instead."
        )
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    norms = [module for name, module in layers[0].named_modules() if "Norm" in type(module).__name__]
    sizes = [norm.weight.numel() for norm in norms]
    shape = ModelShape(
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        params=model.num_parameters(),
        linear_params=sum(parameter.numel() for parameter in layers.parameters() if parameter.ndim == 2),
        norms=sum(size == config.hidden_size for size in sizes),
        normalizes_heads=any(size != config.hidden_size for size in sizes),
        float32_norms=any(type(norm).__name__.startswith("Gemma") for norm in norms),
    )
    return shape if peft_config is None else with_adapter(shape, model, peft_config)


def with_adapter(shape: ModelShape, model: PreTrainedModel, peft_config: PeftConfig) -> ModelShape:
    """The shape of a model with an adapter, which is put on it."""
    if not isinstance(peft_config, LoraConfig):
        raise ValueError(f"The memory of adapters of {peft_config.peft_type} is not known: train one of LoRA.")
    if isinstance(model, GPMForPreference):
        peft_config = GPMTrainer._prepare_peft_config(peft_config, model)
    with torch.device("meta"):
        model = get_peft_model(model, peft_config)
    adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return dataclasses.replace(
        shape,
        params=sum(parameter.numel() for parameter in model.parameters()),
        trained_params=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        adapted_features=sum(module.in_features for module in adapted) // shape.num_layers,
        dropout_bytes=int(peft_config.lora_dropout > 0),
    )


def weight_bytes(model_args: ModelConfig, config: PreTrainedConfig) -> int:
    """Bytes of a weight as it is loaded."""
    dtype = model_args.dtype
    if dtype in (None, "auto"):
        dtype = str(config.dtype or "float32").removeprefix("torch.")
    return 4 if dtype == "float32" else 2


def describe_run(args: argparse.Namespace, overrides: list[str]) -> tuple[str, Run]:
    """The trainer, and all that the estimate depends on."""
    for name in POSITIVE:
        check_positive(f"--{name}", getattr(args, name))
    if args.mfu > 1:
        raise ValueError(f"`--mfu` is {args.mfu:g}, but it is a share of the peak: choose at most 1.")
    trainer, (script_args, training_args, model_args, _) = parse_recipe(args, overrides)
    if model_args.model_name_or_path is None:
        raise ValueError("Name the model by `model_name_or_path`, a directory with a `config.json` or a Hub id.")
    optimizer = str(getattr(training_args.optim, "value", training_args.optim))
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"The memory of the optimizer {optimizer!r} is not known: choose one of {list(OPTIMIZERS)}.")
    adapter = read_adapter(model_args.model_name_or_path, model_args.model_revision)
    config = read_model_config(model_args, training_args, adapter, trainer)
    model = build_model(config, training_args, is_policy=trainer == "gpo")
    text_config = config.get_text_config()
    attention = model_args.attn_implementation or "sdpa"
    if attention == "sdpa" and getattr(text_config, "attn_logit_softcapping", None):
        attention = "eager"  # SDPA has no soft-capping
    judge = None
    if trainer == "gpo" and training_args.reward_model_path is not None:
        judge_config = read_config(training_args.reward_model_path)
        judge = read_shape(build_model(judge_config, training_args, is_policy=False))
    rows = describe_rows(args, training_args, trainer, model, attention)
    peft_config = get_peft_config(model_args) if adapter is None else adapter
    if peft_config is not None and training_args.disable_dropout:
        peft_config.lora_dropout = 0.0
    sharding = read_sharding(args)
    link_bandwidth = (40 if sharding.num_nodes > 1 else 300) if args.link_bandwidth is None else args.link_bandwidth
    run = Run(
        shape=read_shape(model, peft_config),
        judge=judge,
        sharding=sharding,
        optimizer=OPTIMIZERS[optimizer],
        weight_bytes=weight_bytes(model_args, text_config),
        model_args=model_args,
        training_args=training_args,
        attention=attention,
        iterations=getattr(script_args, "iterations", None),
        rows=rows,
        hardware=Hardware(
            args.gpu_memory * GIB,
            args.peak_tflops * 1e12 * args.mfu,
            args.memory_bandwidth * 1e12,
            1e9 * link_bandwidth,
        ),
    )
    return trainer, run


def check_room(name: str, tokens: int, limit: str, room: int | None) -> None:
    """`ValueError` for more tokens than a trainer takes."""
    if room is not None and tokens > room:
        raise ValueError(f"{name} is {tokens}, but {limit} leaves {room}: lower the one, or raise the other.")


def describe_policy_rows(args: argparse.Namespace, training_args: GPOConfig) -> Rows:
    """Tokens of a prompt and of a completion that is sampled for it."""
    longest, length = training_args.max_completion_length, training_args.max_length
    response = longest if args.response_tokens is None else args.response_tokens
    room = None if length is None else length - longest  # prompts are cut to it
    prompt = min(PROMPT_TOKENS, room or PROMPT_TOKENS) if args.prompt_tokens is None else args.prompt_tokens
    check_room("`--response_tokens`", response, "`max_completion_length`", longest)
    check_room("`--prompt_tokens`", prompt, "`max_length`, less `max_completion_length`,", room)
    return Rows(prompt, response, training_args.num_generations, packed=False)


def describe_rows(
    args: argparse.Namespace, training_args: Any, trainer: str, model: PreTrainedModel, attention: str
) -> Rows:
    """Tokens of prompts and responses, and whether rows are packed."""
    if trainer == "gpo":
        return describe_policy_rows(args, training_args)
    length, prompt, response = training_args.max_length, args.prompt_tokens, args.response_tokens
    if length is None and None in (prompt, response):
        raise ValueError("`max_length` is none: say how long rows are by `--prompt_tokens` and `--response_tokens`.")
    if prompt is None:
        prompt = length // 2 if response is None else length - response
    response = length - prompt if response is None else response
    check_room("`--prompt_tokens` and `--response_tokens` together", prompt + response, "`max_length`", length)
    if min(prompt, response, args.responses - 1) < 1:
        raise ValueError(
            f"{args.responses} responses of {response} tokens to a prompt of {prompt} are no comparison: give at "
            "least 2 responses, and at least a token for each part."
        )
    model.model.config._attn_implementation = attention  # as it would be loaded
    packed = trainer == "gpm" and GPMTrainer._shares_prefixes(model, training_args, data_collator=None)
    return Rows(prompt, response, args.responses, packed)


def _count(number: float, item: str) -> str:
    return f"{number:,.0f} {item}" + ("s" if number != 1 else "")


def print_report(name: str, run: Run, report: Report, price: float | None) -> None:
    """Print what the command prints."""
    shape, sharding, rows, training_args = run.shape, run.sharding, run.rows, run.training_args
    trained = "all trained" if not shape.uses_adapters else f"{shape.trained / 1e6:,.1f} million trained"
    layout = f"packed, {report.batch.tokens:,}" if rows.packed else f"padded, {report.batch.tokens:,}"
    checkpointing = "with" if training_args.gradient_checkpointing else "without"
    print(f"Estimated, not measured. {name}: {shape.params / 1e9:.2f} billion parameters, {trained}")
    machines = f" in {sharding.num_nodes} machines" if sharding.num_nodes > 1 else ""
    print(f"{_count(sharding.num_gpus, 'GPU')}{machines}, {report.backend}; {report.precision}")
    print(
        f"A GPU's batch: {report.unit} of {rows.prompt} + {rows.response} tokens ({layout} tokens), {checkpointing} "
        f"gradient checkpointing, {run.attention}\n"
    )
    print("memory of a GPU, GiB")
    for what, size in report.memory.items():
        print(f"  {what:36}{size / GIB:8.1f}")
    fits = "fits" if report.peak <= run.hardware.memory else "DOES NOT FIT"
    print(f"  {'peak':36}{report.peak / GIB:8.1f}   of {run.hardware.memory / GIB:.1f}: {fits}")
    if report.host:
        print(f"  {'in the memory of each machine':36}{report.host / GIB:8.1f}")
    print("\ntime of an optimizer step, seconds")
    for what, seconds in report.seconds.items():
        print(f"  {what:36}{seconds:8.2f}")
    step = "step, if sending overlaps computing"
    print(f"  {step:36}{report.step_seconds:8.2f}   {_count(report.items, report.item)}")
    for what in report.not_timed:
        print(f"  not timed: {what}")
    hours = gpu_hours(report.step_seconds, sharding.num_gpus, report.items)
    cost = "" if price is None else f", {hours * price:,.0f} at {price:g} a GPU-hour"
    print(f"\na million {report.item}s: {_count(hours, 'GPU-hour')}{cost}")


def main(argv: list[str] | None = None) -> int:
    """Print the estimate; returns 0, or 2 with one line on stderr for a recipe or a model it cannot use."""
    args, overrides = make_parser().parse_known_args(argv)
    loggers = (logging, hub_logging)  # warnings about a training that does not come; retries without a network
    verbosities = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"):
            trainer, run = describe_run(args, overrides)
        report = estimate_gpo(run) if trainer == "gpo" else estimate_gpm(run)
    except (*USER_ERRORS, yaml.YAMLError) as error:
        return report_error(PROG, error)
    finally:
        for logger, verbosity in zip(loggers, verbosities, strict=True):
            logger.set_verbosity(verbosity)
    print_report(run.model_args.model_name_or_path, run, report, args.price)
    return 0


if __name__ == "__main__":
    sys.exit(main())
