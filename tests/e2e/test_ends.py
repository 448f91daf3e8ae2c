"""How stores end: a close beside other calls, calls in exit handlers, a close in a signal handler."""

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

import tensorkv
from tensorkv.errors import StoreClosedError

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
        assert go_on.wait(60)

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
    assert begun.wait(60)
    threads.append(start("close", kv.close))
    threads += [start(name, lambda verb=verb: verb(kv, tmp_path)) for name, verb in VERBS.items()]
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert outcome.pop("under way") == "done"
    assert outcome.pop("close") == "done"
    # Those that came before the close are done; nothing else is raised, and nothing happens in a closed store.
    assert {each for each in outcome.values() if each != "done"} <= {StoreClosedError}
    for verb in VERBS.values():
        with pytest.raises(StoreClosedError):
            verb(kv, tmp_path)


AT_EXIT = """
import atexit, sys, threading
import numpy as np, tensorkv

engine, n, is_warm, is_late = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "warm", sys.argv[4] == "late"
kv = tensorkv.create("local", **({"path": sys.argv[5] + "/store"} if engine == "folder" else {}))
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
    kv.save(sys.argv[5] + "/saved")
    kv.close()
    print("done")

atexit.register(last)
"""


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
    command = [sys.executable, "-c", AT_EXIT, engine, str(n), warm, late, str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (shown.returncode, shown.stdout) == (0, "done\n"), shown.stderr[-2000:]
    with tensorkv.create() as kv:
        kv.load(tmp_path / "saved")
        assert kv.info("w").version == 2 + (warm == "warm")


CLOSES_IN_HANDLER = """
import os, signal, sys
import numpy as np, tensorkv

kv = tensorkv.create("local", path=sys.argv[1], log_nbytes=1 << 22)
n = int(sys.argv[2])
if "w" not in kv:
    kv.init("w", np.zeros(n, np.float32))
    kv.set_optimizer("sgd", lr=1.0)

def handle(*_):
    kv.close()
    if sys.argv[3] == "exit":
        sys.exit(7)
    os._exit(7)

signal.signal(signal.SIGTERM, handle)
one = np.ones(n, np.float32)
while True:
    kv.push("w", one)
    os.write(1, b"a")
"""


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize(("how", "n"), [("_exit", 3_000_000), ("exit", 1000)])
def test_a_store_that_a_handler_closes_keeps_every_acknowledged_push(how, n, tmp_path):
    acknowledged = 0
    for life in range(3):
        command = [sys.executable, "-c", CLOSES_IN_HANDLER, str(tmp_path / "store"), str(n), how]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
            for _ in range(2 + life):
                acknowledged += len(process.stdout.read(1))
            process.send_signal(signal.SIGTERM)
            rest, errors = process.communicate(timeout=100)
            acknowledged += len(rest)
        assert process.returncode == 7, errors.decode()[-2000:]
        with tensorkv.create("local", path=tmp_path / "store") as kv:
            value, version = kv.pull("w"), kv.info("w").version
        assert value.min() == value.max() == -version
        assert version in (acknowledged, acknowledged + 1)
        acknowledged = version
