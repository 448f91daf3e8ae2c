"""Every form that callers may write becomes keys without repeats and a list of arrays for each."""

import enum

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv import Embedding, LocalTrainer, Rows, Trainer
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
    "pairs": (
        [("a", 1)],
        None,
        KeyTypeError,
        r"\[\('a', 1\)\]; expected str or int; for pairs of key and value, pass a map",
    ),
    "items": ({"a": 1}.items(), None, KeyTypeError, r"pass a mapping, dict\(...\)"),
    "keys alone": (["a"], None, ArgumentError, "one for each key, or in place of both a mapping of key to value$"),
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


NUMBERS = [np.int64(3), np.uint8(3), np.array(3), np.array([3]), torch.tensor(3)]


class Size(enum.IntEnum):
    SMALL = 3


@pytest.mark.parametrize("number", [3, Size.SMALL, *NUMBERS], ids=repr)
def test_ints_of_libraries_are_ints(number):
    found = arguments.check_int("size", number, 1)
    assert (type(found), found) == (int, 3)


@pytest.mark.parametrize("number", [True, np.True_, torch.tensor(True), 3.0, np.float32(3), "3", None, np.arange(3), 0])
def test_what_is_no_int_in_range(number):
    with pytest.raises(ArgumentError, match=r"^size is .*; expected an int of at least 1, or None$"):
        arguments.check_int("size", number, 1, ", or None")


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_calls_take_the_ints_of_libraries(number):
    three = torch.ones(3, 2)
    with tensorkv.create(threads=np.int64(2)) as kv:
        kv.init("t", Rows(np.array([1]), np.ones((1, 2)), number, init="normal", seed=number))
        assert kv.info("t").shape == (3, 2)
        kv.init("u", Rows(np.array([1]), np.ones((1, 2)), Size.SMALL, init=np.array(0.5)))
        kv.init("v", Rows(np.array([1]), np.ones((1, 2)), 3, init="normal", std=torch.tensor(0.5)))
        kv.init("w", three)
        for _ in range(3):
            kv.push("w", three, priority=number)
        assert kv.pull("w", min_version=number, timeout_s=number).tolist() == three.tolist()
        assert kv.pull("w", priority=number).tolist() == three.tolist()
        kv.publish("first", keep=number)
        layer = Embedding(kv, "e", number, number, padding_idx=number - 1)
        assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (3, 3, 2)
        assert all(type(each) is int for each in (layer.num_embeddings, layer.embedding_dim, layer.padding_idx))
    model = torch.nn.Linear(2, 1)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    assert LocalTrainer(model, tensorkv.create(), inner, every=number)._every == 3


@pytest.mark.parametrize("rate", [np.float32(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor([0.5])], ids=repr)
def test_learning_rates_are_numbers_of_any_library(rate):
    kv = tensorkv.create()
    trainer = Trainer(torch.nn.Linear(2, 1), kv, "sgd", lr=rate)
    assert trainer.learning_rate == 0.5
    for change in (
        lambda: kv.set_hyperparameters(lr=rate),
        lambda: setattr(trainer, "learning_rate", rate),
        lambda: trainer.optimizer.param_groups[0].update(lr=rate),
    ):
        trainer.learning_rate = 0.1
        change()
        trainer.optimizer.flush()
        assert (kv.optimizer["lr"], type(kv.optimizer["lr"])) == (0.5, float)
