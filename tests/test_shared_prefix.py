"""Shared-prefix attention gives what separate rows give: hidden states, gradients, losses."""

import copy

import pytest
import torch
from conftest import BACKBONES, NO_HEAD_DIM, TINY, tiny_model
from datasets import Dataset
from test_gpm_trainer import QUICK
from transformers import (
    AutoConfig,
    AutoModel,
    BloomConfig,
    Cohere2Config,
    Gemma3Config,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    Olmo2Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from gpm_trl import GPMConfig, GPMForPreference, GPMModelConfig, GPMTrainer, PreferenceScorer, letter_cycles
from gpm_trl.data import DataCollatorForGroups
from gpm_trl.data.collator import pad_rows
from gpm_trl.models.shared_prefix import SharedPrefixLayout, enable_shared_prefix

SHARING = {
    **BACKBONES,  # Gemma 2, Gemma 3 and Mistral with a window of 4 tokens
    "olmo2": Olmo2Config(**NO_HEAD_DIM),
    "granite": GraniteConfig(**NO_HEAD_DIM),
    "qwen3_moe": Qwen3MoeConfig(**TINY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "gpt_oss": GptOssConfig(**TINY, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
    "cohere2": Cohere2Config(**TINY, sliding_window=4),
    "gpt2": GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
}
NOT_SHARING = {
    ("qwen3_next", "layers of linear_attention"): Qwen3NextConfig(
        **TINY, num_experts=0, layer_types=["linear_attention", "full_attention"]
    ),
    ("gemma3", "is more than a decoder of text"): Gemma3Config(
        text_config={**TINY, "sliding_window": 4},
        vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
    ),
    ("bloom", "does not use transformers' attention interface"): BloomConfig(hidden_size=32, n_layer=2, n_head=4),
    ("llama4", "chunk"): AutoConfig.for_model(
        "llama4_text", **TINY, num_local_experts=2, attention_chunk_size=4, intermediate_size_mlp=64
    ),
}


def random_ids(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, 259, (count,), generator=generator).tolist()


def ragged_groups(seed: int = 0) -> list[tuple[list[int], list[list[int]]]]:
    """Prompts shorter and longer than a window of 4, one to nine responses, prefixes of each other, identical ones."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for prompt, lengths in ((9, (1, 5, 5, 12)), (2, (7,)), (1, (3, 1)), (12, (2, 9, 4, 4, 4, 1, 6, 3, 8))):
        groups.append((random_ids(prompt, generator), [random_ids(length, generator) for length in lengths]))
    groups.append(([5, 6, 7], [[8, 9], [8, 9, 10], [8, 9, 10], [8]]))
    return groups


def gpm(name: str, **settings) -> GPMForPreference:
    torch.manual_seed(0)
    config = GPMModelConfig(text_config=copy.deepcopy(SHARING[name]), embedding_dim=4, **settings)
    return GPMForPreference(config).eval()


def padded(model: GPMForPreference, groups):
    rows = [prompt + response for prompt, responses in groups for response in responses]
    lengths = torch.tensor([len(prompt) for prompt, responses in groups for _ in responses])
    return model(**pad_rows(rows, 0), prompt_lengths=lengths)


def separate(model: GPMForPreference, groups):
    outputs = [
        model(
            torch.tensor([prompt + response]).to(model.device),
            prompt_lengths=torch.tensor([len(prompt)]).to(model.device),
        )
        for prompt, responses in groups
        for response in responses
    ]
    return torch.cat([output.embeddings for output in outputs]), torch.cat([output.scales for output in outputs])


def packed(model: GPMForPreference, groups):
    enable_shared_prefix(model.model)
    layout, ids = SharedPrefixLayout.pack(groups)
    return model(torch.tensor([ids]), shared_prefix_layout=layout)


# --- The layout ------------------------------------------------------------------------------------------------------


def test_a_layout_says_where_everything_is():
    groups = ragged_groups()
    layout, ids = SharedPrefixLayout.pack(groups)
    rows = [prompt + response for prompt, responses in groups for response in responses]
    assert layout.row_lengths == [len(row) for row in rows]
    assert [ids[index] for index in layout.last_tokens] == [row[-1] for row in rows]
    prompts = [prompt for prompt, responses in groups for _ in responses]
    assert [ids[index] for index in layout.prompt_ends] == [prompt[-1] for prompt in prompts]
    assert len(ids) == len(layout.positions) == sum(layout.prefix_lengths) + sum(map(sum, layout.response_lengths))
    assert layout.positions[layout.last_tokens].tolist() == [len(row) - 1 for row in rows]


def test_the_prefix_is_the_longest_that_leaves_each_response_a_token():
    groups = [([5, 6], [[7, 8, 1], [7, 8, 9, 1]]), ([5], [[7, 8], [7, 8, 9]]), ([5], [[4, 3]]), ([], [[5, 6], [7]])]
    layout, ids = SharedPrefixLayout.pack(groups)
    assert layout.prefix_lengths == (4, 2, 2, 0)
    assert layout.response_lengths == ((1, 2), (1, 2), (1,), (2, 1))
    assert ids == [5, 6, 7, 8, 1, 9, 1, 5, 7, 8, 8, 9, 5, 4, 3, 5, 6, 7]
    assert layout.positions[-3:].tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="no token"):
        SharedPrefixLayout.pack([([5], [[6], []])])


# --- Equal to separate rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHARING)
def test_embeddings_and_gates_are_those_of_separate_rows(name):
    model, groups = gpm(name), ragged_groups()
    with torch.no_grad():
        embeddings, scales = separate(model, groups)
        output = packed(model, groups)
    torch.testing.assert_close(output.embeddings, embeddings, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.scales, scales, rtol=0, atol=1e-5)
    assert (embeddings[0] - embeddings[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "reentrant"), [*((name, None) for name in SHARING), ("gemma2", False), ("gpt_oss", True)]
)
def test_gradients_are_those_of_padded_rows(name, reentrant):
    groups = ragged_groups(seed=1)
    gradients = []
    for compute in (padded, packed):
        model = gpm(name, normalize_embeddings=False)
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        output = compute(model, groups)
        weights = torch.linspace(-1, 1, output.embeddings.numel()).reshape_as(output.embeddings)
        ((output.embeddings * weights).sum() * 10 + output.scales[:, 0].sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        if expected is not None:
            scale = expected.abs().max().clamp(min=1e-6)
            torch.testing.assert_close(gradients[1][name] / scale, expected / scale, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_rows_without_a_layout_are_computed_as_before(name):
    model, groups = gpm(name), ragged_groups()
    with torch.no_grad():
        expected = padded(model, groups)
        enable_shared_prefix(model.model)
        output = padded(model, groups)
    torch.testing.assert_close(output.embeddings, expected.embeddings, rtol=0, atol=1e-6)


# --- What cannot share -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "reason"), NOT_SHARING)
def test_layers_that_cannot_share_are_refused(name, reason):
    backbone = AutoModel.from_config(NOT_SHARING[name, reason])
    with pytest.raises(ValueError, match=f"{reason}.* Use padded rows"):
        enable_shared_prefix(backbone)


def test_a_layout_needs_a_backbone_that_is_ready_for_it_and_leaves_nothing_else_to_say():
    model = gpm("llama")
    layout, ids = SharedPrefixLayout.pack(ragged_groups())
    with pytest.raises(ValueError, match="enable_shared_prefix"):
        model(torch.tensor([ids]), shared_prefix_layout=layout)
    enable_shared_prefix(model.model)
    with pytest.raises(ValueError, match="leave out `attention_mask`"):
        model(torch.tensor([ids]), torch.ones(1, len(ids)), shared_prefix_layout=layout)


def test_saved_models_do_not_name_the_attention(tmp_path):
    model = gpm("llama")
    enable_shared_prefix(model.model)
    model.save_pretrained(tmp_path)
    assert "gpm_shared_prefix" not in (tmp_path / "config.json").read_text()
    assert GPMForPreference.from_pretrained(tmp_path).model.config._attn_implementation == "sdpa"


# --- Batches, training, scoring --------------------------------------------------------------------------------------


def test_a_packed_batch_has_the_comparisons_of_a_padded_one(tokenizer):
    groups = [
        {"prompt_ids": prompt, "response_ids": responses, "pairs": [[0, len(responses) - 1]], "targets": [1.0]}
        for prompt, responses in ragged_groups()
    ]
    plain = DataCollatorForGroups(tokenizer)(groups)
    batch = DataCollatorForGroups(tokenizer, shared_prefix=True)(groups)
    assert set(plain) - set(batch) == {"attention_mask", "prompt_lengths"}
    assert set(batch) - set(plain) == {"shared_prefix_layout"}
    for name in ("group_rows", "response_rows", "response_groups", "comparisons", "labels"):
        assert torch.equal(batch[name], plain[name])
    assert batch["shared_prefix_layout"].row_lengths == plain["attention_mask"].sum(-1).tolist()


def k_way_rows() -> Dataset:
    rows = [
        {
            "prompt": f"Question {number}: which of these is it?",
            "responses": [f"answer {letter * (number % 3 + 1)}" for letter in "abcd"[: 2 + number % 3]],
            "comparisons": [[0, 1]] if number % 3 == 0 else [[0, 1], [1, 2], [2, 0]],
        }
        for number in range(12)
    ]
    return Dataset.from_list(rows)


def losses_of(directory, tokenizer, rows, shared_prefix, **settings) -> list[tuple[float, float]]:
    args = QUICK | {"max_steps": 6, "per_device_train_batch_size": 2, "bf16": False, **settings}
    args = GPMConfig(str(directory), shared_prefix=shared_prefix, **args)
    trainer = GPMTrainer(tiny_model(), args, rows, processing_class=tokenizer)
    assert trainer.data_collator.shared_prefix is (shared_prefix is not False)
    trainer.train()
    return [(entry["loss"], entry["num_tokens"]) for entry in trainer.state.log_history if "loss" in entry]


def test_a_run_has_the_losses_of_one_with_padded_rows(tokenizer, tmp_path):
    """With checkpointing and accumulation; without: `test_gpm_trainer.py` and `test_hrc.py`."""
    rows, settings = k_way_rows(), {"gradient_checkpointing": True, "gradient_accumulation_steps": 3}
    padded_run = losses_of(tmp_path / "padded", tokenizer, rows, False, **settings)
    packed_run = losses_of(tmp_path / "packed", tokenizer, rows, "auto", **settings)
    assert len(padded_run) == 6
    for (loss, tokens), (expected, expected_tokens) in zip(packed_run, padded_run, strict=True):
        assert loss == pytest.approx(expected, abs=1e-4)
        assert tokens == expected_tokens


def test_a_scorer_computes_each_prompt_once_and_gives_the_scores_of_padded_rows(tokenizer):
    rows = k_way_rows()
    expected = PreferenceScorer(tiny_model(), tokenizer, shared_prefix=False).matrix(rows["prompt"], rows["responses"])
    for batch_tokens in (1, 60, 100_000):
        scorer = PreferenceScorer(tiny_model(), tokenizer, batch_tokens)
        assert scorer.shared_prefix is True
        for matrix, wanted in zip(scorer.matrix(rows["prompt"], rows["responses"]), expected, strict=True):
            torch.testing.assert_close(matrix, wanted, rtol=0, atol=1e-5)
    computed = []
    scorer.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    scorer.matrix(["What is it?"], [["first one", "second", "third", "second"]])
    prompt_ids, response_ids, _ = scorer.encode("What is it?", ["first one", "second", "third"])
    assert computed == [len(prompt_ids) + sum(map(len, response_ids))]


def test_what_reads_padded_rows_falls_back_and_says_so_or_raises(tokenizer, tmp_path, monkeypatch):
    messages, rows = [], Dataset.from_list(list(letter_cycles()))
    monkeypatch.setattr("gpm_trl.models.shared_prefix.attention.logger.warning_once", messages.append)

    def collator(model=None, **settings):
        args = GPMConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **settings)
        return GPMTrainer(model or tiny_model(), args, rows, processing_class=tokenizer).data_collator

    assert collator(pad_to_multiple_of=8).shared_prefix is False
    assert collator(neftune_noise_alpha=5.0).shared_prefix is False
    assert collator(tiny_model(use_lm_head=True), sft_loss_coef=0.1).shared_prefix is False
    padded = "Prompts are computed once for each response, in padded rows: "
    assert f"{padded}`sft_loss_coef` reads the tokens of padded rows." in messages
    for given, value in (("auto", True), ("true", True), (False, False), ("False", False)):
        assert collator(shared_prefix=given).shared_prefix is value
    with pytest.raises(ValueError, match="`pad_to_multiple_of` is about padded rows"):
        collator(pad_to_multiple_of=8, shared_prefix=True)
    with pytest.raises(ValueError, match="`shared_prefix` is 'maybe'"):
        PreferenceScorer(tiny_model(), tokenizer, shared_prefix="maybe")
