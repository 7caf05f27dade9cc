"""The signal of general preference optimisation as a reward, for TRL's policy-gradient trainers."""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import extract_model_from_parallel, gather_object
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from trl.models import prepare_deepspeed
from trl.trainer.utils import get_config_model_id

from ..data.formats import template_kwargs
from ..data.renderer import EncodedGroup, RewardModelRenderer, Text, cut_end
from ..models.loading import whole_models
from ..preference import block_scores, check_choice, mean_preference, preference_matrix
from ..scorer import NotFiniteError, PreferenceScorer

__all__ = ["PreferenceReward"]

logger = logging.get_logger(__name__)

SIGNALS = ("score", "probability")
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")


# This rank's completions to a prompt: which they are, what the prompt is known by, and the token ids.
SampledGroup = tuple[list[int], bytes, EncodedGroup]
# What is known of a completion: its prompt, the prompt with its tokens, its embedding and the weights of the blocks.
Row = tuple[bytes, bytes, list[float], list[float]]


class EmbeddedBatch(NamedTuple):
    """
    The N completions of all ranks, rank 0's first: their embeddings `(N, 2k)`, weights of the blocks `(N, k)` and what
    their prompts are known by; and which of them are this rank's.
    """

    embeddings: torch.Tensor
    scales: torch.Tensor
    prompts: list[bytes]
    local: slice


class PreferenceReward:
    r"""
    Reward function for [`~trl.GRPOTrainer`] and [`~trl.RLOOTrainer`]: how much a general preference model prefers a
    completion to all that were sampled for the same prompt (Equation 5.2 and Remark 5.2):

        "score"        s_hat(y_i > pi | x) = (1/K) sum_k s(y_i > y_k | x) / tau
        "probability"  P_hat(y_i > pi | x) = (1/K) sum_k sigmoid(s(y_i > y_k | x) / tau)

    over the K completions of equal prompts, the completion itself included (0, or 1/2), wherever they stand in the
    batch and on whichever rank. So the rewards of a prompt add up to 0, or to K/2, and `rewards/<name>/mean` says
    nothing about learning: look at other metrics. A Bradley-Terry reward model is taken too: its s_hat is
    `r_i - mean_k r_k`.

    Each rank embeds its own completions; 2k + k floats a completion are gathered, not texts. Equal completions to a
    prompt get the same reward to the last bit.

    **Long rows** cannot be left out in training. Where a prompt with its longest completion has more than `max_length`
    tokens, the prompt is cut from the left for all its completions alike, on all ranks, but keeps `max_length / 2`
    tokens (or all it has); a completion that is too long even so is cut at its end, before its EOS. A reward model's
    rows are cut from the left, whatever is there. The first time, a warning says so.

    **Sharded training**: a model given by name is loaded whole on each rank, on its device, also under ZeRO-3;
    [`~PreferenceReward.shard`] divides it. A model that DeepSpeed or FSDP has already prepared as shards is used as it
    is: all ranks then make equally many passes.

    Args:
        model (`str`, `os.PathLike`, [`GPMForPreference`], a reward model, or [`PreferenceScorer`]):
            A general preference model, or a sequence classifier with one label, by Hub id or directory, or made
            already, or in a scorer. It is frozen: its parameters no longer require gradients. Metrics are called
            after the last part of its name.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The model's tokenizer; loaded by the model's name if `None`.
        signal (`str`, defaults to `"score"`):
            `"score"` (s_hat, in log-odds) or `"probability"` (P_hat, from 0 to 1).
        batch_tokens (`int`, *optional*):
            See [`PreferenceScorer`]; so are the next two, which the scorer has if `model` is one.
        max_length (`int`, *optional*):
            Most tokens of a row.
        long_rows (`str`, *optional*):
            `"truncate_prompt"`, the default here, is described above; anything else raises. A scorer keeps its own.
        trust_remote_code (`bool`, defaults to `False`):
            Whether code that a model brings is run, where it is loaded by name.

    Raises:
        ValueError: If the model is of another kind, or was partitioned by ZeRO-3 and not prepared; if `signal` is
            unknown; if an argument would be ignored.

    Example:

    ```python
    from datasets import load_dataset
    from gpm_trl import PreferenceReward
    from trl import GRPOTrainer

    trainer = GRPOTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=PreferenceReward("path/to/gpm"),
        train_dataset=load_dataset("trl-lib/ultrafeedback-prompt", split="train"),
    )
    trainer.train()
    ```
    """

    def __init__(
        self,
        model: str | os.PathLike | PreTrainedModel | PreferenceScorer,
        processing_class: PreTrainedTokenizerBase | None = None,
        signal: str = "score",
        batch_tokens: int | None = None,
        max_length: int | None = None,
        long_rows: str | None = None,
        trust_remote_code: bool = False,
    ):
        check_choice("signal", signal, SIGNALS)
        self.signal = signal
        settings = {"batch_tokens": batch_tokens, "max_length": max_length, "long_rows": long_rows}
        if isinstance(model, str | os.PathLike):
            settings["trust_remote_code"] = trust_remote_code
        self.scorer = _make_scorer(model, processing_class=processing_class, **settings)
        # DeepSpeed's own marks: a partitioned parameter has an id, and a module that an engine prepared a registry.
        is_partitioned = any(hasattr(parameter, "ds_id") for parameter in self.scorer.model.parameters())
        if is_partitioned and not hasattr(self.scorer.model, "ds_inflight_param_registry"):
            raise ValueError(
                f"The {type(self.scorer.model).__name__} was partitioned by ZeRO-3, and no engine puts it together: "
                "give `PreferenceReward` its path, load the model before the training arguments are made, or prepare "
                "it by `trl.models.utils.prepare_deepspeed`."
            )
        self.scorer.model.requires_grad_(False).eval()
        name = str(model) if isinstance(model, str | os.PathLike) else get_config_model_id(self.scorer.model.config)
        self.__name__ = Path(name).name or type(self).__name__

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **kwargs) -> list[float]:
        """
        Rewards of this rank's completions. Every rank must call it, with any number of completions.

        Args:
            prompts (list of N `str` or lists of messages): The prompt of each completion.
            completions (list of N `str` or lists of messages): The completions; an empty one is taken, too.
            kwargs: Columns of the dataset, one value a completion: `tools` and `chat_template_kwargs` go to the chat
                template, as in training. Others are left aside.

        Returns:
            list of N `float`: Rewards, in the order of the completions.

        Raises:
            ValueError: If an embedding is NaN or infinite, on all ranks; the message names the completion.
            ValueError: If a completion cannot be rendered, or a row is too long and `long_rows` is not
                `"truncate_prompt"`, on all ranks.
        """
        batch = self._embed(prompts, completions, kwargs)
        members: dict[bytes, list[int]] = {}
        for index, prompt in enumerate(batch.prompts):
            members.setdefault(prompt, []).append(index)
        rewards = torch.empty(len(batch.prompts))
        for indices in members.values():
            log_odds = preference_matrix(batch.embeddings[indices], batch.scales[indices[0]]) / self.scorer.temperature
            rewards[indices] = mean_preference(log_odds if self.signal == "score" else log_odds.sigmoid())
        return rewards[batch.local].tolist()

    def shard(self, accelerator: Accelerator) -> None:
        """
        Divide the model among the ranks, as ZeRO-3 does with the policy, instead of keeping it whole on each. Nothing
        is done without ZeRO-3.
        """
        plugin = accelerator.state.deepspeed_plugin
        if plugin is not None and plugin.zero_stage == 3:
            self._engine = prepare_deepspeed(self.scorer.model, accelerator)

    def log_odds(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        num_generations: int,
        part_weights: tuple[float, float] = (1.0, 1.0),
        **kwargs,
    ) -> torch.Tensor:
        """
        Log-odds `s(y_i > y_j | x) / tau` of all pairs among each `num_generations` consecutive completions of all
        ranks, rank 0's first, as the samplers of TRL lay them out; a group may straddle ranks. Every rank must call
        it.

        Args:
            prompts, completions, kwargs: This rank's, see [`~PreferenceReward.__call__`].
            num_generations (`int`): K, the number of completions to a prompt.
            part_weights (`tuple[float, float]`): Weights of the transitive and of the cyclic blocks in the scores, see
                [`~gpm_trl.preference.dsppo_weights`].

        Returns:
            `torch.Tensor`: Log-odds of the G groups of all ranks, `(G, K, K)`, exactly antisymmetric, in float32 on
            the CPU; the same on all ranks.

        Raises:
            ValueError: If the completions do not make whole groups, or a group is of several prompts; also see
                [`~PreferenceReward.__call__`]. On all ranks.
        """
        embeddings, scales = self._groups(prompts, completions, num_generations, kwargs)
        counts = torch.tensor([self.scorer.reward_dim, self.scorer.num_blocks - self.scorer.reward_dim])
        weights = torch.tensor(part_weights).repeat_interleave(counts)  # (k,)
        return preference_matrix(embeddings, scales * weights) / self.scorer.temperature

    def block_log_odds(
        self, prompts: Sequence[Text], completions: Sequence[Text], num_generations: int, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        [`~PreferenceReward.log_odds`] block by block and without the gate, `(G, K, K, k)`; and what the blocks weigh
        for each prompt, `(G, k)`, as in [`~gpm_trl.models.modeling_gpm.GPMOutput`].
        """
        embeddings, scales = self._groups(prompts, completions, num_generations, kwargs)
        return block_scores(embeddings) / self.scorer.temperature, scales

    def _groups(
        self, prompts: Sequence[Text], completions: Sequence[Text], size: int, columns: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings `(G, K, 2k)` and scales `(G, k)` of the groups of all ranks, `size` completions each."""
        batch = self._embed(prompts, completions, columns)
        count = len(batch.prompts)
        if size < 1 or count == 0 or count % size:
            raise ValueError(f"{count} completions on all ranks do not make groups of {size}.")
        for index, prompt in enumerate(batch.prompts):
            if prompt != batch.prompts[index - index % size]:
                raise ValueError(
                    f"Completion {index} of all ranks has another prompt than the first of its group of {size}: give "
                    "the completions to a prompt one after another."
                )
        return batch.embeddings.unflatten(0, (-1, size)), batch.scales[::size]

    def _embed(self, prompts: Sequence[Text], completions: Sequence[Text], columns: dict[str, Any]) -> EmbeddedBatch:
        """Embed this rank's completions, and gather those of all."""
        groups: list[SampledGroup] = []

        def lengths() -> list[tuple[bytes, int]]:
            groups.extend(self._encode(prompts, completions, columns))
            return [(key, max(map(len, encoded.response_ids))) for _, key, encoded in groups]

        longest: dict[bytes, int] = {}  # tokens of the longest completion to each prompt, on any rank
        for key, length in itertools.chain.from_iterable(_of_all_ranks(lengths)):
            longest[key] = max(longest.get(key, 0), length)

        def rows() -> list[Row]:
            try:
                kept = [self._cut(encoded, longest[key]) for _, key, encoded in groups]
                embedded = self.scorer.embed_encoded(kept, show_progress=False)
            except NotFiniteError as error:
                index = groups[error.prompt][0][error.response]
                texts = f"{completions[index]!r:.200} to {prompts[index]!r:.200}"
                raise ValueError(f"{_place(index)}, {texts}. {error.reason}") from error
            rows: list[Any] = [None] * len(completions)
            for (indices, key, encoded), (embeddings, scales) in zip(groups, embedded, strict=True):
                for index, ids, embedding in zip(indices, encoded.response_ids, embeddings.tolist(), strict=True):
                    rows[index] = (key, _digest([key.hex(), ids]), embedding, scales.tolist())
            return rows

        return _join(_of_all_ranks(rows))

    def _encode(
        self, prompts: Sequence[Text], completions: Sequence[Text], columns: dict[str, Any]
    ) -> list[SampledGroup]:
        """This rank's completions by prompt, of any length if they may be cut."""
        if len(prompts) != len(completions):
            raise ValueError(f"There are {len(prompts)} prompts and {len(completions)} completions on one rank.")
        members: dict[bytes, tuple[list[int], dict[str, Any]]] = {}
        for index, prompt in enumerate(prompts):
            arguments = template_kwargs({name: values[index] for name, values in template_columns(columns).items()})
            members.setdefault(_digest([prompt, arguments]), ([], arguments))[0].append(index)
        groups = []
        for key, (indices, arguments) in members.items():
            prompt, responses = prompts[indices[0]], [completions[index] for index in indices]
            try:
                if self.scorer.renderer.long_rows == "truncate_prompt":
                    encoded = EncodedGroup(*self.scorer.renderer.encode(prompt, responses, **arguments), False)
                else:
                    encoded = self.scorer.encode(prompt, responses, arguments)
            except ValueError as error:
                place = f"{_place(indices[0])} and the others of it to {prompt!r:.200}"
                raise ValueError(f"{place}: {error}") from error
            groups.append((indices, key, encoded))
        return groups

    def _cut(self, group: EncodedGroup, longest: int) -> EncodedGroup:
        """The group, its rows no longer than `max_length`; whatever else it is embedded with."""
        renderer = self.scorer.renderer
        limit = renderer.max_length
        prompt_ids, response_ids, _ = group
        if limit is None or len(prompt_ids) + longest <= limit:
            return group
        if PartialState().is_main_process:
            logger.warning_once(
                f"Prompts with completions of more than {limit} tokens, `max_length`, are cut to be scored by "
                f"{self.__name__}: the prompt from the left, and a completion of more than half at its end."
            )
        if isinstance(renderer, RewardModelRenderer):
            return EncodedGroup([], [renderer.cut_left(ids, limit) for ids in response_ids], truncated=True)
        room = min(longest, max(limit - len(prompt_ids), limit // 2))
        kept = [cut_end(ids, room) for ids in response_ids]
        return EncodedGroup(renderer.cut_left(prompt_ids, limit - room), kept, truncated=True)


def _make_scorer(model: Any, **settings) -> PreferenceScorer:
    given = {name: value for name, value in settings.items() if value is not None}
    if isinstance(model, PreferenceScorer):
        if given:
            raise ValueError(f"{', '.join(given)} would be ignored: the scorer that was given has its own.")
        return model
    given.setdefault("long_rows", "truncate_prompt")
    tokenizer = given.pop("processing_class", None)
    if isinstance(model, str | os.PathLike):
        with whole_models():
            return PreferenceScorer.from_pretrained(model, PartialState().device, tokenizer=tokenizer, **given)
    if not isinstance(model, FullyShardedDataParallel):  # whose parts are only put together in its own forward
        model = extract_model_from_parallel(model)
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(get_config_model_id(model.config))
    return PreferenceScorer(model, tokenizer, **given)


def template_columns(columns: dict[str, Any]) -> dict[str, Any]:
    """Those of a dataset's columns that go to the chat template, which is all that a model is told."""
    return {name: columns[name] for name in TEMPLATE_COLUMNS if name in columns}


def _of_all_ranks(function: Callable[[], Any]) -> list[Any]:
    """What `function` returns on each rank. If it raises a `ValueError` on one, all raise that: none waits for it."""
    try:
        value, error = function(), None
    except ValueError as raised:
        value, error = None, raised
    gathered = gather_object([(value, error)])
    for _, raised in gathered:
        if raised is not None:
            raise raised
    return [value for value, _ in gathered]


def _join(ranks: list[list[Row]]) -> EmbeddedBatch:
    """All ranks' completions, each with the embedding that the first equal one has on any rank."""
    rows = [row for rank in ranks for row in rank]
    process = PartialState().process_index
    start = sum(map(len, ranks[:process]))
    first: dict[bytes, int] = {}
    indices = [first.setdefault(key, index) for index, (_, key, _, _) in enumerate(rows)]
    embeddings = torch.tensor([rows[index][2] for index in indices])
    scales = torch.tensor([row[3] for row in rows])
    return EmbeddedBatch(embeddings, scales, [row[0] for row in rows], slice(start, start + len(ranks[process])))


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).digest()


def _place(index: int) -> str:
    return f"Completion {index} of rank {PartialState().process_index}"
