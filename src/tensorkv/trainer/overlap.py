"""Overlap: push gradients in buckets while backward computes the others."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from tensorkv.errors import ArgumentError, WaitTimeoutError, quote
from tensorkv.shard.norm import PushResult
from tensorkv.store import KVStore

from .gradients import Gradients, Grads, cannot_agree
from .groups import Params

# Long enough that a push costs bytes rather than calls, short enough that several fit into a backward pass.
BUCKET_NBYTES = 4 << 20


class Overlap:
    """Pushes the gradients of replicas from hooks that run when backward has computed them.

    Buckets hold parameters in the order in which the first backward on rank 0 has computed their gradients, or in the
    reverse order of the model where workers in ``mode="sync"`` cannot tell each other. Every worker pushes them in this
    order, whichever is full first. The gradients of the first backward are pushed after it.

    Args:
        kv: the store.
        params: by key, the parameter of every replica.
        gradients: of these.
        parts: returns what is pushed of some gradients.
        before: is called before the first bucket of each step.
    """

    def __init__(
        self,
        kv: KVStore,
        params: Params,
        gradients: Gradients,
        parts: Callable[[Grads], list[list[torch.Tensor]]],
        before: Callable[[], None],
    ) -> None:
        self._kv, self._params, self._gradients, self._parts = kv, params, gradients, parts
        # Of the object that owns this one; a cycle would keep both until Python looks for cycles.
        self._before = weakref.WeakMethod(before)
        # Replicas on several GPUs, and threads that call backward themselves, run hooks at the same time.
        self._lock = threading.RLock()
        self._buckets: list[list[str]] | None = None
        # Keys in the order in which the first backward computes the gradients of their last replicas.
        self._order: dict[str, None] = {}
        self._accumulates = False
        self._missing: dict[str, int] = {}
        self._next = 0
        handles = [
            param.register_post_accumulate_grad_hook(self._hook(key))  # type: ignore[no-untyped-call]
            for key, replicas in params.items()
            for param in replicas
        ]
        self.close = weakref.finalize(self, _remove, handles)
        """Remove the hooks, as happens when this object is gone."""
        self.close.atexit = False
        self.begin()

    def begin(self) -> None:
        """Forget what backward has computed and what was pushed since the last step."""
        with self._lock:
            self._found_inf: bool | None = None
            self._missing = {key: len(replicas) for key, replicas in self._params.items()}
            self._next = 0

    def _hook(self, key: str) -> Any:
        # Parameters live longer than a Trainer, and keep their hooks.
        weak = weakref.ref(self)

        def hook(_: torch.Tensor) -> None:
            overlap = weak()
            if overlap is not None and not overlap._accumulates and not overlap._kv._closed:
                with overlap._lock:
                    overlap._take(key)

        return hook

    def _take(self, key: str) -> None:
        """Note that backward has computed a gradient, and push the buckets that have all of theirs."""
        self._missing[key] -= 1
        if self._missing[key] < 0:
            raise ArgumentError(
                f"Trainer: backward has computed the gradient of {quote(key)} twice; with overlap=True call step() "
                "after each backward, or trainer.zero_grad() if it has raised. To accumulate gradients, make all "
                "backward calls but the last within trainer.no_sync()"
            )
        if self._buckets is None:
            self._order.pop(key, None)
            self._order[key] = None
            return
        while self._next < len(self._buckets) and not any(self._missing[k] for k in self._buckets[self._next]):
            self._push(self._buckets[self._next])

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Leave gradients that are computed in the block for the push after a later backward."""
        before, self._accumulates = self._accumulates, True
        try:
            yield
        finally:
            self._accumulates = before

    def _push(self, keys: Sequence[str]) -> None:
        if self._next == 0 and (before := self._before()) is not None:
            before()
        grads = self._gradients.of(keys)
        if grads:
            # Backward computes last what the next forward pass needs first.
            try:
                self._kv.push(list(grads), self._parts(grads), priority=self._next)
            except WaitTimeoutError as error:
                self._next += error.applied
                raise
            found_inf = self._kv.last_push.found_inf
            if found_inf is not None:
                self._found_inf = self._found_inf or found_inf
        self._next += 1

    @property
    def has_pushed(self) -> bool:
        """Whether some gradients of the next step are in the store."""
        return self._next > 0

    def finish(self) -> PushResult:
        """Push the remaining buckets, which have a parameter that backward has not reached.

        Until ``begin`` is called, another call pushes nothing again.

        Returns:
            What was found out about all pushes of the step.
        """
        with self._lock:
            if self._buckets is None:
                self._buckets = self._make_buckets()
            while self._next < len(self._buckets):
                self._push(self._buckets[self._next])
            return PushResult(self._found_inf)

    def _make_buckets(self) -> list[list[str]]:
        order = [*self._order, *(key for key in reversed(self._params) if key not in self._order)]
        told = self._kv._gather("Trainer.step", json.dumps(order).encode())
        # Workers that cannot tell each other take the usual order of a backward pass.
        agreed = list(reversed(self._params)) if cannot_agree(self._kv, told) else json.loads(told[0])
        buckets: list[list[str]] = []
        room = 0
        for key in agreed:
            if room <= 0:
                buckets.append([])
                room = BUCKET_NBYTES
            buckets[-1].append(key)
            room -= self._params[key][0].nbytes
        return buckets


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
