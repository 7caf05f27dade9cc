"""
General preference models for TRL: cyclic preferences, with one embedding a response.

Importing the package registers [`GPMForPreference`] with [`~transformers.AutoModel`], and the `"preference-ranking"`
pipeline. Trainers and the scorer are imported when first used, since trl and datasets are slow to import.
"""

import importlib
from importlib.metadata import version

from .models import GPMForPreference, GPMModelConfig, GPMOutput
from .pipeline import PreferenceRankingPipeline
from .preference import (
    mean_preference,
    preference_cross_entropy,
    preference_matrix,
    preference_probability,
    preference_regression,
    preference_score,
)

__version__ = version("gpm-trl")

_LAZY = {
    "DataCollatorForGroups": "data",
    "GPMConfig": "gpm",
    "GPMTrainer": "gpm",
    "GPOConfig": "gpo",
    "GPOTrainer": "gpo",
    "GPRLConfig": "gprl",
    "GPRLTrainer": "gprl",
    "PreferenceReward": "gpo",
    "PreferenceScorer": "scorer",
    "Ranking": "scorer",
    "Renderer": "data",
    "SharedPrefixPolicy": "gpo",
    "letter_cycles": "data",
    "prepare_dataset": "data",
    "rank_scores": "scorer",
    "ultrafeedback_cycles": "data",
}

__all__ = [
    "DataCollatorForGroups",
    "GPMConfig",
    "GPMForPreference",
    "GPMModelConfig",
    "GPMOutput",
    "GPMTrainer",
    "GPOConfig",
    "GPOTrainer",
    "GPRLConfig",
    "GPRLTrainer",
    "PreferenceRankingPipeline",
    "PreferenceReward",
    "PreferenceScorer",
    "Ranking",
    "Renderer",
    "SharedPrefixPolicy",
    "letter_cycles",
    "mean_preference",
    "preference_cross_entropy",
    "preference_matrix",
    "preference_probability",
    "preference_regression",
    "preference_score",
    "prepare_dataset",
    "rank_scores",
    "ultrafeedback_cycles",
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
