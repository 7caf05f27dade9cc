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


def train(model, output_dir: str, resume: bool, where: str = "") -> GPMTrainer:
    saving = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVE_STEPS, "save_total_limit": 1}
    settings = {**QUICK, **saving, "per_device_train_batch_size": 2, "bf16": False, "dataloader_pin_memory": False}
    trainer = GPMTrainer(
        model,
        GPMConfig(output_dir, **settings),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=byte_tokenizer(),
        callbacks=[DieAt(int(where))] if where.isdecimal() else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(f"{output_dir}/final")
    trainer.accelerator.wait_for_everyone()
    return trainer


def main(directory: str, rank: str = "", where: str = "") -> None:
    """
    Start a run, of which a rank dies `where`: at a step, or in a file such as `checkpoint-4/optimizer.pt`. Without
    them, the run goes on, and one that nobody disturbs follows it.
    """
    models = [tiny_model(), tiny_model()]  # before ZeRO-3 is known, which would divide them
    if rank != os.environ["RANK"]:
        where = ""
    if where and not where.isdecimal():
        die_in(where)
    trainer = train(models[0], f"{directory}/run", resume=True, where=where)
    if not rank:
        trainer = train(models[1], f"{directory}/whole", resume=False)
    trainer.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
