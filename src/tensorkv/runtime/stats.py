"""Counts, bytes and seconds per verb and per key, for ``KVStore.stats``."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from time import perf_counter
from typing import Any

clock = perf_counter


class Metrics:
    """Counters of one store; every method may be called from several threads.

    >>> metrics = Metrics()
    >>> metrics.add("push", clock(), ["w"], [24])
    >>> metrics.read()["verbs"]["push"]["nbytes"]
    24
    """

    def __init__(self) -> None:
        # A signal handler that calls the store may interrupt the thread that holds it.
        self._lock = threading.RLock()
        self._verbs: dict[str, list[Any]] = {}
        # Numbers, and not a list for each key, which Python's garbage collector would look through again and again.
        self._calls: dict[str, dict[str | int, int]] = {}
        self._nbytes: dict[str, dict[str | int, int]] = {}

    def add(self, verb: str, start: float, keys: Sequence[str | int], nbytes: Sequence[int]) -> None:
        """Count one call that began at ``start`` and moved so many bytes for each of its keys."""
        seconds = clock() - start
        with self._lock:
            total = self._verbs.setdefault(verb, [0, 0, 0.0])
            total[0] += 1
            total[1] += sum(nbytes)
            total[2] += seconds
            calls, moved = self._calls.setdefault(verb, {}), self._nbytes.setdefault(verb, {})
            for key, size in zip(keys, nbytes, strict=True):
                calls[key] = calls.get(key, 0) + 1
                moved[key] = moved.get(key, 0) + size

    def add_one(self, verb: str, start: float, key: str | int, nbytes: int) -> None:
        """Count one call of a single key."""
        seconds = clock() - start
        with self._lock:
            total = self._verbs.get(verb)
            if total is not None:
                calls, moved = self._calls[verb], self._nbytes[verb]
                total[0] += 1
                total[1] += nbytes
                total[2] += seconds
                calls[key] = calls.get(key, 0) + 1
                moved[key] = moved.get(key, 0) + nbytes
                return
        self.add(verb, start, [key], [nbytes])

    def read(self) -> dict[str, Any]:
        """Return ``{"verbs": {verb: {calls, nbytes, seconds}}, "keys": {key: {verb: {calls, nbytes}}}}``."""
        with self._lock:
            verbs = {
                verb: {"calls": calls, "nbytes": nbytes, "seconds": seconds}
                for verb, (calls, nbytes, seconds) in self._verbs.items()
            }
            keys: dict[str | int, dict[str, dict[str, int]]] = {}
            for verb, by_key in self._calls.items():
                for key, calls in by_key.items():
                    keys.setdefault(key, {})[verb] = {"calls": calls, "nbytes": self._nbytes[verb][key]}
        return {"verbs": verbs, "keys": keys}

    def forget(self, keys: Sequence[str | int]) -> None:
        """Drop the counts of deleted keys."""
        with self._lock:
            for by_key in (*self._calls.values(), *self._nbytes.values()):
                for key in keys:
                    by_key.pop(key, None)
