"""Changes: what the records of a shard's log say of its entries and its rule, and back, with nothing trusted."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from tensorkv.arrays.arguments import Key
from tensorkv.arrays.packing import Item, raw_bytes
from tensorkv.arrays.rows import Rows
from tensorkv.errors import CheckpointError, StorageError, quote
from tensorkv.shard.entry import Entry
from tensorkv.shard.rules import Assign, CallUpdater, LostUpdater, Rule, StepOptimizer

from . import manifest
from .record import Record, crc32


def updated(rule: CallUpdater, entry: Entry, total: Any) -> Any:
    """Return what an updater makes of a value, or of some rows of it."""
    return rule.updated_rows(entry, total) if isinstance(total, Rows) else rule.updated(entry, total)


def put(entries: Sequence[Entry], made: Sequence[Any]) -> None:
    """Replace values, or rows of them."""
    for entry, value in zip(entries, made, strict=True):
        if isinstance(value, Rows):
            entry.write_rows(value)
        else:
            entry.value.copy_(value)  # type: ignore[union-attr]
        entry.version += 1


def items_of(entries: Sequence[Entry], sums: Sequence[Any]) -> list[Item]:
    """Return the tensors of a push or a put."""
    items = []
    for entry, total in zip(entries, sums, strict=True):
        if isinstance(total, Rows):
            items += [Item(entry.key, "ids", total.ids), Item(entry.key, "rows", total.values)]
        else:
            items.append(Item(entry.key, "sum", total))
    return items


def read_sum(entry: Entry, item: Item, others: Iterator[Item]) -> Any:
    """Return what ``items_of`` has made of one key, checked."""
    total: Any = item.tensor
    fits = item.role == "sum" and not entry.spec.is_table
    if item.role == "ids":
        rows, ids = next(others, item), item.tensor
        fits = rows.role == "rows" and rows.key == entry.key and ids.dtype is torch.int64
        total = Rows(ids, rows.tensor, entry.spec.shape[0])
        fits = fits and bool((ids[1:] > ids[:-1]).all())
        item = rows
    if not fits or item.tensor.dtype is not entry.spec.dtype or total.shape != entry.spec.shape:
        raise StorageError(f"{quote(entry.key)}: no sum for it: {item.role!r} of shape {tuple(total.shape)}")
    return total


def restore(body: Any, tensors: manifest.Tensors, rule: Rule | None) -> manifest.Contents:
    """Return what a manifest holds, its states being those of a rule (None: of its own)."""
    contents = manifest.restore(body, tensors)
    if contents.kind != "store":
        raise StorageError(f"holds {contents.kind}")
    manifest.check_states(contents if rule is None else replace(contents, rule=rule))
    return contents


def name_tensors(record: Record, tensors: manifest.Tensors) -> manifest.Tensors:
    """Add the tensors of an init or a snapshot to others, by name."""
    for item in record.items():
        if item.key in tensors or item.role != "tensor":
            raise StorageError(f"the tensor {quote(item.key)} stands there twice, or is none")
        tensors[str(item.key)] = item.tensor
    return tensors


def as_list(found: Any) -> list[Any]:
    """Return what has to be a list."""
    if not isinstance(found, list):
        raise StorageError(f"{found!r:.40} is no list")
    return found


def digest(entry: Entry, ids: list[torch.Tensor] | None) -> int:
    """Return a checksum of a key's version, value and state (of ``ids``: those rows of the value)."""
    states = [entry.state[name] for name in sorted(entry.state)]
    tensors: list[Any] = [entry.value, *states]
    if ids is not None:
        tensors = [entry.read_rows(torch.unique(torch.cat(ids))), *(state for state in states if state.numel() == 1)]
    checksum = crc32(str(entry.version).encode())
    for tensor in tensors:
        checksum = crc32(raw_bytes(tensor), checksum)
    return checksum


def describe_rule(rule: Rule) -> dict[str, Any]:
    """Return a rule as plain data; of an updater, only that there is one."""
    if isinstance(rule, StepOptimizer):
        return {"update": "optimizer", "optimizer": rule.optimizer.spec.to_json()}
    return {"update": "assign" if type(rule) is Assign else "updater"}


def restore_rule(head: dict[str, Any], held: Container[Key]) -> Rule:
    """Return what ``describe_rule`` has described, of a shard that holds these keys."""
    if head["update"] == "optimizer":
        rule = manifest.restore_rule(head["optimizer"])
        if not all(key in held for key in rule.optimizer.spec.overrides):
            raise StorageError("the optimizer has numbers for what is no key")
        return rule
    if head["update"] not in ("assign", "updater"):
        raise CheckpointError(f"update is {head['update']!r}")
    return Assign() if head["update"] == "assign" else LostUpdater()
