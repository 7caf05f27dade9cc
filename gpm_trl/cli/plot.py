"""
`gpm-trl plot`: pictures of preferences, calibration and training, as PNG or SVG by the name of the output. They need
the extra `viz`: `pip install "gpm-trl[viz]"`.

- `discs`: the responses to a prompt in the planes of the embedding, arrows from the preferred to the other;
- `matrix`: the probabilities of all pairs of responses, in the order of their ranking;
- `reliability` and `subsets`: calibration and accuracy by subset, from reports of `gpm-trl evaluate`;
- `curves`: loss and accuracy of one or more training runs, from their directories.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..scorer import RANKING_METHODS
from .arguments import USER_ERRORS, add_model_arguments, load_scorer, report_error

logger = logging.get_logger(__name__)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="gpm-trl plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    pictures = parser.add_subparsers(dest="picture", required=True, metavar="picture")
    for name, what in (("discs", "embeddings of the responses"), ("matrix", "probabilities of all pairs")):
        picture = pictures.add_parser(name, help=what)
        picture.add_argument("--model", required=True, help="directory or Hub id of a general preference model")
        picture.add_argument("--prompt", required=True, help="the prompt, plain text")
        picture.add_argument("--responses", required=True, nargs="+", help="the responses to it")
        picture.add_argument("--chat", action="store_true", help="apply the chat template, the prompt a user message")
        if name == "matrix":
            picture.add_argument("--method", choices=RANKING_METHODS, default=RANKING_METHODS[0], help="ranking")
        add_model_arguments(picture)
    for name, what in (("reliability", "reliability diagram"), ("subsets", "accuracy by subset")):
        picture = pictures.add_parser(name, help=what)
        picture.add_argument("--report", required=True, nargs="+", help="reports of `gpm-trl evaluate --output`")
    picture = pictures.add_parser("curves", help="learning curves")
    picture.add_argument("--run", required=True, nargs="+", help="directories of training runs, or name=directory")
    picture.add_argument("--metrics", nargs="+", help="what to show of them (default: loss and accuracy)")
    for picture in pictures.choices.values():
        picture.add_argument("--output", required=True, type=Path, help="PNG or SVG file to write")
        picture.add_argument("--title", help="title of the picture")
    return parser


def read_models(paths: list[str]) -> dict[str, dict[str, Any]]:
    """The models of some reports by name."""
    models: dict[str, dict[str, Any]] = {}
    for path in paths:
        report = json.loads(Path(path).read_text())
        if not isinstance(report, dict) or "models" not in report:
            raise ValueError(f"{path} is no report of `gpm-trl evaluate`.")
        for model in report["models"]:
            if model["name"] in models:
                raise ValueError(f"{model['name']} is in more than one of the reports: show it once.")
            models[model["name"]] = model
    return models


def read_runs(runs: list[str]) -> dict[str, list[dict[str, float]]]:
    """The logs of some training runs by name: that of the last checkpoint, where the directory has none itself."""
    logs = {}
    for run in runs:
        name, _, directory = run.partition("=")
        if Path(run).is_dir() or not directory:
            name = directory = run
        if name in logs:
            raise ValueError(f"Two runs are called {name}: name them, as in `A={directory}`.")
        states = [Path(directory) / "trainer_state.json"]
        if not states[0].exists():
            states = sorted(
                Path(directory).glob("checkpoint-*/trainer_state.json"),
                key=lambda path: int(path.parent.name.split("-")[1]),
            )
        if not states:
            raise FileNotFoundError(f"{directory} has no trainer_state.json, nor a checkpoint that has one.")
        logs[name] = json.loads(states[-1].read_text())["log_history"]
    return logs


def draw(args: argparse.Namespace):
    """The picture that the arguments describe."""
    from .. import plots  # here, since matplotlib is an extra

    if args.picture in ("discs", "matrix"):
        scorer = load_scorer(args.model, args)
        prompt = [{"role": "user", "content": args.prompt}] if args.chat else args.prompt
        if args.picture == "discs":
            (group,) = scorer.embed([prompt], [args.responses])
            has_gate = scorer.is_gpm and scorer.model.config.use_scale_gate
            scales = group.scales if has_gate else None
            return plots.plot_embedding_discs(group.embeddings, scales, args.responses, args.title)
        ranking = scorer.rank(prompt, args.responses, args.method)
        return plots.plot_preference_heatmap(ranking.probabilities, args.responses, ranking.order, args.title)
    if args.picture == "curves":
        return plots.plot_learning_curves(read_runs(args.run), args.metrics, title=args.title)
    models = read_models(args.report)
    if args.picture == "reliability":
        if not all("overall" in model for model in models.values()):
            raise ValueError("The report is of RewardBench 2, which has no calibration: it is about best-of-N.")
        bins = {name: model["overall"]["calibration"] for name, model in models.items()}
        return plots.plot_reliability(bins, args.title)
    return plots.plot_subset_accuracy({name: model["subsets"] for name, model in models.items()}, args.title)


def main(argv: list[str] | None = None) -> int:
    """Draw a picture; returns 0, or 2 with one line on stderr for arguments or files it cannot use."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        figure = draw(args)
        from ..plots import save_figure

        save_figure(figure, args.output)
    except USER_ERRORS as error:
        logger.debug("Traceback of the error below", exc_info=True)
        return report_error(parser.prog, error)
    print(f"Wrote {args.output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
