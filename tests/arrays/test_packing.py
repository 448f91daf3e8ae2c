"""Packing: every dtype, and layouts that no tensors have."""

import json
import math

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

from tensorkv.arrays import interop, packing
from tensorkv.arrays.packing import (
    Item,
    LayoutError,
    decode_layout,
    encode_layout,
    join_layout,
    pack,
    split_layout,
    unpack,
)
from tensorkv.compiled import _layouts
from tensorkv.runtime.recent import Recent


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


@pytest.fixture(params=["compiled", "plain"])
def layouts(request, monkeypatch):
    """Layouts are written and read with the compiled part, and without it."""
    monkeypatch.setattr(packing, "_decoded", Recent(32))
    if request.param == "plain":
        monkeypatch.setattr(packing, "_layouts", None)
    elif packing._layouts is None:
        pytest.skip("needs the compiled part")
    return request.param


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_malformed_layouts_are_refused(layout, layouts):
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


KINDS = [
    ("sum", torch.float32, [2, 3]),
    ("ids", torch.int64, []),
    ("sum", torch.bool, [0]),
    ("sum", torch.float64, [1 << 40, 0]),
    ("words", torch.uint8, [7]),
]
SHORT = [["w"], ["b", 'a "quoted" one\\', "two\nlines", "\x7f~ !", "ü\u2028\ud800", ""], [0, 3, -1, 1 << 70, -(10**18)]]


@pytest.mark.parametrize("keys", [[], *SHORT, [f"layers.{n}" for n in range(300)], list(range(-5, 500))], ids=len)
def test_a_layout_is_split_into_what_it_was_joined_of(keys, layouts):
    numbers = [7 * place * place % len(KINDS) for place in range(len(keys))]
    layout = join_layout(keys, KINDS, numbers)
    described = [[role, interop.dtype_name(dtype), shape] for role, dtype, shape in KINDS]
    whole = [[key, *described[number]] for key, number in zip(keys, numbers, strict=True)]
    # Clients and servers compare checksums of it.
    assert layout == json.dumps(whole, separators=(",", ":")).encode()
    found = split_layout(layout)
    assert found.keys == tuple(keys)
    assert [KINDS[n] for n in numbers] == [
        (role, getattr(torch, name), shape) for role, name, shape in (found.kinds[n] for n in found.numbers)
    ]
    ends = [slot.stop for slot in decode_layout(layout)]
    at = 0
    for number, end in zip(numbers, ends, strict=True):
        _, dtype, shape = KINDS[number]
        at += -at % dtype.itemsize + math.prod(shape) * dtype.itemsize
        assert end == at


def is_read_as_json_reads_it(layout):
    """Whether the compiled part leaves a layout to json, or finds in it what json does, if that is anything."""
    if _layouts is None:
        pytest.skip("needs the compiled part")
    found = _layouts.split(layout)
    if found is None:
        return True
    keys, ends, numbers = found
    try:
        kinds = [json.loads(b"[" + end) for end in ends]
    except ValueError:
        with pytest.raises(ValueError, match=r"."):
            json.loads(layout)
        return True
    return json.loads(layout) == [[key, *kinds[number]] for key, number in zip(keys, numbers, strict=True)]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_compiled_part_reads_malformed_layouts_as_json_reads_them(layout):
    assert is_read_as_json_reads_it(layout)


PIECES = [b"[", b"]", b",", b'"', b"-", b"0", b"1", b"12", b"w", b"\\", b" ", b"\xff", b"{", b"true", b"."]


@given(st.data())
def test_the_compiled_part_reads_layouts_with_other_bytes_as_json_reads_them(data):
    layout = join_layout(["w", 7], KINDS, [0, 1])
    assert is_read_as_json_reads_it(layout)
    assert _layouts.split(layout) is not None
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(layout)))
        layout = layout[:at] + data.draw(st.sampled_from([b"", *PIECES])) + layout[at + data.draw(st.integers(0, 2)) :]
    assert is_read_as_json_reads_it(layout)


def test_places_beyond_what_memory_has_are_refused(layouts):
    assert packing.place([(1, 3), (8, 16), (4, 0)], [0, 1, 2, 0, 2])[0].tolist() == [0, 8, 24, 24, 28]
    assert packing.place([(1, 1 << 61)], [0])[1] == 1 << 61
    for count in (2, 9):
        with pytest.raises(OverflowError):
            packing.place([(1, 1 << 61)], [0] * count)
    with pytest.raises(OverflowError):
        packing.place([(1, (1 << 64) + 3)], [0])
    assert packing.place([], [])[1] == 0


def test_a_number_without_a_kind_is_refused(layouts):
    for call in (lambda: join_layout(["w"], KINDS, [9]), lambda: packing.place([(1, 3)], [1])):
        with pytest.raises(IndexError):
            call()
    with pytest.raises(ValueError, match=r"."):
        join_layout(["w"], KINDS, [0, 0])


@pytest.mark.parametrize("stride", [0, 3])
def test_the_bytes_of_one_element_with_any_stride(stride):
    one = torch.as_strided(torch.tensor([1.0, 2, 3, 4]), (1,), (stride,))
    assert bytes(packing.raw_bytes(one)) == np.float32(1).tobytes()
    shared = packing.flat_bytes(one)
    shared.zero_()
    assert one.tolist() == [0]
    assert len(packing.raw_bytes(torch.zeros(0, 3))) == 0
