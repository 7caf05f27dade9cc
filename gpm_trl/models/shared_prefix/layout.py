"""Where prompts and responses are in a packed row."""

import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


@dataclass(frozen=True)
class SharedPrefixLayout:
    """
    What is where in a packed row of G prompts and N responses, T tokens in all.

    Args:
        prompt_lengths (tuple of G `int`): Tokens of each group's prompt; the gate reads the last of them.
        prefix_lengths (tuple of G `int`): Tokens that the rows of a group share; 0 where they share none.
        response_lengths (tuple of G tuples of `int`): Tokens of each row after these, at least one.

    Example:

    ```python
    >>> from gpm_trl.models.shared_prefix import SharedPrefixLayout
    >>> layout, packed = SharedPrefixLayout.pack([([5, 6], [[1], [7, 1]]), ([8], [[9, 9, 1]])])
    >>> packed
    [5, 6, 1, 7, 1, 8, 9, 9, 1]
    >>> layout.positions.tolist(), layout.last_tokens, layout.prompt_ends
    ([0, 1, 2, 2, 3, 0, 1, 2, 3], [2, 4, 8], [1, 1, 5])

    ```
    """

    prompt_lengths: tuple[int, ...]
    prefix_lengths: tuple[int, ...]
    response_lengths: tuple[tuple[int, ...], ...]

    @classmethod
    def pack(
        cls, groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]
    ) -> tuple["SharedPrefixLayout", list[int]]:
        """
        Pack groups of token ids: each a prompt and the responses to it.

        The prefix is the longest that all rows of a group have in common, the prompt and what all responses begin
        with, but for the last token of the shortest row: every response needs a token of its own to be embedded by.

        Returns:
            The layout, and the token ids of the packed row.
        """
        prefixes, lengths, packed = [], [], []
        for prompt, responses in groups:
            shared = len(os.path.commonprefix(list(responses)))  # noqa: RUF071 (of lists, element by element)
            shared = min(shared, min(map(len, responses)) - 1)
            if shared < 0:
                raise ValueError("A response has no token: each must end in at least an EOS.")
            packed += [*prompt, *responses[0][:shared]]
            for response in responses:
                packed += response[shared:]
            prefixes.append(len(prompt) + shared)
            lengths.append(tuple(len(response) - shared for response in responses))
        prompts = tuple(len(prompt) for prompt, _ in groups)
        return cls(prompts, tuple(prefixes), tuple(lengths)), packed

    @functools.cached_property
    def groups(self) -> list[tuple["Segment", list["Segment"]]]:
        """The prefix of each group, which may be empty, and its responses."""
        groups, start = [], 0
        for length, response_lengths in zip(self.prefix_lengths, self.response_lengths, strict=True):
            prefix = Segment(start, start, start, start + length)
            responses, start = [], prefix.end
            for response_length in response_lengths:
                responses.append(Segment(prefix.start, prefix.end, start, start + response_length))
                start += response_length
            groups.append((prefix, responses))
        return groups

    @property
    def segments(self) -> list["Segment"]:
        """All that are not empty, in their order in the packed row."""
        parts = (part for prefix, responses in self.groups for part in (prefix, *responses))
        return [part for part in parts if part.num_queries]

    @property
    def positions(self) -> torch.Tensor:
        """Position of each token in its row, `(T,)`."""
        return ranges((part.num_keys - part.num_queries, part.num_keys) for part in self.segments)

    @property
    def last_tokens(self) -> list[int]:
        """Index of the last token of each response, N."""
        return [response.end - 1 for _, responses in self.groups for response in responses]

    @property
    def prompt_ends(self) -> list[int]:
        """Index of the last token of each response's prompt, N."""
        groups = zip(self.groups, self.prompt_lengths, strict=True)
        return [prefix.start + length - 1 for (prefix, responses), length in groups for _ in responses]

    @property
    def row_lengths(self) -> list[int]:
        """Tokens of each row, prefix and response, N."""
        return [response.num_keys for _, responses in self.groups for response in responses]

    def model_inputs(self, device: torch.device) -> dict[str, Any]:
        """What a backbone takes beside the tokens of the packed row."""
        return {
            "position_ids": self.positions[None].to(device),  # (1, T)
            "attention_mask": torch.ones(1, 1, 1, 1, device=device),  # 4-D: no mask is made of it
            "shared_prefix_layout": self,
        }

    @functools.cached_property
    def _kept(self) -> dict[tuple, Any]:
        """What all layers of a model need of the layout, made once and kept as long as it."""
        return {}

    def visible(self, num_queries: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor:
        """
        Which keys the last `num_queries` of `num_keys` tokens see, `(1, 1, Q, K)`: those before and their own, the
        last `window` of these.
        """
        key = (num_queries, num_keys, window, device)
        if key not in self._kept:
            queries = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
            keys = torch.arange(num_keys, device=device)
            visible = keys <= queries
            if window is not None:
                visible &= queries - keys < window
            self._kept[key] = visible[None, None]
        return self._kept[key]

    def key_segments(self, device: torch.device) -> tuple[torch.Tensor, dict[str, Any]]:
        """
        For flash attention: which tokens of the packed row are the keys of its S segments, one after the other, and
        the arguments that say where segments start and end, `(S + 1,)`, and how long the longest is. The queries are
        the packed row as it is.
        """
        key = ("key segments", device)
        if key not in self._kept:
            parts = self.segments
            ends = [0, *accumulate(part.num_keys for part in parts)]
            arguments = {
                "cu_seq_lens_q": torch.tensor([0, *(part.end for part in parts)], dtype=torch.int32, device=device),
                "cu_seq_lens_k": torch.tensor(ends, dtype=torch.int32, device=device),
                "max_length_q": max(part.num_queries for part in parts),
                "max_length_k": max(part.num_keys for part in parts),
            }
            indices = ranges(bounds for part in parts for bounds in (part[:2], part[2:]))
            self._kept[key] = indices.to(device), arguments
        return self._kept[key]

    def block_mask(self, window: int | None, device: torch.device) -> BlockMask:
        """Which tokens of the packed row see which, for flex attention."""
        key = ("block mask", window, device)
        if key not in self._kept:
            segments = torch.tensor([part for part in self.segments for _ in range(part.num_queries)], device=device)
            prefix_start, prefix_end, start, _ = segments.unbind(1)  # of the segment of each token
            positions = self.positions.to(device)

            def sees(batch, head, query, key):
                shared = (key >= prefix_start[query]) & (key < prefix_end[query])
                sees = (shared | (key >= start[query])) & (key <= query)
                return sees if window is None else sees & (positions[query] - positions[key] < window)

            size = len(positions)
            self._kept[key] = create_block_mask(sees, B=None, H=None, Q_LEN=size, KV_LEN=size, device=device)
        return self._kept[key]


def ranges(bounds: Iterable[tuple[int, int]]) -> torch.Tensor:
    """Integers from the first of each two to before the second, one range after the other."""
    return torch.cat([torch.arange(start, end) for start, end in bounds])


class Segment(NamedTuple):
    """
    A prefix or a response: the tokens from `start` to `end` of the packed row, which attend to those from
    `prefix_start` to `prefix_end` and, causally, to themselves. A prefix has none before it.
    """

    prefix_start: int
    prefix_end: int
    start: int
    end: int

    @property
    def num_queries(self) -> int:
        return self.end - self.start

    @property
    def num_keys(self) -> int:
        return self.prefix_end - self.prefix_start + self.num_queries
