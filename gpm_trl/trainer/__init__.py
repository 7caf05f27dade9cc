"""Training arguments and trainers. The only rooms that import trl are this one and `cli`."""

from .gpm_config import GPMConfig
from .gpm_trainer import GPMTrainer

__all__ = ["GPMConfig", "GPMTrainer"]
