"""Scores, and trains under ZeRO-3, on several processes, and writes what came out: see `test_rewards.py`."""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from conftest import TRAINING, tiny_model
from datasets import Dataset
from torch.distributed.fsdp import fully_shard
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import prepare_deepspeed

from gpm_trl import GPMForPreference, PreferenceScorer
from gpm_trl.cli.quickstart import byte_tokenizer
from gpm_trl.gpo.reward import PreferenceReward

NAN_BYTE = "~"
QUICK = {**TRAINING, "max_steps": 2, "max_completion_length": 8, "learning_rate": 1e-2}


def poisoned() -> PreferenceScorer:
    """Of a model whose embeddings of rows with a certain byte are not finite."""
    model, tokenizer = tiny_model(), byte_tokenizer()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer(NAN_BYTE, add_special_tokens=False).input_ids] = torch.nan
    return PreferenceScorer(model, tokenizer)


def message_of(function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return ""


def of_sharded(reward: PreferenceReward, prompts: list[str], completions: list[str]) -> dict:
    """Rewards with many batches on the last rank and none on the others; and the number of calls of the model."""
    state = PartialState()
    passes = []
    reward.scorer.model.register_forward_hook(lambda *_: passes.append(1))
    mine = slice(None) if state.process_index == state.num_processes - 1 else slice(0)
    rewards = reward(prompts[mine], completions[mine])
    return {"rewards": rewards, "passes": len(passes)}


def score(directory: Path) -> dict:
    """Rewards and log-odds of each case, of which every rank has a share; errors on one rank; FSDP."""
    state = PartialState(cpu=True)
    rank = state.process_index
    report = {"rewards": {}, "log_odds": {}}
    for name, case in json.loads((directory / "cases.json").read_text()).items():
        bounds = case["bounds"] if state.num_processes > 1 else [0, len(case["prompts"])]
        share = slice(bounds[rank], bounds[rank + 1])
        reward = PreferenceReward(directory / "gpm", **case.get("options", {}))
        prompts, completions = case["prompts"][share], case["completions"][share]
        report["rewards"][name] = reward(prompts, completions)
        if "num_generations" in case:
            report["log_odds"][name] = reward.log_odds(prompts, completions, case["num_generations"]).tolist()
    report["nan"] = message_of(PreferenceReward(poisoned()), ["Q", "R"], ["a", NAN_BYTE if rank else "b"])
    strict = PreferenceReward(directory / "gpm", max_length=20, long_rows="error")
    report["long"] = message_of(strict, ["Q"], ["a" * (3 if rank else 30)])
    report["uneven"] = message_of(strict, ["Q"], ["a"] * (1 + rank))
    report["mixed"] = message_of(strict.log_odds, ["Q" if rank else "R"], ["a"], num_generations=2)
    report["not whole"] = message_of(strict.log_odds, ["Q"], ["a"], num_generations=3)
    if state.num_processes > 1:
        model = tiny_model()
        fully_shard(model, reshard_after_forward=True)
        reward = PreferenceReward(model, byte_tokenizer(), batch_tokens=8)
        report["fsdp"] = of_sharded(reward, ["Q"] * 5, ["a" * (i + 1) for i in range(5)])
    return report


def train_under_zero3(directory: Path) -> dict:
    args = GRPOConfig(str(directory / "trainer"), per_device_train_batch_size=3, num_generations=6, **QUICK)
    reward = PreferenceReward(directory / "gpm")
    rows = Dataset.from_list([{"prompt": f"Question {index}"} for index in range(8)])
    trainer = GRPOTrainer(str(directory / "policy"), args=args, reward_funcs=reward, train_dataset=rows)
    trainer.train()
    partitioned = GPMForPreference.from_pretrained(directory / "gpm")
    models = (reward.scorer.model, partitioned)
    report = {
        "world_size": trainer.accelerator.num_processes,
        "log_history": trainer.state.log_history,
        "sizes": [sum(weight.numel() for weight in model.parameters()) for model in models],
        "refused": message_of(PreferenceReward, partitioned, byte_tokenizer()),
    }
    engine = prepare_deepspeed(partitioned, trainer.accelerator)
    sharded = PreferenceReward(engine, byte_tokenizer(), batch_tokens=8)
    report["zero3"] = of_sharded(sharded, ["Q"] * 5, ["a" * (i + 1) for i in range(5)])
    return report


if __name__ == "__main__":
    directory, mode = Path(sys.argv[1]), sys.argv[2]
    report = score(directory) if mode == "score" else train_under_zero3(directory)
    state = PartialState()
    report["world_size"] = state.num_processes
    (directory / f"{mode}_{state.process_index}_of_{state.num_processes}.json").write_text(json.dumps(report))
    state.wait_for_everyone()
    state.destroy_process_group()
