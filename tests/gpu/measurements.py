"""Parts of `check.py`: packed rows against what there is without them, at real sizes, and memory against the docs."""

import argparse
import functools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from conftest import TRAINING
from datasets import Dataset
from kernels import completions, log_probs_by_trl
from measuring import interleaved, ratios
from ranking import ways_to_rank
from shared_prefix import WAYS, Step, peak, random_groups
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.utils import is_flash_attn_2_available
from trl.trainer.utils import add_fused_lm_head

from gpm_trl import (
    GPMConfig,
    GPMForPreference,
    GPMModelConfig,
    GPMTrainer,
    GPOConfig,
    GPOTrainer,
    GPRLConfig,
    GPRLTrainer,
)
from gpm_trl.cli.quickstart import byte_tokenizer
from gpm_trl.gpo.shared_prefix import shared_prefix_log_probs
from gpm_trl.models.shared_prefix import enable_shared_prefix

GIB = 2**30
# (K, p, r): responses, and tokens of the prompt and of each response.
SHAPES = [(8, 1024, 256), (8, 4096, 256), (4, 512, 512), (2, 768, 256)]
TINY_SHAPES = [(4, 16, 8), (2, 8, 8)]
CHECKPOINTING = 16_384  # separate rows of more tokens need it, so that they fit 80 GB
BYTES = len(byte_tokenizer())
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02}


def shape(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        **SPECIAL,
    )


def one_billion(args: argparse.Namespace) -> LlamaConfig:
    """The shape of Llama-3.2-1B."""
    return shape(64, 2, 4, 2, 128, 512) if args.tiny else shape(2048, 16, 32, 8, 8192, 128_256)


def smollm2(args: argparse.Namespace) -> LlamaConfig:
    """The shape of SmolLM2-135M."""
    return shape(64, 2, 4, 2, 128, 512) if args.tiny else shape(576, 30, 9, 3, 1536, 49_152)


class Device:
    """The GPU or, of `--tiny`, the CPU; what both can do."""

    def __init__(self, args: argparse.Namespace):
        self.name = "cpu" if args.tiny else "cuda"

    def synchronize(self) -> None:
        if self.name == "cuda":
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], Any]) -> float:
        self.synchronize()
        start = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - start

    def peak(self, function: Callable[[], Any]) -> float:
        """MiB by which it raises the memory in use."""
        if self.name == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        before = peak(self.name)
        function()
        self.synchronize()
        return peak(self.name) - before


def checkpoint(model: torch.nn.Module, wanted: bool) -> None:
    if wanted:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def shapes(args: argparse.Namespace, item: Callable) -> dict[str, Callable]:
    """An item for each (K, p, r); those that need gradient checkpointing say so."""
    items = {}
    for numbers in TINY_SHAPES if args.tiny else SHAPES:
        size, prompt, response = numbers
        checkpointing = size * (prompt + response) > (100 if args.tiny else CHECKPOINTING)
        bound = f"bound {size * (prompt + response) / (prompt + size * response):.2f}"
        name = f"{numbers}{', checkpointing' if checkpointing else ''}"
        items[name] = functools.partial(item, size, prompt, response, bound, checkpointing)
    return items


# --- Training and scoring ---------------------------------------------------------------------------------------------


def training(args: argparse.Namespace) -> dict[str, Callable]:
    """A GPM's step and scoring, of 1.4 billion parameters in bfloat16, against TRL's collator and padded rows."""
    device = Device(args)
    sizes = (
        {"hidden_size": 64, "layers": 2, "heads": 4} if args.tiny else {"hidden_size": 2048, "layers": 28, "heads": 16}
    )
    attention = "flash_attention_2" if is_flash_attn_2_available() and not args.tiny else "sdpa"

    @functools.cache
    def made() -> Step:
        settings = argparse.Namespace(device=device.name, dtype="float32", attn_implementation=attention, **sizes)
        with torch.device(device.name):
            step = Step(str((2, 16, 64)), settings)
        for model in step.models.values():
            model.to(torch.bfloat16)  # not autocast, which would cast all weights in each step
        return step

    def item(size: int, prompt: int, response: int, bound: str, checkpointing: bool) -> Iterator[tuple]:
        step = made()
        step.groups = random_groups([(prompt, [response] * size)])
        for model in step.models.values():
            checkpoint(model, checkpointing)
        for what, train in (("training", True), ("scoring", False)):
            times = interleaved(WAYS, functools.partial(step.seconds, train=train), args.rounds)
            for way in ("trl", "padded"):
                yield f"{what}, {way} / packed", ratios(times[way], times["packed"]), bound, None
            tokens = prompt + size * response
            yield f"{what}, packed, tokens/s", f"{tokens / statistics.median(times['packed']):,.0f}", attention, None
        peaks = {way: device.peak(functools.partial(step.seconds, way, train=True)) for way in WAYS}
        yield "training, MiB", ", ".join(f"{way} {mib:,.0f}" for way, mib in peaks.items()), "", None

    return shapes(args, item)


# --- The policy -------------------------------------------------------------------------------------------------------


def updates(args: argparse.Namespace) -> dict[str, Callable]:
    """Log-probabilities of completions by a policy of 1.2 billion parameters in bfloat16, against TRL's padded rows."""
    device = Device(args)

    @functools.cache
    def made() -> LlamaForCausalLM:
        with torch.device(device.name):
            model = LlamaForCausalLM(one_billion(args)).to(torch.bfloat16)
        enable_shared_prefix(model.base_model)
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        return model.train()

    def item(size: int, prompt: int, response: int, bound: str, checkpointing: bool) -> Iterator[tuple]:
        model = made()
        checkpoint(model, checkpointing)
        group = random_groups([(prompt, [response] * size)])[0]
        batch = completions([(group["prompt_ids"], group["response_ids"])], model.device)
        ways = {"trl": log_probs_by_trl, "packed": shared_prefix_log_probs}

        def forward(way: str) -> None:
            with torch.no_grad():
                ways[way](model, *batch)

        def update(way: str) -> None:
            log_probs, _ = ways[way](model, *batch)
            log_probs.mean().backward()
            model.zero_grad()

        for what, compute in (("update", update), ("log-probabilities", forward)):
            times = interleaved(ways, lambda way, compute=compute: device.seconds(lambda: compute(way)), args.rounds)
            yield f"{what}, trl / packed", ratios(times["trl"], times["packed"]), bound, None
        peaks = {way: device.peak(functools.partial(update, way)) for way in ways}
        yield "update, MiB", ", ".join(f"{way} {mib:,.0f}" for way, mib in peaks.items()), "", None

    return shapes(args, item)


# --- Ranking ----------------------------------------------------------------------------------------------------------


def ranking(args: argparse.Namespace) -> dict[str, Callable]:
    """Eight responses to a prompt, by a preference model of 1.2 billion parameters in bfloat16."""
    device, size = Device(args), 8

    def item() -> Iterator[tuple]:
        with torch.device(device.name):
            model = GPMForPreference(GPMModelConfig(text_config=one_billion(args))).to(torch.bfloat16)
        ways = ways_to_rank(argparse.Namespace(responses=size, tokens=8 if args.tiny else 512), model)
        times = interleaved(ways, lambda way: device.seconds(ways[way]), args.rounds)
        ours, *others = ways
        yield f"{ours}, s", f"{statistics.median(times[ours]):.4f}", "", None
        for way in others:
            yield f"{way} / {ours}", ratios(times[way], times[ours]), "", None

    return {f"K = {size}": item}


# --- Whole runs -------------------------------------------------------------------------------------------------------


def runs(args: argparse.Namespace) -> dict[str, Callable]:
    """Trainers with models of SmolLM2's size in bfloat16, packed and padded; of policies, sampling is in it."""
    device = Device(args)
    size, prompt, response = (4, 16, 8) if args.tiny else (8, 512, 64)
    steps = {"GPM": 3 if args.tiny else 20, "GPO": 2 if args.tiny else 5, "GPRL": 2 if args.tiny else 5}
    settings = {**TRAINING, "use_cpu": args.tiny, "bf16": True, "learning_rate": 1e-5}

    def text(seed: int, length: int) -> str:
        letters = torch.randint(97, 123, (length,), generator=torch.Generator().manual_seed(seed))
        return "".join(map(chr, letters.tolist()))

    def trainer(kind: str, packed: bool, max_steps: int, directory: Path) -> Any:
        given = {**settings, "shared_prefix": packed, "max_steps": max_steps}
        prompts = [{"prompt": text(index, prompt)} for index in range(16)]
        torch.manual_seed(0)
        if kind == "GPM":
            pairs = [[index, index + 1] for index in range(0, size, 2)]
            rows = [
                {
                    **row,
                    "responses": [text(1000 * number + index, 2 * response) for index in range(size)],
                    "comparisons": pairs,
                }
                for number, row in enumerate(prompts, 1)
            ]
            model = GPMForPreference.from_pretrained(directory / "gpm")
            gpm_args = GPMConfig(str(directory / "run"), per_device_train_batch_size=2, **given)
            return GPMTrainer(model, gpm_args, Dataset.from_list(rows), processing_class=byte_tokenizer())
        # Only what the tokenizer can say, and as many tokens each.
        suppressed = list(range(BYTES, smollm2(args).vocab_size))
        given["generation_kwargs"] = {"suppress_tokens": suppressed, "min_new_tokens": response}
        given |= {"num_generations": size, "max_completion_length": response, "per_device_train_batch_size": 2 * size}
        config, trainer_class = {"GPO": (GPOConfig, GPOTrainer), "GPRL": (GPRLConfig, GPRLTrainer)}[kind]
        policy, gpm = str(directory / "policy"), str(directory / "gpm")
        policy_args = config(str(directory / "run"), **given)
        return trainer_class(policy, reward_funcs=gpm, args=policy_args, train_dataset=Dataset.from_list(prompts))

    def item(kind: str) -> Iterator[tuple]:
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            torch.manual_seed(0)
            models = {"policy": LlamaForCausalLM(smollm2(args))}
            models["gpm"] = GPMForPreference(GPMModelConfig(text_config=smollm2(args)))
            for part, model in models.items():
                model.save_pretrained(directory / part)
                byte_tokenizer().save_pretrained(directory / part)
            seconds = {}
            for packed in (True, False):
                trainer(kind, packed, 1, directory).train()  # warms up
                run = trainer(kind, packed, steps[kind], directory)
                mib = device.peak(run.train)
                seconds[packed] = next(log["train_runtime"] for log in run.state.log_history if "train_runtime" in log)
                losses = [log["loss"] for log in run.state.log_history if "loss" in log]
                value = f"{seconds[packed]:.2f} s, {mib:,.0f} MiB, loss {losses[0]:.4g} to {losses[-1]:.4g}"
                whole = len(losses) == steps[kind] and all(map(math.isfinite, losses))
                yield "packed" if packed else "padded", value, f"{steps[kind]} finite losses", whole
            yield "padded / packed, s", f"{seconds[False] / seconds[True]:.2f}", "", None

    return {kind: functools.partial(item, kind) for kind in steps}


# --- Memory -----------------------------------------------------------------------------------------------------------


def state_bytes(parameters: int, dtype: torch.dtype) -> int:
    """Of weights, gradients and Adam's states in one process, by the table of docs/scaling.md."""
    return parameters * ((2 + 2 + 4) if dtype == torch.bfloat16 else (4 + 4 + 8))


class States(TrainerCallback):
    """Counts, after each optimizer step, the bytes of weights, gradients and the optimizer's states."""

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        weights = [*model.parameters()]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        states = [value for of in optimizer.state.values() for value in of.values() if torch.is_tensor(value)]
        self.bytes = sum(tensor.nbytes for tensor in (*weights, *gradients, *states))


def memory(args: argparse.Namespace) -> dict[str, Callable]:
    """A GPM of 1.2 billion parameters that trains on rows of 1024 + 1024 tokens with gradient checkpointing."""
    device = Device(args)

    def item(dtype: torch.dtype) -> Iterator[tuple]:
        half = 16 if args.tiny else 1022  # and special tokens
        rows = [{"prompt": "p" * half, "chosen": "c" * half, "rejected": "r" * half}] * 4
        with torch.device(device.name), tempfile.TemporaryDirectory() as directory:
            model = GPMForPreference(GPMModelConfig(text_config=one_billion(args)))
            model.model.to(dtype)
            given = {**TRAINING, "use_cpu": args.tiny, "bf16": True, "gradient_checkpointing": True, "max_steps": 2}
            gpm_args = GPMConfig(directory, per_device_train_batch_size=1, **given)
            data = {"train_dataset": Dataset.from_list(rows), "processing_class": byte_tokenizer()}
            trainer = GPMTrainer(model, gpm_args, callbacks=[States()], **data)
        weights = sum(weight.nbytes for weight in model.parameters())
        mib = device.peak(trainer.train)
        states = next(one for one in trainer.callback_handler.callbacks if isinstance(one, States)).bytes
        expected = state_bytes(model.num_parameters(), dtype)
        limit = f"{expected / GIB:.3g} by docs/scaling.md, within 5 %"
        yield "weights, gradients, Adam, GiB", f"{states / GIB:.3g}", limit, abs(states / expected - 1) < 0.05
        # The page says what is counted for activations, not how.
        yield (
            "peak, GiB",
            f"{weights / GIB + mib / 1024:.3g}",
            f"more than {expected / GIB:.3g}; activations vary",
            None,
        )

    return {
        "all in bfloat16": functools.partial(item, torch.bfloat16),
        "float32 weights, autocast": functools.partial(item, torch.float32),
    }
