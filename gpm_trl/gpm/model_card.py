"""The model card of a general preference model."""

import os
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from transformers import Trainer
from transformers.trainer_callback import TrainerState
from trl.trainer.utils import get_config_model_id

from .config import MODEL_FIELDS

__all__ = ["CITATION", "generate_model_card"]

CITATION = """@inproceedings{zhang2025beyond,
  title     = {Beyond Bradley-Terry Models: A General Preference Model for Language Model Alignment},
  author    = {Zhang, Yifan and Zhang, Ge and Wu, Yue and Xu, Kangping and Gu, Quanquan},
  booktitle = {International Conference on Machine Learning},
  year      = {2025},
  url       = {https://arxiv.org/abs/2410.02197}
}"""
# As `_paper` of TRL's trainers.
HRC_PAPER = {
    "title": "Transitivity Meets Cyclicity",
    "id": "2605.17342",
    "citation": """@inproceedings{huang2026transitivity,
  title     = {Transitivity Meets Cyclicity},
  author    = {Huang and Li and Zhao and Li},
  booktitle = {International Conference on Machine Learning},
  year      = {2026},
  url       = {https://arxiv.org/abs/2605.17342}
}""",
}


def generate_model_card(
    trainer: Trainer,
    output_dir: str,
    dataset_name: str | list[str] | None = None,
    tags: str | list[str] | None = None,
    license: str | None = None,
) -> ModelCard:
    """
    The card, not yet saved, of the model that a [`GPMTrainer`] has trained: the formula, the loss, the settings, the
    last evaluation, and snippets that load it from `output_dir`, or from the Hub if it is pushed. What precedes the
    name of a directory is left out where it says where this machine keeps things: the card may be published.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    is_adapter = is_peft_model(model)
    config = model.config
    # A model that began as a causal LM has the name of that in the configuration of its backbone.
    base_model = get_config_model_id(config) or get_config_model_id(config.get_text_config())
    name_or_path = trainer.hub_model_id or (Path(output_dir).name if os.path.isabs(output_dir) else output_dir)
    tags = [tags] if isinstance(tags, str) else tags or []
    metrics = _last_evaluation(trainer.state)
    has_template = trainer.processing_class.chat_template is not None
    model_settings = {name: getattr(config, name) for name in MODEL_FIELDS}
    arguments = model_settings | {"renderer": config.renderer}
    versions = {name: version(name) for name in ("gpm-trl", "trl", "transformers", "torch", "datasets", "peft")}
    return ModelCard.from_template(
        ModelCardData(
            base_model=base_model if base_model and not os.path.isdir(base_model) else None,
            datasets=[dataset_name] if isinstance(dataset_name, str) else dataset_name,
            library_name="peft" if is_adapter else "transformers",
            license=license,
            metrics=["accuracy"] if any(name.endswith("accuracy") for name in metrics) else None,
            model_name=Path(name_or_path).name,
            pipeline_tag="text-ranking",
            tags=["generated_from_trainer", *sorted({*tags, *trainer._tag_names})],
        ),
        template_str=files("gpm_trl.gpm").joinpath("templates", "gpm_model_card.md").read_text(),
        name_or_path=name_or_path,
        config=config,
        is_adapter=is_adapter,
        # The scorer loads an adapter's base model by its name. Where it has none, the snippet does, with these.
        base_arguments=None if base_model else {name: repr(value) for name, value in arguments.items()},
        # As `PreferenceScorer.as_prompt`.
        is_conversational=has_template and config.renderer.get("conversational") is not False,
        loss_type=trainer.args.loss_type,
        settings=model_settings | _training_settings(trainer),
        metrics=metrics,
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
        citation=f"{CITATION}\n\n{HRC_PAPER['citation']}" if config.reward_dim and config.embedding_dim else CITATION,
    )


def _training_settings(trainer: Trainer) -> dict[str, Any]:
    """What the model was trained with, by the names of the arguments where they have one."""
    args, dataset = trainer.args, trainer.train_dataset
    names = ("max_length", "long_rows", "loss_type", "sft_loss_coef", "max_tokens_per_batch", "learning_rate")
    names += ("warmup_steps", "seed", "mixed_precision")
    settings = {
        **{name: getattr(args, name) for name in names},
        "lr_scheduler_type": args.lr_scheduler_type.value,
        "num_train_epochs": args.num_train_epochs if args.max_steps <= 0 else f"(max_steps {args.max_steps})",
        "total batch size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
    }
    # With `max_tokens_per_batch`, a row of the dataset is a batch.
    rows = "training rows" if args.max_tokens_per_batch is None else "training batches"
    return settings | ({rows: len(dataset)} if isinstance(dataset, Dataset) else {})


def _last_evaluation(state: TrainerState) -> dict[str, Any]:
    """The metrics of the last step with an evaluation, on one dataset or on several, and the step."""
    evaluations = [entry for entry in state.log_history if any(name.startswith("eval_") for name in entry)]
    last = [entry for entry in evaluations if entry["step"] == evaluations[-1]["step"]]
    metrics = {name: value for entry in last for name, value in entry.items() if name.startswith("eval_")}
    timing = ("_runtime", "_per_second", "_time")
    shown = {name: f"{value:.4g}" for name, value in metrics.items() if not name.endswith(timing)}
    return shown | ({"step": last[0]["step"]} if last else {})
