"""Pushes models to a Hub, pulls them from it, and writes the scores that they give: see `test_hub.py`."""

import json
import sys
from pathlib import Path

import huggingface_hub.constants  # noqa: F401 (first, since conftest goes offline)
from conftest import tiny_model
from peft import LoraConfig
from test_checkpoints import LORA, chat_tokenizer, scores, train
from transformers import AutoModelForCausalLM

from gpm_trl import PreferenceScorer


def push(directory: Path) -> dict:
    """Scores of what is pushed, by name, and commits."""
    result = {}
    chat_tokenizer().push_to_hub("someone/full")
    for name, seed in (("older", 0), ("full", 1)):
        model = tiny_model("llama", seed=seed)
        result[f"{name}_commit"] = model.push_to_hub("someone/full", max_shard_size="50KB").oid
        result[name] = scores(model).tolist()
    base = AutoModelForCausalLM.from_config(tiny_model("gemma2").config.text_config)
    base.push_to_hub("someone/base")
    chat_tokenizer().push_to_hub("someone/base")
    for name, peft_config in (("adapter", LoraConfig(**LORA)), ("trained", None)):
        args = {"hub_model_id": f"someone/{name}"}
        trainer = train("someone/base", directory / name, args=args, peft_config=peft_config)
        trainer.push_to_hub(dataset_name="someone/rows", license="apache-2.0")
        result[name] = scores(trainer.model).tolist()
    return result


def pull(older_commit: str) -> dict:
    """Scores of what is pulled, by name."""
    result = {name: scores(f"someone/{name}").tolist() for name in ("full", "adapter", "trained")}
    result["older"] = scores("someone/full", revision=older_commit).tolist()
    try:
        PreferenceScorer.from_pretrained("someone/full", revision="no-such-branch")
    except OSError as error:
        result["error"] = str(error)
    return result


if __name__ == "__main__":
    output = Path(sys.argv[1])
    pushed = push(output)
    (output / "push.json").write_text(json.dumps(pushed))
    (output / "pull.json").write_text(json.dumps(pull(pushed["older_commit"])))
