"""`gpm-trl evaluate`: its report and its errors, and the same numbers from two processes as from one."""

import json
import re
from pathlib import Path

import pytest
from conftest import lively_model, tiny_reward_model, user
from launching import launch, sharding_config

from gpm_trl import PreferenceScorer
from gpm_trl.cli import evaluate
from gpm_trl.evaluation import BENCHMARKS, accuracy_difference, describe_model, describe_run, to_markdown
from gpm_trl_cli import main as gpm_trl_main

SCRIPT = Path(__file__).with_name("evaluation_run.py")
# Odd numbers of rows; one of the pairs is too long, and the second process's.
PAIRS = [
    {
        "prompt": f"Question {index // 2}?" + " Please!" * 9 * (index == 5),
        "chosen": "yes" * (1 + index % 3),
        "rejected": "no" * (1 + index % 4),
        "label": [1.0, 0.0, 0.7][index % 3],
        "subset": "ab"[index % 2],
    }
    for index in range(11)
]
REWARD_BENCH = [
    {
        "id": index,
        "prompt": f"Question {index}?",
        "chosen": "yes" * (1 + index % 3),
        "rejected": "no" * (1 + index % 4),
        "subset": ["alpacaeval-easy", "mt-bench-med", "donotanswer", "hep-go", "math-prm"][index % 5],
    }
    for index in range(13)
]
REWARD_BENCH_2 = [
    {
        "id": ("ref:{}", "tied:{}")[index % 2].format(index // 2) if index < 6 else str(index),
        "prompt": f"Question {index}?",
        "chosen": ["yes" * (1 + index % 3), "yes!"][: 1 + (index % 2 and index < 6)],
        "rejected": ["no", "never" * (1 + index % 2), "maybe"],
        "subset": "Ties" if index < 6 else ("Math", "Precise IF")[index % 2],
    }
    for index in range(11)
]
ROWS = {"pairs": PAIRS, "reward_bench": REWARD_BENCH, "reward_bench_2": REWARD_BENCH_2}


@pytest.fixture(scope="module")
def models(tmp_path_factory, chat_tokenizer):
    """Directories of a general preference model and of a Bradley-Terry reward model."""
    root = tmp_path_factory.mktemp("models")
    for name, model in (("gpm", lively_model(renderer={"max_length": 80})), ("bt", tiny_reward_model())):
        model.save_pretrained(root / name)
        chat_tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A directory with the rows of each benchmark, and one with a row that cannot be used."""
    root = tmp_path_factory.mktemp("data")
    files = {**ROWS, "bad": [PAIRS[0], {**PAIRS[1], "rejected": None}, PAIRS[2]]}
    files["queries"] = [{"query" if name == "prompt" else name: row[name] for name in row} for row in PAIRS]
    files["messages"] = [{**row, "prompt": [user(row["prompt"])]} for row in PAIRS]
    for name, rows in files.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def run(model, dataset, *more):
    models = [str(name) for name in (model if isinstance(model, list) else [model])]
    return evaluate.main(["--model", *models, f"--dataset={dataset}", "--device=cpu", *map(str, more)])


def assert_same(actual, expected, tolerance, path="", but=("date",)):
    """The same report, but for the last digits of its numbers."""
    if isinstance(expected, dict):
        assert list(actual) == list(expected), path
        for name in set(expected) - set(but):
            assert_same(actual[name], expected[name], tolerance, f"{path}/{name}", but)
    elif isinstance(expected, list):
        assert len(actual) == len(expected), path
        for index, pair in enumerate(zip(actual, expected, strict=True)):
            assert_same(*pair, tolerance, f"{path}/{index}", but)
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, abs=tolerance), path
    else:
        assert actual == expected, path


@pytest.mark.parametrize("benchmark", ROWS)
def test_two_kinds_of_models_are_evaluated_by_one_command(models, data, tmp_path, capsys, benchmark):
    output = tmp_path / "reports" / "report.json"
    names, dataset = [models / "gpm", models / "bt"], data / f"{benchmark}.jsonl"
    arguments = [f"--benchmark={benchmark}", f"--dataset={dataset}", f"--output={output}", "--device=cpu"]
    assert gpm_trl_main(["evaluate", "--model", *map(str, names), *arguments]) == 0
    report = json.loads(output.read_text())
    assert "NaN" not in output.read_text()
    assert list(report) == ["benchmark", "dataset", "split", "rows", "date", "versions", "models", "differences"]
    assert (report["benchmark"], report["rows"]) == (benchmark, len(ROWS[benchmark]))
    assert (report["dataset"], report["split"]) == (str(dataset), "train")
    assert report["versions"] == describe_run()["versions"]
    outcomes = []
    for name, model in zip(names, report["models"], strict=True):
        scorer = PreferenceScorer.from_pretrained(name, device="cpu", long_rows="truncate_prompt")
        expected = {**describe_model(scorer, str(name)), **BENCHMARKS[benchmark](scorer, ROWS[benchmark])}
        outcomes.append(expected.pop("outcomes"))
        assert_same(model, expected, 1e-9)
    (difference,) = report["differences"]
    pair = {"first": str(names[0]), "second": str(names[1])}
    assert_same(difference, {**pair, **accuracy_difference(*outcomes)}, 1e-9)
    accuracies = [model["overall"]["accuracy"] for model in report["models"] if "overall" in model]
    if accuracies:
        assert difference["accuracy"] == pytest.approx(accuracies[1] - accuracies[0])
    assert [model["class"] for model in report["models"]] == ["GPMForPreference", "Qwen3ForSequenceClassification"]
    printed = capsys.readouterr().out
    assert printed.startswith(to_markdown(benchmark, report["models"], report["differences"]) + "\n")
    header, _, first, second = [line.split("|") for line in printed.splitlines()[:4]]
    assert (header[-2].strip(), first[-2].strip()) == ("accuracy minus first's", "")
    assert re.fullmatch(r" *[+-]\d+\.\d% \[-\d+\.\d%, \+\d+\.\d%\] ", second[-2])
    if benchmark == "pairs":
        assert f"\n{names[0]}: 1 prompts were cut, for 80 tokens a row.\n" in printed
        assert "bt: " not in printed
    if benchmark == "reward_bench":
        missing = printed.split(f"\n{names[0]}: no rows of ")[1].splitlines()[0].removesuffix(".").split(", ")
        assert len(missing) == 23 - 5


def test_every_two_of_three_models_are_compared(models, data, tmp_path):
    names = [str(models / name) for name in ("gpm", "bt", "gpm")]
    assert run(names, data / "pairs.jsonl", f"--output={tmp_path / 'report.json'}") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    accuracies = [model["overall"]["accuracy"] for model in report["models"]]
    pairs = [(0, 1), (0, 2), (1, 2)]
    for difference, (first, second) in zip(report["differences"], pairs, strict=True):
        assert (difference["first"], difference["second"]) == (names[first], names[second])
        assert difference["accuracy"] == pytest.approx(accuracies[second] - accuracies[first])
        assert difference["comparisons"] == report["models"][0]["overall"]["comparisons"]
    assert accuracies[0] != accuracies[1]


def test_a_split_is_chosen_by_name_and_options_are_applied(models, tmp_path, capsys):
    for split, rows in (("train", PAIRS), ("test", PAIRS[:3])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out" / "report.json"
    options = ["--dtype=bfloat16", "--attn_implementation=eager", "--max_length=20", f"--output={output}"]
    assert run(models / "gpm", tmp_path, "--split=test", *options) == 0
    report = json.loads(output.read_text())
    (model,) = report["models"]
    assert (report["split"], report["rows"], model["rows"]) == ("test", 3, 3)
    assert (model["dtype"], model["attn_implementation"], model["max_length"]) == ("bfloat16", "eager", 20)
    assert "were cut, for 20 tokens a row." in capsys.readouterr().out
    assert run(models / "gpm", tmp_path) == 2  # two splits: which?
    assert "`--split` is None, but the dataset has the splits ['test', 'train']: choose one." in error_line(capsys)


def test_a_benchmark_is_found_on_the_hub(monkeypatch):
    found = {"allenai/reward-bench": {"raw": [1], "filtered": [1, 2]}, "allenai/reward-bench-2": {"test": [1]}}
    monkeypatch.setattr(evaluate, "load_rows", found.get)
    for benchmark, split, name in zip(("reward_bench", "reward_bench_2"), ("filtered", "test"), found, strict=True):
        args = evaluate.make_parser().parse_args(["--model=m", f"--benchmark={benchmark}"])
        rows, described = evaluate.load_benchmark(args)
        assert described == {"dataset": name, "split": split, "rows": len(rows)}


def error_line(capsys) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("gpm-trl evaluate: error: ")
    return lines[0].removeprefix("gpm-trl evaluate: error: ")


def test_columns_are_mapped_and_strings_made_messages(models, data, tmp_path):
    reports = []
    for name, *more in (
        ("queries", '--column_mapping={"prompt": "query"}'),
        ("pairs",),
        ("queries", '--column_mapping={"prompt": "query"}', "--chat"),
        ("messages",),
    ):
        assert run(models / "gpm", data / f"{name}.jsonl", f"--output={tmp_path / 'report.json'}", *more) == 0
        reports.append(json.loads((tmp_path / "report.json").read_text())["models"][0]["overall"])
    assert reports[0] == reports[1] != reports[2] == reports[3]


def test_what_cannot_be_used_is_told_in_one_line(models, data, decoder, tmp_path, capsys):
    pairs, output = data / "pairs.jsonl", tmp_path / "report.json"
    cases = [
        ((decoder, pairs), "is Qwen3ForCausalLM (model type qwen3), neither a general preference model nor"),
        (
            (models / "gpm", pairs, "--split=test"),
            "`--split` is 'test', but the dataset has the splits ['train']: choose one.",
        ),
        ((models / "gpm", tmp_path / "none.jsonl"), f"There is no file {tmp_path / 'none.jsonl'}."),
        ((models / "gpm", ""), "Name the rows to evaluate on by `--dataset`."),
        ((models / "gpm", pairs, "--benchmark=reward_bench_2"), "the rows lack ['id']"),
        ((models / "gpm", pairs, "--benchmark=reward_bench", "--chat"), "`--chat` is of `--benchmark pairs`: reward"),
        ((models / "gpm", pairs, "--long_rows=error"), "Row 6: "),
        (([models / "gpm", tmp_path / "nowhere"], pairs), "nowhere"),
        ((models / "gpm", data / "bad.jsonl"), "bad.jsonl: Row 2: "),
        # Before a model is loaded:
        ((tmp_path / "nowhere", data / "queries.jsonl"), "`query` may be a part of the prompt"),
        ((tmp_path / "nowhere", pairs, '--column_mapping={"prompt": "query"}'), "`column_mapping` names `query`"),
        (
            (
                models / "gpm",
                data / "reward_bench.jsonl",
                "--benchmark=reward_bench",
                '--column_mapping={"prompt": "id"}',
            ),
            "`column_mapping` is for the benchmark pairs",
        ),
    ]
    for arguments, message in cases:
        assert run(*arguments, f"--output={output}") == 2
        assert message in error_line(capsys)
        assert not output.exists()


def test_what_was_evaluated_is_printed_if_a_later_model_fails(models, data, tmp_path, capsys, monkeypatch):
    load = evaluate.load_scorer

    def loading(name, *args, **kwargs):
        if name.endswith("bt"):
            raise ValueError("out of something")
        return load(name, *args, **kwargs)

    monkeypatch.setattr(evaluate, "load_scorer", loading)
    assert run([models / "gpm", models / "bt"], data / "pairs.jsonl") == 2
    found = capsys.readouterr()
    assert "out of something" in found.err
    assert f"{models / 'gpm'}" in found.out
    assert f"{models / 'bt'}" not in found.out


def test_a_report_that_cannot_be_written_is_said_before_a_model_is_loaded(data, capsys):
    assert run("no/model", data / "pairs.jsonl", f"--output={data / 'pairs.jsonl' / 'report.json'}") == 2
    assert "pairs.jsonl cannot be written, since" in error_line(capsys)


# --- Several processes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_and_two(models, data):
    """What `evaluation_run.py` writes and prints as one process, and as two."""
    names = [str(models / name) for name in ("gpm", "bt")]
    runs = [launch(config, SCRIPT, data, *names) for config in (None, sharding_config("ddp", data))]
    assert [run.returncode for run in runs] == [0, 0], [run.stderr for run in runs]
    written = [[json.loads((data / f"of_{n}" / f"{rank}.json").read_text()) for rank in range(n)] for n in (1, 2)]
    return [(ranks, run.stdout) for ranks, run in zip(written, runs, strict=True)]


@pytest.mark.multiprocess
def test_two_processes_write_the_reports_of_one_and_print_them_once(one_and_two, data):
    for benchmark in ROWS:
        reports = [json.loads((data / f"of_{count}" / f"{benchmark}.json").read_text()) for count in (1, 2)]
        assert_same(*reports, 1e-5)
        assert all(model["rows"] == len(ROWS[benchmark]) for model in reports[1]["models"])
        assert benchmark == "reward_bench_2" or reports[1]["models"][0]["overall"]["length"]["comparisons"] > 5
    printed = [[line for line in text.splitlines() if line and line[0] != "{"] for _, text in one_and_two]  # no logs
    assert printed[0] == printed[1]
    assert sum(line.startswith("| model") for line in printed[0]) == 3


@pytest.mark.multiprocess
def test_two_processes_share_the_rows_and_both_know_the_result(one_and_two):
    ((one,), _), (two, _) = one_and_two
    assert (one["world_size"], [report["world_size"] for report in two]) == (1, [2, 2])
    assert [report["codes"] for report in (one, *two)] == [[0, 0, 0]] * 3
    prompts = [row["prompt"] for row in PAIRS]
    assert [report["scored"]["shared"] for report in (one, *two)] == [prompts, prompts[::2], prompts[1::2]]
    assert [report["scored"]["in step"] for report in two] == [prompts] * 2
    for report in two:
        for name in ("shared", "in step"):
            assert_same(report[name], one["shared"], 1e-5)
        assert_same(report["one row"], one["one row"], 1e-5)
        assert_same(report["trainer"], one["trainer"], 1e-5)
    assert_same(two[0]["shared"], two[1]["shared"], 0)
    assert set(one["trainer"]) == {f"eval_pairs_{name}" for name in ("accuracy", "tie_rate", "brier", "ece")}


@pytest.mark.multiprocess
def test_an_error_of_one_process_ends_all(models, data, tmp_path):
    """The bad row is the second process's; the first must not wait for it."""
    arguments = ["-m", "gpm_trl.cli.evaluate", f"--model={models / 'gpm'}", f"--dataset={data / 'bad.jsonl'}"]
    result = launch(sharding_config("ddp", tmp_path), *arguments, "--device=cpu", f"--output={tmp_path / 'out.json'}")
    assert result.returncode != 0
    assert result.stderr.count("bad.jsonl: Row 2: ") == 2  # each process says it
    assert not (tmp_path / "out.json").exists()
