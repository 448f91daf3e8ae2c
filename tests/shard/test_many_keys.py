"""Calls of many keys: the same bits plain, logged and parsed, and errors for whatever is out of the ordinary."""

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv.shard import native
from tensorkv.shard.shard import Shard

F32 = np.float32
WAYS = ["plain", "logged", "parsed"]
KEYS = [f"k{i}" for i in range(20)]
SHAPES = [(), (1,), (3,), (2, 3), (0,), (5, 1), (7,), (2, 2, 2)] * 3


def random_arrays(rng, dtype="float32"):
    return [np.asarray(rng.standard_normal(shape) * 100).astype(dtype) for shape, _ in zip(SHAPES, KEYS, strict=False)]


def create(way, folder, monkeypatch):
    """Return a store whose calls go one way: as they are, by a log, or parsed, as without the compiled part."""
    monkeypatch.setattr(native, "can_look", native_can_look if way != "parsed" else lambda: False)
    return tensorkv.create(path=folder / way) if way == "logged" else tensorkv.create()


native_can_look = native.can_look


@pytest.fixture(params=WAYS)
def kv(request, tmp_path, monkeypatch):
    with create(request.param, tmp_path, monkeypatch) as store:
        store.init(KEYS, random_arrays(np.random.default_rng(0)))
        yield store


@pytest.fixture
def plain(monkeypatch):
    """How many calls were made without being parsed."""
    counted, made = [], Shard.try_compiled

    def count(self, *args, **kwargs):
        done = made(self, *args, **kwargs)
        counted.extend([1] if done else [])
        return done

    monkeypatch.setattr(Shard, "try_compiled", count)
    return counted


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "uint16", "bool", "complex64", "float16"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_way_gives_the_same_bits(dtype, library, count, plain, monkeypatch, tmp_path):
    rng = np.random.default_rng(2)
    wrap = torch.from_numpy if library == "torch" else np.asarray
    first = [wrap(np.asarray(x)) for x in random_arrays(rng, dtype)]
    rounds = [[[wrap(np.asarray(x)) for x in random_arrays(rng, dtype)] for _ in range(count)] for _ in range(4)]
    results = []
    for way in WAYS:
        found = []
        with create(way, tmp_path, monkeypatch) as kv:
            kv.init(KEYS, first)
            for parts in rounds:
                outs = [wrap(np.zeros(shape, dtype)) for shape, _ in zip(SHAPES, KEYS, strict=False)]
                more = [wrap(np.zeros(shape, dtype)) for shape, _ in zip(SHAPES, KEYS, strict=False)]
                kv.pushpull(KEYS, list(zip(*parts, strict=True)), out=outs)
                kv.pull(KEYS, out=[[a, b] for a, b in zip(more, outs, strict=True)])
                found.append([np.asarray(x).tobytes() for x in (*outs, *more)])
            found.append([kv.info(key).version for key in KEYS])
            found.append(kv.stats()["keys"])
        results.append(found)
    assert results[0] == results[1] == results[2]
    assert (len(plain) > 0) == (dtype != "complex64" and native_can_look())


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
def test_an_optimizer_gives_the_same_bits_every_way(name, count, library, plain, monkeypatch, tmp_path):
    """Also when single keys, rows of a key or other numbers come in between."""
    wrap = torch.from_numpy if library == "torch" else np.asarray
    results = []
    for way in WAYS:
        rng, found = np.random.default_rng(7), []
        with create(way, tmp_path, monkeypatch) as kv:
            kv.init(KEYS, [wrap(x) for x in random_arrays(rng)])
            optimizer = {"momentum": "sgd", "nesterov": "sgd"}.get(name, name)
            kv.set_optimizer(optimizer, **OPTIMIZERS[name])
            for turn in range(12):
                parts = [[wrap(x) for x in random_arrays(rng)] for _ in range(count)]
                outs = [wrap(np.zeros(shape, F32)) for shape, _ in zip(SHAPES, KEYS, strict=False)]
                kv.pushpull(KEYS, list(zip(*parts, strict=True)), out=outs)
                found.append([np.asarray(x).tobytes() for x in outs])
                if turn == 5:
                    kv.push(KEYS, parts[0])
                    kv.push("k3", parts[0][3])
                    kv.push("k3", tensorkv.Rows(np.array([1]), np.ones((1, 3), F32), 2))
                if turn == 7:
                    for key, part in zip(KEYS, parts[0], strict=True):
                        kv.push(key, [part] * (1 if key == "k3" else 2))
                if turn == 9:
                    kv.set_hyperparameters(lr=0.05)
            found.append([kv.info(key).version for key in KEYS])
        results.append(found)
    assert results[0] == results[1] == results[2]
    assert (len(plain) > 3) == (name != "nadam" and native_can_look())


def test_one_keys_own_numbers_are_kept(kv):
    kv.set_optimizer("sgd", lr=1.0)
    kv.set_hyperparameters(lr=0.0, keys="k3")
    before = kv.pull(KEYS)
    for _ in range(3):
        kv.push(KEYS, [np.ones(x.shape, F32) for x in before])
    for key, old, new in zip(KEYS, before, kv.pull(KEYS), strict=True):
        np.testing.assert_allclose(new, old - (0 if key == "k3" else 3), rtol=1e-5, atol=1e-4)


def test_a_saved_state_goes_on_the_same(kv, tmp_path):
    kv.set_optimizer("adam", lr=0.1)
    ones = [np.ones(shape, F32) for shape, _ in zip(SHAPES, KEYS, strict=False)]
    kv.push(KEYS, ones)
    kv.save(tmp_path / "all")
    kv.save_optimizer_states(tmp_path / "states")
    kv.push(KEYS, ones)
    expected = [x.tobytes() for x in kv.pull(KEYS)]
    kv.load(tmp_path / "all")
    for _ in range(2):
        kv.load_optimizer_states(tmp_path / "states")
        kv.push(KEYS, ones)
        assert [x.tobytes() for x in kv.pull(KEYS)] == expected
        kv.load(tmp_path / "all")
    kv.set_optimizer("sgd", lr=0.0)
    kv.set_optimizer("adam", lr=0.1)
    kv.push(KEYS, ones)
    assert [x.tobytes() for x in kv.pull(KEYS)] != expected, "another optimizer in between drops the state"


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
def test_bad_parts_change_nothing(kv, bad, verb):
    make, error = BAD[bad]
    before = [x.tobytes() for x in kv.pull(KEYS)]
    values = random_arrays(np.random.default_rng(3))
    values[3] = make()
    with pytest.raises(error, match='"k3"'):
        getattr(kv, verb)(KEYS, values)
    assert [x.tobytes() for x in kv.pull(KEYS)] == before


@pytest.mark.parametrize("kind", ["read-only", "overlapping", "shape", "text", "torch overlapping"])
def test_bad_outs_are_not_written(kv, kind):
    good = [np.zeros(shape, F32) for shape, _ in zip(SHAPES, KEYS, strict=False)]
    kv.pull(KEYS, out=good)
    kv.pull(KEYS, out=good)
    good_before = [x.copy() for x in good]
    kv.push(KEYS, random_arrays(np.random.default_rng(4)))
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
        kv.pull(KEYS, out=outs)
    assert all(np.array_equal(x, y) for x, y in zip(good, good_before, strict=True))


def test_in_place(kv):
    arrays = random_arrays(np.random.default_rng(5))
    expected = [x + x for x in arrays]
    kv.pushpull(KEYS, [[x, x.copy()] for x in arrays], out=arrays)
    assert all(np.array_equal(x, y) for x, y in zip(arrays, expected, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_outs_may_be_the_parts_of_other_keys(way, monkeypatch, tmp_path):
    keys = list(range(30))
    with create(way, tmp_path, monkeypatch) as kv:
        kv.init(keys, [np.zeros(4, F32)] * 30)
        for _ in range(3):
            arrays = [np.full(4, i, F32) for i in keys]
            kv.pushpull(keys, arrays, out=arrays[::-1])
            assert [int(x[0]) for x in arrays] == keys[::-1]


def test_parameters_and_gradients(kv):
    weights = [torch.nn.Parameter(torch.ones(shape)) for shape, _ in zip(SHAPES, KEYS, strict=False)]
    kv.push(KEYS, weights)
    kv.push(KEYS, [3 * torch.ones(shape) for shape, _ in zip(SHAPES, KEYS, strict=False)])
    kv.pull(KEYS, out=weights)
    assert all((weight == 3).all() for weight in weights)
    assert all(weight.grad_fn is None for weight in weights)


def test_other_keys_and_other_forms_still_work(kv):
    kv.push("k3", np.full((2, 3), 7, F32))
    kv.push(KEYS[:10], random_arrays(np.random.default_rng(6))[:10])
    assert kv.pull("k3").tolist() == random_arrays(np.random.default_rng(6))[3].tolist()
    kv.push({"k3": np.zeros((2, 3), F32)})
    values = random_arrays(np.random.default_rng(7))
    kv.push(KEYS, values)
    kv.push(list(reversed(KEYS)), values[::-1])
    assert all(np.array_equal(x, y) for x, y in zip(kv.pull(KEYS), values, strict=True))
    kv.push(KEYS, [np.array(x, order="F") for x in values])
    assert all(np.array_equal(x, y) for x, y in zip(kv.pull(KEYS), values, strict=True))


def test_a_deleted_key_is_missed(kv):
    kv.delete("k3")
    with pytest.raises(tensorkv.KeyNotFoundError, match='"k3"'):
        kv.push(KEYS, random_arrays(np.random.default_rng(9)))
    kv.init("k3", np.zeros(4, F32))
    for _ in range(4):
        with pytest.raises(tensorkv.ValueMismatchError, match='"k3"'):
            kv.push(KEYS, random_arrays(np.random.default_rng(9)))


def test_a_loaded_store_has_its_own_values(kv, tmp_path):
    kv.save(tmp_path / "saved")
    values = random_arrays(np.random.default_rng(10))
    kv.push(KEYS, values)
    saved = [x.tobytes() for x in kv.pull(KEYS)]
    kv.load(tmp_path / "saved")
    assert [x.tobytes() for x in kv.pull(KEYS)] != saved
    kv.push(KEYS, values)
    assert [x.tobytes() for x in kv.pull(KEYS)] == saved


def test_an_updater_and_an_optimizer_see_the_values(kv):
    before = kv.pull(KEYS)
    ones = [np.ones(x.shape, F32) for x in before]
    kv.set_updater(lambda key, received, stored: np.add(stored, received, out=stored))
    kv.push(KEYS, ones)
    assert all(np.array_equal(x, y + 1) for x, y in zip(kv.pull(KEYS), before, strict=True))
    kv.set_optimizer("sgd", lr=1.0)
    kv.push(KEYS, ones)
    np.testing.assert_allclose(
        np.hstack([x.ravel() for x in kv.pull(KEYS)]), np.hstack([x.ravel() for x in before]), rtol=1e-5
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


def test_odd_key_lists(kv):
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


def test_outs_that_were_apart_and_no_longer_are(kv):
    base = torch.zeros(200)
    outs, offset = [], 0
    for shape, _ in zip(SHAPES, KEYS, strict=False):
        size = torch.Size(shape).numel()
        outs.append(base[offset : offset + size].view(shape))
        offset += size
    for _ in range(2):
        kv.pull(KEYS, out=outs)
    outs[11].data = outs[3].data
    with pytest.raises(tensorkv.ArgumentError, match="overlap"):
        kv.pull(KEYS, out=outs)
