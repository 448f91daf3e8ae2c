"""Directory: what a client knows of the keys that servers hold. Servers know more; it asks when it misses one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tensorkv.arrays.arguments import Key
from tensorkv.arrays.spec import KeySpec
from tensorkv.engines.partition import pieces
from tensorkv.errors import KeyExistsError, KeyTypeError, no_such_key, quote
from tensorkv.runtime import shield
from tensorkv.shard.entry import Entry
from tensorkv.shard.optimizers import ROWWISE, OptimizerSpec
from tensorkv.shard.rules import Assign, Rule, StepOptimizer
from tensorkv.shard.table import Table

from .layout import Held, Route, from_note

_REMEMBERED_ROUTES = 256


class Directory:
    """Keys, where their pieces are, and the rule.

    Args:
        num_servers: over which keys lie.
        ask: returns each server's listing.
        wide: whether sums travel in the dtype in which they are made.
    """

    def __init__(self, num_servers: int, ask: Callable[[], Sequence[Mapping[str, Any]]], *, wide: bool) -> None:
        self._num_servers, self._ask, self._wide = num_servers, ask, wide
        self._lock = threading.RLock()
        self._held: dict[Key, Held] = {}
        self._asked = self._heard = 0
        self._halves: dict[Key, set[int]] = {}
        self._entries: dict[Key, Entry] = {}
        self._routes: dict[tuple[Key, ...], Route] = {}
        self.rule: Rule = Assign()

    def refresh(self, ask: Callable[[], Sequence[Mapping[str, Any]]] | None = None) -> None:
        """Learn what the servers have now; ``ask`` is another way to ask them."""
        shield.run(self._refresh, ask)

    def _refresh(self, ask: Callable[[], Sequence[Mapping[str, Any]]] | None) -> None:
        with self._lock:
            self._asked += 1
            number = self._asked
        listings = (ask or self._ask)()
        notes: dict[Key, Any] = {}
        found: dict[Key, set[int]] = {}
        for server, listing in enumerate(listings):
            for key, note, _, _ in listing["keys"]:
                notes[key] = note
                found.setdefault(key, set()).add(server)
        with self._lock:
            if number < self._heard:
                # Somebody has asked later, and heard sooner.
                return
            self._heard = number
            old, new, halves = self._held, {}, {}
            for key in sorted(notes, key=lambda key: notes[key]["order"]):
                held = from_note(notes[key])
                # A key is there when every piece of it is.
                if found[key] >= set(held.servers):
                    new[key] = old[key] if old.get(key) == held else held
                else:
                    halves[key] = found[key]
            # Others read them meanwhile: they are replaced, not changed.
            self._held, self._halves = new, halves
            if new != old:
                self._routes = {}
            self._entries = {key: each for key, each in self._entries.copy().items() if new.get(key) is old.get(key)}
            described = listings[0]["optimizer"]
            if described is not None:
                # Each server has the numbers of its own keys.
                optimizers = [listing["optimizer"] for listing in listings if listing["optimizer"] is not None]
                described = {**described, "overrides": [own for each in optimizers for own in each["overrides"]]}
            self._take_rule(None if described is None else OptimizerSpec.from_json(described))

    def _take_rule(self, spec: OptimizerSpec | None) -> None:
        mine = self.optimizer
        if (None if mine is None else mine.to_json()) != (None if spec is None else spec.to_json()):
            self.rule = Assign() if spec is None else StepOptimizer(spec)

    @property
    def optimizer(self) -> OptimizerSpec | None:
        """The optimizer, as far as it is known here."""
        return self.rule.optimizer.spec if isinstance(self.rule, StepOptimizer) else None

    # ------------------------------------------------------------ keys

    def names(self) -> list[Key]:
        """Every key that is known, in the order of init."""
        return list(self._held)

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def find(self, verb: str, key: Key) -> Held:
        """Return where a key is, asking the servers if it is not known.

        Raises:
            KeyNotFoundError, KeyTypeError: no server has it.
        """
        held = self._held.get(key)
        if held is None:
            self.refresh()
            held = self._held.get(key)
        if held is None:
            self._check_key_type(verb, key)
            raise no_such_key(verb, key, self._held)
        return held

    def entry(self, verb: str, key: Key) -> Entry:
        """Return an entry without numbers, for checks."""
        held = self.find(verb, key)
        entry = self._entries.get(key)
        if entry is None:
            spec = held.spec
            value: torch.Tensor | Table
            if spec.is_table:
                value = Table(spec.shape[0], spec.shape[1:], spec.dtype)
            else:
                value = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            entry = self._entries[key] = Entry(key, spec, value)
        return entry

    def leftovers(self, keys: Sequence[Key]) -> dict[int, list[Key]]:
        """Return the servers that have pieces of keys of which others are missing."""
        found: dict[int, list[Key]] = {}
        for key in keys:
            for server in self._halves.get(key, ()):
                found.setdefault(server, []).append(key)
        return found

    def check_new(self, keys: Sequence[Key]) -> None:
        """Raise if a key cannot be initialised."""
        for key in keys:
            self._check_key_type("init", key)
            if key in self._held:
                raise KeyExistsError(f"init({quote(key)}): the key exists; push to it, or delete it first")

    def _check_key_type(self, verb: str, key: Key) -> None:
        first = next(iter(self._held), key)
        if type(first) is not type(key):
            raise KeyTypeError(
                f"{verb}({quote(key)}): this store's keys are {type(first).__name__}, got {type(key).__name__}; "
                "one store has one key type, fixed by its first init"
            )

    # ------------------------------------------------------------ places

    def place(
        self, keys: Sequence[Key], specs: Sequence[KeySpec], *, rule: Rule | None = None, anew: bool = False
    ) -> list[Held]:
        """Return where new keys go; the largest choose first.

        Args:
            keys, specs: of the new keys.
            rule: that is going to be in force (None: the present one).
            anew: whether they replace all that there are.
        """
        loads = [0] * self._num_servers
        present = [] if anew else list(self._held.values())
        for held in present:
            _load(loads, held)
        rule = rule or self.rule
        whole = isinstance(rule, StepOptimizer) and rule.optimizer.spec.name not in ROWWISE
        order = 1 + max((held.order for held in present), default=-1)
        made: dict[int, Held] = {}
        for index in sorted(range(len(keys)), key=lambda i: -_nbytes(specs[i])):
            shape = specs[index].shape
            if specs[index].is_table:
                # Rows go by their ids, so that those that are asked for most are spread.
                where = [(server, 0, shape[0]) for server in range(self._num_servers)]
            else:
                where = pieces(shape, loads, whole=whole)
            made[index] = Held(specs[index], where, order + index)
            _load(loads, made[index])
        return [made[index] for index in range(len(keys))]

    def known_route(self, keys: Sequence[Key]) -> Route | None:
        """Return how these keys lie over servers, if that was asked for before."""
        return self._routes.get(tuple(keys))

    def route(self, verb: str, keys: Sequence[Key]) -> Route:
        """Return how these keys lie over servers."""
        # Those of keys that change meanwhile go with the dict that they are put into.
        called, routes = tuple(keys), self._routes
        route = routes.get(called)
        if route is None:
            route = Route(keys, [self.find(verb, key) for key in keys], wide=self._wide)
            if len(routes) >= _REMEMBERED_ROUTES:
                routes.clear()
            routes[called] = route
        return route


def _nbytes(spec: KeySpec) -> int:
    return 0 if spec.is_table else spec.shape.numel() * spec.dtype.itemsize


def _load(loads: list[int], held: Held) -> None:
    if not held.spec.is_table:
        for server, start, stop in held.pieces:
            loads[server] += held.shape(start, stop).numel() * held.spec.dtype.itemsize
