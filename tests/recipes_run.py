"""Runs modules one after the other under any launcher, as `python -m` would: see `test_recipes.py`."""

import json
import os
import runpy
import sys
import traceback
from pathlib import Path

import conftest  # noqa: F401 (offline, one thread)
import torch
from accelerate.state import AcceleratorState, PartialState
from launching import prepare_process


def run(module: str, arguments: list[str]) -> str | None:
    """The traceback of what went wrong, if anything did."""
    AcceleratorState._reset_state()
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return None if not end.code else f"exit code {end.code}"
    except Exception:
        return traceback.format_exc()
    return None


def main(jobs_file: Path) -> None:
    prepare_process()
    leave = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda *args: None  # a run leaves at its end, but others follow
    for name, module, arguments in json.loads(jobs_file.read_text()):
        error = run(module, arguments)
        if error is not None:
            print(name, error, file=sys.stderr)
            os._exit(1)  # other processes may wait for this one
        report = {"world_size": PartialState().num_processes, "distributed_type": distributed_type()}
        (jobs_file.parent / f"{name}.{PartialState().process_index}.json").write_text(json.dumps(report))
    PartialState().wait_for_everyone()
    leave()


def distributed_type() -> str:
    return str(AcceleratorState._shared_state["distributed_type"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
