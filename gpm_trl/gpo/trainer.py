"""Trainer that aligns a policy with a general preference, online."""

import contextlib
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl import GRPOTrainer
from trl.trainer.utils import (
    create_model_from_path,
    get_config_model_id,
    split_tensor_dict,
    use_adapter,
)

from ..gpm.model_card import CITATION, CardFacts, generate_policy_card
from ..models.loading import HUB_ARGUMENTS, hub_arguments, is_adapter, read_adapter
from ..preference import best_and_worst, entering_responses, group_signal, policy_loss, response_loss
from ..saving import WholeCheckpoints
from .arguments import temporarily
from .config import PAIRWISE, GPOConfig
from .judges import GivenScores, Judge, local_part, make_judges, penalise, reward_log_odds
from .prompts import EpochSampler, check_dataset, check_number, check_prompts, check_unscored
from .reference import (
    REFERENCE_ADAPTER,
    ReferenceUpdate,
    add_reference_adapter,
    disable_reference_dropout,
    has_reference_adapter,
    initial_reference,
    prepare_reference,
)

__all__ = ["GPOTrainer"]


class GPOTrainer(WholeCheckpoints, GRPOTrainer):
    r"""
    Trainer for general preference optimisation (Section 5 of the paper): a policy samples K completions of each
    prompt, a preference model compares them, and the policy is regressed on what it says.

        loss = (log pi_theta(y|x) / pi_t(y|x) - s_hat(y > pi_t | x) / beta)^2      (Equation 5.3)

    It is [`~trl.GRPOTrainer`] with other rewards and another loss. Overrides: `_calculate_rewards` (log-odds within
    groups, from which the signals come), `_generate_and_score_completions` and `_prepare_inputs` (batches carry the
    signals, in the order sampled), `_compute_loss`, `_tokenize_prompts` (`max_length`), `_generate_single_turn` (given
    completions), `_get_train_sampler` and `_init_training_state` (the order of an epoch, and where in a generation a
    run goes on, after a resume), `_save_optimizer_and_scheduler` and `_load_optimizer_and_scheduler` (the updated
    reference), `log` (confidence of the win rate), `create_model_card`, and those of
    [`~gpm_trl.saving.WholeCheckpoints`]. Everything else, from generation with or without vLLM to
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
            Tokenizers of the preference models; loaded by their names if `None`.
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
    ```
    """

    _tag_names = ["trl", "gpo"]
    _name = "GPO"
    _paper = {
        "title": "Beyond Bradley-Terry Models: A General Preference Model for Language Model Alignment",
        "id": "2410.02197",
        "citation": CITATION,
    }

    _uses_reference = True

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
        self._check_arguments(model, ref_model, peft_config, args, ignored)
        changed: dict[str, Any] = {}  # for the parent
        if isinstance(model, str):
            args.model_init_kwargs = {**(args.model_init_kwargs or {}), "use_safetensors": True}  # never a pickle
            if is_adapter(model, hub_arguments(args.model_init_kwargs)):
                model, quantization_config = load_policy_adapter(model, init_kwargs(args, quantization_config)), None
                changed["model_init_kwargs"] = None  # used; the parent would say that it ignores them
        if has_reference_adapter(model):  # an earlier trainer's
            model.delete_adapter(REFERENCE_ADAPTER)
        for dataset in eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]:
            check_prompts(dataset, "eval_dataset")
        if "scores" in check_dataset(train_dataset, args):
            check_unscored(reward_funcs, eval_dataset)
            judges = [GivenScores()]
        else:
            judges = make_judges(reward_funcs or args.reward_model_path, reward_processing_classes)
        self._given: list[list[int]] | None = None
        self._betas = args.betas()
        uses_adapter = peft_config is not None or isinstance(model, PeftModel)
        if ref_model is None and not uses_adapter and self._uses_reference:
            ref_model = initial_reference(model, init_kwargs(args, quantization_config))
        # With beta = 0, the parent makes no reference of its own; with an adapter, it makes the right one.
        changed |= {"beta": self._betas[0] if uses_adapter else 0.0, "sync_ref_model": False}
        with temporarily(args, **changed):
            super().__init__(
                model=model,
                reward_funcs=judges,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        for judge in judges:
            if isinstance(judge, Judge):
                judge.shard(self.accelerator)
        self._set_reference(ref_model)

    def _set_reference(self, reference: PreTrainedModel | None) -> None:
        """Make the reference ready, if it is a model, and have it become the policy in time."""
        args = self.args
        self.beta = self._betas[0]  # not 0: the parent computes the reference's log-probabilities
        if reference is not None:
            self.ref_model = prepare_reference(
                reference, self.accelerator, self.temperature, args.disable_dropout, args.cast_lm_head_to_fp32
            )
        self._update: ReferenceUpdate | None = None
        if args.sync_ref_model:
            if isinstance(self.model, PeftModel):
                add_reference_adapter(self.model)
            alpha, steps = args.ref_model_mixup_alpha, args.ref_model_sync_steps
            self._update = ReferenceUpdate(self.ref_model, self.accelerator, alpha, steps)
            self.add_callback(self._update)
        disable_reference_dropout(self.model)

    @staticmethod
    def _check_arguments(
        model: Any, ref_model: Any, peft_config: PeftConfig | None, args: GPOConfig, ignored: dict
    ) -> None:
        for name, value in ignored.items():
            if name not in ("data_collator", "compute_metrics", "preprocess_logits_for_metrics"):
                raise TypeError(f"GPOTrainer got an unexpected keyword argument {name!r}.")
            if value is not None:
                raise ValueError(
                    f"`{name}` would be ignored: batches and metrics are those of the samples. Leave it out."
                )
        by_name = isinstance(model, str) and is_adapter(model, hub_arguments(args.model_init_kwargs or {}))
        adapter = by_name or isinstance(model, PeftModel)
        if adapter and peft_config is not None:
            raise ValueError("The policy is an adapter, and `peft_config` would be a second: leave out the latter.")
        if isinstance(model, PeftModel) and "default" not in model.peft_config:
            raise ValueError(
                f'The adapters of the policy are {sorted(model.peft_config)}, but the one called "default" is '
                "trained: load it by that name."
            )
        if ref_model is not None:
            if ref_model is model:
                raise ValueError(
                    "`ref_model` is the policy itself, so it would change with it: leave it out for a copy of the "
                    "policy as it is."
                )
            if peft_config is not None or adapter:
                raise ValueError(
                    "With an adapter, the reference is the policy without it, or as it was: leave out `ref_model`."
                )

    # --- Sampling ----------------------------------------------------------------------------------------------------

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        epochs_trained, steps_trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        # A run that is resumed may begin within a generation: the steps that it took are not taken again.
        self._step, self._buffered_inputs = steps_trained, None
        return epochs_trained, steps_trained

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochSampler:
        names = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        sampler = super()._get_train_sampler(dataset)
        check_number(len(sampler.data_source), self.args)
        return EpochSampler(lambda: int(self.state.epoch or 0), **{name: getattr(sampler, name) for name in names})

    def _tokenize_prompts(self, prompts: list):
        prompt_ids, images, multimodal_fields = super()._tokenize_prompts(prompts)
        if self.args.max_length is not None:
            room = self.args.max_length - self.max_completion_length
            prompt_ids = [ids[-room:] for ids in prompt_ids]
        if not all(map(len, prompt_ids)):
            raise ValueError("A prompt has no tokens, so nothing can follow it: leave it out, or give it a text.")
        # Not all architectures have a limit.
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(map(len, prompt_ids))
        if context is not None and longest + self.max_completion_length > context:
            raise ValueError(
                f"A prompt has {longest} tokens and a completion up to {self.max_completion_length} "
                f"(`max_completion_length`), but the policy's context is {context}: leave the prompt out, lower "
                f"`max_completion_length`, or set `max_length={context}` to have prompts cut from the left."
            )
        return prompt_ids, images, multimodal_fields

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if self._given is None:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return self._given, None

    def _completion_ids(self, row: dict[str, Any], index: int) -> list[int]:
        """Token ids of a given completion: those that were sampled, or else its text's and an EOS."""
        counts = {name: len(row[name]) for name in ("completions", "completion_ids") if name in row}
        if set(counts.values()) != {self.num_generations}:
            raise ValueError(
                f"A row of `train_dataset` has {counts}, but `num_generations` is {self.num_generations}: make them "
                "the same."
            )
        if "completion_ids" in row:
            return row["completion_ids"][index]
        completion = row["completions"][index]
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        ids = self.processing_class(text, add_special_tokens=False).input_ids
        return [*ids, self.processing_class.eos_token_id][: self.max_completion_length]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "completions" in inputs[0] and self.model.training:
            # Rows are repeated K times, in the order of all processes.
            first = self.accelerator.process_index * len(inputs)
            self._given = [
                self._completion_ids(row, (first + index) % self.num_generations) for index, row in enumerate(inputs)
            ]
        # Where an optimizer's step is not a whole generation, the parent computes log-probabilities of the policy as
        # it was, for importance weights: of no use to a regression.
        whole = self.args.steps_per_generation * self.num_iterations
        try:
            with temporarily(self.args, gradient_accumulation_steps=whole):
                batch = super()._generate_and_score_completions(inputs)
        finally:
            self._given = None
        size = len(inputs)
        for name, values in self._signals.items():
            batch[name] = local_part(values.flatten(), size).to(batch["completion_ids"].device)
        return batch

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        training = self.model.training
        num_generations = self.num_generations if training else self.num_generations_eval
        mode = "train" if training else "eval"
        # Pairs are made within a batch of a process; the rest is gathered.
        together = len(inputs) * (1 if self.args.loss_type in PAIRWISE else self.accelerator.num_processes)
        if together % num_generations:
            raise ValueError(
                f"{together} completions are evaluated together, which is not a multiple of the {num_generations} of "
                "a prompt: make `per_device_eval_batch_size` one."
            )
        if not training and not self.use_vllm:
            wins = self._win_rates(inputs, prompts, completions, completion_ids_list, num_generations)
            self._metrics[mode]["win_rate"].extend(wins.tolist())
            # What functions log is of the policy's completions alone, which come next.
            self._pending_extra_logs.clear()
            self._pending_metrics.clear()
        rewards, log_odds, valid = self._compare(inputs, prompts, completions, completion_ids_list, num_generations)
        signals = group_signal(log_odds, self.args.loss_type)
        enters = entering_responses(signals, valid, self.args.pairing)
        weights = enters / enters.sum(1, keepdim=True).clamp(min=1)
        best, worst = best_and_worst(signals, valid)
        self._signals = {"signals": signals, "weights": weights, "best": best, "worst": worst}
        margin = (signals * best).sum(1) - (signals * worst).sum(1)
        self._metrics[mode]["objective/scores_margin"].append(margin.mean().item())
        return rewards

    def _compare(
        self, inputs: list, prompts: list, completions: list, completion_ids: list[list[int]], num_generations: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        The parent's rewards, `(G K, F)`; and of the G groups of all processes the log-odds `(G, K, K)`, added up over
        reward functions, and which completions take part, `(G, K)`.
        """
        for judge in self.reward_funcs:
            if isinstance(judge, Judge):
                judge.num_generations = num_generations
        # A column `completions` would come a second time, as an argument of the functions.
        inputs = [{name: value for name, value in row.items() if name != "completions"} for row in inputs]
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        if rewards.isinf().any():
            index, function = rewards.isinf().nonzero()[0].tolist()
            raise ValueError(
                f"{self.reward_func_names[function]} gave completion {index} a reward of "
                f"{rewards[index, function].item()}: return a finite number, or None for a completion that takes no "
                "part."
            )
        log_odds = torch.zeros(len(rewards) // num_generations, num_generations, num_generations)
        for judge, weight, column in zip(self.reward_funcs, self.reward_weights, rewards.cpu().unbind(1), strict=True):
            matrix = getattr(judge, "log_odds", None)
            if matrix is None:
                matrix = reward_log_odds(column.view(-1, num_generations))
            log_odds += weight * matrix
        valid = ~rewards.cpu().isnan().all(1).view(-1, num_generations)
        if self.args.score_clip is not None:
            log_odds = log_odds.clamp(-self.args.score_clip, self.args.score_clip)
        ended = torch.tensor(
            [bool(set(ids) & set(self.eos_token_ids)) for ids in completion_ids], device=self.accelerator.device
        )
        ended = gather(ended).cpu().view(-1, num_generations)
        if self.args.missing_eos_penalty is not None:
            log_odds = penalise(log_odds, ~ended, self.args.missing_eos_penalty)
        if self.mask_truncated_completions:
            valid = valid & ended
        return rewards, log_odds, valid

    @torch.no_grad()
    def _win_rates(
        self, inputs: list, prompts: list, completions: list, completion_ids: list[list[int]], num_generations: int
    ) -> torch.Tensor:
        """Mean probability, for each prompt, that a completion of the policy is preferred to one of the reference."""
        # Generating counts what it generates.
        with self._reference_as_policy(), temporarily(self, _metrics={"eval": defaultdict(list)}):
            _, reference_ids, _, others, *_ = self._generate(prompts)

        def alternating(first: list, second: list) -> list:
            return [value for pair in zip(first, second, strict=True) for value in pair]

        _, log_odds, _ = self._compare(
            alternating(inputs, inputs),
            alternating(prompts, prompts),
            alternating(completions, others),
            alternating(completion_ids, reference_ids),
            2 * num_generations,
        )
        return log_odds[:, 0::2, 1::2].sigmoid().mean((1, 2))

    @contextlib.contextmanager
    def _reference_as_policy(self):
        """Generation samples from the reference."""
        if self.ref_model is None:
            model = self.accelerator.unwrap_model(self.model)
            with use_adapter(model, REFERENCE_ADAPTER if has_reference_adapter(model) else None):
                yield
            return
        with temporarily(self, model_wrapped=self.ref_model):
            yield

    def _prepare_inputs(self, generation_batch):
        if not self.model.training:
            return self._only_entering(self._generate_and_score_completions(generation_batch))
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = [self._only_entering(part) for part in split_tensor_dict(batch, steps)]
        return self._buffered_inputs[self._step % steps]

    def _only_entering(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch without the completions that enter no term, of which at least one stays for the forward."""
        size = len(batch["weights"])
        if self.args.loss_type in PAIRWISE:
            return {**batch, "num_responses": size}
        kept = batch["weights"].nonzero()[:, 0]
        kept = kept if len(kept) else torch.zeros(1, dtype=torch.long, device=kept.device)
        rows = {name: value[kept] if value.dim() else value for name, value in batch.items()}
        return {**rows, "num_responses": size}

    # --- The loss ----------------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        mode = "train" if self.model.training else "eval"
        mask = inputs["completion_mask"]
        logps, entropies, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].shape[1],
            compute_entropy=True,
        )
        log_ratios = ((logps - inputs["ref_per_token_logps"]) * mask).sum(1)
        terms = log_ratios / mask.sum(1).clamp(min=1) if self.args.length_normalize else log_ratios
        num_generations = self.num_generations if mode == "train" else self.num_generations_eval
        if self.args.loss_type in PAIRWISE:
            groups, signals = terms.view(-1, num_generations), inputs["signals"].view(-1, num_generations)
            valid = inputs["weights"].view(-1, num_generations) > 0
            loss = policy_loss(groups, signals, self.args.loss_type, self.current_beta, valid=valid).mean()
        else:
            # The mean over prompts of means over their completions, some of which may be in other batches.
            losses = inputs["weights"] * response_loss(terms, inputs["signals"], self.current_beta)
            loss = losses.sum() * num_generations / inputs["num_responses"]
        self._record(mode, inputs, (logps * mask).sum(1), log_ratios, (entropies * mask).sum(1), mask.sum(1))
        return loss / (self.current_gradient_accumulation_steps if mode == "train" else 1)

    # --- Checkpoints -------------------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self._update is not None and self._update.num_updates:
            self._update.save(Path(output_dir), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._update is not None and checkpoint is not None:
            self._update.load(Path(checkpoint), self.model)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
    ) -> None:
        if self.is_world_process_zero():
            facts = CardFacts.of_trainer(self, self.args.output_dir, dataset_name, tags, license)
            generate_policy_card(facts, self.reward_func_names).save(Path(self.args.output_dir) / "README.md")

    # --- Metrics -----------------------------------------------------------------------------------------------------

    @property
    def current_beta(self) -> float:
        """beta of this epoch."""
        return self._betas[min(int(self.state.epoch or 0), len(self._betas) - 1)]

    @torch.no_grad()
    def _record(
        self,
        mode: str,
        inputs: dict[str, torch.Tensor],
        logps: torch.Tensor,
        log_ratios: torch.Tensor,
        entropies: torch.Tensor,
        lengths: torch.Tensor,
    ) -> None:
        """Means over completions, their tokens, and the best and worst of each prompt, over all processes."""
        best, worst = inputs["best"], inputs["worst"]
        rewards = self.current_beta * log_ratios
        sums = {
            "objective/kl": (log_ratios, torch.ones_like(log_ratios)),
            "objective/entropy": (-logps, torch.ones_like(logps)),
            "entropy": (entropies, lengths),
            "rewards/chosen": (rewards * best, best),
            "rewards/rejected": (rewards * worst, worst),
            "logps/chosen": (logps * best, best),
            "logps/rejected": (logps * worst, worst),
        }
        local = torch.stack(
            [torch.stack([values.sum().float(), counts.sum().float()]) for values, counts in sums.values()]
        )
        totals = self.accelerator.reduce(local, reduction="sum").tolist()
        for name, (total, count) in zip(sums, totals, strict=True):
            self._metrics[mode][name].append(total / count if count else math.nan)
        metrics = self._metrics[mode]
        metrics["rewards/margins"].append(metrics["rewards/chosen"][-1] - metrics["rewards/rejected"][-1])
        metrics["beta"].append(self.current_beta)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not self.model.training:
            metrics = self._metrics["eval"]
            wins = metrics.get("win_rate", [])
            if len(wins) > 1:
                # Normal approximation over prompts: the mean is within this of the truth in 95 of 100 samples.
                metrics["win_rate_ci"] = [1.96 * statistics.stdev(wins) / math.sqrt(len(wins))]
            # Of one of several datasets, `logs` have its name: `eval_name_loss`.
            loss = next((name for name in logs if name.endswith("loss")), "eval_loss")
            dataset = loss.removeprefix("eval_").removesuffix("loss")
            for name in list(metrics):
                metrics[f"{dataset}{name}"] = metrics.pop(name)
        super().log(logs, start_time)


def init_kwargs(args: GPOConfig, quantization_config: BitsAndBytesConfig | None) -> dict[str, Any]:
    """How `GRPOTrainer` loads a policy that is given by name."""
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {}), "use_safetensors": True}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    return kwargs


def load_policy_adapter(name: str, kwargs: dict[str, Any]) -> PeftModel:
    """An adapter to be trained on, by its directory or Hub id, on its base, which is loaded as `kwargs` say."""
    adapter = read_adapter(name, hub_arguments(kwargs))
    kwargs = {key: value for key, value in kwargs.items() if key not in HUB_ARGUMENTS}
    base = create_model_from_path(adapter.base, **kwargs, **adapter.base_kwargs)
    return PeftModel.from_pretrained(base, adapter.directory, is_trainable=True)
