"""What a policy learns from: preference models, reward functions and judges, all as log-odds within a group."""

import asyncio
import functools
import inspect
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import get_callable_name, start_event_loop_in_daemon

from ..preference import mean_preference
from ..scorer import is_sharded
from .reward import PreferenceReward, template_columns


class Judges:
    r"""
    One or several judges of completions, whose log-odds are added up, then cut to `score_clip`; then a completion
    without an EOS loses `missing_eos_penalty` to each that has one.

    Args:
        functions (list of [`PreferenceReward`] or `Callable`): Preference models; or functions of TRL's kind,
            `(prompts, completions, completion_ids, **columns)`, that give a number for each completion (`None`: none),
            or a K x K matrix of log-odds for each prompt, of K = `num_generations`, another column.
        weights (list of `float`, *optional*): Of the judges; 1 by default.
        score_clip, missing_eos_penalty (`float`, *optional*): See [`GPOConfig`].
    """

    def __init__(
        self,
        functions: list[Callable],
        weights: list[float] | None = None,
        score_clip: float | None = None,
        missing_eos_penalty: float | None = None,
    ):
        _check_number("reward_weights", weights, functions)
        self.functions = functions
        names = [get_callable_name(judge) for judge in functions]  # the later of equal ones get a number
        self.names = [f"{name}_{again}" if (again := names[:i].count(name)) else name for i, name in enumerate(names)]
        self.weights = weights or [1.0] * len(functions)
        self.score_clip = score_clip
        self.missing_eos_penalty = missing_eos_penalty

    def log_odds(
        self,
        prompts: list,
        completions: list,
        size: int,
        ended: list[bool],
        part_weights: tuple[float, float] = (1.0, 1.0),
        /,  # columns may have these names
        *,
        log_metric: Callable[[str, float], None],
        log_extra: Callable[[str, list], None],
        **columns,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Log-odds between the completions of each group, and which completions were scored. Every process must call it.

        Args:
            prompts, completions, columns: This process's, as TRL gives them to reward functions.
            size (`int`): K: groups are each K consecutive completions of all processes, and may straddle these.
            ended (list of `bool`): Whether each of this process's completions has an EOS token.
            part_weights (`tuple[float, float]`): See [`PreferenceReward.log_odds`]; functions have no such parts.
            log_metric, log_extra (`Callable`): TRL's; they get the mean and standard deviation of what each judge
                gave, and what it gave for each of this process's completions.

        Returns:
            `(G, K, K)`, antisymmetric, and a mask `(G, K)`, of the G groups of all processes, on the CPU.
        """
        logs = {"log_metric": log_metric, "log_extra": log_extra}
        total, scored = 0.0, False
        for judge, name, weight in zip(self.functions, self.names, self.weights, strict=True):
            matrices, values = _ask(judge, prompts, completions, size, part_weights, {**columns, **logs})
            total = total + weight * matrices
            scored = scored | ~values.isnan()
            given = values[~values.isnan()]
            log_metric(f"rewards/{name}/mean", given.mean().item())
            log_metric(f"rewards/{name}/std", given.std().item() if len(given) > 1 else math.nan)
            log_extra(name, local_part(values.flatten(), len(completions)).tolist())
        if self.score_clip is not None:
            total = total.clamp(-self.score_clip, self.score_clip)
        if self.missing_eos_penalty is not None:
            flagged = 1 - torch.tensor(gather_object(ended)).float().view(-1, size)
            total = total - self.missing_eos_penalty * (flagged.unsqueeze(-1) - flagged.unsqueeze(-2))
        # Nothing is said about a completion without a reward, so it ties with all others.
        return total.masked_fill(~(scored.unsqueeze(-1) & scored.unsqueeze(-2)), 0.0), scored


def _ask(
    judge: Callable,
    prompts: list,
    completions: list,
    size: int,
    part_weights: tuple[float, float],
    columns: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """A judge's log-odds `(G, K, K)`, and its rewards or mean log-odds `(G, K)`, of the groups of all processes."""
    if isinstance(judge, PreferenceReward):
        matrices = judge.log_odds(prompts, completions, size, part_weights, **template_columns(columns))
        return matrices, mean_preference(matrices)
    values = _call(judge, prompts, completions, size, columns)
    if values.dim() == 1:
        rewards = values.view(-1, size)
        # r_i - r_j, as of a Bradley-Terry model; 0 beside a reward that is missing.
        return (rewards.unsqueeze(-1) - rewards.unsqueeze(-2)).nan_to_num(0.0), rewards
    matrices = values.view(-1, size, size)
    _check_antisymmetric(matrices, get_callable_name(judge))
    return matrices, mean_preference(matrices)


def _check_antisymmetric(matrices: torch.Tensor, name: str) -> None:
    error = (matrices + matrices.transpose(-1, -2)).abs().max().item()
    if not error < 1e-3:
        raise ValueError(
            f"{name} has a matrix that is not antisymmetric (by {error:.3g}): entry [i, j] is the log-odds that "
            "completion i is preferred to j, and minus entry [j, i]."
        )


def _call(judge: Callable, prompts: list, completions: list, size: int, columns: dict[str, Any]) -> torch.Tensor:
    """What a function gives for the completions of all processes: rewards `(N,)`, or rows of log-odds `(N, K)`."""
    name = get_callable_name(judge)
    output = judge(prompts=prompts, completions=completions, **{"num_generations": size, **columns})
    if inspect.iscoroutine(output):
        output = asyncio.run_coroutine_threadsafe(output, _event_loop()).result()
    if output is None:
        raise ValueError(f"{name} returned nothing: return a number for each completion, or a matrix for each prompt.")
    if len(output) > 0 and np.ndim(output[0]) == 2:
        output = _rows_of_matrices(output, len(completions), size, name)
    if len(output) != len(completions):
        raise ValueError(f"{name} returned {len(output)} values for {len(completions)} completions: return one each.")
    values = torch.tensor(gather_object([_with_nan(value) for value in output]), dtype=torch.float32)
    if values.isinf().any():
        index = values.isinf().nonzero()[0, 0].item()
        raise ValueError(
            f"{name} gave completion {index} a reward of {values[index].tolist()}: return a finite number, or None."
        )
    return values


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One for all calls: what a function keeps (clients, locks) belongs to the loop that it was first used in."""
    return start_event_loop_in_daemon("judges")[1]


def _rows_of_matrices(matrices: Sequence, num_completions: int, size: int, name: str) -> list:
    """Of K x K matrices, one a prompt, the row of each completion: its log-odds over the K of its group."""
    shapes = [tuple(np.shape(matrix)) for matrix in matrices]
    if num_completions % size or shapes != [(size, size)] * (num_completions // size):
        raise ValueError(
            f"{name} returned matrices of the shapes {shapes} for the {num_completions} completions of a process: "
            f"return a {size} x {size} matrix for each prompt, in batches of a multiple of `num_generations` = {size}."
        )
    return [row for matrix in matrices for row in torch.as_tensor(matrix, dtype=torch.float32).tolist()]


class GivenScores:
    """The judge of a dataset with the column `scores`, for each prompt its K x K log-odds or K rewards."""

    __name__ = "scores"

    def __init__(self, num_generations: int):
        self.num_generations = num_generations

    def __call__(self, completions: list, scores: list, **columns) -> list:
        """Of each completion its row or its reward: a row of the dataset is there for each of its completions."""
        size, first = self.num_generations, PartialState().process_index * len(completions)
        for values in scores:
            check_scores(values, size)
        return [values[(first + index) % size] for index, values in enumerate(scores)]


def check_scores(scores: list, size: int) -> None:
    """Raise `ValueError` unless a row's `scores` are rewards, or log-odds, of K = `size` completions."""
    if np.shape(scores) not in ((size,), (size, size)):
        raise ValueError(
            f"`scores` of the shape {np.shape(scores)} for a prompt with {size} completions: give K rewards or K x K "
            "log-odds."
        )
    values = torch.tensor(_with_nan(scores))
    if values.isinf().any() or (values.dim() == 2 and values.isnan().any()):
        raise ValueError(f"`scores` are {scores!r:.200}: give finite numbers, or None for a reward that is missing.")
    if values.dim() == 2:
        _check_antisymmetric(values, "`scores`")


def _with_nan(value: Any) -> Any:
    """A reward, or a row of log-odds, as numbers, with NaN for what is missing."""
    if value is None:
        return math.nan
    return [_with_nan(entry) for entry in value] if isinstance(value, list) else float(value)


def local_part(values: torch.Tensor, size: int) -> torch.Tensor:
    """This process's `size` of the values of all processes."""
    start = PartialState().process_index * size
    return values[start : start + size]


def _check_number(name: str, given: list | None, functions: list) -> None:
    if given is not None and len(given) != len(functions):
        raise ValueError(f"There are {len(functions)} `reward_funcs` and {len(given)} `{name}`: give one for each.")


def make_judges(
    reward_funcs: Any,
    args: Any,
    processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None,
) -> list[Callable]:
    """
    A judge for each of `reward_funcs`, or the one that `args`, of [`GPOConfig`] or like it, names by
    `reward_model_path`: models, also by name, as [`PreferenceReward`], functions as they are.
    """
    is_missing = reward_funcs is None or reward_funcs == []
    if is_missing == (args.reward_model_path is None):
        raise ValueError(
            f"The preference model is {'missing' if is_missing else 'given twice'}: give `reward_model_path`, its "
            "directory or name on the Hub, or in Python `reward_funcs`, but not both."
        )
    reward_funcs = args.reward_model_path if is_missing else reward_funcs
    given = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    classes = [None] * len(given) if processing_classes is None else processing_classes
    classes = classes if isinstance(classes, list) else [classes]
    _check_number("reward_processing_classes", classes, given)
    _check_number("reward_weights", args.reward_weights, given)
    trust = args.trust_remote_code
    return [_make_judge(judge, tokenizer, trust) for judge, tokenizer in zip(given, classes, strict=True)]


def place_judges(judges: list[Callable], reward_funcs: Any, accelerator: Accelerator) -> None:
    """
    Those that were made of `reward_funcs`, and are nobody else's, go to the device, as TRL's do, or are divided among
    the ranks, see [`PreferenceReward.shard`].
    """
    given = reward_funcs if isinstance(reward_funcs, list) and reward_funcs else [reward_funcs]
    for judge, origin in zip(judges, given, strict=True):
        if isinstance(judge, PreferenceReward) and judge is not origin:
            is_placed = not isinstance(origin, nn.Module) or hasattr(origin, "hf_device_map") or is_sharded(origin)
            if not is_placed:
                origin.to(accelerator.device)
            judge.shard(accelerator)


def check_parts(judges: list[Callable]) -> None:
    """Raise `ValueError` unless each judge has a transitive and a cyclic part, for DSPPO to weight."""
    for judge in judges:
        is_model = isinstance(judge, PreferenceReward)
        if not is_model or not 0 < judge.scorer.reward_dim < judge.scorer.num_blocks:
            what = judge.scorer.kind if is_model else "function"
            raise ValueError(
                f'`loss_type="dsppo"` weights the transitive and the cyclic part of a judge, but '
                f'{get_callable_name(judge)} is a {what}: give a hybrid reward-cyclic model, or take "sppo".'
            )


def _make_judge(judge: Any, tokenizer: PreTrainedTokenizerBase | None, trust_remote_code: bool) -> Callable:
    if isinstance(judge, PreferenceReward) and judge.signal != "score":
        raise ValueError(
            f"`signal` = {judge.signal!r} of a PreferenceReward would be ignored: the trainer takes its log-odds, of "
            'which GPOTrainer with `loss_type="sppo"` makes probabilities. Leave it out.'
        )
    if isinstance(judge, (str, os.PathLike)):
        try:
            return PreferenceReward(judge, tokenizer, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{str(judge)!r} in `reward_funcs` could not be loaded: give the directory or Hub id of a general "
                f"preference model, or of a sequence classifier with one label. {error}"
            ) from error
    if isinstance(judge, nn.Module):
        return PreferenceReward(judge, tokenizer)
    if not callable(judge):
        raise TypeError(
            f"A reward function is a {type(judge).__name__}: pass a model, the name of one, or a function."
        )
    if tokenizer is not None:
        raise ValueError(
            f"`reward_processing_classes` has a tokenizer for {get_callable_name(judge)}, which would ignore it: pass "
            "None."
        )
    return judge
