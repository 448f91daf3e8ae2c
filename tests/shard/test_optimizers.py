"""Optimizers: the same numbers as torch.optim, for the keys of a push alone, from names and numbers alone."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tensorkv
from tensorkv import OptimizerError, Rows
from tensorkv.arrays.interop import dtype_name
from tensorkv.runtime import _compat
from tensorkv.shard import native, optimizers
from tensorkv.shard.fused import FUSED
from tensorkv.shard.optimizers import CLASSES, ROWWISE, OptimizerSpec, spec
from tensorkv.testing.values import check_neighbours

# Numbers other than the defaults, several for some.
NUMBERS = [
    ("sgd", {"lr": 0.1}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "maximize": True}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("adam", {"lr": 0.1}),
    ("adam", {"lr": 0.1, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1, "amsgrad": True}),
    ("adam", {"lr": 0.1, "maximize": True, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("adamw", {"lr": 0.1}),
    ("adamw", {"lr": 0.1, "weight_decay": 0.2, "amsgrad": True, "maximize": True}),
    ("adagrad", {"lr": 0.1}),
    ("adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.3, "weight_decay": 0.1, "maximize": True}),
    ("adadelta", {"lr": 0.5}),
    ("adadelta", {"lr": 0.5, "rho": 0.8, "weight_decay": 0.1, "maximize": True}),
    ("adafactor", {"lr": 0.1}),
    ("adafactor", {"lr": 0.1, "eps": (1e-8, 1e-2), "d": 1.5, "weight_decay": 0.1, "maximize": True}),
    ("adamax", {"lr": 0.1}),
    ("adamax", {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.1, "maximize": True}),
    ("asgd", {"lr": 0.1}),
    ("asgd", {"lr": 0.1, "lambd": 0.01, "alpha": 0.5, "t0": 3.0, "weight_decay": 0.1, "maximize": True}),
    ("muon", {"lr": 0.1}),
    ("muon", {"lr": 0.1, "nesterov": False, "momentum": 0.5, "weight_decay": 0.0, "ns_steps": 3}),
    ("nadam", {"lr": 0.1}),
    ("nadam", {"lr": 0.1, "momentum_decay": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("radam", {"lr": 0.1}),
    ("radam", {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True}),
    ("rmsprop", {"lr": 0.1}),
    ("rmsprop", {"lr": 0.1, "alpha": 0.8, "momentum": 0.9, "centered": True, "weight_decay": 0.1, "maximize": True}),
    ("rprop", {"lr": 0.1}),
    ("rprop", {"lr": 0.1, "etas": (0.4, 1.5), "step_sizes": (1e-3, 1.0), "maximize": True}),
]
NUMBERS = [(name, numbers) for name, numbers in NUMBERS if name in CLASSES]
ROW_NUMBERS = [
    ("sgd", {"lr": 0.1, "weight_decay": 0.1}),
    ("sgd", {"lr": 0.1, "momentum": 0.9}),
    ("adagrad", {"lr": 0.1, "initial_accumulator_value": 0.1}),
    ("adam", {"lr": 0.1}),
    ("adam", {"lr": 0.1, "amsgrad": True}),
    ("adamw", {"lr": 0.1}),
    ("rmsprop", {"lr": 0.1, "momentum": 0.9, "centered": True}),
    ("rprop", {"lr": 0.1}),
    ("adamax", {"lr": 0.1}),
    ("adadelta", {"lr": 0.1}),
]
NUM_ROWS = 2_000_000_000


def ids_of(cases):
    return [f"{name}-{index}" for index, (name, _) in enumerate(cases)]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def torch_optimizer(name, params, numbers, **how):
    return getattr(torch.optim, CLASSES[name])(params, **numbers, **how)


def assert_steps(name, got, expected):
    """Assert that values are those of torch.optim, but for the last places where a fused kernel steps."""
    if name not in FUSED or got.dtype.is_complex:
        assert torch.equal(got, expected)
        return
    assert got.dtype is expected.dtype
    assert got.shape == expected.shape
    bound = 8 * torch.finfo(got.dtype).eps * float(expected.abs().max())
    assert float((got.double() - expected.double()).abs().max()) <= bound


def one_by_one(name):
    """Return the flags with which torch.optim computes as the store does where it has no fused kernel."""
    return {} if name == "muon" else {"foreach": False}


def reference(name, numbers, values, grads, **how):
    """Step torch.optim itself on these values, once for each list of gradients."""
    params = [torch.nn.Parameter(value.clone()) for value in values]
    optimizer = torch_optimizer(name, params, numbers, **how)
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = None if grad is None else grad.clone()
        optimizer.step()
    return [param.detach() for param in params]


def store(values, optimizer=None, **numbers):
    """Return a store with these values by key, and an optimizer."""
    kv = tensorkv.create()
    kv.init(values)
    if optimizer is not None:
        kv.set_optimizer(optimizer, **numbers)
    return kv


def state_of(kv, key):
    """Return the optimizer's state of a key, as a checkpoint has it."""
    entry = kv._engine._shard.entry("info", key)
    return {name: tensor.clone() for name, tensor in entry.state.items()}


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


# ---------------------------------------------------------------- the numbers of torch.optim


def test_every_optimizer_is_tested():
    assert {name for name, _ in NUMBERS} == set(CLASSES)


@pytest.mark.parametrize("given", ["name", "NAME", "class"])
@pytest.mark.parametrize(("name", "numbers"), NUMBERS, ids=ids_of(NUMBERS))
def test_ten_steps_are_those_of_torch(name, numbers, given):
    # 64 elements, so that torch computes all of them in vectors, as the store does.
    start = random(8, 8)
    parts = [[random(8, 8, seed=100 * step + part) for part in range(3)] for step in range(10)]
    sums = [[(a + b) + c] for a, b, c in parts]
    kv = store({"w": start}, {"name": name, "NAME": name.upper(), "class": getattr(torch.optim, CLASSES[name])}[given])
    kv.set_optimizer(name, **numbers)
    for step in parts:
        kv.push("w", step)
    got = kv.pull("w")
    assert_steps(name, got, reference(name, numbers, [start], sums, **one_by_one(name))[0])
    torch.testing.assert_close(got, reference(name, numbers, [start], sums)[0], rtol=2e-5, atol=2e-6)
    assert not torch.equal(got, start)
    assert kv.info("w").version == 10


@pytest.mark.parametrize(("name", "numbers"), NUMBERS, ids=ids_of(NUMBERS))
def test_odd_sizes_and_several_keys(name, numbers):
    shapes = [(3, 5), (7, 1), (2, 67)] if name == "muon" else [(3, 5), (7,), (), (2, 67), (0, 2)]
    values = {f"w{i}": random(*shape, seed=i) for i, shape in enumerate(shapes)}
    kv = store(values, name, **numbers)
    steps = [[random(*shape, seed=10 * step + i + 50) for i, shape in enumerate(shapes)] for step in range(10)]
    for step in steps:
        kv.push(dict(zip(values, step, strict=True)))
    # An empty tensor is a division by zero in torch's own Adafactor.
    kept = [i for i, shape in enumerate(shapes) if 0 not in shape]
    starts = [list(values.values())[i] for i in kept]
    expected = reference(name, numbers, starts, [[step[i] for i in kept] for step in steps])
    for i, value in zip(kept, expected, strict=True):
        torch.testing.assert_close(kv.pull(f"w{i}"), value, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", CLASSES)
def test_a_store_on_the_cpu_asks_no_gpu(name, monkeypatch):
    """It would take memory there, and fail in a forked child."""

    def ask(optimizer):
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    for check in _compat.GRAPH_CHECKS:
        monkeypatch.setattr(torch.optim.Optimizer, check, ask, raising=False)
    optimizers.initial_state.cache_clear()
    start = torch.ones(4, 6)
    kv = store({"w": start}, name)
    kv.push("w", torch.ones(4, 6))
    assert not torch.equal(kv.pull("w"), start)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128])
@pytest.mark.parametrize("name", CLASSES)
def test_other_dtypes(name, dtype):
    start = random(8, 8, dtype=dtype)
    kv = store({"w": start}, name, lr=0.05)
    grads = [[random(8, 8, seed=step + 1, dtype=dtype)] for step in range(4)]
    if dtype.is_complex and name not in ROWWISE:
        with pytest.raises(RuntimeError, match="complex"):
            reference(name, {"lr": 0.05}, [start], grads)
        with pytest.raises(OptimizerError, match="real values only"):
            kv.push("w", grads[0][0])
        assert torch.equal(kv.pull("w"), start)
        assert kv.info("w").version == 0
        return
    expected = reference(name, {"lr": 0.05}, [start], grads, **one_by_one(name))[0]
    for (grad,) in grads:
        kv.push("w", grad)
    assert_steps(name, kv.pull("w"), expected)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adagrad", "rmsprop", "adafactor", "muon"])
def test_gradients_of_any_strides(name, parts):
    layouts = [
        lambda: random(6, 8).t(),
        lambda: random(1, 6).expand(8, 6),
        lambda: random(16, 12)[::2, ::2],
        lambda: torch.zeros(8, 6),
    ]
    start = random(8, 6)
    plain, other = store({"w": start}, name, lr=0.1), store({"w": start}, name, lr=0.1)
    for make in layouts:
        plain.push("w", [make().clone(memory_format=torch.contiguous_format)] * parts)
        other.push("w", [make()] * parts)
    assert torch.equal(plain.pull("w"), other.pull("w"))


@pytest.mark.parametrize("library_of", [lambda x: x, lambda x: x.numpy()], ids=["torch", "numpy"])
def test_numpy_and_torch_alike(library_of):
    kv = store({"w": library_of(random(5))}, "adam", lr=0.1)
    kv.push("w", library_of(random(5, seed=1)))
    expected = reference("adam", {"lr": 0.1}, [random(5)], [[random(5, seed=1)]])[0]
    np.testing.assert_allclose(np.asarray(kv.pull("w")), expected.numpy(), rtol=1e-6)


# ---------------------------------------------------------------- only what was pushed


@pytest.mark.parametrize(("name", "numbers"), NUMBERS, ids=ids_of(NUMBERS))
def test_only_pushed_keys_step(name, numbers):
    kv = store({"a": random(4, 4), "b": random(4, 4, seed=1)}, name, **numbers)
    kv.push({"a": random(4, 4, seed=2), "b": random(4, 4, seed=3)})
    before, state = bits(kv.pull("b")), {n: bits(t) for n, t in state_of(kv, "b").items()}
    for step in range(3):
        kv.push("a", random(4, 4, seed=step + 4))
    assert bits(kv.pull("b")) == before
    assert {n: bits(t) for n, t in state_of(kv, "b").items()} == state
    assert (kv.info("a").version, kv.info("b").version) == (4, 1)


def test_a_step_sees_the_pushed_parameters_alone(monkeypatch):
    seen = []
    nadam = optimizers._class("nadam")
    right = nadam.step
    kv = store({i: torch.ones(2) for i in range(50)}, "nadam")
    kv.push(list(range(50)), [torch.ones(2)] * 50)

    def step(self, *args):
        seen.append((sum(len(group["params"]) for group in self.param_groups), len(self.state)))
        return right(self, *args)

    monkeypatch.setattr(nadam, "step", step)
    kv.push([3, 7], [torch.ones(2), torch.ones(2)])
    assert seen == [(2, 2)]


def test_keys_that_come_later_have_counters_of_their_own():
    kv = store({"a": random(64)}, "adam", lr=0.1)
    for step in range(3):
        kv.push("a", random(64, seed=step))
    kv.init("b", random(64, seed=9))
    kv.push({"a": random(64, seed=5), "b": random(64, seed=6)})
    assert state_of(kv, "a")["step"] == 4
    assert state_of(kv, "b")["step"] == 1
    expected = reference("adam", {"lr": 0.1}, [random(64, seed=9)], [[random(64, seed=6)]])[0]
    assert_steps("adam", kv.pull("b"), expected)


def do_single(kv, verb, step, grads, case):
    """Do what concerns a single key, or the optimizer."""
    name, numbers = case
    if verb == "one":
        kv.push(3, grads[3])
    elif verb == "rows":
        kv.push(4, Rows(np.array([5, 1, 5]), grads[4][:3], 7))
    elif verb == "lr":
        kv.set_hyperparameters(lr=0.05 + step / 100)
    elif verb == "own lr":
        kv.set_hyperparameters([2, 7], lr=0.3)
    elif verb == "later":
        kv.set_hyperparameters(**LATER.get(name, {"lr": 0.2}))
    elif verb == "again":
        kv.set_optimizer(name, **numbers)
    elif verb == "delete":
        kv.delete(1)
        kv.init(1, grads[1])


LATER = {"sgd": {"momentum": 0.5}, "adam": {"amsgrad": True}, "adamw": {"amsgrad": True}, "rmsprop": {"centered": True}}


@settings(max_examples=60, print_blob=True)
@given(
    case=st.sampled_from([case for case in NUMBERS if case[0] in ROWWISE]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    library=st.sampled_from(["numpy", "torch"]),
    verbs=st.lists(
        st.sampled_from(["all", "all", "pushpull", "one", "rows", "lr", "own lr", "later", "some", "again", "delete"]),
        min_size=4,
        max_size=12,
    ),
    scaled=st.booleans(),
)
@example(NUMBERS[2], torch.float32, "numpy", ["all", "delete", "all", "all"], False)
def test_many_keys_at_once_are_the_keysone_by_one(case, dtype, library, verbs, scaled):
    name, numbers = case
    library = "torch" if dtype is torch.bfloat16 else library
    shapes = [(3,), (2, 5), (), (64,), (7, 11), (1,), (0, 2), (130,), (4, 4), (2, 2, 3)]
    keys = list(range(len(shapes)))
    scaling = {"rescale_grad": 0.5, "clip_gradient": 1.0} if scaled else {}

    def make(seed):
        made = [random(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes)]
        return made if library == "torch" else [tensor.numpy() for tensor in made]

    together, apart = (store(dict(zip(keys, make(0), strict=True)), name, **numbers, **scaling) for _ in range(2))
    for step, verb in enumerate(verbs):
        grads = make(100 * step + 100)
        if verb in ("all", "pushpull", "some"):
            chosen = keys if verb != "some" else [key for key in keys if (key + step) % 4]
            parts = [[grads[key], grads[key]] for key in chosen]
            (together.pushpull if verb == "pushpull" else together.push)(chosen, parts)
            for key, own in zip(chosen, parts, strict=True):
                apart.push(key, own)
        for kv in (together, apart):
            do_single(kv, verb, step, grads, case)
        for key, array in zip(keys, together.pull(keys), strict=True):
            assert bits(torch.as_tensor(array)) == bits(torch.as_tensor(apart.pull(key)))
            mine, theirs = state_of(together, key), state_of(apart, key)
            assert mine.keys() == theirs.keys()
            assert all(bits(mine[word]) == bits(theirs[word]) for word in mine)
            assert together.info(key).version == apart.info(key).version


# ---------------------------------------------------------------- the caller's arrays


ALIAS_NUMBERS = [*NUMBERS, ("sgd", {"momentum": 0.9}), ("sgd", {"rescale_grad": 0.5}), ("adam", {"clip_gradient": 0.1})]


@pytest.mark.parametrize(("name", "numbers"), NUMBERS, ids=ids_of(NUMBERS))
def test_an_update_depends_on_no_other_key(name, numbers):
    # The last ones together are worth several threads.
    shapes = [(8,), (2000,), (7, 9), (), (0,), (3, 0), (3, 5, 2), (200, 100)]
    check_neighbours(tensorkv.create("local"), name, shapes, **numbers)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize(("name", "numbers"), ALIAS_NUMBERS, ids=ids_of(ALIAS_NUMBERS))
def test_pushed_arrays_are_neither_changed_nor_kept(name, numbers, dtype, count):
    if dtype.is_complex and name not in ROWWISE:
        dtype = torch.float64
    kv, other = (store({"w": random(8, 8, dtype=dtype)}, name, **numbers) for _ in range(2))
    for step in range(3):
        parts = [random(8, 8, seed=10 * step + i + 1, dtype=dtype) for i in range(count)]
        copies = [part.clone() for part in parts]
        kv.push("w", parts)
        other.push("w", copies)
        assert all(torch.equal(part, copy) for part, copy in zip(parts, copies, strict=True))
        for part in parts:
            part.fill_(1000)
        assert torch.equal(kv.pull("w"), other.pull("w"))
        mine, theirs = state_of(kv, "w"), state_of(other, "w")
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[n], theirs[n]) for n in mine)


def test_gradients_of_parameters_are_left_alone():
    param = torch.nn.Parameter(torch.ones(2))
    grad = torch.ones(2, requires_grad=True)
    kv = store({"w": param}, "sgd", lr=0.5, momentum=0.9)
    kv.push("w", grad)
    assert param.grad is None
    assert grad.grad is None
    assert kv.pull("w").tolist() == [0.5, 0.5]
    assert not kv.pull("w").requires_grad


# ---------------------------------------------------------------- rescale_grad and clip_gradient


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop"])
def test_rescale_then_clip_then_weight_decay(name, count):
    numbers = {"lr": 0.1, "weight_decay": 0.5}
    start = random(64)
    parts = [random(64, seed=i + 1) * 10 for i in range(count)]
    total = parts[0] if count == 1 else (parts[0] + parts[1]) + parts[2]
    grad = (total * 0.25).clamp(-1, 1)
    kv = store({"w": start}, name, rescale_grad=0.25, clip_gradient=1, **numbers)
    kv.push("w", parts)
    assert_steps(name, kv.pull("w"), reference(name, numbers, [start], [[grad]], **one_by_one(name))[0])


def test_clip_bounds_both_parts_of_complex_numbers():
    kv = store({"w": torch.zeros(2, dtype=torch.complex64)}, "sgd", lr=1.0, clip_gradient=1.0)
    kv.push("w", torch.tensor([3 - 4j, 0.5 + 2j]))
    assert kv.pull("w").tolist() == [-1 + 1j, -0.5 - 1j]


def test_rescale_and_clip_apply_to_rows():
    kv = store({"w": torch.zeros(3, 1)}, "sgd", lr=1.0, rescale_grad=0.5, clip_gradient=2.0)
    pushed = torch.tensor([[8.0], [1.0], [1.0]])
    kv.push("w", Rows(torch.tensor([2, 0, 0]), pushed, 3))
    assert kv.pull("w").tolist() == [[-1.0], [0.0], [-2.0]]
    assert pushed.tolist() == [[8.0], [1.0], [1.0]]


# ---------------------------------------------------------------- set_hyperparameters, set_optimizer again


def test_numbers_for_all_and_for_some():
    kv = store({key: torch.zeros(1) for key in "abc"}, "sgd", lr=1.0)
    kv.set_hyperparameters("a", lr=2.0)
    kv.set_hyperparameters(["a", "b"], weight_decay=0.0)
    ones = {key: torch.ones(1) for key in "abc"}
    assert [x.item() for x in kv.pushpull(ones).values()] == [-2.0, -1.0, -1.0]
    kv.set_hyperparameters("a", lr=3.0)
    assert kv.pushpull("a", torch.ones(1)).item() == -5.0
    assert kv.optimizer["lr"] == 1.0
    # A number for all ends what single keys had of it, and only that.
    kv.set_hyperparameters("b", maximize=True)
    kv.set_hyperparameters(lr=0.5)
    assert [x.item() for x in kv.pushpull(ones).values()] == [-5.5, -0.5, -1.5]
    assert kv.optimizer["lr"] == 0.5


def test_a_deleted_key_takes_its_numbers_along():
    kv = store({"a": torch.zeros(1)}, "sgd", lr=1.0)
    kv.set_hyperparameters("a", lr=2.0)
    kv.delete("a")
    kv.init("a", torch.zeros(1))
    assert kv.pushpull("a", torch.ones(1)).item() == -1.0


def test_numbers_are_checked_against_those_in_force():
    kv = store({"a": torch.zeros(2)}, "sgd", lr=1.0, momentum=0.5)
    kv.set_hyperparameters(nesterov=True)
    with pytest.raises(OptimizerError, match="Nesterov"):
        kv.set_hyperparameters(momentum=0.0)
    with pytest.raises(OptimizerError, match="Nesterov"):
        kv.set_hyperparameters("a", dampening=0.5)
    assert (kv.optimizer["momentum"], kv.optimizer["dampening"]) == (0.5, 0)
    assert kv.pushpull("a", torch.ones(2)).tolist() == [-1.5, -1.5]


def test_numbers_without_an_optimizer_or_a_key():
    kv = store({"a": torch.zeros(1)})
    with pytest.raises(OptimizerError, match="set_optimizer first"):
        kv.set_hyperparameters(lr=0.1)
    kv.set_optimizer("sgd", lr=1.0)
    with pytest.raises(tensorkv.KeyNotFoundError, match='"b"'):
        kv.set_hyperparameters(["a", "b"], lr=9.0)
    with pytest.raises(OptimizerError, match='did you mean "lr"'):
        kv.set_hyperparameters("a", learning_rate=9.0)
    assert kv.pushpull("a", torch.ones(1)).item() == -1.0


def test_numbers_changed_later_are_those_of_torch():
    kv = store({"w": random(64)}, "sgd", lr=0.1, momentum=0.9)
    param = torch.nn.Parameter(random(64))
    optimizer = torch.optim.SGD([param], lr=0.1, momentum=0.9)
    for step in range(6):
        if step == 3:
            kv.set_hyperparameters(lr=0.01, momentum=0.5, weight_decay=0.1)
            optimizer.param_groups[0].update(lr=0.01, momentum=0.5, weight_decay=0.1)
        param.grad = random(64, seed=step)
        optimizer.step()
        kv.push("w", random(64, seed=step))
    assert_steps("sgd", kv.pull("w"), param.detach())


@pytest.mark.parametrize(
    ("name", "later"),
    [
        ("adam", {"amsgrad": True}),
        ("adamw", {"amsgrad": True}),
        ("sgd", {"momentum": 0.9}),
        ("rmsprop", {"centered": True}),
        ("rmsprop", {"momentum": 0.9}),
    ],
)
@pytest.mark.parametrize("rows", [False, True])
def test_state_that_a_number_needs_later(name, later, rows):
    kv, other = (store({"w": random(4, 16)}, name, lr=0.1) for _ in range(2))
    for step in range(2):
        kv.push("w", random(4, 16, seed=step))
        other.push("w", random(4, 16, seed=step))
    kv.set_hyperparameters(**later)
    grad = random(4, 16, seed=3)
    kv.push("w", Rows(torch.arange(4), grad, 4) if rows else grad)
    param = torch.nn.Parameter(other.pull("w"))
    optimizer = torch_optimizer(name, [param], {"lr": 0.1, **later})
    # What the number newly asks for begins at zero.
    optimizer.state[param] = state_of(other, "w")
    for missing in set(state_of(kv, "w")) - set(optimizer.state[param]):
        if name != "sgd":
            optimizer.state[param][missing] = torch.zeros(4, 16)
    param.grad = grad
    optimizer.step()
    assert_steps(name, kv.pull("w"), param.detach())


def test_the_same_optimizer_again_keeps_state_and_another_drops_it():
    kv = store({"w": torch.zeros(2)}, "sgd", lr=1.0, momentum=0.5)
    kv.init("t", Rows(torch.tensor([1]), torch.zeros(1, 2), 10))
    rows = Rows(torch.tensor([1]), torch.ones(1, 2), 10)
    kv.push(["w", "t"], [torch.ones(2), rows])
    kv.set_optimizer("SGD", lr=1.0, momentum=0.25)
    kv.push(["w", "t"], [torch.ones(2), rows])
    assert kv.pull("w").tolist() == [-2.25, -2.25]
    assert kv.row_sparse_pull("t", row_ids=[1]).values.tolist() == [[-2.25, -2.25]]
    kv.set_optimizer("adam", lr=1.0)
    assert state_of(kv, "w") == {}
    kv.set_optimizer("sgd", lr=1.0, momentum=0.5)
    kv.push(["w", "t"], [torch.ones(2), rows])
    assert kv.pull("w").tolist() == [-3.25, -3.25]
    assert kv.row_sparse_pull("t", row_ids=[1]).values.tolist() == [[-3.25, -3.25]]


def test_a_second_set_optimizer_ends_single_keys_numbers():
    kv = store({"a": torch.zeros(1)}, "sgd", lr=1.0)
    kv.set_hyperparameters("a", lr=5.0)
    kv.set_optimizer("sgd", lr=2.0)
    assert kv.pushpull("a", torch.ones(1)).item() == -2.0


# ---------------------------------------------------------------- bad names and numbers


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ("sdg", 'did you mean "sgd"'),
        ("rmspop", 'did you mean "rmsprop"'),
        ("", "the names are sgd"),
        (None, "None"),
        (3, "no optimizer for a store: 3"),
        ("LBFGS", "'LBFGS'"),
        (torch.optim.LBFGS, "the class LBFGS"),
        ("SparseAdam", "'SparseAdam'"),
        (torch.optim.SparseAdam, "the class SparseAdam"),
        (torch.optim.Optimizer, "the class Optimizer"),
        (torch.optim.SGD([torch.zeros(1)]), "an instance of SGD; give its name and hyperparameters instead"),
        (torch.nn.Linear, "the class Linear"),
        (["sgd"], "sgd"),
    ],
    ids=str,
)
def test_names_that_are_no_optimizers(optimizer, words):
    kv = store({"w": torch.zeros(1)}, "sgd", lr=0.5)
    with pytest.raises(OptimizerError) as caught:
        kv.set_optimizer(optimizer)
    assert words in str(caught.value)
    assert kv.optimizer["name"] == "sgd"


@pytest.mark.parametrize(
    ("name", "numbers", "words"),
    [
        ("sgd", {"learning_rate": 0.1}, 'did you mean "lr"'),
        ("sgd", {"lr_scheduler": "cosine"}, 'sgd has no "lr_scheduler"; set lr with set_hyperparameters, or give Trai'),
        ("adam", {"wd": 0.1}, 'did you mean "weight_decay"'),
        ("rmsprop", {"rho": 0.9}, 'did you mean "alpha"'),
        ("adam", {"beta1": 0.1}, 'did you mean "betas"'),
        ("adam", {"epsilon": 0.1}, 'did you mean "eps"'),
        ("sgd", {"momentun": 0.1}, 'did you mean "momentum"'),
        ("sgd", {"beta1": 0.1}, "it has lr, momentum"),
        ("sgd", {"zzz": 0.1}, 'sgd has no "zzz"'),
        ("adam", {"fused": True}, "adam: leave fused out; how a step is computed is no hyperparameter"),
        ("adam", {"params": []}, 'adam has no "params"'),
        ("sgd", {"lr": -1.0}, "Invalid learning rate"),
        ("sgd", {"lr": float("nan")}, "lr is nan; expected a finite number"),
        ("sgd", {"lr": float("inf")}, "lr is inf"),
        ("sgd", {"lr": "0.1"}, "lr is '0.1'; expected a finite number"),
        ("sgd", {"lr": None}, "lr is None"),
        ("sgd", {"lr": True}, "lr is True"),
        ("sgd", {"lr": 10**400}, "expected a finite number"),
        ("sgd", {"lr": torch.ones(2)}, "expected a finite number"),
        ("sgd", {"lr": np.ones(2)}, "expected a finite number"),
        ("sgd", {"dampening": "x"}, "dampening is 'x'"),
        ("sgd", {"nesterov": "yes"}, "expected True or False"),
        ("sgd", {"nesterov": True}, "Nesterov momentum requires a momentum"),
        ("adam", {"betas": 0.9}, "betas is 0.9; expected 2 numbers"),
        ("adam", {"betas": (0.9, 0.99, 0.999)}, "expected 2 numbers"),
        ("adam", {"betas": (0.9, float("nan"))}, "betas is"),
        ("adam", {"betas": (0.9, 1.5)}, "Invalid beta"),
        ("adam", {"betas": ([0.9], 0.99)}, "betas is"),
        ("adafactor", {"eps": 1e-3}, "expected 2 numbers"),
        ("muon", {"adjust_lr_fn": "zzz"}, "zzz"),
        ("muon", {"ns_steps": 1000}, "muon: "),
        ("muon", {"ns_steps": 2.5}, "muon: "),
        ("sgd", {"rescale_grad": float("nan")}, "rescale_grad is nan"),
        ("sgd", {"rescale_grad": 10**400}, "rescale_grad is 1"),
        ("sgd", {"rescale_grad": None}, "rescale_grad is None"),
        ("sgd", {"rescale_grad": np.complex64(1)}, "rescale_grad is"),
        ("sgd", {"clip_gradient": 0}, "clip_gradient is 0"),
        ("sgd", {"clip_gradient": -1}, "clip_gradient is -1"),
        ("sgd", {"clip_gradient": "x"}, "clip_gradient is 'x'"),
        ("sgd", {"clip_gradient": True}, "clip_gradient is True"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_numbers_that_do_not_work(name, numbers, words):
    kv = store({"w": torch.zeros(1)}, "sgd", lr=0.5, momentum=0.25)
    kv.push("w", torch.ones(1))
    before = kv.optimizer
    with pytest.raises(OptimizerError) as caught:
        kv.set_optimizer(name, **numbers)
    assert words in str(caught.value)
    assert kv.optimizer == before
    assert kv.pushpull("w", torch.ones(1)).item() == -1.125


def test_numbers_of_numpy_become_pythons():
    made = spec("adam", {"lr": np.float32(0.5), "betas": [np.float64(0.5), 0.75], "amsgrad": np.bool_(True)})
    assert made.numbers["lr"] == 0.5
    assert type(made.numbers["lr"]) is float
    assert made.numbers["betas"] == (0.5, 0.75)
    assert made.numbers["amsgrad"] is True


# ---------------------------------------------------------------- values that cannot be updated


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool])
def test_integers_with_an_optimizer(dtype):
    kv = store({"w": torch.zeros(2), "n": torch.zeros(2, dtype=dtype)}, "sgd", lr=1.0)
    with pytest.raises(OptimizerError, match=r'"n" is .*floating-point values only'):
        kv.push({"w": torch.ones(2), "n": torch.ones(2, dtype=dtype)})
    assert kv.pull("w").tolist() == [0, 0]
    assert kv.pull("n").tolist() == [0, 0]
    assert (kv.info("w").version, state_of(kv, "w")) == (0, {})


@pytest.mark.skipif("muon" not in CLASSES, reason="this torch has no Muon")
@pytest.mark.parametrize("shape", [(), (4,), (2, 2, 2)])
def test_muon_updates_matrices_only(shape):
    kv = store({"m": torch.zeros(2, 2), "v": torch.zeros(shape)}, "muon")
    with pytest.raises(OptimizerError, match='muon updates matrices, and "v"'):
        kv.push({"m": torch.ones(2, 2), "v": torch.ones(shape)})
    assert kv.pull("m").tolist() == [[0, 0], [0, 0]]
    assert kv.info("m").version == 0


@pytest.mark.parametrize("name", sorted(set(CLASSES) - ROWWISE))
def test_rows_with_an_optimizer_that_needs_the_whole(name):
    kv = store({"m": torch.zeros(2, 2), "w": torch.zeros(2, 2)}, name)
    kv.init("t", Rows(torch.tensor([0]), torch.zeros(1, 2), 9))
    with pytest.raises(OptimizerError, match=f"{name} needs whole gradients"):
        kv.push({"m": torch.ones(2, 2), "w": Rows(torch.tensor([0]), torch.ones(1, 2), 2)})
    with pytest.raises(OptimizerError, match=f"{name} needs whole gradients"):
        kv.push({"m": torch.ones(2, 2), "t": Rows(torch.tensor([0]), torch.ones(1, 2), 9)})
    assert kv.pull("m").tolist() == [[0, 0], [0, 0]]
    assert (kv.info("m").version, state_of(kv, "m")) == (0, {})


# ---------------------------------------------------------------- Rows


class RowStore:
    """A dense key or a sparse table of the same rows, behind one way to push and read."""

    def __init__(self, kind, start, name, numbers):
        self.kind = kind
        # Spread over the table where there is room.
        self.places = torch.arange(len(start)) * (300_000_001 if kind == "table" else 1)
        self.num_rows = NUM_ROWS if kind == "table" else len(start)
        value = start if kind == "dense" else Rows(self.places.flip(0), start.flip(0), self.num_rows)
        self.kv = store({"e": value}, name, **numbers)

    def push(self, *parts):
        self.kv.push("e", [Rows(self.places[torch.tensor(ids)], values, self.num_rows) for ids, values in parts])

    def rows(self):
        return self.kv.row_sparse_pull("e", row_ids=self.places).values

    def state(self):
        entry = self.kv._engine._shard.entry("info", "e")
        if self.kind == "dense":
            return {n: t.clone() for n, t in entry.state.items() if t.ndim}
        return {n: entry.value.read(self.places, n) for n in entry.value.columns}


@pytest.mark.parametrize("kind", ["dense", "table"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "numbers"), ROW_NUMBERS, ids=ids_of(ROW_NUMBERS))
def test_rows_step_as_torch_on_those_rows(name, numbers, dtype, kind):
    start = random(6, 3, dtype=dtype)
    held = RowStore(kind, start, name, numbers)
    param = torch.nn.Parameter(start[1:4].clone())
    optimizer = torch_optimizer(name, [param], numbers)
    rest = torch.tensor([0, 4, 5])
    for step in range(5):
        first, second = (random(3, 3, seed=10 * step + i, dtype=dtype) for i in (1, 2))
        # Repeated ids and several parts: summed in the order given, then one step.
        held.push(([3, 1, 3], first), ([2, 2, 1], second))
        param.grad = torch.stack([first[1] + second[2], second[0] + second[1], first[0] + first[2]])
        optimizer.step()
        state = held.state()
        assert all((tensor[rest] == tensor[rest][:1, :1]).all() for tensor in state.values())
    torch.testing.assert_close(held.rows()[1:4], param.detach(), rtol=1e-6, atol=1e-7)
    assert bits(held.rows()[rest]) == bits(start[rest])
    for column, tensor in held.state().items():
        torch.testing.assert_close(tensor[1:4], optimizer.state[param][column], rtol=1e-6, atol=1e-8)
    assert held.kv.info("e").version == 5


@pytest.mark.parametrize("kind", ["dense", "table"])
@pytest.mark.parametrize("maximize", [False, True])
def test_rows_step_as_sparse_adam(kind, maximize):
    start = random(6, 3)
    numbers = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "maximize": maximize}
    held = RowStore(kind, start, "adam", numbers)
    param = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SparseAdam([param], **numbers)
    for step in range(8):
        ids = [[1, 4], [4, 5], [0, 0, 1], [2]][step % 4]
        values = random(len(ids), 3, seed=step)
        held.push((ids, values))
        param.grad = torch.sparse_coo_tensor(torch.tensor([ids]), values, (6, 3), check_invariants=True)
        optimizer.step()
    torch.testing.assert_close(held.rows(), param.detach(), rtol=1e-5, atol=1e-6)
    assert state_of(held.kv, "e")["step"] == 8


@pytest.mark.parametrize("kind", ["dense", "table"])
@pytest.mark.parametrize(("name", "numbers"), ROW_NUMBERS, ids=ids_of(ROW_NUMBERS))
def test_rows_that_no_push_named_do_not_move(name, numbers, kind):
    held = RowStore(kind, random(6, 3), name, numbers)
    held.push(([0, 1, 2, 3], random(4, 3, seed=1)))
    rows, state = held.rows(), held.state()
    held.push(([1, 5], random(2, 3, seed=2)))
    held.push(([1], random(1, 3, seed=3)))
    rest = torch.tensor([0, 2, 3, 4])
    assert bits(held.rows()[rest]) == bits(rows[rest])
    after = held.state()
    assert after.keys() == state.keys()
    assert all(bits(after[n][rest]) == bits(state[n][rest]) for n in state)
    assert bits(held.rows()[1]) != bits(rows[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex128])
@pytest.mark.parametrize("kind", ["dense", "table"])
@pytest.mark.parametrize("name", ["adagrad", "rprop", "rmsprop"])
def test_a_row_seen_later_begins_as_torch_begins(name, kind, dtype):
    numbers = {"lr": 0.1, **({"initial_accumulator_value": 0.1} if name == "adagrad" else {})}
    start = random(6, 3, dtype=dtype)
    held = RowStore(kind, start, name, numbers)
    held.push(([0, 1], random(2, 3, seed=1, dtype=dtype)))
    grad = random(1, 3, seed=2, dtype=dtype)
    held.push(([4], grad))
    (expected,) = reference(name, numbers, [start[4:5]], [[grad]], **one_by_one(name))
    torch.testing.assert_close(held.rows()[4:5], expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-6, atol=0)


def test_a_single_keys_numbers_do_not_start_other_keys_rows():
    kv = store({"a": torch.zeros(3, 1), "b": torch.zeros(3, 1)}, "adagrad", lr=1.0)
    kv.set_hyperparameters("a", initial_accumulator_value=9.0)
    for i in (0, 1):
        kv.push("b", Rows(torch.tensor([i]), torch.ones(1, 1), 3))
        kv.push("a", Rows(torch.tensor([i]), torch.full((1, 1), 4.0), 3))
    assert kv.pull("b").tolist() == [[-1.0], [-1.0], [0.0]]
    torch.testing.assert_close(kv.pull("a"), torch.tensor([[-0.8], [-0.8], [0.0]]))


@pytest.mark.parametrize("name", ["sgd", "adam", "adagrad", "rmsprop"])
def test_rows_and_whole_gradients_share_one_state(name):
    kv = store({"w": random(4, 16)}, name, lr=0.1)
    other = store({"w": random(4, 16)}, name, lr=0.1)
    for step in range(4):
        grad = random(4, 16, seed=step)
        kv.push("w", Rows(torch.arange(4), grad, 4) if step % 2 else grad)
        other.push("w", grad)
    assert torch.equal(kv.pull("w"), other.pull("w"))


@pytest.mark.parametrize("shape", [(5, 3), (40, 3), (300, 7)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(ROWWISE))
def test_rows_of_all_ids_have_the_bits_of_a_whole_gradient(name, dtype, shape):
    kv = store({"w": random(*shape).to(dtype)}, name, lr=0.1)
    other = store({"w": random(*shape).to(dtype)}, name, lr=0.1)
    for step in range(5):
        grad = random(*shape, seed=step).to(dtype)
        kv.push("w", Rows(torch.arange(shape[0]), grad, shape[0]))
        other.push("w", grad)
    assert bits(kv.pull("w")) == bits(other.pull("w"))


def test_empty_rows_are_a_step_of_no_row():
    kv = store({"w": torch.ones(3, 2)}, "adam", lr=0.1)
    kv.push("w", Rows(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2), 3))
    assert kv.pull("w").tolist() == [[1, 1]] * 3
    assert kv.info("w").version == 1
    kv.push("w", torch.ones(3, 2))
    assert (kv.pull("w") < 1).all()


@pytest.mark.parametrize("name", ["sgd", "adam", "adagrad"])
def test_a_huge_table_holds_the_rows_it_has_seen(name):
    numbers = {"lr": 0.1, **({"momentum": 0.9} if name == "sgd" else {})}
    kv = store({"t": Rows(torch.tensor([5]), torch.ones(1, 4), NUM_ROWS)}, name, **numbers)
    for step in range(10):
        ids = torch.tensor([step, NUM_ROWS - 1 - step, 1_234_567_890])
        kv.push("t", Rows(ids, torch.ones(3, 4), NUM_ROWS))
    assert kv.info("t").nbytes == 21 * 4 * 4
    table = kv._engine._shard.entry("info", "t").value
    assert all(len(table._columns[column]) < 100 for column in ["", *table.columns])
    assert kv.row_sparse_pull("t", row_ids=[77, NUM_ROWS // 2]).values.tolist() == [[0] * 4] * 2


# ---------------------------------------------------------------- as data


@pytest.mark.parametrize("keys", [["a", "b"], [1, -2]])
@pytest.mark.parametrize(("name", "numbers"), NUMBERS, ids=ids_of(NUMBERS))
def test_json_round_trip(name, numbers, keys):
    made = spec(name, {**numbers, "rescale_grad": 0.5, "clip_gradient": 2})
    made.overrides.update({keys[0]: {"lr": 0.25}, keys[1]: {"lr": 0.5, "weight_decay": 0.25}})
    if name == "rprop":
        made.overrides[keys[1]] = {"etas": (0.25, 1.5)}
    assert OptimizerSpec.from_json(json.loads(json.dumps(made.to_json(), allow_nan=False))) == made


def test_json_of_numbers_that_only_go_together():
    made = spec("sgd", {"momentum": 0.9})
    made.overrides["a"] = {"nesterov": True}
    assert OptimizerSpec.from_json(json.loads(json.dumps(made.to_json()))) == made


GOOD = spec("adam", {"lr": 0.5}).to_json()


def nested(depth):
    made = []
    for _ in range(depth):
        made = [made]
    return made


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "adam",
        {},
        {"numbers": {}},
        {**GOOD, "numbers": None},
        {**GOOD, "numbers": [["lr", 0.5]]},
        {**GOOD, "numbers": {"lr": float("nan")}},
        {**GOOD, "numbers": {"lr": float("inf")}},
        {**GOOD, "numbers": {"lr": 10**400}},
        {**GOOD, "numbers": {"lr": {}}},
        {**GOOD, "numbers": {"betas": nested(5000)}},
        {**GOOD, "numbers": {"__class__": 1}},
        {**GOOD, "numbers": {"params": []}},
        {**GOOD, "numbers": {"fused": True}},
        {**GOOD, "numbers": {1: 2}},
        {**GOOD, "name": "LBFGS"},
        {**GOOD, "name": "Optimizer"},
        {**GOOD, "name": ["adam"]},
        {**GOOD, "name": None},
        {**GOOD, "name": "os.system"},
        {**GOOD, "rescale_grad": None},
        {**GOOD, "rescale_grad": "1"},
        {**GOOD, "clip_gradient": -1},
        {**GOOD, "clip_gradient": [1]},
        {**GOOD, "overrides": None},
        {**GOOD, "overrides": {"a": {}}},
        {**GOOD, "overrides": ["ab"]},
        {**GOOD, "overrides": [["a"]]},
        {**GOOD, "overrides": [["a", {}, {}]]},
        {**GOOD, "overrides": [["a", None]]},
        {**GOOD, "overrides": [[None, {}]]},
        {**GOOD, "overrides": [[["a"], {}]]},
        {**GOOD, "overrides": [["a", {"zzz": 1}]]},
        {**GOOD, "overrides": [["a", {"lr": "x"}]]},
    ],
    ids=lambda data: repr(data)[:60] if not isinstance(data, dict) else None,
)
def test_hostile_json(data):
    with pytest.raises(OptimizerError):
        OptimizerSpec.from_json(data)


def test_words_beside_the_known_ones_are_ignored():
    assert OptimizerSpec.from_json({**GOOD, "comment": "x"}) == spec("adam", {"lr": 0.5})


def test_a_key_that_is_deleted_and_made_again_has_no_numbers_of_its_own():
    """Nor does its state begin with what they asked for."""
    ids, values = torch.tensor([1, 4]), torch.tensor([[1.0], [2.0]])
    with tensorkv.create() as kv, tensorkv.create() as other:
        for store in (kv, other):
            store.set_optimizer("adagrad", lr=0.5)
        kv.init("t", tensorkv.Rows(ids, values, 9))
        kv.set_hyperparameters("t", lr=0.25, initial_accumulator_value=100.0)
        kv.delete("t")
        for store in (kv, other):
            store.init("t", tensorkv.Rows(ids, values, 9))
            for step in range(2):
                # Rows that were not pushed before begin with the fill.
                store.push("t", tensorkv.Rows(ids + step, values, 9))
        pulled = [store.row_sparse_pull("t", row_ids=range(9)).values for store in (kv, other)]
        assert torch.equal(*pulled)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("is_compiled", [True, False])
def test_a_bound_beyond_a_dtype_clips_nothing(name, dtype, is_compiled, tmp_path, monkeypatch):
    """Also after a load of what was saved."""
    if not is_compiled:
        monkeypatch.setattr(native, "_native", None)
    found = []
    for bound in (None, 1e300):
        kv = store({"w": torch.ones(2, 3, dtype=dtype)}, name, lr=0.5, clip_gradient=bound, ema=0.5)
        for _ in range(2):
            kv.push("w", torch.full((2, 3), 3.0, dtype=dtype))
        kv.save(tmp_path / f"{bound}")
        with tensorkv.create() as other:
            other.load(tmp_path / f"{bound}")
            assert other.optimizer["clip_gradient"] == bound
            found += [(each.pull("w"), each.pull_ema("w")) for each in (kv, other)]
    assert all(torch.equal(*pair) for each in found[1:] for pair in zip(each, found[0], strict=True))


WORDS = sorted(
    (name, word)
    for name in CLASSES
    for word, number in {**spec(name, {}).numbers, "clip_gradient": 1.0}.items()
    if isinstance(number, int | float | tuple) and not isinstance(number, bool)
)


def _set_number(kv, key, name, word, number):
    """Set a number, or the last of several, of a key if that is possible."""
    given = spec(name, {}).numbers.get(word)
    number = (*given[:-1], number) if isinstance(given, tuple) else number
    if word == "clip_gradient":
        key = None
    kv.set_hyperparameters(key, **{word: number})


@pytest.mark.parametrize(("name", "word"), WORDS)
def test_numbers_beyond_a_dtype_are_infinite_or_refused(name, word, tmp_path):
    """They are never torch's own error, and a folder that has them is opened again."""
    for number in (65520.0, 1e39, 1e300):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            with tensorkv.create(path=tmp_path / f"{number}{dtype}") as kv:
                kv.init({"v": torch.ones(2, 1, dtype=dtype), "w": torch.ones(2, 1, dtype=dtype)})
                kv.set_optimizer(name, ema=0.5)
                kv.push(["v", "w"], [torch.ones(2, 1, dtype=dtype)] * 2)
                try:
                    _set_number(kv, "w", name, word, number)
                except OptimizerError:
                    continue
                before = [*kv.pull_ema(["v", "w"]), *kv.pull(["v", "w"])]
                versions = [info.version for info in kv.info(["v", "w"])]
                refused = ""
                try:
                    kv.push(["v", "w"], [torch.ones(2, 1, dtype=dtype)] * 2)
                except OptimizerError as error:
                    refused = str(error)
                if refused:
                    assert refused.startswith(f'"w" is {dtype_name(dtype)}, which {name} cannot step: ')
                    assert all(map(torch.equal, before, [*kv.pull_ema(["v", "w"]), *kv.pull(["v", "w"])]))
                    assert [info.version for info in kv.info(["v", "w"])] == versions
                assert refused or (name, word, dtype) != ("rprop", "lr", torch.float16)
                kv.save(tmp_path / "all")
                kv.save_optimizer_states(tmp_path / "states")
                held = [*kv.pull_ema(["v", "w"]), *kv.pull(["v", "w"])]
            for log_nbytes in (1, None):
                # A log that is too long is replaced by a snapshot.
                with tensorkv.create(path=tmp_path / f"{number}{dtype}", log_nbytes=log_nbytes) as kv:
                    assert kv.optimizer["name"] == name
                    kv.set_hyperparameters("v", lr=0.25)
            kv = tensorkv.create()
            kv.load(tmp_path / "all")
            kv.load_optimizer_states(tmp_path / "states")
            pairs = zip(held, [*kv.pull_ema(["v", "w"]), *kv.pull(["v", "w"])], strict=True)
            assert all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in pairs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_numbers_beyond_a_dtype_that_hold_for_all_keys_are_loaded(dtype, tmp_path):
    kv = store({"w": torch.ones(2, dtype=dtype)}, "adagrad", lr=0.1, initial_accumulator_value=1e39)
    kv.push("w", torch.ones(2, dtype=dtype))
    kv.save(tmp_path / "all")
    with tensorkv.create() as other:
        other.load(tmp_path / "all")
        assert torch.equal(kv.pull("w"), other.pull("w"))
