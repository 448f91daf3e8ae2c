"""What workers run that compress their gradients."""

import json
import os
import sys

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv import compression
from tensorkv.engines import partition
from tensorkv.engines.sync import push
from tests.sync.dist_programs import RANK, SIZE, check, create, say

# Sizes from which values are divided, and take several slots, are as much smaller.
SMALLER = 64
SHAPES = {"scalar": (), "empty": (0, 3), "vector": (5,), "matrix": (600, 40), "half": (40, 70), "brain": (31,)}
DTYPES = {"half": torch.float16, "brain": torch.bfloat16}
CODECS = [
    {"type": "2bit", "threshold": 0.5},
    {"type": "1bit"},
    {"type": "fp16"},
    {"type": "bf16"},
    {"type": "int8"},
    {"type": "topk", "ratio": 0.2},
    {"type": "powersgd", "rank": 2},
]
OPTIMIZERS = {
    "sgd": {"lr": 0.1, "momentum": 0.9},
    "adamw": {"lr": 0.1, "ema": 0.9},
    "adam": {"lr": 0.1, "max_grad_norm": 0.5},
    "nadam": {"lr": 0.1},
}
OPTIONS = {"adamw": {"reduce": "mean"}, "nadam": {"nonfinite": "skip_step"}}


def add(key, received, stored):
    if isinstance(received, tensorkv.Rows):
        stored.values += received.values
    else:
        stored += received


def part(key, *seed):
    made = torch.from_numpy(np.random.default_rng([*seed, *key.encode()]).normal(size=SHAPES[key]).astype(np.float32))
    return made.to(DTYPES.get(key, torch.float32))


def rows(*seed):
    rng = np.random.default_rng(seed)
    return tensorkv.Rows(
        torch.from_numpy(rng.integers(0, 9, 3)), torch.from_numpy(rng.normal(size=(3, 2)).astype(np.float32)), 9
    )


class Simulated:
    """A local store that is pushed what arrives of the gradients of all workers, of which each has what it owes."""

    def __init__(self, rule):
        self.store = tensorkv.create("local", **OPTIONS.get(rule, {}))
        self.codec, self.owed, self.memory = None, {}, {}

    def arrived(self, key, rank, parts):
        total = parts[0].float().clone()
        for each in parts[1:]:
            total += each.float()
        # For a mean there are as many parts as were pushed; -0.0 changes no sum.
        others = [torch.full_like(total, -0.0) for _ in parts[1:]]
        if self.codec is None:
            return [total, *others]
        owed, out = np.empty(total.shape, np.float32), np.empty(total.shape, np.float32)
        words, memory = np.empty(self.codec.nbytes(owed.shape), np.uint8), self.memory.setdefault((key, rank), {})
        self.codec.encode(total.numpy(), self.owed.get((key, rank)), owed, words, memory)
        self.codec.decode(words, out)
        self.owed[key, rank] = owed
        return [torch.from_numpy(out), *others]

    def push_owed(self):
        keys = list(dict.fromkeys(key for key, _ in self.owed))
        self.store.push(
            {k: [torch.from_numpy(self.owed[k, r]) for r in range(SIZE) if (k, r) in self.owed] for k in keys}
        )
        self.owed, self.memory = {}, {}


def start(rule, *stores):
    for store in stores:
        store.init({key: part(key, 1) for key in SHAPES})
        store.init("table", tensorkv.Rows(torch.arange(9), torch.ones(9, 2), 9))
        if rule == "updater":
            store.set_updater(add)
        elif rule != "assign":
            store.set_optimizer(rule, **OPTIMIZERS[rule])


def step(kv, simulated, who, *seed, uses_pushpull):
    """Push gradients, two parts of some keys; where this worker is not among those present, for the others alone."""
    parts = {
        key: {rank: [part(key, *seed, rank, number) for number in range(1 + (key == "matrix"))] for rank in who}
        for key in SHAPES
    }
    given = {rank: [rows(*seed, rank)] for rank in who}
    if RANK in who:
        mine = {key: own[RANK] for key, own in parts.items()}
        if uses_pushpull:
            kv.pushpull(mine)
        else:
            kv.push({**mine, "table": given[RANK]})
    arrived = {
        key: [each for rank in who for each in simulated.arrived(key, rank, own[rank])] for key, own in parts.items()
    }
    if not uses_pushpull:
        arrived["table"] = [each for own in given.values() for each in own]
    simulated.store.push(arrived)


def same(kv, simulated):
    for key in SHAPES:
        check(kv.pull(key), simulated.store.pull(key))
        assert kv.info(key) == simulated.store.info(key), key
    mine, right = (store.row_sparse_pull("table", row_ids=torch.arange(9)) for store in (kv, simulated.store))
    check(mine.values, right.values)


def agree(options, *rules):
    """Codecs follow one another; the values are those of a local store that is pushed what arrives."""
    options = json.loads(options)
    partition._WHOLE //= SMALLER
    push.SLOT_NBYTES //= SMALLER
    push.SLOT_NBYTES_OVER_HOSTS //= SMALLER
    for rule in rules:
        with create(**OPTIONS.get(rule, {}), **options) as kv:
            simulated = Simulated(rule)
            start(rule, kv, simulated.store)
            # The first steps are made without a codec, so that there is a state that other hosts have to be told.
            for number, params in enumerate([None, *CODECS, None]):
                codec = compression.parse(params)
                if simulated.owed and rule != "assign":
                    simulated.push_owed()
                simulated.codec, simulated.owed, simulated.memory = codec, {}, {}
                kv.set_gradient_compression(params, simulate=True)
                for turn in range(3):
                    step(kv, simulated, range(SIZE), number, turn, uses_pushpull=turn == 1)
                same(kv, simulated)
                assert kv.last_push == simulated.store.last_push
            counts = kv.stats()["compression"]
            assert 0 < counts["sent_nbytes"] < counts["sent_raw_nbytes"]
            assert counts["received_nbytes"] == (SIZE - 1) * counts["sent_nbytes"]
            assert counts["received_raw_nbytes"] == (SIZE - 1) * counts["sent_raw_nbytes"]
        say("same bits", rule)


def leave(*rules):
    """Workers run out of batches one after another, and owe what they have not sent until they are back."""
    for rule in rules:
        with create(**OPTIONS.get(rule, {})) as kv:
            simulated = Simulated(rule)
            start(rule, kv, simulated.store)
            kv.set_gradient_compression(CODECS[0], simulate=True)
            simulated.codec = compression.parse(CODECS[0])
            for epoch in range(2):
                for turn in range(SIZE + 1):
                    who = [rank for rank in range(SIZE) if turn <= rank]
                    if turn == RANK + 1:
                        kv.leave()
                    if who:
                        step(kv, simulated, who, epoch, turn, uses_pushpull=turn % 2 == 1)
                same(kv, simulated)
        say("same bits", rule)


def save(path, rule, type_of_codec):
    """Push, save and push again; say what the last push makes, and what all workers owe together."""
    params = next(each for each in CODECS if each["type"] == type_of_codec)
    with create() as kv:
        start(rule, kv)
        kv.set_gradient_compression(params, simulate=True)
        for turn in range(2):
            kv.push({key: part(key, turn, RANK) for key in SHAPES})
        kv.save(path)
        kv.push({key: part(key, 2, RANK) for key in SHAPES})
        say({key: kv.pull(key).float().numpy().tobytes().hex() for key in SHAPES})


def load(path, rule, type_of_codec):
    """Go on from a checkpoint; say what a push makes of it."""
    params = next(each for each in CODECS if each["type"] == type_of_codec)
    with create() as kv:
        kv.set_gradient_compression(params, simulate=True)
        kv.load(path)
        kv.push({key: part(key, 2, RANK) for key in SHAPES})
        say({key: kv.pull(key).float().numpy().tobytes().hex() for key in SHAPES})


def owe_nothing(path):
    """Load a checkpoint and push what is owed; say the values."""
    with create() as kv:
        kv.load(path)
        kv.set_gradient_compression({"type": "fp16"}, simulate=True)
        kv.set_gradient_compression(None)
        say({key: kv.pull(key).double().numpy().tolist() for key in SHAPES})


def refuse(what):
    """One worker's call is refused, or all are; say the errors, and whether the store still works."""
    with create() as kv:
        kv.init({"w": torch.zeros(3), "i": torch.zeros(3, dtype=torch.int32), "t": torch.zeros(4, 2)})
        if what == "settings":
            with pytest.raises(tensorkv.WorkerMismatchError) as caught:
                kv.set_gradient_compression({"type": "2bit", "threshold": 1.0 + RANK}, simulate=True)
            say(caught.value)
            os._exit(0)
        if what == "shared":
            with pytest.raises(tensorkv.ArgumentError, match="on one host and share memory"):
                kv.set_gradient_compression({"type": "2bit"})
            say(kv.pushpull("w", torch.ones(3)).tolist())
            return
        kv.set_gradient_compression({"type": "2bit"}, simulate=True)
        bad = {
            "integers": ("i", torch.ones(3, dtype=torch.int32), "expected float32, float16 or bfloat16"),
            "rows": ("t", tensorkv.Rows(torch.tensor([1]), torch.ones(1, 2), 4), "Rows for a dense key"),
            "mixed": (
                "t",
                [torch.ones(4, 2), tensorkv.Rows(torch.tensor([1]), torch.ones(1, 2), 4)],
                "Rows for a dense key",
            ),
            "nan": ("w", torch.tensor([1.0, float("nan"), 0.0]), "has NaN or Inf, which 2bit cannot compress"),
        }
        key, gradient, message = bad[what]
        with pytest.raises(tensorkv.TensorKVError, match=message):
            kv.push(key, gradient)
        # Nothing is owed of what was refused.
        say(
            kv.pushpull("w", torch.tensor([0.75, -0.25, 0.5])).tolist(),
            kv.pushpull("w", torch.full((3,), 0.25)).tolist(),
        )


def refuse_alone(form):
    """The gradient of rank 1 alone has NaN; say what each worker's push raises, and whether the store still works."""
    with create() as kv:
        kv.init("w", np.zeros(3, np.float32))
        kv.set_gradient_compression({"type": "bf16"}, simulate=True)
        gradient = np.full((3, 2), np.nan if RANK == 1 else 1, np.float32)
        gradient = np.ascontiguousarray(gradient[:, 0]) if form == "plain" else gradient[:, 0]
        for _ in range(2):
            with pytest.raises(tensorkv.TensorKVError) as caught:
                kv.push("w", gradient)
            say(type(caught.value).__name__, "|", caught.value)
            gradient = np.ones(3, np.float32)


def leave_out():
    """Say the value after a sum that overflows was left out, of which something was owed."""
    with create(nonfinite="skip") as kv:
        kv.init("h", torch.zeros(2, dtype=torch.float16))
        kv.set_optimizer("sgd", lr=1.0)
        kv.set_gradient_compression({"type": "topk", "ratio": 0.5}, simulate=True)
        for gradient in ([1.0, 2.0], [4e4, 0.0], [0.5, 0.0]):
            kv.push("h", torch.tensor(gradient))
        assert kv.info("h").version == 2, "one sum overflows"
        say(kv.pull("h").tolist())


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
