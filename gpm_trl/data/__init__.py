"""Texts to tokens, rows to groups, groups to batches."""

from .collator import DataCollatorForGroups
from .cyclic import letter_cycles, ultrafeedback_cycles
from .groups import prepare_dataset
from .renderer import Renderer

__all__ = ["DataCollatorForGroups", "Renderer", "letter_cycles", "prepare_dataset", "ultrafeedback_cycles"]
