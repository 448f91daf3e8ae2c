"""The gradients that a step pushes, and what stands for those that a backward pass has not computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from tensorkv.errors import ArgumentError, show
from tensorkv.store import KVStore

from .groups import Params

# The gradients of a step, by key.
Grads = dict[str, list[torch.Tensor]]
UNUSED = ("skip", "agree", "zero")


def check_unused(kv: KVStore, unused: Any, *, overlaps: bool) -> None:
    """Raise ArgumentError if a Trainer cannot have such an option."""
    if not isinstance(unused, str) or unused not in UNUSED:
        raise ArgumentError(f'unused is {show(unused)}; expected "skip", "agree" or "zero"')
    if unused == "agree" and overlaps:
        raise ArgumentError(
            'unused="agree" needs overlap=False, since it is known after backward only which parameters have a '
            'gradient; with overlap=True use unused="zero"'
        )
    if unused == "agree" and cannot_agree(kv, kv._gather("Trainer", b"")):
        raise ArgumentError(
            'unused="agree" needs workers that can tell each other which gradients they have, as those of "dist_sync"; '
            'use unused="zero"'
        )


def cannot_agree(kv: KVStore, told: Sequence[bytes]) -> bool:
    """Return whether workers have to push alike and cannot tell each other what they push.

    Args:
        kv: the store.
        told: what its workers have told each other.
    """
    return len(told) != kv.num_workers and kv._engine.joins_workers != "alone"


class Gradients:
    """Collects the gradients of replicas by key.

    Args:
        kv: the store.
        replicas: modules with equal parameters.
        params: the trained parameters of every replica, by key.
        unused: what is pushed for parameters without a gradient, as ``Trainer`` says.
    """

    def __init__(self, kv: KVStore, replicas: Sequence[nn.Module], params: Params, unused: str) -> None:
        self._kv, self._params, self._unused = kv, params, unused
        # Workers that have a gradient of these push rows.
        self._sparse = {
            id(module.weight)
            for replica in replicas
            for module in replica.modules()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
        }

    def of(self, keys: Iterable[str]) -> Grads:
        """Return the gradients of some keys; those without any are left out unless they count as zero."""
        found = {key: own for key in keys if (own := [grad for p in self._params[key] if (grad := p.grad) is not None])}
        return found if self._unused == "skip" else self._filled(found, keys if self._unused == "zero" else found)

    def all(self) -> Grads:
        """Return the gradients that a step pushes."""
        found = self.of(self._params)
        if self._unused != "agree":
            return found
        bits = self._kv._gather("Trainer.step", bytes(key in found for key in self._params))
        used = [key for key, *marks in zip(self._params, *bits, strict=True) if any(marks)]
        return self._filled(found, used)

    def _filled(self, found: Grads, keys: Iterable[str]) -> Grads:
        """Return the gradients of some keys, with zeros for replicas that have none."""
        filled: Grads = {}
        for key in keys:
            params = self._params[key]
            if len(found.get(key, ())) == len(params):
                filled[key] = found[key]
            else:
                filled[key] = [self._zeros(param) if param.grad is None else param.grad for param in params]
        return filled

    def _zeros(self, param: nn.Parameter) -> torch.Tensor:
        return _no_rows(param) if id(param) in self._sparse else torch.zeros_like(param, requires_grad=False)


def _no_rows(param: nn.Parameter) -> torch.Tensor:
    ids = torch.empty((1, 0), dtype=torch.int64, device=param.device)
    rows = param.new_empty((0, *param.shape[1:]))
    return torch.sparse_coo_tensor(
        ids, rows, param.shape, dtype=param.dtype, device=param.device, check_invariants=False
    )
