"""
`gpm-trl gpo`: align a policy with a general preference model, online. Takes what `trl grpo` takes, with [`GPOConfig`]
for its `GRPOConfig`; the preference model is `reward_model_path`.

    gpm-trl gpo --model_name_or_path path/to/policy --reward_model_path path/to/gpm --dataset_name prompts.jsonl

On several processes: `accelerate launch --config_file recipes/accelerate_configs/zero2.yaml -m gpm_trl.cli.gpo ...`.
"""

import sys

from trl import TrlParser

from ..gpo import GPOConfig, GPOTrainer
from .training import make_training_parser, run_training, trainer_arguments


def make_parser(prog: str = "gpm-trl gpo") -> TrlParser:
    """The parser of the command's arguments and YAML file."""
    return make_training_parser(GPOConfig, prog)


def build_trainer(*parsed) -> GPOTrainer:
    """The trainer that the parsed arguments describe; raises `ValueError` or `OSError` for what it cannot use."""
    arguments = trainer_arguments(*parsed)
    is_scored = "scores" in (arguments["train_dataset"].column_names or [])
    if arguments["args"].reward_model_path is None and not is_scored:
        raise ValueError("Name the preference model by `reward_model_path`.")
    return GPOTrainer(**arguments)


def main(argv: list[str] | None = None) -> int:
    """Train, save and, if asked, push; returns 0, or 2 with one line on stderr for arguments or data it cannot use."""
    return run_training(make_parser(), build_trainer, argv)


if __name__ == "__main__":
    sys.exit(main())
