"""A store whose values are published as fast as can be, readers in processes of their own, and servers that are killed.

    python -m tests.support.published MINUTES

does this alone for so many minutes, and prints what it has counted.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress

import numpy as np
import ray

import tensorkv

SERVERS = 2
READERS = 4
KILL_EVERY_S = 20.0
LIMIT_S = 120.0
# Divided over servers and read through shared memory, or small; of the last one few elements change.
SHAPES = {"large": (300_000,), "rows": (600, 100), "small": (3,), "few": (100_000,)}
FEW = 50
LAST = "last"
F32 = np.float32


def values(number):
    """The values of a version: all elements are its number, or a few are."""
    found = {key: np.full(shape, number, F32) for key, shape in SHAPES.items()}
    found["few"][FEW:] = 0
    return found


def number_in(arrays):
    """The number of the version that all arrays are of."""
    found = {
        float(number) for key, array in arrays.items() for number in np.unique(array[: FEW if key == "few" else None])
    }
    assert len(found) == 1, f"versions {sorted(found)} together"
    assert not arrays["few"][FEW:].any()
    return found.pop()


def read(name):
    """Read each newest release whole and by changes until the last; print how many, and how often one was lost."""
    mine, base, last, seen, lost = None, None, None, 0, 0
    with tensorkv.create("dist_async", name=name, timeout_s=LIMIT_S) as kv:
        while last != LAST:
            with kv.wait_release(after=last, timeout_s=LIMIT_S) as release:
                try:
                    pulled = dict(zip(SHAPES, release.pull(list(SHAPES)), strict=True))
                    number = number_in(pulled)
                    if mine is None:
                        mine, base = pulled, release.digest
                    else:
                        changes = release.changes(since=last)
                        tensorkv.apply_changes(mine, changes, base=base)
                        assert number_in(mine) == number
                        base = changes.digest
                    assert base == release.digest
                except tensorkv.ReleaseNotFoundError:
                    # It had been dropped, and the server that held it for this reader was killed.
                    mine, lost = None, lost + 1
                    continue
                last, seen = release.name, seen + 1
    print(json.dumps({"seen": seen, "lost": lost}), flush=True)


class WeightsInUse:
    """Publishes, reads and kills until the block ends; a context manager.

    Args:
        chance: chooses which server is killed.
    """

    def __init__(self, chance):
        self._chance, self._stack, self._stop = chance, ExitStack(), threading.Event()
        self.kills = self.published = 0
        self.errors = []

    def __enter__(self):
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            name = f"published{os.getpid()}"
            options = {"num_servers": SERVERS, "num_workers": 1, "path": f"{folder}/store", "timeout_s": LIMIT_S}
            self._kv = stack.enter_context(tensorkv.create("dist_async", name=name, **options))
            self._kv.init(values(0))
            environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
            self._readers = [
                subprocess.Popen(
                    [sys.executable, "-m", "tests.support.published", "read", name],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                for _ in range(READERS)
            ]
            for reader in self._readers:
                stack.callback(reader.wait)
                stack.callback(reader.kill)
            self._threads = [threading.Thread(target=self._guard, args=(work,)) for work in (self._publish, self._kill)]
            for thread in self._threads:
                thread.start()
                stack.callback(thread.join)
            stack.callback(self._stop.set)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        self._stack.__exit__(*error)

    def _guard(self, work):
        try:
            work()
        except BaseException as error:
            self.errors.append(error)
            raise

    def _publish(self):
        while not self._stop.is_set():
            self.published += 1
            self._kv.push(values(self.published))
            self._kv.publish(str(self.published), keep=2)

    def _kill(self):
        while not self._stop.wait(KILL_EVERY_S):
            with suppress(ray.exceptions.RayActorError):
                server = self._chance.randrange(SERVERS)
                os.kill(self._kv._engine._servers[server].place(LIMIT_S)[1], signal.SIGKILL)
                self.kills += 1

    def end(self):
        """Publish the last release; return what was counted.

        Raises:
            AssertionError: a reader has read two versions together, or something else has failed.
        """
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert not self.errors, self.errors
        self._kv.push(values(self.published + 1))
        self._kv.publish(LAST, keep=2)
        found = {"published": self.published, "kills": self.kills, "reads": 0, "lost": 0}
        for reader in self._readers:
            out, err = reader.communicate(timeout=LIMIT_S)
            assert reader.returncode == 0, out + err
            told = json.loads(out.splitlines()[-1])
            found["reads"] += told["seen"]
            found["lost"] += told["lost"]
        return found


if __name__ == "__main__":
    if sys.argv[1] == "read":
        read(sys.argv[2])
    else:
        with WeightsInUse(random.Random(0)) as used:
            time.sleep(60 * float(sys.argv[1]))
            print(json.dumps(used.end()))
