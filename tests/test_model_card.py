"""The model card: where it is written, what it says, and that its snippets run."""

import copy
import io
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
import torch
from accelerate.utils import is_peft_model
from conftest import CHAT_TEMPLATE, byte_tokenizer, tiny_model
from datasets import Dataset
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig

from gpm_trl import GPMConfig, GPMTrainer, Renderer, preference_matrix, preference_probability

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
BLOCKED = "import sys; sys.modules.update(dict.fromkeys(('gpm_trl', 'trl', 'peft')))\n"


def make_trainer(directory, model, args=None, rows=ROWS, **kwargs):
    args = GPMConfig(**{"output_dir": str(directory), **SETTINGS, **(args or {})})
    return GPMTrainer(model, args, Dataset.from_list(rows), **kwargs)


def plain_trainer(directory, args=None, model=None, **kwargs):
    return make_trainer(directory, model or tiny_model(), args, processing_class=byte_tokenizer(), **kwargs)


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


def snippets(card):
    """That with the package and, of a whole model, that without."""
    return re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer that has evaluated and saved at each of two steps."""
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    args = {**steps, "gradient_accumulation_steps": 3, "seed": 7, "max_length": 99, "long_rows": "truncate_prompt"}
    trainer = plain_trainer(tmp_path_factory.mktemp("trained"), args, eval_dataset=Dataset.from_list(ROWS))
    trainer.train()
    trainer.save_model()
    return trainer


# --- Where it is written, and what it says ---------------------------------------------------------------------------


def test_a_card_is_in_each_directory_and_its_snippets_load_what_is_there(trained, tmp_path):
    trained.save_model(str(tmp_path / "elsewhere"))
    output_dir = trained.args.output_dir
    for directory in (output_dir, f"{output_dir}/checkpoint-1", f"{output_dir}/checkpoint-2", tmp_path / "elsewhere"):
        card = ModelCard.load(f"{directory}/README.md")
        assert [code.count(f'from_pretrained("{directory}"') for code in snippets(card)] == [1, 2]


def test_card_of_a_plain_model(trained):
    card = ModelCard.load(f"{trained.args.output_dir}/README.md")
    assert "@inproceedings{zhang2025beyond," in card.text
    assert "https://huggingface.co/papers/2410.02197" in card.text
    assert "-[p log sigmoid((s - margin) / tau) + (1 - p) log sigmoid(-(s - margin) / tau)]" in card.text
    assert "s(y_i > y_j | x) = sum_l lambda_l(x) (v_i[2l] v_j[2l+1] - v_i[2l+1] v_j[2l]),   l = 0, ..., 1" in card.text
    assert "scaled to unit length; the prompt has a gate `lambda(x)`, read at its last token (softmax)." in card.text
    assert "`tau` is 0.1." in card.text
    assert "None]" not in card.text
    data = card.data
    assert data.tags == ["generated_from_trainer", "gpm", "preference-model", "trl"]
    assert (data.library_name, data.pipeline_tag, data.metrics) == ("transformers", "text-ranking", ["accuracy"])
    assert (data.base_model, data.license, data.datasets) == (None, None, None)


def test_card_has_the_settings_and_the_last_evaluation(trained):
    card = ModelCard.load(f"{trained.args.output_dir}/README.md")
    shown = table(card)
    expected = {
        "embedding_dim": "4",
        "use_scale_gate": "True",
        "gate_activation": "softmax",
        "temperature": "0.1",
        "normalize_embeddings": "True",
        "learn_temperature": "False",
        "loss_type": "cross_entropy",
        "max_length": "99",
        "long_rows": "truncate_prompt",
        "learning_rate": "0.01",
        "seed": "7",
        "lr_scheduler_type": "cosine",
        "total batch size": "12",
        "training rows": "4",
    }
    assert {name: shown.get(name) for name in expected} == expected
    last = [entry for entry in trained.state.log_history if "eval_loss" in entry][-1]
    assert "Last evaluation, at step 2" in card.text
    for name in ("eval_loss", "eval_accuracy", "eval_probability"):
        assert float(shown[name]) == pytest.approx(last[name], rel=1e-3)
    assert not any(name.endswith(("_runtime", "_per_second")) for name in shown)


def test_card_of_another_model_loss_and_batch(tmp_path):
    model = tiny_model(use_scale_gate=False, normalize_embeddings=False, learn_temperature=True)
    args = {"loss_type": "regression", "max_tokens_per_batch": 60}
    trainer = plain_trainer(tmp_path, args, model, rows=[{**row, "score": 1.0} for row in ROWS])
    trainer.hub_model_id = "someone/some-gpm"
    card = card_of(trainer)
    assert "((s - margin) / tau - s_D)^2" in card.text
    assert "s(y_i > y_j | x) = sum_l (v_i[2l]" in card.text
    assert "`tau` is a trained parameter" in card.text
    assert not any(words in card.text for words in ("log sigmoid", "lambda", "unit length", "Last evaluation"))
    assert table(card)["training batches"] == str(len(trainer.train_dataset)) != "4"
    assert card.data.metrics is None
    assert "# some-gpm" in card.text
    assert snippets(card)[0].count('from_pretrained("someone/some-gpm")') == 1


def test_card_has_the_last_evaluation_on_every_dataset(tmp_path):
    eval_dataset = {"first": Dataset.from_list(ROWS[:2]), "second": Dataset.from_list(ROWS[2:])}
    trainer = plain_trainer(tmp_path, eval_dataset=eval_dataset)
    trainer.evaluate()
    assert {"eval_first_accuracy", "eval_second_accuracy"} <= set(table(card_of(trainer)))


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)], ids=["full", "adapter"])
def test_header_has_what_the_hub_filters_by(tmp_path, peft_config):
    trainer = plain_trainer(tmp_path, model=model_from_the_hub(), peft_config=peft_config)
    trainer.save_model()
    datasets = ["openbmb/UltraFeedback", "someone/more"]
    for dataset_name in (datasets[0], datasets):
        trainer.create_model_card(dataset_name=dataset_name, tags="mine", license="apache-2.0")
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.datasets == (datasets if dataset_name is datasets else datasets[:1])
    for name in (card.data.base_model, *card.data.datasets):
        validate_repo_id(name)
    assert card.data.license == "apache-2.0"
    assert {"mine", "gpm"} <= set(card.data.tags)
    assert card.data.library_name == ("peft" if peft_config else "transformers")
    assert "Its backbone is [Qwen/Qwen3-0.6B](https://huggingface.co/Qwen/Qwen3-0.6B)." in card.text
    links = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in datasets)
    assert f"It was trained on {links}." in card.text


# --- The snippets ----------------------------------------------------------------------------------------------------


def trained_matrix(trainer, prompt):
    """What the model in memory gives for the snippets' responses."""
    renderer = Renderer(trainer.processing_class, max_length=trainer.args.max_length)
    with torch.inference_mode():
        output = trainer.model.eval()(**renderer(prompt, ["4", "5"]))
    return preference_probability(preference_matrix(output.embeddings, output.scales[0]), output.temperature)


def assert_prints(printed, expected):
    assert abs(expected[0, 1] - 0.5) > 1e-3
    torch.testing.assert_close(torch.tensor(eval(printed, {"tensor": list})), expected, rtol=0, atol=1e-4)


def conversational(directory):
    rows = [{name: [{"role": "user", "content": text}] for name, text in row.items()} for row in ROWS]
    for row in rows:
        row["chosen"][0]["role"] = row["rejected"][0]["role"] = "assistant"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return make_trainer(directory, tiny_model(), rows=rows, processing_class=tokenizer)


def adapter(directory, decoder):
    args = {"embedding_dim": 4, "gate_activation": "softplus", "temperature": 0.3, "learn_temperature": True}
    return make_trainer(directory, str(decoder), args, peft_config=LoraConfig(r=2))


@pytest.mark.parametrize("kind", ["plain", "conversational", "adapter"])
def test_snippet_prints_the_trained_matrix(trained, tmp_path, decoder, kind):
    trainer = trained
    if kind != "plain":
        trainer = conversational(tmp_path) if kind == "conversational" else adapter(tmp_path, decoder)
        trainer.train()
    card = card_of(trainer)
    prompt = "What is 2 + 2?"
    expected = trained_matrix(trainer, prompt if kind == "plain" else [{"role": "user", "content": prompt}])
    with redirect_stdout(io.StringIO()) as printed:
        exec(snippets(card)[0], {})
    assert_prints(printed.getvalue(), expected)
    assert len(snippets(card)) == (1 if is_peft_model(trainer.model) else 2)
    assert card.data.base_model is None  # a directory is none
    assert "More Information Needed" not in card.text  # as in PEFT's own card


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", ["plain", "conversational"])
def test_snippet_without_the_package_prints_the_trained_matrix(trained, tmp_path, kind):
    trainer, prompt = trained, "What is 2 + 2?"
    if kind == "conversational":
        trainer, prompt = conversational(tmp_path), [{"role": "user", "content": prompt}]
        trainer.train()
    code = BLOCKED + snippets(card_of(trainer))[1]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert_prints(run.stdout, trained_matrix(trainer, prompt))


def test_snippet_of_an_adapter_of_a_nameless_model_loads_its_base_by_hand(tmp_path):
    (code,) = snippets(card_of(plain_trainer(tmp_path, peft_config=LoraConfig(r=2))))
    assert 'base = GPMForPreference.from_pretrained(\n    "path/to/the/base/model",\n    embedding_dim=4,\n' in code
    assert "gate_activation='softmax',\n" in code
    assert '"None"' not in code
    compile(code, "snippet", "exec")
