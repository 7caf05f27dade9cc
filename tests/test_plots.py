"""What the pictures show, read back from their artists; that files are valid and repeatable; and refused input."""

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
FIGURES = {
    "discs": lambda: plots.plot_embedding_discs(CYCLE, labels="ABCD", title="Title"),
    "heatmap": lambda: plots.plot_preference_heatmap(
        PROBABILITIES, labels=["from $5 to $6", "B", "C"], title="a $ and b"
    ),
    "reliability": lambda: plots.plot_reliability({"GPM": BINS, "BT": BINS[:1]}, title="Title"),
}


def label_texts(axes) -> dict[str, np.ndarray]:
    """The points of a disc by their labels."""
    return {text.get_text(): np.array(text.xy) for text in axes.texts if text.arrow_patch is None}


def arrow_names(axes) -> set[tuple[str, str]]:
    """The labels at tail and head of each arrow of a disc."""
    points = label_texts(axes)

    def name(point) -> str:
        return min(points, key=lambda label: np.linalg.norm(points[label] - point))

    return {(name(text.xyann), name(text.xy)) for text in axes.texts if text.arrow_patch is not None}


def test_arrows_lead_round_the_cycle_and_have_their_heads_at_the_loser():
    (axes,) = FIGURES["discs"]().axes
    assert arrow_names(axes) == CYCLE_WINS
    (axes,) = plots.plot_embedding_discs([[1.0, 0.0], [0.0, 1.0]], labels=["winner", "loser"]).axes
    (patch,) = (text.arrow_patch for text in axes.texts if text.arrow_patch is not None)
    start, _, _, *triangle, _ = axes.transData.inverted().transform(patch.get_path().vertices)
    assert np.linalg.norm(start - [1, 0]) < 0.1
    assert np.linalg.norm(triangle - np.array([0, 1]), axis=1).max() < 0.2


def test_each_block_has_a_panel_with_its_gate_and_its_own_arrows():
    embeddings = np.concatenate([0.8 * CYCLE, 0.5 * CYCLE[::-1], np.zeros((4, 2))], axis=1)
    figure = plots.plot_embedding_discs(embeddings, scales=[0.62, 0.3, 0.08], labels="ABCD")
    assert [axes.get_title() for axes in figure.axes] == ["block 1, λ = 0.62", "block 2, λ = 0.3", "block 3, λ = 0.08"]
    wins = [CYCLE_WINS, {(loser, winner) for winner, loser in CYCLE_WINS}, set()]
    assert [arrow_names(axes) for axes in figure.axes] == wins


@pytest.mark.parametrize("num_responses", [2, 5, 7, 12])
def test_arrows_are_the_positive_terms_of_the_score_or_of_many_the_strongest_of_each(num_responses):
    jitter = np.random.default_rng(0).uniform(0, 1, num_responses)  # so that no two wins are equally strong
    angles = (np.arange(num_responses) + 0.5 * jitter) * 2 * math.pi / num_responses
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    scores = np.sin(angles - angles[:, None])
    figure = plots.plot_embedding_discs(embeddings, labels=[str(i) for i in range(num_responses)])
    wins = {(i, j) for i, j in np.argwhere(scores > 0) if num_responses < 7 or j == scores[i].argmax()}
    assert arrow_names(figure.axes[0]) == {(str(i), str(j)) for i, j in wins}
    assert ("strongest" in figure.get_supxlabel()) == (num_responses > 6)


def test_responses_that_coincide_share_a_label_and_keep_their_wins():
    (axes,) = plots.plot_embedding_discs(np.repeat(CYCLE, [1, 2, 1, 3], axis=0), labels="ABCDEFG").axes
    assert arrow_names(axes) == {("A", "B, C"), ("B, C", "D"), ("D", "E, F, G"), ("E, F, G", "A")}


@pytest.mark.parametrize(("largest", "radius"), [(0.3, 1.0), (4.0, 4.0)])
def test_discs_are_unit_discs_unless_a_point_lies_outside(largest, radius):
    figure = plots.plot_embedding_discs(np.concatenate([CYCLE * largest, CYCLE * 0.1], axis=1))
    assert [axes.patches[0].radius for axes in figure.axes] == [radius, radius]
    assert f"Radius {radius:g}." in figure.get_supxlabel()


def test_cells_and_ticks_follow_the_ranking_and_colours_are_centred_at_one_half():
    axes = plots.plot_preference_heatmap(PROBABILITIES, labels="ABC", ranking=[2, 0, 1]).axes[0]
    ordered = PROBABILITIES[[2, 0, 1]][:, [2, 0, 1]]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(column, row): f"{ordered[row, column]:.2f}" for row in range(3) for column in range(3)}
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [tick.get_text() for tick in ticks] == ["C", "A", "B"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row is on top
    (image,) = axes.images
    np.testing.assert_array_equal(image.get_array(), ordered)
    assert image.get_clim() == (0, 1)
    assert min(image.cmap(image.norm(0.5))[:3]) > 0.95


@pytest.mark.parametrize(("size", "num_texts"), [(1, 1), (12, 144), (13, 0)])
def test_numbers_are_written_while_they_can_be_read(size, num_texts):
    assert len(plots.plot_preference_heatmap(np.full((size, size), 0.5)).axes[0].texts) == num_texts


def test_bins_are_joined_in_order_above_their_counts_and_the_legend_has_the_calibration_error():
    figure = plots.plot_reliability({"GPM": BINS})
    axes, strip = figure.axes
    assert axes.lines[0].get_xydata().tolist() == [[0.55, 0.6], [0.95, 0.8]]
    assert axes.lines[1].get_xydata().tolist() == [[0.5, 0.5], [1, 1]]
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in strip.patches]
    np.testing.assert_allclose(bars, [(0.55, 40), (0.95, 60)])
    error = (60 * 0.15 + 40 * 0.05) / 100
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [f"GPM (ECE {error:.3f})", "perfectly calibrated"]


@pytest.mark.parametrize("name", FIGURES)
def test_files_are_valid_and_the_same_each_time_and_nothing_is_cut(name, tmp_path):
    figure = FIGURES[name]()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -0.02
    for kind in ("png", "svg"):
        paths = [tmp_path / "new" / f"{index}.{kind}" for index in range(3)]
        for path, again in zip(paths, (figure, figure, FIGURES[name]()), strict=True):
            plots.save_figure(again, path)
        assert len({digest(path) for path in paths}) == 1
    assert figure._repr_png_().startswith(b"\x89PNG")  # in a notebook
    assert matplotlib.image.imread(tmp_path / "new" / "0.png").std() > 0.01
    texts = {element.text for element in ElementTree.parse(paths[0]).iter() if element.tag.endswith("text")}
    expected = {"heatmap": {"from $5 to $6", "a $ and b", "0.90"}}.get(name, {"Title"})
    assert expected <= texts  # text is text, and starts no formula


def test_long_responses_are_numbered_beside_a_key_and_short_ones_are_not():
    responses = ["an answer of many words " * 9, "B", "C"]
    heatmap = plots.plot_preference_heatmap(PROBABILITIES, responses, ranking=[2, 0, 1])
    assert [text.get_text() for text in heatmap.axes[0].get_xticklabels()] == ["3", "1", "2"]
    discs = plots.plot_embedding_discs(CYCLE[:3], labels=responses)
    assert set(label_texts(discs.axes[0])) == {"1", "2", "3"}
    for figure in (heatmap, discs):
        first, second, third = figure.get_supxlabel().splitlines()[-3:]
        assert first.startswith("1: an answer of many words")
        assert first.endswith("…")
        assert (second, third) == ("2: B", "3: C")
    assert "1: " not in plots.plot_embedding_discs(CYCLE[:3], labels="ABC").get_supxlabel()


def test_only_0_and_1_look_like_0_and_1():
    matrix = np.array([[0.5, 0.9991, 1.0], [0.0009, 0.5, 0.994], [0.0, 0.006, 0.5]])
    cells = [text.get_text() for text in plots.plot_preference_heatmap(matrix).axes[0].texts]
    assert cells == ["0.50", ">.99", "1.00", "<.01", "0.50", "0.99", "0.00", "0.01", "0.50"]


def test_bands_are_the_intervals_and_names_are_cut_in_the_middle():
    names = [f"outputs/a-long-directory/of-the-year-2026/model-{seed}" for seed in (1, 2)]
    bins = [{**entry, "accuracy_ci": [entry["accuracy"] - 0.1, entry["accuracy"] + 0.1]} for entry in BINS]
    figure = plots.plot_reliability({names[0]: bins, names[1]: BINS})
    (band,) = figure.axes[0].collections
    corners = {(round(x, 6), round(y, 6)) for x, y in band.get_paths()[0].vertices}
    assert {(0.55, 0.5), (0.55, 0.7), (0.95, 0.7), (0.95, 0.9)} <= corners
    texts = [text.get_text() for text in figure.legends[0].get_texts()][:2]
    assert all(text.startswith("outputs/") and f"model-{seed} (ECE" in text for seed, text in enumerate(texts, 1))


def test_the_callers_settings_are_neither_used_nor_changed(tmp_path):
    plots.save_figure(FIGURES["heatmap"](), tmp_path / "one.svg")
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": "other", "axes.titlesize": 40}):
        before = dict(matplotlib.rcParams)
        plots.save_figure(FIGURES["heatmap"](), tmp_path / "two.svg")
        assert dict(matplotlib.rcParams) == before
    assert digest(tmp_path / "one.svg") == digest(tmp_path / "two.svg")


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'\.png' or '\.svg'"):
        plots.save_figure(FIGURES["discs"](), tmp_path / "new" / "figure.svgz")
    assert not (tmp_path / "new").exists()


def test_pictures_need_neither_pyplot_nor_a_display(tmp_path):
    code = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); plots = runpy.run_path({plots.__file__!r})\n"
    code += "plots['save_figure'](plots['plot_embedding_discs']([[1, 0], [0, 1]]), sys.argv[1])\n"
    code += "assert 'matplotlib.pyplot' not in sys.modules"
    environment = {"PATH": "", "MPLCONFIGDIR": str(tmp_path)}  # no DISPLAY
    subprocess.run([sys.executable, "-c", code, tmp_path / "discs.png"], env=environment, check=True)
    assert (tmp_path / "discs.png").stat().st_size > 1000


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "gpm-trl\[viz\]"'):
        runpy.run_path(plots.__file__)


BAD = {
    "embeddings of a batch": (plots.plot_embedding_discs, np.zeros((2, 3, 4)), r"\(2, 3, 4\).*\(K, 2k\)"),
    "too many gate values": (plots.plot_embedding_discs, CYCLE, [0.5, 0.5], r"\(2,\).*\(k,\)"),
    "too few labels": (plots.plot_embedding_discs, CYCLE, None, "AB", "2 entries for 4 responses"),
    "no square": (plots.plot_preference_heatmap, np.full((2, 3), 0.5), r"\(2, 3\)"),
    "scores": (plots.plot_preference_heatmap, [[0, 3], [-3, 0]], r"-3.*preference_probability"),
    "a NaN": (plots.plot_preference_heatmap, [[0.5, math.nan], [0.5, 0.5]], "nan"),
    "no complements": (plots.plot_preference_heatmap, [[0.5, 0.7], [0.7, 0.5]], r"P\[i, j\] \+ P\[j, i\] = 1"),
    "a ranking with a tie": (plots.plot_preference_heatmap, PROBABILITIES, None, [0, 0, 1], r"\[0, 0, 1\].*0 to 2"),
    "no models": (plots.plot_reliability, {}, "at least one model"),
    "no bins": (plots.plot_reliability, {"GPM": []}, "bins of each"),
    "a low confidence": (plots.plot_reliability, {"GPM": [{**BINS[0], "confidence": 0.3}]}, "'GPM'.*0.3.*from 0.5"),
    "a percentage": (plots.plot_reliability, {"GPM": [{**BINS[0], "accuracy": 80}]}, "80.*from 0 to 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_its_value(name):
    plot, *arguments, message = BAD[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        plot(*arguments)
