"""Training arguments and trainers. The only rooms that import trl are this one and `cli`."""

from .gpm_config import GPMConfig
from .gpm_trainer import GPMTrainer
from .gpo_config import GPOConfig
from .gpo_trainer import GPOTrainer
from .rewards import PreferenceReward

__all__ = ["GPMConfig", "GPMTrainer", "GPOConfig", "GPOTrainer", "PreferenceReward"]
