"""Servers that tests use one after another, since to start one takes two seconds of a processor."""

import itertools
import json
from contextlib import ExitStack

import tensorkv

# Pools of several modules may be on one Ray, one after another.
_names = (f"pool{number}" for number in itertools.count())


class ServerPool:
    """Stores of type ``dist_async`` whose servers stay when a test closes the store; a context manager.

    Args:
        folder: for a checkpoint of nothing, which empties a store between two tests.
    """

    def __init__(self, folder):
        self._empty = folder / "empty"
        self._kept = {}
        self._stack = ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stack.close()

    def name(self, **options):
        """Return the name of a store with these options that has no keys, no optimizer and no worker."""
        kept = self._kept.setdefault(json.dumps(options, sort_keys=True), [])
        for name, keeper in kept:
            if keeper.stats()["clients"] == 1:
                keeper.load(self._empty)
                return name
        name = next(_names)
        with tensorkv.create("dist_async", name=name, num_workers=1, **options) as worker:
            worker.save(self._empty)
            # A reader, since the only rank of a worker is taken.
            keeper = self._stack.enter_context(tensorkv.create("dist_async", name=name))
        kept.append((name, keeper))
        return name

    def create(self, **options):
        """Return a store with these options, without keys, whose only worker this is."""
        return tensorkv.create("dist_async", name=self.name(**options))
