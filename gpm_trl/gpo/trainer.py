"""Trainer that aligns a policy with a general preference, online."""

import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import gather
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import create_model_from_path, get_config_model_id

from ..data.renderer import check_token_ids, count_embeddings, cut_left, within_context
from ..gpm.config import temporarily
from ..gpm.model_card import CITATION, HRC_PAPER
from ..gpm.preparation import loading_arguments
from ..models.loading import hub_arguments, is_adapter, load_adapted, read_adapter
from ..models.modeling_gpm import load_whole
from ..preference import (
    best_and_worst,
    dsppo_weights,
    entering_responses,
    group_signal,
    policy_loss,
    response_loss,
)
from ..saving import WholeCheckpoints
from .config import PAIRWISE, GPOConfig
from .judges import GivenScores, Judges, check_parts, local_part, make_judges, place_judges
from .layers import CountedOnce, ExactResuming, GivenCompletions, NamedEvaluations, WinRate
from .prompts import check_given, check_prompts
from .reference import MovingReference, current_epoch
from .shared_prefix import SharedPrefixPolicy, take_rows

__all__ = ["GPOTrainer"]


class GPOTrainer(
    SharedPrefixPolicy,
    ExactResuming,
    CountedOnce,
    GivenCompletions,
    WinRate,
    NamedEvaluations,
    MovingReference,
    WholeCheckpoints,
    GRPOTrainer,
):
    r"""
    Trainer for general preference optimisation (Section 5 of the paper): a policy samples K completions of each
    prompt, a preference model compares them, and the policy is regressed on what it says.

        loss = (log pi_theta(y|x) / pi_t(y|x) - s_hat(y > pi_t | x) / beta)^2      (Equation 5.3)

    It is [`~trl.GRPOTrainer`] with another loss. The reward of a completion is its signal s_hat, so that the parent's
    advantages, without scaling, are the signals. Overrides of the parent: `_compute_loss`; `_calculate_rewards`,
    `_generate_and_score_completions` and `_prepare_inputs` (which completions enter the loss), `_tokenize_prompts`
    (`max_length`) and `log` (metrics as means over the whole step). What else it can do is in the layers that it
    derives from, each of which names its own overrides. Everything else, from generation with or without vLLM to
    sharding, is the parent's.

    The same samples may serve several optimizer steps (`steps_per_generation`, `num_iterations`): the loss is a
    regression whose targets depend on the samples alone, so no importance weights are needed.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy, a causal LM, by name or directory or already made; or an adapter of one, which is trained on.
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            The reference of the first iteration. Defaults to the policy as it is; with an adapter, to the policy
            without it, or as the adapter was.
        reward_funcs (`str`, [`~transformers.PreTrainedModel`], [`PreferenceReward`], `Callable`, or a list of these):
            What prefers: a general preference model or a reward model; a function of TRL's kind, which gives a number
            for each completion; or one that gives a K x K matrix of log-odds for each prompt. Several are added up,
            weighted by `args.reward_weights`, as log-odds.
        args ([`GPOConfig`], *optional*):
            Training arguments.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with a `prompt`; the other columns go to functions. With `completions`, K texts a row (and, if they
            were sampled from the policy, their `completion_ids`), nothing is sampled; with `scores` beside them, the
            K x K log-odds or K rewards, nothing is scored either.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict`, *optional*):
            Rows with a `prompt`, for the win rate of the policy against the reference.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The policy's tokenizer. Preference models read texts, with tokenizers of their own.
        reward_processing_classes ([`~transformers.PreTrainedTokenizerBase`] or a list of these, *optional*):
            Tokenizers of the preference models, one for each; loaded by their names if `None`.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train.
        callbacks, optimizers, quantization_config:
            See [`~trl.GRPOTrainer`].

    Raises:
        ValueError: If an argument contradicts another, or would be ignored.

    Example:

    ```python
    from datasets import load_dataset
    from gpm_trl import GPOTrainer

    trainer = GPOTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs="path/to/gpm",
        train_dataset=load_dataset("trl-lib/ultrafeedback-prompt", split="train"),
    )
    trainer.train()
    trainer.save_model()
    ```
    """

    _tag_names = ["trl", "gpo"]
    _name = "GPO"
    _paper = {
        "title": "Beyond Bradley-Terry Models: A General Preference Model for Language Model Alignment",
        "id": "2410.02197",
        "citation": CITATION,
    }
    groups_stay_together = True  # pairs are made within a batch

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        ref_model: PreTrainedModel | None = None,
        reward_funcs: Any = None,
        args: GPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: "Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None" = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        **ignored,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = GPOConfig(f"{model_name.split('/')[-1]}-GPO")
        for name, value in ignored.items():
            if name not in ("data_collator", "compute_metrics", "preprocess_logits_for_metrics"):  # OnlineDPOTrainer's
                raise TypeError(f"GPOTrainer got an unexpected keyword argument {name!r}.")
            if value is not None:
                raise ValueError(f"`{name}` would be ignored: batches and metrics are the samples'. Leave it out.")
        model, quantization_config, changed = given_policy(model, args, quantization_config, peft_config, ref_model)
        evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        for dataset in evaluated if eval_dataset is not None else ():
            check_prompts(dataset, "eval_dataset")
        if "scores" in check_given(train_dataset, args, reward_funcs, eval_dataset):
            judges = [GivenScores(args.num_generations)]
        else:
            judges = make_judges(reward_funcs, args, reward_processing_classes)
        if args.loss_type == "dsppo":
            check_parts(judges)
            self._paper = HRC_PAPER
        self.judges = Judges(judges, args.reward_weights, args.score_clip, args.missing_eos_penalty)
        self._sums: dict[str, dict[str, torch.Tensor]] = {"train": {}, "eval": {}}
        with temporarily(args, **changed, reward_weights=None):  # they are of the judges: the parent has one function
            super().__init__(
                model=model,
                ref_model=ref_model,
                reward_funcs=self.signal,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        if self._is_vlm:
            raise ValueError(
                "The policy has a processor of images, which no loss reads: take a policy of text, or in Python pass "
                "its tokenizer as `processing_class`."
            )
        self._check_tokens(dataset for dataset in (train_dataset, *evaluated) if isinstance(dataset, Dataset))
        if isinstance(train_dataset, Dataset):
            self._check_completions(train_dataset)
        place_judges(judges, reward_funcs, self.accelerator)

    def _check_tokens(self, datasets: Iterable[Dataset]) -> None:
        """Raise `ValueError`, before the training, for a prompt that is too long or has a token that is not known."""
        self._num_embeddings = count_embeddings(self.model)
        check_token_ids([self.processing_class.pad_token_id], self.processing_class, self._num_embeddings)
        for dataset in datasets:
            for rows in dataset.select_columns("prompt").iter(batch_size=1000):
                self._tokenize_prompts(rows["prompt"])

    # --- Signals -----------------------------------------------------------------------------------------------------

    def signal(self, prompts: list, completions: list, completion_ids: list[list[int]], **columns) -> list[float]:
        """
        The one reward function that the parent calls: how each completion fares in its group, see
        [`~gpm_trl.preference.group_signal`]; NaN for one that no judge gave anything for. Signals of a group add up to
        0, so that the parent's advantages, `reward - mean(reward)`, are the signals.
        """
        is_dsppo = self.args.loss_type == "dsppo"
        weights = dsppo_weights(self.current_iteration, self.args.dsppo_lambda) if is_dsppo else (1.0, 1.0)
        log_odds, scored = self._log_odds(prompts, completions, completion_ids, self._group_size, weights, **columns)
        signals = group_signal(log_odds, self.args.loss_type).masked_fill(~scored, math.nan)
        return local_part(signals.flatten(), len(completions)).tolist()

    def _log_odds(
        self,
        prompts: list,
        completions: list,
        completion_ids: list[list[int]],
        size: int,
        weights: tuple[float, float] = (1.0, 1.0),
        /,  # columns may have these names
        **columns,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the judges say of groups of `size`, see [`~gpm_trl.gpo.judges.Judges.log_odds`]."""
        columns["completion_ids"] = completion_ids
        return self.judges.log_odds(prompts, completions, size, self._ended(completion_ids), weights, **columns)

    @property
    def current_iteration(self) -> int:
        """t of DSPPO: the given one of the first iteration, and one more with each update of the reference."""
        updates = self._update.count(self.state, self.model.training) if self._update is not None else 0
        return self.args.dsppo_iteration + updates

    def _ended(self, completion_ids: list[list[int]]) -> list[bool]:
        """Whether each completion has an EOS token: the tokenizer's, or one that the policy stops at."""
        return [not self._stops.isdisjoint(ids) for ids in completion_ids]

    @property
    def _stops(self) -> set[int]:
        stops = self.accelerator.unwrap_model(self.model).generation_config.eos_token_id
        return {self.processing_class.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}

    @property
    def _mode(self) -> str:
        """Which of the parent's metrics are written."""
        return "train" if self.model.training else "eval"

    @property
    def _group_size(self) -> int:
        """K, in training or in evaluation."""
        return self.num_generations if self.model.training else self.num_generations_eval

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        size = self._group_size
        # Pairs are made within a batch of a process; the rest is gathered.
        together = len(inputs) * (1 if self.args.loss_type in PAIRWISE else self.accelerator.num_processes)
        if together % size:
            raise ValueError(
                f"{together} completions are evaluated together, which is not a multiple of the {size} of a prompt: "
                "make `per_device_eval_batch_size` one."
            )
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # (N, 1)
        signals = rewards.view(-1, size)
        valid = ~signals.isnan()
        if self.mask_truncated_completions:
            eos = getattr(self, "eos_token_ids", [self.processing_class.eos_token_id])  # one before TRL 1.13
            last = {*eos, self.processing_class.pad_token_id}  # where the parent does not mask
            ended = torch.tensor([ids[-1] in last for ids in completion_ids_list], device=valid.device)
            valid &= gather(ended).view(-1, size)
        if not self.model.training:
            valid[self._num_new :] = False
        enters = entering_responses(signals, valid, self.args.pairing)
        best, worst = best_and_worst(signals, valid)
        best, worst = best & ~worst, worst & ~best  # two to compare
        weight = enters / enters.sum(1, keepdim=True).clamp(min=1)
        for name, values in (("weight", weight), ("best", best), ("worst", worst)):
            # Into the rows, in which `_generate_and_score_completions` finds it again.
            for row, value in zip(inputs, local_part(values.flatten(), len(inputs)).tolist(), strict=True):
                row[name] = value
        return rewards

    def _generate_and_score_completions(self, inputs):
        if self.model.training:
            self._check_finite(with_weights=True)  # or sampling would fail in a way of its own
        rows = [dict(row) for row in inputs]
        # Where an optimizer's step is not a whole generation, the parent (TRL 1.16) computes log-probabilities of the
        # policy as it was, for importance weights: a forward that a regression has no use for.
        whole = self.args.steps_per_generation * self.num_iterations
        with temporarily(self.args, gradient_accumulation_steps=whole):
            batch = super()._generate_and_score_completions(rows)
        for name in ("weight", "best", "worst"):
            batch[name] = torch.tensor([row[name] for row in rows], device=batch["completion_ids"].device)
        return batch

    def _prepare_inputs(self, generation_batch):
        batch = super()._prepare_inputs(generation_batch)
        size = len(batch["weight"])
        if self.args.loss_type not in PAIRWISE:  # without completions that enter no term, but one for the forward
            kept = batch["weight"].nonzero()[:, 0]
            batch = take_rows(batch, kept if len(kept) else kept.new_zeros(1))
        return {**batch, "num_responses": size}

    def _tokenize_prompts(self, prompts: list):
        prompt_ids, images, multimodal_fields = super()._tokenize_prompts(prompts)
        if self.args.max_length is not None:
            room = self.args.max_length - self.max_completion_length
            prompt_ids = [cut_left(ids, room, self.processing_class.bos_token_id) for ids in prompt_ids]
        for ids in prompt_ids:
            check_token_ids(ids, self.processing_class, self._num_embeddings)
        if not all(map(len, prompt_ids)):
            raise ValueError("A prompt has no tokens, so nothing can follow it: leave it out, or give it a text.")
        longest, context = max(map(len, prompt_ids)), within_context(None, self.model.config)
        if context is not None and longest + self.max_completion_length > context:
            raise ValueError(
                f"A prompt has {longest} tokens and a completion up to {self.max_completion_length} more, but the "
                f"policy's context is {context}: lower `max_completion_length`, or set `max_length={context}` to have "
                "prompts cut from the left."
            )
        return prompt_ids, images, multimodal_fields

    # --- The loss ----------------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        mask = inputs["completion_mask"]
        logps, entropies, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], mask], dim=1),
            mask.shape[1],
            compute_entropy=True,
        )
        log_ratios = ((logps - inputs["ref_per_token_logps"]) * mask).sum(1)  # log pi_theta / pi_t, (B,)
        terms = log_ratios / mask.sum(1).clamp(min=1) if self.args.length_normalize else log_ratios
        size, signals = self._group_size, inputs["advantages"]
        if self.args.loss_type in PAIRWISE:
            groups, signals = terms.view(-1, size), signals.view(-1, size)
            valid = inputs["weight"].view(-1, size) > 0
            losses = policy_loss(groups, signals, self.args.loss_type, self.current_beta, valid=valid)
        else:
            losses = inputs["weight"] * response_loss(terms, signals, self.current_beta)
        # The mean over prompts of means over their completions, some of which may be in other batches.
        loss = losses.sum() * size / inputs["num_responses"]
        self._record(inputs, losses, (logps * mask).sum(1), log_ratios, (entropies * mask).sum(1), mask.sum(1))
        return loss / (self.current_gradient_accumulation_steps if self.model.training else 1)

    @property
    def current_beta(self) -> float:
        """beta of this epoch."""
        betas = self.args.betas()
        return betas[min(current_epoch(self.state.epoch, self.model.training), len(betas) - 1)]

    # --- Metrics -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _record(
        self,
        inputs: dict[str, torch.Tensor],
        losses: torch.Tensor,
        logps: torch.Tensor,
        log_ratios: torch.Tensor,
        entropies: torch.Tensor,
        lengths: torch.Tensor,
    ) -> None:
        """
        Sums and counts over the completions that enter the loss, their tokens, and the best and worst of each prompt.
        These may be in different batches, so that means are taken over all that is logged together.
        """
        enters = (inputs["weight"] > 0).float()
        best, worst = inputs["best"].float(), inputs["worst"].float()
        rewards = self.current_beta * log_ratios
        sums = {
            "loss": (losses, inputs["weight"]),
            "best": (inputs["advantages"] * best, best),
            "worst": (inputs["advantages"] * worst, worst),
            "beta": (self.current_beta * enters, enters),
            "objective/kl": (log_ratios * enters, enters),
            "objective/entropy": (-logps * enters, enters),
            "entropy": (entropies * enters, lengths * enters),
            "rewards/chosen": (rewards * best, best),
            "rewards/rejected": (rewards * worst, worst),
            "logps/chosen": (logps * best, best),
            "logps/rejected": (logps * worst, worst),
        }
        local = torch.stack(
            [torch.stack([value.sum().float(), count.sum().float()]) for value, count in sums.values()]
        )
        totals = self.accelerator.reduce(local, reduction="sum").cpu()
        recorded = self._sums[self._mode]
        for name, total in zip(sums, totals, strict=True):
            recorded[name] = recorded.get(name, 0.0) + total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # NaN, which the parent leaves out, where nothing entered the loss.
        means = {name: [(total / count).item()] for name, (total, count) in self._sums[self._mode].items()}
        self._sums[self._mode] = {}
        if means:
            means["rewards/margins"] = [means["rewards/chosen"][0] - means["rewards/rejected"][0]]
            (best,), (worst,), (loss,) = (means.pop(name) for name in ("best", "worst", "loss"))
            means["objective/scores_margin"] = [best - worst]
            # The parent's counts rows where prompts are meant, and the prompts that processes repeat.
            if not self.model.training and not math.isnan(loss):
                logs |= {name: loss for name in logs if name.endswith("_loss")}
        self._metrics[self._mode] |= means
        super().log(logs, start_time)


def given_policy(
    model: Any, args: GRPOConfig, quantization: Any, peft_config: PeftConfig | None, ref_model: Any = None
) -> tuple[Any, Any, dict[str, Any]]:
    """Model, quantisation and changes of `args` for `GRPOTrainer`, so that no weight of the policy is made up."""
    by_name = isinstance(model, str) and is_adapter(model, hub_arguments(args.model_init_kwargs or {}))
    is_given = by_name or isinstance(model, PeftModel)
    if is_given and peft_config is not None:
        raise ValueError("The policy is an adapter, and `peft_config` would be a second: leave out the latter.")
    if isinstance(model, PeftModel) and "default" not in model.peft_config:
        raise ValueError(
            f'The adapters of the policy are {sorted(model.peft_config)}, but "default" is trained: call one so.'
        )
    if ref_model is not None and ref_model is model:
        raise ValueError("`ref_model` is the policy itself, so it would change with it: leave it out for a copy.")
    if ref_model is not None and (is_given or peft_config is not None):
        raise ValueError("With an adapter, the reference is the policy as it was: leave out `ref_model`.")
    if by_name:  # whose arguments are used up; the parent would say that it ignores them
        return load_policy_adapter(model, args, quantization), None, {"model_init_kwargs": None}
    if not isinstance(model, str):
        return model, quantization, {}
    # The parent's `create_model_from_path`, of the policy and, by default, its reference, takes a class.
    whole = SimpleNamespace(from_pretrained=lambda *a, **k: load_whole(create_model_from_path, *a, **k)[0])
    return model, quantization, {"model_init_kwargs": {**(args.model_init_kwargs or {}), "architecture": whole}}


def load_policy_adapter(name: str, args: GRPOConfig, quantization_config: BitsAndBytesConfig | None) -> PeftModel:
    """An adapter to be trained on, by its directory or Hub id, on its base, loaded as `GRPOTrainer` loads policies."""
    kwargs = loading_arguments(args, quantization_config)
    if read_adapter(name, kwargs["trust_remote_code"], hub_arguments(kwargs)).of_reward_model:
        raise ValueError(f"{name} is an adapter of a reward model, not of a policy: give it as `reward_funcs`.")
    return load_adapted(create_model_from_path, name, is_trainable=True, **kwargs)
