"""Training arguments of [`GPRLTrainer`]."""

import math
from dataclasses import dataclass, field

from transformers.utils import is_torch_bf16_gpu_available
from trl import GRPOConfig

from ..gpm.config import refuse_ignored
from ..gpo.config import IGNORED_IN_SAMPLING
from ..preference import check_choice
from .drift_monitor import SHARES


@dataclass
class GPRLConfig(GRPOConfig):
    r"""
    Configuration of the [`GPRLTrainer`]: [`~trl.GRPOConfig`] with the drift monitor of GPRL.

    Only new fields, and fields with another default, are listed. The paper's notes that we have do not give the
    numbers of the monitor: these are ours.

    Parameters:
        > Parameters that control the drift monitor, see [`DriftMonitor`]

        drift_threshold (`float`, *optional*, defaults to `0.1`):
            D(t), in nats, above which the monitor acts; `inf` only watches, `None` is no monitor.
        drift_shares (`str`, *optional*, defaults to `"scores"`):
            What a block's share is in: `"weighted"`, the advantages `m_l lambda_l A_l`; `"unweighted"`, these without
            m; or `"scores"`, what they are before they are normalised, `lambda_l u_l`.
        drift_baseline_steps (`int`, *optional*, defaults to `10`):
            Generations at the start whose mean is alpha(0).
        drift_smoothing (`float`, *optional*, defaults to `0.5`):
            Weight of the past in alpha(t), in [0, 1); 0 is none.
        drift_weight_factor, drift_min_weight (`float`, *optional*, defaults to `0.9` and `0.1`):
            What m_l is multiplied by in a generation, in (0, 1], and the least it becomes.
        drift_beta_factor, drift_max_beta_factor (`float`, *optional*, defaults to `1.1` and `10.0`):
            What beta is multiplied by in a generation, at least 1, and the most that this makes of it.

        > Other parameters

        reward_model_path (`str`, *optional*):
            The preference model, if `reward_funcs` is not given to the trainer.

    > [!NOTE]
    > These parameters have default values different from [`~trl.GRPOConfig`]:
    > - `beta`: 0.04 instead of 0, TRL's default before: without a KL term the monitor has no trust region to tighten.
    > - `max_completion_length`: 512 instead of 256, the paper's, whose K = 8 and three epochs are the parent's.
    > - `scale_rewards`: `"none"`, since each block is normalised already.
    > - `bf16`: where the device has it, instead of everywhere.

    Raises:
        ValueError: If a value is outside of its range, or an option is set that would be ignored.

    Example:

    ```python
    >>> from gpm_trl import GPRLConfig
    >>> args = GPRLConfig(output_dir="llama-gprl", use_cpu=True)
    >>> args.num_generations, args.beta, args.drift_threshold
    (8, 0.04, 0.1)

    ```
    """

    beta: float = field(default=0.04, metadata={"help": "Weight of the KL divergence from the reference."})
    max_completion_length: int | None = field(default=512, metadata={"help": "Most tokens of each (paper: 512)."})
    scale_rewards: str = field(default="none", metadata={"help": "Of no use: blocks are normalised already."})
    drift_threshold: float | None = field(default=0.1, metadata={"help": "Drift above which the monitor acts, nats."})
    drift_shares: str = field(
        default="scores", metadata={"help": "What the shares of blocks are in.", "choices": list(SHARES)}
    )
    drift_baseline_steps: int = field(default=10, metadata={"help": "First generations, whose shares are alpha(0)."})
    drift_smoothing: float = field(default=0.5, metadata={"help": "Weight of the past in the shares."})
    drift_weight_factor: float = field(default=0.9, metadata={"help": "What m_l is multiplied by."})
    drift_min_weight: float = field(default=0.1, metadata={"help": "The least m_l."})
    drift_beta_factor: float = field(default=1.1, metadata={"help": "What beta is multiplied by."})
    drift_max_beta_factor: float = field(default=10.0, metadata={"help": "The most beta, over that of the start."})
    reward_model_path: str | None = field(default=None, metadata={"help": "The preference model, by name."})

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        if self.scale_rewards not in ("none", False):
            raise ValueError(
                f"`scale_rewards` is {self.scale_rewards!r}, but each block is normalised in its group already, and "
                'scaling the sum would undo the gate and the monitor: leave it out, or use "none".'
            )
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"`multi_objective_aggregation` is {self.multi_objective_aggregation!r}, which would normalise a sum "
                "of blocks that are normalised already: leave it out."
            )
        refuse_ignored(self, IGNORED_IN_SAMPLING)
        self._check_drift()
        super().__post_init__()

    def _check_drift(self) -> None:
        if self.drift_threshold is None:
            refuse_ignored(self, {"there is no monitor without `drift_threshold`": "drift_[!t]*"})
            return
        check_choice("drift_shares", self.drift_shares, SHARES)
        most = self.drift_max_beta_factor
        for name, fits, rule in (
            ("drift_threshold", self.drift_threshold > 0, "positive, or None for no monitor"),
            ("drift_baseline_steps", self.drift_baseline_steps >= 1, "at least 1"),
            ("drift_smoothing", 0 <= self.drift_smoothing < 1, "in [0, 1)"),
            ("drift_weight_factor", 0 < self.drift_weight_factor <= 1, "in (0, 1]; 1 leaves m as it is"),
            ("drift_min_weight", 0 < self.drift_min_weight <= 1, "in (0, 1]"),
            ("drift_beta_factor", 1 <= self.drift_beta_factor < math.inf, "at least 1, which leaves beta as it is"),
            ("drift_max_beta_factor", 1 <= most < math.inf, "at least 1 and finite"),
        ):
            if not fits:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be {rule}.")
        if self.beta == 0 and self.drift_beta_factor != 1:
            raise ValueError(
                f"`beta` is 0, so there is no KL divergence that `drift_beta_factor` = {self.drift_beta_factor} could "
                "weigh more: set the latter to 1, or `beta`."
            )
