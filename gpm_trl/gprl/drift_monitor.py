"""Whether a policy begins to exploit one block of a preference model, and what is done about it."""

from collections.abc import Callable

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..preference import block_advantages

SHARES = ("scores", "weighted", "unweighted")
FLOOR = 1e-3  # added to each share, so that one of 0 has a logarithm


class DriftMonitor(TrainerCallback, ExportableState):
    r"""
    Drift monitor of GPRL: compares the share of each block in the variance within groups with that of the first
    generations, and counteracts where one has grown.

        D(t) = KL(alpha(t) || alpha(0)), in nats, of the shares alpha_l of the k blocks in generation t
        D > threshold: m_l is divided by `weight_speed` where alpha_l has grown, and beta multiplied by `beta_speed`
        otherwise m_l returns to 1, and beta to the arguments', by the same factors; m_l of a block whose share has not
        grown returns also while D > threshold

    It is fed with what all processes have gathered, so that all act alike. Overrides: `on_train_begin` (a resumed run
    goes on from its checkpoint, also where transformers does not restore callbacks, its default) and `state`.
    Args: `num_blocks`, k; `settings`, the options of [`GPRLConfig`] that begin with `drift_`, without that.
    """

    def __init__(self, num_blocks: int, **settings):
        self.settings = settings
        self.penalties = [1.0] * num_blocks  # 1 / m
        self.beta_scale = 1.0  # beta / that of the arguments
        self.num_seen = 0  # generations
        self.shares = self.baseline = [0.0] * num_blocks  # alpha(t), and alpha(0) once there were enough of them

    def state(self) -> dict:
        attributes = {name: value for name, value in vars(self).items() if name != "settings"}
        return {"args": {"num_blocks": len(self.shares), **self.settings}, "attributes": attributes}

    def on_train_begin(self, args, state, control, **kwargs):
        # A checkpoint that was saved without a monitor has no entry, which the Trainer looks for when it saves.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        if len(saved["shares"]) != len(self.shares):
            blocks = f"{len(saved['shares'])} blocks, and this one {len(self.shares)}"
            raise ValueError(f"The run that is resumed has a preference model of {blocks}: resume with the same.")
        vars(self).update(saved)

    @property
    def weights(self) -> torch.Tensor:  # m, (k,)
        return 1 / torch.tensor(self.penalties)

    @property
    def drift(self) -> float:  # D(t)
        shares, baseline = torch.tensor([self.shares, self.baseline], dtype=torch.float64)
        return (shares * (shares / baseline).log()).sum().item()

    def update(self, blocks: torch.Tensor, scales: torch.Tensor, log_metric: Callable[[str, float], None]) -> None:
        """
        Take a generation into account: groups as of [`~gpm_trl.preference.block_advantages`]. `log_metric` gets
        `drift/kl`, once there is a baseline, and `drift/share_<l>` and `drift/weight_<l>`, l from 1.
        """
        if self.settings["shares"] == "scores":
            parts = blocks.mean(-2) * scales.unsqueeze(-2)  # of s_hat, (G, K, k)
        else:
            parts = block_advantages(blocks, scales, self.weights if self.settings["shares"] == "weighted" else None)
        powers = parts.double().square().mean((0, 1))
        if powers.sum() > 0:  # else completions differ in nothing, which says nothing
            self._take(powers / powers.sum() + FLOOR)
        if self.num_seen > self.settings["baseline_steps"]:
            log_metric("drift/kl", self.drift)
        for number, (share, weight) in enumerate(zip(self.shares, self.weights.tolist(), strict=True), start=1):
            log_metric(f"drift/share_{number}", share)
            log_metric(f"drift/weight_{number}", weight)

    def _take(self, shares: torch.Tensor) -> None:
        is_first = self.num_seen < self.settings["baseline_steps"]
        # The mean of the first, then an exponential one from there.
        keep = self.num_seen / (self.num_seen + 1) if is_first else self.settings["smoothing"]
        before, now = torch.tensor(self.shares, dtype=torch.float64), shares / shares.sum()
        self.shares = (keep * before + (1 - keep) * now).tolist()
        self.num_seen += 1
        if is_first:
            self.baseline = self.shares
            return

        def moved(factor: float, speed: float, away: bool) -> float:
            return min(factor * speed, self.settings["limit"]) if away else max(factor / speed, 1.0)

        drifts, speed = self.drift > self.settings["threshold"], self.settings["weight_speed"]
        compared = zip(self.penalties, self.shares, self.baseline, strict=True)
        self.penalties = [moved(factor, speed, drifts and share > before) for factor, share, before in compared]
        self.beta_scale = moved(self.beta_scale, self.settings["beta_speed"], drifts)
