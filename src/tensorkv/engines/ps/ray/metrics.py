"""ServerMetrics: a server's counters for Ray's metrics, which Prometheus and Ray's dashboard read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

_TAGS = ("store", "server")
_GAUGES = {
    "keys": "keys of which this server holds a piece",
    "nbytes": "bytes of the values",
    "clients": "processes that use the store",
    "workers": "workers that are alive",
    "dead_workers": "workers that have been silent for too long",
    "ahead_rounds": "rounds by which the fastest live worker is ahead of the slowest",
    "most_ahead_rounds": "the largest lead so far",
    "snapshots": "snapshots that are held",
    "log_nbytes": "bytes of the log in the server's folder",
}
_COUNTERS = {
    "pushes": "pushes, those of pushpull included",
    "pulls": "pulls, those of pushpull included",
    "moved_nbytes": "bytes that came with requests and went with answers",
    "waits": "requests that had to wait for others",
    "waited_seconds": "seconds that they waited",
    "resent": "requests that came again",
}


class ServerMetrics:
    """What ``ray.util.metrics`` is told of one server; names begin with ``tensorkv_``, tags are store and server.

    Args:
        store: its name.
        server: the server's index.
    """

    def __init__(self, store: str, server: int) -> None:
        tags = {"store": store, "server": str(server)}
        self._gauges = {word: Gauge(f"tensorkv_{word}", text, _TAGS) for word, text in _GAUGES.items()}
        self._counters = {word: Counter(f"tensorkv_{word}", text, _TAGS) for word, text in _COUNTERS.items()}
        for metric in (*self._gauges.values(), *self._counters.values()):
            metric.set_default_tags(tags)
        self.told: dict[str, float] = {}
        """The last value of each."""

    def tell(self, stats: Mapping[str, Any]) -> None:
        """Tell Ray what a server's ``stats`` says now."""
        values = _values(stats)
        for word, gauge in self._gauges.items():
            gauge.set(values[word])
        for word, counter in self._counters.items():
            more = values[word] - self.told.get(word, 0)
            if more > 0:
                counter.inc(more)
        self.told = values


def _values(stats: Mapping[str, Any]) -> dict[str, float]:
    verbs = stats["verbs"]

    def calls(*names: str) -> float:
        return float(sum(verbs[name]["calls"] for name in names if name in verbs))

    return {
        "keys": stats["keys"],
        "nbytes": stats["nbytes"],
        "clients": stats["clients"],
        "workers": len(stats["here"]),
        "dead_workers": len(stats["dead"]),
        "ahead_rounds": stats["ahead"],
        "most_ahead_rounds": stats["most_ahead"],
        "snapshots": stats["snapshots"],
        "log_nbytes": stats.get("wal", {}).get("log_nbytes", 0),
        "pushes": calls("push", "pushpull"),
        "pulls": calls("pull", "pushpull", "pull_rows"),
        "moved_nbytes": sum(each["nbytes"] for each in verbs.values()),
        "waits": stats["waits"],
        "waited_seconds": stats["waited_s"],
        "resent": stats["resent"],
    }
