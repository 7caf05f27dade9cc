"""`gpm-trl plot`: every picture from what the other commands leave behind."""

import json

import pytest
from conftest import tiny_model

from gpm_trl import PreferenceScorer
from gpm_trl.cli import plot

pytest.importorskip("matplotlib")

ANSWERS = ["--prompt=Which letter?", "--responses", "A", "B", "C"]
BINS = [{"confidence": 0.6, "accuracy": 0.5, "count": 8}]
REPORT = {"models": [{"name": "GPM", "overall": {"calibration": BINS}}]}


@pytest.fixture
def report(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    return tmp_path / "report.json"


@pytest.mark.parametrize("picture", ["discs", "matrix", "reliability"])
def test_every_picture_is_drawn(picture, gpm, report, tmp_path, capsys):
    sources = {
        "discs": [f"--model={gpm}", *ANSWERS],
        "matrix": [f"--model={gpm}", *ANSWERS, "--method=copeland", "--chat"],
        "reliability": [f"--report={report}"],
    }
    output = tmp_path / "pictures" / f"{picture}.svg"
    assert plot.main([picture, *sources[picture], f"--output={output}", "--title=A title"]) == 0
    assert capsys.readouterr().out == f"Wrote {output}.\n"
    assert "A title" in output.read_text()


def test_the_matrix_is_in_the_order_of_the_ranking(gpm, tmp_path):
    ranking = PreferenceScorer.from_pretrained(gpm).rank("Which letter?", ["A", "B", "C"])
    args = plot.make_parser().parse_args(["matrix", f"--model={gpm}", *ANSWERS, f"--output={tmp_path / 'x.png'}"])
    labels = [label.get_text() for label in plot.draw(args).axes[0].get_yticklabels()]
    assert labels == ["ABC"[index] for index in ranking.order]


def test_a_model_without_a_gate_has_no_gate_in_its_titles(tmp_path, tokenizer):
    tiny_model(use_scale_gate=False).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    args = plot.make_parser().parse_args(["discs", f"--model={tmp_path}", *ANSWERS, f"--output={tmp_path / 'x.png'}"])
    assert [axes.get_title() for axes in plot.draw(args).axes] == ["block 1", "block 2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reliability", "--report=nowhere.json", "--output=x.png"], "nowhere.json"),
        (["reliability", "--report={list}", "--output=x.png"], "is no report of `gpm-trl evaluate`"),
        (["reliability", "--report={bench}", "--output=x.png"], "RewardBench 2 has none"),
        (["reliability", "--report", "{report}", "{report}", "--output=x.png"], "more than one of the reports"),
        (["reliability", "--report={report}", "--output=x.pdf"], ".pdf"),
        (["discs", "--model=/nowhere/gpm", *ANSWERS, "--output=x.png"], "/nowhere/gpm"),
        (["discs", "--model=/nowhere/gpm", *ANSWERS, "--output=x.pdf"], "'.pdf'"),  # before a model is loaded
    ],
)
def test_what_cannot_be_used_is_one_line(arguments, message, report, tmp_path, capsys):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "bench.json").write_text('{"models": [{"name": "GPM", "subsets": {}}]}')
    paths = {"report": report, "list": tmp_path / "list.json", "bench": tmp_path / "bench.json"}
    assert plot.main([argument.format(**paths) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("gpm-trl plot: error: ")
    assert message in line
