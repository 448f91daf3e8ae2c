"""What `create` takes for a store on servers, checked; and how a client comes to its servers."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tensorkv.arrays.arguments import check_timeout
from tensorkv.engines.ps.client.engine import PSEngine, StoreEndingError, close_abandoned
from tensorkv.errors import ArgumentError, quote
from tensorkv.transport.wire import Settings

from .ray import cluster


def build(name: str, address: str | None, timeout_s: float, insecure: bool, options: Mapping[str, Any]) -> PSEngine:
    """Return a client of the store of a name; its servers are started if there are none.

    Args:
        name, address, timeout_s, insecure: as for ``tensorkv.create("dist_async")``.
        options: of the store; those that are None are not asked for.

    Raises:
        ArgumentError: options out of range, or other than those of the store that is there.
        StorageError: a server's folder cannot be opened.
        RankDeadError, ServerDeadError: others did not join in time.
    """
    timeout_s = check_timeout(timeout_s)
    if not isinstance(name, str) or not name or "/" in name:
        raise ArgumentError(f"create: name is {name!r}; expected a str without a slash")
    asked = {word: each for word, each in options.items() if each is not None}
    wanted = _settings(asked)
    started = cluster.enter(address, timeout_s, insecure=insecure)
    try:
        close_abandoned()
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return _join(name, wanted, asked, timeout_s, insecure=insecure, started=started)
            except StoreEndingError:
                # The next one has servers of its own, as soon as these have ended.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
    except BaseException:
        cluster.leave(started)
        raise


def _join(
    name: str, wanted: Settings, asked: Mapping[str, Any], timeout_s: float, *, insecure: bool, started: bool
) -> PSEngine:
    """Return a client of the servers that are there, or of new ones."""
    found = cluster.find_servers(name, timeout_s)
    actors, settings = found or cluster.make_servers(name, wanted, timeout_s)
    for word, each in asked.items():
        if getattr(settings, word) != each:
            raise ArgumentError(
                f"create: the store {quote(name)} is there, and its {word} is {getattr(settings, word)!r}, not "
                f"{each!r}; leave the option out to join it, or choose another name"
            )
    try:
        places = cluster.check_safety(actors, insecure, timeout_s)
    except ArgumentError:
        if found is None:
            cluster.stop_servers(actors)
        raise
    return PSEngine(actors, settings, places, timeout_s, started=started)


def _settings(asked: Mapping[str, Any]) -> Settings:
    """Check the options of a new store."""
    settings = Settings(**{"num_workers": int(os.environ.get("WORLD_SIZE", 1)), **asked})
    for word in ("num_servers", "num_workers", "keep"):
        number = getattr(settings, word)
        if type(number) is not int or number < 1:
            raise ArgumentError(f"create: {word} is {number!r}; expected an int of at least 1")
    timeout_s = settings.heartbeat_timeout_s
    if not isinstance(timeout_s, int | float) or isinstance(timeout_s, bool) or not 1 < timeout_s < 1e9:
        raise ArgumentError(
            f"create: heartbeat_timeout_s is {timeout_s!r}; expected seconds, more than the 1 between two heartbeats"
        )
    _check_one_of("mode", settings.mode, ("async", "sync"))
    _check_one_of("nonfinite", settings.nonfinite, ("pass", "raise", "skip"))
    is_sync = settings.mode == "sync"
    if settings.staleness is not None and (type(settings.staleness) is not int or settings.staleness < 0 or is_sync):
        raise ArgumentError(
            f"create: staleness is {settings.staleness!r}; expected an int of at least 0, or None, in mode async"
        )
    if settings.nonfinite != "pass" and is_sync and settings.num_servers > 1:
        raise ArgumentError(
            f"create: nonfinite={settings.nonfinite!r} in mode sync takes one server: of several, one would refuse a "
            "sum whose other pieces the others have taken"
        )
    return _durable(settings, asked)


def _durable(settings: Settings, asked: Mapping[str, Any]) -> Settings:
    if settings.path is None:
        if settings.durability != "memory":
            raise ArgumentError(f"create: durability={settings.durability!r} needs path=, a folder to keep things in")
        return settings
    if "durability" not in asked:
        return replace(settings, durability="process")
    _check_one_of("with a path, durability", settings.durability, ("process", "disk"))
    return settings


def _check_one_of(word: str, found: Any, choices: tuple[str, ...]) -> None:
    if found not in choices:
        raise ArgumentError(f"create: {word} is {found!r}; expected one of {', '.join(choices)}")
