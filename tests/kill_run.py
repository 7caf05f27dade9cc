"""Trains under any launcher, and kills one process at a step or in the middle of a file: see `test_kill.py`."""

import os
import signal
import sys
from pathlib import Path

import torch
import transformers.modeling_utils
from conftest import tiny_model
from datasets import Dataset
from test_gpm_trainer import QUICK
from transformers import TrainerCallback, TrainerState

from gpm_trl import GPMConfig, GPMTrainer
from gpm_trl.cli.quickstart import byte_tokenizer

STEPS, SAVE_STEPS = 8, 2
ROWS = [{"prompt": f"Question {i}", "chosen": f"yes {i * i}", "rejected": f"no {7 * i}"} for i in range(20)]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            die()


def die_in(path: str) -> None:
    """Make the process die when it has written the first half of a file of a checkpoint, such as `checkpoint-4/x`."""
    checkpoint, name = path.split("/")

    def dying(function, position: int):
        def wrapper(*args, **kwargs):
            function(*args, **kwargs)
            file = Path(args[position])
            if file.name == name and checkpoint in file.parts:  # a model is written beside, and renamed
                os.truncate(file, file.stat().st_size // 2)
                die()

        return wrapper

    torch.save = dying(torch.save, 1)
    transformers.modeling_utils.safe_save_file = dying(transformers.modeling_utils.safe_save_file, 1)
    TrainerState.save_to_json = dying(TrainerState.save_to_json, 1)


def main(output_dir: str, rank: str = "-1", where: str = "") -> None:
    """`where` is a step, or a file such as `checkpoint-4/optimizer.pt`."""
    model = tiny_model()  # before ZeRO-3 is known, which would divide it
    saving = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVE_STEPS, "save_total_limit": 1}
    settings = {**QUICK, **saving, "per_device_train_batch_size": 2, "bf16": False, "dataloader_pin_memory": False}
    args = GPMConfig(output_dir, **settings)
    dies = args.process_index == int(rank)
    if dies and not where.isdecimal():
        die_in(where)
    trainer = GPMTrainer(
        model,
        args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=byte_tokenizer(),
        callbacks=[DieAt(int(where))] if dies and where.isdecimal() else None,
    )
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(f"{output_dir}/final")
    trainer.accelerator.wait_for_everyone()
    trainer.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
