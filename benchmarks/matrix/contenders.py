"""Contenders of the matrix: one way each of doing a cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from benchmarks.common.contender import Contender
from benchmarks.common.work import RULES, Verb, WrongResultError, first_values, new_outs
from benchmarks.local import contenders as local
from benchmarks.matrix.works import Cell
from benchmarks.sync import contenders as sync

NAMES = {
    "tensorkv": "tensorkv",
    "plain": "plain NumPy or torch",
    "fused": "torch.optim, fused",
    "gloo": "Gloo all_reduce, torch.optim",
    "mpi": "MPI Allreduce",
    "mxnet": "MXNet",
}
_TIMEOUT_S = 120

Call = Callable[[], Any]


class Caller(Contender):
    """A contender that is given arrays of the cell's library.

    ``given`` are the parts of each key and ``given_outs`` its outs. They share memory with the NumPy arrays of a
    contender, apart from those of JAX, which cannot be written: its parts are copies, and its outs are NumPy's.
    """

    WORK: ClassVar[type[Any]] = Cell

    def __init__(self, work: Cell, rank: int | None = None) -> None:
        super().__init__(work, rank)
        self._more_outs = new_outs(work) if work.outs == 2 else []
        self.returns = work.form == "no out"
        self.given_outs = [
            [self._as_given(out, key + place + 1) for place, out in enumerate(own)]
            for key, own in enumerate(self.all_outs())
        ]
        self._found: dict[int, Any] = {}
        self._arrange()

    def pushed(self) -> Sequence[int]:
        own: range = self.work.own_parts(self.rank or 0)
        return own

    def _as_given(self, array: Any, place: int) -> Any:
        if self.work.arrays == "torch" or (self.work.arrays == "mixed" and place % 2):
            import torch

            return torch.from_numpy(array)
        return array

    def _arrange(self) -> None:
        self.given = [
            [self._as_given(part, key + place) for place, part in enumerate(own)] for key, own in enumerate(self.parts)
        ]
        if self.work.arrays == "jax":
            import jax

            self.given = [[jax.numpy.array(part) for part in own] for own in self.given]

    def all_outs(self) -> list[list[Any]]:
        """Return the outs of each key, as NumPy arrays; none where results are returned."""
        if self.returns:
            return [[] for _ in self.outs]
        return [list(own) for own in zip(self.outs, *([self._more_outs] if self._more_outs else []), strict=True)]

    def keep(self, found: Any, keys: Sequence[int] | None = None) -> None:
        """Keep what a call has returned for some keys, or for all."""
        self._found |= zip(range(self.work.keys) if keys is None else keys, found, strict=True)

    def renew(self) -> None:
        super().renew()
        for out in self._more_outs:
            out[:] = np.nan
        self._found.clear()
        if self.work.arrays == "jax":
            self._arrange()

    def check(self) -> None:
        super().check()
        for key, out in enumerate(self._more_outs):
            if not np.array_equal(out, self.outs[key]):
                raise WrongResultError(f"{self.work.name}: the outs of key {key} differ")

    def out(self, key: int) -> Any:
        if not self.returns:
            return super().out(key)
        if key not in self._found:
            raise WrongResultError(f"{self.work.name}: key {key} was not returned")
        return np.asarray(self._found[key])


class TensorKV(Caller):
    """The store of this project.

    ``first`` is the first call of a new store, or, of servers, of a new client with new keys; ``changing`` calls with a
    new random half of the keys, then with the other half.
    """

    # Servers take seconds to start, so they are kept from cell to cell, by a client that does nothing else.
    _servers: ClassVar[Any] = None

    def __init__(self, work: Cell, rank: int | None = None) -> None:
        self._kv: Any = None
        self._calls: dict[Verb, Call] = {}
        self._rng, self._halves = np.random.default_rng(0), list[Call]()
        super().__init__(work, rank)

    @staticmethod
    def start() -> dict[str, str]:
        import tensorkv  # noqa: F401 - takes a while, and is not to be measured

        return {}

    def open(self, port: int, **options: Any) -> None:
        self._port = port

    def prepare(self, verb: Verb, calls: int) -> None:
        if verb == "first" or self._kv is None:
            self.close()
            self._kv = self._create()
            self._kv.init(list(range(self.work.keys)), first_values(self.work))
            local.set_rule(self._kv, self.work.rule)
            self._kv.barrier()
            self.steps = 0
            self._calls.clear()
        self.calls()
        if verb == "changing":
            self._halves = [self._call(keys) for _ in range(calls) for keys in self._halve()]

    def _create(self) -> Any:
        import tensorkv

        if self.work.engine == "dist_sync":
            return sync.open_store(self._port)
        if self.work.engine == "dist_async":
            if self._servers is None:
                type(self)._servers = tensorkv.create("dist_async", name="matrix", timeout_s=_TIMEOUT_S)
            return tensorkv.create("dist_async", name="matrix", timeout_s=_TIMEOUT_S)
        return tensorkv.create("local")

    def _arrange(self) -> None:
        super()._arrange()
        self._calls.clear()

    def calls(self) -> dict[Verb, Call]:
        if not self._calls:
            whole = self._call(range(self.work.keys))
            self._calls = {"first": whole, "pushpull": whole}
            if self.work.keys > 1:
                self._calls["changing"] = self._call_halves
        return self._calls

    def _halve(self) -> tuple[Sequence[int], Sequence[int]]:
        mixed = self._rng.permutation(self.work.keys).tolist()
        middle = len(mixed) // 2
        return sorted(mixed[:middle]), sorted(mixed[middle:])

    def _call_halves(self) -> None:
        self._halves.pop()()
        self._halves.pop()()

    def _call(self, keys: Sequence[int]) -> Call:
        """Return a function that pushes and pulls some keys, written as the form says."""
        kv, form, chosen = self._kv, self.work.form, list(keys)
        given, outs = [self.given[key] for key in chosen], [self.given_outs[key] for key in chosen]
        parts = [own if form == "nested" else own[0] for own in given]
        each = outs if form in ("several outs", "no out") else [out for [out] in outs]
        if form == "single":
            triples = list(zip(chosen, parts, each, strict=True))

            def call() -> None:
                for key, part, out in triples:
                    kv.pushpull(key, part, out=out)

        elif form == "mapping":
            by_key, out_by_key = dict(zip(chosen, parts, strict=True)), dict(zip(chosen, each, strict=True))

            def call() -> None:
                kv.pushpull(by_key, out=out_by_key)

        elif form == "no out":

            def call() -> None:
                self.keep(kv.pushpull(chosen, parts), chosen)

        else:

            def call() -> None:
                kv.pushpull(chosen, parts, out=each)

        return call

    def close(self) -> None:
        if self._kv is not None:
            if self.work.engine == "dist_async":
                self._kv.delete(self._kv.keys())
                self._kv.set_updater(None)
            self._kv.close()
        self._kv = None


class Plain(Caller):
    """The library of the arrays, written the obvious way; of mixed ones, NumPy. ``assign`` only."""

    def __init__(self, work: Cell, rank: int | None = None) -> None:
        super().__init__(work, rank)
        self._values: list[Any] = [value.copy() for value in first_values(work)]

    def calls(self) -> dict[Verb, Call]:
        return {"pushpull": {"torch": self._torch, "jax": self._jax}.get(self.work.arrays, self._numpy)()}

    def _numpy(self) -> Call:
        rows = list(zip(self.parts, self._values, self.all_outs(), strict=True))

        def call() -> None:
            for parts, value, outs in rows:
                value[...] = parts[0]
                for part in parts[1:]:
                    value += part
                for out in outs:
                    out[...] = value
            if self.returns:
                self.keep([value.copy() for value in self._values])

        return call

    def _torch(self) -> Call:
        import torch

        values = [torch.from_numpy(value) for value in self._values]
        parts, outs = list(zip(*self.given, strict=True)), list(zip(*self.given_outs, strict=True))

        def call() -> None:
            torch._foreach_copy_(values, parts[0])
            for more in parts[1:]:
                torch._foreach_add_(values, more)
            for own in outs:
                torch._foreach_copy_(own, values)
            if self.returns:
                self.keep([value.clone() for value in values])

        return call

    def _jax(self) -> Call:
        import jax

        rows = list(zip(self.given, self.all_outs(), strict=True))

        def call() -> None:
            values = []
            for parts, outs in rows:
                value = parts[0] if len(parts) > 1 else jax.numpy.array(parts[0])
                for part in parts[1:]:
                    value = value + part
                for out in outs:
                    out[...] = value
                values.append(value)
            if self.returns:
                self.keep(jax.block_until_ready([jax.numpy.array(value) for value in values]))

        return call


class Torch(Caller):
    """PyTorch: gradients are summed, over ranks by one all-reduce of one flat buffer; ``torch.optim``'s fused step."""

    def __init__(self, work: Cell, rank: int | None = None) -> None:
        super().__init__(work, rank)
        import torch

        self._values = [torch.tensor(value) for value in first_values(work)]
        self._flat = torch.empty(work.value_nbytes // 4)
        pieces = self._flat.split([value.numel() for value in self._values])
        self._sums = [piece.view(value.shape) for piece, value in zip(pieces, self._values, strict=True)]
        _, name, options = RULES[work.rule]
        kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "adagrad": torch.optim.Adagrad}
        self._optimizer = kinds[name](self._values, fused=True, **options) if name else None

    def reduce(self) -> None:
        """Sum the flat buffers of all ranks."""

    def calls(self) -> dict[Verb, Call]:
        import torch

        given = [[torch.from_numpy(part) for part in own] for own in self.parts]
        outs = list(zip(*([torch.from_numpy(out) for out in own] for own in self.all_outs()), strict=True))
        parts, sums, optimizer = list(zip(*given, strict=True)), self._sums, self._optimizer
        results = sums if optimizer is None else self._values
        # Alone, the only part needs no copy to be a gradient.
        first = parts[0] if type(self) is Torch and optimizer is not None and len(parts) == 1 else sums

        def call() -> None:
            if first is sums:
                torch._foreach_copy_(sums, parts[0])
                for more in parts[1:]:
                    torch._foreach_add_(sums, more)
            self.reduce()
            if optimizer is not None:
                for value, gradient in zip(results, first, strict=True):
                    value.grad = gradient
                optimizer.step()
            for own in outs:
                torch._foreach_copy_(own, results)
            if self.returns:
                self.keep([value.clone() for value in results])

        return {"pushpull": call}


class Gloo(Torch):
    """As ``Torch``, with ranks."""

    @staticmethod
    def start() -> dict[str, str]:
        return sync.Gloo.start()

    def reduce(self) -> None:
        import torch.distributed

        torch.distributed.all_reduce(self._flat)


class MPI(sync.MPI):
    """``Allreduce`` of mpi4py; ``assign`` and ``list`` only."""

    WORK: ClassVar[type[Any]] = Cell


class MXNet(local.MXNet):
    """MXNet's KVStore ``local``; ``list`` only."""

    WORK: ClassVar[type[Any]] = Cell


class SyncMXNet(sync.MXNet):
    """MXNet's KVStore ``dist_sync``; ``list`` only."""

    WORK: ClassVar[type[Any]] = Cell


class AsyncMXNet(SyncMXNet):
    """MXNet's KVStore ``dist_async``, with one worker and one server."""

    TYPE: ClassVar[str] = "dist_async"
