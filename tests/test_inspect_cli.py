"""`gpm-trl inspect`: what it says of files whose answers are known, or found by trying all orders."""

import json
import re
import shutil
from itertools import permutations

import numpy as np
import pytest
from conftest import assistant, user
from datasets import Dataset

from gpm_trl import Renderer, letter_cycles, prepare_dataset
from gpm_trl.cli import inspect

SCALAR, GPM = "best accuracy of a scalar reward", "best accuracy of a GPM"
CYCLIC = "cyclic share of the preferences (Hodge)"


RESPONSES = "responses a prompt (least, median, most)"


def pair(chosen, rejected, prompt="Which letter?", **columns):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


@pytest.fixture
def report_of(tmp_path, capsys):
    """Inspects rows; returns what was printed, by its names."""

    def run(rows, *arguments):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        report = inspect.inspect(inspect.make_parser().parse_args([str(tmp_path / "rows.jsonl"), *arguments]))
        first, _, *printed = capsys.readouterr().out.splitlines()
        assert re.fullmatch(rf".*rows\.jsonl: {len(rows)} rows, read as .*", first)
        assert [line.split("  ")[0] for line in printed] == [*list(report)[:-1], "", report["verdict"]]
        return report

    return run


def shares(report):
    return [report[name] for name in (CYCLIC, SCALAR, GPM)]


def test_counts(report_of):
    rows = [
        pair("A", "B"),
        pair("A", "B"),  # repeated
        pair("B", "A", label=0.0),  # the same once more
        pair("B", "A"),  # in conflict with these
        pair("A", "B", label=0.5),  # a tie
        pair("B", "B"),  # identical
        pair("A", "B", label=0.7),
        pair("A", "B", prompt="Another?"),
        pair("C", "D", prompt="Another?"),
    ]
    report = report_of([{"label": 1.0, "source": "x", **row} for row in rows])
    counts = {name: value for name, value in report.items() if isinstance(value, int | list)}
    assert counts == {
        "prompts": 2,
        RESPONSES: [2, 3, 4],
        "comparisons": 9,
        "- ties": 1,
        "- of identical responses": 1,
        "- repeated": 2,
        "pairs of responses in conflict (i > j and j > i)": 1,
        "prompts in which a cycle could close": 0,
        "- in which one does": 0,
    }
    assert report[SCALAR] == report[GPM] == pytest.approx(6 / 7)  # of those with a preference, one is in conflict
    assert "cannot say" in report["verdict"]


@pytest.mark.parametrize(
    ("comparisons", "expected", "verdict"),
    [
        ("AB BC CA", [1, 2 / 3, 1], "more than 66.67% right"),
        ("AB BC CA AD BD CD", [1, 5 / 6, 1], "more than 83.33%"),  # all have a win and a loss, but for D
        ("AB AB BA BC CA", [1, 3 / 5, 4 / 5], "more than 60.00%"),
        ("AB BA BC CA", [0, 3 / 4, 3 / 4], "You need no GPM"),  # A and B are in conflict, and not in a cycle
        ("AB BC AC", [0, 1, 1], "You need no GPM"),
        ("AB AC AD", [0, 1, 1], "cannot say"),
        ("AB BC CD EF FG GE", [0.5, 5 / 6, 1], "more than 83.33%"),
    ],
)
def test_what_goes_round(report_of, comparisons, expected, verdict):
    report = report_of([pair(*letters) for letters in comparisons.split()])
    if "AD" in comparisons and "CA" in comparisons:
        expected = [report[CYCLIC], *expected[1:]]
    assert shares(report) == pytest.approx(expected)
    assert verdict in report["verdict"]


def test_the_hodge_split_is_of_mean_strengths(report_of):
    """Around A > B > C > A, 2 p - 1 is 0.8, 0.6 (the mean of 0.4 and 0.8) and 0.2; weights are 1, 2 and 1."""
    labels = [("A", "B", 0.9), ("C", "B", 0.3), ("B", "C", 0.9), ("C", "A", 0.6)]
    report = report_of([pair(chosen, rejected, label=label) for chosen, rejected, label in labels])
    curl = (0.8 + 0.6 + 0.2) / (1 + 1 / 2 + 1)  # what is left over of each, times its weight
    assert report[CYCLIC] == pytest.approx(curl**2 * (1 + 1 / 2 + 1) / (0.8**2 + 2 * 0.6**2 + 0.2**2))


@pytest.mark.parametrize(("length", "at_most"), [(4, False), (12, False), (13, True)])
def test_cycles_of_letters(report_of, length, at_most):
    report = report_of(list(letter_cycles(length)))
    prompts = 26 // length
    assert report["- in which one does"] == report["prompts in which a cycle could close"] == prompts
    name = f"{SCALAR}, at most" if at_most else SCALAR
    assert [report[CYCLIC], report[name], report[GPM]] == pytest.approx([1, 1 - 1 / length, 1])


def random_rows(seed):
    """K-way rows of four prompts, some of them several times, with soft labels, ties and conflicts."""
    generator = np.random.default_rng(seed)
    rows = []
    for prompt in "abcdac":
        size = int(generator.integers(2, 6))
        pairs = [generator.choice(size, size=2, replace=False).tolist() for _ in range(generator.integers(1, 12))]
        labels = generator.choice([0.0, 0.2, 0.5, 0.8, 1.0, 1.0], size=len(pairs)).tolist()
        rows.append({"prompt": prompt, "responses": list("ABCDE"[:size]), "comparisons": pairs, "label": labels})
    return rows


def as_pairs(rows):
    return [
        pair(row["responses"][i], row["responses"][j], row["prompt"], label=label)
        for row in rows
        for (i, j), label in zip(row["comparisons"], row["label"], strict=True)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_accuracies_are_those_of_the_best_orders_and_the_order_of_rows_and_responses_does_not_matter(report_of, seed):
    rows = random_rows(seed)
    report = report_of(rows)
    wins = {prompt: np.zeros((5, 5)) for prompt in "abcd"}
    for row in as_pairs(rows):
        i, j = "ABCDE".index(row["chosen"]), "ABCDE".index(row["rejected"])
        wins[row["prompt"]][i, j] += row["label"] > 0.5
        wins[row["prompt"]][j, i] += row["label"] < 0.5
    total = sum(table.sum() for table in wins.values())
    best = sum(max(np.triu(table[np.ix_(o, o)]).sum() for o in permutations(range(5))) for table in wins.values())
    most = sum(np.maximum(table, table.T).sum() / 2 for table in wins.values())
    assert shares(report)[1:] == pytest.approx([best / total, most / total])

    turned = [
        {
            "prompt": row["prompt"],
            "responses": row["responses"][::-1],
            "comparisons": [[len(row["responses"]) - 1 - i for i in pair[::-1]] for pair in row["comparisons"][::-1]],
            "label": [1 - label for label in row["label"][::-1]],
        }
        for row in rows[::-1]
    ]
    unchanged = report.keys() - {RESPONSES}
    for others in (turned, as_pairs(rows)[::-1]):
        other = report_of(others)
        assert {name: other[name] for name in unchanged} == {name: pytest.approx(report[name]) for name in unchanged}
    doubled = report_of([*rows, *rows])
    assert shares(doubled) == pytest.approx(shares(report))
    assert doubled["- repeated"] == report["- repeated"] + report["comparisons"]


def test_responses_are_the_same_if_their_messages_are(report_of):
    """Whatever the order of their keys; prompts differ if their tools do."""
    spelled = [{"role": "assistant", "content": "A"}], [{"content": "A", "role": "assistant"}]
    rows = [{"prompt": [user("?")], "chosen": text, "rejected": [assistant("B")]} for text in spelled]
    assert report_of(rows)["- repeated"] == 1
    rows[0]["tools"], rows[1]["tools"] = "[]", json.dumps([{"type": "function", "function": {"name": "f"}}])
    report = report_of(rows)
    assert (report["prompts"], report["- repeated"]) == (2, 0)


@pytest.mark.parametrize("rows", [[pair("A", "A")], [pair("A", "B", label=0.5), pair("B", "A", label=0.5)]])
def test_rows_without_a_preference(report_of, rows):
    assert "cannot say" in report_of(rows)["verdict"]


LONG = [pair("A" * 40, "B" * 10), pair("A" * 40, "C" * 20), pair("D" * 5, "C" * 20, prompt="P" * 30)]


@pytest.mark.parametrize("chat", [False, True])
def test_tokens_are_counted_and_cut_as_in_training(report_of, gpm, decoder, chat_tokenizer, tmp_path, chat):
    rows = LONG
    if chat:
        rows = [
            {name: [user(text)] if name == "prompt" else [assistant(text)] for name, text in row.items()}
            for row in rows
        ]
    only_tokenizer = tmp_path / "model"
    shutil.copytree(gpm, only_tokenizer, ignore=shutil.ignore_patterns("*.safetensors"))
    renderer = Renderer(chat_tokenizer)
    lengths = []
    for row in rows:
        prompt_ids, ids = renderer.encode(row["prompt"], [row["chosen"], row["rejected"]])
        lengths += [(len(prompt_ids), len(prompt_ids) + len(response)) for response in ids]
    for max_length in {length for _, length in lengths}:
        report = report_of(rows, f"--model={only_tokenizer}", f"--max_length={max_length}")
        left = {}
        for long_rows in ("filter", "truncate_prompt"):
            try:
                groups = prepare_dataset(Dataset.from_list(rows), Renderer(chat_tokenizer, max_length, long_rows))
            except ValueError:  # none is left
                groups = []
            left[long_rows] = len(rows) - sum(len(group["pairs"]) for group in groups)
        assert report[f"comparisons with more than {max_length}"] == left["filter"]
        assert report["- even if prompts are cut"] == left["truncate_prompt"]
    prompts, totals = zip(*{*lengths}, strict=True)
    assert report["tokens of a prompt (median, 95 %, most)"][2] == max(prompts)
    assert report["tokens of a prompt and its response"][2] == max(totals)
    assert report_of(rows, f"--model={decoder}")["comparisons with more than 512"] == 0  # its context


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([pair("A", "B"), pair("A", None)], [], r"rows\.jsonl: Row 2: "),
        ([pair("A", "B", label=1.0), pair("A", "B", label=2.0)], [], r"rows\.jsonl: Row 2: `label` is 2\.0"),
        ([{"query": "?", "good": "A", "bad": "B"}], [], "column_mapping"),
        (
            [pair("A", "B")],
            ["--split=test"],
            r"`--split` is 'test', but the dataset has the splits \['train'\]: choose",
        ),
        ([pair("A", "B")], ["--max_length=9"], "--model"),
        ([pair("A", "B")], ["--model=/nowhere/model"], "/nowhere/model"),
        ([pair("A", "B")], ["--model={gpm}", "--max_length=1"], "`max_length` is 1"),
    ],
)
def test_what_cannot_be_used_is_one_line(rows, arguments, message, tmp_path, gpm, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert inspect.main([str(tmp_path / "rows.jsonl"), *(text.format(gpm=gpm) for text in arguments)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("gpm-trl inspect: error: ")
    assert re.search(message, last)


def test_columns_are_mapped(report_of):
    rows = [{"query": "?", "good": "A", "bad": "B"}]
    mapping = json.dumps({"prompt": "query", "chosen": "good", "rejected": "bad"})
    assert report_of(rows, f"--column_mapping={mapping}")["comparisons"] == 1


def test_a_row_in_another_encoding_has_its_number(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        "".join(json.dumps(pair(text, "B"), ensure_ascii=False) + "\n" for text in "Aé").encode("latin-1")
    )
    assert inspect.main([str(path)]) == 2
    # datasets < 5 read the whole file at once.
    assert re.search(r"rows\.jsonl:( Row )?2: 'utf-8' codec can't decode", capsys.readouterr().err)
