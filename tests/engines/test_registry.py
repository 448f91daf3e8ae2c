"""Engines are found by name: built in, registered, or installed by others through an entry point."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv import engines
from tensorkv.engines.local import LocalEngine
from tensorkv.shard.shard import Shard

TINY = """
from tensorkv.engines.local import LocalEngine

class Doubling(LocalEngine):
    def __init__(self, *, times: int = 2) -> None:
        super().__init__(False)
        self.times = times

    def push(self, call):
        call.batch.parts = [parts * self.times for parts in call.batch.parts]
        self.push_parts(call.batch, call.priority)
"""


def test_an_installed_engine_is_found(tmp_path):
    """A distribution that declares an entry point, installed on a path of its own."""
    (tmp_path / "tinyengine.py").write_text(TINY)
    metadata = tmp_path / "tinyengine-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tinyengine\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[tensorkv.engines]\ndoubling = tinyengine:Doubling\n")
    script = """
        import sys
        sys.path.insert(0, sys.argv[1])
        import numpy as np, tensorkv
        assert "doubling" in tensorkv.engines.names()
        kv = tensorkv.create("doubling", times=3)
        kv.init("w", np.zeros(1))
        kv.push("w", np.ones(1))
        print(kv.type, kv.pull("w"))
        try:
            tensorkv.create("doubling", tmies=3)
        except tensorkv.ArgumentError as error:
            print(error)
        try:
            tensorkv.create("dubling")
        except tensorkv.EngineNotFoundError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.stderr == ""
    lines = shown.stdout.splitlines()
    assert lines[0] == "doubling [3.]"
    assert "its options are: times" in lines[1]
    assert 'did you mean "doubling"' in lines[2]


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(engines, "_factories", dict(engines._factories))
    return engines.register


def test_register(registered):
    registered("mine", lambda: LocalEngine(False))
    with tensorkv.create("mine") as kv:
        assert kv.type == "mine"
        assert kv.broadcast("w", np.ones(1)).tolist() == [1]
    assert "mine" in engines.names()
    for name, factory in (("mine", LocalEngine), ("local", LocalEngine), ("", LocalEngine), (3, LocalEngine), ("x", 3)):
        with pytest.raises(tensorkv.ArgumentError, match="register"):
            registered(name, factory)


@pytest.mark.parametrize("verb", ["push", "pull", "pushpull"])
def test_a_class_that_overrides_a_verb_sees_every_call(registered, verb):
    seen = []

    class Watching(LocalEngine):
        pass

    def watch(self, call):
        seen.append(call.verb)
        getattr(LocalEngine, verb)(self, call)

    setattr(Watching, verb, watch)
    registered("watching", lambda: Watching(False))
    keys, ones, outs = list(range(20)), [np.ones(1)] * 20, [np.zeros(1) for _ in range(20)]
    with tensorkv.create("watching") as kv:
        kv.init(keys, [np.zeros(1)] * 20)
        for _ in range(5):
            for key, value, out in ((keys, ones, outs), (3, ones[0], outs[0]), ([1, 2], ones[:2], outs[:2])):
                kv.push(key, value)
                kv.pull(key)
                kv.pull(key, out=out)
                kv.pushpull(key, value)
                kv.pushpull(key, value, out=out)
    assert seen == [verb] * (15 if verb == "push" else 30)


def test_the_least_that_an_engine_needs(registered):
    priorities = []

    class Least(engines.Engine):
        def __init__(self):
            self._shard = Shard()

        def init(self, keys, values, specs):
            self._shard.init(keys, values, specs)

        def push_parts(self, batch, priority):
            priorities.append(priority)
            self._shard.push(batch)

        def pull_into(self, keys, outs):
            self._shard.pull(keys, outs)

        def spec(self, verb, key):
            return self._shard.entry(verb, key).spec

        def info(self, keys):
            return [self._shard.entry("info", key).info() for key in keys]

        def keys(self):
            return self._shard.keys()

    registered("least", Least)
    kv = tensorkv.create("least")
    kv.init("w", np.zeros(2))
    assert kv.pushpull("w", np.ones(2)).tolist() == [1, 1]
    assert kv.pull("w", min_version=1, timeout_s=5).tolist() == [1, 1]
    assert ("w" in kv, len(kv), kv.rank, kv.num_workers, kv.optimizer, kv.dead_workers()) == (True, 1, 0, 1, None, [])
    # An engine gets ints, whatever the caller's are.
    kv.push("w", np.ones(2), priority=np.int64(3))
    kv.pushpull(["w"], [np.ones(2)], priority=torch.tensor(4))
    assert [(type(each), each) for each in priorities] == [(int, 0), (int, 3), (int, 4)]
    kv.barrier()
    kv.leave()
    for call in (
        lambda: kv.set_optimizer("sgd", lr=1.0),
        lambda: kv.set_updater(print),
        lambda: kv.set_hyperparameters(lr=1.0),
        lambda: kv.delete("w"),
        lambda: kv.save("somewhere"),
        lambda: kv.load("somewhere"),
        lambda: kv.snapshot(),
        lambda: kv.row_sparse_pull("w", row_ids=[0]),
    ):
        with pytest.raises(tensorkv.ArgumentError, match=r"^\w+: (this type of store cannot|a store of type)"):
            call()
    kv.close()


def test_a_factory_that_returns_something_else(registered):
    registered("something", lambda: object())
    with pytest.raises(tensorkv.ArgumentError, match=r"the factory returned .*; expected a tensorkv.engines.Engine"):
        tensorkv.create("something")


def test_the_names_of_this_version():
    assert {"local", "local_allreduce_cpu", "local_update_cpu", "device", "local_allreduce_device", "nccl"} <= set(
        engines.names()
    )


def test_unknown_names_list_what_exists():
    with pytest.raises(tensorkv.EngineNotFoundError, match=r'did you mean "local".*device, .*local, .*nccl'):
        tensorkv.create("loca")
