"""Warnings that name the line of the user's program, however deep inside of tensorkv they arise."""

from __future__ import annotations

import sys
import warnings


def warn(warning: Warning | str) -> None:
    """Issue a warning for the line that called into tensorkv.

    Args:
        warning: a text is a ``UserWarning``.
    """
    level, frame = 1, sys._getframe()
    # The modules of tensorkv are those of the package that has this one.
    package = __name__.partition(".")[0]
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == package:
        level, frame = level + 1, frame.f_back
    warnings.warn(warning, stacklevel=level)
