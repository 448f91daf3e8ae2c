"""Servers on two hosts, a worker that uses them all along, and faults of one host in between."""

import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from benchmarks.common.hosts import hosts
from tests.support.ray_hosts import RayHosts
from tests.support.until import until

FAULTS = ("crash", "cable", "hang")


class HostsInUse:
    """Two hosts, each with a folder and a server of its own; a context manager.

    The worker, on the first host, pushes, makes keys, takes snapshots and saves, and checks what it reads.

    Args:
        chance: chooses how long faults last, and what is between them.
    """

    def __init__(self, chance):
        self._chance, self._stack, self.faults = chance, ExitStack(), Counter()

    def __enter__(self):
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self._made = stack.enter_context(hosts(2))
            self._cluster = stack.enter_context(RayHosts(self._made))
            path, self._until, self._progress = folder / "path", folder / "until", folder / "progress"
            path.mkdir()
            for host in self._made:
                (folder / host.name).mkdir()
                host.mount(folder / host.name, path)
            options = {"num_servers": 2, "path": str(path / "store")}
            self._worker = self._cluster.run(self._made[0], "do_everything", options, str(folder), str(self._until))
            assert self._worker.say() == "pushing"
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        self._stack.__exit__(*error)

    def disturb(self, fault):
        """Have the second host be away for a while, in one of the ways of ``FAULTS``."""
        host, before = self._made[1], self._pushed()
        # Each fault meets a worker that has gone on after the one before.
        until(lambda: self._pushed() > before + 1 or self._worker.has_ended())
        if self._worker.has_ended():
            self._worker.end()
            raise AssertionError("the worker has ended before it was told to")
        time.sleep(self._chance.uniform(0.5, 3))
        if fault == "crash":
            host.crash()
            host.boot()
            self._cluster.join(host)
        elif fault == "cable":
            host.unplug()
            time.sleep(self._chance.uniform(0.5, 8))
            host.plug()
        else:
            host.pause()
            time.sleep(self._chance.uniform(0.5, 8))
            host.resume()
        self.faults[fault] += 1

    def _pushed(self):
        """How often the worker has pushed."""
        text = self._progress.read_text() if self._progress.exists() else ""
        return int(text or 0)

    def end(self):
        """End the worker; return what it has counted.

        Raises:
            AssertionError: a push was lost or made twice, or the worker has read something wrong.
        """
        self._until.touch()
        (said,) = self._worker.end()
        assert said["least"] == said["most"] == said["pushed"], said
        return said
