"""Keys, values, lists and mappings of them, as callers may write them."""

from enum import Enum

import numpy as np
import pytest

import tensorkv

from .values import F32, ones


class Name(str, Enum):  # noqa: UP042 - str(Name.W) is not its value
    W = "w"
    B = "b"


class ArgumentContract:
    """Keys, values, lists and mappings of them, as callers may write them."""

    # ---------------------------------------------------------------- keys

    @pytest.mark.parametrize("key", ["w", "3", "a/b", "ключ", " ", 3, 0, -7, 2**70], ids=repr)
    def test_str_and_int_are_keys(self, kv, key):
        kv.init(key, ones(2))
        kv.push(key, 5 * ones(2))
        assert kv.pull(key).tolist() == [5, 5]
        assert kv.keys() == [key]
        assert key in kv

    @pytest.mark.parametrize("key", [np.int64(3), np.int32(3), np.uint8(3)], ids=repr)
    def test_numpy_integers_are_ints(self, kv, key):
        kv.init(key, ones(2))
        assert kv.keys() == [3]
        assert type(kv.keys()[0]) is int
        assert kv.pull(3).tolist() == [1, 1]
        assert key in kv

    def test_a_numpy_str_is_a_str(self, kv):
        kv.init(np.str_("w"), ones(1))
        assert type(kv.keys()[0]) is str

    def test_a_str_that_is_an_enum_is_its_value(self, kv):
        kv.init(Name.W, ones(2))
        kv.init_tree({"net": {Name.B: ones(1)}})
        assert kv.keys() == ["w", "net.b"]
        assert [type(key) for key in kv.keys()] == [str, str]
        assert Name.W in kv
        assert kv.info(Name.W) == kv.info("w")
        kv.push(Name.W, 2 * ones(2))
        kv.push([Name.W], {"w": 3 * ones(2)})
        kv.push(["w"], {Name.W: 4 * ones(2)})
        assert kv.pull([Name.W, "w"])[0].tolist() == [4, 4]
        pulled = kv.pushpull({Name.W: 5 * ones(2)})
        assert pulled[Name.W].tolist() == [5, 5]
        kv.push_tree({"net": {Name.B: 6 * ones(1)}})
        kv.push_tree({Name.W: 7 * ones(2)})
        kv.push_tree({"any": 8 * ones(2)}, rename={"any": Name.W})
        into = {Name.W: np.zeros(2, F32), "net": {Name.B: np.zeros(1, F32)}}
        kv.pull_tree(into=into)
        assert (into[Name.W].tolist(), into["net"][Name.B].tolist()) == ([8, 8], [6])
        kv.delete(Name.W)
        assert kv.keys() == ["net.b"]
        assert Name.W not in kv

    @pytest.mark.parametrize("key", ["", True, False, np.True_, None, 1.0, 2j, b"w", object(), {1, 2}, np.ones(2)])
    def test_other_things_are_no_keys(self, kv, key):
        for call in (kv.init, kv.push):
            with pytest.raises(tensorkv.KeyTypeError):
                call(key, ones(2))
        with pytest.raises(TypeError):
            kv.pull(key)

    def test_one_store_has_one_key_type(self, kv):
        kv.init("3", ones(2))
        with pytest.raises(tensorkv.KeyTypeError, match="keys are str, got int"):
            kv.init(3, ones(2))
        with pytest.raises(tensorkv.KeyTypeError):
            kv.push(3, ones(2))
        with pytest.raises(tensorkv.KeyTypeError):
            kv.pull(3)
        assert 3 not in kv
        assert kv.keys() == ["3"]
        # An empty store takes keys of either type.
        kv.delete("3")
        kv.init(3, ones(2))
        with pytest.raises(tensorkv.KeyTypeError, match="keys are int, got str"):
            kv.push("3", ones(2))
        assert kv.keys() == [3]

    def test_mixed_types_in_one_call(self, kv):
        with pytest.raises(tensorkv.KeyTypeError, match="two types"):
            kv.init(["a", 1], [ones(1), ones(1)])
        assert len(kv) == 0

    # ---------------------------------------------------------------- forms

    def test_key_and_value(self, kv, library):
        kv.init("w", library.make([[1, 2, 3], [4, 5, 6]]))
        kv.push("w", library.make([[6, 5, 4], [3, 2, 1]]))
        assert library.read(kv.pull("w")).tolist() == [[6, 5, 4], [3, 2, 1]]

    def test_parts_are_summed(self, kv, library):
        kv.init("w", library.make([0, 0]))
        kv.push("w", [library.make([1, 2]), library.make([10, 20]), library.make([100, 200])])
        assert library.read(kv.pull("w")).tolist() == [111, 222]

    def test_lists_of_keys(self, kv, library):
        kv.init([5, 7, 9], [library.make([i]) for i in range(3)])
        kv.push([5, 7, 9], [library.make([10]), [library.make([1]), library.make([2])], library.make([30])])
        assert [library.read(x).tolist() for x in kv.pull([9, 5, 7])] == [[30], [10], [3]]

    def test_a_repeated_key_is_summed_also_interleaved(self, kv):
        kv.init(["a", "b"], [ones(1), ones(1)])
        kv.push(["a", "b", "a", "a"], [ones(1), 5 * ones(1), [ones(1), ones(1)], ones(1)])
        assert kv.pull("a").tolist() == [4]
        assert kv.pull("b").tolist() == [5]
        assert kv.info("a").version == 1

    def test_mappings(self, kv):
        kv.init({"a": ones(1), "b": 2 * ones(1)})
        kv.push({"a": [ones(1), ones(1)], "b": 7 * ones(1)})
        out = {"a": np.zeros(1, F32), "b": np.zeros(1, F32)}
        kv.pull(out)
        assert (out["a"].tolist(), out["b"].tolist()) == ([2], [7])
        pushed = kv.pushpull({"a": 4 * ones(1), "b": 5 * ones(1)})
        assert {key: value.tolist() for key, value in pushed.items()} == {"a": [4], "b": [5]}
        kv.pushpull(["a", "b", "a"], [ones(1)] * 3, out=out)
        assert (out["a"].tolist(), out["b"].tolist()) == ([2], [1])
        kv.pushpull({"a": ones(1), "b": ones(1)}, out={"b": out["b"], "a": out["a"]})
        assert (out["a"].tolist(), out["b"].tolist()) == ([1], [1])

    def test_tuples_ranges_and_views_are_lists_too(self, kv):
        values = {0: ones(1), 1: ones(1)}
        kv.init(range(2), (ones(1), ones(1)))
        kv.push((0, 1), [ones(1), ones(1)])
        assert [x.tolist() for x in kv.pull(values.keys())] == [[1], [1]]

    def test_no_keys_at_all(self, kv):
        kv.init([], [])
        kv.push([], [])
        assert kv.pull([]) == []
        kv.pull([], out=[])

    @pytest.mark.parametrize("verb", ["init", "push", "pushpull", "broadcast"])
    def test_unequal_lengths_name_both(self, kv, verb):
        if verb in ("push", "pushpull"):
            kv.init(["a", "b", "c"], [ones(1)] * 3)
        with pytest.raises(ValueError, match=r"3 keys and 2 values"):
            getattr(kv, verb)(["a", "b", "c"], [ones(1), ones(1)])
