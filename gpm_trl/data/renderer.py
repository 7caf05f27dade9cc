"""The one way from texts to tokens: templates, BOS and EOS, the end of the prompt, and rows that are too long."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .collator import pad_rows

__all__ = ["Renderer"]

Text = str | Sequence[dict[str, Any]]


@dataclass
class Renderer:
    r"""
    Turns a prompt and its responses into token ids, the same way in training, scoring and policy optimisation. Its
    settings are saved with the model, in `config.renderer`.

    - The **prompt** is rendered *without* the generation prompt; the scale gate reads its last token. Where a template
      renders earlier turns differently once a response follows (as those do that strip thinking from earlier turns),
      the prompt is what stands before the response. Where a template refuses to render a prompt alone, the prompt ends
      where the response's content starts, i.e. after the header of the assistant's turn.
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

    Raises:
        ValueError: If the tokenizer has no EOS token.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from gpm_trl import Renderer
    >>> tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B")  # doctest: +SKIP
    >>> renderer = Renderer(tokenizer)  # doctest: +SKIP
    >>> batch = renderer("What is 2 + 2?", ["4", "5"])  # doctest: +SKIP

    ```
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = None
    long_rows: str = "filter"

    def __post_init__(self):
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"{type(self.tokenizer).__name__} has no EOS token, but every response must end in one: set "
                "`tokenizer.eos_token` (for a trainer, `eos_token` in its config)."
            )
        first = self.tokenizer("a").input_ids[:1]
        self._bos = first if first == [self.tokenizer.bos_token_id] else []

    @classmethod
    def from_config(cls, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> "Renderer":
        """The renderer a model was trained with: `tokenizer` with the settings in `config.renderer`."""
        return cls(tokenizer, **config.renderer)

    def __call__(self, prompt: Text, responses: Sequence[Text], **template_kwargs) -> dict[str, torch.Tensor]:
        """
        Rows of one prompt with each of K responses, padded on the right: what [`GPMForPreference`] takes.

        Args:
            prompt (`str` or list of messages): Messages are dictionaries with `role` and `content`. A string is plain
                text: no template is applied.
            responses (list of `str` or of lists of messages): Of the prompt's kind; for a conversational prompt, a
                string is the content of one assistant message.
            template_kwargs: Passed to the chat template (`tools`, ...).

        Returns:
            `dict` with `input_ids (K, L)`, `attention_mask (K, L)` and `prompt_lengths (K,)`.

        Raises:
            ValueError: See [`~Renderer.encode`]; also if a row is longer than `max_length` and `long_rows` is not
                `"truncate_prompt"`.
        """
        prompt_ids, response_ids = self.encode(prompt, responses, **template_kwargs)
        prompt_ids, fits = self.fit(prompt_ids, response_ids)
        if not all(fits):
            raise ValueError(f"Response {fits.index(False)} is longer than `max_length` = {self.max_length} tokens.")
        rows = [prompt_ids + ids for ids in response_ids]
        lengths = torch.full((len(rows),), len(prompt_ids))
        return {**pad_rows(rows, pad_token_id=self.tokenizer.eos_token_id), "prompt_lengths": lengths}

    def encode(self, prompt: Text, responses: Sequence[Text], **template_kwargs) -> tuple[list[int], list[list[int]]]:
        """
        Token ids of a prompt and of the responses to it, of any length. A row is `prompt_ids + response_ids[i]`.

        Args:
            prompt, responses, template_kwargs: See [`~Renderer.__call__`].

        Returns:
            `prompt_ids`, `response_ids`.

        Raises:
            ValueError: If the prompt has no token; if the tokenizer has no chat template, or its template refuses the
                conversation or renders the prompt differently for one response than for another.
        """
        if isinstance(prompt, str):
            prefix, texts = prompt, [prompt + response for response in responses]
        else:
            prefix, texts = self._render(list(prompt), responses, template_kwargs)
        prompt_ids = self._bos + self._without_bos(self._tokenize(prefix))
        if not prompt_ids:
            raise ValueError(
                "The prompt is empty and the tokenizer adds no BOS token, so the scale gate has no token to read: "
                "give a prompt."
            )
        return prompt_ids, [self._response_ids(prompt_ids, prefix, text) for text in texts]

    def fit(self, prompt_ids: list[int], response_ids: Sequence[list[int]]) -> tuple[list[int], list[bool]]:
        """
        Apply `max_length` and `long_rows` to a prompt and the responses to it.

        Args:
            prompt_ids, response_ids: See [`~Renderer.encode`].

        Returns:
            The prompt (cut from the left under `"truncate_prompt"`, the BOS kept, to fit the longest response that
            leaves it a token: all responses keep one prompt), and for each response whether its row fits.

        Raises:
            ValueError: If a row is too long and `long_rows` is `"error"`.
        """
        if self.max_length is None:
            return prompt_ids, [True] * len(response_ids)
        if self.long_rows == "error":
            longest = len(prompt_ids) + max(map(len, response_ids))
            if longest > self.max_length:
                raise ValueError(
                    f"A row has {longest} tokens, more than `max_length` = {self.max_length}: raise `max_length`, or "
                    'choose `long_rows="filter"` or `"truncate_prompt"`.'
                )
        if self.long_rows == "truncate_prompt":
            smallest = len(self._bos) + 1
            room = [self.max_length - len(ids) for ids in response_ids]
            kept = min((left for left in room if left >= smallest), default=len(prompt_ids))
            if kept < len(prompt_ids):
                prompt_ids = self._bos + prompt_ids[len(prompt_ids) - kept + len(self._bos) :]
        return prompt_ids, [len(prompt_ids) + len(ids) <= self.max_length for ids in response_ids]

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _without_bos(self, ids: list[int]) -> list[int]:
        return ids[1:] if self._bos and ids[:1] == self._bos else ids

    def _response_ids(self, prompt_ids: list[int], prefix: str, text: str) -> list[int]:
        ids = self._bos + self._without_bos(self._tokenize(text))
        if ids[: len(prompt_ids)] != prompt_ids:  # a token straddles the boundary
            return self._end_with_eos(self._tokenize(text[len(prefix) :]))
        return self._end_with_eos(ids[len(prompt_ids) :])

    def _end_with_eos(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        if eos in ids:
            end = len(ids) - ids[::-1].index(eos)
            if not self.tokenizer.decode(ids[end:]).strip():
                return ids[:end]
        return [*ids, eos]

    def _render(self, prompt: list[dict], responses: Sequence[Text], template_kwargs: dict) -> tuple[str, list[str]]:
        """The text of a conversation's prompt, and of the whole conversation with each response."""
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"The rows are conversations, but {type(self.tokenizer).__name__} has no chat template: set "
                "`tokenizer.chat_template` (for a trainer, `chat_template_path` in its config)."
            )

        def render(messages: list[dict]) -> str:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **template_kwargs)

        try:
            texts = [render(prompt + _as_messages(response)) for response in responses]
        except TemplateError as error:
            roles = [message.get("role") for message in prompt + _as_messages(responses[0])]
            raise ValueError(f"The chat template refuses a conversation with the roles {roles}: {error}") from error
        prefix = _prompt_prefix(render, prompt, texts)
        if not all(text.startswith(prefix) for text in texts):
            raise ValueError(
                "The chat template renders the prompt differently for one response than for another, so that no gate "
                "could depend on the prompt alone. Render the rows yourself and pass plain text."
            )
        return prefix, texts


def _as_messages(response: Text) -> list[dict]:
    return [{"role": "assistant", "content": response}] if isinstance(response, str) else list(response)


def _prompt_prefix(render: Callable[[list[dict]], str], prompt: list[dict], texts: list[str]) -> str:
    """
    The part of the rendered conversations that is the prompt's.

    It is the prompt rendered alone, if the conversations start with it. Otherwise earlier turns are rendered
    differently once a response follows: then it ends where the last prompt message does in the conversation, found by
    the longest tail of the prompt rendered alone that occurs before the response. If there is none, it ends where the
    response's content starts: what two conversations with different responses have in common.
    """
    try:
        alone = render(prompt) if prompt else ""
    except TemplateError:
        alone = ""
    if alone and all(text.startswith(alone) for text in texts):
        return alone
    probes = [render([*prompt, {"role": "assistant", "content": content}]) for content in ("0", "1")]
    shared = os.path.commonprefix(probes)  # noqa: RUF071 (characters are what is meant)
    shortest, longest = 0, len(alone)  # if a tail of `alone` occurs in `shared`, so do all shorter ones
    while shortest < longest:
        middle = (shortest + longest + 1) // 2
        if alone[-middle:] in shared:
            shortest = middle
        else:
            longest = middle - 1
    return shared[: shared.rfind(alone[-shortest:]) + shortest] if shortest else shared
