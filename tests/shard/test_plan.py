"""Plans do what the general way does, bit for bit, and step aside for whatever is out of the ordinary."""

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv.shard import native, plan

pytestmark = pytest.mark.usefixtures("without_looking")
F32 = np.float32
KEYS = [f"k{i}" for i in range(20)]
SHAPES = [(), (1,), (3,), (2, 3), (0,), (5, 1), (7,), (2, 2, 2)] * 3


def random_arrays(rng, dtype="float32"):
    return [np.asarray(rng.standard_normal(shape) * 100).astype(dtype) for shape, _ in zip(SHAPES, KEYS, strict=False)]


def plans_of(kv):
    return list(kv._engine._shard._plans._plans.values())


@pytest.fixture
def without_looking(monkeypatch):
    """Plans are for what the compiled part cannot look at: logged pushes, parts in one flat tensor."""
    monkeypatch.setattr(native, "can_look", lambda: False)


@pytest.fixture
def kv():
    with tensorkv.create() as store:
        store.init(KEYS, random_arrays(np.random.default_rng(0)))
        yield store


@pytest.fixture
def planned(kv):
    for _ in range(3):
        kv.push(KEYS, random_arrays(np.random.default_rng(1)))
    assert len(plans_of(kv)) == 1
    return kv


@pytest.fixture
def runs(monkeypatch):
    """How many calls went through a plan."""
    counted = []
    moved = plan.Form.moved
    monkeypatch.setattr(plan.Form, "moved", lambda self, *a: (counted.append(1), moved(self, *a))[1])
    return counted


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "uint16", "bool", "complex64", "float16"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_plan_gives_the_bits_of_the_general_way(dtype, library, count, runs, monkeypatch):
    rng = np.random.default_rng(2)
    wrap = torch.from_numpy if library == "torch" else np.asarray
    first = [wrap(np.asarray(x)) for x in random_arrays(rng, dtype)]
    rounds = [[[wrap(np.asarray(x)) for x in random_arrays(rng, dtype)] for _ in range(count)] for _ in range(4)]
    results = []
    for planned in (True, False):
        if not planned:
            monkeypatch.setattr(plan.Plans, "find", lambda *_: None)
        with tensorkv.create() as kv:
            kv.init(KEYS, first)
            for parts in rounds:
                outs = [wrap(np.zeros(shape, dtype)) for shape, _ in zip(SHAPES, KEYS, strict=False)]
                more = [wrap(np.zeros(shape, dtype)) for shape, _ in zip(SHAPES, KEYS, strict=False)]
                kv.pushpull(KEYS, list(zip(*parts, strict=True)), out=outs)
                kv.pull(KEYS, out=[[a, b] for a, b in zip(more, outs, strict=True)])
                results.append([np.asarray(x).tobytes() for x in (*outs, *more)])
            results.append([kv.info(key).version for key in KEYS])
            results.append(kv.stats()["keys"])
    half = len(results) // 2
    assert results[:half] == results[half:]
    assert len(runs) > 0


def test_many_chunks(monkeypatch, runs):
    monkeypatch.setattr(plan, "_CHUNK", 10)
    with tensorkv.create() as kv:
        kv.init(KEYS, random_arrays(np.random.default_rng(0)))
        for seed in range(4):
            parts = [random_arrays(np.random.default_rng(seed + i)) for i in range(3)]
            kv.push(KEYS, [list(group) for group in zip(*parts, strict=True)])
        assert len(plans_of(kv)[0]._chunks) > 3
        expected = [(a + b) + c for a, b, c in zip(*parts, strict=True)]
        assert all(np.array_equal(x, y) for x, y in zip(kv.pull(KEYS), expected, strict=True))
    assert runs


OPTIMIZERS = {
    "sgd": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "dampening": 0.1},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "clip_gradient": 5, "rescale_grad": 0.5},
    "adam": {"amsgrad": True},
    "adamw": {"maximize": True},
    "adagrad": {"initial_accumulator_value": 0.5},
    "nadam": {"lr": 0.1},
    "rmsprop": {},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_an_optimizer_gives_the_bits_of_the_general_way(name, count, library, runs, monkeypatch):
    """Also when single keys, rows of a key or other numbers come in between."""
    wrap = torch.from_numpy if library == "torch" else np.asarray
    results = []
    for planned in (True, False):
        rng = np.random.default_rng(7)
        if not planned:
            monkeypatch.setattr(plan.Plans, "find", lambda *_: None)
        with tensorkv.create() as kv:
            kv.init(KEYS, [wrap(x) for x in random_arrays(rng)])
            optimizer = {"momentum": "sgd", "nesterov": "sgd"}.get(name, name)
            kv.set_optimizer(optimizer, **OPTIMIZERS[name])
            for turn in range(12):
                parts = [[wrap(x) for x in random_arrays(rng)] for _ in range(count)]
                outs = [wrap(np.zeros(shape, F32)) for shape, _ in zip(SHAPES, KEYS, strict=False)]
                kv.pushpull(KEYS, list(zip(*parts, strict=True)), out=outs)
                results.append([np.asarray(x).tobytes() for x in outs])
                if turn == 5:
                    kv.push(KEYS, parts[0])
                    kv.push("k3", parts[0][3])
                    kv.push("k3", tensorkv.Rows(np.array([1]), np.ones((1, 3), F32), 2))
                if turn == 7:
                    for key, part in zip(KEYS, parts[0], strict=True):
                        kv.push(key, [part] * (1 if key == "k3" else 2))
                if turn == 9:
                    kv.set_hyperparameters(lr=0.05)
            results.append([kv.info(key).version for key in KEYS])
    half = len(results) // 2
    assert results[:half] == results[half:]
    assert (len(runs) > 3) == (name != "nadam")


def test_one_keys_own_numbers_are_kept(planned):
    planned.set_optimizer("sgd", lr=1.0)
    planned.set_hyperparameters(lr=0.0, keys="k3")
    before = planned.pull(KEYS)
    for _ in range(3):
        planned.push(KEYS, [np.ones(x.shape, F32) for x in before])
    for key, old, new in zip(KEYS, before, planned.pull(KEYS), strict=True):
        np.testing.assert_allclose(new, old - (0 if key == "k3" else 3), rtol=1e-5, atol=1e-4)


def test_a_saved_state_goes_on_the_same(planned, tmp_path):
    planned.set_optimizer("adam", lr=0.1)
    ones = [np.ones(shape, F32) for shape, _ in zip(SHAPES, KEYS, strict=False)]
    planned.push(KEYS, ones)
    planned.save(tmp_path / "all")
    planned.save_optimizer_states(tmp_path / "states")
    planned.push(KEYS, ones)
    expected = [x.tobytes() for x in planned.pull(KEYS)]
    planned.load(tmp_path / "all")
    for _ in range(2):
        planned.load_optimizer_states(tmp_path / "states")
        planned.push(KEYS, ones)
        assert [x.tobytes() for x in planned.pull(KEYS)] == expected
        planned.load(tmp_path / "all")
    planned.set_optimizer("sgd", lr=0.0)
    planned.set_optimizer("adam", lr=0.1)
    planned.push(KEYS, ones)
    assert [x.tobytes() for x in planned.pull(KEYS)] != expected, "another optimizer in between drops the state"


BAD = {
    "a shape": (lambda: np.ones((9,), F32), tensorkv.ValueMismatchError),
    "a dtype": (lambda: np.ones((2, 3), np.float64), tensorkv.ValueMismatchError),
    "no array": (lambda: "text", tensorkv.ArrayTypeError),
    "None": (lambda: None, tensorkv.ArrayTypeError),
    "meta": (lambda: torch.ones(2, 3, device="meta"), tensorkv.ArrayTypeError),
    "sparse": (lambda: torch.ones(2, 3).to_sparse(), tensorkv.ArrayTypeError),
    "masked": (lambda: np.ma.masked_array(np.ones((2, 3), F32), True), tensorkv.ArrayTypeError),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("verb", ["push", "pushpull"])
def test_bad_parts_change_nothing(planned, bad, verb):
    make, error = BAD[bad]
    before = [x.tobytes() for x in planned.pull(KEYS)]
    values = random_arrays(np.random.default_rng(3))
    values[3] = make()
    with pytest.raises(error, match='"k3"'):
        getattr(planned, verb)(KEYS, values)
    assert [x.tobytes() for x in planned.pull(KEYS)] == before


@pytest.mark.parametrize("kind", ["read-only", "overlapping", "shape", "text", "torch overlapping"])
def test_bad_outs_are_not_written(planned, kind):
    good = [np.zeros(shape, F32) for shape, _ in zip(SHAPES, KEYS, strict=False)]
    planned.pull(KEYS, out=good)
    planned.pull(KEYS, out=good)
    good_before = [x.copy() for x in good]
    planned.push(KEYS, random_arrays(np.random.default_rng(4)))
    outs = list(good)
    if kind == "read-only":
        outs[3].flags.writeable = False
    elif kind == "overlapping":
        outs[11] = good[3]
    elif kind == "shape":
        outs[3] = np.zeros(1, F32)
    elif kind == "text":
        outs[3] = "text"
    else:
        outs = [torch.from_numpy(x) for x in good]
        outs[11] = outs[3].view(2, 3)
    with pytest.raises(tensorkv.TensorKVError):
        planned.pull(KEYS, out=outs)
    assert all(np.array_equal(x, y) for x, y in zip(good, good_before, strict=True))


def test_in_place(planned, runs):
    arrays = random_arrays(np.random.default_rng(5))
    expected = [x + x for x in arrays]
    planned.pushpull(KEYS, [[x, x.copy()] for x in arrays], out=arrays)
    assert all(np.array_equal(x, y) for x, y in zip(arrays, expected, strict=True))
    assert runs


def test_outs_may_be_the_parts_of_other_keys(runs, monkeypatch):
    monkeypatch.setattr(plan, "_CHUNK", 10)
    keys = list(range(30))
    with tensorkv.create() as kv:
        kv.init(keys, [np.zeros(4, F32)] * 30)
        for _ in range(3):
            arrays = [np.full(4, i, F32) for i in keys]
            kv.pushpull(keys, arrays, out=arrays[::-1])
            assert [int(x[0]) for x in arrays] == keys[::-1]
    assert runs


def test_parameters_and_gradients(planned, runs):
    weights = [torch.nn.Parameter(torch.ones(shape)) for shape, _ in zip(SHAPES, KEYS, strict=False)]
    planned.push(KEYS, weights)
    planned.push(KEYS, [3 * torch.ones(shape) for shape, _ in zip(SHAPES, KEYS, strict=False)])
    planned.pull(KEYS, out=weights)
    assert all((weight == 3).all() for weight in weights)
    assert all(weight.grad_fn is None for weight in weights)
    assert len(runs) == 3


def test_other_keys_and_other_forms_still_work(planned):
    planned.push("k3", np.full((2, 3), 7, F32))
    planned.push(KEYS[:10], random_arrays(np.random.default_rng(6))[:10])
    assert planned.pull("k3").tolist() == random_arrays(np.random.default_rng(6))[3].tolist()
    planned.push({"k3": np.zeros((2, 3), F32)})
    values = random_arrays(np.random.default_rng(7))
    planned.push(KEYS, values)
    planned.push(list(reversed(KEYS)), values[::-1])
    assert all(np.array_equal(x, y) for x, y in zip(planned.pull(KEYS), values, strict=True))
    planned.push(KEYS, [np.array(x, order="F") for x in values])
    assert all(np.array_equal(x, y) for x, y in zip(planned.pull(KEYS), values, strict=True))


def test_two_lists_that_share_keys_do_not_rebuild_plans_for_ever(kv, monkeypatch):
    made = []
    init = plan.Plan.__init__
    monkeypatch.setattr(plan.Plan, "__init__", lambda self, entries: (made.append(1), init(self, entries))[1])
    values = random_arrays(np.random.default_rng(8))
    for _ in range(100):
        kv.push(KEYS, values)
        kv.push(KEYS[5:], values[5:])
    assert 2 <= len(made) < 30
    assert all(np.array_equal(x, y) for x, y in zip(kv.pull(KEYS), values, strict=True))


def test_a_deleted_key_ends_the_plan(planned):
    planned.delete("k3")
    with pytest.raises(tensorkv.KeyNotFoundError, match='"k3"'):
        planned.push(KEYS, random_arrays(np.random.default_rng(9)))
    planned.init("k3", np.zeros(4, F32))
    for _ in range(4):
        with pytest.raises(tensorkv.ValueMismatchError, match='"k3"'):
            planned.push(KEYS, random_arrays(np.random.default_rng(9)))


def test_a_loaded_store_has_no_old_plans(planned, tmp_path):
    planned.save(tmp_path)
    values = random_arrays(np.random.default_rng(10))
    planned.push(KEYS, values)
    saved = [x.tobytes() for x in planned.pull(KEYS)]
    planned.load(tmp_path)
    assert [x.tobytes() for x in planned.pull(KEYS)] != saved
    planned.push(KEYS, values)
    assert [x.tobytes() for x in planned.pull(KEYS)] == saved


def test_an_updater_and_an_optimizer_see_planned_values(planned):
    before = planned.pull(KEYS)
    ones = [np.ones(x.shape, F32) for x in before]
    planned.set_updater(lambda key, received, stored: np.add(stored, received, out=stored))
    planned.push(KEYS, ones)
    assert all(np.array_equal(x, y + 1) for x, y in zip(planned.pull(KEYS), before, strict=True))
    planned.set_optimizer("sgd", lr=1.0)
    planned.push(KEYS, ones)
    np.testing.assert_allclose(
        np.hstack([x.ravel() for x in planned.pull(KEYS)]), np.hstack([x.ravel() for x in before]), rtol=1e-5
    )


def test_nonfinite_is_seen_in_many_keys_too():
    with tensorkv.create(nonfinite="raise") as kv:
        kv.init(KEYS, random_arrays(np.random.default_rng(0)))
        for _ in range(3):
            kv.push(KEYS, random_arrays(np.random.default_rng(1)))
        values = random_arrays(np.random.default_rng(1))
        values[3][0, 0] = np.nan
        with pytest.raises(tensorkv.NonFiniteError, match='"k3"'):
            kv.push(KEYS, values)


def test_odd_key_lists_are_no_plans(kv):
    for keys in ([["a"]] * 9, [{}] * 9, [None] * 9, [1.5] * 9):
        for _ in range(4):
            with pytest.raises(tensorkv.KeyTypeError):
                kv.push(keys, [np.ones(1)] * 9)
    for _ in range(4):
        kv.push(["k3"] * 9, [np.ones((2, 3), F32)] * 9)
    assert kv.pull("k3").tolist() == [[9] * 3] * 2
    assert kv.push(["k3"] * 9, [[np.ones((2, 3), F32)]] * 9) is None


def test_true_is_not_one():
    keys = list(range(10))
    with tensorkv.create() as kv:
        kv.init(keys, [np.zeros(1, F32)] * 10)
        for _ in range(4):
            kv.push(keys, [np.ones(1, F32)] * 10)
        for odd in ([False, True, *keys[2:]], [0.0, *keys[1:]]):
            with pytest.raises(tensorkv.KeyTypeError):
                kv.push(odd, [np.ones(1, F32)] * 10)


def test_outs_that_were_apart_and_no_longer_are(planned):
    base = torch.zeros(200)
    outs, offset = [], 0
    for shape, _ in zip(SHAPES, KEYS, strict=False):
        size = torch.Size(shape).numel()
        outs.append(base[offset : offset + size].view(shape))
        offset += size
    for _ in range(2):
        planned.pull(KEYS, out=outs)
    outs[11].data = outs[3].data
    with pytest.raises(tensorkv.ArgumentError, match="overlap"):
        planned.pull(KEYS, out=outs)
