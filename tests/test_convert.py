"""`gpm-trl convert`: released checkpoints, and reward models, which become general preference models as they are."""

import copy
import json
from unittest.mock import Mock

import pytest
import torch
from conftest import BACKBONES, CHAT_TEMPLATE, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_released import ANSWERS, QUESTION, save_released
from test_renderer import CHATML, assistant, prepend_bos, user
from transformers import AutoModelForSequenceClassification, GPT2Config, set_seed

from gpm_trl import GPMForPreference, PreferenceScorer
from gpm_trl.cli.quickstart import byte_tokenizer
from gpm_trl.models.reward_model import gpm_from_reward_model
from gpm_trl_cli import main

ROWS = torch.tensor([[5, 6], [7, 8]])
CONVERSATION = [user("Hi?"), assistant("Yes?"), *QUESTION]
# (name, pad token): one of its own, the EOS, which such a model then reads past, or none.
REWARD_MODELS = [("llama", 2), ("llama", None), ("qwen3", 0), ("gemma2", 0)]


def reward_model(backbone="llama", pad_token_id=0, **settings):
    set_seed(3)
    config = copy.deepcopy(BACKBONES[backbone])
    config.num_labels, config.pad_token_id = 1, pad_token_id
    for name, value in settings.items():
        setattr(config, name, value)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():  # so that rewards differ
        for name, weight in model.named_parameters():
            weight.mul_(10 if "score" in name else 4 if "_proj" in name else 1)
    return model


def save_reward_model(directory, *args, template=CHAT_TEMPLATE, add_bos=False, **settings):
    reward_model(*args, **settings).save_pretrained(directory)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    if add_bos:
        prepend_bos(tokenizer)
    tokenizer.save_pretrained(directory)
    return directory


def convert(*arguments) -> int:
    return main(["convert", *map(str, arguments)])


def scorers(*directories, **settings):
    return [PreferenceScorer.from_pretrained(directory, device="cpu", **settings) for directory in directories]


# Released checkpoints


@pytest.mark.parametrize(
    ("backbone", "gated", "sharded"),
    [("gemma", True, False), ("gemma", False, True), ("llama", True, True), ("llama", False, False)],
)
def test_converted_checkpoint_scores_the_same(tmp_path, capsys, backbone, gated, sharded):
    source = save_released(tmp_path / "released", backbone, gated, sharded)
    assert convert(source, tmp_path / "new" / "native") == 0
    gate = "with a scale gate" if gated else "without a gate"
    printed = f"general preference model, embedding_dim 6, reward_dim 0, {gate}, tau = 0.1, texts rendered by the"
    assert f"{printed} convention 'released'" in capsys.readouterr().out
    released, native = scorers(source, tmp_path / "new" / "native")
    assert native.model.config.renderer == released.model.config.renderer
    for prompt in (QUESTION, CONVERSATION, "2 + 2 = "):
        assert torch.equal(native.matrix([prompt], [ANSWERS])[0], released.matrix([prompt], [ANSWERS])[0])
    written = (tmp_path / "new" / "native" / "config.json").read_text()
    assert json.loads(written)["model_type"] == "gpm"
    assert str(tmp_path) not in written
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["native"]  # nothing temporary is left


def test_dtype_can_be_chosen(tmp_path):
    assert convert(save_released(tmp_path / "released"), tmp_path / "native", "--dtype=bfloat16") == 0
    weights = load_file(tmp_path / "native" / "model.safetensors")
    assert weights["model.norm.weight"].dtype == torch.bfloat16
    assert weights["embedding_head.weight"].dtype == torch.float32


# Reward models


@pytest.mark.parametrize(("backbone", "pad_token_id"), REWARD_MODELS)
def test_preferences_from_text_are_those_of_the_reward_model(tmp_path, capsys, backbone, pad_token_id):
    source = save_reward_model(tmp_path / "rm", backbone, pad_token_id, template=CHATML, add_bos=True)
    assert convert("--from-bt", source, tmp_path / "gpm") == 0
    assert "Bradley-Terry model, embedding_dim 0, reward_dim 1, without a gate, tau = 1.0" in capsys.readouterr().out
    (original,) = scorers(source)
    packed = {"shared_prefix": pad_token_id == 2, "batch_tokens": 1 if backbone == "llama" else 10_000}
    (converted,) = scorers(tmp_path / "gpm", **packed)
    for prompt in (QUESTION, CONVERSATION, "2 + 2 = "):
        expected = original.probability([prompt] * 3, ANSWERS, [*ANSWERS[1:], "5"])
        assert (expected - 0.5).abs().max() > 0.05  # there is something to compare
        actual = converted.probability([prompt] * 3, ANSWERS, [*ANSWERS[1:], "5"])
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
        assert converted.rank(prompt, ANSWERS).order == original.rank(prompt, ANSWERS).order


@pytest.mark.parametrize("pad_token_id", [0, 2])
def test_long_rows_are_cut_and_refused_alike(tmp_path, pad_token_id):
    source = save_reward_model(tmp_path / "rm", "llama", pad_token_id)
    assert convert("--from-bt", source, tmp_path / "gpm") == 0
    prompt = [user("q" * 40 + "What is 2 + 2?")]
    original, converted = scorers(source, tmp_path / "gpm", max_length=70, long_rows="truncate_prompt")
    assert converted.encode(prompt, ANSWERS).truncated
    expected, actual = (scorer.matrix([prompt], [ANSWERS])[0] for scorer in (original, converted))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    for scorer in scorers(source, tmp_path / "gpm"):
        assert scorer.renderer.max_length == 512  # what the backbone takes
        with pytest.raises(ValueError, match="more than `max_length` = 512"):
            scorer.matrix([[user("q" * 600)]], [ANSWERS])


def test_bradley_terry_is_a_value_of_the_configuration(tmp_path):
    source = save_reward_model(tmp_path / "rm", "llama", 2)
    assert convert("--from-bt", source, tmp_path / "gpm") == 0
    written = (tmp_path / "gpm" / "config.json").read_text()
    config = json.loads(written)
    assert (config["reward_dim"], config["embedding_dim"], config["temperature"]) == (1, 0, 1.0)
    assert (config["use_scale_gate"], config["normalize_embeddings"]) == (False, False)
    renderer = {"max_length": None, "long_rows": "filter", "convention": "reward_model", "pad_token_id": 2}
    assert config["renderer"] == renderer
    assert str(tmp_path) not in written
    weights = load_file(tmp_path / "gpm" / "model.safetensors")
    assert torch.equal(weights["embedding_head.weight"], load_file(source / "model.safetensors")["score.weight"])
    output = GPMForPreference.from_pretrained(tmp_path / "gpm")(ROWS)
    assert torch.equal(output.embeddings[:, 1], torch.ones(2))


def test_a_reward_model_with_other_names_and_a_bias_is_converted_and_can_be_trained():
    """The bias cancels in all scores."""
    set_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=259, num_labels=1, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    converted = gpm_from_reward_model(model)
    torch.testing.assert_close(converted(ROWS).embeddings[:, :1], model(ROWS).logits)
    model.score.bias = torch.nn.Parameter(torch.tensor([3.0]))
    embeddings = converted(ROWS).embeddings
    assert torch.equal(gpm_from_reward_model(model)(ROWS).embeddings, embeddings)
    (embeddings[0, 0] * embeddings[1, 1] - embeddings[0, 1] * embeddings[1, 0]).backward()
    assert converted.embedding_head.weight.grad.abs().max() > 0
    adapted = get_peft_model(converted, LoraConfig(target_modules="all-linear", modules_to_save=["embedding_head"]))
    assert torch.allclose(adapted(ROWS).embeddings, embeddings)


# Errors


def test_models_that_are_no_reward_models_raise():
    with pytest.raises(ValueError, match="Qwen3ForSequenceClassification has 3 labels"):
        gpm_from_reward_model(reward_model("qwen3", num_labels=3))
    with pytest.raises(ValueError, match="GPMForPreference is not a decoder of text with one linear `score` head"):
        gpm_from_reward_model(tiny_model())


@pytest.fixture(scope="module")
def sources(tmp_path_factory, decoder):
    """A directory with directories of all kinds."""
    directory = tmp_path_factory.mktemp("sources")
    tiny_model().save_pretrained(directory / "gpm")
    save_released(directory / "released")
    for name in ("rm", "headless"):
        save_reward_model(directory / name)
    (directory / "headless" / "model.safetensors").write_bytes((decoder / "model.safetensors").read_bytes())
    save_reward_model(directory / "labels", num_labels=2)
    save_released(directory / "misshapen", heads={"value_head.weight": (5, 32)})
    (directory / "decoder").symlink_to(decoder)
    return directory


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["gpm"], "is a general preference model of this package already"),
        (["rm"], "is a Bradley-Terry reward model: say so by --from-bt"),
        (["--from-bt", "released"], "is one of the authors' released checkpoints: leave out --from-bt"),
        (["decoder"], "neither a general preference model nor a reward model"),
        (["--from-bt", "headless"], "lacks score.weight"),
        (["--from-bt", "headless", "--embedding_dim=3"], "`embedding_dim` is 3"),
        (["--from-bt", "labels"], "has 2 labels, but a reward model has one"),
        (["misshapen"], "heads of the shapes {'value_head.weight': [5, 32]}"),
        (["nowhere"], "huggingface.co"),
    ],
)
def test_one_line_for_what_cannot_be_converted(sources, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(sources)
    before = sorted(path.name for path in sources.iterdir())
    assert convert(*arguments, "new") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gpm-trl convert: error: ")]
    assert len(lines) == 1
    assert complaint in lines[0]
    assert sorted(path.name for path in sources.iterdir()) == before


@pytest.mark.parametrize("destination", [".", "../link"])
def test_destination_may_be_the_working_directory_or_a_link(tmp_path, monkeypatch, destination):
    source = save_released(tmp_path / "released")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    assert convert(source, destination) == 0
    assert isinstance(GPMForPreference.from_pretrained(destination), GPMForPreference)


def test_destination_must_be_free_and_writable(tmp_path, capsys, monkeypatch):
    source = save_released(tmp_path / "released")
    (tmp_path / "file").touch()
    for destination in ("released", "file"):
        assert convert(source, tmp_path / destination) == 2
        assert f"{destination} is there already and not empty" in capsys.readouterr().err
    assert convert("nowhere", tmp_path / "file" / "native") == 2  # before any work
    assert "cannot be written, since" in capsys.readouterr().err
    monkeypatch.setattr("tempfile.TemporaryFile", Mock(side_effect=PermissionError))  # as root, one may write anywhere
    assert convert("nowhere", tmp_path / "native") == 2
    assert "is no directory you may write to" in capsys.readouterr().err
