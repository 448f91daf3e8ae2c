"""Outs: given ones are opened all or none, new ones are made for each place in the caller's list."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tensorkv.arrays import interop
from tensorkv.arrays.outputs import GivenOuts, NewOuts, like_origin
from tensorkv.arrays.spec import KeySpec
from tensorkv.errors import ArgumentError, ArrayTypeError, ValueMismatchError

SPEC = KeySpec(torch.Size([2]), torch.float32, interop.NUMPY, False)


def test_given_outs_share_memory_with_the_callers():
    a, b = np.zeros(2, np.float32), torch.zeros(2)
    outs = GivenOuts("pull", "w", [a, b])
    outs.check([SPEC])
    for tensor in outs.tensors[0]:
        tensor.fill_(3)
    assert outs.result("w") is None
    assert (a.tolist(), b.tolist()) == ([3, 3], [3, 3])


def test_arrays_that_torch_cannot_view_are_filled_at_the_end():
    flipped = np.zeros(2, np.float32)[::-1]
    outs = GivenOuts("pull", "w", flipped)
    outs.tensors[0][0].copy_(torch.tensor([1, 2]))
    assert flipped.tolist() == [0, 0]
    outs.finish()
    assert flipped.tolist() == [1, 2]


def test_arrays_of_other_libraries_on_a_gpu_are_compared_by_the_tensors_that_view_them(monkeypatch):
    """They have no method of torch, and what fills them is waited for at the end."""
    done, tensors = [], [torch.zeros(3), torch.zeros(3)]
    monkeypatch.setattr(interop, "target", lambda array: (tensors[array.index], lambda: done.append(array.index)))
    given = [SimpleNamespace(index=0), SimpleNamespace(index=1)]
    outs = GivenOuts("pull", ["a", "b"], given)
    assert [own[0] is tensor for own, tensor in zip(outs.tensors, tensors, strict=True)] == [True, True]
    with pytest.raises(ArgumentError, match="overlap"):
        GivenOuts("pull", ["a", "b"], [given[0], given[0]])


def test_checks():
    with pytest.raises(ArrayTypeError, match=r'pull\("w"\): out 1 is'):
        GivenOuts("pull", "w", [np.zeros(2), None])
    with pytest.raises(ArgumentError, match='"a" and an out of "b" overlap'):
        (lambda x: GivenOuts("pull", ["a", "b"], [x, x]))(np.zeros(2))
    with pytest.raises(ValueMismatchError, match="shape"):
        GivenOuts("pull", "w", np.zeros(3)).check([SPEC])
    with pytest.raises(ValueMismatchError, match="int32"):
        GivenOuts("pull", "w", np.zeros(2, np.int32)).check([SPEC])
    table = KeySpec(torch.Size([2]), torch.float32, interop.NUMPY, True)
    with pytest.raises(ValueMismatchError, match="row_sparse_pull"):
        GivenOuts("pull", "w", np.zeros(2)).check([table])
    with pytest.raises(ValueMismatchError, match="row_sparse_pull"):
        NewOuts("pull", ["w"], [table])


def test_sparse_outs_are_skipped_only_when_asked():
    sparse = torch.zeros(2, 2).to_sparse(1)
    outs = GivenOuts("pull", "w", sparse, skip_sparse=True)
    assert outs.tensors == [[]]
    assert "row_sparse_pull" in str(outs.skipped)
    with pytest.raises(ArrayTypeError, match="sparse"):
        GivenOuts("pull", "w", sparse)


def test_new_outs_have_one_array_for_each_place():
    outs = NewOuts("pull", ["a", "b", "a"], [SPEC] * 3)
    assert outs.keys == ["a", "b"]
    assert [len(tensors) for tensors in outs.tensors] == [2, 1]
    for number, tensor in enumerate(tensor for tensors in outs.tensors for tensor in tensors):
        tensor.fill_(number)
    assert [x.tolist() for x in outs.result(["a", "b", "a"])] == [[0, 0], [2, 2], [1, 1]]


def test_new_outs_take_the_form_of_the_key():
    assert NewOuts("pull", ["a"], [SPEC]).result("a").shape == (2,)
    assert list(NewOuts("pull", ["a"], [SPEC]).result({"a": 1})) == ["a"]
    like = SPEC.of(like_origin("pull", torch.zeros(1)))
    assert isinstance(NewOuts("pull", ["a"], [like]).result("a"), torch.Tensor)
