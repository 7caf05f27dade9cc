"""GPOTrainer: its losses against float64 references, its signals, reference and learning, and what a user does."""

import asyncio
import copy
import inspect
import itertools
import logging
import math
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trl
from conftest import (
    CHAT_TEMPLATE,
    TRAINING,
    assistant,
    byte_tokenizer,
    save_to_cache,
    tiny_model,
    tiny_reward_model,
    user,
)
from datasets import Dataset, IterableDataset
from oracles import duality_gap
from packaging.version import Version
from peft import IA3Config, LoHaConfig, LoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    TrainerCallback,
    set_seed,
)
from trl import GRPOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from gpm_trl import GPOConfig, GPOTrainer, PreferenceScorer
from gpm_trl.gpo import judges
from gpm_trl.gpo import reference as reference_module
from gpm_trl.gpo.reference import add_fused_lm_head, has_reference_adapter

QUICK = {
    **TRAINING,
    "max_steps": 1,
    "num_generations": 3,
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 12,
    "max_completion_length": 6,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "temperature": 0.7,
    "beta": 0.5,
}
# The step is the gradient.
SGD = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "weight_decay": 0.0}
PAIRWISE = ("sigmoid", "ipo", "rebel")
LOSS_TYPES = ("gpo", "sppo", *PAIRWISE)


def tiny_policy(seed=0, **settings):
    set_seed(seed)
    config = {
        "vocab_size": 259,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **settings}))


class Recorded(GPOTrainer):
    """Keeps batches, losses of the optimizer's batches, and how often the reference is asked."""

    def __init__(self, *args, **kwargs):
        self.batches, self.losses, self.reference_rows, self.policy_rows = [], [], 0, 0
        super().__init__(*args, **kwargs)

    def _prepare_inputs(self, generation_batch):
        self.batches.append(super()._prepare_inputs(generation_batch))
        return self.batches[-1]

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        self.losses.append(loss.item())
        return loss

    def _get_per_token_logps_and_entropies(self, model, input_ids, *args, **kwargs):
        if model is self.ref_model:
            self.reference_rows += len(input_ids)
        else:
            self.policy_rows += len(input_ids)
        return super()._get_per_token_logps_and_entropies(model, input_ids, *args, **kwargs)


class Snapshots(TrainerCallback):
    """The policy after each step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(weights(model))


@pytest.fixture
def make_trainer(tmp_path, tokenizer):
    """A trainer of few quick steps: `args` are fields of its config, the rest goes to the trainer."""

    def make(train_dataset, reward_funcs=None, model=None, args=None, trainer_class=Recorded, **kwargs):
        if isinstance(train_dataset, list):
            train_dataset = Dataset.from_list(train_dataset)
        config = GPOConfig(**{"output_dir": str(tmp_path / "output"), **QUICK, **(args or {})})
        return trainer_class(
            **{"processing_class": tokenizer, **kwargs},
            model=tiny_policy() if model is None else model,
            reward_funcs=reward_funcs,
            args=config,
            train_dataset=train_dataset,
        )

    return make


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal_weights(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def step(trainer):
    """The loss of one optimizer step, and its gradient, which is the step."""
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    return sum(trainer.losses), {name: before[name] - weight for name, weight in after.items()}


def signals_of(trainer):
    """Signals of the completions in a first batch, `(G, K)`."""
    trainer.train()
    return trainer.batches[0]["advantages"].view(-1, trainer.args.num_generations)


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def byte_sum(completions, **kwargs):
    """Other rewards for other completions, also where all are gibberish."""
    return [sum(completion.encode()) % 11 / 4 for completion in completions]


def prompts(num_rows=8):
    return [{"prompt": "Q" * (1 + index % 3)} for index in range(num_rows)]


def forced_rows(num_rows, num_generations, seed=0, long=False):
    """Prompts of other lengths with completions of 1 to 5 tokens and an EOS, or too many, and random log-odds."""
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(num_rows):
        completions = [
            "".join(generator.choice(list("abcdefg"), generator.integers(0, 6))) for _ in range(num_generations)
        ]
        if long:
            completions[index % num_generations] = "abcdefghij"
        upper = np.triu(generator.normal(size=(num_generations, num_generations)), 1)
        scores = (upper - upper.T).tolist()
        rows.append({"prompt": "pqrs" * (1 + index), "completions": completions, "scores": scores})
    return rows


# --- The loss against the specification ------------------------------------------------------------------------------


def expected_log_ratio(policy, initial, tokenizer, prompt, completion, args):
    """Sum of log-ratios over the tokens of a completion, up to its EOS if it has one, and their number."""
    prompt_ids = tokenizer(prompt).input_ids
    ids = [*tokenizer(completion).input_ids, tokenizer.eos_token_id][: args.max_completion_length]
    total = torch.zeros((), dtype=torch.float64)
    for sign, model in ((1, policy), (-1, initial)):
        logits = model(torch.tensor([prompt_ids + ids])).logits[0] / args.temperature
        for position, token in enumerate(ids, start=len(prompt_ids)):
            total = total + sign * (logits[position - 1, token] - logits[position - 1].logsumexp(0))
    return total, len(ids)


def expected_loss(policy, initial, tokenizer, rows, args):
    """Mean loss of the prompts as Section 5 of the paper has it, in plain loops."""
    losses = []
    for row in rows:
        size, scores, beta = len(row["completions"]), row["scores"], args.beta
        ratios, signals, valid = [], [], []
        for index, completion in enumerate(row["completions"]):
            ratio, length = expected_log_ratio(policy, initial, tokenizer, row["prompt"], completion, args)
            ratios.append(ratio / length if args.length_normalize else ratio)
            odds = scores[index]
            if args.loss_type == "sppo":
                signals.append(sum(1 / (1 + math.exp(-value)) for value in odds) / size - 0.5)
            else:
                signals.append(sum(odds) / size)
            ended = len(tokenizer(completion).input_ids) < args.max_completion_length
            if ended or not args.mask_truncated_completions:
                valid.append(index)
        if args.pairing == "best_worst":
            valid = sorted(
                {max(valid, key=lambda index: signals[index]), min(valid, key=lambda index: signals[index])}
            )
        terms = [(ratios[index] - signals[index] / beta) ** 2 for index in valid]
        if args.loss_type in PAIRWISE:
            terms = []
            for first, second in itertools.combinations(valid, 2):
                winner, loser = sorted((first, second), key=lambda index: -signals[index])
                h, gap = ratios[winner] - ratios[loser], signals[winner] - signals[loser]
                terms.append(
                    {
                        "sigmoid": -F.logsigmoid(beta * h),
                        "ipo": (h - 1 / (2 * beta)) ** 2,
                        "rebel": (beta * h - gap) ** 2,
                    }[args.loss_type]
                )
        losses.append(sum(terms) / len(terms))
    return sum(losses) / len(losses)


def in_float64(model):
    """A new model with the same weights, without what trainers have added to the forward."""
    fresh = tiny_policy().double()
    fresh.load_state_dict(model.state_dict())
    return fresh


def assert_is_the_specified_step(trainer, rows, tokenizer):
    policy, initial = in_float64(trainer.model), in_float64(trainer.ref_model)
    assert not any(torch.equal(*pair) for pair in zip(policy.parameters(), initial.parameters(), strict=True))
    expected = expected_loss(policy, initial, tokenizer, rows, trainer.args)
    expected.backward()
    loss, gradients = step(trainer)
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    largest = max(parameter.grad.abs().max().item() for parameter in policy.parameters())
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(gradients[name].double(), parameter.grad, rtol=1e-3, atol=2e-5 * largest)


def other_policy():
    """A policy without a weight in common with `tiny_policy()`, also in its norms."""
    model = tiny_policy(seed=1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    "args",
    [
        *({"loss_type": loss_type, "pairing": "all"} for loss_type in LOSS_TYPES),
        *({"loss_type": loss_type, "pairing": "best_worst"} for loss_type in ("gpo", "sigmoid")),
        *(
            {"loss_type": loss_type, "length_normalize": True, "num_generations": 4}
            for loss_type in ("gpo", "sigmoid")
        ),
        {"num_generations": 2},
        {"loss_type": "sigmoid", "pairing": "best_worst", "length_normalize": True, "num_generations": 5},
        # With truncated completions, which are opponents, but enter the loss only if they are not masked.
        *({"loss_type": loss_type, "mask_truncated_completions": True} for loss_type in ("gpo", "ipo")),
        {"mask_truncated_completions": False},
        {"mask_truncated_completions": True, "pairing": "best_worst", "num_generations": 4},
        {"mask_truncated_completions": True, "pairing": "best_worst", "num_generations": 4, "loss_type": "rebel"},
    ],
    ids=lambda args: " ".join(map(str, args.values())),
)
def test_loss_and_gradient_are_those_of_the_specification(args, make_trainer, tokenizer):
    size = args.get("num_generations", 3)
    rows = forced_rows(3, size, long="mask_truncated_completions" in args)
    trainer = make_trainer(
        rows, args={**SGD, **args, "per_device_train_batch_size": 3 * size}, ref_model=other_policy()
    )
    assert trainer.shares_prefixes or Version(trl.__version__) < Version("1.15")
    assert_is_the_specified_step(trainer, rows, tokenizer)


BY_PROMPT = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
SPLITS = [
    BY_PROMPT,  # the only one of the pairwise losses
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 12},
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},  # of groups
    {"per_device_train_batch_size": 12, "pad_to_multiple_of": 16},
]


@pytest.mark.parametrize(
    "args",
    [
        {"mask_truncated_completions": False},
        {"mask_truncated_completions": True},
        {"mask_truncated_completions": True, "pairing": "best_worst"},
        *({"mask_truncated_completions": True, "loss_type": loss_type} for loss_type in PAIRWISE),
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_a_step_does_not_depend_on_how_its_batch_is_split_or_padded(args, make_trainer):
    """Its loss, its gradient and its metrics."""
    rows, args = forced_rows(4, 3, long=True), {**SGD, **args}
    whole = make_trainer(rows, args={**args, "per_device_train_batch_size": 12}, ref_model=other_policy())
    loss, gradients = step(whole)
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for split in SPLITS[: 1 if "loss_type" in args else None]:
        parts = make_trainer(rows, args={**args, **split}, ref_model=other_policy())
        split_loss, split_gradients = step(parts)
        assert len(parts.losses) == 12 // split["per_device_train_batch_size"]
        assert split_loss == pytest.approx(loss, rel=1e-5)
        assert_equal_weights(split_gradients, gradients, rtol=1e-4, atol=1e-5 * largest)
        for name in ONLINE_DPO_METRICS:
            assert logged(parts, name) == pytest.approx(logged(whole, name), rel=1e-4, abs=1e-6), name


def test_only_completions_that_enter_the_loss_are_read_for_it(make_trainer):
    args = {"pairing": "best_worst", "num_generations": 5, "per_device_train_batch_size": 10}
    trainer = make_trainer(forced_rows(2, 5), args=args)
    trainer.train()
    (batch,) = trainer.batches
    assert len(batch["completion_ids"]) == 4
    assert trainer.reference_rows == 10


@pytest.mark.parametrize("split", [{}, {"num_iterations": 2}, {"gradient_accumulation_steps": 2}])
def test_the_policy_reads_a_completion_once_a_step(make_trainer, split):
    """Also where a generation is of several steps, and the parent would read it before, for importance weights."""
    args = {"num_generations": 4, "per_device_train_batch_size": 2, "steps_per_generation": 4, **split}
    trainer = make_trainer(
        forced_rows(2, 4), args={**args, "max_steps": 4 // args.get("gradient_accumulation_steps", 1)}
    )
    trainer.train()
    assert trainer.reference_rows == 8
    assert trainer.policy_rows == 8
    assert trainer.args.gradient_accumulation_steps == split.get("gradient_accumulation_steps", 1)


def test_a_group_of_masked_completions_has_no_loss_and_no_gradient(make_trainer):
    rows = [{"prompt": "p", "completions": ["abcdefghij"] * 3, "scores": [[0.0] * 3] * 3}]
    trainer = make_trainer(rows, args={**SGD, "mask_truncated_completions": True}, ref_model=other_policy())
    loss, gradients = step(trainer)
    assert loss == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())


def test_given_rewards_are_scores_too(make_trainer, tokenizer):
    rows = forced_rows(2, 3)
    rewards = [{**row, "scores": [float(index), 3.0, -1.0]} for index, row in enumerate(rows)]
    matrices = [{**row, "scores": [[i - j for j in row["scores"]] for i in row["scores"]]} for row in rewards]
    trainer = make_trainer(rewards, args={**SGD, "per_device_train_batch_size": 6}, ref_model=other_policy())
    assert_is_the_specified_step(trainer, matrices, tokenizer)


def test_given_token_ids_are_taken_as_they_are(make_trainer):
    rows = [{"prompt": "p", "completions": ["ab", "c", ""], "completion_ids": [[70, 71], [5, 2], [2]]}]
    assert sampled_ids(make_trainer(rows, byte_sum)) == [[70, 71], [5, 2], [2]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completion_ids": [[70, 71], [5, 9999], [2]]}, "but the model's embedding has"),
        ({"completion_ids": [[70, 71], [5, 2], []]}, "a completion without tokens"),
        ({"completions": [[assistant("a"), user("b"), assistant("c")]] * 3}, "give one message with a text"),
        ({"completions": [[{**assistant(None), "tool_calls": []}]] * 3}, "give one message with a text"),
    ],
)
def test_given_completions_that_cannot_be_trained_on_are_told_before_the_training(make_trainer, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer([{"prompt": "p", "completions": ["ab", "c", ""], **changes}], byte_sum)


def test_given_completions_are_cut_as_sampled_ones_are(make_trainer):
    rows = [{"prompt": "p", "completions": ["abcdefgh"] * 3, "completion_ids": [[70, 71, 72, 73, 74, 2]] * 3}]
    args = {"max_completion_length": 4}
    assert sampled_ids(make_trainer(rows, byte_sum, args=args)) == [[70, 71, 72, 73]] * 3


def test_the_win_rate_of_given_completions_reads_none_of_their_columns(make_trainer):
    rows = [{"prompt": "p", "completions": ["ab", "c", "d"], "completion_ids": [[70, 71, 2], [5, 2], [6, 2]]}] * 4
    trainer = make_trainer(rows, byte_sum, eval_dataset=Dataset.from_list(rows))
    assert 0 <= trainer.evaluate()["eval_win_rate"] <= 1


def test_columns_may_be_called_as_the_arguments_of_judges(make_trainer, gpm):
    names = ("size", "ended", "part_weights", "num_generations", "weights")
    rows, told = [{"prompt": "p", **dict.fromkeys(names, 7.0)}] * 4, []

    def judge(completions, **columns):
        told.append({name: columns[name] for name in names})
        return byte_sum(completions)

    trainer = make_trainer(rows, [judge, gpm], eval_dataset=Dataset.from_list(rows))
    trainer.train()
    trainer.evaluate()
    sizes = [len(columns["size"]) for columns in told]
    assert told == [dict.fromkeys(names, [7.0] * size) for size in sizes]
    assert len(sizes) > 2


def sampled_ids(trainer):
    trainer.train()
    (batch,) = trainer.batches
    pairs = zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


@pytest.mark.parametrize("conversational", [False, True])
def test_given_completions_may_be_messages(conversational, make_trainer, chat_tokenizer):
    texts = ["ab", "c", ""]
    row = {"prompt": "p", "completions": texts}
    if conversational:
        row = {"prompt": [user("p")], "completions": [[assistant(text)] for text in texts]}
    trainer = make_trainer([row], lambda completions, **kwargs: [0.0, 1.0, 2.0], processing_class=chat_tokenizer)
    assert [chat_tokenizer.decode(ids) for ids in sampled_ids(trainer)] == ["ab</s>", "c</s>", "</s>"]


def test_samples_serve_several_steps_without_importance_weights(make_trainer):
    calls = []

    def count(completions, **kwargs):
        calls.append(len(completions))
        return byte_sum(completions)

    args = {"steps_per_generation": 4, "num_iterations": 2, "max_steps": 16}
    trainer = make_trainer(prompts(), count, args=args)
    trainer.train()
    assert calls == [12, 12]
    batches = trainer.batches
    samples = [batch["completion_ids"].tolist() for batch in batches]
    assert all(samples[index] == samples[index + 4] for index in (0, 1, 2, 3, 8, 9, 10, 11))
    assert len({str(sample) for sample in samples}) == 8
    # As sampled, the log-ratio is 0; after steps it is that of the policy as it is now.
    assert trainer.losses[0] == pytest.approx((batches[0]["advantages"] / 0.5).square().mean().item(), rel=1e-4)
    assert trainer.losses[4] != pytest.approx(trainer.losses[0], rel=1e-3)


def test_beta_is_that_of_the_epoch(make_trainer):
    args = {"beta": [1.0, 0.5], "num_train_epochs": 3, "max_steps": -1, "learning_rate": 0.0}
    trainer = make_trainer(forced_rows(2, 3), args={**args, "optim": "sgd"})
    trainer.train()
    assert logged(trainer, "beta") == [1, 1, 0.5, 0.5, 0.5, 0.5]
    # The policy is the reference, so that the loss is the mean of (s / beta)^2.
    first, second = sorted(trainer.losses[:2]), sorted(trainer.losses[2:4])
    assert second == pytest.approx([4 * loss for loss in first], rel=1e-4)


@pytest.mark.parametrize("sync_steps", [None, 2])
def test_an_evaluation_is_of_the_epoch_and_iteration_that_it_ends(sync_steps, make_trainer):
    args = {"beta": [1.0, 0.5], "num_train_epochs": 2, "max_steps": -1, "ref_model_sync_steps": sync_steps}
    args |= {"eval_strategy": "epoch", "num_generations_eval": 2, "per_device_eval_batch_size": 4}
    trainer = make_trainer(prompts()[:2], byte_sum, args=args, eval_dataset=Dataset.from_list(prompts()[:2]))
    seen, losses = [], trainer._compute_loss

    def record(model, inputs):
        seen.append((model.training, trainer.current_beta, trainer.current_iteration))
        return losses(model, inputs)

    trainer._compute_loss = record
    trainer.evaluate()
    trainer.train()
    first, second = (True, 1.0, 1), (True, 0.5, 2)
    evaluated = [(False, *values) for _, *values in (first, first, second)]
    assert seen == [evaluated[0], first, first, evaluated[1], second, second, evaluated[2]]


# --- Signals ---------------------------------------------------------------------------------------------------------


def test_a_function_may_return_matrices(make_trainer):
    matrix = [[0.0, 1.0, -2.0], [-1.0, 0.0, 3.0], [2.0, -3.0, 0.0]]
    seen = []

    def judge(prompts, completions, **kwargs):
        seen.append((len(prompts), len(completions)))
        return [matrix] * (len(completions) // 3)

    args = {"per_device_train_batch_size": 6}
    signals = signals_of(make_trainer(prompts(), judge, args=args))
    assert seen == [(6, 6)]
    torch.testing.assert_close(signals, torch.tensor([[-1.0, 2.0, -1.0]] * 2) / 3)


def test_a_judge_in_memory_goes_to_the_device_and_a_scorer_stays_where_it_is(chat_tokenizer):
    accelerator = SimpleNamespace(device="meta", state=SimpleNamespace(deepspeed_plugin=None))
    scorer = PreferenceScorer(tiny_model(), chat_tokenizer)
    for origin, device in ((tiny_model(), "meta"), (scorer, "cpu")):
        judge = judges.PreferenceReward(origin, None if origin is scorer else chat_tokenizer)
        judges.place_judges([judge], [origin], accelerator)
        assert {parameter.device.type for parameter in judge.scorer.model.parameters()} == {device}


LOCK = asyncio.Lock()  # as clients have: it belongs to the loop that it is first waited for in


async def async_rewards(completions, **kwargs):
    async def waits():
        async with LOCK:
            await asyncio.sleep(0)

    await asyncio.gather(waits(), waits())
    return [3.0, 1.0, -1.0]


class AsyncJudge:
    async def __call__(self, completions, **kwargs):
        return await async_rewards(completions)


def test_an_object_may_be_asynchronous(make_trainer):
    for _ in range(2):
        assert signals_of(make_trainer(prompts(), AsyncJudge())).tolist() == [[2, 0, -2]]


def test_several_functions_add_up_by_their_weights(make_trainer):
    def rewards(completions, **kwargs):
        return [3.0, 0.0, 0.0]

    def matrices(completions, **kwargs):
        return [[[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]

    functions = [rewards, matrices, async_rewards]
    trainer = make_trainer(prompts(), functions, args={"reward_weights": [1.0, 6.0, 0.5]})
    torch.testing.assert_close(signals_of(trainer), torch.tensor([[2 + 2 + 1, -1 - 2 + 0, -1 + 0 - 1.0]]))
    assert {"rewards/rewards/mean", "rewards/matrices/mean", "rewards/async_rewards/mean"} <= {
        name for entry in trainer.state.log_history for name in entry
    }


def test_judges_of_one_name_are_logged_apart(make_trainer):
    def make(value):
        def judge(completions, **kwargs):
            return [value] * len(completions)

        return judge

    trainer = make_trainer(prompts(), [make(1.0), make(5.0)])
    trainer.train()
    assert logged(trainer, "rewards/judge/mean") == [1.0]
    assert logged(trainer, "rewards/judge_1/mean") == [5.0]


@pytest.mark.parametrize("loss_type", ["gpo", "sppo", "rebel"])
def test_completions_without_a_reward_take_no_part(loss_type, make_trainer):
    rows = [{"prompt": "p", "completions": ["a", "bb", "c"]}]
    args = {"loss_type": loss_type, **SGD}
    trainer = make_trainer(rows, lambda completions, **kwargs: [3.0, None, -1.0], args=args, ref_model=other_policy())
    policy, initial = in_float64(trainer.model), in_float64(trainer.ref_model)
    ratios = [expected_log_ratio(policy, initial, byte_tokenizer(), "p", text, trainer.args)[0] for text in ("a", "c")]
    loss, _ = step(trainer)
    # The group has three members, of which one is not better or worse than any.
    signals = trainer.batches[0]["advantages"].tolist()
    if loss_type != "sppo":
        assert signals == pytest.approx([4 / 3, -4 / 3] if len(signals) == 2 else [4 / 3, 0, -4 / 3])
    h, beta = (ratios[0] - ratios[1]).item(), 0.5
    squares = [(ratios[0].item() - signals[0] / beta) ** 2, (ratios[1].item() - signals[-1] / beta) ** 2]
    expected = (beta * h - 8 / 3) ** 2 if loss_type == "rebel" else sum(squares) / 2
    assert loss == pytest.approx(expected, rel=1e-4)


def test_a_prompt_without_any_reward_moves_nothing(make_trainer):
    args = {"max_steps": 2}
    trainer = make_trainer(prompts(), lambda completions, **kwargs: [None] * len(completions), args=args)
    before = weights(trainer.model)
    trainer.train()
    assert trainer.losses == [0, 0]
    assert_equal_weights(weights(trainer.model), before)


def test_the_missing_eos_penalty_looks_at_completion_ids_only(make_trainer):
    rows = [{"prompt": "p", "completions": ["a", "b", "</s>"], "completion_ids": [[70, 2], [70, 71], [30, 31]]}]
    # The text of the last one names an EOS, but does not hold one.
    trainer = make_trainer(rows, lambda completions, **kwargs: [0.0] * 3, args={"missing_eos_penalty": 3.0})
    torch.testing.assert_close(signals_of(trainer), torch.tensor([[2.0, -1.0, -1.0]]))


def test_log_odds_are_clipped_pair_by_pair_before_the_penalty(make_trainer):
    rows = [{"prompt": "p", "completions": ["a", "b", "c"], "completion_ids": [[70, 2], [70, 2], [70]]}]
    args = {"score_clip": 1.0, "missing_eos_penalty": 3.0}
    trainer = make_trainer(rows, lambda completions, **kwargs: [10.0, 0.5, 0.0], args=args)
    expected = torch.tensor([[0 + 1 + (1 + 3), -1 + 0 + (0.5 + 3), -(1 + 3) - (0.5 + 3)]]) / 3
    torch.testing.assert_close(signals_of(trainer), expected)


def test_empty_completions_are_compared_and_learned_from(make_trainer, chat_tokenizer):
    rows = [{"prompt": [user("p")], "completions": [[assistant(text)] for text in ("", "a", "")]}]
    classes = {"processing_class": chat_tokenizer, "reward_processing_classes": chat_tokenizer}
    trainer = make_trainer(rows, tiny_model(), args={"length_normalize": True}, **classes)
    (signals,) = signals_of(trainer).tolist()
    assert signals[0] == signals[2] != 0
    assert math.isfinite(trainer.losses[0])


def other_tokenizer():
    """Bytes in another order, with other special tokens and another template than the policy's."""
    vocabulary = byte_tokenizer().get_vocab()
    alphabet = sorted((token for token, index in vocabulary.items() if index > 2), reverse=True)
    names = ["[BEGIN]", "[END]", "[NONE]", *alphabet]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(names)}, merges=[]))
    base = byte_tokenizer().backend_tokenizer
    tokenizer.pre_tokenizer, tokenizer.decoder = base.pre_tokenizer, base.decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="[BEGIN]",
        eos_token="[END]",
        pad_token="[NONE]",
        chat_template="{% for message in messages %}#{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}#assistant: {% endif %}",
    )


@pytest.fixture(scope="module")
def gpm_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gpm")
    model = tiny_model()
    model.config.text_config.pad_token_id = 2
    model.save_pretrained(directory)
    other_tokenizer().save_pretrained(directory)
    return directory


CHAT_ROWS = [
    {"prompt": [user(f"Question {index}?")], "completions": [[assistant(text)] for text in ("yes", "no", "may")]}
    for index in range(2)
]


@pytest.mark.parametrize("kind", ["path", "model"])
def test_a_preference_model_reads_texts_with_its_own_tokenizer(kind, gpm_directory, make_trainer, chat_tokenizer):
    scorer = PreferenceScorer.from_pretrained(gpm_directory, device="cpu")
    given = {"path": gpm_directory, "model": scorer.model}[kind]
    classes = {"reward_processing_classes": other_tokenizer()} if kind == "model" else {}
    args = {"per_device_train_batch_size": 6, "shuffle_dataset": False}
    trainer = make_trainer(CHAT_ROWS, given, args=args, processing_class=chat_tokenizer, **classes)
    matrices = scorer.matrix([row["prompt"] for row in CHAT_ROWS], [row["completions"] for row in CHAT_ROWS])
    expected = torch.stack(matrices).mean(-1) / scorer.temperature
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(signals_of(trainer), expected, rtol=1e-4, atol=1e-6)


def test_a_bradley_terry_model_gives_its_rewards_less_their_mean(make_trainer, chat_tokenizer):
    model = tiny_reward_model()
    args = {"per_device_train_batch_size": 6, "shuffle_dataset": False}
    classes = {"processing_class": chat_tokenizer, "reward_processing_classes": chat_tokenizer}
    signals = signals_of(make_trainer(CHAT_ROWS, model, args=args, **classes))
    rewards = torch.zeros(2, 3)
    for i, j in itertools.product(range(2), range(3)):
        messages = CHAT_ROWS[i]["prompt"] + CHAT_ROWS[i]["completions"][j]
        ids = chat_tokenizer.apply_chat_template(messages, return_dict=False)
        rewards[i, j] = model(torch.tensor([ids])).logits[0, 0]
    assert rewards.std() > 0.01
    torch.testing.assert_close(signals, rewards - rewards.mean(1, keepdim=True), rtol=1e-3, atol=1e-4)


# --- Learning --------------------------------------------------------------------------------------------------------

MOVES = "rps"
ROCK_PAPER_SCISSORS = 2 * np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
TRANSITIVE = np.array([[0.0, 1.0, 2.0], [-1.0, 0.0, 1.0], [-2.0, -1.0, 0.0]])
# One optimizer step an iteration, of one move.
GAME = {
    "num_generations": 64,
    "per_device_train_batch_size": 64,
    "max_completion_length": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "logging_strategy": "no",
    **SGD,
}


def move_tokenizer():
    vocabulary = {"<pad>": 0, "<eos>": 1, "?": 2, "r": 3, "p": 4, "s": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="?")


def tabular_policy(probabilities):
    """A causal LM whose next token is r, p or s whatever comes before: only the bias of its head is trained."""
    set_seed(0)
    config = PhiConfig(
        vocab_size=6,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=16,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = PhiForCausalLM(config).requires_grad_(False)
    model.lm_head.weight.zero_()
    model.lm_head.bias.copy_(torch.tensor([-1e4] * 3 + [math.log(probability) for probability in probabilities]))
    model.lm_head.bias.requires_grad_(True)
    return model


def move_probabilities(model):
    return model.lm_head.bias.detach().double().softmax(0)[3:].numpy()


class Policies(TrainerCallback):
    """Probabilities of the moves after each iteration of so many steps."""

    def __init__(self, steps):
        self.steps, self.probabilities = steps, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.steps == 0:
            self.probabilities.append(move_probabilities(model))


def oracle(scores):
    """Exact log-odds of a game, as a judge."""

    def judge(completions, **kwargs):
        played = np.array([MOVES.index(completion) for completion in completions]).reshape(-1, GAME["num_generations"])
        return [torch.tensor(scores[np.ix_(moves, moves)]) for moves in played]

    return judge


@pytest.mark.parametrize(("loss_type", "beta"), [("gpo", 0.5), ("sigmoid", 2.0)])
def test_on_a_transitive_game_the_policy_comes_to_play_the_best_move(loss_type, beta, make_trainer):
    model = tabular_policy([0.1, 0.3, 0.6])
    args = {**GAME, "max_steps": 30, "ref_model_sync_steps": 1, "beta": beta, "loss_type": loss_type}
    make_trainer([{"prompt": "?"}], oracle(TRANSITIVE), model, args, processing_class=move_tokenizer()).train()
    assert move_probabilities(model)[0] > 0.9


@pytest.mark.slow
def test_on_rock_paper_scissors_the_duality_gap_of_the_averaged_policy_falls(make_trainer):
    model, policies = tabular_policy([0.8, 0.1, 0.1]), Policies(4)
    args = {**GAME, "max_steps": 600, "num_iterations": 4, "ref_model_sync_steps": 4, "beta": 8.0, "seed": 0}
    kwargs = {"processing_class": move_tokenizer(), "callbacks": [policies], "trainer_class": GPOTrainer}
    make_trainer([{"prompt": "?"}], oracle(ROCK_PAPER_SCISSORS), model, args, **kwargs).train()
    played = np.array(policies.probabilities)
    gaps = [duality_gap(ROCK_PAPER_SCISSORS, played[:count].mean(0)) for count in (1, 40, 150)]
    assert gaps[0] > 2.5
    assert gaps[1] < 0.6 * gaps[0]
    assert gaps[2] < 0.6 * gaps[1]  # 1 / sqrt(T) gives 0.52
    # The policy itself does not converge: it goes round.
    assert max(duality_gap(ROCK_PAPER_SCISSORS, policy) for policy in played[-30:]) > 1.2


# --- The reference ---------------------------------------------------------------------------------------------------


def expected_logps(model, batch, temperature=0.7):
    """Log-probabilities of the tokens of the completions, `(N, T)`, from whole logits."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    length = batch["completion_ids"].shape[1]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1] / temperature
    logps = logits.log_softmax(-1).gather(-1, batch["completion_ids"].unsqueeze(-1))[..., 0]
    return logps * batch["completion_mask"]


def assert_reference_logps(batch, model, temperature=0.7):
    actual = batch["ref_per_token_logps"] * batch["completion_mask"]
    torch.testing.assert_close(actual, expected_logps(model, batch, temperature), rtol=1e-4, atol=1e-4)


def test_the_reference_is_a_copy_of_the_policy_as_it_was(make_trainer):
    trainer = make_trainer(prompts(), byte_sum, args={"max_steps": 3, "sync_ref_model": False})
    before = weights(trainer.model)
    assert_equal_weights(weights(trainer.ref_model), before)
    trainer.train()
    assert_equal_weights(weights(trainer.ref_model), before)
    assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())
    assert all(not torch.equal(weight, before[name]) for name, weight in weights(trainer.model).items())
    for batch in trainer.batches:
        assert_reference_logps(batch, trainer.ref_model)


def test_the_reference_has_no_dropout(make_trainer):
    model = tiny_policy(attention_dropout=0.5).train()
    trainer = make_trainer(prompts(), byte_sum, model)
    trainer.train()
    assert_reference_logps(trainer.batches[0], trainer.ref_model)


@pytest.mark.parametrize(
    "cast",
    [
        False,
        pytest.param(True, marks=pytest.mark.skipif(add_fused_lm_head is None, reason="refused before TRL 1.15")),
    ],
)
def test_the_reference_is_as_precise_as_the_policy(cast, make_trainer):
    trainer = make_trainer(
        prompts(), byte_sum, tiny_policy().to(torch.bfloat16), {"cast_lm_head_to_fp32": cast, "max_steps": 2}
    )
    trainer.train()
    assert logged(trainer, "objective/kl")[0] == 0
    assert logged(trainer, "objective/kl")[1] != 0


def test_a_reference_less_precise_than_the_policy_is_refused(make_trainer, monkeypatch):
    """TRL before 1.15 has no function that would make it as precise."""
    monkeypatch.setattr("gpm_trl.gpo.reference.add_fused_lm_head", None)
    with pytest.raises(ValueError, match="`cast_lm_head_to_fp32` is not done to a reference"):
        make_trainer(prompts(), byte_sum, args={"cast_lm_head_to_fp32": True})


@pytest.mark.parametrize(
    ("args", "last_update"),
    [
        ({"ref_model_sync_steps": 2, "max_steps": 5}, 4),
        ({"ref_model_sync_steps": 2, "max_steps": 4}, 2),  # the next iteration does not start
        ({"num_train_epochs": 2, "max_steps": -1}, 4),  # of 4 prompts
        ({"num_train_epochs": 3, "max_steps": 6}, 4),
    ],
)
def test_the_reference_becomes_the_policy_at_the_start_of_an_iteration(args, last_update, make_trainer):
    snapshots = Snapshots()
    trainer = make_trainer(prompts(4), byte_sum, args=args, callbacks=[snapshots])
    trainer.train()
    assert_equal_weights(weights(trainer.ref_model), snapshots.weights[last_update - 1])
    assert trainer.batches[0]["ref_per_token_logps"].shape[0] == 3
    assert_reference_logps(trainer.batches[-1], trainer.ref_model)


def test_the_reference_may_be_mixed(make_trainer):
    snapshots = Snapshots()
    args = {"ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25, "max_steps": 4}
    trainer = make_trainer(prompts(), byte_sum, args=args, callbacks=[snapshots])
    initial = weights(trainer.model)
    trainer.train()
    mixed = {name: 0.25 * snapshots.weights[1][name] + 0.75 * weight for name, weight in initial.items()}
    assert_equal_weights(weights(trainer.ref_model), mixed, rtol=1e-5, atol=1e-7)


def lora_config():
    return LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")


def adapter(policy_weights, name):
    return {key.replace(f".{name}.", "."): weight for key, weight in policy_weights.items() if f".{name}." in key}


def base_weights(model):
    return {name: weight for name, weight in weights(model).items() if "lora" not in name}


def assert_only_one_adapter_is_trained(model):
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".default." in name}


def test_with_an_adapter_the_reference_is_the_policy_without_it(make_trainer):
    args = {"sync_ref_model": False, "max_steps": 3}
    trainer = make_trainer(prompts(), byte_sum, args=args, peft_config=lora_config())
    assert trainer.ref_model is None
    before = base_weights(trainer.model)
    trainer.train()
    assert_equal_weights(base_weights(trainer.model), before)
    assert max(weight.abs().max() for name, weight in weights(trainer.model).items() if "lora_B" in name) > 0
    with trainer.model.disable_adapter():
        assert_reference_logps(trainer.batches[-1], trainer.model)
    assert trainer.losses[-1] != pytest.approx(
        (trainer.batches[-1]["advantages"] / 0.5).square().mean().item(), rel=1e-4
    )


@pytest.mark.parametrize("given", ["config", "model"])
def test_with_an_adapter_the_reference_is_a_second_one_that_stays_behind(given, make_trainer):
    snapshots = Snapshots()
    args = {"ref_model_sync_steps": 2, "max_steps": 5, "learning_rate": 0.1}
    if given == "config":
        trainer = make_trainer(prompts(), byte_sum, args=args, peft_config=lora_config(), callbacks=[snapshots])
    else:
        model = get_peft_model(tiny_policy(), lora_config())
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.3)
        trainer = make_trainer(prompts(), byte_sum, model, args, callbacks=[snapshots])
    base, initial = base_weights(trainer.model), weights(trainer.model)
    assert_equal_weights(adapter(initial, "ref"), adapter(initial, "default"))
    assert_only_one_adapter_is_trained(trainer.model)
    trainer.train()
    assert_only_one_adapter_is_trained(trainer.model)
    # After steps 2 and 4, and as it was at that time.
    fourth, fifth = (adapter(snapshot, "default") for snapshot in snapshots.weights[3:])
    assert_equal_weights(adapter(weights(trainer.model), "ref"), fourth)
    assert not any(torch.equal(weight, fifth[name]) for name, weight in fourth.items())
    assert_equal_weights(base_weights(trainer.model), base)
    assert trainer.model.active_adapter == "default"
    trainer.model.set_adapter("ref")
    assert_reference_logps(trainer.batches[-1], trainer.model)


class Logits(TrainerCallback):
    """The policy's logits of a text, before the first step and after each."""

    def __init__(self):
        self.found = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.found.append(logits_of(model))

    on_step_end = on_train_begin


@torch.no_grad()
def logits_of(model):
    training = model.training
    logits = model.eval()(input_ids=torch.tensor([[1, 65, 66, 67]])).logits
    model.train(training)
    return logits


OTHER_ADAPTERS = {
    "pissa": LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"),
    "embedding": LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
    "tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[65, 66]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(r=2, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("sync_ref_model", [True, False])
@pytest.mark.parametrize("given", ["config", "model"])
@pytest.mark.parametrize("kind", OTHER_ADAPTERS)
def test_adapters_of_other_kinds_have_a_reference_too(kind, given, sync_ref_model, make_trainer, tmp_path):
    policy, config, logits = tiny_policy(), copy.deepcopy(OTHER_ADAPTERS[kind]), Logits()
    args = {"ref_model_sync_steps": 2} if sync_ref_model else {"sync_ref_model": False}
    args |= {"max_steps": 3, "learning_rate": 0.1, "save_strategy": "steps", "save_steps": 1}
    expected, kwargs = logits_of(policy), {"peft_config": config}
    if given == "model":
        policy, kwargs = get_peft_model(policy, config), {}
        torch.testing.assert_close(logits_of(policy), expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter += 0.1 * parameter.requires_grad * torch.randn_like(parameter)
        assert (logits_of(policy) - expected).abs().max() > 1e-2
        expected = logits_of(policy)
    trainer = make_trainer(prompts(), byte_sum, policy, args, callbacks=[logits], **kwargs)
    trainer.train()
    torch.testing.assert_close(logits.found[0], expected, rtol=1e-4, atol=1e-4)
    assert all((now - before).abs().max() > 1e-3 for before, now in itertools.pairwise(logits.found))
    with trainer._reference_as_policy():
        reference = logits_of(trainer.model)
    torch.testing.assert_close(reference, logits.found[2 if sync_ref_model else 0], rtol=1e-4, atol=1e-4)
    if sync_ref_model:
        trainer._update.load(tmp_path / "output" / "checkpoint-3", trainer.model)
        with trainer._reference_as_policy():
            torch.testing.assert_close(logits_of(trainer.model), reference, rtol=0, atol=0)


def test_adapters_of_which_a_model_can_hold_one_are_told_at_once(make_trainer):
    config = LoraConfig(r=2, target_modules=["q_proj"], bias="all")
    with pytest.raises(ValueError, match=r"The reference is a second adapter, 'ref'.*sync_ref_model=False"):
        make_trainer(prompts(), byte_sum, peft_config=config)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"], init_lora_weights=False),
        LoHaConfig(r=2, module_dropout=0.5, rank_dropout=0.5, target_modules=["q_proj"], init_weights=False),
        VeraConfig(r=2, vera_dropout=0.5, target_modules=["q_proj"], init_weights=False),
    ],
    ids=["lora", "loha", "vera"],
)
def test_the_reference_of_any_adapter_has_no_dropout(config, make_trainer):
    trainer = make_trainer(prompts(), byte_sum, get_peft_model(tiny_policy(), config))
    ids = torch.tensor([[1, 65, 66, 67]])
    trainer.model.train()
    with torch.no_grad():
        assert not torch.equal(trainer.model(ids).logits, trainer.model(ids).logits)
        with trainer._reference_as_policy():
            trainer.model.train()
            torch.testing.assert_close(trainer.model(ids).logits, trainer.model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("gathers", [True, False])
def test_a_reference_that_zero3_does_not_gather_is_told_before_the_training(gathers, monkeypatch):
    monkeypatch.setattr(reference_module, "is_deepspeed_zero3_enabled", lambda: True)
    engine = SimpleNamespace(zero_gather_16bit_weights_on_model_save=lambda: gathers)
    with nullcontext() if gathers else pytest.raises(ValueError, match="zero3_save_16bit_model: true"):
        reference_module.check_saveable(engine)


@pytest.mark.parametrize("size", [8, 16])
def test_a_reference_that_cannot_become_the_policy_is_refused_at_once(size, make_trainer):
    reference = tiny_policy(intermediate_size=64) if size == 16 else tiny_policy(hidden_size=size)
    with pytest.raises(
        ValueError, match=r"`ref_model` cannot become the policy: .* `sync_ref_model=False` to keep it"
    ):
        make_trainer(prompts(), byte_sum, ref_model=reference)
    make_trainer(prompts(), byte_sum, ref_model=reference, args={"sync_ref_model": False}).train()


@pytest.mark.parametrize(
    ("alpha", "sync", "uses_adapter"),
    [(1.0, {"ref_model_sync_steps": 2}, False), (0.5, {"ref_model_sync_steps": 2}, True), (1.0, {}, True)],
    ids=["steps", "mixed adapter", "epochs"],
)
def test_resumed_training_is_that_without_an_interruption(alpha, sync, uses_adapter, make_trainer, tmp_path):
    args = {"max_steps": 7, "save_strategy": "steps", "save_steps": 1, "ref_model_mixup_alpha": alpha, **sync}
    args |= {"optim": "adamw_torch"}

    def make(**saving):
        kwargs = {"peft_config": lora_config()} if uses_adapter else {}
        return make_trainer(prompts(3), byte_sum, args={**args, **saving}, **kwargs)

    whole = make()
    whole.train()
    for start in (3, 4):  # within an iteration or at the end of one, or the other way round
        resumed = make(save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / "output" / f"checkpoint-{start}"))
        assert resumed.losses == whole.losses[start:], start
        assert_equal_weights(weights(resumed.model), weights(whole.model))
        if not uses_adapter:
            assert_equal_weights(weights(resumed.ref_model), weights(whole.ref_model))
    with pytest.raises(ValueError, match="has the initial reference, which is renewed here: make a new trainer"):
        whole.train(resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-1"))


@pytest.mark.parametrize(
    "args",
    [
        {"steps_per_generation": 4},
        {"steps_per_generation": 2, "num_iterations": 2},
        {"steps_per_generation": 4, "gradient_accumulation_steps": 3},
    ],
)
def test_a_run_resumed_within_a_generation_takes_the_steps_that_are_left(args, make_trainer, tmp_path):
    args = {"num_generations": 4, "per_device_train_batch_size": 2, "num_train_epochs": 2, "max_steps": -1, **args}
    args |= {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "sync_ref_model": False}
    whole = make_trainer(forced_rows(4, 4), args=args)
    whole.train()
    accumulated = args.get("gradient_accumulation_steps", 1)
    per_epoch = len(whole.losses) // 2
    for start in sorted({1, whole.state.global_step // 2, whole.state.global_step - 1}):
        resumed = make_trainer(forced_rows(4, 4), args={**args, "save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(tmp_path / "output" / f"checkpoint-{start}"))
        steps = whole.state.global_step // 2
        done = start // steps * per_epoch + start % steps * accumulated
        assert resumed.losses == whole.losses[done:], start
        assert_equal_weights(weights(resumed.model), weights(whole.model))


def test_the_reference_of_an_adapter_has_no_dropout(make_trainer):
    """As an adapter of its own, whether the trainer or TRL has made it."""
    policy = get_peft_model(tiny_policy(), LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False))
    for sync_ref_model in (True, False):
        trainer = make_trainer(forced_rows(2, 3), model=policy, args={"sync_ref_model": sync_ref_model})
        assert has_reference_adapter(trainer.model)
        trainer.model.train()
        rows = [row for row in forced_rows(2, 3) for _ in range(3)]
        first, second = (trainer._generate_and_score_completions(rows) for _ in range(2))
        torch.testing.assert_close(first["ref_per_token_logps"], second["ref_per_token_logps"], rtol=0, atol=0)


# --- Evaluation and metrics ------------------------------------------------------------------------------------------

ONLINE_DPO_METRICS = {
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "objective/kl",
    "objective/entropy",
    "objective/scores_margin",
    "logps/chosen",
    "logps/rejected",
    "beta",
}


def test_metrics_are_what_they_say(make_trainer):
    rows = forced_rows(3, 3)
    args = {"per_device_train_batch_size": 9, "shuffle_dataset": False}
    trainer = make_trainer(rows, args=args, ref_model=other_policy())
    policy, initial = in_float64(trainer.model), in_float64(trainer.ref_model)
    trainer.train()
    (batch,) = trainer.batches
    with torch.no_grad():
        logps = torch.tensor([float(value) for value in expected_logps(policy, batch).sum(1)]).view(3, 3)
        ratios = logps - expected_logps(initial, batch).sum(1).float().view(3, 3)
    signals = torch.tensor([row["scores"] for row in rows]).mean(-1)
    best, worst = signals.argmax(1, keepdim=True), signals.argmin(1, keepdim=True)
    chosen, rejected = 0.5 * ratios.gather(1, best).mean(), 0.5 * ratios.gather(1, worst).mean()
    expected = {
        "objective/kl": ratios.mean(),
        "objective/entropy": -logps.mean(),
        "objective/scores_margin": (signals.gather(1, best) - signals.gather(1, worst)).mean(),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "logps/chosen": logps.gather(1, best).mean(),
        "logps/rejected": logps.gather(1, worst).mean(),
        "beta": 0.5,
    }
    for name, value in expected.items():
        assert logged(trainer, name) == [pytest.approx(float(value), rel=1e-3)], name


def test_entropy_is_that_of_the_policy_at_the_tokens(make_trainer):
    model = tabular_policy([0.5, 0.25, 0.25])
    args = {**GAME, "logging_strategy": "steps", "temperature": 1.0}
    trainer = make_trainer([{"prompt": "?"}], oracle(TRANSITIVE), model, args, processing_class=move_tokenizer())
    trainer.train()
    assert logged(trainer, "entropy") == [pytest.approx(1.5 * math.log(2), rel=1e-3)]


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize(("moves", "rate"), [("rs", 1 / (1 + math.exp(-2))), ("sr", 1 / (1 + math.exp(2)))])
def test_the_win_rate_is_that_of_the_policy(moves, rate, conversational, make_trainer):
    policy, initial = (tabular_policy([float(move == played) + 1e-9 for move in MOVES]) for played in moves)
    tokenizer = move_tokenizer()
    tokenizer.chat_template = "?"
    prompt = [user("?")] if conversational else "?"

    def judge(completions, **kwargs):
        if conversational:
            assert all(message["role"] == "assistant" for (message,) in completions)
            completions = [message["content"] for (message,) in completions]
        played = [MOVES.index(completion) for completion in completions]
        return torch.tensor(ROCK_PAPER_SCISSORS[np.ix_(played, played)])[None]

    rows = Dataset.from_list([{"prompt": prompt}] * 2)
    args = {**GAME, "num_generations_eval": 2, "per_device_eval_batch_size": 2}
    trainer = make_trainer(rows, judge, policy, args, ref_model=initial, eval_dataset=rows, processing_class=tokenizer)
    metrics = trainer.evaluate()
    assert metrics["eval_win_rate"] == pytest.approx(rate)
    assert metrics["eval_win_rate_ci"] == 0
    assert trainer.model_wrapped is not trainer.ref_model


def test_the_win_rate_reads_both_policies_alike(make_trainer, chat_tokenizer, monkeypatch):
    """Where the tokenizer says what of a completion is the answer, also of the reference's."""
    pattern = {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text"}
    content = {"close_pattern": r"</s>\s*", "content": "text"}
    chat_tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<assistant>\n",
        "fields": {"reasoning_content": pattern, "content": content},
    }
    policy, reference = (
        [*chat_tokenizer(f"<think>{text}</think>b", add_special_tokens=False).input_ids, chat_tokenizer.eos_token_id]
        for text in ("because", "")
    )

    def generate(self, rows, *args, **kwargs):
        return [reference if self.model_wrapped is self.ref_model else policy] * len(rows), None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate)
    rows = Dataset.from_list([{"prompt": [user("?")]}] * 4)
    args = {"max_completion_length": 40, "log_completions": False}

    def length(completions, **kwargs):
        return [float(len(message["content"])) for (message,) in completions]

    trainer = make_trainer(rows, length, args=args, eval_dataset=rows, processing_class=chat_tokenizer)
    assert trainer.evaluate()["eval_win_rate"] == 0.5
    assert logged(trainer, "eval_completions/mean_length") == [len(policy)]


def test_each_of_several_evaluation_datasets_has_its_metrics(make_trainer):
    datasets = {name: Dataset.from_list(prompts(4)) for name in ("first", "second")}
    args = {"num_generations_eval": 4, "per_device_eval_batch_size": 16}
    metrics = make_trainer(prompts(), byte_sum, args=args, eval_dataset=datasets).evaluate()
    for name in datasets:
        assert 0 < metrics[f"eval_{name}_win_rate"] < 1
        assert f"eval_{name}_win_rate_ci" in metrics
    assert "eval_win_rate" not in metrics


def test_evaluation_is_the_mean_over_prompts(make_trainer):
    """The last batch may have fewer: transformers' mean takes the number of prompts for one of rows."""
    args = {"per_device_eval_batch_size": 6, "num_generations_eval": 3, "num_generations": 3}
    trainer = make_trainer(prompts(), byte_sum, args=args, eval_dataset=Dataset.from_list(prompts(5)))
    metrics = trainer.evaluate()
    assert len(trainer.losses) == 3
    assert metrics["eval_loss"] == pytest.approx(np.average(trainer.losses, weights=[2, 2, 1]), rel=1e-5)
    assert trainer.state.log_history[-1]["eval_loss"] == metrics["eval_loss"]


def test_a_margin_is_of_prompts_with_something_to_compare(make_trainer):
    def judge(prompts, completions, **kwargs):
        return [
            None if prompt == prompts[0] else value
            for prompt, value in zip(prompts, byte_sum(completions), strict=True)
        ]

    args = {"per_device_train_batch_size": 6}
    rows = [{key: row[key] for key in ("prompt", "completions")} for row in forced_rows(2, 3)]
    trainer = make_trainer(rows, judge, args=args)
    trainer.train()
    (batch,) = trainer.batches
    signals = batch["advantages"]  # of one prompt: the other's are left out
    assert len(signals) == 3
    assert logged(trainer, "objective/scores_margin") == [pytest.approx((signals.max() - signals.min()).item())]


def test_a_margin_of_a_prompt_whose_completions_are_in_two_steps(make_trainer):
    args = {"num_generations": 4, "per_device_train_batch_size": 2, "steps_per_generation": 2, "max_steps": 2}
    trainer = make_trainer(forced_rows(1, 4), args=args | {"logging_steps": 1})
    trainer.train()
    assert all(math.isfinite(value) for value in logged(trainer, "objective/scores_margin") if value is not None)
    trainer = make_trainer(forced_rows(1, 4), args=args | {"logging_steps": 2})
    trainer.train()
    signals = np.concatenate([batch["advantages"] for batch in trainer.batches])
    assert logged(trainer, "objective/scores_margin") == [pytest.approx(np.ptp(signals), rel=1e-5)]


def test_an_interrupted_evaluation_leaves_nothing_to_the_next(make_trainer):
    trainer = make_trainer(prompts(), byte_sum, eval_dataset=Dataset.from_list(prompts(5)))
    set_seed(0)
    expected = trainer.evaluate()
    trainer.predict(Dataset.from_list(prompts(4)))
    set_seed(0)
    found = trainer.evaluate()
    for name in ("eval_loss", "eval_win_rate", "eval_win_rate_ci"):
        assert found[name] == expected[name]


def test_continuous_batching_leaves_an_evaluation_one(make_trainer, monkeypatch):
    sample = GRPOTrainer._generate_single_turn

    def leaving_it_in_training(self, *args, **kwargs):
        found = sample(self, *args, **kwargs)
        self.model_wrapped.train()
        return found

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", leaving_it_in_training)
    trainer = make_trainer(prompts(), byte_sum, eval_dataset=Dataset.from_list(prompts(4)))
    metrics = trainer.evaluate()
    assert 0 < metrics["eval_win_rate"] < 1
    assert not trainer.model.training
    assert not trainer.ref_model.training
    trainer.train()
    assert trainer.model.training


def test_functions_are_told_how_many_completions_a_prompt_has(make_trainer):
    """Twice as many in a comparison with the reference, which one that returns matrices has to know."""

    def judge(completions, num_generations, **kwargs):
        scores = torch.tensor(byte_sum(completions)).view(-1, num_generations)
        return list(scores[:, :, None] - scores[:, None, :])

    args = {"num_generations": 3, "num_generations_eval": 4, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(prompts(), judge, args=args, eval_dataset=Dataset.from_list(prompts(3)))
    trainer.train()
    assert 0 < logged(trainer, "eval_win_rate")[0] < 1


def test_an_iteration_is_evaluated_against_its_own_reference(make_trainer):
    model = tabular_policy([0.2, 0.2, 0.6])

    def transitive(completions, **kwargs):
        return [-2.0 * MOVES.index(completion) for completion in completions]

    rows = Dataset.from_list([{"prompt": "?"}] * 8)
    args = {**GAME, "max_steps": -1, "num_train_epochs": 1, "eval_strategy": "epoch", "beta": 1.0}
    args |= {"per_device_eval_batch_size": 64, "ref_model_sync_steps": 8}
    trainer = make_trainer(rows, transitive, model, args, eval_dataset=rows, processing_class=move_tokenizer())
    trainer.train()
    (win_rate,) = logged(trainer, "eval_win_rate")
    assert win_rate > 0.6


def test_completions_are_tabulated_with_what_functions_log(make_trainer, tmp_path):
    pandas = pytest.importorskip("pandas")

    def lengths(completions, log_extra, log_metric, **kwargs):
        log_extra("length", [len(completion) for completion in completions])
        log_metric("calls", len(completions))
        return byte_sum(completions)

    rows = Dataset.from_list(prompts(4))
    args = {"log_completions": True, "steps_per_generation": 8, "num_completions_to_print": 0}
    trainer = make_trainer(prompts(), lengths, args=args, eval_dataset=rows)
    metrics = trainer.evaluate()
    assert metrics["eval_calls"] == 12  # not those of the reference, too
    (path,) = (tmp_path / "output" / "completions").glob("*.parquet")
    table = pandas.read_parquet(path)
    assert len(table) == 12
    assert [len(completion) for completion in table["completion"]] == table["length"].tolist()
    assert table["lengths"].tolist() == byte_sum(table["completion"])


# --- What was written for OnlineDPOTrainer ---------------------------------------------------------------------------


def online_dpo_settings(directory, loss_type):
    return {
        **TRAINING,
        "output_dir": str(directory),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "max_new_tokens": 8,
        "max_length": 64,
        "temperature": 0.9,
        "top_p": 1.0,
        "missing_eos_penalty": 1.0,
        "beta": [0.1],
        "loss_type": loss_type,
        "disable_dropout": True,
        "reward_weights": [1.0],
        "gradient_checkpointing": True,
    }


def online_script(config_class, trainer_class, settings, reward_funcs, peft_config):
    """As for TRL 1.16's OnlineDPOTrainer: only the classes differ."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    model, ref_model = tiny_policy(), None if peft_config else tiny_policy()
    rows = Dataset.from_list([{"prompt": [user("Q" * (1 + index % 3))]} for index in range(8)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    callback = Snapshots()
    trainer = trainer_class(
        model=model,
        ref_model=ref_model,
        reward_funcs=reward_funcs,
        args=config_class(**settings),
        data_collator=None,
        train_dataset=rows,
        eval_dataset=None,
        processing_class=tokenizer,
        reward_processing_classes=tokenizer if isinstance(reward_funcs, torch.nn.Module) else None,
        peft_config=peft_config,
        compute_metrics=None,
        callbacks=[callback],
        optimizers=(None, None) if peft_config else (optimizer, None),
        preprocess_logits_for_metrics=None,
    )
    trainer.train()
    trainer.save_model(settings["output_dir"])
    return len(callback.weights), trainer


def chat_length(prompts, completions, completion_ids, **kwargs):
    return [float(len(message["content"])) for (message,) in completions]


@pytest.mark.parametrize("classes", [(OnlineDPOConfig, OnlineDPOTrainer), (GPOConfig, GPOTrainer)], ids=["TRL", "GPO"])
@pytest.mark.parametrize(("loss_type", "reward", "adapter"), [("sigmoid", "function", False), ("ipo", "model", True)])
def test_a_script_for_online_dpo_runs_with_the_names_of_the_classes_changed(
    classes, adapter, loss_type, reward, tmp_path
):
    config = lora_config() if adapter else None
    reward_funcs = chat_length if reward == "function" else tiny_reward_model()
    steps, trainer = online_script(*classes, online_dpo_settings(tmp_path, loss_type), reward_funcs, config)
    assert steps == 2
    assert set(trainer.state.log_history[0]) >= ONLINE_DPO_METRICS


def test_the_trainer_takes_the_arguments_of_online_dpo_in_its_order():
    parameters = list(inspect.signature(GPOTrainer.__init__).parameters)
    others = [name for name in inspect.signature(OnlineDPOTrainer.__init__).parameters if name in parameters]
    assert parameters[: len(others)] == others
    missing = set(inspect.signature(OnlineDPOTrainer.__init__).parameters) - set(parameters)
    assert missing == {"data_collator", "compute_metrics", "preprocess_logits_for_metrics"}  # must be None


# --- Bad input -------------------------------------------------------------------------------------------------------


def image_processor():
    """As little of one as the trainers look at."""
    processor = ProcessorMixin.__new__(ProcessorMixin)
    processor.tokenizer = byte_tokenizer()
    return processor


def no_reward(completions, **kwargs):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"train_dataset": None}, "`train_dataset` is missing: pass"),
        ({"train_dataset": [{"text": "x"}]}, r"columns \['text'\], but no `prompt`"),
        ({"train_dataset": [{"prompt": "x", "scores": [[0.0]]}]}, "`scores` but no `completions`"),
        (
            {"train_dataset": forced_rows(2, 3), "reward_funcs": None, "args": {"remove_unused_columns": True}},
            "`remove_unused_columns` would drop",
        ),
        ({"eval_dataset": Dataset.from_list([{"text": "x"}])}, "`eval_dataset` has the columns"),
        (
            {"model": get_peft_model(tiny_policy(), lora_config()), "peft_config": lora_config()},
            "`peft_config` would be a second: leave",
        ),
        (
            {"model": get_peft_model(tiny_policy(), lora_config(), adapter_name="mine")},
            r"adapters of the policy are \['mine'\], but",
        ),
        (
            {"train_dataset": [{"prompt": "x", "completions": ["a", "b"]}]},
            r"have \[2\] completions, but `num_generations` is 3",
        ),
        ({"train_dataset": forced_rows(2, 3)}, "nothing is scored: leave out `reward_funcs`"),
        ({"reward_funcs": None}, "preference model is missing: give `reward_model_path`"),
        ({"reward_funcs": []}, "preference model is missing: give"),
        ({"args": {"reward_model_path": "gpm"}}, "preference model is given twice: give"),
        ({"reward_processing_classes": byte_tokenizer()}, "a tokenizer for no_reward, which would ignore it"),
        (
            {"model": tiny_policy(image_token_id=5), "processing_class": image_processor()},
            "has a processor of images, .* pass its tokenizer",
        ),
        ({"reward_funcs": 3}, "A reward function is a int: pass a model"),
        ({"reward_funcs": "no/such/model"}, "'no/such/model' in `reward_funcs` could not be loaded: give"),
        (
            {"reward_funcs": [no_reward, no_reward], "reward_processing_classes": [None]},
            "2 `reward_funcs` and 1 `reward_processing_classes`: give",
        ),
        *(
            ({"reward_funcs": ["no/such/model"] * 2, **others}, f"2 `reward_funcs` and {number}: give one")
            for others, number in (
                ({"reward_processing_classes": byte_tokenizer()}, "1 `reward_processing_classes`"),
                ({"reward_processing_classes": [None] * 3}, "3 `reward_processing_classes`"),
                ({"reward_processing_classes": []}, "0 `reward_processing_classes`"),
                ({"args": {"reward_weights": [1.0]}}, "1 `reward_weights`"),
                ({"args": {"reward_weights": [1.0] * 3}}, "3 `reward_weights`"),
            )
        ),
        (
            {"reward_funcs": [no_reward], "args": {"reward_weights": [1.0, 2.0]}},
            "There are 1 `reward_funcs` and 2 `reward_weights`: give",
        ),
        ({"ref_model": tiny_policy(), "peft_config": lora_config()}, "leave out `ref_model`"),
        ({"compute_metrics": len}, "`compute_metrics` would be ignored.* Leave it out"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(kwargs, message, make_trainer):
    arguments = {"train_dataset": prompts(), "reward_funcs": no_reward, "trainer_class": GPOTrainer, **kwargs}
    with pytest.raises((ValueError, TypeError), match=message):
        make_trainer(**arguments)


def test_a_reference_that_is_the_policy_is_refused(make_trainer):
    model = tiny_policy()
    with pytest.raises(ValueError, match=r"`ref_model` is the policy itself.*leave it out"):
        make_trainer(prompts(), byte_sum, model, ref_model=model)


def test_evaluation_of_broken_groups_is_refused(make_trainer):
    """Seven at a time are no whole groups of three."""
    args = {"per_device_eval_batch_size": 7, "num_generations_eval": 3}
    trainer = make_trainer(prompts(), byte_sum, args=args, eval_dataset=Dataset.from_list(prompts()))
    with pytest.raises(ValueError, match=r"7 completions are evaluated together.*`per_device_eval_batch_size`"):
        trainer.evaluate()


def test_a_policy_with_nothing_but_a_pickle_is_refused(decoder, make_trainer, tmp_path):
    directory = shutil.copytree(decoder, tmp_path / "pickled")
    (directory / "model.safetensors").unlink()
    torch.save(load_file(decoder / "model.safetensors"), directory / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        make_trainer(prompts(), byte_sum, str(directory))


def test_a_policy_in_four_bits_learns_by_its_adapter(decoder, make_trainer):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    args = {"max_steps": 2, "sync_ref_model": False}
    kwargs = {"quantization_config": config, "peft_config": LoraConfig(r=2, target_modules="all-linear")}
    trainer = make_trainer(prompts(), byte_sum, str(decoder), args, **kwargs)
    trainer.train()
    weights = dict(trainer.model.named_parameters())
    assert any(weight.dtype == torch.uint8 for weight in weights.values())
    assert max(weight.abs().max() for name, weight in weights.items() if "lora_B" in name) > 0
    first, second = logged(trainer, "objective/kl")
    assert first == pytest.approx(0, abs=1e-5) != second


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions, **kwargs: [1.0, 2.0], "returned 2 values for 3 completions: return one"),
        (lambda completions, **kwargs: None, "returned nothing: return"),
        (lambda completions, **kwargs: [0.0, math.inf, 1.0], "gave completion 1 a reward of inf: return"),
        (
            lambda completions, **kwargs: torch.zeros(1, 2, 2),
            r"shapes \[\(2, 2\)\] for the 3 completions .* return a 3 x 3 matrix",
        ),
        (lambda completions, **kwargs: torch.ones(1, 3, 3), r"not antisymmetric \(by 2\): entry"),
        (lambda completions, **kwargs: torch.full((1, 3, 3), math.nan), r"not antisymmetric \(by nan\)"),
    ],
)
def test_bad_rewards_are_refused_before_the_step(function, message, make_trainer):
    trainer = make_trainer(prompts(), function)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.losses == []


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([[0.9] * 3] * 3, "scores` has a matrix that is not antisymmetric"),
        ([[None] * 3] * 3, "give finite numbers"),
        ([math.inf, 1.0, 2.0], "give finite numbers"),
        ([[0.0, 1.0], [-1.0, 0.0]], r"shape \(2, 2\) for a prompt with 3 completions: give K rewards or K x K"),
    ],
)
def test_scores_that_are_no_log_odds_are_refused_before_the_training(scores, message, make_trainer):
    first = [0.0] * 3 if np.ndim(scores) == 1 else [[0.0] * 3] * 3
    rows = [{**row, "scores": scores if index else first} for index, row in enumerate(forced_rows(2, 3))]
    with pytest.raises(ValueError, match=message):
        make_trainer(rows)
    trainer = make_trainer(IterableDataset.from_generator(lambda: iter(rows)))  # read as the training goes on
    with pytest.raises(ValueError, match=message):
        trainer.train()


@pytest.mark.parametrize("ignored", ["reward_funcs", "reward_model_path", "eval_dataset"])
def test_what_would_score_beside_scores_is_refused(ignored, make_trainer, gpm):
    given = {"args": {"reward_model_path": str(gpm)}} if ignored == "reward_model_path" else {}
    given |= {"eval_dataset": Dataset.from_list(prompts())} if ignored == "eval_dataset" else {}
    with pytest.raises(ValueError, match=f"nothing is scored: leave out `{ignored}`"):
        make_trainer(forced_rows(2, 3), byte_sum if ignored == "reward_funcs" else None, **given)


def test_fewer_prompts_than_are_sampled_together_are_refused(make_trainer):
    args = {"generation_batch_size": 9, "per_device_train_batch_size": 3}
    with pytest.raises(ValueError, match=r"There are 2 prompts, but 3 are sampled together .* give more prompts"):
        make_trainer(prompts(2), byte_sum, args=args)


def test_tools_that_only_the_judge_reads_are_told(make_trainer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("gpm_trl.gpo.prompts"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("gpm_trl"), "propagate", True)
    make_trainer([{**row, "tools": "[]"} for row in prompts()], byte_sum)
    assert "`train_dataset` has `tools`: the judge reads them with the prompt, the policy does not" in caplog.text


def test_prompts_that_an_epoch_leaves_out_are_counted(make_trainer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("gpm_trl"), "propagate", True)
    args = {"generation_batch_size": 9, "per_device_train_batch_size": 3}
    make_trainer(prompts(7), byte_sum, args=args).train()
    assert "An epoch is of 6 of the 7 prompts, since 3 are sampled together." in caplog.text


def save_policy_adapter(decoder, directory):
    config = LoraConfig(r=2, init_lora_weights=False)
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(decoder), config)
    adapter.save_pretrained(directory)
    return adapter


def test_an_adapter_is_trained_on_by_its_directory(decoder, make_trainer, tmp_path):
    """As the object in memory is, and against the adapter as it was."""
    policy = save_policy_adapter(decoder, tmp_path / "adapter")
    rows = forced_rows(2, 3)
    trainers = [make_trainer(rows, model=model) for model in (policy, str(tmp_path / "adapter"))]
    for trainer in trainers:
        trainer.train()
    assert trainers[0].losses == trainers[1].losses
    for name in ("default", "ref"):
        assert_equal_weights(*(adapter(weights(trainer.model), name) for trainer in trainers))
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors: save it anew"):
        make_trainer(rows, model=str(tmp_path / "adapter"))


def test_an_adapter_is_trained_on_by_its_name(decoder, make_trainer, tmp_path):
    adapter = save_policy_adapter(decoder, tmp_path / "adapter")
    save_to_cache(tmp_path / "adapter", tmp_path / "cache", "user/policy", "v2")
    init_kwargs = {"cache_dir": str(tmp_path / "cache"), "revision": "v2"}
    trainer = make_trainer(forced_rows(2, 3), model="user/policy", args={"model_init_kwargs": init_kwargs})
    before = weights(trainer.model)
    lora = {name: value for name, value in before.items() if ".default." in name}
    assert_equal_weights(lora, {name: value for name, value in weights(adapter).items() if "lora" in name})
    trainer.train()
    changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
    assert changed == lora.keys()


def test_matrices_are_refused_where_groups_straddle_processes():
    judge = judges.Judges([lambda prompts, completions, **columns: torch.zeros(1, 3, 3)])
    with pytest.raises(ValueError, match=r"for the 4 completions of a process: .* a multiple of `num_gen"):
        judge.log_odds(["p"] * 4, ["a"] * 4, 3, [True] * 4, log_metric=print, log_extra=print)


def test_a_preference_model_that_gives_nan_is_refused_before_the_step(make_trainer, chat_tokenizer):
    model = tiny_model()
    next(model.parameters()).data.fill_(math.nan)
    classes = {"processing_class": chat_tokenizer, "reward_processing_classes": chat_tokenizer}
    trainer = make_trainer(CHAT_ROWS, model, **classes)
    with pytest.raises(ValueError, match="Completion 0 of rank 0"):
        trainer.train()
    assert trainer.losses == []


def test_prompts_longer_than_the_context_are_refused(make_trainer):
    long, policy = [{"prompt": "Q" * 40}], tiny_policy(max_position_embeddings=32)
    message = r"40 tokens and a completion up to 6 .* context is 32: .*`max_length=32`"
    with pytest.raises(ValueError, match=message):
        make_trainer(long, byte_sum, policy)
    with pytest.raises(ValueError, match=message):
        make_trainer(prompts(), byte_sum, policy, eval_dataset=Dataset.from_list(long))
    trainer = make_trainer(IterableDataset.from_generator(lambda: iter(long)), byte_sum, policy)
    with pytest.raises(ValueError, match=message):  # of a stream, when it is drawn
        trainer.train()
    assert trainer.losses == []


@pytest.mark.parametrize(
    ("row", "counts"),
    [
        ({"completions": ["a", "b"]}, r"\{'completions': 2\}"),
        ({"completions": ["a"] * 3, "completion_ids": [[5, 2]]}, r"\{'completions': 3, 'completion_ids': 1\}"),
    ],
)
def test_a_stream_with_another_number_of_completions_is_refused(row, counts, make_trainer):
    rows = IterableDataset.from_generator(lambda: iter([{"prompt": "p", **row}]))
    trainer = make_trainer(rows, byte_sum)
    with pytest.raises(ValueError, match=f"has {counts}, but `num_generations` is 3: make"):
        trainer.train()


def test_max_length_cuts_prompts_from_the_left(make_trainer):
    trainer = make_trainer([{"prompt": "abcdefgh"}], byte_sum, args={"max_length": 9})
    trainer.train()
    assert byte_tokenizer().decode(trainer.batches[0]["prompt_ids"][0]) == "fgh"


def test_a_prompt_that_is_cut_keeps_its_bos(make_trainer):
    class WithBos(GPOTrainer):
        def _generate(self, prompts, *args, **kwargs):
            seen.append(self._tokenize_prompts(prompts)[0][0])
            return super()._generate(prompts, *args, **kwargs)

    seen, tokenizer = [], byte_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    rows = [{"prompt": [{"role": "user", "content": "abcdefgh"}]}] * 8
    make_trainer(
        rows,
        lambda completions, **kwargs: [0.0] * len(completions),
        args={"max_length": 9},
        processing_class=tokenizer,
        trainer_class=WithBos,
    ).train()
    assert tokenizer.decode(seen[0]) == tokenizer.bos_token + "gh"


def test_the_evaluation_loss_is_the_mean_over_prompts_with_another_number_of_completions(make_trainer):
    """Nothing is trained and the policy is the reference: the loss of a prompt is the mean of (s / beta)^2."""
    rows = Dataset.from_list(prompts(4))
    args = {"num_generations_eval": 4, "per_device_eval_batch_size": 8}
    trainer = make_trainer(prompts(), byte_sum, args=args, eval_dataset=rows)
    trainer.evaluate()
    expected = [(batch["advantages"] / 0.5).square().mean().item() for batch in trainer.batches]
    assert trainer.losses == pytest.approx(expected, rel=1e-4)
    assert all(loss > 0 for loss in trainer.losses)


# --- Numbers that are not finite -------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_ends_the_run_before_it_is_saved(make_trainer, tmp_path):
    class Spoiled(Recorded):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs) * (math.nan if self.state.global_step == 2 else 1)

    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "logging_steps": 100}
    trainer = make_trainer(forced_rows(4, 3), args=saving, trainer_class=Spoiled)
    with pytest.raises(FloatingPointError, match="not finite at step 3"):
        trainer.train()
    assert [path.name for path in (tmp_path / "output").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_policy_that_is_not_finite_is_told_before_it_samples(make_trainer):
    """Sampling itself would fail, in words of its own; at the beginning, or before the first log."""
    policy = tiny_policy()
    policy.model.norm.weight.data[3] = math.nan
    for model, args in ((policy, {}), (tiny_policy(), {"learning_rate": 1e30, "logging_steps": 100})):
        with pytest.raises(FloatingPointError, match=r"not finite at step \d"):
            make_trainer(prompts(), byte_sum, model, args={"max_steps": 3, **args}).train()
