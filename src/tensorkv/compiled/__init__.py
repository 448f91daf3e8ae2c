"""Tell which compiled parts this installation has. Without a C compiler it has none, and is slower."""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module

PARTS = ("_native", "_shared", "_signals", "_tables")

log = logging.getLogger("tensorkv")


@cache
def parts() -> dict[str, bool]:
    """Return the compiled parts, and whether each can be used here.

    >>> parts()
    {'_native': True, '_shared': True, '_signals': True, '_tables': True}
    """
    return {name: _is_there(name) for name in PARTS}


def _is_there(name: str) -> bool:
    try:
        import_module(f"tensorkv.compiled.{name}")
    except ImportError:
        return False
    return True


def describe() -> str:
    """Describe which compiled parts are missing; an empty str if none is.

    >>> describe()
    ''
    """
    names = ", ".join(name for name, is_there in parts().items() if not is_there)
    return f"installed without its compiled parts {names}, since no C compiler was found" if names else ""


@cache
def warn_once() -> None:
    """Log a warning about missing parts, the first time in a process."""
    if what := describe():
        log.warning("tensorkv is %s: results are the same, calls slower; see docs/dependencies.md", what)
