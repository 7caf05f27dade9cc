"""Training of policies on what a preference model says of their samples."""

from .config import GPOConfig
from .reward import PreferenceReward
from .shared_prefix import SharedPrefixPolicy
from .trainer import GPOTrainer

__all__ = ["GPOConfig", "GPOTrainer", "PreferenceReward", "SharedPrefixPolicy"]
