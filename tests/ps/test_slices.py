"""Slices over servers: several clients push parts of values, which are read when they are complete."""

import threading
from functools import partial

import numpy as np
import pytest

import tensorkv
from tensorkv import TensorSlice
from tensorkv.engines import partition
from tests.support.amount import amount
from tests.support.fake_servers import NONE, Cluster, together
from tests.support.until import LIMIT_S

pytest.importorskip("ray")

F32 = np.float32
# Its rows are divided between three servers.
SHAPE = (40, 64)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Values of a few hundred elements are divided."""
    monkeypatch.setattr(partition, "_WHOLE", 256)


def slices_of(value, count, axis=0):
    """Return slices of a value, as torch.chunk would cut it."""
    size = -(-value.shape[axis] // count)
    found = []
    for first in range(0, value.shape[axis], size):
        own = [slice(None)] * value.ndim
        own[axis] = slice(first, first + size)
        offsets = [0] * value.ndim
        offsets[axis] = first
        found.append(TensorSlice(value[tuple(own)], offsets, value.shape))
    return found


def test_values_are_divided():
    for num_servers in (2, 3):
        assert len(partition.pieces(SHAPE, [0] * num_servers)) == num_servers


def filled(number):
    return np.full(SHAPE, number, F32)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("num_servers", [1, 3])
def test_no_server_updates_before_all_slices_are_there(num_servers, axis):
    """The first slices are of rows that the other servers do not hold."""
    with Cluster(num_servers) as cluster:
        stores = cluster.stores(4)
        stores[0].init("w", filled(0))
        for number in range(1, 4):
            slices = slices_of(filled(number), 4, axis)
            for kv, own in list(zip(stores, slices, strict=True))[:-1]:
                kv.push("w", own)
                for reader in stores:
                    with pytest.raises(tensorkv.IncompleteValueError):
                        reader.pull("w")
                    for row in (0, 39):
                        with pytest.raises(tensorkv.IncompleteValueError):
                            reader.pull("w", region=slice(row, row + 1))
            stores[3].push("w", slices[3])
            for reader in stores:
                assert np.array_equal(reader.pull("w"), filled(number))
        assert stores[0].info("w").version == 3


@pytest.mark.parametrize("fault", ["lose request", "lose reply", "twice"])
@pytest.mark.parametrize("num_servers", [1, 2])
def test_slices_that_are_sent_again_count_once(fault, num_servers):
    sent = iter(range(10**9))

    def fate(head):
        return fault if head["verb"] == "push" and next(sent) % 3 == 0 else NONE

    with Cluster(num_servers, fate=fate) as cluster:
        stores = cluster.stores(2)
        stores[0].init("w", filled(0))
        stores[0].set_optimizer("sgd", lr=1.0, maximize=True)
        for number in range(1, amount(8, 40)):
            first, second = slices_of(filled(1), 2)
            stores[0].push("w", first)
            stores[1].push("w", second)
            assert np.array_equal(stores[0].pull("w"), filled(number))
        assert cluster.fired(fault) > 2


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("num_servers", [1, 3])
def test_slices_of_a_round_of_mode_sync_come_together(num_servers, reduce):
    with Cluster(num_servers, mode="sync", num_workers=3, reduce=reduce) as cluster:
        stores = cluster.stores(3)
        stores[0].init({"w": filled(0), "b": np.zeros(2, F32)})
        value = np.random.default_rng(0).standard_normal(SHAPE).astype(F32)
        given = [{"w": own, "b": np.full(2, rank, F32)} for rank, own in enumerate(slices_of(value, 3))]
        together(*[partial(kv.push, own) for kv, own in zip(stores, given, strict=True)])
        for kv in stores:
            assert kv.pull("w").tobytes() == value.tobytes()
            assert kv.pull("b").tolist() == [3 if reduce == "sum" else 1] * 2
        # One slice is missing: every worker of the round hears of it, and nothing changes.
        given[2]["w"] = given[2]["w"].__class__(value[:0], (0, 0), SHAPE)
        errors = []

        def push(kv, own):
            with pytest.raises(tensorkv.IncompleteValueError, match=r"the round was refused.*\[28:40, 0:64\]"):
                kv.push(own)
            errors.append(kv)

        together(*[partial(push, kv, own) for kv, own in zip(stores, given, strict=True)])
        assert len(errors) == 3
        assert stores[1].pull("w").tobytes() == value.tobytes()


@pytest.mark.parametrize("num_servers", [1, 3])
def test_slices_of_a_pushpull_of_mode_sync_come_together(num_servers):
    """No worker has all of them, and no server either before the round."""
    with Cluster(num_servers, mode="sync", num_workers=2) as cluster:
        stores = cluster.stores(2)
        stores[0].init("w", filled(0))
        found = {}

        def work(rank, own):
            found[rank] = stores[rank].pushpull("w", own)

        together(*[partial(work, rank, own) for rank, own in enumerate(slices_of(filled(3), 2))])
        for rank in range(2):
            assert np.array_equal(found[rank], filled(3))


@pytest.mark.parametrize("num_servers", [1, 3])
def test_an_array_beside_slices_that_is_not_finite_leaves_every_server_as_it_was(num_servers):
    with Cluster(num_servers, nonfinite="raise") as cluster:
        kv = cluster.store()
        kv.init({"w": filled(0), **{f"b{number}": np.zeros(4, F32) for number in range(6)}})
        bad = {f"b{number}": np.full(4, np.nan if number == 5 else 1, F32) for number in range(6)}
        with pytest.raises(tensorkv.NonFiniteError, match='"b5"'):
            kv.push({"w": slices_of(filled(1), 2)[0], **bad})
        assert all(kv.pull(key).tolist() == [0] * 4 for key in bad)
        # Nor were the slices kept.
        assert not kv.pull("w").any()


@pytest.mark.parametrize("staleness", [None, 2])
def test_what_was_found_out_about_slices_is_told(staleness):
    with Cluster(1, staleness=staleness, num_workers=1) as cluster:
        kv = cluster.store()
        kv.init("w", filled(0))
        kv.set_optimizer("sgd", lr=1.0, max_grad_norm=1.0)
        first, second = slices_of(filled(1), 2)
        kv.push("w", first)
        kv.push("w", second)
        assert kv.last_push.grad_norm == pytest.approx(np.sqrt(np.prod(SHAPE)), rel=1e-6)
    with Cluster(1, nonfinite="skip", staleness=staleness, num_workers=1) as cluster:
        kv = cluster.store()
        kv.init("w", filled(0))
        for number, is_bad in ((1, False), (np.inf, True)):
            kv.push("w", slices_of(filled(number), 2)[0])
            kv.push("w", slices_of(filled(1), 2)[1])
            assert kv.last_push.found_inf is is_bad


def test_slices_under_a_bound_of_staleness():
    with Cluster(2, staleness=2, num_workers=2) as cluster:
        stores = cluster.stores(2)
        stores[0].init("w", filled(0))
        for number in range(1, 8):
            for kv, own in zip(stores, slices_of(filled(number), 2), strict=True):
                kv.push("w", own)
        assert np.array_equal(stores[1].pull("w"), filled(7))


def test_readers_beside_workers_that_push_slices_see_whole_versions():
    with Cluster(1) as cluster:
        stores = cluster.stores(3)
        stores[0].init("w", filled(0))
        done, seen = threading.Event(), []

        def write(kv, place):
            for number in range(1, amount(40, 400)):
                kv.push("w", slices_of(filled(number), 2)[place])
                barrier.wait(LIMIT_S)

        def read():
            while not done.is_set():
                try:
                    found = stores[2].pull("w")
                except tensorkv.IncompleteValueError:
                    seen.append(-1)
                    continue
                assert (found == found[0, 0]).all()
                seen.append(found[0, 0])

        barrier = threading.Barrier(2)
        reader = threading.Thread(target=read)
        reader.start()
        try:
            together(partial(write, stores[0], 0), partial(write, stores[1], 1))
        finally:
            done.set()
            reader.join()
        assert {-1} < set(seen)


@pytest.mark.parametrize("options", [{"nonfinite": "skip"}, {"nonfinite": "skip_step"}, {}], ids=str)
def test_what_needs_sums_of_the_whole_takes_no_slices_on_several_servers(options):
    slices = slices_of(filled(1), 2)
    for num_servers in (1, 2):
        with Cluster(num_servers, **options) as cluster:
            kv = cluster.store()
            kv.init("w", filled(0))
            if not options:
                kv.set_optimizer("sgd", lr=1.0, maximize=True, max_grad_norm=1.0)
            if num_servers == 2:
                with pytest.raises(tensorkv.ArgumentError, match="use one"):
                    kv.push("w", slices)
                assert not kv.pull("w").any()
            else:
                if options.get("nonfinite") == "skip_step":
                    # A step of several pushes could not be left out as a whole.
                    with pytest.raises(tensorkv.IncompleteValueError):
                        kv.push("w", slices[0])
                    kv.push("w", slices)
                else:
                    kv.push("w", slices[0])
                    kv.push("w", slices[1])
                norm = np.sqrt(np.prod(SHAPE))
                assert np.allclose(kv.pull("w"), filled(1 if options else 1 / norm))
                if options:
                    kv.push("w", slices_of(filled(np.nan), 2))
                    assert np.array_equal(kv.pull("w"), filled(1))
                    kv.push("w", slices_of(filled(2), 2))
                    assert np.array_equal(kv.pull("w"), filled(2))


def test_slices_are_not_compressed():
    with Cluster(2) as cluster:
        kv = cluster.store()
        kv.init("w", filled(0))
        kv.set_gradient_compression({"type": "fp16"})
        with pytest.raises(tensorkv.ArgumentError, match="cannot be compressed"):
            kv.push("w", slices_of(filled(1), 2))
        kv.set_gradient_compression(None)
        kv.push("w", slices_of(filled(1), 2))
        assert np.array_equal(kv.pull("w"), filled(1))


def test_slices_of_several_keys_are_taken_by_all_servers_or_by_none():
    with Cluster(2) as cluster:
        kv = cluster.store()
        keys = [f"k{number}" for number in range(6)]
        kv.init(keys, [np.zeros((4, 2), F32) for _ in keys])
        whole, half = np.ones((4, 2), F32), slices_of(np.ones((4, 2), F32), 2)
        kv.push("k5", half[0])
        # They lie on both servers, one of which has the value that has a slice already.
        with pytest.raises(tensorkv.ValueMismatchError, match="overlaps"):
            kv.push(keys, [slices_of(whole, 2) for _ in keys])
        with pytest.raises(tensorkv.IncompleteValueError):
            kv.pushpull(
                [*keys[:5], "k5"], [*(slices_of(whole, 2) for _ in keys[:5]), TensorSlice(whole[:0], (0, 0), (4, 2))]
            )
        assert not any(each.any() for each in kv.pull(keys[:5]))
        kv.push("k5", half[1])
        kv.push(keys, [slices_of(whole, 2) for _ in keys])
        assert all(each.all() for each in kv.pull(keys))


@pytest.mark.parametrize("num_servers", [1, 2])
def test_a_number_that_the_key_cannot_hold_is_refused_by_all_servers(num_servers):
    with Cluster(num_servers, nonfinite="raise") as cluster:
        kv = cluster.store()
        kv.init("w", filled(0).astype(np.float16))
        bad = filled(1)
        bad[0, 0] = 1e6
        for slices in ([TensorSlice(bad, (0, 0), SHAPE)], slices_of(bad, 4)[:1], slices_of(bad, 4, 1)[:1]):
            with pytest.raises(tensorkv.NonFiniteError):
                kv.push("w", slices)
            assert not kv.pull("w").any()
        kv.push("w", slices_of(filled(1), 4))
        assert kv.pull("w").all()


@pytest.mark.parametrize("options", [{"pull_dtype": "bf16"}, {"staleness": 5}, {}], ids=str)
def test_a_pushpull_of_an_incomplete_value_changes_nothing(options):
    rows = tensorkv.Rows(np.array([1]), np.ones((1, 64), F32), 40)
    with Cluster(2, **options) as cluster:
        kv = cluster.store()
        kv.init("w", filled(0))
        kv.set_optimizer("sgd", lr=1.0, maximize=True)
        first, second = slices_of(filled(1), 2)
        kv.push("w", first)
        for value in (filled(5), rows):
            with pytest.raises(tensorkv.IncompleteValueError):
                kv.pushpull("w", value)
        kv.push("w", second)
        assert np.array_equal(kv.pull("w"), filled(1))
        # What has no elements is nothing to wait for.
        with pytest.raises(tensorkv.IncompleteValueError):
            kv.pushpull("w", TensorSlice(filled(1)[:0], (0, 0), SHAPE))


def test_a_late_copy_of_a_refused_push_is_refused_as_well():
    with Cluster(1) as cluster:
        kv, other = cluster.stores(2)
        kv.init("w", filled(0))
        kept, serve = [], cluster.servers[0].serve

        def keep(head, layout, payload, out):
            if head["verb"] == "push":
                kept.append((dict(head), layout, bytes(payload)))
            return serve(head, layout, payload, out)

        cluster.servers[0].serve = keep
        first, second = slices_of(filled(1), 2)
        kv.push("w", first)
        with pytest.raises(tensorkv.ValueMismatchError, match="overlaps"):
            kv.push("w", slices_of(filled(9), 2)[0])
        other.push("w", second)
        head, layout, payload = kept[1]
        assert "error" in serve(head, layout, bytearray(payload), None).head
        assert np.array_equal(other.pull("w"), filled(1))


def test_workers_without_elements_are_not_behind(tmp_path):
    with Cluster(1, staleness=1, num_workers=2, path=str(tmp_path / "store")) as cluster:
        kv, replica = cluster.stores(2)
        kv.init("w", filled(0))
        for number in range(1, 5):
            replica.push("w", TensorSlice(filled(number)[:0], (0, 0), SHAPE))
            kv.push("w", slices_of(filled(number), 2))
        assert np.array_equal(replica.pull("w"), filled(4))
