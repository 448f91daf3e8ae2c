"""Random programs of verbs against a model of NumPy arrays in a dict, compared bit for bit after each step."""

import itertools
import shutil
import tempfile
from dataclasses import dataclass, field
from random import Random

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import tensorkv
from tensorkv import Rows
from tensorkv.arrays import interop
from tensorkv.engines import call as engine_call
from tensorkv.runtime.stats import Metrics
from tensorkv.shard import reduce, rules, shard
from tests.support.amount import amount

# Enough small keys that calls which repeat them run on flat arrays.
NUM_LAYERS = 9
EXAMPLES = amount(100, 300)
STEPS = 50
STEPS_WANTED = amount(2_000, 10_000)

NUM_ROWS = 2_000_000_000
SHAPES = [(), (1,), (3,), (2, 3), (4, 2), (0, 2), (2, 1, 3)]
DTYPES = ["float32", "float64", "int32", "int64", "bool", "float16", "bfloat16", "uint16"]
# What may be pushed into a value, and what it may be pulled into, beside its own dtype.
PARTS = {
    "float32": ["float16", "bfloat16"],
    "float64": ["float32", "float16", "bfloat16"],
    "int64": ["int32", "uint16"],
    "int32": ["uint16"],
    "float16": ["float32", "bfloat16"],
    "bfloat16": ["float32", "float16"],
}
OUTS = {
    "float32": ["float64", "float16", "bfloat16"],
    "float64": ["float32"],
    "int32": ["int64", "float64"],
    "int64": ["int32"],
    "bool": ["int32", "float32", "float16"],
    "float16": ["float32", "float64"],
    "bfloat16": ["float32", "float64"],
    "uint16": ["int32", "float32"],
}
BAD_PARTS = {
    "float32": ["float64", "int32", "bool"],
    "float64": ["int64", "bool"],
    "int32": ["int64", "float32", "bool"],
    "int64": ["float64", "bool"],
    "bool": ["int32", "float32"],
    "float16": ["float64", "int32"],
    "bfloat16": ["float64", "bool"],
    "uint16": ["int32", "float32"],
}

steps_run = 0

seeds = st.integers(0, 2**32 - 1)
picks = st.lists(st.integers(0, 13), min_size=1, max_size=4)


# ---------------------------------------------------------------- numbers, as the documentation has them


def to_dtype(array, dtype):
    """Cast as documented; the model holds bfloat16 as the float32 of the same value."""
    if dtype != "bfloat16":
        return array.astype(dtype)
    bits = array.astype(np.float32).view(np.uint32)
    bits = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.asarray(bits).view(np.float32)


def random_array(rng, shape, dtype):
    size = int(np.prod(shape))
    if dtype == "bool":
        numbers = [rng.random() < 0.5 for _ in range(size)]
    elif "int" in dtype:
        info = np.iinfo(dtype)
        numbers = [rng.randint(info.min, info.max) if rng.random() < 0.5 else rng.randint(0, 9) for _ in range(size)]
    else:
        numbers = [rng.choice((rng.uniform(-4, 4), rng.gauss(0, 1e-3), 0.0, -0.0)) for _ in range(size)]
        return to_dtype(np.array(numbers, np.float64).reshape(shape), dtype)
    return np.array(numbers, dtype).reshape(shape)


def wide(dtype):
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def add(parts, dtype):
    """Add left to right in at least float32 and round once."""
    total = to_dtype(parts[0], wide(dtype))
    for part in parts[1:]:
        total = np.add(total, to_dtype(part, wide(dtype)), out=np.empty_like(total))
    return to_dtype(total, dtype)


def bits(array):
    return array.shape, array.tobytes()


# ---------------------------------------------------------------- arrays of the libraries


def as_array(array, dtype, library, layout, rng):
    """Return an array of a library with these numbers, contiguous or not."""
    if layout == "strided" and array.ndim:
        base = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
        base[..., ::2] = array
        array = base[..., ::2]
    elif layout == "transposed" and array.ndim:
        array = array.copy(order="F")
    elif layout == "flipped" and array.ndim and library == "numpy":
        array = array[::-1].copy()[::-1]
    else:
        array = array.copy()
    if library == "numpy":
        if layout == "read-only":
            array.flags.writeable = False
        return array
    tensor = torch.from_numpy(array)
    if dtype == "bfloat16":
        tensor = tensor.to(torch.bfloat16)
    if tensor.is_floating_point() and rng.random() < 0.2:
        tensor = tensor.requires_grad_()
    return tensor


def read(thing):
    """Return a copy in the model's form."""
    if isinstance(thing, torch.Tensor):
        thing = thing.detach()
        thing = thing.float() if thing.dtype is torch.bfloat16 else thing
        return thing.numpy().copy()
    return np.array(thing)


def scribble(thing):
    """Overwrite a caller's array."""
    if isinstance(thing, Rows):
        scribble(thing.values)
        scribble(thing.ids)
    elif isinstance(thing, torch.Tensor):
        thing.detach().fill_(1)
    elif thing.flags.writeable:
        thing[...] = 1


@dataclass
class Known:
    """What the model knows of a key; ``rows`` is None for a dense one."""

    shape: tuple
    dtype: str
    library: str
    value: np.ndarray | None = None
    rows: dict | None = None
    version: int = 0

    def copy(self):
        rows = None if self.rows is None else dict(self.rows)
        return Known(self.shape, self.dtype, self.library, self.value, rows, self.version)

    def read_rows(self, ids):
        if self.rows is None:
            return self.value[ids]
        zero = np.zeros(self.shape[1:], self.stored_dtype)
        return np.array([self.rows.get(i, zero) for i in ids], self.stored_dtype).reshape(len(ids), *self.shape[1:])

    @property
    def stored_dtype(self):
        return "float32" if self.dtype == "bfloat16" else self.dtype

    def write_rows(self, ids, values):
        if self.rows is None:
            self.value = self.value.copy()
            self.value[ids] = values
        else:
            self.rows.update((i, row.copy()) for i, row in zip(ids, values, strict=True))

    def update(self, received, mode):
        """Apply the rule to a sum: an array, or (ids, rows)."""
        self.version += 1
        if isinstance(received, tuple):
            ids, got = received
            self.write_rows(ids, self.updated(self.read_rows(ids), got, mode))
        else:
            self.value = self.updated(self.value, received, mode)

    def updated(self, stored, received, mode):
        if mode == "assign":
            return received
        once = add([stored, received], self.dtype)
        return add([once, received], self.dtype)


class UpdaterFailureError(Exception):
    """What the updater of these tests raises."""


def twice(failing):
    """Return an updater that does stored += 2 * received, but spoils and raises for some keys."""

    def update(key, received, stored):
        received, stored = (x.values if isinstance(x, Rows) else x for x in (received, stored))
        if isinstance(stored, torch.Tensor) and stored.dtype is torch.uint16:
            # torch has no sums for it; the bits are the same.
            received, stored = received.view(torch.int16), stored.view(torch.int16)
        stored += received
        if key in failing:
            raise UpdaterFailureError(key)
        stored += received

    return update


@dataclass
class Call:
    """The arguments of one push, in a form that users write, and what the model needs to follow."""

    keys: list = field(default_factory=list)
    groups: list = field(default_factory=list)
    parts: dict = field(default_factory=dict)
    watched: list = field(default_factory=list)


class StoreMachine(RuleBasedStateMachine):
    TYPE = "local"

    @initialize(int_keys=st.booleans(), layer_dtype=st.sampled_from(["float32", "float64", "int64", "bool", "float16"]))
    def open(self, int_keys, layer_dtype):
        self.names = [3, 0, -7, 2**40, 11] if int_keys else ["w", "bias", "emb/0", "ü", "3"]
        self.layers = [100 + i if int_keys else f"layer{i}" for i in range(NUM_LAYERS)]
        self.layer_dtype = layer_dtype
        self.stranger = "3" if int_keys else 3
        self.kv = tensorkv.create(self.TYPE)
        self.model = {}
        self.mode, self.failing = "assign", frozenset()
        self.kept = []
        self.pulled = []

    def teardown(self):
        if hasattr(self, "kv"):
            self.kv.close()

    def name(self, i):
        return self.names[i % len(self.names)]

    def count(self):
        global steps_run
        steps_run += 1

    # ------------------------------------------------------------ what holds after each step

    @invariant()
    def store_is_model(self):
        if not hasattr(self, "kv"):
            return
        assert self.kv.keys() == list(self.model)
        assert len(self.kv) == len(self.model)
        for key, known in self.model.items():
            assert key in self.kv
            info = self.kv.info(key)
            assert (info.shape, info.dtype, info.version) == (known.shape, known.dtype, known.version)
            if known.rows is None:
                assert info.kind == "dense"
            else:
                assert info.kind == "rows"
                ids = sorted(i for i in {*known.rows, 0, 5, NUM_ROWS - 1} if i < known.shape[0])
                got = self.kv.row_sparse_pull(key, row_ids=ids)
                assert read(got.ids).tolist() == ids
                self.compare(got.values, known, known.read_rows(ids))
        dense = [key for key, known in self.model.items() if known.rows is None]
        for key, array in zip(dense, self.kv.pull(dense), strict=True):
            self.compare(array, self.model[key], self.model[key].value)
        for array, before in self.kept + self.pulled:
            assert bits(read(array)) == before

    def compare(self, got, known, expected):
        assert type(got) is (torch.Tensor if known.library == "torch" else np.ndarray)
        assert str(got.dtype).removeprefix("torch.") == known.dtype
        assert bits(read(got)) == bits(expected), f"{known.dtype}: got {got}, expected {expected}"

    def keep(self, arrays_pulled):
        self.pulled = [*self.pulled, *((array, bits(read(array))) for array in arrays_pulled)][-8:]

    # ------------------------------------------------------------ init, broadcast, delete

    def new_values(self, chosen, seed):
        rng = Random(seed)
        fresh = list(dict.fromkeys(self.name(i) for i in chosen if self.name(i) not in self.model))
        values, known = [], []
        for _ in fresh:
            dtype, shape = rng.choice(DTYPES), rng.choice(SHAPES)
            library = "torch" if dtype == "bfloat16" else rng.choice(["numpy", "torch"])
            if rng.random() < 0.3:
                num_rows = rng.choice([6, NUM_ROWS])
                made, ids, rows = self.new_rows(rng, num_rows, rng.choice([(), (2,), (0,)]), dtype, library)
                table = Known((num_rows, *made.shape[1:]), dtype, library, rows={})
                table.write_rows(*merge([(ids, rows)], dtype))
                values.append(made)
                known.append(table)
            else:
                array = random_array(rng, shape, dtype)
                layout = rng.choice(["plain", "strided", "transposed", "flipped", "read-only"])
                values.append(as_array(array, dtype, library, layout, rng))
                known.append(Known(shape, dtype, library, array))
        return fresh, values, known

    def new_rows(self, rng, num_rows, row_shape, dtype, library):
        pool = [0, 1, 2, 3, 5] if num_rows < 10 else [0, 5, 1_000_000_007, num_rows - 1]
        pool = [i for i in pool if i < num_rows]
        ids = [rng.choice(pool) for _ in range(rng.randint(0, 5))] if pool else []
        values = random_array(rng, (len(ids), *row_shape), dtype)
        array = as_array(values, dtype, library, rng.choice(["plain", "strided"]), rng)
        if library == "torch" and rng.random() < 0.3 and not array.requires_grad:
            index = torch.tensor([ids], dtype=torch.int64)
            return torch.sparse_coo_tensor(index, array, (num_rows, *row_shape), check_invariants=True), ids, values
        index = np.array(ids, rng.choice(["int64", "int32", "uint32"]))
        index = torch.from_numpy(index) if library == "torch" and index.dtype != np.uint32 else index
        return Rows(index, array, num_rows), ids, values

    @rule(chosen=picks, seed=seeds, form=st.sampled_from(["single", "list", "mapping"]), out=st.booleans())
    def init(self, chosen, seed, form, out):
        self.count()
        fresh, values, known = self.new_values(chosen, seed)
        if form == "single" or not fresh:
            fresh, values, known = fresh[:1], values[:1], known[:1]
        dense = all(each.rows is None for each in known)
        verb = self.kv.broadcast if out and dense else self.kv.init
        if not fresh:
            return
        if form == "single":
            got = verb(fresh[0], values[0])
        elif form == "list":
            got = verb(tuple(fresh), values)
        else:
            got = verb(dict(zip(fresh, values, strict=True)))
        for value in values:
            if not getattr(value, "is_sparse", False):
                scribble(value)
        self.model.update(zip(fresh, known, strict=True))
        if out and dense:
            listed = [got] if form == "single" else list(got.values()) if form == "mapping" else got
            for array, each in zip(listed, known, strict=True):
                self.compare(array, each, each.value)
            self.keep(listed)
        else:
            assert got is None

    @precondition(lambda self: self.model)
    @rule(chosen=picks, strange=st.booleans())
    def delete(self, chosen, strange):
        self.count()
        keys = list(dict.fromkeys(self.name(i) for i in chosen))[:2]
        if strange:
            with pytest.raises((tensorkv.KeyNotFoundError, tensorkv.KeyTypeError)):
                self.kv.delete([*keys, "nowhere" if isinstance(keys[0], str) else 99])
            return
        if all(key in self.model for key in keys):
            self.kv.delete(keys if len(keys) > 1 else keys[0])
            for key in keys:
                del self.model[key]
        else:
            with pytest.raises(tensorkv.KeyNotFoundError):
                self.kv.delete(keys)

    # ------------------------------------------------------------ push

    def held(self, chosen):
        listed = list(self.model)
        return [listed[i % len(listed)] for i in chosen]

    def new_call(self, chosen, seed):
        rng = Random(seed)
        call = Call()
        for key in self.held(chosen):
            known = self.model[key]
            kind = "rows" if known.rows is not None else "dense"
            if kind == "dense" and known.shape:
                kind = rng.choice(["dense"] * 3 + ["rows", "mixed"])
            group = [self.new_part(call, key, known, kind, rng) for _ in range(rng.choice([1, 1, 2, 3]))]
            call.keys.append(key)
            call.groups.append(group[0] if len(group) == 1 and rng.random() < 0.7 else group)
        return call

    def new_part(self, call, key, known, kind, rng):
        dtype = rng.choice([known.dtype, known.dtype, *PARTS.get(known.dtype, [])])
        library = "torch" if dtype == "bfloat16" else rng.choice(["numpy", "torch"])
        if kind == "rows" or (kind == "mixed" and rng.random() < 0.5):
            part, ids, values = self.new_rows(rng, known.shape[0], known.shape[1:], dtype, library)
            call.parts.setdefault(key, []).append((ids, values))
            if isinstance(part, Rows):
                call.watched.extend([part.values, part.ids])
            return part
        array = random_array(rng, known.shape, dtype)
        call.parts.setdefault(key, []).append(array)
        layout = rng.choice(["plain", "plain", "strided", "transposed", "flipped", "read-only"])
        part = as_array(array, dtype, library, layout, rng)
        call.watched.append(part)
        return part

    def total(self, key, parts):
        known = self.model[key]
        if all(isinstance(part, tuple) for part in parts):
            return merge(parts, known.dtype)
        return add(
            [part if not isinstance(part, tuple) else spread(part, known.shape, known.dtype) for part in parts],
            known.dtype,
        )

    @precondition(lambda self: self.model)
    @rule(
        chosen=picks,
        seed=seeds,
        form=st.sampled_from(["single", "list", "mapping"]),
        pull=st.sampled_from(["no", "new", "out"]),
        overwrite=st.booleans(),
    )
    def push(self, chosen, seed, form, pull, overwrite):
        self.count()
        call = self.new_call(chosen[:1] if form == "single" else chosen, seed)
        if form == "single":
            args = (call.keys[0], call.groups[0])
        elif form == "mapping" and len(set(call.keys)) == len(call.keys):
            args = (dict(zip(call.keys, call.groups, strict=True)),)
        else:
            args = (call.keys, call.groups)
        if any(self.model[key].rows is not None for key in call.keys):
            pull = "no"
        self.make(call, args, pull, overwrite)

    def make(self, call, args, pull, overwrite):
        keys = list(dict.fromkeys(call.keys))
        before = [bits(read(array)) for array in call.watched]
        outs = []
        if pull == "out":
            outs = [np.zeros(self.model[key].shape, self.model[key].stored_dtype) for key in call.keys]
            args = (*args, None) if len(args) == 1 else args
            out = dict(zip(call.keys, outs, strict=True)) if len(keys) == len(call.keys) and overwrite else outs
            args = (*args, out if isinstance(args[0], dict | list) else outs[0])
        verb = self.kv.push if pull == "no" else self.kv.pushpull
        if self.mode == "twice" and self.failing & set(keys):
            with pytest.raises(UpdaterFailureError):
                verb(*args)
            # The failing key is as it was; of the others, those before it have been updated.
            for key in set(keys) - self.failing:
                if self.kv.info(key).version > self.model[key].version:
                    self.model[key].update(self.total(key, call.parts[key]), self.mode)
        else:
            got = verb(*args)
            for key in keys:
                self.model[key].update(self.total(key, call.parts[key]), self.mode)
            self.check_pushpull(pull, call, got, outs)
        after = [bits(read(array)) for array in call.watched]
        assert after == before
        if overwrite:
            for array in call.watched:
                scribble(array)
        else:
            self.kept = [*self.kept, *zip(call.watched, before, strict=True)][-8:]

    @rule(
        seed=seeds,
        verb=st.sampled_from(["push", "push", "push new", "push out", "pull", "delete"]),
        columns=st.integers(1, 3),
        library=st.sampled_from(["numpy", "torch"]),
        odd=st.booleans(),
    )
    def layers_again(self, seed, verb, columns, library, odd):
        """Name all layers in their order, mostly with arrays exactly as the keys ask for."""
        self.count()
        rng = Random(seed)
        missing = [i for i, key in enumerate(self.layers) if key not in self.model]
        if missing:
            values = [random_array(rng, SHAPES[i % len(SHAPES)], self.layer_dtype) for i in missing]
            made = [as_array(value, self.layer_dtype, library, "plain", Random(0)) for value in values]
            self.kv.init([self.layers[i] for i in missing], made)
            for i, value in zip(missing, values, strict=True):
                self.model[self.layers[i]] = Known(value.shape, self.layer_dtype, library, value)
        elif verb == "delete":
            self.kv.delete(self.layers[2])
            del self.model[self.layers[2]]
        elif verb == "pull":
            zeros = [np.zeros_like(self.model[key].value) for key in self.layers]
            outs = [as_array(zero, self.layer_dtype, library, "plain", Random(0)) for zero in zeros]
            self.kv.pull(self.layers, out=outs)
            for key, out in zip(self.layers, outs, strict=True):
                assert bits(read(out)) == bits(self.model[key].value)
            self.keep(outs)
        else:
            call = Call(list(self.layers), [[] for _ in self.layers])
            for place in range(columns * NUM_LAYERS):
                key = self.layers[place % NUM_LAYERS]
                known = self.model[key]
                if odd and rng.random() < 0.1:
                    part = self.new_part(call, key, known, "mixed" if known.shape else "dense", rng)
                else:
                    array = random_array(rng, known.shape, self.layer_dtype)
                    part = as_array(array, self.layer_dtype, library, "plain", Random(0))
                    call.parts.setdefault(key, []).append(array)
                    call.watched.append(part)
                call.groups[place % NUM_LAYERS].append(part)
            self.make(call, (call.keys, call.groups), {"push": "no"}.get(verb, verb[5:]), overwrite=odd)

    def check_pushpull(self, pull, call, got, outs):
        if pull == "out":
            for key, out in zip(call.keys, outs, strict=True):
                assert bits(out) == bits(self.model[key].value)
        elif pull == "new":
            if isinstance(got, dict):
                listed = list(got.items())
            else:
                listed = list(zip(call.keys, got if isinstance(got, list) else [got], strict=True))
            for key, array in listed:
                self.compare(array, self.model[key], self.model[key].value)
            self.keep([array for _, array in listed])
        else:
            assert got is None

    @rule(mode=st.sampled_from(["assign", "twice", "twice"]), failing=st.sets(st.integers(0, 4), max_size=2))
    def set_updater(self, mode, failing):
        self.count()
        self.mode = mode
        self.failing = frozenset(self.names[i] for i in failing) if mode == "twice" else frozenset()
        self.kv.set_updater(None if mode == "assign" else twice(self.failing))

    # ------------------------------------------------------------ pull

    @precondition(lambda self: any(known.rows is None for known in self.model.values()))
    @rule(chosen=picks, seed=seeds, form=st.sampled_from(["single", "list", "mapping"]), like=st.booleans())
    def pull(self, chosen, seed, form, like):
        self.count()
        rng = Random(seed)
        dense = [key for key, known in self.model.items() if known.rows is None]
        keys = [dense[i % len(dense)] for i in chosen]
        if form == "single":
            keys = keys[:1]
        if form == "mapping":
            keys = list(dict.fromkeys(keys))
        elif rng.random() < 0.4:
            self.pull_new(keys, form, like)
            return
        outs = [[self.new_out(self.model[key], rng) for _ in range(rng.choice([1, 1, 2]))] for key in keys]
        given = [group[0] if len(group) == 1 else group for group in outs]
        if form == "single":
            assert self.kv.pull(keys[0], out=given[0]) is None
        elif form == "list":
            self.kv.pull(keys, given)
        else:
            self.kv.pull(dict(zip(keys, given, strict=True)))
        for key, group in zip(keys, outs, strict=True):
            for out in group:
                dtype = str(out.dtype).removeprefix("torch.")
                assert bits(read(out)) == bits(to_dtype(self.model[key].value, dtype))
        self.keep([out for group in outs for out in group])

    def pull_new(self, keys, form, like):
        # Only torch has bfloat16 without a further package.
        like = torch.empty(0) if like else None
        got = self.kv.pull(keys[0] if form == "single" else keys, like=like)
        listed = [got] if form == "single" else got
        for key, array in zip(keys, listed, strict=True):
            known = self.model[key].copy()
            known.library = known.library if like is None else "torch"
            self.compare(array, known, known.value)
        self.keep(listed)

    def new_out(self, known, rng):
        dtype = rng.choice([known.dtype, known.dtype, *OUTS[known.dtype]])
        library = "torch" if dtype == "bfloat16" else rng.choice(["numpy", "torch"])
        junk = to_dtype(np.ones(known.shape, np.float32), dtype)
        out = as_array(junk, dtype, library, rng.choice(["plain", "strided", "transposed", "flipped"]), rng)
        return out.detach() if isinstance(out, torch.Tensor) else out

    @precondition(lambda self: any(known.shape for known in self.model.values()))
    @rule(chosen=st.integers(0, 4), ids=st.lists(st.integers(0, 10), max_size=4), out=st.booleans())
    def row_sparse_pull(self, chosen, ids, out):
        self.count()
        keys = [key for key, known in self.model.items() if known.shape]
        key = keys[chosen % len(keys)]
        known = self.model[key]
        ids = [i for i in ids if i < known.shape[0]]
        expected = sorted(set(ids))
        target = Rows(np.array([0]), np.zeros((1, 1)), 1) if out else None
        got = self.kv.row_sparse_pull(key, out=target, row_ids=np.array(ids, np.int64) if len(ids) % 2 else ids)
        assert (got is None) == out
        got = target if out else got
        assert got.num_rows == known.shape[0]
        assert read(got.ids).tolist() == expected
        self.compare(got.values, known, known.read_rows(expected))
        self.keep([got.values])

    # ------------------------------------------------------------ calls that must change nothing

    @precondition(lambda self: self.model)
    @rule(
        chosen=picks,
        seed=seeds,
        fault=st.sampled_from(["unknown key", "other key type", "shape", "dtype", "no array", "lengths", "ids"]),
        place=st.integers(0, 5),
        pull=st.booleans(),
    )
    def bad_push(self, chosen, seed, fault, place, pull):
        self.count()
        rng = Random(seed)
        call = self.new_call(chosen, seed)
        key = call.keys[place % len(call.keys)]
        known = self.model[key]
        expected = tensorkv.ValueMismatchError
        if fault == "unknown key":
            key = "nowhere" if isinstance(key, str) else 99
            bad, expected = np.ones(2), tensorkv.KeyNotFoundError
        elif fault == "other key type":
            key, bad, expected = self.stranger, np.ones(2), tensorkv.KeyTypeError
        elif fault == "shape":
            bad = random_array(rng, (*known.shape, 2) if known.rows is None else (2,), known.stored_dtype)
        elif fault == "dtype":
            bad = random_array(rng, known.shape if known.rows is None else (2,), rng.choice(BAD_PARTS[known.dtype]))
        elif fault == "no array":
            bad, expected = rng.choice([None, "text", 2.5, object()]), tensorkv.ArrayTypeError
        elif fault == "lengths":
            bad, expected = None, tensorkv.ArgumentError
        else:
            ids = torch.tensor([[0, known.shape[0] if known.shape else 4]])
            bad = torch.sparse_coo_tensor(ids, torch.ones(2), (2**40,), check_invariants=False)
        where = place % (len(call.keys) + 1)
        if fault != "lengths":
            call.keys.insert(where, key)
            call.groups.insert(where, [bad] if rng.random() < 0.5 else bad)
        else:
            call.groups.append(np.ones(2))
        with pytest.raises(expected):
            (self.kv.pushpull if pull else self.kv.push)(call.keys, call.groups)

    @precondition(lambda self: self.model)
    @rule(chosen=picks, seed=seeds, fault=st.sampled_from(["exists", "twice", "key type", "no key", "no array"]))
    def bad_init(self, chosen, seed, fault):
        self.count()
        fresh, values, _ = self.new_values(chosen, seed)
        if fault == "exists":
            bad, expected = next(iter(self.model)), tensorkv.KeyExistsError
        elif fault == "twice" and fresh:
            bad, expected = fresh[0], tensorkv.KeyExistsError
        elif fault == "key type":
            bad, expected = self.stranger, tensorkv.KeyTypeError
        elif fault == "no array":
            bad, expected = "new" if isinstance(self.names[0], str) else 98, tensorkv.ArrayTypeError
        else:
            bad, expected = Random(seed).choice(["", None, 2.5, True, b"w"]), tensorkv.KeyTypeError
        with pytest.raises(expected):
            self.kv.init([*fresh, bad], [*values, "text" if fault == "no array" else np.ones(2)])

    @precondition(lambda self: any(known.rows is None for known in self.model.values()))
    @rule(chosen=picks, seed=seeds, fault=st.sampled_from(["read-only", "shape", "dtype", "overlap", "unknown key"]))
    def bad_pull(self, chosen, seed, fault):
        self.count()
        rng = Random(seed)
        dense = [key for key, known in self.model.items() if known.rows is None]
        keys = [dense[i % len(dense)] for i in chosen]
        outs = [np.full(self.model[key].shape, 7, "float64") for key in keys]
        outs = [o.astype(self.model[k].stored_dtype) for k, o in zip(keys, outs, strict=True)]
        known = self.model[keys[0]]
        bad = np.zeros(known.shape, known.stored_dtype)
        key, expected = keys[0], tensorkv.ValueMismatchError
        if fault == "read-only":
            bad.flags.writeable = False
            expected = tensorkv.ArrayTypeError
        elif fault == "shape":
            bad = np.zeros((*known.shape, 2), known.stored_dtype)
        elif fault == "dtype":
            bad = np.zeros(known.shape, "bool" if known.dtype != "bool" else "S1")
            expected = (tensorkv.ValueMismatchError, tensorkv.ArrayTypeError)
        elif fault == "overlap" and outs[0].size:
            bad, expected = outs[0][...], tensorkv.ArgumentError
        else:
            key, expected = ("nowhere" if isinstance(key, str) else 99), tensorkv.KeyNotFoundError
        where = rng.randint(0, len(keys))
        sentinels = [bits(out) for out in outs]
        with pytest.raises(expected):
            self.kv.pull([*keys[:where], key, *keys[where:]], out=[*outs[:where], bad, *outs[where:]])
        assert [bits(out) for out in outs] == sentinels

    # ------------------------------------------------------------ checkpoints

    @precondition(lambda self: self.model)
    @rule(often=st.integers(0, 3))
    def save_and_load(self, often):
        self.count()
        if often:
            return
        folder = tempfile.mkdtemp()
        try:
            self.kv.save(folder)
            other = tensorkv.create(self.TYPE)
            other.load(folder)
        finally:
            shutil.rmtree(folder)
        self.kv.close()
        self.kv = other
        # An updater is a function, which a checkpoint does not hold.
        self.kv.set_updater(None if self.mode == "assign" else twice(self.failing))


def merge(parts, dtype):
    """Return sorted ids and the sum of each one's rows, added in the order given."""
    sums = {}
    for ids, values in parts:
        for i, row in zip(ids, to_dtype(values, wide(dtype)), strict=True):
            sums[i] = np.add(sums[i], row, out=np.empty_like(row)) if i in sums else row
    row_shape = parts[0][1].shape[1:]
    stored = np.float32 if dtype == "bfloat16" else dtype
    rows = np.array([sums[i] for i in sorted(sums)]).reshape(len(sums), *row_shape)
    return sorted(sums), to_dtype(rows.astype(wide(dtype)), dtype).astype(stored)


def spread(part, shape, dtype):
    """Return Rows as a dense array: repeated ids are summed first, and not rounded."""
    ids, values = merge([part], wide(dtype))
    dense = np.zeros(shape, values.dtype)
    dense[ids] = values
    return dense


class DeviceMachine(StoreMachine):
    TYPE = "device"


MACHINES = {"local": StoreMachine, "device": DeviceMachine}


@pytest.mark.parametrize("machine", MACHINES)
def test_programs(machine):
    before = steps_run
    run_state_machine_as_test(
        MACHINES[machine],
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            derandomize=False,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert steps_run - before >= STEPS_WANTED, "too few steps to say anything"


# ---------------------------------------------------------------- the machine finds what it is for


def forget_last_part(monkeypatch):
    right = reduce.sum_piece
    monkeypatch.setattr(reduce, "sum_piece", lambda out, parts, *how: right(out, parts[:2], *how))


def add_from_the_right(monkeypatch):
    right = reduce.sum_piece
    monkeypatch.setattr(reduce, "sum_piece", lambda out, parts, *how: right(out, parts[::-1], *how))


def keep_what_was_pushed(monkeypatch):
    right = rules.Assign.apply

    def apply(self, entries, parts, *rest):
        right(self, entries, parts, *rest)
        for entry, key_parts in zip(entries, parts, strict=True):
            if len(key_parts) == 1 and key_parts[0].dtype is entry.value.dtype:
                entry.value = key_parts[0]

    monkeypatch.setattr(rules.Assign, "apply", apply)


def hand_out_what_is_stored(monkeypatch):
    right = shard.Shard._pull

    def pull(self, keys, outs, regions=None):
        if regions is not None:
            right(self, keys, outs, regions)
            return
        for key, key_outs in zip(keys, outs, strict=True):
            value = self.entry("pull", key).value
            for out in key_outs:
                if out.dtype is value.dtype and out.untyped_storage().resizable() and out.is_contiguous():
                    out.set_(value)
                else:
                    out.copy_(value)

    monkeypatch.setattr(shard.Shard, "_pull", pull)


def update_in_place(monkeypatch):
    right = rules.CallUpdater.apply

    def apply(self, entries, parts, *rest):
        stored = [entry.value.clone() for entry in entries]
        try:
            right(self, entries, parts, *rest)
        except UpdaterFailureError:
            for entry, value, key_parts in zip(entries, stored, parts, strict=True):
                entry.value.copy_(reduce.total(value, [value, *key_parts]))
            raise

    monkeypatch.setattr(rules.CallUpdater, "apply", apply)


def forget_a_version(monkeypatch):
    monkeypatch.setattr(rules, "_count_versions", lambda entries: None)


def mix_up_the_layers(monkeypatch):
    """Those of the same shape, in compiled pushes."""
    right = shard.Shard.try_compiled

    def try_compiled(self, call, **how):
        if call.verb == "push" and type(call.key) is list and all(key in self for key in call.key):
            keys = list(call.key)
            specs = [self.entry("push", key).spec for key in keys]
            for first, second in itertools.combinations(range(len(keys)), 2):
                if specs[first] == specs[second]:
                    keys[first], keys[second] = keys[second], keys[first]
            call = engine_call.Call(Metrics().of("push"), "push", keys, call.value, None, 0)
        return right(self, call, **how)

    monkeypatch.setattr(shard.Shard, "try_compiled", try_compiled)


def check_less(monkeypatch):
    monkeypatch.setattr(interop, "may_push", lambda part, value: True)


@pytest.mark.release
@pytest.mark.parametrize(
    "plant",
    [
        forget_last_part,
        add_from_the_right,
        keep_what_was_pushed,
        hand_out_what_is_stored,
        update_in_place,
        forget_a_version,
        mix_up_the_layers,
        check_less,
    ],
)
def test_machine_finds_a_planted_fault(monkeypatch, plant):
    plant(monkeypatch)
    # The updater fails on a key that a refused call would not have reached.
    with pytest.raises((AssertionError, pytest.fail.Exception, UpdaterFailureError)):
        run_state_machine_as_test(
            StoreMachine,
            settings=settings(
                max_examples=800,
                stateful_step_count=STEPS,
                database=None,
                derandomize=True,
                report_multiple_bugs=False,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
