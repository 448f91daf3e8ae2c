"""The options of a store on parameter servers, checked once. Needs no Ray."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tensorkv.arrays.arguments import absolute_path, check_flag, check_timeout
from tensorkv.engines.transport.rendezvous import launched
from tensorkv.errors import ArgumentError, quote, show
from tensorkv.shard.nonfinite import MODES, NonFinite
from tensorkv.shard.reduce import Reduce

from .messages import PULL_DTYPES

# Options of one client; the others are those of the store, and the same for all of its clients.
_OF_CLIENT = ("name", "address", "timeout_s", "insecure", "pull_dtype", "reader")


def _world_size() -> int:
    return launched()[1]


@dataclass(frozen=True, kw_only=True)
class PSOptions:
    """What ``tensorkv.create("dist_async")`` takes.

    Args:
        num_servers: how many hold values.
        num_workers: how many push (default: ``WORLD_SIZE``, else 1).
        placement: ``"spread"``: servers take turns at the nodes of the cluster; ``"pack"``: all are on one node; or a
            mapping of ``"server-0"`` and so on to ``{"node": host name, address or Ray's id}`` or ``{"resources":
            {name: amount}}``; servers that it does not name are spread.
        mode: ``"async"``: a push is applied at once; ``"sync"``: when every live worker has pushed.
        staleness: in mode async, how many rounds a worker may be ahead of the slowest (None: any number).
        path: a folder that the servers see, where they keep everything (None: in memory alone).
        durability: ``"memory"``, ``"process"`` (default with a path) or ``"disk"``.
        spare: with a path, keep a process for each server that takes over when the server is killed.
        nonfinite: ``"pass"``, ``"raise"`` or ``"skip"`` updates whose sum has NaN or Inf, or ``"skip_step"``, the
            whole push.
        reduce: whether a push takes the ``"sum"`` or the ``"mean"`` of the parts of a key, in mode sync those of all
            workers.
        keep: how many snapshots may be held at a time.
        heartbeat_timeout_s: after how many seconds without a heartbeat a worker is dead; more than the 1 between two
            heartbeats.
        pull_dtype: ``"bf16"`` or ``"fp16"``: values of float32 and float64, which servers keep as they are, are
            rounded to that dtype when this client pulls them, and travel in half the bytes or a quarter.
        reader: whether this client is no worker, whatever ``RANK`` says: its rank is ``num_workers`` or above.
        name: of the store in its cluster.
        address: of a Ray cluster (default: ``RAY_ADDRESS``, else one is started on this machine).
        timeout_s: how long to wait for servers and other workers.
        insecure: accept a cluster that other hosts can reach and that asks for no token, and a token that other users
            of this machine can read.
    """

    num_servers: int = 1
    num_workers: int = field(default_factory=_world_size)
    placement: str | Mapping[str, Mapping[str, Any]] = "spread"
    mode: str = "async"
    staleness: int | None = None
    path: str | None = None
    durability: str = ""
    spare: bool = True
    nonfinite: NonFinite = "pass"
    reduce: Reduce = "sum"
    keep: int = 4
    heartbeat_timeout_s: float = 30.0
    pull_dtype: str | None = None
    reader: bool = False
    name: str = "tensorkv"
    address: str | None = None
    timeout_s: float = 300.0
    insecure: bool = False

    def __post_init__(self) -> None:
        if not self.durability:
            object.__setattr__(self, "durability", "memory" if self.path is None else "process")

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> PSOptions:
        """Check the options that a user has given.

        Raises:
            ArgumentError: an option is out of range.

        >>> PSOptions.parse({"path": "/tmp/store", "keep": 2}).durability
        'process'
        """
        path = given.get("path")
        options = cls(**{**given, "path": None if path is None else absolute_path("create", path)})
        # It travels as JSON.
        object.__setattr__(options, "placement", _plain(options.placement))
        options._check_client()
        options._check_store()
        return options

    def _check_client(self) -> None:
        check_timeout(self.timeout_s)
        check_flag("insecure", self.insecure)
        check_flag("reader", self.reader)
        if not isinstance(self.name, str) or not self.name or "/" in self.name:
            raise ArgumentError(f"create: name is {show(self.name)}; expected a str without a slash")

        if self.pull_dtype is not None:
            _check_one_of("pull_dtype", self.pull_dtype, tuple(PULL_DTYPES))

    def _check_store(self) -> None:
        for name in ("num_servers", "num_workers", "keep"):
            number = getattr(self, name)
            if type(number) is not int or number < 1:
                raise ArgumentError(f"create: {name} is {show(number)}; expected an int of at least 1")
        self._check_placement()
        timeout_s = self.heartbeat_timeout_s
        if not isinstance(timeout_s, int | float) or isinstance(timeout_s, bool) or not 1 < timeout_s < 1e9:
            raise ArgumentError(
                f"create: heartbeat_timeout_s is {show(timeout_s)}; expected seconds, more than the 1 between two "
                "heartbeats"
            )
        _check_one_of("mode", self.mode, ("async", "sync"))
        _check_one_of("nonfinite", self.nonfinite, MODES)
        _check_one_of("reduce", self.reduce, ("sum", "mean"))
        is_sync, staleness = self.mode == "sync", self.staleness
        if staleness is not None and (type(staleness) is not int or staleness < 0 or is_sync):
            raise ArgumentError(
                f"create: staleness is {show(staleness)}; expected an int of at least 0, or None, in mode async"
            )
        if self.nonfinite != "pass" and is_sync and self.num_servers > 1:
            raise ArgumentError(
                f"create: nonfinite={self.nonfinite!r} in mode sync needs num_servers=1: one of several servers "
                "could refuse its piece of a sum that the others have applied"
            )
        if self.path is not None:
            _check_one_of("with a path, durability", self.durability, ("process", "disk"))
        elif self.durability != "memory":
            raise ArgumentError(f"create: durability={self.durability!r} needs path=, a folder for the log")
        check_flag("spare", self.spare)

    def _check_placement(self) -> None:
        placement = self.placement
        if isinstance(placement, str) and placement in ("spread", "pack"):
            return
        expected = '{"node": "..."} or {"resources": {"...": 1}}'
        if not isinstance(placement, Mapping):
            raise ArgumentError(
                f"create: placement is {show(placement)}; expected 'spread', 'pack', or a mapping of server names to "
                f"{expected}"
            )
        servers = [f"server-{index}" for index in range(self.num_servers)]
        for name, wanted in placement.items():
            if name not in servers:
                raise ArgumentError(f"create: placement names {show(name)}; the servers are {', '.join(servers)}")
            if not isinstance(wanted, Mapping) or not _is_place(dict(wanted)):
                raise ArgumentError(f"create: placement of {name} is {show(wanted)}; expected {expected}")

    def check_same(self, given: Mapping[str, Any], found: PSOptions) -> None:
        """Raise if a store that is running differs in an option that was given.

        Args:
            given: the options that were given.
            found: of the store.
        """
        for name in given:
            mine, theirs = getattr(self, name), getattr(found, name)
            if name not in _OF_CLIENT and mine != theirs:
                raise ArgumentError(
                    f"create: the store {quote(self.name)} is running with {name}={theirs!r}, not {mine!r}; leave "
                    "the option out to join it, or choose another name"
                )

    def of_store(self) -> dict[str, Any]:
        """Return the options that all clients of the store share, as plain data."""
        return {name: each for name, each in asdict(self).items() if name not in _OF_CLIENT}

    def folder(self, index: int) -> str | None:
        """Return the folder of one server; None: it keeps everything in memory."""
        return None if self.path is None else os.path.join(self.path, f"server-{index}")


def _plain(placement: Any) -> Any:
    """Return a placement with dicts in place of other mappings."""
    if not isinstance(placement, Mapping):
        return placement
    return {name: _plain(each) for name, each in placement.items()}


def _is_place(wanted: dict[Any, Any]) -> bool:
    match wanted:
        case {"node": str() as node, **rest}:
            return bool(node) and not rest
        case {"resources": Mapping() as resources, **rest}:
            pairs = resources.items()
            amounts_fit = all(type(amount) in (int, float) and 0 < amount < 1e18 for _, amount in pairs)
            return bool(pairs) and not rest and amounts_fit and all(isinstance(word, str) for word, _ in pairs)
    return False


def _check_one_of(name: str, found: Any, choices: tuple[str, ...]) -> None:
    if found not in choices:
        raise ArgumentError(f"create: {name} is {show(found)}; expected one of {', '.join(choices)}")
