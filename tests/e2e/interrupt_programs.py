"""Programs of one process in which signal handlers and trace functions raise, or call the store, at any moment.

Run as ``python -m tests.e2e.interrupt_programs PROGRAM ENGINE [planted]``; prints how often something was raised or
called. With ``planted``, calls are not shielded, and the program is to find out.
"""

import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

import tensorkv
from tensorkv import Rows
from tensorkv.engines.local import LocalEngine
from tensorkv.shard import native
from tests.support.amount import amount

F32 = np.float32
# At each so many lines something is done.
LINES = amount(5, 1)
SOURCE = str(Path(tensorkv.__file__).parent)


class Boom(BaseException):
    """What the handlers raise: no Exception, as SystemExit and KeyboardInterrupt are none."""


def create(engine, folder=None):
    if engine == "durable":
        # A snapshot is due now and then.
        return tensorkv.create("local", path=folder or tempfile.mkdtemp(), log_nbytes=1 << 20)
    return tensorkv.create(engine)


def state(kv):
    """Everything that a store holds, comparable."""
    with kv._engine._shard.frozen() as (entries, rule):
        held = {}
        for entry in entries:
            value = entry.value
            rows = value.to_rows() if entry.spec.is_table else None
            parts = [rows.ids, rows.values] if rows else [value]
            tensors = [*parts, *(entry.state[name] for name in sorted(entry.state))]
            held[entry.key] = (entry.version, [tensor.numpy(force=True).tobytes() for tensor in tensors])
        optimizer = rule.optimizer.spec.to_json() if hasattr(rule, "optimizer") else type(rule).__name__
    return held, optimizer


# ------------------------------------------------------------ calls, each made again and again

SIZES = {"a": (2, 3), "b": (37,), "c": (300, 301)}
MANY = [f"m{i}" for i in range(12)]


def ones(key, number=1.0):
    return np.full(SIZES.get(key, (5,)), number, F32)


def torch_ones(key):
    return torch.from_numpy(ones(key))


def double(key, received, stored):
    if isinstance(stored, Rows):
        stored, received = stored.values, received.values
    stored += received * 2


def fill(kv):
    kv.init({key: ones(key) for key in [*SIZES, *MANY]})
    kv.init("t", Rows(np.array([1, 7]), np.ones((2, 3), F32), num_rows=50))


def rows(number):
    return Rows(np.array([number % 50, (number * 7 + 1) % 50]), np.ones((2, 3), F32), num_rows=50)


def outs(*keys):
    return [np.zeros(SIZES.get(key, (5,)), F32) for key in keys]


def pushpull_with_outs(kv, number, *keys):
    """Push, and check that outs that were filled at all were filled whole."""
    into = outs(*keys)
    try:
        kv.pushpull(list(keys), [[ones(key), ones(key, number)] for key in keys], out=into)
    finally:
        for out in into:
            assert (out == out.flat[0]).all(), "half an out"


CALLS = {
    "quick": lambda kv, number: kv.push("a", ones("a", number)),
    "quick torch": lambda kv, number: kv.pushpull("a", torch_ones("a"), out=torch_ones("a")),
    "list": lambda kv, number: kv.push(["a", "b"], [ones("a", number), ones("b")]),
    "parts": lambda kv, number: kv.push("b", [ones("b"), torch_ones("b"), ones("b", number)]),
    "mapping": lambda kv, number: kv.pushpull({"a": ones("a"), "c": ones("c", number)}),
    "large": lambda kv, number: kv.push("c", [ones("c"), ones("c", number), ones("c")]),
    "outs": lambda kv, number: pushpull_with_outs(kv, number, "a", "b", "c"),
    # Arrays that are not plain are parsed in Python.
    "parsed": lambda kv, number: kv.pushpull(["a", "c"], [np.flip(ones("a", number)), np.flip(ones("c"))]),
    "many": lambda kv, number: kv.pushpull(MANY, [ones(key, number) for key in MANY], out=outs(*MANY)),
    "rows": lambda kv, number: kv.push("t", rows(number)),
    "rows and dense": lambda kv, number: kv.push(["t", "b"], [rows(number), ones("b", number)]),
    "init": lambda kv, number: kv.init([f"new{number}", f"also{number}"], [ones("a"), ones("b")]),
    "broadcast": lambda kv, number: kv.broadcast(f"new{number}", ones("b")),
}
RULES = {
    "assign": lambda kv: None,
    "sgd": lambda kv: kv.set_optimizer("sgd", lr=0.1, momentum=0.9),
    "adam": lambda kv: kv.set_optimizer("adam", lr=0.1),
    "nadam": lambda kv: kv.set_optimizer("nadam", lr=0.1),
    "updater": lambda kv: kv.set_updater(double),
}
CONTROL = {
    "set_optimizer": lambda kv, number: kv.set_optimizer("adagrad", lr=0.1 * number),
    "set_hyperparameters": lambda kv, number: kv.set_hyperparameters("a", lr=0.01 * number),
    "delete": lambda kv, number: kv.delete(MANY[number % len(MANY)]) if MANY[number % len(MANY)] in kv else None,
    "load": lambda kv, number: kv.load(SAVED),
}
SAVED = ""


# ------------------------------------------------------------ raising at every line


class AtLine:
    """Runs a call, and has a signal come at its n-th line in this package, whose handler does something."""

    def __init__(self, line, act):
        self.left, self.has_acted = line, False
        signal.signal(signal.SIGUSR1, lambda *_: act())

    def trace(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        if event == "line" and not self.has_acted:
            self.left -= 1
            if self.left < 0:
                self.has_acted = True
                signal.raise_signal(signal.SIGUSR1)
        return self.trace

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(None)


def boom():
    raise Boom


def raise_at_every_line(engine, calls, rules):
    """Every call, under every rule, with an exception at each of its lines; a twin makes it undisturbed."""
    raised = 0
    for rule in rules:
        for name, call in calls.items():
            folder = tempfile.mkdtemp()
            kv, twin = create(engine, folder), tensorkv.create()
            for each in (kv, twin):
                fill(each)
                RULES[rule](each)
                if name == "set_hyperparameters":
                    each.set_optimizer("sgd", lr=0.1)
                call(each, 1)
            line = 0
            while call_with_boom(kv, twin, call, line, f"{engine} {rule} {name}"):
                line += LINES
                raised += 1
            if engine == "durable":
                kv.close()
                kv = create(engine, folder)
                if rule == "updater":
                    kv.set_updater(double)
                assert state(kv) == state(twin), f"{rule} {name}: the folder does not hold what the store held"
            kv.close()
            twin.close()
    return raised


def call_with_boom(kv, twin, call, line, what):
    """Make a call that is interrupted at a line, once more if it did not happen; return whether it has that line."""
    number, before = line + 2, state(kv)
    with AtLine(line, boom) as at, suppress(Boom):
        call(kv, number)
    call(twin, number)
    found, expected = state(kv), state(twin)
    if at.has_acted and found == before != expected:
        call(kv, number)
        found = state(kv)
    assert found == expected, f"{what}: an exception at line {line} of the call leaves half of it"
    return at.has_acted


# ------------------------------------------------------------ calling the store at every line


def call_at_every_line(engine):
    """A handler that pulls, saves, pushes and looks at each line of a push: it sees whole pushes, and nothing hangs."""
    folder, made, version = tempfile.mkdtemp(), 0, 0
    kv = create(engine)
    keys = ["a", "b", "c"]
    kv.init(keys, [ones(key, 0) for key in keys])

    def check(values, versions):
        assert len({float(value) for each in values for value in (each.min(), each.max())}) == 1, "half a push is seen"
        assert len(set(versions)) == 1, "versions of half a push"

    def pull():
        check(kv.pull(keys), [1])

    def save():
        kv.save(folder)
        with tensorkv.create() as other:
            other.load(folder)
            check(other.pull(keys), [other.info(key).version for key in keys])

    def snapshot():
        with kv.snapshot() as moment:
            check(moment.pull(keys), moment.versions.values())

    def push():
        kv.push(keys, [ones(key, 1e6) for key in keys])

    def look():
        nonlocal version
        assert kv.stats()["verbs"]
        assert len(kv) == 3
        assert "a" in kv
        before, version = version, kv.info("c").version
        assert version >= before, "a push was seen, and is not there any more"

    forms = {
        "list": lambda number: kv.push(keys, [ones(key, number) for key in keys]),
        "pushpull": lambda number: kv.pushpull(keys, [ones(key, number) for key in keys]),
        # Arrays that are not plain are parsed in Python.
        "parsed": lambda number: kv.pushpull(keys, [np.flip(ones(key, number)) for key in keys]),
        # Each is a push of its own, so one key at a time is looked at.
        "quick": lambda number: kv.push("a", ones("a", number)),
    }
    for name, call in forms.items():
        for act in (push, look, lambda: kv.pull("a")) if name == "quick" else (pull, save, snapshot, push, look):
            # Saving is slow, and most lines are alike to it.
            made += act_at_lines(kv, call, act, LINES * (5 if act is save else 1), grown=2 if act is push else 1)
        if name != "quick":
            check(kv.pull(keys), [kv.info(key).version for key in keys])
    kv.close()
    return made


def act_at_lines(kv, call, act, step, grown):
    """Act at every ``step``-th line of a push, which it must neither lose nor double."""
    made = 0
    while True:
        before = kv.info("a").version
        with AtLine(made * step, act) as at:
            call(float(before))
        if not at.has_acted:
            return made
        assert kv.info("a").version == before + grown, f"a push was lost or doubled at line {made * step}"
        made += 1


def pull_at_every_line_in_step():
    """A handler that pulls at each line of what a worker of ``dist_sync`` does in the caller's thread: nothing hangs.

    These are calls that are refused, which all workers are told, and calls that only look.
    """
    kv = tensorkv.create("dist_sync")
    kv.init("w", np.zeros(6, F32))

    def refused(kind, verb, *arguments):
        def call():
            try:
                verb(*arguments)
            except kind:
                return
            raise AssertionError("the call was not refused")

        return call

    calls = [
        refused(tensorkv.KeyNotFoundError, kv.push, "nowhere", np.ones(6, F32)),
        refused(tensorkv.ValueMismatchError, kv.pushpull, ["w"], [np.ones(7, F32)]),
        refused(tensorkv.KeyExistsError, kv.init, "w", np.ones(6, F32)),
        refused(tensorkv.KeyNotFoundError, kv.delete, "nowhere"),
        refused(tensorkv.ArgumentError, kv.set_optimizer, "sgd", -1),
        lambda: kv.push("w", np.ones(6, F32)),
        lambda: kv.info("w"),
        kv.stats,
        lambda: "w" in kv,
    ]
    pulled = [0]

    def pull():
        assert kv.pull("w").shape == (6,)
        pulled[0] += 1

    for call in calls:
        for line in range(0, 180, LINES):
            with AtLine(line, pull):
                call()
    kv.close()
    return pulled[0]


# ------------------------------------------------------------ raising at random moments


def raise_at_random(engine, times, rule="sgd", seed=0):
    """Raise three kinds of exception at so many random moments; the store is whole each time, idle, and closes."""
    rng, raised = random.Random(seed), 0
    kinds = [Boom, type("Timeout", (Exception,), {}), KeyboardInterrupt]
    wanted = [Boom]

    def handle(*_):
        raise wanted[0]

    signal.signal(signal.SIGALRM, handle)
    while raised < times:
        # From the smallest, which a call of a few microseconds pushes, to what threads divide.
        n = rng.choice([6, 1000, 100_000, 600_000])
        folder = tempfile.mkdtemp()
        kv = create(engine, folder)
        kv.init("w", np.zeros(n, F32))
        if rule == "sgd":
            kv.set_optimizer("sgd", lr=1.0)
        is_listed, scale = rng.random() < 0.5, 1e-4 + 2e-8 * n

        def push_until_raised(kv, acknowledged, n=n, rule=rule, is_listed=is_listed, scale=scale):
            """Push until a handler raises; return how many pushes have returned."""
            wanted[0] = rng.choice(kinds)
            one = np.ones(n, F32)
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + rng.random() * scale)
                while True:
                    part = one if rule == "sgd" else np.full(n, acknowledged + 1, F32)
                    kv.push(["w"], [part]) if is_listed else kv.push("w", part)
                    acknowledged += 1
            except tuple(kinds):
                return acknowledged

        pushed = 0
        for _ in range(times // 5):
            pushed = check_pushes(kv, push_until_raised(kv, pushed))
            raised += 1
        if engine == "durable":
            # An exception while a push is under way, and the end of a with block at once.
            with kv:
                pushed = push_until_raised(kv, pushed)
            raised += 1
            kv = create(engine, folder)
            check_pushes(kv, pushed)
        kv.close()
    return raised


def check_pushes(kv, acknowledged):
    """Return how many pushes the store has had: those that have returned, and perhaps the interrupted one."""
    value, version = kv.pull("w"), kv.info("w").version
    assert value.min() == value.max(), "half a push"
    assert version in (acknowledged, acknowledged + 1), f"{version} pushes, {acknowledged} acknowledged"
    assert abs(value[0]) == version, f"the value is of {value[0]} pushes, the version {version}"
    return version


# ------------------------------------------------------------ raising in workers that push in step


def raise_in_step(times):
    """Raise at random moments of pushes of ``dist_sync``; each has happened on every worker, or on none.

    At the end a pull that waits for another worker is interrupted, too: it ends at once and has done nothing.
    """
    kv = tensorkv.create("dist_sync")
    rng, raised, pushes = random.Random(kv.rank), 0, 0
    signal.signal(signal.SIGALRM, lambda *_: boom())
    sizes = {"w": 6, "x": 100_000}
    kv.init({key: np.zeros(size, F32) for key, size in sizes.items()})

    def check(expected):
        for key, value in zip(sizes, kv.pull(list(sizes)), strict=True):
            assert (value == expected).all(), f"{key} is {value[:3]} after {pushes} pushes, expected {expected}"

    while pushes < times:
        if pushes % 2 == 0:
            # So that no push has to wait for a worker that is behind, which would end the store.
            check(pushes * kv.num_workers)
        try:
            signal.setitimer(signal.ITIMER_REAL, 1e-6 + rng.random() * 4e-4)
            kv.push(list(sizes), [np.full(size, pushes + 1, F32) for size in sizes.values()])
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Boom:
            raised += 1
        # What the signal came too late for.
        with suppress(Boom):
            signal.setitimer(signal.ITIMER_REAL, 0)
        pushes = kv.info("w").version
        assert pushes == kv.info("x").version
    check(times * kv.num_workers)
    zeros = [np.zeros(size, F32) for size in sizes.values()]
    if kv.rank == 0:
        kv.push(list(sizes), zeros)
        out = np.full(6, 7, F32)
        with suppress(Boom):
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            # The other worker comes when this one has given up.
            kv.pull("w", out=out)
            raise AssertionError("the pull was not interrupted")
        assert (out == 7).all()
        Path(os.environ["INTERRUPTED"]).touch()
    else:
        while not os.path.exists(os.environ["INTERRUPTED"]):
            time.sleep(0.01)
        kv.push(list(sizes), zeros)
    check(0)
    kv.close()
    return raised


def main(program, engine, *more):
    global SAVED
    if "planted" in more:
        LocalEngine.protect = staticmethod(lambda work, *args: work(*args))
        native.can_look = lambda: False
    torch.set_num_threads(1)
    SAVED = os.path.join(tempfile.mkdtemp(), "saved")
    with tensorkv.create() as kv:
        fill(kv)
        kv.save(SAVED)
    if program == "lines":
        count = raise_at_every_line(engine, CALLS, [more[0]])
    elif program == "control":
        count = raise_at_every_line(engine, CONTROL, ["assign"])
    elif program == "step":
        count = raise_in_step(int(more[0]))
    elif program == "pulls":
        count = pull_at_every_line_in_step()
    elif program == "calls":
        count = call_at_every_line(engine)
    else:
        count = raise_at_random(engine, int(more[0]), *more[1:2])
    print(count)


if __name__ == "__main__":
    main(*sys.argv[1:])
