"""What a store offers beside its verbs, and its life."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch

import tensorkv


@pytest.fixture
def kv():
    with tensorkv.create() as store:
        store.init("w", np.ones(2))
        yield store


@pytest.mark.parametrize("how", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_store_cannot_be_pickled_or_copied(kv, how):
    with pytest.raises(TypeError, match="create one in each process"):
        how(kv)


def test_the_optimizer_as_a_dict(kv):
    assert kv.optimizer is None
    kv.set_optimizer(torch.optim.SGD, lr=0.5, clip_gradient=3)
    shown = kv.optimizer
    assert (shown["name"], shown["lr"], shown["clip_gradient"], shown["rescale_grad"]) == ("sgd", 0.5, 3.0, 1.0)
    shown["lr"] = 99
    assert kv.optimizer["lr"] == 0.5


def test_an_updater_replaces_the_optimizer_and_the_other_way_round(kv):
    kv.set_optimizer("sgd", lr=1.0)
    kv.set_updater(lambda key, received, stored: np.add(stored, received, out=stored))
    assert kv.optimizer is None
    assert kv.pushpull("w", np.ones(2)).tolist() == [2, 2]
    kv.set_optimizer("sgd", lr=1.0)
    assert kv.pushpull("w", np.ones(2)).tolist() == [1, 1]


def test_membership(kv):
    assert "w" in kv
    for other in ("v", 3, True, None, 1.5, ["w"]):
        assert other not in kv


def test_delete_forgets_state_counts_and_numbers(kv):
    kv.set_optimizer("sgd", lr=1.0, momentum=0.5)
    kv.set_hyperparameters(lr=0.0, keys="w")
    kv.push("w", np.ones(2))
    kv.delete(["w", "w"])
    assert kv.stats()["keys"] == {}
    kv.init("w", np.ones(2))
    assert kv.pushpull("w", np.ones(2)).tolist() == [0, 0], "neither the old momentum nor the key's own lr"


def test_close_in_with_and_out_of_it():
    with tensorkv.create() as kv:
        kv.close()
    with pytest.raises(tensorkv.StoreClosedError):
        "w" in kv  # noqa: B015
    with pytest.raises(ZeroDivisionError), tensorkv.create() as kv:
        1 / 0  # noqa: B018
    assert repr(kv) == "KVStore('local', closed)"


def test_close_lets_go_of_the_values(kv):
    kv.push("w", np.ones(2))
    value = weakref.ref(kv._engine._shard.entry("pull", "w").value)
    kv.close()
    gc.collect()
    assert value() is None
