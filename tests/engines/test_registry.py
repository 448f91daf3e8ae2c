"""Engines are found by name: built in, registered, or installed by others through an entry point."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest

import tensorkv
from tensorkv import engines
from tensorkv.engines.local import LocalEngine

TINY = """
from tensorkv.engines.local import LocalEngine

class Doubling(LocalEngine):
    def __init__(self, *, times: int = 2) -> None:
        super().__init__(False)
        self.times = times

    one = many = None

    def push(self, batch, priority):
        batch.parts = [parts * self.times for parts in batch.parts]
        super().push(batch, priority)
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
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
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


def test_an_engine_without_the_short_way(registered):
    class Plain(LocalEngine):
        one = many = None

    registered("plain", lambda: Plain(False))
    keys = list(range(20))
    with tensorkv.create("plain") as kv:
        kv.init(keys, [np.zeros(1)] * 20)
        for _ in range(4):
            kv.push(keys, [np.ones(1)] * 20)
        assert [x.tolist() for x in kv.pull(keys)] == [[1]] * 20


def test_the_names_of_this_version():
    assert {"local", "local_allreduce_cpu", "local_update_cpu", "device", "local_allreduce_device", "nccl"} <= set(
        engines.names()
    )


def test_unknown_names_list_what_exists():
    with pytest.raises(tensorkv.EngineNotFoundError, match=r'did you mean "local".*device, .*local, .*nccl'):
        tensorkv.create("loca")
