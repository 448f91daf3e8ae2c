"""The local engine passes the contract, under every type name."""

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv.engines import local
from tensorkv.releases import finder
from tensorkv.shard import reduce
from tensorkv.testing import Contract
from tests.support.until import LIMIT_S


class TestLocal(Contract):
    TYPE = "local"


class TestDevice(Contract):
    TYPE = "device"


ALIASES = ["local_allreduce_cpu", "local_update_cpu", "local_allreduce_device", "nccl"]


@pytest.mark.parametrize("name", ALIASES)
def test_aliases(name):
    with tensorkv.create(name) as kv:
        assert kv.type == name
        kv.init("w", np.zeros(2))
        assert kv.pushpull("w", [np.ones(2)] * 3).tolist() == [3, 3]


@pytest.mark.parametrize("value", [None, np.zeros(1), np.zeros(2)])
@pytest.mark.parametrize("form", ["whole", "part", "rows"])
def test_averages_of_a_key_that_another_thread_deletes_or_creates_again(value, form):
    with tensorkv.create() as kv:
        kv.init("w", np.ones(4))
        kv.init("x", np.ones(4))
        kv.set_optimizer("sgd", lr=1.0, ema=0.5)
        out = np.full(4, 9.0)
        pull = {
            "whole": lambda: kv.pull_ema(["x", "w"], out=[np.zeros(4), out]),
            "part": lambda: kv.pull_ema("w", out=tensorkv.TensorSlice(out[2:], (2,), (4,))),
            "rows": lambda: kv.pull_ema("w", row_ids=[0, 3]),
        }[form]
        contents = kv._engine.contents

        def contents_of_others(**options):
            with ThreadPoolExecutor(1) as pool:
                pool.submit(kv.delete, "w").result()
                if value is not None:
                    pool.submit(kv.init, "w", value).result()
            return contents(**options)

        kv._engine.contents = contents_of_others
        error, words = (
            (tensorkv.KeyNotFoundError, "no such key")
            if value is None
            else (tensorkv.ValueMismatchError, "the key was re-created with another shape")
        )
        with pytest.raises(error, match=rf'^pull_ema\("w"\): {words}'):
            pull()
        assert out.tolist() == [9] * 4


def test_close_ends_a_wait_for_a_version():
    with tensorkv.create() as kv, ThreadPoolExecutor(1) as pool:
        kv.init("w", np.zeros(2))
        asked, info = threading.Event(), kv._engine.info

        def tell(key):
            found = info(key)
            asked.set()
            return found

        kv._engine.info = tell
        pulled = pool.submit(kv.pull, "w", min_version=1)
        assert asked.wait(LIMIT_S)
        kv.close()
        with pytest.raises(tensorkv.StoreClosedError, match=r'^pull\("w"\): this store was closed'):
            pulled.result()


@pytest.mark.parametrize("verb", ["pushpull", "pull", "pull of a region"])
def test_outs_that_are_parts_are_read_together_with_the_others(verb):
    """No push of another thread comes between a call's push, its whole outs and its parts."""
    with tensorkv.create() as kv, ThreadPoolExecutor(1) as pool:
        kv.init("w", np.zeros(4))
        other = []
        pull_regions = kv._engine.pull_regions

        def push_first(*arguments):
            other.append(pool.submit(kv.push, "w", np.full(4, 2.0)))
            with pytest.raises(TimeoutError):
                other[-1].result(0.1)
            pull_regions(*arguments)

        kv._engine.pull_regions = push_first
        whole, part = np.empty(4), np.empty(2)
        outs = [whole, tensorkv.TensorSlice(part, (1,), (4,))]
        if verb == "pushpull":
            kv.pushpull("w", np.ones(4), out=outs)
        elif verb == "pull":
            kv.pull("w", out=outs)
        else:
            kv.pull("w", out=outs, region=slice(0, 4))
        for each in other:
            each.result()
        expected = 1 if verb == "pushpull" else 0
        assert whole.tolist() == [expected] * 4
        assert part.tolist() == [expected] * 2
        assert kv.pull("w", like=whole).tolist() == [2] * 4


def test_threads_create_the_keys_of_a_tree_at_the_same_time():
    with tensorkv.create() as kv, ThreadPoolExecutor(4) as pool:
        for turn in range(50):
            trees = [{f"{turn}": np.ones(2), f"{turn} of {thread}": np.ones(2)} for thread in range(4)]
            list(pool.map(kv.push_tree, trees))
            assert kv.info(f"{turn}").version == 4
        assert len(kv) == 250


def test_loaded_releases_are_there_when_the_folder_is_opened_again(tmp_path):
    with tensorkv.create() as kv:
        kv.init({"a": np.zeros(3), "b": np.ones(3)})
        kv.publish("one")
        kv.push("a", np.ones(3))
        kv.publish("two")
        kv.save(tmp_path / "saved", releases=True)
        digests = [kv.open_release(name).digest for name in ("one", "two")]
    with tensorkv.create(path=tmp_path / "store") as kv:
        kv.init("a", np.zeros(1))
        kv.publish("before")
        kv.load(tmp_path / "saved")
    with tensorkv.create(path=tmp_path / "store") as kv:
        assert [(each.name, each.number) for each in kv.releases()] == [("one", 1), ("two", 2)]
        assert [kv.open_release(name).digest for name in ("one", "two")] == digests
        for name in ("before", "one"):
            with pytest.raises(tensorkv.ReleaseExistsError):
                kv.publish(name)
        kv.publish("three")
        kv.push("b", np.zeros(3))
        assert kv.open_release("three").pull("b").tolist() == [1, 1, 1]


def test_an_old_release_does_not_lend_its_changes_to_one_of_its_name(tmp_path):
    with tensorkv.create() as kv, tensorkv.create() as other:
        for store, values in ((kv, [1, 2]), (other, [3, 4])):
            store.init("a", np.zeros(2))
            store.publish("one")
            store.push("a", np.array(values, float))
            store.publish("two")
        other.save(tmp_path / "saved", releases=True)
        found = []
        for _ in range(2):
            with kv.open_release("two") as release:
                found.append(release.changes(since="one")[0].values.tolist())
            kv.load(tmp_path / "saved")
        assert found == [[1, 2], [3, 4]]


def test_more_elements_than_a_slice_holds():
    rng = np.random.default_rng(1)
    parts = [rng.standard_normal((700, 1001)).astype(np.float32) for _ in range(3)]
    with tensorkv.create() as kv:
        kv.init("w", parts[0])
        assert np.array_equal(kv.pushpull("w", parts), (parts[0] + parts[1]) + parts[2])
        columns = [np.asfortranarray(part) for part in parts]
        assert np.array_equal(kv.pushpull("w", columns), (parts[0] + parts[1]) + parts[2])


@pytest.mark.parametrize("optimizer", [None, "sgd", "adam", "rmsprop"])
@pytest.mark.parametrize("size", [(1 << 17) - 1, 1 << 17, (1 << 17) + 1, 70_000])
def test_threads_and_slices_change_no_bit(optimizer, size, monkeypatch):
    generator = np.random.default_rng(size)
    parts = [generator.standard_normal(size).astype(np.float32) for _ in range(3)]
    first = generator.standard_normal(size).astype(np.float32)
    results = set()
    for threads in (1, 2, 3, 4):
        for slice_size in (1 << 16, 1 << 17, 1 << 19):
            monkeypatch.setattr(reduce, "SLICE", slice_size)
            with tensorkv.create(threads=threads) as kv:
                kv.init("w", first)
                if optimizer:
                    kv.set_optimizer(optimizer, lr=0.1, weight_decay=0.01)
                out = np.empty_like(first)
                for _ in range(3):
                    kv.push("w", parts[:2])
                    kv.pushpull("w", parts, out=out)
                results.add((out.tobytes(), kv.pull("w").tobytes()))
    assert len(results) == 1


def test_jax_parts_on_devices_of_their_own():
    jax = pytest.importorskip("jax")
    devices = jax.devices("cpu")
    assert len(devices) == 3
    parts = [jax.device_put(np.full(2, i + 1, np.float32), device) for i, device in enumerate(devices)]
    with tensorkv.create() as kv:
        kv.init("w", parts[2])
        kv.push("w", parts)
        assert kv.pull("w").devices() == {devices[2]}
        for device, part in zip(devices, parts, strict=True):
            pulled = kv.pull("w", like=part)
            assert pulled.devices() == {device}
            assert pulled.tolist() == [6, 6]
        with pytest.raises(tensorkv.ArrayTypeError, match="like="):
            kv.pull("w", out=parts[0])


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
class TestCuda:
    def test_device_keeps_the_value_where_the_parts_are(self):
        with tensorkv.create("device") as kv:
            kv.init("w", torch.zeros(1000))
            parts = [torch.full((1000,), float(i), device="cuda") for i in range(4)]
            kv.push("w", parts)
            assert kv.info("w").device.startswith("cuda")
            assert kv.pull("w").tolist() == [6.0] * 1000
            out = torch.zeros(1000, device="cuda")
            kv.pull("w", out=out)
            assert out.sum().item() == 6000

    def test_local_keeps_the_value_on_the_cpu(self):
        with tensorkv.create("local") as kv:
            kv.init("w", torch.zeros(10, device="cuda"))
            kv.push("w", [torch.ones(10, device="cuda"), torch.ones(10)])
            assert kv.info("w").device == "cpu"
            assert kv.pull("w").is_cuda

    def test_outs_may_lie_side_by_side(self):
        out = torch.zeros(2, 6, device="cuda")
        with tensorkv.create() as kv:
            kv.init(["q", "k", "v"], [np.full((2, 2), number, np.float32) for number in (1, 2, 3)])
            kv.pull(["q", "k", "v"], out=list(out.chunk(3, dim=1)))
            assert out.tolist() == [[1, 1, 2, 2, 3, 3]] * 2
            with pytest.raises(tensorkv.ArgumentError, match="overlap"):
                kv.pull(["q", "k"], out=[out[:, :2], out[:, 1:3]])

    def test_streams_of_the_caller_are_in_order(self):
        with tensorkv.create("device") as kv:
            kv.init("w", torch.zeros(1 << 22, device="cuda"))
            streams = [torch.cuda.Stream() for _ in range(4)]
            for step in range(50):
                with torch.cuda.stream(streams[step % 4]):
                    part = torch.full((1 << 22,), float(step), device="cuda")
                    kv.push("w", [part, part])
                with torch.cuda.stream(streams[(step + 1) % 4]):
                    pulled = kv.pull("w")
                    assert (pulled == 2.0 * step).all().item()

    @pytest.mark.parametrize("optimizer", ["sgd", "adam", "adagrad"])
    def test_an_optimizer_on_the_gpu(self, optimizer, tmp_path):
        with tensorkv.create("device") as kv:
            kv.init("w", torch.ones(1000, device="cuda"))
            kv.set_optimizer(optimizer, lr=0.1)
            weight = torch.ones(1000, device="cuda", requires_grad=True)
            classes = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adagrad": torch.optim.Adagrad}
            reference = classes[optimizer]([weight], lr=0.1)
            for step in range(5):
                if step == 3:
                    kv.save(tmp_path / "saved")
                    kv.load(tmp_path / "saved")
                weight.grad = torch.full((1000,), 2.0, device="cuda")
                reference.step()
                kv.push("w", [torch.ones(1000, device="cuda")] * 2)
            torch.testing.assert_close(kv.pull("w"), weight.detach())

    def test_cupy(self):
        cupy = pytest.importorskip("cupy")
        with tensorkv.create("device") as kv:
            kv.init("w", cupy.zeros(10, cupy.float32))
            kv.push("w", [cupy.ones(10, cupy.float32)] * 3)
            pulled = kv.pull("w")
            assert isinstance(pulled, cupy.ndarray)
            assert pulled.tolist() == [3] * 10
            out = cupy.zeros(10, cupy.float32)
            kv.pull("w", out=out)
            assert out.tolist() == [3] * 10


def test_a_plain_push_does_not_lose_its_key_to_slices_that_come_meanwhile(monkeypatch):
    """A slice arrives after the compiled part has looked at a push, and before its values change under a snapshot."""
    with tensorkv.create() as kv:
        shard = kv._engine._shard
        numel = 1 << 18
        kv.init({"w": np.zeros(numel, np.float32), "b": np.zeros(numel, np.float32)})
        half, make = np.ones(numel // 2, np.float32), type(shard)._make_plain
        pushed = []

        def push_slice_first(self, *arguments):
            if not pushed:
                pushed.append(True)
                kv.push("w", tensorkv.TensorSlice(half, (0,), (numel,)))
            return make(self, *arguments)

        monkeypatch.setattr(type(shard), "_make_plain", push_slice_first)
        with kv.snapshot() as snapshot:
            kv.push(["w", "b"], [np.full(numel, 5, np.float32)] * 2)
            assert pushed
            assert not snapshot.pull("w").any()
        assert set(kv.pull("b").tolist()) == {5}
        kv.push("w", tensorkv.TensorSlice(half, (numel // 2,), (numel,)))
        assert set(kv.pull("w").tolist()) == {1}


@pytest.mark.parametrize(
    ("inner", "read"),
    [
        ("hold_release", lambda kv, release: release.pull("w").tolist()),
        ("hold_newest", lambda kv, release: kv.wait_release(timeout_s=LIMIT_S).pull("w").tolist()),
    ],
    ids=["renewal of a lease", "wait for a release"],
)
def test_a_signal_handler_raises_outside_the_lock_of_releases(inner, read, monkeypatch):
    """Otherwise it might leave the store's lock behind, held."""

    def handle(*_):
        raise TimeoutError("of the handler")

    before = signal.signal(signal.SIGALRM, handle)
    try:
        with tensorkv.create("local") as kv:
            kv.init("w", np.zeros(3))
            kv.publish("step-1")
            release = kv.open_release("step-1", lease_s=1e-9)
            shard, held = kv._engine._shard, []
            hold = getattr(shard, inner)

            def interrupted(*args):
                signal.raise_signal(signal.SIGALRM)
                held.append(hold(*args))

            with monkeypatch.context() as patches:
                patches.setattr(shard, inner, interrupted)
                with pytest.raises(TimeoutError, match="of the handler"):
                    read(kv, release)
            assert len(held) == 1
            assert read(kv, release) == [0] * 3
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "replaced by load"])
def test_a_release_that_goes_while_it_is_compared_is_not_held_on(is_closed, monkeypatch, tmp_path):
    with tensorkv.create("local") as kv:
        kv.init("w", np.zeros(3))
        kv.publish("other")
        kv.save(tmp_path / "saved", releases=True)
        kv.publish("mine")
        release = kv.open_release("mine", lease_s=3600)
        kv.publish("next", keep=1)
        groups = finder._groups

        def go(entries):
            release.close() if is_closed else kv.load(tmp_path / "saved")
            return groups(entries)

        monkeypatch.setattr(finder, "_groups", go)
        if is_closed:
            assert release.digest
        else:
            with pytest.raises(tensorkv.SnapshotError, match="dropped"):
                _ = release.digest
        with pytest.raises(tensorkv.ReleaseNotFoundError):
            kv.open_release("mine")


def test_a_release_stays_for_its_lease_after_each_read(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(local, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with tensorkv.create("local") as kv:
        kv._engine._shard.releases._now = lambda: now[0]
        kv.init("w", np.zeros(3))
        kv.publish("step-1")
        release = kv.open_release("step-1", lease_s=60)
        kv.publish("step-2", keep=1)
        # At the second read the lease is too new to be renewed.
        for seconds in (16, 14, 59):
            now[0] += seconds
            kv.publish(f"at {now[0]}", keep=1)
            assert release.pull("w").tolist() == [0] * 3
        now[0] += 76
        kv.publish("last", keep=1)
        with pytest.raises(tensorkv.ReleaseNotFoundError, match="was dropped"):
            release.pull("w")
