"""What workers run from `create` to the end of their process: who meets whom, forks, exits, earlier groups."""

import os
import sys
import time

import numpy as np
import torch
from dist_programs import RANK, SIZE, create, say

from tensorkv.engines import group

ENGINES = os.path.dirname(group.__file__)


def crosswise(job, sees_namespaces):
    """One of two jobs whose ranks sit crosswise in two PID namespaces: each rank 0 has the other one's process ID."""
    if sees_namespaces != "True":
        real = group._namespace
        group._namespace = lambda kind: "" if kind == "pid" else real(kind)
    say("pid", os.readlink("/proc/self"))
    number = float(job)
    with create() as kv:
        kv.init("a", np.zeros(1000, np.float32))
        for _ in range(30):
            got = kv.pushpull("a", np.full(1000, number * (RANK + 1), np.float32))
            assert set(got.tolist()) == {3 * number}, got
            kv.push("a", np.full(1000, number, np.float32))
            got = kv.pull("a")
            assert set(got.tolist()) == {2 * number}, got
    say("sums of its own")


def late():
    """The last worker is late at every step of ``create``, as on a busy machine."""
    steps = set()

    def step(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(ENGINES) and code not in steps:
            steps.add(code)
            time.sleep(0.1)

    if RANK == SIZE - 1:
        sys.setprofile(step)
    kv = create()
    sys.setprofile(None)
    kv.init("a", torch.zeros(3))
    assert kv.pushpull("a", torch.ones(3)).tolist() == [SIZE] * 3
    kv.close()
    say("met", f"late at {len(steps)} steps" if steps else "")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
