"""Work on CUDA values, shown with streams and devices that are not there; real ones are tested with the engines."""

from contextlib import contextmanager

import pytest
import torch

import tensorkv
from tensorkv.arrays import interop
from tensorkv.arrays.slices import Slices, TensorSlice, take_slice
from tensorkv.arrays.spec import KeySpec
from tensorkv.shard import reduce, shard
from tensorkv.shard.entry import Batch, Entry
from tensorkv.shard.optimizers import Optimizer, spec
from tensorkv.shard.table import Table
from tensorkv.storage import checkpoint
from tensorkv.storage.manifest import Contents


class FakeTensor:
    def __init__(self, device):
        self.device = torch.device(device)

    is_cuda = True
    dtype = torch.float32
    shape = torch.Size([2])


class FakeStream:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_event(self, event):
        self.log.append((self.name, "waits for", event))

    def record_event(self):
        self.log.append((self.name, "records"))
        return f"event of {self.name}"


def entry(device):
    value = FakeTensor(device)
    return Entry("w", KeySpec(value.shape, value.dtype, interop.NUMPY, False), value)


def test_work_waits_for_the_work_before_it(monkeypatch):
    log, held, on_cpu = [], entry("cuda:0"), entry("cpu")
    for name in ("A", "B"):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, name=name: FakeStream(log, name))
        with shard.stream_order([held, on_cpu]):
            log.append((name, "works"))
    assert log == [
        ("A", "works"),
        ("A", "records"),
        ("B", "waits for", "event of A"),
        ("B", "works"),
        ("B", "records"),
    ]
    assert on_cpu.ready is None


def test_only_cpu_values_with_cuda_parts_move():
    value = torch.ones(2)
    held = Entry("w", KeySpec(value.shape, value.dtype, interop.NUMPY, False), value)
    shard.move_to_parts([held], [[torch.ones(2)]])
    assert held.value is value
    held.state = {"step": torch.tensor(1.0), "row_var": torch.ones(1, 2), "momentum_buffer": torch.ones(2)}
    shard.move_to_parts([held], [[torch.ones(2), FakeTensor("meta")]])
    assert held.value.is_meta
    # As torch keeps them on a GPU.
    assert {name: state.is_meta for name, state in held.state.items()} == {
        "step": False,
        "row_var": True,
        "momentum_buffer": True,
    }


def test_a_value_that_leaves_the_gpu_is_not_waited_for(monkeypatch):
    log, held = [], entry("cuda:0")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(log, str(device)))
    with shard.stream_order([held]):
        held.value = FakeTensor("cpu")
    assert (log, held.ready) == ([], None)


def test_outs_of_one_dtype_are_filled_together(monkeypatch):
    """Kernels of a GPU take outs of one dtype, and no unsigned integers."""
    copy, seen = torch._foreach_copy_, []

    def copied(outs, values):
        seen.append([(out.dtype, value.dtype) for out, value in zip(outs, values, strict=True)])
        copy(outs, values)

    with tensorkv.create("device") as kv:
        kv.init({"a": torch.ones(2), "b": torch.full((2,), 2.5), "n": torch.full((2,), 65535, dtype=torch.uint16)})
        outs = [torch.zeros(2), torch.zeros(2, dtype=torch.float16), torch.zeros(2, dtype=torch.uint16), torch.zeros(2)]
        monkeypatch.setattr(torch, "_foreach_copy_", copied)
        kv.pull(["a", "b", "n", "b"], out=outs)
    assert [out.tolist() for out in outs] == [[1, 1], [2.5, 2.5], [65535, 65535], [2.5, 2.5]]
    single, half, signed = torch.float32, torch.float16, torch.int16
    assert seen == [[(single, single)] * 2, [(half, single)], [(signed, signed)]]


def test_a_load_leaves_keys_that_it_keeps_where_they_are(monkeypatch):
    """A key that was made on the CPU, and moved to the GPU by its first part there."""
    moved = []
    monkeypatch.setattr(Entry, "move", lambda entry, device: moved.append(entry.key))
    with tensorkv.create("device") as kv:
        kv.init({"kept": torch.ones(2), "loaded": torch.ones(2)})
        held = kv._engine._shard
        with held.frozen() as (entries, rule):
            loaded = [each.copy() for each in entries if each.key == "loaded"]
        checkpoint.put(held, Contents("keys", loaded, rule))
        assert moved == ["loaded"]


def test_rows_from_the_cpu_are_written_to_a_table_on_a_device():
    """``index_copy_`` takes both from one device."""
    table = Table(9, torch.Size([2]), torch.float32)
    table.write(torch.tensor([1]), torch.ones(1, 2))
    table.add_column("momentum_buffer", torch.float32, 0.0)
    seen = []

    class Seen(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function.__name__ == "index_copy_":
                seen.append([arg.device.type for arg in args if isinstance(arg, torch.Tensor)])
            return super().__torch_function__(function, types, args, kwargs or {})

    table.to(torch.device("meta"))
    table._columns["momentum_buffer"] = table._columns["momentum_buffer"].as_subclass(Seen)
    table.write(torch.tensor([1]), torch.ones(1, 2), "momentum_buffer")
    assert seen == [["meta"] * 3]


class OnGpu(torch.Tensor):
    """A tensor on a device that the CPU cannot read."""

    is_cuda = True


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adagrad", "rmsprop"])
@pytest.mark.parametrize("given", ["nothing", "a state from the CPU"])
def test_fused_kernels_of_torch_find_the_count_of_steps_on_the_gpu(monkeypatch, name, given):
    optimizer, state = Optimizer(spec(name, {"lr": 0.1})), {}
    if given != "nothing":
        optimizer.step(["w"], [torch.ones(2)], [torch.ones(2)], [state])
    value, grad = (torch.empty(2, device="meta").as_subclass(OnGpu) for _ in range(2))
    state = {each: held if held.dim() == 0 else held.to("meta") for each, held in state.items()}
    runner, seen = optimizer._runner, []

    def recorded(fused):
        found = runner(fused)

        def step():
            seen.extend((own["step"].device, param.device) for param, own in found.state.items() if "step" in own)

        if fused:
            found.step = step
        return found

    monkeypatch.setattr(optimizer, "_runner", recorded)
    optimizer.step(["w"], [value], [grad], [state])
    assert all(step == param for step, param in seen)
    assert bool(seen) == (name in ("adam", "adamw") and given != "nothing")


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", ["pinned", "pageable", "on a GPU"])
def test_only_copies_from_pinned_memory_are_waited_for(count, kind):
    """They would go on after the push, when the caller may write into the part."""
    ahead = []

    class Part:
        is_cpu = kind != "on a GPU"

        def is_pinned(self):
            return kind == "pinned"

        def to(self, device, dtype, non_blocking):
            ahead.append(non_blocking)
            return torch.empty(2, device=device)

    class Value(OnGpu):
        def copy_(self, part, non_blocking=False):
            if isinstance(part, Part):
                ahead.append(non_blocking)
            return self

    value = torch.empty(2, device="meta").as_subclass(Value)
    reduce.sum_piece(value, [Part() for _ in range(count)])
    assert ahead == [kind != "pinned"] * count


class TestInOrder:
    """All work on values is within a block that puts it after earlier work on them."""

    @pytest.fixture
    def held(self):
        """A shard of one key, and the keys on which work is in order now."""
        held, keys = shard.Shard(on_device=True), []

        @contextmanager
        def in_order(entries):
            keys.extend(entry.key for entry in entries)
            yield
            del keys[-len(entries) :]

        held._in_order = in_order
        value = torch.zeros(2, 2)
        held.init(["w"], [value], [KeySpec(value.shape, value.dtype, interop.NUMPY, False)])
        return held, keys

    def test_a_new_value_is_copied(self, held, monkeypatch):
        held, keys = held
        seen = []
        monkeypatch.setattr(held, "apply", lambda change: seen.append(list(keys)))
        value = torch.zeros(2)
        held.init(["b"], [value], [KeySpec(value.shape, value.dtype, interop.NUMPY, False)])
        assert seen == [["b"]]

    def test_values_are_read_for_checkpoints_and_averages(self, held):
        held, keys = held
        with held.frozen():
            assert keys == ["w"]
        held.publish("one", None, None)
        with held.frozen(releases=True):
            assert keys == ["w", "w"]
        assert keys == []

    def test_states_are_restored(self, held, monkeypatch):
        held, keys = held
        with held.frozen() as ((entry,), rule):
            saved = entry.copy()
        seen = []
        monkeypatch.setattr(Entry, "move", lambda entry, device: seen.append(list(keys)))
        held.restore_states([saved], rule)
        assert seen == [["w"]]

    def test_slices_are_gathered(self, held, monkeypatch):
        held, keys = held
        seen, placed = [], Slices.placed

        def seen_placed(slices, memory):
            seen.append("w" in keys)
            return placed(slices, memory)

        monkeypatch.setattr(Slices, "placed", seen_placed)
        for column in range(2):
            part = take_slice(TensorSlice(torch.ones(2, 1), (0, column), (2, 2)))
            held.push(Batch("push", ["w"], [[part]]))
        assert seen == [True, True]
        assert keys == []
