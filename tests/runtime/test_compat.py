"""Each private part of torch that tensorkv uses: it is there, and does what it is used for."""

import ast
import inspect
import re
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

import tensorkv
from tensorkv.runtime import _compat

SOURCES = Path(tensorkv.__file__).parent
OPERATORS = {
    "torch._foreach_add",
    "torch._foreach_add_",
    "torch._foreach_copy_",
}


def private_names(source):
    """Return the private names of torch and Ray that a module uses, each up to its first private word."""
    modules, found = {}, []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [each.name for each in names]
                modules |= {each.asname or "": each.name for each in names}
            case ast.ImportFrom(module=str(module), names=names, level=0):
                found += [f"{module}.{each.name}" for each in names]
                modules |= {each.asname or each.name: f"{module}.{each.name}" for each in names}
            case ast.Attribute():
                found.append(ast.unparse(node))
            case ast.Call(func=ast.Attribute() as called, keywords=keywords):
                found += [f"{ast.unparse(called)}.{each.arg}" for each in keywords]
    private = set()
    for name in filter(re.compile(r"[\w.]+").fullmatch, found):
        root, *rest = name.split(".")
        root, *rest = [*modules.get(root, root).split("."), *rest]
        at = next(
            (at for at, word in enumerate(rest, start=1) if word.startswith("_") and not word.endswith("__")), None
        )
        if root in ("torch", "ray") and at is not None:
            private.add(".".join([root, *rest[:at]]))
    return private


def test_private_names_are_used_in_one_place():
    assert private_names("import torch.distributed as dist\ndist.a._b.c") == {"torch.distributed.a._b"}
    assert private_names("from torch import distributed\ndistributed._b") == {"torch.distributed._b"}
    assert private_names("from ray._raylet import X\nimport torch\ntorch.ones") == {"ray._raylet"}
    assert private_names("import ray\nray.init(_plasma_directory=3)") == {"ray.init._plasma_directory"}
    used = {
        name for path in SOURCES.rglob("*.py") if path.name != "_compat.py" for name in private_names(path.read_text())
    }
    assert used <= OPERATORS, "use these through a module _compat"


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_operators_of_torch_optim(name):
    assert callable(getattr(torch, name.removeprefix("torch."), None)), f"this version of torch has no {name}"


def test_dispatch_modes_are_counted_and_suspended():
    assert _compat.num_dispatch_modes() == 0
    with FakeTensorMode():
        assert _compat.num_dispatch_modes() == 1
        with _compat.without_dispatch_modes():
            assert _compat.num_dispatch_modes() == 0
            assert type(torch.ones(1)) is torch.Tensor
        assert type(torch.ones(1)) is not torch.Tensor


def test_the_store_of_the_default_group_is_found():
    mine = dist.HashStore()
    dist.init_process_group("gloo", store=mine, rank=0, world_size=1)
    try:
        before = mine.num_keys()
        # Under a key with a prefix of the group.
        _compat.default_rendezvous_store().set("key", "value")
        assert _compat.default_rendezvous_store().get("key") == b"value"
        assert mine.num_keys() == before + 1
    finally:
        dist.destroy_process_group()


def test_a_gloo_group_of_its_own_has_a_timeout():
    device = dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")
    group = _compat.gloo_group(dist.HashStore(), 0, 1, device, 7.0)
    assert (group.rank(), group.size()) == (0, 1)
    assert not dist.is_initialized()
    assert group.options._timeout == timedelta(seconds=7)
    into = [torch.zeros(2)]
    group.allgather([into], [torch.ones(2)]).wait()
    assert into[0].tolist() == [1, 1]


def test_increment_version_takes_many_tensors():
    outs = [torch.zeros(1), torch.zeros(1)]
    _compat.increment_version(outs)
    assert [out._version for out in outs] == [1, 1]


def test_optimizers_ask_for_graphs_in_methods_that_can_be_replaced():
    step = inspect.getsource(inspect.unwrap(torch.optim.Adam.step))
    asked = [name for name in _compat.GRAPH_CHECKS if f"self.{name}()" in step]
    assert asked
    assert all(hasattr(torch.optim.Optimizer, name) for name in asked)
