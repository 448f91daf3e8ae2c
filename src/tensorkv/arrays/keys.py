"""Keys: non-empty str, or int."""

from __future__ import annotations

from typing import Any

import numpy as np

from tensorkv.errors import KeyTypeError, show

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
        raise KeyTypeError(f"{verb}: invalid key {show(key)}; expected a non-empty str or an int")
    if isinstance(key, str):
        if not key:
            raise KeyTypeError(f"{verb}: the key is an empty string; expected a non-empty str or an int")
        return str(key)
    return int(key)
