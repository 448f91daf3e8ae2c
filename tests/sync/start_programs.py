"""What workers run that meet in a store of keys which has seen earlier starts."""

import os
import signal
import sys

import numpy as np
from torch.distributed import TCPStore
from torch.distributed.run import main as torchrun

from tensorkv import RankDeadError
from tests.support.until import until
from tests.sync.dist_programs import RANK, SIZE, create, say


def other_counts():
    """Each worker's launcher has counted another number of restarts."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(RANK)
    for _ in range(2):
        with create() as kv:
            assert kv.broadcast("a", np.full(3, RANK, np.float32)).tolist() == [0, 0, 0]
    say("met")


def stale(before, first):
    """The worker ``first`` is there before the others; ``before`` is what the earlier start has announced."""
    keys = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)

    def has_come():
        if first == "0":
            return keys.get("tensorkv/start").decode() != before
        return keys.add(f"tensorkv/{before}/turns", 0) >= SIZE

    if int(first) != RANK:
        until(has_come)
    with create() as kv:
        assert kv.broadcast("a", np.full(3, RANK, np.float32)).tolist() == [0, 0, 0]
    say("met")


def node(*addresses):
    """One of two launchers, each on a host of its own, with one worker."""
    words = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--monitor-interval=0.5", "--rdzv-backend=c10d"]
    place = [f"--rdzv-endpoint={addresses[0]}:29400", f"--rdzv-conf=is_host={int(RANK == 0)}"]
    torchrun([*words, *place, f"--local-addr={addresses[RANK]}", __file__, "one_node_fails"])


def one_node_fails():
    """At the first start the last worker ends; the other stays, until its launcher starts it again."""
    count = os.environ["TORCHELASTIC_RESTART_COUNT"]
    with create() as kv:
        kv.init("a", np.zeros(3, np.float32))
        kv.barrier()
        say(f"rank {RANK} at count {count}")
        try:
            if RANK == SIZE - 1 and count == "0":
                say("fault fired")
                os._exit(3)
            assert kv.pushpull("a", np.ones(3, np.float32)).tolist() == [SIZE] * 3
            say(f"rank {RANK} met the others at count {count}")
        except RankDeadError:
            say(f"rank {RANK} waits")
            signal.pause()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
