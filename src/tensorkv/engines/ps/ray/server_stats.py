"""What several servers tell of themselves, as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SUMS = ("nbytes", "waits", "waited_s")
_MOST = ("ahead", "most_ahead", "clients", "snapshots")


def merge(told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return sums over servers, and of workers what the one says that sees most.

    >>> one = {"nbytes": 4, "verbs": {"push": {"calls": 1, "nbytes": 4, "seconds": 0.5}}, "dead": [2]}
    >>> merge([one, one])["server_verbs"]["push"]["nbytes"]
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
    return found
