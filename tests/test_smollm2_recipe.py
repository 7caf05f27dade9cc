"""The recipe `smollm2-135m`: its splits, its arithmetic, its one look at the test rows, and all of it, tiny."""

import gzip
import importlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CHAT_TEMPLATE, TRAINING, assistant, tiny_model, user
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config, set_seed

from gpm_trl import GPMConfig, GPMTrainer, PreferenceScorer
from gpm_trl.cli.quickstart import byte_tokenizer

RECIPE = Path(__file__).parents[1] / "recipes" / "smollm2-135m"
DOCS = RECIPE.parents[1] / "docs"


@pytest.fixture(scope="module")
def modules():
    """The recipe's files as modules, which import each other by their short names."""
    names = ("data", "study", "report", "tables", "grpo")
    sys.path.insert(0, str(RECIPE))
    found = {name: importlib.import_module(name) for name in names}
    yield found
    sys.path.remove(str(RECIPE))
    for name in names:
        del sys.modules[name]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny decoder with as many layers as the recipes' adapters need."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    set_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 17, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = Qwen3Config(vocab_size=len(tokenizer), **sizes, **special)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Three files of rows: each prompt of the first has seven answers, six of which are compared with the seventh."""
    directory = tmp_path_factory.mktemp("rows")
    alpaca = [
        {
            "prompt": [user(f"Say {n}.")],
            "chosen": [assistant("Yes. " * m)],
            "rejected": [assistant(f"{n}")],
            "label": 0.75,
        }
        for n in range(60)
        for m in range(1, 7)
    ]
    hh = [
        {"prompt": [user(f"May I {n}?")], "chosen": [assistant("No.")], "rejected": [assistant(f"Why not {n}?")]}
        for n in range(60)
    ]
    llmbar = [
        {"prompt": f"Do {n}", "chosen": "I do.", "rejected": "I do not.", "subset": f"llmbar-{n % 2}", "id": n}
        for n in range(8)
    ]
    for name, lines in (("alpaca_pairs", alpaca), ("hh_harmless", hh), ("llmbar", llmbar)):
        with gzip.open(directory / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    return directory


@pytest.fixture(scope="module")
def splits(tmp_path_factory, modules, model, rows):
    output = tmp_path_factory.mktemp("splits")
    make_data(modules, output, rows, model)
    return output


def make_data(modules: dict, output: Path, rows: Path, model: Path) -> None:
    arguments = ["--output_dir", str(output), "--data", str(rows), "--model", str(model)]
    modules["data"].make_data(modules["data"].make_parser().parse_args(arguments))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompts_of(*paths: Path) -> set[str]:
    return {json.dumps(row["prompt"]) for path in paths for row in read(path)}


def test_splits_share_no_prompt_and_lack_none(splits):
    data = splits / "data"
    train, valid = (prompts_of(*data.glob(f"p*/{name}.jsonl")) for name in ("train", "valid"))
    test = prompts_of(*(data / "test").glob("*.jsonl"))
    assert not train & valid
    assert not (train | valid) & test
    assert len(train | valid | test) == 60 + 60 + 8
    assert len(train) > 60
    assert valid
    counts = json.loads((data / "counts.json").read_text())
    assert sum(number["comparisons"] for number in counts.values()) == 360 + 60 + 8


def test_a_prompt_has_its_answers_once_and_their_labels(splits):
    row = next(row for row in read(splits / "data" / "preferences" / "train.jsonl") if row["source"] == "alpaca")
    assert len(row["responses"]) == 7
    assert len(row["comparisons"]) == 6
    assert row["label"] == [0.75] * 6
    assert all(row["responses"][chosen][0]["content"].startswith("Yes") for chosen, _ in row["comparisons"])


def test_a_long_answer_leaves_its_comparison_out(modules, model, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(modules["data"], "TRAIN_TOKENS", {"alpaca": 50, "hh": 256})
    make_data(modules, tmp_path, rows, model)
    found = read(tmp_path / "data" / "preferences" / "train.jsonl")
    texts = [response[0]["content"] for row in found if row["source"] == "alpaca" for response in row["responses"]]
    assert texts
    assert max(map(len, texts)) < 50
    assert {row["source"] for row in found} == {"alpaca", "hh"}


def test_transcripts_of_hh_become_messages(modules):
    text = "\n\nHuman: Hello?\n\nWhat: now?\n\nAssistant: Hi.\n\nHuman: Bye\n\nAssistant: "
    messages = [("user", "Hello?\n\nWhat: now?"), ("assistant", "Hi."), ("user", "Bye"), ("assistant", "")]
    assert modules["data"].transcript(text) == [{"role": role, "content": content} for role, content in messages]


def test_annotations_of_alpaca_eval_become_rows(modules, monkeypatch):
    """A preference of 1 is for the first output, of 2 for the second."""
    row = {"instruction": "Go", "output_1": "first", "output_2": "second"}
    annotations = json.dumps([{**row, "preference": 1.75}, {**row, "preference": 1.25}]).encode()
    monkeypatch.setattr(modules["data"], "urlopen", lambda url: io.BytesIO(annotations))
    monkeypatch.setattr(modules["data"], "ALPACA_MODELS", ("one",))
    second, first = modules["data"].alpaca_rows(None)
    assert (second["chosen"], second["rejected"]) == ([assistant("second")], [assistant("first")])
    assert (first["chosen"], first["rejected"]) == ([assistant("first")], [assistant("second")])
    assert second["label"] == first["label"] == 0.75


def test_seeds_add_no_certainty(modules):
    """The interval of three seeds that agree is that of one."""
    hits = [n % 4 > 1 or n % 7 > 2 for n in range(60) for _ in range(2)]  # alike within prompts
    one, three = (
        {f"{seed}:{n}": (str(n // 2), hit) for n, hit in enumerate(hits) for seed in range(m)} for m in (1, 3)
    )
    expected, found = modules["report"].pooled(one), modules["report"].pooled(three)
    assert found["accuracy"] == pytest.approx(expected["accuracy"])
    width, wider = (limits["accuracy_ci"][1] - limits["accuracy_ci"][0] for limits in (found, expected))
    assert width == pytest.approx(wider, rel=0.1)


def test_the_panel_has_trained_no_policy(modules, tmp_path):
    make_parser, judges_of = modules["report"].make_parser, modules["report"].judges_of
    args = make_parser().parse_args(["policies", f"--output_dir={tmp_path}"])
    panel = ["bt_gated-2", "gpm-2", "hrc-2"]
    assert judges_of(args, "gprl-20") == (["gpm-0"], panel)
    assert judges_of(args, "grpo_bt-60") == (["bt_gated-0"], panel)
    assert judges_of(args, "initial-0") == ([], panel)
    small = make_parser().parse_args(["policies", f"--output_dir={tmp_path}", "--small"])
    assert judges_of(small, "gpo-3") == (["gpm-0"], ["bt_gated-0"])


@pytest.mark.parametrize("precision", [(), ("--bf16",)], ids=["float32", "bf16"])
def test_layers_that_models_share_are_computed_once_and_give_the_same(modules, model, tmp_path, precision):
    names = ["models", f"--output_dir={tmp_path}", f"--model={model}", *precision]
    args = modules["report"].make_parser().parse_args(names)
    mixed = modules["report"].mixed_precision
    rows = [{"prompt": [user("Say it.")], "chosen": [assistant("Yes.")], "rejected": [assistant("No, no.")]}]
    for width in (0, 4):
        settings = {"embedding_dim": width, "reward_dim": 1, "use_cpu": True}
        lora = LoraConfig(r=2, target_modules=r".*layers\.1[5-9]\..*_proj", init_lora_weights=False)
        trainer = GPMTrainer(
            str(model),
            GPMConfig(str(tmp_path / str(width)), report_to="none", **settings),
            Dataset.from_list(rows),
            peft_config=lora,
        )
        trainer.save_model()
        texts = [row["prompt"] for row in rows], [[row["chosen"], row["rejected"], row["chosen"]] for row in rows]
        with mixed(args):
            (expected,) = PreferenceScorer.from_pretrained(tmp_path / str(width), "cpu").matrix(*texts)
        scorer = modules["report"].load_scorer(args, tmp_path / str(width))
        for _ in range(2):  # the second reads what the first has written
            with mixed(args):
                (found,) = scorer.matrix(*texts)
            assert torch.equal(found, expected)
        assert len(list((tmp_path / "report" / "layers").iterdir())) == 1


def test_a_run_with_other_settings_is_not_taken_for_done(modules, tmp_path):
    args = modules["study"].make_parser().parse_args(["models", f"--output_dir={tmp_path}", "--model=small"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "done.json").write_text(json.dumps({"settings": {"seed": 0}}))
    run = modules["study"].run
    assert run(tmp_path / "run", [], args, seed=0, dataset_name=tmp_path) == {"settings": {"seed": 0}}
    with pytest.raises(ValueError, match=r"run is of {'model': 'small', 'seed': 0}, not of {'seed': 1"):
        run(tmp_path / "run", [], args, seed=1)


def test_grpo_takes_its_reward_from_a_preference_model(modules, model, chat_tokenizer, tmp_path):
    tiny_model(embedding_dim=0, reward_dim=2).save_pretrained(tmp_path / "bt")
    chat_tokenizer.save_pretrained(tmp_path / "bt")
    settings = {**TRAINING, "num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 4}
    args = modules["grpo"].Config(str(tmp_path), reward_model_path=str(tmp_path / "bt"), max_steps=1, **settings)
    prompts = Dataset.from_list([{"prompt": [user("Say it.")]}] * 2)
    trainer = modules["grpo"].make_trainer({"model": str(model), "args": args, "train_dataset": prompts}, None)
    trainer.train()
    assert "rewards/bt/mean" in trainer.state.log_history[0]


def test_the_log_ratio_of_an_answer_is_that_of_its_tokens_up_to_the_eos(modules, model):
    """Of sampled answers to padded prompts, against each row by itself in float64."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    policy = get_peft_model(base, LoraConfig(r=2, target_modules=r".*_proj", init_lora_weights=False)).eval()
    set_seed(0)
    prompts, mask = torch.randint(5, 50, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    mask[0, :4] = 0
    sampling = {"do_sample": True, "top_k": 0, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    sampled = policy.generate(
        input_ids=prompts, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **sampling
    )
    eos = sampled.sequences[1, 8].item()  # as if the second answer had ended at its third token
    ratios, lengths = modules["report"].log_ratios(policy, mask, sampled, eos)
    assert lengths[1] <= 3
    for ids, start, ratio, length in zip(sampled.sequences, (4, 0, 0), ratios, lengths, strict=True):
        row, answer = ids[None, start : 6 + length], ids[6 : 6 + length, None]
        with torch.no_grad():
            own = policy(row).logits.log_softmax(-1)[0, -length - 1 : -1].gather(1, answer).sum()
            with policy.disable_adapter():
                initial = policy(row).logits.log_softmax(-1)[0, -length - 1 : -1].gather(1, answer).sum()
        assert ratio == pytest.approx((own - initial).item(), abs=1e-4)
        assert abs(ratio) > 1e-3
    assert modules["report"].log_ratios(base, mask, sampled, eos) == ([0.0] * 3, lengths)


def test_distinct_pairs(modules):
    assert modules["report"].distinct(["a b a b", "a b"]) == 2 / 4


def test_an_answer_is_shown_as_it_is_in_one_line(modules):
    assert modules["tables"].as_cell("1. *a*\n\n| <b> & `c`_") == r"1. \*a\* \| &lt;b&gt; &amp; \`c\`\_"


def test_the_results_page_has_what_the_reports_say(modules):
    """`make paper-table` prints the tables that are on the page."""
    page = (DOCS / "results.md").read_text()
    reports = sorted((DOCS / "results").glob("smollm2-135m-*.json"))
    assert reports
    for report in reports:
        for table in modules["tables"].make_tables(json.loads(report.read_text())):
            assert table in page


@pytest.mark.slow
def test_the_small_study_from_rows_to_tables(splits, model, tmp_path):
    """Every step in its own process; a second run makes nothing anew; the test rows are read once."""
    output = tmp_path / "study"
    output.mkdir()
    (output / "data").symlink_to(splits / "data")

    def step(script: str, *arguments: str) -> subprocess.CompletedProcess:
        common = ["--output_dir", str(output), "--model", str(model), "--jobs", "2", "--small"]
        command = [sys.executable, str(RECIPE / script), *arguments, *common]
        return subprocess.run(command, capture_output=True, text=True)

    early = step("report.py", "models")
    assert early.returncode == 2
    assert "study.py" in early.stderr
    for part in ("models", "policies"):
        for script in ("study.py", "report.py"):
            done = step(script, part)
            assert done.returncode == 0, done.stderr[-3000:]
    made = {path: path.stat().st_mtime_ns for path in output.rglob("*.json*")}
    parts = [output / "report" / f"{part}.json" for part in ("models", "policies")]
    of_models, report = (json.loads(path.read_text()) for path in parts)
    assert set(of_models["runs"]) == {"bt_gated-0", "gpm-0"}
    assert str(model.parent) not in parts[0].read_text() + parts[1].read_text()  # nothing of this machine
    assert set(of_models["models"]) == {"bt_gated", "gpm"}
    assert set(of_models["models"]["gpm"]) == {"alpaca", "hh", "llmbar"}
    initial = report["policies"]["initial"]["0"]
    assert initial["kl"] == [0, 0, 0]
    assert initial["own"] is None
    assert set(report["policies"]["gpo"]["6"]["judges"]) == {"bt_gated-0", "gpm-0"}
    for one in of_models["models"]["gpm"].values():
        assert one["differences"] == [one["difference"]["accuracy"]]  # of one seed
    assert of_models["models"]["bt_gated"]["hh"]["difference"]["accuracy"] == 0
    assert not (output / "report" / "layers").exists()
    assert {name: list(steps) for name, steps in report["policies"].items() if name != "initial"} == {
        "gpo": ["2", "4", "6"],
        "grpo_bt": ["2", "4", "6"],
    }
    for script, *arguments in (("study.py", "models"), ("study.py", "policies")):
        assert step(script, *arguments).returncode == 0
    assert all(path.stat().st_mtime_ns == made[path] for path in made if path.name == "done.json")

    tables = subprocess.run(
        [
            sys.executable,
            str(RECIPE / "tables.py"),
            *map(str, parts),
            "--pictures",
            str(tmp_path),
            "--samples",
            str(tmp_path / "samples.md"),
        ],
        capture_output=True,
        text=True,
    )
    assert tables.returncode == 0, tables.stderr
    assert "| GPM, 2k = 6 " in tables.stdout
    assert "| GRPO, by gated BT " in tables.stdout
    assert len(list(tmp_path.glob("smollm2_*.png"))) == 3
    page = (tmp_path / "samples.md").read_text()
    assert "| prompt | SmolLM2, as it is | GPO, by the GPM |" in page
    assert page.count("\n| Say ") == len(report["samples"])

    adapter = output / "policies" / "gpo" / "checkpoint-6" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes() + b" ")
    late = step("report.py", "policies")
    assert late.returncode == 2
    assert "a second look is no test" in late.stderr
