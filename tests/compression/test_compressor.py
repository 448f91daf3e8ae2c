"""What a store makes of compressed pushes, in one process: forms, libraries, rules, errors and what is owed."""

import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv.compression import Codec, Compressor, names, parse, register
from tensorkv.compression import layout as compression_layout
from tensorkv.compression.codec import RUN, add_residual

F32 = np.float32
TWO_BITS = {"type": "2bit", "threshold": 0.5}


@pytest.fixture
def kv():
    with tensorkv.create() as made:
        made.init("w", np.zeros(4, F32))
        made.set_gradient_compression(TWO_BITS, simulate=True)
        yield made


GRADIENT = np.array([0.75, -0.75, 0.25, 0], F32)
SENT = [0.5, -0.5, 0, 0]


@pytest.mark.parametrize(
    "make",
    [
        np.copy,
        torch.from_numpy,
        lambda array: np.repeat(array, 2)[::2],
        lambda array: torch.from_numpy(array).repeat_interleave(2)[::2],
        lambda array: torch._neg_view(-torch.from_numpy(array)),
        lambda array: torch.from_numpy(array).requires_grad_(),
        lambda array: pytest.importorskip("jax.numpy").asarray(array),
    ],
    ids=["numpy", "torch", "strided", "strided torch", "negated", "requires grad", "jax"],
)
@pytest.mark.parametrize("form", ["single", "list", "mapping", "out", "tree"])
def test_every_form_and_library(kv, make, form):
    part = make(GRADIENT)
    if form == "single":
        kv.push("w", part)
    elif form == "list":
        kv.push(["w"], [[part]])
    elif form == "mapping":
        assert kv.pushpull({"w": part})["w"].tolist() == SENT
    elif form == "tree":
        kv.push_tree({"w": part})
    else:
        out = np.empty(4, F32)
        kv.pushpull("w", part, out=out)
        assert out.tolist() == SENT
    assert kv.pull("w").tolist() == SENT
    # What was owed comes with the next one.
    assert kv.pushpull("w", part).tolist() == [1 / 2, -1 / 2, 1 / 2, 0]


def test_parts_are_as_workers(kv):
    """Each has what it owes."""
    small = np.full(4, 0.25, F32)
    assert kv.pushpull("w", [small, small, GRADIENT]).tolist() == SENT
    assert kv.pushpull("w", [small, small, np.zeros(4, F32)]).tolist() == [1, 1, 1, 1]


def test_an_update_that_raises_leaves_what_is_owed(kv):
    def refuse(key, received, stored):
        raise ValueError("no")

    kv.push("w", GRADIENT)
    kv.set_updater(refuse)
    with pytest.raises(ValueError, match="no"):
        kv.push("w", np.full(4, 0.25, F32))
    kv.set_updater(None)
    assert kv.pushpull("w", np.full(4, 0.25, F32)).tolist() == [0.5, 0, 0.5, 0]


def test_nothing_is_lost_when_a_codec_changes(kv):
    kv.set_optimizer("sgd", lr=1.0, maximize=True)
    kv.push("w", GRADIENT)
    kv.set_gradient_compression(TWO_BITS, simulate=True)
    assert kv.pull("w").tolist() == SENT
    kv.set_gradient_compression({"type": "2bit", "threshold": 0.125}, simulate=True)
    assert kv.pull("w").tolist() == GRADIENT.tolist()
    kv.push("w", GRADIENT)
    kv.set_gradient_compression({"type": "none"})
    assert kv.pull("w").tolist() == (2 * GRADIENT).tolist()
    assert kv.info("w").version == 4


def test_an_updater_cannot_change_the_codec(kv):
    def update(key, received, stored):
        kv.set_gradient_compression({"type": "2bit", "threshold": 0.125}, simulate=True)

    kv.set_updater(update)
    with pytest.raises(tensorkv.UpdaterError, match="an updater called the store that runs it"):
        kv.push("w", GRADIENT)
    kv.set_updater(None)
    assert kv.pushpull("w", GRADIENT).tolist() == SENT


def test_a_value_that_is_assigned_owes_nothing(kv):
    kv.push("w", GRADIENT)
    kv.set_gradient_compression(None)
    assert kv.pull("w").tolist() == SENT
    assert kv.info("w").version == 1


def test_tables_are_not_compressed(kv):
    kv.init("t", tensorkv.Rows(np.array([1]), np.ones((1, 2), F32), 9))
    kv.push({"w": GRADIENT, "t": tensorkv.Rows(np.array([2]), np.full((1, 2), 0.3, F32), 9)})
    assert kv.row_sparse_pull("t", row_ids=[2]).values.tolist() == [[F32(0.3)] * 2]
    assert kv.pull("w").tolist() == SENT


def test_a_shape_that_changes_with_its_key_starts_anew(kv):
    kv.push("w", GRADIENT)
    kv.delete("w")
    kv.init("w", np.zeros(2, F32))
    assert kv.pushpull("w", np.full(2, 0.25, F32)).tolist() == [0, 0]


@pytest.mark.parametrize("options", [{}, {"nonfinite": "raise"}, {"nonfinite": "skip"}])
def test_nan_is_an_error_and_changes_nothing(options):
    with tensorkv.create(**options) as kv:
        kv.init(["v", "w"], [np.zeros(4, F32)] * 2)
        kv.set_gradient_compression(TWO_BITS, simulate=True)
        kv.push(["v", "w"], [GRADIENT] * 2)
        for odd in (np.nan, np.inf, -np.inf):
            with pytest.raises(tensorkv.NonFiniteError, match=r'push\("w"\).*NaN or Inf, which 2bit cannot compress'):
                kv.push(["v", "w"], [GRADIENT, np.array([0, 0, 0, odd], F32)])
        assert kv.info("v").version == 1
        assert kv.pushpull("v", np.full(4, 0.25, F32)).tolist() == [0.5, 0, 0.5, 0]


@pytest.mark.parametrize("mode", ["skip", "skip_step"])
def test_what_was_owed_of_a_sum_that_is_left_out_still_is(mode):
    with tensorkv.create(nonfinite=mode) as kv:
        kv.init("h", torch.zeros(2, dtype=torch.float16))
        kv.set_optimizer("sgd", lr=1.0)
        kv.set_gradient_compression({"type": "topk", "ratio": 0.5}, simulate=True)
        kv.push("h", [torch.tensor([1.0, 2.0])] * 2)
        kv.push("h", [torch.tensor([4e4, 0.0])] * 2)
        assert kv.info("h").version == 1, "the sum overflows"
        kv.push("h", [torch.tensor([0.5, 0.0])] * 2)
        assert kv.pull("h").tolist() == [-3, -4]


def test_what_was_owed_of_a_key_whose_updater_failed_still_is():
    def update(key, received, stored):
        if key == "b" and fails:
            raise RuntimeError("not this time")
        stored += received

    with tensorkv.create() as kv:
        kv.init(["a", "b"], [torch.zeros(2)] * 2)
        kv.set_updater(update)
        kv.set_gradient_compression({"type": "topk", "ratio": 0.5}, simulate=True)
        for fails in (False, True, False):
            with pytest.raises(RuntimeError, match="not this time") if fails else nullcontext():
                kv.push(["a", "b"], [torch.tensor([1.0, 4.0])] * 2)
        assert [each.tolist() for each in kv.pull(["a", "b"])] == [[0, 12], [0, 8]]
        kv.set_gradient_compression(None)
        assert [each.tolist() for each in kv.pull(["a", "b"])] == [[3, 12], [2, 8]]


def test_what_overflows_with_what_is_owed_is_an_error(kv):
    huge = np.full(4, 3e38, F32)
    kv.push("w", huge)
    with pytest.raises(tensorkv.NonFiniteError, match="with the residual of earlier ones"):
        kv.push("w", huge)
    kv.set_gradient_compression({"type": "powersgd"}, simulate=True)
    kv.init("m", np.zeros((20, 30), F32))
    with pytest.raises(tensorkv.NonFiniteError, match="products overflow"):
        kv.push("m", np.random.default_rng(0).normal(size=(20, 30)).astype(F32) * F32(3e37))


@pytest.mark.parametrize("dtype", ["int8", "int64", "bool", "float64"])
def test_other_dtypes_are_an_error(kv, dtype):
    kv.init("i", np.zeros(4, dtype))
    with pytest.raises(tensorkv.ValueMismatchError, match=f"this one is {dtype}; expected float32, float16"):
        kv.push("i", np.zeros(4, dtype))
    kv.set_gradient_compression(None)
    kv.push("i", np.ones(4, dtype))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TWO_BITS,), "sends nothing; simulate=True"),
        ((TWO_BITS, 3), "without a name"),
        (({"type": "3bit"},), 'no codec .3bit. .did you mean "[12]bit"'),
    ],
)
def test_settings_that_are_refused(arguments, message):
    with tensorkv.create() as kv, pytest.raises(tensorkv.ArgumentError, match=f"set_gradient_compression.*{message}"):
        kv.set_gradient_compression(*arguments)


def test_a_store_in_a_folder_does_not_simulate(tmp_path):
    with tensorkv.create(path=tmp_path / "store") as kv:
        with pytest.raises(tensorkv.ArgumentError, match="store in a folder"):
            kv.set_gradient_compression(TWO_BITS, simulate=True)
        kv.set_gradient_compression(None)


@pytest.mark.parametrize("params", [TWO_BITS, {"type": "powersgd"}], ids=["2bit", "powersgd"])
def test_a_checkpoint_has_what_is_owed(params, tmp_path):
    def push(store, seed):
        rng = np.random.default_rng(seed)
        store.push("m", [rng.normal(size=(30, 20)).astype(F32) for _ in range(2)])
        return store.pull("m")

    with tensorkv.create() as first, tensorkv.create() as second, tensorkv.create() as third:
        first.init("m", np.zeros((30, 20), F32))
        first.set_optimizer("adam", lr=0.1)
        first.set_gradient_compression(params, simulate=True)
        push(first, 0)
        first.save(tmp_path / "a")
        # It goes through a store that compresses nothing, too.
        second.load(tmp_path / "a")
        second.save(tmp_path / "b")
        third.load(tmp_path / "b")
        third.set_gradient_compression(params, simulate=True)
        assert push(first, 1).tobytes() == push(third, 1).tobytes()


def test_threads_push_one_key():
    count, each = 4, 50
    with tensorkv.create() as kv:
        kv.init("w", np.zeros(1000, F32))
        kv.set_optimizer("sgd", lr=1.0, maximize=True)
        kv.set_gradient_compression(TWO_BITS, simulate=True)

        def push():
            for _ in range(each):
                kv.push("w", np.full(1000, 0.25, F32))

        threads = [threading.Thread(target=push) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(kv.pull("w").tolist()) == {0.25 * count * each}
        counts = kv.stats()["compression"]
        assert counts["sent_nbytes"] == 256 * count * each
        assert counts["sent_raw_nbytes"] == 4000 * count * each
        assert counts["received_nbytes"] == counts["received_raw_nbytes"] == 0


def test_arrays_of_several_runs_are_as_those_of_one(monkeypatch):
    rng = np.random.default_rng(8)
    gradients = rng.normal(size=(3, 3, RUN // 2 + 5)).astype(F32)
    found = []
    for _ in range(2):
        with tensorkv.create() as kv:
            kv.init("w", np.zeros((3, RUN // 2 + 5), F32))
            kv.set_gradient_compression(TWO_BITS, simulate=True)
            found.append([kv.pushpull("w", each).tobytes() for each in gradients])
        monkeypatch.setattr("tensorkv.compression.layout.RUN", 1 << 30)
        compression_layout._remembered.clear()
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["2bit", "1bit", "bf16", "int8", "powersgd"])
def test_many_gradients_are_encoded_as_each_by_itself(name):
    """Small ones go together, large ones in pieces, and the same gradients in other lists."""
    rng = np.random.default_rng(3)
    shapes = [(), (1,), (5, 7), (64,), (0, 3), (RUN + 9,), (33,), (RUN - 1,), (2, 2), (100, 100), (40, 2000), (3,)]
    codec = parse({"type": name})
    together, alone, owed, memories = Compressor(codec), Compressor(codec), {}, {}
    for chosen in (range(12), range(12), range(3, 9), [8, 1, 0, 10], range(12)):
        gradients = {place: rng.normal(size=shapes[place]).astype(F32) for place in chosen}
        sources = [(str(place), 0) for place in chosen]
        sending = together.encode("push", sources, [torch.from_numpy(each) for each in gradients.values()])
        together.keep(sending)
        together.end(sending)
        arrived = sending.decoded()
        assert len(sending.words) == sum(-(-codec.nbytes(shapes[place]) // 8) * 8 for place in chosen)
        for source, (place, gradient), got in zip(sources, gradients.items(), arrived, strict=True):
            one = alone.encode("push", [source], [torch.from_numpy(gradient)])
            alone.keep(one)
            alone.end(one)
            assert torch.equal(one.decoded()[0], got)
            left, words = np.empty_like(gradient), np.empty(codec.nbytes(gradient.shape), np.uint8)
            decoded = np.empty_like(gradient)
            codec.encode(gradient, owed.get(place), left, words, memories.setdefault(place, {}))
            codec.decode(words, decoded)
            assert np.array_equal(decoded, got.numpy())
            assert np.array_equal(left, together.owed[source].residual)
            assert np.array_equal(left, alone.owed[source].residual)
            owed[place] = left


@pytest.mark.parametrize("params", [TWO_BITS, {"type": "bf16"}, {"type": "topk"}])
def test_of_many_gradients_the_one_with_nan_is_named_and_nothing_changes(params):
    made = Compressor(parse(params))
    sources = [(name, 0) for name in "abc"]
    first = made.encode("push", sources, [torch.from_numpy(GRADIENT)] * 3)
    made.keep(first)
    bad = GRADIENT.copy()
    bad[1] = np.nan
    with pytest.raises(tensorkv.NonFiniteError, match=r'push\("b"\): the gradient, with the residual'):
        made.encode("push", sources, [torch.from_numpy(each) for each in (GRADIENT, bad, GRADIENT)])
    for index, source in enumerate(sources):
        assert made.owed[source] is first.owed[index]
        assert (
            made.owed[source].residual.tolist()
            == Compressor(parse(params))
            .encode("push", [source], [torch.from_numpy(GRADIENT)])
            .owed[0]
            .residual.tolist()
        )


class Signs(Codec):
    """What a third party could write: the sign of each element, as a byte."""

    name = "signs"

    def nbytes(self, shape):
        return int(np.prod(shape))

    def encode(self, gradient, residual, owed, words, memory):
        add_residual(gradient, residual, owed)
        words[:] = np.sign(owed).astype(np.int8).reshape(-1).view(np.uint8)
        owed -= np.sign(owed)

    def decode(self, words, out):
        out.reshape(-1)[:] = words.view(np.int8)

    def to_json(self):
        return {"type": self.name}


def test_a_codec_of_somebody_else(monkeypatch):
    monkeypatch.setattr("tensorkv.compression.codec._factories", {})
    register("signs", Signs)
    assert names() == ["signs"]
    with tensorkv.create() as kv:
        kv.init("w", np.zeros(4, F32))
        kv.set_gradient_compression({"type": "signs"}, simulate=True)
        assert kv.pushpull("w", GRADIENT).tolist() == [1, -1, 1, 0]
        assert kv.pushpull("w", np.zeros(4, F32)).tolist() == [-1, 1, -1, 0]
    with pytest.raises(tensorkv.ArgumentError, match=r"signs: wrong parameters: got .* keyword argument 'bits'"):
        parse({"type": "signs", "bits": 2})


def test_words_that_did_not_arrive_are_owed_again():
    made = Compressor(parse(TWO_BITS))
    sources, gradients = [("w", 0), ("v", 0)], [torch.from_numpy(GRADIENT), torch.from_numpy(GRADIENT)]
    first = made.encode("push", sources, gradients)
    made.keep(first)
    second = made.encode("push", sources, gradients)
    made.keep(second)
    made.undo(second, keys=["w"])
    assert made.owed["w", 0].residual.tolist() == [0.25, -0.25, 0.25, 0]
    assert made.owed["v", 0] is second.owed[1]
    made.undo(second, keys=["v"])
    assert made.owed["v", 0].residual.tolist() == [0.25, -0.25, 0.25, 0]
    made.undo(first)
    assert made.owed == {}
    assert made.traffic.stats() == {}
