"""
The report of the study: the only step that reads the test rows, and it reads them once.

    python recipes/smollm2-135m/report.py models --output_dir outputs/smollm2-135m
    python recipes/smollm2-135m/report.py policies --output_dir outputs/smollm2-135m

`models` evaluates each preference model on the test rows. `policies` lets each policy answer test prompts, and
preference models compare the answers with some of the initial policy: the judge that trained it, and a panel of
others, of another seed, which trained none. `report/opened-models.json` says for which models the rows were read: for
others they are not read again; so for policies. What is there is not made again.
"""

import argparse
import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from hashlib import file_digest, sha256
from itertools import pairwise, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from study import POLICIES, add_arguments, model_directory, policy_directory, threads
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import cached_file

from gpm_trl import PreferenceScorer
from gpm_trl.cli.arguments import run_command
from gpm_trl.evaluation import accuracy_difference, describe_run, evaluate_pairs
from gpm_trl.evaluation.metrics import bootstrap_interval, rate_interval
from gpm_trl.preference import preference_probability
from gpm_trl.saving import write_whole

BASELINE = "bt_gated"
PANEL = ("bt_gated", "gpm", "hrc")
TEST_SETS = ("alpaca", "hh", "llmbar")
NEW_TOKENS = 96
INITIAL_DRAWS = 4  # answers of the initial policy to a prompt, with seeds of their own


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("report.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("step", choices=("models", "policies"))
    add_arguments(parser)
    return parser


def make_report(args: argparse.Namespace) -> None:
    plan, path = args.plan, args.output_dir / "chosen.json"
    if not path.exists():
        raise ValueError(f"The report comes last, but there is no {path}: run `study.py` first.")
    chosen = json.loads(path.read_text())
    models = {
        f"{kind}-{seed}": model_directory(args, kind, chosen["best"][kind], seed)
        for kind in plan.kinds
        for seed in plan.seeds
    }
    report = {**describe_run(), "bf16": args.bf16, "base": describe_base(args), "chosen": chosen}
    report["counts"] = json.loads((args.output_dir / "data" / "counts.json").read_text())
    if args.step == "models":
        report["runs"] = describe_runs(models)
        report["opened"] = open_test_rows(args, models)
        report["models"] = report_models(args, models)
    else:
        policies = {
            f"{name}-{step}": policy_directory(args, name) / f"checkpoint-{step}"
            for name in plan.policies
            for step in plan.steps_shown
        }
        wanted = {judge for name in policies for judges in judges_of(args, name) for judge in judges}
        judges = {name: path for name, path in models.items() if name in wanted}
        report["runs"] = describe_runs({name: policy_directory(args, name) for name in plan.policies})
        report["policies_chosen"] = json.loads((args.output_dir / "policies" / "chosen.json").read_text())
        report["opened"] = open_test_rows(args, {**judges, **policies})
        report["policies"], report["samples"] = report_policies(args, judges, policies)
    write_whole(args.output_dir / "report" / f"{args.step}.json", json.dumps(report, indent=1) + "\n")
    shutil.rmtree(args.output_dir / "report" / "layers", ignore_errors=True)


def describe_base(args: argparse.Namespace) -> dict[str, str]:
    with open(cached_file(args.model, "model.safetensors"), "rb") as weights:
        return {"name": Path(args.model).name, "sha256": file_digest(weights, "sha256").hexdigest()}


def describe_runs(paths: dict[str, Path]) -> dict[str, Any]:
    """What each training was told, when, and how long it took."""
    runs = {name: json.loads((path / "done.json").read_text()) for name, path in paths.items()}
    for run in runs.values():
        del run["log"], run["settings"]["model"]
    return runs


def at_once(function: Callable, args: argparse.Namespace, calls: Sequence[tuple]) -> list[Any]:
    """What a function returns for each of its arguments, computed by as many processes as there are jobs."""
    os.environ["OMP_NUM_THREADS"] = threads(args)  # which new processes read
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        return list(pool.map(function, repeat(args), *zip(*calls, strict=True)))


def open_test_rows(args: argparse.Namespace, paths: dict[str, Path]) -> str:
    """Write down what the test rows are read for; raises `ValueError` if that was something else. Returns the date."""
    missing = [str(path) for path in paths.values() if not (path / "adapter_config.json").exists()]
    if missing:
        raise ValueError(f"The report comes last, but {', '.join(missing)} are not trained: run `study.py` first.")
    digests = {
        name: sha256((path / "adapter_model.safetensors").read_bytes()).hexdigest()[:16]
        for name, path in paths.items()
    }
    opened = args.output_dir / "report" / f"opened-{args.step}.json"
    look = {"bf16": args.bf16, "models": digests}
    if opened.exists():
        before = json.loads(opened.read_text())
        if {name: before[name] for name in look} != look:
            raise ValueError(
                f"The test rows were read on {before['date']} for other {args.step}, or with another `--bf16`: a "
                "second look is no test."
            )
    else:
        write_whole(opened, json.dumps({"date": time.strftime("%Y-%m-%d %H:%M"), **look}, indent=1) + "\n")
    return json.loads(opened.read_text())["date"]


class SharedLayers(nn.Module):
    """The layers that the adapters leave as they are: what they make of a batch is kept in files, for all models."""

    def __init__(self, layers: list[nn.Module], directory: Path):
        super().__init__()
        self.layers, self.directory = nn.ModuleList(layers), directory

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor, **kwargs) -> torch.Tensor:
        key = sha256(hidden.numpy().tobytes() + position_ids.numpy().tobytes()).hexdigest()
        path = self.directory / f"{key}.safetensors"
        if not path.exists():
            for layer in self.layers:
                hidden = layer(hidden, position_ids=position_ids, **kwargs)
            own = path.with_suffix(f".{os.getpid()}")  # whole, if two processes write it
            save_file({"hidden": hidden}, own)
            own.rename(path)
        return load_file(path)["hidden"]


def load_scorer(args: argparse.Namespace, path: Path) -> PreferenceScorer:
    """A preference model, whose lower layers are computed once for all."""
    scorer = PreferenceScorer.from_pretrained(str(path), "cpu", long_rows="truncate_prompt")
    backbone, directory = scorer.model.get_base_model().model, args.output_dir / "report" / "layers"
    directory.mkdir(parents=True, exist_ok=True)
    is_adapted = [any("lora_" in name for name, _ in layer.named_parameters()) for layer in backbone.layers]
    shared = is_adapted.index(True)
    backbone.layers = nn.ModuleList([SharedLayers(backbone.layers[:shared], directory), *backbone.layers[shared:]])
    return scorer


def mixed_precision(args: argparse.Namespace) -> torch.autocast:
    """That of the models' training, if that had one."""
    return torch.autocast("cpu", torch.bfloat16, enabled=args.bf16)


# --- Preference models -----------------------------------------------------------------------------------------------


def report_models(args: argparse.Namespace, models: dict[str, Path]) -> dict[str, Any]:
    """Of each kind and test set: the seeds' reports, what they say together, and the differences from the baseline."""
    wanted = [(name, path, rows) for name, path in models.items() for rows in TEST_SETS]
    found = at_once(evaluate, args, wanted)
    evaluated = {(name, rows): own for (name, _, rows), own in zip(wanted, found, strict=True)}
    report: dict[str, Any] = {}
    for rows in TEST_SETS:
        subsets = [row.get("subset") for row in read_test_rows(args, rows)]
        outcomes = {kind: merged_outcomes(evaluated, kind, rows) for kind in args.plan.kinds}
        for kind, own in outcomes.items():
            seeds = [
                found for (name, where), found in evaluated.items() if where == rows and name.startswith(f"{kind}-")
            ]
            parts: dict[str, dict] = {subset: {} for subset in subsets if subset is not None}
            for comparison, outcome in own.items():
                if (subset := subsets[int(comparison.split(":")[1])]) is not None:
                    parts[subset][comparison] = outcome
            by_seed = [
                accuracy_difference(*(evaluated[f"{one}-{seed}", rows]["outcomes"] for one in (BASELINE, kind)))
                for seed in args.plan.seeds
            ]
            report.setdefault(kind, {})[rows] = {
                "seeds": [{key: value for key, value in found.items() if key != "outcomes"} for found in seeds],
                **pooled(own),
                "difference": accuracy_difference(outcomes[BASELINE], own),
                "differences": [difference["accuracy"] for difference in by_seed],
                "subsets": {subset: pooled(part) for subset, part in parts.items()},
            }
    return report


def evaluate(args: argparse.Namespace, name: str, path: Path, rows: str) -> dict[str, Any]:
    """The report of a model on test rows, with outcomes."""
    output = args.output_dir / "report" / "models" / f"{name}-{rows}.json"
    if not output.exists():
        with mixed_precision(args):
            found = evaluate_pairs(load_scorer(args, path), read_test_rows(args, rows))
        for part in found["subsets"].values():
            del part["calibration"]
        write_whole(output, json.dumps(found) + "\n")
        print(f"{name}, {rows}: accuracy {found['overall']['accuracy']:.1%}", flush=True)
    return json.loads(output.read_text())


def read_test_rows(args: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    lines = (args.output_dir / "data" / "test" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def merged_outcomes(evaluated: dict, kind: str, rows: str) -> dict[str, tuple[str, float]]:
    """Hits of all seeds of a kind. A prompt is one cluster, whatever the seed: seeds must add no false certainty."""
    return {
        f"{name.split('-')[-1]}:{comparison}": tuple(outcome)
        for (name, where), found in evaluated.items()
        if where == rows and name.rsplit("-", 1)[0] == kind
        for comparison, outcome in found["outcomes"].items()
    }


def pooled(outcomes: dict[str, tuple[str, float]]) -> dict[str, Any]:
    """Accuracy of the outcomes, with an interval over prompts."""
    hits: dict[str, list[float]] = {}
    for cluster, hit in outcomes.values():
        hits.setdefault(cluster, []).append(hit)
    sums, counts = np.array([sum(own) for own in hits.values()]), np.array([len(own) for own in hits.values()])
    return {"accuracy": float(sums.sum() / counts.sum()), "accuracy_ci": rate_interval(sums, counts)}


# --- Policies --------------------------------------------------------------------------------------------------------


def report_policies(
    args: argparse.Namespace, judges: dict[str, Path], policies: dict[str, Path]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """
    Of each policy and step: how its answers fare against the initial policy's, by the judge that trained it and by the
    panel, and their form. And the last answers of all to the first 20 prompts, of which the beginning is told.
    """
    asked = [(f"initial-{draw}", None, draw + 1) for draw in range(INITIAL_DRAWS)]
    asked += [(name, path, 0) for name, path in policies.items()]
    samples = dict(zip((name for name, *_ in asked), at_once(sample, args, asked), strict=True))
    compared = at_once(compare, args, [(name, path, samples) for name, path in judges.items()])
    wins = dict(zip(judges, compared, strict=True))
    report: dict[str, Any] = {}
    for policy in ("initial-0", *policies):
        answers, (name, step) = samples[policy], policy.rsplit("-", 1)
        own, panel = (np.array([wins[judge][policy] for judge in some]) for some in judges_of(args, policy))
        report.setdefault(name, {})[step] = {
            "tokens": interval([answer["tokens"] for answer in answers]),
            "cut": float(np.mean([not answer["ended"] for answer in answers])),
            "kl": interval([answer["log_ratio"] for answer in answers]),
            "distinct_2": distinct([answer["completion"] for answer in answers]),
            "own": interval(own.mean(0).tolist()) if len(own) else None,
            "panel": interval(panel.mean(0).tolist()),
            "panel_prefers": float(np.sign(panel.mean(0) - 0.5).mean() / 2 + 0.5),  # the share of prompts
            "judges": {judge: interval(by_policy[policy]) for judge, by_policy in wins.items()},
        }
    last = {name: samples[f"{name}-{max(steps, key=int)}"] for name, steps in report.items()}
    shown = [
        {
            "prompt": textwrap.shorten(one["prompt"][-1]["content"], 60, placeholder=" ..."),
            "answers": {name: answers[index]["completion"] for name, answers in last.items()},
        }
        for index, one in enumerate(samples["initial-0"][:20])
    ]
    return report, shown


def judges_of(args: argparse.Namespace, policy: str) -> tuple[list[str], list[str]]:
    """The judge that trained a policy, and the panel: of the last seed, so of no policy. With one seed, the others."""
    first, last = args.plan.seeds[0], args.plan.seeds[-1]
    name = policy.rsplit("-", 1)[0]
    own = [f"{POLICIES[name][1]}-{first}"] if name in POLICIES else []
    panel = [f"{kind}-{last}" for kind in PANEL if kind in args.plan.kinds]
    return own, [judge for judge in panel if judge not in own]


def interval(values: Sequence[float]) -> list[float]:
    """The mean over prompts, and its 95 % bootstrap interval."""
    sums = np.column_stack([values, np.ones(len(values))])
    (limits,) = bootstrap_interval(sums, lambda totals: totals[:, :1] / totals[:, 1:])
    return [float(np.mean(values)), *limits]


def distinct(texts: Sequence[str]) -> float:
    """Share of different word pairs among all, of answers cut to 50 words so that lengths do not decide."""
    words = [text.split()[:50] for text in texts]
    pairs = [pair for text in words for pair in pairwise(text)]
    return len(set(pairs)) / max(len(pairs), 1)


def sample(args: argparse.Namespace, name: str, path: Path | None, seed: int) -> list[dict[str, Any]]:
    """
    A policy's answers to the test prompts, one each: their tokens, and the log-ratio of the policy to the initial one,
    whose mean is the KL divergence. All trained ones have one seed, and the initial policy has others: with the same
    random numbers, its answers would begin as theirs.
    """
    output = args.output_dir / "report" / "samples" / f"{name}.jsonl"
    if not output.exists():
        prompts = [row["prompt"] for row in read_test_rows(args, "prompts")[: args.plan.policy_prompts]]
        tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
        base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        policy = base if path is None else PeftModel.from_pretrained(base, str(path)).eval()
        set_seed(seed)
        answers = []
        for start in range(0, len(prompts), 48):
            batch = prompts[start : start + 48]
            inputs = tokenizer.apply_chat_template(
                batch, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
            )
            with torch.inference_mode():
                sampled = policy.generate(
                    **inputs,
                    max_new_tokens=NEW_TOKENS,
                    do_sample=True,
                    temperature=1.0,
                    top_p=1.0,
                    top_k=0,
                    pad_token_id=tokenizer.pad_token_id,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
                ids = sampled.sequences[:, inputs["input_ids"].shape[1] :]
                ratios, lengths = log_ratios(policy, inputs["attention_mask"], sampled, tokenizer.eos_token_id)
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            for prompt, own, text, ratio, length in zip(batch, ids, texts, ratios, lengths, strict=True):
                ended = own[length - 1].item() == tokenizer.eos_token_id
                answers.append(
                    {"prompt": prompt, "completion": text, "tokens": length, "ended": ended, "log_ratio": ratio}
                )
        write_whole(output, "".join(json.dumps(answer) + "\n" for answer in answers))
        print(f"{name}: {np.mean([answer['tokens'] for answer in answers]):.0f} tokens an answer", flush=True)
    return [json.loads(line) for line in output.read_text().splitlines()]


def log_ratios(policy, mask: torch.Tensor, sampled, eos: int) -> tuple[list[float], list[int]]:
    """log pi(y | x) - log pi_0(y | x) of sampled answers up to their EOS, and their lengths."""
    answers = sampled.sequences[:, mask.shape[1] :]
    kept = ((answers == eos).cumsum(1) - (answers == eos).long()) == 0  # up to and with the first EOS
    ratios = torch.zeros(len(answers))
    if isinstance(policy, PeftModel):
        mask = torch.cat([mask, kept.long()], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        width = answers.shape[1]
        with policy.disable_adapter():
            inputs = {"input_ids": sampled.sequences, "attention_mask": mask, "position_ids": positions}
            initial = policy(**inputs, logits_to_keep=width + 1).logits[:, :-1]
        own, initial = (
            logits.log_softmax(-1).gather(2, answers[..., None])[..., 0]
            for logits in (torch.stack(sampled.logits, dim=1), initial)
        )
        ratios = ((own - initial) * kept).sum(1)
    return ratios.tolist(), kept.sum(1).tolist()


def compare(
    args: argparse.Namespace, judge: str, path: Path, samples: dict[str, list[dict]]
) -> dict[str, list[float]]:
    """
    Of each policy, prompt by prompt, the probability that a judge prefers its answer to one of the initial policy's,
    the mean over these.
    """
    output = args.output_dir / "report" / "judged" / f"{judge}.json"
    if not output.exists():
        scorer = load_scorer(args, path)
        prompts = [answer["prompt"] for answer in samples["initial-0"]]
        answers = [[answer["completion"] for answer in own] for own in zip(*samples.values(), strict=True)]
        answers = [[{"role": "assistant", "content": text}] for own in answers for text in own]
        size = len(samples)
        groups = [answers[start : start + size] for start in range(0, len(answers), size)]
        with mixed_precision(args):
            scores = torch.stack(scorer.matrix(prompts, groups))
        scores = scores[:, :, :INITIAL_DRAWS]  # the first are the initial policy's
        probabilities = preference_probability(scores, scorer.temperature).mean(-1)
        wins = dict(zip(samples, probabilities.T.tolist(), strict=True))
        write_whole(output, json.dumps(wins) + "\n")
        print(f"{judge} has compared {size} policies on {len(prompts)} prompts", flush=True)
    return json.loads(output.read_text())


if __name__ == "__main__":
    sys.exit(run_command(make_parser(), make_report, None))
