"""Training arguments of [`GPRLTrainer`]."""

import math
from dataclasses import dataclass, field

from trl import GRPOConfig

from ..gpm.config import SharedPrefixConfig, refuse_ignored
from ..gpo.config import IGNORED_IN_SAMPLING
from ..preference import check_choice
from .drift_monitor import SHARES


@dataclass
class GPRLConfig(SharedPrefixConfig, GRPOConfig):
    r"""
    Configuration of the [`GPRLTrainer`]: [`~trl.GRPOConfig`] with the drift monitor of GPRL, whose numbers are ours.

    Parameters:
        drift_threshold (`float`, *optional*, defaults to `0.1`):
            D(t), in nats, above which the [`DriftMonitor`] acts; `inf` only watches, `None` is no monitor.
        drift_shares (`str`, *optional*, defaults to `"scores"`):
            Of what a block has its share: `"scores"`, lambda_l u_l, before they are normalised; `"weighted"`, the
            advantages m_l lambda_l A_l; or `"unweighted"`, these without m. As advantages are normalised, the last two
            see only blocks that go flat.
        drift_baseline_steps (`int`, *optional*, defaults to `10`):
            Generations at the start whose mean is alpha(0).
        drift_smoothing (`float`, *optional*, defaults to `0.5`):
            Weight of the past in alpha(t), in [0, 1); 0 is none.
        drift_weight_speed, drift_beta_speed (`float`, *optional*, defaults to `1.1`):
            What m_l is divided by, and beta multiplied, in a generation with drift; 1 leaves it as it is.
        drift_limit (`float`, *optional*, defaults to `10.0`):
            How far either may go: m_l to 1 / limit, and beta to limit * beta.
        shared_prefix, max_tokens_per_batch:
            See [`~gpm_trl.gpm.config.SharedPrefixConfig`].
        reward_model_path (`str`, *optional*):
            The preference model, if `reward_funcs` is not given to the trainer.

    > [!NOTE]
    > These parameters have default values different from [`~trl.GRPOConfig`]:
    > `beta`: 0.04 instead of 0, TRL's former default, since the monitor needs a KL term; `scale_rewards`: `"none"`;
    > `bf16`: where the device has it.

    Raises:
        ValueError: For a value outside of its range, and for an option that would be ignored.
    """

    beta: float = field(default=0.04, metadata={"help": "Weight of the KL divergence from the reference."})
    scale_rewards: str = field(default="none", metadata={"help": "Of no use: blocks are normalised already."})
    drift_threshold: float | None = field(default=0.1, metadata={"help": "Drift above which the monitor acts, nats."})
    drift_shares: str = field(default="scores", metadata={"help": "Of what blocks have shares.", "choices": SHARES})
    drift_baseline_steps: int = field(default=10, metadata={"help": "First generations, whose shares are alpha(0)."})
    drift_smoothing: float = field(default=0.5, metadata={"help": "Weight of the past in the shares."})
    drift_weight_speed: float = field(default=1.1, metadata={"help": "What m_l is divided by."})
    drift_beta_speed: float = field(default=1.1, metadata={"help": "What beta is multiplied by."})
    drift_limit: float = field(default=10.0, metadata={"help": "How far they may go, as a factor."})
    reward_model_path: str | None = field(default=None, metadata={"help": "The preference model, by name."})

    def __post_init__(self):
        self.scale_rewards = self.scale_rewards or "none"  # False is another name for it
        for name, only in (("scale_rewards", "none"), ("multi_objective_aggregation", "sum_then_normalize")):
            if (value := getattr(self, name)) != only:
                raise ValueError(f"`{name}` is {value!r}, but each block is normalised already: leave it out.")
        refuse_ignored(self, IGNORED_IN_SAMPLING)
        super().__post_init__()
        if self.drift_threshold is None:
            refuse_ignored(self, {"there is no monitor without `drift_threshold`": "drift_[!t]*"})
            return
        check_choice("drift_shares", self.drift_shares, SHARES)
        if not self.drift_threshold > 0 or not 0 <= self.drift_smoothing < 1:
            given = f"`drift_threshold` is {self.drift_threshold} and `drift_smoothing` {self.drift_smoothing}"
            raise ValueError(f"{given}, but the first must be positive, or None for none, and the second in [0, 1).")
        for name in ("drift_baseline_steps", "drift_weight_speed", "drift_beta_speed", "drift_limit"):
            if not 1 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"`{name}` is {value}, but must be at least 1, and finite.")
        if self.beta == 0 and self.drift_beta_speed != 1:
            raise ValueError(f"`beta` is 0: for `drift_beta_speed` = {self.drift_beta_speed} to act, set it higher.")
