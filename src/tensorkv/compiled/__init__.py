"""The compiled parts: each a module, or None where this installation lacks it and is slower."""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module

from .sources import PARTS, checksum

log = logging.getLogger("tensorkv")

# Why each missing part is missing.
_missing: dict[str, str] = {}


def _load(part: str) -> object:
    """Import a part, unless it was built from other sources than those beside it: its functions may then differ."""
    try:
        module = import_module(f"{__name__}.{part}")
    except ModuleNotFoundError:
        _missing[part] = "no C compiler was found"
        return None
    except ImportError as error:
        _missing[part] = str(error)
        return None
    try:
        is_current = getattr(module, "SOURCES", None) == checksum(part)
    except OSError:
        is_current = True
    if is_current:
        return module
    _missing[part] = "they were built from other C sources (remove the files and install tensorkv again)"
    return None


# For `from tensorkv.compiled import _native`, which takes this name rather than importing the part.
for _part in PARTS:
    globals()[_part] = _load(_part)


def parts() -> dict[str, bool]:
    """Return the compiled parts, and whether each can be used here.

    >>> list(parts())
    ['_codecs', '_elements', '_layouts', '_native', '_shared', '_signals', '_tables']
    >>> all(parts().values())
    True
    """
    return {part: part not in _missing for part in PARTS}


def describe() -> str:
    """Describe which compiled parts are missing, and why; an empty str if none is.

    >>> describe()
    ''
    """
    reasons = dict.fromkeys(_missing.values())
    without = [
        f"without its compiled parts {', '.join(part for part in _missing if _missing[part] == reason)}, since {reason}"
        for reason in reasons
    ]
    return f"installed {', and '.join(without)}" if without else ""


@cache
def warn_once() -> None:
    """Log a warning about missing parts, the first time in a process."""
    if what := describe():
        log.warning("tensorkv is %s: results are the same, calls slower; see docs/dependencies.md", what)
