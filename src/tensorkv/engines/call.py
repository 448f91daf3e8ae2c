"""Call: what a caller asked of a push, pull or pushpull; it is parsed when an engine needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import add
from typing import Any

import torch

from tensorkv.arrays import interop
from tensorkv.arrays.arguments import Key, keys_of, pairs
from tensorkv.arrays.outputs import GivenOuts, NewOuts
from tensorkv.arrays.rows import is_rows, take_rows
from tensorkv.arrays.spec import KeySpec
from tensorkv.errors import ArgumentError, SparseOutWarning, TensorKVError, quote, show
from tensorkv.runtime.modes import outside_modes
from tensorkv.shard.entry import Batch, Part


class Call:
    """One push, pull or pushpull, as the caller wrote it.

    Args:
        verb: ``"push"``, ``"pull"`` or ``"pushpull"``.
        key, value, out: the caller's arguments, in any form that the verbs of ``KVStore`` take.
        priority: of this call; higher goes first where an engine queues pushes.
        like: for a pull without ``out``, an array of the library and device to return.
        ignore_sparse: for a pull, leave sparse outs alone.
    """

    __slots__ = ("_batch", "_outs", "ignore_sparse", "key", "like", "moved", "out", "priority", "value", "verb")

    def __init__(
        self,
        verb: str,
        key: Any,
        value: Any,
        out: Any,
        priority: Any,
        like: Any = None,
        ignore_sparse: bool = False,
    ) -> None:
        self.verb, self.key, self.value, self.out, self.priority = verb, key, value, out, priority
        self.like, self.ignore_sparse = like, ignore_sparse
        self._batch: Batch | None = None
        self._outs: NewOuts | GivenOuts | None = None
        self.moved: int | Sequence[int] | None = None
        """Bytes moved for the key, or for each of the keys, of a call that an engine did without parsing it."""

    @property
    def batch(self) -> Batch:
        """The keys without repeats, and for each key its parts as tensors or Rows that share the caller's memory.

        Raises:
            KeyTypeError, ArrayTypeError, ArgumentError: what ``key``, ``value`` or ``priority`` are does not fit.
        """
        if self._batch is None:
            check_priority(self.verb, self.priority)
            keys, groups = pairs(self.verb, "value", self.key, self.value)
            parts = [
                [take(self.verb, each, index, array) for index, array in enumerate(group)]
                for each, group in zip(keys, groups, strict=True)
            ]
            self._batch = Batch(self.verb, keys, parts)
        return self._batch

    def listed(self, spec: Callable[[str, Key], KeySpec]) -> tuple[Any, Any, Any] | None:
        """Return keys, values and outs as lists where the caller wrote mappings, with new outs if none were given.

        Args:
            spec: returns what an array for a key must be like.

        Returns:
            None where the arguments do not fit together, which ``check`` and ``fill`` say in words.
        """
        keys, values, outs = self.key, self.value, self.out
        if type(keys) is dict:
            keys = list(keys)
            if self.verb == "pull" and outs is None:
                outs = list(self.key.values())
            elif self.verb != "pull" and values is None:
                values = list(self.key.values())
            else:
                return None
            if type(outs) is dict:
                outs = [outs.get(key) for key in keys] if len(outs) == len(keys) else None
        if type(self.priority) is not int or (values is None and self.verb != "pull"):
            return None
        if self.verb == "push":
            return keys, values, None
        if outs is None:
            outs = self._new_outs(keys, spec)
        return None if outs is None or (self.like is not None and self._outs is None) else (keys, values, outs)

    def _new_outs(self, keys: Any, spec: Callable[[str, Key], KeySpec]) -> list[Any] | None:
        """Make new outs, in the form of the keys; None if a key is repeated, or cannot be pulled."""
        try:
            with outside_modes():
                self._outs = made = self._make_outs(spec)
        except TensorKVError:
            return None
        if type(keys) is list:
            return made.arrays if len(made.keys) == len(keys) else None
        return made.arrays[0] if made.keys == [keys] else None

    def _make_outs(self, spec: Callable[[str, Key], KeySpec]) -> NewOuts:
        keys = keys_of(self.verb, list(self.key) if isinstance(self.key, Mapping) else self.key)
        return NewOuts(self.verb, keys, [spec(self.verb, key) for key in keys], self.like)

    def check(self) -> None:
        """Raise what ``batch`` raises, and what the outs raise that can be told without the keys' values."""
        if self.verb == "pull":
            check_priority(self.verb, self.priority)
        else:
            _ = self.batch
        if self.out is None and not (self.verb == "pull" and isinstance(self.key, Mapping)):
            return
        if self.like is not None:
            raise ArgumentError(f"{self.verb}: got out= and like=; like= chooses what a pull without out returns")
        keys = list(self.key) if isinstance(self.key, Mapping) and self.verb != "pull" else self.key
        self._outs = GivenOuts(self.verb, keys, self.out, skip_sparse=self.ignore_sparse)

    def fill(
        self, spec: Callable[[str, Key], KeySpec], copy: Callable[[list[Key], list[list[torch.Tensor]]], None]
    ) -> None:
        """Have an engine fill the outs of a checked call.

        Args:
            spec: returns what an array for a key must be like.
            copy: writes the keys' values into tensors.

        Raises:
            KeyNotFoundError, ValueMismatchError: a key that is not there, or an out that does not fit.
        """
        outs = self._outs
        if outs is None:
            outs = self._make_outs(spec)
        else:
            outs.check([spec(self.verb, key) for key in outs.keys])
        copy(outs.keys, outs.tensors)
        outs.finish()
        self._outs = outs

    def result(self) -> Any:
        """Return what the verb returns: new arrays in the form of ``key``; None if outs were given."""
        return None if self._outs is None else self._outs.result(self.key)

    def counts(self) -> tuple[list[Key], list[int]]:
        """Return keys, and for each of them the bytes that the call has moved."""
        if self.moved is not None:
            return ([self.key], [self.moved]) if isinstance(self.moved, int) else (self.key, list(self.moved))
        pulled = [] if self._outs is None else list(map(nbytes, self._outs.tensors))
        if self._batch is None:
            return [] if self._outs is None else self._outs.keys, pulled
        pushed = list(map(nbytes, self._batch.parts))
        # The outs of a pushpull have the keys of its batch, in the same order.
        return self._batch.keys, list(map(add, pushed, pulled)) if pulled else pushed

    @property
    def skipped(self) -> SparseOutWarning | None:
        """The warning that an out was left alone."""
        return self._outs.skipped if isinstance(self._outs, GivenOuts) else None


def check_priority(verb: str, priority: Any) -> None:
    """Raise ArgumentError if the priority of a call is not an int."""
    if type(priority) is not int:
        raise ArgumentError(f"{verb}: priority is {show(priority)}; expected an int")


def take(verb: str, key: Key, index: int | None, array: Any) -> Part:
    """Return an array of any library as a tensor that shares its memory, or Rows of such.

    Args:
        verb, key: for messages.
        index: which part of the key it is; None for a value.
        array: the caller's.

    Raises:
        ArrayTypeError, ValueMismatchError: not an array that a store can take.
    """
    try:
        return take_rows(array) if is_rows(array) else interop.take(array)
    except TensorKVError as error:
        part = "the value" if index is None else f"part {index}"
        raise type(error)(f"{verb}({quote(key)}): {part} {error}") from None


def nbytes(parts: Sequence[Part]) -> int:
    """Return the bytes of some parts together."""
    return parts[0].nbytes if len(parts) == 1 else sum([part.nbytes for part in parts])
