"""Sums: the same bits whatever the slices, layouts and ways, and no temporary of a value's size."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv.arrays import interop
from tensorkv.shard import reduce
from tests.support import processes


def reference(parts, dtype):
    total = parts[0].to(interop.accumulator(dtype)).numpy().copy()
    for part in parts[1:]:
        total = total + part.to(interop.accumulator(dtype)).numpy()
    return torch.from_numpy(np.asarray(total)).to(dtype)


DTYPES = [
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "int8",
    "int64",
    "uint8",
    "uint16",
    "uint64",
    "bool",
    "complex64",
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 127, 128, 129, 1000])
def test_slices_change_no_bit(dtype, size, monkeypatch):
    dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    parts = [(torch.randn(size, generator=generator) * 100).abs().to(dtype) for _ in range(4)]
    expected = reference(parts, dtype)
    for slice_size in (1, 64, 100, 1 << 18):
        monkeypatch.setattr(reduce, "SLICE", slice_size)
        out = torch.empty(size, dtype=dtype)
        reduce.sum_into(out, parts)
        assert (
            out.numpy().tobytes() == expected.numpy().tobytes()
            if dtype is not torch.bfloat16
            else torch.equal(out, expected)
        )


@pytest.mark.parametrize("shape", [(7, 30), (1, 210), (210, 1), (7, 5, 6)])
def test_layouts_change_no_bit(shape, monkeypatch):
    monkeypatch.setattr(reduce, "SLICE", 16)
    plain = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    expected = reference(plain, torch.float32)
    turned = [part.movedim(0, -1).contiguous().movedim(-1, 0) for part in plain]
    out = torch.empty(shape)
    reduce.sum_into(out, [plain[0], turned[1], plain[2]])
    assert torch.equal(out, expected)
    out = torch.empty(shape).movedim(0, -1).contiguous().movedim(-1, 0)
    reduce.sum_into(out, turned)
    assert torch.equal(out, expected)


def test_mixed_dtypes_are_summed_in_the_values():
    out = torch.empty(1, dtype=torch.float64)
    reduce.sum_into(out, [torch.tensor([2.0**-30]), torch.ones(1, dtype=torch.float64), torch.ones(1).half()])
    assert out.item() == 2 + 2.0**-30


def test_many_at_once():
    parts = [[torch.full((i,), float(i)), torch.full((i,), 1.0)] for i in range(5)]
    outs = [torch.empty(i) for i in range(5)]
    reduce.sum_many(outs, parts)
    assert [out.tolist() for out in outs] == [[float(i + 1)] * i for i in range(5)]


def test_total_may_share_the_only_part():
    value, part = torch.zeros(3), torch.ones(3)
    assert reduce.total(value, [part], may_share=True) is part
    assert reduce.total(value, [part]).data_ptr() != part.data_ptr()
    assert reduce.total(value, [part.half()], may_share=True).dtype is torch.float32


def test_count_nonfinite(monkeypatch):
    monkeypatch.setattr(reduce, "SLICE", 2)
    assert reduce.count_nonfinite(torch.tensor([1, np.nan, np.inf, -np.inf, 2])) == 3
    assert reduce.count_nonfinite(torch.tensor([1 + 1j, complex(0, np.nan)])) == 1
    assert reduce.count_nonfinite(torch.arange(3)) == 0


def peak_nbytes():
    """The most memory that this process has used since ``forget_peak``."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


def memory_of_a_push(dtype, optimizer, is_strided):
    """How much memory a push needs for a while, in multiples of the value's size."""
    parts = [np.ones((1_000_000, 10), np.float32).astype(dtype) for _ in range(4)]
    if is_strided:
        parts = [np.asfortranarray(part) for part in parts]
    with tensorkv.create() as kv:
        kv.init("w", parts[0])
        # Large enough to be summed in slices by threads, whose buffers stay.
        few = [part[:100_000] for part in parts]
        kv.init("warm", few[0])
        if optimizer is not None:
            kv.set_optimizer(optimizer, lr=0.1)
        kv.push("warm", few)
        forget_peak()
        before = peak_nbytes()
        kv.push("w", parts)
        return (peak_nbytes() - before) / parts[0].nbytes


@pytest.mark.parametrize(
    ("dtype", "optimizer", "is_strided", "values"),
    [
        ("float32", None, False, 0.1),
        ("float16", None, False, 0.1),
        ("float32", None, True, 0.1),
        ("float32", "sgd", False, 1.1),
    ],
)
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks of memory are told by Linux")
def test_a_push_needs_at_most_one_buffer_of_a_values_size(dtype, optimizer, is_strided, values):
    assert processes.run(memory_of_a_push, dtype, optimizer, is_strided) <= values
