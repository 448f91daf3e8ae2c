"""Works of several hosts: what they exchange, in lock step, over servers on each, and with one server elsewhere.

Needs NumPy alone, so that the process of a peer with an old NumPy can import it.
"""

from __future__ import annotations

from benchmarks.servers.works import Serving
from benchmarks.sync.works import Exchange

# Keys, shape, and how many calls are timed together.
_SIZES = [(1, (25_000_000,), 1), (160, (160_000,), 1), (1000, (1000,), 5), (1, (2, 3), 50)]
_QUICK_SIZES = [(1, (100_000,), 1), (16, (1600,), 1), (1, (2, 3), 5)]
_PER_HOST = {2: (1, 2), 3: (1,)}


def exchanges(hosts: int, *, quick: bool) -> list[Exchange]:
    """Return what ranks on so many hosts exchange in lock step.

    >>> [work.name for work in exchanges(3, quick=True)][0]
    '1 × 100k, 3 ranks on 3 hosts, assign'
    """
    return [
        Exchange(keys, shape, hosts * per_host, calls=calls, hosts=hosts)
        for per_host in _PER_HOST.get(hosts, (1,))
        for keys, shape, calls in (_QUICK_SIZES if quick else _SIZES)
    ]


def servings(hosts: int, *, quick: bool) -> list[Serving]:
    """Return what a worker on each host pushes to a server on each host.

    >>> [work.name for work in servings(2, quick=True)][0]
    'servers on 2 hosts: 1 × 100k, 2 workers, SGD momentum 0.9'
    """
    return [
        Serving(keys, shape, hosts, "momentum", calls=calls, topic=f"servers on {hosts} hosts")
        for keys, shape, calls in (_QUICK_SIZES if quick else _SIZES)
    ]


def far(*, quick: bool) -> list[Serving]:
    """Return what one worker pushes to one server on another host.

    >>> [work.name for work in far(quick=True)][0]
    'another host: 1 × 100k, 1 worker, assign'
    """
    return [
        Serving(keys, shape, 1, calls=calls, topic="another host")
        for keys, shape, calls in (_QUICK_SIZES if quick else _SIZES)
    ]
