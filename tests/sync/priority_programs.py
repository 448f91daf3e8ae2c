"""What workers run whose pushes wait for each other: in which order is each finished?"""

import sys
from pathlib import Path

import numpy as np

from tensorkv.engines.sync.allreduce import AllReduce
from tests.support.until import until
from tests.sync.dist_programs import F32, RANK, SIZE, create, say


def record(is_ready):
    """Note the keys of pushes in the order in which they are served; the first waits until all is ready."""
    right, order = AllReduce.run, []

    def run(self):
        if not order:
            until(is_ready)
        order.append(self.call.text.split('"')[3])
        return right(self)

    AllReduce.run = run
    return order


def begin(keys, shared_memory):
    """Make a store and the stages of its pushes."""
    kv = create(shared_memory=shared_memory == "True")
    kv.init(keys, [np.zeros(100_000, F32)] * len(keys))
    for key in keys:
        kv.push(key, np.ones(100_000, F32))
    kv.barrier()
    return kv


def waiting(folder, shared_memory):
    """While the first push waits, all make three others."""
    priorities = {"a": 0, "b": 1, "c": 5, "d": 3}
    with begin(list(priorities), shared_memory) as kv:
        order = record(lambda: len(list(Path(folder).iterdir())) == SIZE)
        for key, priority in priorities.items():
            kv.push(key, np.full(100_000, ord(key), F32), priority=priority)
        (Path(folder) / str(RANK)).touch()
        for key in priorities:
            assert (kv.pull(key) == ord(key) * SIZE).all(), key
        say("order", *order)


def awaited(folder, shared_memory):
    """The last worker makes its third push when its second has been finished; the others have made it long before."""
    last = RANK == SIZE - 1
    with begin(["a", "b", "c"], shared_memory) as kv:
        order = record(lambda: len(list(Path(folder).iterdir())) == SIZE)
        kv.push("a", np.ones(100_000, F32))
        kv.push("b", np.full(100_000, 2, F32))
        if last:
            (Path(folder) / str(RANK)).touch()
            assert (kv.pull("b") == 2 * SIZE).all()
        kv.push("c", np.full(100_000, 3, F32), priority=9)
        if not last:
            (Path(folder) / str(RANK)).touch()
        assert (kv.pull("c") == 3 * SIZE).all()
        say("order", *order)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
