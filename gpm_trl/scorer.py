"""From texts to embeddings and scores: the only inference path."""

import itertools
import os
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel, gather_object, is_peft_model
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .data.collator import pad_rows
from .data.formats import as_messages
from .data.renderer import EncodedGroup, Text, count_embeddings, make_renderer, within_context
from .games import copeland_scores, cyclicity, von_neumann_winner
from .models import GPMForPreference, GPMModelConfig
from .models.loading import HUB_ARGUMENTS, check_reward_model, load_config, load_reward_model
from .models.shared_prefix import SharedPrefixLayout, share_prefixes
from .preference import (
    block_scores,
    check_choice,
    mean_preference,
    preference_matrix,
    preference_probability,
    preference_score,
)

__all__ = ["PreferenceScorer", "Ranking", "ResponseEmbeddings", "rank_scores"]

logger = logging.get_logger(__name__)

BATCH_TOKENS = 16_384
RANKING_METHODS = ("mean", "copeland", "von_neumann")
Texts = Sequence[Text]
TemplateKwargs = Sequence[dict[str, Any]] | None  # one entry a prompt


class NotFiniteError(ValueError):
    """An embedding or a score is NaN or infinite. `prompt` and `response`: the indices of the group, and within it."""

    def __init__(self, prompt: int, response: int, reason: str):
        super().__init__(f"Prompt {prompt}: {reason}")
        self.prompt, self.response, self.reason = prompt, response, reason


class ResponseEmbeddings(NamedTuple):
    """Embeddings of the K responses to a prompt, `(K, 2k)`, and the weights of its blocks, `(k,)`, in float32."""

    embeddings: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True, repr=False, eq=False)
class Ranking:
    """
    The K responses to a prompt, compared and ranked: what [`rank_scores`] returns. Prints as a table.

    Args:
        order (list of `int`): Indices of the responses, the best first. Ties are broken by the mean preference, then
            by the order given.
        values (`torch.Tensor` of shape `(K,)`): What they are ranked by, in the order given.
        scores (`torch.Tensor` of shape `(K, K)`): Scores s of all pairs, `[i, j]` that of i over j.
        probabilities (`torch.Tensor` of shape `(K, K)`): `P(y_i > y_j | x) = sigmoid(s / tau)`.
        mean_preference (`torch.Tensor` of shape `(K,)`): Equation 5.2, in log-odds.
        transitive (`torch.Tensor` of shape `(K, K)`, *optional*): The part of the scores that is of transitive blocks:
            all of a Bradley-Terry model's, none of a GPM's.
        responses (list of K texts, *optional*): The responses, for the table.

    Example:

    ```python
    >>> import torch
    >>> from gpm_trl import rank_scores
    >>> rank_scores(torch.tensor([[0.0, -0.1, 0.3], [0.1, 0.0, 0.1], [-0.3, -0.1, 0.0]]), temperature=0.1)
    rank  beats another  response
       1          61.1%  0
       2          73.1%  1
       3          15.8%  2

    ```
    """

    order: list[int]
    values: torch.Tensor
    scores: torch.Tensor
    probabilities: torch.Tensor
    mean_preference: torch.Tensor
    transitive: torch.Tensor | None = None
    responses: Texts | None = None

    def __repr__(self) -> str:
        """The table: the probability of beating another response is the mean over these; responses are cut."""
        texts = map(str, range(len(self.order))) if self.responses is None else map(_one_line, self.responses)
        wins = (self.probabilities.sum(1) - 0.5) / max(len(self.order) - 1, 1)  # without the one half against itself
        rows = list(zip(wins.tolist(), texts, strict=True))
        lines = [f"{rank:4}  {rows[i][0]:13.1%}  {rows[i][1]}" for rank, i in enumerate(self.order, start=1)]
        return "\n".join(["rank  beats another  response", *lines])

    @property
    def cyclic(self) -> torch.Tensor | None:
        """The part of the scores that is of cyclic blocks, `(K, K)`: what the transitive one leaves."""
        return None if self.transitive is None else self.scores - self.transitive

    @property
    def cyclicity(self) -> float:
        """
        The share of the scores that no ratings, so no Bradley-Terry model, can express
        ([`~gpm_trl.games.cyclicity`]): 0 if ratings explain them all, 1 for rock-paper-scissors. Computed when asked.
        """
        return cyclicity(self.scores)

    def to_dict(self, parts: bool = False) -> dict[str, Any]:
        """
        Plain lists, for JSON: `matrix` holds the scores, `ranking` the order, `winner` its first; with `parts` also
        the `transitive` and the `cyclic` part of the scores.
        """
        return ({"transitive": _plain(self.transitive), "cyclic": _plain(self.cyclic)} if parts else {}) | {
            "ranking": self.order,
            "winner": self.order[0],
            "values": _plain(self.values),
            "mean_preference": _plain(self.mean_preference),
            "matrix": _plain(self.scores),
            "probabilities": _plain(self.probabilities),
        }


def _one_line(text: Text) -> str:
    """The beginning of a text, or of the last message, in one line."""
    if not isinstance(text, str):
        last = (as_messages(text, "response") or [{}])[-1]
        text = last.get("content") or last.get("tool_calls") or ""
    return textwrap.shorten(str(text), 80, placeholder=" ...")


def _plain(tensor: torch.Tensor) -> list:
    """Numbers to the seven digits that float32 has; 0 without a sign."""
    if tensor.dim() > 1:
        return [_plain(row) for row in tensor]
    return [float(f"{value:.7g}") + 0.0 for value in tensor.tolist()]


class PreferenceScorer:
    r"""
    Scores, compares and ranks responses with a general preference model.

    Prompts and responses are texts: strings, which are taken as they are, or lists of messages, to which the chat
    template is applied; the responses to a conversation may be strings, each the content of one assistant message.
    They are rendered as in training. K responses to a prompt cost K embeddings, one for each distinct response, and
    every score is a small product of embeddings. Rows are batched by a budget of tokens; results come in the order
    given, on the CPU, in float32.

    A Bradley-Terry reward model (a sequence classifier with one label) is scored in the same way, as the special case
    v = [r, 1] and tau = 1 (Section 4 of the paper): its scores are differences of rewards.

    Args:
        model ([`GPMForPreference`], a [`~peft.PeftModel`] of it, or a reward model):
            It is used where it is, and put into evaluation mode for each call.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's.
        batch_tokens (`int`, defaults to `16384`):
            Most tokens of a batch, padding counted. A longer row is a batch of its own.
        max_length (`int`, *optional*):
            Most tokens of a row. Defaults to what the model was trained with, for a reward model to what the backbone
            takes; never more than that.
        long_rows (`str`, *optional*):
            `"truncate_prompt"` cuts the prompt of longer rows from the left, for all its responses alike (so that a
            longer response changes the scores of the others); anything else raises. Defaults to what the model was
            trained with.
        shared_prefix (`str` or `bool`, defaults to `"auto"`):
            Whether a prompt is computed once for all its responses. `"auto"`: where the model can; `True` raises
            where it cannot.

    Example:

    ```python
    >>> from gpm_trl import PreferenceScorer
    >>> scorer = PreferenceScorer.from_pretrained("path/to/gpm")  # doctest: +SKIP
    >>> scorer.probability(["What is 2 + 2?"], ["4"], ["5"])  # doctest: +SKIP
    tensor([0.9731])

    ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_tokens: int = BATCH_TOKENS,
        max_length: int | None = None,
        long_rows: str | None = None,
        shared_prefix: str | bool = "auto",
    ):
        if batch_tokens < 1:
            raise ValueError(f"`batch_tokens` is {batch_tokens}, but a batch has at least one token.")
        self.model = model
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self.is_gpm = isinstance(model.config, GPMModelConfig)
        # The blocks of a score, of which the first `reward_dim` are transitive: all that a reward model has.
        self.num_blocks = model.config.num_blocks if self.is_gpm else 1
        self.reward_dim = model.config.reward_dim if self.is_gpm else 1
        unwrapped = extract_model_from_parallel(model)
        unwrapped = unwrapped.get_base_model() if is_peft_model(unwrapped) else unwrapped
        settings = {**model.config.renderer} if self.is_gpm else {"convention": "reward_model"}
        given = {"max_length": max_length, "long_rows": long_rows}
        settings.update({name: value for name, value in given.items() if value is not None})
        settings["max_length"] = within_context(settings.get("max_length"), model.config)
        self.renderer = make_renderer(tokenizer, **settings, num_embeddings=count_embeddings(unwrapped))
        if self.is_gpm:
            self._pad_token_id = tokenizer.eos_token_id  # never looked at
        else:
            check_reward_model(model.config, type(unwrapped).__name__, unwrapped.name_or_path)
            # The classifiers of transformers find a row's end by the pad token; without one, they take its last.
            self._pad_token_id = model.config.get_text_config().pad_token_id
        hindrance = None if self.is_gpm else "a reward model reads its rows apart"
        self.shared_prefix = share_prefixes(unwrapped.model if self.is_gpm else unwrapped, shared_prefix, hindrance)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        batch_tokens: int = BATCH_TOKENS,
        max_length: int | None = None,
        long_rows: str | None = None,
        shared_prefix: str | bool = "auto",
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ) -> "PreferenceScorer":
        r"""
        Load a model and its tokenizer.

        Args:
            path_or_id (`str` or `os.PathLike`): Directory or Hub id of a general preference model, or of a reward
                model ([`~transformers.AutoModelForSequenceClassification`] with one label).
            device (`str` or `torch.device`, *optional*): Defaults to the accelerator, if there is one, else the CPU.
            dtype (`str` or `torch.dtype`, *optional*): Of the backbone; defaults to the checkpoint's. Heads are
                float32 in any case.
            attn_implementation (`str`, *optional*): `"sdpa"`, `"flash_attention_2"`, ...; defaults to transformers'.
            batch_tokens (`int`), max_length (`int`), long_rows (`str`), shared_prefix (`str` or `bool`): See
                [`PreferenceScorer`].
            tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Defaults to the checkpoint's.
            kwargs: Other arguments of [`~transformers.PreTrainedModel.from_pretrained`] (`revision`, `token`,
                `trust_remote_code`, ...). `device_map` and `quantization_config` say where the model goes.

        Raises:
            ValueError: If the model is neither, or its checkpoint is incomplete; `OSError` if there is none.
        """
        kwargs = {"use_safetensors": True, **kwargs, "trust_remote_code": bool(kwargs.get("trust_remote_code"))}
        hub_kwargs = {name: kwargs[name] for name in (*HUB_ARGUMENTS, "trust_remote_code") if name in kwargs}
        placing = [name for name in ("device_map", "quantization_config") if kwargs.get(name) is not None]
        if device is not None and placing:
            raise ValueError(f"`device` and `{placing[0]}` both say where the model goes: keep one.")
        config = load_config(path_or_id, **hub_kwargs)
        given = {"dtype": dtype, "attn_implementation": attn_implementation}
        kwargs.update({name: value for name, value in given.items() if value is not None})
        if isinstance(config, GPMModelConfig):
            model = GPMForPreference.from_pretrained(path_or_id, **kwargs)
        else:
            model = load_reward_model(path_or_id, config, **kwargs)
        if not placing:
            accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            model.to(device or accelerator or "cpu")
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(path_or_id, **hub_kwargs)
        return cls(model, tokenizer, batch_tokens, max_length, long_rows, shared_prefix)

    def __repr__(self) -> str:
        parts = {"embedding_dim": 2 * (self.num_blocks - self.reward_dim), "reward_dim": self.reward_dim}
        parts |= {"tau": round(self.temperature, 6), "max_length": self.renderer.max_length}
        shown = ", ".join(f"{name}={value}" for name, value in parts.items())
        backbone = self.model.config.get_text_config().model_type
        return f"{type(self).__name__}({self.kind} on {backbone}, {shown}, {self.model.dtype}, {self.model.device})"

    @property
    def kind(self) -> str:
        """What the model is called."""
        return self.model.config.kind if self.is_gpm else "Bradley-Terry reward model"

    @property
    def temperature(self) -> float:
        """tau in `P(y_i > y_j | x) = sigmoid(s / tau)`: the model's; 1 for a reward model."""
        return self.model.temperature.item() if self.is_gpm else 1.0

    def as_prompt(self, text: str) -> Text:
        """A text as the model knows prompts: a user's message, but for one of plain text, or without a template."""
        is_plain = self.renderer.conversational is False or self.tokenizer.chat_template is None
        return text if is_plain else [{"role": "user", "content": text}]

    def encode(self, prompt: Text, responses: Texts, template_kwargs: dict[str, Any] | None = None) -> EncodedGroup:
        """
        Token ids of a prompt and its responses, at least one, for [`~PreferenceScorer.embed_encoded`]; errors: see
        [`~gpm_trl.data.Renderer.encode_fitting`].
        """
        if len(responses) == 0:
            raise ValueError("There are no responses: give at least one.")
        return self.renderer.encode_fitting(prompt, responses, **(template_kwargs or {}))

    def embed(
        self, prompts: Texts, responses: Sequence[Texts], template_kwargs: TemplateKwargs = None
    ) -> list[ResponseEmbeddings]:
        """
        Embed the responses to each prompt: N [`ResponseEmbeddings`].

        Args:
            prompts (list of N `str` or lists of messages): One for each group.
            responses (list of N lists): The responses to each, any number.
            template_kwargs (list of N `dict`, *optional*): What the chat template gets for each (`tools`, ...).

        Raises:
            ValueError: If the lists do not match, a prompt has no response, or a row is too long, not rendered or not
                embedded (NaN); the message gives the prompt's number.
        """
        _check_lists(prompts=prompts, responses=responses, template_kwargs=template_kwargs)
        groups = []
        for index, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
            try:
                groups.append(self.encode(prompt, group, template_kwargs[index] if template_kwargs else None))
            except ValueError as error:
                raise ValueError(f"Prompt {index}: {error}") from error
        if truncated := sum(group.truncated for group in groups):
            limit = f"{self.renderer.max_length} tokens a row"
            logger.warning(f"{truncated} of {len(groups)} prompts were cut to {limit}.")
        return self.embed_encoded(groups)

    @torch.no_grad()  # no inference mode: a sharded model that is trained on would keep its tensors
    def embed_encoded(self, groups: list[EncodedGroup], show_progress: bool = True, raise_errors: bool = True) -> list:
        """
        [`~PreferenceScorer.embed`] for groups that [`~PreferenceScorer.encode`] made; with a progress bar, if there is
        more than one batch and `show_progress` is true. Without `raise_errors`, an error stands in its group's place.

        Raises:
            NotFiniteError: If an embedding or a score is not finite; the message gives the prompt and the response.
        """
        keys = [[(tuple(prompt_ids), tuple(ids)) for ids in response_ids] for prompt_ids, response_ids, _ in groups]
        # In one order, whatever order they are given in: scores of a over b and of b over a are then the same to the
        # last bit. The rows of a prompt together if they share it, else rows of like length, the longest first.
        rows = {row for group in keys for row in group}
        rows = sorted(rows, key=lambda row: (-len(row[0]) - (0 if self.shared_prefix else len(row[1])), row))
        index_of = {row: index for index, row in enumerate(rows)}
        # Of each prompt, the row that its one gate is read from: the first.
        gate_of = {prompt: index for index, (prompt, _) in reversed([*enumerate(rows)])}
        embeddings, scales = self._embed_rows(rows, show_progress)
        members = [[index_of[row] for row in group] for group in keys]
        finite, temperature = embeddings.isfinite().all(-1) & scales.isfinite().all(-1), self.temperature
        results: list = []
        for number, (group, indices) in enumerate(zip(keys, members, strict=True)):
            results.append(ResponseEmbeddings(embeddings[indices], scales[gate_of[group[0][0]]]))
            # Products of finite numbers may overflow, also that of a response by itself.
            scored = (preference_matrix(*results[-1]) / temperature).isfinite().all(-1)
            if not scored.all():
                what, fine, own = "The embedding", finite, finite[indices]
                if own.all():
                    what, fine, own = "A score", scored, scored
                response = own.int().argmin().item()  # the first
                reason = (
                    f"{what} of response {response} is not finite. {int((~fine).sum())} of {len(fine)} rows are like "
                    f"it; the model computes in {self.model.dtype}, with temperature {temperature}: try float32, and "
                    "check its weights."
                )
                results[-1] = NotFiniteError(number, response, reason)
                if raise_errors:
                    raise results[-1]
        return results

    def _embed_rows(self, rows: list[tuple[tuple, tuple]], show_progress: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings `(N, 2k)` and weights of the blocks `(N, k)` of N rows, each a prompt and a response."""
        embeddings, scales = torch.empty(len(rows), 2 * self.num_blocks), torch.empty(len(rows), self.num_blocks)
        one_token = (self.tokenizer.eos_token_id,)
        in_training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            batches = list(self._batches(rows))
            # Where processes hold shards of one model, all take part in each call: as many as any process makes.
            num_passes = max(gather_object([len(batches)])) if is_sharded(self.model) else len(batches)
            hidden = len(batches) < 2 or not show_progress
            with logging.tqdm(total=len(rows), desc="Embedding", unit="row", disable=hidden) as progress:
                for batch in batches:
                    embeddings[batch], scales[batch] = self._forward(rows[batch])
                    progress.update(batch.stop - batch.start)
                for _ in range(num_passes - len(batches)):
                    self._forward([(one_token, one_token)])
        finally:
            for module in in_training:
                module.training = True
        return embeddings, scales

    def _batches(self, rows: list[tuple[tuple, tuple]]) -> Iterator[slice]:
        """Slices of rows of `batch_tokens` at most; longer rows are alone, and all rows if there is no pad token."""
        start, tokens = 0, 0
        for index, (prompt, response) in enumerate(rows):
            if self.shared_prefix:
                is_shared = index > start and rows[index - 1][0] == prompt
                tokens += len(response) + (0 if is_shared else len(prompt))
            else:
                tokens = (index + 1 - start) * sum(map(len, rows[start]))  # of the longest
            if (tokens > self.batch_tokens or self._pad_token_id is None) and index > start:
                yield slice(start, index)
                start, tokens = index, len(prompt) + len(response)
        if rows:
            yield slice(start, len(rows))

    def _forward(self, rows: list[tuple[tuple, tuple]]) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.model.device
        if self.shared_prefix:
            by_prompt = itertools.groupby(rows, key=lambda row: row[0])
            layout, packed = SharedPrefixLayout.pack(
                [(prompt, [ids for _, ids in group]) for prompt, group in by_prompt]
            )
            output = self.model(input_ids=torch.tensor([packed], device=device), shared_prefix_layout=layout)
        else:
            batch = pad_rows([[*prompt, *response] for prompt, response in rows], self._pad_token_id or 0)
            if self.is_gpm:
                batch["prompt_lengths"] = torch.tensor([len(prompt) for prompt, _ in rows])
            output = self.model(**{name: tensor.to(device) for name, tensor in batch.items()})
        if self.is_gpm:
            return output.embeddings.cpu(), output.scales.cpu()
        rewards = output.logits[:, 0].float().cpu()
        return torch.stack([rewards, torch.ones_like(rewards)], dim=-1), torch.ones(len(rows), 1)

    def score(self, prompts: Texts, a: Texts, b: Texts, template_kwargs: TemplateKwargs = None) -> torch.Tensor:
        """
        Scores s `(N,)` of N responses `a` over as many `b`, one of each to each prompt, in units of tau (Definition
        4.3): see [`~gpm_trl.preference.preference_score`]; other arguments and errors: [`~PreferenceScorer.embed`].
        """
        _check_lists(prompts=prompts, a=a, b=b)
        groups = self.embed(prompts, [[first, second] for first, second in zip(a, b, strict=True)], template_kwargs)
        if not groups:
            return torch.empty(0)
        first, second = torch.stack([group.embeddings for group in groups]).unbind(1)
        return preference_score(first, second, torch.stack([group.scales for group in groups]))

    def probability(self, prompts: Texts, a: Texts, b: Texts, template_kwargs: TemplateKwargs = None) -> torch.Tensor:
        """
        Probabilities `(N,)` that responses `a` are preferred to `b`, `sigmoid(s / tau)` of [`~PreferenceScorer.score`]
        (Equation 3.1).
        """
        return preference_probability(self.score(prompts, a, b, template_kwargs), self.temperature)

    def matrix(
        self, prompts: Texts, responses: Sequence[Texts], template_kwargs: TemplateKwargs = None
    ) -> list[torch.Tensor]:
        """
        Scores of all pairs among the responses to each prompt, N of `(K, K)`, in units of tau, exactly antisymmetric:
        see [`~gpm_trl.preference.preference_matrix`]; arguments and errors: see [`~PreferenceScorer.embed`].
        """
        return [preference_matrix(*group) for group in self.embed(prompts, responses, template_kwargs)]

    def mean_preference(
        self,
        prompts: Texts,
        responses: Sequence[Texts],
        template_kwargs: TemplateKwargs = None,
        references: Sequence[Texts] | None = None,
    ) -> list[torch.Tensor]:
        """
        Mean preference s_hat of each response over all to its prompt (Equation 5.2), in log-odds: see
        [`~gpm_trl.preference.mean_preference`].

        With `references`, it is the mean over these instead: one number a response that does not depend on which
        others are scored with it, for tools that take a scalar reward. That is lossy: differences of such numbers are
        not the scores of the model, and they order the responses of a cycle, which nothing does.

        Args:
            prompts, responses, template_kwargs: See [`~PreferenceScorer.embed`].
            references (list of N lists, *optional*): Responses to each prompt, at least one, that s_hat is over; the
                same whenever numbers are to be compared.

        Returns:
            N `torch.Tensor`: Mean preferences, `(K,)` each; without `references`, those of a prompt add up to zero.
        """
        if references is None:
            matrices = self.matrix(prompts, responses, template_kwargs)
            return [mean_preference(matrix / self.temperature) for matrix in matrices]

        _check_lists(responses=responses, references=references)
        if not all(references):
            raise ValueError("A list of references is empty: give each prompt at least one.")
        if any(isinstance(group, str) for group in (*responses, *references)):
            raise ValueError("`responses` or `references` has a string for a prompt: give a list of them.")
        groups = [[*group, *others] for group, others in zip(responses, references, strict=True)]
        matrices = self.matrix(prompts, groups, template_kwargs)
        return [
            matrix[: len(group), len(group) :].mean(-1) / self.temperature
            for matrix, group in zip(matrices, responses, strict=True)
        ]

    def rank(
        self, prompt: Text, responses: Texts, method: str = "mean", template_kwargs: dict[str, Any] | None = None
    ) -> Ranking:
        """
        Rank the K responses to a prompt by a method of [`rank_scores`]. `template_kwargs` is what the chat template
        gets (`tools`, ...); errors: see [`~PreferenceScorer.embed`].
        """
        check_choice("method", method, RANKING_METHODS)
        (group,) = self.embed([prompt], [responses], [template_kwargs or {}])
        return replace(self.rank_embedded(group, method), responses=responses)

    def rank_embedded(self, group: ResponseEmbeddings, method: str = "mean") -> Ranking:
        """[`~PreferenceScorer.rank`] for responses that are embedded already."""
        transitive = block_scores(*group)[..., : self.reward_dim].sum(-1)
        return replace(rank_scores(preference_matrix(*group), self.temperature, method), transitive=transitive)

    def best_of_n(
        self, prompts: Texts, responses: Sequence[Texts], method: str = "mean", template_kwargs: TemplateKwargs = None
    ) -> list[Text]:
        """
        The best response to each of N prompts by a method of [`rank_scores`], as it was given. Other arguments and
        errors: see [`~PreferenceScorer.embed`].
        """
        check_choice("method", method, RANKING_METHODS)
        matrices = self.matrix(prompts, responses, template_kwargs)
        winners = [rank_scores(matrix, self.temperature, method).order[0] for matrix in matrices]
        return [group[winner] for group, winner in zip(responses, winners, strict=True)]


def _check_lists(**lists: Sequence | None) -> None:
    """Raise `ValueError` unless those that are given are lists of one length."""
    given = {name: texts for name, texts in lists.items() if texts is not None}
    if any(isinstance(texts, str) for texts in given.values()) or len({len(texts) for texts in given.values()}) > 1:
        got = (f"a string for `{name}`" if isinstance(x, str) else f"{len(x)} `{name}`" for name, x in given.items())
        raise ValueError(f"Give lists with one entry for each prompt or comparison; got {', '.join(got)}.")


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of the parameters only: by ZeRO-3, whose parameters have an id, or FSDP."""
    by_fsdp = any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules())
    return by_fsdp or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def rank_scores(scores: torch.Tensor, temperature: float, method: str = "mean") -> Ranking:
    r"""
    Rank the K responses to a prompt by their scores.

    Args:
        scores (`torch.Tensor`): Scores s of all pairs, `(K, K)`: see [`~gpm_trl.preference.preference_matrix`].
        temperature (`float`): tau in `P(y_i > y_j | x) = sigmoid(s / tau)`.
        method (`str`, defaults to `"mean"`): What ranks them. `"mean"`: the mean preference s_hat over the group
            (Equation 5.2), in log-odds. `"copeland"`: how many others a response beats, a tie counting one half.
            `"von_neumann"`: its probability in the von Neumann winner of the probabilities, the mixture that no
            response beats ([`~gpm_trl.games.von_neumann_winner`]), to six decimals; many are 0.

    Raises:
        ValueError: If the method is unknown.

    Example:

    ```python
    >>> import torch
    >>> from gpm_trl import rank_scores
    >>> scores = torch.tensor([[0.0, -0.1, 0.3], [0.1, 0.0, 0.1], [-0.3, -0.1, 0.0]])
    >>> rank_scores(scores, temperature=0.1).order, rank_scores(scores, temperature=0.1, method="copeland").order
    ([0, 1, 2], [1, 0, 2])

    ```
    """
    check_choice("method", method, RANKING_METHODS)
    scores = scores.detach().cpu()
    probabilities = preference_probability(scores, temperature)
    means = mean_preference(scores / temperature)
    if method == "mean":
        values = means
    elif method == "copeland":
        values = torch.as_tensor(copeland_scores(scores.double().numpy()), dtype=torch.float32)
    else:
        winner = von_neumann_winner(preference_probability(scores.double(), temperature).numpy())
        values = torch.as_tensor(winner, dtype=torch.float32).round(decimals=6)
    order = sorted(range(len(means)), key=lambda i: (-values[i].item(), -means[i].item()))
    return Ranking(order, values, scores, probabilities, means)
