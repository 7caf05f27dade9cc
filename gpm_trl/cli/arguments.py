"""What the commands that load or write a model share."""

import argparse
import atexit
import datetime
import difflib
import json
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets.exceptions import DatasetsError
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..models.configuration_gpm import LONG_ROWS
from ..saving import check_output_dir, whole_files
from ..scorer import BATCH_TOKENS, PreferenceScorer

logger = logging.get_logger(__name__)

# A user can mend these, so they are one line. Anything else is a fault of the program, and has its traceback.
USER_ERRORS = (ValueError, OSError, EOFError, ImportError, FloatingPointError, DatasetsError, SafetensorError)


def command_parser(name: str, description: str) -> argparse.ArgumentParser:
    """The parser of a command, which shows the lines of its description as they are."""
    layout = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"gpm-trl {name}", description=description, formatter_class=layout)


def add_model_arguments(parser: argparse.ArgumentParser, with_rows: bool = False) -> None:
    """The options of [`PreferenceScorer.from_pretrained`], but for the model itself; maybe with those of the rows."""
    if with_rows:
        parser.add_argument("--chat", action="store_true", help="make strings messages: a user's, and the answers")
        what = 'columns to read for those of a layout, as JSON: {"prompt": "query"}; null leaves one out'
        parser.add_argument("--column_mapping", type=json_object, help=what)
    group = parser.add_argument_group("model")
    add_source_arguments(group)
    group.add_argument("--dtype", help="of the backbone: float32, bfloat16, float16 (default: the checkpoint's)")
    group.add_argument("--attn_implementation", help="sdpa, flash_attention_2, ... (default: transformers')")
    group.add_argument("--device", type=usable_device, help="default: the process's accelerator, else the CPU")
    tokens = "most tokens of a batch, padding counted (default: %(default)s)"
    group.add_argument("--batch_tokens", type=int, default=BATCH_TOKENS, help=tokens)
    length = "most tokens of a row (default: as in training, for a reward model what the backbone takes)"
    group.add_argument("--max_length", type=int, help=length)
    group.add_argument(
        "--long_rows",
        choices=LONG_ROWS,
        help="what to do with longer rows. truncate_prompt: cut the prompt from the left (the default of `evaluate`, "
        "which leaves out rows that are too long even so). error: stop. filter: `evaluate` leaves the row out, other "
        "commands stop. truncate_end: cut the end; of the authors' checkpoints, their default except in `evaluate`",
    )


def add_source_arguments(parser: Any) -> None:
    """What to read of a checkpoint, and whether to trust it; `parser` may be a group of one."""
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that a checkpoint may bring")


def json_object(text: str) -> dict:
    """An option that is a JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object, such as {{"prompt": "query"}}')
    return value


def usable_device(name: str) -> str:
    """A device's name, if there is such a device."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter from a build of torch without it
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return name


def load_scorer(name: str, args: argparse.Namespace, **defaults) -> PreferenceScorer:
    """The model `name` with the options of [`add_model_arguments`]; `defaults` stand in for those not given."""
    names = ("revision", "dtype", "attn_implementation", "max_length", "long_rows", "trust_remote_code")
    given = {option: getattr(args, option) for option in names if getattr(args, option) is not None}
    device = args.device or PartialState().device
    return PreferenceScorer.from_pretrained(name, device, batch_tokens=args.batch_tokens, **{**defaults, **given})


def start_processes(args: argparse.Namespace) -> PartialState:
    """The state of the processes that a launcher has started, on CPUs if there is no accelerator."""
    # One process may have a chunk of rows more than another, which can take longer than collectives wait by default.
    timeout = datetime.timedelta(days=1)
    state = PartialState(cpu=args.device == "cpu" or not torch.accelerator.is_available(), timeout=timeout)
    atexit.register(state.destroy_process_group)  # whose threads can abort the process once the interpreter is gone
    return state


def report_error(prog: str, error: Exception) -> int:
    """Print the error that is being handled as one line on stderr; returns the exit code, 2."""
    logger.debug("Traceback of the error below", exc_info=True)
    message = str(error)
    # The message of `datasets` says that data could not be read; why is in the cause.
    if isinstance(error, DatasetsError) and error.__cause__ is not None and str(error.__cause__) not in message:
        message = f"{message}: {error.__cause__}"
    tqdm.write(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)  # not behind a progress bar
    return 2


def check_options(parser: argparse.ArgumentParser, argv: list[str] | None, others: tuple[str, ...] = ()) -> None:
    """Raise `ValueError` for an option that the parser lacks, with the most similar one."""
    parts = [action.choices.values() for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    known = [option for part in (parser, *chain(*parts)) for option in part._option_string_actions] + [*others]
    for name in (argument.split("=")[0] for argument in (sys.argv[1:] if argv is None else argv)):
        if name[2:] and name.startswith("--") and not any(option.startswith(name) for option in known):
            similar = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"there is no option {name}{f': did you mean {similar[0]}?' if similar else '.'}")


def run_command(parser: argparse.ArgumentParser, run: Callable, argv: list[str] | None) -> int:
    """Run a command with its parsed arguments; returns 0, or 2 with one line on stderr for what it cannot use."""
    try:
        check_options(parser, argv)
        run(parser.parse_args(argv))
    except USER_ERRORS as error:
        return report_error(parser.prog, error)
    return 0


def check_destination(path: Path) -> None:
    """Raise `ValueError` or `OSError` unless `path` is an empty directory, or does not exist and can be made."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} is there already and not empty: remove it, or write to another directory.")
    check_output_dir(path)


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write a model and its tokenizer to a directory. The files get their names once all are written."""
    with whole_files(path.resolve()) as whole:  # `path` may be a link
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
