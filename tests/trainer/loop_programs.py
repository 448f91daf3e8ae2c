"""Accumulation, parameters without a gradient, and buffers, beside the same loop over ``torch.optim``.

Every program runs in one process with a ``local`` store, and in each worker of a team with ``dist_sync``.
"""

import contextlib
import copy
import threading

import torch
from torch import nn

import tensorkv
from tensorkv import Trainer
from tensorkv.trainer import overlap as overlap_module
from tests.trainer.optimizer_programs import RANK, SIZE, Run, make_batch

NUMBERS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}


def accumulate(store, update_on_store, overlap, replicas):
    """Add the gradients of three batches up before each step."""
    numbers = {"lr": 0.1, "momentum": 0.9}
    with Run(store, "sgd", numbers, replicas, update_on_store=update_on_store, overlap=overlap) as run:
        for step in range(5):
            run.zero_grad()
            with run.trainer.no_sync():
                losses = [run.backward(3 * step + micro, 1 / 3) for micro in range(2)]
            losses.append(run.backward(3 * step + 2, 1 / 3))
            run.expected.step()
            run.trainer.step()
            for pair in losses:
                run.check(pair)
    return 5


def accumulations(store):
    return [
        accumulate(store, update_on_store, overlap, replicas)
        for update_on_store in (True, False)
        for overlap in (True, False)
        for replicas in (1, 2)
    ]


class Crossed(nn.Module):
    """Layers that are used in another order than they are defined, and than on other workers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x):
        layers = [self.b, self.a, self.c] if RANK == 0 else [self.c, self.b, self.a]
        for layer in layers:
            x = layer(x)
        return x


def order(store):
    """Return the pushes of three steps, each with whether it was made within backward."""
    before, overlap_module.BUCKET_NBYTES = overlap_module.BUCKET_NBYTES, 1
    try:
        torch.manual_seed(0)
        model = Crossed()
        with tensorkv.create(store) as kv:
            trainer = Trainer(model, kv, "sgd", lr=0.1, overlap=True)
            pushes, lock, in_backward, push = [], threading.Lock(), threading.Event(), kv.push

            def spy(keys, *args, **options):
                with lock:
                    pushes[-1].append((*keys, in_backward.is_set()))
                return push(keys, *args, **options)

            kv.push = spy
            for _ in range(3):
                pushes.append([])
                trainer.zero_grad()
                loss = model(torch.ones(2, 4)).square().sum()
                in_backward.set()
                loss.backward()
                in_backward.clear()
                trainer.step()
        return pushes
    finally:
        overlap_module.BUCKET_NBYTES = before


class Branches(nn.Module):
    """A layer that is always used, and branches of which one, or none, is used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Linear(6, 4)
        self.branches = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))
        self.rows = nn.Embedding(5, 4, sparse=True)

    def forward(self, x, branch):
        h = self.stem(x).tanh()
        if branch % 2:
            h = h + self.rows(torch.tensor([branch, 4]))[0]
        return self.branches[branch](h)


def branch_of(worker, step):
    """Which branch a worker takes: different ones, then the same; the third rests in some steps."""
    return [(0, 1), (1, 0), (2, 2), (0, 0), (1, 2), (1, 1)][step % 6][worker % 2]


def unused(store, how, update_on_store, overlap=False, replicas=1):
    """Train with parameters that only some workers use, or nobody, in a step."""
    alone = Branches()
    mine = [copy.deepcopy(alone) for _ in range(replicas)]
    shares = SIZE * replicas
    # Torch steps rows of a sparse gradient without momentum and weight decay alone.
    plain = [param for name, param in alone.named_parameters() if name != "rows.weight"]
    expected = torch.optim.SGD(plain, **NUMBERS)
    sparse = torch.optim.SGD([alone.rows.weight], lr=0.1)
    with tensorkv.create(store) as kv:
        groups = [{"params": ["stem.*", "branches.*"]}, {"params": "rows.*", "momentum": 0, "weight_decay": 0}]
        options = {"update_on_store": update_on_store, "overlap": overlap, "unused": how}
        trainer = Trainer(mine, kv, "sgd", param_groups=groups, rescale_grad=1 / shares, **NUMBERS, **options)
        for step in range(12):
            x, y = make_batch(step)
            parts = list(zip(x.chunk(shares), y.chunk(shares), strict=True))
            for each in (expected, sparse, trainer):
                each.zero_grad()
            for index, (own_x, own_y) in enumerate(parts):
                (nn.functional.mse_loss(alone(own_x, branch_of(index, step)), own_y) / shares).backward()
            for param in plain:
                if param.grad is None and how == "zero":
                    param.grad = torch.zeros_like(param)
            for index, replica in enumerate(mine):
                place = RANK * replicas + index
                own_x, own_y = parts[place]
                nn.functional.mse_loss(replica(own_x, branch_of(place, step)), own_y).backward()
            expected.step()
            sparse.step()
            trainer.step()
            for replica in mine:
                for one, other in zip(replica.parameters(), alone.parameters(), strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        return [kv.info(f"branches.{branch}.weight").version for branch in range(3)]


def unused_in_every_way(store):
    found = []
    for update_on_store in (True, False):
        for replicas in (1, 2):
            found.append(unused(store, "agree", update_on_store, replicas=replicas))
            found.append(unused(store, "zero", update_on_store, replicas=replicas))
            found.append(unused(store, "zero", update_on_store, overlap=True, replicas=replicas))
    return found


def skip_differs(overlap):
    """Without an agreement, workers that have gradients of different parameters get an error."""
    model = Branches()
    with tensorkv.create("dist_sync") as kv:
        trainer = Trainer(model, kv, "sgd", lr=0.1, overlap=overlap)
        nn.functional.mse_loss(model(make_batch(0)[0], RANK), make_batch(0)[1]).backward()
        try:
            trainer.step()
            kv.pull("stem.weight")
        except tensorkv.WorkerMismatchError as error:
            return str(error)
    return "no error"


def refused(what):
    """Rank 1 alone makes a call that is refused; return what each worker's call raises."""
    kv = tensorkv.create("dist_sync", reduce="mean")
    with contextlib.suppress(tensorkv.WorkerMismatchError), kv:
        model, alone = nn.Linear(6, 1), RANK == 1
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        try:
            if what == "LocalTrainer":
                tensorkv.LocalTrainer(model, kv, inner, every=0 if alone else 1)
            trainer = Trainer(model, kv, "sgd", lr=0.1, ema=0.5, unused="no" if what == "Trainer" and alone else "skip")
            nn.functional.mse_loss(model(make_batch(0)[0]), make_batch(0)[1]).backward()
            if what == "load_state_dict":
                state = trainer.state_dict()
                trainer.load_state_dict({} if alone else state)
            if what == "optimizer.load_state_dict":
                state = trainer.optimizer.state_dict()
                trainer.optimizer.load_state_dict({} if alone else state)
            if what == "pull_ema":
                trainer.pull_ema(None if alone else model)
            if what == "learning_rate":
                trainer.learning_rate = -1.0 if alone else 0.2
            trainer.param_groups[0]["lr"] = -1.0 if alone else 0.2
            trainer.step()
            said = "no error", ""
        except tensorkv.TensorKVError as error:
            said = type(error).__name__, str(error)
    return said


class Counted(nn.Module):
    """Buffers of several dtypes and shapes beside those of a batch norm."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)
        self.register_buffer("small", torch.full((2, 2), seed, dtype=torch.bfloat16))
        self.register_buffer("spin", torch.tensor([seed + 1j]))
        self.register_buffer("flag", torch.tensor(seed == 0))
        self.register_buffer("none", torch.empty(0, 3))
        self.register_buffer("scratch", torch.tensor([float(seed)]), persistent=False)

    def forward(self, x):
        self.small += 1
        self.scratch *= 2
        return self.norm(self.layer(x))


def buffers(store, mode, replicas):
    """Return the buffers of every replica at the start, after a forward pass, and after the step."""
    mine = [Counted(RANK * replicas + index) for index in range(replicas)]

    def read():
        return [{name: buffer.tolist() for name, buffer in replica.named_buffers()} for replica in mine]

    with tensorkv.create(store) as kv:
        trainer = Trainer(mine, kv, "sgd", lr=0.1, buffers=mode)
        found = [read()]
        for index, replica in enumerate(mine):
            place = RANK * replicas + index
            replica(torch.arange(12.0).view(4, 3) * (place + 1)).square().sum().backward()
            replica.norm.num_batches_tracked += place
        found.append(read())
        trainer.step()
        found.append(read())
    return found


def buffers_in_every_mode(store):
    return {mode: buffers(store, mode, 2) for mode in ("local", "broadcast", "mean")}


def other_buffers():
    """The workers' modules have different buffers."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model.register_buffer("mine", torch.zeros(1 + RANK))
    with tensorkv.create("dist_sync") as kv:
        try:
            Trainer(model, kv, "sgd", lr=0.1, buffers="mean")
        except tensorkv.WorkerMismatchError as error:
            return str(error)
    return "no error"
