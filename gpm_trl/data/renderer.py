"""The one way from texts to tokens: templates, BOS and EOS, the end of the prompt, and rows that are too long."""

import inspect
import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..models.configuration_gpm import check_row_limits
from .collator import pad_rows
from .formats import as_messages

__all__ = ["ReleasedRenderer", "Renderer", "RewardModelRenderer", "cut_end", "make_renderer"]

logger = logging.get_logger(__name__)

Text = str | Sequence[dict[str, Any]]
# Arguments of `apply_chat_template` that are not for the template, and so not for a row to choose.
OWN_ARGUMENTS = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
OWN_ARGUMENTS -= {"tools", "documents"}


class RowTooLongError(ValueError):
    """A row is longer than `max_length`, and cutting its prompt is not allowed or not enough."""


class EncodedGroup(NamedTuple):
    """Token ids of a prompt and of the responses to it, and whether any of them were cut to `max_length`."""

    prompt_ids: list[int]
    response_ids: list[list[int]]
    truncated: bool


def count_embeddings(model: PreTrainedModel) -> int:
    """How many tokens a model has embeddings of."""
    within = model.get_input_embeddings().modules()  # an adapter may wrap it
    return next(module.num_embeddings for module in within if hasattr(module, "num_embeddings"))


def within_context(max_length: int | None, config: PreTrainedConfig) -> int | None:
    """The most tokens of a row: `max_length`, or what the backbone takes, if that is less. `None` is any number."""
    config = config.get_text_config()
    context, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None) or {}
    if context is not None and rope.get("original_max_position_embeddings") == context:  # of the positions, unscaled
        context = int(context * rope.get("factor", 1))
    return min((limit for limit in (max_length, context) if limit is not None), default=None)


def check_token_ids(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, num_embeddings: int | None) -> None:
    """Raise `ValueError` for a token that is beyond the rows of a model's embedding, `None` for any number."""
    largest = max(ids, default=0)
    if num_embeddings is not None and largest >= num_embeddings:
        raise ValueError(
            f"{tokenizer.convert_ids_to_tokens(largest)!r} has the id {largest}, but the model's embedding has "
            f"{num_embeddings} rows: call `model.resize_token_embeddings(len(tokenizer))`, or take its own tokenizer."
        )


def cut_end(ids: list[int], size: int) -> list[int]:
    """At most `size` tokens: the first `size - 1` and the last, which is an EOS."""
    return ids if len(ids) <= size else [*ids[: size - 1], ids[-1]]


def cut_left(ids: list[int], size: int, bos_token_id: int | None) -> list[int]:
    """The last `size` tokens; a leading BOS is kept, in place of the first of them."""
    bos = ids[:1] if ids and ids[0] == bos_token_id else []
    return ids if len(ids) <= size else bos + ids[len(ids) - size + len(bos) :]


@dataclass
class Renderer:
    r"""
    Turns a prompt and its responses into token ids, the same way in training, scoring and policy optimisation. Its
    settings are saved with the model, in `config.renderer`.

    - The **prompt** is rendered *without* the generation prompt; the scale gate reads its last token. Where a template
      renders earlier turns differently once a response follows (it strips their thinking, say), the prompt is what
      stands before the response. Where a template refuses to render a prompt alone, the prompt ends where the
      response's content starts, after the header of the assistant's turn.
    - Prompt tokens do not depend on the response: where a token would straddle the boundary, both sides are tokenized
      apart. So responses to one prompt share its tokens, and the gate sees the same for all.
    - One BOS stands first if the tokenizer wants one, and every response ends in EOS; white space that a template
      writes after the EOS is dropped.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): With an EOS token, and a chat template for
            conversations.
        max_length (`int`, *optional*): Most tokens of a prompt and a response together; `None` for no limit.
        long_rows (`str`, defaults to `"filter"`): What [`~Renderer.fit`] does with longer rows: `"filter"` drops the
            response (as TRL drops the row), `"truncate_prompt"` cuts the prompt from the left, `"error"` raises.
        conversational (`bool`, *optional*): Whether the model is trained on messages, or on plain text; texts of the
            other kind are warned of, once.
        num_embeddings (`int`, *optional*): Rows of the model's embedding; a text with a token beyond raises.

    Raises:
        ValueError: If the tokenizer has no EOS token, or none that the model knows, or `long_rows` is unknown.

    Example:

    ```python
    renderer = Renderer(AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B"))
    output = model(**renderer("What is 2 + 2?", ["4", "5"]))
    ```
    """

    convention: ClassVar[str] = "gpm"

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = None
    long_rows: str = "filter"
    conversational: bool | None = None
    num_embeddings: int | None = None

    def __post_init__(self):
        if self.tokenizer.eos_token_id is None:
            raise ValueError("There is no EOS token, but every response ends in one: set `tokenizer.eos_token`.")
        check_row_limits(self.max_length, self.long_rows, self.convention)
        check_token_ids([self.tokenizer.eos_token_id], self.tokenizer, self.num_embeddings)
        self._bos = self._leading_bos(self._tokenize("a", add_special_tokens=True))
        self._version = version("gpm-trl")  # so that what another version has tokenized is not taken from a cache

    def __call__(self, prompt: Text, responses: Sequence[Text], **template_kwargs) -> dict[str, torch.Tensor]:
        """
        Rows of one prompt with each of K responses, padded on the right: what [`GPMForPreference`] takes.

        Args:
            prompt (`str` or list of messages): A string is plain text: no template is applied.
            responses (list of `str` or of lists of messages): Of the prompt's kind; for a conversational prompt, a
                string is the content of one assistant message.
            template_kwargs: Passed to the chat template (`tools`, ...).

        Returns:
            `dict` with `input_ids (K, L)`, `attention_mask (K, L)` and `prompt_lengths (K,)`.
        """
        prompt_ids, response_ids, _ = self.encode_fitting(prompt, responses, **template_kwargs)
        rows = pad_rows([prompt_ids + ids for ids in response_ids], pad_token_id=self.tokenizer.eos_token_id)
        return {**rows, "prompt_lengths": torch.full((len(response_ids),), len(prompt_ids))}

    def encode(self, prompt: Text, responses: Sequence[Text], **template_kwargs) -> tuple[list[int], list[list[int]]]:
        """
        Token ids of a prompt and of the responses to it, of any length. Arguments: see [`~Renderer.__call__`].

        Returns:
            `prompt_ids` and `response_ids`; a row is `prompt_ids + response_ids[i]`.

        Raises:
            ValueError: If the prompt has no token; if it or a response is no text; if the chat template is missing,
                refuses the conversation, or renders the prompt differently for one response than for another.
        """
        prompt, responses = self._read_texts(prompt, responses, template_kwargs)
        if isinstance(prompt, str):
            prefix, texts = prompt, [prompt + response for response in responses]
        else:
            prefix, texts = self._render(prompt, responses, template_kwargs)
        prompt_ids = self._with_bos(self._tokenize(prefix))
        if not prompt_ids:
            raise ValueError("The prompt is empty, so the scale gate has no token to read: give a prompt.")
        return prompt_ids, [self._response_ids(prompt_ids, prefix, text) for text in texts]

    def encode_fitting(self, prompt: Text, responses: Sequence[Text], **template_kwargs) -> EncodedGroup:
        """
        [`~Renderer.encode`] for scoring, where no response can be left out: a row that is too long raises
        `RowTooLongError`, unless cutting the prompt is enough under `"truncate_prompt"`.
        """
        prompt_ids, response_ids = self.encode(prompt, responses, **template_kwargs)
        kept_ids, _ = self.fit(prompt_ids, response_ids, raise_errors=True)
        return EncodedGroup(kept_ids, response_ids, truncated=kept_ids != prompt_ids)

    def fit(
        self, prompt_ids: list[int], response_ids: Sequence[list[int]], raise_errors: bool = False
    ) -> tuple[list[int], list[bool]]:
        """
        Apply `max_length` and `long_rows` to a prompt and the responses to it, as [`~Renderer.encode`] returns them.

        Returns:
            The prompt, and for each response whether its row fits. Under `"truncate_prompt"`, the prompt is cut from
            the left, once for all responses, to fit the longest that leaves it a token after the BOS.

        Raises:
            RowTooLongError: If a row is too long, and `raise_errors` or `long_rows` is `"error"`.
        """
        cuts, shortest = self.long_rows == "truncate_prompt", prompt_ids
        if cuts:  # to a token that the gate reads, after the BOS
            shortest = self.cut_left(prompt_ids, len(self._leading_bos(prompt_ids)) + 1)
        lengths = [len(shortest) + len(ids) for ids in response_ids]
        fits = [self.max_length is None or length <= self.max_length for length in lengths]
        if (raise_errors or self.long_rows == "error") and not all(fits):
            index = fits.index(False)
            remedy = "though its prompt was cut" if cuts else 'or use `long_rows="truncate_prompt"`'
            raise RowTooLongError(
                f"The row of response {index} has {lengths[index]} tokens, more than `max_length` = "
                f"{self.max_length}: raise it, as far as the backbone allows, {remedy}."
            )
        if cuts and self.max_length is not None and any(fits):
            longest = max(len(ids) for ids, fit in zip(response_ids, fits, strict=True) if fit)
            prompt_ids = self.cut_left(prompt_ids, self.max_length - longest)
        return prompt_ids, fits

    def cut_left(self, ids: list[int], size: int) -> list[int]:
        """[`cut_left`] with the tokenizer's BOS."""
        return cut_left(ids, size, self.tokenizer.bos_token_id)

    def _tokenize(self, text: str, add_special_tokens: bool = False) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=add_special_tokens).input_ids
        check_token_ids(ids, self.tokenizer, self.num_embeddings)
        return ids

    def _tokenize_inside(self, text: str) -> list[int]:
        """Tokens of a text that another precedes: without the space that SentencePiece puts before a first word."""
        anchor = self._tokenize("\n")
        ids = self._tokenize("\n" + text)
        return ids[len(anchor) :] if ids[: len(anchor)] == anchor else self._tokenize(text)

    def _leading_bos(self, ids: list[int]) -> list[int]:
        return ids[:1] if ids and ids[0] == self.tokenizer.bos_token_id else []

    def _with_bos(self, ids: list[int]) -> list[int]:
        return ids if self._leading_bos(ids) else self._bos + ids

    def _response_ids(self, prompt_ids: list[int], prefix: str, text: str) -> list[int]:
        """The tokens of `text` after those of the prompt, ending in one EOS."""
        ids, length = self._with_bos(self._tokenize(text)), len(prompt_ids)
        # Where a token straddles the boundary, the two sides are tokenized apart.
        ids = ids[length:] if ids[:length] == prompt_ids else self._tokenize_inside(text[len(prefix) :])
        eos = self.tokenizer.eos_token_id
        while eos in ids:
            last = len(ids) - 1 - ids[::-1].index(eos)
            if self.tokenizer.decode(ids[last + 1 :]).strip():
                break
            ids = ids[:last]
        return [*ids, eos]

    def _apply_template(self, messages: list[dict], template_kwargs: dict[str, Any]) -> str:
        if self.tokenizer.chat_template is None:
            raise ValueError("Rows are conversations, but there is no chat template: set `tokenizer.chat_template`.")
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **template_kwargs)
        except Exception as error:  # a template is a program of its own
            roles = [message.get("role") for message in messages]
            raise ValueError(f"The chat template refuses a conversation with the roles {roles}: {error}") from error

    def _read_texts(self, prompt: Text, responses: Sequence[Text], template_kwargs: dict) -> tuple[Text, list[Text]]:
        """The texts, messages as [`~gpm_trl.data.formats.as_messages`] makes them; raises `ValueError` for others."""
        is_plain = isinstance(prompt, str)
        if isinstance(responses, str):
            raise ValueError("`responses` is one string: give a list of them.")
        for number, text in enumerate(responses):
            if is_plain and not isinstance(text, str):
                raise ValueError(
                    f"The response {number} is a {type(text).__name__}, but the prompt a string: make both messages."
                )
        given = sorted(name for name, value in template_kwargs.items() if value is not None)
        if is_plain and given:
            raise ValueError(f"{', '.join(given)} would be ignored: no chat template is applied to plain text.")
        if refused := [name for name in given if name in (*OWN_ARGUMENTS, *self.tokenizer.special_tokens_map)]:
            raise ValueError(f"`chat_template_kwargs` has {refused}, which no chat template takes: leave them out.")
        if self.conversational is not None and self.conversational == is_plain:
            trained, given = ("messages", "plain text (see --chat)") if is_plain else ("plain text", "messages")
            logger.warning_once(f"The model is trained on {trained}, but gets {given}, rendered in another way.")
        if is_plain:
            return prompt, [*responses]
        return as_messages(prompt, "prompt"), [as_messages(text, f"response {i}") for i, text in enumerate(responses)]

    def _render_rows(self, prompt: list[dict], responses: list[list[dict]], template_kwargs: dict) -> list[str]:
        """The text of a conversation with each response; all messages must be in it."""
        texts = [self._apply_template([*prompt, *response], template_kwargs) for response in responses]
        repeats = len(set(texts)) < len(texts)
        for response, text in zip(responses, texts, strict=True):
            conversation = [*prompt, *response]
            for index, message in enumerate(conversation):
                content = (message["content"] or "").strip()
                if content and (content not in text or (repeats and index >= len(prompt))):
                    other = {**message, "content": "1" if content == "0" else "0"}
                    self._check_is_written("content", conversation, index, other, text, template_kwargs)
                if "tool_calls" in message:
                    other = {"role": message["role"], "content": message["content"] or ""}
                    self._check_is_written("tool calls", conversation, index, other, text, template_kwargs)
        return texts

    def _check_is_written(
        self, part: str, conversation: list[dict], index: int, other: dict, text: str, template_kwargs: dict
    ) -> None:
        """A template may change what it writes, but not write the same text if a message is replaced by an `other`."""
        try:
            changed = self._apply_template([*conversation[:index], other, *conversation[index + 1 :]], template_kwargs)
        except ValueError:  # the template refuses the other
            return
        if changed == text:
            raise ValueError(
                f"The chat template writes nothing of the {part} of a message of the role "
                f"{conversation[index]['role']!r}: use a form that it knows, or another template."
            )

    def _render(self, prompt: list[dict], responses: list[list[dict]], template_kwargs: dict) -> tuple[str, list[str]]:
        """The text of a conversation's prompt, and of the whole conversation with each response."""
        texts = self._render_rows(prompt, responses, template_kwargs)
        try:
            alone = self._apply_template(prompt, template_kwargs) if prompt else ""
        except ValueError:  # the template wants a response
            alone = ""
        # An EOS that the template writes at the end of every conversation is no part of the prompt.
        candidates = [alone, alone.rstrip().removesuffix(self.tokenizer.eos_token)]
        for prefix in candidates:
            if prefix and all(text.startswith(prefix) for text in texts):
                return prefix, texts
        probes = [self._apply_template([*prompt, *as_messages(content)], template_kwargs) for content in "01"]
        prefix = _prompt_within(probes, candidates)
        if not all(text.startswith(prefix) for text in texts) or (prompt and not prefix):
            raise ValueError("The chat template renders the prompt differently for each response: pass plain text.")
        return prefix, texts


@dataclass
class RewardModelRenderer(Renderer):
    """
    Renders for a Bradley-Terry reward model, a sequence classifier, as [`~trl.RewardTrainer`] does: the template's
    text, with nothing added or dropped; plain text ends in EOS. Such a model reads one position of the whole row, so
    `prompt_ids` is empty, and `"truncate_prompt"` cuts rows from the left, where cutting the prompt would be enough.

    Args:
        pad_token_id (`int`, *optional*): Left out at the end of rows, since the classifiers of transformers read the
            last token that is not this one, which may be the EOS. For a reward model converted to a GPM.
    """

    convention: ClassVar[str] = "reward_model"

    pad_token_id: int | None = None

    def encode(self, prompt: Text, responses: Sequence[Text], **template_kwargs) -> tuple[list[int], list[list[int]]]:
        return [], [self._without_padding(ids) for ids in self._rows(prompt, responses, template_kwargs)]

    def _rows(self, prompt: Text, responses: Sequence[Text], template_kwargs: dict) -> list[list[int]]:
        prompt, responses = self._read_texts(prompt, responses, template_kwargs)
        if isinstance(prompt, str):
            eos = self.tokenizer.eos_token
            return [self._tokenize(prompt + text.removesuffix(eos) + eos, True) for text in responses]
        return [self._tokenize(text) for text in self._render_rows(prompt, responses, template_kwargs)]

    def _without_padding(self, ids: list[int]) -> list[int]:
        while len(ids) > 1 and ids[-1] == self.pad_token_id:
            ids = ids[:-1]
        return ids

    def encode_fitting(self, prompt: Text, responses: Sequence[Text], **template_kwargs) -> EncodedGroup:
        rows = self._rows(prompt, responses, template_kwargs)
        _, fits = self.fit([], rows, raise_errors=self.long_rows != "truncate_prompt")
        if not all(fits):
            if not prompt:  # nothing to cut
                self.fit([], rows, raise_errors=True)
            # The rows of a reward model do not tell where the prompt ends. The general rendering does: it raises where
            # cutting the prompt alone is not enough.
            general = Renderer(self.tokenizer, self.max_length, self.long_rows)
            general.encode_fitting(prompt, responses, **template_kwargs)
            rows = [self.cut_left(ids, self.max_length) for ids in rows]
        return EncodedGroup([], [self._without_padding(ids) for ids in rows], truncated=not all(fits))


class ReleasedRenderer(Renderer):
    """
    Renders conversations as the example of the authors' released checkpoints does. The template's text is tokenized
    with special tokens, so that BOS stands twice where the template writes one. A long row is cut at its end
    (`long_rows="truncate_end"`). Its last token, whatever it is, becomes EOS. The gate reads the last token of the
    *first message*, rendered alone; further messages count as response. Plain text, which the example does not take,
    is rendered as by [`Renderer`].
    """

    convention: ClassVar[str] = "released"

    def encode(self, prompt: Text, responses: Sequence[Text], **template_kwargs) -> tuple[list[int], list[list[int]]]:
        if isinstance(prompt, str):
            return super().encode(prompt, responses, **template_kwargs)
        prompt, responses = self._read_texts(prompt, responses, template_kwargs)
        rows = [self._tokenize(text, True) for text in self._render_rows(prompt, responses, template_kwargs)]
        firsts = [[*prompt, *response][:1] for response in responses]
        firsts = [self._tokenize(self._apply_template(first, template_kwargs), True) for first in firsts]
        prompt_ids = rows[0][: len(firsts[0])] if rows else []
        for row, first in zip(rows, firsts, strict=True):
            if row[: len(first)] != prompt_ids:
                raise ValueError("The first message, which the gate reads, has other tokens for another response.")
            if len(row) == len(prompt_ids):
                raise ValueError("The conversation is no longer than its first message: let a response follow it.")
        return prompt_ids, [[*row[len(prompt_ids) : -1], self.tokenizer.eos_token_id] for row in rows]

    def encode_fitting(self, prompt: Text, responses: Sequence[Text], **template_kwargs) -> EncodedGroup:
        if self.long_rows != "truncate_end" or self.max_length is None:
            return super().encode_fitting(prompt, responses, **template_kwargs)
        prompt_ids, response_ids = self.encode(prompt, responses, **template_kwargs)
        room = self.max_length - len(prompt_ids)
        if room < 1:
            raise RowTooLongError(
                f"Of `max_length` = {self.max_length}, rows would have nothing of a response: raise it above "
                f"{len(prompt_ids)}, the tokens of the prompt, or of its first message."
            )
        kept = [cut_end(ids, room) for ids in response_ids]
        return EncodedGroup(prompt_ids, kept, truncated=kept != response_ids)


def make_renderer(tokenizer: PreTrainedTokenizerBase, convention: str = "gpm", **settings) -> Renderer:
    """The renderer of a `convention` (the class attribute), with its other `settings`: those of `config.renderer`."""
    renderers = {renderer.convention: renderer for renderer in (Renderer, ReleasedRenderer, RewardModelRenderer)}
    return renderers[convention](tokenizer, **settings)


def _prompt_within(conversations: list[str], candidates: list[str]) -> str:
    """
    The prompt of two conversations that differ in their responses alone, where it is not what the prompt rendered
    alone is (`candidates`): a template may render earlier turns differently once a response follows. It ends where its
    last message does, which is found by the longest tail of a candidate that occurs before the response. If there is
    none, it ends where the response's content starts.
    """
    shared = os.path.commonprefix(conversations)  # noqa: RUF071 (characters are what is meant)
    tail = max((_longest_tail(candidate, shared) for candidate in candidates), key=len)
    end = shared.rfind(tail) + len(tail)
    agreed = len(os.path.commonprefix([candidates[0], shared]))  # noqa: RUF071
    # A tail that ends before the two first differ is that of an earlier message: a template may merge the response
    # into a last message of the same role.
    return shared[:end] if tail and end >= agreed else shared


def _longest_tail(text: str, within: str) -> str:
    # If one tail occurs there, so do all shorter ones: what a binary search needs.
    return text[bisect_left(range(len(text)), True, key=lambda start: text[start:] in within) :]
