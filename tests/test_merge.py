"""`gpm-trl merge`: one model of an adapter and its base, and what it says of the change."""

import re

import pytest
import torch
from datasets import Dataset
from test_checkpoints import ROWS, adapter_of_convention, save_gpm, saved_adapter, scores

from gpm_trl import GPMForPreference
from gpm_trl.cli import merge
from gpm_trl_cli import main

REPORT = re.compile(r"Largest change of a score: (\S+), of scores up to (\S+)\.")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapters")
    saved_adapter(directory)
    return directory / "adapter"


def report(output) -> tuple[float, float]:
    change, largest = REPORT.search(output).groups()
    return float(change), float(largest)


@pytest.mark.parametrize(("backbone", "of_gpm"), [("gemma2", False), ("llama", True)], ids=["causal_lm", "gpm"])
def test_a_merged_model_gives_the_scores_of_its_adapter(tmp_path, capsys, backbone, of_gpm):
    trained = saved_adapter(tmp_path, backbone, of_gpm, learn_temperature=not of_gpm).model
    expected, temperature = scores(trained), trained.temperature.item()
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--device", "cpu"]) == 0
    change, largest = report(capsys.readouterr().out)
    assert 0 <= change < 1e-5 < 1e-3 < largest
    (tmp_path / "base").rename(tmp_path / "gone")  # it stands alone
    torch.testing.assert_close(scores(tmp_path / "merged"), expected, rtol=0, atol=1e-5)
    merged = GPMForPreference.from_pretrained(tmp_path / "merged")
    assert type(merged) is GPMForPreference
    assert merged.temperature.item() == pytest.approx(temperature)
    assert (temperature != pytest.approx(0.3, abs=1e-4)) == merged.config.learn_temperature != of_gpm
    assert not any("lora" in name or "modules_to_save" in name for name in merged.state_dict())
    assert not list((tmp_path / "merged").glob("adapter*"))


def test_a_merged_model_reads_texts_as_its_adapter_and_rows_of_a_dataset_are_compared(tmp_path, capsys, monkeypatch):
    expected = adapter_of_convention(tmp_path, "released").model.config.renderer
    Dataset.from_list(ROWS).to_json(tmp_path / "rows.jsonl")
    seen, score_rows = [], merge.score_rows
    monkeypatch.setattr(merge, "score_rows", lambda scorer, rows: seen.append(rows) or score_rows(scorer, rows))
    arguments = ["--dataset_name", str(tmp_path / "rows.jsonl"), "--device", "cpu"]
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), *arguments]) == 0
    assert seen == [ROWS[:16], ROWS[:16]]
    assert report(capsys.readouterr().out)[0] < 1e-5
    assert GPMForPreference.from_pretrained(tmp_path / "merged").config.renderer == expected
    assert expected["convention"] == "gpm"
    torch.testing.assert_close(scores(tmp_path / "merged"), scores(tmp_path / "adapter"), rtol=1e-5, atol=1e-5)


def test_a_change_is_reported(tmp_path, adapter, capsys, monkeypatch):
    """What is compared is the model that was written, here with heads that are not the adapter's."""
    load = merge.load_scorer

    def load_changed(name, *args, **kwargs):
        scorer = load(name, *args, **kwargs)
        if name != str(adapter):
            scorer.model.embedding_head.weight.data.copy_(scorer.model.embedding_head.weight.data.flip(0))
        return scorer

    monkeypatch.setattr(merge, "load_scorer", load_changed)
    assert main(["merge", str(adapter), str(tmp_path / "merged"), "--device", "cpu"]) == 0
    change, largest = report(capsys.readouterr().out)
    assert change > 0.5 * largest


def test_what_cannot_be_merged_is_one_line(tmp_path, adapter, capsys, monkeypatch):
    def assert_one_line(message, *arguments) -> None:
        assert main(["merge", *map(str, arguments), "--device", "cpu"]) == 2
        assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])

    save_gpm(tmp_path / "gpm")
    assert_one_line("gpm is no adapter, so there is nothing to merge", tmp_path / "gpm", tmp_path / "merged")
    assert_one_line("gpm-trl merge: error: .*none", tmp_path / "none", tmp_path / "merged")
    monkeypatch.setattr(merge, "load_scorer", None)  # said before any work
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "?", "chosen": "a", "rejected": "b"}\n{"prompt": "?", "chosen": null, "rejected": null}\n'
    )
    bad = f"--dataset_name={tmp_path / 'rows.jsonl'}"
    assert_one_line("rows.jsonl: Row 2: ", adapter, tmp_path / "merged", bad)
    assert_one_line("adapter is there already and not empty: remove it", adapter, adapter)
    assert not (tmp_path / "merged").exists()
