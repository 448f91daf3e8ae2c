"""Ctrl-C at any moment leaves every key whole: its value and optimizer state are before the push or after it."""

import os
import signal
import subprocess
import sys

import pytest

SCRIPT = """
import random, signal, sys, threading, time
import numpy as np, tensorkv, tensorkv.pool

kind, seed = sys.argv[1], int(sys.argv[2])
random.seed(seed)
if len(sys.argv) > 3:
    # The fault: work in the main thread, where an interrupt strikes in the middle.
    tensorkv.pool.Pool.run = lambda self, jobs, then=None: ([job() for job in jobs], then and then())
sizes = {"large": [1_500_000], "odd": [300_001, 70_003], "small": [37], "many": [1000] * 64}[kind.split()[0]]
optimizer = kind.split()[1]
keys = [f"k{i}" for i in range(len(sizes))]
parts = [[np.full(size, x, np.float32) for x in (1.0, 0.5, 0.5)] for size in sizes]
outs = [np.zeros(size, np.float32) for size in sizes]
kv = tensorkv.create("local")
kv.init(keys, [np.zeros(size, np.float32) for size in sizes])
if optimizer == "adam":
    kv.set_optimizer("adam", lr=0.5)
elif optimizer == "sgd":
    kv.set_optimizer("sgd", lr=0.5, momentum=0.9)
for _ in range(4):
    kv.pushpull(keys, parts, out=outs)

weights = [0.0]
model = tensorkv.create()
model.init("w", np.zeros(64, np.float32))
model.set_optimizer("adam", lr=0.5)

def replay(steps):
    while len(weights) <= steps:
        weights.append(model.pushpull("w", np.full(64, 2, np.float32))[0])
    return weights[steps]

def check():
    # Every element of a key has had the same history, so they are all equal, in the value and in the state.
    with kv._engine._shard.frozen() as (entries, _):
        for entry in entries:
            assert (entry.value == entry.value[0]).all(), "torn value"
            for name, tensor in entry.state.items():
                assert (tensor.flatten() == tensor.flatten()[0]).all(), "torn " + name
            if optimizer == "adam":
                expected = replay(int(entry.state["step"]))
                assert entry.value[0] == expected, "the counter of steps and the value have parted"
            if optimizer == "none":
                assert entry.value[0] in (2.0, 7.0)

def interrupt():
    time.sleep(0.002 + random.random() * 0.01)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

fired = 0
stop = time.monotonic() + 8
while fired < 40 and time.monotonic() < stop:
    timer = threading.Thread(target=interrupt)
    try:
        timer.start()
        while True:
            kv.pushpull(keys, parts, out=outs)
            if optimizer == "none":
                kv.push(keys, [np.full(size, 7, np.float32) for size in sizes])
    except KeyboardInterrupt:
        fired += 1
    timer.join()
    check()
    kv.pushpull(keys, parts, out=outs)
kv.close()
print(fired)
"""


@pytest.mark.parametrize(
    ("size", "optimizer"),
    [
        ("large", "none"),
        ("large", "adam"),
        ("odd", "sgd"),
        ("small", "none"),
        ("small", "adam"),
        ("many", "none"),
        ("many", "adam"),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_an_interrupted_push_is_whole(size, optimizer):
    command = [sys.executable, "-c", SCRIPT, f"{size} {optimizer}", "0"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert int(shown.stdout) >= 10, "too few interrupts came to say anything"


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_a_push_that_can_be_interrupted_would_be_seen():
    command = [sys.executable, "-c", SCRIPT, "large adam", "0", "planted"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert shown.returncode == 1
    assert "torn" in shown.stderr or "have parted" in shown.stderr


def test_sigint_is_what_raises_keyboard_interrupt_here():
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
