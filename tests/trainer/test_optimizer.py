"""``trainer.optimizer``: PyTorch's schedulers and scaler on a store train as they do on an optimizer of torch."""

import copy
import gc
import pickle
import re
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import tensorkv
from tensorkv import Trainer
from tensorkv.shard.optimizers import CLASSES
from tests.support.workers import run
from tests.trainer import optimizer_programs as programs

MODES = [True, False]


def _model():
    return programs.make_model()


def _set_calls(kv, monkeypatch):
    """The changes of numbers that reach a store."""
    seen, change, set_all = [], kv._engine.set_hyperparameters, kv._engine.set_optimizer

    def spy(numbers, keys):
        seen.append((numbers, keys))
        change(numbers, keys)

    def spy_on_all(spec):
        seen.append(spec.overrides)
        set_all(spec)

    monkeypatch.setattr(kv._engine, "set_hyperparameters", spy)
    monkeypatch.setattr(kv._engine, "set_optimizer", spy_on_all)
    return seen


# ---------------------------------------------------------------- beside torch.optim


def test_every_scheduler_of_torch_is_tried():
    known = {name for name in lr_scheduler.__all__ if name != "LRScheduler"}
    assert known == {name.partition(" ")[0] for name in programs.SCHEDULERS} - {"SWALR"}


@pytest.mark.parametrize("update_on_store", MODES)
@pytest.mark.parametrize("name", programs.SCHEDULERS)
def test_a_scheduler_gives_the_losses_that_it_gives_with_torch(name, update_on_store):
    programs.schedule("local", name, update_on_store)


@pytest.mark.parametrize("update_on_store", MODES)
def test_a_scheduler_over_replicas(update_on_store):
    programs.schedule("device", "OneCycleLR", update_on_store, replicas=2)
    programs.schedule("local", "CosineAnnealingLR", update_on_store, replicas=3)


def test_schedulers_over_workers():
    for names in run(2, programs.schedules, "dist_sync"):
        assert names == list(programs.SCHEDULERS)


@pytest.mark.parametrize("update_on_store", MODES)
@pytest.mark.parametrize("unscales", [True, False])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_grad_scaler_skips_the_steps_that_it_skips_with_torch(replicas, unscales, update_on_store):
    assert programs.scaler("local", update_on_store, unscales, replicas) == 2


def test_a_step_that_one_worker_s_grad_scaler_skips_is_skipped_by_all():
    for skipped in run(2, programs.scalers, "dist_sync"):
        assert skipped == [2] * 8


@pytest.mark.parametrize("update_on_store", MODES)
def test_states_travel_between_torch_and_a_store(update_on_store):
    assert programs.states("local", update_on_store) == 24


@pytest.mark.parametrize(("update_on_store", "overlap"), [(True, False), (True, True), (False, False)])
def test_frozen_layers_are_added_later(update_on_store, overlap):
    programs.thaw("local", update_on_store, overlap)


def test_no_layers_are_added_while_gradients_of_a_step_are_pushed():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    with tensorkv.create() as kv:
        trainer = Trainer(model, kv, "sgd", lr=0.1, overlap=True)
        for version in (1, 2):
            trainer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            if version == 2:
                with pytest.raises(tensorkv.ArgumentError, match=r"backward has pushed .* after step\(\)"):
                    trainer.optimizer.add_param_group({"params": "0.*"})
            trainer.step()
            assert {kv.info(key).version for key in kv} == {version}
        model[0].requires_grad_()
        trainer.optimizer.add_param_group({"params": "0.*"})
        assert len(kv.keys()) == 4


def test_states_and_new_groups_over_workers():
    assert run(2, programs.states_and_groups, "dist_sync") == ["done"] * 2


@pytest.mark.parametrize(("update_on_store", "changes_both"), [(True, True), (True, False), (False, True)])
def test_workers_whose_schedulers_differ_get_an_error(update_on_store, changes_both):
    for message in run(2, programs.differ, update_on_store, changes_both):
        assert "the workers' calls differ" in message
        assert "set_hyperparameters" in message


@pytest.mark.parametrize("update_on_store", MODES)
def test_workers_that_set_different_learning_rates_get_an_error(update_on_store):
    for message, rates in run(2, programs.rates_differ, update_on_store):
        assert "the workers' calls differ" in message
        assert rates == [0.1, 0.05]


@pytest.mark.parametrize("update_on_store", MODES)
def test_states_with_a_learning_rate_in_a_tensor(update_on_store):
    alone = _model()
    expected = torch.optim.Adam(alone.parameters(), lr=torch.tensor(0.25))
    programs.loss_of(alone, *programs.make_batch(0)).backward()
    expected.step()
    trainer = Trainer(_model(), tensorkv.create(), "adam", lr=0.1, update_on_store=update_on_store)
    trainer.optimizer.load_state_dict(expected.state_dict())
    assert trainer.learning_rate == 0.25


@pytest.mark.parametrize("name", ["local", "device"])
def test_states_of_a_channels_last_model(name):
    alone = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    model = copy.deepcopy(alone)
    x = torch.ones(1, 3, 4, 4)

    def train(net, optimizer):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()

    expected = torch.optim.AdamW(alone.parameters(), lr=0.01)
    train(alone, expected)
    assert not expected.state[alone.weight]["exp_avg"].is_contiguous()
    model.load_state_dict(alone.state_dict())
    with tensorkv.create(name) as kv:
        trainer = Trainer(model, kv, "adamw", lr=0.01)
        trainer.optimizer.load_state_dict(expected.state_dict())
        for _ in range(3):
            train(alone, expected)
            train(model, trainer.optimizer)
            torch.testing.assert_close(model.weight, alone.weight)


def test_a_checkpoint_has_what_a_scheduler_has_set_last(tmp_path):
    assert programs.resume("local", tmp_path / "local") == [0.025, 0.0125]
    assert run(2, programs.resume, "dist_sync", str(tmp_path / "dist")) == [[0.025, 0.0125]] * 2


# ---------------------------------------------------------------- one place for numbers


def test_numbers_reach_the_store_once_a_step_and_only_if_they_changed(monkeypatch):
    model = _model()
    with tensorkv.create() as kv:
        trainer = Trainer(model, kv, "sgd", lr=0.1, param_groups=programs.groups_of(model))
        seen = _set_calls(kv, monkeypatch)
        trainer.step()
        for _ in range(3):  # the last counts
            for group in trainer.param_groups:
                group["lr"] = group["lr"] / 2
        assert kv.optimizer["lr"] == 0.1
        trainer.step()
        trainer.step()
        [overrides] = seen
        rates = {key: own["lr"] for key, own in overrides.items()}
        assert rates == {"0.weight": 0.0125, "2.weight": 0.0125, "0.bias": 0.00625, "2.bias": 0.00625}
        seen.clear()
        for group in trainer.param_groups:
            group["lr"] = 0.5
        trainer.step()
        assert seen == [({"lr": 0.5}, None)]
        seen.clear()
        trainer.param_groups[0]["lr"] = 0.25
        trainer.param_groups[0]["lr"] = 0.5
        trainer.step()
        assert not seen


def test_numbers_of_many_groups_are_one_call(monkeypatch):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
    with tensorkv.create() as kv:
        kv.init("other", torch.zeros(1))
        groups = [{"params": f"{n}.*", "lr": 0.1 * (n + 1)} for n in range(5)]
        trainer = Trainer(model, kv, "adamw", lr=0.1, max_grad_norm=9.0, param_groups=groups)
        kv.set_hyperparameters("1.bias", weight_decay=0.5)
        kv.set_hyperparameters("other", lr=7.0)
        lambdas = [lambda step, n=n: 1 / (step + n * n + 2) for n in range(5)]
        model(torch.ones(1, 2)).sum().backward()
        trainer.step()
        scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambdas)
        calls = _set_calls(kv, monkeypatch)
        for step in range(1, 3):
            trainer.step()
            assert len(calls) == step
            own = kv._engine.optimizer.overrides
            for n in range(5):
                rate = 0.1 * (n + 1) / (step - 1 + n * n + 2)
                assert own[f"{n}.weight"]["lr"] == own[f"{n}.bias"]["lr"] == pytest.approx(rate)
            assert own["1.bias"]["weight_decay"] == 0.5
            assert own["other"] == {"lr": 7.0}
            assert kv.optimizer["max_grad_norm"] == 9
            assert kv.info("0.weight").version == step + 1
            scheduler.step()


def test_groups_show_what_was_set_in_the_store():
    with tensorkv.create() as kv:
        model = _model()
        trainer = Trainer(model, kv, "adamw", lr=0.1, param_groups=programs.groups_of(model))
        group = trainer.param_groups[1]
        assert (group["lr"], group["weight_decay"], group["betas"]) == (0.05, 0.0, (0.9, 0.999))
        kv.set_hyperparameters(lr=0.2)
        assert [group["lr"] for group in trainer.param_groups] == [0.2, 0.2]
        assert group is trainer.param_groups[1]
        kv.set_hyperparameters("*.bias", lr=0.3, betas=(0.8, 0.9))
        assert [group["lr"] for group in trainer.param_groups] == [0.2, 0.3]
        assert group["betas"] == (0.8, 0.9)
        kv.set_hyperparameters("0.bias", lr=0.4)  # of one key, not of the group
        kv.set_hyperparameters("0.weight", lr=0.5)
        assert trainer.param_groups[0]["lr"] == 0.2
        trainer.learning_rate = 0.6
        assert [group["lr"] for group in trainer.param_groups] == [0.6, 0.6]
        trainer.set_learning_rate(0.7)
        assert kv.optimizer["lr"] == trainer.learning_rate == 0.7


def test_what_is_set_last_counts():
    with tensorkv.create() as kv:
        trainer = Trainer(_model(), kv, "sgd", lr=0.1)
        trainer.param_groups[0]["lr"] = 0.2
        kv.set_hyperparameters(lr=0.3)
        trainer.step()
        assert kv.optimizer["lr"] == trainer.learning_rate == 0.3
        trainer.param_groups[0]["lr"] = 0.4
        trainer.step()
        assert kv.optimizer["lr"] == trainer.learning_rate == 0.4


def _load(kv, trainer, path, _):
    kv.load(path / "saved")
    trainer.refresh()


REPLACERS = {
    "kv.load": _load,
    "kv.load_optimizer_states": lambda kv, trainer, path, _: kv.load_optimizer_states(path / "states"),
    "kv.set_optimizer": lambda kv, trainer, path, _: kv.set_optimizer("sgd", lr=0.1),
    "kv.set_hyperparameters": lambda kv, trainer, path, _: kv.set_hyperparameters(lr=0.1),
    "of its keys": lambda kv, trainer, path, _: kv.set_hyperparameters("*", lr=0.1),
    "trainer.load_state_dict": lambda kv, trainer, path, states: trainer.load_state_dict(states[0]),
    "optimizer.load_state_dict": lambda kv, trainer, path, states: trainer.optimizer.load_state_dict(states[1]),
    "trainer.learning_rate": lambda kv, trainer, path, _: setattr(trainer, "learning_rate", 0.1),
}


@pytest.mark.parametrize(
    ("replace", "update_on_store"),
    [(name, on_store) for name in REPLACERS for on_store in MODES if on_store or not name.startswith(("kv.", "of "))],
)
def test_an_equal_number_that_is_set_later_replaces_one_that_is_pending(replace, update_on_store, tmp_path):
    model = _model()
    with tensorkv.create() as kv:
        trainer = Trainer(model, kv, "sgd", lr=0.1, update_on_store=update_on_store)
        states = trainer.state_dict(), trainer.optimizer.state_dict()
        kv.save(tmp_path / "saved")
        if update_on_store:
            kv.save_optimizer_states(tmp_path / "states")
        trainer.param_groups[0]["lr"] = 0.5
        REPLACERS[replace](kv, trainer, tmp_path, states)
        before = model[0].bias.detach().clone()
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        trainer.step()
        torch.testing.assert_close(model[0].bias.detach(), before - 0.1)
        assert trainer.learning_rate == 0.1


def test_what_is_set_for_others_leaves_pending_numbers_alone(tmp_path):
    with tensorkv.create() as kv:
        one, other = (Trainer(_model(), kv, "sgd", lr=0.1, prefix=prefix) for prefix in ("a.", "b."))
        one.param_groups[0]["lr"] = 0.5
        kv.set_hyperparameters(weight_decay=0.1)
        kv.set_hyperparameters("a.0.bias", lr=0.1)
        kv.set_hyperparameters(other.keys, lr=0.1)
        other.param_groups[0]["lr"] = 0.25
        other.step()
        one.step()
        assert [each.param_groups[0]["lr"] for each in (one, other)] == [0.5, 0.25]
        assert one.param_groups[0]["weight_decay"] == 0.1
    with tensorkv.create() as kv:
        # A store that only sums has no numbers to replace those of the replicas' optimizers.
        trainer = Trainer(_model(), kv, "sgd", lr=0.1, update_on_store=False)
        kv.save(tmp_path)
        trainer.param_groups[0]["lr"] = 0.5
        kv.load(tmp_path)
        trainer.step()
        assert trainer.learning_rate == 0.5


def test_a_store_keeps_nothing_of_trainers_that_are_gone(tmp_path):
    with tensorkv.create() as kv:
        for number in range(3):
            trainer = Trainer(_model(), kv, "sgd", lr=0.1, prefix=f"{number}.")
        gc.collect()
        assert len(kv._trainers) == 1
        trainer.param_groups[0]["lr"] = 0.2
        kv.save(tmp_path)
        assert kv._engine.optimizer.overrides["2.0.bias"] == {"lr": 0.2}


def test_a_trainer_s_groups_leave_other_keys_alone():
    with tensorkv.create() as kv:
        one, other = (Trainer(_model(), kv, "sgd", lr=0.1, prefix=prefix) for prefix in ("a.", "b."))
        kv.init("more", torch.zeros(1))
        one.param_groups[0]["lr"] = 0.2
        one.step()
        assert (one.learning_rate, other.learning_rate, kv.optimizer["lr"]) == (0.2, 0.1, 0.1)
        kv.push("more", torch.ones(1))
        assert kv.pull("more").item() == pytest.approx(-0.1)


@pytest.mark.parametrize("update_on_store", MODES)
@pytest.mark.parametrize("bad", [float("nan"), -1.0, "0.1", None])
def test_a_number_out_of_range_changes_nothing(bad, update_on_store):
    model = _model()
    with tensorkv.create() as kv:
        groups = programs.groups_of(model)
        trainer = Trainer(model, kv, "sgd", lr=0.1, param_groups=groups, update_on_store=update_on_store)
        before = copy.deepcopy(model.state_dict())
        programs.loss_of(model, *programs.make_batch(0)).backward()
        trainer.param_groups[0]["lr"], trainer.param_groups[1]["lr"] = 0.2, bad
        with pytest.raises(tensorkv.OptimizerError, match="Trainer: sgd"):
            trainer.step()
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        if update_on_store:
            assert kv.optimizer["lr"] == 0.1
        else:
            assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.1, 0.05]
        assert not any(kv.info(key).version for key in kv)
        trainer.param_groups[1]["lr"] = torch.tensor(0.5)
        trainer.step()
        assert [group["lr"] for group in trainer.param_groups] == [0.2, 0.5]


def test_keys_that_share_numbers_share_their_kernel():
    """So a schedule costs as much with ten thousand keys of their own numbers as with one."""
    with tensorkv.create() as kv:
        keys = [f"{number}.bias" for number in range(50)]
        kv.init(keys, [torch.zeros(2)] * 50)
        kv.set_optimizer("sgd", lr=0.1)
        kv.set_hyperparameters(keys[:40], weight_decay=0.1)
        kv.set_hyperparameters(keys[:20], lr=0.2)
        kv.set_hyperparameters(weight_decay=0.5)
        kv.push(keys, [torch.ones(2)] * 50)
        assert len(kv._engine._shard.rule.optimizer._kernels) == 2
        assert [kv.pull(key)[0].item() for key in (keys[0], keys[20], keys[40])] == pytest.approx([-0.2, -0.1, -0.1])


# ---------------------------------------------------------------- a torch.optim.Optimizer


@pytest.mark.parametrize("update_on_store", MODES)
def test_it_is_an_optimizer_of_torch(update_on_store):
    replicas = [_model(), _model()]
    trainer = Trainer(replicas, tensorkv.create(), "adamw", lr=0.1, update_on_store=update_on_store)
    optimizer = trainer.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is trainer.param_groups
    (group,) = optimizer.param_groups
    assert list(map(id, group["params"])) == [id(param) for replica in replicas for param in replica.parameters()]
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    assert "lr: 0.1" in repr(optimizer)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    trainer.step()
    assert calls == ["before", "after"]
    for copier in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="use state_dict"):
            copier(optimizer)


@pytest.mark.parametrize("update_on_store", MODES)
def test_a_closure_computes_the_gradients(update_on_store):
    model, alone = _model(), _model()
    trainer = Trainer(model, tensorkv.create(), "sgd", lr=0.1, update_on_store=update_on_store)
    expected = torch.optim.SGD(alone.parameters(), lr=0.1)

    def closure_of(model, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = programs.loss_of(model, *programs.make_batch(1))
            loss.backward()
            return loss

        return closure

    with torch.no_grad():
        losses = [each.step(closure_of(m, each)) for each, m in ((trainer.optimizer, model), (expected, alone))]
    assert torch.equal(*losses)
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_a_scheduler_notices_the_step_of_a_trainer():
    model = _model()
    trainer = Trainer(model, tensorkv.create(), "sgd", lr=0.1)
    scheduler = lr_scheduler.ExponentialLR(trainer.optimizer, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.step()
        scheduler.step()
    assert trainer.learning_rate == 0.05


@pytest.mark.parametrize("update_on_store", MODES)
def test_a_scaled_step_that_is_refused_can_be_repeated(update_on_store):
    model = nn.Linear(2, 1, bias=False)
    trainer = Trainer(model, tensorkv.create(), "sgd", lr=0.5, update_on_store=update_on_store)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = model.weight.detach().clone()
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    trainer.param_groups[0]["lr"] = -1.0
    with pytest.raises(tensorkv.OptimizerError, match="learning rate"):
        scaler.step(trainer.optimizer)
    assert model.weight.grad.tolist() == [[1024, 1024]]
    trainer.param_groups[0]["lr"] = 0.5
    scaler.step(trainer.optimizer)
    scaler.update()
    assert model.weight.grad.tolist() == [[1, 1]]
    assert torch.equal(model.weight, before - 0.5)


def test_a_grad_scaler_and_overlap_exclude_each_other():
    model = _model()
    trainer = Trainer(model, tensorkv.create(), "sgd", lr=0.1, overlap=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(programs.loss_of(model, *programs.make_batch(1))).backward()
    with pytest.raises(tensorkv.OptimizerError, match="a GradScaler needs overlap=False"):
        scaler.step(trainer.optimizer)
    assert not hasattr(trainer.optimizer, "found_inf")
    assert not any(trainer._kv.info(key).version for key in trainer.keys)
    # Training goes on without the scaler.
    for version in (1, 2):
        trainer.zero_grad()
        programs.loss_of(model, *programs.make_batch(1)).backward()
        trainer.step()
        assert {trainer._kv.info(key).version for key in trainer.keys} == {version}


def test_a_state_of_other_groups_changes_nothing():
    def with_lr(state, lr):
        return {**state, "param_groups": [*state["param_groups"][:-1], {**state["param_groups"][-1], "lr": lr}]}

    model = _model()
    trainer = Trainer(model, tensorkv.create(), "adamw", lr=0.1, param_groups=programs.groups_of(model))
    optimizer = trainer.optimizer
    programs.loss_of(model, *programs.make_batch(0)).backward()
    trainer.step()
    before = optimizer.state_dict()
    for change, message in [
        (lambda state: 3, "got 3; expected what state_dict"),
        (lambda state: {**state, "param_groups": state["param_groups"][:1]}, r"groups of \[2\] parameters; expected"),
        (lambda state: {**state, "state": {0: {"exp_avg": torch.ones(8, 6)}}}, 'lacks "step"'),
        (lambda state: {**state, "state": {0: 3}}, "the state of a parameter is 3"),
        (lambda state: {**state, "param_groups": [{**g, "lr": -1.0} for g in state["param_groups"]]}, "learning rate"),
        (lambda state: with_lr(state, -1.0), "learning rate"),
        (lambda state: with_lr(state, "fast"), "adamw: lr is 'fast'; expected"),
    ]:
        with pytest.raises(tensorkv.CheckpointError, match=message):
            optimizer.load_state_dict(change(copy.deepcopy(before)))
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        assert all(torch.equal(after["state"][i]["exp_avg"], own["exp_avg"]) for i, own in before["state"].items())


def _stepped(name, **options):
    """The state_dict of an optimizer of torch after a step on a matrix."""
    model = nn.Linear(3, 2, bias=False)
    optimizer = getattr(torch.optim, CLASSES[name])(model.parameters(), lr=0.1, **options)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("update_on_store", MODES)
@pytest.mark.parametrize("name", CLASSES)
def test_the_state_of_another_optimizer_is_refused(name, update_on_store, by_class):
    model = nn.Linear(3, 2, bias=False)
    given = getattr(torch.optim, CLASSES[name]) if by_class else name
    trainer = Trainer(model, tensorkv.create(), given, lr=0.2, update_on_store=update_on_store)
    optimizer = trainer.optimizer
    model(torch.ones(1, 3)).sum().backward()
    trainer.step()
    before, whole = optimizer.state_dict(), trainer.state_dict()
    # AdamW is Adam with decoupled_weight_decay.
    fits = {name, "adamw"} if name == "adam" else {name}
    for other in CLASSES.keys() - fits:
        with pytest.raises(tensorkv.CheckpointError, match=f"of another optimizer than {name}: it (has|lacks) "):
            optimizer.load_state_dict(_stepped(other))
        if not update_on_store:
            with pytest.raises(tensorkv.CheckpointError, match=f"of another optimizer than {name}: it (has|lacks) "):
                trainer.load_state_dict({**whole, "optimizer": _stepped(other)})
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        assert after["state"].keys() == before["state"].keys()
        for word, each in after["state"].get(0, {}).items():
            assert each is None or torch.equal(each, before["state"][0][word])
    for other in fits:
        optimizer.load_state_dict(_stepped(other))
        assert trainer.learning_rate == 0.1


@pytest.mark.parametrize("update_on_store", MODES)
def test_adamw_goes_on_from_adam_with_decoupled_decay_alone(update_on_store):
    model = nn.Linear(3, 2, bias=False)
    optimizer = Trainer(model, tensorkv.create(), "adamw", lr=0.2, update_on_store=update_on_store).optimizer
    with pytest.raises(
        tensorkv.CheckpointError, match='of another optimizer than adamw: it has "decoupled_weight_decay"'
    ):
        optimizer.load_state_dict(_stepped("adam"))
    optimizer.load_state_dict(_stepped("adam", decoupled_weight_decay=True))
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("update_on_store", MODES)
def test_adam_goes_on_from_the_adamw_of_a_store(update_on_store):
    """With AdamW's decay, which it keeps."""
    models = [nn.Linear(3, 2, bias=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    first = Trainer(models[0], tensorkv.create(), "adamw", lr=0.1, weight_decay=0.5, update_on_store=update_on_store)
    other = Trainer(models[1], tensorkv.create(), "adam", lr=0.3, update_on_store=update_on_store)
    other.optimizer.load_state_dict(first.optimizer.state_dict())
    for trainer, model in zip((first, other), models, strict=True):
        model(torch.ones(1, 3)).sum().backward()
        trainer.step()
    assert torch.equal(models[0].weight, models[1].weight)
    first.optimizer.load_state_dict(other.optimizer.state_dict())


@pytest.mark.parametrize("update_on_store", MODES)
def test_a_group_keeps_words_that_other_optimizers_have(update_on_store):
    model = nn.Linear(3, 2)
    groups = [{"params": [model.weight], "momentum": 0.5, "t0": 3}, {"params": [model.bias]}]
    trainer = Trainer(model, tensorkv.create(), "adam", lr=0.1, param_groups=groups, update_on_store=update_on_store)
    model(torch.ones(1, 3)).sum().backward()
    trainer.step()
    trainer.optimizer.load_state_dict(trainer.optimizer.state_dict())
    trainer.load_state_dict(trainer.state_dict())
    assert trainer.optimizer.param_groups[0]["t0"] == 3


@pytest.mark.parametrize("update_on_store", MODES)
def test_states_of_older_versions_of_torch_are_loaded(update_on_store):
    model = nn.Linear(3, 2, bias=False)
    optimizer = Trainer(model, tensorkv.create(), "adam", lr=0.2, update_on_store=update_on_store).optimizer
    old = _stepped("adam")
    for word in ("maximize", "decoupled_weight_decay"):
        del old["param_groups"][0][word]
    optimizer.load_state_dict(old)
    assert optimizer.param_groups[0]["lr"] == 0.1


# ---------------------------------------------------------------- parameter groups


@pytest.mark.parametrize("update_on_store", MODES)
@pytest.mark.parametrize(
    "make",
    [
        lambda model: [{"params": [model[0].weight, model[2].weight]}, {"params": [model[0].bias, model[2].bias]}],
        lambda model: [{"params": ["0.weight", model[2].weight]}, {"params": ["*.bias"]}],
        lambda model: [{"params": "*.weight"}, {"params": lambda name: name.endswith("bias")}],
        lambda model: [
            {"params": [pair for pair in model.named_parameters() if pair[1].ndim == size]} for size in (2, 1)
        ],
        lambda model: ({"params": each} for each in (["*.weight"], (p for p in model.parameters() if p.ndim == 1))),
    ],
    ids=["parameters", "names", "patterns", "named parameters", "generators"],
)
def test_parameters_of_groups_in_every_form(make, update_on_store):
    model = _model()
    groups = [{**group, "lr": lr, "name": str(lr)} for group, lr in zip(make(model), (0.25, 0.5), strict=True)]
    with tensorkv.create() as kv:
        trainer = Trainer(model, kv, param_groups=groups, prefix="net.", update_on_store=update_on_store)
        assert kv.keys() == trainer.keys == ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]
        assert [(group["lr"], group["name"]) for group in trainer.param_groups] == [(0.25, "0.25"), (0.5, "0.5")]
        before = copy.deepcopy(model.state_dict())
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        trainer.step()
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name] - (0.25 if name.endswith("weight") else 0.5))


def test_plain_parameters_are_one_group_and_frozen_ones_may_be_in_it():
    model = _model()
    model[0].requires_grad_(False)
    trainer = Trainer(model, tensorkv.create(), lr=0.1, param_groups=model.parameters())
    assert [list(map(id, group["params"])) for group in trainer.param_groups] == [[*map(id, model[2].parameters())]]


@pytest.mark.parametrize("update_on_store", MODES)
@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (
            lambda m: [{"params": m[0].parameters()}],
            "ArgumentError",
            '"2.weight" requires a gradient and is in no parameter group',
        ),
        (lambda m: [{"params": "*"}, {"params": m[2].bias}], "ArgumentError", '"2.bias" is in two parameter groups'),
        (lambda m: [{"params": "*"}, {"params": [nn.Parameter(torch.ones(1))]}], "ArgumentError", "not a parameter of"),
        (lambda m: [{"params": ["0.wieght"]}], "ArgumentError", 'no parameter "0.wieght" (did you mean "0.weight"?)'),
        (lambda m: [{"params": "*.bais"}], "KeyNotFoundError", 'Trainer: params("*.bais"): the pattern matches no key'),
        (lambda m: [{"params": set(m.parameters())}], "ArgumentError", "a set, which has no order"),
        (lambda m: [{"parameters": "*"}], "ArgumentError", "expected a dict such as"),
        (lambda m: [{"params": "*", "weight_decy": 1}], "ArgumentError", 'did you mean "weight_decay"?'),
        (lambda m: [{"params": "*", "rescale_grad": 1}], "ArgumentError", "rescale_grad holds for all parameters"),
        (lambda m: [{"params": "*", "lr": -1.0}], "OptimizerError|ValueError", "learning rate: -1.0"),
        (lambda m: m[0].weight, "ArgumentError", "param_groups is a Parameter"),
        (lambda m: [], "KeyNotFoundError|ArgumentError", "in no parameter group"),
        (lambda m: 3, "ArgumentError", "param_groups is 3"),
    ],
)
def test_groups_that_do_not_fit(groups, error, message, update_on_store):
    model = _model()
    with tensorkv.create() as kv:
        with pytest.raises(tensorkv.TensorKVError, match=re.escape(message)) as caught:
            Trainer(model, kv, "sgd", lr=0.1, param_groups=groups(model), update_on_store=update_on_store)
        assert re.fullmatch(error, type(caught.value).__name__)
        assert len(kv) == 0
        assert kv.optimizer is None


@pytest.mark.parametrize("update_on_store", MODES)
def test_a_group_that_cannot_be_added_changes_nothing(update_on_store):
    model = _model()
    model[0].requires_grad_(False)
    with tensorkv.create() as kv:
        trainer = Trainer(model, kv, "sgd", lr=0.1, update_on_store=update_on_store)
        model[0].requires_grad_(True)
        kv.init("0.bias", torch.zeros(8))
        for group, error in [
            ({"params": "0.bias"}, tensorkv.KeyExistsError),
            ({"params": "0.weight", "lr": -1.0}, tensorkv.OptimizerError),
            ({"params": "2.bias"}, tensorkv.ArgumentError),
            ("0.weight", tensorkv.ArgumentError),
        ]:
            with pytest.raises(error):
                trainer.optimizer.add_param_group(group)
            assert trainer.keys == ["2.weight", "2.bias"]
            assert kv.keys() == ["2.weight", "2.bias", "0.bias"]
            assert len(trainer.param_groups) == 1
        trainer.step()
