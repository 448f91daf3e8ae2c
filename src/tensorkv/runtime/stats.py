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
        self._keys: dict[str, dict[str | int, list[int]]] = {}

    def add(self, verb: str, start: float, keys: Sequence[str | int], nbytes: Sequence[int]) -> None:
        """Count one call that began at ``start`` and moved so many bytes for each of its keys."""
        seconds = clock() - start
        with self._lock:
            total = self._verbs.setdefault(verb, [0, 0, 0.0])
            total[0] += 1
            total[1] += sum(nbytes)
            total[2] += seconds
            by_key = self._keys.setdefault(verb, {})
            for key, size in zip(keys, nbytes, strict=True):
                count = by_key.get(key)
                if count is None:
                    by_key[key] = [1, size]
                else:
                    count[0] += 1
                    count[1] += size

    def add_one(self, verb: str, start: float, key: str | int, nbytes: int) -> None:
        """Count one call of a single key."""
        seconds = clock() - start
        with self._lock:
            total = self._verbs.get(verb)
            count = None if total is None else self._keys[verb].get(key)
            if total is not None and count is not None:
                total[0] += 1
                total[1] += nbytes
                total[2] += seconds
                count[0] += 1
                count[1] += nbytes
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
            for verb, by_key in self._keys.items():
                for key, (calls, nbytes) in by_key.items():
                    keys.setdefault(key, {})[verb] = {"calls": calls, "nbytes": nbytes}
        return {"verbs": verbs, "keys": keys}

    def forget(self, keys: Sequence[str | int]) -> None:
        """Drop the counts of deleted keys."""
        with self._lock:
            for by_key in self._keys.values():
                for key in keys:
                    by_key.pop(key, None)
