"""What workers run: each program is one function; the process is started with its name and arguments."""

import os
import random
import shutil
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv.engines import partition
from tensorkv.engines.sync import checkpoint, group, host, order, push
from tensorkv.shard import native
from tests.support.until import until
from tests.sync import stages

F32 = np.float32
RANK = int(os.environ.get("RANK", "0"))
SIZE = int(os.environ.get("WORLD_SIZE", "1"))


def create(**options):
    return tensorkv.create("dist_sync", **options)


def say(*words):
    print(*words, flush=True)


# ------------------------------------------------------------ the same bits as the local store

DECIDING = [
    ("sgd", {}),
    ("sgd", {"momentum": 0.9}),
    ("adam", {"amsgrad": True}),
    ("adamw", {"weight_decay": 0.1, "ema": 0.9}),
    ("adagrad", {}),
    ("rmsprop", {"momentum": 0.5}),
    ("adadelta", {}),
    (None, {}),
]


def decided(first, count):
    """Random pushes whose update all sums decide on: clipped by their norm, left out or refused for a NaN or Inf.

    Some workers give arrays that are plain, others do not; values are divided, and pushed in many buckets.
    """
    partition._WHOLE //= 256
    push.SLOT_NBYTES //= 256
    for seed in range(int(first), int(first) + int(count)):
        rng, made = random.Random(seed), np.random.default_rng(seed)
        options = {
            "nonfinite": rng.choice(["pass", "raise", "skip", "skip_step"]),
            "reduce": rng.choice(["sum", "mean"]),
        }
        name, numbers = rng.choice(DECIDING)
        if rng.random() < 0.8 or options["nonfinite"] == "pass":
            numbers = {**numbers, "max_grad_norm": rng.choice([0.5, 100.0])}
        shapes = [(3, 5), (1000,), (130, 7), (), (0, 4), (5000, 3)]
        dtypes = [torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]
        like = {
            f"k{number}": torch.ones(rng.choice(shapes), dtype=rng.choice(dtypes))
            for number in range(rng.randint(1, 6))
        }
        with create(**options) as kv, tensorkv.create(**options) as local:
            for store in (kv, local):
                store.init(like)
                if name is not None:
                    store.set_optimizer(name, lr=0.1, rescale_grad=0.7, **numbers)
            for step in range(4):
                _decide_alike(kv, local, like, rng, made, (seed, step))
            assert kv.stats()["nonfinite"] == local.stats()["nonfinite"], seed
    say("same bits, compiled:", native.can_look())


def _decide_alike(kv, local, like, rng, made, where):
    """Make a call with the parts of this worker in one store, and with those of all in the other."""
    keys = [key for key in like if rng.random() < 0.8] or list(like)
    # More than one part is summed before the others' come.
    parts = {
        key: [
            [
                torch.from_numpy(np.asarray(made.standard_normal(like[key].shape))).to(like[key].dtype)
                for _ in range(rng.randint(1, 2) if rank == 0 else 1)
            ]
            for rank in range(SIZE)
        ]
        for key in keys
    }
    poisoned = rng.choice(parts[rng.choice(keys)])[0]
    if rng.random() < 0.3 and poisoned.numel():
        # The last is Inf in float16 only when it is summed.
        poisoned.view(-1)[rng.randrange(poisoned.numel())] = rng.choice([np.nan, np.inf, 60_000.0])
    verb, strided = rng.choice(["push", "pushpull"]), rng.choice([None, 0, SIZE - 1])
    own, every = [parts[key][RANK] for key in keys], [[part for own in parts[key] for part in own] for key in keys]
    if strided == RANK:
        own = [[part.t().contiguous().t() if part.ndim == 2 else part for part in each] for each in own]
    outcomes = []
    for store, values in ((kv, own), (local, every)):
        outs = [torch.full_like(like[key], 7) for key in keys]
        try:
            store.push(keys, values) if verb == "push" else store.pushpull(keys, values, out=outs)
            outcomes.append((repr(store.last_push), outs))
        except tensorkv.NonFiniteError as error:
            outcomes.append((str(error), outs))
    (said, outs), (right, right_outs) = outcomes
    assert said == right, (where, said, right)
    for key, out, right_out in zip(
        [*keys, *like], [*outs, *map(kv.pull, like)], [*right_outs, *map(local.pull, like)], strict=True
    ):
        assert out.reshape(-1).view(torch.uint8).equal(right_out.reshape(-1).view(torch.uint8)), (where, verb, key)
    for key in like:
        assert kv.info(key) == local.info(key), (where, key)


SHAPES = [
    (),
    (3,),
    (0, 2),
    (7, 5),
    (64,),
    (300, 70),
    (40_000,),
    (2, 3, 4),
    (1, 30_000),
    (513, 65),
    (700, 513),
    (300_001,),
]
DTYPES = ["float32", "float32", "float64", "float16", "bfloat16", "int32", "complex64"]
OPTIMIZERS = [
    ("sgd", {"lr": 0.1}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("adam", {"lr": 0.1, "amsgrad": True}),
    ("adamw", {"lr": 0.1, "weight_decay": 0.1, "rescale_grad": 0.5}),
    ("rmsprop", {"lr": 0.01, "centered": True}),
    ("adagrad", {"lr": 0.1}),
    ("nadam", {"lr": 0.01}),
    ("adadelta", {}),
    ("adafactor", {"lr": 0.01}),
    ("muon", {"lr": 0.01}),
]


def make(rng, shape, dtype):
    torch.manual_seed(rng.randrange(1 << 30))
    if dtype == "int32":
        return torch.randint(-9, 9, shape, dtype=torch.int32)
    return torch.randn(shape, dtype=getattr(torch, dtype))


def programs(count, first_seed, shared_memory):
    """Random programs of verbs; every worker computes what a local store makes of all workers' parts."""
    for seed in range(int(first_seed), int(first_seed) + int(count)):
        one_program(seed, shared_memory == "True")
    say("same bits")


def one_program(seed, shared_memory):
    rng = random.Random(seed)
    with create(shared_memory=shared_memory) as kv, tensorkv.create("local") as local:
        keys = {}
        for _ in range(rng.randint(3, 14)):
            action = rng.choice(
                ["init", "push", "push", "push", "pushpull", "pushpull", "many", "rule", "rows", "delete"]
            )
            try:
                step(rng, action, kv, local, keys)
            except (AssertionError, tensorkv.TensorKVError) as error:
                error.add_note(f"seed {seed}, action {action}, rank {RANK}")
                raise
        compare(kv, local, list(keys), seed)


def step(rng, action, kv, local, keys):
    if action == "init" or not keys:
        for _ in range(rng.randint(1, 4)):
            key, shape, dtype = f"k{rng.randrange(1 << 40)}", rng.choice(SHAPES), rng.choice(DTYPES)
            keys[key] = (shape, dtype)
            value = make(rng, shape, dtype)
            local.init(key, value)
            # Rank 0's value counts.
            kv.init(key, value if RANK == 0 else torch.zeros_like(value))
    elif action == "rule":
        set_rule(rng, kv, local, keys)
    elif action == "delete" and len(keys) > 2:
        key = rng.choice(sorted(keys))
        del keys[key]
        kv.delete(key)
        local.delete(key)
    elif action == "rows":
        push_rows(rng, kv, local, keys)
    else:
        push_dense(rng, action, kv, local, keys)


def set_rule(rng, kv, local, keys):
    if any(dtype == "int32" for _, dtype in keys.values()) or rng.random() < 0.3:
        kv.set_updater(None)
        local.set_updater(None)
        return
    if rng.random() < 0.2:

        def update(key, received, stored):
            if isinstance(received, tensorkv.Rows):
                stored.values += received.values * 2
            else:
                stored += received * 2

        kv.set_updater(update)
        local.set_updater(update)
        return
    whole = any(len(shape) != 2 for shape, _ in keys.values())
    is_complex = any(dtype == "complex64" for _, dtype in keys.values())
    name, numbers = rng.choice(OPTIMIZERS[: -2 if whole or is_complex else None])
    if is_complex and name in ("rmsprop", "nadam"):
        return
    kv.set_optimizer(name, **numbers)
    local.set_optimizer(name, **numbers)


def push_rows(rng, kv, local, keys):
    wide = [k for k, (shape, dtype) in keys.items() if len(shape) == 2 and shape[0] > 1 and dtype == "float32"]
    if not wide or (local.optimizer or {}).get("name") in ("muon", "adafactor"):
        return
    key = rng.choice(wide)
    (rows, width), _ = keys[key]
    parts = []
    for _ in range(SIZE):
        ids = torch.tensor([rng.randrange(rows) for _ in range(rng.randint(0, 5))], dtype=torch.int64)
        parts.append(tensorkv.Rows(ids, make(rng, (len(ids), width), "float32"), rows))
    kv.push(key, parts[RANK])
    local.push(key, parts)


def push_dense(rng, action, kv, local, keys):
    chosen = rng.sample(sorted(keys), rng.randint(1, len(keys)))
    if action == "many":
        chosen = sorted(keys)
    if (local.optimizer or {}).get("name"):
        chosen = [key for key in chosen if keys[key][1] != "int32"]
    if not chosen:
        return
    for _ in range(3 if action == "many" else 1):
        parts = [[make(rng, *keys[key]) for _ in range(SIZE)] for key in chosen]
        mine = [own[RANK] for own in parts]
        if action == "push":
            kv.push(chosen, mine, priority=rng.randint(-2, 2))
            local.push(chosen, parts)
        else:
            outs = [torch.empty_like(own) for own in mine]
            kv.pushpull(chosen, mine, out=outs)
            for out, right in zip(outs, local.pushpull(chosen, parts), strict=True):
                check(out, right)


def check(got, right):
    bits = [torch.atleast_1d(each).contiguous().view(torch.uint8) for each in (got, right)]
    assert torch.equal(*bits), f"{got} is not {right}"


def compare(kv, local, keys, seed):
    for key in keys:
        check(kv.pull(key), local.pull(key))
        assert kv.info(key) == local.info(key), (seed, key)


def values(first, last, folder, shared_memory):
    """Training, checkpoints and odd values, each worker beside a local store."""
    from tensorkv.engines import partition
    from tensorkv.engines.sync import push
    from tests.support import value_programs

    partition._WHOLE = value_programs.DIVIDED
    push.SLOT_NBYTES = push.SLOT_NBYTES_OVER_HOSTS = value_programs.CHUNK_NBYTES
    for seed in range(int(first), int(last) + 1):
        os.makedirs(f"{folder}/{seed}", exist_ok=True)
        with create(shared_memory=shared_memory == "True") as kv:
            value_programs.train(seed, kv, f"{folder}/{seed}", rank=RANK, workers=SIZE)
    with create(shared_memory=shared_memory == "True") as kv:
        value_programs.train_on_nothing(kv, f"{folder}/nothing", rank=RANK, workers=SIZE)
    say("same values")


# ------------------------------------------------------------ mismatches

CALLS = {
    "push a": lambda kv: kv.push("a", np.ones(3, F32)),
    "push b": lambda kv: kv.push("b", np.ones(3, F32)),
    "push a, b": lambda kv: kv.push(["a", "b"], [np.ones(3, F32)] * 2),
    "push b, a": lambda kv: kv.push(["b", "a"], [np.ones(3, F32)] * 2),
    "push more elements": lambda kv: kv.push("a", np.ones(4, F32)),
    "push another shape": lambda kv: kv.push("a", np.ones((3, 1), F32)),
    "push another dtype": lambda kv: kv.push("a", np.ones(3, np.int32)),
    "push rows": lambda kv: kv.push("c", tensorkv.Rows(np.array([1]), np.ones((1, 2), F32), 3)),
    "push dense c": lambda kv: kv.push("c", np.ones((3, 2), F32)),
    "push slices of a": lambda kv: kv.push("a", tensorkv.TensorSlice(np.ones(3, F32), (0,), (3,))),
    "pushpull slices of a": lambda kv: kv.pushpull("a", tensorkv.TensorSlice(np.ones(3, F32), (0,), (3,))),
    "push many": lambda kv: [kv.push("a", np.ones(3, F32)) for _ in range(3)],
    "pushpull a": lambda kv: kv.pushpull("a", np.ones(3, F32)),
    "init d": lambda kv: kv.init("d", np.ones(2, F32)),
    "init another d": lambda kv: kv.init("d", np.ones((2, 2), F32)),
    "barrier": lambda kv: kv.barrier(),
    "sgd": lambda kv: kv.set_optimizer("sgd", lr=0.1),
    "sgd with another lr": lambda kv: kv.set_optimizer("sgd", lr=0.2),
    "adam": lambda kv: kv.set_optimizer("adam", lr=0.1),
    "whole numbers": lambda kv: [
        kv.set_optimizer("adam", lr=1, weight_decay=0, betas=(0.0, 0.5), rescale_grad=2),
        kv.set_hyperparameters(lr=2, weight_decay=-0.0),
        kv.set_hyperparameters("b", lr=0, betas=(0.0, 0.25)),
    ],
    "the same as floats": lambda kv: [
        kv.set_optimizer("adam", weight_decay=0.0, lr=1.0, betas=[0.0, np.float64(0.5)], rescale_grad=2.0),
        kv.set_hyperparameters(weight_decay=0, lr=np.float32(2)),
        kv.set_hyperparameters("b", betas=[0.0, 0.25], lr=np.int64(0)),
    ],
    "load": lambda kv: kv.load("/nowhere"),
    "load if it is there": lambda kv: kv.load("/nowhere", missing_ok=True),
    "load states": lambda kv: kv.load_optimizer_states("/nowhere"),
    "nothing": lambda kv: None,
    "unknown key": lambda kv: kv.push("nowhere", np.ones(3, F32)),
    "no array": lambda kv: kv.push("a", "text"),
}


def mismatches(shared_memory):
    """The last rank makes another call than the others; every worker gets an error that names both."""
    for left, right in PAIRS + EQUAL:
        say("===", left, "/", right)
        mismatch(left, right, shared_memory)


def mismatch(left, right, shared_memory):
    kv = create(shared_memory=shared_memory == "True")
    kv.init(["a", "b", "c"], [np.zeros(3, F32), np.zeros(3, F32), np.zeros((3, 2), F32)])
    error = None
    try:
        CALLS[right if RANK == SIZE - 1 else left](kv)
        kv.pull("a")
        kv.close()
    except (tensorkv.TensorKVError, TypeError, ValueError) as caught:
        error = caught
    say(type(error).__name__, "|", str(error).replace("\n", " "))
    if error is not None:
        try:
            kv.push("a", np.ones(3, F32))
            kv.pull("a")
            say("goes on")
        except tensorkv.TensorKVError as after:
            say("refuses", type(after).__name__)


PAIRS = [
    ("push a", "push b"),
    ("push a", "push a, b"),
    ("push a, b", "push b, a"),
    ("push a", "push more elements"),
    ("push a", "push another shape"),
    ("push a", "push another dtype"),
    ("push rows", "push dense c"),
    ("push a", "pushpull a"),
    ("push many", "push a"),
    ("push a", "push many"),
    ("push a", "nothing"),
    ("push a", "barrier"),
    ("push a", "init d"),
    ("init d", "init another d"),
    ("init d", "push a"),
    ("push a", "push slices of a"),
    ("push slices of a", "pushpull slices of a"),
    ("load if it is there", "load"),
    ("load", "load states"),
    ("sgd", "adam"),
    ("sgd", "sgd with another lr"),
    ("sgd", "nothing"),
    ("push a", "unknown key"),
    ("push a", "no array"),
    ("barrier", "nothing"),
]


def long_lists(shared_memory):
    """Long lists of keys that differ in one place."""
    # Longer than what workers tell each other of a call; over hosts that is less, and an init takes longer.
    many = 3000 if shared_memory == "True" else 300
    for count, at in ((80, 41), (many, many // 2), (many, many - 1)):
        names = [f"layer.{number:04}.weight" for number in range(count)]
        kv = create(shared_memory=shared_memory == "True")
        kv.init(names, [np.zeros(1, F32)] * count)
        if RANK == SIZE - 1:
            del names[at]
        for verb in (kv.push, kv.pushpull):
            try:
                verb(names, [np.ones(1, F32)] * len(names))
                kv.pull(names[0])
            except tensorkv.WorkerMismatchError as error:
                say(count, at, "|", error)
        kv.close()


# What is written in another way, and no mismatch.
EQUAL = [("whole numbers", "the same as floats")]
# Calls that are refused where they are made, with an error of their own.
REFUSED = {
    "push more elements": "ValueMismatchError",
    "push another shape": "ValueMismatchError",
    "push another dtype": "ValueMismatchError",
    "unknown key": "KeyNotFoundError",
    "no array": "ArrayTypeError",
}

# ------------------------------------------------------------ lost workers

PHASES = ["between", "laid out", "summed", "background", "copying"]


def lost(phase, how, repeat):
    """The last rank dies or stops at some point; the others get an error that names it."""
    victim = SIZE - 1
    rounds = 3 + int(repeat)
    if victim == RANK:
        plant_end(phase, how, rounds)
    if "STOPPED" in os.environ:
        shorten_timeouts(os.environ["STOPPED"], victim)
    kv = create(timeout_s=300)
    value = np.ones(700_000, F32)
    kv.init(["a", "b"], [value, value])
    out = np.empty_like(value)
    try:
        for turn in range(1000):
            if phase == "background":
                kv.push("a", value)
                kv.pull("a", out=out)
            else:
                kv.pushpull(["a", "b"], [value, value], out=[out, out.copy()])
            if victim == RANK and phase == "between" and turn == rounds:
                end(how)
        say("not lost")
    except tensorkv.TensorKVError as error:
        say(type(error).__name__, "|", error)
    try:
        kv.push("a", value)
        say("goes on")
    except tensorkv.TensorKVError as error:
        say("refuses", type(error).__name__)
    kv.close()


def plant_end(phase, how, rounds):
    """End this process at a phase of its so-manieth exchange."""
    stage = {"laid out": "stage_in", "summed": "reduce", "background": "run", "copying": "copy_out"}.get(phase)
    seen = [0]

    def faulty():
        seen[0] += 1
        if seen[0] > rounds:
            end(how)

    if stage is not None:
        stages.plant(stage, faulty)


def shorten_timeouts(path, victim):
    """Let a minute pass with each look at a worker of this host that others wait for, once a file is there."""
    passed, suspect = [], host.HostGroup._suspect

    def look(self, awaited):
        found = suspect(self, awaited)
        # No time passes in waits for others, which go on however slow they are.
        if found == victim and os.path.exists(path):
            passed.append(60)
        return found

    host.HostGroup._suspect = look
    host.monotonic = lambda: time.monotonic() + sum(passed)


def end(how):
    say("fault fired")
    if how == "exit":
        os._exit(3)
    if "STOPPED" in os.environ:
        Path(os.environ["STOPPED"]).touch()
    os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    signal.pause()


def endless():
    """Push and pull until something goes wrong."""
    kv = create(timeout_s=60)
    kv.init("a", np.ones(50_000, F32))
    try:
        for turn in range(1_000_000):
            kv.pushpull("a", np.ones(50_000, F32))
            if turn == 20:
                say("turn 20")
            if turn == 21:
                # Nothing but the timeout ends a call over a broken wire. Each worker has said turn 20 by now.
                shorten_timeouts_over_wires()
                say("in a hurry")
    except tensorkv.TensorKVError as error:
        say(type(error).__name__, "|", error)


def shorten_timeouts_over_wires():
    """Wait for a message of another host for two seconds from now on, and for a rendezvous store there for one."""
    wait, soon = group.ProcessGroup.wait, timedelta(seconds=2)

    def wait_in_a_hurry(self, work, rank):
        wait(self, SimpleNamespace(wait=lambda: work.wait(soon)), rank)

    group.ProcessGroup.wait, group._STORE_S = wait_in_a_hurry, 1.0


def patient():
    """Push and pull until a call has taken long on a worker; every sum is right."""
    with create(timeout_s=60) as kv:
        kv.init("a", np.zeros(50_000, F32))
        part, turn, is_over = np.full(50_000, RANK + 1, F32), 0, False
        while not is_over:
            start = time.monotonic()
            found = kv.pushpull("a", part)
            assert set(found[1:].tolist()) == {SIZE * (SIZE + 1) / 2}
            is_over = found[0] >= 1000
            # All workers are told in the next call.
            part[0] += 1000 * (time.monotonic() - start > 3)
            turn += 1
            if turn == 20:
                say("turn 20")
        say("went on after a wait")


def interrupted(folder):
    """Ctrl-C in a call that waits for rank 0: it ends at once, and that of rank 0 ends with an error."""
    right, is_interrupted, is_told = host.HostGroup.wait, Path(folder, "interrupted"), Path(folder, "told")

    def wait(*args):
        host.HostGroup.wait = right
        say("waits")
        right(*args)

    kv = create(timeout_s=60)
    kv.init("a", np.ones(3, F32))
    kv.pushpull("a", np.ones(3, F32))
    if RANK == 1:
        host.HostGroup.wait = wait
        try:
            kv.pushpull("a", np.ones(3, F32))
        except KeyboardInterrupt:
            say("interrupted")
        is_interrupted.touch()
        # Not the end of this process tells the other one.
        until(is_told.exists)
    else:
        until(is_interrupted.exists)
        try:
            kv.pushpull("a", np.ones(3, F32))
        except tensorkv.TensorKVError as error:
            say(type(error).__name__, "|", error)
        is_told.touch()


# ------------------------------------------------------------ unequal batches, checkpoints, training


def leave(optimizer):
    """Ranks with 3, 5, 7, ... batches: sums are over those present."""
    with create() as kv:
        kv.init(["a", "b"], [np.zeros(5, F32), np.zeros(50_000, F32)])
        local = tensorkv.create("local")
        local.init(["a", "b"], [np.zeros(5, F32), np.zeros(50_000, F32)])
        for store in (kv, local):
            if optimizer != "assign":
                store.set_optimizer(optimizer, lr=0.1)
        for epoch in range(2):
            for turn in range(3 + 2 * SIZE):
                who = [rank for rank in range(SIZE) if turn < 3 + 2 * rank]
                if RANK in who:
                    kv.push("a", np.full(5, RANK + turn, F32))
                    kv.pushpull(["a", "b"], [np.full(5, turn, F32), np.full(50_000, RANK + 1, F32)])
                elif turn == 3 + 2 * RANK:
                    kv.leave()
                if who:
                    local.push("a", [np.full(5, rank + turn, F32) for rank in who])
                    local.push("a", [np.full(5, turn, F32) for _ in who])
                    local.push("b", [np.full(50_000, rank + 1, F32) for rank in who])
            for key in ("a", "b"):
                assert np.array_equal(kv.pull(key), local.pull(key)), (
                    epoch,
                    key,
                    kv.pull(key)[:3],
                    local.pull(key)[:3],
                )
        kv.pushpull("a", np.ones(5, F32))
        say("left and back")


def updater_raises():
    """What an updater raises on one worker reaches all, for Rows and tables too; the store goes on."""

    def update(key, received, stored):
        rows = isinstance(received, tensorkv.Rows)
        stored = stored.values if rows else stored
        stored += 1
        if (received.values if rows else received).flatten()[0] < 0:
            raise KeyError("a negative number")

    with create() as kv:
        kv.init({"d": np.zeros((4, 2), F32), "e": np.zeros(3, F32)})
        kv.init("t", tensorkv.Rows(np.array([1]), np.zeros((1, 2), F32), 1000))
        kv.set_updater(update)
        sign = F32(-1 if RANK == SIZE - 1 else 0)
        for key, value in {
            "d": tensorkv.Rows(np.array([2]), np.full((1, 2), sign), 4),
            "t": tensorkv.Rows(np.array([1]), np.full((1, 2), sign), 1000),
            "e": np.full(3, sign),
        }.items():
            try:
                kv.push(key, value)
                say("nothing raised")
            except KeyError as error:
                say("raised", key, error)
            assert kv.info(key).version == 0, key
        kv.push("d", tensorkv.Rows(np.array([2]), np.ones((1, 2), F32), 4))
        assert kv.pull("d").tolist() == [[0, 0], [0, 0], [1, 1], [0, 0]]
        assert kv.info("d").version == 1
        say("goes on")


class OwnError(Exception):
    pass


class SilentError(OwnError):
    def __str__(self):
        raise ValueError("no message")


RAISED = {
    "group": lambda: ExceptionGroup("several", [ValueError("one")]),
    "stop": lambda: StopIteration("no more"),
    "own": lambda: OwnError("planted"),
    "silent": SilentError,
}


def updater_raises_types():
    """Types that others cannot make of a message, and one that a generator cannot raise; the store goes on."""
    here = []

    def update(key, received, stored):
        here.append(key)
        raise RAISED[name]()

    rows = tensorkv.Rows(np.array([2]), np.ones((1, 2), F32), 4)
    calls = {
        "plain": lambda kv: kv.push("e", np.ones(3, F32)),
        "strided": lambda kv: kv.push("e", np.ones(6, F32)[::2]),
        "pushpull": lambda kv: kv.pushpull("e", np.ones(3, F32)),
        "rows": lambda kv: kv.push("d", rows),
        "table": lambda kv: kv.push("t", tensorkv.Rows(np.array([1]), np.ones((1, 2), F32), 1000)),
        "both": lambda kv: kv.push(["e", "d"], [np.ones(3, F32), rows]),
    }
    with create() as kv:
        kv.init({"d": np.zeros((4, 2), F32), "e": np.zeros(3, F32)})
        kv.init("t", tensorkv.Rows(np.array([1]), np.zeros((1, 2), F32), 1000))
        kv.set_updater(update)
        for name in RAISED:
            for how, call in calls.items():
                here.clear()
                try:
                    call(kv)
                    say("nothing raised")
                except (ExceptionGroup, StopIteration, OwnError, RuntimeError, TypeError) as error:
                    say(name, how, "here" if here else "there", type(error).__name__)
        kv.set_updater(None)
        assert kv.info("e").version == kv.info("d").version == 0
        assert kv.pushpull("e", np.ones(3, F32)).tolist() == [SIZE] * 3
        say("goes on")


def closed_by_two_threads():
    """The second thread comes when the first has met the other workers and takes the store down."""
    kv = create()
    kv.init("w", np.zeros(3, F32))
    pushes, ended = kv._engine._pushes, []
    second = threading.Thread(target=lambda: ended.append(kv.close()))

    def closing():
        second.start()
        second.join(0.5)
        say("second", "went on" if ended else "waits")
        close()

    close, pushes.close = pushes.close, closing
    kv.close()
    second.join()
    say("closed", ended)


def forgotten_close():
    """A process that ends without close, its last push being on the way."""
    kv = create(shared_memory=False)
    kv.init("a", np.zeros(3_000_000, F32))
    for _ in range(3):
        kv.push("a", np.ones(3_000_000, F32))
    if RANK == SIZE - 1:
        kv.pull("a")
    say("the end")


def ahead():
    """Far more pushes on the way than there are entries, with a worker that is late, and new lists of keys."""
    with create() as kv:
        for key in range(60):
            kv.init(key, np.zeros(4, F32))
        for late in range(SIZE):
            for key in range(60):
                kv.push(key, np.ones(4, F32))
            kv.barrier()
            if late == RANK:
                time.sleep(1)
            for _ in range(2):
                for key in range(60):
                    kv.push(key, np.full(4, late + 1, F32))
        for turn in range(20):
            kv.push([turn, turn + 1], [np.ones(4, F32)] * 2)
            for key in range(34):
                kv.push(key, np.full(4, turn, F32))
        assert kv.pull(33).tolist() == [19.0 * SIZE] * 4
        assert kv.pull(59).tolist() == [SIZE * SIZE] * 4
        say("all there")


def new_trees(shared_memory):
    """Trees whose keys are new, or some of them, while older pushes are on their way."""
    with create(shared_memory=shared_memory == "True") as kv:
        for turn in range(20):
            kv.push_tree({f"{turn}": np.full(3, RANK + 1, F32), "all": np.full(2, turn, F32)})
        total = SIZE * (SIZE + 1) / 2
        assert kv.pull_tree({"19": np.zeros(3, F32)})["19"].tolist() == [total] * 3
        assert kv.pushpull_tree({"new": np.full(1, RANK + 1, F32)})["new"].tolist() == [total]
        assert kv.pull("all").tolist() == [19 * SIZE] * 2
        assert [kv.info(key).version for key in ("0", "all", "new")] == [1, 20, 1]
        kv.set_optimizer("sgd", lr=1.0)
        for _ in range(3):
            with pytest.raises(tensorkv.KeyNotFoundError, match="init_tree"):
                kv.push_tree({"late": np.ones(3, F32)})
        kv.push_tree({"new": np.ones(1, F32)})
        assert kv.pull("new").tolist() == [total - SIZE]
        say("all there")


def load_releases(folder):
    """A checkpoint with releases is refused on every worker, and nothing has changed."""
    with create() as kv:
        kv.init("w", np.zeros(2, F32))
        with pytest.raises(tensorkv.CheckpointError, match="has releases, which this type of store does not have"):
            kv.load(folder)
        kv.push("w", np.ones(2, F32))
        assert kv.pull("w").tolist() == [SIZE, SIZE]
        say("all there")


def key_by_key(count, shared_memory):
    """Many small keys, each pushed alone, as MXNet's Module does: no more stages than for a few, and the right sums."""
    from tensorkv.engines.sync import push, schedule

    made = []

    class Counted(schedule.StagingBuffer):
        def __init__(self, host, slots, slot_nbytes, **options):
            made.append(slots * slot_nbytes)
            super().__init__(host, slots, slot_nbytes, **options)

    push.StagingBuffer = Counted
    with create(shared_memory=shared_memory == "True") as kv:
        kv.init(list(range(int(count))), [np.zeros(500 + key, F32) for key in range(int(count))])
        for turn in (1, 2, 3):
            for key in range(int(count)):
                kv.push(key, np.full(500 + key, turn * (key + RANK), F32))
                # Pushes of one key keep their order, whatever their priorities.
                kv.push(key, np.full(500 + key, turn * key, F32), priority=turn)
            for key in range(int(count)):
                assert set(kv.pull(key).tolist()) == {float(SIZE * turn * key)}
                got = kv.pushpull(key, np.full(500 + key, key + RANK, F32))
                assert set(got.tolist()) == {float(SIZE * key + SIZE * (SIZE - 1) // 2)}
        say("stages:", len(made), "nbytes:", sum(made))


# ------------------------------------------------------------ calls of plain arrays


def some_plain(compiled):
    """Some workers give plain arrays and others do not, so that one call goes both ways: the local store's bits."""
    push.SLOT_NBYTES = 1 << 12
    partition._WHOLE = 1 << 10
    if compiled == "False" and RANK == 0:
        native._native, native.can_look = None, lambda: False
    shapes = [(2, 3), (700,), (90, 40), (), (0, 4), (7,), (3000,), (50, 21)]
    dtypes = [torch.float32, torch.float16, torch.float64, torch.bfloat16]
    generator = torch.Generator().manual_seed(1)
    for options, optimizer in (({}, None), ({}, "sgd"), ({}, "adamw"), ({"reduce": "mean"}, "adam")):
        with create(**options) as kv, tensorkv.create("local", **options) as local:
            keys = [f"{index}" for index in range(2 * len(shapes))]
            of = [(shapes[index % 8], dtypes[index % 4 if index < 8 else index // 4]) for index in range(len(keys))]
            for store in (kv, local):
                store.init(keys, [torch.ones(shape, dtype=dtype) for shape, dtype in of])
                if optimizer:
                    store.set_optimizer(optimizer, lr=0.1)
            for turn in range(4):
                chosen = keys if turn != 2 else keys[1::3]
                # What each worker has is the sum of its parts, and the local store adds these sums.
                parts = [
                    [torch.randn(of[int(key)][0], generator=generator).to(of[int(key)][1]) for key in chosen]
                    for _ in range(SIZE)
                ]
                mine = [torch.stack([part, part], -1)[..., 0] if turn % 2 == RANK else part for part in parts[RANK]]
                outs = [torch.empty(of[int(key)][0], dtype=of[int(key)][1]) for key in chosen]
                kv.pushpull(chosen, mine, out=outs)
                local.push(chosen, [list(own) for own in zip(*parts, strict=True)])
                for key, out in zip(chosen, outs, strict=True):
                    check(out, local.pull(key))
                    assert kv.info(key) == local.info(key), key
    say("same bits")


FORM_DTYPES = ["float32", "float32", "float64", "float16", "bfloat16", "int32", "uint8", "bool", "complex64"]
FORM_SHAPES = [(), (3,), (0, 2), (7, 5), (64,), (2, 3, 4), (513, 65), (300_001,)]
FORM_OPTIMIZERS = [None, None, *OPTIMIZERS[:6]]


def forms(count, first_seed, shared_memory, compiled):
    """Random calls in every form and of mixed libraries, first ones and later ones: the local store's bits."""
    if compiled == "False":
        native._native, native.can_look = None, lambda: False
    with create(shared_memory=shared_memory == "True") as kv, tensorkv.create("local") as local:
        for seed in range(int(first_seed), int(first_seed) + int(count)):
            try:
                calls_of_forms(seed, kv, local)
            except (AssertionError, tensorkv.TensorKVError) as error:
                error.add_note(f"seed {seed}, rank {RANK}")
                raise
    say("same bits")


def crowd():
    """More workers on a host than share memory: the others are like another host."""
    group._MAX_SHARING = 2
    with create() as kv, tensorkv.create("local") as local:
        assert kv.stats()["dist"]["hosts"] == 2
        calls_of_forms(0, kv, local)
    say("same bits")


def calls_of_forms(seed, kv, local):
    rng, own_rng = random.Random(seed), random.Random(1000 * seed + RANK)
    optimizer = rng.choice(FORM_OPTIMIZERS)
    dtypes = FORM_DTYPES[:5] if optimizer else FORM_DTYPES
    keys = {f"{seed} {i}": (rng.choice(FORM_SHAPES[: rng.choice([6, 8])]), rng.choice(dtypes)) for i in range(12)}
    for store in (kv, local):
        store.set_updater(None)
        store.init({key: torch.zeros(shape, dtype=getattr(torch, dtype)) for key, (shape, dtype) in keys.items()})
        if optimizer:
            store.set_optimizer(optimizer[0], **optimizer[1])
    lists = [rng.sample(sorted(keys), rng.choice([1, 1, 3, 12])) for _ in range(3)]
    for turn in range(6):
        chosen = rng.choice(lists[: 1 + turn])
        parts = {key: [parts_of(rng, *keys[key]) for _ in range(SIZE)] for key in chosen}
        verb = rng.choice(["push", "pushpull", "pushpull", "pull"])
        if verb != "pull":
            local.push(chosen, [[summed(own) for own in parts[key]] for key in chosen])
        mine = {key: [as_array(own_rng, part) for part in parts[key][RANK]] for key in chosen}
        call_in_some_form(own_rng, kv, verb, chosen, mine, local)
    for key in keys:
        check(kv.pull(key), local.pull(key))
        assert kv.info(key).version == local.info(key).version
        kv.delete(key)
        local.delete(key)


def parts_of(rng, shape, dtype):
    """One worker's parts of a key; some are of another dtype that fits."""
    torch.manual_seed(rng.randrange(1 << 30))
    parts = [torch.randn(shape) * 50 for _ in range(rng.choice([1, 1, 2, 3]))]
    if dtype == "uint8":
        parts = [part.abs() for part in parts]
    fits = dtype == "float32" and rng.random() < 0.2
    return [
        part > 0 if dtype == "bool" else part.to(getattr(torch, rng.choice(["float16", "float32"]) if fits else dtype))
        for part in parts
    ]


def summed(parts):
    """The sum of one worker's parts, as wide as it travels."""
    wide = torch.float32 if {part.dtype for part in parts} & {torch.float16, torch.bfloat16} else parts[0].dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total | part if wide is torch.bool else total + part.to(wide)
    return total


def as_array(rng, tensor):
    """The same numbers in an array of some library, with some layout."""
    kind = rng.choice(["torch", "torch", "numpy", "numpy", "numpy", "strided"])
    if kind == "strided" and tensor.ndim:
        return torch.stack([tensor, tensor], -1)[..., 0]
    return tensor.clone() if tensor.dtype is torch.bfloat16 or kind != "numpy" else tensor.numpy().copy()


def call_in_some_form(rng, kv, verb, chosen, mine, local):
    """Make a call, and compare its outputs."""
    nested = rng.random() < 0.5
    outs = {key: [as_array(rng, torch.zeros_like(local.pull(key))) for _ in range(1 + nested)] for key in chosen}
    if rng.random() < 0.3:
        outs = {
            key: [out.to(torch.float32) if getattr(out, "dtype", None) is torch.float16 else out for out in own]
            for key, own in outs.items()
        }
    form = rng.choice(["one", "list", "list", "tuple", "mapping", "repeated"])
    takes = nested or any(len(own) > 1 for own in mine.values())
    values = {key: own if takes else own[0] for key, own in mine.items()}
    targets = {key: own if nested else own[0] for key, own in outs.items()}
    has_outs = rng.random() < 0.7 or verb == "push"
    if form == "repeated" and verb == "push" and takes:
        kv.push([key for key in chosen for _ in mine[key]], [part for key in chosen for part in mine[key]])
        return
    if form == "one" and len(chosen) == 1:
        keys, given, filled = chosen[0], values[chosen[0]], targets[chosen[0]]
    elif form == "mapping":
        keys, given, filled = values, None, targets
        if verb == "pull":
            keys = targets if has_outs else chosen
    else:
        make = tuple if form == "tuple" else list
        keys, given, filled = make(chosen), make(values.values()), make(targets.values())
    if verb == "push":
        kv.push(keys, given)
        return
    filled = filled if has_outs and not (verb == "pull" and form == "mapping") else None
    got = kv.pull(keys, out=filled) if verb == "pull" else kv.pushpull(keys, given, out=filled)
    if not has_outs:
        got = got if isinstance(got, list) else list(got.values()) if isinstance(got, dict) else [got]
        outs = {key: [array] for key, array in zip(chosen, got, strict=True)}
    for key in chosen:
        for out in outs[key]:
            found = torch.as_tensor(out)
            check(torch.empty(found.shape, dtype=found.dtype).copy_(found), local.pull(key).to(found.dtype))


def other_keys():
    """Keys are deleted and re-created between the look at a call's arrays and the call, and the rule is changed."""
    try_compiled, then = push.Pushes.try_compiled, []

    def wait_and_try(*args):
        if then:
            thread = threading.Thread(target=then.pop())
            thread.start()
            thread.join()
        return try_compiled(*args)

    def init_again(kv, shape, dtype):
        kv.delete("a")
        kv.init("a", np.zeros(shape, dtype))

    push.Pushes.try_compiled = wait_and_try
    with create() as kv:
        kv.init(["a", "b"], [np.zeros(5, F32), np.zeros(2, F32)])
        ones, out = [np.ones(5, F32), np.ones(2, F32)], [np.zeros(5, F32), np.zeros(2, F32)]
        for verb in ("push", "pushpull", "pull"):
            call = {
                "push": lambda: kv.push(["a", "b"], ones),
                "pushpull": lambda: kv.pushpull(["a", "b"], ones, out=out),
                "pull": lambda: kv.pull(["a", "b"], out=out),
            }[verb]
            for shape, dtype in ((5, F32), (4, F32), (5, np.int16)):
                call()
                then.append(lambda shape=shape, dtype=dtype: init_again(kv, shape, dtype))
                if (shape, dtype) == (5, F32) or (shape == 5 and verb == "pull"):
                    call()
                    assert kv.pull("a").tolist() == [0.0 if verb == "pull" else float(SIZE)] * 5
                    assert kv.info("a").version == (verb != "pull")
                    if verb != "push":
                        assert out[0].tolist() == kv.pull("a").tolist()
                else:
                    before = kv.pull("b").tolist(), out[0].tolist()
                    with pytest.raises(tensorkv.ValueMismatchError):
                        call()
                    assert (kv.pull("b").tolist(), out[0].tolist()) == before
                    assert kv.pull("a").tolist() == [0.0] * shape
                init_again(kv, 5, F32)
            then.append(lambda: kv.delete("a"))
            with pytest.raises(tensorkv.KeyNotFoundError):
                call()
            kv.init("a", np.zeros(5, F32))
        kv.pushpull(["a", "b"], ones)
        then.append(lambda: kv.set_optimizer("sgd", lr=1.0))
        assert kv.pushpull("a", np.ones(5, F32)).tolist() == [0.0] * 5
        then.append(lambda: kv.set_updater(lambda key, received, stored: np.copyto(stored, received * 3)))
        assert kv.pushpull("a", np.ones(5, F32)).tolist() == [3.0 * SIZE] * 5
        assert not then
        kv.set_updater(None)
        kv.init("n", np.zeros(3, np.int32))
        assert kv.pushpull("n", np.ones(3, np.int32)).tolist() == [SIZE] * 3
        kv.set_optimizer("sgd", lr=1.0)
        with pytest.raises(tensorkv.OptimizerError):
            kv.pushpull("n", np.ones(3, np.int32))
        assert kv.info("n").version == 1
    say("as they are now")


def many_lists():
    """Another choice of keys at each push: memory is bounded, and the numbers are right."""
    from tensorkv.engines.sync import push

    push._MIN_STAGING_NBYTES = 0
    rng, count, nbytes = random.Random(5), 100_000, 0
    with create() as kv, tensorkv.create("local") as local:
        for store in (kv, local):
            store.init(list(range(12)), [np.zeros(count, F32)] * 12)
            store.set_optimizer("sgd", lr=0.5)
        for turn in range(60):
            chosen = rng.sample(range(12), 6)
            kv.push(chosen, [np.full(count, turn + RANK, F32)] * 6)
            local.push(chosen, [[np.full(count, turn + rank, F32) for rank in range(SIZE)]] * 6)
            nbytes += 6 * count * 4
        with open("/proc/self/maps") as lines:
            ends = [line.split()[0].split("-") for line in lines if "memfd:tensorkv" in line]
        mapped = sum(int(stop, 16) - int(start, 16) for start, stop in ends)
        # Pushpulls stage their parts in a buffer of its own.
        most = 12 * count * 4 * (1 + 4 * SIZE) + (1 << 20) + push.RING * SIZE * push.SLOT_NBYTES
        say("bounded" if mapped < most < nbytes * SIZE else f"{mapped} of {most}, {nbytes * SIZE} pushed")
        for key in range(12):
            check(torch.from_numpy(kv.pull(key)), torch.from_numpy(local.pull(key)))
        say("same bits")


def lists_in_other_forms(limit):
    """Workers whose arrays differ in form, or that have left, drop the staging buffers of the same lists of keys."""
    count = 40_000
    push._MIN_STAGING_NBYTES = 0
    push._MAX_STAGING = 3.4 if limit == "bytes" else 100
    push._MIN_SCHEDULES, push._MAX_NAMED = 4, 100 if limit == "bytes" else 0
    names = list("abcdef")
    lists = [[name for name in names if name != out] for out in names]
    ones = [np.ones(count, F32)] * 5
    strided = [np.ones((count, 2), F32)[:, 0]] * 5
    with create() as kv:
        kv.init(names, [np.zeros(count, F32)] * 6)
        for turn in range(2):
            for each in lists[:4]:
                kv.push(each, ones)
            if turn == 0:
                kv.pushpull(lists[0], strided if RANK else ones)
            elif RANK:
                kv.leave()
            else:
                kv.pushpull(lists[0], ones)
                kv.leave()
            kv.push(lists[4], ones)
            kv.push(lists[0], ones)
            assert kv.pull("f").tolist() == [SIZE] * count
        say("the same buffers")


def state_stays():
    """Owners and optimizer state stay when keys go and the optimizer gets other numbers."""
    with create() as kv, tensorkv.create("local") as local:
        for store in (kv, local):
            store.init({"a": np.zeros(4, F32), "b": np.zeros(4, F32)})
            store.set_optimizer("sgd", lr=0.1, momentum=0.9)
        for key in "ab":
            kv.push(key, np.ones(4, F32))
            local.push(key, [np.ones(4, F32)] * SIZE)
        for store in (kv, local):
            store.delete("a")
            store.set_optimizer("sgd", lr=0.2, momentum=0.9)
        kv.push("b", np.ones(4, F32))
        local.push("b", [np.ones(4, F32)] * SIZE)
        assert np.array_equal(kv.pull("b"), local.pull("b"))
        say("same state")


def loaded_state(folder):
    """After a load, too, hosts that update no value hold no optimizer state; with a codec all of them do."""

    def hold_state():
        with kv._engine._shard.frozen() as (entries, _):
            return any(entry.state for entry in entries)

    def train():
        kv.push("a", np.ones(3, F32))
        local.push("a", [np.ones(3, F32)] * SIZE)
        assert np.array_equal(kv.pull("a"), local.pull("a"))

    with create(shared_memory=False) as kv, tensorkv.create("local") as local:
        for store in (kv, local):
            store.init("a", np.zeros(3, F32))
            store.set_optimizer("adam", lr=0.1)
        train()
        found = {"a push": hold_state()}
        kv.save(f"{folder}/all")
        kv.load(f"{folder}/all")
        found["load"] = hold_state()
        kv.save_optimizer_states(f"{folder}/states")
        kv.load_optimizer_states(f"{folder}/states")
        found["load_optimizer_states"] = hold_state()
        with kv._engine.contents() as contents:
            kept = contents
        kv._engine.restore(kept)
        found["restore"] = hold_state()
        train()
        kv.set_gradient_compression({"type": "fp16"})
        train()
        kv.save(f"{folder}/all")
        kv.load(f"{folder}/all")
        found["load with a codec"] = hold_state()
        train()
        kv.set_gradient_compression(None)
        kv.load(f"{folder}/all")
        found["load without it"] = hold_state()
    say(found)


def saved_state(folder):
    """Checkpoints of optimizers whose state has shapes of its own."""
    for name in ("adafactor", "muon", "adadelta"):
        with create() as kv:
            kv.init({"a": np.ones((4, 3), F32), "b": np.ones((700, 513), F32)})
            kv.set_optimizer(name, lr=0.1)
            kv.push(["a", "b"], [np.full((4, 3), RANK + 1, F32), np.full((700, 513), 2, F32)])
            kv.save(f"{folder}/{name}")
            kv.push(["a", "b"], [np.ones((4, 3), F32), np.ones((700, 513), F32)])
            after = kv.pull(["a", "b"])
            kv.load(f"{folder}/{name}")
            kv.push(["a", "b"], [np.ones((4, 3), F32), np.ones((700, 513), F32)])
            assert all(map(np.array_equal, kv.pull(["a", "b"]), after)), name
    say("same after load")


def leave_with_long_names():
    """A push of more names than an entry holds, and one that is refused, while the others have left."""
    names = [f"model.layer.{number:04}.weight" for number in range(300)]
    with create() as kv:
        kv.init(names, [np.zeros(3, F32)] * 300)
        kv.push(names, [np.ones(3, F32)] * 300)
        if RANK == 0:
            kv.push(names, [np.full(3, 5, F32)] * 300)
            try:
                kv.push(names[0], np.ones(4, F32))
            except tensorkv.ValueMismatchError:
                say("refused")
            kv.push(names, [np.full(3, 7, F32)] * 300)
        kv.leave()
        assert kv.pull(names[299]).tolist() == [7, 7, 7]
        say("left")


def interrupted_pull():
    """A pull that is interrupted has not forgotten what it waited for."""
    import threading

    with create() as kv:
        kv.init("a", np.zeros(3, F32))
        kv.push("a", np.ones(3, F32))
        kv.barrier()
        file = Path(os.environ["INTERRUPTED"])
        if RANK == 1:
            until(file.exists)
        kv.push("a", np.full(3, 5, F32))
        if RANK == 0:
            try:
                threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
                kv.pull("a")
                say("too fast")
            except KeyboardInterrupt:
                say("interrupted")
            file.touch()
        assert kv.pull("a").tolist() == [5.0 * SIZE] * 3
        say("new values")


def interrupted_before(what):
    """A signal comes while a call waits for an earlier push: it ends the store, and no worker waits for the other."""
    right, file = order.PushQueue.wait_for, Path(os.environ["INTERRUPTED"])

    def interrupting(*args):
        order.PushQueue.wait_for = right
        signal.raise_signal(signal.SIGINT)
        right(*args)

    with create() as kv:
        kv.init(["a", "b"], [np.zeros(100_000, F32)] * 2)
        kv.push("a", np.ones(100_000, F32))
        kv.pull("a")
        if RANK == 1:
            until(file.exists)
        else:
            order.PushQueue.wait_for = interrupting
        try:
            kv.push("a", np.ones(100_000, F32))
            if what == "refused" and RANK == 0:
                kv.push("b", np.ones(7, F32))
            else:
                kv.pushpull("b", np.ones(100_000, F32))
        except (KeyboardInterrupt, tensorkv.WorkerError) as error:
            say(type(error).__name__)
        finally:
            file.touch()
        with pytest.raises(tensorkv.WorkerError) as caught:
            kv.barrier()
        say(caught.value)


def other_options(name, first, second):
    try:
        create(**{name: second if RANK else first})
    except tensorkv.WorkerMismatchError as error:
        say(error)


def no_sharing():
    """The last rank cannot open what the others share: all go through Gloo, and one of them says so."""
    import warnings

    from tensorkv.engines.sync import group

    right, asked = group.Segment, []

    class Closed(right):
        def __init__(self, nbytes, name=None, *, private=False):
            if name is not None:
                asked.append(name)
                raise PermissionError("planted")
            super().__init__(nbytes, name, private=private)

    if RANK == SIZE - 1:
        group.Segment = Closed
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kv = create()
    with kv:
        said = [f"{os.path.basename(each.filename)}: {each.message}" for each in caught]
        say("fault fired" if asked else "no fault", "warnings:", said)
        assert kv.stats()["dist"]["hosts"] == SIZE
        kv.init("a", np.zeros(3, F32))
        assert kv.pushpull("a", np.full(3, RANK, F32)).tolist() == [SIZE * (SIZE - 1) / 2] * 3


def left_and_barrier():
    """Others may not do more than push and pull while somebody has left."""
    kv = create()
    kv.init("a", np.zeros(5, F32))
    try:
        if RANK == 0:
            kv.leave()
        else:
            kv.barrier()
    except tensorkv.WorkerMismatchError as error:
        say(type(error).__name__, "|", error)


def train_a_bit(kv, steps, first=0):
    for turn in range(first, first + steps):
        rng = np.random.default_rng([turn, 7])
        grads = [[rng.standard_normal(shape).astype(F32) for _ in range(4)] for shape in ((40_000,), (300, 70), (3,))]
        if kv.num_workers == 1:
            kv.push(["a", "b", "c"], grads)
        else:
            mine = [sum(own[RANK * 4 // SIZE + 1 : (RANK + 1) * 4 // SIZE], own[RANK * 4 // SIZE]) for own in grads]
            kv.push(["a", "b", "c"], mine)


def save(path, optimizer):
    with create() as kv:
        kv.init({"a": np.ones(40_000, F32), "b": np.ones((300, 70), F32), "c": np.ones(3, F32)})
        kv.init("t", tensorkv.Rows(np.array([5]), np.ones((1, 2), F32), 1_000_000_000))
        kv.set_optimizer(optimizer, lr=0.01)
        kv.push("t", tensorkv.Rows(np.array([RANK]), np.ones((1, 2), F32), 1_000_000_000))
        train_a_bit(kv, 3)
        kv.save(path)
        say("saved", {key: kv.pull(key).tobytes().hex()[:40] for key in "abc"})


def save_by_many(path):
    """File numbers are enough for one worker less than there are, and the last has nothing to write."""
    checkpoint._FILES = 100_000 // (SIZE - 1)
    with create() as kv:
        kv.init(list("abcdef"), [np.full(5, number, F32) for number in range(6)])
        kv.save(path)
        kv.push("a", np.ones(5, F32))
        kv.load(path)
        assert [kv.pull(key)[0] for key in "abcdef"] == list(range(6))
        say("same after load", sorted(path.name[-17:] for path in Path(path).glob("data-*")))


def own_folders(folder):
    """Each worker is a host with a folder of its own at the same path, and the last one writes the checkpoint."""
    os.makedirs(f"{folder}/{RANK}")
    os.chdir(f"{folder}/{RANK}")
    path = "/proc/self/cwd/saved"
    with create(shared_memory=False) as kv:
        kv.init("w", np.zeros(2, F32))
        assert kv.load(path, missing_ok=True) is False
        kv.push("w", np.ones(2, F32))
        kv.save(path)
        try:
            say("loaded", kv.load(path, missing_ok=True))
        except tensorkv.CheckpointError as error:
            say("refused |", error)
        if RANK == 0:
            # As a run of this host alone would save it.
            with tensorkv.create("local") as own:
                own.init("w", np.full(2, 9, F32))
                own.save(path)
        elif RANK == 1:
            shutil.copytree("../2/saved", "saved")
        for options in ({}, {"missing_ok": True}):
            try:
                say("loaded", kv.load(path, **options))
            except tensorkv.CheckpointError as error:
                say("differs |", error)
        kv.push("w", np.full(2, 2, F32))
        assert kv.pull("w").tolist() == [2 * SIZE] * 2
        say("goes on")


def load(path, out):
    with create() as kv:
        kv.load(path)
        assert kv.info("a").version == 3
        train_a_bit(kv, 2, first=3)
        if RANK == 0:
            np.savez(out, **{key: kv.pull(key) for key in "abc"})
        say("rows", kv.row_sparse_pull("t", row_ids=[0, 1, 5]).values.tolist())
        say("loaded")


def averages(what):
    """Averages go to whole outs on rank 0, and to parts on the others; other keys are a mismatch."""
    with create() as kv:
        kv.init(["w", "v"], [np.zeros((1, 4), F32), np.zeros(3, F32)])
        kv.set_optimizer("sgd", lr=1.0, ema=0.5)
        for _ in range(2):
            kv.push("w", np.full((1, 4), -1 / SIZE, F32))
        if what == "keys":
            with pytest.raises(tensorkv.WorkerMismatchError) as caught:
                kv.pull_ema("v" if RANK else "w")
            say(caught.value)
            return
        out = np.zeros((1, 4), F32)
        rows = tensorkv.TensorSlice(np.zeros((0, 4), F32), (1, 0), (1, 4))
        columns = np.zeros((1, 3), F32)
        kv.pull_ema("w", out=rows if RANK else out)
        kv.pull_ema("w", out=[tensorkv.TensorSlice(columns, (0, 1), (1, 4)), out] if RANK else out)
        kv.barrier()
        assert out.tolist() == [[1.25] * 4]
        assert columns.tolist() == [[1.25 if RANK else 0.0] * 3]
        say("the same calls")


def own_libraries():
    """After rank 0's contents were restored, new arrays are on each worker of the library that it has."""
    with create() as kv:
        kv.init("a", np.ones(2, F32) if RANK else torch.ones(2))
        with kv._engine.contents() as held:
            kept = held
        kv._engine.restore(kept)
        assert type(kv.pull("a")) is (np.ndarray if RANK else torch.Tensor)
        assert kv.pull("a").tolist() == [1, 1]
    say("as before")


def step_or_barrier():
    """One worker makes a Trainer's step, which first asks which parameters have gradients; the other a barrier."""
    with create() as kv:
        trainer = tensorkv.Trainer(torch.nn.Linear(2, 1), kv, "sgd", lr=0.1, unused="agree")
        with pytest.raises(tensorkv.WorkerMismatchError) as caught:
            kv.barrier() if RANK else trainer.step()
        say(caught.value)


def train(overlap, update_on_store, shared_memory):
    """A Trainer over workers equals one over replicas."""
    import copy

    def model():
        torch.manual_seed(3)
        return torch.nn.Sequential(
            torch.nn.Linear(20, 300),
            torch.nn.Tanh(),
            # Large enough to be divided between workers.
            torch.nn.Linear(300, 900),
            torch.nn.Tanh(),
            torch.nn.Linear(900, 3),
        )

    numbers = {"lr": 0.05, "momentum": 0.9, "update_on_store": update_on_store == "True"}
    mine, replicas = model(), [copy.deepcopy(model()) for _ in range(SIZE)]
    with create(shared_memory=shared_memory == "True") as kv, tensorkv.create("local") as local:
        trainer = tensorkv.Trainer(mine, kv, "sgd", overlap=overlap == "True", **numbers)
        right = tensorkv.Trainer(replicas, local, "sgd", **numbers)
        for turn in range(6):
            torch.manual_seed(turn)
            data = torch.randn(SIZE, 8, 20)
            trainer.zero_grad()
            mine(data[RANK]).square().mean().backward()
            trainer.step()
            right.zero_grad()
            for replica, share in zip(replicas, data, strict=True):
                replica(share).square().mean().backward()
            right.step()
            for got, expected in zip(mine.parameters(), replicas[0].parameters(), strict=True):
                assert torch.equal(got, expected), turn
        say("same weights")
        state = trainer.state_dict()
        # If the store updates, rank 0's state counts.
        wrong = {**state, "weights": {name: weight + 1 for name, weight in state["weights"].items()}}
        trainer.load_state_dict(wrong if RANK and numbers["update_on_store"] else state)
        right.load_state_dict({**state, "optimizer": right.state_dict()["optimizer"]})
        for each, data_of in ((mine, data[RANK]), *zip(replicas, data, strict=True)):
            each.zero_grad()
            each(data_of).square().mean().backward()
        trainer.step()
        right.step()
        assert all(map(torch.equal, mine.parameters(), replicas[0].parameters()))
        say("same after load_state_dict")
        if overlap == "True":
            mine(data[RANK]).sum().backward()
            try:
                mine(data[RANK]).sum().backward()
            except tensorkv.ArgumentError as error:
                say("twice", error)
            trainer.step()


def demo_killed(folder):
    """The demo, whose last worker is killed after some epochs at its first start."""
    from tensorkv.cli import demo, main

    save, seen = demo._save_checkpoint, []

    def killing(settings, kv, curves):
        save(settings, kv, curves)
        seen.append(len(curves.losses))
        if RANK == SIZE - 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and len(curves.losses) == 2:
            end("kill")

    demo._save_checkpoint = killing
    words = [
        "demo",
        "--store",
        "dist_sync",
        "--epochs",
        "4",
        "--checkpoint",
        f"{folder}/run",
        "--out",
        f"{folder}/a.png",
    ]
    assert main.main(words) == 0
    say(f"rank {RANK} made epochs {seen[0]} to {seen[-1]}")


def existing_group():
    """A process group that is there already is used and stays."""
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo")
    with create() as kv:
        assert (kv.rank, kv.num_workers) == (dist.get_rank(), dist.get_world_size())
        assert kv.broadcast("a", np.full(3, RANK, F32)).tolist() == [0, 0, 0]
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == SIZE
    dist.destroy_process_group()
    say("still there")


def addresses():
    """Which addresses this process listens on or is connected to, a store being open and used."""
    with create() as kv, create(shared_memory=False) as other:
        for each in (kv, other):
            each.init("a", np.ones(3, F32))
            each.pushpull("a", np.ones(3, F32))
        inodes = set()
        for fd in os.listdir("/proc/self/fd"):
            try:
                inodes.add(os.readlink(f"/proc/self/fd/{fd}"))
            except OSError:
                continue
        for table in ("tcp", "tcp6"):
            with open(f"/proc/self/net/{table}") as lines:
                for line in list(lines)[1:]:
                    fields = line.split()
                    if f"socket:[{fields[9]}]" in inodes:
                        say(table, fields[1], fields[2], fields[3])
        kv.barrier()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
