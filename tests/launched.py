"""Runs a script, or `-m` and a module, as `python` would, in a process that `launching.launch` has started."""

import atexit
import os
import runpy
import sys
import traceback

import conftest  # noqa: F401 (offline, one thread)
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def admit_fsdp_on_cpus() -> None:
    """Accelerate shards over accelerators alone, and on CPUs silently replicates: let it shard there too."""
    initialize = AcceleratorState.__init__

    def patched(self, *args, fsdp_plugin=None, **kwargs):
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = patched


def communicate_by_gloo() -> None:
    """Without this, DeepSpeed compiles its own communication between CPUs: a minute, and a compiler."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def run(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def exit_code(arguments: list[str]) -> int:
    """Run, and print what went wrong, if anything did."""
    try:
        run(arguments)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        admit_fsdp_on_cpus()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        communicate_by_gloo()
    code = exit_code(sys.argv[1:])
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # The interpreter is left standing: while it is taken down, a thread of gloo that frees a tensor aborts the process
    # (github.com/pytorch/pytorch/issues/190489).
    os._exit(code)
