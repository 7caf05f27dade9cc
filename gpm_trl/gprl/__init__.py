"""Reinforcement learning of policies on a preference model's blocks."""

from .config import GPRLConfig
from .drift_monitor import DriftMonitor
from .trainer import GPRLTrainer

__all__ = ["DriftMonitor", "GPRLConfig", "GPRLTrainer"]
