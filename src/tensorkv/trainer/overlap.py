"""Overlap: push gradients in buckets while backward computes the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tensorkv.errors import ArgumentError, quote
from tensorkv.store import KVStore

# Long enough that a push costs bytes rather than calls, short enough that several fit into a backward pass.
BUCKET_NBYTES = 4 << 20


class Overlap:
    """Pushes the gradients of replicas from hooks that run when backward has computed them.

    Buckets hold neighbouring parameters, the last ones first, in the order of backward. Every worker pushes them in
    this order, whichever is full first.

    Args:
        kv: the store.
        params: by key, the parameter of every replica.
        before: is called before the first bucket of each step.
    """

    def __init__(self, kv: KVStore, params: dict[str, list[nn.Parameter]], before: Callable[[], None]) -> None:
        self._kv, self._params, self._before = kv, params, before
        self._buckets = _buckets(params)
        self._missing: dict[str, int] = {}
        self._next = 0
        self._handles = [
            param.register_post_accumulate_grad_hook(self._hook(key))  # type: ignore[no-untyped-call]
            for key, replicas in params.items()
            for param in replicas
        ]
        self._begin()

    def _begin(self) -> None:
        self._missing = {key: len(replicas) for key, replicas in self._params.items()}
        self._next = 0

    def _hook(self, key: str) -> Any:
        def hook(_: torch.Tensor) -> None:
            self._missing[key] -= 1
            if self._missing[key] < 0:
                raise ArgumentError(
                    f"Trainer: backward has computed the gradient of {quote(key)} twice; with overlap=True call step() "
                    "after each backward. To accumulate gradients, use overlap=False"
                )
            while self._next < len(self._buckets) and not any(self._missing[k] for k in self._buckets[self._next]):
                self._push(self._buckets[self._next])
                self._next += 1

        return hook

    def _push(self, keys: Sequence[str]) -> None:
        if self._next == 0:
            self._before()
        groups = [[param.grad for param in self._params[key] if param.grad is not None] for key in keys]
        wanted = [index for index, group in enumerate(groups) if group]
        if wanted:
            # Backward computes last what the next forward pass needs first.
            self._kv.push([keys[i] for i in wanted], [groups[i] for i in wanted], priority=self._next)

    def finish(self) -> None:
        """Push the remaining buckets, which have a parameter that backward has not reached."""
        while self._next < len(self._buckets):
            self._push(self._buckets[self._next])
            self._next += 1
        self._begin()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def _buckets(params: dict[str, list[nn.Parameter]]) -> list[list[str]]:
    buckets: list[list[str]] = []
    room = 0
    for key, replicas in reversed(list(params.items())):
        if room <= 0:
            buckets.append([])
            room = BUCKET_NBYTES
        buckets[-1].append(key)
        room -= replicas[0].nbytes
    return buckets
