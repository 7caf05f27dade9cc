"""Entry point of `gpm-trl <command>`."""

import importlib
import sys

COMMANDS = {
    "gpm": "train a general preference model",
    "gpo": "align a policy with a general preference model, online",
    "score": "compare and rank the responses in a file",
    "evaluate": "accuracy and calibration, on your rows or on RewardBench",
    "convert": "write a released checkpoint, or a reward model, as a general preference model",
    "merge": "make a model of its own of an adapter and its base model",
    "plot": "pictures of preferences and calibration",
    "cyclic": "write cyclic preference data, from UltraFeedback's ratings or the alphabet",
    "quickstart": "train on cyclic preferences and compare with Bradley-Terry, in minutes and without a GPU",
}
TRAIN = ("gpm", "gpo")  # on as many processes as accelerate is told


def _usage() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
    return (
        f"usage: gpm-trl <command> [arguments]\n\ncommands:\n{commands}\n\n`gpm-trl <command> --help` says more. With "
        "`--accelerate_config zero3` (or another name, or a file), gpm and gpo run on\nthe processes that it says."
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, or 2 for arguments or data it cannot use."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    name, *arguments = argv
    if name not in COMMANDS:
        print(f"gpm-trl: error: there is no command {name!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    if name in TRAIN and any(argument.split("=")[0] == "--accelerate_config" for argument in arguments):
        from .launch import launch

        return launch(name, arguments)
    return importlib.import_module(f"gpm_trl.cli.{name}").main(arguments)


if __name__ == "__main__":
    sys.exit(main())
