"""
Memory of `gpm-trl score`: the peak of its process on files of 10,000 and of 100,000 rows.

    python tests/benchmarks/score_memory.py
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import parser, row

from gpm_trl import GPMForPreference
from gpm_trl.cli.quickstart import byte_tokenizer, save_tiny_decoder

# By Linux's own count: `getrusage` of a child starts at its parent's peak.
SCORE = """import sys; from pathlib import Path; from gpm_trl_cli import main
assert main(sys.argv[1:]) == 0; print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    row("rows", "peak memory, MiB", "seconds")
    row("---:", "---:", "---:")
    with tempfile.TemporaryDirectory() as directory:
        model, source, target = (Path(directory, name) for name in ("gpm", "rows.jsonl", "scored.jsonl"))
        save_tiny_decoder(model, seed=0)
        GPMForPreference.from_pretrained(model).save_pretrained(model)
        byte_tokenizer().save_pretrained(model)
        for count in options.parse_args().rows:
            rows = [
                {"prompt": f"Question {n}?", "responses": [f"answer {n + k}" for k in range(4)]} for n in range(count)
            ]
            source.write_text("".join(json.dumps(row) + "\n" for row in rows))
            command = ["score", f"--model={model}", f"--input={source}", f"--output={target}", "--device=cpu"]
            start = time.perf_counter()
            result = subprocess.run(
                [sys.executable, "-c", SCORE, *command], capture_output=True, text=True, check=True
            )
            assert len(target.read_text().splitlines()) == count
            row(f"{count:,}", f"{int(result.stdout.split()[-1]) / 1024:.0f}", f"{time.perf_counter() - start:.0f}")
            target.unlink()


if __name__ == "__main__":
    main()
