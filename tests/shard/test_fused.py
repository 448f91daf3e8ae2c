"""Kernels equal torch's own fused step, and their bits depend on nothing but the numbers."""

from itertools import pairwise

import pytest
import torch

from tensorkv.shard import optimizers
from tensorkv.shard.fused import ALIGN, DTYPES, FUSED, NAMES, Kernel

CASES = {
    "sgd": ("sgd", {"lr": 0.1}),
    "momentum": ("sgd", {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01}),
    "nesterov": ("sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "adam": ("adam", {"lr": 0.1, "weight_decay": 0.01}),
    "amsgrad": ("adam", {"lr": 0.1, "amsgrad": True}),
    "decoupled": ("adam", {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adamw": ("adamw", {"lr": 0.1, "weight_decay": 0.1}),
    "adagrad": ("adagrad", {"lr": 0.1, "lr_decay": 0.01, "initial_accumulator_value": 0.5}),
    "rmsprop": ("rmsprop", {"lr": 0.1, "weight_decay": 0.01}),
    "centered": ("rmsprop", {"lr": 0.1, "momentum": 0.9, "centered": True, "maximize": True}),
}


def run(case, dtype, size, cuts, *, at_once=False, steps=4):
    name, numbers = CASES[case]
    spec = optimizers.spec(name, numbers)
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(size, generator=generator).to(dtype)
    state = None
    for turn in range(steps):
        grad = torch.randn(size, generator=generator).to(dtype)
        kernel = Kernel(name, spec.numbers, first=turn == 0)
        state = kernel.fresh(value) if state is None else state
        step = state["step"] + 1 if "step" in state else None
        columns = [state[column] for column in kernel.columns]
        borders = [0, *cuts, size]
        for low, high in pairwise(borders):
            pieces = value[low:high], grad[low:high], [column[low:high] for column in columns], step
            if at_once:
                kernel.at_once(*pieces, state.get("step") if high == size else None)
            else:
                kernel(*pieces)
        if step is not None:
            state["step"].copy_(step)
    return value, state


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_slices_change_no_bit(case, dtype):
    size = 5 * ALIGN + 37
    expected, state = run(case, dtype, size, [])
    for cuts in ([1], [ALIGN], [3, 64, 65, 200], range(1, size)):
        value, other = run(case, dtype, size, cuts)
        assert torch.equal(value, expected)
        assert all(torch.equal(state[name], other[name]) for name in state)
    value, other = run(case, dtype, size, [], at_once=True)
    assert torch.equal(value, expected)
    assert all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [ALIGN, 16 * ALIGN])
def test_the_bits_are_torchs_own_step(case, dtype, size):
    """Bit for bit where the size is a multiple of ALIGN; what torch computes one by one may differ in the last bit."""
    name, numbers = CASES[case]
    value, _ = run(case, dtype, size, [])
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, generator=generator).to(dtype)
    how = {"fused": True} if name in FUSED else {"foreach": False}
    reference = getattr(torch.optim, optimizers.CLASSES[name])([weight], **numbers, **how)
    for _ in range(4):
        weight.grad = torch.randn(size, generator=generator).to(dtype)
        reference.step()
    assert torch.equal(value, weight)


def test_torch_itself_depends_on_where_a_tensor_ends():
    """The reason for ALIGN: without it, an element's bits would depend on its neighbours."""
    torch.manual_seed(0)
    value, grad, buffer = torch.randn(3, 1000)
    numbers = optimizers.spec("sgd", {"lr": 0.1, "momentum": 0.9}).numbers
    results = []
    for step in (1, 1000):
        v, m = value.clone(), buffer.clone()
        for low in range(0, 1000, step):
            cut = slice(low, low + step)
            Kernel("sgd", numbers)._call(v[cut], grad[cut], [m[cut]], None)
        results.append(v)
    assert not torch.equal(*results)


def test_names_are_optimizers():
    assert set(optimizers.CLASSES) > NAMES
