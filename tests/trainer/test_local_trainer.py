"""LocalTrainer: the published algorithm, step by step, on every type of store."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv import LocalTrainer, OptimizerError
from tensorkv.shard import optimizers
from tensorkv.trainer.updates import check_rule
from tests.support.fake_servers import Cluster
from tests.support.until import LIMIT_S
from tests.support.workers import run
from tests.trainer import local_programs as programs

AVERAGE = {"lr": 1, "momentum": 0}
OUTERS = {
    "the paper's": {},
    "without momentum": {"lr": 0.5, "momentum": 0},
    "plain momentum": {"lr": 0.3, "momentum": 0.5, "nesterov": False},
}


def assert_close(found, expected):
    assert len(found) == len(expected) == programs.ROUNDS
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(mine), theirs, rtol=2e-5, atol=1e-6)


def reference(outer, workers, **more):
    full = {"lr": 0.7, "momentum": 0.9, "nesterov": True, **outer}
    return programs.published(workers, **{**full, "nesterov": full["nesterov"] and bool(full["momentum"])}, **more)


@pytest.mark.parametrize("name", OUTERS)
def test_one_worker_makes_the_steps_of_the_paper(name):
    with tensorkv.create() as kv:
        assert_close(programs.train(kv, 0, **OUTERS[name]), reference(OUTERS[name], 1))


@pytest.mark.parametrize("name", OUTERS)
def test_workers_in_lock_step_make_the_steps_of_the_paper(name):
    found = run(2, programs.on_workers, OUTERS[name])
    assert found[0] == found[1]
    assert_close(found[0], reference(OUTERS[name], 2))


@pytest.mark.parametrize("name", OUTERS)
def test_servers_make_the_steps_of_the_paper(name):
    found = on_servers(OUTERS[name], mode="sync", reduce="mean")
    assert [each.tolist() for each in found[0]] == [each.tolist() for each in found[1]]
    assert_close(found[0], reference(OUTERS[name], 2))


def on_servers(outer, **options):
    with Cluster(2, num_workers=2, **options) as cluster:
        return train_on(cluster.stores(2), outer)


def train_on(stores, outer):
    with ThreadPoolExecutor(len(stores)) as pool:
        each = [pool.submit(programs.train, kv, worker, **outer) for worker, kv in enumerate(stores)]
        return [future.result(LIMIT_S) for future in each]


def test_steps_of_1_without_momentum_are_the_mean_bit_by_bit():
    expected = [each.tolist() for each in programs.averaged(2)]
    assert run(2, programs.on_workers, AVERAGE) == [expected] * 2
    for found in on_servers(AVERAGE, mode="sync", reduce="mean"):
        assert [each.tolist() for each in found] == expected
    with tensorkv.create() as kv:
        assert [each.tolist() for each in programs.train(kv, 0, **AVERAGE)] == [
            each.tolist() for each in programs.averaged(1)
        ]


def test_an_optimizer_that_another_worker_sets_meanwhile_is_not_taken_for_an_updater(monkeypatch):
    with Cluster(1, num_workers=2, reduce="mean") as cluster:
        first, second = cluster.stores(2)
        engine, kind, reads = second._engine, type(second._engine), []

        def read(name, get):
            def got(self):
                found = get(self)
                if self is engine and name not in reads:
                    reads.append(name)
                    if len(reads) == 1:
                        first.set_optimizer("sgd", lr=0.7, momentum=0.9, nesterov=True)
                return found

            monkeypatch.setattr(kind, name, property(got))

        held = kind.optimizer.fget
        read("assigns", lambda self: held(self) is None)
        read("optimizer", held)
        check_rule(second, optimizers.spec("sgd", {"lr": 0.7, "momentum": 0.9, "nesterov": True}))
        assert reads, "the optimizer was set in between"
        check_rule(second, optimizers.spec("sgd", {"lr": 0.7, "momentum": 0.9, "nesterov": True}))
        with pytest.raises(OptimizerError, match=r"lr 0\.7"):
            check_rule(second, optimizers.spec("sgd", {"lr": 0.5, "momentum": 0.9, "nesterov": True}))


def test_a_worker_that_leaves_is_not_in_the_mean():
    found = run(2, programs.leaves_early)
    expected = reference({}, 2, lasts=[programs.ROUNDS, 2])[-1]
    torch.testing.assert_close(torch.tensor(found[0]), expected, rtol=2e-5, atol=1e-6)


def test_workers_that_do_not_wait_for_each_other():
    """Each outer step takes one worker's gradient; it goes on from what the store has then."""
    with Cluster(2, num_workers=2, mode="async", staleness=2) as cluster:
        stores = cluster.stores(2)
        found = train_on(stores, {"lr": 0.3})
        values = {name: stores[0].pull(name).flatten() for name, _ in programs.model().named_parameters()}
        assert [stores[0].info(key).version for key in values] == [2 * programs.ROUNDS] * len(values)
    ends = [worker[-1].split([len(value) for value in values.values()]) for worker in found]
    for value, *last in zip(values.values(), *ends, strict=True):
        assert any(torch.equal(value, each) for each in last), "of the worker whose step was the last one"


def test_a_checkpoint_goes_on_with_the_same_bits(tmp_path):
    def steps(net, inner, trainer, numbers):
        for step in numbers:
            inner.zero_grad()
            programs.loss(net, 0, step).backward()
            trainer.step()
        return [each.tolist() for each in net.parameters()]

    def begin(kv):
        net = programs.model()
        inner = torch.optim.SGD(net.parameters(), lr=0.1)
        return net, inner, LocalTrainer(net, kv, inner, every=2, prefix="net.")

    with tensorkv.create() as kv:
        made = begin(kv)
        steps(*made, range(4))
        kv.save(tmp_path / "four")
        expected = steps(*made, range(4, 8))
    with tensorkv.create() as kv:
        made = begin(kv)
        kv.load(tmp_path / "four")
        made[2].refresh()
        assert steps(*made, range(4, 8)) == expected
        assert made[2].steps == 4
    with tensorkv.create() as kv:
        made = begin(kv)
        kv.delete("net.0.bias")
        with pytest.raises(tensorkv.KeyNotFoundError, match=r'refresh: the store has no parameter "net.0.bias"'):
            made[2].refresh()


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"every": 0}, tensorkv.ArgumentError, "every is 0; expected an int of at least 1"),
        ({"every": 1.5}, tensorkv.ArgumentError, "every is 1.5"),
        ({"inner": "adamw"}, tensorkv.ArgumentError, "inner is 'adamw'; expected an optimizer of torch"),
        ({"model": 3}, tensorkv.ArgumentError, "model is 3; expected an nn.Module"),
        ({"kv": None}, tensorkv.ArgumentError, "kv is None; expected a KVStore"),
        ({"prefix": 4}, tensorkv.ArgumentError, "prefix is 4; expected a str"),
        ({"outer": "sdg"}, tensorkv.OptimizerError, "sdg"),
        ({"lr": -1}, tensorkv.OptimizerError, "Invalid learning rate"),
        ({"model": torch.nn.ReLU()}, tensorkv.ArgumentError, "no parameter requires a gradient"),
        ({"outer": "muon"}, tensorkv.OptimizerError, "LocalTrainer: muon updates matrices, and "),
        ({"inner": programs.inner_of(programs.model())}, tensorkv.ArgumentError, "inner has no parameter of the model"),
    ],
)
def test_bad_arguments_change_nothing(change, error, said):
    net = programs.model()
    before = [each.tolist() for each in net.parameters()]
    with tensorkv.create() as kv:
        given = {"model": net, "kv": kv, "inner": programs.inner_of(net), "every": 2, **change}
        with pytest.raises(error, match=said):
            LocalTrainer(**given)
        assert kv.keys() == []
    assert [each.tolist() for each in net.parameters()] == before


def test_stores_that_do_not_fit():
    for said in run(2, programs.sums):
        assert 'create it with reduce="mean"' in said
    net = programs.model()
    with tensorkv.create() as kv:
        kv.set_optimizer("sgd", lr=0.1)
        with pytest.raises(
            tensorkv.OptimizerError, match="the store has an update rule, and parameters are to be averaged"
        ):
            LocalTrainer(net, kv, programs.inner_of(net), every=2, **AVERAGE)
        with pytest.raises(
            tensorkv.OptimizerError, match=r"LocalTrainer: the store's optimizer has lr 0.1 \(here 0.7\)"
        ):
            LocalTrainer(net, kv, programs.inner_of(net), every=2)
        assert kv.keys() == []
        assert kv.optimizer["lr"] == 0.1


def test_a_second_trainer_keeps_the_numbers_of_single_keys():
    with tensorkv.create() as kv:
        for prefix in ("a.", "b."):
            model = torch.nn.Linear(2, 1, bias=False)
            LocalTrainer(model, kv, torch.optim.SGD(model.parameters(), lr=0.1), every=1, lr=0.5, prefix=prefix)
            if prefix == "a.":
                kv.set_hyperparameters("a.weight", lr=0.25)
        before = kv.pull("a.weight")
        kv.push("a.weight", torch.ones(1, 2))
        # Nesterov's first step with the momentum 0.9.
        torch.testing.assert_close(kv.pull("a.weight"), before - 0.25 * 1.9)


@pytest.mark.parametrize("averages", [False, True])
def test_an_updater_of_the_store_is_refused(averages):
    net = programs.model()
    with tensorkv.create(reduce="mean") as kv:
        kv.set_updater(lambda key, received, stored: stored.add_(received))
        with pytest.raises(tensorkv.OptimizerError, match="LocalTrainer: the store has an up"):
            LocalTrainer(net, kv, programs.inner_of(net), every=2, **(AVERAGE if averages else {}))
        assert kv.keys() == []


@pytest.mark.parametrize("key", ["0.weight", 3])
def test_keys_that_a_store_has_leave_it_without_an_optimizer(key):
    net = programs.model()
    with tensorkv.create() as kv:
        kv.init(key, np.zeros(2))
        with pytest.raises((tensorkv.KeyExistsError, tensorkv.KeyTypeError)):
            LocalTrainer(net, kv, programs.inner_of(net), every=2)
        assert kv.optimizer is None
        assert kv.keys() == [key]
