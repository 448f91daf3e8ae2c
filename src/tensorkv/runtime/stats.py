"""Counts, bytes and seconds per verb and per key, for ``KVStore.stats``."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tensorkv.compiled import _native

clock = perf_counter

if TYPE_CHECKING or _native is not None:
    Record = _native.Record
else:

    class Record:
        """Counts of a verb, and of each of its keys."""

        def __init__(self) -> None:
            # A signal handler that calls the store may interrupt the thread that holds it. Of its own, since a child
            # that was forked while it was held creates stores.
            self._lock = threading.RLock()
            self.calls = self.nbytes = 0
            self.seconds = 0.0
            self._keys: dict[Any, Record] = {}

        def add(self, seconds: float, keys: list[Any], nbytes: list[int]) -> None:
            """Count one call, which moved so many bytes for each of its keys."""
            with self._lock:
                self.calls += 1
                self.seconds += seconds
                for key, size in zip(keys, nbytes, strict=True):
                    own = self._keys.get(key) or self._keys.setdefault(key, Record())
                    own.calls += 1
                    own.nbytes += size
                    self.nbytes += size

        def forget(self, keys: list[Any]) -> None:
            """Drop the counts of a list of keys."""
            with self._lock:
                for key in keys:
                    self._keys.pop(key, None)

        def of_keys(self) -> dict[Any, Record]:
            """Return a dict of key to its Record."""
            with self._lock:
                return dict(self._keys)


class Metrics:
    """Counters of one store; every method may be called from several threads.

    >>> metrics = Metrics()
    >>> metrics.add("push", clock(), ["w"], [24])
    >>> metrics.read()["verbs"]["push"]["nbytes"]
    24
    """

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}

    def of(self, verb: str) -> Record:
        """Return the counts of a verb."""
        return self._records.get(verb) or self._records.setdefault(verb, Record())

    def add(self, verb: str, start: float, keys: Sequence[str | int], nbytes: Sequence[int]) -> None:
        """Count one call that began at ``start`` and moved so many bytes for each of its keys."""
        self.of(verb).add(clock() - start, list(keys), list(nbytes))

    def read(self) -> dict[str, Any]:
        """Return ``{"verbs": {verb: {calls, nbytes, seconds}}, "keys": {key: {verb: {calls, nbytes}}}}``."""
        verbs: dict[str, dict[str, Any]] = {}
        keys: dict[str | int, dict[str, dict[str, int]]] = {}
        for verb, record in list(self._records.items()):
            if record.calls:
                verbs[verb] = {"calls": record.calls, "nbytes": record.nbytes, "seconds": record.seconds}
            for key, own in record.of_keys().items():
                keys.setdefault(key, {})[verb] = {"calls": own.calls, "nbytes": own.nbytes}
        return {"verbs": verbs, "keys": keys}

    def forget(self, keys: Sequence[str | int]) -> None:
        """Drop the counts of deleted keys."""
        for record in list(self._records.values()):
            record.forget(list(keys))
