"""What workers do with a LocalTrainer, and the published algorithm in plain tensors."""

import copy
import threading

import torch

import tensorkv
from tensorkv import LocalTrainer

ROUNDS, EVERY = 4, 3


# Workers may be threads, which share torch's generator.
_seeding = threading.Lock()


def model():
    with _seeding:
        torch.manual_seed(7)
        return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


def loss(net, worker, step):
    """The loss of a worker's batch."""
    chance = torch.Generator().manual_seed(100 * worker + step)
    inputs, targets = torch.randn(6, 5, generator=chance), torch.randn(6, 2, generator=chance)
    return (net(inputs) - targets).square().mean()


def inner_of(net):
    return torch.optim.AdamW(net.parameters(), lr=0.02)


def train(kv, worker, **options):
    """Train by a LocalTrainer; return the parameters after each outer step, flat."""
    net = model()
    inner = inner_of(net)
    trainer = LocalTrainer(net, kv, inner, every=EVERY, **options)
    seen = []
    for step in range(ROUNDS * EVERY):
        inner.zero_grad()
        loss(net, worker, step).backward()
        if trainer.step():
            seen.append(torch.cat([each.detach().flatten().clone() for each in net.parameters()]))
    return seen


def published(workers, *, lr=0.7, momentum=0.9, nesterov=True, lasts=None):
    """Algorithm 1 of the paper, step by step, with torch's own outer optimizer.

    Args:
        workers: how many.
        lr, momentum, nesterov: of the outer optimizer.
        lasts: how many rounds each worker takes part in.
    """
    common = model()
    outer = torch.optim.SGD(common.parameters(), lr=lr, momentum=momentum, nesterov=nesterov)
    nets = [copy.deepcopy(common) for _ in range(workers)]
    inners = [inner_of(net) for net in nets]
    seen = []
    for turn in range(ROUNDS):
        there = [worker for worker in range(workers) if lasts is None or turn < lasts[worker]]
        for worker in there:
            nets[worker].load_state_dict(common.state_dict())
            for step in range(turn * EVERY, (turn + 1) * EVERY):
                inners[worker].zero_grad()
                loss(nets[worker], worker, step).backward()
                inners[worker].step()
        for place, parameter in enumerate(common.parameters()):
            deltas = [parameter.detach() - list(nets[worker].parameters())[place].detach() for worker in there]
            parameter.grad = sum(deltas[1:], start=deltas[0]) / len(there)
        outer.step()
        seen.append(torch.cat([each.detach().flatten().clone() for each in common.parameters()]))
    return seen


def averaged(workers):
    """The mean of all workers' parameters after each round."""
    nets = [model() for _ in range(workers)]
    inners = [inner_of(net) for net in nets]
    seen = []
    for turn in range(ROUNDS):
        for worker, (net, inner) in enumerate(zip(nets, inners, strict=True)):
            for step in range(turn * EVERY, (turn + 1) * EVERY):
                inner.zero_grad()
                loss(net, worker, step).backward()
                inner.step()
        with torch.no_grad():
            for own in zip(*(net.parameters() for net in nets), strict=True):
                mean = sum([each.clone() for each in own[1:]], start=own[0].clone()) / workers
                for each in own:
                    each.copy_(mean)
        seen.append(torch.cat([each.detach().flatten().clone() for each in nets[0].parameters()]))
    return seen


def on_workers(options):
    """Train on the workers of a dist_sync store."""
    with tensorkv.create("dist_sync", reduce="mean") as kv:
        return [each.tolist() for each in train(kv, kv.rank, **options)]


def leaves_early():
    """Rank 1 stops after two rounds."""
    with tensorkv.create("dist_sync", reduce="mean") as kv:
        net = model()
        inner = inner_of(net)
        trainer = LocalTrainer(net, kv, inner, every=EVERY)
        for step in range(EVERY * (2 if kv.rank else ROUNDS)):
            inner.zero_grad()
            loss(net, kv.rank, step).backward()
            trainer.step()
        found = torch.cat([each.detach().flatten() for each in net.parameters()]).tolist()
        kv.leave()
        return found


def sums():
    """A store that would take sums."""
    with tensorkv.create("dist_sync") as kv:
        net = model()
        try:
            LocalTrainer(net, kv, inner_of(net), every=2)
        except tensorkv.ArgumentError as error:
            return str(error)
        return "nothing was raised"
