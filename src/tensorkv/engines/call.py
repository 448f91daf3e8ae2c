"""Call: what a caller asked of a push, pull or pushpull; it is parsed when an engine needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import add
from typing import Any

from tensorkv.arrays import interop
from tensorkv.arrays.arguments import Key, keys_of, pairs, plain_number
from tensorkv.arrays.outputs import CopyParts, CopyValues, GivenOuts, NewOuts, Together, like_origin
from tensorkv.arrays.rows import is_rows, take_rows
from tensorkv.arrays.slices import Slices, join_slices, take_slice
from tensorkv.arrays.spec import KeySpec
from tensorkv.errors import (
    ArgumentError,
    ArrayTypeError,
    SparseOutWarning,
    TensorKVError,
    quote,
    show,
)
from tensorkv.shard import native
from tensorkv.shard.entry import Batch, Part


class Call(native.Call):
    """One push, pull or pushpull, as the caller wrote it.

    Args:
        record: in which ``end`` counts the call.
        verb: ``"push"``, ``"pull"``, ``"pushpull"`` or ``"pull_ema"``.
        key, value, out: the caller's arguments, in any form that the verbs of ``KVStore`` take.
        priority: of this call; higher goes first where an engine queues pushes.
        like: for a pull without ``out``, an array of the library and device to return.
        ignore_sparse: for a pull, leave sparse outs alone.
    """

    # What is parsed of the arguments, when that is first asked for.
    _batch: Batch | None = None
    _outs: NewOuts | GivenOuts | None = None
    _like_origin: interop.Origin | None = None
    skipped: SparseOutWarning | None = None
    """The warning that an out was left alone."""

    def view_jax(self) -> bool:
        """Have a call that was not plain looked at again with NumPy's views of JAX's arrays; False if it has none."""
        viewed = interop.jax_views(self.values)
        if viewed is self.values:
            return False
        self.values = viewed
        return True

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
            for each, group in zip(keys, parts, strict=True):
                if len(group) > 1 and any(isinstance(part, Slices) for part in group):
                    group[:] = [join_slices(f"{self.verb}({quote(each)})", group)]
            self._batch = Batch(self.verb, keys, parts)
        return self._batch

    def check(self) -> None:
        """Raise what ``batch`` raises, and what the outs raise that can be told without the keys' values."""
        reads_only = self.verb in ("pull", "pull_ema")
        if reads_only:
            check_priority(self.verb, self.priority)
        else:
            _ = self.batch
        if self.out is None and not (reads_only and isinstance(self.key, Mapping)):
            return
        if self.like is not None:
            raise ArgumentError(f"{self.verb}: got out= and like=; like= chooses what a pull without out returns")
        keys = list(self.key) if isinstance(self.key, Mapping) and not reads_only else self.key
        self._outs = outs = GivenOuts(self.verb, keys, self.out, skip_sparse=self.ignore_sparse)
        self.skipped = outs.skipped

    def fill(
        self,
        spec: Callable[[str, Key], KeySpec],
        copy: CopyValues,
        copy_parts: CopyParts,
        together: Together,
    ) -> None:
        """Have an engine fill the outs of a checked call.

        Args:
            spec: returns what an array for a key must be like.
            copy, copy_parts: write values, and parts of values.
            together: a block in which both see the same values.

        Raises:
            KeyNotFoundError, ValueMismatchError: a key that is not there, or an out that does not fit.
        """
        outs = self._outs
        if outs is None:
            keys = keys_of(self.verb, list(self.key) if isinstance(self.key, Mapping) else self.key)
            outs = NewOuts(self.verb, keys, [self.like_spec(spec(self.verb, key)) for key in keys])
        else:
            outs.check([spec(self.verb, key) for key in outs.keys])
        outs.fill(copy, copy_parts, together)
        self._outs = outs

    def like_spec(self, spec: KeySpec) -> KeySpec:
        """Return what a new array for a key must be like, whose library and device ``like`` may choose."""
        if self.like is None:
            return spec
        if self._like_origin is None:
            self._like_origin = like_origin(self.verb, self.like)
        return spec if spec.origin == self._like_origin else spec.of(self._like_origin)

    def give(self, outs: Any, specs: dict[int, KeySpec]) -> Any:
        """Return filled new outs as arrays of their keys' libraries.

        Args:
            outs: one, or a list.
            specs: of the keys whose arrays torch has made, by place.
        """
        listed = outs if isinstance(outs, list) else [outs]
        given = interop.give_each([listed[place] for place in specs], [spec.origin for spec in specs.values()])
        for place, array in zip(specs, given, strict=True):
            listed[place] = array
        return outs if isinstance(outs, list) else listed[0]

    def outcome(self) -> tuple[list[Key], list[int], Any]:
        """Return the keys of a parsed call, for each of them the bytes that it has moved, and what the verb returns."""
        outs = self._outs
        result = None if outs is None else outs.result(self.key)
        pulled = [] if outs is None else list(map(nbytes, outs.tensors))
        if self._batch is None:
            return [] if outs is None else outs.keys, pulled, result
        pushed = list(map(nbytes, self._batch.parts))
        # The outs of a pushpull have the keys of its batch, in the same order.
        return self._batch.keys, list(map(add, pushed, pulled)) if pulled else pushed, result


def check_priority(verb: str, priority: Any) -> int:
    """Return the priority of a call as an int, or raise ArgumentError."""
    found = plain_number(priority)
    if type(found) is not int:
        raise ArgumentError(f"{verb}: priority is {show(priority)}; expected an int")
    return found


def take(verb: str, key: Key, index: int | None, array: Any) -> Any:
    """Return an array of any library as a tensor that shares its memory, or Rows or Slices of such.

    Args:
        verb, key: for messages.
        index: which part of the key it is; None for a value.
        array: the caller's.

    Raises:
        ArrayTypeError, ValueMismatchError: not an array that a store can take.
    """
    try:
        is_dense = interop.is_dense(array)
        found = None if is_dense else take_slice(array)
        if found is not None:
            if index is None:
                raise ArrayTypeError("is a slice of a value; give all of it, or have push_tree create the key")
            return found
        if is_dense or not is_rows(array):
            return interop.clean(interop.take(array))
        rows = take_rows(array)
        if index is not None and rows.init is not None:
            raise ArgumentError("has init=, which says how the rows of a new table start; give it to init")
        return rows
    except TensorKVError as error:
        part = "the value" if index is None else f"part {index}"
        raise type(error)(f"{verb}({quote(key)}): {part} {error}") from None


def nbytes(parts: Sequence[Part]) -> int:
    """Return the bytes of some parts together."""
    return parts[0].nbytes if len(parts) == 1 else sum([part.nbytes for part in parts])
