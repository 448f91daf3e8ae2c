"""What workers run from `create` to the end of their process: who meets whom, forks, exits, earlier groups."""

import atexit
import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import torch
from torch.distributed import TCPStore

import tensorkv
from tensorkv.engines.sync import group
from tensorkv.engines.transport import rendezvous
from tests.support.descriptors import open_files
from tests.support.until import LIMIT_S
from tests.sync.dist_programs import RANK, SIZE, create, say

ENGINES = os.path.dirname(group.__file__)


def crosswise(job, sees_namespaces):
    """One of two jobs whose ranks sit crosswise in two PID namespaces: each rank 0 has the other one's process ID."""
    if sees_namespaces != "True":
        real = rendezvous._namespace
        rendezvous._namespace = lambda kind: "" if kind == "pid" else real(kind)
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


def sums():
    with create() as kv:
        kv.init("a", torch.zeros(3))
        assert kv.pushpull("a", torch.ones(3)).tolist() == [SIZE] * 3


def after_groups(is_referred_to):
    """A process group was there before the store, and is over: where torch starts again, so does the store."""
    torch.distributed.init_process_group("gloo")
    # What a DistributedDataParallel, for example, goes on to refer to.
    kept = torch.distributed.distributed_c10d._get_default_store() if is_referred_to == "True" else None
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # Else the last worker could find the rendezvous store of the group, just before rank 0 lets go of it.
    in_turn("destroyed")
    sums()
    if kept is None:
        # Another group of torch's own on the store of an earlier one would find the addresses that this one has left.
        torch.distributed.init_process_group("gloo")
        sums()
        torch.distributed.destroy_process_group()
    sums()
    say("met each time", "with the store of the group still there" if kept is not None else "")


def again():
    """A store that could not be created, on some workers or on one, is created at the next try."""
    if RANK == 0:
        try:
            create(timeout_s=1)
        except tensorkv.RankDeadError:
            say("fault fired")
    in_turn("failed")
    sums()
    sums()
    say("met")


def fails_late():
    """Workers have opened the memory that they share, and one does not say so in time."""
    right = group.ProcessGroup._all_agree

    def late(self, name, holds):
        if RANK:
            raise RuntimeError("planted")
        self.timeout_s = 0.2
        return right(self, name, holds)

    group.ProcessGroup._all_agree = late
    try:
        create()
    except (tensorkv.RankDeadError, RuntimeError) as error:
        say(error)
    say("left open:", open_files("/memfd:tensorkv"))


def in_turn(name):
    """Go on when rank 0 has come here."""
    signals = TCPStore("127.0.0.1", int(os.environ["SIGNALS"]), is_master=False)
    signals.wait([name]) if RANK else signals.set(name, "")


# ------------------------------------------------------------ children

VERBS = {
    "init": lambda kv: kv.init("b", torch.zeros(3)),
    "push": lambda kv: kv.push("a", torch.ones(3)),
    "pull": lambda kv: kv.pull("a"),
    "pull out": lambda kv: kv.pull("a", out=torch.zeros(3)),
    "pull many": lambda kv: kv.pull(["a"] * 9, out=[torch.zeros(3) for _ in range(9)]),
    "pushpull": lambda kv: kv.pushpull("a", torch.ones(3)),
    "set_optimizer": lambda kv: kv.set_optimizer("sgd", lr=1),
    "optimizer": lambda kv: kv.optimizer,
    "keys": lambda kv: kv.keys(),
    "stats": lambda kv: kv.stats(),
    "save": lambda kv: kv.save("checkpoint"),
    "barrier": lambda kv: kv.barrier(),
    "close": lambda kv: kv.close(),
}


def use(kv):
    """Use a parent's store, which is refused at once; then another one."""
    assert "parent" in repr(kv)
    for name, verb in VERBS.items():
        try:
            verb(kv)
        except tensorkv.ForkedStoreError:
            continue
        raise AssertionError(f"{name} was not refused")
    if kv.type == "dist_async":
        try:
            tensorkv.create("dist_async")
            raise AssertionError("Ray was joined from a forked child")
        except tensorkv.ForkedStoreError:
            pass
    alone()


def alone():
    with tensorkv.create("local") as own:
        own.init("a", torch.zeros(70_000))
        assert own.pushpull("a", torch.ones(70_000)).sum() == 70_000


def forked(kv, then):
    """Fork a child that ends as any script does: exit handlers run, and all objects are finalized."""
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)
        try:
            then(kv)
        except BaseException as error:
            say("child:", repr(error))
            sys.exit(5)
        sys.exit(7)
    return child


def wait_for(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Numbers(torch.utils.data.Dataset):
    """What a data loader reads in a forked child."""

    def __init__(self, kv):
        self.kv = kv

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.kv.pull("a")


def children(engine, folder):
    """Children of every kind end while the store is in use, and it goes on as if they had never been."""
    options = {"local": {"path": folder}, "links": {"shared_memory": False}}.get(engine, {})
    kv = tensorkv.create({"links": "dist_sync"}.get(engine, engine), **options)
    kv.init("a", torch.zeros(3))
    kv.push("a", torch.ones(3))
    kv.pull("a")
    if RANK:
        # A push of rank 0 is under way, and its thread in the middle of it.
        in_turn("forked")
    kv.push("a", torch.full((3,), 2.0))
    assert wait_for(forked(kv, use)) == 7
    if not RANK:
        in_turn("forked")
    assert kv.pull("a").tolist() == [2.0 * kv.num_workers] * 3
    if engine in ("links", "dist_async"):
        assert wait_for(forked(kv, lambda _: os.kill(os.getpid(), signal.SIGTERM))) == -signal.SIGTERM
        held = subprocess.run(
            ["ls", "-l", "/proc/self/fd"], close_fds=False, capture_output=True, text=True, check=True
        )
        # What Ray lets others inherit is not ours to choose.
        assert "socket:" not in held.stdout or engine == "dist_async", held.stdout
        if RANK == 0:
            process = multiprocessing.get_context("forkserver").Process(target=alone)
            process.start()
            process.join()
            assert process.exitcode == 0
    assert subprocess.run([sys.executable, "-c", "exit(3)"], preexec_fn=lambda: None, check=False).returncode == 3
    process = multiprocessing.get_context("fork").Process(target=use, args=(kv,))
    process.start()
    process.join()
    assert process.exitcode == 0
    try:
        list(torch.utils.data.DataLoader(Numbers(kv), num_workers=1, multiprocessing_context="fork"))
        raise AssertionError("a loader has used the store")
    except tensorkv.ForkedStoreError:
        pass
    for number in (3.0, 4.0):
        kv.push("a", torch.full((3,), number))
        assert kv.pull("a").tolist() == [number * kv.num_workers] * 3
        assert kv.pushpull("a", torch.full((3,), -number)).tolist() == [-number * kv.num_workers] * 3
    kv.close()
    say("goes on")


def outlived():
    """The last worker is killed, and a forked child of it lives on: the others do not wait for the child."""
    kv = create(shared_memory=False)
    kv.init("a", torch.zeros(3))
    kv.pushpull("a", torch.ones(3))
    if RANK == SIZE - 1:
        if os.fork() == 0:
            say("child", os.getpid())
            time.sleep(LIMIT_S)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        kv.pushpull("a", torch.ones(3))
    except tensorkv.RankDeadError as error:
        say(error)


# ------------------------------------------------------------ exits


def at_exit(first_push, shared_memory):
    """Push and pull in an exit handler, which runs before that of the store or, registered earlier, after it."""
    kv = create(shared_memory=shared_memory == "True")
    kv.init("a", torch.zeros(100_000))
    if first_push == "before":
        kv.push("a", torch.ones(100_000))
        kv.pull("a")
    atexit.register(end, kv, "of the user")
    if first_push == "after":
        kv.push("a", torch.ones(100_000))
    if first_push == "never":
        # What Python does from 3.12 on.
        def refuse(_):
            raise RuntimeError("can't create new thread at interpreter shutdown")

        threading.Thread.start = refuse


def end(kv, whose):
    for number in (2.0, 3.0):
        kv.push("a", torch.full((100_000,), number))
        assert set(kv.pull("a").tolist()) == {number * SIZE}
        assert set(kv.pushpull("a", torch.full((100_000,), -number)).tolist()) == {-number * SIZE}
    kv.close()
    say("closed in the exit handler", whose)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
