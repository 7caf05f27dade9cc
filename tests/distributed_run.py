"""Trains on K-way rows of unequal size under any launcher, and writes weights and logs: see `test_distributed.py`."""

import json
import sys
from pathlib import Path

from conftest import byte_tokenizer, tiny_model
from datasets import Dataset
from test_gpm_trainer import QUICK

from gpm_trl import GPMConfig, GPMTrainer

ROWS = [
    {
        "prompt": f"Question {index}",
        "responses": [f"answer {chr(97 + k) * (k + 1)} of {index}" for k in range(2 + index % 3)],
        "comparisons": [[i, j] for i in range(2 + index % 3) for j in range(i)],
    }
    for index in range(12)
]


def main(output_dir: Path, per_device_batch_size: int) -> None:
    settings = {
        **QUICK,
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_train_batch_size": per_device_batch_size,
        "per_device_eval_batch_size": 2,
        "dataloader_pin_memory": False,
    }
    rows = Dataset.from_list(ROWS)
    trainer = GPMTrainer(
        tiny_model(reward_dim=1),  # with both parts
        GPMConfig(str(output_dir / "trainer"), **settings),
        train_dataset=rows,  # a number that the ranks divide: otherwise accelerate repeats rows in the last batch
        eval_dataset=rows.select(range(11)),
        processing_class=byte_tokenizer(),
    )
    trainer.train()
    trainer.save_model(str(output_dir / "final"))
    if trainer.accelerator.is_main_process:
        wrapper = type(trainer.model_wrapped).__name__
        report = {"ranks": trainer.accelerator.num_processes, "wrapper": wrapper, "logs": trainer.state.log_history}
        (output_dir / "report.json").write_text(json.dumps(report))
    trainer.accelerator.wait_for_everyone()  # as in `gpm_trl.cli.gpm`
    trainer.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
