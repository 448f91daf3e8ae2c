"""How changes are written as records of a log and read back, with nothing trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tensorkv.arrays.arguments import Key
from tensorkv.arrays.packing import Item, join_slots, raw_bytes
from tensorkv.arrays.rows import Rows
from tensorkv.arrays.slices import Slices
from tensorkv.errors import CheckpointError, StorageError, quote
from tensorkv.shard.changes import (
    Change,
    Delete,
    Init,
    PlainPush,
    Publish,
    Push,
    Put,
    SetNotes,
    SetRule,
    ShowRelease,
    TakenSlices,
    Unpublish,
)
from tensorkv.shard.entry import Batch, Entry, slots_of
from tensorkv.shard.rules import Assign, LostUpdater, Rule, StepOptimizer, check_push
from tensorkv.shard.shard import Shard

from . import manifest
from .record import Record


@dataclass(slots=True)
class Events(Change):
    """Change the tables of a server, which stand beside the requests that were applied."""

    events: Sequence[Any]


def encode(change: Change) -> Record:
    """Return the record of a change; a push has been summed."""
    record = _encode(change)
    return replace(record, head={**record.head, "requests": list(change.requests)}) if change.requests else record


def _encode(change: Change) -> Record:  # noqa: C901 - one case for each kind of change
    match change:
        case Push(entries=entries, parts=parts, scale=scale, slices=slices):
            head = _head_of_push(scale)
            if change.others:
                head["others"] = list(change.others)
            return _with_slices(head, _items(entries, [total for (total,) in parts]), slices)
        case PlainPush(batch=batch, entries=entries, sums=torch.Tensor() as sums):
            return Record(_head_of_push(batch.scale), join_slots(slots_of(entries)), [raw_bytes(sums)])
        case Put(entries=entries, values=values, slices=slices):
            return _with_slices({"verb": "put"}, _items(entries, values), slices)
        case Init(entries=entries):
            body, tensors = manifest.describe("store", entries, Assign())
            items = [Item(name, "tensor", tensor) for name, tensor in tensors.items()]
            return Record.pack({"verb": "init", "body": body}, items)
        case Delete(keys=keys):
            return Record({"verb": "delete", "keys": list(keys)})
        case SetRule(rule=rule):
            return Record({"verb": "rule", **_describe_rule(rule)})
        case SetNotes(notes=notes):
            return Record({"verb": "notes", "notes": dict(notes)})
        case Publish(name=name, number=number, keys=keys):
            return Record(
                {
                    "verb": "publish",
                    "name": name,
                    "number": number,
                    "keys": None if keys is None else list(keys),
                    "is_visible": change.is_visible,
                    "keep": change.keep,
                    "owner": change.owner,
                    "attempt": change.attempt,
                }
            )
        case ShowRelease(name=name, keep=keep):
            return Record({"verb": "show_release", "name": name, "keep": keep})
        case Unpublish(names=names):
            return Record({"verb": "unpublish", "names": list(names)})
        case Events(events=events):
            return Record({"verb": "session", "events": list(events)})
    raise TypeError(f"a log has no record of a {type(change).__name__}")


def _head_of_push(scale: float) -> dict[str, Any]:
    # Under a name of its own, which a version that knows no scale refuses; as text, since it may be NaN.
    return {"verb": "push"} if scale == 1 else {"verb": "push_scaled", "scale": scale.hex()}


def _with_slices(head: dict[str, Any], items: list[Item], slices: TakenSlices) -> Record:
    """Return the record of a push, under a name of its own if there are slices, which older versions refuse."""
    if not slices.kept and not slices.ended:
        return Record.pack(head, items)
    head = {"verb": "slices", "push": head, "ended": [entry.key for entry in slices.ended]}
    return Record.pack(head, [*items, *(item for entry, own in slices.kept for item in slice_items(entry.key, own))])


def decode(record: Record, shard: Shard) -> Change:  # noqa: C901 - one case for each kind of change
    """Return the change of a record, checked against the shard that is to apply it.

    Raises:
        TensorKVError: it does not fit the shard.
        LookupError, TypeError, ValueError: it is malformed.
    """
    head = record.head
    match head.get("verb"):
        case "push" | "push_scaled" | "put":
            return _read_push(head, record, shard, TakenSlices())
        case "slices":
            kept = [item for item in record.items() if item.role in ("bounds", "slices")]
            ended = [shard.entry("push", key) for key in _list(head["ended"])]
            return _read_push(head["push"], record, shard, TakenSlices(read_slices(kept, shard), ended))
        case "init":
            contents = read_contents(head["body"], add_tensors(record, {}), shard.rule)
            shard.check_new([entry.key for entry in contents.entries])
            return Init(contents.entries)
        case "delete":
            return Delete(_list(head["keys"]))
        case "rule":
            return SetRule(_read_rule(head, shard))
        case "notes":
            return SetNotes(dict(head["notes"]))
        case "publish":
            keys = None if head["keys"] is None else _list(head["keys"])
            for key in keys or ():
                shard.entry("publish", key)
            name, number = str(head["name"]), int(head["number"])
            owner, attempt = str(head["owner"]), str(head["attempt"])
            return Publish(name, number, keys, bool(head["is_visible"]), head["keep"], owner, attempt)
        case "show_release":
            return ShowRelease(str(head["name"]), head["keep"])
        case "unpublish":
            return Unpublish(_list(head["names"]))
        case "session":
            return Events(_list(head["events"]))
        case verb:
            raise StorageError(f"{verb!r} is unknown to this version of tensorkv; use a newer one")


# ---------------------------------------------------------------- sums


def _read_push(head: dict[str, Any], record: Record, shard: Shard, slices: TakenSlices) -> Push | Put:
    entries, sums = _read_items(record, shard)
    if head["verb"] == "put":
        return Put(entries, sums, slices)
    batch = Batch("push", [entry.key for entry in entries], [[total] for total in sums])
    check_push(batch, entries, shard.rule)
    others = _list(head.get("others", []))
    return Push(entries, batch.parts, scale=float.fromhex(head.get("scale", "1")), slices=slices, others=others)


def slice_items(key: Key, slices: Slices) -> list[Item]:
    """Return what a record has of the slices of a value."""
    bounds, values = slices.to_tensors()
    return [Item(key, "bounds", bounds), Item(key, "slices", values)]


def read_slices(items: Sequence[Item], shard: Shard) -> list[tuple[Entry, Slices]]:
    """Return the slices of values, of which some others have come or are missing."""
    found = []
    for bounds, values in zip(items[::2], items[1::2], strict=True):
        entry, slices = shard.entry("push", bounds.key), Slices.from_tensors(bounds.tensor, values.tensor)
        is_pair = (bounds.role, values.role, values.key) == ("bounds", "slices", bounds.key)
        if not is_pair or slices.shape != entry.spec.shape or slices.dtype is not entry.spec.dtype:
            raise StorageError(f"{quote(entry.key)}: expected slices of a value of shape {tuple(entry.spec.shape)}")
        found.append((entry, slices))
    return found


def _items(entries: Sequence[Entry], sums: Sequence[Any]) -> list[Item]:
    items = []
    for entry, total in zip(entries, sums, strict=True):
        if isinstance(total, Rows):
            items += [Item(entry.key, "ids", total.ids), Item(entry.key, "rows", total.values)]
        else:
            items.append(Item(entry.key, "sum", total))
    return items


def _read_items(record: Record, shard: Shard) -> tuple[list[Entry], list[Any]]:
    items = (item for item in record.items() if item.role not in ("bounds", "slices"))
    entries: list[Entry] = []
    sums: list[Any] = []
    for item in items:
        entry = shard.entry("push", item.key)
        entries.append(entry)
        sums.append(_read_sum(entry, item, items))
    if len({entry.key for entry in entries}) < len(entries):
        raise StorageError("duplicate key in a record")
    return entries, sums


def _read_sum(entry: Entry, item: Item, others: Iterator[Item]) -> Any:
    total: Any = item.tensor
    fits = item.role == "sum" and not entry.spec.is_table
    if item.role == "ids":
        rows, ids = next(others, item), item.tensor
        fits = rows.role == "rows" and rows.key == entry.key and ids.dtype is torch.int64
        total = Rows(ids, rows.tensor, entry.spec.shape[0])
        fits = fits and bool((ids[1:] > ids[:-1]).all())
        item = rows
    if not fits or item.tensor.dtype is not entry.spec.dtype or total.shape != entry.spec.shape:
        raise StorageError(
            f"{quote(entry.key)}: expected a sum of shape {tuple(entry.spec.shape)}, got {item.role!r} of shape "
            f"{tuple(total.shape)}"
        )
    return total


# ---------------------------------------------------------------- entries and rules


def read_contents(body: Any, tensors: manifest.Tensors, rule: Rule | None) -> manifest.Contents:
    """Return what a manifest describes, its states being those of a rule (None: of its own)."""
    contents = manifest.restore(body, tensors)
    if contents.kind != "store":
        raise StorageError(f"contains {contents.kind}, expected a store")
    manifest.check_states(contents if rule is None else replace(contents, rule=rule))
    return contents


def add_tensors(record: Record, tensors: manifest.Tensors) -> manifest.Tensors:
    """Add the tensors of an init or a snapshot to others, by name."""
    for item in record.items():
        if item.key in tensors or item.role != "tensor":
            raise StorageError(f"duplicate or unexpected tensor {quote(item.key)} in a record")
        tensors[str(item.key)] = item.tensor
    return tensors


def _describe_rule(rule: Rule) -> dict[str, Any]:
    """Return a rule as plain data; of an updater, only that there is one."""
    if isinstance(rule, StepOptimizer):
        return {"update": "optimizer", "optimizer": rule.optimizer.spec.to_json()}
    return {"update": "assign" if type(rule) is Assign else "updater"}


def _read_rule(head: dict[str, Any], shard: Shard) -> Rule:
    if head["update"] == "optimizer":
        rule = manifest.restore_rule(head["optimizer"])
        if not all(key in shard for key in rule.optimizer.spec.overrides):
            raise StorageError("the optimizer has hyperparameters for keys that do not exist")
        return rule
    if head["update"] not in ("assign", "updater"):
        raise CheckpointError(f"unknown update rule {head['update']!r}")
    return Assign() if head["update"] == "assign" else LostUpdater()


def _list(found: Any) -> list[Any]:
    if not isinstance(found, list):
        raise StorageError(f"expected a list, got {found!r:.40}")
    return found
