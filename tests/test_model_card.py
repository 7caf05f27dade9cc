"""The model card: where it is written, what it says, and that its snippets run."""

import io
import os
import re
import subprocess
import sys
from contextlib import chdir, redirect_stdout
from pathlib import Path

import pytest
import torch
from conftest import CHAT_TEMPLATE, byte_tokenizer, tiny_model
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from test_gpm_trainer import QUICK
from trl import ScriptArguments

from gpm_trl import GPMConfig, GPMTrainer, Renderer, preference_matrix, preference_probability
from gpm_trl.cli.training import save_and_push

ROWS = [{"prompt": f"What is {index} + 1?", "chosen": f"{index + 1}", "rejected": "none"} for index in range(4)]
SETTINGS = {**QUICK, "learning_rate": 1e-2}


def make_trainer(directory, model, args=None, rows=ROWS, **kwargs):
    args = GPMConfig(**{"output_dir": str(directory), **SETTINGS, **(args or {})})
    return GPMTrainer(model, args, Dataset.from_list(rows), **kwargs)


def plain_trainer(directory, args=None, model=None, **kwargs):
    return make_trainer(directory, model or tiny_model(), args, processing_class=byte_tokenizer(), **kwargs)


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
    """A trainer that has evaluated on two datasets, and saved, at each of two steps."""
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    args = {**steps, "gradient_accumulation_steps": 3, "seed": 7, "max_length": 99, "long_rows": "truncate_prompt"}
    eval_dataset = {"first": Dataset.from_list(ROWS[:1]), "second": Dataset.from_list(ROWS[2:])}
    trainer = plain_trainer(tmp_path_factory.mktemp("trained"), args, eval_dataset=eval_dataset)
    trainer.train()
    trainer.save_model()
    return trainer


# --- Where it is written, and what it says ---------------------------------------------------------------------------


def test_a_card_is_in_each_directory_and_its_snippets_load_what_is_there(trained, tmp_path):
    trained.save_model(str(tmp_path / "elsewhere"))
    output_dir = trained.args.output_dir
    for directory in (output_dir, f"{output_dir}/checkpoint-1", f"{output_dir}/checkpoint-2", tmp_path / "elsewhere"):
        card = ModelCard.load(f"{directory}/README.md")
        assert [code.count(f'from_pretrained("{Path(directory).name}"') for code in snippets(card)] == [1, 2]
        assert str(tmp_path.parent) not in card.content  # where this machine keeps things


def test_card_of_a_plain_model(trained):
    card = ModelCard.load(f"{trained.args.output_dir}/README.md")
    assert "-[p log sigmoid((s - margin) / tau) + (1 - p) log sigmoid(-(s - margin) / tau)]" in card.text
    assert "s(y_i > y_j | x) = sum_l lambda_l(x) (v_i[2l] v_j[2l+1] - v_i[2l+1] v_j[2l]),   l = 0, ..., 1" in card.text
    assert "scaled to unit length; the prompt has a gate `lambda(x)`, read at its last token (softmax)." in card.text
    assert "`tau` is 0.1." in card.text
    data = card.data
    assert data.tags == ["generated_from_trainer", "gpm", "preference-model", "trl"]
    assert (data.library_name, data.pipeline_tag, data.metrics) == ("transformers", "text-ranking", ["accuracy"])
    assert (data.base_model, data.license, data.datasets) == (None, None, None)


def test_card_has_the_settings_and_the_last_evaluation(trained):
    card = ModelCard.load(f"{trained.args.output_dir}/README.md")
    shown = table(card)
    expected = {"embedding_dim": "4", "use_scale_gate": "True", "temperature": "0.1", "max_length": "99", "seed": "7"}
    expected |= {"lr_scheduler_type": "constant", "total batch size": "12", "training rows": "4"}
    assert {name: shown.get(name) for name in expected} == expected
    assert "Last evaluation, at step 2" in card.text
    for name in ("eval_first_loss", "eval_second_loss", "eval_second_probability"):
        (*_, last) = (entry[name] for entry in trained.state.log_history if name in entry)
        assert float(shown[name]) == pytest.approx(last, rel=1e-3)
    assert not any(name.endswith(("_runtime", "_per_second")) for name in shown)


def test_card_of_another_model_loss_and_batch(tmp_path):
    model = tiny_model(use_scale_gate=False, normalize_embeddings=False, learn_temperature=True)
    args = {"loss_type": "regression", "max_tokens_per_batch": 60, "per_device_train_batch_size": 1}
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


def test_card_of_a_bradley_terry_model_claims_no_cycles_and_its_snippet_runs(tmp_path):
    trainer = plain_trainer(tmp_path, model=tiny_model(reward_dim=1, embedding_dim=0))
    trainer.train()
    card = card_of(trainer)
    assert "A Bradley-Terry model: it gives" in card.text
    assert "s(y_i > y_j | x) = (r(x, y_i) - r(x, y_j))\n```" in card.text
    assert "`tau` is 1.0." in card.text
    assert not any(words in card.text for words in ("can express", "sum_l", "lambda", "unit length", "an embedding"))
    assert_prints(output_of(snippets(card)[0], trainer), trained_matrix(trainer))


def test_card_of_a_hybrid_model_has_both_parts_and_its_snippets_run(tmp_path):
    settings = {"reward_dim": 1, "embedding_dim": 2, "reward_clip": 3.0, "cyclic_weight": 0.5}
    trainer = plain_trainer(tmp_path, model=tiny_model(**settings))
    trainer.train()
    trainer.save_model()
    card = card_of(trainer)
    assert "A hybrid reward-cyclic model (HRC): it gives" in card.text
    formula = "s(y_i > y_j | x) = (r(x, y_i) - r(x, y_j))\n                 + 0.5 sum_l lambda_l(x) (v_i[2l] v_j[2l+1]"
    assert formula in card.text
    assert "with rewards cut to the range from -3.0 to 3.0," in card.text
    assert "arxiv.org/abs/2605.17342" in card.text
    assert len(snippets(card)) == 2
    for snippet in snippets(card):
        assert_prints(output_of(snippet, trainer), trained_matrix(trainer))


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)], ids=["full", "adapter"])
def test_header_has_what_the_hub_filters_by(tmp_path, peft_config):
    model = tiny_model()
    model.config.text_config.name_or_path = "Qwen/Qwen3-0.6B"
    trainer = plain_trainer(tmp_path, model=model, peft_config=peft_config)
    trainer.save_model()
    datasets = ["openbmb/UltraFeedback", "someone/more"]
    for dataset_name in (datasets[0], datasets):
        trainer.create_model_card(dataset_name=dataset_name, tags="mine", license="apache-2.0")
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.datasets == (datasets if dataset_name is datasets else datasets[:1])
    assert card.data.base_model == "Qwen/Qwen3-0.6B"
    assert card.data.license == "apache-2.0"
    assert {"mine", "gpm"} <= set(card.data.tags)
    assert card.data.library_name == ("peft" if peft_config else "transformers")
    assert "Its backbone is [Qwen/Qwen3-0.6B](https://huggingface.co/Qwen/Qwen3-0.6B)." in card.text
    links = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in datasets)
    assert f"It was trained on {links}." in card.text


# --- The snippets ----------------------------------------------------------------------------------------------------


def trained_matrix(trainer):
    """What the model in memory gives for the snippets' prompt and responses."""
    prompt = "What is 2 + 2?"
    if trainer.model.config.renderer["conversational"]:
        prompt = [{"role": "user", "content": prompt}]
    renderer = Renderer(trainer.processing_class, max_length=trainer.args.max_length)
    with torch.inference_mode():
        output = trainer.model.eval()(**renderer(prompt, ["4", "5"]))
    return preference_probability(preference_matrix(output.embeddings, output.scales[0]), output.temperature)


def output_of(snippet, trainer):
    with redirect_stdout(io.StringIO()) as printed, chdir(Path(trainer.args.output_dir).parent):
        exec(snippet, {})
    return printed.getvalue()


def assert_prints(printed, expected):
    assert abs(expected[0, 1] - 0.5) > 1e-3
    torch.testing.assert_close(torch.tensor(eval(printed, {"tensor": list})), expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def conversational(tmp_path_factory):
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    rows = [{name: [{"role": roles[name], "content": row[name]}] for name in roles} for row in ROWS]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    directory = tmp_path_factory.mktemp("conversational")
    trainer = make_trainer(directory, tiny_model(), rows=rows, processing_class=tokenizer)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def texts_beside_a_template(tmp_path_factory):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    trainer = make_trainer(tmp_path_factory.mktemp("texts"), tiny_model(), processing_class=tokenizer)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, decoder):
    args = {"embedding_dim": 4, "gate_activation": "softplus", "temperature": 0.3, "learn_temperature": True}
    trainer = make_trainer(tmp_path_factory.mktemp("adapter"), str(decoder), args, peft_config=LoraConfig(r=2))
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["trained", "conversational", "texts_beside_a_template", "adapter"])
def test_snippet_prints_the_trained_matrix(request, kind):
    trainer = request.getfixturevalue(kind)
    card = card_of(trainer)
    assert_prints(output_of(snippets(card)[0], trainer), trained_matrix(trainer))
    assert len(snippets(card)) == (1 if kind == "adapter" else 2)
    assert card.data.base_model is None  # a directory is none
    assert "More Information Needed" not in card.text  # as in PEFT's own card


@pytest.mark.multiprocess
def test_snippets_without_the_package_print_the_trained_matrices(trained, conversational, tmp_path):
    trainers = (trained, conversational)
    codes = [f"os.chdir({str(Path(one.args.output_dir).parent)!r})\n{snippets(card_of(one))[1]}" for one in trainers]
    code = "import os, sys; sys.modules.update(dict.fromkeys(('gpm_trl', 'trl', 'peft')))\n"
    code += "\nprint('--')\n".join(codes)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for printed, trainer in zip(run.stdout.split("--"), trainers, strict=True):
        assert_prints(printed, trained_matrix(trainer))


def test_snippet_of_an_adapter_of_a_nameless_model_loads_its_base_by_hand(tmp_path):
    (code,) = snippets(card_of(plain_trainer(tmp_path, peft_config=LoraConfig(r=2))))
    assert 'base = GPMForPreference.from_pretrained(\n    "path/to/the/base/model",\n    embedding_dim=4,\n' in code
    assert "gate_activation='softmax',\n" in code
    assert '"None"' not in code
    compile(code, "snippet", "exec")


@pytest.mark.parametrize(("name", "told"), [("someone/rows", "someone/rows"), (None, None), ("rows.jsonl", None)])
def test_a_command_that_pushes_names_data_of_the_hub_and_no_file_of_this_machine(name, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").touch()
    trainer = plain_trainer("run")
    trainer.args.push_to_hub = True
    pushed = []
    monkeypatch.setattr(trainer, "push_to_hub", lambda *_, **named: pushed.append(named.get("dataset_name")))
    save_and_push(trainer, ScriptArguments(dataset_name=name))
    assert pushed[-1] == told
