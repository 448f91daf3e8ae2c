"""Blocks of float8 and their scales, beside a loop over blocks."""

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv import dequantize_blocks, quantize_blocks

SHAPES = [(1, 1), (128, 128), (129, 127), (300, 5), (2, 3, 200, 260), (0, 4), (3, 0)]


def by_loop(array):
    """Quantize block by block, as the formula has it."""
    values = torch.empty(array.shape, dtype=torch.float8_e4m3fn)
    *lead, rows, columns = array.shape
    scales = torch.empty(*lead, -(-rows // 128), -(-columns // 128))
    for down in range(scales.shape[-2]):
        for across in range(scales.shape[-1]):
            own = (..., slice(128 * down, 128 * down + 128), slice(128 * across, 128 * across + 128))
            largest = array[own].abs().amax((-2, -1))
            scale = torch.where(largest > 0, largest / 448, 1)
            scales[..., down, across] = scale
            values[own] = (array[own] / scale[..., None, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return values, scales


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_blocks_are_what_the_formula_says(shape, dtype):
    array = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    values, scales = quantize_blocks(array)
    expected, by_block = by_loop(array.float())
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scales, by_block)
    restored = dequantize_blocks(values, scales, dtype=torch.float64)
    full = scales.repeat_interleave(128, -2).repeat_interleave(128, -1)[..., : shape[-2], : shape[-1]]
    assert torch.equal(restored, (values.float() * full).double())
    # Four significant bits, or the distance of the smallest numbers of the block.
    error = (restored - array.double()).abs()
    assert (error <= torch.maximum(array.double().abs() / 16, full.double() * 2**-10 * 1.001)).all()


@pytest.mark.parametrize("number", [0.0, -0.0, 1e-45, 1e-38, 3e38, -1.0, 448.0])
def test_blocks_of_one_number(number):
    array = torch.full((2, 130), number)
    values, scales = quantize_blocks(array)
    restored = dequantize_blocks(values, scales)
    assert torch.isfinite(scales).all()
    assert (scales > 0).all()
    # Scales are normal numbers, since some processors take others for zero.
    assert torch.allclose(restored, array, rtol=1e-6, atol=1e-39)
    assert torch.equal(torch.signbit(restored), torch.signbit(array))


def test_a_block_does_not_depend_on_others():
    array = torch.randn(256, 256, generator=torch.Generator().manual_seed(2))
    before = quantize_blocks(array)
    array[:128, :128] *= 1000
    after = quantize_blocks(array)
    assert torch.equal(before[0].view(torch.uint8)[128:], after[0].view(torch.uint8)[128:])
    assert torch.equal(before[0].view(torch.uint8)[:, 128:], after[0].view(torch.uint8)[:, 128:])
    assert torch.allclose(after[1][0, 0], before[1][0, 0] * 1000)


def test_arrays_of_any_library_and_layout():
    array = torch.randn(200, 130, generator=torch.Generator().manual_seed(3))
    values, scales = (each.float().numpy() for each in quantize_blocks(array.t()))
    jax = pytest.importorskip("jax")
    for given in (array.numpy().T, jax.numpy.asarray(array.numpy()).T, torch.nn.Parameter(array.t())):
        mine, own = quantize_blocks(given)
        assert type(mine) is type(own)
        assert isinstance(mine, jax.Array) == isinstance(given, jax.Array)
        found = mine.float().numpy() if isinstance(mine, torch.Tensor) else np.asarray(mine).astype(np.float32)
        assert np.array_equal(found, values)
        assert np.array_equal(np.asarray(own), scales)
        assert np.array_equal(np.asarray(dequantize_blocks(mine, own)), dequantize_blocks(*quantize_blocks(array.t())))


@pytest.mark.parametrize(
    "bad", [torch.ones(3), torch.ones(2, 2, dtype=torch.int32), "text", None, torch.ones(())], ids=str
)
def test_what_has_no_blocks_is_refused(bad):
    with pytest.raises(tensorkv.ArrayTypeError, match="quantize_blocks"):
        quantize_blocks(bad)
    with pytest.raises(tensorkv.ArrayTypeError, match="dequantize_blocks"):
        dequantize_blocks(bad, torch.ones(1, 1))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_the_dtype_of_a_result_may_be_a_name(dtype):
    pair = quantize_blocks(torch.ones(2, 300))
    assert torch.equal(dequantize_blocks(*pair, dtype=dtype), dequantize_blocks(*pair, dtype=getattr(torch, dtype)))


@pytest.mark.parametrize(
    "dtype", ["int", "int32", torch.int32, "float17", "nn", None, np.int8, object, np.floating, np.zeros(2)]
)
def test_other_dtypes_of_a_result_are_refused(dtype):
    values, scales = quantize_blocks(torch.ones(2, 300))
    with pytest.raises(tensorkv.ArgumentError, match=r"dequantize_blocks: dtype is .*; expected one of bfloat16"):
        dequantize_blocks(values, scales, dtype=dtype)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_refused(number):
    array = torch.ones(2, 300)
    array[1, 299] = number
    with pytest.raises(tensorkv.NonFiniteError, match="NaN or Inf"):
        quantize_blocks(array)


def test_scales_of_other_values_are_refused():
    values, scales = quantize_blocks(torch.ones(2, 300))
    for other in (scales[:, :2], scales.t(), torch.ones(2, 300)):
        with pytest.raises(tensorkv.ValueMismatchError, match=r"\(2, 300\) have scales of \(1, 3\)"):
            dequantize_blocks(values, other)


@pytest.mark.parametrize(
    "part",
    [
        tensorkv.TensorSlice(torch.ones(2, 2), (0, 0), (2, 2)),
        tensorkv.Rows(torch.tensor([0]), torch.ones(1, 2), 2),
    ],
    ids=["slice", "rows"],
)
def test_parts_that_are_not_rounded_are_named(part):
    with tensorkv.create() as kv:
        kv.init_tree({"w": torch.zeros(2, 2)}, dtype="float8_e4m3fn")
        with pytest.raises(tensorkv.ValueMismatchError, match=r'push\("w"\): part 0 is float32, .* float8_e4m3fn'):
            kv.push_tree({"w": part})
        assert not kv.pull("w").float().any()


def test_scales_of_what_jax_divides():
    jax = pytest.importorskip("jax")
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None))
    values, scale_inv = quantize_blocks(jax.device_put(np.ones((12, 4), np.float32), where))
    assert (values.sharding, scale_inv.shape) == (where, (1, 1))
