"""The model cards that the trainers write."""

import os
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from transformers import Trainer, TrainingArguments, is_wandb_available
from transformers.trainer_callback import TrainerState
from trl.trainer.utils import get_comet_experiment_url, get_config_model_id, get_trackio_space_url

from ..models import GPMModelConfig
from .config import MODEL_FIELDS

__all__ = ["CardFacts", "generate_model_card", "generate_policy_card"]

QUESTION = "What is 2 + 2?"

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

# Of a comparison.
LOSSES = {
    "cross_entropy": (
        "the probability `p` that the first response is preferred",
        "-[p log sigmoid((s - margin) / tau) + (1 - p) log sigmoid(-(s - margin) / tau)]",
    ),
    "regression": ("the given log-odds `s_D`", "((s - margin) / tau - s_D)^2"),
}

GENERATE = """from transformers import pipeline

generator = pipeline("text-generation", model="{name}")
output = generator({prompt}, max_new_tokens=128, return_full_text=False)
print(output[0]["generated_text"])"""

# Of a completion or a pair of completions, with the signal `s`.
POLICY_LOSSES = {
    "gpo": "(l - s / beta)^2",
    "sppo": "(l - s / beta)^2",
    "sigmoid": "-log sigmoid(beta (l_w - l_l))",
    "ipo": "(l_w - l_l - 1 / (2 beta))^2",
    "rebel": "(beta (l_w - l_l) - (s_w - s_l))^2",
}
POLICY_METRICS = ("win_rate", "win_rate_ci", "objective/kl", "completions/mean_length", "completions/clipped_ratio")


@dataclass
class CardFacts:
    """
    What every card says.

    Args:
        args ([`~transformers.TrainingArguments`]): What the model was trained with.
        state ([`~transformers.TrainerState`]): For the last evaluation.
        name_or_path (`str`): What the snippet loads: a Hub id or a directory.
        base_model (`str`): The model it was initialised from: a Hub id, a directory, or empty where it is none.
        is_adapter (`bool`): Whether a PEFT adapter is saved rather than a whole model.
        is_conversational (`bool`): Whether the snippet's prompt is a message, for a tokenizer with a chat template.
        num_rows (`int`, *optional*): Prompts that it was trained on.
        dataset_name (`str` or `list[str]`, *optional*): Hub ids.
        license (`str`, *optional*): As the Hub calls it: `"apache-2.0"`, ...
        tags (`list[str]`): For the Hub's filters.
    """

    args: TrainingArguments
    state: TrainerState
    name_or_path: str
    base_model: str
    is_adapter: bool
    is_conversational: bool
    num_rows: int | None
    dataset_name: str | list[str] | None
    license: str | None
    tags: list[str]

    @classmethod
    def of_trainer(
        cls,
        trainer: Trainer,
        output_dir: str,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
    ) -> "CardFacts":
        """Those of a model that a trainer has trained, and that is in `output_dir` or on the Hub."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        is_adapter = is_peft_model(model)
        config = model.get_base_model().config if is_adapter else model.config
        dataset = trainer.train_dataset
        return cls(
            args=trainer.args,
            state=trainer.state,
            name_or_path=trainer.hub_model_id or output_dir,
            base_model=get_config_model_id(config) or get_config_model_id(config.get_text_config()),
            is_adapter=is_adapter,
            is_conversational=trainer.processing_class.chat_template is not None,
            num_rows=len(dataset) if isinstance(dataset, Dataset) else None,
            dataset_name=dataset_name,
            license=license,
            tags=sorted({*([tags] if isinstance(tags, str) else tags or []), *trainer._tag_names}),
        )

    @property
    def prompt(self) -> str:
        """The snippets' prompt, as Python."""
        return f'[{{"role": "user", "content": "{QUESTION}"}}]' if self.is_conversational else f'"{QUESTION}"'

    def card(
        self,
        template: str,
        settings: dict[str, Any],
        metrics: dict[str, Any],
        pipeline_tag: str,
        **fields: Any,
    ) -> ModelCard:
        """The card of a template, followed by how the model was trained."""
        base_model_id = self.base_model if self.base_model and not os.path.isdir(self.base_model) else None
        versions = {name: version(name) for name in ("gpm-trl", "trl", "transformers", "torch", "datasets", "peft")}
        templates = files("gpm_trl.gpm").joinpath("templates")
        return ModelCard.from_template(
            ModelCardData(
                base_model=base_model_id,
                datasets=self.dataset_name,
                library_name="peft" if self.is_adapter else "transformers",
                license=self.license,
                metrics=["accuracy"] if any(name.endswith("accuracy") for name in metrics) else None,
                model_name=Path(self.name_or_path).name,
                pipeline_tag=pipeline_tag,
                tags=["generated_from_trainer", *self.tags],
            ),
            template_str="".join(templates.joinpath(name).read_text() for name in (template, "training.md")),
            title=Path(self.name_or_path).name,
            base_model=base_model_id,
            datasets=[self.dataset_name] if isinstance(self.dataset_name, str) else self.dataset_name or [],
            args=self.args,
            settings=settings | _training_settings(self.args, self.num_rows),
            metrics=metrics,
            versions=", ".join(f"{name} {number}" for name, number in versions.items()),
            citation=CITATION,
            **_tracking_links(),
            **fields,
        )


def generate_model_card(facts: CardFacts, config: GPMModelConfig) -> ModelCard:
    """The card of a general preference model, with the formula, the loss, and snippets that run."""
    model_settings = {name: getattr(config, name) for name in MODEL_FIELDS}
    arguments = model_settings | {"renderer": config.renderer}
    load = (LOAD_ADAPTER if facts.is_adapter and not facts.base_model else LOAD).format(
        name=facts.name_or_path,
        base_model="path/to/the/base/model",
        arguments=",\n    ".join(f"{name}={value!r}" for name, value in arguments.items()),
    )
    render = (RENDER_CHAT if facts.is_conversational else RENDER_TEXT).format(question=QUESTION)
    carried = None if facts.is_adapter else CARRIED_SNIPPET.format(name=facts.name_or_path, render=render)
    target, loss = LOSSES[facts.args.loss_type]
    own = ("max_length", "long_rows", "loss_type", "sft_loss_coef")
    return facts.card(
        "gpm_model_card.md",
        settings=model_settings | {name: getattr(facts.args, name) for name in own},
        metrics=_last_evaluation(facts.state),
        pipeline_tag="text-ranking",
        config=config,
        snippet=SNIPPET.format(load=load, prompt=facts.prompt),
        carried_snippet=carried,
        trainer="GPMTrainer",
        loss_of=f"Loss of a comparison with the score `s`, the temperature `tau` and {target}",
        loss=loss,
    )


def generate_policy_card(facts: CardFacts, preferences: list[str]) -> ModelCard:
    """The card of a policy that was aligned with `preferences`, with the loss and a snippet that runs."""
    args = facts.args
    ratio = "log pi(y|x) - log pi_t(y|x)"
    ratio = f"`l = ({ratio}) / |y|`" if args.length_normalize else f"`l = {ratio}`"
    signal = "probability of `y`, less a half," if args.loss_type == "sppo" else "mean score of `y`"
    pairwise = args.loss_type in ("sigmoid", "ipo", "rebel")
    terms = "a winner `w` and a loser `l` among the completions" if pairwise else "a completion `y`"
    own = (
        *("loss_type", "beta", "pairing", "length_normalize", "num_generations", "sync_ref_model"),
        *("temperature", "top_p", "max_completion_length", "score_clip", "missing_eos_penalty"),
    )
    shown = ("step", *(f"eval_{name}" for name in POLICY_METRICS))
    return facts.card(
        "gpo_model_card.md",
        settings={"preference": ", ".join(preferences)} | {name: getattr(args, name) for name in own},
        metrics={name: value for name, value in _last_evaluation(facts.state).items() if name in shown},
        pipeline_tag="text-generation",
        preferences=", ".join(f"`{name}`" for name in preferences),
        snippet=GENERATE.format(name=facts.name_or_path, prompt=facts.prompt),
        trainer="GPOTrainer",
        loss_of=(
            f"Loss of {terms} of the prompt `x`, with the log-ratio {ratio} to the reference `pi_t` and, as the "
            f"signal `s`, the {signal} over the completions of `x`"
        ),
        loss=POLICY_LOSSES[args.loss_type],
    )


def _training_settings(args: TrainingArguments, num_rows: int | None) -> dict[str, Any]:
    """What any model was trained with, by the names of the arguments where they have one."""
    settings = {
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


def _tracking_links() -> dict[str, str | None]:
    wandb_url = None
    if is_wandb_available():
        import wandb

        wandb_url = wandb.run.url if wandb.run is not None else None
    return {"wandb_url": wandb_url, "trackio_url": get_trackio_space_url(), "comet_url": get_comet_experiment_url()}


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
