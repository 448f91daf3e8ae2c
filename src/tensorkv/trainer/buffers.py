"""Buffers of modules, such as the running means of a batch norm: kept equal on all replicas and workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tensorkv.arrays import interop
from tensorkv.arrays.packing import raw_bytes
from tensorkv.arrays.trees import plain_name
from tensorkv.errors import ArgumentError, quote, show
from tensorkv.store import KVStore

MODES = ("local", "broadcast", "mean")


def check_buffers(buffers: Any) -> str:
    """Return the option, or raise ArgumentError if a Trainer cannot have it."""
    if not isinstance(buffers, str) or buffers not in MODES:
        raise ArgumentError(f'buffers is {show(buffers)}; expected "local", "broadcast" or "mean"')
    return buffers


class Buffers:
    """Makes the buffers of all replicas equal.

    Args:
        kv: the store.
        replicas: of one module.
        mode: ``"broadcast"``: those of the first replica of rank 0. ``"mean"``: the mean of floating-point buffers over
            all replicas and workers, summed in the order of ranks; others as with ``"broadcast"``.

    Raises:
        ArgumentError: replicas whose buffers differ, an expanded buffer, or workers that are not in lock step.
        WorkerMismatchError: workers whose buffers differ in name, shape or dtype.
    """

    def __init__(self, kv: KVStore, replicas: Sequence[nn.Module], mode: str) -> None:
        self._kv, self._replicas, self._mode = kv, replicas, mode
        found = [
            [[plain_name(name), interop.dtype_name(b.dtype), list(b.shape)] for name, b in replica.named_buffers()]
            for replica in replicas
        ]
        if any(each != found[0] for each in found):
            raise ArgumentError("Trainer: the buffers of replicas differ; make replicas with copy.deepcopy")
        for name, buffer in (pair for replica in replicas for pair in replica.named_buffers()):
            if any(step == 0 and size > 1 for step, size in zip(buffer.stride(), buffer.shape, strict=True)):
                raise ArgumentError(
                    f"Trainer: the buffer {quote(name)} is expanded: several of its elements share one place in "
                    'memory, and it cannot be written; register a clone of it, or use buffers="local"'
                )
        kv._agree("Trainer", {"buffers": found[0]})
        counts = kv._gather("Trainer", len(replicas).to_bytes(8))
        if len(counts) != kv.num_workers:
            raise ArgumentError(
                f'Trainer: buffers="{mode}" needs workers in lock step, as those of "dist_sync"; use buffers="local"'
            )
        self._count = sum(map(int.from_bytes, counts))

    def start(self) -> None:
        """Give all replicas and workers the buffers of rank 0's first replica."""
        self._synchronise("Trainer", "broadcast")

    def synchronise(self) -> None:
        """Make the buffers equal, after a step."""
        self._synchronise("Trainer.step", self._mode)

    def _synchronise(self, verb: str, mode: str) -> None:
        groups = list(zip(*(replica.buffers() for replica in self._replicas), strict=True))
        mine = [_sum(group) if mode == "mean" and _has_mean(group[0]) else group[0] for group in groups]
        told = self._kv._gather(verb, b"".join(map(raw_bytes, mine)))
        place = 0
        with torch.no_grad():
            for group, own in zip(groups, mine, strict=True):
                nbytes = own.numel() * own.itemsize
                parts = [_tensor_of(each[place : place + nbytes], own) for each in told] if nbytes else [own]
                value = _sum(parts) / self._count if own is not group[0] else parts[0]
                place += nbytes
                for buffer in group:
                    buffer.copy_(value)


def _has_mean(buffer: torch.Tensor) -> bool:
    return buffer.is_floating_point() or buffer.is_complex()


def _sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum from left to right, on the CPU."""
    total = parts[0].detach().to("cpu", interop.accumulator(parts[0].dtype), copy=True)
    for part in parts[1:]:
        total += part.detach().cpu()
    return total


def _tensor_of(data: bytes, like: torch.Tensor) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=like.dtype).view(like.shape)
