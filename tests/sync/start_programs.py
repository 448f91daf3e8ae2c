"""What workers run that meet in a store of keys which has seen earlier starts."""

import os
import signal
import sys
from datetime import timedelta

import numpy as np
from torch.distributed import TCPStore
from torch.distributed.run import main as torchrun

from tensorkv import RankDeadError
from tensorkv.engines.transport.rendezvous import connect
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


STEPS = 40


def elastic(own, first, folder):
    """A launcher of one of up to three hosts, which goes on with those that are left."""
    words = ["--nnodes=1:3", "--nproc-per-node=1", "--max-restarts=3", "--monitor-interval=0.2", "--rdzv-backend=c10d"]
    # A host is missing after two seconds, and another one is waited for as long.
    conf = f"is_host={int(own == first)},last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=2"
    place = [f"--rdzv-endpoint={first}:29400", f"--rdzv-conf={conf}", f"--local-addr={own}"]
    torchrun([*words, *place, __file__, "train_from_checkpoint", folder])


def train_from_checkpoint(folder):
    """Count the workers of each step, and keep what came out; each start begins where the last checkpoint is."""
    with create(timeout_s=10) as kv:
        if not kv.load(f"{folder}/checkpoint", missing_ok=True):
            kv.init("steps", np.zeros(3, np.float32))
            kv.init("workers", np.zeros(3, np.float32))
            kv.set_optimizer("sgd", lr=1.0, maximize=True)
        say(f"rank {RANK} of {SIZE} begins at step {kv.info('steps').version}")
        while kv.info("steps").version < STEPS:
            done = kv.info("steps").version
            kv.push(["steps", "workers"], [np.full(3, 1 / SIZE, np.float32), np.ones(3, np.float32)])
            if done % 5 == 4:
                kv.save(f"{folder}/checkpoint")
                say(f"saved {done + 1}")
            if SIZE == 3 and done == 12:
                # From here on the test takes a host away, and nobody goes on without it.
                say("at step 12")
                signal.pause() if RANK == 2 else kv.barrier()
        say(f"ended with {SIZE}: {kv.pull('steps').tolist()} {kv.pull('workers').tolist()}")


def a_child_is_another_worker():
    store, rank, _ = connect(timedelta(seconds=30))
    child = os.fork()
    if not child:
        os.environ["RANK"] = "1"
        store, rank, _ = connect(timedelta(seconds=30))
        store.set("rank of the child", str(rank))
        os._exit(0)
    os.waitpid(child, 0)
    assert (rank, store.get("rank of the child")) == (0, b"1")
    say("met")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
