"""The metadata of the keys that servers hold, as one client knows it; it asks the servers when it misses a key."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from tensorkv.arrays.arguments import Key
from tensorkv.arrays.keytable import KeyTable
from tensorkv.arrays.spec import KeySpec
from tensorkv.engines.partition import pieces
from tensorkv.runtime import shield
from tensorkv.shard.entry import Entry
from tensorkv.shard.optimizers import ROWWISE, OptimizerSpec
from tensorkv.shard.rules import Assign, Rule, StepOptimizer
from tensorkv.shard.table import Table

from .layout import KeyPlacement, Layout

_CACHED_LAYOUTS = 256

Ask = Callable[[Sequence[Any]], Sequence[Mapping[str, Any]]]
"""Asks every server for its keys, unless they are those of this client's last listing, and for the rule."""


class Listing(NamedTuple):
    """The keys of one server.

    Args:
        changes: what differs when the server has other keys (None: nothing is known).
        placements: of its keys.
    """

    changes: Any
    placements: dict[Key, KeyPlacement]

    @classmethod
    def from_reply(cls, reply: Mapping[str, Any]) -> Listing:
        """Return the listing of a reply to ``ListKeys``; keys of one kind share their spec and pieces."""
        kinds = [KeyPlacement.from_metadata({**kind, "order": 0}) for kind in reply["kinds"]]
        placements = {}
        for key, index, order in zip(reply["keys"], reply["indices"], reply["orders"], strict=True):
            kind = kinds[index]
            placements[key] = KeyPlacement(kind.spec, kind.pieces, order)
        return cls(reply["changes"], placements)


class KeyMap:
    """Keys, their placements, and the rule.

    Args:
        num_servers: over which keys lie.
        ask: asks every server for its keys.
        wide: whether sums travel in the dtype in which they are made.
    """

    def __init__(self, num_servers: int, ask: Ask, *, wide: bool) -> None:
        self._num_servers, self._ask, self._wide = num_servers, ask, wide
        self._lock = threading.RLock()
        self._placements: KeyTable[KeyPlacement] = KeyTable()
        self._asked = self._answered = 0
        self._listings = [Listing(None, {})] * num_servers
        self._incomplete: dict[Key, set[int]] = {}
        self._entries: dict[Key, Entry] = {}
        self._layouts: dict[tuple[Key, ...], Layout] = {}
        self.rule: Rule = Assign()

    def refresh(self, ask: Ask | None = None) -> None:
        """Ask the servers which keys there are, and for the rule.

        Args:
            ask: asks in another way.
        """
        shield.run(self._refresh, ask or self._ask)

    def _refresh(self, ask: Ask) -> None:
        with self._lock:
            self._asked += 1
            number, known = self._asked, self._listings
        replies = ask([listing.changes for listing in known])
        listings = [
            Listing.from_reply(reply) if "keys" in reply else before
            for reply, before in zip(replies, known, strict=True)
        ]
        with self._lock:
            if number < self._answered:
                # Another thread has asked later and was answered earlier.
                return
            self._answered = number
            if any(mine is not theirs for mine, theirs in zip(listings, self._listings, strict=True)):
                self._listings = listings
                self._join(listings)
            described = replies[0]["optimizer"]
            if described is not None:
                # Each server has the overrides of its own keys.
                optimizers = [reply["optimizer"] for reply in replies if reply["optimizer"] is not None]
                described = {**described, "overrides": [own for each in optimizers for own in each["overrides"]]}
            self._set_rule(None if described is None else OptimizerSpec.from_json(described))

    def _join(self, listings: Sequence[Listing]) -> None:
        """Take over the keys that servers have listed."""
        placements: dict[Key, KeyPlacement] = {}
        found: dict[Key, set[int]] = {}
        for server, listing in enumerate(listings):
            placements.update(listing.placements)
            for key in listing.placements:
                found.setdefault(key, set()).add(server)
        old, new, incomplete = self._placements, KeyTable[KeyPlacement](), {}
        for key, placement in sorted(placements.items(), key=lambda item: item[1].order):
            # A key exists when all of its pieces do.
            if found[key].issuperset(placement.servers):
                before = old.get(key)
                new[key] = before if before is not None and before == placement else placement
            else:
                incomplete[key] = found[key]
        # Other threads read these without the lock: they are replaced, not changed.
        self._placements, self._incomplete = new, incomplete
        if new != old:
            self._layouts = {}
        self._entries = {key: each for key, each in self._entries.copy().items() if new.get(key) is old.get(key)}

    def _set_rule(self, spec: OptimizerSpec | None) -> None:
        mine = self.optimizer
        if (None if mine is None else mine.to_json()) != (None if spec is None else spec.to_json()):
            self.rule = Assign() if spec is None else StepOptimizer(spec)

    @property
    def optimizer(self) -> OptimizerSpec | None:
        """The optimizer, as of the last refresh."""
        return self.rule.optimizer.spec if isinstance(self.rule, StepOptimizer) else None

    # ------------------------------------------------------------ keys

    def __iter__(self) -> Iterator[Key]:
        """Iterate over the keys in the order of init, as of the last refresh."""
        return iter(self._placements)

    def __contains__(self, key: object) -> bool:
        return key in self._placements

    def find(self, verb: str, key: Key) -> KeyPlacement:
        """Return the placement of a key; refresh if the key is unknown.

        Raises:
            KeyNotFoundError, KeyTypeError: no server has it.
        """
        if key not in self._placements:
            self.refresh()
        return self._placements.find(verb, key)

    def entry(self, verb: str, key: Key) -> Entry:
        """Return an entry without values, for checks."""
        placement = self.find(verb, key)
        entry = self._entries.get(key)
        if entry is None:
            spec = placement.spec
            value: torch.Tensor | Table
            if spec.is_table:
                value = Table(spec.shape[0], spec.shape[1:], spec.dtype)
            else:
                value = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            entry = self._entries[key] = Entry(key, spec, value)
        return entry

    def incomplete(self, keys: Sequence[Key]) -> dict[int, list[Key]]:
        """Return, by server, those of some keys of which other servers lack their pieces."""
        found: dict[int, list[Key]] = {}
        for key in keys:
            for server in self._incomplete.get(key, ()):
                found.setdefault(server, []).append(key)
        return found

    def check_new(self, keys: Sequence[Key]) -> None:
        """Raise if a key cannot be initialised."""
        self._placements.check_new(keys)

    # ------------------------------------------------------------ placements and layouts

    def place(
        self, keys: Sequence[Key], specs: Sequence[KeySpec], *, rule: Rule | None = None, replace: bool = False
    ) -> list[KeyPlacement]:
        """Choose the servers of new keys, the largest first.

        Args:
            keys, specs: of the new keys.
            rule: that is going to be in force (None: the present one).
            replace: whether the new keys replace all present ones.
        """
        loads = [0] * self._num_servers
        present = [] if replace else list(self._placements.values())
        for placement in present:
            _add_load(loads, placement)
        rule = rule or self.rule
        whole = isinstance(rule, StepOptimizer) and rule.optimizer.spec.name not in ROWWISE
        order = 1 + max((placement.order for placement in present), default=-1)
        made: dict[int, KeyPlacement] = {}
        for index in sorted(range(len(keys)), key=lambda i: -_nbytes(specs[i])):
            shape = specs[index].shape
            if specs[index].is_table:
                # Rows are placed by their ids, so that the most popular ones are spread over servers.
                where = [(server, 0, shape[0]) for server in range(self._num_servers)]
            else:
                where = pieces(shape, loads, whole=whole)
            made[index] = KeyPlacement(specs[index], where, order + index)
            _add_load(loads, made[index])
        return [made[index] for index in range(len(keys))]

    def cached_layout(self, keys: Sequence[Key]) -> Layout | None:
        """Return the layout of a list of keys, if it was asked for before."""
        return self._layouts.get(tuple(keys))

    def layout(self, verb: str, keys: Sequence[Key]) -> Layout:
        """Return the layout of a list of keys."""
        # If keys change in the meantime, this dict has been replaced, and the layout is dropped with it.
        called, layouts = tuple(keys), self._layouts
        layout = layouts.get(called)
        if layout is None:
            layout = Layout(keys, [self.find(verb, key) for key in keys], wide=self._wide)
            if len(layouts) >= _CACHED_LAYOUTS:
                layouts.clear()
            layouts[called] = layout
        return layout


def _nbytes(spec: KeySpec) -> int:
    return 0 if spec.is_table else spec.shape.numel() * spec.dtype.itemsize


def _add_load(loads: list[int], placement: KeyPlacement) -> None:
    if not placement.spec.is_table:
        for server, start, stop in placement.pieces:
            loads[server] += placement.shape(start, stop).numel() * placement.spec.dtype.itemsize
