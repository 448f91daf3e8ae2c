"""Work on CUDA values, shown with streams and devices that are not there; real ones are tested with the engines."""

from contextlib import contextmanager

import pytest
import torch

from tensorkv.arrays import interop
from tensorkv.arrays.slices import Slices, TensorSlice, take_slice
from tensorkv.arrays.spec import KeySpec
from tensorkv.shard import reduce, shard
from tensorkv.shard.entry import Batch, Entry
from tensorkv.shard.optimizers import Optimizer, spec


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
    part = FakeTensor("meta")
    shard.move_to_parts([held], [[part]])
    assert held.value.is_meta


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
