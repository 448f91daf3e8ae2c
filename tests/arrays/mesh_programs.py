"""What each process of a mesh does: pulls into DTensors, which then have what the whole value has.

Run by ``torchrun`` with the numbers of processes along each axis of the mesh.
"""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import tensorkv

# Even, uneven, fewer rows than processes, and without elements.
SHAPES = [(8, 4), (7, 3), (3, 5), (1, 2), (0, 3), (5,)]


def pull_all(kv, mesh):
    """Pull each value into DTensors of all placements."""
    count = 0
    for number, shape in enumerate(SHAPES):
        value = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape) + number
        kv.init(f"v{number}", value)
        choices = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
        for placements in itertools.product(choices, repeat=mesh.ndim):
            out = distribute_tensor(torch.full(shape, -1.0), mesh, placements)
            kv.pull(f"v{number}", out=out)
            assert torch.equal(out.full_tensor(), value), (shape, placements)
            out.zero_()
            kv.push(f"v{number}", value)
            kv.pushpull([f"v{number}"], [value], out=[out])
            assert torch.equal(out.full_tensor(), value), (shape, placements)
            count += 1
    return count


def pull_module(kv, mesh):
    """Pull a tree into a module whose parameters are DTensors, two of them tied."""

    def module():
        made = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 7), "b": torch.nn.Linear(3, 7), "c": torch.nn.Linear(3, 7)})
        made["b"].weight = made["a"].weight
        return made

    # All processes have stores of the same values.
    torch.manual_seed(0)
    whole, mine = module(), module()
    kv.init_tree(whole, prefix="net")
    own = {
        id(p): torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)] * mesh.ndim))
        for p in mine.parameters()
    }
    for layer in mine.values():
        layer.weight, layer.bias = own[id(layer.weight)], own[id(layer.bias)]
    assert mine["b"].weight is mine["a"].weight
    kv.pull_tree(into=mine, prefix="net")
    for name, param in whole.named_parameters():
        found = mine.get_parameter(name)
        assert isinstance(found, DTensor)
        assert torch.equal(found.full_tensor(), param), name
    kv.publish("first")
    with torch.no_grad():
        for param in mine.parameters():
            param.zero_()
    with kv.open_release("first") as release:
        release.pull_tree(into=mine, prefix="net")
    assert all(torch.equal(mine.get_parameter(name).full_tensor(), param) for name, param in whole.named_parameters())


def refuse(kv, mesh):
    """DTensors that are sums in parts, of other shapes, or that are pushed."""
    kv.init("w", np.ones((4, 2), np.float32))
    local = torch.zeros(4, 2)
    for bad, error, said in (
        (DTensor.from_local(local, mesh, [Partial()] * mesh.ndim), tensorkv.ArrayTypeError, "placement Partial"),
        (distribute_tensor(torch.zeros(8, 2), mesh, [Shard(0)] * mesh.ndim), tensorkv.ValueMismatchError, "expected"),
    ):
        with pytest.raises(error, match=said):
            kv.pull("w", out=bad)
    assert not local.any()


def main():
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", tuple(map(int, sys.argv[1:])))
    with tensorkv.create() as kv:
        count = pull_all(kv, mesh)
        pull_module(kv, mesh)
        refuse(kv, mesh)
    print(f"{count} DTensors", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
