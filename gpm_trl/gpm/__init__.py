"""Training of preference models."""

from .config import GPMConfig
from .trainer import GPMTrainer

__all__ = ["GPMConfig", "GPMTrainer"]
