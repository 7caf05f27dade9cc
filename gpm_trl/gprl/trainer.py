"""Trainer of a policy by reinforcement learning on a preference model's blocks."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.trainer.utils import get_callable_name, get_config_model_id

from ..gpm.config import temporarily
from ..gpo.judges import local_part, make_judges, place_judges
from ..gpo.layers import ExactResuming
from ..gpo.prompts import check_dataset
from ..gpo.reward import PreferenceReward, template_columns
from ..gpo.shared_prefix import SharedPrefixPolicy
from ..gpo.trainer import given_policy
from ..preference import block_advantages
from ..saving import WholeCheckpoints
from .config import GPRLConfig
from .drift_monitor import DriftMonitor

CITATION = """@article{umer2026general,
  title   = {General Preference Reinforcement Learning},
  author  = {Umer and Mohsin and Bilal and Chaudhry and Haupt and Koyejo and Fox and Cioffi},
  journal = {arXiv preprint arXiv:2605.18721},
  year    = {2026}
}"""


class GPRLTrainer(SharedPrefixPolicy, ExactResuming, WholeCheckpoints, GRPOTrainer):
    r"""
    Trainer for general preference reinforcement learning (GPRL, arXiv 2605.18721): [`~trl.GRPOTrainer`] with a
    preference model whose blocks are normalised one by one.

        A_i = sum_l m_l lambda_l(x) A_l,i      (see [`~gpm_trl.preference.block_advantages`])

    The only change is the reward: that of the preference model is A_i, which the parent does not scale. With one block
    of weight 1, it is GRPO on [`PreferenceReward`]. It overrides no method itself; shared prefixes, resuming and
    checkpoints are the layers' that it derives from. A [`DriftMonitor`] sets m and `beta`.

    Args:
        model: As of [`~trl.GRPOTrainer`]; or an adapter, by its directory or Hub id, which is trained on.
        reward_funcs (`str`, [`~transformers.PreTrainedModel`], [`PreferenceReward`], `Callable`, or a list of these):
            A general preference model or a hybrid one. Beside it, reward models and functions, as in the parent: their
            rewards are centred, not scaled, and added by `args.reward_weights`.
        args ([`GPRLConfig`]), train_dataset, kwargs: See [`~trl.GRPOTrainer`].

    Raises:
        ValueError: If not exactly one of `reward_funcs` has cyclic blocks, or an argument contradicts another.

    Example:

    ```python
    prompts = load_dataset("trl-lib/ultrafeedback-prompt", split="train")
    GPRLTrainer("Qwen/Qwen3-0.6B", reward_funcs="path/to/gpm", train_dataset=prompts).train()
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
        **kwargs,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = GPRLConfig(f"{model_name.split('/')[-1]}-GPRL")
        if "completions" in check_dataset(train_dataset, args):
            raise ValueError("`train_dataset` has `completions`, but the policy's own are trained on: leave them out.")
        quantization, peft_config = kwargs.pop("quantization_config", None), kwargs.get("peft_config")
        model, kwargs["quantization_config"], changed = given_policy(model, args, quantization, peft_config)
        tokenizers = kwargs.pop("reward_processing_classes", None)
        judges = make_judges(reward_funcs, args, tokenizers)
        self.judge = find_judge(judges)
        if args.drift_threshold is not None:
            settings = {
                name.removeprefix("drift_"): value for name, value in vars(args).items() if name.startswith("drift_")
            }
            monitor = DriftMonitor(self.judge.scorer.num_blocks, **settings)
            kwargs["callbacks"] = [*(kwargs.get("callbacks") or []), monitor]
        functions = [self._advantage_function() if judge is self.judge else judge for judge in judges]
        with temporarily(args, **changed):
            super().__init__(model, functions, args, train_dataset, **kwargs)
        place_judges(judges, reward_funcs, self.accelerator)

    @property
    def monitor(self) -> DriftMonitor | None:  # which transformers may replace by what it restores
        return next((one for one in self.callback_handler.callbacks if isinstance(one, DriftMonitor)), None)

    def _advantage_function(self) -> Callable:
        """The judge as a function for the parent, by its own name: advantages of this process's completions."""

        def advantages(prompts: list, completions: list, log_metric: Callable, **columns) -> list[float]:
            size = self.num_generations if self.model.training else self.num_generations_eval
            blocks, scales = self.judge.block_log_odds(prompts, completions, size, **template_columns(columns))
            monitor = self.monitor
            if monitor is not None and self.model.training:
                # A generation that is sampled again, after a resume within it, was counted before.
                if self._step % (self.args.steps_per_generation * self.num_iterations) == 0:
                    monitor.update(blocks, scales, log_metric)
                self.beta = self.args.beta * monitor.beta_scale
                log_metric("beta", self.beta)
            parts = block_advantages(blocks, scales, monitor and monitor.weights)  # of all processes, (G, K, k)
            return local_part(parts.sum(-1).flatten(), len(completions)).tolist()

        advantages.__name__ = get_callable_name(self.judge)
        return advantages


def find_judge(judges: list[Callable]) -> PreferenceReward:
    """The one of the judges that is a preference model with cyclic blocks."""
    models = [judge for judge in judges if isinstance(judge, PreferenceReward)]
    found = [judge for judge in models if judge.scorer.num_blocks > judge.scorer.reward_dim]
    if len(found) != 1:
        raise ValueError(
            f"Of `reward_funcs`, {', '.join(map(get_callable_name, judges))}, {len(found)} are general preference "
            "models: give one, whose blocks are normalised; for rewards alone there is TRL's GRPOTrainer."
        )
    return found[0]
