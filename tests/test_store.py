"""The verbs' signatures, and what a store does beside the contract."""

import inspect
import warnings

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv import KVStore

# MXNet's order of arguments.
SIGNATURES = {
    "init": "(key, value=None)",
    "push": "(key, value=None, priority=0)",
    "pull": (
        "(key, out=None, priority=0, ignore_sparse=True, *, like=None, region=None, min_version=None, timeout_s=None)"
    ),
    "pushpull": "(key, value=None, out=None, priority=0)",
    "broadcast": "(key, value=None, out=None, priority=0)",
    "row_sparse_pull": "(key, out=None, priority=0, row_ids=None)",
}


@pytest.mark.parametrize("verb", SIGNATURES)
def test_signatures(verb):
    parameters = list(inspect.signature(getattr(KVStore, verb)).parameters.values())[1:]
    shown = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])
    assert str(shown) == SIGNATURES[verb]


def test_the_default_type_is_local():
    with tensorkv.create() as kv:
        assert kv.type == "local"


def test_positional_arguments_as_mxnet_has_them():
    out = np.zeros(2)
    with tensorkv.create() as kv:
        kv.init("w", np.zeros(2))
        kv.push("w", np.ones(2), 5)
        kv.pull("w", out, -1)
        assert out.tolist() == [1, 1]
        kv.pushpull("w", 2 * np.ones(2), out, 0)
        assert out.tolist() == [2, 2]
        kv.broadcast("v", np.ones(2), out, 0)
        assert out.tolist() == [1, 1]


def test_the_warning_names_the_callers_line():
    with tensorkv.create() as kv:
        kv.init("w", np.zeros((2, 2), np.float32))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                kv.pull("w", out=torch.zeros(2, 2).to_sparse(1))
        assert [warning.filename for warning in caught] == [__file__]
        with warnings.catch_warnings(record=True) as caught, kv.snapshot() as snapshot:
            warnings.simplefilter("always")
            snapshot.pull("w", out=torch.zeros(2, 2).to_sparse(1))
        assert [warning.filename for warning in caught] == [__file__]


def test_nothing_is_pulled_of_a_table_into_rows():
    out = tensorkv.Rows(np.array([3]), np.full((1, 1), 7.0), 5)
    with tensorkv.create() as kv:
        kv.init("t", tensorkv.Rows(np.array([1]), np.ones((1, 1)), 5))
        with pytest.warns(tensorkv.SparseOutWarning):
            kv.pull("t", out=out)
        assert (out.ids.tolist(), out.values.tolist()) == ([3], [[7]])


def test_row_sparse_pull_of_several_keys_into_rows():
    with tensorkv.create() as kv:
        kv.init({"a": np.ones((3, 1)), "b": torch.zeros(4, 2)})
        outs = [tensorkv.Rows(np.array([0]), np.zeros((1, 1)), 3), tensorkv.Rows(np.array([0]), np.zeros((1, 2)), 4)]
        kv.row_sparse_pull(["a", "b"], out=outs, row_ids=[np.array([2, 0]), np.array([3])])
        assert [out.ids.tolist() for out in outs] == [[0, 2], [3]]
        assert isinstance(outs[1].values, torch.Tensor)


def test_every_public_method_has_a_docstring():
    for name, thing in inspect.getmembers(KVStore):
        if not name.startswith("_"):
            assert inspect.getdoc(thing), name
