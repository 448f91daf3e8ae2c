"""Pulls: copies in the caller's library, and outputs that the caller gives."""

import numpy as np
import pytest
import torch

import tensorkv

from .values import F32, VIEWS, ones


class ReadContract:
    """Pulls: copies in the caller's library, and outputs that the caller gives."""

    # ---------------------------------------------------------------- no aliasing

    def test_pushed_arrays_are_free_and_unchanged(self, kv, library):
        kv.init("w", library.make([0, 0]))
        part = library.make([1, 2])
        kv.push("w", part)
        assert library.read(part).tolist() == [1, 2]
        if library.name != "jax":
            part[:] = 9
        assert library.read(kv.pull("w")).tolist() == [1, 2]
        kv.push("w", [part, library.make([5, 5])])
        kv.set_optimizer("sgd", lr=1.0, momentum=0.9, weight_decay=0.1)
        before = library.read(part)
        kv.pushpull("w", part)
        kv.pushpull("w", part)
        assert np.array_equal(library.read(part), before)

    def test_pull_hands_out_no_stored_memory(self, kv, library):
        kv.init("w", library.make([1, 2]))
        first = kv.pull("w")
        if library.name != "jax":
            first[:] = 9
        kept = library.read(first)
        assert library.read(kv.pull("w")).tolist() == [1, 2]
        kv.push("w", library.make([5, 6]))
        assert np.array_equal(library.read(first), kept)

    def test_an_optimizer_keeps_no_pushed_memory(self, kv):
        results = []
        for overwrite in (False, True):
            kv.init(f"w{overwrite}", ones(2))
            kv.set_optimizer("sgd", lr=1.0, momentum=0.5)
            for _ in range(3):
                grad = ones(2)
                kv.push(f"w{overwrite}", grad)
                if overwrite:
                    grad[:] = 1000
            results.append(kv.pull(f"w{overwrite}").tolist())
        assert results[0] == results[1]

    # ---------------------------------------------------------------- pull

    def test_a_pull_of_a_version_of_a_key_that_does_not_exist(self, kv):
        kv.init("w", ones(2))
        with pytest.raises(tensorkv.KeyNotFoundError, match=r'^pull\("nope"\): no such key'):
            kv.pull(["w", "nope"], min_version=0)

    def test_pull_into_one_and_into_several(self, kv):
        kv.init("w", np.array([1, 2], F32))
        a, b, c = np.zeros(2, F32), torch.zeros(2), np.zeros(2)
        assert kv.pull("w", out=a) is None
        kv.pull("w", out=[b, c])
        assert (a.tolist(), b.tolist(), c.tolist()) == ([1, 2], [1, 2], [1, 2])
        d, e = np.zeros(2, F32), np.zeros(2, F32)
        kv.pull(["w", "w"], out=[d, e])
        assert (d.tolist(), e.tolist()) == ([1, 2], [1, 2])

    def test_pull_lists(self, kv):
        kv.init(["a", "b"], [ones(2), 2 * ones(3)])
        a, b1, b2 = np.zeros(2, F32), np.zeros(3, F32), np.zeros(3, F32)
        kv.pull(["a", "b"], out=[a, [b1, b2]])
        assert (a.tolist(), b1.tolist(), b2.tolist()) == ([1, 1], [2, 2, 2], [2, 2, 2])
        first, second = kv.pull(["a", "a"])
        first[:] = 7
        assert second.tolist() == [1, 1]

    @pytest.mark.parametrize("view", VIEWS)
    def test_pull_into_any_strides(self, kv, view):
        kv.init("w", np.array([[1, 2], [3, 4]], F32))
        base = np.full((4, 6), -1, F32)
        out = VIEWS[view](base)[:2, :2]
        touched = int(out.size) if np.shares_memory(out, base) else 0
        kv.pull("w", out=out)
        assert out.tolist() == [[1, 2], [3, 4]]
        assert (base != -1).sum() == touched

    @pytest.mark.parametrize(
        ("value", "out", "fits"),
        [
            ("float32", "float16", True),
            ("float64", "float32", True),
            ("float32", "bfloat16", True),
            ("int64", "int8", True),
            ("int32", "float64", True),
            ("bool", "float32", True),
            ("float32", "complex64", True),
            ("complex128", "complex64", True),
            ("int64", "float32", False),
            ("int64", "float64", False),
            ("uint64", "complex128", False),
            ("uint32", "float64", True),
            ("float32", "int32", False),
            ("complex64", "float32", False),
            ("float32", "bool", False),
        ],
    )
    def test_pull_casts_within_a_family_or_safely(self, kv, value, out, fits):
        kv.init("w", torch.ones(2).to(getattr(torch, value)))
        target = torch.full((2,), 7).to(getattr(torch, out))
        if fits:
            kv.pull("w", out=target)
            assert target.to(torch.complex128).tolist() == [1, 1]
        else:
            before = target.clone()
            with pytest.raises(tensorkv.ValueMismatchError, match=rf"out 0 is {out}"):
                kv.pull("w", out=target)
            assert torch.equal(target, before)

    def test_pull_without_out_gives_what_init_had(self, kv, library):
        for key, dtype in (("h", "float16"), ("f", "float32"), ("i", "int32"), ("b", "bool")):
            kv.init(key, library.make([1, 0], dtype))
            pulled = kv.pull(key)
            assert str(pulled.dtype).removeprefix("torch.") == dtype
            assert library.read(pulled).tolist() == [1, 0]

    def test_like_chooses_the_library(self, kv, library):
        kv.init({"n": ones(2), "t": torch.ones(2)})
        for key in ("n", "t"):
            assert library.read(kv.pull(key, like=library.make([0]))).tolist() == [1, 1]
        assert all(library.read(x).tolist() == [1, 1] for x in kv.pull(["n", "t"], like=library.make([0])))

    def test_like_beside_outs(self, kv):
        kv.init("w", ones(2))
        out = np.zeros(2, F32)
        for call in (lambda: kv.pull("w", out=out, like=out), lambda: kv.pull({"w": out}, like=out)):
            with pytest.raises(tensorkv.ArgumentError, match="pull: got out= and like="):
                call()
        assert out.tolist() == [0, 0]

    def test_like_never_cuts_numbers_down(self, kv):
        jax = pytest.importorskip("jax")
        kv.init("i", np.array([2**40]))
        with pytest.raises(tensorkv.ArrayTypeError, match="jax_enable_x64"):
            kv.pull("i", like=jax.numpy.zeros(1))

    def test_nothing_is_written_when_one_out_is_wrong(self, kv):
        kv.init({"a": ones(2), "b": ones(2)})
        good, read_only = np.zeros(2, F32), np.zeros(2, F32)
        read_only.flags.writeable = False
        for bad in (read_only, np.zeros(3, F32), np.zeros(2, np.int32), "text", None):
            with pytest.raises(tensorkv.TensorKVError):
                kv.pull(["a", "b"], out=[good, bad])
            assert good.tolist() == [0, 0]

    def test_outs_that_overlap(self, kv):
        kv.init("w", ones(4))
        base = np.zeros(6, F32)
        with pytest.raises(tensorkv.ArgumentError, match="overlap"):
            kv.pull("w", out=[base[:4], base[2:]])
        with pytest.raises(tensorkv.ArgumentError, match="overlap"):
            kv.pull("w", out=[base[:4], torch.from_numpy(base)[1:5]])
        assert base.tolist() == [0] * 6
        both = np.zeros(8, F32)
        kv.pull("w", out=[both[::2], both[1::2]])
        assert both.tolist() == [1] * 8

    def test_pull_into_a_parameter(self, kv):
        weight = torch.nn.Parameter(torch.zeros(2))
        kv.init("w", ones(2))
        kv.pull("w", out=weight)
        assert weight.tolist() == [1, 1]
        assert weight.requires_grad
