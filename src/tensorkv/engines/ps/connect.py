"""Connect to the servers of a store, or start them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .client.engine import PSEngine, StoreEndingError, close_abandoned
from .options import PSOptions
from .ray import cluster, placement


def connect(given: Mapping[str, Any]) -> PSEngine:
    """Return a client of a store; its servers are started if there are none.

    Args:
        given: the options that the user has given, of ``PSOptions``.

    Raises:
        ArgumentError: options out of range, or other than those of the store that is there.
        StorageError: a server's folder cannot be opened.
        RankDeadError, ServerDeadError: others did not join in time.
    """
    options = PSOptions.parse(given)
    started = cluster.enter(options.address, options.timeout_s, insecure=options.insecure)
    try:
        close_abandoned()
        deadline = time.monotonic() + options.timeout_s
        while True:
            try:
                return _join(options, given, started=started)
            except StoreEndingError:
                # As soon as these servers have ended, new ones can be started.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
    except BaseException:
        cluster.leave(started)
        raise


def _join(options: PSOptions, given: Mapping[str, Any], *, started: bool) -> PSEngine:
    """Return a client of the servers that are there, or of new ones."""
    found = cluster.find_servers(options.name, options.timeout_s)
    servers, theirs = found or cluster.make_servers(options)
    options.check_same(given, theirs)
    try:
        places = cluster.places(servers, options.name, options.insecure, options.timeout_s)
        weights = placement.weights(theirs, [place[3] for place in places])
        own = replace(theirs, pull_dtype=options.pull_dtype, reader=options.reader)
        return PSEngine(servers, own, places, weights, options.timeout_s, started=started)
    except BaseException:
        if found is None and cluster.end_if_unused(servers[0].actor):
            cluster.stop_servers(servers)
        raise
