"""Trainer for general preference models."""

import copy
import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    EvalPrediction,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging
from trl import RewardTrainer
from trl.trainer.utils import (
    create_model_from_path,
    get_config_model_id,
    global_then_local_main_first,
)

from ..data import DataCollatorForGroups, Renderer, prepare_dataset
from ..data.batches import fill_batches
from ..data.collator import NO_COMPARISON
from ..data.groups import GROUP_FEATURES
from ..models import GPMForPreference, GPMModelConfig
from ..models.modeling_gpm import HEAD_NAMES
from ..models.shared_prefix import share_prefixes
from ..preference import preference_cross_entropy, preference_regression, preference_score
from ..saving import WholeCheckpoints, whole_files
from .config import GPMConfig
from .metrics import STATISTICS, group_statistics, mean_metrics
from .model_card import CITATION, CardFacts, generate_model_card

__all__ = ["GPMTrainer"]

logger = logging.get_logger(__name__)

MODEL_INPUTS = ("input_ids", "attention_mask", "prompt_lengths", "shared_prefix_layout")


class GPMTrainer(WholeCheckpoints, RewardTrainer):
    r"""
    Trainer for general preference models: [`~trl.RewardTrainer`] with another model, batch and loss.

    Overrides of [`~trl.RewardTrainer`]: `_prepare_dataset` and `_set_signature_columns_if_needed` (rows become groups:
    a prompt, its distinct responses and the comparisons between them), `compute_loss`, and `create_model_card`.
    Overrides of [`~transformers.Trainer`]: `evaluation_loop` and `log` (metrics as means over comparisons), `_save`
    and `_push_from_checkpoint` (a model card and the model's code with each checkpoint), and those of
    [`~gpm_trl.saving.WholeCheckpoints`]. Everything else, from tokenizer set-up to PEFT, is the parent's.

    Args:
        model (`str`, [`GPMForPreference`] or [`~peft.PeftModel`]):
            A causal LM, which gets new heads, a general preference model or an adapter of one, which are trained
            further, by Hub id or directory; or a model already made. A name is loaded with `args.model_init_kwargs`,
            in float32 unless these say otherwise.
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
    ```
    """

    # `compute_loss` divides by the number of comparisons of the whole step, over accumulated batches and ranks.
    loss_is_scaled_for_ga = True

    _tag_names = ["trl", "gpm", "preference-model"]
    _name = "GPM"
    _paper = {
        "title": "Beyond Bradley-Terry Models: A General Preference Model for Language Model Alignment",
        "id": "2410.02197",
        "citation": CITATION,
    }

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
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = GPMConfig(f"{model_name.split('/')[-1]}-GPM")
        if args.accelerator_config.dispatch_batches:
            raise ValueError(
                "`dispatch_batches=True` cuts batches between rows, but the comparisons of a batch are between its "
                "rows: leave it out."
            )
        args.accelerator_config.dispatch_batches = False  # streams would be dispatched by default
        # The tokenizer first: reading one is quick, loading a model is not.
        if processing_class is None:
            processing_class = self._load_tokenizer(model, args)
        self._check_tokenizer(processing_class, args)
        revision, init_kwargs = None, args.model_init_kwargs
        if isinstance(model, str):
            revision = (init_kwargs or {}).get("revision")
            model = self._load_model(model, args, quantization_config)
            # Used up. The parent, which gets a model, would say that it ignores them.
            args.model_init_kwargs = quantization_config = None
        config = self._checked_config(model, args)
        if peft_config is not None or is_peft_model(model):
            self._check_base_is_elsewhere(model, args.output_dir)
        self._set_renderer(config, args)
        if peft_config is not None:
            peft_config = self._prepare_peft_config(peft_config, model, revision)
        shares = self._shares_prefixes(model, args, kwargs.get("data_collator"))
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = DataCollatorForGroups(processing_class, args.pad_to_multiple_of, shares)
        self._statistics = defaultdict(lambda: torch.zeros(len(STATISTICS), dtype=torch.float64))
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            quantization_config=quantization_config,
            compute_metrics=compute_metrics,
            **kwargs,
        )
        args.model_init_kwargs = init_kwargs
        self.label_names = ["labels"]  # for `compute_metrics`
        if args.max_tokens_per_batch is not None:
            self.train_dataset = self._fill_batches(shares)
        self._keep_heads_trainable()
        self._keep_outputs_whole()

    @staticmethod
    def _load_tokenizer(model: Any, args: GPMConfig) -> PreTrainedTokenizerBase:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        if not name:
            raise ValueError("The model has no name to load a tokenizer by: pass `processing_class`.")
        revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)

    @staticmethod
    def _check_tokenizer(processing_class: PreTrainedTokenizerBase, args: GPMConfig) -> None:
        if processing_class.eos_token is None and args.eos_token is None:
            raise ValueError(
                f"{type(processing_class).__name__} has no EOS token, but every response must end in one: set "
                "`eos_token` in the config, or `tokenizer.eos_token`."
            )

    @staticmethod
    def _load_model(name: str, args: GPMConfig, quantization_config: BitsAndBytesConfig | None) -> GPMForPreference:
        init_kwargs = dict(args.model_init_kwargs or {})
        if quantization_config is not None:
            if "quantization_config" in init_kwargs:
                raise ValueError(
                    "`quantization_config` is given twice, to the trainer and in `args.model_init_kwargs`: keep one."
                )
            init_kwargs["quantization_config"] = quantization_config
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            init_kwargs["device_map"] = None
        init_kwargs.setdefault("trust_remote_code", args.trust_remote_code)
        set_seed(args.seed)  # for the new heads
        if args.sft_loss_coef > 0:
            init_kwargs["use_lm_head"] = True
        init_kwargs["is_trainable"] = True  # of an adapter
        return create_model_from_path(name, GPMForPreference, **args.model_settings(), **init_kwargs)

    @staticmethod
    def _checked_config(model: Any, args: GPMConfig) -> GPMModelConfig:
        """The model's configuration, if the model is of the right class and `args` does not contradict it."""
        unwrapped = model.get_base_model() if is_peft_model(model) else model
        if not isinstance(unwrapped, GPMForPreference):
            raise TypeError(
                f"`model` is a {type(unwrapped).__name__}, but GPMTrainer trains a GPMForPreference: pass the name of "
                "a causal LM, or `GPMForPreference.from_pretrained(...)`."
            )
        config = unwrapped.config
        for name, value in args.model_settings().items():
            if getattr(config, name) != value:
                raise ValueError(
                    f"`{name}` is {value} in the config but {getattr(config, name)} in the model: leave it out, or "
                    f"load the model with `GPMForPreference.from_pretrained(..., {name}={value!r})`."
                )
        if args.sft_loss_coef > 0 and not config.use_lm_head:
            raise ValueError(
                "`sft_loss_coef` needs the backbone's language-model head, which this model does not have: load a "
                "causal LM with `GPMForPreference.from_pretrained(..., use_lm_head=True)`."
            )
        return config

    @staticmethod
    def _set_renderer(config: GPMModelConfig, args: GPMConfig) -> None:
        """What the model's texts are rendered by from now on."""
        convention = config.renderer.get("convention", "gpm")
        if convention != "gpm":
            logger.warning(
                f"Texts were rendered by the convention {convention!r} for this model so far: it is now trained, and "
                "will be used, with texts as this package renders them."
            )
        # Said where it was, since an adapter's settings are merged into those of its base.
        said = {"convention": "gpm"} if "convention" in config.renderer else {}
        config.renderer = {**said, "max_length": args.max_length, "long_rows": args.long_rows}

    @staticmethod
    def _check_base_is_elsewhere(model: "GPMForPreference | PeftModel", output_dir: str) -> None:
        """Raise `ValueError` if an adapter or one of its checkpoints would be saved over the base that it needs."""
        base = (model.get_base_model() if is_peft_model(model) else model).name_or_path
        directory = Path(output_dir).resolve()
        if base and Path(base).resolve() in (directory, *directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
            raise ValueError(
                f"`output_dir` is {output_dir}, but the base model of the adapter is there ({base}): its config.json "
                "would be replaced, and neither could be loaded again. Choose another directory."
            )

    @staticmethod
    def _shares_prefixes(model: Any, args: GPMConfig, data_collator: Callable | None) -> bool:
        """Whether batches are packed, each prompt once."""
        if data_collator is not None and args.max_tokens_per_batch is not None:
            raise ValueError(
                "`max_tokens_per_batch` counts the tokens of the trainer's own batches, not those of the "
                "`data_collator` that is given: leave one of the two out."
            )
        hindrances = {
            "`sft_loss_coef` reads the tokens of padded rows": args.sft_loss_coef > 0,
            "`pad_to_multiple_of` is about padded rows": args.pad_to_multiple_of is not None,
            "`torch_compile` is on": args.torch_compile,
            "a `data_collator` is given": data_collator is not None,
        }
        hindrance = next((reason for reason, applies in hindrances.items() if applies), None)
        unwrapped = model.get_base_model() if is_peft_model(model) else model
        return share_prefixes(unwrapped.model, args.shared_prefix, hindrance)

    @staticmethod
    def _prepare_peft_config(
        peft_config: PeftConfig, model: GPMForPreference, revision: str | None = None
    ) -> PeftConfig:
        if peft_config.is_prompt_learning:
            raise ValueError(
                f"{type(peft_config).__name__} puts virtual tokens before the prompt, so that `prompt_lengths` would "
                "no longer say where it ends: use an adapter inside the layers, such as LoRA."
            )
        peft_config = copy.deepcopy(peft_config)
        # The classes for task types expect what such a model has: a causal LM's generation, a classifier's labels.
        peft_config.task_type = None
        peft_config.revision = revision or peft_config.revision  # of the base, to load it by
        heads = [name for name in HEAD_NAMES if hasattr(model, name)]
        peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or []), *heads})
        if peft_config.target_modules is None and getattr(peft_config, "target_parameters", None) is None:
            logger.info('`peft_config` has no target modules: it gets "all-linear".')
            peft_config.target_modules = "all-linear"
        return peft_config

    def _keep_heads_trainable(self) -> None:
        """Heads in float32 (for QLoRA, the parent casts trained weights to bfloat16), and none frozen."""
        if not is_peft_model(self.model):
            return
        for name, parameter in self.model.named_parameters():
            is_trained_copy = ".modules_to_save." in name and any(head in name for head in HEAD_NAMES)
            if is_trained_copy and getattr(self.model, "quantization_method", None) is not None:
                parameter.data = parameter.data.float()
        base = self.model.get_base_model()
        frozen = [
            name
            for name in HEAD_NAMES
            if hasattr(base, name)
            and not any(parameter.requires_grad for parameter in getattr(base, name).parameters())
        ]
        if frozen:
            raise ValueError(
                f"The adapter leaves {' and '.join(frozen)} frozen, so nothing would learn what they read: add "
                f"`modules_to_save={frozen}` to its config, or let the trainer make it from `peft_config`."
            )

    def _keep_outputs_whole(self) -> None:
        """
        FSDP2's mixed precision, as accelerate sets it, rounds what a model returns, and gradients where they are added
        up over processes: embeddings of unit length would no longer have it.
        """
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            policy = plugin.mixed_precision_policy
            plugin.mixed_precision_policy = replace(policy, output_dtype=None, reduce_dtype=torch.float32)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        renderer = Renderer(processing_class, max_length=args.max_length, long_rows=args.long_rows)
        with global_then_local_main_first():
            return prepare_dataset(
                dataset,
                renderer,
                target="score" if args.loss_type == "regression" else "label",
                group_by_prompt=args.group_by_prompt,
                name=dataset_name,
                num_proc=args.dataset_num_proc,
            )

    def _fill_batches(self, shared_prefix: bool) -> Dataset | IterableDataset:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        with global_then_local_main_first():
            return fill_batches(self.train_dataset, self.args.max_tokens_per_batch, shared_prefix, seed)

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = [*GROUP_FEATURES, "groups"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        compared = inputs["labels"] != NO_COMPARISON  # (G, C_max); below, C comparisons in a row
        groups = compared.nonzero()[:, 0]
        comparisons, targets = inputs["comparisons"][compared], inputs["labels"][compared]  # (C, 2), (C,)
        margins = inputs["margins"][compared] if "margins" in inputs else None
        preferred = torch.sign(targets if self.args.loss_type == "regression" else targets - 0.5)
        # The second response of a comparison where the data prefers it, else the first: what the LM loss imitates.
        winners = torch.where(preferred >= 0, comparisons[:, 0], comparisons[:, 1])

        output = model(
            **{name: inputs[name] for name in MODEL_INPUTS if name in inputs},
            lm_labels=self._lm_labels(inputs, winners) if self.args.sft_loss_coef > 0 else None,
        )
        first, second = output.embeddings[comparisons].unbind(1)
        # One gate a prompt: it depends on the prompt alone.
        scores = preference_score(first, second, output.scales[inputs["group_rows"][groups]])
        loss_function = preference_regression if self.args.loss_type == "regression" else preference_cross_entropy
        losses = loss_function(scores, targets, output.temperature, margins)
        if self.args.sft_loss_coef > 0:
            losses = (1 - self.args.sft_loss_coef) * losses + self.args.sft_loss_coef * output.lm_loss[winners]

        self._record(mode, group_statistics(inputs, output, groups, scores, losses, preferred))
        if num_items_in_batch is None:
            loss = losses.mean()
        else:
            # The number is that of all ranks, whose gradients are averaged.
            ranks = self.accelerator.num_processes // self._tp_size if self.args.average_tokens_across_devices else 1
            loss = losses.sum() * ranks / num_items_in_batch
        if not return_outputs:
            return loss
        log_odds = inputs["labels"].masked_scatter(compared, (scores / output.temperature).to(inputs["labels"].dtype))
        return loss, {"loss": loss, "log_odds": log_odds}

    @staticmethod
    def _lm_labels(inputs: dict[str, torch.Tensor], winners: torch.Tensor) -> torch.Tensor:
        """Token ids of the preferred responses, -100 elsewhere, `(N, L)`."""
        mask = inputs["attention_mask"].bool()
        is_response = mask & (mask.cumsum(-1) > inputs["prompt_lengths"].unsqueeze(-1))
        is_winner = torch.zeros_like(inputs["prompt_lengths"], dtype=torch.bool)
        is_winner[winners] = True
        return inputs["input_ids"].masked_fill(~(is_response & is_winner.unsqueeze(-1)), -100)

    def _record(self, mode: str, statistics: torch.Tensor) -> None:
        if mode == "train":  # what a sampler repeats to fill the last batch is trained on, so it counts
            sums = self.accelerator.gather(statistics.double().sum(0, keepdim=True))
        else:
            sums = self.accelerator.gather_for_metrics(statistics).double()
        sums = sums.sum(0).cpu()
        self._statistics[mode] += sums
        if mode == "train":
            self._total_train_tokens += int(sums[STATISTICS.index("num_tokens")]) // self._tp_size

    def _pop_metrics(self, mode: str) -> dict[str, float]:
        sums = self._statistics.pop(mode, None)
        if sums is None:
            return {}
        config = self.accelerator.unwrap_model(self.model).config
        return {"num_tokens": self._total_train_tokens, **mean_metrics(sums, has_gate=config.use_scale_gate)}

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self._statistics.pop("eval", None)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._pop_metrics("eval").items()}
        output.metrics.update(metrics)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            metrics = self._pop_metrics("train")
            metrics.pop("loss", None)  # the Trainer's own, a mean over steps
            self._metrics["train"] = {name: [value] for name, value in metrics.items()}
        super().log(logs, start_time)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
    ) -> None:
        if self.is_world_process_zero():
            self._write_model_card(self.args.output_dir, dataset_name, tags, license)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        directory = output_dir or self.args.output_dir
        with whole_files(directory) as partial:
            super()._save(partial, state_dict)
            model = self.accelerator.unwrap_model(self.model)
            if is_peft_model(model):
                base = model.get_base_model()
                config = copy.deepcopy(base.config)
                config.dtype = base.dtype
                config.to_json_file(Path(partial) / "config.json")  # `adapter_config.json` says nothing of the heads
        self._write_model_card(directory)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():  # the parent takes weights and configuration alone
            for file in (*Path(checkpoint_folder).glob("*.py"), *Path(checkpoint_folder).glob("README.md")):
                shutil.copy(file, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _write_model_card(
        self,
        output_dir: str,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
    ) -> None:
        model = self.accelerator.unwrap_model(self.model)
        config = model.get_base_model().config if is_peft_model(model) else model.config
        card = generate_model_card(CardFacts.of_trainer(self, output_dir, dataset_name, tags, license), config)
        os.makedirs(output_dir, exist_ok=True)
        card.save(Path(output_dir) / "README.md")
