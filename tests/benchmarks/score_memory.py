"""
Memory of `gpm-trl score`: the peak of its process on files of 10,000 and of 100,000 rows.

    python tests/benchmarks/score_memory.py
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import print_header, print_row

from gpm_trl import GPMForPreference
from gpm_trl.cli.quickstart import byte_tokenizer, save_tiny_decoder


def measure(model: Path, rows: int, directory: Path) -> tuple[float, float]:
    """Peak memory in MiB and seconds of a process that scores `rows` rows; the process is this script's child."""
    source, target = directory / f"{rows}.jsonl", directory / f"{rows}-scored.jsonl"
    with source.open("w") as file:
        for number in range(rows):
            row = {"prompt": f"Question {number}?", "responses": [f"answer {number + k}" for k in range(4)]}
            file.write(json.dumps(row) + "\n")
    command = ["score", f"--model={model}", f"--input={source}", f"--output={target}", "--device=cpu"]
    code = (
        # By Linux's own count: `getrusage` of a child starts at its parent's peak.
        "from gpm_trl.cli.main import main; from pathlib import Path; "
        f"assert main({command!r}) == 0; print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    with target.open() as file:
        assert sum(1 for _ in file) == rows
    return int(result.stdout.split()[-1]) / 1024, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        save_tiny_decoder(directory / "decoder", seed=0)
        GPMForPreference.from_pretrained(directory / "decoder").save_pretrained(directory / "gpm")
        byte_tokenizer().save_pretrained(directory / "gpm")
        print_header("rows", "peak memory, MiB", "seconds")
        for rows in args.rows:
            memory, seconds = measure(directory / "gpm", rows, directory)
            print_row(f"{rows:,}", f"{memory:.0f}", f"{seconds:.0f}")


if __name__ == "__main__":
    main()
