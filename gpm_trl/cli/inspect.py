"""
`gpm-trl inspect`: what preference data hold, how cyclic they are, and how much of them a scalar reward can get right.

With `--model`, also lengths in tokens and what `max_length` cuts; no weights are loaded. docs/inspect.md explains all.
"""

import argparse
import json
from hashlib import blake2b
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging

from ..data.formats import Layout, comparisons_and_labels, find_layout, prompt_and_responses, template_kwargs
from ..data.renderer import Renderer, make_renderer, within_context
from ..games import hodge_decomposition, reversals
from ..models.configuration_gpm import DEFAULT_RENDERER, GPMModelConfig
from ..models.loading import check_saved
from .arguments import add_source_arguments, command_parser, json_object, run_command
from .rows import load_rows, split_of


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("inspect", __doc__)
    parser.add_argument("data", metavar="DATA", help="Hub id, directory or JSON, JSON Lines or Parquet file")
    parser.add_argument("--split", default="train", help="split of the dataset (default: %(default)s)")
    what = 'columns to read for those of a layout, {"prompt": "query"}'
    parser.add_argument("--column_mapping", type=json_object, help=what)
    parser.add_argument("--model", help="directory or Hub id of a model, to count tokens")
    parser.add_argument("--max_length", type=int, help="most tokens of a row (default: the model's, else 2048)")
    add_source_arguments(parser)
    return parser


def read_row(row: dict[str, Any], layout: Layout, renderer: Renderer | None, known: dict) -> list[tuple]:
    """
    The comparisons of a row: two responses, each the digests of its prompt and its own, and a label. `known` gets each
    new response: tokens of its prompt and of its row, and whether the row fits once the prompt is cut.
    """
    row = layout.read(row)
    prompt, responses = prompt_and_responses(row)
    pairs, labels = comparisons_and_labels(row, len(responses))
    options = template_kwargs(row)
    texts = (json.dumps(text, sort_keys=True).encode() for text in ([prompt, options], *responses))
    first, *rest = (blake2b(text, digest_size=16).digest() for text in texts)
    new = {(first, key): text for key, text in zip(rest, responses, strict=True) if (first, key) not in known}
    known |= dict.fromkeys(new, (0, 0, True))
    if renderer is not None and new:
        prompt_ids, ids = renderer.encode(prompt, list(new.values()), **options)
        for key, response_ids, fits in zip(new, ids, renderer.fit(prompt_ids, ids)[1], strict=True):
            known[key] = (len(prompt_ids), len(prompt_ids) + len(response_ids), fits)
    return [((first, rest[i]), (first, rest[j]), label) for (i, j), label in zip(pairs, labels, strict=True)]


def _cycles(won: np.ndarray, lost: np.ndarray, strength: np.ndarray, count: np.ndarray) -> tuple[float, bool, float]:
    """
    Of responses that are connected, sums `(n, n)` over the comparisons of each pair i < j: how many comparisons an
    order gets wrong beside those in conflict, whether that is exact, and the cyclic part's sum of squares.
    """
    least, is_exact = reversals(won + lost.T)
    more_wrong = least - np.minimum(won, lost).sum()
    if more_wrong <= 0:
        return 0.0, is_exact, 0.0
    count = count + count.T
    means = (strength - strength.T) / np.maximum(count, 1)
    return more_wrong, is_exact, (count * hodge_decomposition(means, count)[2] ** 2).sum() / 2


def count_comparisons(prompts: np.ndarray, pairs: np.ndarray, labels: np.ndarray) -> tuple[dict[str, Any], str]:
    """What the comparisons of `pairs` of responses, `(m, 2)`, to `prompts`, `(n,)`, with `labels`, `(m,)`, hold."""
    strengths = np.where(pairs[:, 0] < pairs[:, 1], 2 * labels - 1, 1 - 2 * labels).round(9)  # 0.8 is 1 - 0.2
    pairs, sizes, differ = np.sort(pairs, axis=1), np.bincount(prompts), pairs[:, 0] != pairs[:, 1]
    edges, edge = np.unique(pairs[differ], axis=0, return_inverse=True)
    sides = [strengths > 0, strengths < 0, strengths, np.ones(len(pairs))]
    sums = np.stack([np.bincount(edge.ravel(), side[differ], len(edges)) for side in sides])
    opposed, decided = np.minimum(sums[0], sums[1]), sums[:2].sum()
    graph = coo_array((sums[3], tuple(edges.T)), shape=(len(prompts), len(prompts)))
    part = connected_components(graph, directed=False)[1][edges[:, 0]]
    rings, cycles, wrong, exact, cyclic = set(), set(), opposed.sum(), True, 0.0
    for members in np.split(np.argsort(part, kind="stable"), np.cumsum(np.bincount(part))[:-1]):
        responses, indices = np.unique(edges[members], return_inverse=True)
        if len(members) < max(3, len(responses)):
            continue  # a tree, so no cycle
        matrices = np.zeros((4, len(responses), len(responses)))
        matrices[:, *indices.reshape(-1, 2).T] = sums[:, members]
        rings.add(prompts[responses[0]])
        more_wrong, is_exact, share = _cycles(*matrices)
        if more_wrong:
            cycles.add(prompts[responses[0]])
            wrong, exact, cyclic = wrong + more_wrong, exact and is_exact, cyclic + share
    scalar, gpm = (1 - float(missed / max(decided, 1)) for missed in (wrong, opposed.sum()))
    verdict = "These data cannot say whether you need a GPM: no prompt has three responses compared in a ring."
    if rings:
        verdict = "You need no GPM for these data: where preferences could go round, they do not."
    if cycles:
        verdict = f"No scalar reward gets more than {scalar:.2%} right; a GPM can, unless the cycles are noise."
    report = {
        "prompts": len(sizes),
        "responses a prompt (least, median, most)": np.percentile(sizes, [0, 50, 100]).astype(int).tolist(),
        "comparisons": len(pairs),
        "- ties": int((strengths == 0).sum()),
        "- of identical responses": int((~differ).sum()),
        "- repeated": len(pairs) - len(np.unique(np.column_stack([pairs, strengths]), axis=0)),
        "pairs of responses in conflict (i > j and j > i)": int((opposed > 0).sum()),
        "prompts in which a cycle could close": len(rings),
        "- in which one does": len(cycles),
        "cyclic share of the preferences (Hodge)": float(cyclic / max((sums[2] ** 2 / sums[3]).sum(), 1e-300)),
        f"best accuracy of a scalar reward{'' if exact else ', at most'}": scalar,
        "best accuracy of a GPM": gpm,
    }
    return report, verdict


def count_tokens(tokens: np.ndarray, pairs: np.ndarray, prompts: np.ndarray, max_length: float) -> dict[str, Any]:
    """What `tokens`, `(n, 3)`, hold: for each response those of its prompt and of its row, and whether that fits."""
    long, fits = tokens[:, 1] > max_length, tokens[:, 2] == 1
    prompt, both = np.percentile(tokens[:, :2], [50, 95, 100], axis=0, method="higher").T.astype(int).tolist()
    return {
        "tokens of a prompt (median, 95 %, most)": prompt,
        "tokens of a prompt and its response": both,
        f"comparisons with more than {max_length:,}": int(long[pairs].any(1).sum()),
        "- even if prompts are cut": int((~fits)[pairs].any(1).sum()),
        "prompts that would be cut": len(set(prompts[long & fits])),
    }


def inspect(args: argparse.Namespace) -> dict[str, Any]:
    """Read the rows, and print what they hold; returns it."""
    rows, renderer, known, comparisons = split_of(load_rows(args.data), args.split, "--split"), None, {}, []
    layout = find_layout(rows.column_names, args.column_mapping)
    if args.model is not None:
        check_saved(args.model)
        source = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
        config = AutoConfig.from_pretrained(args.model, **source)
        saved = config.renderer if isinstance(config, GPMModelConfig) else DEFAULT_RENDERER
        max_length = within_context(saved["max_length"] if args.max_length is None else args.max_length, config)
        settings = {**saved, "max_length": max_length, "long_rows": "truncate_prompt"}
        renderer = make_renderer(AutoTokenizer.from_pretrained(args.model, **source), **settings)
    elif args.max_length is not None:
        raise ValueError("`--max_length` is a number of tokens: name the model that counts them by `--model`.")
    stream = iter(rows)
    for number in logging.tqdm(range(1, len(rows) + 1), desc="Reading", unit="row"):
        try:
            comparisons += read_row(next(stream), layout, renderer, known)
        except ValueError as error:
            raise ValueError(f"{args.data}: Row {number}: {error}") from error
    if not comparisons:
        raise ValueError(f"{args.data} has no comparison.")
    order = {key: index for index, key in enumerate(sorted(known))}
    prompts = np.unique([prompt for prompt, _ in order], return_inverse=True)[1]
    pairs = np.array([[order[first], order[second]] for first, second, _ in comparisons])
    report, verdict = count_comparisons(prompts, pairs, np.array([label for *_, label in comparisons]))
    if renderer is not None:
        report |= count_tokens(np.array([known[key] for key in order]), pairs, prompts, renderer.max_length or np.inf)
    print(f"{args.data}: {len(rows):,} rows, {layout}\n")
    for name, value in report.items():
        print(f"{name:52}{f'{value:.2%}' if isinstance(value, float) else value}")
    print(f"\n{verdict}")
    return {**report, "verdict": verdict}


def main(argv: list[str] | None = None) -> int:
    return run_command(make_parser(), inspect, argv)
