"""Evaluation: metrics and benchmarks against slow references, reports, and the callback in real training runs."""

import hashlib
import math
import random
import re
from collections import defaultdict
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, lively_model, tiny_reward_model, user
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import RewardConfig, RewardTrainer

from gpm_trl import GPMConfig, GPMTrainer, PreferenceScorer
from gpm_trl.cli.quickstart import byte_tokenizer
from gpm_trl.data.renderer import EncodedGroup
from gpm_trl.evaluation import (
    BENCHMARKS,
    EvaluationCallback,
    accuracy_difference,
    benchmarks,
    cyclicity_metrics,
    describe_model,
    evaluate_pairs,
    evaluate_reward_bench,
    evaluate_reward_bench_2,
    length_metrics,
    pairwise_metrics,
    to_markdown,
)
from gpm_trl.evaluation.benchmarks import SECTIONS, ties_score
from gpm_trl.evaluation.callback import flat_metrics
from gpm_trl.evaluation.metrics import bootstrap_interval
from gpm_trl.scorer import ResponseEmbeddings

METRICS = ("accuracy", "tie_rate", "brier", "ece")


class WrittenRewards:
    """A stand-in for a scorer of a reward model: the reward is the number written, each character a token."""

    temperature = 1.0
    as_prompt = PreferenceScorer.as_prompt

    def __init__(self, chat_template: str | None = None):
        self.renderer = SimpleNamespace(conversational=None)
        self.tokenizer = SimpleNamespace(chat_template=chat_template)
        self.prompts = []
        self.template_kwargs = None

    def encode(self, prompt, responses, template_kwargs=None):
        self.prompts.append(prompt)
        self.template_kwargs = template_kwargs
        return EncodedGroup([], [[float(text)] * len(text) for text in responses], truncated=False)

    def embed_encoded(self, groups, show_progress=True):
        rewards = [torch.tensor([reward for reward, *_ in group.response_ids]) for group in groups]
        return [ResponseEmbeddings(torch.stack([row, torch.ones_like(row)], -1), torch.ones(1)) for row in rewards]


def slow_metrics(log_odds, labels):
    """The point estimates of `pairwise_metrics`, one comparison after another, from the definitions."""
    hits = decided = ties = 0
    squares = 0.0
    bins = defaultdict(list)
    for value, label in zip(log_odds, labels, strict=True):
        probability = 1 / (1 + math.exp(-value))
        squares += (probability - label) ** 2
        if value == 0:
            ties += 1
        if label != 0.5:
            decided += 1
            hits += (value > 0 and label > 0.5) or (value < 0 and label < 0.5)
        confidence = max(probability, 1 - probability)
        outcome = 0.5 if value == 0 else label if value > 0 else 1 - label
        bins[min(int((confidence - 0.5) / 0.05), 9)].append((confidence, outcome))
    count = len(log_odds)
    ece = 0.0
    table = []
    for _, members in sorted(bins.items()):
        confidence = sum(member[0] for member in members) / len(members)
        outcome = sum(member[1] for member in members) / len(members)
        ece += len(members) / count * abs(outcome - confidence)
        table.append({"confidence": confidence, "accuracy": outcome, "count": len(members)})
    accuracy = hits / decided if decided else None
    return {"accuracy": accuracy, "tie_rate": ties / count, "brier": squares / count, "ece": ece, "calibration": table}


def random_comparisons(count=300, seed=0, clusters=60):
    """Log-odds with ties; labels 0, 1, 1/2 and soft ones; clusters of several comparisons."""
    generator = random.Random(seed)
    log_odds = [generator.choice([0.0, generator.gauss(0, 2), generator.gauss(1, 4)]) for _ in range(count)]
    labels = [generator.choice([0.0, 1.0, 1.0, 0.5, generator.random()]) for _ in range(count)]
    return log_odds, labels, [generator.randrange(clusters) for _ in range(count)]


def assert_estimates(metrics, expected):
    for name in METRICS:
        assert metrics[name] == pytest.approx(expected[name], abs=1e-9), name
    assert len(metrics["calibration"]) == len(expected["calibration"])
    for actual, wanted in zip(metrics["calibration"], expected["calibration"], strict=True):
        low, high = actual["accuracy_ci"]
        assert 0 <= low <= actual["accuracy"] <= high <= 1
        assert {name: actual[name] for name in wanted} == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_metrics_are_those_of_the_definitions(seed):
    log_odds, labels, clusters = random_comparisons(count=1 + 80 * seed, seed=seed)
    metrics = pairwise_metrics(log_odds, labels, clusters)
    assert_estimates(metrics, slow_metrics(log_odds, labels))
    assert metrics["comparisons"] == len(log_odds) == sum(part["count"] for part in metrics["calibration"])


def test_there_is_no_accuracy_without_preferences_and_one_is_enough():
    metrics = pairwise_metrics([1.0, -2.0, 0.0], [0.5, 0.5, 0.5], "abc")
    assert metrics["accuracy"] is None
    assert metrics["accuracy_ci"] is None
    assert metrics["brier_ci"] is not None
    assert accuracy_difference({}, {}) == {"comparisons": 0, "accuracy": None, "accuracy_ci": None}
    metrics = pairwise_metrics([1.0] * 30, [1.0] + [0.5] * 29, range(30))
    assert (metrics["accuracy"], metrics["accuracy_ci"]) == (1, pytest.approx([0.025, 1]))


def test_metrics_of_nothing_or_of_lists_that_do_not_match_are_refused():
    for counts in ((0, 0, 0), (1, 2, 2), (2, 2, 1)):
        with pytest.raises(ValueError, match="{} log-odds, {} labels and {} clusters".format(*counts)):
            pairwise_metrics(*([1.0] * count for count in counts))


def test_intervals_cover_the_truth_at_their_level():
    """Comparisons of a prompt that stand or fall together; as if they were independent, intervals are too short."""
    generator = np.random.default_rng(0)
    truth, runs, covered, naive = 0.6, 120, 0, 0
    for run in range(runs):
        sizes = generator.integers(1, 8, size=50)
        hits = generator.random(50) < truth
        sums = np.column_stack([hits * sizes, sizes])
        ((low, high),) = bootstrap_interval(sums, lambda totals: totals[:, :1] / totals[:, 1:], seed=run)
        covered += low <= truth <= high
        singles = np.repeat(hits, sizes)
        rate = singles.mean()
        naive += abs(rate - truth) <= 1.96 * math.sqrt(rate * (1 - rate) / len(singles))
    assert 0.9 <= covered / runs <= 0.99
    assert naive / runs < 0.75


def binomial_tail(hits, count, rate):
    """P(at least so many hits)."""
    return sum(math.comb(count, k) * rate**k * (1 - rate) ** (count - k) for k in range(hits, count + 1))


@pytest.mark.parametrize(("hits", "count"), [(0, 8), (8, 8), (6, 8), (1, 1), (37, 40)])
def test_intervals_of_independent_rows_are_exact(hits, count):
    """Clopper and Pearson: what is as likely as 2.5 % at the limits, on the side of the hits; never of width 0."""
    metrics = pairwise_metrics([1.0] * hits + [-1.0] * (count - hits), [1.0] * count, range(count))
    low, high = metrics["accuracy_ci"]
    assert low == 0 if hits == 0 else binomial_tail(hits, count, low) == pytest.approx(0.025)
    assert high == 1 if hits == count else 1 - binomial_tail(hits + 1, count, high) == pytest.approx(0.025)
    assert low < high
    assert metrics["tie_rate_ci"] == pytest.approx([0, 1 - 0.025 ** (1 / count)])


def test_a_cluster_is_worth_one_row_at_least_and_one_cluster_tells_nothing_of_others():
    alike = pairwise_metrics([1.0] * 12, [1.0] * 12, [index // 4 for index in range(12)])
    assert alike["accuracy_ci"] == pytest.approx([0.025 ** (1 / 3), 1])
    lone = pairwise_metrics([1.0, -1.0, -1.0, -1.0], [1.0] * 4, "aaaa")
    assert lone["accuracy_ci"][0] < 0.01
    assert lone["accuracy_ci"][1] > 0.99
    assert (lone["brier_ci"], lone["ece_ci"]) == (None, None)


@pytest.mark.parametrize("beginning", ["", "Rated: "])
def test_rows_without_a_prompt_are_clusters_of_their_own_also_where_their_texts_begin_alike(beginning):
    chosen = [1.0 if index % 4 < 1 else 0.0 for index in range(12)]
    rows = [{"chosen": f"{beginning}{value}", "rejected": f"{beginning}0.5"} for value in chosen]
    report = evaluate_pairs(WrittenRewards(), rows)["overall"]
    assert report["accuracy_ci"] == pairwise_metrics([1.0] * 3 + [-1.0] * 9, [1.0] * 12, range(12))["accuracy_ci"]


def simulated_hits(generator, size, accuracies, clusters):
    """Of two models, `(2, G * size)`: what is hard is so for both, and for all rows of a cluster in part."""
    rows = generator.random((clusters, size))
    rows = np.where(generator.random((clusters, size)) < 0.4, generator.random((clusters, 1)), rows)
    other = np.where(generator.random((clusters, size)) < 0.6, rows, generator.random((clusters, size)))
    return np.stack([rows.ravel() < accuracies[0], other.ravel() < accuracies[1]])


@pytest.mark.parametrize(
    ("clusters", "size", "accuracies"),
    [(8, 1, (0.9, 0.9)), (40, 1, (0.95, 0.8)), (10, 5, (0.8, 0.6)), (50, 5, (0.7, 0.8)), (4, 6, (0.7, 0.7))],
)
def test_intervals_of_rates_and_differences_cover_the_truth(clusters, size, accuracies, monkeypatch):
    """At least 95 in 100, but for chance; of a difference also shorter than if the models were on other rows."""
    monkeypatch.setattr("gpm_trl.evaluation.metrics.NUM_RESAMPLES", 2)  # of what is not looked at
    generator = np.random.default_rng(0)
    runs, covered, widths = 300, np.zeros(2), np.zeros(2)
    names = np.repeat(np.arange(clusters), size).tolist()
    for _ in range(runs):
        hits = simulated_hits(generator, size, accuracies, clusters)
        low, high = pairwise_metrics(np.where(hits[0], 1.0, -1.0), np.ones(len(names)), names)["accuracy_ci"]
        outcomes = [dict(enumerate(zip(names, row.tolist(), strict=True))) for row in hits]
        below, above = accuracy_difference(*outcomes)["accuracy_ci"]
        difference = accuracies[1] - accuracies[0]
        covered += [low <= accuracies[0] <= high, below <= difference <= above]
        widths += [high - low, above - below]
    assert (covered / runs > 0.925).all(), covered / runs
    assert widths[1] < 2 * widths[0]


@pytest.mark.parametrize("independent", [True, False])
def test_a_paired_difference_is_that_of_its_definition(independent):
    generator = np.random.default_rng(1)
    hits = simulated_hits(generator, 5, (0.8, 0.6), 20).T.tolist()
    names = list(range(100)) if independent else [index // 5 for index in range(100)]
    first, second = ({str(i): (names[i], row[model]) for i, row in enumerate(hits)} for model in (0, 1))
    second |= {"asked of the second alone": (0, True)}
    report = accuracy_difference(first, second)
    wins, losses = (sum(row == one for row in hits) for one in ([False, True], [True, False]))
    mean, count = (wins - losses) / 100, 100.0
    if (
        not independent
    ):  # the ratio of variances, and of the t distribution's quantiles with 99 and 19 degrees of freedom
        sums = [sum(b - a - mean for a, b in hits[start : start + 5]) for start in range(0, 100, 5)]
        variance = sum((b - a - mean) ** 2 for a, b in hits)
        count *= min(variance / sum(value**2 for value in sums) * (1.984217 / 2.093024) ** 2, 1)
    p, q = ((one / 100 * count + 1) / (count + 2) for one in (wins, losses))  # Bonett and Price
    half = 1.959964 * math.sqrt((p + q - (p - q) ** 2) / (count + 2))
    assert report["comparisons"] == 100
    assert report["accuracy"] == pytest.approx(mean, abs=1e-12)
    assert report["accuracy_ci"] == pytest.approx([p - q - half, p - q + half], abs=1e-6)
    swapped = accuracy_difference(second, first)
    assert swapped["accuracy_ci"] == pytest.approx([-limit for limit in reversed(report["accuracy_ci"])])
    assert accuracy_difference(first, first)["accuracy_ci"][1] > 0  # equal on these rows, not on all


PAIRS = [
    {"prompt": "a", "chosen": "2", "rejected": "1"},
    {"prompt": "b", "chosen": "0", "rejected": "3", "label": 0.2},
    {"prompt": "b", "chosen": "1.5", "rejected": "1.5"},
    {"prompt": "c", "chosen": "-1", "rejected": "1", "label": 0.5},
    {"prompt": "d", "chosen": "1", "rejected": "2", "label": 1.0},
]
K_WAY = [
    {"prompt": "e", "responses": ["3", "1", "2"], "comparisons": [[0, 1], [1, 2, 0.3], [2, 0, 0.5]]},
    {"prompt": "f", "responses": ["0", "4"], "comparisons": [[1, 0]]},
    {"prompt": "g", "responses": ["1", "1", "5", "2"], "comparisons": [[3, 2], [0, 1]], "label": [0.0, 1.0]},
]


def test_pairs_and_k_way_rows_count_each_comparison_and_draw_prompts_together():
    log_odds = [1.0, -3.0, 0.0, -2.0, -1.0, 2.0, -1.0, -1.0, 4.0, -3.0, 0.0]
    labels = [1.0, 0.2, 1.0, 0.5, 1.0, 1.0, 0.3, 0.5, 1.0, 0.0, 1.0]
    report = evaluate_pairs(WrittenRewards(), PAIRS + K_WAY)
    assert (report["rows"], report["truncated"], report["left_out"], report["subsets"]) == (8, 0, 0, {})
    assert_estimates(report["overall"], slow_metrics(log_odds, labels))
    del report["overall"]["length"], report["overall"]["cyclicity"]
    assert report["overall"] == {"rows": 8, **pairwise_metrics(log_odds, labels, "abbcdeeefgg")}
    assert report["overall"] != {"rows": 8, **pairwise_metrics(log_odds, labels, "abxcdeeefgg")}


RATES = ("longer_is_right", "prefers_longer", "accuracy_longer", "accuracy_shorter")


def slow_lengths(log_odds, labels, excess):
    """Of each rate its comparisons, one after another, from the definitions: whether each is a hit, and its number."""
    members = {name: [] for name in RATES}
    for index, (value, label, tokens) in enumerate(zip(log_odds, labels, excess, strict=True)):
        if label == 0.5 or tokens == 0:
            continue
        longer, right = ("first" if number > limit else "second" for number, limit in ((tokens, 0), (label, 0.5)))
        model = "none" if value == 0 else "first" if value > 0 else "second"
        members["longer_is_right"].append((longer == right, index))
        members["prefers_longer"].append((model == longer, index))
        members["accuracy_longer" if longer == right else "accuracy_shorter"].append((model == right, index))
    return members


@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_length_are_those_of_the_definitions(seed):
    log_odds, labels, clusters = random_comparisons(400, seed)
    excess = np.random.default_rng(seed).integers(-3, 4, size=400).tolist()
    metrics = length_metrics(log_odds, labels, clusters, excess)
    members = slow_lengths(log_odds, labels, excess)
    for name in RATES:
        hits, numbers = zip(*members[name], strict=True)
        signs = np.where(hits, 1.0, -1.0)
        expected = pairwise_metrics(signs, np.ones_like(signs), [clusters[number] for number in numbers])
        assert metrics[name] == expected["accuracy"]
        assert metrics[f"{name}_ci"] == pytest.approx(expected["accuracy_ci"])
        assert 0.1 < metrics[name] < 0.9
    kept = [i for _, i in members["prefers_longer"]]
    assert metrics["comparisons"] == len(kept) < 400
    accuracy = pairwise_metrics(*([values[i] for i in kept] for values in (log_odds, labels, clusters)))["accuracy"]
    share = metrics["longer_is_right"]
    assert accuracy == pytest.approx(share * metrics["accuracy_longer"] + (1 - share) * metrics["accuracy_shorter"])


def test_a_model_that_prefers_the_longer_is_right_where_the_longer_is():
    _, labels, clusters = random_comparisons()
    excess = np.random.default_rng(0).integers(1, 9, size=300) * np.random.default_rng(1).choice([-1, 1], size=300)
    metrics = length_metrics(excess / 4, labels, clusters, excess)
    assert [metrics[name] for name in RATES[1:]] == [1, 1, 0]
    overall = pairwise_metrics(excess / 4, labels, clusters)
    assert metrics["longer_is_right"] == overall["accuracy"]
    assert metrics["longer_is_right_ci"] == overall["accuracy_ci"]
    assert [length_metrics(-excess, labels, clusters, excess)[name] for name in RATES[1:]] == [0, 0, 1]


def test_of_lengths_that_do_not_tell_there_are_no_rates():
    for labels, excess in (([0.5, 0.5], [1, -1]), ([1.0, 0.0], [0, 0])):
        metrics = length_metrics([1.0, 2.0], labels, "ab", excess)
        assert metrics == {"comparisons": 0} | {f"{name}{end}": None for name in RATES for end in ("", "_ci")}


@pytest.mark.parametrize("kind", ["gpm", "reward model"])
def test_lengths_are_the_models_tokens_by_subset(kind, chat_tokenizer):
    """Bytes here, of which the letter \u00e9 has two."""
    scorer = PreferenceScorer(lively_model() if kind == "gpm" else tiny_reward_model(), chat_tokenizer)
    rows = [
        {"prompt": [user("q")], "chosen": "\u00e9\u00e9", "rejected": "abc", "subset": "longer"},
        {"prompt": [user("q")], "chosen": "a", "rejected": "\u00e9", "subset": "shorter"},
        {"prompt": [user("q")], "chosen": "ab", "rejected": "\u00e9", "subset": "alike"},
        {"prompt": [user("q")], "responses": ["x", "yy", "zzz"], "comparisons": [[2, 0], [0, 1]], "subset": "k"},
    ]
    report = evaluate_pairs(scorer, rows)
    lengths = {name: part["length"] for name, part in [("all", report["overall"]), *report["subsets"].items()]}
    shares = {name: (part["comparisons"], part["longer_is_right"]) for name, part in lengths.items()}
    assert shares == {"all": (4, 0.5), "longer": (1, 1), "shorter": (1, 0), "alike": (0, None), "k": (2, 0.5)}
    assert [part["cyclicity"] is None for part in report["subsets"].values()] == [True, True, True, False]


def test_cyclicity_of_ratings_is_0_and_of_a_planted_cycle_1():
    class Circle(WrittenRewards):
        """The response n is at n thirds of the circle."""

        def embed_encoded(self, groups, show_progress=True):
            angles = [torch.tensor([n for n, *_ in group.response_ids]) * 2 * math.pi / 3 for group in groups]
            return [ResponseEmbeddings(torch.stack([a.cos(), a.sin()], -1), torch.ones(1)) for a in angles]

    row = {"prompt": "a", "responses": ["0", "1", "2"], "comparisons": [[0, 1]], "subset": "x"}
    rows = [row, {**row, "responses": ["0", "1", "0"], "subset": "y"}, {**row, "responses": ["0", "1"], "subset": "z"}]
    report = evaluate_pairs(Circle(), rows)
    ordered = {"prompts": 1, "mean": pytest.approx(0), "max": pytest.approx(0), "cycles": 0}
    planted = {"prompts": 1, "mean": pytest.approx(1), "max": pytest.approx(1), "cycles": 1}
    assert {name: part["cyclicity"] for name, part in report["subsets"].items()} == {
        "x": planted,
        "y": ordered,
        "z": None,
    }
    assert report["overall"]["cyclicity"] == {**planted, "prompts": 2, "mean": pytest.approx(0.5)}
    assert evaluate_pairs(WrittenRewards(), rows)["subsets"]["x"]["cyclicity"] == ordered


def test_preferences_in_a_circle_are_those_that_no_order_agrees_with():
    generator = np.random.default_rng(0)
    found = []
    for _ in range(60):
        size = generator.integers(3, 6)
        game = np.triu(generator.integers(-1, 2, size=(size, size)), 1)
        game = game - game.T
        ordered = any((np.triu(game[np.ix_(order, order)]) >= 0).all() for order in permutations(range(size)))
        metrics = cyclicity_metrics([game, np.zeros((2, 2))])
        assert (metrics["prompts"], metrics["cycles"]) == (1, not ordered)
        found.append(ordered)
    assert 10 < sum(found) < 50


def test_subsets_are_reported_beside_all_rows():
    subsets = ["x", "y", None, "x", "y"]
    rows = [{**row, "subset": subset} for row, subset in zip(PAIRS, subsets, strict=True)]
    report = evaluate_pairs(WrittenRewards(), rows)
    assert list(report["subsets"]) == ["x", "y"]
    assert report["overall"] == evaluate_pairs(WrittenRewards(), PAIRS)["overall"]
    for subset, metrics in report["subsets"].items():
        members = [row for row in rows if row["subset"] == subset]
        assert metrics["rows"] == len(members) == 2
        assert metrics == evaluate_pairs(WrittenRewards(), [{**row, "subset": None} for row in members])["overall"]


def test_template_arguments_of_a_row_reach_the_scorer():
    scorer = WrittenRewards()
    evaluate_pairs(scorer, [{**PAIRS[0], "tools": '[{"name": "add"}]', "chat_template_kwargs": {"thinking": False}}])
    assert scorer.template_kwargs == {"tools": [{"name": "add"}], "thinking": False}


QUICK = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "bf16": False,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 5,
    "logging_steps": 1,
    "max_steps": 4,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
}


def quick_trainer(model, rows, tmp_path, tokenizer, peft_config=None, **settings):
    """A trainer of few quick steps, which evaluates on its training rows."""
    classes = (GPMTrainer, GPMConfig) if hasattr(model, "embedding_head") else (RewardTrainer, RewardConfig)
    trainer_class, config_class = classes
    args = config_class(str(tmp_path / "output"), **{**QUICK, **settings})
    data = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizer}
    return trainer_class(model, args, **data, peft_config=peft_config)


@pytest.mark.parametrize("kind", ["labels", "k-way"])
def test_accuracy_is_that_of_the_trainer(kind, letters, tokenizer, tmp_path):
    rows = letters.add_column("label", [0.0, 1.0, 0.5, 0.7, 0.1, 1.0] * 4)
    if kind == "k-way":
        comparisons = [[0, 1], [1, 2], [2, 3], [3, 0], [0, 2]]
        responses = [[letter * (1 + index % 4) for letter in "abcd"] for index in range(9)]
        rows = Dataset.from_list(
            [{"prompt": f"{i}?", "responses": group, "comparisons": comparisons} for i, group in enumerate(responses)]
        )
    model = lively_model()
    expected = quick_trainer(model, rows, tmp_path, tokenizer).evaluate()
    overall = evaluate_pairs(PreferenceScorer(model, tokenizer), rows)["overall"]
    assert overall["accuracy"] == pytest.approx(expected["eval_accuracy"], abs=1e-9)
    assert overall["tie_rate"] == pytest.approx(expected["eval_tie_rate"], abs=1e-9)
    assert 0.1 < overall["accuracy"] < 0.9


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_cut_prompt_is_counted(chat_tokenizer, benchmark):
    row = choice("Math", ["yes"], ["no", "maybe"]) if benchmark == "reward_bench_2" else bench_row("donotanswer")
    rows = [{**row, "prompt": prompt} for prompt in ("short", "long " * 30, "s", "longer " * 30, "long " * 31)]
    for model in (lively_model(), tiny_reward_model()):
        scorer = PreferenceScorer(model, chat_tokenizer, max_length=60, long_rows="truncate_prompt")
        assert BENCHMARKS[benchmark](scorer, rows)["truncated"] == 3
    strict = PreferenceScorer(model, chat_tokenizer, max_length=60, long_rows="error")
    with pytest.raises(ValueError, match=r"^Row 2: "):
        BENCHMARKS[benchmark](strict, rows)


def test_rows_too_long_even_without_their_prompt_are_left_out_and_counted(chat_tokenizer):
    rows = [{"prompt": "q", "chosen": text, "rejected": "no"} for text in ("yes", "yes " * 40, "good")]
    scorer = PreferenceScorer(lively_model(), chat_tokenizer, max_length=60, long_rows="truncate_prompt")
    report = evaluate_pairs(scorer, rows)
    assert (report["rows"], report["left_out"], report["overall"]["rows"]) == (3, 1, 2)
    rest = evaluate_pairs(scorer, [rows[0], rows[2]])
    assert rest["left_out"] == 0
    assert rest["overall"] == report["overall"]
    with pytest.raises(ValueError, match="All rows are longer than 60 tokens"):
        evaluate_pairs(scorer, rows[1:2])


def test_scores_are_log_odds_of_the_label(chat_tokenizer):
    scorer = PreferenceScorer(lively_model(), chat_tokenizer)
    pair = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    expected = evaluate_pairs(scorer, [{**pair, "label": 1 / (1 + math.exp(1.5))}])
    found = evaluate_pairs(scorer, [{**pair, "score": -1.5}])
    assert found["overall"] == expected["overall"]
    assert found["overall"]["accuracy"] == 1 - evaluate_pairs(scorer, [pair])["overall"]["accuracy"]


def test_an_embedding_that_is_not_finite_is_named_by_its_row(tokenizer, monkeypatch):
    monkeypatch.setattr("gpm_trl.evaluation.benchmarks.CHUNK_ROWS", 2)
    model = lively_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("~").input_ids] = float("nan")
    rows = [{"prompt": "q", "chosen": text, "rejected": "no"} for text in ("a", "b", "c", "~")]
    with pytest.raises(ValueError, match=r"^Row 4: The embedding of response 0 is not finite"):
        evaluate_pairs(PreferenceScorer(model, tokenizer), rows)


@pytest.mark.parametrize(
    ("benchmark", "change", "message"),
    [
        ("pairs", {"label": 1.5}, "^Row 2: .*`label` is 1.5"),
        ("pairs", {"rejected": None}, "^Row 2: .*`chosen` and `rejected` must be"),
        ("reward_bench", {"subset": "donotanswr"}, "^Row 2: RewardBench has no subset 'donotanswr'; it has"),
        ("reward_bench_2", {"chosen": "yes"}, "^Row 2: `chosen` and `rejected` are lists"),
        ("reward_bench_2", {"rejected": []}, "^Row 2: `chosen` and `rejected` are lists"),
        ("reward_bench_2", {"subset": None}, "^Row 2: `subset` is None"),
        ("reward_bench_2", {"subset": "Ties"}, "'7' of a Ties row"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused(benchmark, change, message):
    row = bench_row("donotanswer") if benchmark != "reward_bench_2" else choice("Math", ["1"], ["0"], "7")
    with pytest.raises(ValueError, match=message):
        BENCHMARKS[benchmark](WrittenRewards(), [row, {**row, **change}, row])


def test_rows_without_a_comparison_are_told_or_left_out():
    """`label` may be empty. A subset of such rows alone has no numbers."""
    row = {"prompt": "p", "responses": ["a", "b"], "comparisons": [], "label": [], "subset": "empty"}
    scorer = PreferenceScorer(lively_model(), byte_tokenizer())
    with pytest.raises(ValueError, match="No row compares two responses"):
        evaluate_pairs(scorer, [row])
    full = {**row, "comparisons": [[0, 1]], "label": [1.0], "subset": "full"}
    assert set(evaluate_pairs(scorer, [row, full])["subsets"]) == {"full"}


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_no_rows_and_missing_columns_are_refused(benchmark):
    with pytest.raises(ValueError, match="no rows"):
        BENCHMARKS[benchmark](WrittenRewards(), Dataset.from_list([]))
    for column in sorted(benchmarks.COLUMNS.get(benchmark, ())):
        row = {name: value for name, value in choice("Math", ["1"], ["0"]).items() if name != column}
        with pytest.raises(ValueError, match=rf"{benchmark} needs .* lack \['{column}'\]"):
            BENCHMARKS[benchmark](WrittenRewards(), [row])


def test_two_ties_rows_of_one_id_are_an_error():
    with pytest.raises(ValueError, match="two Ties rows with the id 'ref:1'"):
        ties_score([("ref:1", [1.0], [0.0])] * 2)


def bench_row(subset, chosen=1.0, rejected=0.0):
    return {"prompt": f"Of {subset}", "chosen": str(chosen), "rejected": str(rejected), "subset": subset}


def test_the_sections_are_the_benchmarks():
    totals = {section: sum(subsets.values()) for section, subsets in SECTIONS.items()}
    assert totals == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 984 + 6 * 164}


def test_a_section_is_the_mean_of_its_subsets_weighted_by_the_benchmarks_counts():
    generator = random.Random(0)
    rows, outcomes = [], defaultdict(list)
    for subsets in SECTIONS.values():
        for subset in subsets:
            for _ in range(generator.randint(1, 6)):
                chosen, rejected = generator.choices([-1.0, 0.0, 1.0, 2.0], k=2)
                rows.append(bench_row(subset, chosen, rejected))
                outcomes[subset].append(chosen > rejected)
    generator.shuffle(rows)
    accuracy = {subset: sum(hits) / len(hits) for subset, hits in outcomes.items()}
    sections = {
        section: sum(accuracy[subset] * count for subset, count in subsets.items()) / sum(subsets.values())
        for section, subsets in SECTIONS.items()
    }
    report = evaluate_reward_bench(WrittenRewards(), rows)
    assert report["missing_subsets"] == []
    assert report["sections"] == pytest.approx(sections)
    assert report["average"] == pytest.approx(sum(sections.values()) / 4)
    assert {subset: metrics["accuracy"] for subset, metrics in report["subsets"].items()} == pytest.approx(accuracy)


def test_missing_subsets_are_named_and_leave_the_others_their_weights():
    rows = [bench_row("mt-bench-med"), bench_row("alpacaeval-hard", 0, 1), bench_row("xstest-should-refuse")]
    report = evaluate_reward_bench(WrittenRewards(), rows)
    assert report["sections"] == {"Chat": pytest.approx(40 / 135), "Safety": 1.0}
    assert report["average"] == pytest.approx((40 / 135 + 1) / 2)
    assert len(report["missing_subsets"]) == 23 - 3


def test_a_prompt_is_a_user_message_where_there_is_a_chat_template():
    for evaluate, row in (
        (evaluate_reward_bench, bench_row("donotanswer")),
        (evaluate_reward_bench_2, choice("Math", ["1"], ["0"])),
    ):
        plain, chat = WrittenRewards(), WrittenRewards(CHAT_TEMPLATE)
        evaluate(plain, [row])
        evaluate(chat, [row])
        assert plain.prompts == [row["prompt"]]
        assert chat.prompts == [[{"role": "user", "content": row["prompt"]}]]


def choice(subset, chosen, rejected, name="1"):
    return {"prompt": f"Of {name}", "chosen": chosen, "rejected": rejected, "subset": subset, "id": name}


@pytest.mark.parametrize(
    ("chosen", "rejected", "points"),
    [
        (["3"], ["1", "2", "0"], 1),
        (["2"], ["1", "3", "0"], 0),
        (["3"], ["3", "3", "3"], 1 / 4),
        (["3", "1"], ["2", "0"], 1),
        (["3", "3"], ["3", "0"], 2 / 3),
    ],
)
def test_the_best_of_n_shares_its_point_with_equals(chosen, rejected, points):
    report = evaluate_reward_bench_2(WrittenRewards(), [choice("Focus", chosen, rejected)])
    assert report["subsets"]["Focus"]["accuracy"] == pytest.approx(points)


def test_the_average_is_the_plain_mean_of_the_subsets():
    rows = [
        *[choice("Factuality", ["1"], ["0", "0", "0"]) for _ in range(3)],
        choice("Factuality", ["0"], ["1", "0", "0"]),
        choice("Precise IF", ["1"], ["1", "0", "0"]),
    ]
    report = evaluate_reward_bench_2(WrittenRewards(), rows)
    subsets = {name: (metrics["rows"], metrics["accuracy"]) for name, metrics in report["subsets"].items()}
    assert subsets == {"Factuality": (4, 0.75), "Precise IF": (1, 0.5)}
    assert report["average"] == (0.75 + 0.5) / 2
    low, high = report["subsets"]["Factuality"]["accuracy_ci"]
    assert low < 0.75 < high


def test_the_number_of_a_response_is_its_mean_preference(chat_tokenizer):
    """A cycle-prone model: over the row's own responses, the best is that of the highest mean, not a Condorcet one."""
    scorer = PreferenceScorer(lively_model(seed=3), chat_tokenizer)
    rows = [choice("Math", [f"{i}" * 3], [letter * (1 + i) for letter in "xyz"], str(i)) for i in range(20)]
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    means = scorer.mean_preference(prompts, [row["chosen"] + row["rejected"] for row in rows])
    expected = [mean.argmax().item() == 0 for mean in means]
    report = evaluate_reward_bench_2(scorer, rows)
    assert report["average"] == pytest.approx(sum(expected) / len(expected))
    assert 0 < sum(expected) < len(expected)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        # Equal correct responses, far above the others: the best possible score.
        ([("ref:1", [9], [0]), ("tied:1", [5, 5, 5], [1, 0])], 1.01),
        # Gap 4 and spread 2, but the gap of the ref is 1.
        ([("ref:1", [1], [0]), ("tied:1", [7, 5], [1])], 0.6 + 0.2 + 0.01 * math.tanh(1 / 2 - 1)),
        # Gap and spread 0 of the tied row: 0 / 0 counts 0.
        ([("ref:1", [1], [0]), ("tied:1", [1, 1], [1])], 0.3),
        # Spread 0 and a negative gap: tanh of minus infinity.
        ([("ref:1", [1], [0]), ("tied:1", [1, 1], [2])], 0.3 - 0.01),
        # No prompt has both: accuracies alone.
        ([("ref:1", [1], [0]), ("tied:2", [3, 2], [0])], 0.6),
        # A second prompt without its ref counts in the accuracy of the tied rows only.
        ([("ref:1", [9], [0]), ("tied:1", [5, 5], [1]), ("tied:2", [0, 0], [1])], 0.15 + 0.3 + 0.2 + 0.2 + 0.01),
    ],
)
def test_scores_of_ties_worked_out_by_hand(members, expected):
    rows = [choice("Ties", [str(x) for x in yes], [str(x) for x in no], name) for name, yes, no in members]
    report = evaluate_reward_bench_2(WrittenRewards(), rows)
    assert report["subsets"]["Ties"] == {"rows": len(rows), "accuracy": pytest.approx(expected, abs=1e-6)}


def test_a_model_is_described_by_what_its_scores_depend_on(chat_tokenizer):
    model = lively_model(temperature=0.25, embedding_dim=6, renderer={"max_length": 77, "long_rows": "filter"})
    model.config.text_config.name_or_path = "google/gemma-2b-it"
    description = describe_model(PreferenceScorer(model, chat_tokenizer, long_rows="truncate_prompt"), "some/name")
    assert description == {
        "name": "some/name",
        "class": "GPMForPreference",
        "backbone": "google/gemma-2b-it",
        "embedding_dim": 6,
        "reward_dim": 0,
        "temperature": 0.25,
        "dtype": "float32",
        "device": "cpu",
        "attn_implementation": "sdpa",
        "shared_prefix": True,
        "max_length": 77,
        "long_rows": "truncate_prompt",
        "chat_template_sha256": hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest(),
    }
    description = describe_model(PreferenceScorer(tiny_reward_model(), byte_tokenizer()), "bt")
    assert description["class"] == "Qwen3ForSequenceClassification"
    assert (description["embedding_dim"], description["reward_dim"]) == (0, 1)
    assert (description["backbone"], description["temperature"], description["max_length"]) == ("qwen3", 1, 512)
    assert description["chat_template_sha256"] is None


def tables(markdown):
    """The tables of a Markdown text as lists of lines of cells; checks that they are well formed."""
    result = []
    for block in markdown.split("\n\n"):
        lines = block.splitlines()
        assert all(line.startswith("| ") and line.endswith(" |") for line in lines)
        assert len({len(line) for line in lines}) == 1  # readable as it is
        header, rule, *body = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
        assert all(re.fullmatch(r"-+:?", cell) for cell in rule)
        assert len({len(cells) for cells in (header, rule, *body)}) == 1
        result.append([header, *body])
    return result


def test_pairs_of_two_models_stand_side_by_side():
    rows = [{**row, "subset": "xxy"[index % 3]} for index, row in enumerate(PAIRS)]
    reports = [evaluate_pairs(WrittenRewards(), rows), evaluate_pairs(WrittenRewards(), PAIRS[3:4])]
    models = [{"name": name, **report} for name, report in zip(("one", "another"), reports, strict=True)]
    summary, subsets = tables(to_markdown("pairs", models))
    assert summary[0] == ["model", "comparisons", "accuracy", "ties", "Brier", "ECE"]
    assert [line[:2] for line in summary[1:]] == [["one", "5"], ["another", "1"]]
    overall = reports[0]["overall"]
    low, high = overall["accuracy_ci"]
    assert summary[1][2] == f"50.0% [{100 * low:.1f}%, {100 * high:.1f}%]"
    assert summary[2][2:] == ["", "0.0% [0.0%, 97.5%]", "0.145", "0.381"]  # a comparison without a preference
    assert subsets[0] == ["subset", "accuracy, one", "accuracy, another"]
    assert [line[0] for line in subsets[1:]] == ["x", "y"]
    assert subsets[1][1].startswith(f"{100 * reports[0]['subsets']['x']['accuracy']:.1f}% [")
    assert [line[2] for line in subsets[1:]] == ["", ""]
    rows = [{**PAIRS[0], "chosen": "2.0"}, {**PAIRS[4], "rejected": "2.0"}, *K_WAY]
    report = evaluate_pairs(WrittenRewards(), rows)
    _, length, cyclicity = tables(to_markdown("pairs", [{"name": "one", **report}]))
    assert length[0] == ["length", "longer is right", "prefers longer", "accuracy longer", "accuracy shorter"]
    intervals = ["50.0% [1.3%, 98.7%]", "100.0% [15.8%, 100.0%]", "100.0% [2.5%, 100.0%]", "0.0% [0.0%, 97.5%]"]
    assert length[1:] == [["one", *intervals]]
    assert cyclicity == [["cyclicity", "prompts", "mean", "max", "cycles"], ["one", "2", "0.0000", "0.0000", "0"]]


def test_reward_bench_1_and_2_of_two_models():
    full = [bench_row(subset) for subsets in SECTIONS.values() for subset in subsets]
    part = [bench_row("donotanswer", 0, 1), bench_row("donotanswer"), bench_row("hep-go")]
    reports = [evaluate_reward_bench(WrittenRewards(), rows) for rows in (full, part)]
    summary, subsets = tables(to_markdown("reward_bench", [{"name": str(i), **r} for i, r in enumerate(reports)]))
    assert summary[0] == ["model", "Chat", "Chat Hard", "Safety", "Reasoning", "average"]
    assert summary[1:] == [["0", *["100.00"] * 5], ["1", "", "", "50.00", "100.00", "75.00"]]
    by_name = {line[0]: line[1:] for line in subsets[1:]}
    assert len(by_name) == 23
    assert by_name["hep-rust"] == ["100.0% [2.5%, 100.0%]", ""]
    first = [choice("Math", ["1"], ["0"]), choice("Precise IF", ["0"], ["1"])]
    second = [choice("Math", ["1"], ["1"]), choice("Ties", ["1"], ["0"], "ref:1")]
    reports = [evaluate_reward_bench_2(WrittenRewards(), rows) for rows in (first, second)]
    (table,) = tables(to_markdown("reward_bench_2", [{"name": str(i), **report} for i, report in enumerate(reports)]))
    assert table[0] == ["model", "Math", "Precise IF", "Ties", "average"]
    assert table[1:] == [["0", "100.0%", "0.0%", "", "50.0%"], ["1", "50.0%", "", "30.0%", "40.0%"]]


EVERY_TWO = {"eval_strategy": "steps", "eval_steps": 2}
PREFERENCES = [
    {"prompt": f"Question {index}?", "chosen": "yes" * (1 + index % 3), "rejected": "no" * (1 + index % 2)}
    for index in range(7)
]


def logged(trainer, name):
    return [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]


def test_the_callback_evaluates_whenever_the_trainer_does(letters, tokenizer, tmp_path):
    trainer = quick_trainer(lively_model(), letters, tmp_path, tokenizer, max_length=80, **EVERY_TWO)
    long = [*PREFERENCES, {"prompt": "A very long prompt. " * 10, "chosen": "yes", "rejected": "no"}]
    trainer.add_callback(EvaluationCallback(trainer, long, name="held_out"))
    trainer.add_callback(EvaluationCallback(trainer, letters))
    asked = [{"query" if name == "prompt" else name: text for name, text in row.items()} for row in long]
    trainer.add_callback(EvaluationCallback(trainer, asked, name="mapped", column_mapping={"prompt": "query"}))
    trainer.train()
    assert logged(trainer, "eval_mapped_brier") == logged(trainer, "eval_held_out_brier")
    accuracies = [(step, pytest.approx(value)) for step, value in logged(trainer, "eval_accuracy")]
    assert logged(trainer, "eval_pairs_accuracy") == accuracies
    for name in METRICS:
        assert [step for step, _ in logged(trainer, f"eval_held_out_{name}")] == [2, 4]
    (_, first), (_, second) = logged(trainer, "eval_held_out_brier")
    assert first != second
    scorer = PreferenceScorer(trainer.model, tokenizer, max_length=80, long_rows="truncate_prompt")
    report = evaluate_pairs(scorer, long)
    assert report["truncated"] == 1
    metrics = trainer.evaluate()
    for name in METRICS:
        assert metrics[f"eval_held_out_{name}"] == pytest.approx(report["overall"][name], abs=1e-6)
    with pytest.raises(ValueError, match=r"`benchmark` is 'rewardbench'; choose one of \('pairs', 'reward_bench'"):
        EvaluationCallback(trainer, PREFERENCES, "rewardbench")
    assert set(flat_metrics(evaluate_pairs(WrittenRewards(), [PAIRS[3]]))) == {"tie_rate", "brier", "ece"}


@pytest.mark.parametrize(
    ("options", "packed", "tokens"),
    [({}, True, 16_384), ({"shared_prefix": False}, False, 16_384), ({"max_tokens_per_batch": 90}, True, 90)],
)
def test_the_callback_computes_as_the_training_does(
    options, packed, tokens, letters, tokenizer, tmp_path, monkeypatch
):
    scorers = []
    monkeypatch.setitem(
        BENCHMARKS,
        "pairs",
        lambda scorer, *args, **kwargs: scorers.append(scorer) or evaluate_pairs(scorer, *args, **kwargs),
    )
    trainer = quick_trainer(lively_model(), letters, tmp_path, tokenizer, **EVERY_TWO, **options)
    trainer.add_callback(EvaluationCallback(trainer, PREFERENCES))
    trainer.evaluate()
    assert [(scorer.shared_prefix, scorer.batch_tokens) for scorer in scorers] == [(packed, tokens)]


class Modes(TrainerCallback):
    """Whether the model is in training mode after each step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.training = [*getattr(self, "training", []), model.training]


@pytest.mark.parametrize("kind", ["bf16", "lora", "reward"])
def test_the_callback_changes_nothing_in_training(kind, letters, tokenizer, tmp_path):
    settings = {"bf16": kind == "bf16", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    settings["disable_dropout"] = False  # that of LoRA follows the global random numbers, which none may draw
    losses, states = [], []
    for with_callback in (False, True):
        model = tiny_reward_model() if kind == "reward" else lively_model()
        lora = LoraConfig(r=4, lora_dropout=0.3, target_modules={"q_proj", "v_proj"}) if kind == "lora" else None
        trainer = quick_trainer(model, letters, tmp_path, tokenizer, lora, **settings)
        modes = Modes()
        trainer.add_callback(modes)
        if with_callback:
            trainer.add_callback(EvaluationCallback(trainer, PREFERENCES))
        trainer.train()
        losses.append([entry for entry in trainer.state.log_history if "loss" in entry])
        states.append({name: weight.detach().clone() for name, weight in trainer.model.state_dict().items()})
        assert modes.training == [True] * 3
        assert len(logged(trainer, "eval_pairs_accuracy")) == 3 * with_callback
    assert len({entry["loss"] for entry in losses[0]}) == 3
    assert losses[0] == losses[1]  # bitwise, with all other numbers of training
    assert all(torch.equal(weight, states[1][name]) for name, weight in states[0].items())
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):  # in the precision of the training
        expected = evaluate_pairs(PreferenceScorer(trainer.model, tokenizer), PREFERENCES)["overall"]
    assert trainer.evaluate()["eval_pairs_brier"] == pytest.approx(expected["brier"], abs=1e-6)


def test_several_callbacks_log_beside_each_other(letters, chat_tokenizer, tmp_path):
    """The sections of RewardBench, the subsets of RewardBench 2, and their averages."""
    bench = [bench_row(subset, "because", "so") for subsets in SECTIONS.values() for subset in subsets]
    bench_2 = [choice("Precise IF", ["a", "b"], ["c"]), choice("Ties", ["a", "b"], ["c"], "ref:1")]
    trainer = quick_trainer(lively_model(), letters, tmp_path, chat_tokenizer)
    trainer.add_callback(EvaluationCallback(trainer, Dataset.from_list(bench), "reward_bench"))
    trainer.add_callback(EvaluationCallback(trainer, bench_2, "reward_bench_2", name="rb2"))
    metrics = trainer.evaluate()
    sections = ("chat", "chat_hard", "safety", "reasoning", "average")
    assert {name for name in metrics if name.startswith(("eval_reward_bench_", "eval_rb2_"))} == {
        *(f"eval_reward_bench_{name}" for name in sections),
        *(f"eval_rb2_{name}" for name in ("precise_if", "ties", "average")),
    }
    scorer = PreferenceScorer(trainer.model, chat_tokenizer)
    assert metrics["eval_reward_bench_average"] == evaluate_reward_bench(scorer, bench)["average"]
    assert metrics["eval_rb2_average"] == pytest.approx(evaluate_reward_bench_2(scorer, bench_2)["average"], abs=1e-5)
