"""Trains policies on given and on sampled completions, under any launcher."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import TRAINING
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file

from gpm_trl import GPOConfig, GPOTrainer
from gpm_trl.cli.quickstart import byte_tokenizer

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
PROMPTS = [{"prompt": f"Question {index}" + "?" * (index % 3)} for index in range(12)]
SYNC = {"batch": 8, "max_steps": 6, "ref_model_sync_steps": 2}
RESUME = {"batch": 8, "max_steps": 9, "num_prompts": 6, "save_strategy": "steps", "save_steps": 5}
RMSPROP = {**RESUME, "optim": "rmsprop", "learning_rate": 1e-3}
SAMPLED = {"batch": 8, "max_steps": 3, "given": False, "eval": True}
# `batch` are the completions of all processes; `reward`: a column, a function, or the directory of a model.
CASES: dict[str, dict[str, Any]] = {
    "gpo": {"batch": 8, "reward": "scores"},
    "best_worst": {"batch": 8, "reward": "function", "pairing": "best_worst"},
    "ipo": {"batch": 8, "reward": "function", "num_generations": 2, "loss_type": "ipo"},
    # Two or four of twelve completions in each of three accumulated batches, where groups do not end.
    "split_over_steps": {"batch": 4, "num_generations": 3, "split": 3},
    # On two ranks, six of twelve completions each, where the second of three groups does not end.
    "split_over_ranks": {"batch": 4, "split": 3},
    "split_best_worst": {"batch": 4, "split": 3, "pairing": "best_worst"},
    # Of 24 completions, cut into more parts on one rank than on the other, in each of two accumulated batches.
    "in_parts": {"batch": 24, "split": 2, "max_tokens_per_batch": 60, "max_steps": 4},
    "judged": {"batch": 8},
    "sync": SYNC,
    "sync_lora": SYNC,
    "resume": RESUME,
    "resume_lora": RESUME,
    "rmsprop": RMSPROP,
    "rmsprop_lora": RMSPROP,
    "sampled": SAMPLED,
    "sampled_lora": SAMPLED,
}


def given_row(index: int, row: dict[str, Any], size: int) -> dict[str, Any]:
    """A row with completions of several lengths, no two alike, and their scores."""
    texts = [chr(97 + (7 * k + index) % 26) * (1 + (k + index) % 5) + str(k) for k in range(size)]
    values = torch.tensor([1.5 * ((k * k + index) % size) + 0.1 * k for k in range(size)])
    return {**row, "completions": texts, "scores": (values[:, None] - values[None, :]).tolist()}


def vowels(completions: list[str], **kwargs) -> list[float]:
    return [sum(0.5 + (ord(letter) % 7) / 3 for letter in text) for text in completions]


class RecordingTrainer(GPOTrainer):
    """Remembers the signals of all processes, as they were made."""

    def __init__(self, *args, **kwargs):
        self.recorded, self.num_parts, self.counted = [], [], []
        super().__init__(*args, **kwargs)

    def _parts(self, inputs):
        made = super()._parts(inputs)
        self.num_parts.append([len(made), sum(bool(part["completion_mask"].any()) for part in made)])
        return made

    def log(self, logs, start_time=None):
        if not self.model.training:
            self.counted.append(len(self._metrics["eval"].get("win_rate", [])))
        super().log(logs, start_time)

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        if self.model.training:
            names = ("advantages", "weight", "best", "worst")
            self.recorded.append({name: self.accelerator.gather(batch[name]).float().tolist() for name in names})
        return batch


def make_trainer(case: str, directory: Path) -> RecordingTrainer:
    options = dict(CASES[case])
    batch, split = options.pop("batch"), options.pop("split", None)
    given, evaluates = options.pop("given", True), options.pop("eval", False)
    reward = {"scores": None, "function": vowels, "gpm": str(directory / "gpm")}[options.pop("reward", "gpm")]
    prompts, size = PROMPTS[: options.pop("num_prompts", None)], options.pop("num_generations", 4)
    rows = [given_row(index, row, size) for index, row in enumerate(prompts)] if given else prompts
    if given and reward is not None:
        rows = [{name: row[name] for name in ("prompt", "completions")} for row in rows]
    settings = {
        **TRAINING,
        "max_steps": 4,
        "num_generations": size,
        "beta": 1.0,
        "per_device_train_batch_size": batch // WORLD_SIZE,
        "gradient_accumulation_steps": split or 1,
        "steps_per_generation": split,
        "max_completion_length": 8,
        "per_device_eval_batch_size": 4,
        "learning_rate": 0.05,
        "optim": "sgd",  # others divide by gradients, also where these are rounding errors
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "dataloader_pin_memory": False,
        **options,
    }
    if evaluates:
        settings |= {"eval_strategy": "steps", "eval_steps": settings["max_steps"]}
    return RecordingTrainer(
        str(directory / "policy"),
        reward_funcs=reward,
        args=GPOConfig(str(directory / case), **settings),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(PROMPTS[:3]) if evaluates else None,
        peft_config=LoraConfig(r=4, lora_alpha=8) if case.endswith("lora") else None,
    )


def fixed_ids() -> torch.Tensor:
    """Token ids of a prompt and a completion that are not in the data."""
    return torch.tensor(byte_tokenizer()(["Which one? This.", "Which one? None."], add_special_tokens=False).input_ids)


def parts(weights) -> list[torch.Tensor]:
    """What of weights is on this process."""
    return [getattr(weight, "ds_tensor", getattr(weight, "_local_tensor", weight)).data for weight in weights]


def held(model: torch.nn.Module | None) -> int:
    """Weights of a model that are on this process."""
    return sum(part.numel() for part in parts(model.parameters() if model is not None else ()))


def reload_reference(trainer: RecordingTrainer, directory: Path) -> dict[str, float]:
    """How far the reference is from itself when spoiled, and when loaded again from what was saved before."""
    adapter = [value for name, value in trainer.model.named_parameters() if ".ref." in name]
    reference = parts(adapter if trainer.ref_model is None else trainer.ref_model.parameters())
    before = [part.clone() for part in reference]

    def distance() -> float:
        return max((part - old).abs().max().item() for part, old in zip(reference, before, strict=True) if len(part))

    trainer._update.save(directory / "saved", trainer.model)
    for part in reference:
        part.mul_(2)
    spoiled = distance()
    trainer._update.load(directory / "saved", trainer.model)
    return {"spoiled": spoiled, "loaded": distance()}


def write(trainer: RecordingTrainer, directory: Path) -> None:
    """The policy that came out and, of each rank, a report and log-probabilities of the fixed tokens."""
    trainer.save_model(directory)
    ids = fixed_ids()
    trainer.model_wrapped.eval()
    with torch.no_grad():
        logps, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model_wrapped, ids, torch.ones_like(ids), ids.shape[1] - 1
        )
    rank = trainer.args.process_index
    save_file({"logps": logps.float().contiguous()}, directory / f"{rank}.safetensors")
    (judge,) = trainer.judges.functions
    report = {
        "world_size": trainer.accelerator.num_processes,
        "wrapper": type(trainer.model_wrapped).__name__,
        "held": {
            "policy": held(trainer.model_wrapped),
            "reference": held(trainer.ref_model),
            "judge": held(judge.scorer.model) if hasattr(judge, "scorer") else 0,
        },
        "signals": trainer.recorded,
        "num_parts": trainer.num_parts,
        "counted": trainer.counted,
        "updates": trainer._update.num_updates,
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "evaluations": [entry for entry in trainer.state.log_history if "eval_win_rate" in entry],
    }
    if directory.name in ("sync", "sync_lora"):
        report["reference"] = reload_reference(trainer, directory)
    (directory / f"{rank}.json").write_text(json.dumps(report))
    trainer.accelerator.wait_for_everyone()


def main(directory: Path, cases: list[str]) -> None:
    for case in cases:
        trainer = make_trainer(case, directory)
        trainer.train()
        write(trainer, directory / case)
        if "save_steps" in CASES[case]:
            checkpoint = directory / case / f"checkpoint-{CASES[case]['save_steps']}"
            trainer = make_trainer(case, directory)
            trainer.train(resume_from_checkpoint=str(checkpoint))
            (directory / case / "resumed").mkdir(exist_ok=True)
            write(trainer, directory / case / "resumed")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
