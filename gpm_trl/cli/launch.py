"""`--accelerate_config`: the commands that train, started on several processes by accelerate."""

import argparse
import subprocess
import sys
from pathlib import Path

import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from .arguments import report_error

CONFIGS = Path(__file__).parents[1] / "accelerate_configs"


def launch(command: str, arguments: list[str]) -> int:
    """
    Run a command that trains as `accelerate launch` does, with `--accelerate_config`, a file or the name of one that
    comes with the package (`zero3`, ...), and maybe `--num_processes` in place of the number in it. Returns 0; 2 with
    one line on stderr for a config that cannot be used; or the exit code of the process that failed first, which says
    why itself, 1 if a signal ended it.
    """
    parser = argparse.ArgumentParser(prog=f"gpm-trl {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("--accelerate_config")
    parser.add_argument("--num_processes")
    own, arguments = parser.parse_known_args(arguments)
    try:
        launched = ["--config_file", str(config_file(own.accelerate_config))]
        launched += ["--num_processes", own.num_processes] if own.num_processes else []
        launch_command(launch_command_parser().parse_args([*launched, "-m", f"gpm_trl.cli.{command}", *arguments]))
        return 0
    except (ValueError, ImportError) as error:  # the latter of DeepSpeed, which the config needs
        return report_error(parser.prog, error)
    except subprocess.CalledProcessError as error:  # accelerate started one process by itself
        exit_code = error.returncode
    except ChildFailedError as error:  # torch started several
        exit_code = error.get_first_failure()[1].exitcode
    if exit_code < 0:
        print(f"{parser.prog}: error: a process was ended by signal {-exit_code}", file=sys.stderr)
        return 1
    return exit_code


def config_file(name: str) -> Path:
    """The file `name`, or the accelerate config of that name which comes with the package; for one machine."""
    path = Path(name) if Path(name).is_file() else CONFIGS / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
        raise ValueError(f"`accelerate_config` is {name!r}: give a file, or one of {names}.")
    try:
        num_machines = load_config_from_file(str(path)).num_machines
    except (AttributeError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"`accelerate_config` {name!r} is no configuration of accelerate: {error}") from error
    if num_machines > 1:
        raise ValueError(
            f"`accelerate_config` {name!r} is for {num_machines} machines, but this command starts the processes of "
            f"one: run `accelerate launch --config_file {path} --machine_rank ...` on each."
        )
    return path
