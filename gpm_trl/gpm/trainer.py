"""Trainer for general preference models."""

import copy
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, EvalPrediction, PreTrainedTokenizerBase
from trl import RewardTrainer
from trl.trainer.utils import get_config_model_id

from ..data import DataCollatorForGroups, Renderer, prepare_dataset
from ..data.batches import fill_batches
from ..data.groups import GROUP_FEATURES, read_first
from ..data.renderer import count_embeddings
from ..models import GPMForPreference, GPMModelConfig
from ..models.loading import check_saved
from ..models.shared_prefix import share_prefixes
from ..preference import preference_cross_entropy, preference_regression, preference_score
from ..saving import WholeCheckpoints, whole_files
from .config import MODEL_FIELDS, GPMConfig, temporarily
from .metrics import STATISTICS, group_statistics, mean_metrics
from .model_card import generate_model_card
from .preparation import (
    check_base_is_elsewhere,
    check_pad_token,
    checked_base,
    copied_heads,
    keep_heads_trainable,
    load_model,
    load_tokenizer,
    prepare_peft_config,
    set_renderer,
)

__all__ = ["GPMTrainer"]

MODEL_INPUTS = ("input_ids", "attention_mask", "prompt_lengths", "shared_prefix_layout")


class GPMTrainer(WholeCheckpoints, RewardTrainer):
    r"""
    Trainer for general preference models: [`~trl.RewardTrainer`] with another model, batch and loss.

    Overrides of [`~trl.RewardTrainer`]: `_prepare_dataset` (rows become groups: a prompt, its distinct responses and
    the comparisons between them), `compute_loss`, `log` (the metrics of training) and `create_model_card`. Overrides
    of [`~transformers.Trainer`]: `evaluation_loop` (the metrics of evaluation), `_save` and `_push_from_checkpoint` (a
    model card and the model's code with each checkpoint), and those of [`~gpm_trl.saving.WholeCheckpoints`].
    Everything else, from the pad token to PEFT, is the parent's.

    Args:
        model (`str`, [`GPMForPreference`] or [`~peft.PeftModel`]):
            A causal LM, which gets new heads, or a general preference model or an adapter of one, which is trained
            further: by Hub id or directory, or already made. A name is loaded with `args.model_init_kwargs`, in
            float32 unless these say otherwise.
        args ([`GPMConfig`], *optional*):
            Training arguments.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows in any preference format of TRL, or K-way rows: see [`~gpm_trl.data.prepare_dataset`].
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of these, *optional*):
            Rows to evaluate on, in the same formats.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer; loaded by the model's name if `None`. Without a pad token, its EOS token pads.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train. Both heads are added to its `modules_to_save`, its `task_type` becomes `None`, and
            without target modules it gets `"all-linear"`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            For a model given by name; the heads stay in float32.
        compute_metrics (`Callable`, *optional*):
            Gets an [`~transformers.EvalPrediction`] with the log-odds of the comparisons in `predictions` and their
            targets in `label_ids`, one row a group, -100 where a group has fewer comparisons.
        kwargs:
            The other arguments of [`~trl.RewardTrainer`]: `data_collator`, `callbacks`, `optimizers`,
            `optimizer_cls_and_kwargs`, `preprocess_logits_for_metrics`.

    Raises:
        TypeError: If `model` is no general preference model.
        ValueError: If an argument contradicts the model, or would be ignored.

    Example:

    ```python
    from datasets import load_dataset
    from gpm_trl import GPMTrainer

    trainer = GPMTrainer(
        model="Qwen/Qwen3-0.6B",
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    )
    trainer.train()
    trainer.save_model()
    ```
    """

    # `compute_loss` divides by the number of comparisons of the whole step, over accumulated batches and ranks.
    loss_is_scaled_for_ga = True

    _tag_names = ["trl", "gpm", "preference-model"]

    def __init__(
        self,
        model: "str | GPMForPreference | PeftModel",
        args: GPMConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: "Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None" = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        **kwargs,
    ):
        if train_dataset is None:
            raise ValueError("`train_dataset` is required.")  # the parent says so, once the model is loaded
        is_named = isinstance(model, str)
        name = model if is_named else get_config_model_id(model.config)
        if is_named:
            check_saved(name)  # before its tokenizer
        if args is None:
            args = GPMConfig(f"{name.split('/')[-1]}-GPM")
        if args.accelerator_config.dispatch_batches:
            raise ValueError("`dispatch_batches=True` would cut batches between rows that are compared: leave it out.")
        args.accelerator_config.dispatch_batches = False  # or streams would be dispatched
        eval_datasets = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
        first = read_first(train_dataset, "train", args.column_mapping)
        for key, rows in eval_datasets.items():
            read_first(rows, key, args.column_mapping)
        self._conversational = first and first[-1]
        init_kwargs = args.model_init_kwargs
        revision = (init_kwargs or {}).get("revision") if is_named else None
        # The tokenizer first: reading one is quick, loading a model is not.
        if processing_class is None:
            processing_class = load_tokenizer(name, args, is_named)
        if is_named:
            model = load_model(model, args, quantization_config)
        base = checked_base(model, args)
        if peft_config is not None or base is not model:
            check_base_is_elsewhere(base, args.output_dir)
        set_renderer(base.config, args, self._conversational)
        if peft_config is not None:
            peft_config = prepare_peft_config(peft_config, base, revision)
        given_heads = copied_heads(base)
        shares = _set_up_packing(base, args, kwargs.get("data_collator"))
        self._base = base  # `chat_template_path` may make its embedding larger
        if not shares:  # else no row needs it
            check_pad_token(processing_class, args, base)
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = DataCollatorForGroups(processing_class, args.pad_to_multiple_of, shares)
        # What a model was loaded with is used. The parent, which gets the model, would warn that it ignores it.
        with temporarily(args, model_init_kwargs=None if is_named else init_kwargs):
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                peft_config=peft_config,
                quantization_config=None if is_named else quantization_config,
                compute_metrics=compute_metrics,
                **kwargs,
            )
        # TRL before 1.15 says no here, and then the Trainer does not count the comparisons of a step.
        self.model_accepts_loss_kwargs = True
        self.label_names = ["labels"]  # for `compute_metrics`
        self._signature_columns = [*GROUP_FEATURES, "groups"]  # what the collator reads, not the model
        self._sums = defaultdict(lambda: torch.zeros(len(STATISTICS), dtype=torch.float64))
        self._num_tokens = 0
        if args.max_tokens_per_batch is not None:
            seed = args.seed if args.data_seed is None else args.data_seed
            with args.distributed_state.main_process_first(), args.distributed_state.local_main_process_first():
                self.train_dataset = fill_batches(self.train_dataset, args.max_tokens_per_batch, shares, seed)
        if is_peft_model(self.model):
            keep_heads_trainable(self.model, given_heads)
        self._keep_outputs_whole()

    def _keep_outputs_whole(self) -> None:
        """
        FSDP2's mixed precision, as accelerate sets it, rounds what a model returns, and gradients where they are added
        up over processes: embeddings of unit length would no longer have it.
        """
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            policy = plugin.mixed_precision_policy
            plugin.mixed_precision_policy = replace(policy, output_dtype=None, reduce_dtype=torch.float32)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        limits = (self._base.config.renderer["max_length"], args.long_rows)
        renderer = Renderer(processing_class, *limits, self._conversational, count_embeddings(self._base))
        # The first process of all, then the first of each machine, fill the caches that the others read.
        with args.distributed_state.main_process_first(), args.distributed_state.local_main_process_first():
            return prepare_dataset(
                dataset,
                renderer,
                target="score" if args.loss_type == "regression" else "label",
                group_by_prompt=args.group_by_prompt,
                name=dataset_name,
                num_proc=args.dataset_num_proc,
                column_mapping=args.column_mapping,
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        compared = inputs["comparison_mask"]  # (G, C_max); below, C comparisons in a row
        groups = compared.nonzero()[:, 0]  # (C,)
        comparisons, targets = inputs["comparisons"][compared], inputs["labels"][compared]  # (C, 2), (C,)
        margins = inputs["margins"][compared] if "margins" in inputs else None
        preferred = torch.sign(targets if self.args.loss_type == "regression" else targets - 0.5)
        # The second response of a comparison where the data prefers it, else the first: what the LM loss imitates.
        winners = torch.where(preferred >= 0, comparisons[:, 0], comparisons[:, 1])

        output = model(
            **{name: inputs[name] for name in MODEL_INPUTS if name in inputs},
            lm_labels=_lm_labels(inputs, winners) if self.args.sft_loss_coef > 0 else None,
        )
        first, second = output.embeddings[comparisons].unbind(1)  # (C, 2k)
        # One gate a prompt: it depends on the prompt alone.
        scores = preference_score(first, second, output.scales[inputs["group_rows"][groups]])  # (C,)
        loss_function = preference_regression if self.args.loss_type == "regression" else preference_cross_entropy
        losses = loss_function(scores, targets, output.temperature, margins)
        if self.args.sft_loss_coef > 0:
            losses = (1 - self.args.sft_loss_coef) * losses + self.args.sft_loss_coef * output.lm_loss[winners]

        self._record(group_statistics(inputs, output, groups, scores, losses, preferred))
        loss = losses.mean()
        if num_items_in_batch is not None:
            # The number is that of all ranks, whose gradients are averaged. Ranks of tensor parallelism share a batch.
            ranks = self.accelerator.num_processes // self.get_tp_size()
            loss = losses.sum() * (ranks if self.args.average_tokens_across_devices else 1) / num_items_in_batch
        if not return_outputs:
            return loss
        log_odds = inputs["labels"].masked_scatter(compared, (scores / output.temperature).to(inputs["labels"].dtype))
        return loss, {"loss": loss, "log_odds": log_odds}

    def _record(self, statistics: torch.Tensor) -> None:
        """Add the statistics of a batch, over all ranks, to the sums of the step."""
        if self.model.training:  # what a sampler repeats to fill the last batch is trained on, so it counts
            # Numbers of a step are few enough for float32, and some devices have no float64.
            sums = self.accelerator.gather(statistics.sum(0, keepdim=True)).cpu().double().sum(0)
            self._num_tokens += int(sums[list(STATISTICS).index("num_tokens")]) // self.get_tp_size()
            self._sums["train"] += sums
        else:
            self._sums["eval"] += self.accelerator.gather_for_metrics(statistics).cpu().double().sum(0)

    def _pop_metrics(self, mode: str) -> dict[str, float]:
        sums = self._sums.pop(mode, None)
        return {} if sums is None else {"num_tokens": self._num_tokens, **mean_metrics(sums)}

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self._sums.pop("eval", None)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self._pop_metrics("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            # The loss that is logged is the Trainer's own, a mean over steps.
            logs |= {name: value for name, value in self._pop_metrics("train").items() if name != "loss"}
        super().log(logs, start_time)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None, license=None):
        if self.is_world_process_zero():
            card = generate_model_card(self, self.args.output_dir, dataset_name, tags, license)
            card.save(Path(self.args.output_dir) / "README.md")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        directory = output_dir or self.args.output_dir
        with whole_files(directory) as partial:
            super()._save(partial, state_dict)
            model = self.accelerator.unwrap_model(self.model)
            if is_peft_model(model):
                config = copy.deepcopy(model.config)
                config.dtype = model.dtype
                config.to_json_file(Path(partial) / "config.json")  # `adapter_config.json` says nothing of the heads
            generate_model_card(self, directory).save(Path(partial) / "README.md")

    def _check_resumed(self, checkpoint: str) -> None:
        if not Path(checkpoint, "config.json").exists():
            return
        saved = GPMModelConfig.from_pretrained(checkpoint)
        own = self.model.config
        changed = [name for name in MODEL_FIELDS if getattr(saved, name) != getattr(own, name)]
        if changed:
            was, now = (", ".join(f"{name}={getattr(one, name)}" for name in changed) for one in (saved, own))
            raise ValueError(
                f"{checkpoint} is of a model with {was}, and this one has {now}: resume with the settings of the run, "
                "or begin another in another `output_dir`."
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():  # the parent takes weights and configuration alone
            for file in (*Path(checkpoint_folder).glob("*.py"), *Path(checkpoint_folder).glob("README.md")):
                shutil.copy(file, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)


def _set_up_packing(base: GPMForPreference, args: GPMConfig, data_collator: Callable | None) -> bool:
    """Make the backbone take packed rows, each prompt once, if nothing hinders it. Returns whether it does."""
    if data_collator is not None and args.max_tokens_per_batch is not None:
        raise ValueError("`max_tokens_per_batch` is about the trainer's own batches: leave it or `data_collator` out.")
    hindrances = {
        "`sft_loss_coef` reads the tokens of padded rows": args.sft_loss_coef > 0,
        "`pad_to_multiple_of` is about padded rows": args.pad_to_multiple_of is not None,
        "`neftune_noise_alpha` goes by the length of padded rows": args.neftune_noise_alpha is not None,
        "`torch_compile` is on": args.torch_compile,
        "a `data_collator` is given": data_collator is not None,
    }
    hindrance = next((reason for reason, applies in hindrances.items() if applies), None)
    return share_prefixes(base.model, args.shared_prefix, hindrance)


def _lm_labels(inputs: dict[str, torch.Tensor], winners: torch.Tensor) -> torch.Tensor:
    """Token ids of the preferred responses, -100 elsewhere, `(N, L)`."""
    mask = inputs["attention_mask"].bool()
    is_response = mask & (mask.cumsum(-1) > inputs["prompt_lengths"].unsqueeze(-1))
    is_winner = torch.zeros_like(inputs["prompt_lengths"], dtype=torch.bool)
    is_winner[winners] = True
    return inputs["input_ids"].masked_fill(~(is_response & is_winner.unsqueeze(-1)), -100)
