"""Checkpoints: scores from text survive every way of saving, code travels along, and broken files are told apart."""

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import BACKBONES, CHAT_TEMPLATE, TRAINING, byte_tokenizer, tiny_model
from datasets import Dataset
from launching import launch, sharding_config
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_convert import save_reward_model
from test_gpm_trainer import QUICK
from test_released import save_released
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

import gpm_trl.models
from gpm_trl import (
    GPMConfig,
    GPMForPreference,
    GPMModelConfig,
    GPMTrainer,
    GPOConfig,
    GPOTrainer,
    PreferenceReward,
    PreferenceScorer,
    saving,
)
from gpm_trl.models.modeling_gpm import HEAD_NAMES
from gpm_trl_cli import main

PROMPTS = ["What is 2 + 2?", [{"role": "user", "content": "Name a colour."}]]
RESPONSES = [["4", "5", "four"], ["red", "seven"]]
ROWS = [{"prompt": f"What is {index} + 1?", "chosen": f"{index + 1}", "rejected": "none"} for index in range(4)]
LORA = {"r": 4, "init_lora_weights": False}
HEADS = {"embedding_dim": 8, "gate_activation": "softplus", "temperature": 0.3}
AS_LOADED = dict.fromkeys(("embedding_dim", "gate_activation", "temperature"))  # for `train`


def chat_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def scores(model, tokenizer=None, **kwargs) -> torch.Tensor:
    """Scores of all pairs of responses to a few prompts, from their texts, by a model or the one in a directory."""
    if isinstance(model, torch.nn.Module):
        scorer = PreferenceScorer(model, tokenizer or chat_tokenizer())
    else:
        scorer = PreferenceScorer.from_pretrained(model, device="cpu", **kwargs)
    return torch.cat([matrix.flatten() for matrix in scorer.matrix(PROMPTS, RESPONSES)])


def save_gpm(directory, backbone="qwen3", **settings) -> GPMForPreference:
    model = tiny_model(backbone, **settings)
    model.save_pretrained(directory)
    chat_tokenizer().save_pretrained(directory)
    return model


def save_base(directory, backbone="qwen3", of_gpm=False):
    """A causal LM, or a GPM, with a tokenizer."""
    if of_gpm:
        save_gpm(directory, backbone, **HEADS)
    else:
        AutoModelForCausalLM.from_config(tiny_model(backbone).config.text_config).save_pretrained(directory)
        chat_tokenizer().save_pretrained(directory)


def train(model, directory, **kwargs) -> GPMTrainer:
    args = {**QUICK, **HEADS, "learning_rate": 1e-2, **kwargs.pop("args", {})}
    trainer = GPMTrainer(model, GPMConfig(str(directory), **args), Dataset.from_list(ROWS), **kwargs)
    trainer.train()
    return trainer


def saved_adapter(directory, backbone="qwen3", of_gpm=False, **args) -> GPMTrainer:
    """An adapter in `directory / "adapter"`, trained and saved by the trainer on the model in `directory / "base"`."""
    save_base(directory / "base", backbone, of_gpm)
    trainer = train(str(directory / "base"), directory / "adapter", args=args, peft_config=LoraConfig(**LORA))
    trainer.save_model()
    return trainer


def adapter_of_convention(directory, convention) -> GPMTrainer:
    """Trained and saved in `directory / "adapter"`, on a base whose texts are not those of this package."""
    if convention == "released":
        save_released(directory / "base")
    else:
        save_reward_model(directory / "rm")
        assert main(["convert", "--from-bt", str(directory / "rm"), str(directory / "base")]) == 0
    trainer = train(str(directory / "base"), directory / "adapter", args=AS_LOADED, peft_config=LoraConfig(**LORA))
    trainer.save_model()
    return trainer


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The directory of an adapter of a causal LM, and the scores of the model that was trained."""
    directory = tmp_path_factory.mktemp("adapters")
    return directory / "adapter", scores(saved_adapter(directory).model)


def edit_json(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Round trips


@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"])
def test_a_saved_model_gives_the_same_scores(tmp_path, max_shard_size):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    chat_tokenizer().save_pretrained(tmp_path)
    assert (len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3) == (max_shard_size == "20KB")
    assert torch.equal(scores(tmp_path), scores(model))
    assert scores(model).abs().max() > 1e-3


@pytest.mark.parametrize(("backbone", "of_gpm"), [("gemma2", False), ("llama", True)], ids=["causal_lm", "gpm"])
def test_an_adapter_gives_the_scores_of_the_model_that_was_trained(tmp_path, caplog, monkeypatch, backbone, of_gpm):
    trainer = saved_adapter(tmp_path, backbone, of_gpm)
    expected = scores(trainer.model)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    torch.testing.assert_close(scores(tmp_path / "adapter"), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(scores(AutoModel.from_pretrained(tmp_path / "adapter")), expected, rtol=0, atol=1e-6)
    monkeypatch.setattr(logging.getLogger("gpm_trl"), "propagate", True)
    caplog.clear()
    restored, info = GPMForPreference.from_pretrained(tmp_path / "adapter", output_loading_info=True)
    assert not info["missing_keys"]
    assert isinstance(restored.get_base_model(), GPMForPreference)
    assert not restored.training
    assert (restored.config.embedding_dim, restored.config.temperature) == (8, 0.3)
    torch.testing.assert_close(scores(restored), expected, rtol=0, atol=1e-6)
    assert not caplog.messages  # of new heads
    # By hand, on a base of one's own
    base = GPMForPreference.from_pretrained(tmp_path / "base", **HEADS)
    assert (scores(base) - expected).abs().max() > 1e-3
    by_hand = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(scores(by_hand), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("convention", ["released", "reward_model"])
def test_an_adapter_reads_texts_as_in_its_training_and_not_as_its_base(tmp_path, convention):
    trainer = adapter_of_convention(tmp_path, convention)

    def scored(model) -> torch.Tensor:
        return scores(model, tokenizer=trainer.processing_class)

    expected = scored(trainer.model)
    torch.testing.assert_close(scores(tmp_path / "adapter"), expected, rtol=0, atol=1e-6)
    # By hand, with the settings of its config.json
    settings = json.loads((tmp_path / "adapter" / "config.json").read_text())
    base = GPMForPreference.from_pretrained(tmp_path / "base", renderer=settings["renderer"])
    by_hand = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(scored(by_hand), expected, rtol=0, atol=1e-6)
    # Trained further
    more = train(str(tmp_path / "adapter"), tmp_path / "more", args=AS_LOADED)
    more.save_model()
    torch.testing.assert_close(scores(tmp_path / "more"), scored(more.model), rtol=0, atol=1e-6)
    # Of an earlier version, which did not say what is the default
    del settings["renderer"]["convention"]
    edit_json(tmp_path / "adapter" / "config.json", renderer=settings["renderer"])
    torch.testing.assert_close(scores(tmp_path / "adapter"), expected, rtol=0, atol=1e-6)
    by_hand.config.renderer = GPMForPreference.from_pretrained(tmp_path / "base").config.renderer
    assert (scored(by_hand) - expected).abs().max() > 1e-3  # so there is a difference to see


@pytest.mark.multiprocess
@pytest.mark.parametrize("sharding", ["zero3", "fsdp2"])
def test_sharded_models_are_saved_whole(tmp_path, sharding):
    save_base(tmp_path / "base")
    (tmp_path / "saved").mkdir()
    run = launch(sharding_config(sharding, tmp_path), Path(__file__).with_name("save_run.py"), tmp_path / "saved")
    assert run.returncode == 0, run.stderr
    for name in ("full", "adapter"):
        expected = torch.tensor(json.loads((tmp_path / "saved" / f"{name}.json").read_text()))
        torch.testing.assert_close(scores(tmp_path / "saved" / name), expected, rtol=0, atol=1e-5)
        assert expected.abs().max() > 1e-3
    heads = load_file(tmp_path / "saved" / "untrained" / "model.safetensors")
    scale = 1 / (heads["embedding_head.weight"].shape[1] + 1)
    for head in ("embedding_head.weight", "scale_gate.weight"):
        assert heads[head].std().item() == pytest.approx(scale, rel=0.2)  # of 256 and 128 numbers


# How an adapter is loaded


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_settings_of_an_adapter_are_those_of_its_configuration_unless_others_are_given(tmp_path, adapter, name):
    directory, elsewhere = shutil.copytree(adapter[0], tmp_path / "adapter"), tmp_path / "settings"
    elsewhere.mkdir()
    (directory / "config.json").rename(elsewhere / "config.json")
    torch.testing.assert_close(
        scores(GPMForPreference.from_pretrained(directory, config=elsewhere)), adapter[1], rtol=0, atol=1e-6
    )
    edit_json(elsewhere / "config.json", dtype="bfloat16", renderer={"max_length": 50, "long_rows": "error"})

    def loaded(value) -> GPMForPreference:
        kwargs = {name: value, "config": elsewhere, "renderer": {"max_length": 99}}
        return GPMForPreference.from_pretrained(directory, **kwargs).get_base_model()

    assert loaded(torch.float16).dtype == loaded("float16").dtype == torch.float16
    assert loaded("auto").dtype == loaded(None).dtype == torch.bfloat16  # and not that of its base
    assert loaded("auto").config.renderer == {"convention": "gpm", "max_length": 99, "long_rows": "error"}


# Adapters that cannot be used


def cut_off(directory):
    (path,) = directory.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])


def with_weights(*lost, **changed):
    """A checkpoint that lacks the weights with these in their names, and has others."""

    def spoil(directory):
        (path,) = directory.glob("*.safetensors")
        kept = {name: tensor for name, tensor in load_file(path).items() if not any(part in name for part in lost)}
        save_file(kept | changed, path, metadata={"format": "pt"})

    return spoil


def of_base(name):
    """An adapter that names another base."""
    return lambda directory: edit_json(directory / "adapter_config.json", base_model_name_or_path=name)


@pytest.mark.parametrize(
    ("spoil", "settings", "error", "message"),
    [
        (with_weights("embedding_head"), {}, ValueError, r"lacks embedding_head\.weight: the adapter was saved in"),
        (with_weights("lora_A"), {}, ValueError, "lacks .* and 11 more: the adapter was saved in part"),
        (cut_off, {}, ValueError, "has a damaged weight file"),
        (lambda directory: None, {"embedding_dim": 4}, ValueError, "does not fit its base model: .*size mismatch"),
        (of_base("models/base"), {}, OSError, "is models/base, by .*relative to where the program runs"),
        (of_base(None), {}, ValueError, "names no base model"),
        (of_base("."), {}, ValueError, "where an adapter is, too"),
        (lambda directory: BACKBONES["phi3"].save_pretrained(directory), {}, ValueError, "of a phi3, not of a GPM"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_one_line(tmp_path, adapter, monkeypatch, spoil, settings, error, message):
    directory = shutil.copytree(adapter[0], tmp_path / "adapter")
    monkeypatch.chdir(directory)
    spoil(directory)
    with pytest.raises(error, match=message) as raised:
        GPMForPreference.from_pretrained(directory, **settings)
    assert error is OSError or "\n" not in str(raised.value)


def test_an_adapter_without_a_description_of_its_heads_is_refused_or_described_by_hand(tmp_path, adapter):
    directory = shutil.copytree(adapter[0], tmp_path / "adapter")
    (directory / "config.json").unlink()
    with pytest.raises(ValueError, match=r"lacks the config\.json that describes the adapter's heads"):
        GPMForPreference.from_pretrained(directory)
    with pytest.raises(ValueError, match=r"GPMForPreference\.from_pretrained` with what it was trained with"):
        PreferenceScorer.from_pretrained(directory)
    model = GPMForPreference.from_pretrained(directory, dtype="float32", **HEADS)
    torch.testing.assert_close(scores(model), adapter[1], rtol=0, atol=1e-6)


def test_an_adapter_of_a_causal_lm_is_to_be_merged(tmp_path, decoder):
    model = AutoModelForCausalLM.from_pretrained(decoder)
    get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"If it is one of a causal LM, merge it first \(`merge_and_unload`"):
        GPMForPreference.from_pretrained(tmp_path)
    PeftModel.from_pretrained(model, tmp_path).merge_and_unload().save_pretrained(tmp_path / "merged")
    assert GPMForPreference.from_pretrained(tmp_path / "merged").config.embedding_dim == 6


# Code that travels with a model


@pytest.mark.parametrize("trust", [False, None, True])
def test_the_packages_classes_are_used_where_it_is_installed(tmp_path, trust):
    save_gpm(tmp_path)
    carried = {path.name for path in tmp_path.glob("*.py")}
    assert carried == {"modeling_gpm.py", "configuration_gpm.py"}
    for name in carried:
        source = Path(gpm_trl.models.__file__).with_name(name)
        assert (tmp_path / name).read_bytes() == source.read_bytes()
        (tmp_path / name).write_text("raise SystemExit('code of a checkpoint was run')")
    model = AutoModel.from_pretrained(tmp_path, trust_remote_code=trust)
    assert type(model) is GPMForPreference
    assert type(model.config) is GPMModelConfig


BLOCKED = "import sys; sys.modules.update(dict.fromkeys(('gpm_trl', 'trl', 'peft')))  # not to be imported\n"


LOAD_TWO = """
import json
import torch
from transformers import AutoModel


def embed(model, rows):
    output = model(torch.tensor(rows["input_ids"]), prompt_lengths=torch.tensor(rows["prompt_lengths"]))
    return {"embeddings": output.embeddings, "scales": output.scales, "temperature": output.temperature}


for name in ("today", "345865a/gpm"):
    rows = json.load(open(f"{name}/expected.json"))
    model, info = AutoModel.from_pretrained(name, trust_remote_code=True, output_loading_info=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    for key, found in embed(model, rows).items():
        torch.testing.assert_close(found, torch.tensor(rows[key]), rtol=0, atol=1e-6)
    model.save_pretrained(f"{name}-again")
try:
    AutoModel.from_pretrained("headless", trust_remote_code=True)
except ValueError as error:
    print(error)
"""


@pytest.mark.multiprocess
def test_saved_models_of_today_and_of_an_earlier_version_are_loaded_without_the_package(earlier, tmp_path):
    rows = json.loads((earlier / "gpm" / "expected.json").read_text())
    model = save_gpm(tmp_path / "today", "gemma2", learn_temperature=True)
    with_weights("scale_gate")(shutil.copytree(tmp_path / "today", tmp_path / "headless"))
    with torch.no_grad():
        output = model(torch.tensor(rows["input_ids"]), prompt_lengths=torch.tensor(rows["prompt_lengths"]))
    expected = {name: output[name].tolist() for name in ("embeddings", "scales", "temperature")}
    (tmp_path / "today" / "expected.json").write_text(json.dumps(rows | expected))
    run = subprocess.run(
        [sys.executable, "-c", BLOCKED + LOAD_TWO],
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "headless lacks scale_gate.weight: the checkpoint is incomplete" in run.stdout
    chat_tokenizer().save_pretrained(tmp_path / "today-again")
    assert torch.equal(scores(tmp_path / "today-again"), scores(model))


# Models of an earlier version


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """
    What revision 345865a saved: a model, and an adapter with the causal LM that it was trained on, each with the
    outputs that it had then.
    """
    shutil.unpack_archive(Path(__file__).with_name("fixtures") / "345865a.zip", tmp_path / "345865a")
    monkeypatch.chdir(tmp_path / "345865a")  # the adapter's base has a relative name
    return tmp_path / "345865a"


@pytest.mark.parametrize("load", [GPMForPreference.from_pretrained, AutoModel.from_pretrained])
@pytest.mark.parametrize("name", ["gpm", "adapter"])
def test_models_of_an_earlier_version_give_what_they_gave(earlier, name, load):
    rows = json.loads((earlier / name / "expected.json").read_text())
    model = load(earlier / name)
    with torch.no_grad():
        output = model(torch.tensor(rows["input_ids"]), prompt_lengths=torch.tensor(rows["prompt_lengths"]))
    for key in ("embeddings", "scales", "temperature"):
        torch.testing.assert_close(output[key], torch.tensor(rows[key]), rtol=0, atol=1e-6)
    scorer = PreferenceScorer.from_pretrained(earlier / name, device="cpu")
    matrices = scorer.matrix(rows["prompts"], rows["responses"])
    for matrix, expected in zip(matrices, rows["scores"], strict=True):
        torch.testing.assert_close(matrix, torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("load", [GPMForPreference.from_pretrained, PreferenceScorer.from_pretrained])
def test_code_of_a_checkpoint_is_not_run_and_not_asked_about(tmp_path, load, monkeypatch):
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    auto_map = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": auto_map}))
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()


# Files that are not what they should be


class Planted:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def plant_pickle(path, witness) -> None:
    path.write_bytes(pickle.dumps(Planted(witness)))
    with path.open("rb") as file:
        pickle.load(file).close()
    assert witness.exists()  # so the trap works
    witness.unlink()


@pytest.mark.parametrize("load", [GPMForPreference.from_pretrained, PreferenceScorer.from_pretrained])
@pytest.mark.parametrize("kind", ["gpm", "adapter", "causal_lm", "reward_model"])
def test_no_pickle_is_loaded(tmp_path, adapter, kind, load):
    directory, witness = tmp_path / "model", tmp_path / "ran"
    if kind == "adapter":
        shutil.copytree(adapter[0], directory)
    elif kind == "reward_model":
        save_reward_model(directory)
    else:
        save_base(directory, of_gpm=kind == "gpm")
    (weights,) = directory.glob("*model.safetensors")
    weights.unlink()
    plant_pickle(directory / ("adapter_model.bin" if kind == "adapter" else "pytorch_model.bin"), witness)
    with pytest.raises((OSError, ValueError)):
        load(directory)
    assert not witness.exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_off, "has a damaged weight file .*cut off"),
        (with_weights(**{"embedding_head.weight": torch.empty(0)}), "without values: embedding_head.weight. ZeRO-3"),
        (
            with_weights(**{"scale_gate.weight": torch.zeros(3, 32)}),
            r"scale_gate.weight \[3, 32\], expected \[2, 32\]",
        ),
        (with_weights("embedding_head"), "lacks embedding_head.weight: the checkpoint is incomplete"),
        (with_weights("", other=torch.zeros(3)), "lacks embedding_head.weight, .* and 23 more: the checkpoint is inc"),
        (
            lambda directory: edit_json(directory / "config.json", format_version=99),
            "`format_version` is 99, .*pip install --upgrade gpm-trl",
        ),
    ],
)
def test_a_broken_checkpoint_is_one_clear_line(tmp_path, damage, message):
    save_gpm(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        GPMForPreference.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


# Saving


def test_a_model_replaces_an_earlier_model_or_adapter(adapter, tmp_path):
    directory = shutil.copytree(adapter[0], tmp_path / "saved")
    for seed, size in ((1, "20KB"), (2, "40KB"), (3, "50GB")):
        model = tiny_model(seed=seed)
        model.save_pretrained(directory, max_shard_size=size)
        assert not list(directory.glob("adapter*"))
        assert torch.equal(scores(directory), scores(model))
    assert [path.name for path in directory.glob("*model*.safetensors*")] == ["model.safetensors"]


def interrupted(tensors, filename, metadata):
    Path(filename).write_bytes(b"half a file")
    raise KeyboardInterrupt


@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"])
def test_an_interrupted_save_leaves_the_model_that_was_there(tmp_path, monkeypatch, max_shard_size):
    expected = scores(save_gpm(tmp_path))
    before = {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny_model(seed=1).save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert torch.equal(scores(tmp_path), expected)


def test_an_interrupted_save_of_an_adapter_leaves_no_file(tmp_path, monkeypatch):
    save_base(tmp_path / "base")
    trainer = train(str(tmp_path / "base"), tmp_path / "adapter", peft_config=LoraConfig(**LORA))
    monkeypatch.setattr("peft.peft_model.safe_save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_model(str(tmp_path / "saved"))
    assert list((tmp_path / "saved").iterdir()) == []


def test_other_files_are_left_alone_and_weights_come_before_the_configuration(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    moved = []
    replace = os.replace
    monkeypatch.setattr(saving.os, "replace", lambda *paths: (moved.append(paths[1]), replace(*paths)))
    tiny_model().save_pretrained(tmp_path)
    names = [os.path.basename(path) for path in moved]
    assert names.index("model.safetensors") < names.index("config.json") == len(names) - 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("base", ["out", "out/checkpoint-2"])
def test_an_adapter_is_not_trained_into_the_directory_of_its_base(tmp_path, base, monkeypatch):
    save_base(tmp_path / base, of_gpm=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("out")
    for directory in ("out", tmp_path / "link"):
        with pytest.raises(ValueError, match=r"the base model of the adapter is there \(.*Choose another directory"):
            train(base, directory, peft_config=LoraConfig(**LORA))
    expected = scores(base)
    adapter = train(base, "adapter", peft_config=LoraConfig(**LORA)).model
    with pytest.raises(ValueError, match="the base model of the adapter is there"):
        train(adapter, "out", processing_class=chat_tokenizer())
    train(base, "out").save_model()  # a whole model needs no base
    assert (scores("out") - expected).abs().max() > 1e-3


# Quantisation


@pytest.mark.parametrize("bits", [4, 8])
def test_the_quantiser_takes_the_backbones_linear_layers_and_no_head(bits):
    pytest.importorskip("bitsandbytes")
    model = tiny_model(use_lm_head=True, learn_temperature=True)
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    replaced = replace_with_bnb_linear(model, quantization_config=config)
    kinds = {name: type(module).__name__ for name, module in replaced.named_modules()}
    assert kinds["model.layers.0.mlp.up_proj"].startswith("Linear")
    assert kinds["embedding_head"] == kinds["scale_gate"] == "Float32Head"


def test_heads_beside_a_quantised_backbone_are_trained_from_what_they_were(tmp_path):
    """The parent rounds to bfloat16 what is trained; a learned temperature of 0.1 would be another."""
    tiny_model(learn_temperature=True).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    rows, args = Dataset.from_list(ROWS), GPMConfig(str(tmp_path / "run"), **QUICK)
    for name in ("base", "adapter"):
        new = {"peft_config": LoraConfig(**LORA)} if name == "base" else {}
        trainer = GPMTrainer(str(tmp_path / name), args, rows, quantization_config=config, **new)
        (file,) = (tmp_path / name).glob("*model.safetensors")
        given = {
            key.split(".")[-2]: value for key, value in load_file(file).items() if key.split(".")[-2] in HEAD_NAMES
        }
        heads = [(key, value) for key, value in trainer.model.named_parameters() if value.requires_grad]
        found = {head: value for head in HEAD_NAMES for key, value in heads if f".{head}." in key}
        assert found.keys() == given.keys() == set(HEAD_NAMES)
        assert all(torch.equal(found[head], given[head]) for head in HEAD_NAMES)
        trainer.train()
        trainer.save_model(tmp_path / "adapter")


# Directories of runs that were not saved


def test_a_directory_with_nothing_but_checkpoints_is_told_with_the_last(tmp_path):
    save_base(tmp_path / "base")
    saving = {"save_strategy": "steps", "save_steps": 1}
    train(str(tmp_path / "base"), tmp_path / "run", args=saving, peft_config=LoraConfig(**LORA))
    assert "from_pretrained" in (tmp_path / "run" / "README.md").read_text()
    rows = Dataset.from_list(ROWS)
    for load in (
        GPMForPreference.from_pretrained,
        PreferenceScorer.from_pretrained,
        PreferenceReward,
        lambda path: GPMTrainer(str(path), GPMConfig(str(tmp_path / "more"), **QUICK), rows),
        lambda path: GPOTrainer(str(path), None, len, GPOConfig(str(tmp_path / "gpo"), **TRAINING), rows),
    ):
        with pytest.raises(OSError, match=r"run has no model, but checkpoints .*run/checkpoint-2\."):
            load(tmp_path / "run")
    scores(tmp_path / "run" / "checkpoint-2")


def test_a_process_that_writes_nothing_leaves_alone_what_another_is_writing(tmp_path):
    """As `save_pretrained(is_main_process=accelerator.is_main_process)` does on the second process."""
    (tmp_path / "_saving-first").mkdir()
    tiny_model().save_pretrained(tmp_path, is_main_process=False)
    assert [path.name for path in tmp_path.iterdir()] == ["_saving-first"]
