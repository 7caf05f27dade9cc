"""GPMTrainer: its loss and metrics against references, and what a user does with it."""

import copy
import dataclasses
import math
import re
import shutil
from pathlib import Path
from statistics import fmean as mean
from unittest.mock import Mock

import pytest
import torch
from accelerate.data_loader import DataLoaderDispatcher
from conftest import BACKBONES, CHAT_TEMPLATE, assistant, byte_tokenizer, tiny_model, user
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging
from trl import RewardConfig, RewardTrainer

from gpm_trl import GPMConfig, GPMForPreference, GPMModelConfig, GPMOutput, GPMTrainer, PreferenceScorer
from gpm_trl.saving import whole_checkpoints

METRICS = {
    *("loss", "accuracy", "tie_rate", "probability", "margin", "abs_score"),
    *("embedding_norm", "gate_entropy", "num_tokens"),
}
QUICK = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "learning_rate": 1e-3,
}
# Scaled gradients show in the weights of SGD, not in those of Adam.
BRADLEY_TERRY = {"embedding_dim": 0, "reward_dim": 1}
SGD = {"optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0.0}

PAIRS = [
    {"prompt": f"Question {index}?", "chosen": " yes" * (1 + index % 3), "rejected": " no" * (1 + index % 2)}
    for index in range(8)
]
# Groups of 3, 1, 2 and 6 comparisons.
K_WAY = [
    {"prompt": "Red?", "responses": ["r", "gg", "bbb"], "comparisons": [[0, 1], [1, 2], [2, 0]]},
    {"prompt": "A pet?", "responses": ["cat", "dog"], "comparisons": [[1, 0, 0.75]]},
    {"prompt": "Where to?", "responses": ["Rome", "Ur", "Nice"], "comparisons": [[0, 1, 0.0], [0, 2, 0.5]]},
    {
        "prompt": "A letter",
        "responses": ["w", "x", "y", "z"],
        "comparisons": [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [3, 2]],
    },
]


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_model_knows_whether_it_is_trained_on_messages(make_trainer, chat_tokenizer, is_chat, caplog, tmp_path):
    logging.get_logger("gpm_trl").warning_once.cache_clear()
    prompts = ["q", [user("q")]]
    row = {"prompt": prompts[is_chat], "chosen": "a", "rejected": "b"}
    trainer = make_trainer(tiny_model(), [row], processing_class=chat_tokenizer)
    trainer.save_model()
    assert GPMModelConfig.from_pretrained(tmp_path / "output").renderer["conversational"] is is_chat
    PreferenceScorer(trainer.model, chat_tokenizer).rank(prompts[not is_chat], ["a", "b"])
    assert f"is trained on {'messages' if is_chat else 'plain text'}, but gets" in caplog.text


def test_columns_are_mapped(make_trainer):
    rows = [{"query": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in PAIRS[:2]]
    mapping = {"prompt": "query", "chosen": "good", "rejected": "bad"}
    trainer = make_trainer(tiny_model(), rows, {"column_mapping": mapping}, eval_dataset=Dataset.from_list(rows[:1]))
    plain = [{name: row[name] for name in mapping} for row in PAIRS[:2]]
    assert list(trainer.train_dataset) == list(make_trainer(tiny_model(), plain).train_dataset)
    with pytest.raises(ValueError, match="`query` may be a part of the prompt"):
        make_trainer("a model that is not there", [{**row, "query": "p"} for row in PAIRS])


@pytest.fixture
def pairs():
    return Dataset.from_list(PAIRS)


@pytest.fixture
def make_trainer(tmp_path, tokenizer):
    """A trainer of a few quick steps: `args` are fields of its config, the rest goes to the trainer."""

    def make(model, train_dataset, args=None, **kwargs):
        settings = {"output_dir": str(tmp_path / "output"), **QUICK, **(args or {})}
        if not isinstance(model, str):
            kwargs.setdefault("processing_class", tokenizer)
        if isinstance(train_dataset, list):
            train_dataset = Dataset.from_list(train_dataset)
        return GPMTrainer(model, GPMConfig(**settings), train_dataset, **kwargs)

    return make


def with_lm_head(decoder):
    set_seed(0)
    return GPMForPreference.from_pretrained(decoder, embedding_dim=4, use_lm_head=True)


def loss_of_all(trainer):
    """The loss of one batch that holds all rows of a trainer whose batch is as large."""
    return trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.state_dict().items()}


def assert_equal_weights(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# --- The class and its configuration ---------------------------------------------------------------------------------


def test_changed_defaults_are_the_papers_and_documented_as_are_the_new_fields():
    parents = {field.name: field.default for field in dataclasses.fields(RewardConfig)}
    changed = {"learning_rate": 2e-6, "lr_scheduler_type": "cosine", "warmup_steps": 0.03}
    changed |= {"num_train_epochs": 2.0, "max_length": 2048}
    for field in dataclasses.fields(GPMConfig):
        if field.name not in parents:
            assert re.search(rf"\n        ([a-z_]+, )?{field.name}( \(`|, [a-z_]+:|:)", GPMConfig.__doc__)
            assert field.metadata["help"]
        else:
            assert field.default == changed.get(field.name, parents[field.name]), field.name
            assert (f"> - `{field.name}`: Defaults to" in GPMConfig.__doc__) == (field.name in {*changed, "bf16"})
    assert GPMConfig("x", use_cpu=True).bf16 is False  # where the device lacks it


@pytest.mark.parametrize(
    "setting",
    [
        *("loss_type=hinge", "sft_loss_coef=1.0", "sft_loss_coef=-0.1", "center_rewards_coefficient=0.01"),
        *("label_smoothing_factor=0.1", "shared_prefix=always"),
    ],
)
def test_config_refuses(setting):
    name, value = setting.split("=")
    with pytest.raises(ValueError, match=f"`{name}` is"):
        GPMConfig("x", use_cpu=True, **{name: float(value) if "0" in value else value})


# --- The loss, against a reference in float64 ------------------------------------------------------------------------


class Reference:
    """Losses by the formulas of the paper, in float64, one unpadded row at a time."""

    def __init__(self, model, tokenizer):
        self.model = copy.deepcopy(model).double()
        self.tokenizer = tokenizer

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def hidden(self, prompt, response):
        ids = self.ids(prompt) + self.ids(response) + [self.tokenizer.eos_token_id]
        return torch.tensor(ids), self.model.model(torch.tensor([ids])).last_hidden_state[0]

    def embedding(self, prompt, response):
        vector = self.model.embedding_head.weight @ self.hidden(prompt, response)[1][-1]
        return vector / vector.norm()

    def score(self, prompt, first, second):
        """v_i^T D R^T D v_j"""
        v_i, v_j = self.embedding(prompt, first), self.embedding(prompt, second)
        gate = self.model.scale_gate.weight @ self.hidden(prompt, first)[1][len(self.ids(prompt)) - 1]
        operator = torch.block_diag(*[torch.tensor([[0.0, -1.0], [1.0, 0.0]])] * len(gate)).double()
        scaling = torch.diag(gate.softmax(-1).sqrt().repeat_interleave(2))
        return v_i @ scaling @ operator.T @ scaling @ v_j

    def log_odds(self, row):
        return (self.score(row["prompt"], row["chosen"], row["rejected"]) - row.get("margin", 0)) / 0.1

    def cross_entropy(self, row):
        z = self.log_odds(row)
        p = row.get("label", 1)
        return -(p * torch.log(torch.sigmoid(z)) + (1 - p) * torch.log(torch.sigmoid(-z)))

    def regression(self, row):
        return (self.log_odds(row) - row["score"]) ** 2

    def negative_log_likelihood(self, row):
        preferred = row["chosen"] if row.get("label", 1) >= 0.5 else row["rejected"]
        ids, hidden = self.hidden(row["prompt"], preferred)
        log_probabilities = (hidden @ self.model.lm_head.weight.T).log_softmax(-1)
        start = len(self.ids(row["prompt"]))
        return -torch.stack([log_probabilities[t - 1, ids[t]] for t in range(start, len(ids))]).mean()


SOFT = [{**row, "label": label} for row, label in zip(PAIRS, (1.0, 0.0, 0.5, 0.3, 0.9, 0.75, 0.1, 1.0), strict=True)]
MARGINS = [{**row, "margin": 0.05 * index} for index, row in enumerate(SOFT)]
SCORES = [{**row, "score": (index - 3) / 2, "margin": 0.02 * index} for index, row in enumerate(PAIRS)]
CROSS_ENTROPY = {"loss_type": "cross_entropy"}
REGRESSION = {"loss_type": "regression"}
WITH_SFT = {"sft_loss_coef": 0.25}
LOSSES = pytest.mark.parametrize(
    ("rows", "args"),
    [(PAIRS, CROSS_ENTROPY), (SOFT, CROSS_ENTROPY), (MARGINS, CROSS_ENTROPY), (SCORES, REGRESSION), (SOFT, WITH_SFT)],
    ids=["hard", "soft", "margin", "regression", "sft"],
)


def reference_loss(reference, rows, args):
    method = reference.regression if args.get("loss_type") == "regression" else reference.cross_entropy
    loss = sum(method(row) for row in rows) / len(rows)
    c = args.get("sft_loss_coef", 0)
    return (1 - c) * loss + c * sum(reference.negative_log_likelihood(row) for row in rows) / len(rows) if c else loss


@LOSSES
def test_loss_and_gradients_are_the_references(make_trainer, decoder, tokenizer, rows, args):
    model = with_lm_head(decoder)
    trainer = make_trainer(model, rows, {"per_device_train_batch_size": 8, **args})
    reference = Reference(model, tokenizer)
    expected = reference_loss(reference, rows, args)
    expected.backward()
    loss = loss_of_all(trainer)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, parameter), other in zip(model.named_parameters(), reference.model.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if other.grad is not None:
            error = (parameter.grad - other.grad).norm() / other.grad.norm()
            assert error < 1e-4, name


@pytest.mark.parametrize("settings", [{"shared_prefix": True, "group_by_prompt": True}, {"shared_prefix": False}])
def test_a_bradley_terry_model_is_trained_as_by_the_reward_trainer(
    make_trainer, decoder, tokenizer, tmp_path, settings
):
    """Loss, gradients (a step of SGD) and accuracy, with margins; then the saved model, against the rewards."""
    rows = [{**row, "margin": 0.2 * index} for index, row in enumerate(PAIRS)]
    batch = {**SGD, "max_steps": 1, "per_device_train_batch_size": 8}
    trainer = make_trainer(str(decoder), rows, {**batch, **settings, **BRADLEY_TERRY})
    config = trainer.model.config
    assert (config.kind, config.temperature, config.use_scale_gate) == ("Bradley-Terry model", 1.0, False)
    with torch.no_grad():
        trainer.model.embedding_head.weight.mul_(10)
    reward_model = AutoModelForSequenceClassification.from_pretrained(decoder, num_labels=1)
    reward_model.score.weight.data.copy_(trainer.model.embedding_head.weight)
    expected = RewardTrainer(
        reward_model,
        RewardConfig(str(tmp_path / "reward"), **{**QUICK, **batch, "bf16": False}),
        train_dataset=Dataset.from_list(rows),
        processing_class=copy.deepcopy(tokenizer),
    )
    before = weights(trainer.model)
    for each in (expected, trainer):
        each.train()
    for name in ("loss", "accuracy", "grad_norm"):
        assert logged(trainer, name) == pytest.approx(logged(expected, name), rel=1e-5)
    after = {name.replace("score.", "embedding_head."): weight for name, weight in weights(expected.model).items()}
    moved = {name: weight - before[name] for name, weight in weights(trainer.model).items()}
    assert min(moved[name].norm() for name in ("embedding_head.weight", "model.embed_tokens.weight")) > 0
    assert_equal_weights(moved, {name: after[name] - before[name] for name in before}, rtol=1e-3, atol=1e-7)

    trainer.save_model(tmp_path / "bt")
    scorer = PreferenceScorer.from_pretrained(tmp_path / "bt", device="cpu")
    ids = [[*tokenizer("Red?" + text, add_special_tokens=False).input_ids, 2] for text in ("r", "gg")]
    with torch.no_grad():
        first, second = (expected.model(torch.tensor([row])).logits.item() for row in ids)
    assert scorer.rank("Red?", ["r", "gg"]).scores[0, 1].item() == pytest.approx(first - second, abs=1e-6)
    with pytest.raises(ValueError, match=r"of another shape: .* Leave out `embedding_dim` or `reward_dim`"):
        make_trainer(str(tmp_path / "bt"), rows, {"embedding_dim": 4})


def test_a_missing_dataset_is_told_before_a_model_is_read(tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        GPMTrainer("no/such-model", GPMConfig(str(tmp_path), use_cpu=True, bf16=False))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**BRADLEY_TERRY, "reward_dim": 3, "use_scale_gate": False}, "Several rewards add up to one"),
        ({**BRADLEY_TERRY, "normalize_embeddings": True}, "has no cyclic blocks for `normalize_embeddings`"),
        ({**BRADLEY_TERRY, "gate_activation": "softplus"}, "'softplus', but there is no gate: leave it out"),
        ({"reward_clip": 1.0}, "`reward_clip` and `reward_weight` need `reward_dim=1`"),
        ({"use_scale_gate": False, "gate_activation": "softmax"}, "'softmax', but there is no gate: leave it out"),
        ({"embedding_dim": 5}, "`embedding_dim` is 5; 2k must be an even number"),
        ({"temperature": -1.0}, "`temperature` is -1.0; it must be positive"),
    ],
)
def test_settings_of_a_model_that_do_not_go_together_are_refused_before_one_is_loaded(settings, message):
    with pytest.raises(ValueError, match=message):
        GPMConfig("x", use_cpu=True, **settings)


def test_loss_of_k_way_rows_is_the_mean_over_comparisons_with_their_margins(make_trainer, tokenizer):
    model = tiny_model()
    margins = [[0.1, 0.0, -0.2], [0.3], [0.0, 0.1], [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]]
    rows = [{**row, "margin": own} for row, own in zip(K_WAY, margins, strict=True)]
    comparisons = [
        {
            "prompt": row["prompt"],
            "chosen": row["responses"][i],
            "rejected": row["responses"][j],
            "label": (*label, 1)[0],
            "margin": margin,
        }
        for row in rows
        for (i, j, *label), margin in zip(row["comparisons"], row["margin"], strict=True)
    ]
    expected = reference_loss(Reference(model, tokenizer), comparisons, {})
    assert loss_of_all(make_trainer(model, rows)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_grouping_by_prompt_embeds_each_response_once_and_leaves_the_loss(make_trainer, letters):
    apart = make_trainer(tiny_model(), letters, {"per_device_train_batch_size": 24})
    settings = {"per_device_train_batch_size": 6, "group_by_prompt": True, "shared_prefix": False}
    together = make_trainer(tiny_model(), letters, settings)
    assert (len(apart.train_dataset), len(together.train_dataset)) == (24, 6)
    assert next(iter(together.get_train_dataloader()))["input_ids"].shape[0] == 24
    assert loss_of_all(together).item() == pytest.approx(loss_of_all(apart).item(), rel=1e-6)


# --- Gradient accumulation -------------------------------------------------------------------------------------------


def train_accumulating(make_trainer, model, rows, batch_size, args=None, **kwargs):
    """One epoch in steps of four rows."""
    settings = {"max_steps": -1, "num_train_epochs": 1, **SGD, **(args or {})}
    settings |= {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 4 // batch_size}
    trainer = make_trainer(model, rows, settings, **kwargs)
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    return after, logged(trainer, "loss")


@pytest.mark.parametrize(
    ("rows", "args", "peft_config"),
    [(K_WAY, {}, None), (SOFT, WITH_SFT, LoraConfig(r=2)), (PAIRS[:6], {}, None)],
    ids=["k-way", "sft of an adapter", "a last step of fewer batches"],
)
def test_accumulation_is_exact(make_trainer, decoder, rows, args, peft_config):
    runs = []
    for size in (4, 1, 2):
        model = with_lm_head(decoder) if args else tiny_model()
        runs.append(train_accumulating(make_trainer, model, rows, size, args, peft_config=peft_config))
    (expected, expected_losses), *others = runs
    for actual, losses in others:
        assert_equal_weights(actual, expected, rtol=0, atol=1e-6)
        assert losses[0] == pytest.approx(expected_losses[0], rel=1e-5)
    if rows is K_WAY:
        assert expected_losses[0] == pytest.approx(loss_of_all(make_trainer(tiny_model(), K_WAY)).item(), rel=1e-5)


# --- Metrics ---------------------------------------------------------------------------------------------------------

# Letters of responses -> embedding and its norm before normalisation; "a" and "A" tie. Of prompts -> gate.
EMBEDDINGS = {"a": (1, 0, 1, 0), "A": (1, 0, 1, 0), "b": (0, 1, 1, 0), "c": (0.6, 0.8, 0, 1)}
NORMS = {"a": 1, "A": 2, "b": 3, "c": 5}
GATES = {"x": (0.25, 0.75), "y": (0.5, 0.5), "z": (1.0, 0.0)}
# (prompt, first, second, label)
COMPARISONS = [
    ("x", "a", "b", 1.0),
    ("x", "b", "a", 0.9),
    ("x", "a", "c", 0.2),
    ("x", "a", "A", 1.0),
    ("y", "c", "b", 0.1),
    ("y", "b", "c", 0.5),
    ("z", "c", "a", 0.0),
]


class LettersModel(GPMForPreference):
    """Embeds a response by its first letter and gates by the prompt's, so that all scores are known."""

    def __init__(self, config):
        super().__init__(config)
        self.letters = byte_tokenizer().convert_ids_to_tokens(range(259))

    def forward(self, input_ids, shared_prefix_layout, **kwargs):
        responses = [self.letters[input_ids[0, index - 1]] for index in shared_prefix_layout.last_tokens]
        prompts = [self.letters[input_ids[0, index]] for index in shared_prefix_layout.prompt_ends]
        nothing = 0 * self.embedding_head.weight.sum()
        gates = torch.tensor([GATES[letter] if self.config.use_scale_gate else (1.0, 1.0) for letter in prompts])
        return GPMOutput(
            embeddings=torch.tensor([EMBEDDINGS[letter] for letter in responses]) + nothing,
            scales=gates + nothing,
            gate=gates if self.config.use_scale_gate else None,
            temperature=torch.tensor(self.config.temperature),
            embedding_norms=torch.tensor([float(NORMS[letter]) for letter in responses]),
        )


def letters_model(**settings):
    return LettersModel(GPMModelConfig(text_config=copy.deepcopy(BACKBONES["qwen3"]), embedding_dim=4, **settings))


def known_score(prompt, first, second, gated=True):
    v, w, gate = EMBEDDINGS[first], EMBEDDINGS[second], GATES[prompt] if gated else (1.0, 1.0)
    return sum(gate[block] * (v[2 * block] * w[2 * block + 1] - v[2 * block + 1] * w[2 * block]) for block in (0, 1))


def known_metrics(comparisons):
    """By their definitions, for one group a comparison."""
    scores = [known_score(*comparison[:3]) for comparison in comparisons]
    labels = [label for *_, label in comparisons]
    probabilities = [1 / (1 + math.exp(-score / 0.1)) for score in scores]
    return {
        "loss": mean(
            -(p * math.log(q) + (1 - p) * math.log(1 - q)) for p, q in zip(labels, probabilities, strict=True)
        ),
        "accuracy": mean(
            score > 0 if label > 0.5 else score < 0
            for score, label in zip(scores, labels, strict=True)
            if label != 0.5
        ),
        "tie_rate": mean(score == 0 for score in scores),
        "probability": mean(probabilities),
        "margin": mean(score / 0.1 for score in scores),
        "abs_score": mean(abs(score) for score in scores),
        "embedding_norm": mean(NORMS[letter] for comparison in comparisons for letter in comparison[1:3]),
        "gate_entropy": mean(sum(-g * math.log(g) for g in GATES[prompt] if g) for prompt, *_ in comparisons),
    }


def known_rows(comparisons):
    names = ("prompt", "chosen", "rejected", "label")
    return Dataset.from_list([dict(zip(names, comparison, strict=True)) for comparison in comparisons])


def k_way_rows(comparisons):
    rows = []
    for prompt in dict.fromkeys(prompt for prompt, *_ in comparisons):
        mine = [comparison[1:] for comparison in comparisons if comparison[0] == prompt]
        responses = sorted({letter for first, second, _ in mine for letter in (first, second)})
        pairs = [[responses.index(first), responses.index(second), label] for first, second, label in mine]
        rows.append({"prompt": prompt, "responses": responses, "comparisons": pairs})
    return Dataset.from_list(rows)


def without_prefix(metrics, prefix="eval_"):
    return {
        name.removeprefix(prefix): value for name, value in metrics.items() if name.removeprefix(prefix) in METRICS
    }


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("kind", ["pairs", "k-way", "stream"])
def test_eval_metrics_are_means_over_comparisons(make_trainer, batch_size, kind):
    """The gate's of groups and the norm's of responses: a K-way group has more comparisons of one gate."""
    rows = known_rows(COMPARISONS) if kind == "pairs" else k_way_rows(COMPARISONS)
    eval_dataset = rows.to_iterable_dataset() if kind == "stream" else rows
    args = {"per_device_eval_batch_size": batch_size}
    trainer = make_trainer(letters_model(), rows, args, eval_dataset=eval_dataset)
    expected = {**known_metrics(COMPARISONS), "num_tokens": 0}
    if kind != "pairs":
        expected["embedding_norm"] = mean(NORMS[letter] for row in rows for letter in row["responses"])
        expected["gate_entropy"] = mean(sum(-g * math.log(g) for g in gate if g) for gate in GATES.values())
    assert without_prefix(trainer.evaluate()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_train_metrics_are_those_of_evaluation(make_trainer, accumulation):
    args = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 2, "logging_strategy": "epoch"}
    args |= {"gradient_accumulation_steps": accumulation}
    trainer = make_trainer(letters_model(), known_rows(COMPARISONS), args)
    trainer.train()
    tokens_a_row = 3  # letter of the prompt, letter of the response, EOS
    expected = {**known_metrics(COMPARISONS), "num_tokens": tokens_a_row * 2 * len(COMPARISONS)}
    metrics = without_prefix(trainer.state.log_history[0])
    metrics["loss"] = expected["loss"]  # the Trainer's, a mean over steps
    assert metrics == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shared_prefix", [True, False], ids=["packed", "padded"])
def test_tokens_are_counted_without_padding(make_trainer, pairs, shared_prefix):
    args = {"per_device_train_batch_size": 8, "shared_prefix": shared_prefix}
    trainer = make_trainer(tiny_model(), pairs, args)
    lengths = [len(row["prompt_ids"]) + len(ids) for row in trainer.train_dataset for ids in row["response_ids"]]
    assert len(set(lengths)) > 1
    trainer.train()
    assert logged(trainer, "num_tokens")[:2] == [sum(lengths), 2 * sum(lengths)]


def test_train_metrics_start_afresh_with_each_log_and_not_with_an_evaluation(make_trainer):
    args = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 2, "per_device_train_batch_size": 1}
    rows = known_rows([*COMPARISONS[:2], COMPARISONS[2], COMPARISONS[2]])
    args |= {"max_steps": 4, "train_sampling_strategy": "sequential"}
    trainer = make_trainer(letters_model(), rows, args, eval_dataset=known_rows(COMPARISONS[2:3]))
    trainer.train()
    assert logged(trainer, "margin") == pytest.approx([0.0, 9.5])
    assert logged(trainer, "num_tokens")[:2] == [12, 24]
    assert logged(trainer, "eval_margin") == pytest.approx([9.5] * 4)
    assert logged(trainer, "eval_num_tokens") == [6, 12, 18, 24]


def test_what_does_not_exist_has_no_metric(make_trainer):
    trainer = make_trainer(letters_model(use_scale_gate=False), known_rows(COMPARISONS))
    metrics = without_prefix(trainer.evaluate(known_rows(COMPARISONS)))
    assert set(metrics) == METRICS - {"gate_entropy"}
    scores = [known_score(*comparison[:3], gated=False) for comparison in COMPARISONS]
    assert metrics["abs_score"] == pytest.approx(mean(map(abs, scores)))
    undecided = trainer.evaluate(known_rows([("x", "a", "b", 0.5)]), metric_key_prefix="test")
    assert not any(name.startswith("eval_") for name in undecided)
    undecided = without_prefix(undecided, "test_")
    assert set(undecided) == METRICS - {"gate_entropy", "accuracy"}
    assert undecided["probability"] > 0.5


def test_accuracy_of_regression_compares_signs(make_trainer):
    rows = [{**row, "score": score} for row, score in zip(known_rows(COMPARISONS[:3]), (2.0, 0.25, -1.0), strict=True)]
    trainer = make_trainer(letters_model(), rows, {"loss_type": "regression"}, eval_dataset=Dataset.from_list(rows))
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("metric", "peft_config"),
    [("margin", None), ("swapped_probability", None), ("loss", LoraConfig(r=2))],
)
def test_the_best_checkpoint_is_found_by_a_metric(make_trainer, pairs, metric, peft_config):
    swapped = pairs.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    args = {"metric_for_best_model": metric, "load_best_model_at_end": True, "max_steps": 2}
    args |= {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    eval_dataset = {"swapped": swapped} if metric.startswith("swapped") else swapped
    trainer = make_trainer(tiny_model(), pairs, args, eval_dataset=eval_dataset, peft_config=peft_config)
    trainer.train()
    assert trainer.state.best_metric == logged(trainer, f"eval_{metric}")[0]
    assert trainer.state.best_global_step == 1
    directory = trainer.state.best_model_checkpoint
    best = PeftModel.from_pretrained(tiny_model(), directory) if peft_config else AutoModel.from_pretrained(directory)
    assert_equal_weights(weights(trainer.model), weights(best))


def test_compute_metrics_gets_log_odds_and_targets(make_trainer):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"largest": prediction.predictions.max().item()}

    rows = k_way_rows(COMPARISONS)
    args = {"per_device_eval_batch_size": 2}
    trainer = make_trainer(letters_model(), rows, args, eval_dataset=rows, compute_metrics=compute_metrics)
    metrics = trainer.evaluate()
    (prediction,) = seen
    log_odds = [[2.5, -2.5, 9.5, 0], [-2, 2, -100, -100], [-8, -100, -100, -100]]
    labels = [[1, 0.9, 0.2, 1], [0.1, 0.5, -100, -100], [0, -100, -100, -100]]
    torch.testing.assert_close(torch.tensor(prediction.predictions), torch.tensor(log_odds))
    torch.testing.assert_close(torch.tensor(prediction.label_ids), torch.tensor(labels))
    assert metrics["eval_largest"] == pytest.approx(9.5)
    assert metrics["eval_accuracy"] == 3 / 6  # hits, misses, a tie and an undecided comparison


# --- What is trained is what is used ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "learned"), [("plain", False), ("chat", True)])
def test_the_saved_model_is_and_scores_as_the_trained_one(make_trainer, decoder, tmp_path, kind, learned):
    rows = PAIRS
    if kind == "chat":
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        rows = [{name: [{"role": roles[name], "content": row[name]}] for name in roles} for row in PAIRS]
    args = {"learning_rate": 1e-2, "learn_temperature": learned, "temperature": 0.3, "long_rows": "truncate_prompt"}
    args["max_length"] = None if learned else 77
    trainer = make_trainer(str(decoder), rows, args)
    assert trainer.model.temperature.item() == pytest.approx(0.3)
    trainer.train()
    assert (abs(trainer.model.temperature.item() - 0.3) > 1e-3) == learned
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoModel.from_pretrained(tmp_path / "saved")
    assert_equal_weights(weights(saved), weights(trainer.model))
    max_length = args["max_length"] or 512  # the backbone's context
    renderer = {"max_length": max_length, "long_rows": "truncate_prompt", "conversational": kind == "chat"}
    assert saved.config.renderer == renderer
    with torch.no_grad():
        batch = trainer.data_collator(list(trainer.train_dataset))
        _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    # As a user gets them, from the saved directory alone.
    scorer = PreferenceScorer.from_pretrained(tmp_path / "saved")
    actual = scorer.score(*([row[name] for row in rows] for name in ("prompt", "chosen", "rejected")))
    actual = actual / scorer.temperature
    assert actual.abs().max() > 0.1
    torch.testing.assert_close(actual, outputs["log_odds"][:, 0], rtol=1e-5, atol=1e-5)


def test_bf16_keeps_the_heads_in_float32(make_trainer, pairs):
    trainer = make_trainer(tiny_model(learn_temperature=True), pairs, {"bf16": True}, eval_dataset=pairs)
    before = weights(trainer.model)
    trainer.train()
    for name, weight in weights(trainer.model).items():
        if not name.startswith("model."):
            assert weight.dtype == torch.float32
            assert not torch.equal(weight, before[name]), name
    assert math.isfinite(trainer.evaluate()["eval_loss"])


# --- The model and its settings --------------------------------------------------------------------------------------


def test_the_seed_draws_the_heads(make_trainer, decoder, pairs):
    first, same, other = (make_trainer(str(decoder), pairs, {"seed": seed}).model for seed in (7, 7, 8))
    assert_equal_weights(weights(first), weights(same))
    for head in ("embedding_head", "scale_gate"):
        assert not torch.equal(getattr(first, head).weight, getattr(other, head).weight)


@pytest.mark.parametrize("settings", [{}, {"embedding_dim": 8, "temperature": 0.5, "use_scale_gate": False}])
def test_a_causal_lm_keeps_its_backbone_and_gets_the_heads_asked_for(make_trainer, decoder, pairs, settings):
    model = make_trainer(str(decoder), pairs, settings).model
    assert_equal_weights(weights(model.model), weights(AutoModelForCausalLM.from_pretrained(decoder).model))
    papers = {"embedding_dim": 6, "use_scale_gate": True, "gate_activation": "softmax", "temperature": 0.1}
    papers |= {"normalize_embeddings": True, "learn_temperature": False, "use_lm_head": False}
    assert {name: getattr(model.config, name) for name in papers} == papers | settings
    assert model.embedding_head.weight.shape == (model.config.embedding_dim, 32)


def test_a_preference_model_by_name_keeps_its_heads_and_refuses_others(make_trainer, chat_tokenizer, pairs, tmp_path):
    expected = tiny_model(seed=3, embedding_dim=8, learn_temperature=True)
    expected.save_pretrained(tmp_path / "gpm")
    chat_tokenizer.save_pretrained(tmp_path / "gpm")
    trainer = make_trainer(str(tmp_path / "gpm"), pairs)
    assert_equal_weights(weights(trainer.model), weights(expected))
    with pytest.raises(ValueError, match="embedding_dim"):
        make_trainer(str(tmp_path / "gpm"), pairs, {"embedding_dim": 4})


def test_rows_longer_than_the_context_are_not_trained_on(make_trainer, decoder, pairs, caplog):
    long = {"prompt": "long " * 110, "chosen": "yes", "rejected": "no"}
    trainer = make_trainer(str(decoder), [*pairs, long], {"max_length": 2048})
    assert len(trainer.train_dataset) == len(pairs)
    assert trainer.model.config.renderer["max_length"] == 512


def test_the_tokenizer_comes_from_where_the_model_does(make_trainer, decoder, pairs, tmp_path):
    shutil.copytree(decoder, tmp_path / "models" / "inner")
    args = {"model_init_kwargs": {"subfolder": "inner"}}
    trainer = make_trainer(str(tmp_path / "models"), pairs, args, processing_class=None)
    assert trainer.processing_class.chat_template == CHAT_TEMPLATE


def test_model_init_kwargs_reach_the_model_and_stay_in_the_arguments(make_trainer, decoder, pairs):
    kwargs = {"dtype": "bfloat16", "attn_implementation": "eager", "revision": "v1"}
    trainer = make_trainer(str(decoder), pairs, {"model_init_kwargs": kwargs}, peft_config=LoraConfig(r=2))
    model = trainer.model.get_base_model()
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert {weight.dtype for weight in model.embedding_head.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "eager"
    assert trainer.model.peft_config["default"].revision == "v1"
    assert trainer.args.model_init_kwargs == kwargs
    with pytest.raises(ValueError, match="fit no layout"):
        GPMTrainer(str(decoder), trainer.args, Dataset.from_list([{"text": "x"}]))
    assert trainer.args.model_init_kwargs == kwargs


def test_default_arguments_name_the_output_after_the_model(decoder, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = GPMTrainer(str(decoder), train_dataset=pairs)
    assert trainer.args.output_dir == f"{decoder.name}-GPM"
    assert isinstance(trainer.args, GPMConfig)


@pytest.mark.parametrize("settings", [{"embedding_dim": 6}, {"use_scale_gate": False}, {"sft_loss_coef": 0.1}])
def test_settings_that_contradict_an_instance_raise(make_trainer, pairs, settings):
    model = tiny_model()
    agreeing = {"embedding_dim": 4, "use_scale_gate": True, "temperature": 0.1}
    assert make_trainer(model, pairs, agreeing).model is model
    with pytest.raises(ValueError, match=next(iter(settings))):
        make_trainer(model, pairs, settings)


def test_a_language_model_head_that_no_loss_reads_is_left_as_it_is(make_trainer, pairs):
    model = tiny_model(use_lm_head=True)
    make_trainer(model, pairs)
    assert not model.lm_head.weight.requires_grad
    model = tiny_model(use_lm_head=True)
    make_trainer(model, pairs, {"sft_loss_coef": 0.1})
    assert model.lm_head.weight.requires_grad


def test_a_tokenizer_gets_its_eos_from_the_arguments(make_trainer, pairs):
    tokenizer = byte_tokenizer()
    eos, tokenizer.eos_token, tokenizer.pad_token = tokenizer.eos_token, None, None
    make_trainer(tiny_model(), pairs, {"eos_token": eos, "shared_prefix": False}, processing_class=tokenizer).train()
    assert tokenizer.pad_token == eos


def test_a_pad_token_that_the_tokenizer_lacks_is_said(make_trainer, pairs):
    with pytest.raises(ValueError, match="pad_token"):
        make_trainer(tiny_model(), pairs, {"pad_token": "<typo>", "shared_prefix": False})


def test_what_a_trainer_cannot_train_raises(make_trainer, decoder, pairs):
    other = AutoModelForCausalLM.from_config(BACKBONES["qwen3"])
    for model in (other, get_peft_model(other, LoraConfig(target_modules="all-linear"))):
        with pytest.raises(TypeError, match="GPMForPreference"):
            make_trainer(model, pairs)
    with pytest.raises(ValueError, match="pass `processing_class`"):
        make_trainer(tiny_model(), pairs, processing_class=None)
    with pytest.raises(ValueError, match="virtual tokens before the prompt"):
        make_trainer(tiny_model(), pairs, peft_config=PromptTuningConfig(num_virtual_tokens=2))
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    args = {"model_init_kwargs": {"quantization_config": quantization}}
    with pytest.raises(ValueError, match="twice"):
        make_trainer(str(decoder), pairs, args, quantization_config=quantization)


# --- Streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [MARGINS, K_WAY * 2], ids=["margins", "k-way"])
def test_a_stream_trains_as_a_dataset_does(make_trainer, rows):
    dataset = Dataset.from_list(rows)
    trainer = make_trainer(tiny_model(), dataset.to_iterable_dataset(), eval_dataset=dataset.to_iterable_dataset())
    trainer.train()
    other = make_trainer(tiny_model(), dataset, {"train_sampling_strategy": "sequential"}, eval_dataset=dataset)
    other.train()
    assert_equal_weights(weights(trainer.model), weights(other.model), rtol=0, atol=1e-6)
    assert without_prefix(trainer.evaluate()) == pytest.approx(without_prefix(other.evaluate()), rel=1e-4)


def test_batches_of_a_stream_are_not_cut_across_ranks(make_trainer, pairs):
    """Accelerate's dispatcher slices by rows, so that comparisons would point to rows of another rank."""
    trainer = make_trainer(tiny_model(), pairs, eval_dataset=pairs.to_iterable_dataset())
    assert not isinstance(trainer.get_eval_dataloader(), DataLoaderDispatcher)
    with pytest.raises(ValueError, match="dispatch_batches"):
        make_trainer(tiny_model(), pairs, {"accelerator_config": {"dispatch_batches": True}})


# --- Resuming --------------------------------------------------------------------------------------------------------


class StopAtThree(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


@pytest.mark.parametrize("kind", ["full", "lora", "stream"])
def test_resuming_continues_as_if_uninterrupted(make_trainer, pairs, tmp_path, kind):
    def trainer(directory, **kwargs):
        args = {"output_dir": str(tmp_path / directory), "max_steps": 5, "save_steps": 3, "save_strategy": "steps"}
        args |= {"per_device_train_batch_size": 2, "lr_scheduler_type": "cosine"}
        dataset = pairs.to_iterable_dataset() if kind == "stream" else pairs
        peft_config = LoraConfig(r=2, target_modules="all-linear") if kind == "lora" else None
        return make_trainer(tiny_model(learn_temperature=True), dataset, args, peft_config=peft_config, **kwargs)

    whole = trainer("whole")
    whole.train()
    if kind == "full":
        trainer("parts", callbacks=[StopAtThree()]).train()
    else:
        shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "parts" / "checkpoint-3")
    resumed = trainer("parts")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5
    assert_equal_weights(weights(resumed.model), weights(whole.model))
    assert logged(resumed, "loss")[3:] == logged(whole, "loss")[3:]
    assert logged(resumed, "margin")[3:] == logged(whole, "margin")[3:]


def checkpoint_of(make_trainer, pairs, **args):
    args = {"max_steps": 2, "save_steps": 2, "save_strategy": "steps", **args}
    trainer = make_trainer(tiny_model(), pairs, args)
    trainer.train()
    return trainer, Path(trainer.args.output_dir, "checkpoint-2")


def test_what_is_left_of_a_deleted_checkpoint_is_not_resumed_from(make_trainer, pairs, monkeypatch):
    """A run that begins again in the same directory is killed as it deletes."""
    trainer, checkpoint = checkpoint_of(make_trainer, pairs)
    monkeypatch.setattr("gpm_trl.saving.shutil.rmtree", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer._save_checkpoint(trainer.model, None)
    assert (checkpoint / "optimizer.pt").exists()
    assert whole_checkpoints(trainer.args.output_dir) == []


def test_a_run_that_has_ended_within_an_epoch_is_not_trained_on(make_trainer, pairs):
    args = {"save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2, "max_steps": 3}
    whole = make_trainer(tiny_model(), pairs, args)
    whole.train()
    assert (whole.state.global_step, whole.state.epoch) == (3, 0.75)
    for length in ({}, {"max_steps": -1, "num_train_epochs": 0.75}):
        again = make_trainer(tiny_model(), pairs, {**args, **length})
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 3
        assert_equal_weights(weights(again.model), weights(whole.model))
    longer = make_trainer(tiny_model(), pairs, {**args, "max_steps": 4})
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 4


def test_checkpoints_of_two_runs_are_not_taken_for_one(make_trainer, pairs):
    """The second run, which began anew in the same directory, was stopped before it came as far as the first."""
    args = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    make_trainer(tiny_model(), pairs, args).train()
    make_trainer(tiny_model(), pairs, {**args, "learning_rate": 3e-2}, callbacks=[StopAtThree()]).train()
    trainer = make_trainer(tiny_model(), pairs, args)
    with pytest.raises(ValueError, match=r"checkpoint-4 does not go on from .*checkpoint-2: their logs are of two"):
        trainer.train(resume_from_checkpoint=True)
    shutil.rmtree(Path(trainer.args.output_dir, "checkpoint-4"))
    trainer.train(resume_from_checkpoint=True)


def test_checkpoints_are_pushed_with_card_and_code(make_trainer, pairs, monkeypatch):
    trainer, checkpoint = checkpoint_of(make_trainer, pairs)
    push = Mock()
    monkeypatch.setattr("transformers.Trainer._push_from_checkpoint", push)
    trainer._push_from_checkpoint(str(checkpoint))
    push.assert_called_once_with(str(checkpoint))
    pushed = {path.name for path in Path(trainer.args.output_dir).iterdir()}
    assert {"README.md", "modeling_gpm.py", "configuration_gpm.py"} <= pushed


@pytest.mark.parametrize(
    ("setting", "was", "peft_config"),
    [({"embedding_dim": 2}, "embedding_dim=4", None), ({"normalize_embeddings": False}, "True", LoraConfig(r=2))],
    ids=["full", "adapter"],
)
def test_a_run_does_not_go_on_as_another_model(make_trainer, pairs, setting, was, peft_config):
    args = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps"}
    make_trainer(tiny_model(), pairs, args | {"max_steps": 1}, peft_config=peft_config).train()
    resumed = make_trainer(tiny_model(**setting), pairs, args, peft_config=peft_config)
    with pytest.raises(
        ValueError, match=rf"checkpoint-1 is of a model with .*{was}, and this one has .*: resume with"
    ):
        resumed.train(resume_from_checkpoint=True)
    make_trainer(tiny_model(), pairs, args, peft_config=peft_config).train(resume_from_checkpoint=True)


# --- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "model"),
    [
        ({"target_modules": "all-linear", "task_type": "SEQ_CLS"}, {}),
        ({"task_type": "CAUSAL_LM"}, {"use_scale_gate": False, "learn_temperature": True}),
        ({"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]}, {}),
    ],
    ids=["all-linear", "no targets", "q and norm"],
)
def test_lora_trains_the_adapter_and_the_heads(make_trainer, pairs, adapter, model):
    peft_config = LoraConfig(r=2, **adapter)
    before_config = copy.deepcopy(peft_config)
    trainer = make_trainer(tiny_model(**model), pairs, {"gradient_checkpointing": True}, peft_config=peft_config)
    assert peft_config == before_config
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "lora_" in name or ".modules_to_save." in name}
    saved = {name.split(".modules_to_save.")[0] for name in moved if ".modules_to_save." in name}
    heads = ("embedding_head", "learned_temperature" if model else "scale_gate", *adapter.get("modules_to_save", ()))
    assert saved == {f"base_model.model.{name}" for name in heads}
    covered = {name.split(".lora_A")[0] for name in moved if "lora_A" in name}
    assert len(covered) == 2 * (1 if adapter.get("target_modules") == ["q_proj"] else 7)  # layers, projections
    assert not any("head" in name or "gate." in name for name in covered)


def test_an_adapter_model_is_trained_further_without_another_adapter(make_trainer, pairs):
    config = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["embedding_head", "scale_gate"])
    model = get_peft_model(tiny_model(), config)
    with pytest.raises(ValueError, match="PeftModel"):
        make_trainer(model, pairs, peft_config=LoraConfig(r=2))
    frozen = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["scale_gate"]))
    with pytest.raises(ValueError, match="leaves embedding_head frozen"):
        make_trainer(frozen, pairs)
    head = model.get_base_model().embedding_head.modules_to_save["default"].weight
    before = head.clone()
    make_trainer(model, pairs).train()
    assert not torch.equal(head, before)


# Numbers that are not finite


class Spoil(TrainerCallback):
    """Makes weights, or gradients, of a step infinite."""

    def __init__(self, step: int, what: str):
        self.step, self.what = step, what

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.what == "gradient" and state.global_step + 1 == self.step:
            handle = model.embedding_head.weight.register_hook(lambda gradient: (handle.remove(), gradient / 0)[1])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.what == "weight" and state.global_step == self.step:
            with torch.no_grad():
                model.embedding_head.weight[0, 0] = math.inf


def spoil_loss(trainer, step: int) -> None:
    original = trainer.compute_loss

    def compute_loss(*args, **kwargs):
        return original(*args, **kwargs) * (math.nan if trainer.state.global_step + 1 == step else 1)

    trainer.compute_loss = compute_loss


@pytest.mark.parametrize(("what", "shared_prefix"), [("loss", False), ("gradient", True)])
def test_a_step_that_is_not_finite_ends_the_run_before_it_is_saved(make_trainer, pairs, what, shared_prefix):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "logging_steps": 100}
    trainer = make_trainer(tiny_model(), pairs, {**saving, "shared_prefix": shared_prefix}, callbacks=[Spoil(3, what)])
    if what == "loss":
        spoil_loss(trainer, 3)
    with pytest.raises(FloatingPointError, match=r"not finite at step 3, .*`learning_rate`.*underflow_overflow`"):
        trainer.train()
    assert [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")] == ["checkpoint-2"]
    assert trainer.state.global_step == 4  # it was read where it was to be saved, and not at each step


@pytest.mark.parametrize("logging", [{"logging_steps": 1}, {"logging_strategy": "no", "max_steps": 3}])
def test_weights_are_finite_at_the_end(make_trainer, pairs, logging):
    trainer = make_trainer(tiny_model(), pairs, {"max_steps": 3, **logging}, callbacks=[Spoil(3, "weight")])
    with pytest.raises(FloatingPointError, match="not finite at step 3"):
        trainer.train()


def test_a_gradient_that_the_scaler_of_fp16_skips_is_no_error(make_trainer, pairs, monkeypatch):
    trainer = make_trainer(
        tiny_model(), pairs, {"max_steps": 4, "max_grad_norm": 0.0}, callbacks=[Spoil(2, "gradient")]
    )
    monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", "fp16")
    with pytest.raises(FloatingPointError, match="not finite at step 3"):  # without a scaler, it went into the weights
        trainer.train()


def test_a_run_has_its_directory_for_itself(make_trainer, pairs):
    refused = []

    class Second(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with pytest.raises(ValueError, match="Another run is writing") as error:
                make_trainer(tiny_model(), pairs).train()
            refused.append(error)

    trainer = make_trainer(tiny_model(), pairs, callbacks=[Second()])
    trainer.train()
    trainer.train()
    assert len(refused) == 4
    assert not list(Path(trainer.args.output_dir).glob("_*"))


def test_a_run_goes_on_from_the_last_checkpoint_that_reads(make_trainer, pairs):
    args = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    whole = make_trainer(tiny_model(), pairs, args)
    whole.train()
    expected, damaged = weights(whole.model), Path(whole.args.output_dir, "checkpoint-3")
    cut_off = (lambda path: path.write_bytes(path.read_bytes()[:-20]), "model.safetensors")
    for damage, name in (cut_off, (Path.unlink, "optimizer.pt")):  # of the other files: test_saving.py
        damage(damaged / name)
        with pytest.raises(ValueError, match=f"checkpoint-3 is no whole checkpoint: it.* {name}"):
            make_trainer(tiny_model(), pairs, args).train(resume_from_checkpoint=str(damaged))
        resumed = make_trainer(tiny_model(seed=1), pairs, args)
        resumed.train(resume_from_checkpoint=True)
        assert len(resumed.state.log_history) == len(whole.state.log_history)
        assert_equal_weights(weights(resumed.model), expected)
        assert whole_checkpoints(whole.args.output_dir)[-1] == damaged  # written anew


def test_what_is_trained_on_is_told_from_an_evaluation_that_is_called_train(make_trainer):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    talk = (
        [{"role": "user", "content": "a"}],
        [{"role": "assistant", "content": "b"}],
        [{"role": "assistant", "content": ""}],
    )
    evaluated = {"train": Dataset.from_list([dict(zip(rows[0], talk, strict=True))])}
    with pytest.raises(ValueError, match="no chat template"):  # of the evaluation, and not before
        make_trainer(tiny_model(), rows, eval_dataset=evaluated)
    assert make_trainer(tiny_model(), rows, eval_dataset={"train": Dataset.from_list(rows)})._conversational is False


def test_a_chat_template_that_adds_tokens_enlarges_the_embedding_that_rows_are_checked_against(tmp_path, decoder):
    other = AutoTokenizer.from_pretrained(decoder)
    other.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    other.chat_template = CHAT_TEMPLATE.replace("<{{ message['role'] }}>", "<|turn|>{{ message['role'] }}")
    other.save_pretrained(tmp_path / "template")
    args = GPMConfig(str(tmp_path / "run"), **QUICK, chat_template_path=str(tmp_path / "template"))
    row = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
    trainer = GPMTrainer(str(decoder), args, Dataset.from_list([row] * 2))
    token = trainer.processing_class.convert_tokens_to_ids("<|turn|>")
    assert token == 259
    assert token in trainer.train_dataset[0]["prompt_ids"]
    trainer.train()
