"""
`gpm-trl gpo`: align a policy with a general preference model, online. Takes what `trl grpo` takes, with [`GPOConfig`]
for its `GRPOConfig`; the preference model is `reward_model_path`.

On one process: `gpm-trl gpo --model_name_or_path policy --reward_model_path gpm --dataset_name prompts.jsonl`. On
several: `accelerate launch --config_file recipes/accelerate_configs/zero2.yaml -m gpm_trl.cli.gpo ...`.
"""

import sys

from ..gpo import GPOConfig, GPOTrainer
from .training import TrainingParser, run_training


def make_parser() -> TrainingParser:
    return TrainingParser(GPOConfig, "gpm-trl gpo")


def main(argv: list[str] | None = None) -> int:
    return run_training(make_parser(), lambda arguments, _: GPOTrainer(**arguments), argv)


if __name__ == "__main__":
    sys.exit(main())
