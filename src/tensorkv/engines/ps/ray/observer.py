"""A read-only monitoring client, for ``tensorkv top``; servers do not count it as a client."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError

from tensorkv.arrays.arguments import check_timeout
from tensorkv.errors import ServerDeadError, quote

from ..messages import Stats, encode, join, split
from ..options import PSOptions
from . import cluster
from .handle import ServerHandle
from .metrics import merge_stats

# Without an owner: servers answer, and do not count a client.
_QUESTION = join(encode(Stats(), {"owner": None, "client": "observer", "seq": 0}))
# How long to look for a server that is not where it was.
_LOOK_S = 1.0
_SETTINGS = ("num_servers", "num_workers", "mode", "staleness", "path", "durability")


class Observer:
    """Reads the statistics of a running store; it keeps no server alive, and ends none. Made by ``observe``."""

    def __init__(self, name: str, servers: Sequence[ServerHandle], options: PSOptions, timeout_s: float) -> None:
        self._name, self._servers, self._timeout_s = name, list(servers), timeout_s
        self.settings = {"name": name, **{word: getattr(options, word) for word in _SETTINGS}}
        """The options of the store, as plain data."""

    def stats(self) -> dict[str, Any]:
        """Return the statistics of the servers, as in ``KVStore.stats``.

        Returns:
            Sums over servers, and under ``"servers"`` those of each: None for one that does not answer now.

        Raises:
            ServerDeadError: every server has ended for good.
        """
        if not ray.is_initialized():
            raise ServerDeadError(f"the store {quote(self._name)} has ended: Ray has been shut down in this process")
        refs = [server.actor.serve.remote(_QUESTION) for server in self._servers]
        ray.wait(refs, num_returns=len(refs), timeout=self._timeout_s)
        told: list[dict[str, Any] | None] = []
        ended = 0
        for server, ref in zip(self._servers, refs, strict=True):
            head: dict[str, Any] | None = None
            try:
                head = split(ray.get(ref, timeout=0))[0]
            except ActorDiedError:
                ended += 1
            except RayError:
                # It is slow, or is being restarted.
                pass
            if server.has_spare and (head is None or "spare" in head):
                # The next question goes to the one that serves.
                with suppress(RayError):
                    server.place(_LOOK_S)
            # A server that is ending has released its values, and refuses.
            told.append(None if head is None or "error" in head or "spare" in head else head)
        if ended == len(told):
            raise ServerDeadError(f"the store {quote(self._name)} has ended: none of its servers is left")
        return {**merge_stats([each for each in told if each is not None]), "servers": told}


def observe(name: str = "tensorkv", address: str | None = None, timeout_s: float = 10.0) -> Observer:
    """Return an observer of the running store of a name.

    Args:
        name: of the store.
        address: of its Ray cluster (None: ``RAY_ADDRESS``, else the clusters of this machine are tried one by one).
        timeout_s: how long to wait for the servers, in seconds.

    Raises:
        ServerDeadError: there is no such store, or its servers do not answer.

    This process stays in the Ray cluster that it has found, as one with a store does.
    """
    timeout_s = check_timeout(timeout_s)
    cluster.find(name, address)
    found = cluster.find_servers(name, timeout_s)
    if found is None:
        raise ServerDeadError(f"the store {quote(name)} has just ended")
    return Observer(name, *found, timeout_s)
