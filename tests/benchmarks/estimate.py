"""
What `gpm-trl estimate` says, beside what a training step allocates, and the tables of docs/scaling.md.

    python tests/benchmarks/estimate.py measure
    python tests/benchmarks/estimate.py tables
    python tests/benchmarks/estimate.py step --size Gemma-2B --max_length 2048 --per_device_train_batch_size 4

`measure` trains small decoders for two steps by the trainers themselves, on the CPU, and takes the peak of the second
from what torch's profiler says of each allocation: bytes that were asked for, the same in every run. `tables` needs no
weights. `step` does on a GPU what `measure` does, with random weights of a real size: one GPU, nothing divided.
"""

import argparse
import copy
import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
    Trainer,
    TrainerCallback,
    set_seed,
)

from gpm_trl.cli import estimate, gpm, gpo
from gpm_trl.cli.estimate_runs import Report, Run, estimate_gpm, estimate_gpo
from gpm_trl.cli.quickstart import byte_tokenizer
from gpm_trl.estimate import GIB, OVERHEAD, gpu_hours

LLAMA = {"vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5}
GEMMA = {"vocab_size": 256_000, "max_position_embeddings": 8192}
SIZES: dict[str, PreTrainedConfig] = {
    "Gemma-2B": GemmaConfig(
        **GEMMA,
        hidden_size=2048,
        intermediate_size=16_384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
    ),
    "Llama-3.1-8B": LlamaConfig(
        **LLAMA, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32
    ),
    "Gemma-2-27B": Gemma2Config(
        **GEMMA,
        hidden_size=4608,
        intermediate_size=36_864,
        num_hidden_layers=46,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=144,
    ),
    "Llama-3.1-70B": LlamaConfig(
        **LLAMA, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64
    ),
}
SMALL = {"vocab_size": 259, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
LORA = ("--use_peft=True", "--lora_target_modules=all-linear", "--learning_rate=1e-4")
# Name, backbone, layers, hidden size, tokens of prompt and response, further arguments.
CASES: dict[str, tuple[type[PreTrainedConfig], int, int, int, int, tuple[str, ...]]] = {
    "Llama, padded": (LlamaConfig, 4, 64, 96, 32, ("--shared_prefix=false",)),
    "Llama, packed": (LlamaConfig, 4, 64, 96, 32, ()),
    "Llama, longer": (LlamaConfig, 4, 64, 256, 256, ("--shared_prefix=false",)),
    "Llama, longer, packed": (LlamaConfig, 4, 64, 256, 256, ()),
    "Llama, deeper": (LlamaConfig, 12, 64, 96, 32, ("--shared_prefix=false",)),
    "Llama, wider": (LlamaConfig, 4, 256, 96, 32, ("--shared_prefix=false",)),
    "Llama, checkpointing": (LlamaConfig, 4, 64, 96, 32, ("--shared_prefix=false", "--gradient_checkpointing=True")),
    "Llama, deeper, longer, checkpointing": (
        LlamaConfig,
        12,
        64,
        256,
        256,
        ("--shared_prefix=false", "--gradient_checkpointing=True"),
    ),
    "Llama, wide, checkpointing": (
        LlamaConfig,
        8,
        512,
        96,
        32,
        ("--shared_prefix=false", "--gradient_checkpointing=True"),
    ),
    "Llama, packed, checkpointing": (LlamaConfig, 12, 64, 256, 256, ("--gradient_checkpointing=True",)),
    "Llama, accumulation": (LlamaConfig, 4, 256, 96, 32, ("--gradient_accumulation_steps=2",)),
    "Llama, eager": (LlamaConfig, 4, 64, 256, 256, ("--shared_prefix=false", "--attn_implementation=eager")),
    "Llama, bfloat16": (
        LlamaConfig,
        4,
        64,
        256,
        256,
        ("--shared_prefix=false", "--dtype=bfloat16", "--bf16=True"),
    ),
    "Llama, float32 weights, bf16": (LlamaConfig, 4, 64, 256, 256, ("--shared_prefix=false", "--bf16=True")),
    "Qwen3, padded": (Qwen3Config, 4, 64, 96, 32, ("--shared_prefix=false",)),
    "Gemma, padded": (GemmaConfig, 4, 64, 96, 32, ("--shared_prefix=false",)),
    "Llama, LoRA": (LlamaConfig, 4, 64, 96, 32, ("--shared_prefix=false", "--lora_dropout=0", *LORA)),
    "Llama, LoRA, checkpointing": (
        LlamaConfig,
        12,
        64,
        256,
        256,
        ("--shared_prefix=false", "--gradient_checkpointing=True", *LORA),
    ),
    "Llama, GPO": (LlamaConfig, 4, 64, 8, 120, ("--num_generations=4",)),
}


def save_model(config: PreTrainedConfig, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """A causal LM with random weights, and a tokenizer of bytes."""
    set_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)


def small_config(config_class: type[PreTrainedConfig], layers: int, hidden: int) -> PreTrainedConfig:
    return config_class(**SMALL, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers)


def save_rows(path: Path, prompt: int, response: int, responses: int, is_gpo: bool, rows: int = 16) -> None:
    """Rows of so many tokens, the special ones counted, of which no two have a prompt in common."""
    lines = []
    for number in range(rows):
        start = f"{number:03}".ljust(prompt, "p")
        texts = [f"{index}".ljust(response - 1, "r") for index in range(responses)]
        if is_gpo:
            scores = [[float(j - i) for j in range(responses)] for i in range(responses)]
            lines.append({"prompt": start, "completions": texts, "scores": scores})
        else:
            lines.append({"prompt": start, "chosen": texts[0], "rejected": texts[1]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


class StepMemory(TrainerCallback):
    """Bytes that the second step allocates beyond what is there before it, at most, and what is there."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.before = self.grown = 0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step != 1:
            return
        trainer = self.trainer
        models = [trainer.model, getattr(trainer, "ref_model", None)]
        tensors = [*(tensor for model in models if model is not None for tensor in model.parameters())]
        states = [value for entry in trainer.optimizer.optimizer.state.values() for value in entry.values()]
        tensors += [value for value in states if torch.is_tensor(value)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        self.before = sum(storages.values())
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step != 2:
            return
        self._profile.__exit__(None, None, None)
        events = [event for event in self._profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        live = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            self.grown = max(self.grown, live)


def run_arguments(directory: Path, is_gpo: bool, prompt: int, response: int, further: tuple[str, ...]) -> list[str]:
    lengths = [f"--max_length={prompt + response}"]
    if is_gpo:
        lengths.append(f"--max_completion_length={response}")
    return [
        f"--model_name_or_path={directory}",
        f"--dataset_name={directory / 'rows.jsonl'}",
        f"--output_dir={directory / 'out'}",
        *lengths,
        "--per_device_train_batch_size=4",
        "--gradient_checkpointing=False",
        "--bf16=False",
        "--max_steps=2",
        "--report_to=none",
        "--save_strategy=no",
        "--logging_strategy=no",
        "--disable_tqdm=True",
        *further,
    ]


def estimated(arguments: list[str], prompt: int, response: int) -> tuple[Run, Report]:
    options = [f"--prompt_tokens={prompt}", f"--response_tokens={response}"]
    args, overrides = estimate.make_parser().parse_known_args([*options, *arguments])
    trainer, run = estimate.describe_run(args, overrides)
    return run, (estimate_gpo if trainer == "gpo" else estimate_gpm)(run)


def measured_and_estimated(name: str, directory: Path) -> tuple[float, float]:
    """Bytes at the peak of a training step of a case, on the CPU, and what is estimated for it."""
    config_class, layers, hidden, prompt, response, further = CASES[name]
    is_gpo = "GPO" in name
    save_model(small_config(config_class, layers, hidden), directory)
    save_rows(directory / "rows.jsonl", prompt, response, 4 if is_gpo else 2, is_gpo)
    arguments = run_arguments(directory, is_gpo, prompt, response, further)
    report = estimated(arguments, prompt, response)[1]
    command = gpo if is_gpo else gpm
    build: Callable = gpo.build if is_gpo else gpm.build_trainer
    trainer = build(*command.make_parser().parse_args_and_config([*arguments, "--use_cpu=True"]))
    memory = StepMemory(trainer)
    trainer.add_callback(memory)
    trainer.train()
    return memory.before + memory.grown, report.peak - OVERHEAD


def measure() -> None:
    print("| run | measured, MiB | estimated, MiB | estimated / measured |\n| --- | ---: | ---: | ---: |")
    for name in CASES:
        with tempfile.TemporaryDirectory() as directory:
            measured, expected = measured_and_estimated(name, Path(directory))
        cells = (name, f"{measured / 2**20:.2f}", f"{expected / 2**20:.2f}", f"{expected / measured:.2f}")
        print(f"| {' | '.join(cells)} |", flush=True)


def step(args: argparse.Namespace, further: list[str]) -> None:
    """A step of a real size on one GPU: the peak that torch counts, beside the estimate."""
    length = args.max_length
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        save_model(SIZES[args.size], directory, torch.bfloat16)
        save_rows(directory / "rows.jsonl", length // 2, length - length // 2, 2, is_gpo=False, rows=64)
        arguments = run_arguments(directory, False, length // 2, length - length // 2, tuple(further))
        run, report = estimated(arguments, length // 2, length - length // 2)
        trainer = gpm.build_trainer(*gpm.make_parser().parse_args_and_config(arguments))
        result = trainer.train()
    seconds = result.metrics["train_runtime"] / trainer.state.global_step
    print(f"peak, GiB: measured {torch.cuda.max_memory_allocated() / GIB:.1f}, estimated", end=" ")
    print(f"{(report.peak - OVERHEAD) / GIB:.1f}")
    print(f"seconds a step: measured {seconds:.2f} (the first counted), estimated {report.step_seconds:.2f}", end=" ")
    print(f"at {run.hardware.flops / 1e12:.0f} TFLOP/s")


RECIPE = (
    "--attn_implementation=flash_attention_2",
    "--dtype=bfloat16",
    "--max_length=2048",
    "--gradient_checkpointing=True",
)
ADAPTER = ("--use_peft=True", "--lora_target_modules=all-linear", "--lora_r=32")
QUANTIZED = ("--load_in_4bit=True", "--use_bnb_nested_quant=True")
GPO = (
    "--num_generations=8",
    "--per_device_train_batch_size=8",
    "--gradient_accumulation_steps=4",
    "--max_completion_length=1024",
    "--gradient_checkpointing=True",
)
# Of Llama-3.1-8B on 8 GPUs: what it is called, the accelerate configuration, further arguments.
WAYS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("DDP", "ddp", ()),
    ("ZeRO-2", "zero2", ()),
    ("ZeRO-3", "zero3", ()),
    ("ZeRO-3, weights and optimizer offloaded", "zero3_offload", ()),
    ("FSDP2", "fsdp2", ()),
    ("ZeRO-3, without gradient checkpointing, batch of 1", "zero3", ("--gradient_checkpointing=False",)),
    ("LoRA, DDP", "ddp", ADAPTER),
    ("LoRA, ZeRO-3", "zero3", ADAPTER),
    ("QLoRA, DDP", "ddp", (*ADAPTER, *QUANTIZED)),
)


def table(header: str, rows: list[list[str]]) -> None:
    count = header.count("|") + 1
    print(f"\n| {header} |\n| --- |{' ---: |' * (count - 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def report_cells(run: Run, report: Report) -> list[str]:
    kept = sum(report.memory[name] for name in ("weights", "gradients", "optimizer states"))
    seconds, gpus = report.seconds, run.sharding.num_gpus
    peak = f"{report.peak / GIB:.0f}"
    return [
        f"{kept / GIB:.1f}",
        f"{report.memory['activations'] / GIB:.1f}",
        peak if report.peak <= run.hardware.memory else f"**{peak}**",
        f"{seconds['computing']:.1f}",
        f"{seconds['sending']:.1f}",
        "not timed" if report.not_timed else f"{gpu_hours(report.step_seconds, gpus, report.items):,.0f}",
    ]


def gpo_cells(run: Run, report: Report) -> list[str]:
    server = copy.copy(run.training_args)
    server.use_vllm, server.vllm_mode = True, "server"
    elsewhere = estimate_gpo(dataclasses.replace(run, training_args=server))
    peaks = [each.peak for each in (report, elsewhere)]
    seconds = report.seconds
    return [
        *(f"{peak / GIB:.0f}" if peak <= run.hardware.memory else f"**{peak / GIB:.0f}**" for peak in peaks),
        f"{max(seconds['computing'], seconds['sending']):.1f}",
        f"{seconds['reference'] + seconds['preference model']:.1f}",
        f"{seconds['sampling (a lower bound)']:.1f}",
        f"{gpu_hours(report.step_seconds, run.sharding.num_gpus, report.items):,.0f}",
    ]


def tables() -> None:
    header = "weights, gradients, optimizer | activations | peak | computing, s | sending, s | GPU-hours a million"
    with tempfile.TemporaryDirectory() as temporary:
        for name, config in SIZES.items():
            config.save_pretrained(Path(temporary) / name)

        def cells(size: str, batch: int, *arguments: str) -> list[str]:
            model = f"--model_name_or_path={Path(temporary) / size}"
            given = [model, f"--per_device_train_batch_size={batch}", *RECIPE, *arguments]
            return report_cells(*estimated(given, 1024, 1024))

        rows = []
        for size, batches in zip(SIZES, ((4, 4), (4, 4), (2, 4), (1, 2)), strict=True):
            for (gpus, nodes), batch in zip(((8, 1), (64, 8)), batches, strict=True):
                world = ("--accelerate_config=zero3", f"--num_processes={gpus}", f"--num_machines={nodes}")
                rows.append([f"{size}, {gpus} GPUs", str(batch), *cells(size, batch, *world)])
        table(f"GPM | prompts a GPU | {header} comparisons", rows)
        rows = []
        for name, config_name, further in WAYS:
            batch = 1 if "batch of 1" in name else 4
            rows.append([name, *cells("Llama-3.1-8B", batch, f"--accelerate_config={config_name}", *further)])
        table(f"Llama-3.1-8B, 8 GPUs | {header} comparisons", rows)
        rows = []
        for size in SIZES:
            for gpus, nodes in ((8, 1), (64, 8)):
                world = ("--accelerate_config=zero3", f"--num_processes={gpus}", f"--num_machines={nodes}")
                judge = f"--reward_model_path={Path(temporary) / 'Gemma-2B'}"
                model = f"--model_name_or_path={Path(temporary) / size}"
                further = (*world, judge, *GPO)
                rows.append(
                    [f"{size}, {gpus} GPUs", *gpo_cells(*estimated([model, *RECIPE[:2], *further], 512, 1024))]
                )
        parts = "peak, whole weights for sampling | peak, vLLM elsewhere | training, s | scoring, s"
        table(f"GPO | {parts} | sampling, s, at least | GPU-hours a million completions", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("what", choices=("measure", "tables", "step"))
    parser.add_argument("--size", choices=tuple(SIZES), default="Gemma-2B", help="of `step` (default: %(default)s)")
    parser.add_argument("--max_length", type=int, default=2048, help="of `step` (default: %(default)s)")
    args, further = parser.parse_known_args()
    if args.what == "step":
        step(args, further)
    else:
        {"measure": measure, "tables": tables}[args.what]()


if __name__ == "__main__":
    main()
