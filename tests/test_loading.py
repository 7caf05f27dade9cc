"""What is loaded: no weight made up; adapters of reward models; code of a backbone; tokens that a model lacks."""

import copy
import json
import shutil

import pytest
import torch
from conftest import BACKBONES, CHAT_TEMPLATE, TINY, TRAINING, byte_tokenizer, tiny_model
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_checkpoints import edit_json, with_weights
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    set_seed,
)
from trl import RewardConfig, RewardTrainer

from gpm_trl import (
    GPMConfig,
    GPMForPreference,
    GPMTrainer,
    GPOConfig,
    GPOTrainer,
    PreferenceReward,
    PreferenceScorer,
)
from gpm_trl.gpo.judges import make_judges
from gpm_trl.models.modeling_gpm import reading_weights
from gpm_trl_cli import main

PROMPT, RESPONSES = "What is 2 + 2?", ["4", "5", "It is four."]
ROWS = [{"prompt": f"What is {index} + 1?", "chosen": f"{index + 1}", "rejected": "none"} for index in range(8)]
GPO = {**TRAINING, "max_steps": 1, "num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 3}


QUIET = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--max_steps", "1", "--output_dir"]


def save_model(directory, model_class, **settings):
    set_seed(0)
    model = model_class(Qwen3Config(**{**TINY, **settings}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(5 if "score" in name else 1)
    model.save_pretrained(directory)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("rm"), Qwen3ForSequenceClassification, num_labels=1)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("policy"), Qwen3ForCausalLM)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def gpo_trainer(model, directory, reward_funcs=lambda completions, **kwargs: [0.0] * len(completions), **kwargs):
    args = GPOConfig(str(directory / "output"), **{**GPO, **kwargs.pop("args", {})})
    rows = kwargs.pop("rows", [{"prompt": row["prompt"]} for row in ROWS])
    return GPOTrainer(model, None, reward_funcs, args, Dataset.from_list(rows), **kwargs)


def scores(directory, **kwargs) -> torch.Tensor:
    return PreferenceScorer.from_pretrained(directory, device="cpu", **kwargs).matrix([PROMPT], [RESPONSES])[0]


# --- No weight is made up --------------------------------------------------------------------------------------------


def shards(directory):
    """Two shards, of which the second is gone."""
    path = directory / "model.safetensors"
    weights = load_file(path)
    path.unlink()
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    names = sorted(weights)
    save_file({name: weights[name] for name in names[::2]}, directory / files[0], metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: files[number % 2] for number, name in enumerate(names)}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def of_shape(name, *shape):
    return with_weights(name, **{name: torch.zeros(shape)})


# Lacks the head, all of a layer or one weight, has a head of two labels or another vocabulary, or not all its shards.
DAMAGES = {
    "head": (with_weights("score", "lm_head"), r"lacks (score|lm_head)\.weight: "),
    "layer": (with_weights("layers.1."), r"lacks model\.layers\.1\..* and \d+ more: "),
    "embedding": (of_shape("model.embed_tokens.weight", 300, 32), r"tokens\.weight \[300, 32\], expected \[259, 32\]"),
    "shard": (shards, "model-00002-of-00002.safetensors"),
}
damages = pytest.mark.parametrize("damage", DAMAGES)


def damaged(source, directory, damage):
    spoil, message = DAMAGES[damage]
    spoil(shutil.copytree(source, directory))
    return directory, message


@pytest.mark.parametrize("load", [PreferenceScorer.from_pretrained, PreferenceReward], ids=["scorer", "reward"])
@damages
def test_a_reward_model_that_lacks_weights_is_refused(tmp_path, reward_model, damage, load):
    directory, message = damaged(reward_model, tmp_path / "model", damage)
    with pytest.raises((ValueError, OSError), match=message):
        load(directory)


def test_a_reward_model_with_a_head_of_another_shape_is_refused_also_where_transformers_would_not(
    tmp_path, reward_model
):
    directory = shutil.copytree(reward_model, tmp_path / "model")
    of_shape("score.weight", 2, 32)(directory)
    with pytest.raises(ValueError, match=r"score\.weight \[2, 32\], expected \[1, 32\]"):
        PreferenceScorer.from_pretrained(directory, ignore_mismatched_sizes=True)


def test_a_quantised_reward_model_has_all_its_weights(tmp_path):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    # On CPUs with AVX512-BF16, bitsandbytes takes layers of whole blocks of 64 inputs only.
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 16}
    reward_model = save_model(tmp_path / "whole", Qwen3ForSequenceClassification, num_labels=1, **sizes)
    directory, message = damaged(reward_model, tmp_path / "model", "layer")
    with pytest.raises(ValueError, match="`device` and `quantization_config` both say where the model goes"):
        PreferenceScorer.from_pretrained(reward_model, device="cpu", quantization_config=config)
    scorer = PreferenceScorer.from_pretrained(reward_model, device_map=None, quantization_config=config)
    assert scorer.matrix([PROMPT], [RESPONSES])[0].isfinite().all()
    with pytest.raises(ValueError, match=message):
        PreferenceScorer.from_pretrained(directory, quantization_config=config)


@pytest.mark.parametrize("command", ["score", "evaluate", "convert", "gpo"])
def test_every_command_says_so_in_one_line(tmp_path, reward_model, policy, rows, capsys, command):
    directory, _ = damaged(reward_model, tmp_path / "model", "head")
    out = tmp_path / "out"
    arguments = {
        "score": ["--model", directory, "--input", rows, "--output", tmp_path / "scores.jsonl"],
        "evaluate": ["--model", directory, "--dataset", rows],
        "convert": ["--from-bt", directory, tmp_path / "converted"],
        "gpo": ["--model_name_or_path", policy, "--reward_model_path", directory, "--dataset_name", rows, *QUIET, out],
    }
    assert main([command, *map(str, arguments[command])]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"gpm-trl {command}: error: ")
    assert f"{directory} lacks score.weight" in last


@damages
def test_a_policy_that_lacks_weights_is_refused(tmp_path, policy, damage):
    directory, message = damaged(policy, tmp_path / "model", damage)
    with pytest.raises((ValueError, OSError), match=message):
        gpo_trainer(str(directory), tmp_path)


def test_a_whole_policy_is_loaded_as_by_trl_with_its_reference_and_a_tied_head_is_not_missing(tmp_path, policy):
    tied = save_model(tmp_path / "tied", Qwen3ForCausalLM, tie_word_embeddings=True)
    for directory in (policy, tied):
        args = {"model_init_kwargs": {"dtype": "bfloat16"}}
        trainer = gpo_trainer(str(directory), tmp_path, args=args)
        assert trainer.args.model_init_kwargs == {"dtype": "bfloat16"}
        expected = dict(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).named_parameters())
        for model in (trainer.model, trainer.ref_model):
            assert model.dtype == torch.bfloat16
            assert all(torch.equal(weight, expected[name]) for name, weight in model.named_parameters())
        assert trainer.ref_model is not trainer.model


def policy_adapter(base, directory, **settings):
    config = LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear", **settings)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(directory)
    return directory


@damages
def test_the_base_of_a_policys_adapter_is_whole(tmp_path, policy, damage):
    base = shutil.copytree(policy, tmp_path / "base")
    adapter = policy_adapter(base, tmp_path / "adapter")
    spoil, message = DAMAGES[damage]
    spoil(base)
    with pytest.raises((ValueError, OSError), match=message):
        gpo_trainer(str(adapter), tmp_path)


def test_a_policys_adapter_is_whole_and_may_bring_a_weight_that_its_base_lacks(tmp_path, policy):
    base = shutil.copytree(policy, tmp_path / "base")
    adapter = policy_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    expected = load_file(adapter / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    with_weights("lm_head")(base)
    trainer = gpo_trainer(str(adapter), tmp_path, processing_class=byte_tokenizer())
    assert torch.equal(trainer.model.get_output_embeddings().modules_to_save["default"].weight, expected)
    with_weights("lora_A")(adapter)
    with pytest.raises(ValueError, match=r"adapter lacks .* and 11 more: the adapter was saved in part"):
        gpo_trainer(str(adapter), tmp_path)


def test_a_reference_of_a_checkpoint_is_whole(tmp_path, policy):
    args = {"sync_ref_model": True, "ref_model_sync_steps": 1, "max_steps": 2, "save_strategy": "steps"}
    args |= {"save_steps": 1, "ref_model_mixup_alpha": 1.0}
    trainer = gpo_trainer(str(policy), tmp_path, args=args)
    trainer.train()
    (reference,) = (tmp_path / "output" / "checkpoint-2").glob("reference")
    with_weights("lm_head")(reference)
    with pytest.raises(ValueError, match=r"reference lacks lm_head\.weight"):
        gpo_trainer(str(policy), tmp_path, args={**args, "max_steps": 3}).train(str(reference.parent))


# --- Adapters of reward models, as TRL's RewardTrainer saves them ----------------------------------------------------


@pytest.fixture(scope="module", params=["of a causal LM", "of a reward model"])
def reward_adapter(request, tmp_path_factory, policy, reward_model):
    """The directory that `RewardTrainer` saved an adapter to, and the rewards of the model that was trained."""
    directory = tmp_path_factory.mktemp("reward_adapter")
    of_causal_lm = request.param == "of a causal LM"
    config = LoraConfig(task_type="SEQ_CLS" if of_causal_lm else None, r=2, target_modules="all-linear")
    config.modules_to_save = ["score"]
    args = RewardConfig(str(directory), **TRAINING, max_steps=2, learning_rate=0.05, lr_scheduler_type="constant")
    trainer = RewardTrainer(
        str(policy if of_causal_lm else reward_model), args, train_dataset=Dataset.from_list(ROWS), peft_config=config
    )
    trainer.train()
    trainer.save_model()
    rewards = []
    for response in RESPONSES:
        ids = trainer.processing_class(PROMPT + response + "</s>", return_tensors="pt")
        with torch.no_grad():
            rewards.append(trainer.model.eval()(**ids).logits[0, 0])
    return directory, torch.stack(rewards)


def test_an_adapter_of_a_reward_model_scores_as_when_it_was_trained(reward_adapter, capfd):
    directory, rewards = reward_adapter
    expected = rewards[:, None] - rewards
    assert expected.abs().max() > 0.01
    capfd.readouterr()
    torch.testing.assert_close(scores(directory), expected, rtol=0, atol=1e-5)
    assert "MISSING" not in capfd.readouterr().err
    torch.testing.assert_close(scores(directory, batch_tokens=1), expected, rtol=0, atol=1e-5)
    odds = PreferenceReward(directory).log_odds([PROMPT] * 3, RESPONSES, 3)[0]
    torch.testing.assert_close(odds, expected, rtol=0, atol=1e-5)


def test_an_adapter_of_a_reward_model_is_taken_by_every_command(tmp_path, reward_adapter, rows, policy, capsys):
    directory, rewards = reward_adapter
    expected = rewards[:, None] - rewards
    assert main(["merge", str(directory), str(tmp_path / "merged"), "--device", "cpu"]) == 0
    assert main(["convert", "--from-bt", str(directory), str(tmp_path / "converted")]) == 0
    assert main(["evaluate", "--model", str(directory), "--dataset", str(rows), "--device", "cpu"]) == 0
    for written in ("merged", "converted"):
        torch.testing.assert_close(scores(tmp_path / written), expected, rtol=0, atol=1e-5)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert (merged.config.num_labels, merged.config.pad_token_id) == (1, 0)
    gpo_trainer(str(policy), tmp_path, str(directory)).train()
    with pytest.raises(
        ValueError, match="is an adapter of a reward model, not of a policy: give it as `reward_funcs`"
    ):
        gpo_trainer(str(directory), tmp_path)
    capsys.readouterr()
    arguments = ["--dataset_name", str(rows), *QUIET, str(tmp_path / "gpm")]
    assert main(["gpm", "--model_name_or_path", str(directory), *arguments]) == 2
    assert "is an adapter of a Bradley-Terry model, not of a GPM: merge it (" in capsys.readouterr().err
    assert main(["gpm", "--model_name_or_path", str(tmp_path / "merged"), *arguments]) == 0


def test_an_adapter_of_a_reward_head_that_was_not_saved_is_refused(tmp_path, policy):
    model = Qwen3ForSequenceClassification.from_pretrained(policy, num_labels=1)
    get_peft_model(model, LoraConfig(target_modules=["q_proj", "score"])).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"head that was new and is not saved: .*modules_to_save=\['score'\]"):
        PreferenceScorer.from_pretrained(tmp_path, device="cpu")


def test_an_adapter_of_a_reward_model_that_lacks_weights_or_its_base_is_refused(tmp_path, reward_adapter):
    for lost, message in (("score", "lacks score.weight"), ("lora_B", "lacks .* and 11 more: the adapter was saved")):
        directory = shutil.copytree(reward_adapter[0], tmp_path / lost)
        with_weights(lost)(directory)
        with pytest.raises(ValueError, match=message):
            PreferenceScorer.from_pretrained(directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "models/gone"}))
    with pytest.raises(OSError, match=r"The base model of the adapter .* is models/gone, by its adapter_config\.json"):
        PreferenceScorer.from_pretrained(directory)


# --- Backbones with code of their own --------------------------------------------------------------------------------

CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "{model_type}"
    shift: float = 0.0
"""
MODELING = """
from transformers import LlamaForCausalLM, LlamaModel
from .configuration_own import OwnConfig

class OwnModel(LlamaModel):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state + self.config.shift
        return output

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
"""
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
WITH_BASE = {**AUTO_MAP, "AutoModel": "modeling_own.OwnModel"}


def own_code(directory, auto_map=AUTO_MAP, model_type="gpm_test_own"):
    """A Llama as a model with code of its own: a class for its configuration, and a shift of what it gives."""
    set_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(BACKBONES["llama"]))
    model.save_pretrained(directory)
    (directory / "configuration_own.py").write_text(CONFIGURATION.format(model_type=model_type))
    (directory / "modeling_own.py").write_text(MODELING)
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": model_type, "auto_map": auto_map, "shift": 0.5, "architectures": ["OwnForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(directory)
    return directory, model.model


@pytest.mark.parametrize(
    ("auto_map", "model_type"), [(AUTO_MAP, "gpm_test_own"), (WITH_BASE, "gpm_test_own"), (WITH_BASE, "llama")]
)
def test_a_backbone_with_code_of_its_own_is_trained_saved_and_loaded(tmp_path, auto_map, model_type):
    source, llama = own_code(tmp_path / "source", auto_map, model_type)
    model = GPMForPreference.from_pretrained(source, embedding_dim=4, trust_remote_code=True)
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        torch.testing.assert_close(hidden, llama(ids).last_hidden_state + 0.5)
    args = GPMConfig(str(tmp_path / "gpm"), **TRAINING, max_steps=1, trust_remote_code=True)
    trainer = GPMTrainer(str(source), args, Dataset.from_list(ROWS))
    trainer.train()
    trainer.save_model()
    expected = PreferenceScorer(trainer.model, trainer.processing_class).matrix([PROMPT], [RESPONSES])[0]
    shutil.rmtree(source)
    torch.testing.assert_close(scores(tmp_path / "gpm", trust_remote_code=True), expected)
    judging = GPOConfig(str(tmp_path), reward_model_path=str(tmp_path / "gpm"), trust_remote_code=True, **GPO)
    (judge,) = make_judges(None, judging, None)
    assert type(judge.scorer.model.model).__name__ == "OwnModel"
    for loader in (AutoModel, GPMForPreference):
        loaded = loader.from_pretrained(tmp_path / "gpm", trust_remote_code=True, temperature=0.5)
        assert (type(loaded), loaded.config.temperature) == (GPMForPreference, 0.5)
    assert type(loaded.model).__name__ == "OwnModel"
    loaded.save_pretrained(tmp_path / "again")
    copied = GPMForPreference.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert all(torch.equal(weight, loaded.get_parameter(name)) for name, weight in copied.named_parameters())


def test_code_of_a_backbone_is_not_run_untrusted(tmp_path, capsys, rows):
    source, _ = own_code(tmp_path / "source")
    GPMForPreference.from_pretrained(source, trust_remote_code=True).save_pretrained(tmp_path / "gpm")
    byte_tokenizer().save_pretrained(tmp_path / "gpm")
    (tmp_path / "gpm" / "modeling_own.py").write_text("raise SystemExit(1)")
    with pytest.raises(ValueError, match=r"trust_remote_code=True"):
        GPMForPreference.from_pretrained(source)
    for load in (GPMForPreference.from_pretrained, PreferenceScorer.from_pretrained):
        with pytest.raises(ValueError, match=r"gpm has code of its own: read it, and run it by `trust_remote_code"):
            load(tmp_path / "gpm")
    arguments = ["--dataset_name", rows, *QUIET, tmp_path / "out"]
    for model in ("source", "gpm"):
        assert main(["gpm", "--model_name_or_path", str(tmp_path / model), *map(str, arguments)]) == 2
        assert "trust_remote_code=True" in capsys.readouterr().err.strip().splitlines()[-1]
    assert main(["inspect", str(rows), "--model", str(tmp_path / "source")]) == 2
    assert "trust_remote_code=True" in capsys.readouterr().err.strip().splitlines()[-1]
    assert main(["inspect", str(rows), "--model", str(tmp_path / "source"), "--trust_remote_code"]) == 0


def test_an_adapter_of_a_backbone_with_code_of_its_own(tmp_path):
    source, _ = own_code(tmp_path / "source")
    args = GPMConfig(str(tmp_path / "adapter"), **TRAINING, max_steps=1, trust_remote_code=True)
    trainer = GPMTrainer(str(source), args, Dataset.from_list(ROWS), peft_config=LoraConfig(r=2))
    trainer.train()
    trainer.save_model()
    expected = PreferenceScorer(trainer.model, trainer.processing_class).matrix([PROMPT], [RESPONSES])[0]
    torch.testing.assert_close(scores(tmp_path / "adapter", trust_remote_code=True), expected)


# --- Tokens that a model has no embedding for ------------------------------------------------------------------------


def longer_tokenizer(**tokens):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(tokens or {"pad_token": "[PAD]"})
    return tokenizer


REMEDY = r"'{}' has the id 259, but the model's embedding has 259 rows: call `model\.resize_token_embeddings\(len"


def gpm_trainer(directory, tokenizer, rows=ROWS, model=None, **args):
    args = GPMConfig(str(directory), **{**TRAINING, "max_steps": 1, **args})
    return GPMTrainer(model or tiny_model(), args, Dataset.from_list(rows), processing_class=tokenizer)


def test_a_pad_token_that_a_model_lacks_is_refused_where_rows_are_padded_and_else_not_saved(tmp_path):
    with pytest.raises(ValueError, match=REMEDY.format(r"\[PAD\]")):
        gpm_trainer(tmp_path, longer_tokenizer(), shared_prefix=False)
    trainer = gpm_trainer(tmp_path, longer_tokenizer())
    trainer.train()
    trainer.save_model()
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["pad_token_id"] is None
    assert scores(tmp_path).isfinite().all()


def test_a_model_that_was_resized_is_trained_and_loaded(tmp_path):
    model, tokenizer = tiny_model(), longer_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    trainer = gpm_trainer(tmp_path, tokenizer, model=model, shared_prefix=False)
    trainer.train()
    trainer.save_model()
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["pad_token_id"] == 259
    assert scores(tmp_path).isfinite().all()


def test_tokens_of_rows_are_checked_and_those_that_no_row_has_are_not(tmp_path):
    tokenizer = longer_tokenizer(additional_special_tokens=["<think>"])
    gpm_trainer(tmp_path, tokenizer).train()
    row = {"prompt": "Why?", "chosen": "<think>So.", "rejected": "No."}
    with pytest.raises(ValueError, match="Row 9: .*" + REMEDY.format("<think>")):
        gpm_trainer(tmp_path, tokenizer, [*ROWS, row])
    for model in (tiny_model(), Qwen3ForSequenceClassification(Qwen3Config(**TINY, num_labels=1))):
        scorer = PreferenceScorer(model, tokenizer)
        assert scorer.matrix([PROMPT], [RESPONSES])[0].isfinite().all()
        with pytest.raises(ValueError, match="Prompt 1: .*" + REMEDY.format("<think>")):
            scorer.matrix([PROMPT, "Why?"], [RESPONSES, ["<think>So.", "No."]])
    with pytest.raises(ValueError, match=REMEDY.format("<end>")):
        gpm_trainer(tmp_path, longer_tokenizer(eos_token="<end>"))


@pytest.mark.parametrize("kind", ["policy", "reward_model"])
def test_a_saved_pad_token_without_an_embedding_is_said(tmp_path, request, kind):
    directory = shutil.copytree(request.getfixturevalue(kind), tmp_path / "model")
    edit_json(directory / "config.json", pad_token_id=259)
    load = PreferenceScorer.from_pretrained if kind == "reward_model" else GPMForPreference.from_pretrained
    with pytest.raises(ValueError, match="model has a `pad_token_id` beyond its embedding: make it null"):
        load(directory)


def test_an_assertion_of_another_kind_is_not_taken_for_a_pad_token():
    with pytest.raises(AssertionError, match="of a backbone"), reading_weights("model"):
        raise AssertionError("of a backbone")


def test_tokens_that_a_policy_lacks_are_refused_before_training(tmp_path, policy):
    thinking = longer_tokenizer(additional_special_tokens=["<think>"])
    thinking.pad_token = thinking.eos_token
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    gpo_trainer(str(policy), tmp_path, processing_class=thinking).train()
    with pytest.raises(ValueError, match=REMEDY.format("<think>")):
        gpo_trainer(str(policy), tmp_path, rows=[*rows, {"prompt": "<think>"}], processing_class=thinking)
    with pytest.raises(ValueError, match=REMEDY.format(r"\[PAD\]")):
        gpo_trainer(str(policy), tmp_path, processing_class=longer_tokenizer())
