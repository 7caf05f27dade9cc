"""Whether a policy begins to exploit one block of a preference model, and what is done about it."""

from collections.abc import Callable

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..preference import block_advantages

__all__ = ["DriftMonitor"]

SHARES = ("weighted", "unweighted", "scores")
FLOOR = 1e-3  # added to each share, so that one of 0 has a logarithm


class DriftMonitor(TrainerCallback, ExportableState):
    r"""
    Drift monitor of GPRL: compares the share of each block in the variance within groups with that of the first
    generations, and counteracts where one has grown.

        alpha_l(t) = share of block l in generation t;   D(t) = KL(alpha(t) || alpha(0)), in nats
        D > threshold:  m_l is multiplied by `weight_factor` where alpha_l > alpha_l(0), and beta by `beta_factor`
        otherwise:      both go back by the same factors, m_l to 1 and beta to that of the arguments

    It is fed with what all processes have gathered, so that all act alike without a word.

    Overrides: `on_train_begin` (a resumed run takes the state from its checkpoint, also where transformers leaves
    callbacks as they are, its default) and `state` (what a checkpoint holds).

    Args:
        num_blocks (`int`): k, of the preference model.
        threshold, shares, baseline_steps, smoothing, weight_factor, min_weight, beta_factor, max_beta_factor: See
            [`GPRLConfig`], where their names begin with `drift_`.
    """

    def __init__(self, num_blocks: int, **settings):
        self.num_blocks = num_blocks
        self.settings = settings
        self.weights = [1.0] * num_blocks  # m
        self.beta_scale = 1.0  # the current beta / that of the arguments
        self.num_generations_seen = 0
        self.baseline = [0.0] * num_blocks  # alpha(0), once `baseline_steps` generations were seen
        self.shares = [0.0] * num_blocks  # alpha(t), smoothed

    def state(self) -> dict:
        names = ("weights", "beta_scale", "num_generations_seen", "baseline", "shares")
        attributes = {name: getattr(self, name) for name in names}
        return {"args": {"num_blocks": self.num_blocks, **self.settings}, "attributes": attributes}

    def on_train_begin(self, args, state, control, **kwargs):
        # Of a checkpoint that was written without a monitor, transformers would not find the entry that it renews.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        vars(self).update(saved["attributes"])
        if len(self.weights) != self.num_blocks:
            raise ValueError(
                f"The checkpoint is of a preference model with {len(self.weights)} blocks, but this one has "
                f"{self.num_blocks}: resume with the same."
            )

    def update(self, blocks: torch.Tensor, scales: torch.Tensor, log_metric: Callable[[str, float], None]) -> None:
        """
        Take a generation into account.

        Args:
            blocks, scales (`torch.Tensor`): The groups of all processes, see
                [`~gpm_trl.preference.block_advantages`].
            log_metric (`Callable`): Gets `drift/kl` (once there is a baseline), `drift/share_<l>` and
                `drift/weight_<l>`, l from 1.
        """
        shares = self._measured(blocks, scales)
        if shares is not None:
            self._take(shares)
        if self.num_generations_seen > self.settings["baseline_steps"]:
            log_metric("drift/kl", self.drift)
        for block in range(self.num_blocks):
            log_metric(f"drift/share_{block + 1}", self.shares[block])
            log_metric(f"drift/weight_{block + 1}", self.weights[block])

    @property
    def drift(self) -> float:
        """D(t)."""
        shares, baseline = torch.tensor([self.shares, self.baseline], dtype=torch.float64)
        return (shares * (shares / baseline).log()).sum().item()

    def _measured(self, blocks: torch.Tensor, scales: torch.Tensor) -> list[float] | None:
        """Shares of the blocks in a generation; `None` if its completions differ in none."""
        if self.settings["shares"] == "scores":
            parts = blocks.mean(-2) * scales.unsqueeze(-2)  # of s_hat, (G, K, k)
        else:
            weights = torch.tensor(self.weights) if self.settings["shares"] == "weighted" else None
            parts = block_advantages(blocks, scales, weights)
        powers = parts.double().square().mean((0, 1))
        if not powers.sum() > 0:
            return None
        shares = powers / powers.sum() + FLOOR
        return (shares / shares.sum()).tolist()

    def _take(self, shares: list[float]) -> None:
        seen, steps = self.num_generations_seen, self.settings["baseline_steps"]
        self.num_generations_seen += 1
        # The mean of the first ones, then an exponential one from there.
        keep = seen / (seen + 1) if seen < steps else self.settings["smoothing"]
        self.shares = [keep * old + (1 - keep) * new for old, new in zip(self.shares, shares, strict=True)]
        if seen < steps:
            self.baseline = self.shares
            return
        drifts = self.drift > self.settings["threshold"]
        factor, least = self.settings["weight_factor"], self.settings["min_weight"]
        grew = [share > before for share, before in zip(self.shares, self.baseline, strict=True)]
        self.weights = [
            max(weight * factor, least) if drifts and more else min(weight / factor, 1.0)
            for weight, more in zip(self.weights, grew, strict=True)
        ]
        factor, most = self.settings["beta_factor"], self.settings["max_beta_factor"]
        self.beta_scale = min(self.beta_scale * factor, most) if drifts else max(self.beta_scale / factor, 1.0)
