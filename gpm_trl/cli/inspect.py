"""
`gpm-trl inspect`: what preference data hold, how cyclic they are, and how much of them a scalar reward can get right.

With `--model`, also lengths in tokens and what `max_length` cuts; no weights are loaded. docs/inspect.md explains the
numbers.
"""

import argparse
import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging

from ..data.formats import Layout, comparisons_and_targets, find_layout, prompt_and_responses, template_kwargs
from ..data.renderer import Renderer, make_renderer
from ..games import hodge_decomposition, reversals
from ..models.configuration_gpm import DEFAULT_RENDERER
from .arguments import command_parser, run_command
from .rows import load_rows


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("inspect", __doc__)
    parser.add_argument("data", metavar="DATA", help="Hub id, directory or JSON, JSON Lines or Parquet file")
    parser.add_argument("--split", default="train", help="split of the dataset (default: %(default)s)")
    parser.add_argument("--column_mapping", help="columns by the names that are read: prompt=query,chosen=good")
    parser.add_argument("--model", help="directory or Hub id of a model, to count tokens")
    parser.add_argument("--max_length", type=int, help="most tokens of a row (default: the model's, else 2048)")
    parser.add_argument("--output", type=Path, help="JSON file for the report")
    return parser


def read_row(row: dict[str, Any], layout: Layout, renderer: Renderer | None, known: dict) -> list[tuple]:
    """
    The comparisons of a row, each of two keys and a label. A key is the digests of a prompt and of a response; a new
    one gets to be `known` with the tokens of its prompt and of its row, and whether that fits with its prompt cut.
    """
    row = layout.read(row)
    prompt, responses = prompt_and_responses(row)
    pairs, labels = comparisons_and_targets(row, len(responses), "label")
    options = template_kwargs(row)
    digests = [
        blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).digest()
        for value in ([prompt, options], *responses)
    ]
    keys = [(digests[0], digest) for digest in digests[1:]]
    new = {key: response for key, response in zip(keys, responses, strict=True) if key not in known}
    known |= dict.fromkeys(new, (0, 0, True))
    if renderer is not None and new:
        prompt_ids, ids = renderer.encode(prompt, list(new.values()), **options)
        lengths = ((len(prompt_ids), len(prompt_ids) + len(response_ids)) for response_ids in ids)
        known |= {key: (*n, fits) for key, n, fits in zip(new, lengths, renderer.fit(prompt_ids, ids)[1], strict=True)}
    return [(keys[i], keys[j], label) for (i, j), label in zip(pairs, labels, strict=True)]


def count_comparisons(prompts: np.ndarray, pairs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """What `pairs`, `(m, 2)`, of responses with the numbers of their `prompts`, `(n,)`, and `labels`, `(m,)`, hold."""
    strengths = np.where(pairs[:, 0] < pairs[:, 1], 2 * labels - 1, 1 - 2 * labels)
    pairs, sizes, differ = np.sort(pairs, axis=1), np.bincount(prompts), pairs[:, 0] != pairs[:, 1]
    edges, edge, counts = np.unique(pairs[differ], axis=0, return_inverse=True, return_counts=True)
    sides = [strengths[differ] > 0, strengths[differ] < 0, strengths[differ]]
    first, second, means = (np.bincount(edge, side, len(edges)) for side in sides)
    means /= counts
    opposed, decided = np.minimum(first, second), first.sum() + second.sum()
    graph = coo_array((counts, tuple(edges.T)), shape=(len(prompts), len(prompts)))
    part = connected_components(graph, directed=False)[1][edges[:, 0]]
    rings, cycles, wrong, all_exact, cyclic = set(), set(), opposed.sum(), True, 0.0
    for members in np.split(np.argsort(part, kind="stable"), np.cumsum(np.bincount(part))[:-1]):
        responses, indices = np.unique(edges[members], return_inverse=True)
        if len(members) < max(3, len(responses)):
            continue  # a tree, which has no cycle
        rings.add(prompts[responses[0]])
        where, shape = tuple(indices.reshape(-1, 2).T), (len(responses), len(responses))
        won, lost, mean, count = (
            coo_array((values[members], where), shape).toarray() for values in (first, second, means, counts)
        )
        least, exact = reversals(won + lost.T)
        if least > opposed[members].sum():
            cycles.add(prompts[responses[0]])
            wrong, all_exact = wrong + least - opposed[members].sum(), all_exact and exact
            count = count + count.T
            cyclic += (count * hodge_decomposition(mean - mean.T, count)[2] ** 2).sum() / 2
    return {
        "prompts": len(sizes),
        "responses a prompt: least, median, most": [int(sizes.min()), int(np.median(sizes)), int(sizes.max())],
        "comparisons": len(pairs),
        "- ties, their label is 0.5": int((strengths == 0).sum()),
        "- of identical responses": int((~differ).sum()),
        "- that repeat another": len(pairs) - len(np.unique(np.column_stack([pairs, strengths]), axis=0)),
        "pairs of responses": len(edges),
        "- in conflict, each preferred once": int((opposed > 0).sum()),
        "prompts where a cycle could close": len(rings),
        "- where preferences go round": len(cycles),
        "cyclic share of the preferences": float(cyclic / ((counts * means**2).sum() or 1)),
        "best accuracy of a scalar reward": float(1 - wrong / decided) if decided else None,
        "- is it exact": all_exact,
        "best accuracy of a GPM": float(1 - opposed.sum() / decided) if decided else None,
    }


def count_tokens(tokens: np.ndarray, pairs: np.ndarray, prompts: np.ndarray, max_length: int) -> dict[str, Any]:
    ...
