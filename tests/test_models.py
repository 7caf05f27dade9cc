"""The model: backbones, heads, gate, padding, loading and saving, PEFT, language-model head, configuration."""

import dataclasses
import json
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKBONES, TINY, random_rows, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    set_seed,
)
from transformers.utils import is_flash_attn_2_available

from gpm_trl import GPMForPreference, GPMModelConfig, GPMOutput
from gpm_trl.preference import preference_matrix

WITHOUT_HEAD_DIM = {name: value for name, value in TINY.items() if name != "head_dim"}
GPT2 = GPT2Config(
    vocab_size=259,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=64,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.1,
)
GPT_NEOX = GPTNeoXConfig(
    vocab_size=259,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    initializer_range=0.1,
)
OPT = OPTConfig(
    vocab_size=259,
    hidden_size=32,
    word_embed_proj_dim=32,
    ffn_dim=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    init_std=0.1,
)
MOE = Qwen3MoeConfig(**TINY, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
TIED = Qwen3Config(**TINY, tie_word_embeddings=True)
SOFTCAPPED = Gemma2Config(**TINY, sliding_window=4, query_pre_attn_scalar=8, final_logit_softcapping=2.0)
OTHER_NAMES = {"gpt2": GPT2, "gpt_neox": GPT_NEOX, "opt": OPT}  # whose causal LMs call their weights otherwise
CAUSAL_LMS = {**BACKBONES, **OTHER_NAMES, "moe": MOE, "tied": TIED}
LANGUAGE_MODELS = {
    "llama": BACKBONES["llama"],
    "gemma2": SOFTCAPPED,
    "qwen3": BACKBONES["qwen3"],
    "qwen3_tied": TIED,
    "gpt2": GPT2,
}
HEADS = ["embedding_head", "scale_gate"]
LORA = {"r": 4, "target_modules": "all-linear", "modules_to_save": HEADS}

every_backbone = pytest.mark.parametrize("backbone", BACKBONES)
every_loader = pytest.mark.parametrize("loader", [GPMForPreference, AutoModel])
every_causal_lm = pytest.mark.parametrize("name", CAUSAL_LMS)


def save_causal_lm(directory, config, seed: int = 0):
    set_seed(seed)
    causal_lm = AutoModelForCausalLM.from_config(config).eval()
    causal_lm.save_pretrained(directory)
    return causal_lm


def save_gpm(directory, backbone: str = "qwen3", **settings) -> GPMForPreference:
    model = tiny_model(backbone, **settings)
    model.save_pretrained(directory)
    return model


def drop_weights(directory, *prefixes: str) -> None:
    """Remove the weights whose names start with one of `prefixes` from the checkpoint in `directory`."""
    path = directory / "model.safetensors"
    weights = load_file(path)
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(prefixes)}
    assert len(kept) < len(weights)
    save_file(kept, path, metadata={"format": "pt"})


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


def embed_one_by_one(model, rows, prompt_lengths) -> GPMOutput:
    outputs = [embed(model, row[None], length[None]) for row, length in zip(rows, prompt_lengths, strict=True)]
    return GPMOutput(
        embeddings=torch.cat([output.embeddings for output in outputs]),
        scales=torch.cat([output.scales for output in outputs]),
    )


def assert_same_output(actual: GPMOutput, expected: GPMOutput, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual.embeddings, expected.embeddings, rtol=0, atol=atol)
    torch.testing.assert_close(actual.scales, expected.scales, rtol=0, atol=atol)


def assert_same_weights(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def objective(output: GPMOutput) -> torch.Tensor:
    """A scalar that depends on all scores."""
    matrix = preference_matrix(output.embeddings.unsqueeze(0), output.scales[:1])
    return (matrix.triu() / output.temperature).sigmoid().log().sum() + output.scales.square().sum()


def gradients(model) -> dict[str, torch.Tensor]:
    ids, prompt_lengths = random_rows()
    model.zero_grad()
    objective(model(ids, prompt_lengths=prompt_lengths)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def record_inputs(module: torch.nn.Module) -> list[torch.Tensor]:
    """A list that gets the first input of each call of `module`."""
    inputs = []
    module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    return inputs


def lora_model(model: GPMForPreference, seed: int = 1) -> PeftModel:
    """With random, non-zero values in every trained weight."""
    peft_model = get_peft_model(model, LoraConfig(**LORA))
    set_seed(seed)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return peft_model


# Loading and saving a GPM


@every_causal_lm
@every_loader
def test_saved_model_is_loaded_equal(tmp_path, name, loader):
    set_seed(0)
    config = GPMModelConfig(text_config=CAUSAL_LMS[name], use_lm_head=True, learn_temperature=True)
    model = GPMForPreference(config)
    model.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is GPMForPreference
    assert_same_weights(loaded, model)


@every_backbone
def test_saved_model_scores_the_same(tmp_path, backbone):
    model = save_gpm(tmp_path, backbone)
    loaded = GPMForPreference.from_pretrained(tmp_path)
    assert_same_output(embed(loaded, *random_rows()), embed(model, *random_rows()), atol=1e-6)


def test_loaded_model_is_in_evaluation_mode(tmp_path):
    save_gpm(tmp_path)
    assert not GPMForPreference.from_pretrained(tmp_path).training


def test_fields_of_a_gpm_can_be_overridden(tmp_path):
    save_gpm(tmp_path)
    config = GPMForPreference.from_pretrained(tmp_path, temperature=0.5, normalize_embeddings=False).config
    assert (config.temperature, config.normalize_embeddings, config.embedding_dim) == (0.5, False, 4)


@every_loader
def test_overridden_fields_are_checked(tmp_path, loader):
    save_gpm(tmp_path)
    with pytest.raises(ValueError, match="must be positive and finite"):
        loader.from_pretrained(tmp_path, temperature=-1.0)


def test_loading_info_is_returned(tmp_path):
    save_gpm(tmp_path)
    model, info = GPMForPreference.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, GPMForPreference)
    assert not info["missing_keys"]


@pytest.mark.parametrize("head", HEADS)
def test_gpm_without_a_head_raises(tmp_path, head):
    save_gpm(tmp_path)
    drop_weights(tmp_path, head)
    with pytest.raises(ValueError, match=rf"lacks {head}\.weight"):
        GPMForPreference.from_pretrained(tmp_path)


def test_gpm_with_a_truncated_backbone_raises(tmp_path):
    save_gpm(tmp_path)
    drop_weights(tmp_path, "model.layers.1.")
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\..* and \d+ more"):
        GPMForPreference.from_pretrained(tmp_path)


def test_heads_of_another_width_raise(tmp_path):
    save_gpm(tmp_path, embedding_dim=4)
    with pytest.raises(ValueError, match=r"embedding_head\.weight \[4, 32\], expected \[8, 32\]"):
        GPMForPreference.from_pretrained(tmp_path, embedding_dim=8)


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        ({"use_scale_gate": True}, {"use_scale_gate": False}, r"holds scale_gate\.weight"),
        ({"use_scale_gate": False}, {"use_scale_gate": True}, r"lacks scale_gate\.weight"),
        ({"learn_temperature": True}, {"learn_temperature": False}, r"holds learned_temperature\.log_temperature"),
        ({"learn_temperature": False}, {"learn_temperature": True}, r"lacks learned_temperature\.log_temperature"),
        ({"use_lm_head": True}, {"use_lm_head": False}, r"holds lm_head\.weight"),
        ({"use_lm_head": False}, {"use_lm_head": True}, r"lacks lm_head\.weight"),
    ],
)
def test_other_parts_than_were_saved_raise(tmp_path, saved, loaded, message):
    save_gpm(tmp_path, **saved)
    with pytest.raises(ValueError, match=message):
        GPMForPreference.from_pretrained(tmp_path, **loaded)


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is installed")
def test_missing_flash_attention_raises_transformers_error(tmp_path):
    save_gpm(tmp_path)
    with pytest.raises(ImportError, match="FlashAttention2 has been toggled on"):
        GPMForPreference.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


# From a causal LM


@every_causal_lm
def test_weights_of_a_causal_lm_are_loaded_as_they_are(tmp_path, name):
    causal_lm = save_causal_lm(tmp_path, CAUSAL_LMS[name])
    model = GPMForPreference.from_pretrained(tmp_path)
    assert_same_weights(model.model, causal_lm.base_model)


@every_causal_lm
def test_model_from_a_causal_lm_is_saved_under_its_own_names_and_loaded_equal(tmp_path, name):
    save_causal_lm(tmp_path / "causal_lm", CAUSAL_LMS[name])
    model = GPMForPreference.from_pretrained(tmp_path / "causal_lm")
    model.save_pretrained(tmp_path / "gpm")
    assert_same_weights(GPMForPreference.from_pretrained(tmp_path / "gpm"), model)
    backbone_names = saved_names(tmp_path / "gpm") - {f"{head}.weight" for head in HEADS}
    assert all(name.startswith("model.") for name in backbone_names)


@pytest.mark.parametrize("name", [*OTHER_NAMES, "qwen3"])
def test_checkpoint_of_a_backbone_without_a_language_model_is_loaded(tmp_path, name):
    set_seed(0)
    backbone = AutoModel.from_config(CAUSAL_LMS[name])
    backbone.save_pretrained(tmp_path)
    assert_same_weights(GPMForPreference.from_pretrained(tmp_path).model, backbone)


@every_causal_lm
def test_new_heads_are_announced_in_one_line(tmp_path, name, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    save_causal_lm(tmp_path, CAUSAL_LMS[name])
    caplog.clear()
    GPMForPreference.from_pretrained(tmp_path, embedding_dim=4)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "new embedding head of 4 dimensions and a softmax scale gate" in record.getMessage()


def test_loading_a_gpm_says_nothing(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    save_gpm(tmp_path)
    caplog.clear()
    GPMForPreference.from_pretrained(tmp_path)
    assert not caplog.records


def test_new_heads_have_the_deviation_of_the_specification(tmp_path):
    save_causal_lm(tmp_path, BACKBONES["llama"])
    model = GPMForPreference.from_pretrained(tmp_path, embedding_dim=128)
    for head in (model.embedding_head, model.scale_gate):
        assert head.weight.std().item() == pytest.approx(1 / 33, rel=0.1)
        assert head.weight.mean().item() == pytest.approx(0, abs=0.005)


def test_new_heads_depend_on_the_seed_alone(tmp_path):
    save_causal_lm(tmp_path, BACKBONES["llama"])
    heads = []
    for seed in (1, 1, 2):
        set_seed(seed)
        heads.append(GPMForPreference.from_pretrained(tmp_path).embedding_head.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_sharded_causal_lm_is_loaded(tmp_path):
    causal_lm = AutoModelForCausalLM.from_config(BACKBONES["qwen3"])
    causal_lm.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_weights(GPMForPreference.from_pretrained(tmp_path).model, causal_lm.base_model)


def test_truncated_causal_lm_raises(tmp_path):
    save_causal_lm(tmp_path, BACKBONES["llama"])
    drop_weights(tmp_path, "model.layers.1.")
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\."):
        GPMForPreference.from_pretrained(tmp_path)


# Embeddings and gate


@every_backbone
def test_embeddings_and_scales_equal_those_computed_from_the_backbone(backbone):
    model = tiny_model(backbone)
    rows, prompt_lengths = ragged_rows()
    output = embed(model, prompt_lengths=prompt_lengths, **pad(rows, "right"))
    for index, (row, prompt_length) in enumerate(zip(rows, prompt_lengths, strict=True)):
        with torch.no_grad():
            hidden = model.model(input_ids=row[None]).last_hidden_state[0]
        embedding = model.embedding_head.weight @ hidden[-1]
        logits = model.scale_gate.weight @ hidden[prompt_length - 1]
        norm = embedding.square().sum().sqrt()
        torch.testing.assert_close(output.embeddings[index], embedding / norm, rtol=0, atol=1e-5)
        torch.testing.assert_close(output.embedding_norms[index], norm, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(output.scales[index], logits.exp() / logits.exp().sum(), rtol=0, atol=1e-5)


def test_embeddings_have_unit_length(model):
    norms = embed(model, *random_rows()).embeddings.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(3))


def test_embeddings_are_not_normalised_when_switched_off():
    output = embed(tiny_model(normalize_embeddings=False), *random_rows())
    normalised = embed(tiny_model(), *random_rows())
    torch.testing.assert_close(output.embeddings, normalised.embeddings * normalised.embedding_norms[:, None])
    torch.testing.assert_close(output.embeddings.norm(dim=-1), output.embedding_norms)


def test_softplus_gate_is_the_softplus_of_the_logits_of_the_softmax_gate():
    positive = embed(tiny_model(gate_activation="softplus"), *random_rows()).scales
    logits = positive.expm1().log()
    torch.testing.assert_close(logits.softmax(-1), embed(tiny_model(), *random_rows()).scales)
    assert (positive.sum(-1) - 1).abs().min() > 1e-3


def test_model_without_a_gate_has_unit_scales_and_needs_no_prompt_lengths():
    ids, prompt_lengths = random_rows()
    model = tiny_model(use_scale_gate=False)
    output = embed(model, ids, None)
    assert torch.equal(output.scales, torch.ones(3, 2))
    assert not hasattr(model, "scale_gate")
    assert torch.equal(output.embeddings, embed(model, ids, prompt_lengths).embeddings)


@every_backbone
def test_gate_depends_on_the_prompt_alone(backbone):
    model = tiny_model(backbone)
    ids, _ = random_rows(num_rows=2)
    prompt, prompt_lengths = ids[0, :4], torch.tensor([4, 4, 4])
    rows = [ids[0], torch.cat([prompt, ids[1, 4:]]), torch.cat([prompt, ids[1, :2]])]
    output = embed(model, prompt_lengths=prompt_lengths, **pad(rows, "right"))
    torch.testing.assert_close(output.scales, output.scales[:1].expand(3, -1), rtol=0, atol=1e-6)
    assert (output.embeddings[1:] - output.embeddings[0]).abs().max() > 1e-3


@every_backbone
def test_gate_changes_with_the_prompt(backbone):
    model = tiny_model(backbone)
    ids, _ = random_rows(num_rows=1)
    other = ids.clone()
    other[0, 3] += 1
    scales = embed(model, torch.cat([ids, other]), torch.tensor([4, 4])).scales
    assert (scales[0] - scales[1]).abs().max() > 1e-4


def test_prompt_may_be_the_whole_row(model):
    ids, _ = random_rows(num_rows=1)
    whole = embed(model, ids[:, :5], torch.tensor([5]))
    prefix = embed(model, ids, torch.tensor([5]))
    torch.testing.assert_close(whole.scales, prefix.scales, rtol=0, atol=1e-6)


# Padding, modes and attention


@pytest.mark.parametrize("width", [10, 16])
@pytest.mark.parametrize("side", ["left", "right"])
@every_backbone
def test_padding_changes_nothing(backbone, side, width):
    model = tiny_model(backbone)
    rows, prompt_lengths = ragged_rows()
    padded = embed(model, prompt_lengths=prompt_lengths, **pad(rows, side, width))
    assert_same_output(padded, embed_one_by_one(model, rows, prompt_lengths))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*OTHER_NAMES, "moe"])
def test_padding_changes_nothing_for_backbones_with_other_positions_and_experts(name, side):
    set_seed(0)
    model = GPMForPreference(GPMModelConfig(text_config=CAUSAL_LMS[name], embedding_dim=4)).eval()
    rows, prompt_lengths = ragged_rows()
    padded = embed(model, prompt_lengths=prompt_lengths, **pad(rows, side, width=16))
    assert_same_output(padded, embed_one_by_one(model, rows, prompt_lengths))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_id_inside_a_row_changes_nothing(model, side):
    eos = TINY["eos_token_id"]
    rows, prompt_lengths = ragged_rows()
    for row, prompt_length in zip(rows, prompt_lengths, strict=True):
        row[0] = row[prompt_length - 1] = row[-1] = eos
    padded_with_eos = embed(model, prompt_lengths=prompt_lengths, **pad(rows, side, pad_id=eos))
    assert_same_output(padded_with_eos, embed_one_by_one(model, rows, prompt_lengths))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_mask_of_another_dtype_changes_nothing(model, dtype):
    rows, prompt_lengths = ragged_rows()
    batch = pad(rows, "left")
    expected = embed(model, prompt_lengths=prompt_lengths, **batch)
    batch["attention_mask"] = batch["attention_mask"].to(dtype)
    assert_same_output(embed(model, prompt_lengths=prompt_lengths, **batch), expected)


@every_backbone
def test_training_mode_equals_evaluation_mode(backbone):
    model = tiny_model(backbone)
    expected = embed(model, *random_rows())
    assert_same_output(embed(model.train(), *random_rows()), expected, atol=1e-6)


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name != "gemma2"])  # it has no SDPA
def test_eager_attention_equals_sdpa(tmp_path, backbone):
    save_gpm(tmp_path, backbone)
    rows, prompt_lengths = ragged_rows()
    outputs = []
    for implementation in ("eager", "sdpa"):
        model = GPMForPreference.from_pretrained(tmp_path, attn_implementation=implementation)
        assert model.model.config._attn_implementation == implementation
        outputs.append(embed(model, prompt_lengths=prompt_lengths, **pad(rows, "left")))
    assert_same_output(*outputs)


def test_positions_count_the_tokens_of_a_row(model):
    rows, prompt_lengths = ragged_rows()
    seen = {}
    model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    embed(model, prompt_lengths=prompt_lengths, **pad(rows, "left"))
    for positions, row in zip(seen["position_ids"], rows, strict=True):
        assert positions[-len(row) :].tolist() == list(range(len(row)))


def test_backbone_keeps_no_cache(model):
    seen = {}
    model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    embed(model, *random_rows())
    assert seen["use_cache"] is False


def test_given_positions_are_used(model):
    ids, prompt_lengths = random_rows()
    stretched = embed(model, ids, prompt_lengths, position_ids=3 * torch.arange(10).expand(3, -1))
    assert (stretched.embeddings - embed(model, ids, prompt_lengths).embeddings).abs().max() > 1e-3


@every_backbone
def test_input_embeddings_can_be_given_instead_of_ids(backbone):
    model = tiny_model(backbone)
    ids, prompt_lengths = random_rows()
    with torch.no_grad():
        inputs_embeds = model.get_input_embeddings()(ids)
    output = embed(model, None, prompt_lengths, inputs_embeds=inputs_embeds)
    assert_same_output(output, embed(model, ids, prompt_lengths), atol=1e-6)


# Output


def test_output_has_no_logits(model):
    assert "logits" not in {field.name for field in dataclasses.fields(GPMOutput)}
    assert not hasattr(embed(model, *random_rows()), "logits")


def test_output_has_the_configured_temperature():
    output = embed(tiny_model(temperature=0.3), *random_rows())
    assert output.temperature.shape == ()
    assert output.temperature.item() == pytest.approx(0.3)


def test_hidden_states_and_attentions_are_passed_on(tmp_path):
    save_gpm(tmp_path)
    model = GPMForPreference.from_pretrained(tmp_path, attn_implementation="eager")
    output = embed(model, *random_rows(), output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in output.hidden_states] == [(3, 10, 32)] * 3
    assert [tuple(attention.shape) for attention in output.attentions] == [(3, 4, 10, 10)] * 2


def test_hidden_states_and_attentions_are_left_out_by_default(model):
    output = embed(model, *random_rows())
    assert output.hidden_states is None
    assert output.attentions is None


# Errors of the forward pass


def test_missing_prompt_lengths_raise(model):
    with pytest.raises(ValueError, match="pass `prompt_lengths`"):
        model(random_rows()[0])


@pytest.mark.parametrize("length", [-1, 0, 8])
def test_prompt_lengths_out_of_range_raise(model, length):
    rows, prompt_lengths = ragged_rows()
    prompt_lengths[1] = length
    with pytest.raises(ValueError, match=r"between 1 and the number of tokens of the row \(\[10, 7, 5\]\)"):
        model(prompt_lengths=prompt_lengths, **pad(rows, "left"))


@pytest.mark.parametrize("use_scale_gate", [True, False])
def test_row_without_tokens_raises(use_scale_gate):
    ids, prompt_lengths = random_rows()
    mask = torch.ones_like(ids)
    mask[1] = 0
    with pytest.raises(ValueError, match="all zeros"):
        tiny_model(use_scale_gate=use_scale_gate)(ids, mask, prompt_lengths)


def test_labels_without_a_language_model_head_raise(model):
    ids, prompt_lengths = random_rows()
    with pytest.raises(ValueError, match="use_lm_head=True"):
        model(ids, prompt_lengths=prompt_lengths, lm_labels=ids)


def test_no_input_raises(model):
    with pytest.raises(ValueError, match="`input_ids` or `inputs_embeds`"):
        model(prompt_lengths=torch.tensor([1]))


# Language-model head


def response_labels(batch: dict[str, torch.Tensor], labelled: int = 3) -> torch.Tensor:
    """The last `labelled` tokens of each row but the last row, which has no labels."""
    labels = torch.full_like(batch["input_ids"], -100)
    for row, mask in enumerate(batch["attention_mask"][:-1]):
        positions = mask.nonzero().flatten()[-labelled:]
        labels[row, positions] = batch["input_ids"][row, positions]
    return labels


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_lm_loss_equals_that_of_the_causal_lm(tmp_path, name, side):
    causal_lm = save_causal_lm(tmp_path, LANGUAGE_MODELS[name])
    model = GPMForPreference.from_pretrained(tmp_path, use_lm_head=True)
    rows, prompt_lengths = ragged_rows()
    batch = pad(rows, side)
    lm_loss = embed(model, prompt_lengths=prompt_lengths, lm_labels=response_labels(batch), **batch).lm_loss
    with torch.no_grad():
        labels = [torch.cat([torch.full_like(row[:-3], -100), row[-3:]]) for row in rows[:-1]]
        expected = [causal_lm(row[None], labels=label[None]).loss for row, label in zip(rows, labels, strict=False)]
    torch.testing.assert_close(lm_loss[:-1], torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert lm_loss[-1] == 0


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_model_head_is_saved_and_loaded_equal(tmp_path, name):
    save_causal_lm(tmp_path / "causal_lm", LANGUAGE_MODELS[name])
    model = GPMForPreference.from_pretrained(tmp_path / "causal_lm", use_lm_head=True)
    model.save_pretrained(tmp_path / "gpm")
    loaded = GPMForPreference.from_pretrained(tmp_path / "gpm")
    assert_same_weights(loaded, model)
    tied = LANGUAGE_MODELS[name].tie_word_embeddings
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert ("lm_head.weight" in saved_names(tmp_path / "gpm")) != tied


def test_lm_loss_has_gradients(tmp_path):
    save_causal_lm(tmp_path, BACKBONES["qwen3"])
    model = GPMForPreference.from_pretrained(tmp_path, use_lm_head=True)
    ids, prompt_lengths = random_rows()
    model(ids, prompt_lengths=prompt_lengths, lm_labels=ids).lm_loss.mean().backward()
    assert model.lm_head.weight.grad.abs().max() > 0
    assert model.get_input_embeddings().weight.grad.abs().max() > 0


def test_untied_checkpoint_without_a_language_model_head_raises(tmp_path):
    AutoModel.from_config(BACKBONES["qwen3"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight"):
        GPMForPreference.from_pretrained(tmp_path, use_lm_head=True)


def test_backbone_that_scales_its_logits_raises(tmp_path):
    save_causal_lm(tmp_path, GraniteConfig(**WITHOUT_HEAD_DIM, logits_scaling=2.0))
    with pytest.raises(ValueError, match=r"granite backbone, which scales its logits \(logits_scaling\)"):
        GPMForPreference.from_pretrained(tmp_path, use_lm_head=True)


@pytest.mark.parametrize(
    "config",
    [
        PhiConfig(**{**WITHOUT_HEAD_DIM, "num_key_value_heads": 4}),
        GPTJConfig(vocab_size=259, n_embd=32, n_layer=1, n_head=4, n_positions=64, rotary_dim=4),
    ],
    ids=["phi", "gptj"],
)
def test_language_model_head_with_a_bias_raises(tmp_path, config):
    save_causal_lm(tmp_path, config)
    with pytest.raises(ValueError, match=r"lm_head\.bias"):
        GPMForPreference.from_pretrained(tmp_path, use_lm_head=True)


# Temperature


def test_learned_temperature_starts_at_the_configured_one(tmp_path):
    save_causal_lm(tmp_path, BACKBONES["llama"])
    model = GPMForPreference.from_pretrained(tmp_path, learn_temperature=True, temperature=0.3)
    assert model.learned_temperature.log_temperature.item() == pytest.approx(math.log(0.3))
    assert embed(model, *random_rows()).temperature.item() == pytest.approx(0.3)


def test_learned_temperature_is_saved_and_loaded(tmp_path):
    model = tiny_model(learn_temperature=True)
    with torch.no_grad():
        model.learned_temperature.log_temperature.fill_(math.log(0.7))
    model.save_pretrained(tmp_path)
    loaded = GPMForPreference.from_pretrained(tmp_path)
    assert embed(loaded, *random_rows()).temperature.item() == pytest.approx(0.7)


def test_learned_temperature_gets_a_gradient():
    model = tiny_model(learn_temperature=True)
    ids, prompt_lengths = random_rows()
    output = model(ids, prompt_lengths=prompt_lengths)
    assert output.temperature.shape == ()
    (1 / output.temperature).backward()
    assert model.learned_temperature.log_temperature.grad.item() == pytest.approx(-1 / 0.1)


def test_fixed_temperature_is_no_parameter(model):
    assert not [name for name, _ in model.named_parameters() if "temperature" in name]


# Precision


@every_loader
def test_heads_stay_in_float32_with_a_bfloat16_backbone(tmp_path, loader):
    saved = save_gpm(tmp_path, learn_temperature=True)
    model = loader.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    for name in ("embedding_head", "scale_gate", "learned_temperature"):
        assert_same_weights(getattr(model, name), getattr(saved, name))
        assert {tensor.dtype for tensor in getattr(model, name).parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_new_heads_of_a_half_precision_backbone_are_float32(tmp_path, dtype):
    save_causal_lm(tmp_path, BACKBONES["llama"])
    model = GPMForPreference.from_pretrained(tmp_path, dtype=dtype, learn_temperature=True)
    assert model.model.dtype == dtype
    heads = (model.embedding_head, model.scale_gate, model.learned_temperature)
    assert [parameter.dtype for head in heads for parameter in head.parameters()] == [torch.float32] * 3


def test_bfloat16_model_is_saved_and_loaded_equal(tmp_path):
    save_gpm(tmp_path / "float32")
    model = GPMForPreference.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bfloat16")
    loaded = GPMForPreference.from_pretrained(tmp_path / "bfloat16", dtype="auto")
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == {
        name: tensor.dtype for name, tensor in model.state_dict().items()
    }
    assert_same_weights(loaded, model)


def test_bfloat16_backbone_gives_float32_outputs(tmp_path):
    expected = embed(save_gpm(tmp_path, use_lm_head=True), *random_rows())
    model = GPMForPreference.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids, prompt_lengths = random_rows()
    output = embed(model, ids, prompt_lengths, lm_labels=ids)
    for name in ("embeddings", "scales", "temperature", "embedding_norms", "lm_loss"):
        assert output[name].dtype == torch.float32, name
    assert_same_output(output, expected, atol=0.1)


def test_heads_are_computed_in_float32_under_autocast(model):
    embedded, gated = record_inputs(model.embedding_head), record_inputs(model.scale_gate)
    with torch.autocast("cpu", torch.bfloat16):
        output = embed(model, *random_rows())
    embeddings = embedded[0].float() @ model.embedding_head.weight.T
    logits = gated[0].float() @ model.scale_gate.weight.T
    assert output.embeddings.dtype == output.scales.dtype == torch.float32
    expected = embeddings / embeddings.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(output.embeddings, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output.scales, logits.softmax(-1), rtol=1e-6, atol=1e-6)


# Gradients, checkpointing, PEFT


@every_backbone
def test_every_weight_gets_a_gradient(backbone):
    for name, gradient in gradients(tiny_model(backbone).train()).items():
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("use_reentrant", [True, False])
@every_backbone
def test_gradient_checkpointing_gives_the_same_gradients(backbone, use_reentrant):
    model = tiny_model(backbone).train()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    checkpointed = gradients(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("use_reentrant", [True, False])
@every_backbone
def test_gradient_checkpointing_computes_each_layer_twice(backbone, use_reentrant):
    model = tiny_model(backbone).train()
    calls = [record_inputs(layer.input_layernorm) for layer in model.model.layers]
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    gradients(model)
    assert [len(inputs) for inputs in calls] == [2, 2]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients_for_lora(model, use_reentrant):
    peft_model = lora_model(model).train()
    expected = gradients(peft_model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    peft_model.enable_input_require_grads()
    checkpointed = gradients(peft_model)
    assert any("lora_A" in name for name in expected)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7)


@every_backbone
def test_lora_on_all_linear_layers_spares_the_heads(backbone):
    model = tiny_model(backbone, learn_temperature=True)
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    adapted = {name for name, _ in peft_model.named_modules() if name.endswith("lora_A")}
    assert adapted
    assert all(".model.layers." in name for name in adapted)


def test_lora_on_all_linear_layers_spares_the_language_model_head():
    peft_model = get_peft_model(tiny_model(use_lm_head=True), LoraConfig(r=4, target_modules="all-linear"))
    assert not [name for name, _ in peft_model.named_modules() if "lm_head" in name and "lora" in name]


def test_lora_and_saved_heads_are_all_that_is_trained(model):
    trained = {name for name, parameter in lora_model(model).named_parameters() if parameter.requires_grad}
    heads = {name for name in trained if any(head in name for head in HEADS)}
    assert len(heads) == 2
    assert all("lora_" in name for name in trained - heads)


@every_backbone
def test_adapter_round_trip_restores_heads_and_scores(tmp_path, backbone):
    model = save_gpm(tmp_path / "gpm", backbone)
    before = embed(model, *random_rows())
    peft_model = lora_model(model).eval()
    expected = embed(peft_model, *random_rows())
    peft_model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(GPMForPreference.from_pretrained(tmp_path / "gpm"), tmp_path / "adapter").eval()
    assert_same_output(embed(loaded, *random_rows()), expected, atol=1e-6)
    assert (expected.embeddings - before.embeddings).abs().max() > 1e-2
    assert_same_weights(loaded.base_model.model.embedding_head, peft_model.base_model.model.embedding_head)


def test_adapter_round_trip_restores_the_learned_temperature(tmp_path):
    model = save_gpm(tmp_path / "gpm", learn_temperature=True)
    trained = [*HEADS, "learned_temperature"]
    peft_model = get_peft_model(model, LoraConfig(**{**LORA, "modules_to_save": trained})).eval()
    with torch.no_grad():
        (parameter,) = (
            tensor for name, tensor in peft_model.named_parameters() if "modules_to_save.default.log" in name
        )
        parameter.fill_(math.log(0.7))
    peft_model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(GPMForPreference.from_pretrained(tmp_path / "gpm"), tmp_path / "adapter")
    assert embed(loaded, *random_rows()).temperature.item() == pytest.approx(0.7)


def test_merged_adapter_is_saved_as_a_plain_model(tmp_path, model):
    peft_model = lora_model(model).eval()
    expected = embed(peft_model, *random_rows())
    peft_model.merge_and_unload().save_pretrained(tmp_path)
    assert_same_output(embed(GPMForPreference.from_pretrained(tmp_path), *random_rows()), expected)


# Token embeddings


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("use_lm_head", [True, False])
def test_resizing_keeps_the_old_tokens(tmp_path, use_lm_head, tied):
    set_seed(0)
    backbone = Qwen3Config(**TINY, tie_word_embeddings=tied)
    model = GPMForPreference(GPMModelConfig(text_config=backbone, use_lm_head=use_lm_head)).eval()
    old, expected = model.get_input_embeddings().weight.clone(), embed(model, *random_rows())
    model.resize_token_embeddings(300)
    assert torch.equal(model.get_input_embeddings().weight[:259], old)
    assert_same_output(embed(model, *random_rows()), expected, atol=1e-6)
    model.save_pretrained(tmp_path)
    assert_same_weights(GPMForPreference.from_pretrained(tmp_path), model)


def test_resizing_resizes_the_language_model_head():
    model = tiny_model(use_lm_head=True)
    model.resize_token_embeddings(300)
    ids, prompt_lengths = random_rows()
    ids[:, -1] = 299
    assert model.lm_head.weight.shape == (300, 32)
    assert torch.isfinite(embed(model, ids, prompt_lengths, lm_labels=ids).lm_loss).all()


def test_input_embeddings_are_those_of_the_backbone(model):
    assert model.get_input_embeddings() is model.model.embed_tokens
    replacement = torch.nn.Embedding(400, 32)
    model.set_input_embeddings(replacement)
    assert model.get_input_embeddings() is replacement
    assert model.model.embed_tokens is replacement


def test_output_embeddings_are_the_language_model_head(model):
    assert model.get_output_embeddings() is None
    with_head = tiny_model(use_lm_head=True)
    assert with_head.get_output_embeddings() is with_head.lm_head


# Configuration


@pytest.mark.parametrize("value", [0, 1, 3, 7, -2])
def test_bad_embedding_dim_raises(value):
    with pytest.raises(ValueError, match=f"`embedding_dim` is {value}, .*even number, at least 2"):
        GPMModelConfig(embedding_dim=value)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_bad_temperature_raises(value):
    with pytest.raises(ValueError, match=f"`temperature` is {value}, .*positive and finite"):
        GPMModelConfig(temperature=value)


def test_bad_gate_activation_raises():
    with pytest.raises(ValueError, match=r"'relu'; choose one of \('softmax', 'softplus'\)"):
        GPMModelConfig(gate_activation="relu")


@pytest.mark.parametrize(
    ("renderer", "message"),
    [
        (
            {"max_len": 5},
            r"unknown keys \['max_len'\]; it takes \['convention', 'long_rows', 'max_length', 'pad_token_id'\]",
        ),
        ({"max_length": 1}, "`max_length` is 1, .*at least 2"),
        ({"max_length": -5}, "`max_length` is -5, .*at least 2"),
        ({"long_rows": "drop"}, "'drop'; choose one of .*'filter', 'truncate_prompt', 'error'"),
    ],
)
def test_bad_renderer_raises(renderer, message):
    with pytest.raises(ValueError, match=message):
        GPMModelConfig(renderer=renderer)


def test_renderer_settings_left_out_have_their_defaults():
    assert GPMModelConfig().renderer == {"max_length": 2048, "long_rows": "filter"}
    assert GPMModelConfig(renderer={"max_length": None}).renderer == {"max_length": None, "long_rows": "filter"}


def test_configuration_round_trip(tmp_path):
    settings = {
        "embedding_dim": 8,
        "use_scale_gate": False,
        "gate_activation": "softplus",
        "normalize_embeddings": False,
        "temperature": 0.25,
        "learn_temperature": True,
        "use_lm_head": True,
        "renderer": {"max_length": 77, "long_rows": "truncate_prompt"},
    }
    config = GPMModelConfig(text_config=BACKBONES["gemma2"], **settings)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for loaded in (GPMModelConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is GPMModelConfig
        assert {name: getattr(loaded, name) for name in settings} == settings
        assert {name: written[name] for name in settings} == settings
        assert loaded.text_config.to_dict() == config.text_config.to_dict()


def test_configurations_do_not_share_a_renderer():
    first, second = GPMModelConfig(), GPMModelConfig()
    first.renderer["max_length"] = 3
    assert second.renderer["max_length"] == 2048


@pytest.mark.parametrize("text_config", [BACKBONES["gemma"], BACKBONES["gemma"].to_dict()], ids=["config", "dict"])
def test_backbone_configuration_may_be_a_dictionary(text_config):
    config = GPMModelConfig(text_config=text_config)
    assert config.text_config.model_type == "gemma"
    assert config.text_config.hidden_size == 32


def test_default_backbone_is_a_llama():
    assert isinstance(GPMModelConfig().text_config, LlamaConfig)


def test_configuration_has_one_label(tmp_path):
    save_gpm(tmp_path)
    assert GPMModelConfig(embedding_dim=8).num_labels == 1
    assert AutoConfig.from_pretrained(tmp_path).num_labels == 1
