"""A process that has imported torch and tensorkv, and forks a child for each program that a test starts.

Importing torch takes 1.5 s of a processor, a fork some milliseconds. A child is like a process of its own: it has its
own environment, folder, output and signal handlers, holds no descriptor of the server, runs its program as the main
program, and ends as an interpreter ends, with exit handlers and finalizers. The server itself starts no thread.

Requests and replies are messages of JSON on a socket; the server ends, and kills its children, when the other end of
the socket is closed. ``tests.support.processes`` is the client.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import pickle
import runpy
import select
import signal
import socket
import sys
import tempfile
import traceback

# What most programs import, and nothing that starts a thread.
PRELOAD = ("numpy", "torch", "torch._dynamo", "torch.distributed", "pytest", "tensorkv", "tensorkv.engines.sync.engine")
MESSAGE_NBYTES = 1 << 20
CLONE_NEWNET = 0x40000000  # of sched.h


def preload() -> None:
    for name in PRELOAD:
        importlib.import_module(name)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, "a fork would leave threads behind"
    # A collection in a child would copy most of the memory.
    gc.collect()
    gc.freeze()


def serve(connection: socket.socket) -> dict | None:
    """Fork a child for each request; return the request in the child, and None in the server at its end."""
    wakeup, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(woken)
    statuses: dict[int, int] = {}
    connection.send(b"{}")
    while True:
        ready, _, _ = select.select([connection, wakeup], [], [])
        if wakeup in ready:
            os.read(wakeup, 1 << 12)
            reap(statuses)
        if connection not in ready:
            continue
        data, descriptors, _, _ = socket.recv_fds(connection, MESSAGE_NBYTES, 3)
        if not data:
            for pid in statuses:
                os.kill(pid, signal.SIGKILL)
            return None
        status, output, result = descriptors
        pid = os.fork()
        if pid:
            statuses[pid] = status
            os.close(output)
            os.close(result)
            connection.send(json.dumps({"pid": pid}).encode())
            continue
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        connection.close()
        for descriptor in (wakeup, woken, status, *statuses.values()):
            os.close(descriptor)
        return {**json.loads(data), "output": output, "result": result}


def reap(statuses: dict[int, int]) -> None:
    """Tell the exit status of each child that has ended."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            told = statuses.pop(pid)
            with contextlib.suppress(BrokenPipeError):
                os.write(told, f"{os.waitstatus_to_exitcode(status)}".encode())
            os.close(told)


def become(request: dict) -> None:
    """Take the environment, folder and output of a request."""
    import numpy as np
    import torch

    for descriptor in (1, 2):
        os.dup2(request["output"], descriptor)
    os.close(request["output"])
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    if request["netns"]:
        enter(request["netns"])
    tempfile.tempdir = None
    np.random.seed()
    threads = request["env"].get("OMP_NUM_THREADS")
    if threads:
        torch.set_num_threads(int(threads))


def enter(netns: str) -> None:
    """Move this process, which has one thread, into a network namespace that ``ip netns`` has made."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{netns}") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {netns}")


def run(request: dict) -> None:
    """Run a module with arguments, or a function whose result is pickled into a descriptor."""
    if "function" not in request:
        os.close(request["result"])
        sys.argv = [request["module"], *request["args"]]
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        return
    with open(request["result"], "wb") as result:
        call(request["function"], bytes.fromhex(request["args"]), result)


def call(function: str, arguments: bytes, result) -> None:
    """Call ``module:name``; write what it returns, or raises, to a file, and let what it raises end the process."""
    module, _, name = function.partition(":")
    try:
        value = getattr(importlib.import_module(module), name)(*pickle.loads(arguments))
    except BaseException as error:
        result.write(pack_error(error))
        raise
    result.write(pickle.dumps((value, None)))


def pack_error(error: BaseException) -> bytes:
    """Pickle an exception with its traceback as a note, or a RuntimeError of its words if it cannot be pickled."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note("".join(traceback.format_exception(error)))
    return pickle.dumps((None, copy))


def main() -> None:
    if sys.argv[1] == "call":
        # A process of its own, in which nothing is preloaded: for programs that run in another namespace.
        with open(sys.argv[4], "wb") as result:
            call(sys.argv[2], bytes.fromhex(sys.argv[3]), result)
        return
    preload()
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    if request is not None:
        become(request)
        run(request)


if __name__ == "__main__":
    main()
