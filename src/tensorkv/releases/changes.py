"""Changes between two releases: found once, bit by bit, and applied to arrays that hold the older one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch

from tensorkv.arrays import interop, trees
from tensorkv.arrays.arguments import Key
from tensorkv.arrays.interop import Origin
from tensorkv.arrays.trees import Flat
from tensorkv.errors import ArgumentError, ArrayTypeError, ReleaseMismatchError, ValueMismatchError, quote, show
from tensorkv.runtime import _compat
from tensorkv.shard.entry import FrozenEntry
from tensorkv.shard.pool import Pool
from tensorkv.shard.table import Table

from . import elements

Kind = Literal["same", "elements", "dense", "rows", "deleted"]


@dataclass(frozen=True, slots=True)
class KeyChange:
    """What has changed of one key between two releases.

    Args:
        key: of the value.
        kind: ``"same"``: nothing. ``"elements"``: some elements. ``"dense"``: so many that this is the whole value,
            or a key that the older release does not have. ``"rows"``: some rows of a sparse table. ``"deleted"``:
            the newer release does not have the key, or has it with another shape or dtype (as ``"dense"``).
        shape: of the value.
        dtype: of the value.
        origin: the library of the key.
        places: flat indices of elements, int32 or int64; of ``"rows"``, their ids; else None.
        content: the new elements, rows or value; None if nothing has changed.
        before, after: digests of the value in the older release (None: it does not have the key) and in the newer one.
        gone: of ``"elements"``, the digest of what they were.
    """

    key: Key
    kind: Kind
    shape: torch.Size
    dtype: torch.dtype
    origin: Origin
    places: torch.Tensor | None = None
    content: torch.Tensor | None = None
    before: int | None = None
    after: int = 0
    gone: int = 0

    @property
    def indices(self) -> Any:
        """Flat indices of the elements that have changed, or ids of rows, as an array of the key's library; or None."""
        return None if self.places is None else interop.give(self.places.clone(), self.origin)

    @property
    def values(self) -> Any:
        """The new elements, rows or value, as an array of the key's library; None if nothing has changed."""
        return None if self.content is None else interop.give(self.content.clone(), self.origin)

    @property
    def nbytes(self) -> int:
        """Bytes of indices and values."""
        return sum(each.nbytes for each in (self.places, self.content) if each is not None)


class Patch(NamedTuple):
    """What has changed of one key, as inference engines take it.

    Args:
        name: the key.
        shape: of the value.
        indices: flat indices of the elements that have changed; None if ``values`` are all elements.
        values: the new elements.
    """

    name: Key
    shape: tuple[int, ...]
    indices: Any
    values: Any


@dataclass(frozen=True, slots=True)
class Changes:
    """What has changed between two releases, key by key in the order of the newer one.

    ``Release.changes`` and ``load_changes`` return them, ``apply_changes`` applies them. A sequence of ``KeyChange``.

    Args:
        base: name of the older release; None if these are whole values, which can be applied to anything.
        name: of the newer release.
        base_digest, digest: of the two releases.
        changes: one for each key.
    """

    base: str | None
    name: str
    base_digest: str | None
    digest: str
    changes: Sequence[KeyChange] = field(repr=False)

    def __len__(self) -> int:
        return len(self.changes)

    def __iter__(self) -> Iterator[KeyChange]:
        return iter(self.changes)

    def __getitem__(self, place: int) -> KeyChange:
        return self.changes[place]

    @property
    def nbytes(self) -> int:
        """Bytes of all indices and values."""
        return sum(each.nbytes for each in self.changes)

    def patches(self) -> Iterator[Patch]:
        """Return what has changed as tuples ``(name, shape, indices, values)``; others are left out.

        >>> import numpy as np, tensorkv
        >>> kv = tensorkv.create()
        >>> kv.init("w", np.zeros(4, np.float32))
        >>> kv.publish("step-1")
        >>> kv.push("w", np.array([0, 0, 5, 0], np.float32))
        >>> kv.publish("step-2")
        >>> with kv.open_release("step-2") as release:
        ...     list(release.changes(since="step-1").patches())
        [Patch(name='w', shape=(4,), indices=array([2], dtype=int32), values=array([5.], dtype=float32))]
        """
        for each in self.changes:
            if each.kind not in ("same", "deleted"):
                yield Patch(each.key, tuple(each.shape), each.indices, each.values)


# ---------------------------------------------------------------- digests


def content_digest(entry: FrozenEntry, first: int, pool: Pool | None) -> int:
    """Return the digest of what a snapshot holds of a key, which is computed once.

    Args:
        entry: of the snapshot.
        first: the place of its first element in the value that it is a piece of.
        pool: threads that share the work.
    """
    if entry.content_digest is None:
        entry.content_digest = _digest_of(entry.value, first, pool)
    return entry.content_digest


def _digest_of(value: torch.Tensor | Table, first: int, pool: Pool | None) -> int:
    if not isinstance(value, Table):
        return elements.digest(value.cpu().contiguous(), first, pool)
    rows = value.to_rows()
    per_row = value.row_shape.numel()
    places = (rows.ids[:, None] * per_row + torch.arange(per_row)).reshape(-1)
    # Of the ids as well: rows of zeros are rows that were written.
    return elements.add(
        elements.digest_of_elements(rows.values.cpu().contiguous(), places),
        elements.digest_of_elements(rows.ids, rows.ids),
    )


def release_digest(keys: Iterable[tuple[Key, torch.dtype, Sequence[int], int]]) -> str:
    """Return the digest of a release, as 32 hexadecimal digits.

    Args:
        keys: of each key its name, dtype, shape and digest, in any order.

    >>> release_digest([("w", torch.float32, (2,), 7)]) == release_digest([("w", torch.float64, (2,), 7)])
    False
    """
    lines = sorted(
        json.dumps([key, interop.dtype_name(dtype), list(shape), number]) for key, dtype, shape, number in keys
    )
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def changes_of(base: str | None, name: str, found: Sequence[KeyChange]) -> Changes:
    """Return the changes of all keys of a release since another one; None: its values."""
    old = [(each.key, each.dtype, each.shape, each.before) for each in found if each.before is not None]
    new = [(each.key, each.dtype, each.shape, each.after) for each in found if each.kind != "deleted"]
    return Changes(base, name, None if base is None else release_digest(old), release_digest(new), found)


# ---------------------------------------------------------------- finding changes


def is_comparable(old: FrozenEntry, new: FrozenEntry | None) -> bool:
    """Return whether a release has a key as an older one has it, perhaps with other elements or rows."""
    return new is not None and (old.spec.shape, old.spec.dtype, old.spec.is_table) == (
        new.spec.shape,
        new.spec.dtype,
        new.spec.is_table,
    )


def deleted(old: FrozenEntry, *, first: int, pool: Pool | None) -> KeyChange:
    """Return the change of a key that the newer release does not have, or not so; arguments as for ``compare``."""
    spec, before = old.spec, content_digest(old, first, pool)
    return KeyChange(old.key, "deleted", spec.shape, spec.dtype, spec.origin, before=before)


def compare(old: FrozenEntry | None, new: FrozenEntry, *, first: int, numel: int, pool: Pool | None) -> KeyChange:
    """Return what has changed of a key, or of a piece of it; no thread may change the values meanwhile.

    Args:
        old: what the older release holds of it, which is comparable; None: nothing.
        new: what the newer release holds of it.
        first: the place of the piece's first element in the value.
        numel: of the value.
        pool: threads that share the work.
    """
    spec = new.spec
    whole = KeyChange(new.key, "dense", spec.shape, spec.dtype, spec.origin)
    if old is None:
        return _replaced(whole, None, new, first, pool)
    if old is new or old.value is new.value:
        after = content_digest(new, first, pool)
        return replace(whole, kind="same", before=after, after=after)
    before = content_digest(old, first, pool)
    if isinstance(new.value, Table) and isinstance(old.value, Table):
        return _compare_tables(whole, old.value, new, new.value, before, pool)
    earlier, later = (each.tensor.cpu().contiguous() for each in (old, new))
    index_nbytes = 4 if numel <= 1 << 31 else 8
    most = later.nbytes // (index_nbytes + later.element_size())
    found = elements.find(earlier, later, first, numel=numel, most=most, pool=pool)
    if found is None:
        return _replaced(whole, before, new, first, pool)
    after = new.content_digest = elements.add(elements.subtract(before, found.gone), found.come)
    if not len(found.indices):
        return replace(whole, kind="same", before=before, after=after)
    return replace(
        whole,
        kind="elements",
        places=found.indices,
        content=found.values,
        before=before,
        after=after,
        gone=found.gone,
    )


def _replaced(whole: KeyChange, before: int | None, new: FrozenEntry, first: int, pool: Pool | None) -> KeyChange:
    """Return a change that has all that the newer release holds of a key."""
    after = content_digest(new, first, pool)
    if isinstance(new.value, Table):
        rows = new.value.to_rows()
        return replace(whole, places=rows.ids, content=rows.values, before=before, after=after)
    # The store's own memory is reused when the release is dropped.
    return replace(whole, content=new.value.detach().clone(), before=before, after=after)


def _compare_tables(
    whole: KeyChange, earlier: Table, new: FrozenEntry, later: Table, before: int, pool: Pool | None
) -> KeyChange:
    rows = later.to_rows()
    known = torch.isin(earlier.ids, rows.ids)
    if not known.all():
        return _replaced(whole, before, new, 0, pool)
    held = earlier.read(rows.ids)
    differ = (_bits(held) != _bits(rows.values)).any(dim=1) | ~torch.isin(rows.ids, earlier.ids)
    ids, values = rows.ids[differ], rows.values[differ]
    after = content_digest(new, 0, pool)
    if not len(ids):
        return replace(whole, kind="same", before=before, after=after)
    return replace(whole, kind="rows", places=ids, content=values, before=before, after=after)


def _bits(rows: torch.Tensor) -> torch.Tensor:
    """Return the bytes of each row."""
    width = rows.element_size() * rows[0].numel() if len(rows) else 0
    return torch.from_numpy(elements.bytes_of(rows.contiguous())).reshape(len(rows), width)


# ---------------------------------------------------------------- applying changes

_pool = Pool()


def apply_changes(tree: Any, changes: Changes, *, prefix: str = "", base: str | None = None) -> Any:
    """Make arrays that hold one release hold the next one, bit by bit.

    Everything is checked first; on an error nothing has changed. Arrays that hold the newer release already, all or
    some of them, stay as they are, so changes may be applied again after an interruption.

    Args:
        tree: what a pull of the older release has filled: a mapping from key to array, a tree of arrays as for
            ``pull_tree``, or a ``torch.nn.Module``. Arrays have the shapes and dtypes of their keys.
        changes: of ``Release.changes`` or ``load_changes``.
        prefix: of the keys, as for ``pull_tree``; keys that do not begin with it are left out.
        base: the digest of the release that the arrays hold, if that is known: ``Release.digest`` after a pull,
            ``Changes.digest`` after ``apply_changes``. Then only the elements that change are compared with their
            digest. None: the digest of all arrays is computed, which reads them once.

    Returns:
        The tree, its arrays changed in place; arrays of JAX, which cannot be, are replaced in a new tree.

    Raises:
        ReleaseMismatchError: the arrays do not hold the older release; the message names a key that differs.
        ArgumentError: the tree lacks keys or has others; changes of a sparse table.
        ValueMismatchError: another shape or dtype than the key's.
        ArrayTypeError: an array that cannot be written.

    >>> import numpy as np, tensorkv
    >>> kv = tensorkv.create()
    >>> kv.init("w", np.zeros(4, np.float32))
    >>> kv.publish("step-1")
    >>> mine = {"w": kv.pull("w")}
    >>> kv.push("w", np.array([0, 0, 5, 0], np.float32))
    >>> kv.publish("step-2")
    >>> with kv.open_release("step-2") as release:
    ...     tensorkv.apply_changes(mine, release.changes(since="step-1"))
    {'w': array([0., 0., 5., 0.], dtype=float32)}
    """
    if not isinstance(changes, Changes):
        raise ArgumentError(f"apply_changes: changes is {show(changes)}; expected what Release.changes returns")
    if base is not None and changes.base is not None and base not in (changes.base_digest, changes.digest):
        raise ReleaseMismatchError(
            f"apply_changes: base is {show(base)}, and the changes start from {quote(changes.base)} "
            f"({changes.base_digest}); pull the whole release"
        )
    flat = _by_key(tree, changes, prefix)
    wanted = {each.key: each for each in changes if each.kind != "deleted"}
    works = [_Work(wanted[key], array) for key, array in zip(flat.names, flat.leaves, strict=True)]
    begun: list[_Work] = []
    try:
        if changes.base is not None and base is None:
            for work in works:
                work.check(changes.base)
        for work in works:
            begun.append(work)
            work.exchange(changes.base, is_checked=changes.base is None or base is None)
    except BaseException:
        for work in begun:
            work.undo()
        raise
    for work in works:
        work.finish()
    given = [work.given for work in works]
    if all(new is old for new, old in zip(given, flat.leaves, strict=True)):
        return tree
    return flat.rebuild(given)


def _by_key(tree: Any, changes: Changes, prefix: str) -> Flat:
    """Return the arrays of a tree by key, and check that they are those of the changes."""
    kinds = {each.key: each.kind for each in changes if each.kind != "deleted"}
    held = tree.state_dict() if isinstance(tree, torch.nn.Module) else tree
    if isinstance(held, Mapping) and not prefix and all(key in kinds for key in held):
        flat = Flat(list(held), list(held.values()), None, lambda arrays: dict(zip(held, arrays, strict=True)))
    else:
        flat = trees.flatten("apply_changes", held, prefix)
    names = set(flat.names)
    stem = trees.check_prefix("apply_changes", prefix)
    missing = [key for key in kinds if key not in names and (not stem or trees.is_below(str(key), stem))]
    unknown = [name for name in flat.names if name not in kinds]
    if missing or unknown:
        what = f"has no array for {quote(missing[0])}" if missing else f"has {quote(unknown[0])}"
        raise ArgumentError(
            f"apply_changes: the tree {what}, {'which' if missing else 'and'} the release {quote(changes.name)} "
            f"{'has' if missing else 'does not'}; pull the whole release"
        )
    return flat


class _Work:
    """An array and the change that is to be made to it."""

    def __init__(self, change: KeyChange, array: Any) -> None:
        self._change, self._array = change, array
        self._is_done = False
        self._others: torch.Tensor | None = None
        self._target: torch.Tensor | None = None
        self.given = array
        """The array, or what replaces one that cannot be written."""
        key = change.key
        if change.kind == "rows" or (change.kind == "dense" and change.places is not None):
            raise ArgumentError(
                f"apply_changes({quote(key)}): the key is a sparse table; write the rows yourself: change.indices are "
                "their ids, change.values their values"
            )
        try:
            if interop.is_jax(array):
                self._held = interop.take(array)
            else:
                self._target, self._finish = interop.target(array)
                self._held = self._target
        except ArrayTypeError as error:
            raise ArrayTypeError(f"apply_changes({quote(key)}): {error}") from None
        if self._held.shape != change.shape or self._held.dtype is not change.dtype:
            raise ValueMismatchError(
                f"apply_changes({quote(key)}): the array is {interop.dtype_name(self._held.dtype)} of shape "
                f"{tuple(self._held.shape)}, the release has {interop.dtype_name(change.dtype)} of shape "
                f"{tuple(change.shape)}"
            )
        # Elements are read and written where they are, or in a copy.
        self._is_plain = self._target is not None and self._held.is_cpu and self._held.is_contiguous()
        if not self._is_plain:
            self._held = self._held.cpu().contiguous().clone()

    def check(self, base: str) -> None:
        """Raise if the array holds neither the older release nor the newer one."""
        change = self._change
        if change.before is None or change.kind == "dense":
            return
        found = elements.digest(self._held, pool=_pool)
        self._is_done = found == change.after
        if found not in (change.before, change.after):
            raise self._mismatch(base)

    def exchange(self, base: str | None, *, is_checked: bool) -> None:
        """Write elements that have changed; raise if they were not those of the older release or the newer one."""
        change = self._change
        if change.kind != "elements" or self._is_done or change.places is None or change.content is None:
            return
        # What was there, for ``undo``.
        self._others = change.content.clone()
        found = elements.exchange(self._held, change.places, self._others, _pool)
        come = elements.subtract(elements.add(change.gone, change.after), change.before or 0)
        if not is_checked and found not in (change.gone, come):
            raise self._mismatch(base or "")

    def undo(self) -> None:
        """Write what was there before ``exchange``."""
        if self._others is not None and self._change.places is not None:
            elements.exchange(self._held, self._change.places, self._others, _pool)

    def finish(self) -> None:
        """Write whole values, and give the array what was written to a copy of it."""
        change = self._change
        if self._is_done or change.kind == "same" or change.content is None:
            return
        if change.kind == "dense":
            self._held.copy_(change.content)
        if self._target is None:
            self.given = interop.give(self._held, interop.origin(self._array))
            return
        if not self._is_plain:
            self._target.copy_(self._held)
        if isinstance(self._array, torch.Tensor):
            _compat.increment_version([self._array])
        if self._finish is not None:
            self._finish()

    def _mismatch(self, base: str) -> ReleaseMismatchError:
        return ReleaseMismatchError(
            f"apply_changes({quote(self._change.key)}): the array does not hold the release {quote(base)}, from which "
            "the changes start; pull the whole release"
        )
