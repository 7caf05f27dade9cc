"""Training arguments of [`GPOTrainer`]."""

import math
import os
from dataclasses import dataclass, field

from transformers.utils import logging
from trl import GRPOConfig

from ..gpm.config import SharedPrefixConfig, refuse_ignored
from ..preference import LOSS_TYPES, PAIRINGS, REGRESSIONS, check_choice, dsppo_weights

logger = logging.get_logger(__name__)

PAIRWISE = tuple(name for name in LOSS_TYPES if name not in REGRESSIONS)
# Options of the parents that would change nothing, by the reason: where a policy samples, and here.
IGNORED_IN_SAMPLING = {
    "there are no labels, and evaluation computes no predictions": (
        "label_smoothing_factor label_names prediction_loss_only eval_accumulation_steps eval_do_concat_batches "
        "include_for_metrics batch_eval_metrics do_predict"
    ),
    "prompts come by `shuffle_dataset` and `seed`": "train_sampling_strategy length_column_name data_seed",
}
IGNORED = {
    **IGNORED_IN_SAMPLING,
    "the losses of GPOTrainer have no clipped ratios, importance weights, scaled advantages or entropy bonus": (
        "epsilon* delta importance_sampling_level off_policy_mask_threshold average_tokens_across_devices sapo_* "
        "vespo_* multi_objective_aggregation scale_rewards use_bias_correction_kl router_aux_loss_coef *entropy* "
        "vllm_importance_sampling_*"
    ),
    "there are no tools": "max_tool_calling_iterations",
    "older TRL takes Liger's loss; `model_init_kwargs` has `use_kernels`": "use_liger_kernel liger_kernel_config",
}


@dataclass
class GPOConfig(SharedPrefixConfig, GRPOConfig):
    r"""
    Configuration of the [`GPOTrainer`]: [`~trl.GRPOConfig`] with the losses of Section 5 of the paper.

    Only new fields, and fields with another default or meaning, are listed. The defaults are those of the authors' run
    where the paper or its code gives one.

    Parameters:
        > Parameters that control the loss

        loss_type (`str`, *optional*, defaults to `"gpo"`):
            `"gpo"` (Equation 5.3), `"sppo"`, `"dsppo"`, `"sigmoid"` (online DPO), `"ipo"` or `"rebel"`: see
            [`~gpm_trl.preference.policy_loss`].
        dsppo_lambda (`float`, *optional*):
            lambda of DSPPO, see [`~gpm_trl.preference.dsppo_weights`]. Defaults to 1, the best in its paper.
        dsppo_iteration (`int`, *optional*, defaults to `1`):
            t of the first iteration. Each update of the reference adds one.
        beta (`float` or list of `float`, *optional*):
            Weight of the KL divergence from the reference; a list has one for each epoch, of which the last goes on.
            Defaults to 0.001 for `"gpo"`, `"sppo"` and `"dsppo"` (the papers'), and to 0.1 for the others (TRL's).
        pairing (`str`, *optional*, defaults to `"all"`):
            Which of the K completions of a prompt enter the loss: `"all"`, or `"best_worst"` (the authors' run).
        length_normalize (`bool`, *optional*, defaults to `False`):
            Whether log-ratios are divided by the number of tokens of the completion (LN-GPO, Remark E.1).
        score_clip (`float`, *optional*):
            Log-odds of pairs are cut to this absolute value.
        missing_eos_penalty (`float`, *optional*):
            Taken off the log-odds of completions without an EOS token, over each that has one.

        > Parameters that control generation

        num_generations (`int`, *optional*):
            K, completions a prompt. Defaults to 5 (the paper's), and to 2 for `"sigmoid"` and `"ipo"` (TRL's).
        max_completion_length (`int`, *optional*, defaults to `2048`):
            Most tokens of a completion. `max_new_tokens`, if set, is another name for it, as in OnlineDPOConfig.
        max_length (`int`, *optional*):
            Most tokens of prompt and completion together: prompts are cut from the left to leave room for
            `max_completion_length`.

        > Parameters that control the reference

        sync_ref_model (`bool`, *optional*, defaults to `True`):
            Whether the reference becomes the policy at the start of each iteration (pi_t), or stays the initial one.
        ref_model_sync_steps (`int`, *optional*):
            Optimizer steps of an iteration. `None` is an epoch.
        ref_model_mixup_alpha (`float`, *optional*, defaults to `1.0`):
            The reference becomes `alpha * policy + (1 - alpha) * reference`.

        > Other parameters

        shared_prefix, max_tokens_per_batch:
            See [`~gpm_trl.gpm.config.SharedPrefixConfig`].
        reward_model_path (`str`, *optional*):
            The preference model, if `reward_funcs` is not given to the trainer, as in OnlineDPOConfig.

    > [!NOTE]
    > These parameters have default values different from [`~trl.GRPOConfig`]:
    > - `learning_rate`: 5e-7 instead of 1e-6; `optim`: `"rmsprop"`; `warmup_steps`: 0.1, a fraction of all steps;
    >   `num_train_epochs`: 1, the paper's for an iteration.
    > - `temperature`: 0.7 instead of 1.0, `top_p`: 0.9 instead of 1.0.
    > - `bf16`: where the device has it, instead of everywhere.
    > - `per_device_eval_batch_size`: about 8, in whole groups of `num_generations_eval`.
    > - `vllm_importance_sampling_correction`: `False`, since a regression needs no importance weights.
    > - `scale_rewards`: `"none"`, since the parent's advantages are the signals.
    > - `steps_per_generation`: the least multiple of `gradient_accumulation_steps` whose batches on a device hold
    >   whole groups.

    Raises:
        ValueError: If a value is outside of its range, a batch does not hold whole groups of K, or an option is set
            that the loss would ignore.

    Example:

    ```python
    >>> from gpm_trl import GPOConfig
    >>> args = GPOConfig(output_dir="llama-gpo", per_device_train_batch_size=4, use_cpu=True)
    >>> args.num_generations, args.beta, args.steps_per_generation
    (5, 0.001, 5)

    ```
    """

    learning_rate: float = field(default=5e-7, metadata={"help": "The initial learning rate (authors: 5e-7)."})
    optim: str = field(default="rmsprop", metadata={"help": "The optimizer (authors: RMSprop)."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps, or a fraction of all (authors: 0.1)."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs (authors: 1 an iteration)."})
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature (authors: 0.7)."})
    top_p: float = field(default=0.9, metadata={"help": "Nucleus of sampling (authors: 0.9)."})
    num_generations: int | None = field(
        default=None, metadata={"help": "K, completions a prompt. Default: 5 (paper), for sigmoid and ipo 2 (TRL's)."}
    )
    max_completion_length: int | None = field(default=2048, metadata={"help": "Most tokens of each (authors: 2048)."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Another name for `max_completion_length`."})
    max_length: int | None = field(default=None, metadata={"help": "Most tokens of a row: cuts prompts on the left."})
    beta: list[float] | None = field(
        default=None,
        metadata={"help": "Weight of the KL divergence, or one an epoch. Default: 0.001 (gpo, (d)sppo) or 0.1."},
    )
    loss_type: str = field(
        default="gpo", metadata={"help": "What the policy is trained by (Remark 5.2).", "choices": list(LOSS_TYPES)}
    )
    dsppo_lambda: float | None = field(default=None, metadata={"help": "lambda of DSPPO. Default: 1."})
    dsppo_iteration: int = field(default=1, metadata={"help": "t of the first iteration of DSPPO."})
    pairing: str = field(
        default="all", metadata={"help": "Which of the K completions enter the loss.", "choices": list(PAIRINGS)}
    )
    length_normalize: bool = field(default=False, metadata={"help": "Divide log-ratios by the tokens (LN-GPO)."})
    score_clip: float | None = field(default=None, metadata={"help": "Largest log-odds of a pair."})
    missing_eos_penalty: float | None = field(default=None, metadata={"help": "Taken off completions without an EOS."})
    per_device_eval_batch_size: int | None = field(default=None, metadata={"help": "Default: whole groups, about 8."})
    sync_ref_model: bool = field(default=True, metadata={"help": "Renew the reference each iteration (pi_t)."})
    ref_model_sync_steps: int | None = field(default=None, metadata={"help": "Of an iteration. Default: an epoch's."})
    ref_model_mixup_alpha: float = field(default=1.0, metadata={"help": "Share of the policy in a new reference."})
    vllm_importance_sampling_correction: bool = field(default=False, metadata={"help": "Of no use to a regression."})
    scale_rewards: str = field(default="none", metadata={"help": "Of no use: the advantages are the signals."})
    reward_model_path: str | None = field(default=None, metadata={"help": "The preference model, by name."})

    def __post_init__(self):
        self._check_loss()
        if self.num_generations is None:
            self.num_generations = 2 if self.loss_type in ("sigmoid", "ipo") else 5
        if self.num_generations < 2:
            raise ValueError(
                f"`num_generations` is {self.num_generations}, but completions are compared: sample at least 2."
            )
        if self.max_new_tokens is not None:
            if self.max_completion_length not in (self.max_new_tokens, type(self).max_completion_length):
                raise ValueError(
                    f"`max_new_tokens` is {self.max_new_tokens} and `max_completion_length` "
                    f"{self.max_completion_length}, which are two names of one option: leave out one."
                )
            self.max_completion_length = self.max_new_tokens
        if self.max_completion_length is None:
            raise ValueError("`max_completion_length` is None: give the most tokens of a completion.")
        if self.max_length is not None and self.max_length <= self.max_completion_length:
            raise ValueError(
                f"`max_length` is {self.max_length} and `max_completion_length` {self.max_completion_length}, which "
                "leaves no token for the prompt: raise the first or lower the second."
            )
        self._check_batches()
        super().__post_init__()

    def _check_loss(self) -> None:
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        check_choice("pairing", self.pairing, PAIRINGS)
        if self.loss_type == "dsppo":
            self.dsppo_lambda = 1.0 if self.dsppo_lambda is None else self.dsppo_lambda
            _, cyclic = dsppo_weights(self.dsppo_iteration, self.dsppo_lambda)  # raises out of range
            if cyclic == 0 and not self.renews_reference:
                logger.warning(
                    "DSPPO reads no cycles in its first iteration, and this run has no other: set "
                    "`ref_model_sync_steps`, `num_train_epochs` or, for an iteration of its own, `dsppo_iteration`."
                )
        elif self.dsppo_lambda is not None or self.dsppo_iteration != 1:
            raise ValueError(f"`dsppo_lambda` and `dsppo_iteration` are not of {self.loss_type!r}: leave them out.")
        if self.beta is None:
            self.beta = 0.001 if self.loss_type in REGRESSIONS else 0.1
        elif isinstance(self.beta, (list, tuple)) and len(self.beta) == 1:
            self.beta = self.beta[0]
        betas = self.betas()
        if not betas or not all(isinstance(beta, (int, float)) and 0 < beta < math.inf for beta in betas):
            raise ValueError(f"`beta` is {self.beta!r}, but must be positive and finite, or a list with one an epoch.")
        for name in ("score_clip", "missing_eos_penalty"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` is {value}, but must be positive and finite; leave it out for none.")
        if self.ref_model_sync_steps is not None and self.ref_model_sync_steps < 1:
            raise ValueError(f"`ref_model_sync_steps` is {self.ref_model_sync_steps}, but an iteration has a step.")
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"`ref_model_mixup_alpha` is {self.ref_model_mixup_alpha}; choose it in (0, 1].")
        of_sync = {} if self.sync_ref_model else {"`sync_ref_model` is off": "ref_model_*"}
        refuse_ignored(self, {**IGNORED, **of_sync})

    def _check_batches(self) -> None:
        """Whole groups of K in what is generated together and, for pairs, in each batch."""
        size, group = self.per_device_train_batch_size, self.num_generations
        if self.steps_per_generation is None and self.generation_batch_size is None:
            self.steps_per_generation = math.lcm(group // math.gcd(size, group), self.gradient_accumulation_steps)
        world_size = int(os.environ.get("WORLD_SIZE", 1))  # the launchers' own variable
        evaluated = self.num_generations_eval or group
        if evaluated < 2:
            raise ValueError(
                f"`num_generations_eval` is {evaluated}, but completions are compared: sample at least 2."
            )
        # For whole groups in each batch, of a device for pairs, of all devices else.
        whole = evaluated if self.loss_type in PAIRWISE else evaluated // math.gcd(evaluated, world_size)
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = max(8 // whole, 1) * whole
        elif self.per_device_eval_batch_size % whole and self.eval_strategy != "no":
            raise ValueError(
                f"`per_device_eval_batch_size` is {self.per_device_eval_batch_size}, which cuts groups of the "
                f"{evaluated} completions of a prompt: leave it out, or make it a multiple of {whole}."
            )
        batch = size * world_size
        generated = self.generation_batch_size or batch * self.steps_per_generation
        if generated % group:
            raise ValueError(
                f"{generated} completions are generated together, no multiple of `num_generations` = {group}: leave "
                f"`steps_per_generation` out, and `generation_batch_size` too or give a multiple of "
                f"{math.lcm(group, batch)}."
            )
        if self.loss_type in PAIRWISE and size % group:
            raise ValueError(
                f"{self.loss_type!r} compares completions of one batch, but `per_device_train_batch_size` = {size} is "
                f"not a multiple of `num_generations` = {group}: make it {(size // group + 1) * group}."
            )

    @property
    def renews_reference(self) -> bool:
        """Whether the reference can become the policy: not in a run of one epoch that is one iteration."""
        epoch_is_all = self.ref_model_sync_steps is None and self.max_steps <= 0 and self.num_train_epochs <= 1
        return self.sync_ref_model and not epoch_is_all

    def betas(self) -> list[float]:
        """beta of each epoch; the last goes on."""
        return list(self.beta) if isinstance(self.beta, (list, tuple)) else [self.beta]
