"""Packing: tensors as one run of bytes (the payload) and a JSON description of where each lies in it (the layout).

A write-ahead log and the messages between clients and servers hold tensors in this form. docs/wal-format.md has it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tensorkv.compiled import _layouts
from tensorkv.errors import show
from tensorkv.runtime.recent import Recent

from . import interop
from .arguments import Key

_DTYPES = {interop.dtype_name(dtype): dtype for dtype in interop.DTYPES}
COMPACT = json.JSONEncoder(separators=(",", ":"))
"""Writes JSON without spaces; ``json.dumps`` would make an encoder for each call."""
_MAX_NBYTES = 1 << 62


class LayoutError(ValueError):
    """A layout is malformed, or does not match its payload."""


class Item(NamedTuple):
    """A tensor with the key that it belongs to and the role that it has there, such as ``"sum"`` or ``"ids"``."""

    key: Key
    role: str
    tensor: torch.Tensor


class Slot(NamedTuple):
    """Where one tensor lies in a payload, in bytes from its beginning."""

    key: Key
    role: str
    dtype: torch.dtype
    shape: torch.Size
    start: int
    stop: int


class Packed(NamedTuple):
    """Tensors as bytes.

    Args:
        layout: JSON that ``decode_layout`` reads.
        payload: the bytes of the tensors, in one or more buffers.
    """

    layout: bytes
    payload: Sequence[Any]


def pack(items: Sequence[Item]) -> Packed:
    """Pack tensors, sharing their memory where they are contiguous on the CPU.

    >>> packed = pack([Item("w", "sum", torch.ones(3)), Item("n", "sum", torch.tensor(7))])
    >>> packed.layout
    b'[["w","sum","float32",[3]],["n","sum","int64",[]]]'
    >>> [len(buffer) for buffer in packed.payload]
    [12, 4, 8]
    """
    buffers: list[Any] = []
    run = _Run()
    at = 0
    for _, _, tensor in items:
        gap = -at % tensor.dtype.itemsize
        if gap:
            buffers += run.end()
            buffers.append(bytes(gap))
        if tensor.numel() and not run.takes(tensor):
            buffers += run.end()
            run.begin(tensor)
        at += gap + tensor.nbytes
    layout = encode_layout([(key, role, tensor.dtype, tensor.shape) for key, role, tensor in items])
    return Packed(layout, buffers + run.end())


class _Run:
    """Adjacent tensors of one storage, packed as one buffer: each small buffer would cost as much as a large one."""

    def __init__(self) -> None:
        self._first: torch.Tensor | None = None
        self._next = self._nbytes = 0

    def begin(self, tensor: torch.Tensor) -> None:
        self._first, self._nbytes = tensor, tensor.nbytes
        self._next = tensor.data_ptr() + tensor.nbytes if tensor.is_cpu and tensor.is_contiguous() else -1

    def takes(self, tensor: torch.Tensor) -> bool:
        if self._first is None or tensor.data_ptr() != self._next or not tensor.is_contiguous():
            return False
        if tensor.untyped_storage().data_ptr() != self._first.untyped_storage().data_ptr():
            return False
        self._next += tensor.nbytes
        self._nbytes += tensor.nbytes
        return True

    def end(self) -> list[Any]:
        first, self._first = self._first, None
        if first is None:
            return []
        if self._nbytes == first.nbytes:
            return [raw_bytes(first)]
        at = first.storage_offset() * first.dtype.itemsize
        flat = torch.empty(0, dtype=torch.uint8, device="cpu").set_(first.untyped_storage(), at, (self._nbytes,))  # type: ignore[call-overload]
        return [flat.numpy().data]


def unpack(layout: bytes, payload: Any) -> list[Item]:
    """Return the tensors in a payload.

    Args:
        layout: as ``pack`` makes it.
        payload: a contiguous buffer of bytes, whose memory the tensors share.

    Raises:
        LayoutError: malformed, or the payload has another length.
    """
    flat = bytes_of(payload)
    slots, expected = decode_layout(layout), layout_nbytes(layout)
    if expected != len(flat):
        raise LayoutError(f"the payload has {len(flat)} bytes, its layout says {expected}")
    for slot in slots:
        if slot.dtype is torch.bool and bool((flat[slot.start : slot.stop] > 1).any()):
            raise LayoutError(f"the bool tensor {slot.key!r} has bytes other than 0 and 1")
    return [Item(slot.key, slot.role, tensor) for slot, tensor in zip(slots, views(flat, slots), strict=True)]


def layout_nbytes(layout: bytes) -> int:
    """Return how many bytes the payload of a layout has; raise as ``decode_layout``."""
    slots = decode_layout(layout)
    return slots[-1].stop if slots else 0


def bytes_of(buffer: Any) -> torch.Tensor:
    """Return a buffer as a flat tensor that shares its memory."""
    if not len(buffer):
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    # A writable view, though it is not written: torch warns about read-only ones.
    return interop.take(np.frombuffer(buffer, np.uint8))


def views(flat: torch.Tensor, slots: Sequence[Slot]) -> list[torch.Tensor]:
    """Return the tensor of each slot.

    Args:
        flat: the bytes of all of them, whose memory they share.
        slots: as ``decode_layout`` returns them.
    """
    dtypes = {slot.dtype for slot in slots}
    if len(dtypes) != 1 or len(slots) == 1:
        return [flat[slot.start : slot.stop].view(slot.dtype).view(slot.shape) for slot in slots]
    # Tensors of one dtype lie side by side.
    return cut(flat, dtypes.pop(), [slot.shape for slot in slots])


def cut(flat: torch.Tensor, dtype: torch.dtype, shapes: Sequence[torch.Size]) -> list[torch.Tensor]:
    """Return the tensors that lie side by side in bytes, whose memory they share; one call cuts thousands.

    >>> cut(torch.zeros(24, dtype=torch.uint8), torch.float32, [torch.Size([2, 2]), torch.Size([2])])[1]
    tensor([0., 0.])
    """
    pieces = torch.split(flat.view(dtype), [shape.numel() for shape in shapes])
    return [piece if len(shape) == 1 else piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def encode_layout(tensors: Iterable[tuple[Key, str, torch.dtype, Sequence[int]]]) -> bytes:
    """Return the layout of tensors, given the key, role, dtype and shape of each.

    They follow one another, each at the next multiple of its element's size.

    >>> encode_layout([("w", "sum", torch.float32, [3]), ("n", "sum", torch.int64, [])])
    b'[["w","sum","float32",[3]],["n","sum","int64",[]]]'
    """
    kinds: dict[tuple[str, torch.dtype, tuple[int, ...]], int] = {}
    keys, numbers = [], []
    for key, role, dtype, shape in tensors:
        keys.append(key)
        numbers.append(kinds.setdefault((role, dtype, tuple(shape)), len(kinds)))
    return join_layout(keys, list(kinds), numbers)


def join_layout(
    keys: Sequence[Key], kinds: Sequence[tuple[str, torch.dtype, Sequence[int]]], numbers: list[int]
) -> bytes:
    """Return what ``encode_layout`` does, for many tensors of a few kinds.

    Args:
        keys: of each tensor.
        kinds: role, dtype and shape.
        numbers: of each tensor's kind.

    >>> join_layout(["w", "b", "c"], [("sum", torch.int8, [3]), ("sum", torch.float32, [])], [1, 0, 0])
    b'[["w","sum","float32",[]],["b","sum","int8",[3]],["c","sum","int8",[3]]]'
    """
    ends = _ends_of(kinds)
    if _layouts is not None:
        joined: bytes = _layouts.join(keys, [end.encode() for end in ends], numbers, json.dumps)
        return joined
    return join_slots(_slots(keys, ends, numbers))


def join_slots(slots: Iterable[str]) -> bytes:
    """Return the layout of tensors, given what it says of each.

    >>> join_slots(['["w","sum","float32",[3]]'])
    b'[["w","sum","float32",[3]]]'
    """
    return f"[{','.join(slots)}]".encode()


def encode_slots(
    keys: Sequence[Key], kinds: Sequence[tuple[str, torch.dtype, Sequence[int]]], numbers: Sequence[int]
) -> list[str]:
    """Return what a layout says of each of many tensors; arguments as for ``join_layout``."""
    return _slots(keys, _ends_of(kinds), numbers)


def _ends_of(kinds: Sequence[tuple[str, torch.dtype, Sequence[int]]]) -> list[str]:
    """Return what follows the key of a tensor of each kind."""
    return [COMPACT.encode([role, interop.dtype_name(dtype), list(shape)])[1:] for role, dtype, shape in kinds]


def _slots(keys: Sequence[Key], ends: Sequence[str], numbers: Sequence[int]) -> list[str]:
    return [f"[{key},{ends[number]}" for key, number in zip(json_keys(keys), numbers, strict=True)]


def json_keys(keys: Sequence[Key]) -> list[str]:
    """Return each key as JSON.

    >>> json_keys(["w", 3])
    ['"w"', '3']
    """
    # JSON strings have no line ends: one call does all.
    return json.dumps(list(keys), separators=("\n", ":"))[1:-1].split("\n") if keys else []


class SplitLayout(NamedTuple):
    """A layout whose dtypes and shapes nobody has checked.

    Args:
        keys: of each tensor.
        kinds: role, dtype and shape.
        numbers: of each tensor's kind.
    """

    keys: tuple[Key, ...]
    kinds: Sequence[Sequence[Any]]
    numbers: list[int]


def split_layout(layout: bytes) -> SplitLayout:
    """Undo ``join_layout``.

    Raises:
        LayoutError: it is not a list of lists that begin with a key and a role.

    >>> split_layout(b'[["w","sum","float32",[]],["b","sum","int8",[3]],["c","sum","int8",[3]]]')[1:]
    ([['sum', 'float32', []], ['sum', 'int8', [3]]], [0, 1, 1])
    """
    try:
        found = None if _layouts is None else _layouts.split(layout)
        if found is not None:
            keys, ends, numbers = found
            return SplitLayout(keys, json.loads(b"[%s]" % b",".join(b"[" + end for end in ends)), numbers)
        return _split(json.loads(layout))
    except (ValueError, TypeError, RecursionError) as error:
        raise LayoutError(f"malformed layout: {error}") from None


def _split(described: Any) -> SplitLayout:
    kinds: dict[tuple[str, Any, str], tuple[int, Sequence[Any]]] = {}
    keys, numbers = [], []
    for key, role, dtype, shape in described:
        if type(key) not in (str, int) or type(role) is not str:
            raise ValueError(f"{show(key)}, {show(role)}; expected a str or int key, and a role")
        keys.append(key)
        numbers.append(kinds.setdefault((role, dtype, repr(shape)), (len(kinds), (role, dtype, shape)))[0])
    return SplitLayout(tuple(keys), [kind for _, kind in kinds.values()], numbers)


def decode_layout(layout: bytes) -> tuple[Slot, ...]:
    """Check a layout and return the slot of each tensor.

    Raises:
        LayoutError: anything that ``encode_layout`` would not have written.
    """
    slots = _decoded.get(layout)
    if slots is None:
        slots = _decode(layout)
        _decoded.keep(layout, slots, len(slots))
    return slots


_decoded: Recent[bytes, tuple[Slot, ...]] = Recent(32)


def _decode(layout: bytes) -> tuple[Slot, ...]:
    keys, described, numbers = split_layout(layout)
    try:
        kinds = [_checked_kind(*kind) for kind in described]
        sizes = [(dtype.itemsize, shape.numel() * dtype.itemsize) for _, dtype, shape in kinds]
        starts, _ = place(sizes, numbers)
    except (ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        raise LayoutError(f"malformed layout: {error}") from None
    return tuple(
        Slot(key, *kinds[number], start, start + sizes[number][1])
        for key, number, start in zip(keys, numbers, starts.tolist(), strict=True)
    )


def _checked_kind(role: str, name: Any, shape: Any) -> tuple[str, torch.dtype, torch.Size]:
    if type(shape) is not list or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{role!r} {shape!r}")
    dtype = _DTYPES[name]
    if math.prod(shape) * dtype.itemsize >= _MAX_NBYTES:
        raise OverflowError(f"{shape!r} of {name}")
    return role, dtype, torch.Size(shape)


def place(sizes: list[tuple[int, int]], numbers: list[int]) -> tuple[npt.NDArray[np.uint64], int]:
    """Return where each of a row of tensors begins, and where the last one ends.

    Each begins at the next multiple of its element's size.

    Args:
        sizes: of each kind, the bytes of an element and of all.
        numbers: of each tensor's kind.

    Returns:
        the first byte of each, and the byte after the last.

    Raises:
        OverflowError: at 2^62 bytes or later.

    >>> place([(1, 3), (4, 8)], [0, 1, 0])
    (array([ 0,  4, 12], dtype=uint64), 15)
    """
    if _layouts is not None:
        column, end = _layouts.place(sizes, numbers)
        return np.frombuffer(column, np.uint64), end
    starts, at = [], 0
    for number in numbers:
        itemsize, nbytes = sizes[number]
        at += -at % itemsize
        starts.append(at)
        at += nbytes
    if at >= _MAX_NBYTES:
        raise OverflowError("tensors of 2^62 bytes or more")
    return np.array(starts, np.uint64), at


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the elements of a tensor as bytes, sharing the memory of a contiguous CPU tensor."""
    return flat_bytes(tensor.detach().cpu()).numpy().data


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements of a tensor as a flat tensor of bytes, sharing the memory of a contiguous one.

    >>> flat_bytes(torch.as_strided(torch.ones(1), (1,), (0,)))
    tensor([  0,   0, 128,  63], dtype=torch.uint8)
    """
    whole = tensor.contiguous()
    # A tensor of one element is contiguous with any stride, and with most of them has no view of another dtype.
    return torch.as_strided(whole, (whole.numel(),), (1,)).view(torch.uint8)
