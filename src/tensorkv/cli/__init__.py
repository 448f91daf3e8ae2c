"""The command line."""

from __future__ import annotations

import sys


def run() -> int:
    """Run the command ``tensorkv`` of this process, and return its exit status."""
    try:
        from .main import main
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        print("tensorkv: the command line needs rich; pip install 'tensorkv[cli]'", file=sys.stderr)
        return 1
    return main()
