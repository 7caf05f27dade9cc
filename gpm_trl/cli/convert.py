"""
`gpm-trl convert`: write a checkpoint of another layout as a general preference model of this package.

SRC is one of the authors' released checkpoints (`general-preference/GPM-Gemma-2B`), or, with `--from-bt`, a
Bradley-Terry reward model: a sequence classifier with one label, which becomes the k = 1 model v = [r, 1] with the
same preferences, or, with `--embedding_dim`, the start of a hybrid reward-cyclic model, whose cyclic part is new. DST
gets the weights as safetensors, the tokenizer, and a configuration with all conventions of SRC: texts get the scores
that SRC gives them. Not of a start, which is to be trained: it reads rows at their EOS token, as all GPMs do.
"""

import argparse
from pathlib import Path

from accelerate.utils import is_peft_model
from transformers import AutoConfig, PreTrainedTokenizerBase

from ..models import GPMForPreference, GPMModelConfig
from ..models.reward_model import gpm_from_reward_model
from ..scorer import PreferenceScorer, load_config
from .arguments import add_source_arguments, check_destination, command_parser, run_command, write_model


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("convert", __doc__)
    parser.add_argument("source", metavar="SRC", help="directory or Hub id of the checkpoint")
    parser.add_argument("destination", metavar="DST", type=Path, help="directory to write, a new or an empty one")
    parser.add_argument("--from-bt", action="store_true", help="SRC is a Bradley-Terry reward model")
    what = "width 2k of a new cyclic part beside the reward, to be trained (default: none)"
    parser.add_argument("--embedding_dim", type=int, default=0, help=what)
    add_source_arguments(parser)
    parser.add_argument("--dtype", help="of the backbone: float32, bfloat16, float16 (default: the checkpoint's)")
    return parser


def load_source(args: argparse.Namespace) -> tuple[GPMForPreference, PreTrainedTokenizerBase]:
    """The general preference model that SRC is, and its tokenizer; `ValueError` if it is none, or is one already."""
    options = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    is_gpm = isinstance(load_config(args.source, **options), GPMModelConfig)
    if is_gpm and AutoConfig.from_pretrained(args.source, **options).model_type == GPMModelConfig.model_type:
        raise ValueError(f"{args.source} is a general preference model of this package already: use it as it is.")
    if is_gpm and args.from_bt:
        raise ValueError(f"{args.source} is one of the authors' released checkpoints: leave out --from-bt.")
    if args.embedding_dim and not args.from_bt:
        raise ValueError(f"`--embedding_dim {args.embedding_dim}` is of `--from-bt`: leave it out.")
    GPMModelConfig(reward_dim=1, embedding_dim=args.embedding_dim)  # tells a width that none can have
    if not is_gpm and not args.from_bt:
        raise ValueError(f"{args.source} is a Bradley-Terry reward model: say so by --from-bt.")
    scorer = PreferenceScorer.from_pretrained(args.source, "cpu", args.dtype, **options)
    model = scorer.model.merge_and_unload(safe_merge=True) if is_peft_model(scorer.model) else scorer.model
    return model if is_gpm else gpm_from_reward_model(model, args.embedding_dim), scorer.tokenizer


def convert(args: argparse.Namespace) -> None:
    check_destination(args.destination)
    model, tokenizer = load_source(args)
    write_model(model, tokenizer, args.destination)
    config = model.config
    gate = "with a scale gate" if config.use_scale_gate else "without a gate"
    print(
        f"Wrote {args.destination}: {config.kind}, embedding_dim {config.embedding_dim}, reward_dim "
        f"{config.reward_dim}, {gate}, tau = {config.temperature}, texts rendered by the convention "
        f"{config.renderer.get('convention', 'gpm')!r}."
    )


def main(argv: list[str] | None = None) -> int:
    return run_command(make_parser(), convert, argv)
