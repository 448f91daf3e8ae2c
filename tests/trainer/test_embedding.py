"""Embedding and EmbeddingBag: layers whose table is in a store learn as torch's do."""

import copy
import gc
import threading
import weakref
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import tensorkv
from tensorkv import Embedding, EmbeddingBag, Rows, Trainer
from tests.support.amount import amount
from tests.support.workers import run
from tests.trainer.embedding_programs import clip, clip_together, learn_together

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.1}),
    "adam": (torch.optim.SparseAdam, {"lr": 0.1}),
}
N, D = 50, 6


@pytest.fixture
def kv():
    with tensorkv.create() as store:
        yield store


def whole(kv, key="t", rows=N):
    """All rows of a table."""
    return torch.as_tensor(kv.row_sparse_pull(key, row_ids=range(rows)).values)


def batches(steps, shape=(4, 7), low=0):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(low, N, shape, generator=generator) for _ in range(steps)]


def loss(vectors):
    """Of which the gradient differs from element to element."""
    return (vectors * torch.linspace(-1, 1, vectors.numel()).view(vectors.shape)).sum() + vectors.square().sum()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_learns_as_torch_does(kv, optimizer, padding_idx):
    kind, numbers = OPTIMIZERS[optimizer]
    mine = Embedding(kv, "t", N, D, padding_idx=padding_idx, std=0.5, seed=3)
    kv.set_optimizer(optimizer, **numbers)
    theirs = nn.Embedding(N, D, padding_idx=padding_idx, sparse=True)
    with torch.no_grad():
        theirs.weight.copy_(whole(kv))
        if padding_idx is not None:
            theirs.weight[padding_idx] = 0
    step = kind(theirs.parameters(), **numbers)
    for ids in batches(5):
        step.zero_grad()
        vectors, expected = mine(ids), theirs(ids)
        torch.testing.assert_close(vectors, expected)
        loss(expected).backward()
        loss(vectors).backward()
        step.step()
        mine.step()
    final = whole(kv)
    if padding_idx is not None:
        final[padding_idx] = 0
        first = Embedding(kv, "u", N, D, padding_idx=padding_idx)
        assert len(first(torch.tensor([first.padding_idx])).unique()) == 1
    torch.testing.assert_close(final, theirs.weight.detach())
    assert kv.info("t").version == 5


def test_the_padding_row_is_not_pushed(kv):
    layer = Embedding(kv, "t", N, D, padding_idx=0)
    kv.set_optimizer("adam", lr=0.1)
    loss(layer(torch.tensor([0, 5, 0]))).backward()
    layer.step()
    assert kv.info("t").nbytes == D * 4


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags(kv, mode):
    mine = EmbeddingBag(kv, "t", N, D, mode=mode, padding_idx=2)
    kv.set_optimizer("sgd", lr=0.5)
    theirs = nn.EmbeddingBag(N, D, mode=mode, padding_idx=2)
    theirs.weight.data.copy_(whole(kv))
    step = torch.optim.SGD(theirs.parameters(), lr=0.5)
    weights = torch.linspace(0, 1, 28).view(4, 7) if mode == "sum" else None
    for ids in batches(3):
        ids[:, 0] = 2
        for given in ((ids, None, weights), (ids.flatten(), torch.tensor([0, 3, 3]), None)):
            step.zero_grad()
            vectors, expected = mine(*given), theirs(*given)
            torch.testing.assert_close(vectors, expected)
            loss(expected).backward()
            loss(vectors).backward()
            step.step()
            mine.step()
    torch.testing.assert_close(whole(kv), theirs.weight.detach())


def test_weights_of_samples_get_gradients(kv):
    layer = EmbeddingBag(kv, "t", N, D, mode="sum", init=2.0)
    weights = torch.ones(1, 3, requires_grad=True)
    layer(torch.tensor([[1, 2, 1]]), per_sample_weights=weights).sum().backward()
    assert weights.grad.tolist() == [[2.0 * D] * 3]


def test_gradients_of_several_passes_are_one_update(kv):
    layer = Embedding(kv, "t", N, D, init=0.0)
    kv.set_optimizer("sgd", lr=1.0)
    first, second = layer(torch.tensor([1, 1])), layer(torch.tensor([[2], [1]]))
    second.sum().backward()
    first.sum().backward()
    layer(torch.tensor(4)).sum().backward()
    layer.step()
    assert whole(kv)[:5, 0].tolist() == [0, -3, -1, 0, -1]
    assert kv.info("t").version == 1
    again = layer(torch.tensor([7]))
    again.sum().backward(retain_graph=True)
    again.sum().backward()
    layer.step()
    assert whole(kv)[7, 0] == -2


@pytest.mark.parametrize("padding_idx", [None, 0])
def test_a_mean_does_not_count_passes(padding_idx):
    """Of replicas and workers alone, as for parameters: of a model with two towers, or accumulated batches."""
    with tensorkv.create(reduce="mean") as kv:
        layer = Embedding(kv, "t", N, D, init=1.0, padding_idx=padding_idx)
        kv.set_optimizer("sgd", lr=1.0)
        (layer(torch.tensor([1, 0])).sum() + layer(torch.tensor([2], dtype=torch.int32)).sum()).backward()
        layer(torch.tensor([1, 3])).sum().backward()
        assert len(layer._gradients) == 1
        layer.step()
        assert whole(kv)[1:5, 0].tolist() == [-1, 0, 0, 1]


def test_a_mean_counts_replicas():
    """Those without gradients, too, and not the layers of a replica that have one table."""
    with tensorkv.create(reduce="mean") as kv:
        model = nn.ModuleList([nn.Linear(1, 1), *(Embedding(kv, "t", N, D, init=1.0) for _ in range(2))])
        replicas = [model, copy.deepcopy(model)]
        trainer = Trainer(replicas, kv, "sgd", lr=1.0)
        for layer in model[1:]:
            layer(torch.tensor([1, 2])).sum().backward()
        replicas[1][1](torch.tensor([2])).sum().backward()
        trainer.step()
        assert whole(kv)[1:4, 0].tolist() == [0, -0.5, 1]
        model[1](torch.tensor([3])).sum().backward()
        trainer.step()
        assert whole(kv)[3, 0] == 0.5


@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_keep_no_graph(kv):
    layer = Embedding(kv, "t", N, D, init=1.0)
    kv.set_optimizer("sgd", lr=1.0)
    for _ in range(2):
        layer(torch.tensor([1])).square().sum().backward(create_graph=True)
    assert not layer._gradients[0].values.requires_grad
    layer.step()
    assert whole(kv)[1, 0] == -3


def test_gradients_of_a_push_that_fails_are_kept(kv, monkeypatch):
    layer = Embedding(kv, "t", N, D, init=0.0)
    kv.set_optimizer("sgd", lr=1.0)
    layer(torch.tensor([1])).sum().backward()

    def push(*_):
        layer(torch.tensor([1, 2])).sum().backward()
        raise tensorkv.StorageError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(kv, "push", push)
        with pytest.raises(tensorkv.StorageError):
            layer.step()
    layer.step()
    assert whole(kv)[:4, 0].tolist() == [0, -2, -1, 0]


def test_gradients_that_arrive_during_a_push_are_kept(kv, monkeypatch):
    layer = Embedding(kv, "t", N, D, init=0.0)
    kv.set_optimizer("sgd", lr=1.0)
    layer(torch.tensor([1])).sum().backward()
    real = kv.push

    def push(*given):
        real(*given)
        # What another thread does meanwhile.
        monkeypatch.setattr(kv, "push", real)
        layer.step()
        layer(torch.tensor([2])).sum().backward()

    monkeypatch.setattr(kv, "push", push)
    layer.step()
    assert whole(kv)[:4, 0].tolist() == [0, -1, 0, 0]
    layer.step()
    assert whole(kv)[:4, 0].tolist() == [0, -1, -1, 0]


def test_threads_lose_no_gradients(kv):
    layer = Embedding(kv, "t", N, D, init=0.0)
    kv.set_optimizer("sgd", lr=1.0)

    def learn():
        for _ in range(50):
            layer(torch.tensor([1, 2])).sum().backward()
            layer.step()

    threads = [threading.Thread(target=learn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    layer.step()
    assert whole(kv)[:4, 0].tolist() == [0, -200, -200, 0]


def test_zero_grad_forgets(kv):
    model = nn.Sequential(Embedding(kv, "t", N, D, init=0.0))
    kv.set_optimizer("sgd", lr=1.0)
    model(torch.tensor([1])).sum().backward()
    model[0].zero_grad()
    model[0].step()
    assert not whole(kv).any()


def test_passes_without_gradients_keep_nothing(kv):
    layer = Embedding(kv, "t", N, D)
    with torch.no_grad():
        assert not layer(torch.tensor([1])).requires_grad
    with torch.inference_mode():
        layer(torch.tensor([1]))
    assert kv.info("t").nbytes == 0
    layer.eval()
    kept = []
    original = layer._keep
    layer._keep = lambda *given: kept.append(weakref.ref(hook := original(*given))) or hook
    vectors = layer(torch.tensor([1, 2]))
    assert kept[0]() is not None
    del vectors
    gc.collect()
    assert kept[0]() is None, "rows of a pass without a backward pass are freed"


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ids_of_any_shape(kv, shape, dtype):
    layer = Embedding(kv, "t", N, D)
    kv.set_optimizer("adam", lr=0.1)
    vectors = layer(torch.ones(shape, dtype=dtype))
    assert vectors.shape == (*shape, D)
    loss(vectors).backward()
    layer.step()
    assert kv.info("t").version == 1


def test_low_precision_adds_gradients_before_it_rounds(kv):
    layer = Embedding(kv, "t", 3, 1, dtype=torch.float16, init=0.0)
    kv.set_optimizer("sgd", lr=1.0)
    vectors = layer(torch.tensor([1, 1, 1]))
    assert vectors.dtype is torch.float16
    # 2048 + 1 is 2048 in float16.
    (vectors.flatten() * torch.tensor([2048, 1, 1], dtype=torch.float16)).sum().backward()
    layer.step()
    assert layer(torch.tensor([1])).item() == -2050


@pytest.mark.parametrize("library", ["numpy", "torch", "dense"])
def test_a_key_that_the_store_has_is_used_as_it_is(kv, library):
    values = np.full((1, D), 3, np.float32)
    if library == "dense":
        kv.init("t", np.full((N, D), 3, np.float32))
    else:
        kv.init("t", Rows([4], values if library == "numpy" else torch.from_numpy(values), N))
    layer = Embedding(kv, "t", N, D)
    kv.set_optimizer("sgd", lr=1.0)
    vectors = layer(torch.tensor([4]))
    assert vectors.tolist() == [[3.0] * D]
    vectors.sum().backward()
    layer.step()
    assert layer(torch.tensor([4])).tolist() == [[2.0] * D]
    with pytest.raises(tensorkv.ValueMismatchError, match=r'Embedding: "t" has shape \(50, 6\)'):
        Embedding(kv, "t", N, D + 1)
    with pytest.raises(tensorkv.ValueMismatchError, match="float64"):
        Embedding(kv, "t", N, D, dtype=torch.float64)


def test_arrays_that_cannot_be_written_are_left_alone(kv):
    jnp = pytest.importorskip("jax.numpy")
    kv.init("t", Rows([4], jnp.full((1, D), 3.0), N, init=1.0))
    layer = Embedding(kv, "t", N, D, padding_idx=4)
    assert layer(torch.tensor([4, 5]))[:, 0].tolist() == [0, 1]


def test_copies_share_the_table_and_not_gradients(kv):
    model = nn.Sequential(Embedding(kv, "t", N, D, init=0.0), nn.Linear(D, 1))
    other = copy.deepcopy(model)
    assert other[0].kv is kv
    assert other[1].weight is not model[1].weight
    kv.set_optimizer("sgd", lr=1.0)
    other[0](torch.tensor([1])).sum().backward()
    model[0].step()
    assert not whole(kv).any()
    other[0].step()
    assert whole(kv)[1, 0] == -1


def test_copies_keep_what_subclasses_share(kv):
    class Head(Embedding):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.output = nn.Linear(D, D)
            self.outputs = [self.output, self.kv]

    model = nn.ModuleList([Head(kv, "t", N, D, init=0.0)])
    model.append(model[0].output)
    other = copy.deepcopy(model)
    assert other[1] is other[0].output is other[0].outputs[0]
    assert other[0].outputs[1] is kv
    assert other[1].weight is not model[1].weight
    kv.set_optimizer("sgd", lr=1.0)
    shallow = copy.copy(model[0])
    assert (type(shallow), shallow.output) == (Head, model[1])
    shallow(torch.tensor([1])).sum().backward()
    Trainer(nn.ModuleList([model[0], shallow]), kv, "sgd", lr=1.0).step()
    assert whole(kv)[1, 0] == -1


def test_a_trainer_steps_the_layers_of_its_replicas(kv):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.users, self.items = (Embedding(kv, key, N, D, init=1.0) for key in ("users", "items"))
            self.bias = nn.Parameter(torch.zeros(1))

        def forward(self, users, items):
            return (self.users(users) * self.items(items)).sum(-1) + self.bias

    model = Model()
    replicas = [model, copy.deepcopy(model)]
    trainer = Trainer(replicas, kv, "sgd", lr=0.5)
    assert kv.keys() == ["users", "items", "bias"]
    for replica, user in zip(replicas, (3, 3), strict=True):
        replica(torch.tensor([user]), torch.tensor([4])).sum().backward()
    trainer.step()
    assert whole(kv, "users")[2:5, 0].tolist() == [1, 0, 1]
    assert [replica.bias.item() for replica in replicas] == [-1, -1]
    assert [kv.info(key).version for key in kv.keys()] == [1, 1, 1]
    model(torch.tensor([3]), torch.tensor([5])).sum().backward()
    trainer.zero_grad()
    trainer.step()
    assert whole(kv, "users")[2:5, 0].tolist() == [1, 0, 1]
    with pytest.raises(tensorkv.ArgumentError, match="update_on_store"):
        Trainer(model, kv, "sgd", lr=0.5, prefix="other.", update_on_store=False)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_trainer_of_tables_alone(kv, overlap):
    model = nn.ModuleList([Embedding(kv, "users", N, D, init=1.0), Embedding(kv, "items", N, D, init=1.0)])
    trainer = Trainer(model, kv, "sgd", lr=0.5, overlap=overlap)
    for _ in range(2):
        trainer.zero_grad()
        (model[0](torch.tensor([3])) * model[1](torch.tensor([4]))).sum().backward()
        trainer.step()
    # 1 - 0.5 * 1 for each, then 0.5 - 0.5 * 0.5.
    assert whole(kv, "users")[2:5, 0].tolist() == [1, 0.25, 1]
    assert whole(kv, "items")[3:6, 0].tolist() == [1, 0.25, 1]
    trainer.learning_rate = 0.25
    assert kv.optimizer["lr"] == 0.25
    state = trainer.state_dict()
    trainer.load_state_dict(state)
    trainer.optimizer.load_state_dict(trainer.optimizer.state_dict())
    trainer.refresh()
    assert trainer.keys == []
    assert repr(trainer) == "Trainer(0 keys, 1 replica)"


@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_an_optimizer_that_cannot_step_tables_is_refused_at_once(kv, optimizer):
    model = nn.Sequential(Embedding(kv, "t", N, D), nn.Linear(D, 1, bias=False))
    with pytest.raises(
        tensorkv.OptimizerError, match=f'Trainer: {optimizer} needs whole gradients.*table "t" are Rows'
    ):
        Trainer(model, kv, optimizer, lr=0.1)
    assert kv.keys() == ["t"]
    assert kv.optimizer is None
    Trainer(model, kv, "adam", lr=0.1)


def test_a_table_that_comes_later_is_refused_at_once(kv):
    model = nn.Sequential(nn.Linear(D, 2, bias=False), nn.Linear(2, 1, bias=False))
    model[1].weight.requires_grad_(False)
    trainer = Trainer(model, kv, "muon", lr=0.1)
    model.append(Embedding(kv, "t", N, D))
    model[1].weight.requires_grad_(True)
    with pytest.raises(tensorkv.OptimizerError, match=r"add_param_group: muon needs whole gradients, and .* are Rows"):
        trainer.optimizer.add_param_group({"params": ["1.weight"]})
    assert trainer.keys == ["0.weight"]
    assert kv.keys() == ["0.weight", "t"]


def test_a_step_with_tables_is_one_call(kv):
    model = TableModel(kv)
    trainer = Trainer(model, kv, "sgd", lr=1.0)
    for _ in range(3):
        trainer.zero_grad()
        model(torch.tensor([7])).backward()
        trainer.step()
    verbs = kv.stats()["verbs"]
    assert verbs["pushpull"]["calls"] == 3
    assert "push" not in verbs or verbs["push"]["calls"] == 0
    assert (model.bias.item(), whole(kv)[7, 0].item()) == (-3, -3)


def test_the_norm_of_a_step_has_the_rows_of_tables(kv):
    model = TableModel(kv)
    replicas = [model, copy.deepcopy(model)]
    trainer = Trainer(replicas, kv, "sgd", lr=1.0, max_grad_norm=0.5)
    for replica in replicas:
        replica(torch.tensor([7]), factor=3.0, offset=4.0).backward()
    norm = (D * 6.0**2 + 8.0**2) ** 0.5
    assert trainer.step() == (False, norm)
    moved = torch.cat([whole(kv).flatten(), model.bias.detach()])
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-5)
    assert moved[-1].item() == pytest.approx(-8 * 0.5 / norm)


@pytest.mark.parametrize("bad", ["table", "parameter"])
def test_a_step_that_is_not_finite_moves_neither_parameters_nor_tables(bad):
    with tensorkv.create(nonfinite="skip_step") as kv:
        model = TableModel(kv)
        trainer = Trainer(model, kv, "adam", lr=1.0)
        for step in range(4):
            factors = [1.0, 1.0]
            factors[bad == "parameter"] = float("inf") if step == 1 else 1.0
            trainer.zero_grad()
            model(torch.tensor([7]), *factors).backward()
            before = model.bias.item(), whole(kv)[7, 0].item()
            assert trainer.step().found_inf is (step == 1)
            after = model.bias.item(), whole(kv)[7, 0].item()
            assert [one == other for one, other in zip(before, after, strict=True)] == [step == 1] * 2
        assert [kv.info(key).version for key in kv.keys()] == [3, 3]


def test_gradients_of_tables_stay_if_a_step_raises():
    with tensorkv.create(nonfinite="raise") as kv:
        model = TableModel(kv)
        trainer = Trainer(model, kv, "sgd", lr=1.0)
        model(torch.tensor([7]), offset=float("inf")).backward()
        with pytest.raises(tensorkv.NonFiniteError, match='"bias"'):
            trainer.step()
        assert (model.bias.item(), whole(kv).abs().sum().item()) == (0, 0)
        model.bias.grad = None
        trainer.step()
        assert whole(kv)[7, 0].item() == -1


def test_buckets_and_tables_are_one_step(kv):
    model = TableModel(kv)
    trainer = Trainer(model, kv, "sgd", lr=1.0, overlap=True)
    for expected in (-1, -2, -3):
        trainer.zero_grad()
        model(torch.tensor([7])).backward()
        trainer.step()
        assert (model.bias.item(), whole(kv)[7, 0].item()) == (expected, expected)


class TableModel(nn.Module):
    """A table and a bias."""

    def __init__(self, kv, dtype=torch.float32, key="t"):
        super().__init__()
        self.table, self.bias = Embedding(kv, key, N, D, init=0.0, dtype=dtype), nn.Parameter(torch.zeros(1))

    def forward(self, ids, factor=1.0, offset=1.0):
        return (self.table(ids) * factor).sum().float() + self.bias * offset


@pytest.mark.parametrize("unscales", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_scaler_scales_the_gradients_of_tables(kv, dtype, unscales):
    model = TableModel(kv, dtype)
    replicas = [model, copy.deepcopy(model)]
    trainer = Trainer(replicas, kv, "sgd", lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor, expected in ((3.0, -6), (float("inf"), -6), (1.0, -8)):
        trainer.optimizer.zero_grad()
        for replica in replicas:
            scaler.scale(replica(torch.tensor([7]), factor)).backward()
        if unscales:
            scaler.unscale_(trainer.optimizer)
            assert model.bias.grad.item() == 1
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        scaler.step(trainer.optimizer)
        scaler.update()
        assert whole(kv)[7].tolist() == [expected] * D
    assert scaler.get_scale() == 512
    assert [kv.info(key).version for key in ("t", "bias")] == [2, 2]


def test_a_scaled_step_of_tables_that_is_refused_can_be_repeated(kv):
    model = TableModel(kv)
    trainer = Trainer(model, kv, "sgd", lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.tensor([7]))).backward()
    trainer.param_groups[0]["lr"] = -1.0
    with pytest.raises(tensorkv.OptimizerError, match="learning rate"):
        scaler.step(trainer.optimizer)
    trainer.param_groups[0]["lr"] = 1.0
    scaler.step(trainer.optimizer)
    assert whole(kv)[7].tolist() == [-1.0] * D


def test_a_scaler_lowers_its_scale_if_only_a_table_overflows(kv):
    model = TableModel(kv, torch.float16)
    trainer = Trainer(model, kv, "sgd", lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    steps = 0
    while kv.info("t").version == 0:
        assert steps < 10, "the scale does not fall"
        # As a model does that does not know of tables: gradients of a step that is left out are gone.
        model.zero_grad()
        scaler.scale(model(torch.tensor([7]))).backward()
        scaler.step(trainer.optimizer)
        scaler.update()
        steps += 1
    assert (steps, scaler.get_scale()) == (6, 2.0**15)
    assert whole(kv)[7].tolist() == [-1.0] * D


def test_a_step_that_is_repeated_pushes_no_bucket_again():
    with tensorkv.create(nonfinite="raise") as kv:
        model = TableModel(kv)
        trainer = Trainer(model, kv, "sgd", lr=1.0, overlap=True)
        for version, factor in ((1, 1.0), (2, float("inf")), (3, 1.0)):
            trainer.zero_grad()
            model(torch.tensor([7]), factor).backward()
            if factor != 1:
                with pytest.raises(tensorkv.NonFiniteError, match='"t"'):
                    trainer.step()
                model.table.zero_grad()
            trainer.step()
            assert (kv.info("bias").version, model.bias.item()) == (version, -version)


def test_gradients_of_tables_are_clipped_through_the_groups(kv):
    model = TableModel(kv)
    trainer = Trainer(model, kv, "sgd", lr=1.0)
    count = len(trainer.param_groups[0]["params"])
    model(torch.tensor([7]), factor=3.0, offset=4.0).backward()
    params = trainer.param_groups[0]["params"]
    assert len(params) == count + 1
    assert nn.utils.clip_grad_norm_(params, 0.5).item() == pytest.approx((9 * D + 16) ** 0.5)
    trainer.step()
    norm = (whole(kv).square().sum() + model.bias.detach().square()).sqrt()
    assert norm.item() == pytest.approx(0.5, rel=1e-5)
    assert len(trainer.param_groups[0]["params"]) == count
    assert trainer.optimizer.state_dict()["param_groups"][0]["params"] == [0]


@pytest.mark.parametrize("has_more", [False, True])
@pytest.mark.parametrize("groups", [None, [{"params": "bias"}, {"params": "other", "momentum": 0.5}]])
def test_a_scheduler_sets_the_learning_rate_of_tables(kv, groups, has_more):
    model = TableModel(kv)
    model.other = nn.Parameter(torch.zeros(1))
    if has_more:
        kv.init("more", torch.zeros(1))
    trainer = Trainer(model, kv, "sgd", lr=1.0, param_groups=groups)
    scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 1, gamma=0.5)
    saved = trainer.optimizer.state_dict()
    for expected in (-1.0, -1.5, -1.75):
        trainer.zero_grad()
        model(torch.tensor([7])).backward()
        trainer.step()
        scheduler.step()
        assert whole(kv)[7].tolist() == [expected] * D
        assert model.bias.item() == expected
    assert kv.optimizer["lr"] == (1.0 if has_more else 0.25)
    if has_more:
        kv.push("more", torch.ones(1))
        assert kv.pull("more").item() == -1
    trainer.optimizer.load_state_dict(saved)
    model(torch.tensor([7])).backward()
    trainer.step()
    assert whole(kv)[7].tolist() == [-2.75] * D


@pytest.mark.parametrize("rates", [(1.0, 0.5), (0.5, 1.0), (0.25, 1.0)])
@pytest.mark.parametrize("has_more", [True, False])
def test_a_number_of_all_groups_is_the_tables_too_if_some_have_it_already(kv, has_more, rates):
    model = TableModel(kv)
    model.other = nn.Parameter(torch.zeros(1))
    if has_more:
        kv.init("more", torch.zeros(1))
    groups = [{"params": name, "lr": lr} for name, lr in zip(("bias", "other"), rates, strict=True)]
    trainer = Trainer(model, kv, "sgd", lr=1.0, param_groups=groups)
    for group in trainer.param_groups:
        group["lr"] = 0.5
    model(torch.tensor([7])).backward()
    trainer.step()
    assert whole(kv)[7].tolist() == [-0.5] * D
    assert model.bias.item() == -0.5


def test_a_number_that_all_groups_come_to_have_leaves_those_of_single_keys_alone(kv):
    model = TableModel(kv)
    model.other, model.fixed = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    groups = [{"params": "bias", "lr": 1.0}, {"params": ["other", "fixed"], "lr": 0.5}]
    trainer = Trainer(model, kv, "sgd", lr=1.0, param_groups=groups)
    kv.set_hyperparameters("fixed", lr=0.0)
    trainer.param_groups[0]["lr"] = 0.5
    (model(torch.tensor([7])) + model.other + model.fixed).sum().backward()
    trainer.step()
    assert whole(kv)[7].tolist() == [-0.5] * D
    assert [each.item() for each in (model.bias, model.other, model.fixed)] == [-0.5, -0.5, 0]


def test_a_step_that_is_repeated_after_an_error_of_buffers_pushes_no_bucket_again(kv, monkeypatch):
    model = TableModel(kv)
    model.norm = nn.BatchNorm1d(1)
    trainer = Trainer(model, kv, "sgd", lr=1.0, overlap=True, buffers="mean")
    synchronise = trainer.optimizer._buffers.synchronise
    for version in (1, 2):
        trainer.zero_grad()
        model(torch.tensor([7])).backward()
        monkeypatch.setattr(
            trainer.optimizer._buffers, "synchronise", mock.Mock(side_effect=tensorkv.WorkerError("away"))
        )
        with pytest.raises(tensorkv.WorkerError, match="away"):
            trainer.step()
        monkeypatch.setattr(trainer.optimizer._buffers, "synchronise", synchronise)
        trainer.step()
        assert (kv.info("bias").version, model.bias.item()) == (version, -version)


def test_a_group_that_is_added_leaves_the_numbers_of_tables_alone(kv):
    model = TableModel(kv)
    model.other = nn.Parameter(torch.zeros(1), requires_grad=False)
    trainer = Trainer(model, kv, "sgd", lr=1.0, param_groups=[{"params": "bias", "lr": 0.5}])
    model.other.requires_grad_()
    trainer.optimizer.add_param_group({"params": "other", "lr": 0.5})
    model(torch.tensor([7])).backward()
    trainer.step()
    assert whole(kv)[7].tolist() == [-1.0] * D


def test_a_number_of_one_group_is_not_the_tables(kv):
    model = TableModel(kv)
    model.other = nn.Parameter(torch.zeros(1))
    trainer = Trainer(model, kv, "sgd", lr=1.0, param_groups=[{"params": "bias"}, {"params": "other"}])
    trainer.param_groups[1]["lr"] = 0.5
    model(torch.tensor([7])).backward()
    trainer.step()
    assert whole(kv)[7].tolist() == [-1.0] * D


def test_no_parameter_moves_if_the_store_of_a_table_has_no_optimizer(kv):
    with tensorkv.create() as other:
        model = TableModel(other)
        trainer = Trainer(model, kv, "sgd", lr=1.0)
        model(torch.tensor([7])).backward()
        with pytest.raises(tensorkv.OptimizerError, match=r'"t": the store has no optimizer'):
            trainer.step()
        assert (model.bias.item(), kv.info("bias").version) == (0, 0)
        other.set_optimizer("sgd", lr=2.0)
        trainer.step()
        assert (model.bias.item(), whole(other)[7, 0].item()) == (-1, -2)


def test_layers_that_are_added_later_take_part_with_the_next_group(kv):
    model = TableModel(kv)
    trainer = Trainer(model, kv, "sgd", lr=1.0)
    model.more = TableModel(kv, key="more")
    trainer.optimizer.add_param_group({"params": "more.bias"})
    (model(torch.tensor([7])) + model.more(torch.tensor([7]))).backward()
    trainer.param_groups[0]["lr"] = trainer.param_groups[1]["lr"] = 0.5
    trainer.step()
    assert (whole(kv)[7, 0].item(), whole(kv, "more")[7, 0].item(), model.more.bias.item()) == (-0.5, -0.5, -0.5)
    assert kv.optimizer["lr"] == 0.5


def test_a_layer_that_is_frozen_does_not_move(kv):
    model = TableModel(kv)
    trainer = Trainer(model, kv, "sgd", lr=1.0)
    assert model.table.requires_grad_(False) is model.table
    for expected in (0, -1):
        model(torch.tensor([7])).backward()
        trainer.step()
        assert whole(kv)[7, 0].item() == expected
        model.table.requires_grad_()


def test_a_store_without_an_optimizer_is_refused(kv):
    layer = Embedding(kv, "t", N, D)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(tensorkv.OptimizerError, match=r'"t": the store has no optimizer'):
        layer.step()
    assert kv.info("t").version == 0
    kv.set_optimizer("sgd", lr=1.0)
    layer.step()
    kv.set_updater(None)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(tensorkv.OptimizerError, match=r'"t": the store has no optimizer, and gradients would replace'):
        layer.step()
    kv.set_updater(lambda key, received, stored: None)
    with pytest.raises(tensorkv.OptimizerError, match=r'"t": the store has an updater, and tables need an optimizer'):
        layer.step()
    assert kv.info("t").version == 1


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ((3, "t", N, D), {}, "Embedding: kv is 3"),
        ((None, "t", 0, D), {}, "num_embeddings is 0"),
        ((None, "t", N, 1.5), {}, "embedding_dim is 1.5"),
        ((None, "t", N, D), {"dtype": torch.int64}, "dtype is torch.int64"),
        ((None, "t", N, D), {"padding_idx": N}, r"padding_idx is 50; expected an int in \[-50, 50\)"),
        ((None, "t", N, D), {"init": "xavier"}, "init is 'xavier'"),
        ((None, "t", N, D), {"a": 1}, "has no a"),
        (
            (None, "t", N, D),
            {"max_norm": 1.0},
            "Embedding: got an unexpected argument 'max_norm'; expected padding_idx",
        ),
        ((None, "t", N, D), {"mode": "sum", "sparse": True}, "EmbeddingBag: got an unexpected argument 'sparse'"),
        ((None, "t", N, D), {"mode": "median"}, "mode is 'median'"),
    ],
)
def test_bad_arguments(kv, given, options, message):
    kind = EmbeddingBag if "mode" in options else Embedding
    with pytest.raises(tensorkv.ArgumentError, match=message):
        kind(*(kv if each is None else each for each in given), **options)
    assert kv.keys() == []


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([1], tensorkv.ArrayTypeError),
        (torch.tensor([1.0]), tensorkv.ArrayTypeError),
        (torch.tensor([N]), tensorkv.ValueMismatchError),
        (torch.tensor([-1]), tensorkv.ValueMismatchError),
    ],
)
def test_bad_ids(kv, ids, error):
    with pytest.raises(error, match='"t"'):
        Embedding(kv, "t", N, D)(ids)


def test_it_shows_what_it_is(kv):
    assert repr(Embedding(kv, "t", N, D, padding_idx=-1)) == 'Embedding("t", 50, 6, padding_idx=49)'
    assert repr(EmbeddingBag(kv, 't"', N, D)).endswith("50, 6, mode='mean')")


# ---------------------------------------------------------------- several workers and servers


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_together_learn_as_one(workers):
    """With batches of unequal size, and workers without one."""
    run(workers, learn_together)


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_clip_tables_as_one(workers):
    run(workers, clip_together)


@pytest.mark.parametrize("servers", [1, 3])
def test_servers_clip_tables_as_a_local_store_does(server_pool, servers, kv):
    with server_pool.create(num_servers=servers) as theirs:
        found = [clip(store, [[0, 1, 2]] * 3) for store in (kv, theirs)]
    assert found[0][0] == found[1][0]
    assert all(map(torch.equal, found[0][1], found[1][1]))


def test_servers_without_an_optimizer_are_refused(server_pool):
    with server_pool.create(num_servers=3) as kv:
        layer = Embedding(kv, "t", N, D, init=0.0)
        layer(torch.tensor([1])).sum().backward()
        for _ in range(2):
            with pytest.raises(tensorkv.OptimizerError, match=r'"t": the store has no optimizer'):
                layer.step()
            kv.set_optimizer("sgd", lr=1.0)
            layer.step()
            kv.set_updater(None)
        assert whole(kv)[1, 0] == -1


@pytest.mark.parametrize("servers", amount([1, 3], [1, 2, 3]))
def test_servers_hold_what_a_local_store_holds(ray_store, servers, kv, tmp_path):
    path = tmp_path / "servers"
    options = {"name": f"layers on {servers}", "num_servers": servers, "num_workers": 1, "path": path}
    with tensorkv.create("dist_async", **options) as theirs:
        found = [learn(store) for store in (kv, theirs)]
        theirs.save(tmp_path / "saved")
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other)
    with tensorkv.create("dist_async", **options) as theirs, tensorkv.create() as local:
        local.load(tmp_path / "saved")
        for store in (theirs, local):
            # The durable servers, and a checkpoint of theirs, start the same rows in the same way.
            assert torch.equal(whole(store), found[0][0])
            assert store.info("t").nbytes == kv.info("t").nbytes


def learn(store):
    """Train two layers; return their tables."""
    layers = [Embedding(store, "t", N, D, padding_idx=1, std=0.3), EmbeddingBag(store, "u", N, D, init="uniform")]
    store.set_optimizer("adagrad", lr=0.1)
    for ids in batches(4, (3, 4)):
        for layer in layers:
            loss(layer(ids % 20)).backward()
        for layer in layers:
            layer.step()
    return whole(store, "t"), whole(store, "u")
