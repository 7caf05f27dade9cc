"""The model card: where it is written, what it says, and that its snippet runs."""

import copy
import os
import re
import subprocess
import sys

import pytest
import torch
from accelerate.utils import is_peft_model
from conftest import CHAT_TEMPLATE, byte_tokenizer, tiny_model
from datasets import Dataset
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig
from test_checkpoints import BLOCKED

from gpm_trl import GPMConfig, GPMTrainer, GPOConfig, GPOTrainer, Renderer, preference_matrix, preference_probability

ROWS = [{"prompt": f"What is {index} + 1?", "chosen": f"{index + 1}", "rejected": "none"} for index in range(4)]
SETTINGS = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
    "learning_rate": 1e-2,
    "warmup_steps": 0,
}


def make_trainer(directory, model, args=None, **kwargs):
    kwargs = {"train_dataset": Dataset.from_list(ROWS), **kwargs}
    return GPMTrainer(model, GPMConfig(**{"output_dir": str(directory), **SETTINGS, **(args or {})}), **kwargs)


def plain_trainer(directory, args=None, **kwargs):
    return make_trainer(directory, tiny_model(), args, processing_class=byte_tokenizer(), **kwargs)


def model_from_the_hub():
    model = tiny_model()
    model.config.text_config = copy.deepcopy(model.config.text_config)  # `tiny_model` shares it
    model.config.text_config.name_or_path = "Qwen/Qwen3-0.6B"
    return model


def card_of(trainer):
    trainer.save_model()
    return ModelCard.load(f"{trainer.args.output_dir}/README.md")


def table(card):
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]*) \|$", card.text, re.MULTILINE))


def snippet(card, with_package=True):
    snippets = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    return snippets[0 if with_package else 1]


# --- Where it is written ---------------------------------------------------------------------------------------------


def test_every_checkpoint_and_the_output_directory_have_a_card(tmp_path):
    plain_trainer(tmp_path, {"save_strategy": "steps", "save_steps": 1}).train()
    for directory in (tmp_path, tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"):
        assert "# " in ModelCard.load(directory / "README.md").text


def test_a_checkpoints_snippet_loads_the_checkpoint(tmp_path):
    plain_trainer(tmp_path, {"save_strategy": "steps", "save_steps": 1}).train()
    code = snippet(ModelCard.load(tmp_path / "checkpoint-1" / "README.md"))
    assert code.count(f'from_pretrained("{tmp_path / "checkpoint-1"}")') == 1


def test_saving_a_model_elsewhere_writes_the_card_there(tmp_path):
    plain_trainer(tmp_path / "output").save_model(str(tmp_path / "elsewhere"))
    assert snippet(ModelCard.load(tmp_path / "elsewhere" / "README.md")).count(str(tmp_path / "elsewhere")) == 1


def test_the_card_of_an_adapter_replaces_that_of_peft(tmp_path, decoder):
    card = card_of(make_trainer(tmp_path, str(decoder), peft_config=LoraConfig(r=2)))
    assert "general preference model" in card.text
    assert "More Information Needed" not in card.text


# --- The header ------------------------------------------------------------------------------------------------------


def test_header_has_the_tags(tmp_path):
    data = card_of(plain_trainer(tmp_path)).data
    assert {"trl", "gpm", "preference-model", "generated_from_trainer"} <= set(data.tags)
    assert data.library_name == "transformers"


def test_header_names_a_base_model_of_the_hub(tmp_path):
    card = card_of(make_trainer(tmp_path, model_from_the_hub(), processing_class=byte_tokenizer()))
    assert card.data.base_model == "Qwen/Qwen3-0.6B"
    assert "https://huggingface.co/Qwen/Qwen3-0.6B" in card.text


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)], ids=["full", "adapter"])
def test_header_names_no_directory_as_base_model(tmp_path, decoder, peft_config):
    card = card_of(make_trainer(tmp_path, str(decoder), peft_config=peft_config))
    assert card.data.base_model is None
    assert f"huggingface.co/{decoder}" not in card.text


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)], ids=["full", "adapter"])
def test_header_is_valid_metadata(tmp_path, peft_config):
    processing_class = byte_tokenizer()
    trainer = make_trainer(tmp_path, model_from_the_hub(), processing_class=processing_class, peft_config=peft_config)
    trainer.save_model()
    trainer.create_model_card(dataset_name="openbmb/UltraFeedback")
    data = ModelCard.load(tmp_path / "README.md").data
    validate_repo_id(data.base_model)
    validate_repo_id(data.datasets)
    assert data.library_name == ("peft" if peft_config else "transformers")
    assert all(isinstance(tag, str) for tag in data.tags)


def test_datasets_and_tags_asked_for_are_in_the_card(tmp_path):
    trainer = plain_trainer(tmp_path)
    trainer.create_model_card(dataset_name="openbmb/UltraFeedback", tags="mine")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets == "openbmb/UltraFeedback"
    assert {"mine", "gpm"} <= set(card.data.tags)
    assert "https://huggingface.co/datasets/openbmb/UltraFeedback" in card.text


def test_header_has_what_the_hub_filters_by(tmp_path):
    trainer = plain_trainer(tmp_path, eval_dataset=Dataset.from_list(ROWS))
    trainer.evaluate()
    trainer.create_model_card(dataset_name=["openbmb/UltraFeedback", "someone/more"], license="apache-2.0")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "text-ranking"
    assert card.data.license == "apache-2.0"
    assert card.data.datasets == ["openbmb/UltraFeedback", "someone/more"]
    assert card.data.metrics == ["accuracy"]
    sets = "https://huggingface.co/datasets"
    trained_on = f"[openbmb/UltraFeedback]({sets}/openbmb/UltraFeedback), [someone/more]({sets}/someone/more)."
    assert f"It was trained on {trained_on}" in card.text


def test_header_claims_no_licence_and_no_metric_unasked(tmp_path):
    data = card_of(plain_trainer(tmp_path)).data
    assert data.license is None
    assert data.metrics is None


# --- What it says ----------------------------------------------------------------------------------------------------


def test_card_has_the_citation(tmp_path):
    text = card_of(plain_trainer(tmp_path)).text
    assert "@inproceedings{zhang2025beyond," in text
    assert "Beyond Bradley-Terry Models" in text
    assert "https://huggingface.co/papers/2410.02197" in text


def test_card_has_the_loss_it_was_trained_with(tmp_path):
    assert "p log sigmoid((s - margin) / tau)" in card_of(plain_trainer(tmp_path)).text


def test_card_has_the_regression_loss(tmp_path):
    rows = Dataset.from_list([{**row, "score": 1.0} for row in ROWS])
    text = card_of(plain_trainer(tmp_path, {"loss_type": "regression"}, train_dataset=rows)).text
    assert "((s - margin) / tau - s_D)^2" in text
    assert "log sigmoid" not in text


def test_card_has_the_conventions(tmp_path):
    text = card_of(plain_trainer(tmp_path)).text
    assert "s(y_i > y_j | x) = sum_l lambda_l(x) (v_i[2l] v_j[2l+1] - v_i[2l+1] v_j[2l]),   l = 0, ..., 1" in text
    assert "scaled to unit length; the prompt has a gate `lambda(x)`, read at its last token (softmax)." in text
    assert "`tau` is 0.1." in text
    model = tiny_model(use_scale_gate=False, normalize_embeddings=False, learn_temperature=True)
    text = card_of(make_trainer(tmp_path, model, processing_class=byte_tokenizer())).text
    assert "s(y_i > y_j | x) = sum_l (v_i[2l]" in text
    assert "lambda" not in text
    assert "unit length" not in text
    assert "`tau` is a trained parameter" in text


def test_card_has_the_settings(tmp_path):
    args = {"gradient_accumulation_steps": 3, "seed": 7, "max_length": 99, "long_rows": "truncate_prompt"}
    shown = table(card_of(plain_trainer(tmp_path, args)))
    expected = {
        "embedding_dim": "4",
        "use_scale_gate": "True",
        "gate_activation": "softmax",
        "normalize_embeddings": "True",
        "temperature": "0.1",
        "learn_temperature": "False",
        "max_length": "99",
        "long_rows": "truncate_prompt",
        "loss_type": "cross_entropy",
        "learning_rate": "0.01",
        "lr_scheduler_type": "cosine",
        "total batch size": "12",
        "seed": "7",
        "training prompts": "4",
    }
    assert {name: shown.get(name) for name in expected} == expected


def test_card_has_the_last_evaluation(tmp_path):
    trainer = plain_trainer(
        tmp_path, {"eval_strategy": "steps", "eval_steps": 1}, eval_dataset=Dataset.from_list(ROWS)
    )
    trainer.train()
    card = card_of(trainer)
    shown = table(card)
    last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    for name in ("eval_loss", "eval_accuracy", "eval_probability"):
        assert float(shown[name]) == pytest.approx(last[name], rel=1e-3)
    assert "Last evaluation, at step 2" in card.text
    assert not any(name.endswith(("_runtime", "_per_second")) for name in shown)


def test_card_has_the_last_evaluation_on_every_dataset(tmp_path):
    eval_dataset = {"first": Dataset.from_list(ROWS[:2]), "second": Dataset.from_list(ROWS[2:])}
    trainer = plain_trainer(tmp_path, eval_dataset=eval_dataset)
    trainer.evaluate()
    assert {"eval_first_accuracy", "eval_second_accuracy"} <= set(table(card_of(trainer)))


def test_card_without_an_evaluation_shows_none(tmp_path):
    assert "Last evaluation" not in card_of(plain_trainer(tmp_path)).text


# --- The snippet -----------------------------------------------------------------------------------------------------


def printed_matrix(code, directory):
    environment = {**os.environ, "HF_MODULES_CACHE": str(directory / "modules")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return torch.tensor(eval(run.stdout, {"tensor": list}))


def trained_matrix(trainer, prompt):
    """What the model in memory gives for the snippet's responses."""
    model = trainer.model.eval()
    renderer = Renderer(trainer.processing_class, max_length=trainer.args.max_length)
    with torch.inference_mode():
        output = model(**renderer(prompt, ["4", "5"]))
    return preference_probability(preference_matrix(output.embeddings, output.scales[0]), output.temperature)


def assert_snippets_print_the_trained_matrix(trainer, prompt, tmp_path):
    trainer.train()
    expected = trained_matrix(trainer, prompt)
    card = card_of(trainer)
    matrix = printed_matrix(snippet(card), tmp_path)
    assert matrix.shape == (2, 2)
    assert matrix[0, 1] + matrix[1, 0] == pytest.approx(1, abs=2e-4)
    assert abs(expected[0, 1] - 0.5) > 1e-3
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-4)
    if is_peft_model(trainer.model):
        assert "trust_remote_code" not in card.text
    else:
        matrix = printed_matrix(BLOCKED + snippet(card, with_package=False), tmp_path)
        torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-4)


def test_snippet_of_a_plain_model_runs(tmp_path):
    assert_snippets_print_the_trained_matrix(plain_trainer(tmp_path), "What is 2 + 2?", tmp_path)


def test_snippet_of_a_conversational_model_runs(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    rows = [{name: [{"role": "user", "content": text}] for name, text in row.items()} for row in ROWS]
    for row in rows:
        row["chosen"][0]["role"] = row["rejected"][0]["role"] = "assistant"
    trainer = make_trainer(tmp_path, tiny_model(), processing_class=tokenizer, train_dataset=Dataset.from_list(rows))
    assert_snippets_print_the_trained_matrix(trainer, [{"role": "user", "content": "What is 2 + 2?"}], tmp_path)


def test_snippet_of_an_adapter_runs(tmp_path, decoder):
    args = {
        "embedding_dim": 4,
        "gate_activation": "softplus",
        "temperature": 0.3,
        "learn_temperature": True,
        "max_length": 200,
    }
    trainer = make_trainer(tmp_path, str(decoder), args, peft_config=LoraConfig(r=2))
    assert_snippets_print_the_trained_matrix(trainer, [{"role": "user", "content": "What is 2 + 2?"}], tmp_path)


def test_snippet_names_the_repository_of_a_pushed_model(tmp_path):
    trainer = plain_trainer(tmp_path)
    trainer.hub_model_id = "someone/some-gpm"
    card = card_of(trainer)
    assert snippet(card).count('from_pretrained("someone/some-gpm")') == 1
    assert "# some-gpm" in card.text


def test_snippet_of_an_adapter_of_a_nameless_model_invents_no_name(tmp_path):
    code = snippet(card_of(plain_trainer(tmp_path, peft_config=LoraConfig(r=2))))
    assert '"None"' not in code
    assert '""' not in code


# --- Policies --------------------------------------------------------------------------------------------------------


def policy_card(directory, decoder, args=None, **kwargs):
    settings = {"max_completion_length": 4, "num_generations": 2, "eval_strategy": "steps", "eval_steps": 2}
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS])
    trainer = GPOTrainer(
        str(decoder),
        reward_funcs=lambda prompts, completions, **columns: [float(len(text)) for text in completions],
        args=GPOConfig(str(directory), **{**SETTINGS, **settings, **(args or {})}),
        train_dataset=prompts,
        eval_dataset=prompts,
        **kwargs,
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(dataset_name="someone/prompts", license="apache-2.0")
    return ModelCard.load(directory / "README.md"), trainer


def test_card_of_a_policy_says_what_it_is(tmp_path, decoder):
    card, trainer = policy_card(tmp_path, decoder, {"beta": 0.25, "score_clip": 3.0})
    assert card.data.pipeline_tag == "text-generation"
    assert {"trl", "gpo", "generated_from_trainer"} <= set(card.data.tags)
    assert (card.data.base_model, card.data.license, card.data.datasets) == (None, "apache-2.0", "someone/prompts")
    assert "None]" not in card.text
    assert "@inproceedings{zhang2025beyond," in card.text
    shown = table(card)
    expected = {"preference": "<lambda>", "beta": "0.25", "loss_type": "gpo", "num_generations": "2"}
    expected |= {"score_clip": "3.0", "total batch size": "4", "training prompts": "4"}
    assert {name: shown.get(name) for name in expected} == expected
    (last,) = [entry for entry in trainer.state.log_history if "eval_win_rate" in entry]
    assert float(shown["eval_win_rate"]) == pytest.approx(last["eval_win_rate"], rel=1e-3)
    assert "eval_loss" not in shown  # of a regression on another target each time


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        ({}, ["Loss of a completion", "(l - s / beta)^2", "`l = log pi(y|x) - log pi_t(y|x)`", "mean score of `y`"]),
        ({"length_normalize": True}, ["`l = (log pi(y|x) - log pi_t(y|x)) / |y|`"]),
        ({"loss_type": "sppo"}, ["(l - s / beta)^2", "probability of `y`, less a half,"]),
        ({"loss_type": "sigmoid"}, ["a winner `w` and a loser `l`", "-log sigmoid(beta (l_w - l_l))"]),
        ({"loss_type": "ipo"}, ["(l_w - l_l - 1 / (2 beta))^2"]),
        ({"loss_type": "rebel"}, ["(beta (l_w - l_l) - (s_w - s_l))^2"]),
    ],
)
def test_card_of_a_policy_has_the_loss_it_was_trained_with(tmp_path, decoder, args, texts):
    card, _ = policy_card(tmp_path, decoder, {**args, "max_steps": 1})
    assert all(text in card.text for text in texts)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, task_type="CAUSAL_LM")], ids=["full", "adapter"])
def test_snippet_of_a_policy_runs(tmp_path, decoder, peft_config):
    card, trainer = policy_card(tmp_path, decoder, peft_config=peft_config)
    assert card.data.library_name == ("peft" if peft_config else "transformers")
    code = snippet(card).replace("max_new_tokens=128", "max_new_tokens=4, do_sample=False")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    tokenizer = trainer.processing_class
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "What is 2 + 2?"}], add_generation_prompt=True)
    inputs = {name: torch.tensor([values]) for name, values in ids.items()}
    tokens = trainer.model.eval().generate(**inputs, max_new_tokens=4, do_sample=False)[0, len(ids["input_ids"]) :]
    assert run.stdout == tokenizer.decode(tokens, skip_special_tokens=True) + "\n"
