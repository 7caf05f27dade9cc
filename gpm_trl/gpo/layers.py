"""
What [`GPOTrainer`] can do beyond its loss, one layer each: a class between it and [`~trl.GRPOTrainer`]. Each could be
deleted without the others.
"""

import contextlib
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from trl.trainer.utils import RepeatSampler, use_adapter

from ..data.formats import as_messages
from ..data.renderer import check_token_ids
from ..gpm.config import temporarily
from .judges import check_scores
from .prompts import GIVEN
from .reference import REFERENCE_ADAPTER, has_reference_adapter


class ExactResuming:
    """
    Layer: a run that is resumed takes the steps that it would have taken without the interruption; where that was
    within a generation, its completions are sampled again.

    Overrides: `_get_train_sampler` (each epoch has an order of its own), `_init_training_state` (where in a generation
    the run goes on).
    """

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        epochs_trained, steps_trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        # The parent counts its steps from 0, so a run resumed within a generation would skip to the next too late.
        self._step, self._buffered_inputs = steps_trained, None
        return epochs_trained, steps_trained

    def _get_train_sampler(self, dataset: Dataset | None = None) -> "EpochSampler":
        names = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        sampler = super()._get_train_sampler(dataset)
        return EpochSampler(lambda: int(self.state.epoch or 0), **{name: getattr(sampler, name) for name in names})


class EpochSampler(RepeatSampler):
    """
    Orders each epoch by a seed of its own: the parent, after a resume, begins with the order of the first.

    Args:
        epoch (`Callable`): Gives the number of the epoch. (`set_epoch`, which the Trainer calls, does not get through
            to a sampler on several processes after a resume within an epoch.)
        kwargs: Of the parent.
    """

    def __init__(self, epoch: Callable[[], int], **kwargs):
        super().__init__(**kwargs)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed + self.epoch())
        return super().__iter__()


class GivenCompletions:
    """
    Layer: rows with `completions`, and maybe the `completion_ids` that were sampled, are trained on without sampling.

    Overrides: `_generate_and_score_completions` (which completions there are), `_generate_single_turn` (gives them)
    and `_calculate_rewards` (functions get them once, not as a column too).
    """

    # `_generate_single_turn` gets the ids of prompts, not the rows (TRL 1.16): `_generate_and_score_completions`
    # leaves the ids of their completions here for it.
    _given: list[list[int]] | None = None

    def _generate_and_score_completions(self, inputs):
        if "completions" not in inputs[0] or not self.model.training:
            return super()._generate_and_score_completions(inputs)
        # Rows are repeated K times, in the order of all processes.
        first = self.accelerator.process_index * len(inputs)
        size = self.num_generations
        with temporarily(
            self, _given=[self._completion_ids(row, (first + index) % size) for index, row in enumerate(inputs)]
        ):
            return super()._generate_and_score_completions(inputs)

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if self._given is None:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return self._given, None

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rows = [{name: value for name, value in row.items() if name not in GIVEN} for row in inputs]
        return super()._calculate_rewards(rows, prompts, completions, completion_ids_list)

    def _check_completions(self, dataset: Dataset) -> None:
        """Raise `ValueError`, before the training, for given completions that cannot be trained on."""
        columns = [name for name in (*GIVEN, "scores") if name in dataset.column_names]
        for row in dataset.select_columns(columns) if "completions" in columns else ():
            for index in range(self.num_generations):
                self._completion_ids(row, index)
            if "scores" in columns:
                check_scores(row["scores"], self.num_generations)

    def _completion_ids(self, row: dict[str, Any], index: int) -> list[int]:
        """Token ids of a given completion: those that were sampled, or else its text's and an EOS."""
        counts = {name: len(row[name]) for name in ("completions", "completion_ids") if name in row}
        if set(counts.values()) != {self.num_generations}:
            raise ValueError(
                f"A row of `train_dataset` has {counts}, but `num_generations` is {self.num_generations}: make them "
                "the same."
            )
        if "completion_ids" in row:
            ids = row["completion_ids"][index]
        else:
            completion = as_messages(row["completions"][index], "completion")
            if len(completion) != 1 or not isinstance(completion[0]["content"], str):
                raise ValueError(f"A completion is {completion!r:.200}: give one message with a text, or a string.")
            ids = self.processing_class(completion[0]["content"], add_special_tokens=False).input_ids
            ids = [*ids, self.processing_class.eos_token_id]
        if not ids:
            raise ValueError("`completion_ids` has a completion without tokens: one ends with an EOS, at least.")
        check_token_ids(ids, self.processing_class, self._num_embeddings)
        return ids[: self.max_completion_length]


class CountedOnce:
    """
    Layer: evaluation counts each prompt once, though accelerate repeats the first, so that all processes have as many.

    Overrides: `evaluation_loop` (none counts yet), `_calculate_rewards` (how many of the prompts count) and
    `_generate_single_turn` (evaluation stays one).
    """

    _num_evaluated = 0  # prompts of this evaluation, in the batches before
    _num_new = 0  # prompts of this batch that were in none before: its first

    def evaluation_loop(self, *args, **kwargs):
        self._num_evaluated = 0
        self._metrics["eval"].clear()  # of one that was interrupted
        self._sums["eval"].clear()
        return super().evaluation_loop(*args, **kwargs)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if not self.model.training:
            groups = len(inputs) * self.accelerator.num_processes // self.num_generations_eval
            rows = self.callback_handler.eval_dataloader.dataset
            left = len(rows) - self._num_evaluated if isinstance(rows, Dataset) else groups
            self._num_new = min(groups, left)
            self._num_evaluated += self._num_new
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _generate_single_turn(self, *args, **kwargs):
        training = self.model.training
        try:
            return super()._generate_single_turn(*args, **kwargs)
        finally:  # with `use_transformers_continuous_batching`, TRL 1.16 leaves what sampled in training
            self.model.train(training)
            if self.ref_model is not None:
                self.ref_model.eval()


class WinRate:
    """
    Layer: evaluation logs how often a completion of the policy is preferred to one of the reference. Not with vLLM,
    which holds the policy alone.

    Overrides: `_calculate_rewards` (the reference samples too, and both are compared) and `log` (confidence).
    """

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if not self.model.training and not self.use_vllm:
            wins = self._win_rates(inputs, prompts, completions, completion_ids_list)
            self._metrics["eval"]["win_rate"].extend(wins[: self._num_new].tolist())
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    @torch.no_grad()
    def _win_rates(
        self, inputs: list, prompts: list, completions: list, completion_ids: list[list[int]]
    ) -> torch.Tensor:
        """Mean probability, for each prompt, that a completion of the policy is preferred to one of the reference."""
        # Generating counts what it generates, which is not the policy's.
        with self._reference_as_policy(), temporarily(self, _metrics={"eval": defaultdict(list)}):
            _, reference_ids, _, others, *_ = self._generate(prompts)

        def alternating(first: list, second: list) -> list:
            return [value for pair in zip(first, second, strict=True) for value in pair]

        told = [name for name in inputs[0] if name not in ("prompt", *GIVEN)]
        # What is logged about judges is of the policy's completions alone.
        quiet = {"log_metric": lambda name, value: None, "log_extra": lambda column, values: None}
        log_odds, _ = self._log_odds(
            alternating(prompts, prompts),
            alternating(completions, others),
            alternating(completion_ids, reference_ids),
            2 * self.num_generations_eval,
            trainer_state=self.state,
            **quiet,
            **{name: alternating(*[[row[name] for row in inputs]] * 2) for name in told},
        )
        return log_odds[:, 0::2, 1::2].sigmoid().mean((1, 2))

    @contextlib.contextmanager
    def _reference_as_policy(self) -> Iterator[None]:
        """Within, generation samples from the reference."""
        if self.ref_model is None:
            model = self.accelerator.unwrap_model(self.model)
            with use_adapter(model, REFERENCE_ADAPTER if has_reference_adapter(model) else None):
                yield
            return
        # The one attribute that generation reads its model from (TRL 1.16).
        with temporarily(self, model_wrapped=self.ref_model):
            yield

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        wins = self._metrics["eval"].get("win_rate", [])
        if not self.model.training and len(wins) > 1:
            # Normal approximation over prompts: the mean is within this of the truth in 95 of 100 samples.
            self._metrics["eval"]["win_rate_ci"] = [1.96 * statistics.stdev(wins) / math.sqrt(len(wins))]
        super().log(logs, start_time)


class NamedEvaluations:
    """
    Layer: with several evaluation datasets, each has metrics of its own, `eval_<name>_win_rate` and so on.

    Overrides: `log`.
    """

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        loss = next((name for name in logs if name.startswith("eval_") and name.endswith("_loss")), "eval_loss")
        dataset = loss.removeprefix("eval_").removesuffix("loss")  # "name_", where there are several
        metrics = self._metrics["eval"]
        for name in list(metrics):
            metrics[f"{dataset}{name}"] = metrics.pop(name)
        super().log(logs, start_time)
