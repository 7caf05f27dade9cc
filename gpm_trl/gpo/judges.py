"""What GPOTrainer learns from: preference models, reward functions and judges, all as log-odds within a group."""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import nn
from trl.trainer.utils import get_callable_name, is_async_callable

from ..preference import mean_preference
from .reward import PreferenceReward


class Judge:
    """
    A reward function that `GRPOTrainer` can call, which keeps the log-odds between the completions of each group.

    Args:
        function ([`PreferenceReward`] or `Callable`): A preference model; or a function of TRL's kind,
            `(prompts, completions, completion_ids, **columns)`, that gives a number for each completion, or a K x K
            matrix of log-odds for each prompt.
        is_own (`bool`, defaults to `False`): Whether the trainer made the function, and may divide its model.
    """

    def __init__(self, function: PreferenceReward | Callable, is_own: bool = False):
        self.function = function
        self.is_own = is_own
        self.num_generations: int | None = None
        self.log_odds: torch.Tensor | None = None
        self.__name__ = get_callable_name(function)

    def shard(self, accelerator: Accelerator) -> None:
        """Divide a preference model among the ranks as the policy is."""
        if self.is_own and isinstance(self.function, PreferenceReward):
            self.function.shard(accelerator)

    def __call__(self, prompts: list, completions: list, **kwargs) -> Sequence[float | None]:
        """
        A number for each of this process's completions; `log_odds (G, K, K)` then are those of all processes' groups,
        or `None` where only rewards were given.
        """
        self.log_odds = None
        if isinstance(self.function, PreferenceReward):
            self.log_odds = self.function.log_odds(prompts, completions, self.num_generations, **kwargs)
        else:
            output = self.function(prompts=prompts, completions=completions, **kwargs)
            if output is None:
                raise ValueError(
                    f"{self.__name__} returned nothing: return a number for each completion, or a matrix for each "
                    "prompt."
                )
            if not _are_matrices(output):
                return output
            self.log_odds = self._gathered(output, len(completions))
        return local_part(mean_preference(self.log_odds).flatten(), len(completions)).tolist()

    def _gathered(self, matrices: Any, num_completions: int) -> torch.Tensor:
        size = self.num_generations
        if num_completions % size:
            raise ValueError(
                f"{self.__name__} gives a matrix a prompt, but a process has {num_completions} completions, which is "
                f"not a multiple of `num_generations` = {size}: choose a batch size that makes it one."
            )
        matrices = torch.stack([torch.as_tensor(matrix, dtype=torch.float32) for matrix in matrices])
        if matrices.shape != (num_completions // size, size, size):
            raise ValueError(
                f"{self.__name__} returned matrices of the shape {tuple(matrices.shape)}, but there are "
                f"{num_completions // size} prompts with {size} completions: return a {size} x {size} matrix for each."
            )
        _check_antisymmetric(matrices, f"{self.__name__} returned a matrix that")
        return torch.cat(gather_object([matrices]))


class GivenScores(Judge):
    """The column `scores` of the dataset: for each prompt its K x K log-odds, or K rewards."""

    __name__ = "scores"

    def __init__(self):
        self.is_own = False
        self.num_generations = None
        self.log_odds = None

    def __call__(self, prompts: list, completions: list, scores: list, **kwargs) -> list[float]:
        size, count = self.num_generations, len(completions)
        first = PartialState().process_index * count
        # A row is there for each of its completions: it counts where the first of them is.
        own = [torch.tensor(_with_nan(row)) for index, row in enumerate(scores, start=first) if index % size == 0]
        scores = torch.stack(gather_object(own)).float()
        if scores.shape[1:] not in ((size,), (size, size)):
            raise ValueError(
                f"`scores` has the shape {tuple(scores.shape[1:])} for a prompt with {size} completions: give K "
                "rewards or K x K log-odds."
            )
        if scores.dim() == 3:
            _check_antisymmetric(scores, "`scores` has a matrix that")
            self.log_odds, values = scores, mean_preference(scores)
        else:
            self.log_odds, values = reward_log_odds(scores), scores
        return local_part(values.flatten(), count).tolist()


def _with_nan(values: Any) -> Any:
    """A reward, rewards or rows of a matrix, with NaN for what is missing."""
    if isinstance(values, list):
        return [_with_nan(value) for value in values]
    return math.nan if values is None else values


def _check_antisymmetric(matrices: torch.Tensor, what: str) -> None:
    error = (matrices + matrices.transpose(-1, -2)).abs().max().item()
    if not error < 1e-3:
        raise ValueError(
            f"{what} is not antisymmetric (by {error:.3g}): entry [i, j] is the log-odds that completion i is "
            "preferred to j, and minus entry [j, i]."
        )


def _are_matrices(output: Sequence) -> bool:
    return len(output) > 0 and np.ndim(output[0]) > 0


def local_part(values: torch.Tensor, size: int) -> torch.Tensor:
    """This process's `size` of the values of all processes."""
    start = PartialState().process_index * size
    return values[start : start + size]


def reward_log_odds(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards of a Bradley-Terry model `(G, K)` as log-odds `r_i - r_j`, `(G, K, K)`; 0 beside a reward of NaN."""
    return (rewards.unsqueeze(-1) - rewards.unsqueeze(-2)).nan_to_num(0.0)


def penalise(log_odds: torch.Tensor, flagged: torch.Tensor, penalty: float) -> torch.Tensor:
    """Take a penalty off the log-odds `(G, K, K)` of flagged completions `(G, K)` over the others."""
    return log_odds - penalty * (flagged.float().unsqueeze(-1) - flagged.float().unsqueeze(-2))


def make_judges(reward_funcs: Any, processing_classes: Any) -> list[Callable]:
    """Reward functions that the parent calls, one for each of `reward_funcs`."""
    if reward_funcs is None:
        raise ValueError("`reward_funcs` is missing: pass a preference model, by name or directory, or a function.")
    functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    classes = processing_classes if isinstance(processing_classes, list) else [processing_classes] * len(functions)
    if len(classes) != len(functions):
        raise ValueError(
            f"There are {len(functions)} `reward_funcs` and {len(classes)} `reward_processing_classes`: give one "
            "for each, or none."
        )
    judges = []
    for given, processing_class in zip(functions, classes, strict=True):
        function = given
        if isinstance(given, PreferenceReward) and given.signal != "score":
            raise ValueError(
                f"`signal` = {given.signal!r} of a PreferenceReward would be ignored: GPOTrainer takes its log-odds, "
                'and `loss_type="sppo"` makes probabilities of them. Leave it out.'
            )
        if isinstance(function, (str, os.PathLike)):
            try:
                function = PreferenceReward(function, processing_class)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{str(function)!r} in `reward_funcs` could not be loaded: give the directory or Hub id of a "
                    f"general preference model, or of a sequence classifier with one label. {error}"
                ) from error
        elif isinstance(function, nn.Module):
            function = PreferenceReward(function, processing_class)
        elif not callable(function):
            raise TypeError(
                f"A reward function is a {type(function).__name__}: pass a model, the name of one, or a function."
            )
        judges.append(function if is_async_callable(function) else Judge(function, is_own=function is not given))
    return judges
