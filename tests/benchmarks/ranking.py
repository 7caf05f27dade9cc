"""
Ranking K responses of one prompt: `PreferenceScorer` against pair forwards, and against one forward a response.

    python tests/benchmarks/ranking.py

All three compute with the same backbone (Llama-shaped, random weights, float32). A pair model reads the prompt and two
responses in a row, and is not antisymmetric, so it needs both orders of each pair: K (K - 1) forwards. Rounds are
interleaved; medians of rounds, and the median and range of the ratios within a round.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from measuring import header, interleaved, llama, parser, ratios, row

from gpm_trl import GPMForPreference, GPMModelConfig, PreferenceScorer
from gpm_trl.cli.quickstart import byte_tokenizer


def ways_to_rank(args: argparse.Namespace, model: GPMForPreference) -> dict[str, Callable[[], Any]]:
    """What each way computes, the first being ours, on the device of the model."""
    scorer = PreferenceScorer(model, byte_tokenizer())
    backbone = scorer.model.model.eval()
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (args.responses + 1, args.tokens - 1), generator=generator)
    prompt, *responses = ["".join(map(chr, text)) for text in letters.tolist()]  # BOS and EOS make up the tokens
    prompt_ids, response_ids, _ = scorer.encode(prompt, responses)

    @torch.inference_mode()
    def pair_forwards() -> None:
        for i, first in enumerate(response_ids):
            for j, second in enumerate(response_ids):
                if i != j:
                    backbone(torch.tensor([[*prompt_ids, *first, *second]], device=model.device))

    def single_forwards() -> None:
        for response in responses:
            scorer.embed([prompt], [[response]])

    return {
        "PreferenceScorer": lambda: scorer.rank(prompt, responses),
        f"{args.responses} forwards of batch one": single_forwards,
        f"{args.responses * (args.responses - 1)} pair forwards": pair_forwards,
    }


def main() -> None:
    # `tokens` are those of the prompt, and of a response.
    args = parser(__doc__, responses=8, tokens=256, hidden_size=512, layers=4, rounds=7).parse_args()
    config = llama(args.hidden_size, args.layers, heads=8)
    ways = ways_to_rank(args, GPMForPreference(GPMModelConfig(text_config=config)))

    def seconds(way: str) -> float:
        start = time.perf_counter()
        ways[way]()
        return time.perf_counter() - start

    measured = interleaved(ways, seconds, args.rounds)
    header(args, "way", "median, s", "times PreferenceScorer, median [range]")
    for way, times in measured.items():
        row(way, f"{statistics.median(times):.3f}", ratios(times, measured["PreferenceScorer"]))


if __name__ == "__main__":
    main()
