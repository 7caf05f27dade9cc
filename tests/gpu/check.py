"""
What a GPU has to show, in one command: checks and measurements, one table, and the same as JSON.

    bash tests/gpu/run.sh              # on one GPU, in less than nine minutes; exits with 1 if a check failed
    bash tests/gpu/run.sh --tiny       # every line of it on the CPU

Each part is a function of `kernels.py` or `measurements.py`, which gives its items by name; an item is a generator of
rows. A process of its own works through them. It is started again for what is left if it dies, or if an item outlasts
its part, so that no failure stops the rest; and each part has its share of the time, however long others take.
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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "flash-attn", "triton")
# The module and the share of the time of each part. Later ones get what earlier ones leave.
PARTS = {
    "kernels": ("kernels", 0.26),
    "policies": ("kernels", 0.11),
    "tests": ("kernels", 0.10),
    "training": ("measurements", 0.15),
    "updates": ("measurements", 0.10),
    "ranking": ("measurements", 0.04),
    "runs": ("measurements", 0.15),
    "memory": ("measurements", 0.04),
}
GRACE = 0.04  # of the time: an item may outlast the end of its part by so much
START = "start"  # item of each part: importing its module, listing its items


def end_of(part: str, args: argparse.Namespace) -> float:
    """When a part must be over, in seconds since the epoch."""
    names = list(PARTS)
    share = sum(PARTS[name][1] for name in names[: names.index(part) + 1])
    return args.started + 60 * args.minutes * share


def read(journal: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    return [line for line in lines if line.pop("event") == event]


def write(journal: Path, event: str, part: str, what: str, **fields: Any) -> None:
    with journal.open("a") as file:
        file.write(json.dumps({"event": event, "part": part, "what": what, **fields}) + "\n")


# --- The worker ------------------------------------------------------------------------------------------------------


def work(journal: Path, args: argparse.Namespace) -> None:
    """Run all items that are not done yet."""
    sys.path[1:1] = [str(ROOT / "tests"), str(ROOT / "tests" / "benchmarks")]
    done = {(line["part"], line["what"]) for line in read(journal, "done")}
    plans = {line["part"]: line["items"] for line in read(journal, "plan")}  # of a worker before
    for part, (module, _) in PARTS.items():
        items: dict[str, Callable] = dict.fromkeys(plans.get(part, ["all"]), lambda: ())
        if time.time() < end_of(part, args) and (part, START) not in done:

            def start(part: str = part, module: str = module, items: dict = items) -> tuple:
                made = getattr(importlib.import_module(module), part)(args)
                items.clear()
                items.update(made)
                write(journal, "plan", part, START, items=list(made))
                return ()

            items.clear()
            attempt(journal, part, START, start, args)
        for what, item in items.items():
            if not {(part, what), (part, START)} & done:
                attempt(journal, part, what, item, args)


def attempt(journal: Path, part: str, what: str, item: Callable, args: argparse.Namespace) -> None:
    """Run one item, unless it is too late, and write what comes of it."""

    def row(name: str, value: str, limit: str, status: str | bool | None) -> None:
        """`status`: of a check, whether it passed; None for a measurement; or why it was not run."""
        status = {True: "ok", False: "FAILED", None: "measured"}.get(status, status)
        what_of = f"{what}: {name}" if name else what
        write(journal, "row", part, what_of, value=value, limit=limit, status=status)

    write(journal, "begun", part, what)
    try:
        if time.time() > end_of(part, args):
            row("", "", "", "not run: time")
        else:
            for fields in item():
                row(*fields)
    except Exception as error:
        traceback.print_exc()
        row("", "", "", f"FAILED: {type(error).__name__}: {str(error).strip()[:120]}".splitlines()[0])
        write(journal, "done", part, what)
        if "CUDA error" in str(error):  # nothing more can be computed in this process
            sys.exit(3)
    else:
        if what != START:
            write(journal, "done", part, what)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- Who watches it --------------------------------------------------------------------------------------------------


def watch(journal: Path, args: argparse.Namespace) -> None:
    """Start workers until all is done, or one does not get any further."""
    command = [sys.executable, __file__, *sys.argv[1:], "--journal", str(journal), "--started", str(args.started)]
    # Tiny models are faster in one thread, by far where others compute, too.
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if args.tiny else {})}
    num_done = -1
    while num_done < len(read(journal, "done")):
        num_done = len(read(journal, "done"))
        with args.out.with_suffix(".log").open("a") as log:
            # In a group of its own, so that what it started ends with it.
            worker = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, process_group=0)
        try:
            reason = wait(worker, journal, args)
        finally:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
        if worker.returncode == 0:
            return
        if running := in_flight(journal):
            write(journal, "row", *running, value="", limit="", status=f"FAILED: {reason}")
            write(journal, "done", *running)
    write(journal, "row", "all", "the worker", value="", limit="", status=f"FAILED: {reason}, see {log.name}")


def wait(worker: subprocess.Popen, journal: Path, args: argparse.Namespace) -> str:
    """Until the worker ends, or an item is too late: why it did not finish."""
    while worker.poll() is None:
        time.sleep(0.2)
        running = in_flight(journal)
        if running and time.time() > end_of(running[0], args) + 60 * args.minutes * GRACE:
            return "it outlasted its part"
    return f"the process ended with {worker.returncode}"


def in_flight(journal: Path) -> tuple[str, str] | None:
    """The item that was begun and neither finished nor followed by another."""
    begun = [(line["part"], line["what"]) for line in read(journal, "begun")]
    done = [(line["part"], line["what"]) for line in read(journal, "done")]
    return begun[-1] if begun and begun[-1] not in done else None


def describe() -> dict[str, str]:
    """What it all ran on."""

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    gpu = output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "revision": output("git", "rev-parse", "--short", "HEAD"),
        "GPU, driver, memory": gpu if torch.cuda.is_available() else "none: the CPU",
        "Python": sys.version.split()[0],
        **{package: installed(package) for package in PACKAGES},
    }


def show(header: dict[str, str], rows: list[dict[str, Any]]) -> None:
    print("\n" + "\n".join(f"{name}: {value}" for name, value in header.items()) + "\n")
    columns = ("part", "what", "value", "limit", "status")
    cells = [columns, *(tuple(str(row[name]) for name in columns) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for cell in [cells[0], tuple("-" * width for width in widths), *cells[1:]]:
        print(f"| {' | '.join(text.ljust(width) for text, width in zip(cell, widths, strict=True))} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="every line on the CPU, with tiny sizes")
    parser.add_argument("--minutes", type=float, default=9, help="of it all (default: %(default)s)")
    default = Path(os.environ.get("OUT", "."), "gpu.json")
    parser.add_argument(
        "--out", type=Path, default=default, help="the JSON; its log is beside it (default: %(default)s)"
    )
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
    journal = args.out.with_suffix(".jsonl")  # stays only if this process is killed
    for left in (journal, args.out.with_suffix(".log")):
        left.unlink(missing_ok=True)
    watch(journal, args)
    rows = read(journal, "row")
    header = {**describe(), "seconds": f"{time.time() - args.started:.0f}"}
    show(header, rows)
    args.out.write_text(json.dumps({"header": header, "rows": rows}, indent=2) + "\n")
    journal.unlink(missing_ok=True)
    failed = [row for row in rows if row["status"].startswith("FAILED")]
    print(f"\n{len(rows)} rows, {len(failed)} FAILED; {args.out}")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
