"""Changes between two releases: found once, bit by bit, and applied to arrays that hold the older one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
import numpy.typing as npt
import torch

from tensorkv.arrays import interop, trees
from tensorkv.arrays.arguments import Key
from tensorkv.arrays.packing import flat_bytes
from tensorkv.arrays.spec import KeySpec
from tensorkv.arrays.trees import Flat
from tensorkv.errors import ArgumentError, ArrayTypeError, ReleaseMismatchError, ValueMismatchError, quote, show
from tensorkv.runtime import _compat, shield
from tensorkv.runtime.modes import runs_outside_modes
from tensorkv.shard import native
from tensorkv.shard.entry import FrozenEntry
from tensorkv.shard.pool import Pool
from tensorkv.shard.table import Table

from . import elements
from .elements import Bytes

# Arrays of fewer elements are done with others, in one call of the compiled part.
_SMALL_NUMEL = 1 << 20

Kind = Literal["same", "elements", "dense", "rows", "deleted"]
KINDS = get_args(Kind)


@dataclass(slots=True, eq=False)
class KeyChange:
    """What has changed of one key between two releases.

    Args:
        key: of the value.
        kind: ``"same"``: nothing. ``"elements"``: some elements. ``"dense"``: so many that this is the whole value,
            or a key that the older release does not have. ``"rows"``: some rows of a sparse table. ``"deleted"``:
            the newer release does not have the key, or has it with another shape or dtype (as ``"dense"``).
        spec: of the key.
        places: indices as bytes: of elements, or ids of rows; None if there are none.
        content: the new elements, rows or value, as bytes; None if nothing has changed.
        before: digest of the value in the older release, None if that does not have the key.
        after: digest of the value in the newer release.
        gone: of ``"elements"``, the digest of what they were.
    """

    key: Key
    kind: Kind
    spec: KeySpec
    places: Bytes | None = None
    content: Bytes | None = None
    before: int | None = None
    after: int = 0
    gone: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the value."""
        return tuple(self.spec.shape)

    @property
    def dtype(self) -> str:
        """The dtype of the value, such as ``"float32"``."""
        return interop.dtype_name(self.spec.dtype)

    @property
    @runs_outside_modes
    def indices(self) -> Any:
        """Flat indices of elements, int32 or int64, or ids of rows, as an array of the key's library; or None."""
        if self.places is None:
            return None
        found = elements.as_tensor(self.places.copy(), index_dtype(self.spec))
        if self.spec.is_table:
            return interop.give_ids(found, self.spec.shape[0], self.spec.origin)
        return interop.give(found, self.spec.origin.for_parts())

    @property
    @runs_outside_modes
    def values(self) -> Any:
        """The new elements, rows or value, as an array of the key's library; None if nothing has changed."""
        if self.content is None:
            return None
        found = elements.as_tensor(self.content.copy(), self.spec.dtype)
        if self.spec.is_table:
            found = found.reshape(0 if self.places is None else len(self.places) // 8, *self.spec.shape[1:])
        elif self.kind == "dense":
            found = found.reshape(self.spec.shape)
            return interop.give(found, self.spec.origin)
        return interop.give(found, self.spec.origin.for_parts())

    @property
    def come(self) -> int:
        """Of ``"elements"``, the digest of what they are."""
        return elements.subtract(elements.add(self.gone, self.after), self.before or 0)

    def check(self) -> None:
        """Raise ValueError if indices, values and digests do not fit the kind of change and the value."""
        spec = self.spec
        if self.before is None and self.kind != "dense":
            raise ValueError(f"{self.key!r}: a change of the kind {self.kind} without the digest of the older value")
        has_places = self.kind in ("elements", "rows") or (self.kind == "dense" and spec.is_table)
        has_content = has_places or self.kind == "dense"
        if (self.places is not None, self.content is not None) != (has_places, has_content):
            raise ValueError(f"{self.key!r}: a change of the kind {self.kind} with other parts")
        if self.content is None:
            return
        if self.places is None:
            count = spec.shape.numel()
        else:
            size = index_dtype(spec).itemsize
            if len(self.places) % size:
                raise ValueError(f"{self.key!r}: indices that are not whole")
            count = len(self.places) // size
            places = elements.as_tensor(self.places, index_dtype(spec))
            most = spec.shape[0] if spec.is_table else spec.shape.numel()
            if count and not (places[0] >= 0 and places[-1] < most and bool((places[1:] > places[:-1]).all())):
                raise ValueError(f"{self.key!r}: indices that do not increase, or are outside of the value")
        expected = count * item_nbytes(spec)
        if len(self.content) != expected:
            raise ValueError(f"{self.key!r}: {len(self.content)} bytes of values, expected {expected}")

    @property
    def nbytes(self) -> int:
        """Bytes of indices and values."""
        return sum(len(each) for each in (self.places, self.content) if each is not None)


def index_dtype(spec: KeySpec) -> torch.dtype:
    """Return the dtype of indices into a value, or of the ids of a table."""
    return torch.int64 if spec.is_table else elements.index_dtype(spec.shape.numel())


def item_nbytes(spec: KeySpec) -> int:
    """Return the bytes of what an index names: an element, or a row of a table."""
    return spec.dtype.itemsize * (spec.shape[1:].numel() if spec.is_table else 1)


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


@dataclass(frozen=True)
class Changes:
    """What has changed between two releases, key by key in the order of the newer one.

    ``Release.changes`` and ``load_changes`` return them, ``apply_changes`` applies them. A sequence of ``KeyChange``.

    Args:
        base: name of the older release; None if these are whole values, which can be applied to anything.
        name: of the newer release.
        changes: one for each key.
    """

    base: str | None
    name: str
    changes: Sequence[KeyChange] = field(repr=False)

    @cached_property
    def base_digest(self) -> str | None:
        """The digest of the older release."""
        old = [(each.key, each.spec, each.before) for each in self.changes if each.before is not None]
        return None if self.base is None else release_digest(old)

    @cached_property
    def digest(self) -> str:
        """The digest of the newer release."""
        return release_digest((each.key, each.spec, each.after) for each in self.changes if each.kind != "deleted")

    @cached_property
    def plain(self) -> _PlainChanges | None:
        """What ``apply_changes`` does with arrays that are all plain; None if there are other changes."""
        return _PlainChanges.of(self.changes)

    def prepare(self) -> Self:
        """Compute what ``apply_changes`` needs, so that it takes less time."""
        _ = self.plain, self.digest, self.base_digest
        return self

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
                yield Patch(each.key, each.shape, each.indices, each.values)


# ---------------------------------------------------------------- digests


def digests_of(entries: Sequence[FrozenEntry], firsts: Sequence[int], pool: Pool | None) -> list[int]:
    """Return the digest of what a snapshot holds of each of some keys, which is computed once.

    Args:
        entries: of the snapshot.
        firsts: the place of the first element of each in the value that it is a piece of.
        pool: threads that share the work.
    """
    new = [place for place, entry in enumerate(entries) if entry.content_digest is None]
    small = [place for place in new if is_small(entries[place])]
    if small:
        tensors = [entries[place].tensor for place in small]
        found = elements.digest_each(tensors, [firsts[place] for place in small], pool)
        for place, number in zip(small, found.tolist(), strict=True):
            entries[place].content_digest = number
    for place in new:
        entry = entries[place]
        if entry.content_digest is None:
            entry.content_digest = _digest_of(entry.value, firsts[place], pool)
    return [entry.content_digest or 0 for entry in entries]


def is_small(entry: FrozenEntry) -> bool:
    """Return whether a value is done with others in one call of the compiled part."""
    value = entry.value
    return isinstance(value, torch.Tensor) and value.numel() < _SMALL_NUMEL and value.is_cpu


def _digest_of(value: torch.Tensor | Table, first: int, pool: Pool | None) -> int:
    if not isinstance(value, Table):
        return elements.digest(value.cpu().contiguous(), first, pool)
    rows = value.to_rows()
    per_row = value.row_shape.numel()
    places = (rows.ids[:, None] * per_row + torch.arange(per_row, dtype=torch.int64, device="cpu")).reshape(-1)
    # Of the ids as well: rows of zeros are rows that were written.
    return elements.add(
        elements.digest_of_elements(rows.values.cpu().contiguous(), places),
        elements.digest_of_elements(rows.ids, rows.ids),
    )


def release_digest(keys: Iterable[tuple[Key, KeySpec, int]]) -> str:
    """Return the digest of a release, as 32 hexadecimal digits.

    Args:
        keys: of each key its name, spec and digest, in any order.
    """
    lines = sorted([_line_of(*each) for each in keys])
    return hashlib.blake2b("\n".join(lines).encode("ascii"), digest_size=16).hexdigest()


def _line_of(key: Key, spec: KeySpec, number: int) -> str:
    # Which characters repr escapes depends on the version of Unicode that Python has.
    line = f"{key!a} {spec.dtype} {tuple(spec.shape)} {number}"
    return line if spec.init is None else f"{line} {json.dumps(spec.init.to_json(), sort_keys=True)}"


# ---------------------------------------------------------------- finding changes


@dataclass(slots=True)
class Pair:
    """What two releases hold of a key, or of a piece of it.

    Args:
        old: in the older release, comparable with ``new``; None: nothing.
        new: in the newer release.
        first: the place of the piece's first element in the value.
        numel: of the value.
    """

    old: FrozenEntry | None
    new: FrozenEntry
    first: int
    numel: int


def compare(pairs: Sequence[Pair], pool: Pool | None) -> list[KeyChange]:
    """Return what has changed of each of some keys; no thread may change the values meanwhile.

    A dense value that has changed as a whole is left out: ``with_values`` adds it.
    """
    found: list[KeyChange | None] = [None] * len(pairs)
    small: list[int] = []
    for place, pair in enumerate(pairs):
        new = pair.new
        if pair.old is new:
            continue
        are_small = pair.old is not None and is_small(pair.old) and is_small(new)
        if are_small and elements.index_dtype(pair.numel) is torch.int32:
            small.append(place)
        else:
            found[place] = _compare_one(pair, pool)
    _compare_small([pairs[place] for place in small], small, found, pool)
    # The digests of values of which no elements were looked at.
    rest = [place for place, change in enumerate(found) if change is None or _is_bare(change)]
    entries = [pairs[place].new for place in rest]
    digests = digests_of(entries, [pairs[place].first for place in rest], pool)
    for place, entry, number in zip(rest, entries, digests, strict=True):
        change = found[place]
        if change is None:
            found[place] = KeyChange(entry.key, "same", entry.spec, before=number, after=number)
        else:
            change.after = number
    return [change for change in found if change is not None]


def _is_bare(change: KeyChange) -> bool:
    """Return whether a change is of a whole value, which it does not have."""
    return change.kind == "dense" and change.content is None


def with_values(
    changes: Sequence[KeyChange], pull: Callable[[list[Key], list[list[torch.Tensor]]], None]
) -> list[KeyChange]:
    """Return changes with the values that ``compare`` leaves out, where a whole value has changed.

    Args:
        changes: of ``compare``, which stay as they are.
        pull: copies values of the newer release into tensors.
    """
    bare = [place for place, change in enumerate(changes) if _is_bare(change)]
    specs = [changes[place].spec for place in bare]
    values = [torch.empty(spec.shape, dtype=spec.dtype, device="cpu") for spec in specs]
    if bare:
        pull([changes[place].key for place in bare], [[value] for value in values])
    found = list(changes)
    for place, value in zip(bare, values, strict=True):
        found[place] = replace(changes[place], content=elements.bytes_of(value))
    return found


def _compare_small(
    pairs: Sequence[Pair], places: Sequence[int], found: list[KeyChange | None], pool: Pool | None
) -> None:
    """Put what has changed of small values in its place; what has not changed is left out."""
    olds = [pair.old for pair in pairs if pair.old is not None]
    firsts = [pair.first for pair in pairs]
    before = digests_of(olds, firsts, pool)
    differ = elements.find_each([old.tensor for old in olds], [pair.new.tensor for pair in pairs], firsts, pool)
    at = value_at = 0
    columns = (differ.counts.tolist(), differ.gone.tolist(), differ.come.tolist())
    for place, pair, start, count, gone, come in zip(places, pairs, before, *columns, strict=True):
        new = pair.new
        if count < 0:
            found[place] = KeyChange(new.key, "dense", new.spec, before=start)
            continue
        new.content_digest = elements.add(elements.subtract(start, gone), come)
        if count:
            index_end, value_end = at + 4 * count, value_at + new.spec.dtype.itemsize * count
            change = KeyChange(new.key, "elements", new.spec, before=start, after=new.content_digest, gone=gone)
            change.places, change.content = differ.indices[at:index_end], differ.values[value_at:value_end]
            at, value_at = index_end, value_end
            found[place] = change


def _compare_one(pair: Pair, pool: Pool | None) -> KeyChange | None:
    """Return what has changed of a key; None: nothing."""
    old, new, first = pair.old, pair.new, pair.first
    if old is None:
        return _replaced(new, None, pool)
    (before,) = digests_of([old], [first], pool)
    if isinstance(new.value, Table) and isinstance(old.value, Table):
        return _compare_tables(old.value, new, new.value, before, pool)
    earlier, later = old.tensor.cpu().contiguous(), new.tensor.cpu().contiguous()
    index_size = elements.index_dtype(pair.numel).itemsize
    most = elements.worth_finding(later.numel(), later.element_size(), index_size)
    found = elements.find(earlier, later, first, numel=pair.numel, most=most, pool=pool)
    if found is None:
        return _replaced(new, before, pool)
    new.content_digest = elements.add(elements.subtract(before, found.gone), found.come)
    if not len(found.indices):
        return None
    places, content = elements.bytes_of(found.indices), elements.bytes_of(found.values)
    return KeyChange(new.key, "elements", new.spec, places, content, before, new.content_digest, found.gone)


def _replaced(new: FrozenEntry, before: int | None, pool: Pool | None) -> KeyChange:
    """Return a change of all that the newer release holds of a key, with all rows of a table."""
    if not isinstance(new.value, Table):
        return KeyChange(new.key, "dense", new.spec, before=before)
    rows, (after,) = new.value.to_rows(), digests_of([new], [0], pool)
    return KeyChange(new.key, "dense", new.spec, *_bytes_of_rows(rows.ids, rows.values), before, after)


def deleted(old: FrozenEntry, first: int, pool: Pool | None) -> KeyChange:
    """Return the change of a key that the newer release does not have, or not so."""
    return KeyChange(old.key, "deleted", old.spec, before=digests_of([old], [first], pool)[0])


def _compare_tables(earlier: Table, new: FrozenEntry, later: Table, before: int, pool: Pool | None) -> KeyChange | None:
    rows = later.to_rows()
    if not torch.isin(earlier.ids, rows.ids).all():
        return _replaced(new, before, pool)
    held = earlier.read(rows.ids)
    differ = (_bits(held) != _bits(rows.values)).any(dim=1) | ~torch.isin(rows.ids, earlier.ids)
    (after,) = digests_of([new], [0], pool)
    if not differ.any():
        return None
    parts = _bytes_of_rows(rows.ids[differ], rows.values[differ])
    return KeyChange(new.key, "rows", new.spec, *parts, before, after)


def _bytes_of_rows(ids: torch.Tensor, values: torch.Tensor) -> tuple[Bytes, Bytes]:
    return elements.bytes_of(ids.contiguous()), elements.bytes_of(values.cpu().contiguous())


def _bits(rows: torch.Tensor) -> torch.Tensor:
    """Return the bytes of each row."""
    width = rows.element_size() * rows[0].numel() if len(rows) else 0
    return torch.from_numpy(elements.bytes_of(rows.contiguous())).reshape(len(rows), width)


# ---------------------------------------------------------------- applying changes

_pool = Pool()


@runs_outside_modes
def apply_changes(tree: Any, changes: Changes, *, prefix: str = "", base: str | None = None) -> Any:
    """Update arrays from one release to the next, bit for bit.

    On an error nothing has changed. Arrays that hold the newer release already, all or some of them, stay as they are,
    so changes may be applied again after an interruption.

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
    # What a signal handler raises does not leave some arrays written and others not.
    return shield.defer(_apply, tree, changes, prefix, base)


def _apply(tree: Any, changes: Changes, prefix: str, base: str | None) -> Any:
    if base is not None and changes.base is not None and base not in (changes.base_digest, changes.digest):
        raise ReleaseMismatchError(
            f"apply_changes: base is {show(base)}, and the changes start from {quote(changes.base)} "
            f"({changes.base_digest}); pull the whole release"
        )
    if base is not None and changes.base is not None and _apply_plain(tree, changes, prefix):
        return tree
    flat = _by_key(tree, changes, prefix)
    wanted = {each.key: each for each in changes if each.kind != "deleted"}
    works = [_Work(wanted[key], array) for key, array in zip(flat.names, flat.leaves, strict=True)]
    if changes.base is not None and base is None:
        _check(works, changes.base)
    _write(works, None if base is None else changes.base)
    given = [work.given for work in works]
    if all(new is old for new, old in zip(given, flat.leaves, strict=True)):
        return tree
    return flat.rebuild(given)


class _PlainChanges(NamedTuple):
    """Some elements of some small values, as columns: for arrays that the compiled part can look at.

    Args:
        cells: of all keys, which describe their values.
        names: of all keys.
        keys: of those that change, in the order of the columns.
        pieces: the first element of each array that changes, by its place among the names.
        columns: what is exchanged.
        indices, content: the elements, as bytes.
        gone, come: the digests of what was there, and of what is there after that.
    """

    cells: dict[Key, native.Cell]
    names: list[Key]
    keys: list[Key]
    pieces: npt.NDArray[np.int64]
    columns: elements.ExchangeColumns
    indices: Bytes
    content: Bytes
    gone: npt.NDArray[np.uint64]
    come: npt.NDArray[np.uint64]

    @classmethod
    def of(cls, changes: Sequence[KeyChange]) -> _PlainChanges | None:
        kept = [each for each in changes if each.kind != "deleted"]
        changed = [each for each in kept if each.kind == "elements"]
        is_simple = len(changed) + sum(each.kind == "same" for each in kept) == len(kept)
        if not is_simple or not native.can_look() or not elements.can_exchange_columns():
            return None
        cells: dict[Key, native.Cell] = {}
        for each in kept:
            cell = cells[each.key] = native.Cell()
            cell.spec, cell.value = each.spec, native.describe(each.spec)
            if cell.value is None:
                return None
        sizes = [each.spec.shape.numel() for each in changed]
        if max(sizes, default=0) >= _SMALL_NUMEL:
            return None
        itemsizes = np.array([each.spec.dtype.itemsize for each in changed], np.uint64)
        counts = [len(_places(each)) // 4 for each in changed]
        names = [each.key for each in kept]
        places = {name: place for place, name in enumerate(names)}
        pieces = np.zeros((len(changed), 3), np.int64)
        pieces[:, 0] = [places[each.key] for each in changed]
        return cls(
            cells,
            names,
            [each.key for each in changed],
            pieces,
            elements.ExchangeColumns.of(np.array(sizes, np.uint64), itemsizes, counts),
            elements.join_bytes(each.places for each in changed),
            elements.join_bytes(each.content for each in changed),
            np.array([each.gone for each in changed], np.uint64),
            np.array([each.come for each in changed], np.uint64),
        )


def _apply_plain(tree: Any, changes: Changes, prefix: str) -> bool:
    """Apply changes to arrays that are all plain, of a release that they hold; return False if nothing was done."""
    plain = changes.plain
    if plain is None:
        return False
    held = trees.module_state(tree) if isinstance(tree, torch.nn.Module) else tree
    names: list[Any]
    leaves: list[Any]
    if isinstance(held, Mapping) and not prefix and held.keys() == plain.cells.keys():
        names, leaves = list(held), list(held.values())
    else:
        flat = trees.flatten("apply_changes", held, prefix, all_names=True)
        names, leaves = list(flat.names), flat.leaves
        if len(names) != len(plain.cells) or not plain.cells.keys() >= set(names):
            return False
    # Also as parts, whose addresses can be had.
    batch = native.look(plain.cells, names, leaves, leaves, None, None)
    if batch is None:
        return False
    pieces = plain.pieces
    if names != plain.names:
        places = {name: place for place, name in enumerate(names)}
        pieces = pieces.copy()
        pieces[:, 0] = [places[key] for key in plain.keys]
    column = batch.part_column(pieces.tobytes())
    if column is None:
        return False
    addresses, others = np.frombuffer(column, np.uint64), plain.content.copy()
    found = elements.exchange_columns(addresses, plain.columns, plain.indices, others, _pool)
    wrong = np.flatnonzero((found != plain.gone) & (found != plain.come))
    if len(wrong):
        elements.exchange_columns(addresses, plain.columns, plain.indices, others, _pool)
        raise _mismatch(plain.keys[wrong[0]], str(changes.base))
    batch.finish(False)
    return True


def _by_key(tree: Any, changes: Changes, prefix: str) -> Flat:
    """Return the arrays of a tree by key, and check that they are those of the changes."""
    kinds = {each.key: each.kind for each in changes if each.kind != "deleted"}
    held = trees.module_state(tree) if isinstance(tree, torch.nn.Module) else tree
    if isinstance(held, Mapping) and not prefix and all(key in kinds for key in held):
        flat = Flat(list(held), list(held.values()), None, lambda arrays: dict(zip(held, arrays, strict=True)))
    else:
        flat = trees.flatten("apply_changes", held, prefix, all_names=True)
    flat = _without_tied(flat, kinds)
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


def _without_tied(flat: Flat, kinds: Mapping[Key, Kind]) -> Flat:
    """Leave out arrays that the release does not have, and that are the same memory as one that it has."""
    known = {trees.place_of(leaf) for name, leaf in zip(flat.names, flat.leaves, strict=True) if name in kinds} - {None}
    kept = [
        place
        for place, (name, leaf) in enumerate(zip(flat.names, flat.leaves, strict=True))
        if name in kinds or trees.place_of(leaf) not in known
    ]
    if len(kept) == len(flat.names):
        return flat

    def rebuild(leaves: Sequence[Any]) -> Any:
        whole = list(flat.leaves)
        for place, leaf in zip(kept, leaves, strict=True):
            whole[place] = leaf
        return flat.rebuild(whole)

    return Flat([flat.names[place] for place in kept], [flat.leaves[place] for place in kept], None, rebuild)


class _Work:
    """An array and the change that is to be made to it."""

    __slots__ = ("_array", "_finish", "_target", "change", "given", "held", "is_done", "is_plain")

    def __init__(self, change: KeyChange, array: Any) -> None:
        self.change, self._array = change, array
        self.is_done = False
        """Whether the array holds the newer release."""
        self._target: torch.Tensor | None = None
        self._finish: interop.Finish | None = None
        self.given = array
        """The array, or what replaces one that cannot be written."""
        if change.spec.is_table:
            raise ArgumentError(
                f"apply_changes({quote(change.key)}): the key is a sparse table; write the rows yourself: "
                "change.indices are their ids, change.values their values"
            )
        try:
            if interop.is_jax(array):
                self.held = interop.take(array)
            else:
                self._target, self._finish = interop.target(array)
                # What torch cannot view is written by way of another array.
                self.held = self._target if self._finish is None else interop.take(array)
        except ArrayTypeError as error:
            raise ArrayTypeError(f"apply_changes({quote(change.key)}): {error}") from None
        if self.held.shape != change.spec.shape or self.held.dtype is not change.spec.dtype:
            raise ValueMismatchError(
                f"apply_changes({quote(change.key)}): the array is {interop.dtype_name(self.held.dtype)} of shape "
                f"{tuple(self.held.shape)}, the release has {change.dtype} of shape {change.shape}"
            )
        # Elements are read and written where they are, or in a copy.
        self.is_plain = self.held is self._target and self.held.is_cpu and self.held.is_contiguous()
        if not self.is_plain:
            self.held = self.held.cpu().contiguous().clone()

    @property
    def has_elements(self) -> bool:
        """Whether some elements are to be written."""
        return self.change.kind == "elements" and not self.is_done

    @property
    def is_small(self) -> bool:
        """Whether the array is done with others in one call of the compiled part."""
        return self.held.numel() < _SMALL_NUMEL

    def finish(self) -> None:
        """Write whole values, and give the array what was written to a copy of it."""
        change = self.change
        if self.is_done or change.kind == "same" or change.content is None:
            return
        if change.kind == "dense":
            flat_bytes(self.held).copy_(torch.from_numpy(change.content))
        if self._target is None:
            self.given = interop.give(self.held, interop.origin(self._array))
            return
        if not self.is_plain:
            self._target.copy_(self.held)
        if self._finish is not None:
            self._finish()


def _check(works: Sequence[_Work], base: str) -> None:
    """Raise if an array holds neither the older release nor the newer one; mark those that hold the newer one."""
    checked = [work for work in works if work.change.before is not None and work.change.kind != "dense"]
    small = [work for work in checked if work.is_small]
    digests = elements.digest_each([work.held for work in small], [0] * len(small), _pool).tolist()
    found = dict(zip(map(id, small), digests, strict=True))
    for work in checked:
        number = found[id(work)] if id(work) in found else elements.digest(work.held, pool=_pool)
        work.is_done = number == work.change.after
        if number not in (work.change.before, work.change.after):
            raise _mismatch(work.change.key, base)


def _write(works: Sequence[_Work], base: str | None) -> None:
    """Write what has changed; on an error arrays are as they were.

    Args:
        works: arrays and changes.
        base: the older release, if what the elements were is to be checked (None: that was done).
    """
    _leave_out_tied(works)
    to_do = [work for work in works if work.has_elements]
    small = [work for work in to_do if work.is_small]
    large = [work for work in to_do if not work.is_small]
    indices = elements.join_bytes(work.change.places for work in small)
    others = elements.join_bytes(work.change.content for work in small)
    counts = [len(_places(work.change)) // 4 for work in small]
    tensors = [work.held for work in small]
    is_begun = False
    exchanged: list[tuple[_Work, torch.Tensor]] = []
    try:
        gone = elements.exchange_each(tensors, counts, indices, others, _pool).tolist()
        is_begun = True
        if base is not None:
            for work, number in zip(small, gone, strict=True):
                _check_gone(work, number, base)
        for work in large:
            # What was there, for the way back.
            values = elements.as_tensor(_content(work).copy(), work.held.dtype)
            places = elements.as_tensor(_places(work.change), index_dtype(work.change.spec))
            number = elements.exchange(work.held, places, values, _pool)
            exchanged.append((work, values))
            if base is not None:
                _check_gone(work, number, base)
    except BaseException:
        if is_begun:
            elements.exchange_each(tensors, counts, indices, others, _pool)
        for work, values in exchanged:
            places = elements.as_tensor(_places(work.change), index_dtype(work.change.spec))
            elements.exchange(work.held, places, values, _pool)
        raise
    for work in works:
        work.finish()
    written = [work.given for work in works if work.change.kind != "same" and isinstance(work.given, torch.Tensor)]
    if written:
        _compat.increment_version(written)


def _leave_out_tied(works: Sequence[_Work]) -> None:
    """Mark arrays that are the memory of others, which are written once.

    Raises:
        ArgumentError: two keys of one memory have other changes.
    """
    by_memory: dict[Any, list[_Work]] = {}
    for work in works:
        if work.is_plain and work.held.numel():
            by_memory.setdefault((work.held.data_ptr(), work.held.numel()), []).append(work)
    for tied in by_memory.values():
        if len(tied) == 1 or all(work.is_done for work in tied):
            continue
        first, *others = tied
        for work in others:
            if not _are_equal(first, work):
                raise ArgumentError(
                    f"apply_changes: the arrays of {quote(first.change.key)} and {quote(work.change.key)} are one "
                    "memory, and their changes differ"
                )
            work.is_done = True


def _are_equal(one: _Work, other: _Work) -> bool:
    mine, others = one.change, other.change
    return (
        mine.kind == others.kind
        and np.array_equal(_places(mine), _places(others))
        and np.array_equal(_content(one), _content(other))
    )


def _places(change: KeyChange) -> Bytes:
    return change.places if change.places is not None else np.empty(0, np.uint8)


def _content(work: _Work) -> Bytes:
    return work.change.content if work.change.content is not None else np.empty(0, np.uint8)


def _check_gone(work: _Work, found: int, base: str) -> None:
    """Raise if the elements that were written were neither those of the older release nor those of the newer one."""
    change = work.change
    if found not in (change.gone, change.come):
        raise _mismatch(change.key, base)


def _mismatch(key: Key, base: str) -> ReleaseMismatchError:
    return ReleaseMismatchError(
        f"apply_changes({quote(key)}): the array does not hold the release {quote(base)}, from which "
        "the changes start; pull the whole release"
    )
