"""KeyTable: what is held by key, and the errors of keys that a store has not, has already, or cannot have.

``select`` returns the keys that a caller has chosen by name, pattern or function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache, partial
from inspect import isroutine
from typing import Any, TypeVar

from tensorkv.errors import KeyExistsError, KeyNotFoundError, KeyTypeError, quote, suggestion

from .arguments import Key, check_key, check_one_type, is_key, key_list

V = TypeVar("V")

# How many keys a message names.
_NAMED_KEYS = 4


class KeyTable(dict[Key, V]):
    """What is held by key, in the order of init. All keys are str, or all are int; an empty table takes either."""

    def find(self, verb: str, key: Key) -> V:
        """Return what is held of a key.

        Args:
            verb: with which messages begin.
            key: as ``check_key`` returns it.

        Raises:
            KeyNotFoundError: nothing; the message names the nearest key.
            KeyTypeError: nothing, and the other keys are of another type.

        >>> KeyTable({"weight": 1, "bias": 2}).find("pull", "weigth")
        Traceback (most recent call last):
            ...
        tensorkv.errors.KeyNotFoundError: pull("weigth"): no such key (did you mean "weight"?); the store has "weight", "bias"
        >>> KeyTable.fromkeys(range(100), 0).find("pull", 777)
        Traceback (most recent call last):
            ...
        tensorkv.errors.KeyNotFoundError: pull(777): no such key (did you mean 77?); the store has 100 keys: 0, 1, 2, 3, ...
        """  # noqa: E501
        found = self.get(key)
        if found is not None:
            return found
        # Another thread may add keys meanwhile.
        present = list(self)
        _check_type(verb, key, present[0] if present else None)
        near = suggestion(key, present)
        raise KeyNotFoundError(
            f"{verb}({quote(key)}): no such key{near}; the store has {_named(present)}"
            f"{'' if near else '; call init first'}"
        )

    def check_type(self, verb: str, keys: Iterable[Key]) -> None:
        """Raise KeyTypeError if one of some keys is of another type than those that are here."""
        # Once: a dict from whose front many keys were deleted takes long to find its first one.
        present = next(iter(self), None)
        for key in keys:
            _check_type(verb, key, present)

    def check_new(self, keys: Sequence[Key]) -> None:
        """Raise if one of some keys cannot be added.

        Raises:
            KeyExistsError, KeyTypeError: it is there, or the other keys are of another type.

        >>> KeyTable({"w": 1}).check_new(["v", "w"])
        Traceback (most recent call last):
            ...
        tensorkv.errors.KeyExistsError: init("w"): the key exists; push to it, or delete it first
        """
        self.check_type("init", keys)
        for key in keys:
            if key in self:
                raise KeyExistsError(f"init({quote(key)}): the key exists; push to it, or delete it first")


def _check_type(verb: str, key: Key, present: Key | None) -> None:
    if present is not None and type(present) is not type(key):
        raise KeyTypeError(
            f"{verb}({quote(key)}): this store's keys are {type(present).__name__}, got {type(key).__name__}; the keys "
            "of a store are all of one type"
        )


def select(verb: str, wanted: Any, keys: Callable[[], Sequence[Key]]) -> list[Key]:
    """Return the keys that a caller has chosen, each once.

    Args:
        verb: with which messages begin.
        wanted: a key, a pattern of ``fnmatch.fnmatchcase`` for str keys, such as ``"*.bias"``, a function that is
            called with each key and returns whether it is chosen, or a list of these. A str that is an existing key
            is that key, whatever signs it has.
        keys: returns the existing keys; called for patterns and functions only.

    Returns:
        Keys in the order of ``wanted``, those of a pattern or function in the order of ``keys()``. A key that is
        given by name is not looked up: it may be one that does not exist.

    Raises:
        KeyNotFoundError: a pattern or function chooses nothing.
        KeyTypeError: an invalid key.

    >>> select("verb", ["head", "*.bias"], lambda: ["0.weight", "0.bias", "1.bias"])
    ['head', '0.bias', '1.bias']
    >>> select("verb", "*.bais", lambda: ["0.weight", "0.bias", "1.bias"])
    Traceback (most recent call last):
        ...
    tensorkv.errors.KeyNotFoundError: verb("*.bais"): the pattern matches no key; similar keys are "1.bias", "0.bias"
    """
    known = cache(lambda: dict.fromkeys(keys()))
    chosen: dict[Key, None] = {}
    for each in [wanted] if is_key(wanted) or _is_function(wanted) else key_list(verb, wanted):
        if _is_function(each):
            found = [key for key in known() if each(key)]
            if not found:
                raise KeyNotFoundError(
                    f"{verb}: the function {quote(getattr(each, '__name__', 'given'))} returns true for no key; "
                    f"the keys are {_named(list(known()))}"
                )
        else:
            key = check_key(verb, each)
            found = [key]
            if isinstance(key, str) and not _SIGNS.isdisjoint(key) and key not in known():
                found = [other for other in known() if isinstance(other, str) and fnmatchcase(other, key)]
                if not found:
                    raise _no_match(verb, key, list(known()))
        chosen.update(dict.fromkeys(found))
    check_one_type(verb, chosen)
    return list(chosen)


# What makes a str a pattern.
_SIGNS = frozenset("*?[")


def _is_function(thing: Any) -> bool:
    return isroutine(thing) or isinstance(thing, partial)


def _no_match(verb: str, pattern: str, keys: Sequence[Key]) -> KeyNotFoundError:
    near = get_close_matches(pattern, map(str, keys), n=_NAMED_KEYS)
    hint = f"similar keys are {', '.join(map(quote, near))}" if near else f"the keys are {_named(keys)}"
    return KeyNotFoundError(f"{verb}({quote(pattern)}): the pattern matches no key; {hint}")


def _named(keys: Sequence[Key]) -> str:
    named = ", ".join(map(quote, keys[:_NAMED_KEYS])) or "no keys"
    return f"{len(keys)} keys: {named}, ..." if len(keys) > _NAMED_KEYS else named
