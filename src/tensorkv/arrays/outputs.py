"""What a pull fills: arrays that the caller gave, or new ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import numpy as np
import torch

from tensorkv.errors import ArgumentError, ArrayTypeError, SparseOutWarning, ValueMismatchError, quote
from tensorkv.runtime import _compat

from . import arguments, interop
from .arguments import Key, is_key
from .regions import Region
from .rows import Rows
from .slices import TensorSlice, local_part
from .spec import KeySpec

CopyValues = Callable[[list[Key], list[list[torch.Tensor]]], Any]
"""Writes the values of keys into tensors."""
CopyParts = Callable[[list[Key], list[Region], list[list[torch.Tensor]]], Any]
"""Writes a part of the value of each key, which may come repeatedly, into tensors."""
Together = Callable[[], AbstractContextManager[Any]]
"""Makes a block in which values and parts of values are read as they are at one moment."""


class GivenOuts:
    """The caller's arrays, as tensors to be written.

    Args:
        verb: for messages.
        key, out: in any form of ``arguments.pairs``.
        skip_sparse: leave sparse outs alone instead of raising.

    Raises:
        ArrayTypeError: an out that cannot be written.
        ArgumentError: two outs overlap in memory, or forms that do not fit.
    """

    def __init__(self, verb: str, key: Any, out: Any, *, skip_sparse: bool = False) -> None:
        self._verb = verb
        self._finishes: list[interop.Finish] = []
        self._seen_by_autograd: list[torch.Tensor] = []
        self.skipped: SparseOutWarning | None = None
        self.keys, groups = arguments.pairs(verb, "out", key, out)
        self.tensors: list[list[torch.Tensor]] = []
        self._slices: list[list[TensorSlice | None]] = []
        written: list[Any] = []
        for each, group in zip(self.keys, groups, strict=True):
            tensors, slices = [], []
            for index, given in enumerate(group):
                if skip_sparse and self._skips(each, given):
                    continue
                try:
                    array, own = local_part(given)
                    tensor, finish = interop.target(array)
                except ArrayTypeError as error:
                    raise ArrayTypeError(f"{verb}({quote(each)}): out {index} {error}") from None
                tensors.append(tensor)
                slices.append(own)
                if isinstance(array, torch.Tensor):
                    self._seen_by_autograd.append(array)
                    # A DTensor counts versions of its own beside those of its local shard.
                    if isinstance(given, torch.Tensor) and given is not array:
                        self._seen_by_autograd.append(given)
                if finish is not None:
                    self._finishes.append(finish)
                # Of an array that torch cannot view, a copy is filled first.
                written.append(array if finish is not None and isinstance(array, np.ndarray) else tensor)
            self.tensors.append(tensors)
            self._slices.append(slices)
        if len(written) > 1:
            self._check_apart(written)

    def check(self, specs: Sequence[KeySpec]) -> None:
        """Raise ValueMismatchError if an out differs in shape from its key, or cannot hold its dtype."""
        for key, spec, tensors, slices in zip(self.keys, specs, self.tensors, self._slices, strict=True):
            if tensors:
                check_dense(self._verb, key, spec)
            for index, (tensor, own) in enumerate(zip(tensors, slices, strict=True)):
                if own is not None and own.global_shape != tuple(spec.shape):
                    raise ValueMismatchError(
                        f"{self._verb}({quote(key)}): out {index} is a part of a value of shape {own.global_shape}, "
                        f"expected {tuple(spec.shape)}"
                    )
                if own is None and tensor.shape != spec.shape:
                    raise ValueMismatchError(
                        f"{self._verb}({quote(key)}): out {index} has shape {tuple(tensor.shape)}, "
                        f"expected {tuple(spec.shape)}"
                    )
                if tensor.dtype is not spec.dtype and not interop.may_pull(spec.dtype, tensor.dtype):
                    kind = "dtype" if spec.dtype in interop.FLOAT8 else "kind of number"
                    raise ValueMismatchError(
                        f"{self._verb}({quote(key)}): out {index} is {interop.dtype_name(tensor.dtype)}, which cannot "
                        f"hold the key's {interop.dtype_name(spec.dtype)}; give an out of the same {kind}"
                    )

    def fill(self, copy: CopyValues, copy_parts: CopyParts, together: Together = nullcontext) -> None:
        """Have values, and parts of values, written, in a block in which both are the same values."""
        whole: list[list[torch.Tensor]] = [[] for _ in self.keys]
        parts: list[tuple[Key, Region, list[torch.Tensor]]] = []
        for key, tensors, slices, own in zip(self.keys, self.tensors, self._slices, whole, strict=True):
            for tensor, part in zip(tensors, slices, strict=True):
                if part is None:
                    own.append(tensor)
                else:
                    parts.append((key, part.region, [tensor]))
        # An engine may read parts after whole values; if that fails, no out must have been written.
        filled = [[torch.empty_like(out) for out in own] for own in whole] if parts else whole
        with together() if parts else nullcontext():
            copy(self.keys, filled)
            if parts:
                copy_parts(*map(list, zip(*parts, strict=True)))
        if parts:
            for out, value in zip(chain.from_iterable(whole), chain.from_iterable(filled), strict=True):
                out.copy_(value)
        self.finish()

    def finish(self) -> None:
        """Fill the arrays that torch could not write itself."""
        if self._seen_by_autograd:
            # It then notices a tensor that was saved for a backward pass and is another by now.
            _compat.increment_version(self._seen_by_autograd)
        for finish in self._finishes:
            finish()

    def result(self, key: Any) -> None:
        """Return what the verb returns when it was given outs."""

    def _check_apart(self, written: list[Any]) -> None:
        pair = interop.overlapping(written)
        if pair is not None:
            keys = [key for key, tensors in zip(self.keys, self.tensors, strict=True) for _ in tensors]
            first, second = (f"an out of {quote(keys[index])}" for index in sorted(pair))
            raise ArgumentError(f"{self._verb}: {first} and {second} overlap in memory; give separate arrays")

    def _skips(self, key: Key, array: Any) -> bool:
        sparse = isinstance(array, Rows) or interop.is_sparse_tensor(array)
        if sparse:
            self.skipped = SparseOutWarning(
                f"{self._verb}({quote(key)}): a sparse out was left as it is; use row_sparse_pull for rows"
            )
        return sparse


class NewOuts:
    """New arrays, of the library, dtype and device that each key was initialised with.

    Args:
        verb: for messages.
        keys: as the caller listed them; each place gets an array of its own.
        specs: of those keys.

    Raises:
        ArrayTypeError: the library of a key cannot have its array, and the call is to change nothing.
        ValueMismatchError: a key holds a sparse table.
    """

    def __init__(self, verb: str, keys: Sequence[Key], specs: Sequence[KeySpec]) -> None:
        self._made: list[tuple[Any, KeySpec]] = []
        grouped: dict[Key, list[torch.Tensor]] = {}
        for key, spec in zip(keys, specs, strict=True):
            check_dense(verb, key, spec)
            try:
                array = interop.empty(spec.shape, spec.dtype, spec.origin)
            except ArrayTypeError as error:
                raise ArrayTypeError(f"{verb}({quote(key)}): the value {error}") from None
            self._made.append((array, spec))
            grouped.setdefault(key, []).append(interop.take(array))
        self.keys, self.tensors = list(grouped), list(grouped.values())

    def check(self, specs: Sequence[KeySpec]) -> None:
        """Do nothing: they are what their keys ask for."""

    def fill(self, copy: CopyValues, copy_parts: CopyParts, together: Together = nullcontext) -> None:
        """Have values written."""
        copy(self.keys, self.tensors)

    def result(self, key: Any) -> Any:
        """Return the arrays in the form of the caller's ``key``: one, a list, or a dict."""
        given = interop.give_each([array for array, _ in self._made], [spec.origin for _, spec in self._made])
        if is_key(key):
            return given[0]
        return dict(zip(key, given, strict=True)) if isinstance(key, Mapping) else given


def like_origin(verb: str, like: Any) -> interop.Origin:
    """Return the library and device of the array that new ones are to be like.

    Raises:
        ArrayTypeError: it is not an array, or has no numbers.
    """
    try:
        return _origin(like)
    except ArrayTypeError as error:
        raise ArrayTypeError(f"{verb}: like {error}; give an array of the library and device to return") from None


def _origin(like: Any) -> interop.Origin:
    if isinstance(like, torch.Tensor) and like.is_meta:
        raise ArrayTypeError("is a meta tensor, which has no numbers")
    return interop.origin(like)


def describe_like(verb: str, key: Key, like: Any) -> tuple[tuple[int, ...], torch.dtype, interop.Origin]:
    """Return the shape, dtype, library and device of the array that a key's new one is to be like.

    Raises:
        ArrayTypeError: as ``like_origin``, or a dtype that no store holds, or that its library does not have.
    """
    try:
        origin = _origin(like)
        shape, dtype = interop.shape_and_dtype(like)
        interop.check_give(shape, dtype, origin)
        return shape, dtype, origin
    except ArrayTypeError as error:
        raise ArrayTypeError(f"{verb}({quote(key)}): like {error}; give an array like the one to return") from None


def check_dense(verb: str, key: Key, spec: KeySpec) -> None:
    """Raise ValueMismatchError if a key holds a sparse table, which has no dense copy."""
    if spec.is_table:
        raise ValueMismatchError(
            f"{verb}({quote(key)}): the key holds rows of a sparse table; use row_sparse_pull(key, row_ids=...)"
        )
