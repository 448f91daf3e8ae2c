"""How stores end: a close beside other calls, calls in exit handlers, a close in a signal handler."""

import atexit
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

import tensorkv
from tensorkv.errors import KeyNotFoundError, StoreClosedError
from tests.support.processes import Program
from tests.support.until import LIMIT_S, until

VERBS = {
    "push": lambda kv, folder: kv.push("w", np.ones(2)),
    "pushpull": lambda kv, folder: kv.pushpull("w", np.ones(2)),
    "pull": lambda kv, folder: kv.pull("w"),
    "rows": lambda kv, folder: kv.row_sparse_pull("w", row_ids=[0]),
    "init": lambda kv, folder: kv.init("n", np.zeros(2)),
    "delete": lambda kv, folder: kv.delete("w"),
    "save": lambda kv, folder: kv.save(folder / "saved"),
    "load": lambda kv, folder: kv.load(folder / "kept"),
    "snapshot": lambda kv, folder: kv.snapshot(),
    "set_optimizer": lambda kv, folder: kv.set_optimizer("sgd", lr=1.0),
    "set_updater": lambda kv, folder: kv.set_updater(None),
}


@pytest.mark.parametrize("durable", [False, True], ids=["memory", "folder"])
def test_close_waits_for_the_call_under_way_and_the_rest_is_refused(durable, tmp_path):
    kv = tensorkv.create("local", **({"path": tmp_path / "store"} if durable else {}))
    kv.init("w", np.zeros(2))
    kv.save(tmp_path / "kept")
    begun, go_on = threading.Event(), threading.Event()

    def updater(key, received, stored):
        stored += received
        begun.set()
        assert go_on.wait(LIMIT_S)

    kv.set_updater(updater)
    outcome = {}

    def call(name, verb):
        try:
            verb()
            outcome[name] = "done"
        except BaseException as error:
            outcome[name] = type(error)

    def start(name, verb):
        thread = threading.Thread(target=call, args=(name, verb))
        thread.start()
        return thread

    threads = [start("under way", lambda: kv.push("w", np.ones(2)))]
    assert begun.wait(LIMIT_S)
    threads.append(start("close", kv.close))
    threads += [start(name, lambda verb=verb: verb(kv, tmp_path)) for name, verb in VERBS.items()]
    go_on.set()
    for thread in threads:
        thread.join()
    assert outcome.pop("under way") == "done"
    assert outcome.pop("close") == "done"
    # Those that came before the close are done, perhaps without a key that was deleted; nothing else is raised, and
    # nothing happens in a closed store.
    allowed = {StoreClosedError} | ({KeyNotFoundError} if outcome["delete"] == "done" else set())
    assert {each for each in outcome.values() if each != "done"} <= allowed
    for verb in VERBS.values():
        with pytest.raises(StoreClosedError):
            verb(kv, tmp_path)


def call_at_exit(engine, n, is_warm, is_late, folder):
    """Have an exit handler use every verb that changes a store, and close it."""
    kv = tensorkv.create("local", **({"path": folder / "store"} if engine == "folder" else {}))
    kv.init("w", np.zeros(n, np.float32))
    kv.set_optimizer("sgd", lr=1.0)
    if is_warm:
        kv.push("w", np.ones(n, np.float32))

    def last():
        if is_late:
            # As if no thread could be started any more, which is so from Python 3.12 on.
            def refuse(thread):
                raise RuntimeError("can't create new thread at interpreter shutdown")

            threading.Thread.start = refuse
        kv.push("w", np.ones(n, np.float32))
        assert kv.pushpull("w", np.ones(n, np.float32))[0] == kv.pull("w")[-1] == -2 - is_warm
        kv.save(folder / "saved")
        kv.close()
        print("done")

    atexit.register(last)


@pytest.mark.parametrize(
    ("engine", "n", "warm", "late"),
    [
        ("memory", 10, "cold", "early"),
        ("memory", 1_000_000, "cold", "early"),
        ("memory", 1_000_000, "cold", "late"),
        ("folder", 1_000_000, "warm", "early"),
        ("folder", 1_000_000, "cold", "late"),
    ],
)
def test_calls_in_exit_handlers_work(engine, n, warm, late, tmp_path):
    with Program(call_at_exit, engine, n, warm == "warm", late == "late", tmp_path) as program:
        assert (program.wait(), program.text()) == (0, "done\n")
    with tensorkv.create() as kv:
        kv.load(tmp_path / "saved")
        assert kv.info("w").version == 2 + (warm == "warm")


FINALIZER = """
import sys
import numpy as np, tensorkv

class Run:
    def __init__(self, **options):
        self.kv = tensorkv.create("local", threads=2, **options)
        self.kv.init("w", np.zeros(1_000_000, np.float32))
        self.kv.push("w", np.ones(1_000_000, np.float32))
        self.me = self

    def __del__(self):
        assert sys.is_finalizing()
        self.kv.push("w", np.full(1_000_000, 2, np.float32))
        assert self.kv.pull("w").tolist() == [2] * 1_000_000
        self.kv.close()
        print("done", flush=True)

run = Run(**({"path": sys.argv[1]} if len(sys.argv) > 1 else {}))
"""


@pytest.mark.parametrize("engine", ["memory", "folder"])
def test_calls_in_finalizers_at_the_end_of_the_interpreter_work(engine, tmp_path):
    """Threads of the store have ended by then."""
    command = [sys.executable, "-c", FINALIZER, *([str(tmp_path)] if engine == "folder" else [])]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


def push_until_terminated(folder, n, how, acknowledged):
    """Push, writing a byte for each push that has returned, until a signal handler closes the store and ends."""
    kv = tensorkv.create("local", path=folder, log_nbytes=1 << 22)
    if "w" not in kv:
        kv.init("w", np.zeros(n, np.float32))
        kv.set_optimizer("sgd", lr=1.0)

    def handle(*_):
        kv.close()
        if how == "exit":
            sys.exit(7)
        os._exit(7)

    signal.signal(signal.SIGTERM, handle)
    one = np.ones(n, np.float32)
    with open(acknowledged, "ab", buffering=0) as file:
        while True:
            kv.push("w", one)
            file.write(b"a")


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize(("how", "n"), [("_exit", 3_000_000), ("exit", 1000)])
def test_a_store_that_a_handler_closes_keeps_every_acknowledged_push(how, n, tmp_path):
    acknowledged, file = 0, tmp_path / "acknowledged"
    for life in range(3):
        file.write_bytes(b"")
        with Program(push_until_terminated, tmp_path / "store", n, how, file) as program:
            until(lambda pushes=2 + life: file.stat().st_size >= pushes)
            program.process.terminate()
            assert program.wait() == 7, program.text()
        acknowledged += file.stat().st_size
        with tensorkv.create("local", path=tmp_path / "store") as kv:
            value, version = kv.pull("w"), kv.info("w").version
        assert value.min() == value.max() == -version
        assert version in (acknowledged, acknowledged + 1)
        acknowledged = version
