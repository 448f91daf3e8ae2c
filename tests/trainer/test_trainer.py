"""Trainer: replicas through a store train as one torch model does."""

import copy
import io
import re

import numpy as np
import pytest
import torch
from torch import nn

import tensorkv
from tensorkv import Trainer

MODES = [True, False]
OPTIMIZERS = [
    ("sgd", {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    ("adam", {"lr": 0.01}),
]


def _model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def _batch(seed, size=16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator)
    return x, x[:, :2].sum(1, keepdim=True).tanh()


def _loss(model, x, y):
    return nn.functional.mse_loss(model(x), y)


def _train(trainer, replicas, steps, start=0):
    """Give each replica its part of each batch; return the loss over the whole batch at each step."""
    losses = []
    for step in range(start, start + steps):
        parts = [list(t.chunk(len(replicas))) for t in _batch(step)]
        trainer.zero_grad()
        total = 0.0
        for replica, x, y in zip(replicas, *parts, strict=True):
            loss = _loss(replica, x, y)
            loss.backward()
            total += loss.item() / len(replicas)
        trainer.step()
        losses.append(total)
    return losses


def _train_torch(model, name, numbers, steps):
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[name](model.parameters(), **numbers)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = _loss(model, *_batch(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _weights(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def _equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("store", ["local", "device"])
@pytest.mark.parametrize("update_on_store", MODES)
@pytest.mark.parametrize(("name", "numbers"), OPTIMIZERS)
def test_replicas_on_parts_of_a_batch_train_as_one_model_on_the_batch(name, numbers, update_on_store, store):
    alone = _model()
    replicas = [copy.deepcopy(alone) for _ in range(4)]
    expected = _train_torch(alone, name, numbers, 30)
    with tensorkv.create(store) as kv:
        trainer = Trainer(replicas, kv, name, update_on_store=update_on_store, rescale_grad=0.25, **numbers)
        losses = _train(trainer, replicas, 30)
    assert expected[-1] < expected[0] / 2
    # The sum over four means rounds otherwise than one mean: float32, 30 steps.
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-7)
    for replica in replicas:
        assert _equal(_weights(replica), _weights(replicas[0]))
        for one, other in zip(replica.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("allreduce_grads", "step() sums gradients"),
        ("load_states", "use load_state_dict(torch.load(fname))"),
        ("save_states", "use torch.save(trainer.state_dict(), fname)"),
        ("update", "use step()"),
    ],
)
def test_names_of_mxnet_s_trainer_say_what_to_use(name, hint):
    trainer = Trainer(nn.Linear(2, 1), tensorkv.create(), lr=0.1)
    with pytest.raises(AttributeError) as caught:
        getattr(trainer, name)
    assert str(caught.value).startswith(f"'Trainer' object has no attribute '{name}'; {hint}")
    assert (caught.value.name, caught.value.obj) == (name, trainer)
    with pytest.raises(AttributeError, match=r"^'Trainer' object has no attribute 'stap'$"):
        trainer.stap()


@pytest.mark.parametrize("update_on_store", MODES)
def test_the_gradient_is_the_sum_over_replicas(update_on_store):
    replicas = [nn.Linear(1, 1, bias=False) for _ in range(3)]
    trainer = Trainer(replicas, tensorkv.create(), "sgd", lr=1.0, update_on_store=update_on_store)
    # In float32, in which most starting weights round.
    expected = replicas[0].weight.detach() - 7.0
    for factor, replica in zip([1.0, 2.0, 4.0], replicas, strict=True):
        replica.weight.grad = torch.full((1, 1), factor)
    trainer.step()
    assert [replica.weight.item() for replica in replicas] == [expected.item()] * 3


@pytest.mark.parametrize("update_on_store", MODES)
def test_rescaling_comes_before_clipping(update_on_store):
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    trainer = Trainer(
        model, tensorkv.create(), lr=1.0, rescale_grad=0.5, clip_gradient=1.5, update_on_store=update_on_store
    )
    model.weight.grad = torch.tensor([[2.0, -8.0]])
    trainer.step()
    assert model.weight.tolist() == [[-1.0, 1.5]]


@pytest.mark.parametrize("update_on_store", MODES)
def test_gradients_are_clipped_as_by_clip_grad_norm_(update_on_store):
    alone = _model()
    replicas = [copy.deepcopy(alone) for _ in range(2)]
    optimizer = torch.optim.AdamW(alone.parameters(), lr=0.05)
    with tensorkv.create(reduce="mean") as kv:
        trainer = Trainer(replicas, kv, "adamw", lr=0.05, max_grad_norm=0.5, update_on_store=update_on_store)
        for step in range(20):
            x, y = _batch(step)
            optimizer.zero_grad()
            _loss(alone, x, y).backward()
            norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
            optimizer.step()
            trainer.zero_grad()
            for replica, own_x, own_y in zip(replicas, x.chunk(2), y.chunk(2), strict=True):
                _loss(replica, own_x, own_y).backward()
            result = trainer.step()
            assert result.found_inf is False
            assert result.grad_norm == pytest.approx(float(norm), rel=1e-4)
            assert step or result.grad_norm > 0.5, "nothing was clipped"
    for replica in replicas:
        for one, other in zip(replica.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("update_on_store", MODES)
def test_a_step_that_is_not_finite_moves_nothing(update_on_store):
    model = _model()
    with tensorkv.create(nonfinite="skip_step") as kv:
        trainer = Trainer(model, kv, "adam", lr=0.1, update_on_store=update_on_store)
        for step in range(4):
            before = _weights(model)
            trainer.zero_grad()
            _loss(model, *_batch(step)).backward()
            if step % 2:
                next(model.parameters()).grad[0] = float("inf")
            assert trainer.step().found_inf is (step % 2 == 1)
            assert _equal(before, _weights(model)) is (step % 2 == 1)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("nonfinite", ["skip", "skip_step"])
def test_a_step_that_replicas_leave_out_leaves_no_sums_of_others_in_grad(nonfinite, overlap):
    """The store has kept what it had, which is no gradient of this step."""
    replicas = [_model(), _model()]
    with tensorkv.create(nonfinite=nonfinite) as kv:
        trainer = Trainer(replicas, kv, "sgd", lr=0.1, update_on_store=False, overlap=overlap)
        before = _weights(replicas[0])
        for step in (0, 1):
            for replica in replicas:
                loss = _loss(replica, *_batch(0))
                (loss if step else loss + replica[2].bias.sum() * torch.inf).backward()
            assert trainer.step().found_inf is (step == 0)
            for replica in replicas:
                assert _equal(before, _weights(replica)) is (step == 0)
                if step == 0:
                    assert [param.grad for param in replica.parameters()] == [None] * 4
        alone = _model()
        _loss(alone, *_batch(0)).backward()
        for mine, expected in zip(replicas[0].parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, 2 * expected.grad)


def test_what_does_not_go_with_a_bound_on_the_norm():
    with pytest.raises(tensorkv.ArgumentError, match="use overlap=False"):
        Trainer(_model(), tensorkv.create(), lr=0.1, max_grad_norm=1.0, overlap=True)
    with pytest.raises(tensorkv.ArgumentError, match='nonfinite="skip_step" decides by the gradients'):
        Trainer(_model(), tensorkv.create(nonfinite="skip_step"), lr=0.1, overlap=True)
    kv = tensorkv.create()
    model = nn.Sequential(tensorkv.Embedding(kv, "items", 50, 4), nn.Linear(4, 1))
    with tensorkv.create() as other, pytest.raises(tensorkv.ArgumentError, match='"items" is in another store'):
        Trainer(model, other, "sgd", lr=0.1, max_grad_norm=1.0)
    assert kv.keys() == ["items"]
    with pytest.raises(tensorkv.OptimizerError, match="max_grad_norm is 0"):
        Trainer(_model(), tensorkv.create(), lr=0.1, max_grad_norm=0)


def test_a_bound_that_is_set_later_stops_buckets_before_they_step():
    model = _model()
    with tensorkv.create() as kv:
        trainer = Trainer(model, kv, lr=0.1, overlap=True)
        _train(trainer, [model], 2)
        before = _weights(model)
        kv.set_hyperparameters(max_grad_norm=1.0)
        with pytest.raises(tensorkv.ArgumentError, match="max_grad_norm decides"):
            _train(trainer, [model], 1)
        assert {kv.info(key).version for key in trainer.keys} == {2}
        kv.set_hyperparameters(max_grad_norm=None)
        _train(trainer, [model], 1)
        assert not _equal(before, _weights(model))


def test_replicas_that_step_clip_what_was_pushed_in_buckets(monkeypatch):
    monkeypatch.setattr("tensorkv.trainer.overlap.BUCKET_NBYTES", 1)
    found = []
    for overlap in (False, True):
        model = _model()
        with tensorkv.create(nonfinite="skip_step") as kv:
            trainer = Trainer(model, kv, "sgd", lr=0.1, max_grad_norm=0.5, update_on_store=False, overlap=overlap)
            results = []
            for step in range(5):
                x, y = _batch(step)
                trainer.zero_grad()
                before = _weights(model)
                scale = float("inf") if step == 3 else 1.0
                # Of the first bucket, while the others are finite.
                hook = model[2].bias.register_hook(lambda grad, scale=scale: grad * scale)
                _loss(model, x, y).backward()
                hook.remove()
                results.append(trainer.step())
                assert _equal(before, _weights(model)) is (step == 3)
            found.append(
                (results[:3], results[4], results[3].found_inf, [w.tolist() for w in _weights(model).values()])
            )
    assert found[0] == found[1]
    assert found[1][2] is True


def test_a_step_is_one_pushpull():
    replicas = [_model(), _model()]
    with tensorkv.create() as kv:
        trainer = Trainer(replicas, kv, lr=0.1)
        _train(trainer, replicas, 3)
        verbs = kv.stats()["verbs"]
        assert verbs["pushpull"]["calls"] == 3
        assert "push" not in verbs or verbs["push"]["calls"] == 0


@pytest.mark.parametrize("update_on_store", MODES)
def test_all_replicas_start_from_the_first(update_on_store):
    replicas = [_model(1), _model(2), _model(3)]
    first = _weights(replicas[0])
    Trainer(replicas, tensorkv.create(), lr=0.1, update_on_store=update_on_store)
    assert all(_equal(_weights(replica), first) for replica in replicas)


@pytest.mark.parametrize("update_on_store", MODES)
def test_gradients_of_any_layout(update_on_store):
    models = [nn.Linear(3, 2, bias=False) for _ in range(2)]
    grad = torch.arange(6.0).view(3, 2).t()
    for model, own in zip(models, [grad, torch.ones(1, 1).expand(2, 3)], strict=True):
        model.weight.grad = own
    trainer = Trainer(models, tensorkv.create(), lr=1.0, update_on_store=update_on_store)
    expected = models[0].weight.detach() - (grad + 1)
    trainer.step()
    assert torch.equal(models[0].weight, expected)
    assert torch.equal(models[1].weight, expected)


# ---------------------------------------------------------------- which parameters


@pytest.mark.parametrize("update_on_store", MODES)
def test_frozen_parameters_are_left_alone(update_on_store):
    replicas = [_model(1), _model(2)]
    for replica in replicas:
        replica[0].requires_grad_(False)
    before = [_weights(replica) for replica in replicas]
    with tensorkv.create() as kv:
        trainer = Trainer(replicas, kv, lr=0.1, update_on_store=update_on_store)
        assert kv.keys() == trainer.keys == ["2.weight", "2.bias"]
        _train(trainer, replicas, 2)
    for replica, old in zip(replicas, before, strict=True):
        assert torch.equal(replica[0].weight, old["0.weight"])
        assert not torch.equal(replica[2].weight, before[0]["2.weight"])


@pytest.mark.parametrize("update_on_store", MODES)
def test_a_parameter_without_a_gradient_does_not_move(update_on_store):
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    with tensorkv.create() as kv:
        # Weight decay and momentum would move it if it were pushed.
        trainer = Trainer(model, kv, lr=0.1, weight_decay=0.5, momentum=0.9, update_on_store=update_on_store)
        before = _weights(model)
        model["used"](torch.ones(1, 2)).sum().backward()
        trainer.step()
        after = _weights(model)
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert moved == {"used.weight", "used.bias"}
        assert kv.info("unused.weight").version == 0
        trainer.zero_grad()
        trainer.step()
        assert _equal(_weights(model), after)


@pytest.mark.parametrize("update_on_store", MODES)
def test_a_gradient_in_some_replicas_only(update_on_store):
    replicas = [nn.Linear(2, 1, bias=False) for _ in range(3)]
    trainer = Trainer(replicas, tensorkv.create(), lr=1.0, update_on_store=update_on_store)
    before = replicas[0].weight.detach().clone()
    replicas[1].weight.grad = torch.tensor([[1.0, 2.0]])
    trainer.step()
    for replica in replicas:
        assert torch.equal(replica.weight, before - torch.tensor([[1.0, 2.0]]))


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("update_on_store", MODES)
def test_tied_parameters_are_one_key(update_on_store):
    torch.manual_seed(0)
    alone = _Tied()
    model = copy.deepcopy(alone)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    with tensorkv.create() as kv:
        trainer = Trainer(model, kv, lr=0.1, update_on_store=update_on_store)
        assert kv.keys() == ["first.weight"]
        for each in (model, alone):
            each(torch.ones(1, 3)).sum().backward()
        trainer.step()
        optimizer.step()
    assert model.first.weight is model.second.weight
    torch.testing.assert_close(model.first.weight, alone.first.weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("update_on_store", MODES)
def test_buffers_stay_each_replica_s_own(update_on_store):
    replicas = [nn.BatchNorm1d(2), nn.BatchNorm1d(2)]
    replicas[1].running_mean.fill_(5.0)
    with tensorkv.create() as kv:
        trainer = Trainer(replicas, kv, lr=0.1, update_on_store=update_on_store)
        assert replicas[1].running_mean.tolist() == [5.0, 5.0]
        for index, replica in enumerate(replicas):
            replica(torch.tensor([[0.0, 1.0], [2.0, 3.0]]) + index).sum().backward()
        means = [replica.running_mean.clone() for replica in replicas]
        trainer.step()
        assert kv.keys() == ["weight", "bias"]
    assert not torch.equal(*means)
    assert all(torch.equal(replica.running_mean, mean) for replica, mean in zip(replicas, means, strict=True))


# ---------------------------------------------------------------- sparse gradients


@pytest.mark.parametrize("update_on_store", MODES)
def test_rows_without_a_gradient_do_not_move(update_on_store):
    replicas = [nn.Embedding(10, 2, sparse=True) for _ in range(2)]
    trainer = Trainer(replicas, tensorkv.create(), lr=1.0, update_on_store=update_on_store)
    before = replicas[0].weight.detach().clone()
    for rows in ([[1, 4, 4], [4, 7]], [[0], [1]]):
        trainer.zero_grad()
        for replica, ids in zip(replicas, rows, strict=True):
            replica(torch.tensor(ids)).sum().backward()
        trainer.step()
    expected = before.clone()
    for row, count in {0: 1, 1: 2, 4: 3, 7: 1}.items():
        expected[row] -= count
    for replica in replicas:
        torch.testing.assert_close(replica.weight.detach(), expected)
        for row in (2, 3, 5, 6, 8, 9):
            assert torch.equal(replica.weight[row], before[row])


def test_a_store_updates_rows_lazily():
    model = nn.Embedding(4, 2, sparse=True)
    trainer = Trainer(model, tensorkv.create(), "adam", lr=0.1)
    model(torch.tensor([1])).sum().backward()
    trainer.step()
    after_first = model.weight.detach().clone()
    trainer.zero_grad()
    model(torch.tensor([2])).sum().backward()
    trainer.step()
    # Adam's momentum would move row 1 again if the gradient were taken as dense.
    assert torch.equal(model.weight[1], after_first[1])
    assert not torch.equal(model.weight[2], after_first[2])


def test_sparse_gradients_reach_the_worker_s_optimizer_as_sparse():
    replicas = [nn.Embedding(5, 2, sparse=True) for _ in range(2)]
    trainer = Trainer(replicas, tensorkv.create(), torch.optim.SparseAdam, lr=0.1, update_on_store=False)
    before = replicas[0].weight.detach().clone()
    replicas[1](torch.tensor([3])).sum().backward()
    trainer.step()
    assert [replica.weight.grad.coalesce().indices().tolist() for replica in replicas] == [[[3]], [[3]]]
    for replica in replicas:
        assert (replica.weight != before).any(1).tolist() == [False, False, False, True, False]


# ---------------------------------------------------------------- gradients and numbers


@pytest.mark.parametrize("update_on_store", MODES)
def test_zero_grad(update_on_store):
    replicas = [_model(), _model()]
    trainer = Trainer(replicas, tensorkv.create(), lr=0.1, update_on_store=update_on_store)
    _train(trainer, replicas, 1)
    params = [param for replica in replicas for param in replica.parameters()]
    assert all(param.grad.abs().sum() > 0 for param in params)
    trainer.zero_grad(set_to_none=False)
    assert all(torch.equal(param.grad, torch.zeros_like(param)) for param in params)
    trainer.zero_grad()
    assert all(param.grad is None for param in params)


@pytest.mark.parametrize("update_on_store", MODES)
def test_learning_rate_takes_effect(update_on_store):
    models = [nn.Linear(1, 1, bias=False) for _ in range(2)]
    trainer = Trainer(models, tensorkv.create(), lr=0.5, update_on_store=update_on_store)
    assert trainer.learning_rate == 0.5
    trainer.learning_rate = 0.25
    assert trainer.learning_rate == 0.25
    before = models[0].weight.detach().clone()
    models[0].weight.grad = torch.ones(1, 1)
    trainer.step()
    assert all(torch.equal(model.weight, before - 0.25) for model in models)
    for bad in (-1.0, float("nan"), float("inf"), "0.1", True, None):
        with pytest.raises(tensorkv.OptimizerError, match="learning_rate is"):
            trainer.learning_rate = bad
    assert trainer.learning_rate == 0.25


def test_a_learning_rate_for_one_parameter():
    model = nn.Linear(1, 1)
    with tensorkv.create() as kv:
        trainer = Trainer(model, kv, lr=1.0, prefix="net.")
        kv.set_hyperparameters("net.bias", lr=0.5)
        before = _weights(model)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        trainer.step()
    assert torch.equal(model.weight, before["weight"] - 1)
    assert torch.equal(model.bias, before["bias"] - 0.5)


def test_a_function_makes_the_worker_s_optimizers():
    def make(params, lr):
        return torch.optim.SGD([{"params": params[:2]}, {"params": params[2:], "lr": 0.0}], lr=lr)

    replicas = [_model(), _model()]
    trainer = Trainer(replicas, tensorkv.create(), make, lr=0.1, update_on_store=False)
    before = _weights(replicas[0])
    _train(trainer, replicas, 1)
    assert len(trainer.optimizers) == 2
    assert torch.equal(replicas[1][2].weight, before["2.weight"])
    assert not torch.equal(replicas[1][0].weight, before["0.weight"])


# ---------------------------------------------------------------- state


def _saved(trainer):
    file = io.BytesIO()
    torch.save(trainer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _flat(state):
    """Return a state with lists of numbers instead of tensors, which == compares."""
    if isinstance(state, dict):
        return {name: _flat(each) for name, each in state.items()}
    return state.tolist() if isinstance(state, torch.Tensor) else state


@pytest.mark.parametrize("update_on_store", MODES)
@pytest.mark.parametrize(("name", "numbers"), OPTIMIZERS)
def test_a_training_resumes_with_the_same_bits(name, numbers, update_on_store):
    replicas = [_model(), _model()]
    trainer = Trainer(replicas, tensorkv.create(), name, update_on_store=update_on_store, **numbers)
    _train(trainer, replicas, 5)
    trainer.learning_rate = numbers["lr"] / 2
    state, held = _saved(trainer), trainer.state_dict()
    middle = _weights(replicas[0])
    expected = _train(trainer, replicas, 5, start=5)

    others = [_model(7), _model(8)]
    resumed = Trainer(others, tensorkv.create(), name, update_on_store=update_on_store, prefix="other/", **numbers)
    _train(resumed, others, 2)  # what it did before must not show
    resumed.load_state_dict(state)
    assert resumed.learning_rate == numbers["lr"] / 2
    assert all(_equal(_weights(other), middle) for other in others)
    assert _train(resumed, others, 5, start=5) == expected
    for other in others:
        assert _equal(_weights(other), _weights(replicas[0]))
    assert _flat(held) == _flat(state), "training changed a state that was taken before"


def test_a_state_keeps_the_numbers_of_single_parameters_and_other_keys_keep_their_state():
    def push_other(kv):
        kv.push("other", torch.ones(2))
        return kv.pull("other")

    models, results = [nn.Linear(1, 1), nn.Linear(1, 1)], []
    for load in (False, True):
        with tensorkv.create() as kv:
            kv.init("other", torch.zeros(2))
            kv.init("table", tensorkv.Rows(torch.tensor([1]), torch.ones(1, 2), num_rows=9))
            trainer = Trainer(models[load], kv, lr=0.1, momentum=0.9)
            kv.set_hyperparameters("bias", lr=0.5)
            kv.set_hyperparameters("other", lr=0.25)
            push_other(kv)
            kv.push("table", tensorkv.Rows(torch.tensor([1]), torch.ones(1, 2), num_rows=9))
            if load:
                state = _saved(trainer)
                kv.set_hyperparameters("bias", lr=0.75)
                trainer.load_state_dict(state)
                assert trainer.state_dict()["overrides"] == {"bias": {"lr": 0.5}}
            kv.push("table", tensorkv.Rows(torch.tensor([1]), torch.ones(1, 2), num_rows=9))
            results.append((push_other(kv).tolist(), kv.row_sparse_pull("table", row_ids=[1]).values.tolist()))
    assert results[0] == results[1]


def _change(state, part, name, value):
    return {**state, part: {**state[part], name: value}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (list, "not the state of a Trainer with"),
        (lambda s: {**s, "update_on_store": False}, "not the state of a Trainer with update_on_store=True"),
        (lambda s: {**s, "weights": None}, "weights is None"),
        (lambda s: {**s, "weights": {"weight": s["weights"]["weight"]}}, 'only this trainer .* "bias"'),
        (lambda s: _change(s, "weights", "more", torch.ones(1)), 'only the state .* "more"'),
        (lambda s: _change(s, "weights", "bias", torch.ones(3)), r'"bias" is torch.float32 \(3,\)'),
        (lambda s: _change(s, "weights", "bias", torch.ones(1, dtype=torch.float64)), '"bias" is torch.float64'),
        (lambda s: _change(s, "optimizer", "name", "sgd"), "betas"),
        (lambda s: _change(s, "optimizer", "numbers", {"lr": -1.0}), "learning rate: -1"),
        (lambda s: _change(s, "state", "bias", {"exp_avg": torch.ones(1)}), '"bias": the state of adam lacks'),
        (lambda s: _change(s, "state", "bias", 3), "load_state_dict"),
        (lambda s: _change(s, "overrides", "bias", {"wings": 2}), "wings"),
        (lambda s: _change(s, "overrides", "bias", {"lr": -2.0}), "learning rate: -2"),
        (lambda s: _change(s, "overrides", "other", {"lr": 1.0}), 'only the state .* "other"'),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    model = nn.Linear(2, 1)
    with tensorkv.create() as kv:
        trainer = Trainer(model, kv, "adam", lr=0.1)
        model(torch.ones(1, 2)).sum().backward()
        trainer.step()
        state, before = trainer.state_dict(), _weights(model)
        with pytest.raises(tensorkv.CheckpointError, match=message):
            trainer.load_state_dict(change(state))
        assert _equal(_weights(model), before)
        assert _flat(trainer.state_dict()) == _flat(state)


def test_a_worker_s_state_that_does_not_fit_changes_nothing():
    model = nn.Linear(2, 1)
    trainer = Trainer(model, tensorkv.create(), "adam", lr=0.1, update_on_store=False)
    before = trainer.state_dict()
    with pytest.raises(tensorkv.CheckpointError, match="not the state of such an optimizer"):
        trainer.load_state_dict({**before, "optimizer": {"state": {}, "param_groups": []}})
    assert trainer.state_dict()["optimizer"] == before["optimizer"]


# ---------------------------------------------------------------- one store, several models


def test_models_share_a_store_by_prefix():
    models = [nn.Linear(2, 1), nn.Linear(3, 1)]
    with tensorkv.create() as kv:
        kv.init("counter", np.zeros(2, np.float32))
        trainers = [Trainer(model, kv, lr=0.1, prefix=f"{name}.") for model, name in zip(models, "ab", strict=True)]
        assert kv.keys() == ["counter", "a.weight", "a.bias", "b.weight", "b.bias"]
        before = _weights(models[1])
        models[0](torch.ones(1, 2)).sum().backward()
        trainers[0].step()
        assert _equal(_weights(models[1]), before)
        assert kv.pull("counter").tolist() == [0, 0]


@pytest.mark.parametrize(("update_on_store", "load"), [(True, "refresh"), (False, "load_state_dict")])
def test_a_second_trainer_with_the_same_keys(update_on_store, load):
    with tensorkv.create() as kv:
        Trainer(nn.Linear(2, 1), kv, lr=0.1, update_on_store=update_on_store)
        with pytest.raises(
            tensorkv.KeyExistsError, match=rf'"weight".*create the Trainer first, then .*trainer.{load}'
        ):
            Trainer(nn.Linear(2, 1), kv, lr=0.1, update_on_store=update_on_store)


def test_a_store_has_one_optimizer():
    with tensorkv.create() as kv:
        kv.set_optimizer("sgd", lr=0.1, momentum=0.9)
        kv.init("other", torch.zeros(1))
        kv.set_hyperparameters("other", lr=0.5)
        for optimizer, numbers, message in [
            ("adam", {"lr": 0.1}, r"name 'sgd' \(here 'adam'\)"),
            ("sgd", {"lr": 0.2, "momentum": 0.9}, r"has lr 0.1 \(here 0.2\); a store"),
            ("sgd", {"lr": 0.1, "momentum": 0.9, "rescale_grad": 0.5}, r"has rescale_grad 1.0 \(here 0.5\)"),
        ]:
            with pytest.raises(tensorkv.OptimizerError, match=message):
                Trainer(nn.Linear(2, 1), kv, optimizer, **numbers)
        with pytest.raises(tensorkv.OptimizerError, match="the store has the optimizer sgd"):
            Trainer(nn.Linear(2, 1), kv, update_on_store=False, lr=0.1)
        assert kv.keys() == ["other"]
        Trainer(nn.Linear(2, 1), kv, torch.optim.SGD, lr=0.1, momentum=0.9)
        kv.push("other", torch.ones(1))
        assert kv.pull("other").item() == -0.5, "the number of another key was lost"


def test_a_summing_trainer_refuses_an_optimizer_that_came_later():
    model = nn.Linear(2, 1)
    with tensorkv.create() as kv:
        trainer = Trainer(model, kv, lr=0.1, update_on_store=False)
        kv.set_optimizer("sgd", lr=0.1)
        before = _weights(model)
        model(torch.ones(1, 2)).sum().backward()
        with pytest.raises(tensorkv.OptimizerError, match="it is to sum only"):
            trainer.step()
        assert _equal(_weights(model), before)


# ---------------------------------------------------------------- errors


def _without_bias():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1, bias=False))


def _wider():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def _frozen():
    model = _model()
    model[2].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: [_model(), _without_bias()], tensorkv.ArgumentError, 'replica 0 has a parameter "2.bias", replica 1'),
        (lambda: [_without_bias(), _model()], tensorkv.ArgumentError, 'replica 1 has a parameter "2.bias", replica 0'),
        (
            lambda: [_model(), _wider()],
            tensorkv.ValueMismatchError,
            '"2.weight" is float32 (2, 8), trained in replica 1, in replica 0 it is float32 (1, 8), trained',
        ),
        (lambda: [_model(), _model().double()], tensorkv.ValueMismatchError, '"0.weight" is float64'),
        (lambda: [_model(), _frozen()], tensorkv.ValueMismatchError, '"2.bias" is float32 (1,), frozen in replica 1'),
        (lambda: [_model()] * 2, tensorkv.ArgumentError, '"0.weight" of replica 1 is the parameter of another replica'),
        (
            lambda: [_model(), *[_model()] * 2],
            tensorkv.ArgumentError,
            '"0.weight" of replica 2 is the parameter of another replica',
        ),
        (list, tensorkv.ArgumentError, "empty list"),
        (lambda: [_model(), None], tensorkv.ArgumentError, "replica 1 is None"),
        (lambda: _model().requires_grad_(False), tensorkv.ArgumentError, "nothing to train"),
        (lambda: nn.LazyLinear(2), tensorkv.ArgumentError, '"weight" has no shape yet'),
    ],
)
def test_modules_that_cannot_be_trained(make, error, message):
    with tensorkv.create() as kv:
        with pytest.raises(error, match=re.escape(message)):
            Trainer(make(), kv, lr=0.1)
        assert len(kv) == 0
        assert kv.optimizer is None


@pytest.mark.parametrize(
    ("optimizer", "numbers", "message"),
    [
        ("sdg", {}, "sgd"),
        ("sgd", {"wings": 2}, "wings"),
        ("sgd", {"lr": -1.0}, "learning rate"),
        ("sgd", {"rescale_grad": float("nan")}, "rescale_grad"),
        ("sgd", {"clip_gradient": 0}, "clip_gradient"),
        (3, {}, "optimizer"),
    ],
)
@pytest.mark.parametrize("update_on_store", MODES)
def test_optimizers_that_do_not_exist(optimizer, numbers, message, update_on_store):
    with tensorkv.create() as kv:
        with pytest.raises(tensorkv.OptimizerError, match=message):
            Trainer(_model(), kv, optimizer, update_on_store=update_on_store, **numbers)
        assert len(kv) == 0
        assert kv.optimizer is None


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (torch.optim.LBFGS, "LBFGS; expected"),
        (list, "list; expected"),
        (lambda: None, "cannot be created"),
    ],
)
def test_functions_that_make_no_optimizer(optimizer, message):
    with pytest.raises(tensorkv.OptimizerError, match=message):
        Trainer(_model(), tensorkv.create(), optimizer, update_on_store=False)


def test_an_optimizer_made_already():
    model = _model()
    made = torch.optim.SGD(model.parameters(), lr=0.1)
    for update_on_store in MODES:
        with pytest.raises(tensorkv.OptimizerError, match="SGD"):
            Trainer(model, tensorkv.create(), made, update_on_store=update_on_store)


def test_stores_and_prefixes_of_a_wrong_kind():
    with pytest.raises(tensorkv.ArgumentError, match=r"kv is \{\}"):
        Trainer(_model(), {}, lr=0.1)
    with tensorkv.create() as kv:
        with pytest.raises(tensorkv.ArgumentError, match="prefix is 3"):
            Trainer(_model(), kv, prefix=3, lr=0.1)
        kv.init(1, np.zeros(1))
        with pytest.raises(tensorkv.KeyTypeError, match=r"0\.weight"):
            Trainer(_model(), kv, lr=0.1)
        assert kv.optimizer is None


@pytest.mark.parametrize("update_on_store", MODES)
def test_a_step_that_is_refused_changes_nothing(update_on_store):
    model = _model()
    with tensorkv.create(nonfinite="raise") as kv:
        trainer = Trainer(model, kv, lr=0.1, update_on_store=update_on_store)
        before = _weights(model)
        _loss(model, *_batch(0)).backward()
        with torch.no_grad():
            model[2].bias.grad.fill_(float("nan"))
        grad = model[0].weight.grad.clone()
        with pytest.raises(tensorkv.NonFiniteError, match=r"2\.bias"):
            trainer.step()
        assert _equal(_weights(model), before)
        assert torch.equal(model[0].weight.grad, grad)


@pytest.mark.parametrize(("update_on_store", "shown"), [(True, ""), (False, ", update_on_store=False")])
def test_repr(update_on_store, shown):
    trainer = Trainer([_model(), _model()], tensorkv.create(), lr=0.1, update_on_store=update_on_store)
    assert repr(trainer) == f"Trainer(4 keys, 2 replicas{shown})"


def test_a_checkpoint_of_another_model_is_named_by_the_refresh_after_it(tmp_path):
    with tensorkv.create() as kv, tensorkv.create() as other:
        other.init(["b", "embedding"], [np.zeros(2), np.zeros(2)])
        other.save(tmp_path)
        trainer = Trainer(_model(), kv, lr=0.1)
        kv.load(tmp_path)
        with pytest.raises(tensorkv.KeyNotFoundError) as caught:
            trainer.refresh()
    assert str(caught.value) == (
        'Trainer.refresh: pull("0.weight"): no such key; the store has "b", "embedding"; call init first. '
        "A load replaces all keys by those of the checkpoint; load one of this model"
    )


@pytest.mark.parametrize("steps", [0, 1])
def test_a_store_that_sums_has_no_weights_to_refresh_from(steps):
    model = _model()
    with tensorkv.create() as kv:
        trainer = Trainer(model, kv, lr=0.1, update_on_store=False)
        _train(trainer, [model], steps)
        before = _weights(model)
        with pytest.raises(
            tensorkv.ArgumentError, match=r"Trainer.refresh: .* sums of gradients, not weights; use state"
        ):
            trainer.refresh()
    assert _equal(before, _weights(model))


@pytest.mark.parametrize("prefix", ["", "net."])
def test_an_optimizer_that_cannot_step_a_parameter_is_refused_at_once(prefix):
    model = nn.Linear(2, 2)
    with tensorkv.create() as kv:
        with pytest.raises(
            tensorkv.OptimizerError, match=rf'Trainer: muon updates matrices, and "{prefix}bias" has shape \(2,\); keep'
        ):
            Trainer(model, kv, "muon", lr=0.1, prefix=prefix)
        assert (kv.keys(), kv.optimizer) == ([], None)
        trainer = Trainer(model, kv, "adam", lr=0.1, prefix=prefix)
        assert kv.keys() == [f"{prefix}weight", f"{prefix}bias"]
    with tensorkv.create() as kv:
        model.bias.requires_grad_(False)
        trainer = Trainer(model, kv, "muon", lr=0.1, prefix=prefix)
        model.bias.requires_grad_(True)
        with pytest.raises(tensorkv.OptimizerError, match="muon updates matrices"):
            trainer.optimizer.add_param_group({"params": ["bias"]})
        assert trainer.keys == kv.keys() == [f"{prefix}weight"]
        model.weight.sum().backward()
        trainer.step()


@pytest.mark.parametrize("how", ["whole", "layer", "in place"])
def test_compiled_modules_have_the_keys_of_plain_ones(how, tmp_path):
    plain = _model()
    compiled = copy.deepcopy(plain)
    if how == "whole":
        compiled = torch.compile(compiled, backend="eager")
    elif how == "layer":
        compiled[0] = torch.compile(compiled[0], backend="eager")
    else:
        compiled.compile(backend="eager")
    with tensorkv.create() as kv, tensorkv.create() as other:
        trainer = Trainer(compiled, kv, "sgd", lr=0.1, ema=0.5)
        assert trainer.keys == [name for name, _ in plain.named_parameters()]
        sum(param.square().sum() for param in compiled.parameters()).backward()
        trainer.step()
        kv.save(tmp_path / "kept")
        Trainer(plain, other, "sgd", lr=0.1, ema=0.5)
        other.load(tmp_path / "kept")
        other.pull_tree(into=plain)
        assert all(map(torch.equal, plain.parameters(), compiled.parameters()))
        trainer.pull_ema(compiled)
        trainer.pull_ema(plain)
        assert all(map(torch.equal, plain.parameters(), compiled.parameters()))
    with tensorkv.create() as kv:
        kv.init_tree(compiled)
        kv.publish("first")
        kv.push_tree({name: value + 1 for name, value in plain.state_dict().items()})
        kv.publish("second")
        with kv.open_release("second") as second:
            changes = second.changes(since="first")
        before = _weights(plain)
        for module in (compiled, plain):
            tensorkv.apply_changes(module, changes)
            assert all(torch.equal(a, b + 1) for a, b in zip(module.parameters(), before.values(), strict=True))
    with tensorkv.create() as kv:
        kv.init_tree({"net": compiled})
        assert kv.keys() == [f"net.{name}" for name in plain.state_dict()]
        kv.pull_tree({"net": plain})
        kv.pull_tree(into=compiled, prefix="net")
