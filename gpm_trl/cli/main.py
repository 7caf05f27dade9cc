"""`python -m gpm_trl.cli.main <command>`, the same as `gpm-trl <command>`."""

import sys

from gpm_trl_cli import COMMANDS, main

__all__ = ["COMMANDS", "main"]

if __name__ == "__main__":
    sys.exit(main())
