"""What each process of a mesh does: pulls into DTensors and pushes of DTensors, of whole values.

Run by ``torchrun`` with the numbers of processes along each axis of the mesh, and the name of a store on servers, if
pushes are to go there.
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


def push_all(kv, mesh):
    """Push DTensors of all placements; each value is that of the whole, whatever several processes have of it."""
    count = 0
    rank = dist.get_rank()
    for number, shape in enumerate([*SHAPES, ()]):
        if rank == 0 or kv.type == "dist_sync":
            kv.init(f"p{number}", torch.zeros(shape))
        dist.barrier()
        choices = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
        for placements in itertools.product(choices, repeat=mesh.ndim):
            value = torch.randn(shape, generator=torch.Generator().manual_seed(count))
            given = distribute_tensor(value, mesh, placements)
            kv.push(f"p{number}", given)
            dist.barrier()
            assert torch.equal(kv.pull(f"p{number}"), value), (shape, placements)
            dist.barrier()
            count += 1
    model = {"layer": distribute_tensor(torch.arange(12.0).reshape(4, 3), mesh, [Shard(0)] * mesh.ndim)}
    kv.push_tree(model, prefix="model")
    dist.barrier()
    assert torch.equal(kv.pull("model.layer"), torch.arange(12.0).reshape(4, 3))
    dist.barrier()
    return count


def refuse_pushes(kv, mesh):
    """A slice that one process lacks, and one that two have: every process gets the same error."""
    rank, size = dist.get_rank(), dist.get_world_size()
    kv.init("q", torch.zeros(size))
    for place, error in ((rank // 2, tensorkv.ValueMismatchError), (max(rank, 1), tensorkv.ValueMismatchError)):
        with pytest.raises(error, match="overlaps"):
            kv.push("q", tensorkv.TensorSlice(torch.ones(1), (place,), (size,)))
    with pytest.raises(tensorkv.IncompleteValueError, match=r"lacks \[0:1\]"):
        kv.push("q", tensorkv.TensorSlice(torch.ones(1 if rank else 0), (rank,), (size,)))
    assert not kv.pull("q").any()
    kv.push("q", tensorkv.TensorSlice(torch.ones(1), (rank,), (size,)))
    assert kv.pull("q").all()


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


def pull_between_forward_and_backward(kv, mesh):
    """A pull into a DTensor that autograd has saved is a change in place."""
    kv.init("saved", np.full((4, 2), 5, np.float32))
    out = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)] * mesh.ndim)
    x = distribute_tensor(torch.ones(3, 2), mesh, [Replicate()] * mesh.ndim).requires_grad_()
    for pull in (lambda: kv.pull("saved", out=out), lambda: kv.pull_tree(into={"saved": out})):
        loss = torch.nn.functional.linear(x, out).sum()
        pull()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


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
    sizes = [int(each) for each in sys.argv[1:] if each.isdecimal()]
    mesh = init_device_mesh("cpu", tuple(sizes))
    if len(sizes) < len(sys.argv) - 1:
        with tensorkv.create("dist_async", name=sys.argv[-1], num_servers=2) as kv:
            print(f"{push_all(kv, mesh)} DTensors pushed", flush=True)
        dist.destroy_process_group()
        return
    with tensorkv.create("dist_sync") as kv:
        print(f"{push_all(kv, mesh)} DTensors pushed", flush=True)
        refuse_pushes(kv, mesh)
    with tensorkv.create() as kv:
        count = pull_all(kv, mesh)
        pull_module(kv, mesh)
        pull_between_forward_and_backward(kv, mesh)
        refuse(kv, mesh)
    print(f"{count} DTensors", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
