"""The metadata of the keys that servers hold, as one client knows it; it asks the servers when it misses a key."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tensorkv.arrays.arguments import Key
from tensorkv.arrays.spec import KeySpec, numbered
from tensorkv.engines.partition import lightest, pieces
from tensorkv.runtime import shield
from tensorkv.shard.optimizers import ROWWISE, OptimizerSpec
from tensorkv.shard.rules import Assign, Rule, StepOptimizer

from .layout import KeyPlacement, Layout, PlacedKey, PlacedKeys

Ask = Callable[[Sequence[Any]], Sequence[Mapping[str, Any]]]
"""Asks every server for its keys, unless they are those of this client's last listing, and for the rule."""


class Listing(NamedTuple):
    """The keys of one server.

    Args:
        changes: what differs when the server has other keys (None: nothing is known).
        placed: its keys.
    """

    changes: Any
    placed: dict[Key, PlacedKey]

    @classmethod
    def from_reply(cls, reply: Mapping[str, Any]) -> Listing:
        """Return the listing of a reply to ``ListKeys``; keys of one kind share their placement."""
        kinds = [KeyPlacement.from_metadata(kind) for kind in reply["kinds"]]
        columns = zip(reply["keys"], reply["indices"], reply["orders"], strict=True)
        return cls(reply.get("changes"), {key: PlacedKey(kinds[index], order) for key, index, order in columns})


def join_listings(listings: Sequence[Listing], into: PlacedKeys) -> list[Key]:
    """Put the keys of which all pieces exist into ``into``, in the order of init; return the others.

    Args:
        listings: of each server.
        into: an empty table.
    """
    found: dict[Key, PlacedKey] = {}
    for listing in listings:
        found.update(listing.placed)
    others = []
    for key, each in sorted(found.items(), key=lambda item: item[1].order):
        if all(key in listings[server].placed for server in each.placement.servers):
            into[key] = each
        else:
            others.append(key)
    return others


class KeyMap:
    """Keys, their placements, and the rule.

    Args:
        weights: of each server over which keys lie, how much it can hold, compared with the others.
        ask: asks every server for its keys.
        wide: whether sums travel in the dtype in which they are made.
        pull_dtype: of this client.
    """

    def __init__(self, weights: Sequence[int], ask: Ask, *, wide: bool, pull_dtype: str | None) -> None:
        self._weights, self._ask, self._wide = weights, ask, wide
        self._lock = threading.RLock()
        self._asked = self._answered = self._ruled = 0
        self._listings = [Listing(None, {})] * len(weights)
        self._incomplete: dict[Key, set[int]] = {}
        self.placed = PlacedKeys(wide=wide, pull_dtype=pull_dtype)
        """The keys, as of the last refresh."""
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
            if number > self._ruled:
                # ``add`` and ``remove`` know no rule.
                self._ruled = number
                self._take_rule(replies)
            if number < self._answered:
                # Another thread has asked later and was answered earlier.
                return
            self._answered = number
            if any(mine is not theirs for mine, theirs in zip(listings, self._listings, strict=True)):
                self._listings = listings
                self._join(listings)

    def add(self, keys: Sequence[Key], placed: Sequence[PlacedKey], replies: Mapping[int, Mapping[str, Any]]) -> bool:
        """Take over keys that this client has created.

        Args:
            keys, placed: the new keys.
            replies: of each server to its ``Init``.

        Returns:
            Whether nothing else has changed since the last refresh; False: nothing was done.
        """
        with self._lock:
            listings = self._changed(replies)
            if listings is None:
                return False
            new = dict(zip(keys, placed, strict=True))
            for server in replies:
                listings[server].placed.update(
                    (key, each) for key, each in new.items() if server in each.placement.servers
                )
            self._take(listings, self.placed.extended(new))
            return True

    def remove(self, keys: Sequence[Key], replies: Mapping[int, Mapping[str, Any]]) -> bool:
        """Forget keys that this client has deleted; the rest is as for ``add``."""
        with self._lock:
            listings = self._changed(replies)
            if listings is None:
                return False
            for server in replies:
                for key in keys:
                    listings[server].placed.pop(key, None)
            self._take(listings, self.placed.without(keys))
            return True

    def _changed(self, replies: Mapping[int, Mapping[str, Any]]) -> list[Listing] | None:
        """Return the listings to be changed as servers say that they have; None: others have changed them, too.

        So no server is asked, and one key costs little, however many there are.
        """
        listings = list(self._listings)
        for server, reply in replies.items():
            changes, before = listings[server]
            if changes is None or reply.get("before") != changes:
                return None
            listings[server] = Listing(reply["changes"], dict(before))
        return listings

    def _take(self, listings: list[Listing], placed: PlacedKeys) -> None:
        # What a refresh that is under way has been told of keys may be older.
        self._asked += 1
        self._answered, self._listings, self.placed = self._asked, listings, placed

    def _join(self, listings: Sequence[Listing]) -> None:
        """Take over the keys that servers have listed."""
        placed = PlacedKeys(wide=self._wide, pull_dtype=self.placed.pull_dtype)
        self._incomplete = {
            key: {server for server, listing in enumerate(listings) if key in listing.placed}
            for key in join_listings(listings, placed)
        }
        self.placed = placed

    def _take_rule(self, replies: Sequence[Mapping[str, Any]]) -> None:
        """Take over the rule that servers have listed."""
        described = replies[0]["optimizer"]
        if described is not None:
            # Each server has the overrides of its own keys.
            optimizers = [reply["optimizer"] for reply in replies if reply["optimizer"] is not None]
            described = {**described, "overrides": [own for each in optimizers for own in each["overrides"]]}
        spec, mine = None if described is None else OptimizerSpec.from_json(described), self.optimizer
        if (None if mine is None else mine.to_json()) != (None if spec is None else spec.to_json()):
            self.rule = Assign() if spec is None else StepOptimizer(spec)

    @property
    def optimizer(self) -> OptimizerSpec | None:
        """The optimizer, as of the last refresh."""
        return self.rule.optimizer.spec if isinstance(self.rule, StepOptimizer) else None

    # ------------------------------------------------------------ keys

    def __iter__(self) -> Iterator[Key]:
        """Iterate over the keys in the order of init, as of the last refresh."""
        return iter(self.placed)

    def __contains__(self, key: object) -> bool:
        return key in self.placed

    def find(self, verb: str, key: Key) -> KeyPlacement:
        """Return the placement of a key; refresh if the key is unknown.

        Raises:
            KeyNotFoundError, KeyTypeError: no server has it.
        """
        if key not in self.placed:
            self.refresh()
        return self.placed.find(verb, key).placement

    def having(self, verb: str, keys: Sequence[Key]) -> PlacedKeys:
        """Return the table of all keys, which contains these; refresh if one is unknown, and raise as ``find``."""
        placed = self.placed
        if not all(map(placed.__contains__, keys)):
            self.refresh()
            placed = self.placed
            for key in keys:
                placed.find(verb, key)
        return placed

    def by_server(self, verb: str, keys: Sequence[Key]) -> dict[int, list[Key]]:
        """Return, by server, those of the keys of which it holds a piece; raise as ``find``."""
        found: dict[int, list[Key]] = {}
        for key in keys:
            for server in self.find(verb, key).servers:
                found.setdefault(server, []).append(key)
        return dict(sorted(found.items()))

    def incomplete(self, keys: Sequence[Key]) -> dict[int, list[Key]]:
        """Return, by server, those of the keys that are on it but lack pieces on other servers."""
        found: dict[int, list[Key]] = {}
        for key in keys:
            for server in self._incomplete.get(key, ()):
                found.setdefault(server, []).append(key)
        return found

    def check_new(self, keys: Sequence[Key]) -> None:
        """Raise if a key cannot be initialised."""
        self.placed.check_new(keys)

    # ------------------------------------------------------------ placements and layouts

    def place(
        self, keys: Sequence[Key], specs: Sequence[KeySpec], *, rule: Rule | None = None, replace: bool = False
    ) -> list[PlacedKey]:
        """Choose the servers of new keys, the largest first.

        Args:
            keys, specs: of the new keys.
            rule: that is going to be in force (None: the present one).
            replace: whether the new keys replace all present ones.
        """
        loads, order = [0] * len(self._weights), 0
        if not replace:
            present = self.placed.loads
            loads, order = [present[server] for server in range(len(loads))], self.placed.next_order
        rule = rule or self.rule
        whole = isinstance(rule, StepOptimizer) and rule.optimizer.spec.name not in ROWWISE
        made: dict[int, PlacedKey] = {}
        objects, numbers = numbered(specs)
        first: dict[KeySpec, int] = {}
        equal = [first.setdefault(spec, number) for number, spec in enumerate(objects)]
        placements: dict[tuple[int, int], KeyPlacement] = {}
        sizes = [_nbytes(spec) for spec in specs]
        for index in sorted(range(len(keys)), key=sizes.__getitem__, reverse=True):
            spec = specs[index]
            kind = equal[numbers[index]], lightest(loads, self._weights)
            placement = placements.get(kind)
            if placement is None:
                if spec.is_table:
                    # Rows are placed by their ids, so that the most popular ones are spread over servers.
                    where = [(server, 0, spec.shape[0]) for server in range(len(loads))]
                else:
                    where = pieces(spec.shape, loads, whole=whole, weights=self._weights)
                placement = placements[kind] = KeyPlacement(spec, where)
            made[index] = PlacedKey(placement, order + index)
            for server, nbytes in placement.loads:
                loads[server] += nbytes
        return [made[index] for index in range(len(keys))]

    def layout(self, verb: str, keys: Sequence[Key]) -> Layout:
        """Return the layout of a list of keys."""
        return self.having(verb, keys).layout(keys)


def _nbytes(spec: KeySpec) -> int:
    return 0 if spec.is_table else spec.shape.numel() * spec.dtype.itemsize
