"""Shared prefixes in a policy: all completions of a prompt are read in one pass, which reads the prompt once."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers.utils import logging
from trl.trainer.utils import split_tensor_dict

from ..data.batches import first_fit
from ..gpm.config import temporarily
from ..models.shared_prefix import SharedPrefixLayout, ranges, share_prefixes
from ..preference import LOSS_TYPES
from .config import PAIRWISE
from .reference import add_fused_lm_head

__all__ = ["SharedPrefixPolicy", "shared_prefix_log_probs"]

logger = logging.get_logger(__name__)

NO_LABEL = -100
# Losses of GRPO that are sums over completions, as GPO's are: those of the parts of a batch add up to the batch's.
SUMS = ("dapo", "cispo", "vespo")


def shared_prefix_log_probs(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""
    Log-probabilities log pi(y_t | x, y_<t) of the tokens of completions, and entropies of the policy where it chose
    them: those of separate rows, but what the completions of a prompt begin with is computed once.

    The rows are packed as [`~gpm_trl.models.shared_prefix.SharedPrefixLayout`] says. A prompt's last token is repeated
    at the start of each completion, because that place predicts the completion's first token, which differs. Equal
    beginnings of completions are shared too, as far as their next tokens are equal. The last token of a completion is
    left out, since nothing is chosen after it.

    Args:
        model (`nn.Module`): A causal LM with TRL's fused head
            ([`~trl.trainer.utils.add_fused_lm_head`], which knows the temperature and makes logits in tiles), whose
            backbone takes packed rows ([`~gpm_trl.models.shared_prefix.enable_shared_prefix`]).
        input_ids, attention_mask (`torch.LongTensor` of shape `(B, P + C)`): Prompts, padded on the left, and
            completions, padded on the right; in any order. A completion without tokens has no log-probabilities.
        completion_length (`int`): C.

    Returns:
        Two tensors of shape `(B, C)` in nats, 0 at padding. The second is `None` if the head gives no entropies.
    """
    mask = attention_mask[:, -completion_length:].bool()
    lengths = mask.sum(1).tolist()
    groups: dict[tuple[int, ...], dict[int, list[int]]] = {}  # of each prompt, completions by their rows
    for row, (ids, kept, length) in enumerate(zip(input_ids.cpu(), attention_mask.bool().cpu(), lengths, strict=True)):
        ids = ids[kept].tolist()
        start = len(ids) - length
        groups.setdefault(tuple(ids[:start]), {})[row] = ids[start:] or [NO_LABEL]
    # Labels are packed, so that only places with the same label are shared. The token of each is the label before.
    layout, labels = SharedPrefixLayout.pack([(prompt[1:], [*rows.values()]) for prompt, rows in groups.items()])
    tokens = [NO_LABEL, *labels[:-1]]
    places = {}
    for (prompt, rows), (prefix, responses) in zip(groups.items(), layout.groups, strict=True):
        for row, response in zip(rows, responses, strict=True):
            tokens[response.start] = labels[prefix.end - 1] if prefix.num_queries else prompt[0]
            shared = max(lengths[row] - response.num_queries, 0)
            places[row] = [(prefix.end - shared, prefix.end), (response.start, response.start + lengths[row] - shared)]
        tokens[prefix.start] = prompt[0]
        labels[prefix.start : prefix.start + len(prompt) - 1] = [NO_LABEL] * (len(prompt) - 1)
    device = input_ids.device
    indices = ranges(chain.from_iterable(places[row] for row in range(len(lengths)))).to(device)
    inputs = {"input_ids": torch.tensor([tokens], device=device), **layout.model_inputs(device)}
    output = model(**inputs, shift_labels=torch.tensor([labels], device=device), fused_lm_head=True)

    def by_row(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(mask.shape).masked_scatter(mask, values[0, indices])

    return by_row(output.log_probs), by_row(output.entropy) if output.entropy is not None else None


class SharedPrefixPolicy:
    r"""
    Layer: shared-prefix GRPO. The log-probabilities of policy, reference and old policy are computed with each prompt
    once for all its completions: those of rows without padding, to rounding. With [`~trl.GRPOTrainer`]:

    ```python
    class SharedPrefixGRPOTrainer(SharedPrefixPolicy, GRPOTrainer):
        pass
    ```

    K completions of r tokens to a prompt of p cost p + K r tokens instead of K (p + r), and padding nothing. Who
    samples does not matter, vLLM or transformers. For it to share, the completions to a prompt must be in one batch:
    they are not shuffled over the batches of a generation, and a `per_device_train_batch_size` that holds no whole
    groups is told of.

    `args` may have [`~gpm_trl.gpm.config.SharedPrefixConfig`]'s fields; the defaults are `shared_prefix="auto"`, by
    which rows stay as they are where something hinders it, with the reason in the log, and no `max_tokens_per_batch`.
    With the latter, a batch of a device is cut into parts of at most so many tokens, each of which has its forward and
    backward before the next: so the batch may be as large as one likes, and memory goes by tokens. A longer row is a
    part of its own. Metrics are then means over parts.

    Overrides of [`~trl.GRPOTrainer`]: `_get_per_token_logps_and_entropies`, `_prepare_inputs` (groups stay together)
    and `compute_loss` (parts).

    Raises:
        ValueError: If `shared_prefix` is True where something hinders it, or `max_tokens_per_batch` is set with padded
            rows or a loss that is no sum over completions.
    """

    groups_stay_together = False  # True in a subclass: batches keep groups whole, also where rows are padded

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.max_tokens_per_batch = getattr(self.args, "max_tokens_per_batch", None)
        models = [self.accelerator.unwrap_model(model) for model in (self.model, self.ref_model) if model is not None]
        hindrance, wanted = self._hindrance(models[0]), getattr(self.args, "shared_prefix", "auto")
        self.shares_prefixes = all(share_prefixes(_backbone(model), wanted, hindrance) for model in models)
        size, group = self.args.per_device_train_batch_size, self.num_generations
        if self.shares_prefixes and size % group:
            logger.warning_once(
                f"`per_device_train_batch_size` = {size} cuts groups of `num_generations` = {group}, so that prompts "
                f"are computed in several batches: {size + -size % group} would keep groups whole."
            )
        if self.max_tokens_per_batch is not None:
            self._check_parts()

    def _hindrance(self, policy: nn.Module) -> str | None:
        """Why rows cannot be packed, but for the policy's layers."""
        args = self.args
        hindrances = {
            "TRL before 1.15 has no head that takes packed rows": add_fused_lm_head is None,
            "images come with the prompts": self._is_vlm,
            "`router_aux_loss_coef` is about all tokens of padded rows": self.aux_loss_enabled
            and args.loss_type not in LOSS_TYPES,  # which have no such term
            "`use_transformers_continuous_batching` has its own attention": args.use_transformers_continuous_batching,
            "`pad_to_multiple_of` is about padded rows": args.pad_to_multiple_of is not None,
            "`neftune_noise_alpha` goes by the length of padded rows": args.neftune_noise_alpha is not None,
            "`torch_compile` is on": args.torch_compile,
            "the adapter adds tokens to each row": is_peft_model(policy)
            and policy.active_peft_config.is_prompt_learning,
        }
        return next((reason for reason, applies in hindrances.items() if applies), None)

    def _check_parts(self) -> None:
        loss_type = self.args.loss_type
        reason = None
        if not self.shares_prefixes:
            reason = "it is about packed rows, and rows are padded"
        elif loss_type not in (*SUMS, *LOSS_TYPES):
            reason = f"the loss {loss_type!r} is a mean over a batch, whose parts weigh otherwise: {SUMS} are sums"
        elif self.args.entropy_coef or self.args.use_adaptive_entropy or self.args.top_entropy_quantile < 1:
            reason = "the entropy bonus and `top_entropy_quantile` are about a whole batch"
        if reason is not None:
            given = f"`max_tokens_per_batch` is {self.max_tokens_per_batch}"
            raise ValueError(f"{given}, but {reason}: leave one of the two out.")

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ):
        if not self.shares_prefixes:
            kwargs |= {"batch_size": batch_size, "compute_entropy": compute_entropy}  # TRL 1.14 takes them by name
            inputs = (model, input_ids, attention_mask, logits_to_keep)
            return super()._get_per_token_logps_and_entropies(*inputs, **kwargs)
        start = input_ids.shape[1] - logits_to_keep
        inputs = {
            "prompt_ids": input_ids[:, :start],
            "prompt_mask": attention_mask[:, :start],
            "completion_ids": input_ids[:, start:],
            "completion_mask": attention_mask[:, start:],
            "rows": torch.arange(len(input_ids), device=input_ids.device),
        }
        if self.max_tokens_per_batch is None or torch.is_grad_enabled():
            batches = [take_rows(inputs, rows) for rows in inputs["rows"].split(batch_size or len(input_ids))]
        else:
            batches = self._parts(inputs)
        outputs = []
        for part in batches:
            ids, mask = (torch.cat([part[f"prompt_{of}"], part[f"completion_{of}"]], dim=1) for of in ("ids", "mask"))
            with self.accelerator.autocast():
                outputs.append(shared_prefix_log_probs(model, ids, mask, logits_to_keep))
        log_probs, entropies = zip(*outputs, strict=True)
        order = torch.cat([part["rows"] for part in batches])[: len(input_ids)].argsort()  # empty parts come last
        return torch.cat(log_probs)[order], torch.cat(entropies)[order] if compute_entropy else None, None

    def _prepare_inputs(self, generation_batch):
        if not self.model.training or not (self.shares_prefixes or self.groups_stay_together):
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            # Not shuffled as by the parent, so that a group is in as few batches as may be.
            self._buffered_inputs = split_tensor_dict(self._generate_and_score_completions(generation_batch), steps)
        return self._buffered_inputs[self._step % steps]

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.max_tokens_per_batch is None or not self.model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        *parts, last = self._parts(inputs)
        before = torch.zeros((), device=self.accelerator.device)
        scaling = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}  # as the Trainer's own
        for part in parts:
            # Gradients are added up and sent with the last part's, for which DDP must know in the forward; and without
            # `sync_gradients`, DeepSpeed takes no step before it.
            with temporarily(self.accelerator.gradient_state, sync_gradients=False), self.accelerator.no_sync(model):
                loss = super().compute_loss(model, part, *args, **kwargs)
                self.accelerator.backward(loss, **scaling)
            before += loss.detach()
        # The caller does the backward of the last part.
        return super().compute_loss(model, last, *args, **kwargs) + before

    def _parts(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """A batch in parts of at most `max_tokens_per_batch`, as many on each process."""
        units = [*_units(inputs, self.max_tokens_per_batch, whole=self.args.loss_type in PAIRWISE)]
        sizes = [(min(tokens, self.max_tokens_per_batch), tokens, len(rows)) for rows, tokens in units]
        filled = first_fit(sizes, self.max_tokens_per_batch, shared_prefix=True)
        parts = [take_rows(inputs, [row for unit in part for row in units[unit][0]]) for part in filled]
        most = self.accelerator.gather(torch.tensor([len(parts)], device=self.accelerator.device)).max()
        empty = {
            name: torch.zeros_like(value) if _has_rows(value) and not name.startswith("prompt") else value
            for name, value in take_rows(inputs, units[0][0]).items()
        }
        return parts + [empty] * (int(most) - len(parts))


def _backbone(model: nn.Module) -> nn.Module:
    return (model.get_base_model() if is_peft_model(model) else model).base_model


def _units(inputs: dict[str, torch.Tensor], max_tokens: int, whole: bool) -> Iterator[tuple[list[int], int]]:
    """
    What a batch is cut into: the rows of a prompt and their tokens, packed; unless `whole`, no more than `max_tokens`
    where a prompt has several rows.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, ids in enumerate(inputs["prompt_ids"].tolist()):
        groups.setdefault(tuple(ids), []).append(row)
    prompts = inputs["prompt_mask"].sum(1).tolist()
    completions = inputs["completion_mask"].sum(1).clamp(min=1).tolist()  # one without tokens has a place too
    for rows in groups.values():
        unit, tokens = [], prompts[rows[0]]
        for row in rows:
            if unit and not whole and tokens + completions[row] > max_tokens:
                yield unit, tokens
                unit, tokens = [], prompts[row]
            unit.append(row)
            tokens += completions[row]
        yield unit, tokens


def _has_rows(value: Any) -> bool:
    return torch.is_tensor(value) and value.dim() > 0


def take_rows(batch: dict[str, Any], rows: list[int] | torch.Tensor) -> dict[str, Any]:
    """Some rows of a batch, with what is the whole batch's."""
    return {name: value[rows] if _has_rows(value) else value for name, value in batch.items()}
