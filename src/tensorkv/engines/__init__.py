"""Engines: how pushes from several places meet. The contract, and the look-up by type name.

Third parties add engines with ``register``, or with an entry point in the group ``tensorkv.engines``
whose name is the type and whose object is the factory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points
from typing import Any

import numpy as np

from tensorkv.errors import ArgumentError, EngineNotFoundError, install_hint, naming, quote, show, suggestion
from tensorkv.shard.entry import Batch as Batch
from tensorkv.shard.nonfinite import NonFinite
from tensorkv.shard.reduce import Reduce

from .base import Engine as Engine
from .base import Reader as Reader
from .base import ReleaseReader as ReleaseReader
from .call import Call as Call
from .local import LocalEngine
from .ps.options import PSOptions

GROUP = "tensorkv.engines"


Factory = Callable[..., Engine]


def _build_dist(
    *, nonfinite: NonFinite = "pass", reduce: Reduce = "sum", timeout_s: float = 300.0, shared_memory: bool = True
) -> Engine:
    # Only here: torch.distributed takes a while to import.
    from .sync import engine

    # Raises for an option that is out of range before other workers are waited for.
    alone = LocalEngine(False, nonfinite=nonfinite, reduce=reduce)
    made = engine.build(nonfinite=nonfinite, reduce=reduce, timeout_s=timeout_s, shared_memory=shared_memory)
    return made or alone


def _build_ps(**options: Any) -> Engine:
    given = {name: each for name, each in options.items() if each is not None}
    try:
        from .ps.connect import connect
    except ImportError as error:
        raise EngineNotFoundError(
            f"create: dist_async needs Ray, which cannot be imported ({error}); {install_hint('ray')}"
        ) from error
    return connect(given)


# Its options are stated in one place.
_build_ps.__signature__ = inspect.signature(PSOptions)  # type: ignore[attr-defined]


_factories: dict[str, Factory] = {
    **{name: partial(LocalEngine, False) for name in ("local", "local_allreduce_cpu", "local_update_cpu")},
    **dict.fromkeys(("dist", "dist_sync", "dist_device_sync", "dist_sync_device"), _build_dist),
    **dict.fromkeys(("dist_async", "dist_device_async", "dist_async_device"), _build_ps),
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
    # Not the elements of arrays: an engine of one's own may take arrays.
    options = {word: option.item() if isinstance(option, np.generic) else option for word, option in options.items()}
    signature = inspect.signature(factory)
    try:
        signature.bind(**options)
    except TypeError as error:
        taken = ", ".join(signature.parameters) or "none"
        raise ArgumentError(f"create({quote(name)}): {error}; its options are: {taken}") from None
    with naming(f"create({quote(name)})"):
        engine = factory(**options)
    if not isinstance(engine, Engine):
        raise ArgumentError(
            f"create({quote(name)}): the factory returned {show(engine)}; expected a tensorkv.engines.Engine"
        )
    return engine
