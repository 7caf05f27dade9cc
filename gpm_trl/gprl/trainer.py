"""Trainer of a policy by reinforcement learning on a preference model's blocks."""

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOTrainer
from trl.trainer.utils import get_callable_name, get_config_model_id

from ..gpo.judges import local_part, make_judges, shard_judges
from ..gpo.layers import ExactResuming
from ..gpo.policy import policy_arguments
from ..gpo.prompts import check_number_of_prompts, check_prompts
from ..gpo.reference import temporarily
from ..gpo.reward import PreferenceReward
from ..preference import block_advantages
from ..saving import WholeCheckpoints
from .config import GPRLConfig
from .drift_monitor import DriftMonitor

__all__ = ["GPRLTrainer"]

CITATION = """@article{umer2026general,
  title   = {General Preference Reinforcement Learning},
  author  = {Umer, Muhammad and Mohsin, Muhammad Ahmed and Bilal, Ahsan and Chaudhry, Arslan and Haupt, Andreas and
             Koyejo, Sanmi and Fox, Emily and Cioffi, John M.},
  journal = {arXiv preprint arXiv:2605.18721},
  year    = {2026},
  url     = {https://arxiv.org/abs/2605.18721}
}"""


class GPRLTrainer(ExactResuming, WholeCheckpoints, GRPOTrainer):
    r"""
    Trainer for general preference reinforcement learning (GPRL, arXiv 2605.18721): [`~trl.GRPOTrainer`] with a
    preference model whose blocks are normalised one by one.

        A_i = sum_l m_l lambda_l(x) A_l,i      (see [`~gpm_trl.preference.block_advantages`])

    The only change is the reward: that of the preference model is A_i, and the parent, which does not scale it, takes
    it as the advantage. With one block of weight 1 it is GRPO on [`PreferenceReward`]. No method of the parent is
    overridden; resuming and checkpoints are the layers' that it derives from. A [`DriftMonitor`] sets m and `beta`.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy, a causal LM, by name or directory or already made; or an adapter of one, which is trained on.
        reward_funcs (`str`, [`~transformers.PreTrainedModel`], [`PreferenceReward`], `Callable`, or a list of these):
            A general preference model or a hybrid one. Beside it, reward models and functions, as in the parent: their
            rewards are centred, not scaled, and added by `args.reward_weights`.
        args ([`GPRLConfig`], *optional*):
            Training arguments.
        train_dataset, eval_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with a `prompt`; the other columns go to functions.
        reward_processing_classes ([`~transformers.PreTrainedTokenizerBase`] or a list of these, *optional*):
            Tokenizers of the preference and reward models; loaded by their names if `None`.
        callbacks, quantization_config, peft_config, kwargs:
            See [`~trl.GRPOTrainer`].

    Raises:
        ValueError: If not exactly one of `reward_funcs` is a preference model with cyclic blocks, or an argument
            contradicts another.

    Example:

    ```python
    from datasets import load_dataset
    from gpm_trl import GPRLTrainer

    trainer = GPRLTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs="path/to/gpm",
        train_dataset=load_dataset("trl-lib/ultrafeedback-prompt", split="train"),
    )
    trainer.train()
    trainer.save_model()
    ```
    """

    _tag_names = ["trl", "gprl"]
    _name = "GPRL"
    _paper = {"title": "General Preference Reinforcement Learning", "id": "2605.18721", "citation": CITATION}

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: Any = None,
        args: GPRLConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: "Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None" = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = GPRLConfig(f"{model_name.split('/')[-1]}-GPRL")
        check_prompts(train_dataset, "train_dataset")
        check_number_of_prompts(train_dataset, args)
        model, quantization_config, changed = policy_arguments(model, args, quantization_config, peft_config)
        judges = make_judges(reward_funcs or args.reward_model_path, reward_processing_classes, args.reward_weights)
        self.judge = find_judge(judges)
        if args.drift_threshold is not None:
            names = [name for name in vars(args) if name.startswith("drift_")]
            settings = {name.removeprefix("drift_"): getattr(args, name) for name in names}
            callbacks = [*(callbacks or []), DriftMonitor(self.judge.scorer.num_blocks, **settings)]
        with temporarily(args, **changed):
            super().__init__(
                model=model,
                reward_funcs=[self._advantage_function() if judge is self.judge else judge for judge in judges],
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                quantization_config=quantization_config,
                peft_config=peft_config,
                **kwargs,
            )
        shard_judges(judges, reward_funcs, self.accelerator)

    @property
    def monitor(self) -> DriftMonitor | None:
        """The drift monitor, if there is one: transformers may replace it by what it restores from a checkpoint."""
        found = (callback for callback in self.callback_handler.callbacks if isinstance(callback, DriftMonitor))
        return next(found, None)

    def _advantage_function(self) -> Callable:
        """The judge as a function for the parent, by its own name: advantages of this process's completions."""

        def advantages(prompts: list, completions: list, log_metric: Callable, **columns) -> list[float]:
            training, monitor = self.model.training, self.monitor
            size = self.num_generations if training else self.num_generations_eval
            blocks, scales = self.judge.block_log_odds(prompts, completions, size, **columns)
            if monitor is not None and training:
                monitor.update(blocks, scales, log_metric)
                self.beta = self.args.beta * monitor.beta_scale
                log_metric("beta", self.beta)
            weights = None if monitor is None else torch.tensor(monitor.weights)
            parts = block_advantages(blocks, scales, weights)  # of all processes, (G, K, k)
            return local_part(parts.sum(-1).flatten(), len(completions)).tolist()

        advantages.__name__ = get_callable_name(self.judge)
        return advantages


def find_judge(judges: list[Callable]) -> PreferenceReward:
    """The one of the judges that is a preference model with cyclic blocks."""
    models = [judge for judge in judges if isinstance(judge, PreferenceReward)]
    found = [judge for judge in models if judge.scorer.num_blocks > judge.scorer.reward_dim]
    if len(found) == 1:
        return found[0]
    names = ", ".join(map(get_callable_name, found or judges))
    if found:
        raise ValueError(f"{names} in `reward_funcs` are {len(found)} general preference models: give one.")
    raise ValueError(
        f"{names} in `reward_funcs` gives one number for each completion, and has no blocks to normalise one by one: "
        "give a general preference model, or use TRL's GRPOTrainer, which such rewards are for."
    )
