"""Training loops over ``trainer.optimizer`` beside the same loop over ``torch.optim``, for one worker or several.

A worker's share of each batch goes to its replicas, and the mean over workers and replicas is the mean over the batch,
which the torch loop takes. Every program runs in one process with a ``local`` store, and in each worker of a team.
"""

import copy
import os
import warnings

import numpy as np
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

import tensorkv
from tensorkv import Trainer

RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
BATCH = 24

# By name: what makes a scheduler of an optimizer, and the optimizer that it is tried with.
SGD = ("sgd", {"lr": 0.1, "momentum": 0.8})
ADAMW = ("adamw", {"lr": 0.02})


def _sequential(optimizer):
    first = schedulers.LinearLR(optimizer, start_factor=0.1, total_iters=3)
    return schedulers.SequentialLR(optimizer, [first, schedulers.CosineAnnealingLR(optimizer, 9)], [3])


def _chained(optimizer):
    return schedulers.ChainedScheduler(
        [schedulers.ConstantLR(optimizer, 0.5, 3), schedulers.ExponentialLR(optimizer, 0.9)]
    )


SCHEDULERS = {
    "LambdaLR": (SGD, lambda o: schedulers.LambdaLR(o, [lambda step: 0.9**step, lambda step: 1 / (1 + step)])),
    "MultiplicativeLR": (SGD, lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9)),
    "StepLR": (SGD, lambda o: schedulers.StepLR(o, 3, 0.5)),
    "MultiStepLR": (SGD, lambda o: schedulers.MultiStepLR(o, [2, 7], 0.5)),
    "ConstantLR": (SGD, lambda o: schedulers.ConstantLR(o, 0.3, 4)),
    "LinearLR": (SGD, lambda o: schedulers.LinearLR(o, 0.2, total_iters=6)),
    "ExponentialLR": (ADAMW, lambda o: schedulers.ExponentialLR(o, 0.9)),
    "SequentialLR": (ADAMW, _sequential),
    "CosineAnnealingLR": (ADAMW, lambda o: schedulers.CosineAnnealingLR(o, 8, eta_min=0.001)),
    "ChainedScheduler": (SGD, _chained),
    "PolynomialLR": (SGD, lambda o: schedulers.PolynomialLR(o, 8, 2.0)),
    "CosineAnnealingWarmRestarts": (SGD, lambda o: schedulers.CosineAnnealingWarmRestarts(o, 4)),
    "CyclicLR": (SGD, lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 3, base_momentum=0.7, max_momentum=0.9)),
    "CyclicLR of betas": (ADAMW, lambda o: schedulers.CyclicLR(o, 0.001, 0.02, 3)),
    "OneCycleLR": (SGD, lambda o: schedulers.OneCycleLR(o, [0.1, 0.05], total_steps=20)),
    "OneCycleLR of betas": (ADAMW, lambda o: schedulers.OneCycleLR(o, 0.02, total_steps=20)),
    "ReduceLROnPlateau": (SGD, lambda o: schedulers.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.2)),
    "SWALR": (SGD, lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=5)),
}
CLASSES = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def groups_of(model):
    """Weight decay on matrices alone, and another learning rate for the rest."""
    matrices = [param for param in model.parameters() if param.ndim > 1]
    vectors = [param for param in model.parameters() if param.ndim == 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0, "lr": 0.05}]


def make_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, 6, generator=generator)
    return x, x[:, :2].sum(1, keepdim=True).tanh()


def loss_of(model, x, y):
    return nn.functional.mse_loss(model(x), y)


class Run:
    """A model and its copies, one trained by torch alone, the others through a store.

    Args:
        store: its type, or its type and options.
        replicas: how many this worker has.
        make: makes the model.
        groups: of parameters of a model.
        options: of the Trainer.
    """

    def __init__(self, store, name, numbers, replicas=1, make=make_model, groups=groups_of, **options):
        self.alone = make()
        self.replicas = [copy.deepcopy(self.alone) for _ in range(replicas)]
        self.expected = CLASSES[name](groups(self.alone), **numbers)
        kind, given = (store, {}) if isinstance(store, str) else store
        self.kv = tensorkv.create(kind, **given)
        assert self.kv.num_workers == SIZE
        self.shares = SIZE * replicas
        numbers = {**numbers, "rescale_grad": 1 / self.shares}
        self.trainer = Trainer(
            self.replicas, self.kv, name, param_groups=groups(self.replicas[0]), **numbers, **options
        )

    def share(self, index, *tensors):
        return [t.chunk(self.shares)[RANK * len(self.replicas) + index] for t in tensors]

    def backward(self, seed, factor=1.0):
        """Compute gradients everywhere; return the loss over the batch of the model alone, and of a replica."""
        x, y = make_batch(seed)
        loss = loss_of(self.alone, x, y)
        (loss * factor).backward()
        with torch.no_grad():
            mine = loss_of(self.replicas[0], x, y)
        for index, replica in enumerate(self.replicas):
            (loss_of(replica, *self.share(index, x, y)) * factor).backward()
        return loss.item(), mine.item()

    def zero_grad(self):
        self.expected.zero_grad()
        self.trainer.optimizer.zero_grad()

    def check(self, losses):
        """The losses are torch's, and the groups have its numbers."""
        np.testing.assert_allclose(*losses, rtol=1e-5)
        for mine, other in zip(self.trainer.param_groups, self.expected.param_groups, strict=True):
            assert {word: mine[word] for word in other if word in mine and word != "params"} == {
                word: other[word] for word in other if word in mine and word != "params"
            }
            assert mine["lr"] == other["lr"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kv.close()


def schedule(store, name, update_on_store, replicas=1, overlap=False):
    """Train with a scheduler of torch, once over the store's optimizer and once over torch's."""
    (optimizer, numbers), make = SCHEDULERS[name]
    with Run(store, optimizer, numbers, replicas, update_on_store=update_on_store, overlap=overlap) as run:
        each = [make(run.expected), make(run.trainer.optimizer)]
        rates = set()
        for step in range(12):
            run.zero_grad()
            losses = run.backward(step)
            run.expected.step()
            run.trainer.step() if step % 2 else run.trainer.optimizer.step()
            for scheduler in each:
                # Both from the same number, for rounding may decide at a threshold.
                scheduler.step(losses[0]) if name == "ReduceLROnPlateau" else scheduler.step()
            run.check(losses)
            rates.add(run.trainer.learning_rate)
        assert len(rates) > 1
        one, other = each
        assert one.get_last_lr() == other.get_last_lr()


def schedules(store):
    """All schedulers, one after another in the same workers."""
    for index, name in enumerate(SCHEDULERS):
        schedule(store, name, index % 2 == 0, overlap=index % 4 < 2)
        schedule(store, name, index % 2 == 1, replicas=2)
    return list(SCHEDULERS)


def scaler(store, update_on_store, unscales, replicas):
    """Train with a GradScaler, whose scale is too high at first for one worker's gradients in some steps."""
    with Run(store, "sgd", {"lr": 0.1, "momentum": 0.9}, replicas, update_on_store=update_on_store) as run:
        optimizers = run.expected, run.trainer.optimizer
        scalers = [torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2) for _ in optimizers]
        skipped = 0
        for step in range(10):
            run.zero_grad()
            x, y = make_batch(step)
            # On one worker alone.
            factor = torch.inf if step in (3, 6) else 1.0
            mine = factor if RANK == SIZE - 1 else 1.0
            before = [param.detach().clone() for param in run.replicas[0].parameters()]
            loss = loss_of(run.alone, x, y)
            scalers[0].scale(loss * factor).backward()
            for index, replica in enumerate(run.replicas):
                scalers[1].scale(loss_of(replica, *run.share(index, x, y)) * mine).backward()
            scales = [each.get_scale() for each in scalers]
            for each, optimizer, model in zip(scalers, optimizers, (run.alone, run.replicas[0]), strict=True):
                if unscales:
                    each.unscale_(optimizer)
                    # A bound that no gradient reaches: on several workers it would be of each one's own.
                    nn.utils.clip_grad_norm_(model.parameters(), 1e6)
                each.step(optimizer)
                each.update()
            with torch.no_grad():
                run.check(
                    (
                        loss.item() if step == 0 else loss_of(run.alone, x, y).item(),
                        loss.item() if step == 0 else loss_of(run.replicas[0], x, y).item(),
                    )
                )
            same = all(map(torch.equal, before, run.replicas[0].parameters()))
            assert same == (factor != 1.0), step
            skipped += same
            fell = [each.get_scale() < scale for each, scale in zip(scalers, scales, strict=True)]
            # Each worker has a scale of its own.
            assert fell == [factor != 1.0, mine != 1.0]
        assert not hasattr(run.trainer.optimizer, "found_inf")
        return skipped


def scalers(store):
    return [
        scaler(store, update_on_store, unscales, replicas)
        for update_on_store in (True, False)
        for unscales in (True, False)
        for replicas in (1, 2)
    ]


def states(store, update_on_store):
    """Continue from states of torch.optim, and have torch.optim continue from the store's."""
    losses = []
    for name, numbers in (("adamw", {"lr": 0.02}), ("sgd", {"lr": 0.1, "momentum": 0.9})):
        with Run(store, name, numbers, 2, update_on_store=update_on_store) as run:
            scheduler = schedulers.ExponentialLR(run.trainer.optimizer, 0.9)

            def train(start, run=run):
                for step in range(start, start + 4):
                    run.zero_grad()
                    losses.append(run.backward(step))
                    run.check(losses[-1])
                    run.expected.step()
                    run.trainer.optimizer.step()

            train(0)
            scheduler.step()
            # The number that the scheduler has written, though no step has followed.
            saved = copy.deepcopy(run.trainer.optimizer.state_dict())
            assert [group["lr"] for group in saved["param_groups"]] == [numbers["lr"] * 0.9, 0.05 * 0.9]
            assert saved["param_groups"][0]["initial_lr"] == numbers["lr"]
            run.expected.load_state_dict(saved)
            train(4)
            for group in run.expected.param_groups:
                group["lr"] = 0.03
            run.trainer.optimizer.load_state_dict(run.expected.state_dict())
            assert run.trainer.learning_rate == 0.03
            train(8)
            state = run.trainer.optimizer.state
            for param, other in zip(run.replicas[0].parameters(), run.alone.parameters(), strict=True):
                assert state[param].keys() == run.expected.state[other].keys()
    return len(losses)


def thaw(store, update_on_store, overlap):
    """Train frozen layers later, as a group of their own."""

    def make():
        model = make_model()
        model[0].requires_grad_(False)
        return model

    def groups(model):
        return [{"params": model[2].parameters()}]

    numbers = {"lr": 0.1, "momentum": 0.9}
    with Run(store, "sgd", numbers, 2, make, groups, update_on_store=update_on_store, overlap=overlap) as run:
        for step in range(6):
            if step == 3:
                run.trainer.learning_rate = run.expected.param_groups[0]["lr"] = 0.2
                for model in (run.alone, *run.replicas):
                    model[0].requires_grad_(True)
                run.expected.add_param_group({"params": run.alone[0].parameters(), "weight_decay": 0.1})
                run.trainer.optimizer.add_param_group({"params": "0.*", "weight_decay": 0.1})
                assert run.trainer.keys == ["2.weight", "2.bias", "0.weight", "0.bias"]
            run.zero_grad()
            losses = run.backward(step)
            run.check(losses)
            run.expected.step()
            run.trainer.step()
        assert [group["lr"] for group in run.trainer.param_groups] == [0.2, 0.1]


def states_and_groups(store):
    for update_on_store in (True, False):
        states(store, update_on_store)
        thaw(store, update_on_store, overlap=update_on_store)
    return "done"


def differ(update_on_store, changes_both):
    """The workers' schedulers set different numbers."""
    with Run("dist_sync", *SGD, update_on_store=update_on_store) as run:
        run.backward(0)
        run.trainer.step()
        if RANK == 0 or changes_both:
            run.trainer.param_groups[0]["lr"] = 0.01 * (1 + RANK)
        run.zero_grad()
        run.backward(1)
        try:
            run.trainer.step()
        except tensorkv.WorkerMismatchError as error:
            return str(error)
    return "no error"


def rates_differ(update_on_store):
    """The workers set different learning rates at once."""
    with Run("dist_sync", *SGD, update_on_store=update_on_store) as run:
        try:
            run.trainer.learning_rate = 0.5 + RANK
        except tensorkv.WorkerMismatchError as error:
            return [str(error), [group["lr"] for group in run.trainer.param_groups]]
    return ["no error", []]


def resume(store, folder):
    """A checkpoint has the number that a scheduler has written after the last step."""
    with Run(store, *SGD) as run:
        scheduler = schedulers.ExponentialLR(run.trainer.optimizer, 0.5)
        run.backward(0)
        run.trainer.step()
        scheduler.step()
        run.kv.save(folder)
    with Run(store, *SGD) as other:
        resumed = schedulers.ExponentialLR(other.trainer.optimizer, 0.5)
        other.kv.load(folder)
        other.trainer.refresh()
        resumed.load_state_dict(scheduler.state_dict())
        assert [group["lr"] for group in other.trainer.param_groups] == [0.05, 0.025]
        with warnings.catch_warnings():
            # Torch asks for a step in between.
            warnings.simplefilter("ignore")
            resumed.step()
        return [group["lr"] for group in other.trainer.param_groups]
