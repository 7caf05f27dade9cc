"""The model card that [`GPMTrainer`] writes beside every model it saves."""

import os
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers.trainer_callback import TrainerState

from ..models import GPMModelConfig
from .gpm_config import MODEL_FIELDS, GPMConfig

__all__ = ["generate_model_card"]

CITATION = """@inproceedings{zhang2025beyond,
  title     = {Beyond Bradley-Terry Models: A General Preference Model for Language Model Alignment},
  author    = {Zhang, Yifan and Zhang, Ge and Wu, Yue and Xu, Kangping and Gu, Quanquan},
  booktitle = {International Conference on Machine Learning},
  year      = {2025},
  url       = {https://arxiv.org/abs/2410.02197}
}"""

SNIPPET = """from gpm_trl import PreferenceScorer

{load}
ranking = scorer.rank({prompt}, ["4", "5"])
print(ranking.probabilities)"""

LOAD = """scorer = PreferenceScorer.from_pretrained("{name}")"""

# An adapter names its base model; where that has no name, it is loaded by hand.
LOAD_ADAPTER = """from gpm_trl import GPMForPreference
from peft import PeftModel
from transformers import AutoTokenizer

base = GPMForPreference.from_pretrained(
    "{base_model}",
    {arguments},
)
model = PeftModel.from_pretrained(base, "{name}")
scorer = PreferenceScorer(model, AutoTokenizer.from_pretrained("{name}"))"""

# The one place where the formula is written again: for readers who do not have `gpm_trl.preference`.
CARRIED_SNIPPET = """import torch
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
eos = tokenizer.eos_token_id


def tokenize(text):
    begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return tokenizer(text, add_special_tokens=not begun).input_ids


{render}
prompt_ids = tokenize(render())
embeddings = []
for answer in ["4", "5"]:
    ids = tokenize(render(answer))[len(prompt_ids) :]
    ids = ids[: len(ids) - ids[::-1].index(eos)] if eos in ids else [*ids, eos]
    with torch.no_grad():
        output = model(torch.tensor([prompt_ids + ids]), prompt_lengths=torch.tensor([len(prompt_ids)]))
    embeddings.append(output.embeddings[0])  # at the last token of the response
even, odd = torch.stack(embeddings).unflatten(-1, (-1, 2)).unbind(-1)
products = (even * output.scales) @ odd.T  # the scales are those of the prompt
print(torch.sigmoid((products - products.T) / output.temperature))"""

RENDER_TEXT = """def render(answer=""):
    return "{question}" + answer"""

RENDER_CHAT = """def render(answer=None):
    messages = [{{"role": "user", "content": "{question}"}}]
    messages += [{{"role": "assistant", "content": answer}}] if answer is not None else []
    return tokenizer.apply_chat_template(messages, tokenize=False)"""

LOSSES = {
    "cross_entropy": "-[p log sigmoid((s - margin) / tau) + (1 - p) log sigmoid(-(s - margin) / tau)]",
    "regression": "((s - margin) / tau - s_D)^2",
}


def generate_model_card(
    config: GPMModelConfig,
    args: GPMConfig,
    state: TrainerState,
    name_or_path: str,
    base_model: str,
    is_adapter: bool,
    is_conversational: bool,
    num_rows: int | None,
    dataset_name: str | list[str] | None,
    license: str | None,
    tags: list[str],
    links: dict[str, str | None],
) -> ModelCard:
    """
    A card with the loss, the settings, the last evaluation, the citation and a snippet that runs.

    Args:
        config ([`GPMModelConfig`]): The model's.
        args ([`GPMConfig`]): What it was trained with.
        state ([`~transformers.TrainerState`]): For the last evaluation.
        name_or_path (`str`): What the snippet loads: a Hub id or a directory.
        base_model (`str`): The model it was initialised from: a Hub id, a directory, or empty where it is none.
        is_adapter (`bool`): Whether a PEFT adapter is saved rather than a whole model.
        is_conversational (`bool`): Whether the snippet's prompt is a message, for a tokenizer with a chat template.
        num_rows (`int`, *optional*): Prompts that it was trained on.
        dataset_name (`str` or `list[str]`, *optional*): Hub ids.
        license (`str`, *optional*): As the Hub calls it: `"apache-2.0"`, ...
        tags (`list[str]`): For the Hub's filters.
        links (`dict`): `wandb_url`, `trackio_url` and `comet_url`, each a URL or `None`.
    """
    question = "What is 2 + 2?"
    prompt = f'[{{"role": "user", "content": "{question}"}}]' if is_conversational else f'"{question}"'
    model_settings = {name: getattr(config, name) for name in MODEL_FIELDS}
    arguments = model_settings | {"renderer": config.renderer}
    render = (RENDER_CHAT if is_conversational else RENDER_TEXT).format(question=question)
    load = (LOAD_ADAPTER if is_adapter and not base_model else LOAD).format(
        name=name_or_path,
        base_model="path/to/the/base/model",
        arguments=",\n    ".join(f"{name}={value!r}" for name, value in arguments.items()),
    )
    metrics = _last_evaluation(state)
    base_model_id = base_model if base_model and not os.path.isdir(base_model) else None
    versions = {name: version(name) for name in ("gpm-trl", "trl", "transformers", "torch", "datasets", "peft")}
    return ModelCard.from_template(
        ModelCardData(
            base_model=base_model_id,
            datasets=dataset_name,
            library_name="peft" if is_adapter else "transformers",
            license=license,
            metrics=["accuracy"] if any(name.endswith("accuracy") for name in metrics) else None,
            model_name=Path(name_or_path).name,
            pipeline_tag="text-ranking",
            tags=["generated_from_trainer", *tags],
        ),
        template_path=str(files("gpm_trl.trainer").joinpath("templates/gpm_model_card.md")),
        title=Path(name_or_path).name,
        base_model=base_model_id,
        datasets=[dataset_name] if isinstance(dataset_name, str) else dataset_name or [],
        config=config,
        args=args,
        snippet=SNIPPET.format(load=load, prompt=prompt),
        carried_snippet=None if is_adapter else CARRIED_SNIPPET.format(name=name_or_path, render=render),
        loss=LOSSES[args.loss_type],
        settings=model_settings | _training_settings(args, num_rows),
        metrics=metrics,
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
        citation=CITATION,
        **links,
    )


def _training_settings(args: GPMConfig, num_rows: int | None) -> dict[str, Any]:
    """What the model was trained with, by the names of the arguments where they have one."""
    settings = {
        "max_length": args.max_length,
        "long_rows": args.long_rows,
        "loss_type": args.loss_type,
        "sft_loss_coef": args.sft_loss_coef,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": args.lr_scheduler_type.value,
        "warmup_steps": args.warmup_steps,
        "num_train_epochs": args.num_train_epochs if args.max_steps <= 0 else f"(max_steps {args.max_steps})",
        "total batch size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "seed": args.seed,
        "precision": args.mixed_precision if args.mixed_precision != "no" else "full",
    }
    if num_rows is not None:
        settings["training prompts"] = num_rows
    return settings


def _last_evaluation(state: TrainerState) -> dict[str, Any]:
    """The metrics of the last step with an evaluation, on one dataset or on several, and the step."""
    evaluations = [entry for entry in state.log_history if any(name.startswith("eval_") for name in entry)]
    metrics = {}
    for entry in evaluations:
        if entry["step"] == evaluations[-1]["step"]:
            metrics |= {name: value for name, value in entry.items() if name.startswith("eval_")}
    timing = ("_runtime", "_per_second", "_time")
    shown = {name: f"{value:.4g}" for name, value in metrics.items() if not name.endswith(timing)}
    return {**shown, "step": evaluations[-1]["step"]} if evaluations else {}
