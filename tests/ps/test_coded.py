"""Compressed gradients between workers and servers: the bits, what is owed, faults and errors."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv import compression
from tests.support.until import LIMIT_S

pytest.importorskip("ray")
pytestmark = pytest.mark.usefixtures("ray_store")

F32 = np.float32
SHAPES = {"scalar": (), "vector": (7,), "matrix": (700, 300), "half": (40, 70), "brain": (31,)}
DTYPES = {"half": torch.float16, "brain": torch.bfloat16}
# Each follows the one before.
CODECS = [
    {"type": "2bit", "threshold": 0.5},
    {"type": "1bit"},
    {"type": "fp16"},
    {"type": "bf16"},
    {"type": "int8"},
    {"type": "topk", "ratio": 0.2},
    {"type": "powersgd"},
    None,
]
RULES = {
    "assign": (),
    "sgd": {"lr": 0.1, "momentum": 0.9},
    "adam": {"lr": 0.1, "max_grad_norm": 0.5, "ema": 0.9},
}


def start(rule, *stores):
    for store in stores:
        store.init({key: torch.zeros(shape, dtype=DTYPES.get(key, torch.float32)) for key, shape in SHAPES.items()})
        store.init("table", tensorkv.Rows(torch.arange(3), torch.ones(3, 2), 9))
        if rule != "assign":
            store.set_optimizer(rule, **RULES[rule])


def gradients(*seed):
    rng = np.random.default_rng(seed)
    made = {key: torch.from_numpy(rng.normal(size=shape).astype(F32)) for key, shape in SHAPES.items()}
    return {key: each.to(DTYPES.get(key, torch.float32)) for key, each in made.items()}


@pytest.mark.parametrize("mode", ["async", "sync"])
@pytest.mark.parametrize("rule", RULES)
def test_all_codecs_give_the_bits_of_a_local_store(server_pool, mode, rule):
    options = {} if rule == "adam" else {"num_servers": 2}
    with server_pool.create(mode=mode, **options) as kv, tensorkv.create() as local:
        start(rule, kv, local)
        for number, params in enumerate(CODECS):
            kv.set_gradient_compression(params)
            local.set_gradient_compression(params, simulate=True)
            for turn in range(3):
                pushed = gradients(number, turn)
                if turn == 1:
                    kv.pushpull(pushed)
                    local.pushpull(pushed)
                else:
                    rows = tensorkv.Rows(torch.tensor([1, 4]), torch.full((2, 2), turn + 1.0), 9)
                    kv.push({**pushed, "table": rows})
                    local.push({**pushed, "table": rows})
            for key in SHAPES:
                assert torch.equal(kv.pull(key), local.pull(key)), (params, key)
                assert kv.info(key).version == local.info(key).version
            every = torch.arange(9)
            mine, right = (store.row_sparse_pull("table", row_ids=every).values for store in (kv, local))
            assert torch.equal(mine, right)
            assert kv.last_push == local.last_push
        assert kv.stats()["compression"] == local.stats()["compression"]


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_means_of_parts(server_pool, mode):
    with server_pool.create(mode=mode, reduce="mean") as kv, tensorkv.create(reduce="mean") as local:
        start("sgd", kv, local)
        kv.set_gradient_compression({"type": "fp16"})
        parts = gradients(1), gradients(2)
        kv.push({key: [each[key] for each in parts] for key in SHAPES})
        mean = {key: (parts[0][key].float() + parts[1][key].float()) / 2 for key in SHAPES}
        if mode == "sync":
            # The sum is sent, and the server divides it.
            mean = {key: (parts[0][key].float() + parts[1][key].float()).half().float() / 2 for key in SHAPES}
        else:
            mean = {key: each.half().float() for key, each in mean.items()}
        local.push({key: each.to(DTYPES.get(key, torch.float32)) for key, each in mean.items()})
        for key in ("scalar", "vector", "matrix"):
            assert torch.equal(kv.pull(key), local.pull(key)), key


def test_a_value_on_several_servers_is_pushed_as_pieces(server_pool):
    shape = (1200, 1000)
    with server_pool.create(num_servers=2) as kv:
        kv.init("w", torch.zeros(shape))
        assert len(kv._engine._keymap.find("test", "w").pieces) == 2
        kv.set_optimizer("sgd", lr=1.0, maximize=True)
        kv.set_gradient_compression({"type": "2bit", "threshold": 0.5})
        kv.push("w", torch.full(shape, 0.75))
        assert kv.pull("w").unique().tolist() == [0.5]
        kv.set_gradient_compression(None)
        assert kv.pull("w").unique().tolist() == [0.75]


@pytest.mark.parametrize(
    ("key", "gradient", "message"),
    [
        ("i", np.ones(3, np.int32), r'push\("i"\): gradients are compressed \(2bit\), and this one is int32'),
        ("w", tensorkv.Rows(np.array([1]), np.ones(1, F32), 3), r'push\("w"\).*is Rows for a dense key'),
        (
            "w",
            [np.ones(3, F32), tensorkv.Rows(np.array([1]), np.ones(1, F32), 3)],
            r'push\("w"\).*is Rows for a dense key',
        ),
        ("w", np.array([1, np.nan, 0], F32), r'push\("w"\): the gradient.* has NaN or Inf, which 2bit cannot'),
    ],
    ids=["integers", "rows", "rows beside dense", "nan"],
)
def test_what_cannot_be_compressed_is_an_error_and_changes_nothing(server_pool, key, gradient, message):
    with server_pool.create() as kv:
        kv.init({"w": np.zeros(3, F32), "i": np.zeros(3, np.int32)})
        kv.set_gradient_compression({"type": "2bit", "threshold": 0.5})
        kv.push("w", np.array([0.25, 0.75, 0], F32))
        with pytest.raises(tensorkv.TensorKVError, match=message):
            kv.push(key, gradient)
        assert kv.pushpull("w", np.array([0.25, 0, 0.25], F32)).tolist() == [0.5, 0, 0]


def test_what_was_refused_is_owed_as_before(server_pool):
    """Another client has deleted the key when the words come."""
    name = server_pool.name()
    with tensorkv.create("dist_async", name=name) as kv, tensorkv.create("dist_async", name=name) as other:
        kv.init({"w": np.zeros(3, F32), "v": np.zeros(3, F32)})
        kv.set_gradient_compression({"type": "2bit", "threshold": 0.5})
        kv.push("v", np.array([0.25, 0, 0], F32))
        assert other.pull("w").tolist() == [0, 0, 0]
        other.delete("w")
        with pytest.raises(tensorkv.KeyNotFoundError):
            kv.push(["w", "v"], [np.ones(3, F32), np.array([0.25, 0, 0], F32)])
        assert kv.pushpull("v", np.array([0.25, 0, 0], F32)).tolist() == [0.5, 0, 0]


def test_keys_that_are_deleted_owe_nothing(server_pool):
    with server_pool.create() as kv:
        kv.init("w", np.zeros(3, F32))
        kv.set_gradient_compression({"type": "2bit", "threshold": 0.5})
        kv.push("w", np.full(3, 0.25, F32))
        kv.delete("w")
        kv.init("w", np.zeros(3, F32))
        assert kv.pushpull("w", np.full(3, 0.25, F32)).tolist() == [0, 0, 0]


def test_a_server_refuses_words_that_do_not_fit(server_pool):
    from tensorkv.arrays.packing import pack
    from tensorkv.engines.ps.client.session import ServerRequest
    from tensorkv.engines.ps.messages import Push, words_item

    def send(kv, key, nbytes, codec):
        packed = pack([words_item(key, np.zeros(-(-nbytes // 8) * 8, np.uint8))])
        with kv._engine._sessions.take() as session:
            session.send([ServerRequest.of_tensors(0, Push(codec=codec), packed)])

    two_bits = {"type": "2bit", "threshold": 0.5}
    with server_pool.create() as kv:
        kv.init({"w": np.ones(33, F32), "i": np.ones(33, np.int32)})
        kv.init("t", tensorkv.Rows(np.arange(3), np.ones((3, 2), F32), 9))
        for key, nbytes, codec, message in [
            ("w", 24, two_bits, r'push\("w"\): got 24 bytes of 2bit, for \(33,\) it has 12'),
            ("w", 16, None, "no gradient that is compressed"),
            ("i", 16, two_bits, "no gradient that is compressed"),
            ("t", 16, two_bits, "no gradient that is compressed"),
            ("w", 16, {"type": "2bit", "threshold": -1.0}, "threshold is -1.0"),
            ("w", 16, {"type": "other"}, "no codec 'other'"),
        ]:
            with pytest.raises(tensorkv.TensorKVError, match=message):
                send(kv, key, nbytes, codec)
        assert kv.pull("w").tolist() == [1] * 33
        # The same request, as it should be.
        send(kv, "w", 12, two_bits)
        assert kv.pull("w").tolist() == [0] * 33


def test_every_codec_is_tried():
    assert {each["type"] for each in CODECS if each} == set(compression.names()) - {"doctest"}


def push_and_pull(kv, rank):
    kv.push({key: each * (rank + 1) for key, each in gradients(7, rank).items()})
    kv.barrier()
    found = {key: kv.pull(key) for key in SHAPES}
    kv.barrier()
    return found


@pytest.mark.parametrize("kind", ["2bit", "powersgd"])
def test_a_checkpoint_has_what_all_workers_owe(server_pool, tmp_path, kind):
    """Two workers push and save; two others, and one alone, go on from there."""
    params = next(each for each in CODECS if each and each["type"] == kind)
    options = {"num_workers": 2, "num_servers": 2, "mode": "sync"}

    def together(*calls):
        with ThreadPoolExecutor(2) as pool:
            return [each.result(LIMIT_S) for each in [pool.submit(call) for call in calls]]

    def workers(name):
        return together(*[partial(tensorkv.create, "dist_async", name=name, **options)] * 2)

    found = []
    for turn in range(2):
        first, second = sorted(workers(f"owed-{kind}-{turn}"), key=lambda kv: kv.rank)
        pair = (first, second)
        if turn == 0:
            together(*(partial(start, "sgd", kv) for kv in pair))
            together(*(partial(kv.set_gradient_compression, params) for kv in pair))
            together(*(partial(push_and_pull, kv, kv.rank) for kv in pair))
            together(*(partial(kv.save, tmp_path / "saved") for kv in pair))
        else:
            together(*(partial(kv.load, tmp_path / "saved") for kv in pair))
            together(*(partial(kv.set_gradient_compression, params) for kv in pair))
        found.append(together(*(partial(push_and_pull, kv, kv.rank) for kv in pair))[0])
        together(*(kv.close for kv in pair))
    for key in SHAPES:
        assert torch.equal(found[0][key], found[1][key]), key
    with server_pool.create(num_servers=2) as alone, tensorkv.create() as local:
        for kv in (alone, local):
            kv.load(tmp_path / "saved")
            kv.set_gradient_compression(CODECS[2], simulate=True)
            # What both have owed is pushed.
            kv.set_gradient_compression(None)
        for key in SHAPES:
            mine, right = alone.pull(key).float(), local.pull(key).float()
            torch.testing.assert_close(mine, right, rtol=1e-2 if key in DTYPES else 1e-5, atol=1e-6)
            assert not torch.equal(right, found[0][key].float()) or key == "scalar"


def written(turn, wholes):
    """Return gradients as some user would give them."""
    match turn % 4:
        case 0:
            return wholes
        case 1:
            return [torch.stack([each, each], -1)[..., 1] for each in wholes]
        case 2:
            return [each if each.dtype is torch.bfloat16 else each.numpy() for each in wholes]
    # The sum has no rounding.
    return [[each * 2, -each] for each in wholes]


@pytest.mark.parametrize("mode", ["async", "sync"])
@pytest.mark.parametrize("codec", [{"type": "2bit", "threshold": 0.5}, {"type": "int8"}], ids=["2bit", "int8"])
def test_gradients_of_all_kinds_of_arrays_owe_to_each_other(server_pool, mode, codec):
    """Plain arrays, at which the compiled part looks, and others take turns, in changing lists of keys."""
    with server_pool.create(mode=mode, num_servers=2) as kv, tensorkv.create() as local:
        keys = [*SHAPES, *(f"small{number}" for number in range(40))]
        shapes = [*SHAPES.values(), *((number,) for number in range(40))]
        dtypes = [DTYPES.get(key, torch.float32) for key in keys]
        for store in (kv, local):
            store.init(keys, [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)])
            store.set_optimizer("sgd", lr=0.1, momentum=0.9)
        kv.set_gradient_compression(codec)
        local.set_gradient_compression(codec, simulate=True)
        rng = np.random.default_rng(5)
        for turn in range(12):
            places = range(len(keys)) if turn % 3 == 0 else sorted(rng.choice(len(keys), 11, replace=False).tolist())
            chosen = [keys[place] for place in places]
            wholes = [
                torch.from_numpy(rng.normal(size=shapes[place]).astype(F32)).to(dtypes[place]) for place in places
            ]
            local.push(chosen, wholes)
            given = written(turn, wholes)
            if turn % 2:
                kv.push(chosen, given)
            else:
                outs = [torch.empty_like(each) for each in wholes]
                kv.pushpull(chosen, given, out=outs)
                for key, out in zip(chosen, outs, strict=True):
                    assert torch.equal(out, local.pull(key)), (turn, key)
            for key in chosen:
                assert torch.equal(kv.pull(key), local.pull(key)), (turn, key)
        kv.set_gradient_compression(None)
        local.set_gradient_compression(None)
        for key in keys:
            assert torch.equal(kv.pull(key), local.pull(key)), key
        assert kv.stats()["compression"]["sent_raw_nbytes"] == local.stats()["compression"]["sent_raw_nbytes"]


def test_a_push_of_plain_arrays_that_is_refused_owes_what_was_owed(server_pool):
    name = server_pool.name()
    with tensorkv.create("dist_async", name=name) as kv, tensorkv.create("dist_async", name=name) as other:
        kv.init(["w", "v"], [np.zeros(3, F32), np.zeros(3, F32)])
        kv.set_gradient_compression({"type": "2bit", "threshold": 0.5})
        gradients = [np.array([0.25, 0.75, 0], F32), np.array([0.5, 0.25, 0], F32)]
        kv.push(["w", "v"], gradients)
        before = {source: owed.residual.copy() for source, owed in kv._engine._data.compressor.owed.items()}
        other.delete("v")
        with pytest.raises(tensorkv.TensorKVError):
            kv.push(["w", "v"], gradients)
        owed = kv._engine._data.compressor.owed
        assert np.array_equal(owed["w", 0].residual, before["w", 0])
        assert kv.pushpull("w", np.array([0.25, 0, 0.25], F32)).tolist() == [0.5, 0, 0]


@pytest.mark.parametrize("codec", ["2bit", "powersgd"])
def test_what_is_saved_as_owed_is_of_one_push_whatever_other_threads_push(server_pool, codec, monkeypatch):
    rng = np.random.default_rng(0)
    with server_pool.create() as kv, ThreadPoolExecutor(1) as pool:
        kv.init("w", np.zeros((70, 30), F32))
        kv.set_optimizer("sgd", lr=0.1)
        kv.set_gradient_compression({"type": codec})
        pushed = []

        def push():
            kv.push("w", rng.normal(size=(70, 30)).astype(F32))
            pushed.append("w")

        push()
        data = kv._engine._data
        ((_, expected),) = data.owed(0).items()
        find = kv._engine._keymap.find

        def find_late(verb, key):
            # Of two pushes, the second uses the memory again of what was owed before the first.
            for _ in range(2 if verb == "save" else 0):
                pool.submit(push).result(LIMIT_S)
            return find(verb, key)

        monkeypatch.setattr(kv._engine._keymap, "find", find_late)
        ((_, found),) = data.owed(0).items()
        assert len(pushed) == 3
        assert np.array_equal(found.residual, expected.residual)
        assert {name: array.tolist() for name, array in found.memory.items()} == {
            name: array.tolist() for name, array in expected.memory.items()
        }
