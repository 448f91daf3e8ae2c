"""Checkpoints of a store on servers, in the format of every store: pieces are joined on save, and cut on load."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from tensorkv.arrays.arguments import Key
from tensorkv.arrays.packing import Item, pack
from tensorkv.engines.partition import part_of
from tensorkv.errors import SnapshotError, quote
from tensorkv.shard.entry import Entry, FrozenEntry
from tensorkv.shard.releases import SavedRelease, SavedReleases
from tensorkv.shard.rules import Assign, Rule, StepOptimizer
from tensorkv.shard.table import Table
from tensorkv.storage import manifest
from tensorkv.storage.manifest import Contents

from ..messages import Restore
from .keymap import KeyMap
from .layout import KeyPlacement, PlacedKey
from .session import ServerRequest
from .snapshot import ServerContents


def gather(found: Sequence[ServerContents]) -> Contents:
    """Return what all servers hold together.

    Args:
        found: of each server, in one snapshot.
    """
    pieces: dict[Key, list[Entry]] = {}
    placed: dict[Key, PlacedKey] = {}
    for server in found:
        placed.update(server.placed)
        for entry in server.contents.entries:
            pieces.setdefault(entry.key, []).append(entry)
    # A key exists when all of its pieces do.
    complete = [key for key in pieces if len(pieces[key]) == len(placed[key].placement.pieces)]
    keys = sorted(complete, key=lambda key: placed[key].order)
    rule = _joined_rule([server.contents for server in found])
    entries = {key: _join(placed[key].placement, pieces[key]) for key in keys}
    return Contents("store", list(entries.values()), rule, releases=_gather_releases(found, entries))


def _gather_releases(found: Sequence[ServerContents], present: Mapping[Key, Entry]) -> SavedReleases | None:
    """Return the releases of which all servers hold pieces; those there are, the first server knows.

    Args:
        found: of each server, in one snapshot.
        present: the values that were joined.

    Raises:
        SnapshotError: a server does not hold one of them.
    """
    told = [server.contents.releases for server in found]
    if any(each is None for each in told):
        return None
    by_name = [{(each.name, each.number): each for each in own.held} for own in told if own is not None]
    joined: dict[tuple[int, ...], Entry] = {}
    held = []
    for name, number in by_name[0]:
        pieces: dict[Key, list[tuple[PlacedKey, Entry]]] = {}
        for index, (server, releases) in enumerate(zip(found, by_name, strict=True)):
            if (name, number) not in releases:
                raise SnapshotError(f"save: server {index} does not hold the release {quote(name)}; save again")
            for piece in releases[name, number].entries:
                is_copy = isinstance(piece, FrozenEntry)
                placed = PlacedKey.from_metadata(piece.note) if is_copy else server.placed[piece.key]  # type: ignore[attr-defined]
                pieces.setdefault(piece.key, []).append((placed, piece))
        # A key exists when all of its pieces do.
        whole = [own for own in pieces.values() if len(own) == len(own[0][0].placement.pieces)]
        entries = []
        for own in sorted(whole, key=lambda own: own[0][0].order):
            parts = [piece for _, piece in own]
            if not any(isinstance(piece, FrozenEntry) for piece in parts):
                entries.append(present[parts[0].key])
                continue
            place = tuple(map(id, parts))
            if place not in joined:
                joined[place] = FrozenEntry(_join(own[0][0].placement, [piece.copy(state={}) for piece in parts]))
            entries.append(joined[place])
        held.append(SavedRelease(name, number, entries))
    return SavedReleases({} if told[0] is None else told[0].numbers, held)


def scatter(contents: Contents, keymap: KeyMap, num_servers: int) -> list[ServerRequest]:
    """Return the requests that give each server its part of contents.

    Raises:
        CheckpointError: they do not fit.
    """
    kind, entries = contents.kind, contents.entries
    rule: Rule = contents.rule or keymap.rule
    manifest.check_fits(contents, {key: keymap.placed.entry(key) for key in keymap})
    if kind == "store":
        placed = keymap.place([e.key for e in entries], [e.spec for e in entries], rule=rule, replace=True)
    else:
        held = keymap.having("load", [entry.key for entry in entries])
        placed = [held[entry.key] for entry in entries]
    copies = _place_copies(contents, dict(zip([entry.key for entry in entries], placed, strict=True)), keymap)
    requests = []
    # Of all servers: what was open before is not taken for a release of the same name.
    releases = contents.releases and replace(contents.releases, generation=secrets.token_hex(8))
    for server in range(num_servers):
        mine, metadata, pieces = [], {}, dict[int, Entry]()
        for entry, each in zip(entries, placed, strict=True):
            piece = _piece(entry, each.placement, server)
            if piece is not None:
                mine.append(piece)
                if kind == "store":
                    metadata[json.dumps(entry.key)] = each.to_metadata()
                pieces[id(entry)] = piece
        for copy, each in copies:
            piece = _piece(copy, each.placement, server)
            if piece is not None:
                pieces[id(copy)] = frozen = FrozenEntry(piece)
                frozen.note = each.to_metadata()
        # Beside the keys that it has, a server may have numbers for others of its own.
        own_rule = rule if kind == "keys" else _own_rule(rule, {entry.key for entry in mine})
        own_releases = _pieces_of(releases, pieces)
        body, tensors = manifest.describe(kind, mine, own_rule, releases=own_releases)
        items = [Item(name, "tensor", tensor) for name, tensor in tensors.items()]
        requests.append(ServerRequest.of_tensors(server, Restore(body=body, metadata=metadata), pack(items)))
    return requests


def _place_copies(
    contents: Contents, placed: Mapping[Key, PlacedKey], keymap: KeyMap
) -> list[tuple[FrozenEntry, PlacedKey]]:
    """Return where the values lie that only releases have: where the present value of the key does, if it is alike."""
    held = () if contents.releases is None else contents.releases.held
    copies = {id(each): each for own in held for each in own.entries if isinstance(each, FrozenEntry)}
    where: dict[tuple[Key, torch.Size, torch.dtype, bool], PlacedKey] = {
        (key, each.spec.shape, each.spec.dtype, each.spec.is_table): each for key, each in placed.items()
    }
    kinds = {(each.key, each.spec.shape, each.spec.dtype, each.spec.is_table): each.spec for each in copies.values()}
    others = [kind for kind in kinds if kind not in where]
    found = keymap.place([kind[0] for kind in others], [kinds[kind] for kind in others], rule=Assign(), replace=True)
    # After the present keys.
    where |= {
        kind: PlacedKey(each.placement, len(placed) + each.order) for kind, each in zip(others, found, strict=True)
    }
    return [(each, where[each.key, each.spec.shape, each.spec.dtype, each.spec.is_table]) for each in copies.values()]


def _pieces_of(releases: SavedReleases | None, pieces: Mapping[int, Entry]) -> SavedReleases | None:
    """Return what one server holds of releases.

    Args:
        releases: of whole values.
        pieces: of the server, by the identity of the whole entry.
    """
    if releases is None:
        return None
    held = [
        replace(each, entries=[pieces[id(entry)] for entry in each.entries if id(entry) in pieces])
        for each in releases.held
    ]
    return replace(releases, held=held)


def _join(placement: KeyPlacement, pieces: Sequence[Entry]) -> Entry:
    """Join the pieces of a key, which are in the order of their rows."""
    first = pieces[0]
    if len(pieces) == 1:
        return first.copy(spec=placement.spec)
    if isinstance(first.value, Table):
        table = first.value.empty()
        for piece in pieces:
            if isinstance(piece.value, Table):
                table.write(piece.value.ids, piece.value.read(piece.value.ids))
                table.take_columns(piece.value)
        return first.copy(spec=placement.spec, value=table)
    value = torch.cat([piece.value for piece in pieces])  # type: ignore[misc]
    state = {}
    for name, tensor in first.state.items():
        divided = tensor.shape == first.spec.shape
        state[name] = torch.cat([piece.state[name] for piece in pieces]) if divided else tensor
    return first.copy(spec=placement.spec, value=value, state=state)


def _piece(entry: Entry, placement: KeyPlacement, server: int) -> Entry | None:
    """Return the piece of a key that a server holds, with its optimizer state."""
    piece, value = placement.piece_of(server), entry.value
    if piece is None:
        return None
    if isinstance(value, Table):
        return entry.copy(value=_rows_of(value, server, placement))
    if len(placement.pieces) == 1:
        return entry
    start, stop = piece
    shape = placement.shape(start, stop)
    state = {name: part_of(each, placement.spec.shape, start, stop) for name, each in entry.state.items()}
    return entry.copy(spec=replace(entry.spec, shape=shape), value=value[start:stop], state=state)


def _rows_of(table: Table, server: int, placement: KeyPlacement) -> Table:
    selected = placement.rows_of(server, table.ids)
    mine = table.ids[:0] if selected is None else selected[0]
    part = table.empty()
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
