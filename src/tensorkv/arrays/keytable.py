"""KeyTable: what is held by key, and the errors of keys that a store has not, has already, or cannot have."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TypeVar

from tensorkv.errors import KeyExistsError, KeyNotFoundError, KeyTypeError, quote, suggestion

from .arguments import Key

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
        tensorkv.errors.KeyNotFoundError: pull("weigth"): no such key (did you mean "weight"?); the store has "weight", "bias"; call init first
        >>> KeyTable.fromkeys(range(100), 0).find("pull", 777)
        Traceback (most recent call last):
            ...
        tensorkv.errors.KeyNotFoundError: pull(777): no such key (did you mean 77?); the store has 100 keys: 0, 1, 2, 3, ...; call init first
        """  # noqa: E501
        found = self.get(key)
        if found is not None:
            return found
        self._check_type(verb, key)
        named = ", ".join(map(quote, islice(self, _NAMED_KEYS))) or "no keys"
        if len(self) > _NAMED_KEYS:
            named = f"{len(self)} keys: {named}, ..."
        raise KeyNotFoundError(
            f"{verb}({quote(key)}): no such key{suggestion(key, self)}; the store has {named}; call init first"
        )

    def check_new(self, keys: Iterable[Key]) -> None:
        """Raise if one of some keys cannot be added.

        Raises:
            KeyExistsError, KeyTypeError: it is there, or the other keys are of another type.

        >>> KeyTable({"w": 1}).check_new(["v", "w"])
        Traceback (most recent call last):
            ...
        tensorkv.errors.KeyExistsError: init("w"): the key exists; push to it, or delete it first
        """
        for key in keys:
            self._check_type("init", key)
            if key in self:
                raise KeyExistsError(f"init({quote(key)}): the key exists; push to it, or delete it first")

    def _check_type(self, verb: str, key: Key) -> None:
        present = type(next(iter(self), key))
        if present is not type(key):
            raise KeyTypeError(
                f"{verb}({quote(key)}): this store's keys are {present.__name__}, got {type(key).__name__}; the keys "
                "of a store are all of one type"
            )
