"""The pictures of docs/concepts.md, drawn by the package from embeddings by hand: `python docs/images/concepts.py`."""

from pathlib import Path

import numpy as np
import torch

from gpm_trl.games import hodge_decomposition, von_neumann_winner
from gpm_trl.plots import plot_embedding_discs, plot_preference_heatmap, save_figure
from gpm_trl.preference import preference_matrix, preference_probability

HERE = Path(__file__).parent
TAU = 0.5


def at(*degrees: float) -> np.ndarray:
    """Points on the unit circle, `(K, 2)`."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def main() -> None:
    cycle = at(0, 120, 240)
    save_figure(plot_embedding_discs(cycle, labels="ABC", title="A ≻ B ≻ C ≻ A"), HERE / "concept_cycle.png")

    # Two planes: a cycle in the first; in the second D is a quarter turn behind the others, so it beats them all.
    two = np.concatenate([np.concatenate([cycle, [[0.0, 0.0]]]), at(90, 90, 90, 0)], axis=1)
    save_figure(plot_embedding_discs(two, [0.4, 0.6], "ABCD", "λ(x) = (0.4, 0.6)"), HERE / "concept_gate.png")

    rewards = np.column_stack([[0.5, 0.2, -0.1], np.ones(3), cycle])
    save_figure(plot_embedding_discs(rewards, labels="ABC", title="HRC 2+1", reward_dim=1), HERE / "concept_hrc.png")

    scores = preference_matrix(torch.tensor(rewards), torch.ones(2, dtype=torch.double))
    winner = von_neumann_winner(preference_probability(scores, TAU).numpy())
    _, transitive, cyclic = hodge_decomposition(scores.numpy())
    for name, part, title in (
        ("matrix", scores.numpy(), f"P; winner {', '.join(f'{share:.2f}' for share in winner)}"),
        ("transitive", transitive, "the transitive part alone"),
        ("cyclic", cyclic, "the cyclic part alone"),
    ):
        probabilities = preference_probability(torch.tensor(part), TAU)
        save_figure(plot_preference_heatmap(probabilities, "ABC", title=title), HERE / f"concept_{name}.png")


if __name__ == "__main__":
    main()
