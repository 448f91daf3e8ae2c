"""Sums of squares: exact over groups, and the same wherever the elements are."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv import Rows
from tensorkv.shard import native
from tensorkv.shard.norm import GROUP, Clipping, SquareSum

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def numbers(numel, dtype, seed=0):
    """Numbers of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** (3 * torch.randn(numel, generator=generator, dtype=torch.float64)).clamp(-4, 4)
    return (torch.randn(numel, generator=generator, dtype=torch.float64) * sizes).to(dtype)


def by_hand(total, rescale=1.0):
    """The definition, number by number."""
    wide = torch.float64 if total.dtype is torch.float64 else torch.float32
    each = (total.to(wide) * rescale).tolist()
    each += [0.0] * (-len(each) % GROUP)
    found = Fraction(0)
    for start in range(0, len(each), GROUP):
        lanes = [0.0] * 8
        for index, number in enumerate(each[start : start + GROUP]):
            lanes[index % 8] += number * number
        a, b, c, d, e, f, g, h = lanes
        found += Fraction(((a + e) + (c + g)) + ((b + f) + (d + h)))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 2049, 5000])
@pytest.mark.parametrize("rescale", [1.0, 0.3])
def test_the_sum_is_that_of_the_definition(dtype, numel, rescale):
    total = numbers(numel, dtype)
    found = SquareSum.of(total, rescale)
    assert Fraction(found.exact, 1 << 1074) == by_hand(total, rescale)
    assert found.norm() == math.sqrt(float(by_hand(total, rescale)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_compiled_part_adds_the_same_in_any_ranges(dtype):
    values = [numbers(numel, dtype, numel) for numel in (5, 0, 7001, 64, 4096)]
    keys = list(range(len(values)))
    with tensorkv.create() as kv:
        kv.init(keys, [torch.zeros_like(value) for value in values])
        right = sum((SquareSum.of(value, 0.7) for value in values), SquareSum())
        for cuts in ([], [1], [3000, 3001, 7009], range(0, 11_000, 777)):
            batch = native.look(kv._engine._shard._entries, keys, values, None, None, None)
            borders = [0, *cuts, batch.numel]
            for start, stop in itertools.pairwise(borders):
                batch.add_squares(0.7, start, stop)
            assert SquareSum.of_batch(batch.squares) == right


def test_the_compiled_part_takes_sums_and_means_of_parts():
    parts = [numbers(300, torch.float16, seed) for seed in range(3)]
    with tensorkv.create() as kv:
        kv.init("w", torch.zeros(300, dtype=torch.float16))
        for divisor in (1, 3):
            batch = native.look(kv._engine._shard._entries, "w", parts, None, None, None)
            if divisor > 1:
                assert batch.average()
            batch.add_squares(1.0, 0, 300)
            total = ((parts[0].float() + parts[1].float() + parts[2].float()) / divisor).half()
            assert SquareSum.of_batch(batch.squares) == SquareSum.of(total)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_that_end_between_groups_add_up(dtype):
    total = numbers(1000, dtype)
    pieces = [total[:64], total[64:640], total[640:]]
    assert sum(map(SquareSum.of, pieces), SquareSum()) == SquareSum.of(total)
    assert SquareSum.from_plain(SquareSum.of(total).to_plain()) == SquareSum.of(total)


def test_rows_and_complex_numbers():
    values = numbers(210, torch.float32).view(3, 70)
    rows = Rows(torch.tensor([1, 5, 9]), values, 20)
    assert SquareSum.of(rows) == sum(map(SquareSum.of, values), SquareSum())
    assert SquareSum.of(torch.complex(*values[:2])) == SquareSum.of(values[:2].t().contiguous())
    assert SquareSum.of(torch.ones(3, dtype=torch.int32)) == SquareSum()


def test_the_smallest_and_the_largest_doubles():
    tiny, large = torch.tensor([5e-162, 1e-170], dtype=torch.float64), torch.full((70,), 1e154, dtype=torch.float64)
    assert SquareSum.of(tiny).norm() == math.sqrt(5e-162 * 5e-162)
    assert SquareSum.of(large).norm() == math.inf
    assert SquareSum.of(large * 10).rest == math.inf
    assert math.isnan(SquareSum.of(torch.tensor([1.0, math.nan])).norm())
    for poison in (math.inf, math.nan):
        value = torch.ones(100)
        value[77] = poison
        with tensorkv.create() as kv:
            kv.init("w", torch.zeros(100))
            batch = native.look(kv._engine._shard._entries, "w", value, None, None, None)
            batch.add_squares(1.0, 0, 100)
            assert np.array_equal(SquareSum.of_batch(batch.squares).rest, poison, equal_nan=True)


@pytest.mark.parametrize("norm", [0.0, 0.5, 2.0, 2.1, 1e30, math.inf, math.nan])
def test_the_factor_is_that_of_torch(norm):
    param = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    param.grad = torch.tensor([norm], dtype=torch.float64)
    torch.nn.utils.clip_grad_norm_([param], 2.0)
    mine = torch.tensor([norm], dtype=torch.float64) * Clipping(1.0, 2.0).factor(norm)
    torch.testing.assert_close(mine, param.grad, rtol=1e-15, atol=0, equal_nan=True)
