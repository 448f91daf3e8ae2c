"""Engines: how pushes from several places meet. The contract, and the look-up by type name.

Third parties add engines with ``register``, or with an entry point in the group ``tensorkv.engines``
whose name is the type and whose object is the factory.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import entry_points
from typing import Any, Protocol

import torch

from tensorkv.arrays.arguments import Key, check_flag, folder_path
from tensorkv.arrays.rows import Rows
from tensorkv.arrays.spec import KeySpec
from tensorkv.shard.entry import Batch, KeyInfo, Part
from tensorkv.shard.nonfinite import NonFinite
from tensorkv.shard.optimizers import OptimizerSpec
from tensorkv.shard.rules import Updater
from tensorkv.storage.manifest import Kind

from ..errors import ArgumentError, EngineNotFoundError, naming, quote, show, suggestion
from .local import LocalEngine

GROUP = "tensorkv.engines"


class Engine(Protocol):
    """What a KVStore asks of an engine.

    Arrays are torch tensors or Rows of them that share the caller's memory: an engine reads them
    before its method returns and keeps none. It raises the errors of ``tensorkv.errors`` before it
    changes anything, and may be called from several threads.

    An engine may also have two short ways, which are handed the caller's own arrays (None for what the verb
    lacks) and return None when they have done nothing and the general way is to be taken:
    ``one(key, value, out) -> int | None`` for one plain array, returning bytes moved, and
    ``many(keys, values, outs, priority) -> list[int] | None`` for many keys, returning bytes moved per key.
    """

    capabilities: frozenset[str]

    @property
    def rank(self) -> int:
        """This worker's number, from 0."""

    @property
    def num_workers(self) -> int:
        """How many workers push."""

    @property
    def optimizer(self) -> OptimizerSpec | None:
        """The optimizer in force, None without one."""

    def init(self, keys: Sequence[Key], values: Sequence[Part], specs: Sequence[KeySpec]) -> None:
        """Hold copies of new values; all keys or none."""

    def push(self, batch: Batch, priority: int) -> None:
        """Sum the parts of each key and update its value; the whole batch is checked first."""

    def pull(self, keys: Sequence[Key], outs: Sequence[Sequence[torch.Tensor]], priority: int) -> None:
        """Copy each key's value into its tensors, which have its shape."""

    def pushpull(self, batch: Batch, outs: Sequence[Sequence[torch.Tensor]], priority: int) -> None:
        """Push, then pull the same keys, in one trip."""

    def pull_rows(self, keys: Sequence[Key], ids: Sequence[torch.Tensor]) -> list[Rows]:
        """Return copies of the rows of each key; ids are unique and sorted."""

    def delete(self, keys: Sequence[Key]) -> None:
        """Forget keys; all or none."""

    def set_updater(self, updater: Updater | None) -> None:
        """Apply a function to each sum; None restores assignment."""

    def set_optimizer(self, spec: OptimizerSpec) -> None:
        """Step an optimizer with each sum as the gradient."""

    def set_hyperparameters(self, numbers: dict[str, Any], keys: Sequence[Key] | None) -> None:
        """Change numbers of the optimizer, for all keys or some."""

    def spec(self, verb: str, key: Key) -> KeySpec:
        """Tell what an array for a key must be like."""

    def info(self, key: Key) -> KeyInfo:
        """Describe a key."""

    def keys(self) -> list[Key]:
        """Every key, in the order of init."""

    def __contains__(self, key: object) -> bool: ...

    def stats(self) -> Mapping[str, Any]:
        """Counters of the engine's own, merged into ``KVStore.stats()``."""

    def save(self, path: str, kind: Kind) -> None:
        """Write a checkpoint."""

    def load(self, path: str, kind: Kind) -> None:
        """Read a checkpoint; on an error nothing has changed."""

    def barrier(self) -> None:
        """Wait until every worker is here."""

    def broadcast_text(self, text: str) -> str:
        """Return rank 0's text to every worker."""

    def leave(self) -> None:
        """Serve the others until every worker has left."""

    def close(self) -> None:
        """Finish pending pushes and let go of everything; called once."""


Factory = Callable[..., Engine]


def _build_dist(*, nonfinite: NonFinite = "pass", timeout_s: float = 60.0, shared_memory: bool = True) -> Engine:
    # Only here: torch.distributed takes a while to import.
    from .sync import engine

    # Raises for an option that is out of range before other workers are waited for.
    alone = LocalEngine(False, nonfinite=nonfinite)
    return engine.build(nonfinite=nonfinite, timeout_s=timeout_s, shared_memory=shared_memory) or alone


def _build_ray(
    *,
    num_servers: int | None = None,
    num_workers: int | None = None,
    mode: str | None = None,
    staleness: int | None = None,
    path: str | os.PathLike[str] | None = None,
    durability: str | None = None,
    nonfinite: NonFinite | None = None,
    keep: int | None = None,
    lost_after_s: float | None = None,
    name: str = "tensorkv",
    address: str | None = None,
    timeout_s: float = 60.0,
    insecure: bool = False,
) -> Engine:
    """Return a client of parameter servers on Ray.

    Args:
        num_servers: how many hold values (default 1).
        num_workers: how many push (default: ``WORLD_SIZE``, else 1).
        mode: ``"async"`` (default): a push is applied at once; ``"sync"``: when every live worker has pushed.
        staleness: in mode async, how many rounds a worker may be ahead of the slowest (default: any number).
        path: a folder that the servers see, where they keep everything (default: in memory alone).
        durability: ``"memory"``, ``"process"`` (default with a path) or ``"disk"``.
        nonfinite: ``"pass"`` (default), ``"raise"`` or ``"skip"`` updates whose sum has NaN or Inf.
        keep: how many snapshots may be held at a time (default 4).
        lost_after_s: how long a silent worker is waited for, in seconds (default 5; more than 1, since that is how
            often workers tell that they are there).
        name: of the store in its cluster.
        address: of a Ray cluster (default: ``RAY_ADDRESS``, else one is started on this machine).
        timeout_s: how long to wait for servers and other workers.
        insecure: accept a cluster that other hosts can reach and that asks nobody for a token, and a token that other
            users of this machine can read.
    """
    try:
        from .ps import options as ray_store
    except ImportError as error:
        raise EngineNotFoundError(
            f"create: dist_async needs Ray, which cannot be imported ({error}); pip install 'tensorkv[ray]'"
        ) from error
    options = {
        "num_servers": num_servers,
        "num_workers": num_workers,
        "mode": mode,
        "staleness": staleness,
        "path": None if path is None else folder_path("create", path),
        "durability": durability,
        "nonfinite": nonfinite,
        "keep": keep,
        "lost_after_s": lost_after_s,
    }
    return ray_store.build(name, address, timeout_s, check_flag("insecure", insecure), options)


_factories: dict[str, Factory] = {
    **{name: partial(LocalEngine, False) for name in ("local", "local_allreduce_cpu", "local_update_cpu")},
    **dict.fromkeys(("dist", "dist_sync", "dist_device_sync", "dist_sync_device"), _build_dist),
    **dict.fromkeys(("dist_async", "dist_device_async", "dist_async_device"), _build_ray),
    **{name: partial(LocalEngine, True) for name in ("device", "local_allreduce_device", "nccl")},
}


def register(name: str, factory: Factory) -> None:
    """Make ``tensorkv.create(name, **options)`` call ``factory(**options)``.

    Args:
        name: a type name that is not taken.
        factory: returns an ``Engine``; its keyword parameters are the store's options.

    Raises:
        ArgumentError: the name is taken or empty, or the factory cannot be called.

    >>> from tensorkv.engines.local import LocalEngine
    >>> register("doctest", lambda: LocalEngine(False))
    >>> import tensorkv
    >>> tensorkv.create("doctest").type
    'doctest'
    """
    if not isinstance(name, str) or not name:
        raise ArgumentError(f"register: the type name is {show(name)}; expected a non-empty str")
    if name in _factories:
        raise ArgumentError(f"register: the type {quote(name)} exists already; choose another name")
    if not callable(factory):
        raise ArgumentError(f"register({quote(name)}): the factory is {show(factory)}; expected a function")
    _factories[name] = factory


def names() -> list[str]:
    """Return every type name that ``tensorkv.create`` takes now."""
    return sorted({*_factories, *(point.name for point in entry_points(group=GROUP))})


def build(name: Any, options: dict[str, Any]) -> Engine:
    """Return a new engine of a type.

    Raises:
        EngineNotFoundError: no such type; the message lists those there are.
        ArgumentError: an option that the type does not have.
    """
    factory = _factories.get(name) if isinstance(name, str) else None
    if factory is None:
        for point in entry_points(group=GROUP, name=str(name)):
            factory = point.load()
    if factory is None:
        known = names()
        raise EngineNotFoundError(
            f"create: no store type {show(name)}{suggestion(name, known)}; the types are {', '.join(known)}"
        )
    signature = inspect.signature(factory)
    try:
        signature.bind(**options)
    except TypeError as error:
        taken = ", ".join(signature.parameters) or "none"
        raise ArgumentError(f"create({quote(name)}): {error}; its options are: {taken}") from None
    with naming(f"create({quote(name)})"):
        return factory(**options)
