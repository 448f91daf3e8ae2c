"""Packing: every dtype, and layouts that no tensors have."""

import numpy as np
import pytest
import torch

from tensorkv.arrays import interop, packing
from tensorkv.arrays.packing import Item, LayoutError, decode_layout, encode_layout, join_layout, pack, unpack


@pytest.mark.parametrize("dtype", sorted(interop.DTYPES, key=str), ids=str)
def test_every_dtype_is_unpacked_as_it_was_packed(dtype):
    tensors = [
        torch.ones(3, dtype=torch.uint8),
        torch.ones((), dtype=dtype),
        torch.ones((2, 3), dtype=dtype).t(),
        torch.ones((0, 2), dtype=dtype),
    ]
    packed = pack([Item(i, "sum", tensor) for i, tensor in enumerate(tensors)])
    items = unpack(packed.layout, bytearray(b"".join(packed.payload)))
    assert [(item.key, item.role) for item in items] == [(i, "sum") for i in range(4)]
    for item, tensor in zip(items, tensors, strict=True):
        assert item.tensor.dtype is tensor.dtype
        assert torch.equal(item.tensor, tensor)


def test_adjacent_tensors_are_one_buffer():
    flat = torch.arange(10.0)
    packed = pack([Item("a", "sum", flat[:3]), Item("b", "sum", flat[3:7]), Item("c", "sum", flat[8:])])
    assert [len(buffer) for buffer in packed.payload] == [28, 8]
    assert [slot.start for slot in decode_layout(packed.layout)] == [0, 12, 28]


LAYOUTS = {
    "no JSON": b"[",
    "no list": b"3",
    "deep": b"[" * 100_000,
    "short": b'[["w","sum","float32"]]',
    "unknown dtype": b'[["w","sum","object",[1]]]',
    "dtype that is no text": b'[["w","sum",["float32"],[1]]]',
    "negative": b'[["w","sum","float32",[-1]]]',
    "two negatives": b'[["w","sum","float32",[-2,-2]]]',
    "half": b'[["w","sum","float32",[0.5]]]',
    "bool as a size": b'[["w","sum","float32",[true]]]',
    "overflow": b'[["w","sum","float32",[4294967296,4294967296]]]',
    "overflow to nothing": b'[["w","sum","float32",[4611686018427387904,4]]]',
    "beyond int64": b'[["w","sum","float32",[99999999999999999999]]]',
    "beyond what Python reads": b'[["w","sum","float32",[' + b"9" * 5000 + b"]]]",
    "no key": b'[[null,"sum","float32",[1]]]',
    "bool as a key": b'[[true,"sum","float32",[1]]]',
    "role that is no text": b'[["w",3,"float32",[1]]]',
    "NaN": b'[["w","sum","float32",[NaN]]]',
    "more than there is": b'[["w","sum","float32",[3]]]',
    "less than there is": b'[["w","sum","uint8",[3]]]',
    "not UTF-8": b'[["\xff","sum","float32",[1]]]',
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_malformed_layouts_are_refused(layout):
    with pytest.raises(LayoutError):
        unpack(layout, bytearray(8))


def test_bytes_other_than_0_and_1_are_refused_as_bool():
    with pytest.raises(LayoutError, match="bytes other than 0 and 1"):
        unpack(b'[["w","sum","bool",[2]]]', bytearray(b"\1\2"))


@pytest.mark.parametrize(
    "keys", [[], ["w"], ["b", 'a "quoted" one\\', "two\nlines", "ü\u2028\ud800", ""], [3, -1, 1 << 70]]
)
def test_a_joined_layout_is_an_encoded_one(keys):
    kinds = [("sum", torch.float32, torch.Size([2, 3])), ("ids", torch.int64, [])]
    numbers = [index % 2 for index in range(len(keys))]
    tensors = [(key, *kinds[number]) for key, number in zip(keys, numbers, strict=True)]
    assert join_layout(keys, kinds, numbers) == encode_layout(tensors)


@pytest.mark.parametrize("stride", [0, 3])
def test_the_bytes_of_one_element_with_any_stride(stride):
    one = torch.as_strided(torch.tensor([1.0, 2, 3, 4]), (1,), (stride,))
    assert bytes(packing.raw_bytes(one)) == np.float32(1).tobytes()
    shared = packing.flat_bytes(one)
    shared.zero_()
    assert one.tolist() == [0]
    assert len(packing.raw_bytes(torch.zeros(0, 3))) == 0
