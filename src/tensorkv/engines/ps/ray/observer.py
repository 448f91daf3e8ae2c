"""Observer: somebody who looks at the servers of a store and is none of its workers or clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError

from tensorkv.arrays.arguments import check_timeout
from tensorkv.errors import ServerLostError, quote
from tensorkv.transport.wire import Settings, join, split

from . import cluster, server_stats

# A client without an owner: servers answer it, and do not count it.
_QUESTION = join({"verb": "stats", "owner": None, "client": "observer", "seq": 0})
_SETTINGS = ("num_servers", "num_workers", "mode", "staleness", "path", "durability")


class Observer:
    """A look at a running store; it keeps no server alive, and ends none. Made by ``observe``."""

    def __init__(self, name: str, actors: Sequence[Any], settings: Settings, timeout_s: float) -> None:
        self._name, self._actors, self._timeout_s = name, list(actors), timeout_s
        self.settings = {"name": name, **{word: getattr(settings, word) for word in _SETTINGS}}
        """What the store was made with, as plain data."""

    def stats(self) -> dict[str, Any]:
        """Return what the servers tell, as ``KVStore.stats`` has it.

        Returns:
            Sums over servers, and under ``"servers"`` what each says: None for one that does not answer now.

        Raises:
            ServerLostError: every server has ended for good.
        """
        if not ray.is_initialized():
            raise ServerLostError(f"the store {quote(self._name)} has ended: Ray has been shut down in this process")
        refs = [actor.serve.remote(_QUESTION) for actor in self._actors]
        ray.wait(refs, num_returns=len(refs), timeout=self._timeout_s)
        told: list[dict[str, Any] | None] = []
        ended = 0
        for ref in refs:
            try:
                told.append(split(ray.get(ref, timeout=0))[0])
            except ActorDiedError:
                ended += 1
                told.append(None)
            except RayError:
                # One that is slow, or is being started again.
                told.append(None)
        if ended == len(told):
            raise ServerLostError(f"the store {quote(self._name)} has ended: none of its servers is there any more")
        return {**server_stats.merge([each for each in told if each is not None]), "servers": told}


def observe(name: str = "tensorkv", address: str | None = None, timeout_s: float = 10.0) -> Observer:
    """Return a look at the store of a name that is running.

    Args:
        name: of the store.
        address: of its Ray cluster (None: ``RAY_ADDRESS``, else the clusters of this machine are tried one by one).
        timeout_s: how long to wait for the servers, in seconds.

    Raises:
        ServerLostError: there is no such store, or its servers do not answer.

    This process stays in the Ray cluster that it has found, as one with a store does.
    """
    timeout_s = check_timeout(timeout_s)
    cluster.find(name, address)
    found = cluster.find_servers(name, timeout_s)
    if found is None:
        raise ServerLostError(f"the store {quote(name)} has just ended")
    return Observer(name, *found, timeout_s)
