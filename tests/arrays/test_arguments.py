"""Every form that callers may write becomes keys without repeats and a list of arrays for each."""

import numpy as np
import pytest

from tensorkv.arrays import arguments
from tensorkv.arrays.arguments import check_key, is_key
from tensorkv.errors import ArgumentError, KeyExistsError, KeyTypeError

FORMS = {
    "one": (("a", 1), (["a"], [[1]])),
    "parts": (("a", [1, 2]), (["a"], [[1, 2]])),
    "tuple of parts": (("a", (1, 2)), (["a"], [[1, 2]])),
    "keys": ((["a", "b"], [1, 2]), (["a", "b"], [[1], [2]])),
    "keys and parts": ((["a", "b"], [[1, 2], 3]), (["a", "b"], [[1, 2], [3]])),
    "repeated": ((["b", "a", "b"], [1, 2, [3, 4]]), (["b", "a"], [[1, 3, 4], [2]])),
    "mapping": (({"a": 1, "b": [2, 3]}, None), (["a", "b"], [[1], [2, 3]])),
    "mapping of outs": ((["b", "a"], {"a": 1, "b": 2}), (["b", "a"], [[2], [1]])),
    "ints": (((5, np.int8(7)), [1, 2]), ([5, 7], [[1], [2]])),
    "nothing": (([], []), ([], [])),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    (key, value), expected = FORMS[form]
    assert arguments.pairs("push", "value", key, value) == expected


BAD = {
    "lengths": (["a", "b"], [1], ArgumentError, "2 keys and 1 value;"),
    "not a list": (["a", "b"], 1, ArgumentError, "expected a list of 2"),
    "a generator": (["a"], (x for x in [1]), ArgumentError, "generator"),
    "empty": ("a", [], ArgumentError, "empty list"),
    "nested": ("a", [[1]], ArgumentError, r"value 0 is \[1\]"),
    "nested in a list": (["a"], [[[1]]], ArgumentError, r"value 0 is \[1\]"),
    "mapping and value": ({"a": 1}, 2, ArgumentError, "mapping"),
    "mapping of other keys": (["a"], {"b": 1}, ArgumentError, "mapping"),
    "a set": ({"a"}, [1], KeyTypeError, "{'a'}"),
    "bytes": (b"a", 1, KeyTypeError, "b'a'"),
    "bool": (True, 1, KeyTypeError, "True"),
    "two types": (["a", 1], [1, 2], KeyTypeError, "two types"),
    "two types, mapping": ({"a": 1, 1: 2}, None, KeyTypeError, "two types"),
    "nested keys": ([["a"]], [1], KeyTypeError, "invalid key"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_forms(case):
    key, value, error, says = BAD[case]
    with pytest.raises(error, match=says):
        arguments.pairs("push", "value", key, value)


def test_the_callers_lists_are_left_alone():
    parts, values = [1, 2], [[1, 2], 3, 4]
    arguments.pairs("push", "value", "a", parts)[1][0].append(9)
    arguments.pairs("push", "value", ["a", "b", "a"], values)[1][0].append(9)
    assert (parts, values) == ([1, 2], [[1, 2], 3, 4])


def test_single_values():
    assert arguments.single_values("init", "a", 1) == (["a"], [1])
    assert arguments.single_values("init", {"a": 1, "b": 2}, None) == (["a", "b"], [1, 2])
    with pytest.raises(KeyExistsError, match="twice"):
        arguments.single_values("init", ["a", "b", "a"], [1, 2, 3])
    for key, value in [("a", [1]), (["a"], [[1]]), (["a"], [[1, 2]]), ({"a": (1,)}, None), (["a"], {"a": [1]})]:
        with pytest.raises(ArgumentError, match=r'init\("a"\): got .*; expected one array, the value'):
            arguments.single_values("init", key, value)


def test_keys_of_keeps_repeats():
    assert arguments.keys_of("pull", ["a", "b", "a"]) == ["a", "b", "a"]
    assert arguments.keys_of("pull", "a") == ["a"]
    with pytest.raises(KeyTypeError):
        arguments.keys_of("pull", ["a", 1])


@pytest.mark.parametrize(
    ("given", "plain"), [("w", "w"), (np.str_("w"), "w"), (3, 3), (np.uint8(3), 3), (-1, -1)], ids=repr
)
def test_keys_become_plain(given, plain):
    assert check_key("push", given) == plain
    assert type(check_key("push", given)) is type(plain)
    assert is_key(given)


@pytest.mark.parametrize("given", ["", True, np.False_, None, 1.0, b"w", ["w"], ("w",)], ids=repr)
def test_invalid_keys_are_refused(given):
    with pytest.raises(KeyTypeError, match="push"):
        check_key("push", given)
