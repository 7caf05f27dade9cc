"""The `gpm-trl` command: one module for each of its commands, with `make_parser` and `main`."""
