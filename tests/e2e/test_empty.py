"""Values without elements, tables without rows and keys without a push: in checkpoints, states, folders, snapshots."""

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv import Rows
from tensorkv.shard.optimizers import CLASSES, ROWWISE

NO_IDS = torch.zeros(0, dtype=torch.int64)
VALUES = {
    "flat": lambda: torch.zeros(0),
    "no columns": lambda: torch.zeros(3, 0),
    "half": lambda: np.zeros((0, 3), np.float16),
    "bfloat16": lambda: torch.zeros(0, 2, dtype=torch.bfloat16),
    "complex": lambda: torch.zeros(0, 2, dtype=torch.complex64),
    "integers": lambda: np.zeros(0, np.int32),
    "bool": lambda: np.zeros(0, bool),
    "one": lambda: torch.ones(1, 1),
    "unseen": lambda: Rows(NO_IDS, torch.zeros(0, 2), 5),
    "no rows": lambda: Rows(NO_IDS, torch.zeros(0, 2), 0),
    "no width": lambda: Rows(torch.tensor([1, 3]), torch.zeros(2, 0), 5),
}


def may_push(name, optimizer):
    if optimizer is None:
        return True
    if name in ("integers", "bool"):
        return False
    value = VALUES[name]()
    if optimizer not in ROWWISE and (isinstance(value, Rows) or name == "complex"):
        return False
    return optimizer != "muon" or value.ndim == 2


def fill(kv, names, optimizer, pushed):
    kv.init(names, [VALUES[name]() for name in names])
    if optimizer is not None:
        kv.set_optimizer(optimizer, lr=0.1, **({"momentum": 0.9} if optimizer == "sgd" else {}))
    push(kv, pushed, optimizer)


def push(kv, names, optimizer):
    for name in names:
        if may_push(name, optimizer):
            kv.push(name, [VALUES[name]()] * 2)


def state(kv):
    """Return everything that can be seen of a store."""
    found = []
    for key in kv.keys():
        info = kv.info(key)
        pulled = kv.row_sparse_pull(key, row_ids=range(info.shape[0])) if info.kind == "rows" else kv.pull(key)
        found.append((key, info, type(pulled), (pulled.values if isinstance(pulled, Rows) else pulled).tolist()))
    return found


@pytest.mark.parametrize("pushed", [[], ["flat"], ["unseen"], list(VALUES)], ids=["none", "empty", "table", "all"])
@pytest.mark.parametrize("optimizer", [None, "sgd", "adam", "nadam", "adafactor", "muon"])
def test_every_way_out_and_back(optimizer, pushed, tmp_path):
    """A store goes on from a checkpoint, from states and from its folder as one that was never closed."""
    assert optimizer is None or optimizer in CLASSES
    with tensorkv.create() as kv, tensorkv.create() as other:
        fill(kv, list(VALUES), optimizer, pushed)
        kv.save(tmp_path / "store")
        other.load(tmp_path / "store")
        assert state(other) == state(kv)
        if optimizer is not None:
            kv.save_optimizer_states(tmp_path / "states")
            other.load_optimizer_states(tmp_path / "states")
        with kv.snapshot() as moment:
            before = state(kv)
            push(kv, VALUES, optimizer)
            assert [moment.pull(key).tolist() for key in ("flat", "one")] == [before[0][3], before[7][3]]
        push(other, VALUES, optimizer)
        assert state(other) == state(kv)
        for log_nbytes in (None, 300):
            folder = tmp_path / f"folder {log_nbytes}"
            with tensorkv.create("local", path=folder, log_nbytes=log_nbytes) as kept:
                fill(kept, list(VALUES), optimizer, pushed)
            with tensorkv.create("local", path=folder) as kept:
                push(kept, VALUES, optimizer)
                assert state(kept) == state(kv)
                kept.load(tmp_path / "store")
            with tensorkv.create("local", path=folder) as kept:
                push(kept, VALUES, optimizer)
                assert state(kept) == state(kv)


@pytest.mark.parametrize("optimizer", [None, "adam"])
def test_a_store_without_keys(optimizer, tmp_path):
    for _ in range(2):
        with tensorkv.create("local", path=tmp_path / "folder") as kv:
            assert kv.keys() == []
            if optimizer is not None:
                kv.set_optimizer(optimizer)
                kv.save_optimizer_states(tmp_path / "states")
                kv.load_optimizer_states(tmp_path / "states")
            kv.save(tmp_path / "store")
            kv.load(tmp_path / "store")
            with kv.snapshot() as moment:
                assert moment.keys() == []
            kv.init("w", torch.zeros(0))
            kv.push("w", torch.zeros(0))
            kv.delete("w")
