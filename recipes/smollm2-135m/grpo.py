"""
GRPO (`trl.GRPOTrainer`) on the mean preference of a model, whichever kind: with a Bradley-Terry model, the usual RLHF.

    python recipes/smollm2-135m/grpo.py --config recipes/smollm2-135m/gprl.yaml --reward_model_path path/to/bt

Takes what `gpm-trl gprl` takes but the monitor's options. Prompts are computed once for all their completions.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig, GRPOTrainer

from gpm_trl import SharedPrefixPolicy
from gpm_trl.cli.training import TrainingParser, run_training
from gpm_trl.gpm.config import SharedPrefixConfig
from gpm_trl.gpo.judges import make_judges
from gpm_trl.gpo.layers import ExactResuming
from gpm_trl.saving import WholeCheckpoints


@dataclass
class Config(SharedPrefixConfig, GRPOConfig):
    reward_model_path: str | None = field(default=None, metadata={"help": "The preference model, by name."})


class Trainer(SharedPrefixPolicy, ExactResuming, WholeCheckpoints, GRPOTrainer):
    """TRL's trainer; the layers pack its rows, and go on exactly where a killed run was."""


def make_trainer(arguments: dict[str, Any], _) -> Trainer:
    return Trainer(**arguments, reward_funcs=make_judges(None, arguments["args"], None))


if __name__ == "__main__":
    sys.exit(run_training(TrainingParser(Config, "grpo.py"), make_trainer, None))
