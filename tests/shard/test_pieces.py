"""Batches by pieces give what whole batches give, wherever pieces are cut."""

from array import array
from itertools import pairwise

import numpy as np
import pytest
import torch

from tensorkv.shard import native
from tensorkv.shard.fused import Kernel
from tensorkv.shard.optimizers import spec

pytestmark = pytest.mark.skipif(not native.can_look(), reason="needs the compiled part")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.bool]
# DLPack's code and bits of each.
DESCRIBED = [(2, 32), (2, 64), (2, 16), (4, 16), (0, 32), (6, 8)]


class Cell(native.Cell):
    pass


def cell(value, state=None):
    made = Cell()
    made.value, made.state, made.version, made.is_new = value, {} if state is None else state, 0, False
    return made


def random(shape, dtype, generator):
    values = torch.randn(shape, generator=generator) * 3
    return values > 0 if dtype is torch.bool else values.to(dtype)


def column(*addresses):
    return array("Q", addresses).tobytes()


def cut(counts, rng):
    """Return pieces of all keys, in random order, and their triples."""
    pieces = []
    for key, count in enumerate(counts):
        borders = sorted({0, count, *rng.integers(0, count + 1, 2).tolist()})
        pieces += [(key, start, stop - start) for start, stop in pairwise(borders)]
    rng.shuffle(pieces)
    return pieces, array("q", [number for piece in pieces for number in piece]).tobytes()


def at(tensor, element):
    return tensor.data_ptr() + element * tensor.itemsize


@pytest.mark.parametrize("seed", range(20))
def test_sums_and_outs(seed):
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    shapes = [tuple(rng.integers(0, 40, rng.integers(0, 3))) for _ in DTYPES]
    keys = [f"k{i}" for i in range(len(shapes))]
    described = {
        key: cell((*kind, shape))
        for key, kind, shape in zip(keys, DESCRIBED, [tuple(map(int, s)) for s in shapes], strict=True)
    }
    num_parts = rng.integers(1, 4, len(keys))
    values = [
        [random(shape, dtype, generator) for _ in range(n)]
        for shape, dtype, n in zip(shapes, DTYPES, num_parts, strict=True)
    ]
    outs = [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, DTYPES, strict=True)]
    real = {key: cell(out.clone()) for key, out in zip(keys, outs, strict=True)}
    whole = native.look(real, keys, values, outs, None, None)
    assert whole.begin(False)
    whole.run(0, 1 << 40)
    whole.finish()

    # The same sums, one after another in bytes, made by pieces of values that are elsewhere.
    batch = native.look(described, keys, values, None, None, None)
    assert not batch.begin(False), "there is no value to change"
    _, places, nbytes = batch.packed()
    flat = torch.zeros(nbytes, dtype=torch.uint8)
    places = np.frombuffer(places, np.uint64)
    pieces, triples = cut([each.numel() for each in outs], rng)
    targets = column(*(flat.data_ptr() + int(places[key]) + first * DTYPES[key].itemsize for key, first, _ in pieces))
    half = sum(count for _, _, count in pieces) // 2
    batch.sum_pieces(triples, [targets], False, 0, half)
    batch.sum_pieces(triples, [targets], False, half)
    again = [torch.zeros_like(out) for out in outs]
    filled = native.look(described, keys, None, again, None, None)
    filled.copy_pieces(triples, [targets])
    for out, same, key in zip(outs, again, keys, strict=True):
        assert torch.equal(out.view(-1).view(torch.uint8) if out.numel() else out, _raw(same, out)), key
        assert torch.equal(_raw(real[key].value, out), _raw(out, out))

    # And pushed from there, without the last, whose bytes might be no bools.
    pushed = {key: cell(torch.zeros_like(out)) for key, out in zip(keys, outs, strict=True)}
    assert native.look(pushed, keys, flat, None, None, None, True) is None
    some, end = keys[:-1], nbytes - outs[-1].numel()
    for other in (flat[: end - 1], flat[: end + 1] if end < nbytes else flat.view(torch.int8), flat.view(-1, 1)):
        assert native.look(pushed, some, other, None, None, None, True) is None
    push = native.look(pushed, some, flat[:end], None, None, None, True)
    assert push.begin(False)
    push.run(0, 1 << 40)
    push.finish()
    for key, out in zip(some, outs, strict=False):
        assert torch.equal(_raw(pushed[key].value, out), _raw(out, out))
        assert pushed[key].version == 1

    # A call that was looked at takes sums that were made of it.
    batch = native.look(real, keys, values, None, None, None)
    batch.take_sums(flat)
    with pytest.raises(ValueError, match="one array of the bytes of all values"):
        batch.take_sums(torch.zeros(nbytes + 1, dtype=torch.uint8))
    for out in outs:
        out.zero_()
    for key in keys:
        real[key].value.zero_()
    assert batch.begin(False)
    batch.run(0, 1 << 40)
    for key, same in zip(keys, again, strict=True):
        assert torch.equal(_raw(real[key].value, same), _raw(same, same))


def _raw(tensor, like):
    return tensor.view(-1).view(torch.uint8) if like.numel() else tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [None, "sgd", "adam"])
def test_updates(name, dtype):
    rng, generator = np.random.default_rng(1), torch.Generator().manual_seed(1)
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    counts = [1000, 0, 7]
    parts = [[random(count, wide, generator) for count in counts] for _ in range(3)]
    found = []
    for is_cut in (False, True):
        values = [random(count, dtype, torch.Generator().manual_seed(2)) for count in counts]
        cells = {key: cell(value) for key, value in enumerate(values)}
        step = None
        if name is not None:
            numbers = {"momentum": 0.9} if name == "sgd" else {}
            kernel = Kernel(name, spec(name, {"lr": 0.1, **numbers}).to_numbers() | _numbers(name, numbers))
            step = kernel.compiled
            block = kernel.fresh(values)
            native.place_states(list(cells.values()), block.names, block.columns, block.steps, block.state)
        batch = native.look(cells, [0, 1, 2], None, None, step, None)
        assert batch.begin(False)
        pieces = [(key, 0, count) for key, count in enumerate(counts)]
        triples = array("q", [number for piece in pieces for number in piece]).tobytes()
        if is_cut:
            pieces, triples = cut(counts, rng)
        columns = [column(*(at(part[key], first) for key, first, _ in pieces)) for part in parts]
        batch.update_pieces(triples, columns, True)
        batch.finish()
        assert [each.version for each in cells.values()] == [1, 1, 1]
        states = [[state.tolist() for state in each.state.values()] for each in cells.values()]
        found.append(([value.tolist() for value in values], states))
    assert found[0] == found[1]
    if name is None:
        sums = [((a + b) + c).to(dtype).tolist() for a, b, c in zip(*parts, strict=True)]
        assert found[0][0] == sums


def _numbers(name, numbers):
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[name]
    return {**optimizer([torch.zeros(1)], lr=0.1, **numbers).defaults}


@pytest.mark.parametrize("piece", [(3, 0, 1), (0, 5, 2), (0, -1, 1), (-1, 0, 1), (0, 0, -1), (0, 1 << 62, 1 << 62)])
def test_pieces_outside_of_values_are_refused(piece):
    cells, out = {"a": cell(torch.zeros(6))}, torch.zeros(6)
    batch = native.look(cells, ["a"], [out], None, None, None)
    for call in (batch.sum_pieces, batch.copy_pieces, batch.update_pieces):
        with pytest.raises(ValueError, match="outside of its value"):
            call(array("q", piece).tobytes(), [column(out.data_ptr())])
        with pytest.raises(ValueError, match="columns of another length"):
            call(array("q", [0, 0, 1]).tobytes(), [b""])
        with pytest.raises(ValueError, match="columns of another length"):
            call(array("q", [0, 0, 1]).tobytes(), [])
