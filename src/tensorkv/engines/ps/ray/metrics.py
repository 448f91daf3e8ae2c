"""Counters of servers: merged over servers, and exported to Ray's metrics for Prometheus and Ray's dashboard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray.util.metrics import Counter, Gauge

_TAGS = ("store", "server")
_GAUGES = {
    "keys": "keys of which this server holds a piece",
    "nbytes": "bytes of the values",
    "clients": "processes that use the store",
    "workers": "workers that are alive",
    "dead_workers": "workers whose heartbeats have stopped",
    "ahead_rounds": "rounds by which the fastest live worker is ahead of the slowest",
    "most_ahead_rounds": "the largest lead so far",
    "snapshots": "snapshots that are held",
    "log_nbytes": "bytes of the log in the server's folder",
}
_COUNTERS = {
    "pushes": "pushes, those of pushpull included",
    "pulls": "pulls, those of pushpull included",
    "moved_nbytes": "bytes of requests and replies",
    "waits": "requests that had to wait for others",
    "waited_seconds": "seconds that they waited",
    "resent": "requests that were received again",
    "compressed_received_nbytes": "bytes of compressed gradients",
    "compressed_received_raw_nbytes": "bytes that these gradients have without compression",
    "compressed_sent_nbytes": "bytes of values that were rounded for pulls",
    "compressed_sent_raw_nbytes": "bytes that these values have",
}
_TRAFFIC = ("received_nbytes", "received_raw_nbytes", "sent_nbytes", "sent_raw_nbytes")


class ServerMetrics:
    """The metrics of one server in ``ray.util.metrics``; names begin with ``tensorkv_``, tags are store and server.

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
        self.exported: dict[str, float] = {}
        """The last value of each."""

    def export(self, stats: Mapping[str, Any]) -> None:
        """Set Ray's metrics to a server's ``stats``."""
        values = _values(stats)
        for word, gauge in self._gauges.items():
            gauge.set(values[word])
        for word, counter in self._counters.items():
            more = values[word] - self.exported.get(word, 0)
            if more > 0:
                counter.inc(more)
        self.exported = values


def _values(stats: Mapping[str, Any]) -> dict[str, float]:
    verbs, compressed = stats["verbs"], stats.get("compression", {})

    def calls(*names: str) -> float:
        return float(sum(verbs[name]["calls"] for name in names if name in verbs))

    return {
        "keys": stats["keys"],
        "nbytes": stats["nbytes"],
        "clients": stats["clients"],
        "workers": len(stats["connected"]),
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
        **{f"compressed_{word}": compressed.get(word, 0) for word in _TRAFFIC},
    }


_SUMS = ("nbytes", "waits", "waited_s")
_MOST = ("ahead", "most_ahead", "clients", "snapshots", "releases")


def merge_stats(told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sums of what servers count, and the largest of what each counts of all workers.

    >>> one = {"nbytes": 4, "verbs": {"push": {"calls": 1, "nbytes": 4, "seconds": 0.5}}, "dead": [2]}
    >>> merge_stats([one, one])["server_verbs"]["push"]["nbytes"]
    8
    """
    found: dict[str, Any] = {word: sum(each.get(word, 0) for each in told) for word in _SUMS}
    found["num_keys"] = sum(each.get("first_keys", 0) for each in told)
    found |= {word: max((each.get(word, 0) for each in told), default=0) for word in _MOST}
    found["dead_workers"] = sorted({rank for each in told for rank in each.get("dead", ())})
    for word in ("nonfinite", "wal"):
        parts = [each[word] for each in told if word in each]
        if parts:
            found[word] = {name: sum(part[name] for part in parts) for name in parts[0]}
    verbs: dict[str, dict[str, Any]] = {}
    for each in told:
        for verb, counts in each["verbs"].items():
            total = verbs.setdefault(verb, dict.fromkeys(counts, 0))
            for name, count in counts.items():
                total[name] += count
    found["server_verbs"] = verbs
    compressed = [each["compression"] for each in told if "compression" in each]
    found["server_compression"] = {word: sum(each[word] for each in compressed) for word in _TRAFFIC}
    return found
