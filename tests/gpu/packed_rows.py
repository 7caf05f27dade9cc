"""Parts of `check.py`: packed rows against separate ones, by each attention kernel; and the tests that need a GPU."""

import argparse
import contextlib
import copy
import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import transformers
from conftest import TINY
from policy import log_probs_by_trl
from test_shared_prefix import ragged_groups, random_ids, separate
from test_shared_prefix_kernels import flash_attn_varlen_func, packed_by
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import modeling_flash_attention_utils as flash_utils
from trl.trainer.utils import add_fused_lm_head

from gpm_trl import GPMForPreference, GPMModelConfig
from gpm_trl.data.collator import pad_rows
from gpm_trl.gpo.shared_prefix import shared_prefix_log_probs
from gpm_trl.models.shared_prefix.attention import NAMES

ROOT = Path(__file__).parents[2]
SMALL = {**TINY, "hidden_size": 64, "head_dim": 16}  # kernels take no narrower heads
WINDOW = {**SMALL, "sliding_window": 4}
GEMMA = {**WINDOW, "query_pre_attn_scalar": 5}  # a scale that is not that of a head's width
CONFIGS = {
    "llama": transformers.LlamaConfig(**SMALL),
    "mistral": transformers.MistralConfig(**WINDOW),
    "gemma3": transformers.Gemma3TextConfig(**GEMMA),
    "gemma2": transformers.Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=5.0),
}
TORCH_FLASH = "torch's own flash_attention_2"  # on the CPU, the tests' reference for it
# Flex attention comes last, as it is compiled.
KERNELS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", TORCH_FLASH, "flex_attention")
WITHOUT_SOFTCAP = {("sdpa", "gemma2"), (TORCH_FLASH, "gemma2")}
LIMITS = {"outputs": 1e-5, "gradients": 1e-4}  # relative, in float32
TWICE = {"outputs": 2, "gradients": 2}  # in bfloat16, of separate rows' own distance
Computed = dict[str, list[torch.Tensor]]  # "outputs" and "gradients", of all weights
Groups = list[tuple[list[int], list[list[int]]]]
Pair = tuple[torch.Tensor, torch.Tensor]


# --- Packed against separate rows ------------------------------------------------------------------------------------


def kernels(args: argparse.Namespace) -> dict[str, Callable]:
    """Embeddings and gates of a preference model, and gradients."""
    return by_kernel(args, list(CONFIGS), preference_model, separate, embed_packed)


def policies(args: argparse.Namespace) -> dict[str, Callable]:
    """Log-probabilities and entropies of a policy, and gradients; separate rows are TRL's own, padded."""
    return by_kernel(args, ["llama", "gemma2"], policy, log_probs_apart, log_probs_packed)


def by_kernel(
    args: argparse.Namespace, names: list[str], make: Callable, apart: Callable, packed: Callable
) -> dict[str, Callable]:
    """An item for each kernel, architecture and precision that go together."""
    torch.set_float32_matmul_precision("highest")  # no TF32
    device, rows = "cpu" if args.tiny else "cuda", groups()

    def computed(name: str, dtype: torch.dtype, compute: Callable) -> Computed:
        torch.manual_seed(0)
        model = cast(make(copy.deepcopy(CONFIGS[name])).to(device), dtype).train()
        outputs = [output.float() for output in compute(model)]
        flat = torch.cat([output.flatten() for output in outputs])
        (flat * torch.linspace(-1, 1, len(flat), device=device)).sum().backward()
        gradients = [weight.grad.float() for weight in model.parameters() if weight.grad is not None]
        return {"outputs": [output.detach() for output in outputs], "gradients": gradients}

    @functools.cache
    def separate_rows(name: str, dtype: torch.dtype) -> Computed:
        return computed(name, dtype, lambda model: apart(model, rows))

    def item(kernel: str, name: str, dtype: torch.dtype) -> Iterator[tuple]:
        if kernel.startswith("flash") and not getattr(flash_utils, f"is_flash_attn_{kernel[-1]}_available")():
            yield "", "", "", "not run: not installed"
            return
        wanted, own = separate_rows(name, torch.float32), separate_rows(name, dtype)
        base, patch = kernel, contextlib.nullcontext()
        if kernel == TORCH_FLASH:
            base, patch = "flash_attention_2", built_in_flash(args.tiny)
        with patch:
            made = computed(name, dtype, lambda model: packed(model, rows, base))
        yield compare(made, wanted, None if dtype == torch.float32 else own)
        torch.compiler.reset()  # after some recompilations, flex attention would not be compiled any more

    return {
        f"{kernel}, {name}, {str(dtype).removeprefix('torch.')}": functools.partial(item, kernel, name, dtype)
        for kernel, name, dtype in itertools.product(KERNELS, names, (torch.float32, torch.bfloat16))
        if not ("flash" in kernel and dtype == torch.float32) and (kernel, name) not in WITHOUT_SOFTCAP
    }


def compare(made: Computed, wanted: Computed, own: Computed | None) -> tuple:
    """A row: how far packed rows are from separate ones in float32, in units of `own`, if it is given."""

    def distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
        return sum((a - b).square().sum().item() for a, b in zip(one, other, strict=True)) ** 0.5

    errors, limits = {}, LIMITS if own is None else TWICE
    for name, floor in (("outputs", 1.0), ("gradients", 1e-6)):
        if own is not None:
            errors[name] = distance(made[name], wanted[name]) / distance(own[name], wanted[name])
            continue
        pairs = zip(made[name], wanted[name], strict=True)
        errors[name] = max(((a - b).abs().max() / b.abs().max().clamp(min=floor)).item() for a, b in pairs)
    value, limit = (", ".join(f"{name} {number:.2g}" for name, number in of.items()) for of in (errors, limits))
    return "", value, limit, all(errors[name] <= limits[name] for name in errors)


def built_in_flash(tiny: bool) -> contextlib.AbstractContextManager:
    """Within, transformers' flash attention is the kernel that torch has built in."""

    # transformers asks for arguments by the names of flash attention's own function.
    def varlen(q, k, v, *, causal, softmax_scale=None, dropout_p=0.0, window_size=(-1, -1), **segments):
        places = [segments[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")]
        windows = {"window_size_left": window_size[0], "window_size_right": window_size[1]}
        forward = torch.ops.aten._flash_attention_forward
        return forward(q, k, v, *places, dropout_p, causal, False, scale=softmax_scale, **windows)[0]

    functions = (None, flash_attn_varlen_func if tiny else varlen, None, None, None)
    return mock.patch.multiple(flash_utils, _lazy_imports=lambda *_, **__: functions, _loaded_implementation=None)


def cast(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Weights alone, as transformers does: frequencies of positions stay in float32."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


def groups() -> Groups:
    """The tests', and one that is longer than the blocks of kernels."""
    generator = torch.Generator().manual_seed(1)
    long = (random_ids(300, generator), [random_ids(length, generator) for length in (1, 65, 129, 200)])
    return [*ragged_groups(), long]


def preference_model(config: PreTrainedConfig) -> GPMForPreference:
    return GPMForPreference(GPMModelConfig(text_config=config, embedding_dim=4))


def embed_packed(model: GPMForPreference, rows: Groups, base: str) -> Pair:
    output = packed_by(base, model, rows)
    return output.embeddings, output.scales


def policy(config: PreTrainedConfig) -> PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_config(config)
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    return model


def completions(groups: Groups, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Token ids and mask of prompts, padded on the left, and completions, padded on the right; the latter's length."""
    left = pad_rows([prompt[::-1] for prompt, responses in groups for _ in responses], 0)
    right = pad_rows([response for _, responses in groups for response in responses], 0)
    ids, mask = (torch.cat([left[name].flip(1), right[name]], dim=1).to(device) for name in left)
    return ids, mask, right["input_ids"].shape[1]


def log_probs_apart(model: PreTrainedModel, rows: Groups) -> Pair:
    return log_probs_by_trl(model, *completions(rows, model.device))


def log_probs_packed(model: PreTrainedModel, rows: Groups, base: str) -> Pair:
    model.base_model.set_attn_implementation(NAMES[base])
    return shared_prefix_log_probs(model, *completions(rows, model.device))


# --- The tests -------------------------------------------------------------------------------------------------------


def tests(args: argparse.Namespace) -> dict[str, Callable]:
    """Those with the marker `gpu`, of the files that have one, so that no other is imported."""
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    # Without the project's settings, which are for a newer pytest than there may be.
    options = ["-m", "gpu", "-q", "-c", os.devnull, f"--rootdir={ROOT}", "-p", "no:cacheprovider"]

    def item() -> Iterator[tuple]:
        command = [sys.executable, "-m", "pytest", *options, *files]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        print(result.stdout, result.stderr, flush=True)
        summary = (result.stdout.strip().splitlines() or [f"ended with {result.returncode}"])[-1]
        skipped = args.tiny and result.returncode == 0
        yield "", summary, "", "not run: needs a GPU" if skipped else result.returncode == 0

    return {"pytest -m gpu": item}
