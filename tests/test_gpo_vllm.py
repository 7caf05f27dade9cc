"""
GPOTrainer on TRL's vLLM path, with stand-ins for vLLM, which needs a GPU: an engine in the process (colocated), and
the client of a server. They answer with completions that are known, and keep the weights that they are sent.
"""

import gc
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import TRAINING
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl.generation import vllm_generation

from gpm_trl import GPOConfig, GPOTrainer
from gpm_trl.cli.quickstart import save_tiny_decoder

K = 3
ROWS = [{"prompt": f"Question {index}"} for index in range(4)]
MODES = pytest.mark.parametrize("mode", ["colocate", "server"])


def answer(prompt_ids: list[int], index: int) -> list[int]:
    """The completion number `index` of a prompt: letters that depend on both, and the EOS token (2)."""
    return [3 + ord("a") + (sum(prompt_ids) + 5 * index + place) % 26 for place in range(1 + index)] + [2]


def letters(completions: list[str], **kwargs) -> list[float]:
    return [sum(ord(letter) % 7 for letter in text) / 5 for text in completions]


class Weights(dict):
    """What an engine was sent, and copies of it as it was each time that it sampled."""

    def __init__(self):
        self.sampled_with = []

    def load_weights(self, weights) -> None:
        self.update((name, weight.clone()) for name, weight in weights)

    def sample(self) -> None:
        self.sampled_with.append(dict(self))


class Engine:
    """As much of `vllm.LLM` as TRL uses."""

    def __init__(self, **kwargs):
        self.weights = Weights()
        runner = SimpleNamespace(model=self.weights)
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=executor)

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, sampling_params, use_tqdm):
        assert (sampling_params.n, sampling_params.max_tokens, sampling_params.temperature) == (1, 8, 0.7)
        self.weights.sample()
        seen, outputs = Counter(), []
        for prompt in prompts:
            ids = prompt["prompt_token_ids"]
            tokens = answer(ids, seen[tuple(ids)])
            seen[tuple(ids)] += 1
            logprobs = [{token: SimpleNamespace(rank=1, logprob=-1.0)} for token in tokens]
            completion = SimpleNamespace(token_ids=tokens, logprobs=logprobs)
            outputs.append(SimpleNamespace(prompt_token_ids=ids, outputs=[completion]))
        return outputs


class Client:
    """As much of TRL's `VLLMClient` as its trainers use."""

    def __init__(self, **kwargs):
        self.weights = Weights()

    def init_communicator(self, device):
        pass

    def update_named_params(self, metadata, weights):
        weights = list(weights)
        assert [name for name, *_ in metadata] == [name for name, _ in weights]
        self.weights.load_weights(weights)

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, n, max_tokens, temperature, **kwargs):
        assert (n, max_tokens, temperature) == (K, 8, 0.7)
        self.weights.sample()
        completions = [answer(ids, index) for ids in prompts for index in range(n)]
        logprobs = [[[-1.0] for _ in ids] for ids in completions]
        return {"prompt_ids": prompts, "completion_ids": completions, "logprobs": logprobs}


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda *args, **kwargs: True)
    monkeypatch.setattr(vllm_generation, "LLM", Engine, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", lambda **kwargs: SimpleNamespace(**kwargs), raising=False)
    monkeypatch.setattr(vllm_generation, "VLLMClient", Client)
    # TRL sets these, and they would make a launched process of every later test.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    yield
    gc.collect()


class Snapshots(TrainerCallback):
    """The weights of a policy without an adapter, before each step."""

    def __init__(self):
        self.weights = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append({name: weight.detach().clone() for name, weight in model.named_parameters()})


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    directory = tmp_path_factory.mktemp("policy")
    save_tiny_decoder(directory, 0)
    return str(directory)


@pytest.fixture
def make_trainer(policy, tmp_path):
    def make(rows, **kwargs):
        settings = {
            **TRAINING,
            "max_steps": 3,
            "num_generations": K,
            "per_device_train_batch_size": 2 * K,
            "per_device_eval_batch_size": 2 * K,
            "max_completion_length": 8,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "sync_ref_model": False,
            "beta": 1.0,
            **kwargs.pop("args", {}),
        }
        return GPOTrainer(
            policy,
            reward_funcs=letters,
            args=GPOConfig(str(tmp_path / "out"), **settings),
            train_dataset=Dataset.from_list(rows),
            **kwargs,
        )

    return make


def losses(trainer: GPOTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights_of(trainer: GPOTrainer) -> Weights:
    generation = trainer.vllm_generation
    return generation.llm.weights if generation.mode == "colocate" else generation.vllm_client.weights


@MODES
def test_completions_of_vllm_train_as_given_ones(make_trainer, mode):
    trainer = make_trainer(ROWS, args={"use_vllm": True, "vllm_mode": mode})
    trainer.train()
    tokenizer, rows = trainer.processing_class, []
    for row in ROWS:
        ids = [answer(tokenizer(row["prompt"])["input_ids"], index) for index in range(K)]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        rows.append({**row, "completions": texts, "completion_ids": ids})
    given = make_trainer(rows)
    given.train()
    assert len(set(losses(given))) == 3
    assert losses(trainer) == pytest.approx(losses(given), rel=1e-5)


@MODES
def test_vllm_samples_with_the_weights_of_the_step(make_trainer, mode):
    snapshots = Snapshots()
    trainer = make_trainer(ROWS, args={"use_vllm": True, "vllm_mode": mode}, callbacks=[snapshots])
    trainer.train()
    sampled_with = weights_of(trainer).sampled_with
    assert len(sampled_with) == len(snapshots.weights) == 3
    for sent, held in zip(sampled_with, snapshots.weights, strict=True):
        assert sent.keys() == held.keys()
        for name, weight in held.items():
            torch.testing.assert_close(sent[name], weight, atol=0, rtol=0)
    assert any(not torch.equal(sampled_with[0][name], weight) for name, weight in sampled_with[2].items())


@MODES
def test_vllm_gets_an_adapter_merged(make_trainer, mode):
    peft_config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    trainer = make_trainer(ROWS, args={"use_vllm": True, "vllm_mode": mode}, peft_config=peft_config)
    trainer.train()
    first, *_, last = weights_of(trainer).sampled_with
    base = trainer.model.get_base_model().state_dict()
    assert not any("lora" in name for name in last)
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert changed
    assert all("_proj" in name for name in changed)
    assert first.keys() <= {name.replace(".base_layer", "") for name in base}


def test_evaluation_with_vllm_has_no_win_rate(make_trainer):
    """The reference would have to be sampled from too."""
    metrics = make_trainer(ROWS, args={"use_vllm": True}, eval_dataset=Dataset.from_list(ROWS)).evaluate()
    assert metrics["eval_rewards/letters/mean"] > 0
    assert "eval_win_rate" not in metrics
