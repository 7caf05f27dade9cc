"""Training arguments of [`GPMTrainer`], and what the arguments of all trainers share."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available
from trl import RewardConfig

from ..models import GPMModelConfig
from ..preference import check_choice

LOSS_TYPES = ("cross_entropy", "regression")
# Fields that describe the model: `None` is the checkpoint's value or, for new heads, the default of `GPMModelConfig`.
MODEL_FIELDS = (
    *("embedding_dim", "reward_dim", "reward_clip", "reward_weight", "cyclic_weight"),
    *("use_scale_gate", "gate_activation", "normalize_embeddings", "temperature", "learn_temperature"),
)

# Options of the parents that would change nothing, by the reason; patterns of their names.
IGNORED = {
    "no loss smooths labels: use soft ones, the column `label`": "label_smoothing_factor",
    "the scores are differences, which need no centring": "center_rewards_coefficient",
    "Liger has no kernels for preference models": "use_liger_kernel liger_kernel_config",
    "the trainer names its labels itself": "label_names",
    "nothing is generated": "use_cache",
    "the trainer predicts nothing: use `gpm-trl score`": "do_predict",
}


@contextmanager
def temporarily(holder: Any, **values: Any) -> Iterator[None]:
    """Within, attributes of `holder`, such as training arguments, have other values; also where something raises."""
    before = {name: getattr(holder, name) for name in values}
    vars(holder).update(values)
    try:
        yield
    finally:
        vars(holder).update(before)


def refuse_ignored(args: TrainingArguments, ignored: dict[str, str]) -> None:
    """Raise `ValueError` for an option that is not at its default and would be ignored. Versions may lack some."""
    for option in fields(args):
        default = [] if option.default is MISSING else option.default  # only lists have a factory
        if (value := getattr(args, option.name)) == default:
            continue
        for reason, patterns in ignored.items():
            if any(fnmatchcase(option.name, pattern) for pattern in patterns.split()):
                raise ValueError(f"`{option.name}` is {value!r}, but would be ignored: {reason}. Leave it out.")


@dataclass
class SharedPrefixConfig:
    """
    Mixin of [`GPMConfig`], [`GPOConfig`] and [`GPRLConfig`]: how rows are packed. It also turns bf16 off where the
    device lacks it. Another configuration derives from it first, then from its parent.

    Parameters:
        shared_prefix (`str` or `bool`, *optional*, defaults to `"auto"`):
            Whether batches are packed so that a prompt is computed once for all its responses: `"auto"` does so where
            the model and the options allow it, `True` raises where they do not, `False` pads rows.
        max_tokens_per_batch (`int`, *optional*):
            Most tokens that a device computes together in training. In [`GPMConfig`], instead of
            `per_device_train_batch_size`; of a policy, the parts that its batches are cut into, see
            [`~gpm_trl.gpo.shared_prefix.SharedPrefixPolicy`].

    Raises:
        ValueError: For another `shared_prefix`, and for less than one token.
    """

    shared_prefix: str = field(default="auto", metadata={"help": "Compute a prompt once: auto, true or false."})
    max_tokens_per_batch: int | None = field(
        default=None, metadata={"help": "Most tokens that a device computes together in training."}
    )

    def __post_init__(self):
        choices = {"auto": "auto", "true": True, "false": False}
        if str(self.shared_prefix).lower() not in choices:
            raise ValueError(f"`shared_prefix` is {self.shared_prefix!r}; choose auto, true or false.")
        self.shared_prefix = choices[str(self.shared_prefix).lower()]
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < 1:
            raise ValueError(
                f"`max_tokens_per_batch` is {self.max_tokens_per_batch}; give 1 or more, or leave it out."
            )
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        super().__post_init__()


@dataclass
class GPMConfig(SharedPrefixConfig, RewardConfig):
    r"""
    Configuration of the [`GPMTrainer`]: [`~trl.RewardConfig`] with what a general preference model adds.

    Only new fields, and fields with another default, are listed; the defaults are the paper's (Tables 2 and 8).

    Parameters:
        > Parameters that control the model (`None`: as in the checkpoint, or `GPMModelConfig`'s default for new heads)

        embedding_dim (`int`, *optional*, 6 for new heads):
            Width 2k of the cyclic part of the embedding, even; 0 is none.
        reward_dim (`int`, *optional*, 0 for new heads):
            1 for a transitive part, a reward r: the hybrid reward-cyclic model (HRC) or, with `embedding_dim=0`, the
            Bradley-Terry model, the baseline: `P(chosen > rejected) = sigmoid((r_chosen - r_rejected) / tau)`. With
            `embedding_dim=0`, more: `r = sum_l lambda_l(x) r_l`, the baseline with a gate and a head of a GPM's size.
        reward_clip (`float`, *optional*, `None` for new heads):
            delta that rewards are cut to, `clip(r, -delta, delta)`.
        reward_weight (`float`, *optional*, 1 for new heads):
            C1, the weight of the transitive part in the score.
        cyclic_weight (`float`, *optional*, 1 for new heads):
            C2, the weight of the cyclic part.
        use_scale_gate (`bool`, *optional*, `True` for new heads, `False` with one reward alone):
            Whether a gate that reads the prompt scales the k cyclic blocks or, without any, the rewards.
        gate_activation (`str`, *optional*, `"softmax"` for new heads):
            Positive map of the gate, `"softmax"` or `"softplus"`.
        normalize_embeddings (`bool`, *optional*, `True` for new heads with cyclic blocks):
            Whether their part of an embedding has unit length.
        temperature (`float`, *optional*, 0.1 for new heads, 1 without cyclic blocks):
            tau in `P(chosen > rejected) = sigmoid(s / tau)`.
        learn_temperature (`bool`, *optional*, `False` for new heads):
            Whether tau is trained.

        > Parameters that control the data preprocessing

        column_mapping (`dict`, *optional*):
            Columns of the datasets to read for those of a layout, as `{"prompt": "query"}`; `None` (`null` in JSON)
            for one to leave out. See [`~gpm_trl.data.formats.find_layout`].
        long_rows (`str`, *optional*, defaults to `"filter"`):
            What is done with rows longer than `max_length`: `"filter"`, `"truncate_prompt"` or `"error"`.
        group_by_prompt (`bool`, *optional*, defaults to `False`):
            Whether the rows of a prompt form one row, so that its comparisons are in one batch and each of its
            responses is embedded once. `per_device_train_batch_size` then counts prompts.

        > Parameters that control the training

        loss_type (`str`, *optional*, defaults to `"cross_entropy"`):
            `"cross_entropy"` (Equation A.1; column `label`) or `"regression"` (column `score`).
        sft_loss_coef (`float`, *optional*, defaults to `0.0`):
            Weight c of a language-model loss on the preferred response: `(1 - c) loss + c sft_loss`.
        shared_prefix, max_tokens_per_batch:
            See [`SharedPrefixConfig`]. The latter replaces `per_device_train_batch_size`: batches hold as many
            prompts as fit, of whatever lengths, and the loss is the mean over the comparisons of the whole step.
            Which prompts share a batch is drawn once, the order of batches in each epoch. See
            [`~gpm_trl.data.batches.fill_batches`].

    > [!NOTE]
    > These parameters have default values different from [`~trl.RewardConfig`]:
    > - `learning_rate`: Defaults to `2e-6` instead of `1e-4`.
    > - `lr_scheduler_type`: Defaults to `"cosine"` instead of `"linear"`.
    > - `warmup_steps`: Defaults to `0.03` (a fraction of all steps) instead of `0`.
    > - `num_train_epochs`: Defaults to `2` instead of `3`.
    > - `max_length`: Defaults to `2048` instead of `1024`.
    > - `bf16`: Defaults to `True` where the device has it, instead of everywhere.

    Raises:
        ValueError: If a value is outside of its range, or an option is set that would be ignored
            (`label_smoothing_factor`, `center_rewards_coefficient`, `use_liger_kernel`, ...).

    Example:

    ```python
    >>> from gpm_trl import GPMConfig
    >>> args = GPMConfig(output_dir="gemma-2b-it-gpm", embedding_dim=8, use_cpu=True)
    >>> args.learning_rate, args.embedding_dim, args.loss_type
    (2e-06, 8, 'cross_entropy')

    ```
    """

    # Parameters whose default values are overridden from RewardConfig
    learning_rate: float = field(default=2e-6, metadata={"help": "Initial learning rate of AdamW (paper, Table 8)."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The scheduler type to use (paper, Table 8)."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps, or a fraction of all (paper, Table 8: 0.03)."})
    num_train_epochs: float = field(default=2.0, metadata={"help": "Number of training epochs (paper, Table 8)."})
    max_length: int | None = field(default=2048, metadata={"help": "Most tokens of a row (paper, Table 8)."})

    # Parameters that control the model
    embedding_dim: int | None = field(
        default=None, metadata={"help": "Even width 2k of the cyclic part; 0 is none (Bradley-Terry). New heads: 6."}
    )
    reward_dim: int | None = field(
        default=None, metadata={"help": "1 adds a reward (HRC, Bradley-Terry); more: Bradley-Terry with a gate."}
    )
    reward_clip: float | None = field(default=None, metadata={"help": "delta that rewards are cut to. Default: none."})
    reward_weight: float | None = field(default=None, metadata={"help": "C1, of the transitive part. New heads: 1."})
    cyclic_weight: float | None = field(default=None, metadata={"help": "C2, of the cyclic part. New heads: 1."})
    use_scale_gate: bool | None = field(default=None, metadata={"help": "Scale blocks by a gate. New heads: True."})
    gate_activation: str | None = field(
        default=None,
        metadata={"help": "Positive map of the gate. New heads: softmax.", "choices": ["softmax", "softplus"]},
    )
    normalize_embeddings: bool | None = field(default=None, metadata={"help": "To unit length. New heads: True."})
    temperature: float | None = field(default=None, metadata={"help": "tau of P = sigmoid(s / tau). New heads: 0.1."})
    learn_temperature: bool | None = field(default=None, metadata={"help": "Whether to train tau. New heads: False."})

    # Parameters that control the data preprocessing
    column_mapping: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Columns to read for those of a layout, {"prompt": "query"}; null leaves one out.'},
    )
    long_rows: str = field(
        default="filter",
        metadata={"help": "Drop, cut or refuse long rows.", "choices": ["filter", "truncate_prompt", "error"]},
    )
    group_by_prompt: bool = field(default=False, metadata={"help": "One row a prompt: its comparisons share a batch."})

    # Parameters that control the training
    loss_type: str = field(
        default="cross_entropy",
        metadata={"help": "Cross entropy (`label`), or squared error (`score`).", "choices": list(LOSS_TYPES)},
    )
    sft_loss_coef: float = field(default=0.0, metadata={"help": "Weight of a loss on the preferred response's text."})

    def __post_init__(self):
        if self.max_tokens_per_batch is not None:
            size, strategy = self.per_device_train_batch_size, self.train_sampling_strategy
            if size not in (1, type(self).per_device_train_batch_size):
                raise ValueError(
                    f"`per_device_train_batch_size` is {size}, but `max_tokens_per_batch` replaces it: leave one out."
                )
            if strategy != "random":
                raise ValueError(
                    f"`train_sampling_strategy` is {strategy!r}, but batches are filled from rows in random order: "
                    "leave it or `max_tokens_per_batch` out."
                )
            self.per_device_train_batch_size = 1  # a row of the dataset is a batch
        refuse_ignored(self, IGNORED)
        super().__post_init__()
        if isinstance(self.column_mapping, str) and self.column_mapping.startswith("{"):
            try:
                self.column_mapping = json.loads(self.column_mapping)
            except ValueError as error:
                what = f"`column_mapping` is {self.column_mapping!r}, which is no JSON object"
                raise ValueError(f'{what}: give it as {{"prompt": "query"}}.') from error
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        if not 0 <= self.sft_loss_coef < 1:
            raise ValueError(f"`sft_loss_coef` is {self.sft_loss_coef}: choose a weight in [0, 1).")
        config = GPMModelConfig(**self.model_settings())  # a value out of its range is told before a model is loaded
        if self.gate_activation is not None and not config.use_scale_gate:
            raise ValueError(f"`gate_activation` is {self.gate_activation!r}, but there is no gate: leave it out.")

    def model_settings(self) -> dict[str, Any]:
        """The fields that describe the model and are set, as keyword arguments of [`GPMModelConfig`]."""
        return {name: getattr(self, name) for name in MODEL_FIELDS if getattr(self, name) is not None}
