"""Keys: non-empty str, or int."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import KeyTypeError

Key = str | int


def is_key(key: Any) -> bool:
    """Tell whether this is one key rather than several."""
    return isinstance(key, str | int | np.integer)


def check_key(verb: str, key: Any) -> Key:
    """Return the key as a plain str or int, or raise KeyTypeError."""
    if type(key) is str and key:
        return key
    if type(key) is int:
        return key
    if isinstance(key, bool | np.bool_) or not is_key(key):
        raise KeyTypeError(f"{verb}: {key!r} is no key; keys are non-empty str, or int")
    if isinstance(key, str):
        if not key:
            raise KeyTypeError(f"{verb}: the key is an empty string; keys are non-empty str, or int")
        return str(key)
    return int(key)
