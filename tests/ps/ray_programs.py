"""What workers on parameter servers run: each program is one function; the process is started with its name.

They find the cluster by RAY_ADDRESS, or as torchrun's workers do.
"""

import contextlib
import json
import os
import random
import sys
import time

import numpy as np

import tensorkv
from tests.support.until import LIMIT_S

F32 = np.float32
RANK = int(os.environ.get("RANK", "0"))
SIZE = int(os.environ.get("WORLD_SIZE", "1"))


def say(*words):
    print(*words, flush=True)


def one_hot(n, i):
    gradient = np.zeros(n, F32)
    gradient[i] = 1
    return gradient


def ask_through_ray_alone():
    """Let no request go over a socket, where nothing of Ray can fail."""
    from tensorkv.engines.ps.client import rpc

    rpc.can_share = lambda: False


def lose_answers(chance):
    """Lose replies over the socket now and then."""
    from tensorkv.engines.transport.channel import Connection

    receive, draw = Connection.receive, random.Random(1)

    def receive_or_lose(self, deadline):
        reply = receive(self, deadline)
        # What a server says first answers no request.
        if reply and draw.random() < chance:
            raise TimeoutError
        return reply

    Connection.receive = receive_or_lose


def push_set(name, stop, start, step, acknowledged):
    """Push number i of "w" adds 1 to element i; each is written down once it is acknowledged."""
    stop, start, step = int(stop), int(start), int(step)
    if "RAY_testing_rpc_failure" in os.environ:
        ask_through_ray_alone()
    if "LOSE_ANSWERS" in os.environ:
        lose_answers(float(os.environ["LOSE_ANSWERS"]))
    kv = tensorkv.create("dist_async", name=name)
    (n,) = kv.info("w").shape
    with open(acknowledged, "a", buffering=1) as file:
        say("ready")
        for i in range(start, stop, step):
            kv.push("w", one_hot(n, i))
            file.write(f"{i}\n")
    if int(os.environ.get("WANTS_RESENT", "0")):
        assert kv.stats()["resent"] >= int(os.environ["WANTS_RESENT"]), kv.stats()["resent"]
    if "LOSE_ANSWERS" in os.environ:
        assert kv.stats()["socket_requests"] >= kv.stats()["resent"]
    say("resent", kv.stats()["resent"])
    kv.close()


def train():
    """Workers as torchrun starts them train together, on a Ray that rank 0 starts."""
    kv = tensorkv.create("dist_async", mode="sync")
    assert (kv.rank, kv.num_workers) == (RANK, SIZE)
    kv.set_optimizer("sgd", lr=0.5)
    kv.init("w", np.full(4, 8, F32))
    for _ in range(3):
        # Each wants the weights to be its rank; the mean is what they come to.
        kv.push("w", (kv.pull("w") - RANK) / SIZE)
        kv.barrier()
    expected = 8.0
    for _ in range(3):
        expected -= 0.5 * (expected - (SIZE - 1) / 2)
    assert np.allclose(kv.pull("w"), expected), (kv.pull("w"), expected)
    assert kv.info("w").version == 3
    kv.barrier()
    kv.close()
    say("trained")


def silent(name):
    """Be there, and then be killed."""
    kv = tensorkv.create("dist_async", name=name)
    say("rank", kv.rank)
    while True:
        kv.push("n", np.ones(1, F32))
        time.sleep(0.01)


def rely_on_rays_retries(n):
    """Let Ray send again what was not answered, to a server that does not know its requests."""
    import ray

    from tensorkv.engines.ps.client.engine import PSEngine
    from tensorkv.engines.ps.options import PSOptions
    from tensorkv.engines.ps.ray import cluster
    from tensorkv.engines.ps.ray.actor import ServerActor
    from tensorkv.engines.ps.ray.handle import ServerHandle
    from tensorkv.store import KVStore

    class Forgetful(ServerActor):
        def __init__(self, options):
            super().__init__(options, 0)
            self._server._tables.has_applied = lambda client, seq: False

    cluster.enter(None, LIMIT_S)
    options = {"num_cpus": 0, "max_concurrency": 8, "max_restarts": -1, "max_task_retries": -1}
    actor = ray.remote(Forgetful).options(**options).remote(json.dumps(PSOptions().of_store()))
    places = [["elsewhere", 0, 1, "", "", "elsewhere", [None, None]]]
    kv = KVStore(PSEngine([ServerHandle(actor)], PSOptions(), places, [1], LIMIT_S, started=False), "dist_async")
    with contextlib.suppress(tensorkv.KeyExistsError):
        kv.init("n", np.zeros(1, F32))
    for _ in range(int(n)):
        kv.push("n", np.ones(1, F32))
    say("version", kv.info("n").version)
    ray.kill(actor)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
