"""Bad input of every kind: a typed error that says what is wrong, and a store that is bit-identical afterwards."""

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv import Rows
from tensorkv import errors as e
from tensorkv.testing.values import state

F32 = np.float32


def arr(*shape, dtype=F32):
    return np.ones(shape, dtype)


def read_only():
    out = arr(2, 3)
    out.flags.writeable = False
    return out


# name: (call, error, what the message says)
CASES = {
    # keys
    "empty key": (lambda kv: kv.push("", arr(2, 3)), e.KeyTypeError, "empty string"),
    "None as key": (lambda kv: kv.push(None, arr(2, 3)), e.KeyTypeError, "push"),
    "float as key": (lambda kv: kv.pull(1.5), e.KeyTypeError, "pull"),
    "bool as key": (lambda kv: kv.init(True, arr(1)), e.KeyTypeError, "True"),
    "bytes as key": (lambda kv: kv.init(b"w", arr(1)), e.KeyTypeError, "b'w'"),
    "int in a store of str": (lambda kv: kv.push(3, arr(2, 3)), e.KeyTypeError, "str"),
    "keys of two types": (lambda kv: kv.push(["w", 3], [arr(2, 3)] * 2), e.KeyTypeError, "two types"),
    "a set of keys": (lambda kv: kv.push({"w"}, [arr(2, 3)]), e.KeyTypeError, "{'w'}"),
    "an array of keys": (lambda kv: kv.push(np.array([1]), [arr(2, 3)]), e.KeyTypeError, "ndarray"),
    "unknown key": (lambda kv: kv.push("wx", arr(2, 3)), e.KeyNotFoundError, 'did you mean "w"'),
    "unknown key in a batch": (lambda kv: kv.push(["w", "zz"], [5 * arr(2, 3), arr(1)]), e.KeyNotFoundError, "zz"),
    "init again": (lambda kv: kv.init("w", arr(2, 3)), e.KeyExistsError, '"w"'),
    "init again in a batch": (lambda kv: kv.init(["new", "w"], [arr(1), arr(1)]), e.KeyExistsError, '"w"'),
    "a key twice in init": (lambda kv: kv.init(["n", "n"], [arr(1), arr(1)]), e.KeyExistsError, "twice"),
    "delete unknown": (lambda kv: kv.delete(["w", "zz"]), e.KeyNotFoundError, "zz"),
    "info unknown": (lambda kv: kv.info("zz"), e.KeyNotFoundError, "zz"),
    # forms
    "unequal lists": (lambda kv: kv.push(["w", "i"], [arr(2, 3)]), e.ArgumentError, "2 keys and 1 value;"),
    "unequal init": (lambda kv: kv.init(["x", "y"], [arr(1)] * 3), e.ArgumentError, "2 keys and 3 values"),
    "one array for a list of keys": (lambda kv: kv.push(["w", "i"], arr(2, 3)), e.ArgumentError, "list of 2"),
    "no value": (lambda kv: kv.push("w"), e.ArrayTypeError, "None"),
    "no values": (lambda kv: kv.push(["w"]), e.ArgumentError, "None"),
    "no parts": (lambda kv: kv.push("w", []), e.ArgumentError, "empty list"),
    "nested parts": (lambda kv: kv.push("w", [[arr(2, 3)]]), e.ArgumentError, "is a list"),
    "mapping and value": (lambda kv: kv.push({"w": arr(2, 3)}, arr(2, 3)), e.ArgumentError, "mapping"),
    "init of a list": (lambda kv: kv.init("x", [arr(1)]), e.ArgumentError, "one array"),
    "a priority that is no int": (lambda kv: kv.push("w", arr(2, 3), priority="high"), e.ArgumentError, "priority"),
    # arrays
    "text": (lambda kv: kv.push("w", "text"), e.ArrayTypeError, "'text'"),
    "a number": (lambda kv: kv.push("w", 3.0), e.ArrayTypeError, "3.0"),
    "ragged list": (lambda kv: kv.push("w", [[1, 2], [3]]), e.ArgumentError, r"is \[1, 2\]"),
    "list of numbers": (lambda kv: kv.push("w", [1.0, 2.0]), e.ArrayTypeError, "part 0"),
    "objects": (lambda kv: kv.push("w", np.array([[None] * 3] * 2)), e.ArrayTypeError, "object"),
    "meta": (lambda kv: kv.push("w", torch.empty(2, 3, device="meta")), e.ArrayTypeError, "meta"),
    "bad part in a batch": (lambda kv: kv.push(["w", "i"], [5 * arr(2, 3), None]), e.ArrayTypeError, '"i"'),
    "bad second part": (lambda kv: kv.push("w", [arr(2, 3), arr(3, 2)]), e.ValueMismatchError, "part 1"),
    "int into float": (lambda kv: kv.push("w", arr(2, 3, dtype=np.int32)), e.ValueMismatchError, "int32"),
    "float into int": (lambda kv: kv.push("i", arr(4)), e.ValueMismatchError, "int32"),
    "complex into real": (lambda kv: kv.push("w", arr(2, 3, dtype=np.complex64)), e.ValueMismatchError, "complex64"),
    "float64 into float32": (lambda kv: kv.push("w", arr(2, 3, dtype=np.float64)), e.ValueMismatchError, "float64"),
    "shape in a batch": (
        lambda kv: kv.push(["w", "i"], [5 * arr(2, 3), arr(5, dtype=np.int32)]),
        e.ValueMismatchError,
        '"i"',
    ),
    # outs
    "out list longer than keys": (lambda kv: kv.pull(["w"], out=[arr(2, 3)] * 2), e.ArgumentError, "1 key and 2 outs"),
    "out of a wrong shape": (lambda kv: kv.pull("w", out=arr(3, 2)), e.ValueMismatchError, r"\(3, 2\)"),
    "read-only out": (lambda kv: kv.pull("w", out=read_only()), e.ArrayTypeError, "read-only"),
    "out that cannot hold it": (lambda kv: kv.pull("w", out=arr(2, 3, dtype=np.int64)), e.ValueMismatchError, "int64"),
    "text as out": (lambda kv: kv.pull("w", out="text"), e.ArrayTypeError, "out 0"),
    "expanded out": (lambda kv: kv.pull("w", out=torch.zeros(1, 3).expand(2, 3)), e.ArrayTypeError, "expanded"),
    "the same out twice": (lambda kv: (lambda o: kv.pull("w", out=[o, o]))(arr(2, 3)), e.ArgumentError, "overlap"),
    "out and like": (lambda kv: kv.pull("w", out=arr(2, 3), like=arr(1)), e.ArgumentError, "like"),
    "like of no array": (lambda kv: kv.pull("w", like="text"), e.ArrayTypeError, "text|str"),
    "pushpull with a bad out": (lambda kv: kv.pushpull("w", 5 * arr(2, 3), out=arr(1)), e.ValueMismatchError, "out 0"),
    "broadcast with a bad out": (lambda kv: kv.broadcast("x", arr(2), out=arr(3)), e.ValueMismatchError, "out 0"),
    "out mapping of other keys": (
        lambda kv: kv.pushpull({"w": 5 * arr(2, 3)}, out={"i": arr(2, 3)}),
        e.ArgumentError,
        "mapping",
    ),
    # rows
    "row out of range": (lambda kv: kv.push("w", Rows(np.array([2]), arr(1, 3), 2)), e.ValueMismatchError, "row id 2"),
    "negative row": (lambda kv: kv.push("w", Rows(np.array([-1]), arr(1, 3), 2)), e.ValueMismatchError, "row id -1"),
    "rows of another height": (
        lambda kv: kv.push("w", Rows(np.array([2]), arr(1, 3), 9)),
        e.ValueMismatchError,
        r"\(9, 3\)",
    ),
    "rows of another width": (
        lambda kv: kv.push("w", Rows(np.array([1]), arr(1, 4), 2)),
        e.ValueMismatchError,
        r"\(2, 4\)",
    ),
    "rows of another dtype": (
        lambda kv: kv.push("w", Rows(np.array([1]), arr(1, 3, dtype=np.float64), 2)),
        e.ValueMismatchError,
        "float64",
    ),
    "ids of floats": (lambda kv: kv.push("w", Rows(arr(1), arr(1, 3), 2)), e.ArrayTypeError, "float32"),
    "more ids than rows": (lambda kv: kv.push("w", Rows(np.array([0, 1]), arr(1, 3), 2)), e.ValueMismatchError, "ids"),
    "dense into a table": (lambda kv: kv.push("t", arr(1000, 2)), e.ValueMismatchError, "Rows"),
    "pull of a table": (lambda kv: kv.pull("t"), e.ValueMismatchError, "row_sparse_pull"),
    "rows of a 0-d value": (lambda kv: kv.row_sparse_pull("s", row_ids=[0]), e.ValueMismatchError, "0-d"),
    "no row_ids": (lambda kv: kv.row_sparse_pull("w"), e.ArrayTypeError, "row_ids"),
    "row_ids of other length": (lambda kv: kv.row_sparse_pull(["w"], row_ids=[[0], [1]]), e.ArgumentError, "row_ids"),
    "rows into an array": (lambda kv: kv.row_sparse_pull("w", out=arr(1), row_ids=[0]), e.ArrayTypeError, "Rows"),
    # update rules
    "updater that is no function": (lambda kv: kv.set_updater(3), e.ArgumentError, "updater"),
    "unknown optimizer": (lambda kv: kv.set_optimizer("sgdd"), e.OptimizerError, 'did you mean "sgd"'),
    "unknown number": (lambda kv: kv.set_optimizer("sgd", learning_rate=0.1), e.OptimizerError, 'did you mean "lr"'),
    "bad number": (lambda kv: kv.set_optimizer("sgd", lr=-1.0), e.OptimizerError, "learning rate"),
    "NaN as number": (lambda kv: kv.set_optimizer("sgd", lr=float("nan")), e.OptimizerError, "lr"),
    "hyperparameters without optimizer": (lambda kv: kv.set_hyperparameters(lr=1), e.OptimizerError, "set_optimizer"),
    "states without optimizer": (lambda kv: kv.save_optimizer_states("/nowhere"), e.OptimizerError, "set_optimizer"),
    # checkpoints and the rest
    "load from nowhere": (lambda kv: kv.load("/nonexistent"), e.CheckpointError, "nonexistent"),
    "unknown capability": (lambda kv: kv.is_capable("x"), e.ArgumentError, "optimizer"),
}


@pytest.fixture
def kv():
    with tensorkv.create() as store:
        store.init({"w": 2 * arr(2, 3), "i": np.arange(4, dtype=np.int32), "s": np.array(1.5)})
        store.init("t", Rows(np.array([3]), arr(1, 2), 1000))
        yield store


@pytest.mark.parametrize("case", CASES)
def test_bad_input_changes_nothing(kv, case):
    call, error, says = CASES[case]
    before = state(kv)
    with pytest.raises(error, match=says) as caught:
        call(kv)
    assert isinstance(caught.value, tensorkv.TensorKVError)
    assert "\n" not in str(caught.value)
    assert state(kv) == before
    assert kv.optimizer is None


OPTIMIZED = {
    "integers": (lambda kv: kv.push(["w", "i"], [arr(2, 3), np.ones(4, np.int32)]), e.OptimizerError, "int32"),
    "unknown number": (lambda kv: kv.set_hyperparameters(lrr=1), e.OptimizerError, 'did you mean "lr"'),
    "bad number": (lambda kv: kv.set_hyperparameters(momentum=-1), e.OptimizerError, "momentum"),
    "unknown key": (lambda kv: kv.set_hyperparameters(lr=1.0, keys=["w", "zz"]), e.KeyNotFoundError, "zz"),
    "another optimizer": (lambda kv: kv.set_optimizer("adam", lr="fast"), e.OptimizerError, "adam"),
}


@pytest.mark.parametrize("case", OPTIMIZED)
def test_bad_input_with_an_optimizer(kv, case):
    call, error, says = OPTIMIZED[case]
    kv.set_optimizer("sgd", lr=0.1, momentum=0.9)
    kv.push("w", arr(2, 3))
    before, numbers = state(kv), kv.optimizer
    with pytest.raises(error, match=says):
        call(kv)
    assert (state(kv), kv.optimizer) == (before, numbers)
    kv.push("w", arr(2, 3))
    np.testing.assert_allclose(kv.pull("w"), 2 - 0.1 - 0.19, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("locall", {}, 'did you mean "local"'),
        ("dist_magic", {}, "the types are"),
        (3, {}, "the types are"),
        (None, {}, "the types are"),
        ("local", {"colour": "red"}, "colour"),
        ("local", {"nonfinite": "explode"}, "nonfinite"),
        ("local", {"path": b"store"}, "path is b'store'"),
        ("local", {"path": 5}, "path is 5"),
        ("local", {"path": ""}, "path is ''"),
        ("local", {"path": "a\0b"}, "path is"),
        ("device", {"path": 5}, "path is 5"),
    ],
)
def test_bad_create(name, options, says):
    with pytest.raises(tensorkv.TensorKVError, match=says):
        tensorkv.create(name, **options)
