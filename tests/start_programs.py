"""What workers run that meet in a store of keys which has seen earlier starts."""

import os
import sys
import time

import numpy as np
from dist_programs import RANK, SIZE, create, say
from torch.distributed import TCPStore


def other_counts():
    """Each worker's launcher has counted another number of restarts."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(RANK)
    for _ in range(2):
        with create(timeout_s=20) as kv:
            assert kv.broadcast("a", np.full(3, RANK, np.float32)).tolist() == [0, 0, 0]
    say("met")


def stale(before, first):
    """The worker ``first`` is there before the others; ``before`` is what the earlier start has announced."""
    keys = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)

    def has_come():
        if first == "0":
            return keys.get("tensorkv/1/start").decode() != before
        return keys.add(f"tensorkv/1/{before}/turns", 0) == SIZE

    deadline = time.monotonic() + 30
    while int(first) != RANK and not has_come() and time.monotonic() < deadline:
        time.sleep(0.02)
    with create(timeout_s=20) as kv:
        assert kv.broadcast("a", np.full(3, RANK, np.float32)).tolist() == [0, 0, 0]
    say("met")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
