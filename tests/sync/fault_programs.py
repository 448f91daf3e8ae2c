"""What workers run in which something goes wrong that not every worker sees at the same time."""

import contextlib
import os
import random
import signal
import sys
import threading
import time

import numpy as np
import torch

import tensorkv
from tensorkv.arrays.outputs import GivenOuts
from tensorkv.engines import partition
from tensorkv.engines.sync import allreduce, group, host, push
from tensorkv.storage import checkpoint
from tests.sync import stages
from tests.sync.dist_programs import F32, RANK, SIZE, create, say


def outcome(name, do):
    """Say what a call did."""
    try:
        say(name, "gave", do())
    except (tensorkv.TensorKVError, MemoryError) as error:
        kind = "MemoryError" if isinstance(error, MemoryError) else type(error).__name__
        say(name, "raised", kind, "|", error)


def die(*_):
    say("fault fired")
    os.kill(os.getpid(), signal.SIGKILL)


def half_summed():
    """Rank 0 dies when some chunks of a value are summed, while the others are busy with what came before."""
    push.SLOT_NBYTES_OVER_HOSTS = 1 << 20
    count = 4_000_000
    right, seen = allreduce.AllReduce.reduce, []
    with create(shared_memory=False) as kv:
        kv.init("a", np.zeros(count, F32))
        out = np.empty(count, F32)
        kv.pushpull("a", np.ones(count, F32), out=out)

        def slow(*args):
            seen.append(args)
            if RANK == 0 and len(seen) > 6:
                die()
            if RANK > 0:
                time.sleep(0.3)
            return right(*args)

        allreduce.AllReduce.reduce = slow
        outcome("pushpull", lambda: kv.pushpull("a", np.full(count, 7, F32), out=out))
        say("the out has", np.unique(out).tolist())
        outcome("afterwards a pull", lambda: np.unique(kv.pull("a")).tolist())


def outs_stay(count):
    """Some worker breaks off somewhere in a call, which raises on every worker and writes no out."""
    push.SLOT_NBYTES = 1 << 10
    partition._WHOLE = 256
    rng, fired, failed = random.Random(3), [], 0
    for number in range(int(count)):
        name = rng.choice(["stage_in", "reduce", "return_values", "wait_for_values"])
        at, victim = rng.randrange(1 if name == "wait_for_values" else 12), rng.randrange(SIZE)
        verb = rng.choice(["pushpull", "pushpull many", "pushpull cast", "clipped", "updater", "trainer"])
        seen = []

        def faulty(seen=seen, at=at, number=number):
            if seen and len(seen) == at + 1:
                fired.append(number)
                raise ZeroDivisionError("planted")
            if seen:
                seen.append(number)

        take_away = stages.plant(name, faulty) if victim == RANK else None
        kv = create()
        outs, expected = [], []
        try:
            # Who is ahead may break off while this worker is still preparing.
            do, outs, after = prepare(kv, verb)
            expected = [out.clone() for out in outs]
            # From now on it counts.
            seen.append(number)
            do()
            expected = after
        except (tensorkv.TensorKVError, ZeroDivisionError):
            failed += 1
        finally:
            if take_away is not None:
                take_away()
        for out, right_one in zip(outs, expected, strict=True):
            assert torch.equal(out, right_one), (number, name, at, victim, verb, out, right_one)
        # Who was done hears of it now.
        with contextlib.suppress(tensorkv.TensorKVError):
            kv.close()
    say("fired", len(fired), "failed", failed)


def prepare(kv, verb):
    """Return a call, the arrays that it writes, and what they are to be."""
    if verb == "trainer":
        model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 20))
        for param in model.parameters():
            torch.nn.init.ones_(param)
        trainer = tensorkv.Trainer(model, kv, "sgd", lr=1.0)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        outs = [param.data for param in model.parameters()]
        return trainer.step, outs, [torch.full_like(out, 1.0 - SIZE) for out in outs]
    keys = [f"k{number}" for number in range(10)]
    ones = [torch.ones(400) for _ in keys]
    kv.init(keys, ones)
    if verb == "updater":
        kv.set_updater(lambda key, received, stored: stored.copy_(received))
    if verb == "clipped":
        kv.set_optimizer("sgd", lr=1.0, max_grad_norm=1e6)
    outs = [torch.zeros(400, dtype=torch.float64 if verb == "pushpull cast" else torch.float32) for _ in keys]
    if verb == "pushpull many":
        # What comes again goes a shorter way.
        kv.pushpull(keys, ones, out=[out.clone() for out in outs])
    after = 1 - SIZE if verb == "clipped" else SIZE
    return lambda: kv.pushpull(keys, ones, out=outs), outs, [torch.full_like(out, after) for out in outs]


def gathering(shared_memory):
    """The last rank dies before workers tell each other what updaters raised."""
    with create(shared_memory=shared_memory == "True") as kv:
        kv.init("a", np.zeros(3, F32))
        kv.set_updater(lambda key, received, stored: np.add(stored, received, out=stored))
        kv.push("a", np.ones(3, F32))
        if RANK == SIZE - 1:
            group.ProcessGroup.all_gather = die
        outcome("push", lambda: kv.push("a", np.ones(3, F32)))
        outcome("pull", lambda: kv.pull("a").tolist())


def long_call():
    """The last rank dies before a call whose text is longer than what workers tell each other of an error."""
    names = [f"layer.{number:04}.weight" for number in range(100)]
    with create() as kv:
        kv.init(names, [np.zeros(3, F32)] * len(names))
        kv.barrier()
        if RANK == SIZE - 1:
            die()
        outcome("pushpull", lambda: kv.pushpull(names, [np.ones(3, F32)] * len(names)))


class Full(host.Segment):
    """Memory that cannot be had."""

    def __init__(self, nbytes, path=None, *, private=False):
        if path is None:
            raise OSError("planted")
        super().__init__(nbytes, path, private=private)


def no_memory(shared_memory):
    """One worker has no memory for a new key: with shared memory the store goes on, over hosts it ends."""
    right, news = host.Segment, group.ProcessGroup.published_error

    def late_error(*args):
        # Rank 0, which keeps the store of keys, has come to its end by now.
        time.sleep(0.2)
        return news(*args)

    with create(shared_memory=shared_memory == "True") as kv:
        kv.init("a", np.zeros(3, F32))
        kv.pushpull("a", np.ones(3, F32))
        if RANK == 0:
            host.Segment = Full
        else:
            group.ProcessGroup.published_error = late_error
        outcome("init", lambda: kv.init("b", np.zeros(100, F32)))
        host.Segment = right
        outcome("pushpull", lambda: kv.pushpull("a", np.ones(3, F32)).tolist())


def leave_without_memory():
    """There is no memory for what others push while a worker has left, and then there is."""
    right = host.Segment
    with create() as kv:
        kv.init("a", np.zeros(100_000, F32))
        if RANK == 0:
            host.Segment = Full
            outcome("first push", lambda: kv.push("a", np.ones(100_000, F32)))
            host.Segment = right
            outcome("second push", lambda: kv.push("a", np.full(100_000, 2, F32)))
        outcome("leave", kv.leave)
        outcome("pull", lambda: np.unique(kv.pull("a")).tolist())


def load_without_memory(path):
    """A checkpoint for which there is no memory leaves the store as it was."""
    right = host.Segment
    with create() as kv:
        kv.init("a", np.zeros(3, F32))
        kv.save(path)
        kv.set_optimizer("sgd", lr=0.5)
        kv.push("a", np.ones(3, F32))
        host.Segment = Full
        outcome("load", lambda: kv.load(path))
        host.Segment = right
        say("optimizer", (kv.optimizer or {}).get("name"))
        outcome("pull", lambda: kv.pull("a").tolist())


def read_without_memory(path):
    """Rank 0 alone has no memory of its own in which to read a checkpoint."""
    with create() as kv:
        kv.init("a", np.zeros(3, F32))
        kv.save(path)
        if RANK == 0:
            checkpoint.read = no_room
        outcome("load", lambda: kv.load(path))
        outcome("afterwards a push", lambda: kv.push("a", np.ones(3, F32)))


def no_room(*_):
    raise MemoryError("planted")


def re_created():
    """A thread pulls a key that another thread deletes and re-creates with another shape."""
    right, looked, changed = GivenOuts.check, threading.Event(), threading.Event()

    def check(self, specs):
        right(self, specs)
        looked.set()
        changed.wait()

    with create() as kv:
        kv.init("a", np.zeros(5_000_000, F32))
        GivenOuts.check = check
        # Strided, for a call that is parsed.
        out = np.full((5_000_000, 2), -1, F32)[:, 0]
        puller = threading.Thread(target=outcome, args=("pull", lambda: kv.pull("a", out=out)))
        puller.start()
        looked.wait()
        kv.delete("a")
        kv.init("a", np.ones(4, F32))
        changed.set()
        puller.join()
        say("unchanged" if (out == -1).all() else "written")
        outcome("again", lambda: kv.pull("a").tolist())


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
