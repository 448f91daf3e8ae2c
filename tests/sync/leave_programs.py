"""What workers run that have unequal numbers of batches."""

import sys
from functools import cache

import numpy as np
import torch

import tensorkv
from tensorkv.engines import partition
from tensorkv.engines.sync import chain, host, push
from tests.support.amount import amount
from tests.sync.dist_programs import F32, RANK, SIZE, check, create, say

# Together longer than what workers tell each other of a call.
NAMES = [f"model.layer.{number:04}.{'weight' * 20}" for number in range(36)]
assert len(str(NAMES)) > host.ENTRY_TEXT > chain.HEADER_TEXT

# Values are smaller than real ones, and so are the sizes from which they are divided and take several slots.
SMALLER = amount(32, 1)
SHAPES = {"a": (5,), "b": (1_200_000 // SMALLER + 1,), "c": (40, 3), "h": (300 // SMALLER, 70)}
TABLE_ROWS = 1_000_000_000


RULES = ("assign", "updater", "adam", "skip", "mean", "clip", "skip_step")
OPTIONS = {
    "skip": {"nonfinite": "skip"},
    "mean": {"reduce": "mean"},
    "clip": {"nonfinite": "pass"},
    "skip_step": {"nonfinite": "skip_step", "reduce": "mean"},
}


def add(key, received, stored):
    if isinstance(received, tensorkv.Rows):
        stored.values += received.values
    else:
        stored += received


@cache
def numbers(key):
    """Numbers of which some are -0.0, which are not the same once 0.0 was added."""
    rng = np.random.default_rng(ord(key))
    made = rng.standard_normal(SHAPES[key], F32)
    made[rng.random(SHAPES[key]) < 0.4] = -0.0
    return torch.from_numpy(made)


def part(key, *seed):
    scale, shift = np.random.default_rng(seed).integers(1, 1000, 2).tolist()
    made = numbers(key).roll(shift, 0) * (scale / 500)
    return made.half() if key == "h" else made


def rows(key, *seed):
    rng = np.random.default_rng(seed)
    count = SHAPES["c"][0] if key == "c" else TABLE_ROWS
    ids = torch.from_numpy(rng.integers(0, 40, int(rng.integers(0, 6))))
    return tensorkv.Rows(ids, torch.from_numpy(rng.standard_normal((len(ids), 3), F32)), count)


def uneven(order, shared_memory, *rules):
    """Workers run out of batches in some order; sums are over the parts of the others, with the local store's bits."""
    places = [int(rank) for rank in order.split(",")]
    partition._WHOLE //= SMALLER
    push.SLOT_NBYTES //= SMALLER
    push.SLOT_NBYTES_OVER_HOSTS //= SMALLER
    for rule in rules:
        options = OPTIONS.get(rule, {})
        with create(shared_memory=shared_memory == "True", **options) as kv, tensorkv.create(**options) as local:
            for store in (kv, local):
                store.init({key: torch.zeros(shape) for key, shape in SHAPES.items() if key != "h"})
                store.init("h", torch.zeros(SHAPES["h"], dtype=torch.float16))
                store.init("t", tensorkv.Rows(torch.tensor([1]), torch.ones(1, 3), TABLE_ROWS))
                if rule in ("clip", "skip_step"):
                    store.set_optimizer("adam", lr=0.1, max_grad_norm=0.5, rescale_grad=0.7)
                elif rule == "adam":
                    store.set_optimizer("adam", lr=0.1)
                elif rule == "updater":
                    store.set_updater(add)
            for epoch in range(2):
                train(kv, local, places, epoch, rule)
        say("same bits", rule)


def train(kv, local, places, epoch, rule):
    for turn in range(1 + SIZE):
        who = [rank for rank in range(SIZE) if turn <= places.index(rank)]
        if RANK in who:
            batch(kv, rule, who[0], [RANK], epoch, turn)
        elif turn == 1 + places.index(RANK):
            kv.leave()
        if who:
            batch(local, rule, who[0], who, epoch, turn)
    # A worker that has left is told, too.
    assert kv.last_push == local.last_push
    for key in SHAPES:
        check(kv.pull(key), local.pull(key))
        assert kv.info(key) == local.info(key), key
    mine, right = (store.row_sparse_pull("t", row_ids=list(range(40))) for store in (kv, local))
    check(mine.values, right.values)


def batch(store, rule, first, who, *seed):
    """Make a batch's calls with the parts of some workers; the first one present has two of some keys."""

    def parts(make, key, call):
        return [
            make(key, *seed, call, each, ord(key), number)
            for each in who
            for number in range(1 + (each == first and key in "bcht"))
        ]

    store.push({key: parts(part, key, 0) for key in "ab"})
    store.push({key: parts(part, key, 1) for key in "bh"}, priority=3)
    store.push("c", parts(rows, "c", 2))
    store.push({"t": parts(rows, "t", 3), "a": parts(part, "a", 3), "c": parts(rows, "c", 3)})
    if "skip" in rule and seed[-1] % 2:
        poisoned = {"h": parts(part, "h", 5), "c": parts(rows, "c", 5)}
        poisoned["h"][-1][2] = float("nan")
        store.push(poisoned)
    store.pushpull({key: parts(part, key, 4) for key in "hba"}, priority=-1)


def refused(pusher, shared_memory):
    """While the others have left, one pushes a long list of keys, dense and as Rows, and has a call refused."""
    with create(shared_memory=shared_memory == "True") as kv:
        kv.init(NAMES, [np.zeros((2, 1), F32)] * len(NAMES))
        ones = [tensorkv.Rows(np.array([1]), np.ones((1, 1), F32), 2)] * len(NAMES)
        kv.push(NAMES, [np.ones((2, 1), F32)] * len(NAMES))
        kv.push(NAMES, ones)
        if int(pusher) == RANK:
            kv.push(NAMES, [np.full((2, 1), 5, F32)] * len(NAMES))
            try:
                kv.push(NAMES[0], np.ones(4, F32))
            except tensorkv.ValueMismatchError:
                say("refused")
            kv.push(NAMES, ones)
            try:
                kv.push("nowhere", np.ones(4, F32))
            except tensorkv.KeyNotFoundError:
                say("refused")
        kv.leave()
        assert kv.pull(NAMES[-1]).tolist() == [[5], [1]]
        say("left")


def not_seen_before(pusher):
    """One pushes a long list of keys that was never pushed before somebody left."""
    kv = create()
    kv.init(NAMES, [np.zeros(1, F32)] * len(NAMES))
    try:
        if int(pusher) == RANK:
            kv.push(NAMES, [np.ones(1, F32)] * len(NAMES))
        kv.leave()
    except tensorkv.WorkerError as error:
        say(type(error).__name__, "|", error)


def left_and(verb, caller, shared_memory="True"):
    """Others may not do more than push and pull while somebody has left."""
    kv = create(shared_memory=shared_memory == "True")
    kv.init("a", np.zeros(5, F32))
    kv.init(NAMES, [np.zeros(5, F32)] * len(NAMES))
    try:
        if int(caller) != RANK:
            kv.leave()
        elif verb == "barrier":
            kv.barrier()
        elif verb == "push slices":
            kv.push("a", tensorkv.TensorSlice(np.ones(5, F32), (0,), (5,)))
        elif verb == "push many slices":
            kv.push(NAMES, [tensorkv.TensorSlice(np.ones(5, F32), (0,), (5,))] * len(NAMES))
        else:
            kv.init("b", np.zeros(3, F32))
    except tensorkv.WorkerMismatchError as error:
        say(type(error).__name__, "|", error)


def others(caller):
    """Two who have not left push different keys while the others have."""
    kv = create()
    kv.init(["a", "b"], [np.zeros(5, F32)] * 2)
    try:
        if RANK in (int(caller), int(caller) + 1):
            kv.push("a" if int(caller) == RANK else "b", np.ones(5, F32))
            kv.pull(["a", "b"])
        kv.leave()
    except tensorkv.WorkerMismatchError as error:
        say(type(error).__name__, "|", error)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
