"""
Ranking K responses of one prompt: `PreferenceScorer` against pair forwards, and against one forward a response.

    python tests/benchmarks/ranking.py

All three compute with the same backbone (Llama-shaped, random weights, float32). A pair model reads the prompt and two
responses in a row, and is not antisymmetric, so it needs both orders of each pair: K (K - 1) forwards. Rounds are
interleaved; medians of rounds, and the median and range of the ratios within a round.
"""

import argparse
import statistics
from functools import partial

import torch
from common import backbone, interleaved, print_header, print_row, print_setting, ratios, timed
from transformers import set_seed

from gpm_trl import GPMForPreference, GPMModelConfig, PreferenceScorer
from gpm_trl.cli.quickstart import byte_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--responses", type=int, default=8, help="K (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="of the prompt, of a response (default: %(default)s)")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    set_seed(0)
    config = GPMModelConfig(text_config=backbone(args.hidden_size, args.layers, heads=8, expansion=2.75))
    scorer = PreferenceScorer(GPMForPreference(config), byte_tokenizer())  # a character is a token
    model = scorer.model.model.eval()
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (args.responses + 1, args.tokens - 1), generator=generator)
    prompt, *responses = ["".join(map(chr, row)) for row in letters.tolist()]  # BOS and EOS make up the tokens
    prompt_ids, response_ids, _ = scorer.encode(prompt, responses)

    @torch.inference_mode()
    def pair_forwards() -> None:
        for i, first in enumerate(response_ids):
            for j, second in enumerate(response_ids):
                if i != j:
                    model(torch.tensor([[*prompt_ids, *first, *second]]))

    def single_forwards() -> None:
        for response in responses:
            scorer.embed([prompt], [[response]])

    ways = {
        "PreferenceScorer": lambda: scorer.rank(prompt, responses),
        f"{args.responses} forwards of batch one": single_forwards,
        f"{args.responses * (args.responses - 1)} pair forwards": pair_forwards,
    }
    seconds = interleaved({name: partial(timed, way) for name, way in ways.items()}, args.rounds)
    sizes = f"K = {args.responses}, {args.tokens} + {args.tokens} tokens"
    print_setting(f"{sizes}, hidden {args.hidden_size}, {args.layers} layers, float32", args.rounds)
    print_header("way", "median, s", "times PreferenceScorer, median [range]")
    for name, times in seconds.items():
        print_row(name, f"{statistics.median(times):.3f}", ratios(times, seconds["PreferenceScorer"]))


if __name__ == "__main__":
    main()
