"""Changes between two releases as a server sends them, and the changes of whole values that clients make of them.

Values that have changed as a whole are not among them: clients pull these.

The payload of a reply has a table of 64-bit numbers, a row for each property and a column for each key, and then the
indices and the new values of each key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from tensorkv.arrays.arguments import Key
from tensorkv.arrays.spec import KeySpec
from tensorkv.errors import WorkerError
from tensorkv.releases import elements
from tensorkv.releases.changes import KINDS, KeyChange, index_dtype, item_nbytes
from tensorkv.releases.elements import Bytes

from .messages import Reply, room_for

# Rows of the table. Lengths are one more than the bytes, 0 for nothing.
_KIND, _IS_NEW, _INDEX_LENGTH, _VALUE_LENGTH, _BEFORE, _AFTER, _GONE, _NUM_ROWS = range(8)


def encode_changes(base: str | None, changes: Sequence[KeyChange], out: torch.Tensor | None) -> Reply:
    """Return a reply with the changes of what a server holds of each key.

    Args:
        base: the older release (None: these are all values).
        changes: in the order of the keys of the newer release, then those of deleted keys.
        out: memory for the payload, if it fits.
    """
    table = np.zeros((_NUM_ROWS, len(changes)), np.uint64)
    table[_KIND] = [KINDS.index(each.kind) for each in changes]
    table[_IS_NEW] = [each.before is None for each in changes]
    table[_INDEX_LENGTH] = [0 if each.places is None else 1 + len(each.places) for each in changes]
    table[_VALUE_LENGTH] = [0 if each.content is None else 1 + len(each.content) for each in changes]
    table[_BEFORE] = [each.before or 0 for each in changes]
    table[_AFTER] = [each.after for each in changes]
    table[_GONE] = [each.gone for each in changes]
    parts = [table.reshape(-1).view(np.uint8)]
    parts += [part for each in changes for part in (each.places, each.content) if part is not None]
    nbytes = sum(map(len, parts))
    payload = room_for(nbytes, out)
    np.concatenate(parts, out=payload.numpy())
    return Reply({"base": base, "deleted": [each.key for each in changes if each.kind == "deleted"]}, payload)


class PieceChange(NamedTuple):
    """What has changed of a piece of a value.

    Args:
        kind: as of ``KeyChange``.
        before: digest in the older release (None: it does not have the key).
        after, gone, places, content: as of ``KeyChange``.
    """

    kind: Any
    before: int | None
    after: int
    gone: int
    places: Bytes | None
    content: Bytes | None


def decode_changes(payload: Bytes, num_keys: int) -> list[PieceChange]:
    """Return what ``encode_changes`` was called with, for so many keys, those deleted included."""
    table_nbytes = 8 * _NUM_ROWS * num_keys
    if len(payload) < table_nbytes:
        raise WorkerError("changes: a server has sent a malformed reply")
    table = payload[:table_nbytes].copy().view(np.uint64).reshape(_NUM_ROWS, num_keys).tolist()
    at = table_nbytes
    found = []
    for kind, is_new, index_length, value_length, before, after, gone in zip(*table, strict=True):
        parts: list[Bytes | None] = []
        for length in (index_length, value_length):
            parts.append(payload[at : at + length - 1] if length else None)
            at += max(0, length - 1)
        found.append(PieceChange(KINDS[kind], None if is_new else before, after, gone, parts[0], parts[1]))
    return found


class OwnedPiece(NamedTuple):
    """A change of a piece, and the places of the piece's first element and after its last one in the value."""

    first: int
    stop: int
    change: PieceChange


def merge(key: Key, spec: KeySpec, pieces: Sequence[OwnedPiece]) -> KeyChange | None:
    """Return the change of a value from those of its pieces, in order.

    Returns:
        None if the whole value has to be requested instead: the key is new, or rows of its table were removed, on
        some of its servers only.
    """
    changes = [each.change for each in pieces]
    if len(changes) == 1:
        (change,) = changes
        # Of a value that has changed as a whole, all elements were others.
        gone = (change.before or 0) if change.kind == "dense" else change.gone
        return KeyChange(key, change.kind, spec, change.places, change.content, change.before, change.after, gone)
    is_new = any(each.before is None for each in changes)
    is_whole = all(each.kind == "dense" for each in changes)
    if not is_whole and (is_new or (spec.is_table and any(each.kind == "dense" for each in changes))):
        return None
    found = KeyChange(key, "same", spec)
    found.before = None if is_new else elements.add(*(each.before or 0 for each in changes))
    found.after = elements.add(*(each.after for each in changes))
    # Of a piece that is sent whole, all elements were others.
    found.gone = elements.add(*((each.before or 0) if each.kind == "dense" else each.gone for each in changes))
    kinds = {each.kind for each in changes}
    if kinds <= {"same"} or kinds <= {"deleted"}:
        found.kind = changes[0].kind
    elif spec.is_table:
        _merge_rows(found, changes)
    elif kinds == {"dense"}:
        found.kind = "dense"
    else:
        _merge_elements(found, pieces)
    return found


def _merge_rows(found: KeyChange, changes: Sequence[PieceChange]) -> None:
    """Put rows of several servers together: all rows of each, or those that have changed."""
    found.kind = "dense" if changes[0].kind == "dense" else "rows"
    ids = elements.as_tensor(elements.join_bytes(each.places for each in changes), torch.int64)
    content = elements.join_bytes(each.content for each in changes)
    rows = torch.from_numpy(content).reshape(len(ids), item_nbytes(found.spec))
    order = torch.argsort(ids)
    found.places, found.content = elements.bytes_of(ids[order]), elements.bytes_of(rows[order])


def _merge_elements(found: KeyChange, pieces: Sequence[OwnedPiece]) -> None:
    """Put elements together; a piece of which all are sent has each of its elements."""
    dtype = index_dtype(found.spec)
    places: list[Bytes | None] = []
    for first, stop, change in pieces:
        if change.kind == "dense":
            places.append(elements.bytes_of(torch.arange(first, stop, dtype=dtype, device="cpu")))
        else:
            places.append(change.places)
    found.kind, found.places = "elements", elements.join_bytes(places)
    found.content = elements.join_bytes(change.content for _, _, change in pieces)
