"""
Draws dsppo_game.png: SPPO, DSPPO and GPO in games of a few responses, played exactly, against the true preferences.

    python docs/images/dsppo_game.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from gpm_trl.games import von_neumann_winner
from gpm_trl.plots import STYLE
from gpm_trl.preference import dsppo_weights, group_signal

CYCLE = torch.tensor([[0.0, 1, -1], [-1, 0, 1], [1, -1, 0]], dtype=torch.float64)
# Rewards, and the log-odds of a cycle among the last three responses.
GAMES = {
    "a dominant response above a cycle": ([0.5, 0.0, 0.0, 0.0], 2.0),
    "a cycle with unequal rewards": ([0.5, 0.0, -0.5], 2.0),
    "a pure cycle": ([0.0, 0.0, 0.0], 2.0),
}
METHODS = {"SPPO": 0.0, "DSPPO, λ = 1": 1.0, "DSPPO, λ = -1": -1.0, "GPO": None}  # lambda
COLOURS = dict(zip(METHODS, ("#0072b2", "#d55e00", "#e69f00", "#009e73"), strict=True))
BETA, STEPS = 2.0, 300


def parts(rewards: list[float], strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The transitive and the cyclic part of the log-odds, `(n, n)` each."""
    reward = torch.tensor(rewards, dtype=torch.float64)
    cyclic = torch.zeros(len(reward), len(reward), dtype=torch.float64)
    cyclic[-3:, -3:] = strength * CYCLE
    return reward[:, None] - reward[None, :], cyclic


def self_play(
    transitive: torch.Tensor, cyclic: torch.Tensor, strength: float | None, beta: float, steps: int
) -> torch.Tensor:
    """
    Policies pi_1, pi_2, ..., `(steps + 1, n)`, each the exact minimiser of the last one's regression, log Z included:
    `pi_{t+1} ~ pi_t exp(signal_t / beta)`, with the signal of GPO where `strength` is None, else of DSPPO.
    """
    policy = torch.arange(len(transitive), 0, -1, dtype=torch.float64)
    policies = [policy / policy.sum()]
    for iteration in range(1, steps + 1):
        weights = (1.0, 1.0) if strength is None else dsppo_weights(iteration, strength)
        log_odds = weights[0] * transitive + weights[1] * cyclic
        signal = expected_signal(log_odds, policies[-1], "gpo" if strength is None else "dsppo")
        policies.append((policies[-1].log() + signal / beta).softmax(0))
    return torch.stack(policies)


def expected_signal(log_odds: torch.Tensor, policy: torch.Tensor, loss_type: str) -> torch.Tensor:
    """`E[signal]` of each response against opponents from the policy: a group of two has half of one opponent's."""
    n = len(log_odds)
    pairs = torch.zeros(n, n, 2, 2, dtype=log_odds.dtype)
    pairs[..., 0, 1], pairs[..., 1, 0] = log_odds, -log_odds
    return (2 * group_signal(pairs, loss_type)[..., 0]) @ policy


def duality_gaps(log_odds: torch.Tensor, policies: torch.Tensor) -> torch.Tensor:
    """What the best responses to each policy gain on both sides, of the true preferences, `(steps + 1,)`."""
    won = policies @ torch.sigmoid(log_odds).T  # [t, i] = P(y_i > pi_t)
    return 2 * (won.amax(-1) - 0.5)


def distances(log_odds: torch.Tensor, policies: torch.Tensor) -> torch.Tensor:
    """Total variation to the von Neumann winner, `(steps + 1,)`."""
    winner = torch.from_numpy(von_neumann_winner(torch.sigmoid(log_odds)))
    return (policies - winner).abs().sum(-1) / 2


def play(game: str, method: str, steps: int = STEPS, beta: float = BETA) -> dict[str, np.ndarray]:
    transitive, cyclic = parts(*GAMES[game])
    policies = self_play(transitive, cyclic, METHODS[method], beta, steps)
    averages = policies.cumsum(0) / torch.arange(1, len(policies) + 1)[:, None]
    log_odds = transitive + cyclic
    return {
        "gap": duality_gaps(log_odds, policies).numpy(),
        "distance": distances(log_odds, policies).numpy(),
        "gap of the average": duality_gaps(log_odds, averages).numpy(),
    }


def main() -> None:
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            2, len(GAMES), figsize=(10, 5.6), sharex=True, sharey="row", layout="constrained"
        )
        for column, game in zip(panels.T, GAMES, strict=True):
            for method, colour in COLOURS.items():
                measured, times = play(game, method), np.arange(1, STEPS + 2)
                column[0].plot(times, measured["gap"], color=colour, label=method, linewidth=1.4)
                column[0].plot(times, measured["gap of the average"], color=colour, linewidth=0.9, linestyle=":")
                column[1].plot(times, measured["distance"], color=colour, linewidth=1.4)
            column[0].set(title=game)
            column[1].set(xlabel="iteration t")
        panels[0, 0].set(xscale="log", yscale="log", ylim=(1e-3, 1), xlim=(1, STEPS), ylabel="duality gap")
        panels[1, 0].set(yscale="log", ylim=(1e-3, 1), ylabel="distance to the von Neumann winner")
        for axis in (panels[0, 0].xaxis, panels[0, 0].yaxis, panels[1, 0].yaxis):
            axis.set_major_formatter("{x:g}")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS))
        figure.suptitle("Lines: the policy of iteration t. Dots: the mean of the policies up to t", fontsize=9)
        figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
