"""Trains two processes, of which the second computes a loss that is not finite: see `test_kill.py`."""

import json
import math
import sys
from pathlib import Path

from conftest import tiny_model
from datasets import Dataset
from kill_run import ROWS
from test_gpm_trainer import QUICK

from gpm_trl import GPMConfig, GPMTrainer
from gpm_trl.cli.quickstart import byte_tokenizer


class Spoiled(GPMTrainer):
    def compute_loss(self, *args, **kwargs):
        is_bad = self.args.process_index == 1 and self.state.global_step + 1 == 3
        return super().compute_loss(*args, **kwargs) * (math.nan if is_bad else 1)


def main(directory: str) -> None:
    model = tiny_model()  # before ZeRO-3 is known, which would divide it
    saving = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "logging_steps": 100}
    settings = {**QUICK, **saving, "per_device_train_batch_size": 2, "bf16": False, "dataloader_pin_memory": False}
    args = GPMConfig(f"{directory}/run", **settings)
    trainer = Spoiled(model, args, Dataset.from_list(ROWS), processing_class=byte_tokenizer())
    try:
        trainer.train()
    except FloatingPointError as error:
        Path(directory, f"{args.process_index}.json").write_text(json.dumps(str(error)))
    trainer.accelerator.wait_for_everyone()
    trainer.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
