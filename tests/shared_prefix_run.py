"""Trains on ragged K-way rows under any launcher, case by case: see `test_shared_prefix_distributed.py`."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from test_gpm_trainer import QUICK

from gpm_trl import GPMConfig, GPMTrainer
from gpm_trl.cli.quickstart import byte_tokenizer
from gpm_trl.data.collator import NO_COMPARISON, pad_rows

GLOBAL_BATCH_SIZE = 4  # of each of two accumulated batches
SIZES = (2, 5, 3, 2, 4, 5, 2, 3)  # responses, all compared with each other: 1 to 10 comparisons
ROWS = [
    {
        "prompt": f"Question {index}, " + "about words " * (index % 3),
        "responses": [f"answer {chr(97 + (k * 7 + index) % 26) * (k + 1)} of {index}" for k in range(size)],
        "comparisons": [[i, j] for i in range(size) for j in range(i)],
    }
    for index, size in enumerate(SIZES * 3)
]
RESUME = {"save_strategy": "steps", "save_steps": 4}  # in the second of two epochs
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "bf16": {"bf16": True},
    "resume": RESUME,
    "resume_lora": RESUME,
}


class RecordingTrainer(GPMTrainer):
    """Remembers how many comparisons each batch of this rank had, and whether its rows were packed."""

    def __init__(self, *args, **kwargs):
        self.comparisons, self.packed = [], []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.comparisons.append(int((inputs["labels"] != NO_COMPARISON).sum()))
        self.packed.append("shared_prefix_layout" in inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)


def fixed_rows() -> dict[str, torch.Tensor]:
    """Two rows of a prompt that is not in the data, padded."""
    tokenizer = byte_tokenizer()
    prompt, *responses = tokenizer(["Which one? ", "This.", "That one, I think."]).input_ids
    return {
        **pad_rows([prompt + response for response in responses], tokenizer.pad_token_id),
        "prompt_lengths": torch.full((2,), len(prompt)),
    }


def train(
    case: str, model: str, output_dir: Path, shared_prefix: bool, checkpoint: str | None = None
) -> RecordingTrainer:
    batch_size = GLOBAL_BATCH_SIZE // int(os.environ.get("WORLD_SIZE", "1"))
    settings = QUICK | {"max_steps": 6, "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 2}
    settings |= {"learning_rate": 3e-3, "bf16": False, "dataloader_pin_memory": False, **CASES[case]}
    args = GPMConfig(str(output_dir), shared_prefix=shared_prefix, **settings)
    trainer = RecordingTrainer(
        model,
        args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=byte_tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8) if case.endswith("lora") else None,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def write(trainer: RecordingTrainer, output_dir: Path) -> None:
    """What `trainer` has come to: a checkpoint and, of each rank, a report and the embeddings of the fixed rows."""
    trainer.save_model(output_dir)
    trained = trainer.model_wrapped
    trained.eval()
    computed = []
    layer = next(module for name, module in trained.named_modules() if name.endswith("layers.0.mlp"))
    hook = layer.register_forward_hook(lambda module, inputs, output: computed.append(output.dtype))
    with torch.no_grad():
        embeddings = trained(**fixed_rows()).embeddings
    hook.remove()
    save_file({"embeddings": embeddings.contiguous()}, output_dir / f"{trainer.args.process_index}.safetensors")
    report = {
        "world_size": trainer.accelerator.num_processes,
        "wrapper": type(trained).__name__,
        "computes_in": str(computed[0]),
        "held": sum(
            getattr(parameter, "ds_tensor", getattr(parameter, "_local_tensor", parameter)).numel()
            for parameter in trained.parameters()
        ),
        "comparisons": trainer.comparisons,
        "packed": trainer.packed,
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    (output_dir / f"{trainer.args.process_index}.json").write_text(json.dumps(report))
    trainer.accelerator.wait_for_everyone()


def main(model: str, output_dir: Path, rows: str, cases: list[str]) -> None:
    for case in cases:
        directory, shared_prefix = output_dir / case, rows == "packed"
        write(train(case, model, directory, shared_prefix), directory)
        if "save_steps" in CASES[case]:
            checkpoint = directory / f"checkpoint-{CASES[case]['save_steps']}"
            write(train(case, model, directory, shared_prefix, str(checkpoint)), directory / "resumed")
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
