"""Trains and saves models and an adapter on sharded weights, and writes their scores: see `test_checkpoints.py`."""

import json
import sys
from pathlib import Path

from peft import LoraConfig
from test_checkpoints import LORA, PROMPTS, RESPONSES, train

from gpm_trl import PreferenceScorer

if __name__ == "__main__":
    directory = Path(sys.argv[1])
    cases = {"full": {}, "adapter": {"peft_config": LoraConfig(**LORA)}, "untrained": {"args": {"learning_rate": 0}}}
    for name, settings in cases.items():
        trainer = train(str(directory.parent / "base"), directory / name, **settings)
        trainer.save_model()
        matrices = PreferenceScorer(trainer.model, trainer.processing_class).matrix(PROMPTS, RESPONSES)
        if trainer.is_world_process_zero():
            scores = [score for matrix in matrices for score in matrix.flatten().tolist()]
            (directory / f"{name}.json").write_text(json.dumps(scores))
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.free_memory()
    trainer.accelerator.end_training()
