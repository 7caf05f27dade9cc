"""What the pictures show, read back from their artists; that files are valid and repeatable; and refused input."""

import hashlib
import itertools
import math
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from conftest import digest

matplotlib = pytest.importorskip("matplotlib")
plots = pytest.importorskip("gpm_trl.plots")

CYCLE = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], dtype=float)  # A > B > C > D > A
CYCLE_WINS = {("A", "B"), ("B", "C"), ("C", "D"), ("D", "A")}
PROBABILITIES = np.array([[0.5, 0.9, 0.25], [0.1, 0.5, 0.66], [0.75, 0.34, 0.5]])
BINS = [
    {"confidence": 0.95, "accuracy": 0.8, "count": 60},
    {"confidence": 0.55, "accuracy": 0.6, "count": 40},
]
HISTORY = [
    {"step": 5, "epoch": 0.5, "loss": 0.7, "accuracy": 0.5, "margin": 0.0},
    {"step": 10, "epoch": 1.0, "loss": 0.4, "accuracy": 0.8, "margin": 1.0},
    {"step": 10, "epoch": 1.0, "eval_loss": 0.5, "eval_accuracy": 0.7},
    {"step": 10, "epoch": 1.0, "train_loss": 0.55},
]
GPM = {
    "math-prm": {"accuracy": 0.9, "accuracy_ci": [0.85, 0.94], "rows": 447},
    "hep-go": {"accuracy": 0.8, "rows": 164},
    "donotanswer": {"accuracy": 0.4, "accuracy_ci": [0.3, 0.5], "rows": 136},
}
BT = {"donotanswer": {"accuracy": 0.6, "rows": 136}, "math-prm": {"accuracy": 0.7, "rows": 447}}


def random_embeddings(num_responses: int, num_blocks: int, seed: int = 0) -> np.ndarray:
    embeddings = np.random.default_rng(seed).normal(size=(num_responses, 2 * num_blocks))
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def letter_discs():
    return plots.plot_embedding_discs(CYCLE, labels="ABCD")


FIGURES = {
    "discs": letter_discs,
    "heatmap": lambda: plots.plot_preference_heatmap(
        PROBABILITIES, labels=["from $5 to $6", "B", "C"], title="a $ and b"
    ),
    "reliability": lambda: plots.plot_reliability({"GPM": BINS, "BT": BINS[:1]}),
    "curves": lambda: plots.plot_learning_curves({"one": HISTORY, "two": HISTORY}, title="Letters"),
    "subsets": lambda: plots.plot_subset_accuracy({"GPM": GPM, "BT": BT}, title="RewardBench"),
}


def label_texts(axes) -> dict[str, np.ndarray]:
    """The points of a disc by their labels."""
    return {text.get_text(): np.array(text.xy) for text in axes.texts if text.arrow_patch is None}


def arrows(axes) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tail and head of each arrow of a disc."""
    return [(np.array(text.xyann), np.array(text.xy)) for text in axes.texts if text.arrow_patch is not None]


def arrow_names(axes) -> set[tuple[str, str]]:
    points = label_texts(axes)

    def name(point: np.ndarray) -> str:
        return min(points, key=lambda label: np.linalg.norm(points[label] - point))

    return {(name(tail), name(head)) for tail, head in arrows(axes)}


# Discs


def test_arrows_of_the_four_letter_cycle_go_round():
    (axes,) = letter_discs().axes
    assert arrow_names(axes) == CYCLE_WINS


def test_arrow_heads_lie_at_the_loser():
    (axes,) = plots.plot_embedding_discs([[1.0, 0.0], [0.0, 1.0]], labels=["winner", "loser"]).axes
    ((_, head),) = arrows(axes)
    patch = next(text.arrow_patch for text in axes.texts if text.arrow_patch is not None)
    start, _, _, *triangle, _ = axes.transData.inverted().transform(patch.get_path().vertices)
    np.testing.assert_allclose(head, [0, 1])
    assert np.linalg.norm(start - [1, 0]) < 0.1
    assert np.linalg.norm(triangle - head, axis=1).max() < 0.2


def test_each_block_has_a_panel_with_its_gate_and_its_own_arrows():
    embeddings = np.concatenate([0.8 * CYCLE, 0.5 * CYCLE[::-1], np.zeros((4, 2))], axis=1)
    figure = plots.plot_embedding_discs(embeddings, scales=[0.62, 0.3, 0.08], labels="ABCD")
    assert [axes.get_title() for axes in figure.axes] == ["block 1, λ = 0.62", "block 2, λ = 0.3", "block 3, λ = 0.08"]
    assert arrow_names(figure.axes[0]) == CYCLE_WINS
    assert arrow_names(figure.axes[1]) == {(loser, winner) for winner, loser in CYCLE_WINS}
    assert not arrows(figure.axes[2])
    assert "block" in figure.get_supxlabel()


@pytest.mark.parametrize("num_blocks", [1, 4, 6])
def test_panels_are_ordered_and_wrap_at_four(num_blocks):
    figure = plots.plot_embedding_discs(random_embeddings(3, num_blocks), scales=np.arange(num_blocks))
    assert [axes.get_title().split(",")[0] for axes in figure.axes] == [f"block {i + 1}" for i in range(num_blocks)]
    places = [axes.get_subplotspec() for axes in figure.axes]
    assert [(place.rowspan.start, place.colspan.start) for place in places] == [
        divmod(i, 4) for i in range(num_blocks)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_arrows_are_the_positive_terms_of_the_score(seed):
    embeddings = random_embeddings(5, 1, seed)
    scores = np.outer(embeddings[:, 0], embeddings[:, 1])
    scores -= scores.T
    (axes,) = plots.plot_embedding_discs(embeddings).axes
    assert arrow_names(axes) == {(str(i), str(j)) for i, j in np.argwhere(scores > 0)}


@pytest.mark.parametrize("num_responses", [7, 12])
def test_of_many_responses_only_strongest_wins_are_drawn(num_responses):
    angles = np.sort(np.random.default_rng(0).permutation(60)[:num_responses]) * 2 * math.pi / 60
    figure = plots.plot_embedding_discs(np.stack([np.cos(angles), np.sin(angles)], axis=-1))
    scores = np.sin(angles - angles[:, None])
    best = scores.max(1, keepdims=True)
    wins = {(str(i), str(j)) for i, j in np.argwhere((scores > 0) & (scores > best - 1e-9))}
    drawn = arrow_names(figure.axes[0])
    assert drawn <= wins
    assert {i for i, _ in drawn} == {i for i, _ in wins}
    assert len(drawn) == len({i for i, _ in wins})
    assert "strongest" in figure.get_supxlabel()


def test_responses_that_coincide_share_a_label_and_keep_their_wins():
    (axes,) = plots.plot_embedding_discs(np.repeat(CYCLE, [1, 2, 1, 3], axis=0), labels="ABCDEFG").axes
    assert set(label_texts(axes)) == {"A", "B, C", "D", "E, F, G"}
    assert arrow_names(axes) == {("A", "B, C"), ("B, C", "D"), ("D", "E, F, G"), ("E, F, G", "A")}


@pytest.mark.parametrize("scales", [None, [0.0]])
@pytest.mark.parametrize("num_responses", [1, 2, 12])
def test_a_block_without_preferences_has_no_arrows(scales, num_responses):
    embeddings = np.zeros((num_responses, 2)) if scales is None else random_embeddings(num_responses, 1)
    (axes,) = plots.plot_embedding_discs(embeddings, scales).axes
    assert not arrows(axes)


@pytest.mark.parametrize(("largest", "radius"), [(0.3, 1.0), (1.0, 1.0), (4.0, 4.0)])
def test_discs_are_unit_discs_unless_a_point_lies_outside(largest, radius):
    figure = plots.plot_embedding_discs(np.concatenate([CYCLE * largest, CYCLE * 0.1], axis=1))
    assert [axes.patches[0].radius for axes in figure.axes] == [radius, radius]
    assert f"Radius {radius:g}." in figure.get_supxlabel()


CROWDED = {
    "a point outwards of another": ([[0.5, 0.0], [0.6, 0.0]], "AB"),
    "neighbours": ([[0.5, 0.0], [0.5, 0.06]], ["first", "second"]),
    "a ring": ([[math.cos(angle), math.sin(angle)] for angle in np.arange(12) / 2], ["response"] * 12),
    "long labels": (np.concatenate([0.8 * CYCLE, 0.6 * CYCLE], axis=1), ["a longer label"] * 4),
    "random": (random_embeddings(6, 2), "ABCDEF"),
}


@pytest.mark.parametrize("name", CROWDED)
def test_labels_stay_in_their_panels_and_hide_neither_points_nor_one_another(name):
    embeddings, labels = CROWDED[name]
    figure = plots.plot_embedding_discs(embeddings, labels=labels)
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts if text.arrow_patch is None]
        points = axes.transData.transform(axes.lines[-1].get_xydata())
        panel = axes.get_window_extent().padded(1)
        assert all(panel.contains(box.x0, box.y0) and panel.contains(box.x1, box.y1) for box in boxes)
        assert not any(box.contains(*point) for box in boxes for point in points)
        assert not any(one.overlaps(two) for one, two in itertools.combinations(boxes, 2))


def test_long_labels_are_shortened_and_drawn_as_they_are():
    labels = ["The capital of France is Paris,\nof course", "$5 or $6_x", "C"]
    (axes,) = plots.plot_embedding_discs(random_embeddings(3, 1), labels=labels).axes
    assert set(label_texts(axes)) == {"The capital of…", "$5 or $6_x", "C"}


# Heat maps


def test_cells_and_ticks_follow_the_ranking():
    figure = plots.plot_preference_heatmap(PROBABILITIES, labels="ABC", ranking=[2, 0, 1])
    axes = figure.axes[0]
    ordered = PROBABILITIES[[2, 0, 1]][:, [2, 0, 1]]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(column, row): f"{ordered[row, column]:.2f}" for row in range(3) for column in range(3)}
    np.testing.assert_array_equal(axes.images[0].get_array(), ordered)
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [tick.get_text() for tick in ticks] == ["C", "A", "B"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row is on top


def test_colours_are_centred_at_one_half():
    image = plots.plot_preference_heatmap(PROBABILITIES).axes[0].images[0]
    assert image.get_clim() == (0, 1)
    red, green, blue, _ = image.cmap(image.norm(0.5))
    assert min(red, green, blue) > 0.95


@pytest.mark.parametrize(("size", "num_texts"), [(1, 1), (12, 144), (13, 0), (20, 0)])
def test_numbers_are_written_while_they_can_be_read(size, num_texts):
    figure = plots.plot_preference_heatmap(np.full((size, size), 0.5))
    assert len(figure.axes[0].texts) == num_texts
    assert figure.axes[1].get_ylabel() == "P(row is preferred to column)"


# Reliability


def test_the_legend_has_the_expected_calibration_error():
    figure = plots.plot_reliability({"GPM": BINS, "exact": [{"confidence": 0.75, "accuracy": 0.75, "count": 3}]})
    error = (60 * 0.15 + 40 * 0.05) / 100
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        f"GPM (ECE {error:.3f})",
        "exact (ECE 0.000)",
        "perfectly calibrated",
    ]


def test_bins_are_joined_in_the_order_of_confidence_above_their_counts():
    figure = plots.plot_reliability({"GPM": BINS})
    axes, strip = figure.axes
    assert axes.lines[0].get_xydata().tolist() == [[0.55, 0.6], [0.95, 0.8]]
    assert axes.lines[1].get_xydata().tolist() == [[0.5, 0.5], [1, 1]]
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in strip.patches]
    np.testing.assert_allclose(bars, [(0.55, 40), (0.95, 60)])


# Learning curves


def test_training_is_dashed_and_evaluation_solid_in_one_panel():
    figure = plots.plot_learning_curves({"GPM": HISTORY})
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "accuracy"]
    training, evaluation = figure.axes[0].lines
    assert training.get_xydata().tolist() == [[5, 0.7], [10, 0.4]]
    assert evaluation.get_xydata().tolist() == [[10, 0.5]]
    assert (training.get_linestyle(), evaluation.get_linestyle()) == ("--", "-")


def test_runs_differ_in_colour_and_marker_and_missing_metrics_are_left_out():
    other = [{"step": 5, "loss": 0.6}]
    figure = plots.plot_learning_curves({"GPM": HISTORY, "BT": other}, metrics=["margin", "loss"])
    margin, loss = figure.axes
    assert len(margin.lines) == 1
    looks = {(line.get_color(), line.get_marker()) for line in loss.lines}
    assert len(looks) == 2
    assert len({color for color, _ in looks}) == len({marker for _, marker in looks}) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["GPM", "BT", "training", "evaluation"]


def test_the_legend_names_only_kinds_of_lines_that_are_there():
    (legend,) = plots.plot_learning_curves({"BT": HISTORY[:2]}).legends
    assert [text.get_text() for text in legend.get_texts()] == ["BT", "training"]
    assert [line.get_linestyle() for line in legend.get_lines()] == ["-", "--"]


# Subsets


def test_bars_are_as_long_as_accuracies_and_lie_at_their_subsets():
    (axes,) = plots.plot_subset_accuracy({"GPM": GPM, "BT": BT}).axes
    ticks = [tick.get_text() for tick in axes.get_yticklabels()]
    assert ticks == ["math-prm (447)", "hep-go (164)", "donotanswer (136)"]
    for report, bars in zip((GPM, BT), axes.containers, strict=True):
        at = {round(bar.get_y() + bar.get_height() / 2): bar.get_width() for bar in bars}
        assert at == {list(GPM).index(subset): entry["accuracy"] for subset, entry in report.items()}
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first subset is on top
    boxes = [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in axes.patches]
    assert all(one[1] <= two[0] + 1e-9 for one, two in itertools.pairwise(sorted(boxes)))


def test_intervals_are_drawn_where_given_and_guessing_is_marked():
    (axes,) = plots.plot_subset_accuracy({"GPM": GPM, "BT": BT}).axes
    intervals = [line.get_segments()[0] for line in axes.collections]
    assert [segment[:, 0].tolist() for segment in intervals] == [[0.85, 0.94], [0.3, 0.5]]
    assert [list(line.get_xdata()) for line in axes.lines] == [[0.5, 0.5]]


def test_a_subset_that_the_first_model_lacks_comes_last():
    (axes,) = plots.plot_subset_accuracy({"BT": BT, "GPM": GPM}).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()][-1] == "hep-go (164)"


# All


def test_every_picture_can_have_a_title():
    figures = [
        plots.plot_embedding_discs(CYCLE, title="Title"),
        plots.plot_preference_heatmap(PROBABILITIES, title="Title"),
        plots.plot_reliability({"GPM": BINS}, title="Title"),
        plots.plot_learning_curves({"GPM": HISTORY}, title="Title"),
        plots.plot_subset_accuracy({"GPM": GPM}, title="Title"),
    ]
    assert {figure.get_suptitle() for figure in figures} == {"Title"}


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_at_the_edge(name):
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -0.02


@pytest.mark.parametrize("kind", ["png", "svg"])
@pytest.mark.parametrize("name", FIGURES)
def test_files_are_valid_and_the_same_each_time(name, kind, tmp_path):
    figure = FIGURES[name]()
    paths = [tmp_path / "new" / f"{index}.{kind}" for index in range(3)]
    plots.save_figure(figure, paths[0])
    plots.save_figure(figure, paths[1])
    plots.save_figure(FIGURES[name](), str(paths[2]))
    assert len({hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}) == 1
    if kind == "svg":
        assert ElementTree.parse(paths[0]).getroot().tag.endswith("svg")
    else:
        assert paths[0].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert matplotlib.image.imread(paths[0]).std() > 0.01


def test_text_of_an_svg_is_text_and_starts_no_formula(tmp_path):
    plots.save_figure(FIGURES["heatmap"](), tmp_path / "heatmap.svg")
    texts = {
        element.text for element in ElementTree.parse(tmp_path / "heatmap.svg").iter() if element.tag.endswith("text")
    }
    assert {"from $5 to $6", "a $ and b", "0.90", "P(row is preferred to column)"} <= texts


def test_the_callers_settings_are_neither_used_nor_changed(tmp_path):
    plots.save_figure(letter_discs(), tmp_path / "one.svg")
    with matplotlib.rc_context(
        {"font.size": 30, "svg.fonttype": "path", "svg.hashsalt": "other", "axes.titlesize": 40}
    ):
        before = dict(matplotlib.rcParams)
        plots.save_figure(letter_discs(), tmp_path / "two.svg")
        assert dict(matplotlib.rcParams) == before
    assert digest(tmp_path / "one.svg") == digest(tmp_path / "two.svg")


@pytest.mark.parametrize("name", ["figure.pdf", "figure", "figure.svgz", ".png"])
def test_other_endings_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"'\.png' or '\.svg'"):
        plots.save_figure(letter_discs(), tmp_path / "new" / name)
    assert not (tmp_path / "new").exists()


def test_pictures_need_neither_pyplot_nor_a_display(tmp_path):
    code = (
        "import sys; from gpm_trl.plots import *\n"
        "for kind in ('png', 'svg'):\n"
        "    save_figure(plot_embedding_discs([[1, 0], [0, 1]]), f'{sys.argv[1]}/discs.{kind}')\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = {"PATH": "", "MPLCONFIGDIR": str(tmp_path)}  # no DISPLAY
    result = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "discs.png").stat().st_size > 1000


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "gpm-trl\[viz\]"'):
        runpy.run_path(plots.__file__)


def with_(entry: dict, **changes) -> dict:
    return {**entry, **changes}


BAD = {
    "embeddings of a batch": (lambda: plots.plot_embedding_discs(np.zeros((2, 3, 4))), r"\(2, 3, 4\).*\(K, 2k\)"),
    "an odd width": (lambda: plots.plot_embedding_discs(np.zeros((2, 3))), r"\(2, 3\)"),
    "no width": (lambda: plots.plot_embedding_discs(np.zeros((2, 0))), r"\(2, 0\)"),
    "no responses": (lambda: plots.plot_embedding_discs(np.zeros((0, 2))), r"\(0, 2\)"),
    "too many gate values": (lambda: plots.plot_embedding_discs(CYCLE, [0.5, 0.5]), r"\(2,\).*1 blocks"),
    "a negative gate value": (lambda: plots.plot_embedding_discs(CYCLE, [-1]), r"-1\.0"),
    "embeddings with a NaN": (lambda: plots.plot_embedding_discs([[math.nan, 0]]), "1 coordinates"),
    "too few labels": (lambda: plots.plot_embedding_discs(CYCLE, labels="AB"), "2 entries for 4 responses"),
    "no square": (lambda: plots.plot_preference_heatmap(np.full((2, 3), 0.5)), r"\(2, 3\)"),
    "no probabilities": (lambda: plots.plot_preference_heatmap(np.zeros((0, 0))), r"\(0, 0\)"),
    "scores": (lambda: plots.plot_preference_heatmap([[0, 3], [-3, 0]]), r"-3\.0 to 3\.0.*preference_probability"),
    "a NaN": (lambda: plots.plot_preference_heatmap([[0.5, math.nan], [0.5, 0.5]]), "nan"),
    "no complements": (lambda: plots.plot_preference_heatmap([[0.5, 0.7], [0.7, 0.5]]), r"off by up to 0\.4"),
    "too many labels": (lambda: plots.plot_preference_heatmap(PROBABILITIES, "ABCD"), "4 entries for 3 responses"),
    "a ranking with a tie": (lambda: plots.plot_preference_heatmap(PROBABILITIES, ranking=[0, 0, 1]), r"\[0, 0, 1\]"),
    "a short ranking": (lambda: plots.plot_preference_heatmap(PROBABILITIES, ranking=[0, 1]), r"\[0, 1\].*0 to 2"),
    "no models": (lambda: plots.plot_reliability({}), "`reports` is empty"),
    "no bins": (lambda: plots.plot_reliability({"GPM": []}), "nothing for 'GPM'"),
    "a low confidence": (
        lambda: plots.plot_reliability({"GPM": [with_(BINS[0], confidence=0.3)]}),
        "0.3.*between 0.5",
    ),
    "a percentage": (lambda: plots.plot_reliability({"GPM": [with_(BINS[0], accuracy=80)]}), "80.*percentage"),
    "an empty bin": (lambda: plots.plot_reliability({"GPM": [with_(BINS[0], count=0)]}), "count 0.*empty bins"),
    "no runs": (lambda: plots.plot_learning_curves({}), "`runs` is empty"),
    "no history": (lambda: plots.plot_learning_curves({"GPM": []}), "nothing for 'GPM'"),
    "an unknown metric": (
        lambda: plots.plot_learning_curves({"GPM": HISTORY}, ["f1"]),
        r"\['f1'\].*'accuracy', 'loss'",
    ),
    "no metrics": (lambda: plots.plot_learning_curves({"GPM": HISTORY}, []), r"\[\].*choose"),
    "no reports": (lambda: plots.plot_subset_accuracy({}), "`reports` is empty"),
    "no subsets": (lambda: plots.plot_subset_accuracy({"GPM": {}}), "nothing for 'GPM'"),
    "an accuracy in percent": (lambda: plots.plot_subset_accuracy({"GPM": {"a": {"accuracy": 90, "rows": 1}}}), "90"),
    "an accuracy of nothing": (
        lambda: plots.plot_subset_accuracy({"GPM": {"a": {"accuracy": math.nan, "rows": 0}}}),
        "nan",
    ),
    "an interval in percent": (
        lambda: plots.plot_subset_accuracy({"GPM": {"a": {"accuracy": 0.9, "accuracy_ci": [85, 94], "rows": 1}}}),
        "'GPM' on 'a'.*85",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_its_value(name):
    draw, message = BAD[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        draw()
