"""
GPO in iterations, as the paper's authors ran it: sample with the policy of the last iteration, score, train.

    accelerate launch --config_file recipes/accelerate_configs/zero3.yaml recipes/iterations/run.py \
        --config recipes/llama-3-8b-instruct/gpo.yaml

Takes the arguments of `gpm-trl gpo`, and `iterations`, among which the prompts are divided. Every stage is a file or a
directory under `output_dir`:

    iterations.json                         the settings of sampling
    iteration-1/samples/batch-00000.jsonl   a line for each prompt: completions, their token ids, K x K scores
    iteration-1/policy                      what was trained on them, with checkpoints
    iteration-1/done                        says that the iteration is complete

A run that was stopped goes on where it was, if the same command is given: what is there is not made again. Each batch
of prompts has a random seed of its own, so the samples are those of a run that was not stopped, on any number of
processes.
"""

import copy
import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import ScriptArguments

from gpm_trl import GPOConfig, GPOTrainer, PreferenceReward
from gpm_trl.cli.training import TrainingParser, run_training, save_and_push
from gpm_trl.data.renderer import cut_left, within_context
from gpm_trl.models.loading import load_adapted, whole_models
from gpm_trl.saving import write_whole

GENERATION = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
SAMPLING = (*GENERATION, "reward_model_path", "num_generations", "max_completion_length", "max_length", "seed")
SAMPLING += ("generation_kwargs", "chat_template_kwargs")
READ = ("prompt", "tools", "chat_template_kwargs")  # the columns


@dataclass
class IterationArguments(ScriptArguments):
    """What the recipe takes beside the arguments of training."""

    iterations: int = field(default=3, metadata={"help": "Parts of the prompts, one for each iteration (paper: 3)."})


def make_parser(prog: str = "iterations/run.py") -> TrainingParser:
    return TrainingParser(GPOConfig, prog, IterationArguments)


def check(arguments: dict[str, Any], script_args: IterationArguments) -> dict[str, Any]:
    """The arguments of a trainer, if they can be used; raises `ValueError` if not."""
    args, prompts, count = arguments["args"], arguments["train_dataset"], script_args.iterations
    if not isinstance(prompts, Dataset) or "prompt" not in prompts.column_names or args.reward_model_path is None:
        raise ValueError("Give a dataset, no stream, with a column `prompt`, and a model by `reward_model_path`.")
    together = args.generation_batch_size // args.num_generations
    if count < 1 or len(prompts) // count < together:
        raise ValueError(
            f"`iterations` is {count} for {len(prompts)} prompts, {together} of which are trained on together: choose "
            f"from 1 to {len(prompts) // together}."
        )
    if args.eval_strategy != "no" or args.use_vllm or args.resume_from_checkpoint is not None:
        raise ValueError(
            "`eval_strategy`, `use_vllm` and `resume_from_checkpoint` would be ignored: leave them out. Iterations go "
            "on by themselves."
        )
    if args.remove_unused_columns:
        raise ValueError("`remove_unused_columns` would drop the sampled `completions`: leave it out.")
    if args.loss_type == "dsppo":
        raise ValueError("`dsppo` reads the parts of its judge, which samples do not keep: take `gpm-trl gpo`.")
    settings = {"iterations": count, "model": arguments["model"], "batch_size": batch_size(args)}
    settings |= {"revision": (args.model_init_kwargs or {}).get("revision")}
    read = [list(prompts[name]) for name in READ if name in prompts.column_names]
    settings |= {"prompts": hashlib.sha256(json.dumps(read).encode()).hexdigest()}
    settings |= {name: getattr(args, name) for name in SAMPLING}
    path = Path(args.output_dir, "iterations.json")
    (before,) = broadcast_object_list([json.loads(path.read_text()) if path.exists() else settings])
    changed = [(name, before.get(name), new) for name, new in settings.items() if before.get(name) != new]
    if changed:
        began = ", ".join(f"`{name}` = {was}, not {new}" for name, was, new in changed)
        raise ValueError(f"{path.parent} began with {began}: keep it, or choose another `output_dir`.")
    if PartialState().is_main_process:
        write_whole(path, json.dumps(settings, indent=2) + "\n")
    return arguments


def batch_size(args: GPOConfig) -> int:
    """Prompts that a process samples together."""
    return max(args.per_device_eval_batch_size // args.num_generations, 1)


# --- Sampling and scoring --------------------------------------------------------------------------------------------


def sample(arguments: dict[str, Any], prompts: Dataset, first: int, directory: Path) -> Dataset:
    """
    Sample and score the prompts that `directory` lacks, each process its share of the batches. `first` is the number
    of the first prompt in the whole dataset. Returns the samples of all prompts.
    """
    args, state, size = arguments["args"], PartialState(), batch_size(arguments["args"])
    paths = [directory / f"batch-{start // size:05}.jsonl" for start in range(0, len(prompts), size)]
    # As the main process sees them: file systems of others may be behind.
    (left,) = broadcast_object_list([[index for index, path in enumerate(paths) if not path.exists()]])
    sampler = Sampler(arguments) if left else None
    for rows in prompts.iter(1000) if left else ():  # before hours of sampling
        sampler.encode(rows["prompt"])
    for start in range(0, len(left), state.num_processes):
        together = left[start : start + state.num_processes]  # one for each process, at the end maybe none for some
        batches = [range(index * size, min((index + 1) * size, len(prompts))) for index in together]
        before, own = batches[: state.process_index], batches[state.process_index : state.process_index + 1]
        rows = [row for batch in own for row in prompts.select(batch)]
        set_seed(args.seed + first + (own[0].start if own else 0))
        rows = sampler.sample_and_score(rows, sum(map(len, before)))
        if own:
            lines = [json.dumps(row, default=str) + "\n" for row in rows]  # JSON has no dates, which columns may hold
            write_whole(paths[together[state.process_index]], "".join(lines))
    state.wait_for_everyone()
    return Dataset.from_list([json.loads(line) for path in paths for line in path.read_text().splitlines()])


class Sampler:
    """The policy and the preference model, whole on each process."""

    def __init__(self, arguments: dict[str, Any]):
        self.args, name = arguments["args"], arguments["model"]
        kwargs = {**self.args.model_init_kwargs, "quantization_config": arguments["quantization_config"]}
        with whole_models():  # or ZeRO-3 would divide the policy
            load = AutoModelForCausalLM.from_pretrained
            self.policy = load_adapted(load, name, device_map=PartialState().device, **kwargs).eval()
        hub = {option: kwargs[option] for option in ("revision", "trust_remote_code")}
        self.tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", **hub)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        eos = self.policy.generation_config.eos_token_id
        self.eos = {self.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        self.reward = PreferenceReward(self.args.reward_model_path)

    def sample_and_score(self, rows: list[dict[str, Any]], offset: int) -> list[dict[str, Any]]:
        """K completions of each prompt of this process, with scores. `offset` prompts are on the processes before."""
        size = self.args.num_generations
        ids = self.generate([row["prompt"] for row in rows]) if rows else []
        texts = [self.tokenizer.decode(completion, skip_special_tokens=True) for completion in ids]
        repeated = [row for row in rows for _ in range(size)]
        completions = [
            text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
            for row, text in zip(repeated, texts, strict=True)
        ]
        names = [name for name in ("tools", "chat_template_kwargs") if rows and name in rows[0]]
        columns = {name: [row[name] for row in repeated] for name in names}
        # All processes take part, and each gets the scores of all.
        scores = self.reward.log_odds([row["prompt"] for row in repeated], completions, size, **columns).tolist()
        for index, row in enumerate(rows):
            own = slice(index * size, (index + 1) * size)
            row |= {"completions": completions[own], "completion_ids": ids[own], "scores": scores[offset + index]}
        return rows

    def encode(self, prompts: list) -> list[list[int]]:
        """Token ids of prompts; `ValueError` for one that leaves no room in the policy's context."""
        args = self.args
        if isinstance(prompts[0], str):
            prompt_ids = self.tokenizer(prompts).input_ids
        else:
            kwargs = {"add_generation_prompt": True, "return_dict": True, **(args.chat_template_kwargs or {})}
            prompt_ids = self.tokenizer.apply_chat_template(prompts, **kwargs)["input_ids"]
        if args.max_length is not None:  # cut from the left, as in training
            room = args.max_length - args.max_completion_length
            prompt_ids = [cut_left(ids, room, self.tokenizer.bos_token_id) for ids in prompt_ids]
        longest = max(map(len, prompt_ids)) + args.max_completion_length
        if longest != within_context(longest, self.policy.config):
            raise ValueError(
                f"A prompt and `max_completion_length` need {longest} tokens, beyond the policy's context: lower it, "
                "or set `max_length` to have prompts cut from the left."
            )
        return prompt_ids

    def generate(self, prompts: list) -> list[list[int]]:
        """Token ids of K completions of each prompt, up to and with their first EOS."""
        args, prompt_ids = self.args, self.encode(prompts)
        batch = self.tokenizer.pad({"input_ids": prompt_ids}, return_tensors="pt").to(self.policy.device)
        settings = {name: getattr(args, name) for name in GENERATION} | (args.generation_kwargs or {})
        settings |= {"do_sample": True, "num_return_sequences": args.num_generations, "eos_token_id": list(self.eos)}
        settings |= {"max_new_tokens": args.max_completion_length, "pad_token_id": self.tokenizer.pad_token_id}
        # Under ZeRO-3, transformers would wait for the processes that sample nothing; but this policy is whole.
        output = self.policy.generate(**batch, **settings, synced_gpus=False)
        output = output[:, batch["input_ids"].shape[1] :].tolist()
        ends = [next((i + 1 for i, token in enumerate(ids) if token in self.eos), len(ids)) for ids in output]
        return [ids[:end] for ids, end in zip(output, ends, strict=True)]


# --- Iterations ------------------------------------------------------------------------------------------------------


def run(arguments: dict[str, Any], script_args: IterationArguments) -> None:
    """Run the iterations that are left."""
    args, state, count = arguments["args"], PartialState(), script_args.iterations
    output_dir, first = Path(args.output_dir), 0
    args.hub_model_id = args.hub_model_id or output_dir.name  # not that of an iteration's directory
    for index in range(count):
        directory = output_dir / f"iteration-{index + 1}"
        prompts = arguments["train_dataset"].shard(count, index, contiguous=True)
        if index > 0:
            arguments |= {"model": str(output_dir / f"iteration-{index}" / "policy"), "peft_config": None}
            args.model_init_kwargs = {**args.model_init_kwargs, "revision": None}
        (done,) = broadcast_object_list([(directory / "done").exists()])
        if not done:
            state.print(f"Iteration {index + 1} of {count}: sampling, to {directory / 'samples'}", flush=True)
            samples = sample(arguments, prompts, first, directory / "samples")
            clear_device_cache(garbage_collection=True)
            state.print(f"Iteration {index + 1} of {count}: training, to {directory / 'policy'}", flush=True)
            train(arguments, samples, directory, script_args)
            clear_device_cache(garbage_collection=True)
        first += len(prompts)
    state.print(f"The policy of the last iteration is {directory / 'policy'}.")
    state.destroy_process_group()


def train(arguments: dict[str, Any], samples: Dataset, directory: Path, script_args: IterationArguments) -> None:
    """Train on the samples, from the start or from the last checkpoint, and say that the iteration is done."""
    AcceleratorState._reset_state()  # or, under DeepSpeed, accelerate refuses a second trainer
    args = copy.copy(arguments["args"])
    args.output_dir, args.reward_model_path = str(directory / "policy"), None  # the samples have its scores
    trainer = GPOTrainer(**{**arguments, "args": args, "train_dataset": samples})
    trainer.train(resume_from_checkpoint=True)
    save_and_push(trainer, script_args)
    if trainer.accelerator.is_main_process:
        (directory / "done").touch()
    trainer.accelerator.free_memory()


if __name__ == "__main__":
    sys.exit(run_training(make_parser(), check, None, run))
