"""Runs scripts and modules one after the other under any launcher: see `test_recipes.py`."""

import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from launched import exit_code


def main(jobs_file: Path) -> None:
    leave = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda *args: None  # a run leaves at its end, but others follow
    for name, script, arguments in json.loads(jobs_file.read_text()):
        AcceleratorState._reset_state()
        if exit_code([*script, *arguments]):
            sys.exit(f"{name} failed")
        report = {"world_size": PartialState().num_processes, "distributed_type": distributed_type()}
        (jobs_file.parent / f"{name}.{PartialState().process_index}.json").write_text(json.dumps(report))
    PartialState().wait_for_everyone()
    leave()


def distributed_type() -> str:
    return str(AcceleratorState._shared_state["distributed_type"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
