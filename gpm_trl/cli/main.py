"""`python -m gpm_trl.cli.main`, the same as `gpm-trl`."""

import sys

from gpm_trl_cli import COMMANDS, main  # noqa: F401

if __name__ == "__main__":
    sys.exit(main())
