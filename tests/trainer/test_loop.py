"""What a training loop does besides steps: accumulation, unused parameters, buffers; on one worker and on several."""

import sys
import threading
import weakref
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn

import tensorkv
from tensorkv import Trainer
from tensorkv.trainer import overlap as overlap_module
from tests.support.until import LIMIT_S, until
from tests.support.workers import run
from tests.trainer import loop_programs as programs

MODES = [True, False]

# ---------------------------------------------------------------- accumulation and buckets


@pytest.mark.parametrize("update_on_store", MODES)
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("replicas", [1, 2])
def test_gradients_of_several_batches_are_added_up(replicas, overlap, update_on_store):
    assert programs.accumulate("local", update_on_store, overlap, replicas) == 5


def test_gradients_of_several_batches_over_workers():
    assert run(2, programs.accumulations, "dist_sync") == [[5] * 8] * 2


def test_nothing_is_pushed_within_no_sync():
    model = nn.Linear(2, 1)
    with tensorkv.create() as kv:
        trainer = Trainer(model, kv, lr=0.1, overlap=True)
        for _ in range(2):  # also once the order is known
            with trainer.no_sync():
                with suppress(ZeroDivisionError), trainer.no_sync():
                    model(torch.ones(1, 2)).sum().backward()
                    raise ZeroDivisionError
                model(torch.ones(1, 2)).sum().backward()
            version = kv.info("weight").version
            model(torch.ones(1, 2)).sum().backward()
            assert model.weight.grad.tolist() == [[3.0, 3.0]]
            with pytest.raises(tensorkv.ArgumentError, match=r"twice; .* but the last within trainer.no_sync\(\)"):
                model(torch.ones(1, 2)).sum().backward()
            trainer.step()
            assert kv.info("weight").version == version + 1
            trainer.zero_grad()


def test_training_goes_on_after_a_push_that_failed_within_backward():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with tensorkv.create(nonfinite="raise") as kv:
        trainer = Trainer(model, kv, lr=0.1, overlap=True)
        for step, factor in enumerate((1.0, float("nan"), 1.0, 1.0)):
            trainer.zero_grad()
            loss = model(torch.ones(1, 2)).sum() * factor
            if step == 1:
                with pytest.raises(tensorkv.NonFiniteError):
                    loss.backward()
            else:
                loss.backward()
                trainer.step()
        assert {kv.info(key).version for key in kv} == {3}


@pytest.mark.parametrize("failing", [0, 1])
def test_training_goes_on_after_a_backward_that_failed(failing):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with tensorkv.create() as kv:
        trainer = Trainer(model, kv, lr=0.1, overlap=True)
        for step in range(3):
            trainer.zero_grad()
            hidden = model[0](torch.ones(1, 2))
            if step == failing:
                # Of the second layer gradients are computed, of the first one they are not.
                hidden.register_hook(lambda grad: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    model[1](hidden).sum().backward()
                continue
            model[1](hidden).sum().backward()
            trainer.step()
        assert {kv.info(key).version for key in ("0.weight", "0.bias")} == {2}


def test_backward_pushes_nothing_for_a_trainer_that_is_gone():
    model = nn.Linear(2, 1)
    with tensorkv.create() as kv:
        trainer = Trainer(model, kv, lr=0.1, overlap=True)
        for _ in range(2):
            trainer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            trainer.step()
        optimizer = weakref.ref(trainer.optimizer)
        del trainer
        assert optimizer() is None
        for _ in range(2):
            model(torch.ones(1, 2)).sum().backward()
        assert {kv.info(key).version for key in kv} == {2}


def test_backward_pushes_nothing_to_a_store_that_was_closed():
    model = nn.Linear(2, 1)
    old = []
    for _ in range(2):
        with tensorkv.create() as kv:
            old.append(Trainer(model, kv, lr=0.1, overlap=True))
            for version in (1, 2):
                old[-1].zero_grad()
                model(torch.ones(1, 2)).sum().backward()
                old[-1].step()
                assert {kv.info(key).version for key in kv} == {version}
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(tensorkv.StoreClosedError):
        old[0].step()


def test_a_gradient_of_a_batch_within_no_sync_alone_is_pushed():
    model = nn.ModuleList([nn.Linear(1, 1, bias=False) for _ in range(2)])
    trainer = Trainer(model, tensorkv.create(), lr=1.0, overlap=True)
    for _ in range(2):
        before = [layer.weight.item() for layer in model]
        trainer.zero_grad()
        with trainer.no_sync():
            model[0](torch.ones(1, 1)).sum().backward()
        model[1](torch.ones(1, 1)).sum().backward()
        trainer.step()
        assert [layer.weight.item() for layer in model] == pytest.approx([weight - 1 for weight in before])


def test_two_threads_in_backward_push_each_bucket_once(monkeypatch):
    monkeypatch.setattr(overlap_module, "BUCKET_NBYTES", 1)
    replicas = [nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)) for _ in range(2)]
    with tensorkv.create() as kv:
        trainer = Trainer(replicas, kv, lr=0.1, overlap=True)
        push, pushes, pushing = kv.push, [], threading.Event()

        def compute(replica):
            replica(torch.ones(1, 2)).sum().backward()

        def waits(thread):
            """Whether a thread is in a hook of the trainer."""
            frame = sys._current_frames().get(thread.ident)
            return frame is not None and frame.f_code.co_filename == overlap_module.__file__

        def wait(grad):
            assert pushing.wait(LIMIT_S)

        def spy(keys, *args, **options):
            pushes.extend(keys)
            if len(pushes) == 1:
                pushing.set()
                [other] = [each for each in threads if each is not threading.current_thread()]
                until(lambda: len(pushes) > 1 or not other.is_alive() or waits(other))
            push(keys, *args, **options)

        for replica in replicas:
            compute(replica)
        trainer.step()
        trainer.zero_grad()
        monkeypatch.setattr(kv, "push", spy)
        for replica in replicas:
            # The first gradient of both is computed, and one of the threads pushes it.
            replica[0].weight.register_hook(wait)
        threads = [threading.Thread(target=compute, args=[replica]) for replica in replicas]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        trainer.step()
        assert pushes == ["1.weight", "0.weight"]
        assert {kv.info(key).version for key in kv} == {2}


def _expected_order(within):
    """Of the layers that are used as b, a, c on rank 0."""
    return [("c.weight", within), ("a.weight", within), ("b.weight", within)]


def test_buckets_are_in_the_order_of_the_first_backward():
    assert programs.order("local") == [_expected_order(False), _expected_order(True), _expected_order(True)]


def test_all_workers_push_buckets_in_the_order_of_rank_0():
    for pushes in run(2, programs.order, "dist_sync"):
        assert [[bucket[:-1] for bucket in step] for step in pushes] == [
            [("c.weight",), ("a.weight",), ("b.weight",)]
        ] * 3
        assert not any(within for *_, within in pushes[0])


# ---------------------------------------------------------------- parameters without a gradient


@pytest.mark.parametrize("update_on_store", MODES)
@pytest.mark.parametrize(
    ("how", "overlap"), [("skip", False), ("skip", True), ("agree", False), ("zero", False), ("zero", True)]
)
@pytest.mark.parametrize("replicas", [1, 2])
def test_parameters_that_some_steps_or_replicas_do_not_use(replicas, how, overlap, update_on_store):
    versions = programs.unused("local", how, update_on_store, overlap, replicas)
    # Branch 2 is taken by replica 0 alone in one of six steps, by replica 1 in two.
    assert versions == ([12, 12, 12] if how == "zero" else [4, 6, 2] if replicas == 1 else [6, 8, 4])


def test_parameters_that_some_workers_do_not_use():
    agreed, zeros = [6, 8, 4], [12, 12, 12]
    for found in run(2, programs.unused_in_every_way, "dist_sync"):
        assert found == [agreed, zeros, zeros] * 4


@pytest.mark.parametrize("overlap", [True, False])
def test_workers_that_skip_different_parameters_get_an_error(overlap):
    for message in run(2, programs.skip_differs, overlap):
        assert "the workers' calls differ" in message


@pytest.mark.parametrize(
    "what",
    [
        "Trainer",
        "LocalTrainer",
        "step",
        "load_state_dict",
        "optimizer.load_state_dict",
        "pull_ema",
        "learning_rate",
    ],
)
def test_what_a_trainer_refuses_on_one_worker_is_told_to_the_others(what):
    first, second = run(2, programs.refused, what)
    assert first[0] == "WorkerMismatchError", (first, second)
    assert second[0] in ("ArgumentError", "OptimizerError", "CheckpointError"), (first, second)
    name = what.removeprefix("optimizer.")
    said = name if name.endswith("Trainer") else f"Trainer.{name}"
    assert f"rank 1: {said} refused: {second[1]}"[:60] in first[1], (first, second)


@pytest.mark.parametrize("mode", ["broadcast", "mean"])
def test_a_buffer_that_cannot_be_written_is_refused(mode):
    model = nn.Linear(2, 1)
    model.register_buffer("scale", torch.zeros(1).expand(8))
    with tensorkv.create() as kv:
        with pytest.raises(tensorkv.ArgumentError, match='the buffer "scale" is expanded'):
            Trainer(model, kv, lr=0.1, buffers=mode)
        assert kv.keys() == []
        Trainer(model, kv, lr=0.1)


def test_overlap_cannot_agree():
    with tensorkv.create() as kv:
        with pytest.raises(tensorkv.ArgumentError, match='unused="agree" needs overlap=False'):
            Trainer(nn.Linear(2, 1), kv, lr=0.1, overlap=True, unused="agree")
        assert len(kv) == 0


# ---------------------------------------------------------------- buffers


def _mean(name, states):
    return np.asarray([state[name] for state in states]).mean(0)


def _check_buffers(mode, ranks):
    """Each rank's buffers of each replica: at the start, after a forward pass, after the step."""
    start, forward, end = ([state for rank in ranks for state in rank[moment]] for moment in range(3))
    if mode == "local":
        assert [state["small"][0][0] for state in start] == list(range(len(start)))
        assert end == forward
        return
    assert all(state == start[0] for state in start)
    assert start[0]["flag"] is True
    assert all(state == end[0] for state in end)
    assert any(state != forward[0] for state in forward)
    for name, value in end[0].items():
        if mode == "broadcast" or name in ("norm.num_batches_tracked", "flag"):
            assert value == forward[0][name]
        else:
            np.testing.assert_allclose(value, _mean(name, forward), rtol=1e-6)


@pytest.mark.parametrize("mode", ["local", "broadcast", "mean"])
def test_buffers_of_replicas(mode):
    _check_buffers(mode, [programs.buffers("local", mode, 3)])


def test_buffers_of_workers():
    ranks = run(2, programs.buffers_in_every_mode, "dist_sync")
    for mode in ("local", "broadcast", "mean"):
        _check_buffers(mode, [rank[mode] for rank in ranks])


def test_workers_with_other_buffers_get_an_error():
    for message in run(2, programs.other_buffers):
        assert "the workers' calls differ" in message
        assert "buffers" in message


def test_workers_that_are_not_in_lock_step_have_local_buffers(monkeypatch):
    model = nn.BatchNorm1d(2)
    with tensorkv.create() as kv:
        monkeypatch.setattr(type(kv._engine), "num_workers", 2)
        with pytest.raises(tensorkv.ArgumentError, match='buffers="mean" needs workers in lock step'):
            Trainer(model, kv, lr=0.1, buffers="mean")
        assert len(kv) == 0
        Trainer(model, kv, lr=0.1)


def test_replicas_with_other_buffers():
    replicas = [nn.BatchNorm1d(2), nn.BatchNorm1d(2)]
    replicas[1].register_buffer("more", torch.zeros(1))
    with tensorkv.create() as kv:
        with pytest.raises(tensorkv.ArgumentError, match="the buffers of replicas differ"):
            Trainer(replicas, kv, lr=0.1, buffers="mean")
        assert len(kv) == 0
