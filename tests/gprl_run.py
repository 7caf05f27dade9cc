"""Trains a policy by GPRL while its monitor acts, under any launcher; resumes it; and writes what came out."""

import json
import os
import sys
from pathlib import Path

import torch
from conftest import TRAINING
from datasets import Dataset

from gpm_trl import GPRLConfig, GPRLTrainer

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
PROMPTS = [{"prompt": f"Question {index}" + "?" * (index % 3)} for index in range(12)]
SETTINGS = {
    **TRAINING,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "num_generations": 4,
    "per_device_train_batch_size": 4 // WORLD_SIZE,  # on two ranks, the second of three groups is on both
    "gradient_accumulation_steps": 3,
    "max_completion_length": 8,
    "learning_rate": 0.05,
    "optim": "sgd",  # others divide by gradients, also where these are rounding errors
    "lr_scheduler_type": "constant",
    "dataloader_pin_memory": False,
    "drift_baseline_steps": 1,
    "drift_threshold": 1e-9,
}


class GivenTrainer(GPRLTrainer):
    """Takes what is given for samples, since ranks draw for themselves: texts of several lengths, no two alike."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        first, tokenizer = self.args.process_index * len(prompt_ids), self.processing_class
        texts = [
            chr(97 + (7 * k + len(ids) + ids[-1]) % 26) * (1 + (k + ids[-1] + self.state.global_step) % 5) + str(k)
            for k, ids in ((index % 4, ids) for index, ids in enumerate(prompt_ids, start=first))
        ]
        return [[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for text in texts], None


def make_trainer(directory: Path) -> GPRLTrainer:
    args = GPRLConfig(str(directory / "run"), **SETTINGS)
    return GivenTrainer(str(directory / "policy"), str(directory / "gpm"), args, Dataset.from_list(PROMPTS))


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    runs = {}
    for name in ("whole", "resumed"):
        trainer = make_trainer(directory)
        checkpoint = str(directory / "run" / "checkpoint-2") if name == "resumed" else None
        trainer.train(resume_from_checkpoint=checkpoint)
        weights = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        runs[name] = {
            "logs": logs,
            "state": trainer.monitor.state(),
            "beta": trainer.beta,
            "weights": weights.tolist(),
        }
    (directory / f"{trainer.args.process_index}.json").write_text(json.dumps(runs))
    trainer.accelerator.end_training()
