"""Evaluates in every way under any launcher, and writes what came out: see `test_evaluate_cli.py`."""

import json
import os
import sys
from pathlib import Path

from accelerate import PartialState
from conftest import tiny_model
from datasets import Dataset

from gpm_trl import GPMConfig, GPMTrainer, PreferenceScorer
from gpm_trl.cli import evaluate
from gpm_trl.cli.quickstart import byte_tokenizer
from gpm_trl.evaluation import EvaluationCallback, benchmarks, evaluate_pairs


class Counting(PreferenceScorer):
    """Remembers the prompts that this process encoded."""

    prompts = ()

    def encode(self, prompt, responses, template_kwargs=None):
        self.prompts = (*self.prompts, prompt)
        return super().encode(prompt, responses, template_kwargs)


def of_trainer(rows: list[dict], output_dir: Path) -> dict[str, float]:
    """The callback's metrics of an untrained model."""
    args = GPMConfig(str(output_dir / "trainer"), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)
    data = Dataset.from_list(rows)
    trainer = GPMTrainer(tiny_model(), args, data, eval_dataset=data, processing_class=byte_tokenizer())
    trainer.add_callback(EvaluationCallback(trainer, rows))
    return {name: value for name, value in trainer.evaluate().items() if name.startswith("eval_pairs_")}


def main(directory: Path, models: list[str]) -> None:
    state = PartialState(cpu=True)
    output_dir = directory / f"of_{state.num_processes}"
    benchmarks.CHUNK_ROWS = 2
    codes = []
    for name in ("pairs", "reward_bench", "reward_bench_2"):
        files = [f"--dataset={directory / name}.jsonl", f"--output={output_dir / name}.json"]
        codes.append(evaluate.main([f"--benchmark={name}", *files, "--device=cpu", "--model", *models]))
    rows = [json.loads(line) for line in (directory / "pairs.jsonl").read_text().splitlines()]
    report = {"codes": codes, "world_size": int(os.environ.get("WORLD_SIZE", "1")), "scored": {}}
    for name, kwargs in (("shared", {}), ("in step", {"shard": False})):
        scorer = Counting.from_pretrained(models[0], device="cpu", long_rows="truncate_prompt")
        report[name] = evaluate_pairs(scorer, rows, **kwargs)
        report["scored"][name] = scorer.prompts
    report["one row"] = evaluate_pairs(scorer, rows[:1])
    report["trainer"] = of_trainer(rows, output_dir)
    (output_dir / f"{state.process_index}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
