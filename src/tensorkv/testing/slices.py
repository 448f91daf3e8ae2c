"""Slices: pushes of parts of values."""

import uuid

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv import TensorSlice

from .values import F32

VALUE = np.arange(24, dtype=F32).reshape(4, 6)


def cut(value, *corners):
    """Return slices of a value, each from one corner to another."""
    slices = (tuple(map(slice, first, stop)) for first, stop in corners)
    firsts = (first for first, _ in corners)
    return [TensorSlice(value[own], first, value.shape) for own, first in zip(slices, firsts, strict=True)]


def quarters(value):
    """Return four slices, of different sizes, that are all of a value."""
    rows, columns = value.shape
    at, along = rows // 3, columns // 2
    return cut(
        value,
        ((0, 0), (at, along)),
        ((0, along), (at, columns)),
        ((at, 0), (rows, along)),
        ((at, along), (rows, columns)),
    )


class SliceContract:
    """Slices: pushes of parts of values."""

    @pytest.fixture(autouse=True)
    def _slices_of_a_test(self, request):
        """Skip the tests of this class where an engine refuses slices, as it has to do in every push."""
        # Tests of the other classes of a contract come by here, too.
        if self.TAKES_SLICES or not request.function.__qualname__.startswith(f"{SliceContract.__name__}."):
            return
        kv = request.getfixturevalue("kv")
        kv.init("w", VALUE)
        for push in (kv.push, kv.pushpull):
            with pytest.raises(tensorkv.ArgumentError, match=r'push.*\("w"\): slices of a value'):
                push("w", quarters(VALUE + 1))
        assert np.array_equal(kv.pull("w"), VALUE)
        pytest.skip("this type of store takes no slices")

    @pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "bool", "complex64"])
    def test_slices_make_up_a_value(self, kv, library, dtype):
        value = library.make((VALUE % 7).tolist(), dtype)
        kv.init("w", library.make((VALUE * 0).tolist(), dtype))
        kv.push("w", quarters(value))
        assert np.array_equal(library.read(kv.pull("w")), library.read(value))
        kv.push(["w"], [quarters(value)[::-1]])
        assert kv.info("w").version == 2

    def test_slices_of_values_that_are_divided(self, kv):
        value = np.random.default_rng(0).standard_normal((1200, 500)).astype(F32)
        value[0, :3] = [-0.0, np.inf, np.nan]
        kv.init({"w": np.zeros_like(value), "b": np.zeros(3, F32)})
        kv.push({"w": quarters(value), "b": np.ones(3, F32)})
        assert kv.pull("w").tobytes() == value.tobytes()
        assert kv.pull("b").tolist() == [1, 1, 1]
        got = kv.pushpull(["b", "w"], [np.ones(3, F32), quarters(value[::-1])])
        assert got[1].tobytes() == value[::-1].tobytes()

    def test_slices_step_an_optimizer_once(self, kv):
        kv.init("w", np.zeros_like(VALUE))
        kv.set_optimizer("sgd", lr=0.5, momentum=0.5)
        for number in (1, 2):
            kv.push("w", quarters(VALUE))
            assert kv.info("w").version == number
        assert np.array_equal(kv.pull("w"), -VALUE * 1.25)

    def test_slices_are_one_part_of_a_mean(self):
        with self.create(reduce="mean") as kv:
            kv.init({"w": np.zeros_like(VALUE), "table": tensorkv.Rows(np.array([0]), np.zeros((1, 2), F32), 4)})
            kv.push("w", quarters(VALUE))
            assert np.array_equal(kv.pull("w"), VALUE)

    def test_a_tree_of_slices_creates_its_keys(self, kv):
        tree = {"a": TensorSlice(VALUE, (0, 0), (4, 6)), "b": {"c": TensorSlice(torch.ones(2), (0,), (2,))}}
        kv.push_tree(tree, prefix="net")
        assert np.array_equal(kv.pull("net.a"), VALUE)
        assert type(kv.pull("net.b.c")) is torch.Tensor

    def test_slices_without_elements(self, kv):
        kv.init({"w": np.zeros_like(VALUE), "none": np.zeros((0, 3), F32)})
        kv.push("w", [*quarters(VALUE), TensorSlice(VALUE[4:], (4, 0), (4, 6))])
        kv.push("none", TensorSlice(np.zeros((0, 3), F32), (0, 0), (0, 3)))
        assert np.array_equal(kv.pull("w"), VALUE)
        assert kv.pull("none").shape == (0, 3)

    def push_some(self, kv, *slices):
        """Push slices of a key "w" that leave it incomplete; return whether the store keeps them for the others."""
        if not self.SLICES_TOGETHER:
            kv.push("w", list(slices))
            return True
        before = kv.pull("w")
        with pytest.raises(tensorkv.IncompleteValueError, match=r'push\("w"\)'):
            kv.push("w", list(slices))
        assert np.array_equal(kv.pull("w"), before)
        return False

    def test_incomplete_values_cannot_be_read(self, kv):
        kv.init({"w": np.zeros_like(VALUE), "b": np.zeros((3, 1), F32), "v": np.zeros(3, F32)})
        first, second, third, fourth = quarters(VALUE)
        if not self.push_some(kv, first, fourth):
            return
        v = np.full(3, 7, F32)
        reads = [
            lambda: kv.pull("w"),
            lambda: kv.pull(["v", "w"], out=[v, TensorSlice(np.empty((1, 6), F32), (0, 0), (4, 6))]),
            lambda: kv.pull(["v", "w"]),
            lambda: kv.pull("w", out=np.empty((4, 6))),
            lambda: kv.pull("w", region=slice(0, 1)),
            lambda: kv.row_sparse_pull("w", row_ids=[0]),
            lambda: kv.pushpull("w", second),
            lambda: kv.pushpull(["v", "w"], [np.ones(3, F32), second]),
            lambda: kv.pushpull("w", VALUE),
        ]
        if kv.is_capable("snapshot"):
            reads.append(kv.snapshot)
        if kv.is_capable("releases"):
            reads.append(lambda: kv.publish(f"slices-{uuid.uuid4()}"))
        for read in reads:
            with pytest.raises(tensorkv.IncompleteValueError, match=r"lacks \[.*\] of \(4, 6\)"):
                read()
        assert v.tolist() == [7, 7, 7]
        with pytest.raises(tensorkv.ValueMismatchError, match="overlaps"):
            kv.push(["b", "w", "v"], [cut(np.ones((3, 1), F32), ((0, 0), (3, 1))), first, np.ones(3, F32)])
        assert not any(each.any() for each in kv.pull(["b", "v"]))
        kv.push("w", second)
        with pytest.raises(tensorkv.IncompleteValueError, match=r"lacks \[1:4, 0:3\] of"):
            kv.pull("w")
        assert np.array_equal(kv.pushpull("w", third), VALUE)
        assert kv.info("w").version == 1

    def test_a_push_of_the_whole_leaves_slices_alone(self, kv):
        kv.init("w", np.zeros_like(VALUE))
        kv.set_optimizer("sgd", lr=1.0, maximize=True)
        first, *rest = quarters(VALUE)
        if not self.push_some(kv, first):
            return
        kv.push("w", VALUE)
        with pytest.raises(tensorkv.IncompleteValueError):
            kv.pull("w")
        kv.push("w", rest)
        assert np.array_equal(kv.pull("w"), 2 * VALUE)
        assert kv.info("w").version == 2

    def test_incomplete_values_end_with_their_keys(self, kv):
        kv.init("w", VALUE)
        if not self.push_some(kv, quarters(VALUE)[0]):
            return
        kv.delete("w")
        kv.init("w", VALUE + 1)
        assert np.array_equal(kv.pull("w"), VALUE + 1)
        kv.push("w", quarters(VALUE))
        assert np.array_equal(kv.pull("w"), VALUE)

    def test_incomplete_values_are_not_saved(self, kv, tmp_path):
        kv.init("w", VALUE)
        if not self.push_some(kv, quarters(VALUE)[0]):
            return
        with pytest.raises(tensorkv.IncompleteValueError, match="save"):
            kv.save(tmp_path / "checkpoint")
        kv.push("w", quarters(VALUE)[1:])
        kv.save(tmp_path / "checkpoint")
        kv.push("w", quarters(VALUE + 5)[0])
        kv.load(tmp_path / "checkpoint")
        assert np.array_equal(kv.pull("w"), VALUE)

    def test_a_publication_that_was_refused_can_be_made(self, kv):
        kv.init("w", VALUE)
        name = f"slices-{uuid.uuid4()}"
        if not kv.is_capable("releases") or not self.push_some(kv, *quarters(VALUE)[:3]):
            return
        for _ in range(2):
            with pytest.raises(tensorkv.IncompleteValueError, match="publish"):
                kv.publish(name)
        kv.push("w", quarters(VALUE)[3])
        kv.publish(name)
        kv.push("w", quarters(VALUE + 1)[0])
        with kv.open_release(name) as release:
            assert np.array_equal(release.pull("w"), VALUE)

    @pytest.mark.parametrize(
        ("given", "error", "said"),
        [
            (
                cut(VALUE, ((0, 0), (4, 4)), ((3, 3), (4, 6))),
                "ValueMismatchError",
                r"\[3:4, 3:6\] overlaps at \[3:4, 3:4\]",
            ),
            (cut(VALUE, ((0, 0), (4, 6)), ((0, 0), (4, 6))), "ValueMismatchError", "overlaps"),
            (cut(VALUE[:3], ((0, 0), (3, 6))), "ValueMismatchError", r"a value of shape \(3, 6\)"),
            ([*cut(VALUE, ((0, 0), (4, 3))), *cut(VALUE[:3], ((0, 3), (3, 6)))], "ValueMismatchError", "another one"),
            ([*cut(VALUE, ((0, 0), (4, 3))), VALUE], "ArgumentError", "slices of the value and whole arrays"),
            (cut(VALUE + 0.5, ((0, 0), (4, 6))), "ValueMismatchError", "int32"),
        ],
        ids=["overlap", "twice", "shape", "shapes", "whole", "dtype"],
    )
    def test_slices_that_do_not_fit_change_nothing(self, kv, given, error, said):
        key = "i" if said == "int32" else "w"
        kv.init({"w": VALUE, "b": np.zeros(3, F32), "i": VALUE.astype(np.int32)})
        for push in (kv.push, kv.pushpull):
            with pytest.raises(getattr(tensorkv, error), match=said):
                push({"b": np.ones(3, F32), key: given})
        assert kv.pull("b").tolist() == [0, 0, 0]
        assert np.array_equal(kv.pull("w"), VALUE)
        kv.push("w", quarters(VALUE + 1))
        assert np.array_equal(kv.pull("w"), VALUE + 1)

    def test_init_refuses_slices_and_tables_have_none(self, kv):
        kv.init("table", tensorkv.Rows(np.array([0]), np.zeros((1, 6), F32), 4))
        with pytest.raises(tensorkv.ArrayTypeError, match="slice of a value"):
            kv.init("w", TensorSlice(VALUE, (0, 0), (4, 6)))
        with pytest.raises(tensorkv.ValueMismatchError, match="push Rows"):
            kv.push("table", TensorSlice(VALUE, (0, 0), (4, 6)))

    def test_slices_of_nan_are_refused(self):
        with self.create(nonfinite="raise") as kv:
            kv.init("w", VALUE)
            bad = VALUE.copy()
            bad[3, 5] = np.nan
            with pytest.raises(tensorkv.NonFiniteError):
                kv.push("w", quarters(bad))
            kv.init("half", VALUE.astype(np.float16))
            bad[3, 5] = 1e6
            with pytest.raises(tensorkv.NonFiniteError):
                kv.push("half", quarters(bad))
            kv.push(["w", "half"], [quarters(VALUE + 1), quarters(VALUE + 2)])
            assert np.array_equal(kv.pull("w"), VALUE + 1)
            assert np.array_equal(kv.pull("half"), VALUE + 2)
