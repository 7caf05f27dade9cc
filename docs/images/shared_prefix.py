"""
Draws shared_prefix.png: padded rows, the packed row, and which of its tokens see which, as the layout says.

    python docs/images/shared_prefix.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

from gpm_trl.models.shared_prefix import SharedPrefixLayout
from gpm_trl.plots import STYLE

GROUPS = [("P", 3, [("a", 2), ("b", 3)]), ("Q", 2, [("c", 1), ("d", 2)])]
COLOURS = {
    "P": "#7aa6d6",
    "a": "#66ccee",
    "b": "#88ccaa",
    "Q": "#cc88aa",
    "c": "#ee8866",
    "d": "#eecc66",
    "": "#eeeeee",
}


def draw_row(axes: plt.Axes, letters: list[str], x: float, y: float) -> None:
    for index, letter in enumerate(letters):
        axes.add_patch(Rectangle((x + index, y), 1, 1, facecolor=COLOURS[letter], edgecolor="white"))
        axes.text(x + index + 0.5, y + 0.5, letter, ha="center", va="center", color="black", fontsize=9)


def main() -> None:
    layout, packed = SharedPrefixLayout.pack(
        [
            ([0] * prompt, [[index] * length for index, (_, length) in enumerate(responses)])
            for _, prompt, responses in GROUPS
        ]
    )
    letters = [
        letter * length for prompt, size, responses in GROUPS for letter, length in [(prompt, size), *responses]
    ]
    letters = list("".join(letters))
    size = len(packed)
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), width_ratios=(1, 1.15))
        rows = [prompt * count + name * length for prompt, count, responses in GROUPS for name, length in responses]
        width = max(map(len, rows))
        for index, row in enumerate(rows):
            draw_row(left, [*row, *[""] * (width - len(row))], 0, -index * 1.25)
        left.text(0, 1.4, f"padded: {len(rows)} rows of {width}, {len(rows) * width} tokens", fontsize=10)
        draw_row(left, letters, 0, -7.5)
        left.text(0, -6.1, f"packed: one row, {size} tokens", fontsize=10)
        for index, position in enumerate(layout.positions):
            left.text(index + 0.5, -8.0, str(position), ha="center", va="center", fontsize=8, color="#666666")
        left.text(0, -9.0, "positions, as in the padded rows", fontsize=8, color="#666666")
        left.set(xlim=(-0.2, size + 0.2), ylim=(-9.4, 2.2), aspect="equal")

        for part in layout.segments:
            keys = [*range(part.prefix_start, part.prefix_end), *range(part.start, part.end)]
            for query in range(part.start, part.end):
                for key in keys:
                    if key <= query:
                        right.add_patch(
                            Rectangle(
                                (key, size - 1 - query), 1, 1, facecolor=COLOURS[letters[key]], edgecolor="white"
                            )
                        )
        for index, letter in enumerate(letters):
            right.text(index + 0.5, size + 0.5, letter, ha="center", va="center", fontsize=9)
            right.text(-0.6, size - 0.5 - index, letter, ha="center", va="center", fontsize=9)
        right.text(0, -0.9, "a token (row) sees its prompt and, causally, its own response (columns)", fontsize=8)
        right.set(xlim=(-1.2, size), ylim=(-1.3, size + 1.2), aspect="equal")
        for axes in (left, right):
            axes.axis("off")
        figure.savefig(Path(__file__).with_suffix(".png"), dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
