"""Checkpoints of a store on servers, in the format of every store: pieces are put together, or cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from tensorkv.arrays.arguments import Key
from tensorkv.arrays.packing import Item, pack
from tensorkv.errors import CheckpointError
from tensorkv.shard.entry import Entry
from tensorkv.shard.rules import Assign, Rule, StepOptimizer
from tensorkv.shard.table import Table
from tensorkv.storage import checkpoint, manifest
from tensorkv.storage.manifest import Contents, Kind

from .data import letter_of
from .keymap import Directory
from .layout import Held, to_note
from .session import Letter
from .snapshot import State


def save(found: Sequence[State], path: str, kind: Kind) -> None:
    """Write what all servers hold.

    Args:
        found: of each server, at one moment.
        path, kind: as for ``checkpoint.save``.

    Raises:
        CheckpointError: it cannot be written.
    """
    pieces: dict[Key, list[Entry]] = {}
    held: dict[Key, Held] = {}
    for state in found:
        held.update(state.held)
        for entry in state.contents.entries:
            pieces.setdefault(entry.key, []).append(entry)
    # A key is there when every piece of it is.
    keys = [key for key in sorted(pieces, key=lambda key: held[key].order) if len(pieces[key]) == len(held[key].pieces)]
    rule = _joined_rule([state.contents for state in found])
    body, tensors = manifest.describe(kind, [_whole(held[key], pieces[key]) for key in keys], rule)
    checkpoint.write(path, body, tensors)


def load(path: str, kind: Kind, directory: Directory, num_servers: int) -> list[Letter]:
    """Read a checkpoint and return what each server is to become.

    Raises:
        CheckpointError: nothing that ``save`` wrote, or it does not fit.
    """
    contents = checkpoint.read(path)
    if contents.kind != kind:
        raise CheckpointError(f"{path}: holds {contents.kind}, expected {kind}; save and load with the same pair")
    rule: Rule = contents.rule or directory.rule
    if kind == "optimizer-states":
        manifest.check_held(contents, {key: directory.entry("load", key) for key in directory.names()})
    manifest.check_states(contents)
    entries = contents.entries
    if kind == "optimizer-states":
        held = [directory.find("load", entry.key) for entry in entries]
    else:
        held = directory.place([e.key for e in entries], [e.spec for e in entries], rule=rule, anew=True)
    letters = []
    for server in range(num_servers):
        mine, notes = [], {}
        for entry, each in zip(entries, held, strict=True):
            piece = _piece(entry, each, server)
            if piece is not None:
                mine.append(piece)
                notes[json.dumps(entry.key)] = to_note(each)
        body, tensors = manifest.describe(kind, mine, _own_rule(rule, {entry.key for entry in mine}))
        items = [Item(name, "tensor", tensor) for name, tensor in tensors.items()]
        letters.append(letter_of(server, {"body": body, "notes": notes}, pack(items)))
    return letters


def _whole(held: Held, pieces: Sequence[Entry]) -> Entry:
    """Put the pieces of a key together, which come in the order of their rows."""
    first = pieces[0]
    if len(pieces) == 1:
        return replace(first, spec=held.spec)
    if isinstance(first.value, Table):
        table = Table(held.spec.shape[0], held.spec.shape[1:], held.spec.dtype)
        for piece in pieces:
            if isinstance(piece.value, Table):
                table.write(piece.value.ids, piece.value.read(piece.value.ids))
                table.take_columns(piece.value)
        return replace(first, spec=held.spec, value=table)
    value = torch.cat([piece.value for piece in pieces])  # type: ignore[misc]
    state = {}
    for name, tensor in first.state.items():
        divided = tensor.shape == first.spec.shape
        state[name] = torch.cat([piece.state[name] for piece in pieces]) if divided else tensor
    return replace(first, spec=held.spec, value=value, state=state)


def _piece(entry: Entry, held: Held, server: int) -> Entry | None:
    """Return what of a key a server is to have."""
    for owner, start, stop in held.pieces:
        if owner != server:
            continue
        value = entry.value
        if isinstance(value, Table):
            return replace(entry, value=_rows_of(value, server, len(held.pieces)))
        if len(held.pieces) == 1:
            return entry
        shape = held.shape(start, stop)
        state = {name: t[start:stop] if t.shape == held.spec.shape else t for name, t in entry.state.items()}
        return replace(entry, spec=replace(entry.spec, shape=shape), value=value[start:stop], state=state)
    return None


def _rows_of(table: Table, server: int, servers: int) -> Table:
    mine = table.ids[table.ids % servers == server]
    part = Table(table.num_rows, table.row_shape, table.dtype)
    part.write(mine, table.read(mine))
    for name in table.columns:
        part.add_column(name, table.dtype, table.fill(name))
        part.write(mine, table.read(mine, name), name)
    return part


def _joined_rule(found: Sequence[Contents]) -> Rule:
    """Return the rule, with the numbers of single keys that each server has for its own."""
    rule = found[0].rule
    if not isinstance(rule, StepOptimizer):
        return Assign()
    overrides: dict[Key, Any] = {}
    for contents in found:
        if isinstance(contents.rule, StepOptimizer):
            overrides.update(contents.rule.optimizer.spec.overrides)
    return StepOptimizer(replace(rule.optimizer.spec, overrides=overrides))


def _own_rule(rule: Rule, keys: set[Key]) -> Rule:
    if not isinstance(rule, StepOptimizer):
        return rule
    spec = rule.optimizer.spec
    own = {key: numbers for key, numbers in spec.overrides.items() if key in keys}
    return StepOptimizer(replace(spec, overrides=own))
