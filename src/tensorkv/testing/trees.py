"""Trees: nested containers of arrays, by the paths to their arrays."""

from collections import OrderedDict, defaultdict
from typing import NamedTuple

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv import Rows

from .values import F32, ones, state, workers_of_a_sum


class Layer(NamedTuple):
    weight: object
    bias: object


def tree_of(library, number, dtype="float32"):
    """A tree of every kind of container, whose arrays are full of a number."""

    def full(*shape):
        return library.make(np.full(shape, number), dtype)

    return {
        "layers": [Layer(full(2, 3), full(3)), Layer(full(3, 1), None)],
        "scale": (full(), OrderedDict(z=full(1), a=full(2))),
        "more": defaultdict(list, {"none": None, "empty": {}}),
    }


PATHS = ["layers.0.weight", "layers.0.bias", "layers.1.weight", "scale.0", "scale.1.z", "scale.1.a"]


def check(library, tree, number):
    """Check the types of a tree's containers, and that its arrays are full of a number."""
    first, second = tree["layers"]
    scale, ordered = tree["scale"]
    assert [type(each) for each in (tree, tree["layers"], first, second)] == [dict, list, Layer, Layer]
    assert (type(tree["scale"]), type(ordered), list(ordered)) == (tuple, OrderedDict, ["z", "a"])
    assert (type(tree["more"]), tree["more"].default_factory) == (defaultdict, list)
    assert (second.bias, dict(tree["more"])) == (None, {"none": None, "empty": {}})
    arrays = [first.weight, first.bias, second.weight, scale, ordered["z"], ordered["a"]]
    read = [library.read(array) for array in arrays]
    assert [each.shape for each in read] == [(2, 3), (3,), (3, 1), (), (1,), (2,)]
    assert all((each == number).all() for each in read)


class TreeContract:
    """Trees: nested containers of arrays, by the paths to their arrays."""

    @pytest.mark.parametrize("dtype", ["float16", torch.float16])
    def test_a_tree_may_be_held_in_another_dtype(self, kv, library, dtype):
        tree = {"w": library.make([1.0001, 2]), "count": library.make([3], "int32"), "on": library.make([1], "bool")}
        tree["table"] = Rows(library.make([1], "int32"), library.make([[1.5]]), 4)
        kv.init_tree(tree, prefix="net", dtype=dtype)
        dtypes = {key: kv.info(key).dtype for key in kv.keys()}
        assert dtypes == {"net.count": "int32", "net.on": "bool", "net.table": "float32", "net.w": "float16"}
        assert library.read(kv.pull("net.w")).tolist() == [1, 2]
        assert library.read(tree["w"]).tolist() == [F32(1.0001), 2]
        kv.push_tree({"w": library.make([4.0001, 5])}, prefix="net")
        assert library.read(kv.pull("net.w")).tolist() == [4, 5]
        into = {"w": torch.zeros(2)}
        kv.pull_tree(into=into, prefix="net", strict=False)
        assert into["w"].tolist() == [4, 5]

    @pytest.mark.parametrize("dtype", ["int32", "float8_e5m2", "complex64", 3, [], np.int8, "nothing"])
    def test_a_tree_is_held_in_no_other_dtypes(self, kv, dtype):
        with pytest.raises(tensorkv.ArgumentError, match=r"dtype is .*; expected one of bfloat16, float16, float32"):
            kv.init_tree({"w": ones(2)}, dtype=dtype)
        with pytest.raises(tensorkv.ArrayTypeError, match='"w"'):
            kv.init_tree({"w": "text"}, dtype="float16")
        assert kv.keys() == []

    def test_a_tree_in_blocks_of_float8(self, kv, library):
        if library.name != "torch":
            pytest.importorskip("ml_dtypes")
        chance = np.random.default_rng(0)
        w, b = chance.standard_normal((300, 200)).astype(F32), chance.standard_normal(200).astype(F32)
        tree = {"w": library.make(w), "b": library.make(b), "n": library.make([[3]], "int32")}
        kv.init_tree(tree, prefix="net", dtype="float8_e4m3fn")
        found = {key: (kv.info(key).dtype, kv.info(key).shape) for key in kv.keys()}
        assert found == {
            "net.b": ("float32", (200,)),
            "net.n": ("int32", (1, 1)),
            "net.w": ("float8_e4m3fn", (300, 200)),
            "net.w_scale_inv": ("float32", (3, 2)),
        }

        def rounded(value):
            return tensorkv.dequantize_blocks(*tensorkv.quantize_blocks(value))

        def check_pulls(value):
            into = {"w": np.empty((300, 200)), "b": torch.empty(200)}
            kv.pull_tree(into=into, prefix="net")
            assert np.array_equal(into["w"], rounded(value))
            assert np.abs(into["w"] - value).max() <= np.abs(value).max() / 16
            pulled = kv.pull_tree(tree, prefix="net")
            assert np.array_equal(library.read(pulled["w"]), rounded(value))
            both = {"w": np.empty((300, 200), F32), "w_scale_inv": np.full((3, 2), np.nan, F32)}
            kv.pull_tree(into=both, prefix="net")
            assert np.array_equal(both["w"], rounded(value))
            assert np.array_equal(both["w_scale_inv"], kv.pull("net.w_scale_inv", like=np.empty(0)))
            part = np.empty((100, 50), F32)
            kv.pull_tree(into={"w": tensorkv.TensorSlice(part, (190, 100), (300, 200))}, prefix="net")
            assert np.array_equal(part, rounded(value)[190:290, 100:150])

        check_pulls(w)
        if workers_of_a_sum(kv) > 1:
            with pytest.raises(tensorkv.ArgumentError, match="blocks of float8"):
                kv.push_tree({"w": library.make(2 * w)}, prefix="net")
            return
        kv.push_tree({"w": library.make(3 * w), "b": library.make(b)}, prefix="net")
        check_pulls(3 * w)
        # Parts are summed before they are rounded, and new keys are created beside.
        kv.push_tree(*({"w": library.make(w), "new": library.make([1])} for _ in range(2)), prefix="net")
        check_pulls(2 * w)
        assert library.read(kv.pull("net.new")).tolist() == [2]

    def test_a_mean_of_trees_in_blocks_of_float8(self):
        with self.create(reduce="mean") as kv:
            kv.init_tree({"w": ones(2, 2), "b": ones(2)}, dtype="float8_e4m3fn")
            if workers_of_a_sum(kv) > 1:
                return
            kv.push_tree({"w": 2 * ones(2, 2), "b": 2 * ones(2)}, {"w": 4 * ones(2, 2), "b": 4 * ones(2)})
            into = {"w": np.empty((2, 2), F32), "b": np.empty(2, F32)}
            kv.pull_tree(into=into)
            assert into["w"].tolist() == [[3, 3], [3, 3]]
            assert into["b"].tolist() == [3, 3]

    def test_what_is_held_in_blocks_is_not_changed_by_mistake(self, kv):
        kv.init_tree({"w": ones(130, 2)}, dtype="float8_e4m3fn")
        before = state(kv)
        bad = ones(130, 2)
        bad[129, 1] = np.nan
        wrong = [
            (lambda: kv.push("w", ones(130, 2)), "ValueMismatchError", "float8_e4m3fn"),
            (lambda: kv.push_tree({"w": ones(3, 2)}), "TensorKVError", "w"),
            (lambda: kv.push_tree({"w": bad}), "TensorKVError", "w"),
            (lambda: kv.pushpull_tree({"w": ones(130, 2)}), "ArgumentError", "blocks of float8"),
            (
                lambda: kv.push_tree({"w": ones(130, 2), "w_scale_inv": ones(2, 1)}),
                "ArgumentError",
                "w_scale_inv|blocks",
            ),
            (lambda: kv.pull_tree(into={"w": ones(3, 2)}), "ValueMismatchError", "shape"),
            (lambda: kv.pull_tree(into={"w": np.ones((130, 2), int)}), "ValueMismatchError", "int64"),
            (lambda: kv.pull("w", out=ones(130, 2)), "ValueMismatchError", "float8_e4m3fn"),
            (lambda: kv.init_tree({"v": bad}, dtype="float8_e4m3fn"), "NonFiniteError", '"v"'),
        ]
        for call, error, said in wrong:
            with pytest.raises(getattr(tensorkv, error), match=said):
                call()
        assert state(kv) == before

    def test_keys_are_the_paths_of_a_tree(self, kv, library):
        kv.init_tree(tree_of(library, 1))
        kv.init_tree(tree_of(library, 2), prefix="other")
        kv.init_tree(library.make([3]), prefix="bare")
        # A dict's keys are sorted, an OrderedDict's are not.
        assert kv.keys() == [*PATHS, *(f"other.{path}" for path in PATHS), "bare"]
        check(library, kv.pull_tree(tree_of(library, 0)), 1)
        check(library, kv.pull_tree(tree_of(library, 0), prefix="other."), 2)
        assert library.read(kv.pull_tree(library.make([0]), prefix="bare")).tolist() == [3]

    def test_trees_are_pushed_and_pulled(self, kv, library):
        kv.init_tree(tree_of(library, 1))
        kv.push_tree(tree_of(library, 2))
        check(library, kv.pull_tree(tree_of(library, 0)), 2)
        # Several trees are parts of one push.
        kv.push_tree(tree_of(library, 2), tree_of(library, 3), tree_of(library, 4))
        check(library, kv.pull_tree(tree_of(library, 0)), 9)
        check(library, kv.pushpull_tree(tree_of(library, 5), tree_of(library, 6)), 11)
        assert {kv.info(key).version for key in kv} == {3}

    def test_an_optimizer_steps_a_tree(self, kv, library):
        kv.init_tree(tree_of(library, 1), prefix="net")
        kv.set_optimizer("sgd", lr=0.5)
        check(library, kv.pushpull_tree(tree_of(library, 1), tree_of(library, 0), prefix="net"), 0.5)

    def test_a_tree_is_broadcast(self, kv, library):
        check(library, kv.broadcast_tree(tree_of(library, 1), prefix="net"), 1)
        assert kv.keys() == [f"net.{path}" for path in PATHS]

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int32", "bool"])
    def test_trees_of_any_dtype(self, kv, library, dtype):
        if library.name == "jax" and dtype == "float64":
            library, dtype = type(library)(), "float32"
        if library.name == "numpy" and dtype == "bfloat16":
            pytest.importorskip("ml_dtypes")
        tree = {"w": [library.make([1, 0], dtype)]}
        kv.init_tree(tree)
        pulled = kv.pushpull_tree(tree)["w"][0]
        assert str(pulled.dtype).removeprefix("torch.") == dtype
        assert pulled.tolist() == [1, 0]

    def test_a_part_of_a_tree_is_pushed(self, kv, library):
        tree = {"a": library.make([1]), "b": library.make([1])}
        kv.init_tree(tree)
        kv.push_tree({"a": None, "b": library.make([2])})
        pulled = kv.pushpull_tree({"a": library.make([3])})
        assert library.read(pulled["a"]).tolist() == [3]
        assert [kv.info(key).version for key in ("a", "b")] == [1, 1]

    @pytest.mark.parametrize("verb", ["push_tree", "pushpull_tree"])
    def test_a_push_creates_the_keys_of_a_tree(self, kv, library, verb):
        push = getattr(kv, verb)
        push(tree_of(library, 2), prefix="net")
        assert kv.keys() == [f"net.{path}" for path in PATHS]
        check(library, kv.pull_tree(tree_of(library, 0), prefix="net"), 2)
        # Some are there, some are not; the parts of both are summed.
        first, more = ({"a": library.make([number]), "n": library.make([1], "int32")} for number in (1, 5))
        kv.init_tree({"a": library.make([9])})
        pulled = push(first, more)
        assert library.read(kv.pull("a")).tolist() == [6]
        assert library.read(kv.pull("n")).tolist() == [2]
        assert str(kv.pull("n").dtype).removeprefix("torch.") == "int32"
        assert pulled is None or library.read(pulled["n"]).tolist() == [2]
        assert {kv.info(key).version for key in kv} == {1}

    def test_a_push_creates_tables(self, kv):
        parts = [Rows(np.array([4, 2, 4]), ones(3, 1), 10**12), Rows(np.array([7]), ones(1, 1), 10**12)]
        kv.push_tree(*({"table": part} for part in parts))
        assert kv.info("table").kind == "rows"
        rows = kv.row_sparse_pull("table", row_ids=[2, 3, 4, 7])
        assert rows.values[:, 0].tolist() == [1, 0, 2, 1]

    def test_a_first_gradient_is_no_value(self, kv):
        kv.init_tree({"a": ones(2)})
        kv.set_optimizer("sgd", lr=0.5)
        before = state(kv)
        for push, verb in ((kv.push_tree, "push_tree"), (kv.pushpull_tree, "pushpull_tree")):
            with pytest.raises(
                tensorkv.KeyNotFoundError, match=rf'"b"\): no such key.*; {verb} .*: call init_tree first'
            ):
                push({"a": ones(2), "b": ones(2)})
        assert state(kv) == before

    def test_a_push_that_does_not_fit_creates_nothing(self, kv):
        kv.init_tree({"a": ones(2)})
        before = state(kv)
        errors = [
            ([{"a": ones(3), "b": ones(2)}], tensorkv.ValueMismatchError, r'\("a"\): part 0 has shape \(3,\)'),
            ([{"b": ones(2)}, {"b": ones(3)}], tensorkv.ValueMismatchError, r'\("b"\): part 1 has shape \(3,\)'),
            ([{"b": ones(2)}, {"b": ones(2, dtype=int)}], tensorkv.ValueMismatchError, r'\("b"\): part 1 is int64'),
            ([{"b": ones(2), "c": 3.0}], tensorkv.ArrayTypeError, r'\("c"\): part 0 is 3.0, not an array'),
            ([{"b": Rows(np.array([0]), ones(1, 1), 2, init="normal")}], tensorkv.ArgumentError, r'\("b"\).*init='),
        ]
        for parts, kind, match in errors:
            with pytest.raises(kind, match=match):
                kv.push_tree(*parts)
            with pytest.raises(kind, match=match):
                kv.pushpull_tree(*parts)
        with pytest.raises(tensorkv.ArgumentError, match="priority is 'high'"):
            kv.push_tree({"b": ones(2)}, priority="high")
        assert state(kv) == before
        with pytest.raises(tensorkv.KeyNotFoundError, match=r'push\("b"\): no such key'):
            kv.push("b", ones(2))

    def test_a_new_key_has_nothing_of_a_push_that_is_refused(self):
        with self.create(nonfinite="raise") as kv:
            with pytest.raises(tensorkv.NonFiniteError):
                kv.push_tree({"w": np.array([1, np.nan], F32)})
            assert kv.pull("w").tolist() == [0, 0]
            assert kv.info("w").version == 0
            kv.push_tree({"w": ones(2)})
            assert kv.pull("w").tolist() == [1, 1]
        with self.create(reduce="mean") as kv:
            with pytest.raises(tensorkv.ValueMismatchError, match='reduce="mean"'):
                kv.push_tree({"n": ones(2, dtype=int)})
            assert kv.keys() == []
            kv.push_tree({"w": ones(2)})

    def test_trees_without_arrays(self, kv):
        for tree in ({}, [], None, {"a": [None, ()]}):
            kv.init_tree(tree)
            kv.push_tree(tree)
            kv.push_tree(tree, tree)
            assert kv.pushpull_tree(tree) == tree
            assert kv.pull_tree(tree) == (tree if tree is not None else {})
        assert kv.keys() == []

    def test_trees_of_several_libraries(self, kv):
        kv.init_tree({"n": ones(2), "t": torch.ones(2)})
        pulled = kv.pushpull_tree({"n": torch.full((2,), 2.0), "t": np.full(2, 3, F32)})
        assert isinstance(pulled["n"], np.ndarray)
        assert isinstance(pulled["t"], torch.Tensor)
        like = kv.pull_tree({"n": torch.empty(2), "t": ones(2)})
        assert isinstance(like["n"], torch.Tensor)
        assert isinstance(like["t"], np.ndarray)
        assert (like["n"].tolist(), like["t"].tolist()) == ([2, 2], [3, 3])

    def test_a_tree_is_filled(self, kv):
        module = torch.nn.Linear(2, 1)
        kv.init_tree(module.state_dict(), prefix="head")
        kv.push_tree({"weight": torch.full((1, 2), 5.0), "bias": torch.ones(1)}, prefix="head")
        assert kv.pull_tree(into=module.state_dict(), prefix="head") is None
        assert (module.weight.tolist(), module.bias.tolist()) == ([[5, 5]], [1])
        with pytest.raises(tensorkv.ArgumentError, match="pull_tree: got like= and into="):
            kv.pull_tree({}, into={})

    @pytest.mark.parametrize("is_mixed", [False, True])
    def test_arrays_of_a_tree_choose_shapes_and_dtypes(self, kv, library, is_mixed):
        kv.init_tree({"a": library.make([1.5, 2]), "n": library.make([3], "int32")})
        other = np.zeros(1, np.int16) if is_mixed else library.make([0], "int16")
        pulled = kv.pull_tree({"a": library.make([0, 0], "float16"), "n": other})
        assert [str(pulled[name].dtype).removeprefix("torch.") for name in "an"] == ["float16", "int16"]
        assert [pulled[name].tolist() for name in "an"] == [[1.5, 2], [3]]
        for like, match in [
            ({"a": library.make([0] * 5), "n": other}, r'\("a"\): out 0 has shape \(5,\), .* \(2,\)'),
            ({"a": library.make([[0, 0]]), "n": other}, r'\("a"\): out 0 has shape \(1, 2\), .* \(2,\)'),
            ({"a": library.make([0, 0], "int32"), "n": other}, r'\("a"\): out 0 is int32'),
        ]:
            with pytest.raises(tensorkv.ValueMismatchError, match=match):
                kv.pull_tree(like)

    def test_a_tree_without_a_model_is_nested_dicts(self, kv):
        kv.init_tree({"policy": {"layers": [ones(1), 2 * ones(1)]}, "policy2": 3 * ones(1)})
        assert kv.pull_tree() == {"policy": {"layers": {"0": 1, "1": 2}}, "policy2": 3}
        assert kv.pull_tree(prefix="policy.layers") == {"0": 1, "1": 2}
        assert kv.pull_tree(prefix="policy2") == 3
        with pytest.raises(tensorkv.KeyNotFoundError, match='pull_tree: no key begins with "pol"'):
            kv.pull_tree(prefix="pol")
        kv.init("policy", ones(1))
        with pytest.raises(tensorkv.ArgumentError, match='pull_tree: "policy" is an array and part of another name'):
            kv.pull_tree()

    def test_a_tree_without_a_model_has_no_tables(self, kv):
        kv.init_tree({"net": {"w": ones(2)}, "table": Rows(np.array([2]), ones(1, 2), 9)})
        assert {name: value["w"].tolist() for name, value in kv.pull_tree().items()} == {"net": [1, 1]}
        assert kv.pull_tree(prefix="table") == {}
        if kv.is_capable("snapshot"):
            with kv.snapshot() as snapshot:
                assert list(snapshot.pull_tree()) == ["net"]
        with pytest.raises(tensorkv.ValueMismatchError, match=r'pull\("table"\): the key holds rows of a sparse table'):
            kv.pull_tree({"table": ones(9, 2)})

    def test_rows_in_a_tree(self, kv):
        kv.init_tree({"table": Rows(np.array([2]), ones(1, 2), 9), "w": ones(2)})
        kv.push_tree({"table": Rows(np.array([4]), ones(1, 2), 9), "w": ones(2)})
        assert kv.row_sparse_pull("table", row_ids=[2, 3, 4]).values[:, 0].tolist() == [1, 0, 1]

    def test_trees_that_do_not_fit(self, kv):
        kv.init_tree({"a": [ones(2), ones(2)], "b": ones(2)})
        before = state(kv)
        inside = []
        inside.append(inside)
        errors = [
            ({"a": [ones(2), 3.0]}, tensorkv.ArrayTypeError, r'push\("a\.1"\): part 0 is 3.0, not an array'),
            ({"a": [ones(2), "text"]}, tensorkv.ArrayTypeError, r'push\("a\.1"\)'),
            ({"a": [ones(2), ones(3)]}, tensorkv.ValueMismatchError, r'push\("a\.1"\): part 0 has shape \(3,\)'),
            ({"a": [ones(2), ones(3), ones(1)]}, tensorkv.ValueMismatchError, r'\("a\.1"\): part 0 has shape \(3,\)'),
            ({"c": ones(2), "d": 3.0}, tensorkv.ArrayTypeError, r'"d"\): part 0 is 3.0, not an array'),
            ({"a": [ones(2)], "a.0": ones(2)}, tensorkv.ArgumentError, 'push_tree: two leaves .* the path "a.0"'),
            (ones(2), tensorkv.ArgumentError, "push_tree: a leaf of the tree has no name; give a prefix"),
            ({"": ones(2)}, tensorkv.ArgumentError, "push_tree: a leaf of the tree has no name"),
            ({"a": inside}, tensorkv.ArgumentError, "push_tree: the tree contains itself"),
            ({"a": ones(2), 1: ones(2)}, tensorkv.ArgumentError, "push_tree: the tree cannot be flattened"),
        ]
        for tree, kind, match in errors:
            with pytest.raises(kind, match=match):
                kv.push_tree(tree)
        for others in ([{"a": [ones(2)]}], [{"a": (ones(2), ones(2)), "b": ones(2)}], [[ones(2)] * 3]):
            with pytest.raises(tensorkv.ArgumentError, match="trees 0 and 1 differ in structure"):
                kv.push_tree({"a": [ones(2), ones(2)], "b": ones(2)}, *others)
        with pytest.raises(tensorkv.ArgumentError, match="pushpull_tree: got no tree"):
            kv.pushpull_tree()
        with pytest.raises(tensorkv.ArgumentError, match="init_tree: prefix is 3; expected a str"):
            kv.init_tree({"c": ones(2)}, prefix=3)
        with pytest.raises(tensorkv.ArrayTypeError, match=r'init\("c\.0"\): the value is 1.5, not an array'):
            kv.init_tree({"d": ones(2), "c": [1.5]})
        with pytest.raises(tensorkv.KeyExistsError):
            kv.init_tree({"b": ones(2), "c": ones(2)})
        with pytest.raises(tensorkv.ArrayTypeError, match=r'pull_tree\("b"\): like is 3.0'):
            kv.pull_tree({"b": 3.0})
        assert state(kv) == before

    def test_a_closed_store_has_no_trees(self):
        kv = self.create()
        kv.close()
        for call in (kv.init_tree, kv.push_tree, kv.pull_tree, kv.pushpull_tree, kv.broadcast_tree):
            with pytest.raises(tensorkv.StoreClosedError):
                call({})

    # ---------------------------------------------------------------- JAX

    def test_jax_arrays_may_be_donated(self, kv):
        """Nothing of a store refers to an array that was pushed, nor to the memory of one that was pulled."""
        jax = pytest.importorskip("jax")
        add_one = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
        tree = {"f": jax.numpy.zeros(1000), "h": jax.numpy.zeros(1000, "bfloat16"), **sharded(jax)}

        def donate(given):
            moved = add_one(given)
            assert all(each.is_deleted() for each in jax.tree.leaves(given))
            return moved

        kv.init_tree(tree)
        pushed = donate(tree)
        kv.push_tree(pushed)
        pushed = donate(pushed)
        pulled = kv.pushpull_tree(pushed)
        donate(pushed)
        for _ in range(2):
            assert {float(x) for leaf in jax.tree.leaves(pulled) for x in (leaf.min(), leaf.max())} == {2}
            assert {float(x.max()) for x in jax.tree.leaves(donate(pulled))} == {3}
            pulled = kv.pull_tree(pushed)
        for call in (kv.push_tree, kv.pushpull_tree):
            with pytest.raises(tensorkv.ArrayTypeError, match=r'"divided"\): part 0 is a JAX array that was deleted'):
                call(pushed)
        assert kv.info("f").version == 2

    def test_jax_arrays_over_several_devices(self, kv):
        """An array counts once, on however many devices it is; parts are given as several trees."""
        jax = pytest.importorskip("jax")
        tree = sharded(jax)
        kv.init_tree(tree)
        ones_ = jax.tree.map(lambda x: x + 1, tree)
        pulled = kv.pushpull_tree(ones_)
        assert {float(x.sum()) for x in jax.tree.leaves(pulled)} == {12}
        per_device = [jax.device_put(jax.tree.map(np.asarray, ones_), device) for device in jax.devices()]
        pulled = kv.pushpull_tree(*per_device)
        assert {float(x.sum()) for x in jax.tree.leaves(pulled)} == {12 * len(per_device)}
        # The arrays of a tree choose where those of a pull are, and shapes alone do as well.
        structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
        for like in (tree, structs):
            again = kv.pull_tree(like)
            assert jax.tree.map(lambda x: x.sharding, again) == jax.tree.map(lambda x: x.sharding, tree)

    def test_modules_and_tied_tensors(self, kv):
        torch.manual_seed(2)
        trained, read = (torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(3))) for _ in range(2))
        for model in (trained, read):
            model[2].weight = model[0].weight
            model.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        kv.init_tree(trained, prefix="net")
        names = ["steps", "0.weight", "0.bias", "1.weight", "1.bias", "2.bias"]
        assert sorted(kv.keys()) == sorted(f"net.{name}" for name in names)
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(1)
            trained.steps.add_(1)
        kv.push_tree(trained, prefix="net")
        kv.pull_tree(into=read, prefix="net")
        for mine, other in zip(read.state_dict().values(), trained.state_dict().values(), strict=True):
            assert torch.equal(mine, other)
        assert read[2].weight is read[0].weight

    def test_modules_inside_of_a_tree(self, kv):
        torch.manual_seed(2)

        def made():
            found = {name: torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)) for name in ("pi", "v")}
            found["v"][0].weight = found["pi"][0].weight
            return {"nets": [found], "log_std": torch.zeros(1)}

        trained, read = made(), made()
        kv.init_tree(trained, prefix="rl")
        names = [f"{name}.{n}.{kind}" for name in ("pi", "v") for n in (0, 1) for kind in ("weight", "bias")]
        # The tied tensor has one key, with the first of its names.
        names.remove("v.0.weight")
        assert kv.keys() == ["rl.log_std", *(f"rl.nets.0.{name}" for name in names)]
        with torch.no_grad():
            trained["nets"][0]["v"][0].weight.add_(1)
            trained["nets"][0]["v"][1].bias.add_(2)
        kv.push_tree(trained, prefix="rl")
        kv.pull_tree(into=read, prefix="rl")
        for name in ("pi", "v"):
            mine, other = (tree["nets"][0][name].state_dict() for tree in (read, trained))
            assert all(torch.equal(mine[key], other[key]) for key in other)
        like = kv.pull_tree(read, prefix="rl")
        assert list(like["nets"][0]["v"]) == ["0.bias", "1.weight", "1.bias"]
        assert kv.pushpull_tree(trained, prefix="rl", rename={})["log_std"] == 0

    def test_arrays_by_other_names(self, kv, library):
        tree = {"a": library.make([1, 2]), "deep": {"b": library.make([3])}}
        kv.init_tree(tree, prefix="net", rename={"deep.b": "bias"})
        kv.init_tree(tree, rename=lambda path: f"copy/{path}")
        assert sorted(kv.keys()) == ["copy/a", "copy/deep.b", "net.a", "net.bias"]
        kv.push_tree({"a": library.make([5, 6])}, prefix="net", rename={})
        pulled = kv.pull_tree(tree, prefix="net", rename={"deep.b": "bias"})
        assert library.read(pulled["a"]).tolist() == [5, 6]
        assert library.read(pulled["deep"]["b"]).tolist() == [3]
        with pytest.raises(tensorkv.ArgumentError, match="two leaves of the tree have the path"):
            kv.init_tree(tree, rename=lambda path: "same")
        with pytest.raises(tensorkv.ArgumentError, match=r'rename gives "a" the name 3; expected a str'):
            kv.init_tree(tree, rename=lambda path: 3)
        with pytest.raises(tensorkv.ArgumentError, match=r"rename is 7; expected a mapping"):
            kv.init_tree(tree, rename=7)
        with pytest.raises(tensorkv.ArgumentError, match="rename and strict are for the arrays of like= or into="):
            kv.pull_tree(rename={})
        assert len(kv.keys()) == 4

    def test_a_tree_with_arrays_that_have_no_key(self, kv):
        kv.init_tree({"a": ones(2)})
        into = {"a": np.zeros(2, F32), "b": np.full(3, 7, F32)}
        with pytest.raises(tensorkv.KeyNotFoundError, match=r'pull."b".'):
            kv.pull_tree(into=into)
        assert into["a"].tolist() == [0, 0]
        kv.pull_tree(into=into, strict=False)
        assert into["a"].tolist() == [1, 1]
        assert into["b"].tolist() == [7, 7, 7]
        with pytest.raises(tensorkv.ArgumentError, match="pull_tree: strict is 1"):
            kv.pull_tree(into=into, strict=1)


def sharded(jax):
    """A tree of zeros, whole on each device or divided between all."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))

    def put(dtype, *axes):
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        return jax.device_put(np.zeros((12,), dtype), where)

    return {
        "replicated": put(F32),
        "divided": put(F32, "data"),
        "low": put("bfloat16", "data"),
        "every": put("bfloat16"),
    }
