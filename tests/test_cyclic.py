"""Cyclic preference data, and the recipe that writes it and trains on it."""

import importlib.util
import json
import os
import random
from collections import Counter
from itertools import combinations, pairwise, permutations
from pathlib import Path

import pytest

from gpm_trl.data.cyclic import ASPECTS, RatedPrompt, letter_cycles, ultrafeedback_cycles

FILES = [f"without_{aspect}.jsonl" for aspect in ASPECTS]
# Ratings of the paper's Appendix F, in the order of ASPECTS; `None` is "N/A".
ARTS_CENTER = {"Founded in 1968.": (2, 5, 3, 4), "Founded in 1938.": (3, 2, 5, 3), "Founded in 1911.": (5, 4, 3, 5)}
COOKING = {"Three stages.": (5, 4, 3, 4), "Taste and teamwork!": (4, 5, 4, 5), "A day a class.": (4, 4, 5, 5)}


def completion(response, ratings):
    """A completion with ratings in the order of ASPECTS."""
    ratings = ["N/A" if rating is None else str(rating) for rating in ratings]
    annotations = {aspect: {"Rating": rating} for aspect, rating in zip(ASPECTS, ratings, strict=True)}
    return {"response": response, "annotations": annotations}


def make_row(rated, prompt="Tell me."):
    return {"instruction": prompt, "completions": [completion(*item) for item in rated.items()]}


def random_ratings(draw, num_responses=4):
    """Ratings of as many responses, some missing, with few values, so that many are equal."""
    return [tuple(draw.choice([1, 2, 3, 4, 5, None]) for _ in ASPECTS) for _ in range(num_responses)]


def random_rows(num_rows=40, seed=0):
    draw = random.Random(seed)
    rated = [dict(zip("PQRS", random_ratings(draw), strict=True)) for _ in range(num_rows)]
    return [make_row(item, prompt=f"Question {index}?") for index, item in enumerate(rated)]


def preferences(rows):
    return [(row["chosen"], row["rejected"]) for row in rows]


def reference_cycles(rated, omit):
    """Cycles as sets of edges, by another road: orient every pair by every aspect, then look for closed triangles."""
    columns = [index for index, aspect in enumerate(ASPECTS) if aspect != omit]
    edges = [
        {
            (x, y)
            for x, y in permutations(rated, 2)
            if None not in (rated[x][column], rated[y][column]) and rated[x][column] - rated[y][column] > 0
        }
        for column in columns
    ]
    return {
        frozenset(turn)
        for three in combinations(rated, 3)
        for first, second, third in permutations(three)
        for turn in [((first, second), (second, third), (third, first))]
        if all(edge in allowed for edge, allowed in zip(turn, edges, strict=True))
    }


# The paper's examples


@pytest.mark.parametrize(
    ("rated", "omit", "expected"),
    [
        (ARTS_CENTER, "instruction_following", "ABCA"),
        (ARTS_CENTER, "honesty", None),
        (ARTS_CENTER, "truthfulness", "ACBA"),
        (ARTS_CENTER, "helpfulness", "ABCA"),
        (COOKING, "instruction_following", None),
        (COOKING, "honesty", "ACBA"),
        (COOKING, "truthfulness", "ABCA"),
        (COOKING, "helpfulness", "ABCA"),
    ],
)
def test_appendix_f(rated, omit, expected):
    named = dict(zip("ABC", rated, strict=True))
    cycle = [(named[better], named[worse]) for better, worse in pairwise(expected or "")]
    assert set(preferences(ultrafeedback_cycles([make_row(rated)], omit))) == set(cycle)


def test_the_comparisons_of_a_cycle_say_prompt_aspect_and_row():
    rows = [make_row({"a": (1, 1, 1, 1)}), make_row(ARTS_CENTER, prompt="The arts center?")]
    comparisons = list(ultrafeedback_cycles(rows, "instruction_following"))
    assert [(row["prompt"], row["cycle"], row["aspect"]) for row in comparisons] == [
        ("The arts center?", 1, aspect) for aspect in ("honesty", "truthfulness", "helpfulness")
    ]
    first, second, third = ARTS_CENTER
    assert preferences(comparisons) == [(first, second), (second, third), (third, first)]


# Properties


@pytest.mark.parametrize("omit", ASPECTS)
@pytest.mark.parametrize("num_responses", [2, 3, 6])
def test_the_cycles_are_those_of_a_brute_force_reference(omit, num_responses):
    draw = random.Random(num_responses)
    sizes = Counter()
    for _ in range(60):
        rated = dict(zip("PQRSTU", random_ratings(draw, num_responses), strict=False))
        names = list(rated)
        cycles = RatedPrompt.from_row(make_row(rated)).cycles(omit)
        found = [frozenset((names[i], names[j]) for i, j in pairwise((*cycle, cycle[0]))) for cycle in cycles]
        assert len(set(found)) == len(found)
        assert set(found) == reference_cycles(rated, omit)
        assert cycles == sorted(cycles)
        sizes[min(len(cycles), 2)] += 1
    assert set(sizes) >= ({0} if num_responses == 2 else {0, 1})


def test_of_several_cycles_the_first_in_lexicographic_order_is_chosen():
    row = make_row({"P": (2, 2, 4, 1), "Q": (5, 3, 3, 1), "R": (3, 5, 3, 1), "S": (4, 4, 5, 1)})
    first, *others = RatedPrompt.from_row(row).cycles("helpfulness")
    assert others
    assert first < min(others)
    assert [row["chosen"] for row in ultrafeedback_cycles([row], "helpfulness")] == ["PQRS"[index] for index in first]


@pytest.mark.parametrize("white_space", ["", "\n"])
def test_identical_responses_are_in_no_cycle_together(white_space):
    row = make_row(ARTS_CENTER)
    row["completions"][2]["response"] = row["completions"][0]["response"] + white_space
    assert not list(ultrafeedback_cycles([row], "helpfulness"))


def test_a_response_needs_only_the_ratings_that_are_compared():
    rated = {"A": (2, None, 1, None), "B": (1, 2, None, None), "C": (None, 1, 2, None)}
    comparisons = preferences(ultrafeedback_cycles([make_row(rated)], "helpfulness"))
    assert comparisons == [("A", "B"), ("B", "C"), ("C", "A")]


# Forms of rows


def test_ratings_may_be_integers_and_annotations_missing():
    row = make_row(ARTS_CENTER)
    expected = list(ultrafeedback_cycles([row], "helpfulness"))
    for item in row["completions"]:
        for annotation in item["annotations"].values():
            annotation["Rating"] = int(annotation["Rating"])
        item["annotations"]["helpfulness"] = None
    assert list(ultrafeedback_cycles([row], "helpfulness")) == expected
    for nothing in (None, {}, {"honesty": {}}, {"honesty": {"Rating": None}}):
        row["completions"][0]["annotations"] = nothing
        assert not list(ultrafeedback_cycles([row], "helpfulness"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instruction": " "}, "no `instruction` that is a text"),
        ({"completions": None}, "no list of `completions`"),
        ({"completions": [completion("a", (1, 1, 1, 1)), {"annotations": {}}]}, "Completion 1 has no `response`"),
        (
            {"completions": [{"response": "a", "annotations": "5"}]},
            "annotations '5', but the `Rating` of instr",
        ),
        (
            {"completions": [{"response": "a", "annotations": {"honesty": "5"}}]},
            "'5'}, but the `Rating` of honesty is",
        ),
        ({"completions": [completion("a", (1, 6, 1, 1))]}, "but the `Rating` of honesty is"),
        ({"completions": [completion("a", (1, 1, True, 1))]}, "but the `Rating` of truthfulness is"),
    ],
)
def test_a_malformed_row_is_named(changes, message):
    rows = [make_row(COOKING), {**make_row(ARTS_CENTER), **changes}]
    with pytest.raises(ValueError, match=f"^Row 2: .*{message}"):
        list(ultrafeedback_cycles(rows, "helpfulness"))


def test_an_unknown_aspect_names_those_there_are():
    with pytest.raises(ValueError, match="`omit` is 'harmlessness', but the aspects are instruction_following"):
        list(ultrafeedback_cycles([make_row(COOKING)], "harmlessness"))


@pytest.mark.parametrize("length", [3, 5, 26])
def test_letters_of_any_length(length):
    rows = list(letter_cycles(length))
    assert len(rows) == 26 // length * length
    for start in range(0, len(rows), length):
        cycle = rows[start : start + length]
        assert len({row["prompt"] for row in cycle}) == 1
        assert [row["rejected"] for row in cycle] == [row["chosen"] for row in cycle[1:] + cycle[:1]]
    assert len({row["chosen"] for row in rows}) == len(rows)


# The recipe


@pytest.fixture(scope="module")
def recipe():
    """`recipes/cyclic/run.py`, which imports `write.py` beside it."""
    directory = Path(__file__).parents[1] / "recipes" / "cyclic"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        spec = importlib.util.spec_from_file_location("recipe_cyclic", directory / "run.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "ultrafeedback.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in random_rows()))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


MALFORMED = json.dumps({"instruction": "Tell me.", "completions": [{"response": None}]}) + "\n"


@pytest.mark.parametrize("conversational", [False, True])
def test_the_cycles_of_a_file_are_written_and_counted(recipe, source, tmp_path, conversational, capsys):
    """Without those of a malformed row, which is reported."""
    with source.open("a") as file:
        file.write(MALFORMED)
    output_dir = tmp_path / "deep" / "cycles"
    recipe.write.main([f"--dataset={source}", f"--output_dir={output_dir}", *["--conversational"] * conversational])
    assert sorted(os.listdir(output_dir)) == sorted(FILES)
    printed, errors = capsys.readouterr()
    assert "Row 41 is left out: Completion 0 has no `response`" in errors
    for omit, name in zip(ASPECTS, FILES, strict=True):
        expected = list(ultrafeedback_cycles(random_rows(), omit))
        rows = read(output_dir / name)
        assert rows == ([recipe.write.as_conversation(row) for row in expected] if conversational else expected)
        (line,) = [line for line in printed.splitlines() if line.startswith(name)]
        rated = [RatedPrompt.from_row(row) for row in random_rows()]
        several = sum(len(prompt.cycles(omit)) > 1 for prompt in rated)
        few = sum(recipe.write.num_comparable(prompt, omit) < 3 for prompt in rated)
        assert line.split()[1:] == [str(count) for count in (40, few, len(rows) // 3, several, len(rows))]


def test_rows_that_are_not_ultrafeedbacks_training_rows_leave_nothing_behind(recipe, source, tmp_path):
    source.write_text(MALFORMED)
    with pytest.raises(ValueError, match="All 1 rows are malformed"):
        recipe.write.main([f"--dataset={source}", f"--output_dir={tmp_path / 'cycles'}", "--overwrite"])
    assert not os.listdir(tmp_path / "cycles")
    source.rename(tmp_path / "cycles" / "test.jsonl")
    with pytest.raises(ValueError, match=r"no split 'train', only \['test'\]"):
        recipe.write.main([f"--dataset={tmp_path / 'cycles'}", f"--output_dir={tmp_path}"])


def test_letters_are_written(recipe, tmp_path, capsys):
    recipe.write.main(["--letters=5", f"--output_dir={tmp_path}"])
    assert read(tmp_path / "letters-5.jsonl") == list(letter_cycles(5))
    assert "25 comparisons" in capsys.readouterr().out
    with pytest.raises(ValueError, match="`length` is 2"):
        recipe.write.main(["--letters=2", f"--output_dir={tmp_path}"])
    assert os.listdir(tmp_path) == ["letters-5.jsonl"]
    (tmp_path / "letters-5.jsonl").write_text("mine")
    with pytest.raises(FileExistsError, match=r"letters-5\.jsonl: already there"):
        recipe.write.main(["--letters=5", f"--output_dir={tmp_path}"])
    assert (tmp_path / "letters-5.jsonl").read_text() == "mine"
    recipe.write.main(["--letters=5", f"--output_dir={tmp_path}", "--overwrite"])
    assert read(tmp_path / "letters-5.jsonl") == list(letter_cycles(5))


def test_the_recipe_leaves_out_cycles_that_would_lose_a_comparison(recipe, chat_tokenizer, tmp_path):
    rated = dict(zip(("long " * 20, "b", "c"), ARTS_CENTER.values(), strict=True))
    prompt = "A line separator\u2028is no end of a line of JSON."
    rows = list(ultrafeedback_cycles([make_row(ARTS_CENTER, prompt), make_row(rated, prompt)], "helpfulness"))
    args = recipe.parse_arguments([f"--output_dir={tmp_path}"])
    for convert in (dict, recipe.write.as_conversation):
        lines = [json.dumps(convert(row), ensure_ascii=False) + "\n" for row in rows]
        (tmp_path / "without_helpfulness.jsonl").write_text("".join(lines), encoding="utf-8")
        for max_length, numbers in ((250, {0, 1}), (120, {0})):
            loaded = recipe.load_cycles(args, "helpfulness", chat_tokenizer, max_length)
            assert set(loaded["cycle"]) == numbers
            assert len(loaded) == 3 * len(numbers)
        with pytest.raises(SystemExit, match="Nothing to train on without helpfulness"):
            recipe.load_cycles(args, "helpfulness", chat_tokenizer, 10)


@pytest.mark.slow
def test_the_recipe_separates_the_models(recipe, tmp_path, capsys):
    """One sub-dataset of a few cycles; all of it takes minutes."""
    run = [f"--output_dir={tmp_path}", "--omit", "honesty", "--max_cycles=4", "--epochs=100", "--learning_rate=5e-4"]
    recipe.main(run)
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["honesty"]["cycles"] == 4
    assert result["honesty"]["GPM"] == 1
    assert result["honesty"]["BT"] <= 2 / 3 + 1e-6
    assert "honesty                     4" in capsys.readouterr().out


@pytest.mark.slow
def test_the_recipe_takes_a_model_and_data_with_the_papers_settings(recipe, decoder, tmp_path, monkeypatch, capsys):
    source = tmp_path / "ultrafeedback.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in random_rows()))
    seen = []
    monkeypatch.setattr(recipe, "accuracy", lambda _, model, config, rows: seen.append((model, config, rows)) or 0.5)
    recipe.main([f"--model={decoder}", f"--dataset={source}", f"--output_dir={tmp_path / 'out'}"])
    assert len(seen) == 8
    for model, config, rows in seen:
        assert model == str(decoder)
        assert (config.num_train_epochs, config.learning_rate, config.per_device_train_batch_size) == (50, 1e-6, 1)
        assert (config.max_length, config.lr_scheduler_type, config.warmup_steps) == (2048, "cosine", 0.03)
        assert config.bf16
        assert rows[0]["prompt"][0]["role"] == "user"
    assert {config.temperature for _, config, _ in seen[1::2]} == {0.1}
    assert not any(config.group_by_prompt for _, config, _ in seen[1::2])
    assert "helpfulness" in capsys.readouterr().out
