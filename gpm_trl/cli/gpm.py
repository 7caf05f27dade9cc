"""
`gpm-trl gpm`: train a general preference model. Takes what `trl reward` takes, with [`GPMConfig`] for its
`RewardConfig`.

On one process: `gpm-trl gpm --config recipes/gemma-2b-it/gpm.yaml`. On several:
`accelerate launch --config_file recipes/accelerate_configs/zero3.yaml -m gpm_trl.cli.gpm --config ...`.
"""

import sys

from ..gpm import GPMConfig, GPMTrainer
from .training import TrainingParser, run_training


def make_parser() -> TrainingParser:
    return TrainingParser(GPMConfig, "gpm-trl gpm")


def main(argv: list[str] | None = None) -> int:
    return run_training(make_parser(), lambda arguments, _: GPMTrainer(**arguments), argv)


if __name__ == "__main__":
    sys.exit(main())
