"""Handle Ctrl-C while a command imports torch, which takes seconds: end without the traceback of an import."""

from __future__ import annotations

import os
import signal
import sys
import threading


def is_command() -> bool:
    """Tell whether this process is about to run the command line: ``tensorkv ...`` or ``python -m tensorkv ...``."""
    # While python -m imports a package, its own name for the program is "-m".
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    return program == "-m" or os.path.basename(program) == "tensorkv"


_ends = False


def end_at_interrupt() -> None:
    """Let Ctrl-C end a command's process at once, without a traceback, until ``raise_at_interrupt``."""
    global _ends
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _ends = True


def raise_at_interrupt() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, if ``end_at_interrupt`` has changed that."""
    global _ends
    if _ends:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _ends = False


end_at_interrupt()
