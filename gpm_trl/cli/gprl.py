"""`gpm-trl gprl`: reinforcement learning on a general preference model's blocks. As `gpm-trl gpo`, by `GPRLConfig`."""

import sys

from ..gprl import GPRLConfig, GPRLTrainer
from .training import TrainingParser, run_training


def make_parser() -> TrainingParser:
    return TrainingParser(GPRLConfig, "gpm-trl gprl")


def main(argv: list[str] | None = None) -> int:
    return run_training(make_parser(), lambda arguments, _: GPRLTrainer(**arguments), argv)


if __name__ == "__main__":
    sys.exit(main())
