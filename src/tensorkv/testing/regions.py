"""Regions: pulls of parts of values."""

import uuid

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv import TensorSlice

from .values import F32, VIEWS, ones

REGIONS = [
    slice(2, 5),
    slice(None),
    slice(3, 3),
    slice(-2, None),
    (slice(1, 4), slice(0, 2)),
    (slice(None), slice(-1, None), slice(1, 2)),
    (slice(0, 6), slice(2, 2)),
    (),
]


class RegionContract:
    """Regions: pulls of parts of values."""

    @pytest.mark.parametrize("region", REGIONS, ids=str)
    def test_a_region_is_what_an_index_of_numpy_is(self, kv, library, region):
        value = np.arange(6 * 3 * 2).reshape(6, 3, 2)
        for key, dtype in (("f", "float32"), ("h", "float16"), ("i", "int32")):
            kv.init(key, library.make(value.tolist(), dtype))
            expected = value[region].astype(dtype)
            found = library.read(kv.pull(key, region=region))
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert np.array_equal(found, expected)
        out = np.full(expected.shape, -1, np.float64)
        kv.pull("i", out=out, region=region)
        assert np.array_equal(out, expected)

    def test_regions_of_values_that_are_divided(self, kv):
        value, chance = np.random.default_rng(0).standard_normal((1200, 500)).astype(F32), np.random.default_rng(1)
        kv.init(["w", "flat"], [value, torch.from_numpy(value.reshape(-1).copy())])
        for _ in range(20):
            (a, b), (c, d) = np.sort(chance.integers(0, 1201, 2)), np.sort(chance.integers(0, 501, 2))
            assert np.array_equal(kv.pull("w", region=(slice(a, b), slice(c, d))), value[a:b, c:d])
            out = torch.zeros(2, b - a)
            kv.pull(["flat"], out=[[out[1], out[0]]], region=[slice(a, b)])
            assert np.array_equal(out.numpy(), [value.reshape(-1)[a:b]] * 2)

    @pytest.mark.parametrize("view", VIEWS)
    def test_a_region_into_any_strides(self, kv, view):
        kv.init("w", np.arange(12, dtype=F32).reshape(3, 4))
        base = np.full((4, 6), -1, F32)
        out = VIEWS[view](base)[:2, :2]
        touched = int(out.size) if np.shares_memory(out, base) else 0
        kv.pull("w", out=out, region=(slice(1, 3), slice(2, 4)))
        assert out.tolist() == [[6, 7], [10, 11]]
        assert (base != -1).sum() == touched

    def test_regions_of_several_keys(self, kv):
        kv.init({"a": np.arange(4, dtype=F32), "b": torch.arange(6).reshape(2, 3)})
        wanted = [slice(1, 3), (slice(None), slice(0, 1))]
        a, b = kv.pull(["a", "b"], region=wanted)
        assert (a.tolist(), b.tolist()) == ([1, 2], [[0], [3]])
        mine, like = np.zeros(2, F32), np.zeros(0)
        kv.pull({"b": (out := torch.zeros(2, 1, dtype=torch.int64)), "a": mine}, region=wanted[::-1])
        assert (mine.tolist(), out.tolist()) == ([1, 2], [[0], [3]])
        assert type(kv.pull("b", region=wanted[1], like=like)) is np.ndarray
        first, second = kv.pull(["a", "a"], region=[slice(0, 2), slice(0, 2)])
        assert first.tolist() == second.tolist() == [0, 1]

    def test_parts_of_values_that_jax_divides(self, kv):
        jax = pytest.importorskip("jax")
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None))
        value = np.arange(48, dtype=F32).reshape(12, 4)
        divided = jax.device_put(value, where)
        kv.init(["w", "b"], [divided, ones(12)])
        assert np.array_equal(kv.pull("w"), value)
        part = kv.pull("w", region=slice(0, 5))
        assert isinstance(part, jax.Array)
        assert np.array_equal(part, value[:5])
        rows = kv.row_sparse_pull("w", row_ids=[5, 1, 2])
        assert (rows.ids.tolist(), rows.values.tolist()) == ([1, 2, 5], value[[1, 2, 5]].tolist())
        kv.set_optimizer("sgd", lr=0.5, ema=0.5)
        assert kv.pull_ema("w", row_ids=[7]).values.tolist() == value[[7]].tolist()
        for call in (lambda: kv.pull("b", like=divided), lambda: kv.pull(["w", "b"], like=divided)):
            with pytest.raises(
                tensorkv.ArrayTypeError, match=r'^pull\("b"\): the value has the shape \(12,\), which Named'
            ):
                call()

    def test_a_region_is_as_new_as_a_whole_value(self, kv):
        kv.init("w", np.zeros(4, F32))
        kv.set_optimizer("sgd", lr=1.0)
        for number in range(1, 4):
            kv.push("w", -np.ones(4, F32))
            assert kv.pull("w", region=slice(2, 3), min_version=number).tolist() == [number]

    @pytest.mark.parametrize(
        ("key", "region", "error", "said"),
        [
            ("w", slice(0, 7), "ValueMismatchError", "0:7 for axis 0, which has the size 6"),
            ("w", slice(-7, 2), "ValueMismatchError", "-7:2 for axis 0"),
            ("w", slice(4, 2), "ValueMismatchError", "4:2 for axis 0"),
            ("w", (slice(None), slice(0, 4)), "ValueMismatchError", "0:4 for axis 1"),
            ("w", (slice(None),) * 3, "ValueMismatchError", "3 slices"),
            ("w", slice(0, 4, 2), "ArgumentError", "the step 2 for axis 0"),
            ("w", slice(None, None, -1), "ArgumentError", "the step -1"),
            ("w", slice(0.0, 2), "ArgumentError", "expected integers"),
            ("w", 3, "ArgumentError", "expected a slice"),
            ("w", np.array([True] * 6), "ArgumentError", "expected a slice"),
            ("w", (slice(None), ...), "ArgumentError", "expected a slice"),
            ("scalar", slice(None), "ValueMismatchError", "0-d"),
            ("scalar", (), "ValueMismatchError", "0-d"),
            ("table", slice(0, 2), "ValueMismatchError", "row_sparse_pull"),
            ("none", slice(0, 2), "KeyNotFoundError", "no such key"),
        ],
        ids=str,
    )
    def test_regions_that_are_not_there(self, kv, key, region, error, said):
        kv.init({"w": np.ones((6, 3), F32), "scalar": np.array(1.0)})
        kv.init("table", tensorkv.Rows(np.array([1]), np.ones((1, 2), F32), num_rows=9))
        out = np.zeros((2, 3), F32)
        for arguments in ({}, {"out": out}):
            with pytest.raises(getattr(tensorkv, error), match=said):
                kv.pull(key, region=region, **arguments)
        assert not out.any()

    def test_regions_and_outs_that_do_not_fit(self, kv):
        kv.init({"w": np.ones((6, 3), F32), "v": np.ones(4, F32)})
        good, bad = np.zeros((2, 3), F32), np.zeros((4,), F32)
        with pytest.raises(tensorkv.ValueMismatchError, match=r"out 0 has shape \(4,\), expected \(2,\)"):
            kv.pull(["w", "v"], out=[good, bad], region=[slice(0, 2), slice(0, 2)])
        for region in (slice(0, 2), [slice(0, 2)], None):
            with pytest.raises(tensorkv.TensorKVError):
                kv.pull(["w", "v"], out=[good, bad[:2]], region=region)
        with pytest.raises(tensorkv.ArgumentError, match="two regions"):
            kv.pull(["v", "v"], region=[slice(0, 2), slice(1, 2)])
        assert not good.any()
        assert not bad.any()

    def test_outs_that_are_parts_of_values(self, kv):
        value = np.arange(24, dtype=F32).reshape(6, 4)
        kv.init({"w": value, "v": torch.arange(5)})
        upper, lower, whole, v = np.zeros((2, 4), F32), torch.zeros(4, 2), np.zeros((6, 4)), np.zeros(2, np.int64)
        outs = [TensorSlice(upper, (0, 0), (6, 4)), TensorSlice(lower, (2, 1), (6, 4)), whole]
        kv.pull(["w", "v"], out=[outs, TensorSlice(v, [np.int64(3)], torch.Size([5]))])
        for found, expected in ((upper, value[:2]), (lower.numpy(), value[2:, 1:3]), (whole, value), (v, [3, 4])):
            assert np.array_equal(found, expected)
        kv.push("w", value + 1)
        kv.pushpull(["w", "v"], [value + 2, torch.arange(5) + 2], out=[outs[0], [TensorSlice(v, (0,), (5,))]])
        assert np.array_equal(upper, value[:2] + 2)
        assert v.tolist() == [2, 3]
        bare = kv.broadcast("b", value, out=outs[:2])
        assert bare is None
        assert np.array_equal(lower.numpy(), value[2:, 1:3])
        kv.pull("w", out=TensorSlice(upper, (1, 0), (3, 4)), region=slice(2, 5))
        assert np.array_equal(upper, value[3:5] + 2)

    def test_parts_of_averages(self, kv):
        kv.init("w", np.zeros(4, F32))
        kv.set_optimizer("sgd", lr=1.0, ema=0.5)
        for number in range(3):
            kv.push("w", -np.arange(4, dtype=F32) * number)
        whole, part = kv.pull_ema("w"), np.zeros(2, F32)
        kv.pull_ema("w", out=TensorSlice(part, (2,), (4,)))
        assert part.tolist() == whole[2:].tolist()
        assert part.any()

    @pytest.mark.parametrize(
        ("shape", "offsets", "whole", "error", "said"),
        [
            ((2, 3), (0, 0), (2, 2), "ValueMismatchError", "does not lie in a value of shape"),
            ((2, 3), (-1, 0), (6, 3), "ValueMismatchError", "does not lie in a value of shape"),
            ((2, 3), (5, 0), (6, 3), "ValueMismatchError", "does not lie in a value of shape"),
            ((2, 3), (0,), (6, 3), "ArgumentError", "as many numbers in each"),
            ((2, 3), (0, 0), (6,), "ArgumentError", "as many numbers in each"),
            ((), (), (), "ArgumentError", "at least one"),
            ((2, 3), (0.0, 0), (6, 3), "ArgumentError", "expected integers"),
            ((2, 3), 3, (6, 3), "ArgumentError", "expected integers"),
        ],
        ids=str,
    )
    def test_parts_that_cannot_be(self, shape, offsets, whole, error, said):
        with pytest.raises(getattr(tensorkv, error), match=said):
            TensorSlice(np.zeros(shape, F32), offsets, whole)
        with pytest.raises(tensorkv.ArrayTypeError, match="TensorSlice: the array"):
            TensorSlice("text", (0,), (1,))

    def test_parts_of_other_values_change_nothing(self, kv):
        kv.init({"w": np.ones((6, 3), F32), "v": np.ones(4, F32)})
        good, bad, overlapping = np.zeros(2, F32), np.zeros((2, 3), F32), np.zeros((4, 3), F32)
        for whole in ((6, 4), (7, 3)):
            with pytest.raises(
                tensorkv.ValueMismatchError, match=r"out 0 is a part of a value of shape .*expected \(6, 3\)"
            ):
                kv.pull(["v", "w"], out=[TensorSlice(good, (0,), (4,)), TensorSlice(bad, (0, 0), whole)])
        bad.flags.writeable = False
        with pytest.raises(tensorkv.ArrayTypeError, match="read-only"):
            kv.pull(["v", "w"], out=[TensorSlice(good, (0,), (4,)), TensorSlice(bad, (0, 0), (6, 3))])
        parts = [TensorSlice(overlapping[:3], (0, 0), (6, 3)), TensorSlice(overlapping[2:], (3, 0), (6, 3))]
        with pytest.raises(tensorkv.ArgumentError, match="overlap"):
            kv.pull("w", out=parts)
        assert not good.any()
        assert not overlapping.any()

    def test_regions_of_snapshots_and_releases(self, kv):
        kv.init("w", np.arange(1_000_000, dtype=F32).reshape(1000, 1000))
        for capability in ("snapshot", "releases"):
            if not kv.is_capable(capability):
                continue
            if capability == "releases":
                name = f"regions-{uuid.uuid4()}"
                kv.publish(name)
            with kv.snapshot() if capability == "snapshot" else kv.open_release(name) as held:
                before = held.pull("w")
                kv.push("w", before + 1)
                found = held.pull("w", region=(slice(400, 700), slice(999, None)))
                assert np.array_equal(found, before[400:700, 999:])
                with pytest.raises(tensorkv.ValueMismatchError):
                    held.pull("w", region=slice(0, 1001))
