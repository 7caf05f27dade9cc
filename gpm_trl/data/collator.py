"""From groups (a prompt, its responses, the comparisons between them) to padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..models.shared_prefix import SharedPrefixLayout

__all__ = ["DataCollatorForGroups"]

# The Trainer counts the labels that differ from -100 (`_get_num_items_in_batch`), and pads with it across ranks.
# The loss goes by `comparison_mask`, but that count cannot: so a target of -100 becomes the float32 beside it.
NO_COMPARISON, NEXT_TO_IT = -100.0, -99.99999


def pad_rows(
    rows: Sequence[Sequence[int]], pad_token_id: int, pad_to_multiple_of: int | None = None
) -> dict[str, torch.Tensor]:
    """Rows of token ids -> `input_ids (N, L)` and `attention_mask (N, L)`, padded on the right."""
    input_ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad_token_id)
    rest = -input_ids.shape[1] % (pad_to_multiple_of or 1)
    input_ids = F.pad(input_ids, (0, rest), value=pad_token_id)
    lengths = torch.tensor([[len(row)] for row in rows])
    return {"input_ids": input_ids, "attention_mask": (torch.arange(input_ids.shape[1]) < lengths).long()}


@dataclass
class DataCollatorForGroups:
    """
    Collates groups into one padded row per distinct response of each prompt.

    A group is a dictionary with `prompt_ids` (list of ids), `response_ids` (list of lists of ids), `pairs` (list
    of `[i, j]`, indices into the responses), `targets` (one number a comparison: a probability, or a score to regress
    on) and, optionally, `margins`.

    A batch has N rows, one for each distinct response to each distinct prompt of its G groups; C is the most
    comparisons of a group, and groups with fewer are padded:

    - `input_ids (N, L)`, `attention_mask (N, L)`, `prompt_lengths (N,)`: what the model takes;
    - `group_rows (G,)`: a row of each group, whose gate stands for the prompt;
    - `response_rows (R,)`: the row of each response of each group, R >= N, and `response_groups (R,)`: its group;
    - `comparisons (G, C, 2)`: pairs of rows, and `comparison_mask (G, C)`: whether there is one;
    - `labels (G, C)`: the targets, -100 where there is no comparison;
    - `margins (G, C)`, if the groups have any.

    With `shared_prefix`, the rows are packed into one, each prompt once: `input_ids (1, T)` and
    `shared_prefix_layout`, see [`~gpm_trl.models.shared_prefix.SharedPrefixLayout`], are what the model takes.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its pad token fills the rows (the model never looks at
            it).
        pad_to_multiple_of (`int`, *optional*): Makes the width of a batch a multiple of this.
        shared_prefix (`bool`, defaults to `False`): Whether rows are packed rather than padded.

    Example:

    ```python
    >>> from types import SimpleNamespace
    >>> from gpm_trl.data import DataCollatorForGroups
    >>> collator = DataCollatorForGroups(tokenizer=SimpleNamespace(pad_token_id=0))
    >>> group = {"prompt_ids": [1, 5], "response_ids": [[6, 2], [7, 8, 2]], "pairs": [[1, 0]], "targets": [1.0]}
    >>> batch = collator([group])
    >>> batch["input_ids"].tolist(), batch["comparisons"].tolist(), batch["labels"].tolist()
    ([[1, 5, 6, 2, 0], [1, 5, 7, 8, 2]], [[[1, 0]]], [[1.0]])

    ```
    """

    tokenizer: PreTrainedTokenizerBase
    pad_to_multiple_of: int | None = None
    shared_prefix: bool = False

    def __call__(self, groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
        groups = [group for row in groups for group in row.get("groups", [row])]
        # Each prompt with its distinct responses, and where these come in the batch.
        prompts: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
        for group in groups:
            prompts.setdefault(tuple(group["prompt_ids"]), {}).update(dict.fromkeys(map(tuple, group["response_ids"])))
        rows = [(prompt, response) for prompt, responses in prompts.items() for response in responses]
        row_numbers = {row: number for number, row in enumerate(rows)}
        response_rows, comparisons = [], []
        for group in groups:
            prompt = tuple(group["prompt_ids"])
            response_rows.append(torch.tensor([row_numbers[prompt, tuple(ids)] for ids in group["response_ids"]]))
            comparisons.append(response_rows[-1][torch.tensor(group["pairs"])])
        mask = pad_sequence([torch.ones(len(pairs), dtype=torch.bool) for pairs in comparisons], batch_first=True)
        labels = _pad_numbers([group["targets"] for group in groups], padding=NO_COMPARISON)
        if self.shared_prefix:
            layout, packed = SharedPrefixLayout.pack([(prompt, [*prompts[prompt]]) for prompt in prompts])
            inputs = {"input_ids": torch.tensor([packed]), "shared_prefix_layout": layout}
        else:
            ids = [prompt + response for prompt, response in rows]
            inputs = pad_rows(ids, self.tokenizer.pad_token_id, self.pad_to_multiple_of)
            inputs["prompt_lengths"] = torch.tensor([len(prompt) for prompt, _ in rows])
        batch = {
            **inputs,
            "group_rows": torch.stack([numbers[0] for numbers in response_rows]),
            "response_rows": torch.cat(response_rows),
            "response_groups": torch.repeat_interleave(torch.tensor([len(numbers) for numbers in response_rows])),
            "comparisons": pad_sequence(comparisons, batch_first=True),
            "comparison_mask": mask,
            "labels": labels.masked_fill(mask & labels.eq(NO_COMPARISON), NEXT_TO_IT),
        }
        if "margins" in groups[0]:
            batch["margins"] = _pad_numbers([group["margins"] for group in groups], padding=0.0)
        return batch


def _pad_numbers(numbers: list[list[float]], padding: float) -> torch.Tensor:
    tensors = [torch.tensor(row, dtype=torch.float) for row in numbers]
    return pad_sequence(tensors, batch_first=True, padding_value=padding)
