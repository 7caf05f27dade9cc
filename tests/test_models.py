"""The model: backbones, heads, gate, padding, loading and saving, PEFT, language-model head, configuration."""

import copy
import dataclasses
import json
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKBONES, NO_HEAD_DIM, TINY, lively_model, random_rows, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlavaConfig,
    PhiConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    set_seed,
)

from gpm_trl import GPMForPreference, GPMModelConfig, GPMOutput
from gpm_trl.models.configuration_gpm import GPM_FIELDS
from gpm_trl.preference import preference_matrix

# Its causal LM calls its weights otherwise.
GPT2 = GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1)
MOE = Qwen3MoeConfig(**TINY, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
TIED = Qwen3Config(**TINY, tie_word_embeddings=True)
SOFTCAPPED = Gemma2Config(**TINY, sliding_window=4, query_pre_attn_scalar=5, final_logit_softcapping=2.0)
CAUSAL_LMS = {**BACKBONES, "gpt2": GPT2, "moe": MOE, "tied": TIED}
LANGUAGE_MODELS = {"llama": BACKBONES["llama"], "gemma2": SOFTCAPPED, "tied": TIED, "gpt2": GPT2}
HEADS = ["embedding_head", "scale_gate"]
BRADLEY_TERRY = {"embedding_dim": 0, "reward_dim": 1}
GATED_BRADLEY_TERRY = {"embedding_dim": 0, "reward_dim": 3}
HRC = {"embedding_dim": 4, "reward_dim": 1}
LORA = {"r": 4, "target_modules": "all-linear", "modules_to_save": HEADS}

every_backbone = pytest.mark.parametrize("backbone", BACKBONES)
every_loader = pytest.mark.parametrize("loader", [GPMForPreference, AutoModel])


def save_causal_lm(directory, config, seed: int = 0):
    set_seed(seed)
    causal_lm = AutoModelForCausalLM.from_config(config).eval()
    causal_lm.save_pretrained(directory)
    return causal_lm


def save_gpm(directory, backbone: str = "qwen3", **settings) -> GPMForPreference:
    model = tiny_model(backbone, **settings)
    model.save_pretrained(directory)
    return model


def saved_names(directory) -> set[str]:
    return set(load_file(directory / "model.safetensors"))


@torch.no_grad()
def embed(model, input_ids, prompt_lengths, **kwargs) -> GPMOutput:
    return model(input_ids, prompt_lengths=prompt_lengths, **kwargs)


def ragged_rows(seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Rows of 10, 7 and 5 tokens, longer than the sliding windows, and their prompt lengths."""
    ids, prompt_lengths = random_rows(seed=seed)
    return [row[:length] for row, length in zip(ids, (10, 7, 5), strict=True)], prompt_lengths.clamp(max=4)


def pad(rows: list[torch.Tensor], side: str, width: int = 10, pad_id: int = 0) -> dict[str, torch.Tensor]:
    def padded(row, value):
        missing = width - len(row)
        return F.pad(row, (missing, 0) if side == "left" else (0, missing), value=value)

    return {
        "input_ids": torch.stack([padded(row, pad_id) for row in rows]),
        "attention_mask": torch.stack([padded(torch.ones_like(row), 0) for row in rows]),
    }


def assert_same_output(actual: GPMOutput, expected: GPMOutput, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual.embeddings, expected.embeddings, rtol=0, atol=atol)
    torch.testing.assert_close(actual.scales, expected.scales, rtol=0, atol=atol)


def assert_same_weights(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def gradients(model) -> dict[str, torch.Tensor]:
    ids, prompt_lengths = random_rows()
    model.zero_grad()
    output = model(ids, prompt_lengths=prompt_lengths)
    (output.embeddings.pow(3).sum() + output.scales.square().sum()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def record_inputs(module: torch.nn.Module) -> list[torch.Tensor]:
    """A list that gets the first input of each call of `module`."""
    inputs = []
    module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    return inputs


# Kinds of models


@pytest.mark.parametrize(
    ("settings", "name", "num_blocks", "temperature"),
    [
        ({}, "general preference", 2, 0.1),
        (HRC, "hybrid reward-cyclic", 3, 0.1),
        (BRADLEY_TERRY, "Bradley-Terry", 1, 1),
        (GATED_BRADLEY_TERRY, "Bradley-Terry", 3, 1),
    ],
    ids=str,
)
def test_kinds_differ_by_their_blocks_alone(settings, name, num_blocks, temperature):
    config = tiny_model(**settings).config
    assert (config.kind, config.num_blocks, config.temperature) == (f"{name} model", num_blocks, temperature)


@pytest.mark.parametrize(
    "settings",
    [
        BRADLEY_TERRY,
        {**BRADLEY_TERRY, "reward_clip": 0.3, "reward_weight": 2.0, "temperature": 0.5},
        {**GATED_BRADLEY_TERRY, "reward_weight": 2.0},
        {**GATED_BRADLEY_TERRY, "gate_activation": "softplus", "reward_clip": 0.3},
        HRC,
        {**HRC, "reward_clip": 0.3, "reward_weight": 2.0, "cyclic_weight": 0.5},
        {**HRC, "use_scale_gate": False, "normalize_embeddings": False},
        {**HRC, "gate_activation": "softplus", "cyclic_weight": 3.0},
    ],
    ids=str,
)
def test_log_odds_and_gradients_equal_the_formula_in_float64(settings):
    """`s = C1 (clip(r_i) - clip(r_j)) + C2 v_i^T D R^T D v_j`, of hidden states; `r = sum_l lambda_l r_l`."""
    model = lively_model(**settings)
    config, (ids, _) = model.config, random_rows(num_rows=4)
    ids[:, :3], ends = ids[0, :3], torch.full((4,), 3)  # one prompt
    output = model(ids, prompt_lengths=ends, output_hidden_states=True)
    scores = preference_matrix(output.embeddings, output.scales[0]) / output.temperature
    weights = torch.arange(16.0).view(4, 4).sin()  # of no symmetry
    heads = [weight for name, weight in model.named_parameters() if name.startswith(("embedding_head", "scale_gate"))]
    actual = torch.autograd.grad((scores * weights).sum(), heads)

    hidden = output.hidden_states[-1].detach().double()
    leaves = [head.detach().double().requires_grad_() for head in heads]
    raw = hidden[:, -1] @ leaves[0].T
    r, v = raw[:, : config.reward_dim], raw[:, config.reward_dim :]
    if config.reward_clip is not None:
        assert 0 < (r.abs() > config.reward_clip).sum() < r.numel()  # some are cut
        r = r.clip(-config.reward_clip, config.reward_clip)
    gate = torch.ones(config.embedding_dim // 2, dtype=torch.float64)
    if config.use_scale_gate:
        logits = leaves[1] @ hidden[0, 2]
        gate = logits.softmax(0) if config.gate_activation == "softmax" else torch.log1p(logits.exp())
    if config.normalize_embeddings:
        v = v / v.square().sum(-1, keepdim=True).sqrt()
    r = (r * gate).sum(-1) if config.reward_dim > 1 else r.sum(-1)
    expected = config.reward_weight * (r[:, None] - r[None, :])
    for block in range(config.embedding_dim // 2):
        x, y = v[:, 2 * block], v[:, 2 * block + 1]
        expected = expected + config.cyclic_weight * gate[block] * (x[:, None] * y[None, :] - y[:, None] * x[None, :])
    expected = expected / config.temperature
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(actual, torch.autograd.grad((expected * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-4)


def test_a_bradley_terry_model_of_version_1_is_read(tmp_path):
    """It had `bradley_terry` and the width of [r, 1], and the same weights."""
    model = save_gpm(tmp_path, **BRADLEY_TERRY)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("reward_dim", "reward_clip", "reward_weight", "cyclic_weight"):
        del config[name]
    old = {"format_version": 1, "bradley_terry": True, "embedding_dim": 2}
    (tmp_path / "config.json").write_text(json.dumps(config | old))
    loaded = GPMForPreference.from_pretrained(tmp_path)
    assert all(getattr(loaded.config, name) == getattr(model.config, name) for name in GPM_FIELDS)
    ids, prompt_lengths = random_rows()
    assert_same_output(embed(loaded, ids, prompt_lengths), embed(model, ids, prompt_lengths))


# Loading and saving a GPM


@every_loader
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "moe", "tied"])
def test_saved_model_is_loaded_equal(tmp_path, name, loader):
    set_seed(0)
    config = GPMModelConfig(text_config=CAUSAL_LMS[name], use_lm_head=True, learn_temperature=True)
    model = GPMForPreference(config)
    model.save_pretrained(tmp_path)
    loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is GPMForPreference
    assert not loaded.training
    assert not info["missing_keys"]
    assert_same_weights(loaded, model)
    tied = CAUSAL_LMS[name].tie_word_embeddings
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert ("lm_head.weight" in saved_names(tmp_path)) != tied


@every_loader
def test_fields_can_be_overridden_and_are_checked(tmp_path, loader):
    save_gpm(tmp_path, renderer={"max_length": 77})
    config = loader.from_pretrained(tmp_path, temperature=0.5, normalize_embeddings=False).config
    assert (config.temperature, config.normalize_embeddings, config.embedding_dim) == (0.5, False, 4)
    for renderer in (None, {}, {"long_rows": "error"}):  # what it leaves out is the checkpoint's
        loaded = loader.from_pretrained(tmp_path, renderer=renderer).config.renderer
        assert loaded == {"max_length": 77, "long_rows": "filter", **(renderer or {})}
    with pytest.raises(ValueError, match="must be positive and finite"):
        loader.from_pretrained(tmp_path, temperature=-1.0)
    with pytest.raises(ValueError, match="`use_safetensors=False` would load a pickle"):
        loader.from_pretrained(tmp_path, use_safetensors=False)


@pytest.mark.parametrize("save", [save_gpm, lambda directory: save_causal_lm(directory, BACKBONES["llama"])])
def test_a_truncated_backbone_raises(tmp_path, save):
    save(tmp_path)
    path = tmp_path / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("model.layers.1.")}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\..* and \d+ more"):
        GPMForPreference.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("setting", "weight"),
    [
        ("use_scale_gate", "scale_gate.weight"),
        ("learn_temperature", "learned_temperature.log_temperature"),
        ("use_lm_head", "lm_head.weight"),
    ],
)
@pytest.mark.parametrize("saved", [True, False])
def test_other_parts_than_were_saved_raise(tmp_path, saved, setting, weight):
    save_gpm(tmp_path, **{setting: saved})
    with pytest.raises(ValueError, match=f"{'holds' if saved else 'lacks'} {weight}"):
        GPMForPreference.from_pretrained(tmp_path, **{setting: not saved})


# From a causal LM


@pytest.mark.parametrize("name", CAUSAL_LMS)
def test_a_causal_lm_gets_new_heads_in_one_line_and_is_saved_under_its_own_names(tmp_path, name, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    causal_lm = save_causal_lm(tmp_path / "causal_lm", CAUSAL_LMS[name])
    caplog.clear()
    model = GPMForPreference.from_pretrained(tmp_path / "causal_lm", embedding_dim=4)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "new embedding head of 4 dimensions and a softmax scale gate" in record.getMessage()
    assert_same_weights(model.model, causal_lm.base_model)
    model.save_pretrained(tmp_path / "gpm")
    caplog.clear()
    assert_same_weights(GPMForPreference.from_pretrained(tmp_path / "gpm"), model)
    assert not caplog.records
    backbone_names = saved_names(tmp_path / "gpm") - {f"{head}.weight" for head in HEADS}
    assert all(name.startswith("model.") for name in backbone_names)


def test_a_model_of_several_parts_is_no_backbone(tmp_path):
    LlavaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="llava model of several parts"):
        GPMForPreference.from_pretrained(tmp_path)


def test_new_heads_have_the_deviation_of_the_specification_and_depend_on_the_seed_alone(tmp_path):
    save_causal_lm(tmp_path, BACKBONES["llama"])
    models = []
    for seed in (1, 1, 2):
        set_seed(seed)
        models.append(GPMForPreference.from_pretrained(tmp_path, embedding_dim=128, dtype=torch.bfloat16))
    for head in (models[0].embedding_head, models[0].scale_gate):
        assert head.weight.dtype == torch.float32
        assert head.weight.std().item() == pytest.approx(1 / 33, rel=0.1)
        assert head.weight.mean().item() == pytest.approx(0, abs=0.005)
    heads = [model.embedding_head.weight for model in models]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


# Embeddings and gate


@pytest.mark.parametrize(("backbone", "normalize"), [*((name, True) for name in BACKBONES), ("qwen3", False)])
def test_embeddings_and_scales_equal_those_computed_from_the_backbone(backbone, normalize):
    model = tiny_model(backbone, normalize_embeddings=normalize)
    rows, prompt_lengths = ragged_rows()
    output = embed(model, prompt_lengths=prompt_lengths, **pad(rows, "right"))
    for index, (row, prompt_length) in enumerate(zip(rows, prompt_lengths, strict=True)):
        with torch.no_grad():
            hidden = model.model(input_ids=row[None]).last_hidden_state[0]
        embedding = model.embedding_head.weight @ hidden[-1]
        logits = model.scale_gate.weight @ hidden[prompt_length - 1]
        norm = embedding.square().sum().sqrt()
        expected = embedding / norm if normalize else embedding
        torch.testing.assert_close(output.embeddings[index], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(output.embedding_norms[index], norm, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(output.scales[index], logits.exp() / logits.exp().sum(), rtol=0, atol=1e-5)


def test_gate_depends_on_the_prompt_alone(model):
    ids, _ = random_rows(num_rows=2)
    prompt = ids[0, :4]
    rows = [ids[0], torch.cat([prompt, ids[1, 4:]]), torch.cat([prompt, ids[1, :2]]), prompt, ids[1]]
    output = embed(model, prompt_lengths=torch.tensor([4] * 5), **pad(rows, "right"))
    torch.testing.assert_close(output.scales[:4], output.scales[:1].expand(4, -1), rtol=0, atol=1e-6)
    assert (output.scales[4] - output.scales[0]).abs().max() > 1e-4
    assert (output.embeddings[1:] - output.embeddings[0]).abs().max() > 1e-3


# Padding, modes and attention


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*BACKBONES, "gpt2", "moe"])
def test_padding_changes_nothing(name, side):
    set_seed(0)
    model = GPMForPreference(GPMModelConfig(text_config=CAUSAL_LMS[name], embedding_dim=4)).eval()
    rows, prompt_lengths = ragged_rows()
    for row, prompt_length in zip(rows, prompt_lengths, strict=True):
        row[0] = row[prompt_length - 1] = row[-1] = 2  # the id that rows are padded with
    padded = embed(model, prompt_lengths=prompt_lengths, **pad(rows, side, width=16, pad_id=2))
    for index, (row, length) in enumerate(zip(rows, prompt_lengths, strict=True)):
        alone = embed(model, row[None], length[None])
        torch.testing.assert_close(padded.embeddings[index], alone.embeddings[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(padded.scales[index], alone.scales[0], rtol=0, atol=1e-5)


# What goes in and comes out


def test_gates_are_softmax_softplus_or_none():
    ids, prompt_lengths = random_rows()
    positive = embed(tiny_model(gate_activation="softplus"), ids, prompt_lengths).scales
    torch.testing.assert_close(positive.expm1().log().softmax(-1), embed(tiny_model(), ids, prompt_lengths).scales)
    assert (positive.sum(-1) - 1).abs().min() > 1e-3
    model = tiny_model(use_scale_gate=False)
    output = embed(model, ids, None)
    assert torch.equal(output.scales, torch.ones(3, 2))
    assert not hasattr(model, "scale_gate")
    assert torch.equal(output.embeddings, embed(model, ids, prompt_lengths).embeddings)


def test_output_has_states_on_request_and_no_logits(model):
    model.set_attn_implementation("eager")
    output = embed(model, *random_rows(), output_hidden_states=True, output_attentions=True)
    assert "logits" not in {field.name for field in dataclasses.fields(GPMOutput)}
    assert [tuple(states.shape) for states in output.hidden_states] == [(3, 10, 32)] * 3
    assert [tuple(attention.shape) for attention in output.attentions] == [(3, 4, 10, 10)] * 2


def test_input_embeddings_and_positions_can_be_given(model):
    ids, prompt_lengths = random_rows()
    expected = embed(model, ids, prompt_lengths)
    positions = torch.arange(10).expand(3, -1)
    given = {"inputs_embeds": model.get_input_embeddings()(ids), "position_ids": positions}
    assert_same_output(embed(model, None, prompt_lengths, **given), expected, atol=1e-6)
    stretched = embed(model, ids, prompt_lengths, position_ids=3 * positions)
    assert (stretched.embeddings - expected.embeddings).abs().max() > 1e-3


IDS = random_rows()[0]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": None}, "`input_ids` or `inputs_embeds`"),
        ({"prompt_lengths": None}, "pass `prompt_lengths`"),
        ({"prompt_lengths": torch.tensor([3, 0, 3])}, r"is \[3, 0, 3\]; each must be between 1 and .* \[10, "),
        ({"prompt_lengths": torch.tensor([3, 11, 3])}, "must be between 1 and"),
        ({"attention_mask": torch.tensor([[1], [0], [1]]).expand(3, 10)}, "all zeros"),
        ({"lm_labels": IDS}, "use_lm_head=True"),
    ],
)
def test_inputs_that_cannot_be_embedded_raise(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": IDS, "prompt_lengths": torch.tensor([3, 3, 3]), **inputs})


# Language-model head


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_lm_loss_equals_that_of_the_causal_lm(tmp_path, name, side):
    causal_lm = save_causal_lm(tmp_path, LANGUAGE_MODELS[name])
    model = GPMForPreference.from_pretrained(tmp_path, use_lm_head=True)
    rows, prompt_lengths = ragged_rows()
    labels = [torch.cat([torch.full_like(row[:-3], -100), row[-3:]]) for row in rows]
    labels[-1] = torch.full_like(rows[-1], -100)
    lm_labels = pad(labels, side, pad_id=-100)["input_ids"]
    lm_loss = embed(model, prompt_lengths=prompt_lengths, lm_labels=lm_labels, **pad(rows, side)).lm_loss
    with torch.no_grad():
        expected = [causal_lm(rows[index][None], labels=labels[index][None]).loss for index in range(len(rows) - 1)]
    torch.testing.assert_close(lm_loss[:-1], torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert lm_loss[-1] == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GraniteConfig(**NO_HEAD_DIM, logits_scaling=2.0), r"scales its logits \(logits_scaling"),
        (PhiConfig(**NO_HEAD_DIM | {"num_key_value_heads": 4}), r"lm_head\.bias"),
    ],
    ids=["scale", "bias"],
)
def test_language_model_heads_of_another_kind_raise(tmp_path, config, message):
    save_causal_lm(tmp_path, config)
    with pytest.raises(ValueError, match=message):
        GPMForPreference.from_pretrained(tmp_path, use_lm_head=True)


def test_a_backbone_without_a_language_model_is_loaded_and_lacks_its_head(tmp_path):
    backbone = AutoModel.from_config(BACKBONES["qwen3"])
    backbone.save_pretrained(tmp_path)
    assert_same_weights(GPMForPreference.from_pretrained(tmp_path).model, backbone)
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight"):
        GPMForPreference.from_pretrained(tmp_path, use_lm_head=True)


# Temperature


def test_another_temperature_than_the_learned_one_is_refused(tmp_path):
    save_gpm(tmp_path, learn_temperature=True)
    assert GPMForPreference.from_pretrained(tmp_path, temperature=0.1).temperature.item() == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"`temperature` would be ignored: .* has a learned one. Leave it out"):
        GPMForPreference.from_pretrained(tmp_path, temperature=0.5)


def test_learned_temperature_starts_at_the_configured_one_gets_a_gradient_and_is_saved(tmp_path):
    model = tiny_model(learn_temperature=True, temperature=0.3)
    ids, prompt_lengths = random_rows()
    output = model(ids, prompt_lengths=prompt_lengths)
    assert output.temperature.shape == ()
    assert output.temperature.item() == pytest.approx(0.3)
    (1 / output.temperature).backward()
    parameter = model.learned_temperature.log_temperature
    assert parameter.grad.item() == pytest.approx(-1 / 0.3)
    with torch.no_grad():
        parameter.fill_(math.log(0.7))
    model.save_pretrained(tmp_path)
    assert GPMForPreference.from_pretrained(tmp_path).temperature.item() == pytest.approx(0.7)


# Precision


def test_heads_are_computed_in_float32_with_a_half_precision_backbone_and_under_autocast(tmp_path):
    expected = embed(save_gpm(tmp_path, use_lm_head=True), *random_rows())
    ids, prompt_lengths = random_rows()
    model = GPMForPreference.from_pretrained(tmp_path, dtype=torch.bfloat16)
    embedded, gated = record_inputs(model.embedding_head), record_inputs(model.scale_gate)
    with torch.autocast("cpu", torch.bfloat16):
        output = embed(model, ids, prompt_lengths, lm_labels=ids)
    for name in ("embeddings", "scales", "temperature", "embedding_norms", "lm_loss"):
        assert output[name].dtype == torch.float32, name
    embeddings = embedded[0].float() @ model.embedding_head.weight.T
    logits = gated[0].float() @ model.scale_gate.weight.T
    torch.testing.assert_close(output.embeddings, F.normalize(embeddings), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output.scales, logits.softmax(-1), rtol=1e-6, atol=1e-6)
    assert_same_output(output, expected, atol=0.1)


@every_loader
def test_heads_stay_in_float32_with_a_bfloat16_backbone(tmp_path, loader):
    saved = save_gpm(tmp_path / "float32", learn_temperature=True)
    model = loader.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    for name in ("embedding_head", "scale_gate", "learned_temperature"):
        assert_same_weights(getattr(model, name), getattr(saved, name))
    model.save_pretrained(tmp_path / "bfloat16")
    loaded = loader.from_pretrained(tmp_path / "bfloat16", dtype="auto").state_dict()
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {
        name: torch.bfloat16 if name.startswith("model.") else torch.float32 for name in saved.state_dict()
    }


# Gradients, checkpointing, PEFT


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(("backbone", "lora"), [("qwen3", False), ("gemma2", False), ("qwen3", True)])
def test_gradient_checkpointing_computes_each_layer_twice_and_the_same_gradients(backbone, lora, use_reentrant):
    model = tiny_model(backbone)
    trained = get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False)) if lora else model
    trained.train()
    expected = gradients(trained)
    calls = [record_inputs(layer.input_layernorm) for layer in model.model.layers]
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    trained.enable_input_require_grads()
    checkpointed = gradients(trained)
    assert [len(inputs) for inputs in calls] == [2, 2]
    assert any("lora_A" in name for name in expected) == lora
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7)


@every_backbone
def test_an_adapter_of_all_linear_layers_spares_the_heads_and_is_restored_with_them(tmp_path, backbone):
    heads = [*HEADS, "learned_temperature"]
    model = save_gpm(tmp_path / "gpm", backbone, learn_temperature=True)
    before = embed(model, *random_rows())
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=heads, init_lora_weights=False)
    peft_model = get_peft_model(model, config).eval()
    adapted = {name for name, _ in peft_model.named_modules() if name.endswith("lora_A")}
    assert adapted
    assert all(".model.layers." in name for name in adapted)
    with torch.no_grad():
        for name in heads:
            next(getattr(model, name).modules_to_save["default"].parameters()).mul_(0.7)
    expected = embed(peft_model, *random_rows())
    peft_model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(GPMForPreference.from_pretrained(tmp_path / "gpm"), tmp_path / "adapter").eval()
    restored = embed(loaded, *random_rows())
    assert_same_output(restored, expected, atol=1e-6)
    assert restored.temperature == expected.temperature != before.temperature
    assert (expected.embeddings - before.embeddings).abs().max() > 1e-2


# Token embeddings


@pytest.mark.parametrize("name", ["qwen3", "tied", "gpt2"])
@pytest.mark.parametrize("use_lm_head", [True, False])
def test_resizing_keeps_the_old_tokens(tmp_path, use_lm_head, name):
    set_seed(0)
    model = GPMForPreference(GPMModelConfig(text_config=copy.deepcopy(CAUSAL_LMS[name]), use_lm_head=use_lm_head))
    ids, prompt_lengths = random_rows()
    old, expected = model.get_input_embeddings().weight.clone(), embed(model.eval(), ids, prompt_lengths)
    model.resize_token_embeddings(300)
    assert model.get_input_embeddings() is model.model.get_input_embeddings()
    assert torch.equal(model.get_input_embeddings().weight[:259], old)
    assert_same_output(embed(model, ids, prompt_lengths), expected, atol=1e-6)
    if use_lm_head:
        ids[:, -1] = 299
        assert model.get_output_embeddings().weight.shape == (300, 32)
        assert torch.isfinite(embed(model, ids, prompt_lengths, lm_labels=ids).lm_loss).all()
    else:
        assert model.get_output_embeddings() is None
    model.save_pretrained(tmp_path)
    assert_same_weights(GPMForPreference.from_pretrained(tmp_path), model)


# Configuration


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({"embedding_dim": width}, f"`embedding_dim` is {width}; .*even number") for width in (-2, 7, 2.0)),
        *(({"temperature": tau}, f"`temperature` is {tau}; .*positive") for tau in (0, math.inf, math.nan)),
        *(({**HRC, name: -1.0}, f"`{name}` is -1.0; .*positive") for name in ("reward_weight", "cyclic_weight")),
        *(({**HRC, "reward_clip": delta}, f"`reward_clip` is {delta}; .*positive") for delta in (0, -1.0, math.inf)),
        *(({name: 2.0}, "need `reward_dim=1`: give it") for name in ("reward_weight", "reward_clip")),
        *(({"reward_dim": dim}, f"`reward_dim` is {dim}; it is 1 with") for dim in (2, -1, 1.0)),
        (
            {**GATED_BRADLEY_TERRY, "use_scale_gate": False},
            "Several rewards add up to one, but where a gate weighs them",
        ),
        ({"embedding_dim": 0}, "`embedding_dim` is 0 and `reward_dim` too: a Bradley-Terry model has `reward_dim=1`"),
        ({"gate_activation": "relu"}, r"'relu'; choose one of \('softmax', 'softplus'\)"),
        (
            {"renderer": {"max_len": 5}},
            r"unknown keys \['max_len'\]; it takes \['conversational', 'convention', 'long_rows'",
        ),
        ({"renderer": {"max_length": 1}}, "`max_length` is 1; .*at least 2"),
        ({"renderer": {"long_rows": "drop"}}, "'drop'; choose one of .*'filter', 'truncate_prompt', 'error'"),
        ({"renderer": {"long_rows": "truncate_end"}}, "`long_rows` is 'truncate_end'; choose one of"),
        ({"renderer": {"convention": "theirs"}}, "`convention` of `renderer` is 'theirs'; choose one of"),
        ({"renderer": {"pad_token_id": 0}}, "has a `pad_token_id`, which the convention 'gpm' does not use"),
        *(
            ({**BRADLEY_TERRY, name: value}, "`embedding_dim=0` has no cyclic blocks for `normalize_embeddings`")
            for name, value in (("cyclic_weight", 0.5), ("normalize_embeddings", True))
        ),
        *(({"format_version": version}, "format_version") for version in (0, 3, "1.5", None)),
    ],
    ids=str,
)
def test_settings_out_of_range_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        GPMModelConfig(**settings)


def test_configuration_round_trip(tmp_path):
    settings = {"embedding_dim": 8, "reward_dim": 1, "reward_clip": 3, "reward_weight": 2.0, "cyclic_weight": 0.5}
    settings |= {"use_scale_gate": False, "gate_activation": "softplus", "temperature": 0.25}
    settings |= {"normalize_embeddings": False, "learn_temperature": True, "use_lm_head": True}
    settings["renderer"] = {"max_length": 77, "long_rows": "truncate_prompt"}
    config = GPMModelConfig(text_config=BACKBONES["gemma2"], **settings)
    config.save_pretrained(tmp_path)
    for loaded in (GPMModelConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is GPMModelConfig
        assert loaded.num_labels == 1  # `trl.RewardTrainer` refuses others
        assert {name: getattr(loaded, name) for name in settings} == settings
        assert loaded.text_config.to_dict() == config.text_config.to_dict()
    assert GPMModelConfig(renderer={"long_rows": "error"}).renderer == {"max_length": 2048, "long_rows": "error"}
