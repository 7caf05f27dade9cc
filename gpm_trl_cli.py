"""
Entry point of `gpm-trl <command>`.

It is no module of the package, since importing `gpm_trl` registers the models, which takes transformers and torch, and
seconds. So help, the version and a mistyped command are answered at once.
"""

import difflib
import importlib
import sys
from importlib.metadata import version

COMMANDS = {
    "inspect": "what preference data hold, how cyclic they are, and whether a scalar reward would do",
    "gpm": "train a general preference model",
    "gpo": "align a policy with a general preference model, online",
    "gprl": "train a policy on the blocks of a general preference model, by reinforcement learning",
    "score": "compare and rank the responses in a file",
    "evaluate": "accuracy and calibration, on your rows or on RewardBench",
    "convert": "write a released checkpoint, or a reward model, as a general preference model",
    "merge": "merge an adapter and its base model into one model",
    "plot": "pictures of preferences and calibration",
    "app": "a page to try preference models on, in the browser",
    "quickstart": "train on cyclic preferences and compare with Bradley-Terry, in minutes and without a GPU",
}
TRAIN = ("gpm", "gpo", "gprl")  # on as many processes as accelerate is told


def _usage() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
    return (
        f"usage: gpm-trl <command> [arguments]\n\ncommands:\n{commands}\n\n`gpm-trl <command> --help` says more, "
        "`gpm-trl --version` which version this is. With `--accelerate_config zero3`\n(or another name, or a file), "
        "gpm, gpo and gprl run on several processes."
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, or 2 for arguments or data it cannot use."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    name, *arguments = argv
    if name == "--version":
        print(f"gpm-trl {version('gpm-trl')}")
        return 0
    if name not in COMMANDS:
        similar = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f": did you mean {similar[0]!r}?" if similar else ""
        print(f"gpm-trl: error: there is no command {name!r}{hint}\n\n{_usage()}", file=sys.stderr)
        return 2
    if name in TRAIN and any(argument.split("=")[0] == "--accelerate_config" for argument in arguments):
        from gpm_trl.cli.launch import launch

        return launch(name, arguments)
    return importlib.import_module(f"gpm_trl.cli.{name}").main(arguments)


if __name__ == "__main__":
    sys.exit(main())
