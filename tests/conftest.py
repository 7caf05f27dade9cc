"""Tiny models, tokenizers and datasets, built in the process: the suite runs offline, on a CPU, in minutes."""

import copy
import gc
import hashlib
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRACKIO_DISABLED"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # the models are too small to share; and last bits depend on it

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    set_seed,
)
from transformers.utils import logging

from gpm_trl import GPMForPreference, GPMModelConfig, letter_cycles
from gpm_trl.cli.quickstart import byte_tokenizer

collect_ignore = ["gpu"]  # no doctests, and modules that `check.py` alone finds
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed says on stdout that it found no GPU
disable_progress_bars()
logging.disable_progress_bar()

# One BOS, roles, an EOS after each turn.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
TINY = {
    "vocab_size": 259,  # of `byte_tokenizer`
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
NO_HEAD_DIM = {name: value for name, value in TINY.items() if name != "head_dim"}
BACKBONES = {
    "llama": LlamaConfig(**TINY),
    "qwen2": Qwen2Config(**NO_HEAD_DIM),
    "qwen3": Qwen3Config(**TINY),
    "gemma": GemmaConfig(**TINY),
    # The scale of attention is not that of the width of a head, 8, so that one that ignores it is seen.
    "gemma2": Gemma2Config(**TINY, sliding_window=4, query_pre_attn_scalar=5),
    "gemma3": Gemma3TextConfig(**TINY, sliding_window=4, query_pre_attn_scalar=5),
    "mistral": MistralConfig(**TINY, sliding_window=4),
    "phi3": Phi3Config(**NO_HEAD_DIM),
}
# Of a quick training: on the CPU, in float32; nothing is saved or reported.
TRAINING = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "logging_steps": 1,
}


def tiny_model(backbone: str = "qwen3", seed: int = 0, **settings) -> GPMForPreference:
    """A general preference model of about 30,000 random parameters."""
    set_seed(seed)
    config = GPMModelConfig(text_config=copy.deepcopy(BACKBONES[backbone]), **{"embedding_dim": 4, **settings})
    return GPMForPreference(config).eval()


def lively_model(backbone: str = "qwen3", **settings) -> GPMForPreference:
    """A tiny model whose gate and embeddings vary much more with the text than those of new heads."""
    model = tiny_model(backbone, **settings)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith(("embedding_head", "scale_gate")):
                weight.mul_(10)
    return model


def tiny_reward_model() -> Qwen3ForSequenceClassification:
    set_seed(0)
    return Qwen3ForSequenceClassification(Qwen3Config(**TINY, num_labels=1)).eval()


@pytest.fixture(autouse=True, scope="module")
def quick_trainings():
    """Each training begins with a full garbage collection, which need not look through what there is already."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer of bytes without a chat template. Do not change it: use `byte_tokenizer()` for your own."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer():
    """The same with a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture(scope="session")
def decoder(tmp_path_factory):
    """The directory of a tiny causal LM (Qwen3, untied embeddings) with a tokenizer that has a chat template."""
    directory = tmp_path_factory.mktemp("decoder")
    set_seed(0)
    AutoModelForCausalLM.from_config(BACKBONES["qwen3"]).save_pretrained(directory)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def gpm(tmp_path_factory, chat_tokenizer):
    """The directory of a tiny preference model with a tokenizer that has a chat template."""
    directory = tmp_path_factory.mktemp("gpm")
    tiny_model().save_pretrained(directory)
    chat_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def letters():
    """The 24 comparisons of the letters cycles."""
    return Dataset.from_list(list(letter_cycles()))


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def digest(path: Path) -> str:
    """What tells a file from others: if two large ones differ, pytest takes many minutes to show how."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_to_cache(directory: Path, cache: Path, repository: str, revision: str = "main") -> None:
    """As if what is in a directory had been downloaded from a repository of the Hub."""
    downloaded = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(directory, downloaded / "snapshots" / ("a" * 40))
    (downloaded / "refs").mkdir()
    (downloaded / "refs" / revision).write_text("a" * 40)


def random_rows(num_rows: int = 3, length: int = 10, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids without special ones `(N, L)`, and prompt lengths `(N,)` between 2 and L / 2."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 259, (num_rows, length), generator=generator)
    return ids, torch.randint(2, length // 2 + 1, (num_rows,), generator=generator)
