"""
What a GPU has to show, in one command: checks and measurements, as one table and as JSON.

    bash tests/gpu/run.sh              # on one GPU, in less than nine minutes; exits with 1 if a check failed
    bash tests/gpu/run.sh --tiny       # every line of it on the CPU: its numbers mean nothing

Each part is a function of `packed_rows.py` or `measurements.py`, which returns its items by name; an item gives rows.
A process of its own works through them and keeps a journal. It is started again for what is left when it dies, or when
an item outlasts its part, so that no failure stops the rest.
"""

import argparse
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "flash-attn", "triton")
# The module and the share of the time of each part. Later ones have what earlier ones leave.
PARTS = {
    "kernels": ("packed_rows", 0.25),
    "policies": ("packed_rows", 0.12),
    "tests": ("packed_rows", 0.10),
    "training": ("measurements", 0.14),
    "updates": ("measurements", 0.09),
    "ranking": ("measurements", 0.03),
    "runs": ("measurements", 0.16),
    "memory": ("measurements", 0.04),
}
GRACE = 0.04  # of the time, by which an item may outlast its part
START = "start"  # of each part: its module is imported, its items are listed
STATUS = {True: "ok", False: "FAILED", None: "measured"}


def end_of(part: str, args: argparse.Namespace) -> float:
    """When a part is over, in seconds since the epoch."""
    earlier = list(PARTS)[: list(PARTS).index(part) + 1]
    return args.started + 60 * args.minutes * sum(PARTS[name][1] for name in earlier)


def write(journal: Path, event: str, part: str, what: str, *fields: str) -> None:
    with journal.open("a") as file:
        file.write(json.dumps([event, part, what, *fields]) + "\n")


def read(journal: Path, event: str) -> list[tuple[str, ...]]:
    lines = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    return [tuple(fields) for first, *fields in lines if first == event]


# --- The worker ------------------------------------------------------------------------------------------------------


def work(journal: Path, args: argparse.Namespace) -> None:
    """Run all items that are not done yet."""
    sys.path[1:1] = [str(ROOT / "tests"), str(ROOT / "tests" / "benchmarks")]
    done = set(read(journal, "done"))
    for part, (module, _) in PARTS.items():
        items: dict[str, Callable] = {}

        def start(part: str = part, module: str = module, items: dict = items) -> tuple:
            items.update(getattr(importlib.import_module(module), part)(args))
            return ()

        if (part, START) not in done:
            attempt(journal, part, START, start, args)
        for what, item in items.items():
            if (part, what) not in done:
                attempt(journal, part, what, item, args)


def attempt(journal: Path, part: str, what: str, item: Callable, args: argparse.Namespace) -> None:
    """Run one item, unless its part is over, and write what comes of it. A start is done only if it failed."""
    write(journal, "begun", part, what)
    poisoned, done = False, what != START
    try:
        if done and time.time() > end_of(part, args):
            write(journal, "row", part, what, "", "", "not run: time")
        else:
            for name, value, limit, status in item():
                write(
                    journal, "row", part, f"{what}: {name}" if name else what, value, limit, STATUS.get(status, status)
                )
    except Exception as error:
        traceback.print_exc()
        reason = f"FAILED: {type(error).__name__}: {str(error).strip()[:120]}".splitlines()[0]
        write(journal, "row", part, what, "", "", reason)
        poisoned, done = "CUDA error" in str(error), True
    if done:
        write(journal, "done", part, what)
    if poisoned:  # nothing more can be computed in this process
        sys.exit(3)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- Who watches it --------------------------------------------------------------------------------------------------


def in_flight(journal: Path) -> tuple[str, str] | None:
    """The item that was begun last, if it is not done."""
    begun = read(journal, "begun")[-1:]
    return begun[0] if begun and begun[0] not in read(journal, "done") else None


def wait(worker: subprocess.Popen, journal: Path, args: argparse.Namespace) -> str:
    """Until the worker ends, or an item is too late: why it did not finish."""
    while worker.poll() is None:
        time.sleep(0.2)
        part, what = in_flight(journal) or (None, START)
        end = args.started + 60 * args.minutes if what == START else end_of(part, args) + 60 * args.minutes * GRACE
        if time.time() > end:
            return "it outlasted its part"
    return f"the process ended with {worker.returncode}"


def watch(journal: Path, args: argparse.Namespace) -> None:
    """Start workers until all is done, or one does not get any further."""
    command = [sys.executable, __file__, *sys.argv[1:], "--journal", str(journal), "--started", str(args.started)]
    # Tiny models are faster in one thread: a hundred times, where others compute too.
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} if args.tiny else {})}
    num_done = -1
    while num_done < len(read(journal, "done")):
        num_done = len(read(journal, "done"))
        with args.out.with_suffix(".log").open("a") as log:
            # In a group of its own, so that what it started ends with it.
            worker = subprocess.Popen(command, stdout=log, stderr=log, env=environment, process_group=0)
        try:
            reason = wait(worker, journal, args)
        finally:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
        if worker.returncode == 0:
            return
        if running := in_flight(journal):
            write(journal, "row", *running, "", "", f"FAILED: {reason}")
            write(journal, "done", *running)
    write(journal, "row", "all", "the rest", "", "", f"FAILED: {reason}; see {log.name}")


def describe(args: argparse.Namespace) -> dict[str, str]:
    """What it all ran on."""

    def output(command: str) -> str:
        return subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True).stdout.strip()

    # The first of a name counts, as in an import.
    found = {str(package.name).replace("_", "-"): package.version for package in reversed([*distributions()])}
    gpu = output("nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader") or "unknown"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "revision": output("git rev-parse --short HEAD") or "unknown",
        "GPU, driver, memory": "none" if args.tiny else gpu,
        "Python": sys.version.split()[0],
        **{package: found.get(package, "not installed") for package in PACKAGES},
        "seconds": f"{time.time() - args.started:.0f}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="every line of it on the CPU")
    parser.add_argument("--minutes", type=float, default=9, help="of it all (default: %(default)s)")
    out = Path(os.environ.get("OUT", "."), "gpu.json")
    parser.add_argument("--out", type=Path, default=out, help="gets a log beside it (default: %(default)s)")
    parser.add_argument("--journal", type=Path, help=argparse.SUPPRESS)  # of the worker
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rounds = 1 if args.tiny else 5
    if args.journal is not None:
        work(args.journal, args)
        return 0
    if not args.tiny and not torch.cuda.is_available():
        print("There is no CUDA device: run it on a GPU, or with --tiny on the CPU.", file=sys.stderr)
        return 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    journal = args.out.with_suffix(".jsonl")  # stays if this process is killed
    for left in (journal, args.out.with_suffix(".log")):
        left.unlink(missing_ok=True)
    watch(journal, args)
    header = describe(args)
    rows = [dict(zip(("part", "what", "value", "limit", "status"), row, strict=True)) for row in read(journal, "row")]
    print("\n".join(f"{name}: {value}" for name, value in header.items()) + "\n")
    for cells in [list(rows[0]), ["---"] * 5, *(row.values() for row in rows)]:
        print(f"| {' | '.join(cells)} |")
    failed = [row for row in rows if row["status"].startswith("FAILED")]
    print(f"\n{len(rows)} rows, {len(failed)} FAILED: {args.out}")
    args.out.write_text(json.dumps({"header": header, "rows": rows}, indent=2) + "\n")
    journal.unlink()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
