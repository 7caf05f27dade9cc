"""
`gpm-trl gprl`: reinforcement learning of a policy on the blocks of a general preference model. Takes what `trl grpo`
takes, with [`GPRLConfig`] for its `GRPOConfig`; the preference model is `reward_model_path`.

On one process: `gpm-trl gprl --model_name_or_path policy --reward_model_path gpm --dataset_name prompts.jsonl`. On
several: `accelerate launch --config_file recipes/accelerate_configs/zero2.yaml -m gpm_trl.cli.gprl ...`.
"""

import sys
from typing import Any

from trl import ScriptArguments, TrlParser

from ..gprl import GPRLConfig, GPRLTrainer
from .training import make_training_parser, run_training


def make_parser() -> TrlParser:
    return make_training_parser(GPRLConfig, "gpm-trl gprl")


def make_trainer(arguments: dict[str, Any], script_args: ScriptArguments) -> GPRLTrainer:
    """The trainer; raises `ValueError` or `OSError` for what it cannot use."""
    if arguments["args"].reward_model_path is None:
        raise ValueError("Name the preference model by `reward_model_path`.")
    return GPRLTrainer(**arguments)


def main(argv: list[str] | None = None) -> int:
    return run_training(make_parser(), make_trainer, argv)


if __name__ == "__main__":
    sys.exit(main())
