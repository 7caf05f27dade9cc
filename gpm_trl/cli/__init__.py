"""
The `gpm-trl` command: one module for each of its commands. Its `main` returns the exit code: 0, or 2 with one line on
stderr for arguments, files or data that it cannot use.
"""
