"""The command line."""

from __future__ import annotations

import sys

from tensorkv.errors import install_hint


def run() -> int:
    """Run the command ``tensorkv`` of this process, and return its exit status."""
    try:
        from .main import main
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        print(f"tensorkv: the command line needs rich; {install_hint('cli')}", file=sys.stderr)
        return 1
    return main()
