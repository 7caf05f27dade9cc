"""
`gpm-trl gpm`: train a general preference model. Takes what `trl reward` takes, with [`GPMConfig`] for its
`RewardConfig`.

On one process: `gpm-trl gpm --config recipes/gemma-2b-it/gpm.yaml`. On several:
`accelerate launch --config_file recipes/accelerate_configs/zero3.yaml -m gpm_trl.cli.gpm --config ...`.
"""

import sys

from trl import TrlParser

from ..gpm import GPMConfig, GPMTrainer
from .training import make_training_parser, run_training, trainer_arguments


def make_parser(prog: str = "gpm-trl gpm") -> TrlParser:
    """The parser of the command's arguments and YAML file."""
    return make_training_parser(GPMConfig, prog)


def build_trainer(*parsed) -> GPMTrainer:
    """The trainer that the parsed arguments describe; raises `ValueError` or `OSError` for what it cannot use."""
    return GPMTrainer(**trainer_arguments(*parsed))


def main(argv: list[str] | None = None) -> int:
    """Train, save and, if asked, push; returns 0, or 2 with one line on stderr for arguments or data it cannot use."""
    return run_training(make_parser(), build_trainer, argv)


if __name__ == "__main__":
    sys.exit(main())
