"""A policy reads a prompt once for all its completions: log-probabilities, gradients, whole trainings."""

import contextlib
import copy
import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from conftest import TRAINING, random_rows
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from test_shared_prefix import SHARING
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOConfig, GRPOTrainer

from gpm_trl import GPOConfig, GPOTrainer, GPRLConfig, GPRLTrainer, SharedPrefixPolicy
from gpm_trl.gpm.config import SharedPrefixConfig
from gpm_trl.gpo import shared_prefix
from gpm_trl.gpo.shared_prefix import shared_prefix_log_probs
from gpm_trl.models.shared_prefix import enable_shared_prefix

if shared_prefix.add_fused_lm_head is None:
    pytest.skip("TRL before 1.15 has no head that takes packed rows", allow_module_level=True)

TEMPERATURE = 0.7
# Prompts shorter and longer than a window of 4, one of a single token; completions that begin alike, that are equal,
# of one token, of none; and a prompt that begins as another does.
GROUPS = [
    ([5, 6, 7, 8, 9, 10, 11, 12, 13], [[20, 21, 22], [20, 21, 23, 24, 25, 26], [20, 21, 22], [30]]),
    ([40], [[41, 42], [41, 43], []]),
    ([5, 6, 7], [[50, 51, 52, 53, 54, 55, 56], [60]]),
    ([70, 71], [[], []]),
]


def causal_lm(name: str):
    torch.manual_seed(0)
    config = copy.deepcopy(SHARING[name])
    if name == "gemma2":
        config.final_logit_softcapping = 0.5  # which changes logits as small as these
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()  # others know no float64
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
    return model


def batch(groups, seed=0):
    """Rows of all groups in a random order, prompts padded on the left and completions on the right."""
    rows = [(prompt, completion) for prompt, completions in groups for completion in completions]
    random.Random(seed).shuffle(rows)
    left, right = (max(map(len, part)) for part in zip(*rows, strict=True))
    ids, mask = torch.full((len(rows), left + right), 3), torch.zeros(len(rows), left + right, dtype=torch.long)
    for row, (prompt, completion) in enumerate(rows):
        place = slice(left - len(prompt), left + len(completion))
        ids[row, place], mask[row, place] = torch.tensor(prompt + completion), 1
    return ids, mask, right


def expected(model, ids, mask, length):
    """By the formulas, in float64, row by row: log softmax(z / T) at the next token, and -sum_v p_v log p_v."""
    shape = (len(ids), length)
    log_probs, entropies = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for row in range(len(ids)):
        tokens, size = ids[row][mask[row].bool()], int(mask[row, -length:].sum())
        if size:
            logits = model(tokens[None]).logits[0, -size - 1 : -1] / TEMPERATURE
            logs = logits.log_softmax(-1)
            log_probs[row, :size] = logs.gather(-1, tokens[-size:, None]).squeeze(-1)
            entropies[row, :size] = -(logs.exp() * logs).sum(-1)
    return log_probs, entropies


def weighted(values):
    """A sum with a weight of its own for each value."""
    generator = torch.Generator().manual_seed(1)
    return sum((value * torch.randn(value.shape, generator=generator)).sum() for value in values)


@pytest.fixture(params=SHARING)
def models(request):
    model = causal_lm(request.param)
    reference = copy.deepcopy(model).double()
    shared_prefix.add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    enable_shared_prefix(model.base_model)
    return model, reference


def test_log_probabilities_entropies_and_gradients_are_those_of_separate_rows(models):
    model, reference = models
    inputs = batch(GROUPS)
    found, separate = shared_prefix_log_probs(model, *inputs), expected(reference, *inputs)
    for values, others in zip(found, separate, strict=True):
        torch.testing.assert_close(values.double(), others, atol=1e-5, rtol=1e-5)
    assert separate[0][inputs[1][:, -inputs[2] :].bool()].std() > 0.2
    weighted(found).backward()
    weighted(separate).backward()
    largest = max(parameter.grad.abs().max().item() for parameter in reference.parameters())
    for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.double(), other.grad, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_it_is_as_near_as_separate_rows_are(autocast):
    reference = causal_lm("qwen3")
    model = copy.deepcopy(reference) if autocast else copy.deepcopy(reference).bfloat16()
    shared_prefix.add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    enable_shared_prefix(model.base_model)
    whole, single = batch(GROUPS), [batch([(prompt, [row])]) for prompt, rows in GROUPS for row in rows if row]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        packed = [shared_prefix_log_probs(model, *whole)]
        separate = [shared_prefix_log_probs(model, *row) for row in single]
    with torch.no_grad():
        errors = [
            max(
                (found[0] - expected(reference.double(), *row)[0]).abs().max()
                for found, row in zip(values, rows, strict=True)
            )
            for values, rows in ((packed, [whole]), (separate, single))
        ]
    assert 0 < errors[0] <= 1.5 * errors[1]


def test_what_rows_have_in_common_is_computed_once():
    model = causal_lm("qwen3")
    shared_prefix.add_fused_lm_head(model)
    enable_shared_prefix(model.base_model)
    lengths = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    rows = [[20, 21, 22, 23], [20, 21, 24], [20, 21, 22, 25, 26]]
    shared_prefix_log_probs(model, *batch([([5, 6, 7, 8], rows)]))
    # 5 6 7, 8 -> 20, 20 -> 21; then, of each row, 21 and all but the last.
    assert lengths == [5 + 2 + 1 + 3]


def test_the_head_reads_no_prompt():
    seen = {}

    def model(input_ids, shift_labels, **kwargs):
        seen.update(tokens=input_ids[0].tolist(), labels=shift_labels[0].tolist())
        return SimpleNamespace(log_probs=torch.zeros(input_ids.shape), entropy=None)

    shared_prefix_log_probs(model, *batch([([5, 6, 7, 8], [[20, 21, 22], [20, 24]])]))
    assert seen["tokens"][:4] == [5, 6, 7, 8]
    assert seen["labels"][:4] == [-100, -100, -100, 20]
    assert sorted(zip(seen["tokens"][4:], seen["labels"][4:], strict=True)) == [(20, 21), (20, 24), (21, 22)]


def test_a_head_without_entropies_gives_none():
    model = causal_lm("llama")
    shared_prefix.add_fused_lm_head(model)
    enable_shared_prefix(model.base_model)
    assert shared_prefix_log_probs(model, *batch(GROUPS))[1] is None


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_a_policy_that_shares_prefixes_samples_as_before(name):
    model = causal_lm(name)
    prompt = random_rows(3, 6)[0].clamp(min=3)
    settings = {"max_new_tokens": 12, "do_sample": True, "pad_token_id": 0, "eos_token_id": None}

    def sample():
        torch.manual_seed(0)
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)

    before = sample()
    enable_shared_prefix(model.base_model)
    assert torch.equal(sample(), before)


# --- Whole trainings -------------------------------------------------------------------------------------------------


class Given:
    """Takes what is given for samples: completions of several lengths that begin alike, some without an EOS."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        first, size, eos = self.args.process_index * len(prompt_ids), self.num_generations, 2
        drawn = []
        for index, ids in enumerate(prompt_ids, start=first):
            draw = random.Random(100 * sum(ids) + index % size + 7 * self.state.global_step)
            length = draw.randint(1, self.max_completion_length)
            tokens = [60, 61, *(draw.randint(50, 120) for _ in range(length))][: self.max_completion_length]
            drawn.append([*tokens[:-1], eos] if draw.random() < 0.7 else tokens)
        return drawn, None

    def _generate_and_score_completions(self, inputs):
        """With the mask that tools make, where they are asked for: what they answer is read, and not learned."""
        made = super()._generate_and_score_completions(inputs)
        return {**made, "tool_mask": (made["completion_ids"] % 3 > 0).long()} if self.has_tools else made


class SharedPrefixGRPOTrainer(SharedPrefixPolicy, GRPOTrainer):
    pass


@dataclass
class SharedPrefixGRPOConfig(SharedPrefixConfig, GRPOConfig):
    pass


CLASSES = {
    "GRPO": (SharedPrefixGRPOTrainer, SharedPrefixGRPOConfig, {"beta": 0.1, "temperature": 0.7}),
    "GPO": (GPOTrainer, GPOConfig, {"beta": 0.5}),
    "GPRL": (GPRLTrainer, GPRLConfig, {}),
}
SETTINGS = {
    **TRAINING,
    "max_steps": 2,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_completion_length": 9,
    "learning_rate": 0.1,
    "optim": "sgd",  # others divide by gradients, also where these are rounding errors
    "lr_scheduler_type": "constant",
    "dataloader_pin_memory": False,
}
PROMPTS = Dataset.from_list([{"prompt": "Question " + "very " * (index % 4) + str(index)} for index in range(24)])


def vowels(completions, **kwargs):
    return [sum(0.5 + (ord(letter) % 7) / 3 for letter in text) for text in completions]


def trainer_of(kind, decoder, gpm, directory, peft_config=None, tools=False, **options):
    trainer_class, config_class, defaults = CLASSES[kind]
    given = type(f"Given{kind}", (Given, trainer_class), {"has_tools": tools})
    args = config_class(str(directory), **{**SETTINGS, **defaults, **options})
    reward = str(gpm) if kind == "GPRL" else vowels
    data = {"train_dataset": PROMPTS, "peft_config": peft_config}
    return given(str(decoder), reward_funcs=reward, args=args, **data)


def results(trainer):
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return trainer, logs, {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}


NAMES = {"loss", "grad_norm", "entropy", "kl", "objective/kl", "objective/entropy", "clip_ratio/region_mean"}


def assert_same_training(found, other, decoder, names=NAMES):
    """Weights that moved, and what was logged."""
    for name, value in found[2].items():
        torch.testing.assert_close(value, other[2][name], atol=2e-5, rtol=1e-4)
    initial = AutoModelForCausalLM.from_pretrained(decoder).state_dict()
    moved = [(value - initial.get(name, 0)).abs().max() for name, value in found[2].items()]
    assert max(moved) > 5e-3
    for entry, expected_entry in zip(found[1], other[1], strict=True):
        for name in names & entry.keys():
            assert entry[name] == pytest.approx(expected_entry[name], rel=1e-4, abs=1e-5), name


ADAPTER = LoraConfig(r=4, target_modules="all-linear", lora_alpha=16)
WAYS = [
    ("GRPO", {}),
    ("GRPO", {"gradient_accumulation_steps": 2}),  # of other batches where these are shuffled
    ("GRPO", {"num_iterations": 2, "max_steps": 4}),  # with old log-probabilities
    ("GRPO", {"loss_type": "grpo", "mask_truncated_completions": True, "tools": True}),
    ("GRPO", {"loss_type": "bnpo", "importance_sampling_level": "sequence", "entropy_coef": 0.1}),
    ("GRPO", {"peft_config": ADAPTER, "learning_rate": 1.0}),
    ("GRPO", {"gradient_checkpointing": True, "cast_lm_head_to_fp32": True}),
    ("GPO", {"pairing": "best_worst", "mask_truncated_completions": True}),
    ("GPO", {"peft_config": ADAPTER, "learning_rate": 1.0, "ref_model_sync_steps": 1}),
    ("GPRL", {"learning_rate": 0.3}),
]


@pytest.mark.parametrize(
    ("kind", "options"), WAYS, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_a_training_is_that_of_padded_rows(kind, options, decoder, gpm, tmp_path):
    found, other = (
        results(trainer_of(kind, decoder, gpm, tmp_path, shared_prefix=shared, **options)) for shared in (True, False)
    )
    assert (found[0].shares_prefixes, other[0].shares_prefixes) == (True, False)
    accumulates = "gradient_accumulation_steps" in options  # then others are means over batches, not over tokens
    assert_same_training(found, other, decoder, {"loss", "grad_norm"} if accumulates else NAMES)


class Lengths:
    """Tokens of the packed rows that the policy is trained on, and of those that it or its reference only reads."""

    def __init__(self, trainer):
        self.seen, self.read = [], []
        for model in (trainer.model, trainer.ref_model):
            model.base_model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module, args, kwargs):
        if kwargs.get("shared_prefix_layout") is not None:
            (self.seen if torch.is_grad_enabled() else self.read).append(kwargs["input_ids"].shape[1])


PARTS = [
    ("GRPO", {"loss_type": "dapo", "tools": True}),
    ("GRPO", {"loss_type": "cispo", "gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 4}),
    ("GRPO", {"loss_type": "vespo"}),
    ("GPO", {"pairing": "best_worst", "gradient_accumulation_steps": 2, "mask_truncated_completions": True}),
    ("GPO", {"loss_type": "ipo"}),
    ("GPRL", {"learning_rate": 0.3}),
]


@pytest.mark.parametrize(
    ("kind", "options"), PARTS, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_a_training_in_parts_of_so_many_tokens_is_that_of_whole_batches(kind, options, decoder, gpm, tmp_path):
    options = {"num_generations": 4, "per_device_train_batch_size": 16, **options}
    limit = 60  # a prompt has 10 to 26 tokens, and its completions up to 36
    found = trainer_of(kind, decoder, gpm, tmp_path, max_tokens_per_batch=limit, **options)
    lengths = Lengths(found)
    found, other = results(found), results(trainer_of(kind, decoder, gpm, tmp_path, **options))
    assert_same_training(found, other, decoder, {"loss", "grad_norm"})
    assert len(lengths.seen) >= 2 * found[0].state.global_step
    assert max(lengths.seen) <= limit
    assert max(lengths.read) <= limit
    assert sum(lengths.read) >= sum(lengths.seen) / 2
    assert len(lengths.seen) <= 1 + sum(lengths.seen) // (limit // 2)  # they are filled


def test_gradients_of_parts_are_sent_with_the_last(decoder, gpm, tmp_path, monkeypatch):
    """What DDP sends is settled in the forward."""
    trainer = trainer_of("GPO", decoder, gpm, tmp_path, max_tokens_per_batch=60, max_steps=1)
    quiet, forwards, no_sync = [], [], trainer.accelerator.no_sync

    @contextlib.contextmanager
    def recorded(model):
        quiet.append(model)
        with no_sync(model):
            yield
        quiet.pop()

    monkeypatch.setattr(trainer.accelerator, "no_sync", recorded)
    trainer.model.register_forward_hook(lambda *_: torch.is_grad_enabled() and forwards.append(bool(quiet)))
    trainer.train()
    assert forwards == [True] * (len(forwards) - 1) + [False]
    assert len(forwards) > 1


def test_a_row_longer_than_a_part_is_a_part_of_its_own(decoder, gpm, tmp_path):
    trainer = trainer_of("GPO", decoder, gpm, tmp_path, max_tokens_per_batch=12, max_steps=1)
    lengths = Lengths(trainer)
    trainer.train()
    assert len(lengths.seen) == 8
    assert max(lengths.seen) > 12


def test_pairs_are_not_cut_into_parts(decoder, gpm, tmp_path):
    trainer = trainer_of("GPO", decoder, gpm, tmp_path, max_tokens_per_batch=12, max_steps=1, loss_type="sigmoid")
    lengths = Lengths(trainer)
    trainer.train()
    assert len(lengths.seen) == 2


# --- Where prefixes cannot be shared ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pad_to_multiple_of": 8}, "`pad_to_multiple_of` is about padded rows"),
        ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha` goes by the length"),
        ({"torch_compile": True}, "`torch_compile` is on"),
        (
            {"use_transformers_continuous_batching": True},
            "`use_transformers_continuous_batching` has its own attention",
        ),
        ({"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}, "the adapter adds tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_hinders_it_is_told(options, reason, decoder, gpm, tmp_path, monkeypatch):
    monkeypatch.setattr("gpm_trl.models.shared_prefix.attention.logger.warning_once", lambda text: told.append(text))
    told = []
    assert not trainer_of("GRPO", decoder, gpm, tmp_path, **options).shares_prefixes
    assert len(told) == 1
    assert reason in told[0]


def test_what_hinders_it_is_refused_where_it_is_wanted(decoder, gpm, tmp_path):
    with pytest.raises(ValueError, match="`shared_prefix` is True, but `neftune_noise_alpha` goes by the length"):
        trainer_of("GRPO", decoder, gpm, tmp_path, shared_prefix=True, neftune_noise_alpha=5.0)


def test_experts_hinder_only_losses_with_a_term_for_them(chat_tokenizer, gpm, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 8, "num_experts": 4}
    config = Qwen3MoeConfig(vocab_size=259, num_experts_per_tok=2, router_aux_loss_coef=0.1, pad_token_id=0, **sizes)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "experts")
    chat_tokenizer.save_pretrained(tmp_path / "experts")
    for kind, shares in (("GPO", True), ("GRPO", False)):
        trainer = trainer_of(kind, tmp_path / "experts", gpm, tmp_path)
        assert trainer.aux_loss_enabled
        assert trainer.shares_prefixes == shares


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("GPO", {"shared_prefix": False}, "it is about packed rows, and rows are padded"),
        ("GRPO", {"loss_type": "grpo"}, "the loss 'grpo' is a mean over a batch"),
        ("GRPO", {"entropy_coef": 0.1}, "the entropy bonus"),
        ("GPRL", {"top_entropy_quantile": 0.5}, "the entropy bonus and `top_entropy_quantile`"),
    ],
)
def test_parts_that_would_weigh_otherwise_are_refused(kind, options, reason, decoder, gpm, tmp_path):
    with pytest.raises(ValueError, match=f"`max_tokens_per_batch` is 60, but {reason}"):
        trainer_of(kind, decoder, gpm, tmp_path, max_tokens_per_batch=60, **options)


@pytest.mark.parametrize("kind", CLASSES)
def test_parts_of_no_tokens_are_refused(kind, tmp_path):
    with pytest.raises(ValueError, match="`max_tokens_per_batch` is 0; give 1 or more"):
        CLASSES[kind][1](str(tmp_path), use_cpu=True, max_tokens_per_batch=0)


@pytest.mark.parametrize(("shared", "size"), [("auto", 6), ("auto", 8), ("false", 6)])
def test_batches_that_cut_groups_are_told_of(shared, size, decoder, gpm, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(shared_prefix.logger, "warning_once", told.append)
    sizes = {"per_device_train_batch_size": size, "steps_per_generation": 2}
    trainer_of("GPO", decoder, gpm, tmp_path, shared_prefix=shared, **sizes)
    assert ["8 would keep groups whole" in text for text in told] == ([True] if (shared, size) == ("auto", 6) else [])


def test_trls_own_trainer_needs_no_configuration_of_ours(decoder, tmp_path):
    args = GRPOConfig(str(tmp_path), **SETTINGS)
    trainer = SharedPrefixGRPOTrainer(str(decoder), vowels, args, PROMPTS)
    assert trainer.shares_prefixes
    assert trainer.max_tokens_per_batch is None
    again = SharedPrefixGRPOTrainer(trainer.model, vowels, args, PROMPTS)  # a model that shares them already
    assert again.shares_prefixes


def test_groups_stay_in_one_batch(decoder, gpm, tmp_path):
    """Not shuffled over the batches of a generation."""
    trainer = trainer_of(
        "GRPO", decoder, gpm, tmp_path, steps_per_generation=3, gradient_accumulation_steps=3, max_steps=1
    )
    groups = []
    trainer.compute_loss = lambda model, inputs, **kwargs: (
        groups.append({tuple(ids) for ids in inputs["prompt_ids"].tolist()}) or torch.zeros((), requires_grad=True)
    )
    trainer.train()
    assert [len(prompts) for prompts in groups] == [2, 2, 2]
    assert len(set.union(*groups)) == 6
