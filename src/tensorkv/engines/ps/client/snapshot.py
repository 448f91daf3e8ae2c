"""Moments: all keys of all servers as they are at one moment, so that nobody sees half of an update."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from tensorkv.arrays.arguments import Key
from tensorkv.arrays.packing import unpack
from tensorkv.arrays.rows import Rows
from tensorkv.arrays.spec import KeySpec
from tensorkv.engines.base import Outs, Reader
from tensorkv.errors import KeyNotFoundError, SnapshotError, TensorKVError, quote
from tensorkv.storage import manifest
from tensorkv.storage.manifest import Contents

from .data import Traffic
from .layout import Held, from_note
from .session import Lanes, Letter


class State(NamedTuple):
    """What a server holds, and where the other pieces of its keys are."""

    contents: Contents
    held: dict[Key, Held]


class Moments:
    """What takes snapshots of a store.

    Args:
        lanes: to the servers.
        traffic: of this client.
        num_servers: how many there are.
    """

    def __init__(self, lanes: Lanes, traffic: Traffic, num_servers: int) -> None:
        self._lanes, self._traffic = lanes, traffic
        self._all = range(num_servers)
        self.abandoned: list[str] = []
        """Moments whose snapshot was dropped without ``close``."""

    def take(self) -> Moment:
        """Have every server hold what it has at one moment.

        Raises:
            SnapshotError: too many are held.
        """
        while self.abandoned:
            self.drop(self.abandoned.pop())
        name = secrets.token_hex(8)
        notes: dict[Key, Any] = {}
        versions: dict[Key, int] = {}
        pieces: dict[Key, int] = {}
        try:
            for head, _ in self._look({"view": name}):
                for key, version, note in head["keys"]:
                    notes[key] = note
                    versions.setdefault(key, version)
                    pieces[key] = pieces.get(key, 0) + 1
        except TensorKVError:
            self.drop(name)
            raise
        held = {key: from_note(notes[key]) for key in sorted(notes, key=lambda key: notes[key]["order"])}
        # A key is there when every piece of it is.
        held = {key: each for key, each in held.items() if pieces[key] == len(each.pieces)}
        return Moment(self, self._traffic, name, held, {key: versions[key] for key in held})

    def states(self) -> list[State]:
        """Return everything that each server holds, and how it lies over servers."""
        found = []
        for head, payload in self._look_again({"states": True}):
            items = unpack(head["layout"].encode(), payload.numpy().data)
            # Answers lie in memory that the next request uses.
            tensors = {str(item.key): item.tensor.clone() for item in items}
            held = {key: from_note(note) for key, note in head["notes"]}
            found.append(State(manifest.restore(head["body"], tensors), held))
        return found

    def drop(self, name: str) -> None:
        """Hold a moment no more."""
        with suppress(TensorKVError), self._lanes.take() as lane:
            lane.send("drop", [Letter(server, {"view": name}) for server in self._all])

    def _look_again(self, words: dict[str, Any]) -> list[tuple[dict[str, Any], torch.Tensor]]:
        """Look; once more where an answer was lost, or the servers did not stand still for long enough."""
        try:
            return self._look(words)
        except SnapshotError:
            return self._look(words)

    def _look(self, words: dict[str, Any]) -> list[tuple[dict[str, Any], torch.Tensor]]:
        """Stop every server at the same moment, and return what each answers."""
        with self._lanes.take() as lane:
            try:
                wanted: dict[str, list[Any]] = {}
                # The first decides between those who look at the same time: whoever stops it, stops the others.
                answers = lane.send("freeze", [Letter(0, {})])
                if len(self._all) > 1:
                    answers += lane.send("freeze", [Letter(server, {}) for server in self._all[1:]])
                for answer in answers:
                    for client, (seq, fan) in answer.head["fans"].items():
                        if seq > wanted.get(client, [0])[0]:
                            wanted[client] = [seq, fan]
                letters = [Letter(server, {**words, "wanted": wanted}) for server in self._all]
                return [(answer.head, answer.payload.clone()) for answer in lane.send("settle", letters)]
            except TensorKVError:
                with suppress(TensorKVError):
                    lane.send("thaw", [Letter(server, {}) for server in self._all])
                raise


class Moment(Reader):
    """The values of one moment, for reading; what an engine is to a store.

    Args:
        moments: that has taken it.
        traffic: to read by.
        name: under which servers hold it.
        held: of its keys.
        versions: of its keys.
    """

    def __init__(
        self, moments: Moments, traffic: Traffic, name: str, held: dict[Key, Held], versions: dict[Key, int]
    ) -> None:
        self._moments, self._traffic, self._name = moments, traffic, name
        self._held = held
        self.versions = versions

    def spec(self, verb: str, key: Key) -> KeySpec:
        """Tell what an array for a key must be like."""
        held = self._held.get(key)
        if held is None:
            raise KeyNotFoundError(f"{verb}({quote(key)}): the key was not there when this snapshot was taken")
        return held.spec

    def keys(self) -> list[Key]:
        """Every key, in the order of init."""
        return list(self._held)

    def pull_into(self, keys: Sequence[Key], outs: Outs, priority: int) -> None:
        """Copy values into tensors."""
        self._traffic.pull(keys, outs, {"view": self._name}, self._held)

    def pull_rows(self, keys: Sequence[Key], ids: Sequence[torch.Tensor]) -> list[Rows]:
        """Return copies of rows."""
        return self._traffic.pull_rows(keys, ids, {"view": self._name}, self._held)

    def abandon(self) -> None:
        """Hold it no more from the next snapshot on; the garbage collector calls this, in the middle of anything."""
        self._moments.abandoned.append(self._name)

    def close(self) -> None:
        """Hold it no more."""
        self._moments.drop(self._name)
