"""Programs that run on the hosts of ``test_hosts``; each says lines of JSON."""

import json
import os
import sys
from pathlib import Path

import numpy as np

import tensorkv
from tests.support.until import LIMIT_S

F32 = np.float32
# More than goes in a message, and divided among servers.
SHAPE = (1000, 400)
# So often a worker pushes after the disturbance.
AFTER = 5


def say(told):
    print(json.dumps(told), file=_out, flush=True)


def gradients(rng):
    return {"large": rng.normal(size=SHAPE).astype(F32), "small": rng.normal(size=7).astype(F32)}


def train(options, rounds):
    """Push to a large and a small value in step with the others; say what came out, bit by bit, and who has it."""
    with tensorkv.create("dist_async", timeout_s=LIMIT_S, **options) as kv:
        rng = np.random.default_rng(kv.rank)
        kv.init({"large": np.zeros(SHAPE, F32), "small": np.zeros(7, F32)})
        kv.set_optimizer("adamw", lr=0.1)
        hosts = [server["host"] for server in kv.stats()["servers"]]
        for _ in range(rounds):
            found = kv.pushpull(gradients(rng))
        kv.barrier()
        say({"hosts": hosts, **{key: value.tobytes().hex() for key, value in found.items()}})


def count(options):
    """Push ones until a request had to be sent again, and some more; say how many there are, and who has them."""
    with tensorkv.create("dist_async", timeout_s=LIMIT_S, **options) as kv:
        kv.init("w", np.zeros(SHAPE, F32))
        kv.set_optimizer("sgd", lr=1.0, maximize=True)
        say([server["host"] for server in kv.stats()["servers"]])
        pushed = after = 0
        while after < AFTER:
            kv.push("w", np.ones(SHAPE, F32))
            pushed += 1
            after += kv.stats()["resent"] > 0
            if pushed == 3:
                say("pushing")
        value = kv.pull("w")
        servers = [server["host"] for server in kv.stats()["servers"]]
        # Large payloads are not carried by Ray.
        assert kv.stats()["socket_requests"] > pushed
        say({"pushed": pushed, "least": float(value.min()), "most": float(value.max()), "hosts": servers})


def do_everything(options, folder, until):
    """Push, init, snapshot and save in turns until a file is there; say what came out of it.

    A snapshot that a server has lost may be refused; whatever is read is whole.
    """
    with tensorkv.create("dist_async", timeout_s=LIMIT_S, **options) as kv:
        kv.init(["w", "n"], [np.zeros(SHAPE, F32), np.zeros(3, F32)])
        kv.set_optimizer("sgd", lr=1.0, maximize=True)
        say("pushing")
        counts = {"pushed": 0, "saved": 0, "lost": 0}
        while not os.path.exists(until):
            kv.push(["w", "n"], [np.ones(SHAPE, F32), np.ones(3, F32)])
            counts["pushed"] += 1
            number = counts["pushed"]
            Path(folder, "progress").write_text(str(number))
            # Now and then one that is divided, so that both servers have some of it.
            kv.init(f"new {number}", np.full(SHAPE if number % 10 == 0 else 3, number, F32))
            try:
                with kv.snapshot() as snapshot:
                    assert {float(each) for key in ("w", "n") for each in snapshot.pull(key).flat} == {number}
                kv.save(f"{folder}/saved")
                counts["saved"] += 1
            except tensorkv.SnapshotError:
                counts["lost"] += 1
            if counts["saved"]:
                with tensorkv.create("local") as read:
                    read.load(f"{folder}/saved")
                    assert len({*read.pull("w").flat, *read.pull("n").flat}) == 1
            if number % 100 == 99:
                new = range(max(1, number - 99), number + 1)
                for key in new:
                    assert set(kv.pull(f"new {key}").flat) == {key}
                kv.delete([f"new {key}" for key in new])
        value, resent = kv.pull("w"), kv.stats()["resent"]
        say({**counts, "least": float(value.min()), "most": float(value.max()), "resent": resent})


def refuse(options):
    """Say what the error of ``create`` says."""
    try:
        tensorkv.create("dist_async", **options).close()
    except tensorkv.TensorKVError as error:
        say([type(error).__name__, str(error)])


def lose(options):
    """Push until a server is dead; say what the error says."""
    kv = tensorkv.create("dist_async", timeout_s=LIMIT_S, **options)
    kv.init("w", np.zeros(SHAPE, F32))
    say("pushing")
    try:
        while True:
            kv.push("w", np.ones(SHAPE, F32))
    except tensorkv.ServerDeadError as error:
        say(str(error))
    kv.close()


if __name__ == "__main__":
    # What Ray says goes elsewhere.
    _out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    globals()[sys.argv[1]](*json.loads(sys.argv[2]))
