"""
Pictures of embeddings, preferences and calibration. They need the extra `viz`: `pip install "gpm-trl[viz]"`.

Every function takes plain arrays and dictionaries and returns a [`~matplotlib.figure.Figure`], which belongs to no
pyplot and needs no display; [`save_figure`] writes it. Text is drawn as it is given: a `$` starts no formula.
"""

import functools
import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    from matplotlib import style
except ImportError as error:
    raise ImportError('`gpm_trl.plots` needs matplotlib: `pip install "gpm-trl[viz]"`.') from error

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle

__all__ = ["plot_embedding_discs", "plot_preference_heatmap", "plot_reliability", "save_figure"]

GRAY, LIGHT_GRAY = "#666666", "#CCCCCC"
STYLE = {
    "axes.edgecolor": GRAY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "font.size": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "gpm-trl",  # or ids, and so files, would differ each time
    "text.parse_math": False,
}
ARROW = {
    "arrowstyle": "-|>,head_length=0.5,head_width=0.22",
    "connectionstyle": "arc3,rad=0.12",
    "shrinkA": 4,
    "shrinkB": 4,
}
SETTINGS = ("default", "tableau-colorblind10", STYLE)
MAX_ALL_ARROWS = 6  # responses; with more, only the strongest win of each is drawn
KEY_WIDTH = 80  # characters of a response in the key
MERGE_DISTANCE = 0.05  # of the disc's radius, about the size of a marker
ROUNDING = 1e-6


class Picture(Figure):
    """Notebooks show a figure of pyplot by themselves; others need this method."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with style.context(SETTINGS):
            self.savefig(buffer, format="png")
        return buffer.getvalue()


def _styled(plot: Callable[..., Figure]) -> Callable[..., Figure]:
    """A plotting function whose figures have `STYLE`, and a layout that is fixed when they are returned."""

    @functools.wraps(plot)
    def draw(*args, **kwargs) -> Figure:
        with style.context(SETTINGS):
            figure = plot(*args, **kwargs)
            # Ticks are made when first drawn, in the style of that moment. A second pass of the layout would move
            # things a little, and the same figure would give another file.
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        return figure

    return draw


def _response_labels(labels: Sequence[str] | None, num_responses: int, length: int) -> tuple[list[str], str]:
    """A line for each response, its label or its index; if one is longer than `length`, numbers and a key to them."""
    texts = [" ".join(str(label).split()) for label in (range(num_responses) if labels is None else labels)]
    if len(texts) != num_responses:
        raise ValueError(f"`labels` has {len(texts)} entries for {num_responses} responses: give one for each.")
    if max(map(len, texts)) <= length:
        return texts, ""
    lines = [
        f"{number}: {textwrap.shorten(text, KEY_WIDTH, placeholder=' …')}" for number, text in enumerate(texts, 1)
    ]
    return [str(number) for number in range(1, num_responses + 1)], "\n".join(lines)


def _add_key(figure: Figure, key: str) -> None:
    """Write the key to numbered responses below everything else."""
    if key:
        width, height = figure.get_size_inches()
        figure.set_size_inches(max(width, KEY_WIDTH * 0.07), height + 0.14 * (key.count("\n") + 2))
        figure.supxlabel(
            f"{figure.get_supxlabel()}\n\n{key}".strip(), fontsize=7, color=GRAY, ha="center", linespacing=1.4
        )


def _cut_in_the_middle(name: str, length: int = 40) -> str:
    """A name whose beginning and end tell it from others."""
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"


def two_digits(probability: float) -> str:
    """A probability, of which only 0 and 1 look like 0 and 1."""
    if 0 < probability < 0.005:
        return "<.01"
    return ">.99" if 0.995 <= probability < 1 else f"{probability:.2f}"


def _merge(points: np.ndarray, labels: list[str], distance: float) -> tuple[np.ndarray, list[str]]:
    """Makes one of points that lie on one another, with the labels of all."""
    groups: dict[int, list[int]] = {}
    for index, point in enumerate(points):
        first = next((first for first in groups if np.linalg.norm(points[first] - point) < distance), index)
        groups.setdefault(first, []).append(index)
    names = (", ".join(labels[index] for index in group) for group in groups.values())
    texts = [textwrap.fill(name, 22, max_lines=3, placeholder=" …", break_long_words=False) for name in names]
    return np.array([points[group].mean(0) for group in groups.values()]), texts


def _wins(points: np.ndarray, scale: float) -> np.ndarray:
    """A block's terms of the scores, `(N, N)`, where they are positive and drawn, and 0 elsewhere."""
    products = np.outer(points[:, 0], points[:, 1])
    terms = scale * (products - products.T)
    wins = np.where(terms > ROUNDING * scale * (points**2).sum(-1).max(), terms, 0.0)
    return wins if len(points) <= MAX_ALL_ARROWS else wins * np.eye(len(points))[wins.argmax(1)]


def _draw_label(axes: Axes, point: np.ndarray, text: str) -> None:
    """Outwards of the disc's centre, where no arrow of the outermost points goes; upwards of the centre itself."""
    norm = np.linalg.norm(point)
    outwards = point / norm if norm > ROUNDING else np.array([0.0, 1.0])
    column, row = np.round(outwards).astype(int)  # 0 within 30 degrees of the other axis
    side = {"ha": ("center", "left", "right")[column], "va": ("center", "bottom", "top")[row]}
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.3}
    offset = {"xytext": (6 * outwards).tolist(), "textcoords": "offset points"}
    axes.annotate(text, point.tolist(), **offset, **side, bbox=box, zorder=4)


def _draw_rewards(axes: Axes, rewards: np.ndarray, labels: list[str], title: str) -> None:
    """A bar for each response, the first on top."""
    axes.barh(range(len(rewards)), rewards, color="C0")
    axes.axvline(0, color=GRAY, linewidth=0.8)
    axes.set_yticks(range(len(rewards)), labels)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.spines["left"].set_visible(False)
    axes.set_title(title)


@_styled
def plot_embedding_discs(
    embeddings: Any,
    scales: Any | None = None,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    reward_dim: int = 0,
) -> Figure:
    r"""
    The responses to one prompt as points in the planes of the 2x2 blocks, one disc a block; or, for a transitive block
    [r, 1], as bars of their rewards.

    An arrow i -> j says that the block prefers i to j: its term of the score (Definition 4.3, Section 4.2),
    `lambda_l (v_i[2l] v_j[2l+1] - v_i[2l+1] v_j[2l])`, is positive, i.e. j is less than half a turn counter-clockwise
    from i. With one block, this is the score. A cycle of preferences goes round the disc. Among more than six
    responses, only each one's strongest win in the block is drawn.

    Args:
        embeddings (`array`): Embeddings of the responses, `(K, 2k)`.
        scales (`array`, *optional*): Gate values lambda(x) >= 0 of the prompt, `(k,)`. `None` is no gate.
        labels (`list[str]`, *optional*): Names of the responses, K; long ones are numbered, with a key below.
            Default: their indices.
        title (`str`, *optional*): Title of the figure.
        reward_dim (`int`, *optional*, defaults to `0`): How many blocks, the first ones, are transitive.

    Returns:
        [`~matplotlib.figure.Figure`]: One panel a block, all with the radius `max(1, largest norm of a point)`.

    Raises:
        ValueError: If shapes or lengths do not fit.

    Example:

    ```python
    >>> from gpm_trl.plots import plot_embedding_discs
    >>> figure = plot_embedding_discs([[1, 0], [0, 1], [-1, 0], [0, -1]], labels="ABCD")  # A > B > C > D > A
    >>> arrows = [text for text in figure.axes[0].texts if text.arrow_patch]
    >>> [(arrow.xyann, arrow.xy) for arrow in arrows]  # tails and heads
    [((1.0, 0.0), (0.0, 1.0)), ((0.0, 1.0), (-1.0, 0.0)), ((-1.0, 0.0), (0.0, -1.0)), ((0.0, -1.0), (1.0, 0.0))]

    ```
    """
    embeddings = np.asarray(embeddings, dtype=float)
    lambdas = np.ones(embeddings.shape[-1] // 2) if scales is None else np.asarray(scales, dtype=float)
    if embeddings.ndim != 2 or not embeddings.size or lambdas.shape != (embeddings.shape[1] / 2,):
        raise ValueError(
            f"`embeddings` has the shape {embeddings.shape} and `scales` {lambdas.shape}, but they are (K, 2k), a row "
            "for each response to one prompt, and (k,), a gate value for each block: index a batch first."
        )
    labels, key = _response_labels(labels, len(embeddings), 16)
    blocks = embeddings.reshape(len(embeddings), -1, 2).swapaxes(0, 1)  # (k, K, 2)
    rewards, blocks = blocks[:reward_dim, :, 0], blocks[reward_dim:]
    weights, lambdas = np.split(lambdas, [reward_dim])
    radius = max(1.0, np.linalg.norm(blocks, axis=-1).max(initial=0))
    merged = [_merge(points, labels, MERGE_DISTANCE * radius) for points in blocks]
    wins = [_wins(points, scale) for (points, _), scale in zip(merged, lambdas, strict=True)]
    strongest = max((block_wins.max() for block_wins in wins), default=0)

    longest = max(len(line) for _, texts in [*merged, (None, labels)] for text in texts for line in text.split("\n"))
    num_panels = len(rewards) + len(blocks)
    disc = 2.5 if num_panels == 1 else 1.8  # inches
    panel = disc + np.array([0.2 + 0.17 * longest, 0.5])  # with room for labels
    num_columns = min(num_panels, 4)
    num_rows = math.ceil(num_panels / num_columns)
    figure = Picture(figsize=(num_columns * panel[0], num_rows * panel[1] + 0.5), layout="constrained")
    for index, values in enumerate(rewards):
        name = "reward r" if len(rewards) == 1 else f"reward {index + 1}, λ = {weights[index]:.2g}"
        _draw_rewards(figure.add_subplot(num_rows, num_columns, index + 1), values, labels, name)
    for index, (points, (spots, texts)) in enumerate(zip(blocks, merged, strict=True)):
        axes = figure.add_subplot(num_rows, num_columns, len(rewards) + index + 1)
        if num_panels > 1 or scales is not None:
            axes.set_title(f"block {index + 1}" + ("" if scales is None else f", λ = {lambdas[index]:.2g}"))
        axes.add_patch(Circle((0, 0), radius, facecolor="none", edgecolor=GRAY, linewidth=0.8, zorder=1))
        axes.hlines(0, -radius, radius, color=LIGHT_GRAY, linewidth=0.5, zorder=0)
        axes.vlines(0, -radius, radius, color=LIGHT_GRAY, linewidth=0.5, zorder=0)
        axes.plot(*points.T, "o", color="C0", zorder=5)
        for i, j in np.argwhere(wins[index]):
            strength = wins[index][i, j] / strongest
            look = {"color": str(0.75 - 0.4 * strength), "linewidth": 0.5 + 1.1 * strength, "zorder": 2 + strength}
            axes.annotate("", spots[j].tolist(), spots[i].tolist(), arrowprops={**ARROW, **look})
        for spot, text in zip(spots, texts, strict=True):
            _draw_label(axes, spot, text)
        right, top = radius * panel / disc
        axes.set(xlim=(-right, right), ylim=(-top, top), aspect="equal")
        axes.set_axis_off()
    caption = f"Arrow i → j: the block prefers i to j, the darker the more. Radius {radius:.3g}." if merged else ""
    if max((len(spots) for spots, _ in merged), default=0) > MAX_ALL_ARROWS:
        caption += " Only the strongest win of each response is drawn."
    figure.supxlabel(caption, fontsize=7, color=GRAY, wrap=not key)
    _add_key(figure, key)
    figure.suptitle(title, wrap=True)
    return figure


@_styled
def plot_preference_heatmap(
    probabilities: Any,
    labels: Sequence[str] | None = None,
    ranking: Sequence[int] | None = None,
    title: str | None = None,
) -> Figure:
    """
    Heat map of `P(row is preferred to column)`: purple above 1/2, orange below.

    The colours differ in hue for all kinds of colour blindness, and say neither good nor bad, as green and red would.
    Up to twelve responses, the cells show the numbers too.

    Args:
        probabilities (`array`): Probabilities of all pairs, `(K, K)`, with `P[i, j] + P[j, i] = 1`.
        labels (`list[str]`, *optional*): Names of the responses, K; long ones are numbered, with a key below.
            Default: their indices.
        ranking (`list[int]`, *optional*): Indices of the responses, best first: the order of rows and columns.
            Default: as given.
        title (`str`, *optional*): Title of the figure.

    Returns:
        [`~matplotlib.figure.Figure`]: The matrix, best response first if there is a ranking.

    Raises:
        ValueError: If the matrix is not one of pairwise probabilities, or labels or ranking do not fit it.

    Example:

    ```python
    >>> from gpm_trl.plots import plot_preference_heatmap, save_figure
    >>> figure = plot_preference_heatmap([[0.5, 0.9], [0.1, 0.5]], labels=["Four", "Five"])
    >>> save_figure(figure, "matrix.png")  # doctest: +SKIP

    ```
    """
    matrix = np.asarray(probabilities, dtype=float)
    order = range(len(matrix)) if ranking is None else ranking
    size = len(matrix)
    if matrix.shape != (size, size) or not size or not np.abs(matrix + matrix.T - 1).max() <= 1e-3 or matrix.min() < 0:
        raise ValueError(
            f"`probabilities` has the shape {matrix.shape} and is {matrix}, but must be (K, K), in [0, 1], and "
            "P[i, j] + P[j, i] = 1: pass scores through `preference_probability`."
        )
    if sorted(order) != list(range(size)):
        raise ValueError(f"`ranking` is {list(order)}, but must hold each of 0 to {size - 1} once, best first.")
    names, key = _response_labels(labels, size, 20)
    names = [names[index] for index in order]
    matrix = matrix[np.ix_(order, order)]
    side = max(2.0, min(0.38 * size, 4.6), 0.16 * size) + 0.075 * max(map(len, names))  # inches
    figure = Picture(figsize=(side + 1.6, side + 0.6), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(matrix, cmap="PuOr", vmin=0, vmax=1)
    axes.set_xticks(range(size), names, rotation=0 if max(map(len, names)) <= 3 else 90)
    axes.set_yticks(range(size), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="column", ylabel="row")
    if size <= 12:
        for (row, column), value in np.ndenumerate(matrix):
            color = "white" if np.dot(image.cmap(value)[:3], (0.299, 0.587, 0.114)) < 0.5 else "black"
            axes.text(column, row, two_digits(value), ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, label="P(row is preferred to column)", ticks=[0, 0.25, 0.5, 0.75, 1])
    _add_key(figure, key)
    figure.suptitle(title, wrap=True)
    return figure


@_styled
def plot_reliability(reports: Mapping[str, Sequence[Mapping[str, float]]], title: str | None = None) -> Figure:
    """
    Reliability diagram: how often the response that a model prefers is the preferred one, against its confidence.

    Below the diagonal a model is too sure. The legend gives its expected calibration error, the mean of
    `|accuracy - confidence|` over comparisons; the strip below counts the comparisons of each bin. A band is the 95 %
    interval of the accuracies, where the bins have it.

    Args:
        reports (`dict[str, list[dict]]`): The bins of each model, by the model's name. A bin has the mean `confidence`
            in [0.5, 1], the `accuracy` in [0, 1], maybe its interval `accuracy_ci`, and the `count` of its
            comparisons; empty bins are left out.
        title (`str`, *optional*): Title of the figure.

    Returns:
        [`~matplotlib.figure.Figure`]: The diagram, a line for each model.

    Raises:
        ValueError: If there is no model, a model has no bins, or a value is out of its range.

    Example:

    ```python
    >>> from gpm_trl.evaluation import pairwise_metrics
    >>> from gpm_trl.plots import plot_reliability
    >>> metrics = pairwise_metrics([2.0, -1.0, 1.5], [1.0, 1.0, 1.0], clusters=["a", "b", "c"])
    >>> figure = plot_reliability({"a GPM": metrics["calibration"]})

    ```
    """
    if not reports or not all(reports.values()):
        raise ValueError("`reports` must have at least one model, and bins of each.")
    figure = Picture(figsize=(4, 4.4 + 0.2 * len(reports)), layout="constrained")
    axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    width = 0.02 / len(reports)
    for index, (name, bins) in enumerate(reports.items()):
        bins = sorted(bins, key=lambda entry: entry["confidence"])
        confidence, accuracy, count = np.array([[e["confidence"], e["accuracy"], e["count"]] for e in bins]).T
        if confidence[0] < 0.5 or confidence[-1] > 1 or accuracy.min() < 0 or accuracy.max() > 1:
            raise ValueError(
                f"The bins of {name!r} are {bins}, but a confidence is from 0.5 to 1 and an accuracy from 0 to 1."
            )
        ece = (count * np.abs(accuracy - confidence)).sum() / count.sum()
        look = {"color": f"C{index}", "marker": "os^Dv"[index % 5]}
        axes.plot(confidence, accuracy, label=f"{_cut_in_the_middle(name)} (ECE {ece:.3f})", clip_on=False, **look)
        if all("accuracy_ci" in entry for entry in bins):
            limits = np.array([entry["accuracy_ci"] for entry in bins])
            axes.fill_between(confidence, *limits.T, color=look["color"], alpha=0.15, linewidth=0)
        strip.bar(confidence + (index - (len(reports) - 1) / 2) * width, count, width, color=look["color"])
    axes.plot([0.5, 1], [0.5, 1], color=GRAY, linewidth=0.8, linestyle=":", zorder=0, label="perfectly calibrated")
    axes.set(ylabel="accuracy", xlim=(0.49, 1.01), ylim=(None, 1.02))
    figure.legend(handles=axes.get_lines(), loc="outside lower center")
    strip.set(xlabel="confidence", ylabel="count")
    figure.suptitle(title, wrap=True)
    return figure


def picture_format(path: str | Path) -> str:
    """`".png"` or `".svg"`, as which a picture is written to a path; raises `ValueError` for another ending."""
    kind = Path(path).suffix.lower()
    if kind not in (".png", ".svg"):
        raise ValueError(f"{str(path)!r} ends in {kind!r}, but pictures are written as '.png' or '.svg': rename it.")
    return kind


def save_figure(figure: Figure, path: str | Path) -> None:
    """
    Writes a figure as PNG (200 dpi) or SVG (with text as text), by the ending of the path; makes its directory. The
    same figure gives the same bytes.

    Raises:
        ValueError: If the path ends neither in `.png` nor in `.svg`.
    """
    path, kind = Path(path), picture_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with style.context(SETTINGS):
        figure.savefig(path, dpi=200, metadata={"Date": None} if kind == ".svg" else None)
