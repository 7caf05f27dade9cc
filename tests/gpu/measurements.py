"""Parts of `check.py`: packed rows against what there is without them, at real sizes; memory against the docs."""

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
from measuring import interleaved, ratios
from packed_rows import cast, completions
from policy import log_probs_by_trl
from ranking import ways_to_rank
from shared_prefix import WAYS, Step, peak, random_groups
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.utils import is_flash_attn_2_available
from trl.trainer.utils import add_fused_lm_head

import gpm_trl
from gpm_trl import GPMForPreference, GPMModelConfig, GPMTrainer
from gpm_trl.cli.quickstart import byte_tokenizer
from gpm_trl.gpo.shared_prefix import shared_prefix_log_probs
from gpm_trl.models.shared_prefix import enable_shared_prefix

GIB = 2**30
# (K, p, r): responses, and tokens of the prompt and of each response.
SHAPES, TINY_SHAPES = [(8, 1024, 256), (8, 4096, 256), (4, 512, 512), (2, 768, 256)], [(4, 16, 8), (2, 8, 8)]
# Hidden size, layers, heads, their key-value heads, intermediate size, vocabulary: Llama-3.2-1B's, SmolLM2-135M's.
ONE_BILLION, SMOLLM2, TINY = (2048, 16, 32, 8, 8192, 128_256), (576, 30, 9, 3, 1536, 49_152), (64, 2, 4, 2, 128, 512)
STEPS = {"GPM": 20, "GPO": 5, "GPRL": 5}


def decoder(*sizes: int) -> LlamaConfig:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    settings = dict(zip((*names, "vocab_size"), sizes, strict=True))
    return LlamaConfig(**settings, tie_word_embeddings=True, max_position_embeddings=8192, pad_token_id=0)


class Device:
    """The GPU or, where it is tiny, the CPU: what is done differently on them."""

    def __init__(self, args: argparse.Namespace):
        self.name = "cpu" if args.tiny else "cuda"

    def seconds(self, function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        function()
        if self.name == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def peak(self, function: Callable[[], Any]) -> float:
        """MiB by which it raises the peak of memory."""
        if self.name == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        before = peak(self.name)
        function()
        return peak(self.name) - before


def by_shape(args: argparse.Namespace, models: Callable, measure: Callable) -> dict[str, Callable]:
    """An item for each (K, p, r), with gradient checkpointing where separate rows would not fit in 80 GB without."""

    def item(size: int, prompt: int, response: int, checkpointing: bool) -> Iterator[tuple]:
        for model in models():
            model.gradient_checkpointing_disable()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
        (group,) = random_groups([(prompt, [response] * size)])
        bound = f"bound {size * (prompt + response) / (prompt + size * response):.2f}"
        for name, times, mib in measure(group):
            for way in times:
                if way != "packed":
                    yield f"{name}, {way} / packed", ratios(times[way], times["packed"]), bound, None
            yield f"{name}, packed", f"{statistics.median(times['packed']):.3g} s", "", None
            yield f"{name}, MiB", ", ".join(f"{way} {raised:,.0f}" for way, raised in mib.items()), "", None

    items = {}
    for size, prompt, response in TINY_SHAPES if args.tiny else SHAPES:
        checkpointing = size * (prompt + response) > (50 if args.tiny else 16_384)
        name = f"{(size, prompt, response)}{', checkpointing' * checkpointing}"
        items[name] = functools.partial(item, size, prompt, response, checkpointing)
    return items


def training(args: argparse.Namespace) -> dict[str, Callable]:
    """A GPM's step, and scoring, with 1.4 billion parameters in bfloat16, against TRL's collator and padded rows."""
    device = Device(args)

    @functools.cache
    def step() -> Step:
        hidden_size, layers, heads = (64, 2, 4) if args.tiny else (2048, 28, 16)
        settings = argparse.Namespace(device=device.name, hidden_size=hidden_size, layers=layers, heads=heads)
        settings.attn_implementation = "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
        settings.dtype = "float32"  # no autocast, which would cast all weights in each step
        with torch.device(device.name):
            made = Step(str((2, 16, 64)), settings)
        for model in made.models.values():
            cast(model, torch.bfloat16)
        return made

    def measure(group: dict) -> Iterator[tuple]:
        step().groups = [group]
        for name, train in (("training", True), ("scoring", False)):
            compute = functools.partial(step().seconds, train=train)
            times = interleaved(WAYS, compute, args.rounds)
            yield name, times, {way: device.peak(functools.partial(compute, way)) for way in WAYS}

    return by_shape(args, lambda: step().models.values(), measure)


def updates(args: argparse.Namespace) -> dict[str, Callable]:
    """Log-probabilities of completions by 1.2 billion parameters in bfloat16, against TRL's padded rows."""
    device = Device(args)
    ways = {"trl": log_probs_by_trl, "packed": shared_prefix_log_probs}

    @functools.cache
    def policy() -> LlamaForCausalLM:
        with torch.device(device.name):
            model = cast(LlamaForCausalLM(decoder(*(TINY if args.tiny else ONE_BILLION))), torch.bfloat16)
        enable_shared_prefix(model.base_model)
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        return model.train()

    def measure(group: dict) -> Iterator[tuple]:
        batch = completions([(group["prompt_ids"], group["response_ids"])], policy().device)

        def compute(way: str, train: bool) -> None:
            with torch.set_grad_enabled(train):
                log_probs, _ = ways[way](policy(), *batch)
            if train:
                log_probs.mean().backward()
                policy().zero_grad()

        for name, train in (("update", True), ("log-probabilities", False)):
            work = {way: functools.partial(compute, way, train) for way in ways}
            times = interleaved(ways, lambda way, work=work: device.seconds(work[way]), args.rounds)
            yield name, times, {way: device.peak(work[way]) for way in ways}

    return by_shape(args, lambda: [policy()], measure)


def ranking(args: argparse.Namespace) -> dict[str, Callable]:
    """Eight responses of 512 tokens to a prompt of as many, by a GPM of 1.2 billion parameters in bfloat16."""
    device = Device(args)

    def item() -> Iterator[tuple]:
        with torch.device(device.name):
            model = GPMForPreference(GPMModelConfig(text_config=decoder(*(TINY if args.tiny else ONE_BILLION))))
        sizes = argparse.Namespace(responses=8, tokens=8 if args.tiny else 512)
        ways = ways_to_rank(sizes, cast(model, torch.bfloat16))
        times = interleaved(ways, lambda way: device.seconds(ways[way]), args.rounds)
        ours, *others = ways
        yield ours, f"{statistics.median(times[ours]):.3g} s", "", None
        for way in others:
            yield f"{way} / {ours}", ratios(times[way], times[ours]), "", None

    return {"K = 8": item}


def runs(args: argparse.Namespace) -> dict[str, Callable]:
    """Training runs with models of SmolLM2's size, packed and padded; those of policies include sampling."""
    device = Device(args)
    size, prompt, response = (4, 16, 8) if args.tiny else (8, 512, 64)
    config = decoder(*(TINY if args.tiny else SMOLLM2))
    tokenizer = byte_tokenizer()

    def text(seed: int, length: int) -> str:
        letters = torch.randint(97, 123, (length,), generator=torch.Generator().manual_seed(seed))
        return "".join(map(chr, letters.tolist()))

    def trainer(kind: str, packed: bool, steps: int, directory: Path) -> Any:
        settings = {**TRAINING, "use_cpu": args.tiny, "bf16": True, "max_steps": steps, "shared_prefix": packed}
        rows = [{"prompt": text(index, prompt)} for index in range(16)]
        gpm, policy, run = (str(directory / name) for name in ("gpm", "policy", "run"))
        if kind == "GPM":
            for index, row in enumerate(rows, 1):
                row["responses"] = [text(100 * index + number, 2 * response) for number in range(size)]
                row["comparisons"] = [[number, number + 1] for number in range(0, size, 2)]
            given = gpm_trl.GPMConfig(run, **settings, per_device_train_batch_size=2)
            return GPMTrainer(gpm, given, Dataset.from_list(rows))
        # Tokens that the tokenizer has, and as many of each completion.
        settings["generation_kwargs"] = {
            "suppress_tokens": [*range(len(tokenizer), config.vocab_size)],
            "min_new_tokens": response,
        }
        settings |= {"num_generations": size, "max_completion_length": response}
        settings["per_device_train_batch_size"] = 2 * size
        given = getattr(gpm_trl, f"{kind}Config")(run, **settings)
        trainer_class = getattr(gpm_trl, f"{kind}Trainer")
        return trainer_class(policy, reward_funcs=gpm, args=given, train_dataset=Dataset.from_list(rows))

    def item(kind: str) -> Iterator[tuple]:
        steps, seconds = 2 if args.tiny else STEPS[kind], {}
        with tempfile.TemporaryDirectory() as name:
            torch.manual_seed(0)
            gpm = GPMForPreference(GPMModelConfig(text_config=config))
            for part, model in {"policy": LlamaForCausalLM(config), "gpm": gpm}.items():
                model.save_pretrained(Path(name, part))
                tokenizer.save_pretrained(Path(name, part))
            for way, packed in (("packed", True), ("padded", False)):
                trainer(kind, packed, 1, Path(name)).train()  # warms up
                run = trainer(kind, packed, steps, Path(name))
                mib = device.peak(run.train)
                losses = [log["loss"] for log in run.state.log_history if "loss" in log]
                seconds[way] = run.state.log_history[-1]["train_runtime"]
                value = f"{seconds[way]:.2f} s, {mib:,.0f} MiB, loss {losses[0]:.4g} to {losses[-1]:.4g}"
                yield way, value, f"{steps} finite", len(losses) == steps and all(map(math.isfinite, losses))
        yield "padded / packed", f"{seconds['padded'] / seconds['packed']:.2f}", "", None

    return {kind: functools.partial(item, kind) for kind in STEPS}


def state_bytes(parameters: int, dtype: torch.dtype) -> int:
    """Of weights, gradients and Adam's states in one process, by the table of docs/scaling.md."""
    return parameters * (2 + 2 + 4 if dtype == torch.bfloat16 else 4 + 4 + 8)


class States(TrainerCallback):
    """Counts, after an optimizer step, the bytes of weights, gradients and the optimizer's states."""

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        tensors = [tensor for weight in model.parameters() for tensor in (weight, weight.grad) if tensor is not None]
        tensors += [value for values in optimizer.state.values() for value in values.values()]
        self.bytes = sum(tensor.nbytes for tensor in tensors)


def memory(args: argparse.Namespace) -> dict[str, Callable]:
    """A step of a GPM of 1.2 billion parameters on two rows of 1024 + 1024 tokens, with gradient checkpointing."""
    device = Device(args)

    def item(dtype: torch.dtype) -> Iterator[tuple]:
        half, states = 16 if args.tiny else 1023, States()  # and BOS or EOS
        rows = [{"prompt": "p" * half, "chosen": "c" * half, "rejected": "r" * half}] * 2
        settings = {**TRAINING, "use_cpu": args.tiny, "bf16": True, "gradient_checkpointing": True, "max_steps": 2}
        with torch.device(device.name):
            model = GPMForPreference(GPMModelConfig(text_config=decoder(*(TINY if args.tiny else ONE_BILLION))))
        cast(model.model, dtype)
        with tempfile.TemporaryDirectory() as directory:
            given = gpm_trl.GPMConfig(directory, **settings, per_device_train_batch_size=1)
            data = {"train_dataset": Dataset.from_list(rows), "processing_class": byte_tokenizer()}
            trainer = GPMTrainer(model, given, **data, callbacks=[states])
            mib = device.peak(trainer.train)
        expected = state_bytes(model.num_parameters(), dtype)
        close = abs(states.bytes / expected - 1) < 0.05
        yield (
            "weights, gradients, Adam",
            f"{states.bytes / GIB:.3g} GiB",
            f"{expected / GIB:.3g} by the docs, 5 %",
            close,
        )
        # The docs say what is counted for activations, not how: the peak has no limit.
        total = sum(weight.nbytes for weight in model.parameters()) / GIB + mib / 1024
        yield "peak, with activations", f"{total:.3g} GiB", "", None

    cases = {"all in bfloat16": torch.bfloat16, "float32 weights, autocast": torch.float32}
    return {name: functools.partial(item, dtype) for name, dtype in cases.items()}
