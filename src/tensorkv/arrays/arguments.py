"""Arguments: what callers may write, brought to one form: keys without repeats, and per key a list of arrays.

(key, array) · (key, [arrays]) · (keys, arrays) · (keys, [[arrays], ...]) · keys repeated · {key: array or arrays}
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from tensorkv.errors import ArgumentError, KeyExistsError, KeyTypeError, quote, show

Key = str | int

_LISTS = (list, tuple)
_LIST_TYPES = frozenset(_LISTS)
_NO_KEY_LISTS = (bytes, bytearray, memoryview, set, frozenset)
# Verbs that take one value for each key.
_SINGLE = ("init", "broadcast")


def is_key(key: Any) -> bool:
    """Return whether this is one key rather than several."""
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
        # Of a str that is an Enum, str(key) is its name.
        return str.__str__(key)
    return int(key)


def pairs(verb: str, what: str, key: Any, value: Any) -> tuple[list[Key], list[list[Any]]]:
    """Return keys in order of first appearance, and per key its arrays in the order given.

    Args:
        verb, what: for messages, such as ``"push"`` and ``"value"``.
        key: a key, a collection of keys, or a mapping of key to value (then ``value`` is None).
        value: what belongs to the keys, in one of the forms above.

    Raises:
        KeyTypeError: an invalid key, or keys of two types.
        ArgumentError: unequal lengths, an empty or nested list, a mapping and a value.

    >>> pairs("push", "value", ["a", "b", "a"], [1, [2, 3], 4])
    (['a', 'b'], [[1, 4], [2, 3]])
    """
    if is_key(key):
        checked = check_key(verb, key)
        return [checked], [_arrays(verb, what, checked, value)]
    if isinstance(key, Mapping):
        if value is not None:
            raise ArgumentError(f"{verb}: key is a mapping, which has the {what}s; got {what}= as well")
        listed, values = list(key), list(key.values())
    else:
        listed, values = key_list(verb, key), value
        if isinstance(value, Mapping):
            listed = keys_of(verb, listed)
            listed = list(dict.fromkeys(listed)) if what == "out" else listed
            values = _align(verb, what, listed, value)
        if type(values) not in _LISTS:
            if value is None and any(isinstance(each, tuple) for each in listed):
                raise KeyTypeError(
                    f"{verb}: the keys are {show(listed)}; expected str or int; for pairs of key and {what}, "
                    "pass a mapping, dict(...)"
                )
            hint = f", or in place of both a mapping of key to {what}" if value is None else ""
            raise ArgumentError(
                f"{verb}: got {_count(len(listed), 'key')} and {show(value)} as {what}; expected a list of "
                f"{_count(len(listed), what)}, one for each key{hint}"
            )
        if len(values) != len(listed):
            raise ArgumentError(
                f"{verb}: got {_count(len(listed), 'key')} and {_count(len(values), what)}; expected one for each key"
            )
    grouped: dict[Key, list[Any]] = {}
    for each, arrays in zip(listed, values, strict=True):
        checked = check_key(verb, each)
        grouped.setdefault(checked, []).extend(_arrays(verb, what, checked, arrays))
    check_one_type(verb, grouped)
    return list(grouped), list(grouped.values())


def single_values(verb: str, key: Any, value: Any) -> tuple[list[Key], list[Any]]:
    """Return keys and one array for each, as ``init`` takes them.

    Raises:
        KeyExistsError: a key given twice.
        KeyTypeError, ArgumentError: as for ``pairs``.
    """
    if (
        type(key) is list
        and type(value) is list
        and len(key) == len(value)
        and _LIST_TYPES.isdisjoint(map(type, value))
    ):
        # Without a list for each key, which Python's garbage collector would look through.
        keys = keys_of(verb, key)
        if len(set(keys)) == len(keys):
            return keys, list(value)
    keys, values = pairs(verb, "value", key, value)
    listed = [key] if is_key(key) else list(key)
    if len(listed) != len(keys):
        twice = next(each for each, times in Counter(listed).items() if times > 1)
        raise KeyExistsError(f"{verb}: {quote(twice)} is given twice in one call")
    return keys, [arrays[0] for arrays in values]


def keys_of(verb: str, key: Any) -> list[Key]:
    """Return the keys of a call as they stand, repeats included."""
    if is_key(key):
        return [check_key(verb, key)]
    return check_keys(verb, key_list(verb, key))


def key_list(verb: str, keys: Any) -> list[Any]:
    """Return a collection of keys as a list."""
    if isinstance(keys, _NO_KEY_LISTS) or not isinstance(keys, Collection) or hasattr(keys, "__array__"):
        hint = ", such as list(...) or dict(...) of it" if isinstance(keys, Iterator) else ""
        raise KeyTypeError(
            f"{verb}: invalid key {show(keys)}; expected a str, an int, or a list or mapping of them{hint}"
        )
    return list(keys)


def check_keys(verb: str, keys: list[Any]) -> list[Key]:
    """Return a list of keys as plain str or int.

    Raises:
        KeyTypeError: one is invalid, or they are of two types.
    """
    types = set(map(type, keys))
    if types == {int} or (types == {str} and "" not in keys):
        return keys
    found = [check_key(verb, key) for key in keys]
    check_one_type(verb, found)
    return found


def check_one_type(verb: str, keys: Collection[Key]) -> None:
    """Raise KeyTypeError if some keys are str and others int."""
    if len({type(key) for key in keys}) > 1:
        raise KeyTypeError(f"{verb}: the keys are of two types, str and int; one store has one key type")


def _align(verb: str, what: str, keys: list[Any], values: Mapping[Any, Any]) -> list[Any]:
    by_key = {check_key(verb, key): own for key, own in values.items()}
    if len(by_key) != len(keys) or any(key not in by_key for key in keys):
        raise ArgumentError(f"{verb}: the {what} mapping has the keys {show(list(values))}; expected {show(keys)}")
    return [by_key[key] for key in keys]


def _arrays(verb: str, what: str, key: Key, value: Any) -> list[Any]:
    if type(value) not in _LISTS:
        return [value]
    if verb in _SINGLE and what == "value":
        raise ArgumentError(
            f"{verb}({quote(key)}): got {show(value)}; expected one array, the value that all devices share"
        )
    if not value and (verb, what) != ("pushpull", "out"):
        raise ArgumentError(f"{verb}({quote(key)}): got an empty list; expected at least one {what}")
    for index, each in enumerate(value):
        if type(each) in _LISTS:
            raise ArgumentError(
                f"{verb}({quote(key)}): {what} {index} is {show(each)}; expected an array: a list holds the "
                f"{what}s of a key, and is not turned into an array itself; for one array of numbers use numpy.asarray"
            )
    return list(value)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def check_flag(name: str, flag: Any) -> bool:
    """Return an option that is True or False.

    Raises:
        ArgumentError: anything else.
    """
    if type(flag) is not bool:
        raise ArgumentError(f"{name} is {show(flag)}; expected True or False")
    return flag


def plain_number(number: Any) -> Any:
    """Return a number of NumPy, or the one element of an array, as Python's; anything else as it is.

    >>> plain_number(np.float64(0.5)), plain_number(np.array(3)), plain_number("x")
    (0.5, 3, 'x')
    """
    if isinstance(number, np.generic):
        return number.item()
    if isinstance(number, int) and not isinstance(number, bool):
        # Of a subclass, such as an IntEnum.
        return int(number)
    shape = getattr(number, "shape", None)
    if isinstance(shape, tuple) and prod(shape) == 1 and hasattr(number, "item"):
        # Values that are not there yet, as in a function that JAX traces, have none.
        with suppress(Exception):
            found = number.item()
            return found if isinstance(found, int | float | complex) else number
    return number


def check_int(name: str, number: Any, least: int, more: str = "") -> int:
    """Return an integer option as an int; those of NumPy and one-element arrays count.

    Args:
        more: what else is expected, for the error.

    Raises:
        ArgumentError: not an int, or below ``least``.
    """
    found = plain_number(number)
    if type(found) is not int or found < least:
        raise ArgumentError(f"{name} is {show(number)}; expected an int of at least {least}{more}")
    return found


def check_timeout(timeout_s: Any, name: str = "timeout_s") -> float:
    """Return an option of a name as a float.

    Raises:
        ArgumentError: not a number above 0.
    """
    found = plain_number(timeout_s)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < 1e9:
        raise ArgumentError(f"{name} is {show(timeout_s)}; expected a number of seconds above 0")
    return float(found)


def absolute_path(verb: str, path: Any, what: str = "folder") -> str:
    """Return the path of a folder or a file as an absolute one, which a later change of directory does not move.

    Raises:
        ArgumentError: not a path.

    >>> absolute_path("save", "/runs/../runs/first")
    '/runs/../runs/first'
    """
    given = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(given, str) or not given or "\0" in given:
        raise ArgumentError(f"{verb}: path is {show(path)}; expected the path of a {what}, a str or a pathlib.Path")
    try:
        # Not os.path.abspath, which takes "link/.." for nothing where the system follows the link.
        return str(Path(given).absolute())
    except OSError as error:
        raise ArgumentError(
            f"{verb}: path is {show(path)}, and the working directory that it starts from is gone ({error}); "
            "give an absolute path"
        ) from error
