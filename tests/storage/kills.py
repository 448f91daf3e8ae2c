"""Processes that push to a durable shard and are killed, again and again: run as a program by test_durable_kills.py.

    python kills.py FOLDER SEED KILLS DURABILITY HOW OPTIMIZER [PLANT]

HOW is "time" (at any moment), "calls" (in a call of the system) or "seams" (at a step of seams.py).

With "sgd", push i adds 1 to row i of "w" and to every element of "n", as request i of its client. The program itself
starts no thread, so that a child forked from it has torch warm and nothing half done.
What is in the store after each push is known to the bit, from a shard that nobody interrupts.
"""

import collections
import gc
import json
import os
import random
import select
import signal
import sys
import time
import traceback

import torch

from tensorkv.arrays.interop import NUMPY
from tensorkv.arrays.packing import raw_bytes
from tensorkv.arrays.regions import Region
from tensorkv.arrays.rows import Rows
from tensorkv.arrays.slices import Slices
from tensorkv.arrays.spec import KeySpec
from tensorkv.shard import native, optimizers
from tensorkv.shard.entry import Batch
from tensorkv.shard.shard import Shard
from tensorkv.storage import durable, wal
from tensorkv.storage.dedup import AppliedRequests
from tensorkv.storage.durable import DurableLog
from tests.storage.seams import SEAMS, Seam

PUSHES = 150
SPECS = {"sgd": optimizers.spec("sgd", {"lr": 1.0, "maximize": True}), "adam": optimizers.spec("adam", {"lr": 0.1})}
SPEC = [SPECS["sgd"]]
HISTORY = []
CALLS = ("pwritev", "fsync", "fdatasync", "ftruncate", "replace", "unlink", "open", "close")
WRONG = 3


def open_shard(folder, durability):
    return durable.open_shard(folder, durability=durability, log_nbytes=3000, threads=1)


def prepare(shard):
    """Bring a shard to where pushes can begin, whatever of that was done before."""
    if "w" not in shard:
        values = [torch.zeros(PUSHES, 1), torch.zeros(3), torch.zeros(3)]
        specs = [KeySpec(value.shape, value.dtype, NUMPY, False) for value in values]
        shard.init(["w", "n", "s"], values, specs)
    if shard.optimizer is None:
        shard.set_optimizer(SPEC[0])


def gradients(i):
    size = 1.0 if SPEC[0].name == "sgd" else 1 / (i + 3)
    return Batch(
        "push", ["w", "n"], [[Rows(torch.tensor([i]), torch.full((1, 1), size), PUSHES)], [torch.full((3,), size)]]
    )


def slices(i):
    """Two of three pushes bring a slice of "s" that makes it incomplete or leaves it so, the third one the last."""
    place = i // 2 % 3
    value = torch.full((1,), float(i))
    return Slices(torch.Size([3]), (0, 3), [Region(((place, place + 1),))], [value], value.dtype)


def apply(shard, i, requests=()):
    """Make push number i: of Rows, an array and a slice, which is parsed, or of a plain array."""
    batch = gradients(i)
    if i % 2 == 0:
        shard.push(Batch("push", [*batch.keys, "s"], [*batch.parts, [slices(i)]]), requests=requests)
        return
    keys, parts = batch.keys[1:], batch.parts[1:]
    if not shard.try_compiled(native.Call(None, "push", keys, parts, None, 0), requests=requests):
        assert not native.can_look()
        shard.push(Batch("push", keys, parts), requests=requests)


def push(shard, i):
    """Push number i; return whether it was new to the shard."""
    client, seq = f"client-{i % 2}", i // 2 + 1
    is_new = not shard.log.applied.has_applied(client, seq)
    if is_new:
        apply(shard, i, [(client, seq)])
    return is_new


def bits(shard):
    with shard.frozen() as (entries, _):
        return [
            (
                entry.key,
                entry.version,
                *((name, bytes(raw_bytes(t))) for name, t in [("", entry.value), *sorted(entry.state.items())]),
                *(() if entry.incomplete is None else map(bytes, map(raw_bytes, entry.incomplete.to_tensors()))),
            )
            for entry in entries
        ]


def write_history():
    shard = Shard(threads=1)
    prepare(shard)
    HISTORY.append(bits(shard))
    for i in range(PUSHES):
        apply(shard, i)
        HISTORY.append(bits(shard))
    shard.close()


def check(shard, acknowledged):
    """Exit unless every acknowledged push was applied once, the next at most once, and no other."""
    may_be = HISTORY[acknowledged : acknowledged + 2]
    found = bits(shard)
    if found in may_be:
        return
    rows = torch.empty(PUSHES, 1)
    shard.pull(["w"], [[rows]])
    pushes = HISTORY.index(found) if found in HISTORY else "no number"
    raise SystemExit(f"{acknowledged} are acknowledged, {pushes} of pushes lead to this: {rows.flatten().tolist()}")


def work(folder, durability, acknowledged, pipe):
    """Be the process that is killed."""
    shard = open_shard(folder, durability)
    prepare(shard)
    check(shard, acknowledged)
    for i in range(acknowledged, PUSHES):
        is_new = push(shard, i)
        os.write(pipe, b"n" if is_new else b"r")
    check(shard, PUSHES)
    shard.close()


def kill_in_call(number, part, die):
    """Let this process die before, inside or after one of its calls of the system.

    Args:
        number: of the call.
        part: "before", "half" or "after".
        die: what ends the process, given the name of the call.
    """
    left = [number]

    def wrap(name):
        real = getattr(os, name)

        def call(*arguments, **options):
            left[0] -= 1
            if left[0]:
                return real(*arguments, **options)
            if part == "half" and name == "pwritev":
                descriptor, buffers, at = arguments
                whole = b"".join(bytes(buffer) for buffer in buffers)
                os.pwrite(descriptor, whole[: random.randrange(len(whole) + 1)], at)
            elif part == "after":
                real(*arguments, **options)
            die(name)
            return real(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, wrap(name))


def child(folder, durability, acknowledged, acks, deaths, how):
    try:
        if how == "calls":
            # Some live long: a store that was opened often takes many calls to open.
            number = random.randrange(1, 400 if random.random() < 0.05 else 60)
            part = random.choice(["before", "half", "after"])

            def die(name):
                os.write(deaths, f"{name} {part}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)

            kill_in_call(number, part, die)
        elif how == "seams":
            name = random.choice(list(SEAMS))

            def die_there():
                os.write(deaths, f"{name}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)

            Seam(name, random.randrange(1, 5), die_there).__enter__()
        work(folder, durability, acknowledged, acks)
    except BaseException:
        traceback.print_exc()
        os._exit(WRONG)
    os._exit(0)


def run_once(folder, durability, acknowledged, how, found):
    """Fork a process, kill it; return how many pushes are acknowledged then, or None where a check failed."""
    acks, acks_in = os.pipe()
    deaths, deaths_in = os.pipe()
    seed = random.getrandbits(32)
    pid = os.fork()
    if not pid:
        random.seed(seed)
        child(folder, durability, acknowledged, acks_in, deaths_in, how)
    os.close(acks_in)
    os.close(deaths_in)
    if how == "time":
        if random.random() < 0.5:
            # While it opens the store, or soon after.
            time.sleep(random.random() * 0.025)
        else:
            # Between two pushes, however long it took to get there.
            select.select([acks], [], [], 60)
            time.sleep(random.random() * 0.005)
        os.kill(pid, signal.SIGKILL)
    # Read first: what is read to its end is a process that has ended.
    with open(acks, "rb") as file:
        seen = file.read()
    with open(deaths, "rb") as file:
        found["deaths"].update(file.read().decode().splitlines())
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        found["kills"] += 1
        found["in the middle"] += bool(seen)
    elif os.WEXITSTATUS(status):
        return None
    found["pushes"] += len(seen)
    found["resent, known"] += seen.count(b"r")
    return acknowledged + len(seen)


# ---------------------------------------------------------------- faults that have to be noticed


def forget_requests():
    AppliedRequests.has_applied = lambda self, client, seq: False


def acknowledge_first():
    real = push

    def push_late(shard, i):
        os.write(ACKS[0], b"n")
        return real(shard, i)

    def work_hastily(folder, durability, acknowledged, pipe):
        ACKS[0] = pipe
        shard = open_shard(folder, durability)
        prepare(shard)
        check(shard, acknowledged)
        for i in range(acknowledged, PUSHES):
            push_late(shard, i)

    globals()["work"] = work_hastily


ACKS = [0]


def forget_requests_in_snapshots():
    real = DurableLog._snapshot_records

    def records(self, shard):
        for record in real(self, shard):
            yield durable.Record({**record.head, "clients": {}}, record.layout, record.payload)

    DurableLog._snapshot_records = records


def old_log_goes_first():
    """Remove what a snapshot replaces before the snapshot counts."""
    real = wal.WriteAheadLog._finish_snapshot

    def finish(self, temporary, descriptor, lsn):
        for first, _, name in wal._files(self._folder)[1]:
            if first <= lsn:
                self._folder.remove(name)
        real(self, temporary, descriptor, lsn)

    wal.WriteAheadLog._finish_snapshot = finish


PLANTS = {
    "no dedup": forget_requests,
    "acknowledged before it is logged": acknowledge_first,
    "requests outside the snapshot": forget_requests_in_snapshots,
    "old log removed first": old_log_goes_first,
}


def main(folder, seed, kills, durability, how, optimizer, plant=None):
    # This also imports what the first step of an optimizer does.
    SPEC[0] = SPECS[optimizer]
    write_history()
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would leave threads behind"
    # A collection in a child would copy most of its memory.
    gc.freeze()
    random.seed(int(seed))
    durable.DIGEST_EVERY = 8
    if plant is not None:
        PLANTS[plant]()
    found = {
        "kills": 0,
        "in the middle": 0,
        "pushes": 0,
        "resent, known": 0,
        "stores": 0,
        "deaths": collections.Counter(),
    }
    while found["kills"] < int(kills):
        store = os.path.join(folder, f"{seed}-{found['stores']}")
        found["stores"] += 1
        acknowledged = 0
        while acknowledged < PUSHES:
            acknowledged = run_once(store, durability, acknowledged, how, found)
            if acknowledged is None:
                return WRONG
        # The one that ended by itself, or was killed at its very end, has left everything.
        if run_once(store, durability, PUSHES, "nothing", found) is None:
            return WRONG
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
