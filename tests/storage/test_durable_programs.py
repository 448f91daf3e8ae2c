"""Random programs: a store in a folder, closed, opened and dropped on the way, has the bits of one in memory."""

import os
import random
import tempfile

import numpy as np
import pytest

import tensorkv
from tensorkv import Rows, TensorSlice
from tensorkv.shard import rules
from tensorkv.storage import durable
from tests.support.amount import amount
from tests.support.checkpoints import snapshot

SEED = int(os.environ.get("TENSORKV_TEST_SEED", "20"))
SHAPES = {"a": (5,), "b": (3, 4), "c": (), "d": (0, 2), "e": (40, 30)}
TABLES = ["t", "u"]
DTYPES = ["float32", "float64", "float16", "int64", "complex64", "bool"]
OPTIMIZERS = [
    ("sgd", {"lr": 0.1, "momentum": 0.9}),
    ("adam", {"lr": 0.01}),
    ("rmsprop", {"lr": 0.01}),
    ("adafactor", {"lr": 0.1}),
]


def updater(key, received, stored):
    stored += received


class Program:
    """Calls, made on a store in memory and on one in a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.plain = tensorkv.create("local")
        self.kv = None
        self.has_updater = False
        self.openings = self.incomplete = 0
        self.open()

    def open(self):
        level = random.choice(["process", "disk"])
        self.kv = tensorkv.create(
            "local", path=self.folder, durability=level, log_nbytes=random.choice([500, 20_000, None])
        )
        self.openings += 1
        if self.has_updater:
            self.kv.set_updater(updater)

    def both(self, verb, *arguments, **options):
        """Call both; they do the same, or refuse with the same error."""
        results = []
        for kv in (self.plain, self.kv):
            try:
                getattr(kv, verb)(*arguments, **options)
                results.append(None)
            except (tensorkv.TensorKVError, TypeError) as error:
                results.append(type(error))
        assert results[0] is results[1], (verb, results)
        return results[0] is None

    def compare(self):
        plain, mine = snapshot(self.plain), snapshot(self.kv)
        assert mine[0] == plain[0]
        assert mine[2] == plain[2]
        lost = rules.CallUpdater, rules.LostUpdater
        assert plain[1] is mine[1] or (plain[1] in lost and mine[1] in lost)

    def array(self, key):
        shape, dtype = SHAPES[key], self.dtype(key)
        values = np.random.default_rng(random.getrandbits(32)).integers(-3, 4, shape)
        return (values % 2 if dtype == "bool" else values).astype(dtype)

    def dtype(self, key):
        return str(self.plain.info(key).dtype) if key in self.plain else random.choice(DTYPES)

    def rows(self, width=3):
        count = random.randrange(4)
        ids = np.array([random.randrange(12) for _ in range(count)], np.int64)
        return Rows(ids, np.full((count, width), random.random(), np.float32), 12)

    def step(self):  # noqa: C901 - one case for each verb
        keys = list(self.plain.keys())
        key = random.choice([*SHAPES, *TABLES])
        match random.randrange(17):
            case 0 | 1 | 2:
                self.both("init", key, self.rows() if key in TABLES else self.array(key))
            case 3:
                self.both("delete", key)
            case 4:
                name, numbers = random.choice(OPTIMIZERS)
                if self.both("set_optimizer", name, **numbers):
                    self.has_updater = False
            case 5:
                self.both("set_hyperparameters", random.choice([None, *keys]), lr=random.random())
            case 6:
                chosen = random.choice([updater, None])
                self.both("set_updater", chosen)
                self.has_updater = chosen is not None
            case 7:
                self.load()
            case 8:
                self.reopen()
            case 9:
                self.both("push", [k for k in keys if k in SHAPES], [self.array(k) for k in keys if k in SHAPES])
            case 10:
                self.push_slices(random.choice(["a", "b", "e"]))
            case _:
                values = [self.rows() if key in TABLES else self.array(key) for _ in range(random.randrange(1, 4))]
                self.both("push", key, values)

    def push_slices(self, key):
        """Push two slices of a value; between them the store in the folder may be opened again."""
        value, at = self.array(key), random.randrange(1, SHAPES[key][0])
        first, second = (
            TensorSlice(own, (start, *[0] * (value.ndim - 1)), value.shape)
            for own, start in ((value[:at], 0), (value[at:], at))
        )
        if self.both("push", key, first):
            with pytest.raises(tensorkv.IncompleteValueError):
                self.kv.pull(key)
            self.incomplete += 1
            for _ in range(random.randrange(3)):
                self.reopen()
            self.both("push", key, second)

    def load(self):
        with tempfile.TemporaryDirectory() as folder:
            self.plain.save(folder)
            for _ in range(3):
                self.step_push()
            self.both("load", folder)

    def step_push(self):
        keys = [key for key in self.plain.keys() if key in SHAPES]
        if keys:
            key = random.choice(keys)
            self.both("push", key, self.array(key))

    def reopen(self):
        self.kv.close()
        self.open()


@pytest.mark.parametrize("number", range(amount(4, 12)))
def test_a_store_in_a_folder_has_the_bits_of_one_in_memory(number, monkeypatch, tmp_path):
    random.seed(f"{SEED} {number}")
    monkeypatch.setattr(durable, "DIGEST_EVERY", random.choice([2, 7, 64]))
    program = Program(str(tmp_path / "store"))
    try:
        for _ in range(120):
            program.step()
            program.compare()
        program.both("set_updater", None)
        program.has_updater = False
        program.both("delete", "e")
        assert program.both("init", "e", program.array("e"))
        program.push_slices("e")
        program.compare()
        program.reopen()
        assert program.openings > 3
        assert program.incomplete
    finally:
        program.plain.close()
        program.kv.close()
