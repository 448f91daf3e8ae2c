"""The order of work on CUDA values, shown with streams that are not there; real ones are tested with the engines."""

import torch

from tensorkv.arrays import interop
from tensorkv.arrays.spec import KeySpec
from tensorkv.shard import shard
from tensorkv.shard.entry import Entry


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
