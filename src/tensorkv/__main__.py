"""The command line as ``python -m tensorkv``."""

from tensorkv.cli import run

raise SystemExit(run())
