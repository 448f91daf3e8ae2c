"""Random programs of verbs, disturbed in random ways, that every engine must run as an undisturbed `local` store does.

A program comes from its seed alone. Every worker makes the same calls with arrays of its own, and runs the program on a
reference as well: one `local` store in memory that is given all workers' arrays, which nothing disturbs. After each
step both must hold the same bits, versions and optimizer numbers, or have raised the same error. Between and during
steps the worker changes directory, sets torch's defaults and modes, forks, has signal handlers raise or call the store,
reads from other threads, opens the store again, or kills a server.

Run as ``python disturbed.py ENGINE FIRST COUNT [OPTION=VALUE ...]``; with ``dist_sync`` as each of several workers.
Prints how many programs, steps and disturbances there were; the first difference ends it with the seed and the step.
"""

import faulthandler
import json
import os
import random
import signal
import sys
import tempfile
import threading
from collections import Counter
from contextlib import contextmanager, nullcontext

import numpy as np
import torch

import tensorkv
from tensorkv import Rows, TensorKVError
from tests.support.until import LIMIT_S

HANG_S = LIMIT_S
STEPS = 12
SHAPES = {"a": (3,), "b": (40, 5), "c": (70_000,), "d": (), "e": (0, 2), "big": (300_000,)}
DTYPES = {"a": "float32", "b": "float64", "c": "float32", "d": "float16", "e": "float32", "big": "float32"}
TABLE_ROWS = 1_000_000
SMALL = [f"s{i}" for i in range(10)]
OPTIMIZERS = [
    ("sgd", {"lr": 0.1}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
    ("adam", {"lr": 0.01}),
    ("adamw", {"lr": 0.01, "amsgrad": True}),
    ("adagrad", {"lr": 0.1}),
    ("rmsprop", {"lr": 0.01, "momentum": 0.5, "centered": True}),
]


class Boom(BaseException):
    """What signal handlers raise."""


class DifferenceError(Exception):
    """A program has found a difference."""


# ------------------------------------------------------------ programs


def shape_of(key):
    return SHAPES.get(key, (7,))


def dtype_of(key):
    return DTYPES.get(key, "float32")


def array(seed, key, index, library):
    """An array of a key; the same seed gives the same numbers in every library."""
    rng = np.random.default_rng([seed, index, *key.encode()])
    # Few bits, so that sums over workers do not depend on how the reference brackets them.
    made = np.asarray(rng.integers(-64, 64, shape_of(key)) / 8, dtype_of(key))
    return torch.from_numpy(made) if library == "torch" else made


def rows(seed, index, library):
    rng = np.random.default_rng([seed, index, 99])
    ids = rng.integers(0, 40, 5) * 1000
    values = (rng.integers(-64, 64, (5, 3)) / 8).astype(np.float32)
    if library == "torch":
        return Rows(torch.from_numpy(ids), torch.from_numpy(values), TABLE_ROWS)
    return Rows(ids, values, TABLE_ROWS)


def make_program(seed, allowed):
    """Return the steps of a program: what every worker calls, and what disturbs it."""
    rng = random.Random(seed)
    steps = [{"verb": "init", "keys": [*SHAPES, *SMALL], "table": True}]
    for _ in range(STEPS):
        verb = rng.choices(
            ["push", "pushpull", "pull", "pull regions", "rows", "pull rows", "optimizer", "numbers", "delete", "init",
             "save and load", "states", "snapshot", "wrong"],
            [8, 6, 3, 2, 3, 2, 2, 1, 1, 1, 1, 1, 1, 2],
        )[0]  # fmt: skip
        few = rng.sample([*SHAPES, *SMALL], rng.randint(1, 4))
        steps.append(
            {
                "verb": verb,
                "keys": SMALL if rng.random() < 0.3 else few,
                "table": False,
                "parts": rng.randint(1, 3),
                "form": rng.choice(["one", "list", "mapping"]),
                "library": rng.choice(["numpy", "torch"]),
                "optimizer": rng.randrange(len(OPTIMIZERS)),
                "number": rng.choice([0, 1, 0.5, 0.0]),
                "wrong": rng.choice(["key", "shape", "dtype", "form", "number"]),
                "outs": rng.random() < 0.5,
                "disturb": rng.choice(allowed) if rng.random() < 0.6 else "",
            }
        )
    return steps


# ------------------------------------------------------------ one step on one store


class Side:
    """A store and the workers whose arrays it is given: one, or for the reference all."""

    def __init__(self, kv, workers, folder, takes_snapshots):
        self.kv, self.workers, self.folder, self.takes_snapshots = kv, workers, folder, takes_snapshots

    def parts(self, seed, step, key):
        count = step.get("parts", 1)
        return [
            array(seed, key, worker * 10 + index, step.get("library", "numpy"))
            for worker in self.workers
            for index in range(count)
        ]

    def step(self, seed, step):
        """Make a step's call and return what it gives, comparable."""
        verb, keys = step["verb"], [key for key in step["keys"] if step["verb"] == "init" or key in self.kv]
        return getattr(self, "do_" + verb.replace(" ", "_"))(seed, step, keys)

    def do_init(self, seed, step, keys):
        keys = [key for key in keys if key not in self.kv]
        if keys:
            # Every worker gives the first one's values.
            self.kv.init({key: array(seed, key, 0, step.get("library", "numpy")) for key in keys})
        if step["table"] and "table" not in self.kv:
            self.kv.init("table", rows(seed, 0, "numpy"))

    def call(self, seed, step, keys, verb, **options):
        values = {key: self.parts(seed, step, key) for key in keys}
        if step["form"] == "mapping":
            return verb(values, **options)
        if step["form"] == "one" and keys:
            return [verb(key, values[key], **options) for key in keys]
        return verb(keys, list(values.values()), **options)

    def do_push(self, seed, step, keys):
        self.call(seed, step, keys, self.kv.push)

    def do_pushpull(self, seed, step, keys):
        if step["outs"]:
            outs = [np.zeros(shape_of(key), dtype_of(key)) for key in keys]
            self.kv.pushpull(keys, [self.parts(seed, step, key) for key in keys], out=outs)
            return [out.tobytes() for out in outs]
        found = self.call(seed, step, keys, self.kv.pushpull)
        return [np.asarray(each).tobytes() for each in (found.values() if isinstance(found, dict) else found)]

    def do_pull(self, seed, step, keys):
        return [np.asarray(each).tobytes() for each in self.kv.pull(keys)]

    def do_pull_regions(self, seed, step, keys):
        keys = [key for key in keys if shape_of(key)]
        found = self.kv.pull(keys, region=[slice(shape_of(key)[0] // 3, None) for key in keys])
        return [np.asarray(each).tobytes() for each in found]

    def do_rows(self, seed, step, keys):
        own = [rows(seed, worker, step["library"]) for worker in self.workers]
        self.kv.push("table", own)
        if "b" in self.kv and step["outs"]:
            few = [Rows(np.array([1, 7]), array(seed, "b", worker, "numpy")[:2], 40) for worker in self.workers]
            self.kv.push("b", few)

    def do_pull_rows(self, seed, step, keys):
        found = self.kv.row_sparse_pull("table", row_ids=[0, 5, *range(1000, 30_000, 3000)])
        return np.asarray(found.values).tobytes()

    def do_optimizer(self, seed, step, keys):
        name, numbers = OPTIMIZERS[step["optimizer"]]
        self.kv.set_optimizer(name, **numbers)

    def do_numbers(self, seed, step, keys):
        self.kv.set_hyperparameters(keys[0] if keys and step["outs"] else None, lr=step["number"])

    def do_delete(self, seed, step, keys):
        self.kv.delete(keys[:2])

    def do_save_and_load(self, seed, step, keys):
        self.kv.save(self.folder)
        self.kv.load(self.folder)

    def do_states(self, seed, step, keys):
        self.kv.save_optimizer_states(self.folder + "-states")
        self.kv.load_optimizer_states(self.folder + "-states")

    def do_snapshot(self, seed, step, keys):
        if not self.takes_snapshots:
            return self.do_pull(seed, step, keys)
        with self.kv.snapshot() as held:
            self.call(seed, step, keys[:1], self.kv.push)
            return [np.asarray(each).tobytes() for each in held.pull(keys)]

    def do_wrong(self, seed, step, keys):
        match step["wrong"]:
            case "key":
                self.kv.push(["a", "nowhere"], [array(seed, "a", 0, "numpy")] * 2)
            case "shape":
                self.kv.push(SMALL[0], np.ones(3, np.float32))
            case "dtype":
                self.kv.pushpull(SMALL[0], np.ones(7, np.int64))
            case "form":
                self.kv.push([SMALL[0], SMALL[1]], [np.ones(7, np.float32)])
            case _:
                self.kv.set_optimizer("sgd", lr=-1)

    def everything(self):
        """All that the store holds, as a reader sees it."""
        keys = sorted(self.kv.keys())
        dense = [key for key in keys if key != "table"]
        held = {key: np.asarray(each).tobytes() for key, each in zip(dense, self.kv.pull(dense), strict=True)}
        if "table" in keys:
            held["table"] = np.asarray(
                self.kv.row_sparse_pull("table", row_ids=range(0, 40_000, 1000)).values
            ).tobytes()
        return held, {key: self.kv.info(key).version for key in keys}, self.kv.optimizer


def outcome(side, seed, step):
    """Return what a step gives or which error it raises; anything but a typed error is one too many."""
    try:
        return side.step(seed, step)
    except TensorKVError as error:
        return type(error).__name__


# ------------------------------------------------------------ disturbances


@contextmanager
def threads_that_read(kv):
    """Two threads that pull and look during a step."""
    ended, wrong = threading.Event(), []

    def read():
        while not ended.is_set():
            try:
                kv.pull(SMALL)
                kv.info("c")
            except TensorKVError:
                # Deleted meanwhile.
                ended.wait(0.001)
            except BaseException as error:
                wrong.append(error)
                return

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        if wrong:
            raise DifferenceError(f"a reading thread got {wrong[0]!r}")


@contextmanager
def handler(act, delay_s):
    """Have a signal handler act once, after a while, in the main thread; give a list that says whether it has."""
    fired = []

    def handle(*_):
        fired.append(1)
        act()

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, delay_s)
    try:
        yield fired
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def soon(rng):
    """Return after how many seconds a signal is to come during a step; many steps take less than 0.1 ms."""
    return 10 ** rng.uniform(-6, -2.7)


def fork(kv, rng):
    """A child that tries the store and ends in one way or another; the parent goes on as if nothing had been."""
    how = rng.choice(["exit", "_exit", "drop"])
    child = os.fork()
    if child == 0:
        status = 1
        try:
            kv.pull(SMALL)
        except tensorkv.ForkedStoreError:
            status = 0
        if how == "_exit":
            os._exit(status)
        if how == "drop":
            del kv
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what the parent has not written yet is the parent's
        sys.exit(status)
    if os.waitpid(child, 0)[1]:
        raise DifferenceError("a forked child could use the store, or broke")


MODES = {
    "meta": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu"),
    "errstate": lambda: np.errstate(all="raise"),
}
EVERYWHERE = [*MODES, "dtype", "chdir", "threads", "handler", "fork"]


def give_up():
    faulthandler.dump_traceback(all_threads=True)
    os._exit(3)


class Runner:
    """Runs programs on one engine.

    Args:
        engine: type of the store.
        options: of ``create``; ``path`` is a name in the program's folder, and relative.
        rank, size: of this worker.
    """

    def __init__(self, engine, options, rank=0, size=1):
        self.engine, self.options, self.rank, self.size = engine, options, rank, size
        self.counts = Counter()
        self.allowed = list(EVERYWHERE)
        if engine in ("local", "device"):
            self.allowed += ["boom", "boom"]
        if "path" in options:
            self.allowed.append("reopen")
        if engine == "dist_async" and "path" in options:
            self.allowed += ["kill"] * 4

    def create(self, folder):
        return tensorkv.create(self.engine, **self.options, **self.named(folder))

    def named(self, folder):
        return {"name": os.path.basename(folder)} if self.engine == "dist_async" else {}

    def run(self, seed):
        """Run a program; raise DifferenceError at the first difference."""
        # Not faulthandler's own timer, for which a forked child would wait at its end.
        watchdog = threading.Timer(HANG_S, give_up)
        watchdog.daemon = True
        watchdog.start()
        base = os.environ.get("DISTURBED_FOLDER") or tempfile.gettempdir()
        folder = os.path.join(base, f"{self.engine}-{seed}")
        os.makedirs(folder, exist_ok=True)
        os.chdir(folder)
        rng = random.Random(seed * 31 + self.rank)
        kv, local = self.create(folder), tensorkv.create("local")
        has_snapshots = kv.is_capable("snapshot")
        mine = Side(kv, [self.rank], os.path.join(folder, "saved"), has_snapshots)
        reference = Side(local, range(self.size), os.path.join(folder, f"reference-{self.rank}"), has_snapshots)
        for number, step in enumerate(make_program(seed, self.allowed)):
            what = f"program {seed}, step {number}, {json.dumps(step)}"
            try:
                expected = outcome(reference, seed + number, step)
                found = self.disturbed(mine, seed + number, step, rng, folder, reference)
                if found is not None and found != expected:
                    raise DifferenceError(f"gave {found!r:.80}, local {expected!r:.80}")
                if mine.everything() != reference.everything():
                    raise DifferenceError("the store holds something else than local")
            except DifferenceError as stop:
                raise DifferenceError(f"{what}: {stop}") from None
            except SystemExit:
                # A forked child ends.
                raise
            except BaseException as error:
                raise DifferenceError(f"{what}: raised {error!r}") from error
            self.counts["steps"] += 1
        mine.kv.close()
        reference.kv.close()
        watchdog.cancel()
        self.counts["programs"] += 1

    def disturbed(self, side, seed, step, rng, folder, reference):
        """Make a step while something disturbs it; None: what it gives is not to be compared."""
        kind = step.get("disturb", "")
        if kind == "boom":
            return self.with_boom(side, seed, step, rng, reference)
        # A step may be over before its signal comes.
        if kind != "handler":
            self.counts[kind or "undisturbed"] += 1
        with self.disturbance(kind, side, rng, folder):
            return outcome(side, seed, step)

    @contextmanager
    def disturbance(self, kind, side, rng, folder):
        around = nullcontext()
        if kind in MODES:
            around = MODES[kind]()
        elif kind == "threads":
            around = threads_that_read(side.kv)
        elif kind == "handler":
            around = handler(lambda: side.kv.pull(SMALL[-1]) if SMALL[-1] in side.kv else None, soon(rng))
        elif kind == "chdir":
            os.chdir(tempfile.gettempdir())
        elif kind == "fork":
            fork(side.kv, rng)
        elif kind == "reopen":
            side.kv.close()
            os.chdir(folder)
            side.kv = self.create(folder)
        elif kind == "kill":
            os.kill(rng.choice(side.kv.stats()["servers"])["pid"], signal.SIGKILL)
        elif kind == "dtype":
            torch.set_default_dtype(torch.float64)
        try:
            with around as fired:
                yield
        finally:
            torch.set_default_dtype(torch.float32)
        if kind == "handler" and fired:
            self.counts["handler"] += 1

    def with_boom(self, side, seed, step, rng, reference):
        """Have a handler raise during a step; what did not happen is made again."""
        before = side.everything()

        def boom():
            raise Boom

        found = None
        try:
            with handler(boom, soon(rng)):
                found = outcome(side, seed, step)
        except Boom:
            self.counts["raised"] += 1
            if step["form"] == "one" or step["verb"] in ("rows", "save and load", "states", "snapshot", "init"):
                # Several calls, of which some may have happened: made up for from the reference.
                reference.kv.save(side.folder)
                side.kv.load(side.folder)
            elif side.everything() == before:
                outcome(side, seed, step)
            return None
        return found


def main(engine, first, count, *more):
    options = dict(each.split("=", 1) for each in more)
    options = {name: int(text) if text.isdigit() else text for name, text in options.items()}
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    runner = Runner(engine, options, rank, size)
    # A cluster that outlives the stores of single programs.
    if engine == "dist_async":
        from tensorkv.engines.ps.ray import cluster

        cluster.enter(None, LIMIT_S)
    for seed in range(int(first), int(first) + int(count)):
        runner.run(seed)
    print(json.dumps(runner.counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
