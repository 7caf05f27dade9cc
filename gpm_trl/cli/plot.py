"""
`gpm-trl plot`: pictures of preferences and calibration, as PNG or SVG by the name of the output (extra `viz`).

- `discs`: the responses to a prompt in the planes of the embedding, arrows from the preferred to the other; of a
  model with a reward, bars of it;
- `matrix`: the probabilities of all pairs of responses, in the order of their ranking;
- `reliability`: calibration, from reports of `gpm-trl evaluate`.
"""

import argparse
import json
from pathlib import Path

from ..scorer import RANKING_METHODS
from .arguments import add_model_arguments, command_parser, load_scorer, run_command


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("plot", __doc__)
    pictures = parser.add_subparsers(dest="picture", required=True, metavar="picture")
    for name, what in (("discs", "embeddings of the responses"), ("matrix", "probabilities of all pairs")):
        picture = pictures.add_parser(name, help=what)
        picture.add_argument("--model", required=True, help="directory or Hub id of a general preference model")
        picture.add_argument("--prompt", required=True, help="the prompt, plain text")
        picture.add_argument("--responses", required=True, nargs="+", help="the responses to it")
        picture.add_argument("--chat", action="store_true", help="apply the chat template, the prompt a user message")
        add_model_arguments(picture)
    pictures.choices["matrix"].add_argument(
        "--method", choices=RANKING_METHODS, default=RANKING_METHODS[0], help="ranking"
    )
    picture = pictures.add_parser("reliability", help="reliability diagram")
    picture.add_argument("--report", required=True, nargs="+", help="reports of `gpm-trl evaluate --output`")
    for picture in pictures.choices.values():
        picture.add_argument("--output", required=True, type=Path, help="PNG or SVG file to write")
        picture.add_argument("--title", help="title of the picture")
    return parser


def read_bins(paths: list[str]) -> dict[str, list[dict[str, float]]]:
    """The calibration of each model of some reports, by its name."""
    bins = {}
    for path in paths:
        try:
            report = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: {error}") from error
        if not isinstance(report, dict) or not all("overall" in model for model in report.get("models", [{}])):
            raise ValueError(f"{path} is no report of `gpm-trl evaluate` with calibration (RewardBench 2 has none).")
        for model in report["models"]:
            if model["name"] in bins:
                raise ValueError(f"{model['name']} is in more than one of the reports: show it once.")
            bins[model["name"]] = model["overall"]["calibration"]
    return bins


def draw(args: argparse.Namespace):
    """Draw the picture that the arguments describe and save it; returns the figure."""
    from .. import plots  # here, since matplotlib is an extra

    plots.picture_format(args.output)  # before a model is loaded
    if args.picture == "reliability":
        figure = plots.plot_reliability(read_bins(args.report), args.title)
    else:
        scorer = load_scorer(args.model, args)
        prompt = [{"role": "user", "content": args.prompt}] if args.chat else args.prompt
        if args.picture == "matrix":
            ranking = scorer.rank(prompt, args.responses, args.method)
            figure = plots.plot_preference_heatmap(ranking.probabilities, args.responses, ranking.order, args.title)
        else:
            ((embeddings, scales),) = scorer.embed([prompt], [args.responses])
            scales = scales if scorer.is_gpm and scorer.model.config.use_scale_gate else None
            figure = plots.plot_embedding_discs(embeddings, scales, args.responses, args.title, scorer.reward_dim)
    plots.save_figure(figure, args.output)
    print(f"Wrote {args.output}.")
    return figure


def main(argv: list[str] | None = None) -> int:
    return run_command(make_parser(), draw, argv)
