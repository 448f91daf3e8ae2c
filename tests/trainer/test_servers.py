"""Trainers on parameter servers: what workers that wait for each other, or for nobody, cannot do."""

from functools import partial
from unittest import mock

import pytest
import torch
from torch import nn

import tensorkv
from tensorkv import Trainer

pytest.importorskip("ray")
from tests.support.fake_servers import Cluster, together


def _step(trainer, model, number=1.0):
    trainer.zero_grad()
    (model(torch.ones(1, 2)).sum() * number).backward()
    trainer.step()


def test_a_worker_that_comes_late_takes_no_sums_for_weights():
    with Cluster(2, mode="sync", num_workers=2) as cluster:
        stores = cluster.stores(2)
        models = [nn.Linear(2, 1) for _ in stores]
        make = partial(Trainer, optimizer="sgd", lr=0.1, update_on_store=False)
        trainers = together(*[partial(make, *pair) for pair in zip(models, stores, strict=True)])
        assert torch.equal(*(model.weight for model in models))
        together(*[partial(_step, *pair) for pair in zip(trainers, models, strict=True)])
        assert torch.equal(*(model.weight for model in models))
        late = nn.Linear(2, 1)
        before = late.weight.clone()
        with pytest.raises(tensorkv.ArgumentError, match=r'Trainer: the store holds sums .* as of "weight".*=True'):
            make(late, stores[1])
        assert torch.equal(late.weight, before)


def test_a_worker_that_comes_late_asks_as_often_for_many_parameters_as_for_few():
    counts = []
    for layers in (1, 30):
        with Cluster(2, mode="sync", num_workers=2) as cluster:
            stores = cluster.stores(2)
            model = nn.Sequential(*[nn.Linear(2, 1) for _ in range(layers)])
            weights = dict(model.named_parameters())
            stores[0].init(weights)
            last = [*weights][-1]
            together(*[partial(kv.push, last, weights[last]) for kv in stores])
            engine = stores[1]._engine
            with (
                mock.patch.object(engine, "_send", wraps=engine._send) as send,
                pytest.raises(tensorkv.ArgumentError, match=f'sums of gradients, not weights, as of "{last}"'),
            ):
                Trainer(model, stores[1], lr=0.1, update_on_store=False)
            counts.append(len(send.call_args_list))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("overlap", [False, True])
def test_workers_whose_pushes_are_not_summed_need_the_store_to_update(overlap):
    model = nn.Linear(2, 1)
    with Cluster(num_workers=2) as cluster:
        kv = cluster.store()
        with pytest.raises(tensorkv.ArgumentError, match="update_on_store=False needs a store that sums"):
            Trainer(model, kv, lr=0.1, update_on_store=False, overlap=overlap)
        assert len(kv) == 0
        Trainer(model, kv, lr=0.1, overlap=overlap)
    with Cluster() as cluster:
        # One worker has nobody to sum with.
        trainer = Trainer(model, cluster.store(), "sgd", lr=0.1, update_on_store=False, overlap=overlap)
        before = model.weight.clone()
        _step(trainer, model)
        assert torch.allclose(model.weight, before - 0.1)


def test_workers_that_wait_for_each_other_and_cannot_agree():
    """They would push different lists of keys, or a different number of times, and wait until the timeout."""
    model = nn.Linear(2, 1)
    with Cluster(mode="sync", num_workers=2) as cluster:
        kv = cluster.store()
        with pytest.raises(tensorkv.ArgumentError, match=r'unused="agree" needs workers .* use unused="zero"'):
            Trainer(model, kv, lr=0.1, unused="agree")
        assert len(kv) == 0
        trainer = Trainer(model, kv, lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(model(torch.ones(1, 2)).sum()).backward()
        before = model.weight.grad.clone()
        with pytest.raises(tensorkv.OptimizerError, match="a GradScaler needs workers"):
            scaler.step(trainer.optimizer)
        assert not hasattr(trainer.optimizer, "found_inf")
        assert torch.equal(model.weight.grad, before)
        assert kv.info("weight").version == 0


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"mode": "sync"}])
def test_workers_that_need_not_agree(options):
    model = nn.Linear(2, 1)
    with Cluster(**options) as cluster:
        kv = cluster.store()
        trainer = Trainer(model, kv, lr=0.1, unused="agree")
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for factor, version in [(1.0, 1), (torch.inf, 1), (1.0, 2)]:
            trainer.zero_grad()
            scaler.scale(model(torch.ones(1, 2)).sum() * factor).backward()
            scaler.step(trainer.optimizer)
            scaler.update()
            assert kv.info("weight").version == version


def test_workers_push_the_same_buckets_whatever_order_backward_has(monkeypatch):
    monkeypatch.setattr("tensorkv.trainer.overlap.BUCKET_NBYTES", 1)

    class Turned(nn.Module):
        """Two parameters, of which backward reaches one or the other first."""

        def __init__(self, turned):
            super().__init__()
            self.a, self.b, self.turned = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2)), turned

        def forward(self):
            first, second = (self.b, self.a) if self.turned else (self.a, self.b)
            return ((first * first).exp() * second).sum()

    with Cluster(mode="sync", num_workers=2) as cluster:
        stores, models = cluster.stores(2), [Turned(False), Turned(True)]
        make = partial(Trainer, optimizer="sgd", lr=0.1, overlap=True)
        trainers = together(*[partial(make, *pair) for pair in zip(models, stores, strict=True)])
        orders = []

        def train(model, trainer):
            for _ in range(2):
                trainer.zero_grad()
                model().backward()
                orders.append(list(trainer.optimizer._overlap._order))
                trainer.step()

        together(*[partial(train, *pair) for pair in zip(models, trainers, strict=True)])
        assert ["a", "b"] in orders
        assert ["b", "a"] in orders
        assert torch.equal(models[0].a, models[1].a)
        assert torch.equal(models[0].b, models[1].b)
        assert stores[0].info("a").version == 2
