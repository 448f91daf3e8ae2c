"""Contenders: one way each of doing a work. All push the same parts and are checked against the same results.

A library is imported only by the contender that uses it: MXNet runs in a process that has no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
from works import LR, MOMENTUM, Verb, Work, check, first_values, make_parts, new_outs

NAMES = {"tensorkv": "tensorkv", "mxnet": "MXNet", "torch": "plain torch", "numpy": "plain NumPy"}


class Contender:
    """Does one work again and again; counts the updates, so that it can check itself.

    Args:
        work: what to do.
        part: the index of the one part of each key that this process has; all if not given.
    """

    def __init__(self, work: Work, part: int | None = None) -> None:
        self.work = work
        self.steps = 0
        self.scale = 1
        self.parts: list[Any] = make_parts(work, part)
        self.outs: list[Any] = new_outs(work)

    def time(self, verb: Verb, calls: int = 1) -> float:
        """Do ``verb`` with all keys so many times; return the seconds of one."""
        do = self.calls()[verb]
        self.steps += calls
        start = perf_counter()
        for _ in range(calls):
            do()
        return (perf_counter() - start) / calls

    def calls(self) -> dict[Verb, Callable[[], None]]:
        """Return what does each verb to all keys, and returns when everything is done."""
        raise NotImplementedError

    def renew(self) -> None:
        """Make sure that old results are not right any more: NaN in the outs, and for assign other parts."""
        for out in self.outs:
            out[:] = np.nan
        if self.work.rule == "assign":
            self.scale *= 2
            for group in self.parts:
                for part in group:
                    part *= 2

    def check(self) -> None:
        """Raise ``WrongResultError`` unless the outs are right."""
        check(self.work, self.steps, self.scale, lambda key: np.asarray(self.outs[key]))

    def close(self) -> None:
        """Let go of what garbage collection does not."""


def one_or_list(work: Work, groups: list[Any]) -> Any:
    """What a user would write: one key's array or parts, or a list of one entry for each key."""
    groups = [group[0] if isinstance(group, list) and len(group) == 1 else group for group in groups]
    return groups[0] if work.keys == 1 else groups


class TensorKV(Contender):
    """The store of this project.

    Args:
        work: what to do.
        arrays: pushed and pulled as ``"numpy"`` or as ``"torch"``.
    """

    def __init__(self, work: Work, arrays: str = "numpy") -> None:
        super().__init__(work)
        import tensorkv

        given, outs = self.parts, self.outs
        if arrays == "torch":
            import torch

            given = [[torch.from_numpy(part) for part in group] for group in self.parts]
            outs = [torch.from_numpy(out) for out in self.outs]
        self._keys = one_or_list(work, list(range(work.keys)))
        self._given = one_or_list(work, given)
        self._given_outs = one_or_list(work, outs)
        self._kv = tensorkv.create("local")
        self._kv.init(list(range(work.keys)), first_values(work))
        if work.rule == "sgd":
            self._kv.set_optimizer("sgd", lr=LR, momentum=MOMENTUM)

    def calls(self) -> dict[Verb, Callable[[], None]]:
        kv, keys, given, outs = self._kv, self._keys, self._given, self._given_outs

        def push() -> None:
            kv.push(keys, given)

        def push_pull() -> None:
            kv.push(keys, given)
            kv.pull(keys, out=outs)

        def pushpull() -> None:
            kv.pushpull(keys, given, out=outs)

        return {"push": push, "push+pull": push_pull, "pushpull": pushpull}

    def close(self) -> None:
        self._kv.close()


class MXNet(Contender):
    """MXNet's own KVStore ``local``, in C++; each part on a context of its own, as of one device."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        import mxnet as mx

        self._wait = mx.nd.waitall
        given = [[mx.nd.array(part, mx.cpu(index)) for index, part in enumerate(group)] for group in self.parts]
        self.parts = given
        self.outs = [mx.nd.zeros(work.shape) for _ in range(work.keys)]
        self._keys = one_or_list(work, list(range(work.keys)))
        self._given = one_or_list(work, given)
        self._given_outs = one_or_list(work, self.outs)
        self._kv = mx.kv.create("local")
        self._kv.init(list(range(work.keys)), [mx.nd.array(value) for value in first_values(work)])
        if work.rule == "sgd":
            self._kv.set_optimizer(mx.optimizer.SGD(learning_rate=LR, momentum=MOMENTUM, wd=0))
        self._wait()

    def calls(self) -> dict[Verb, Callable[[], None]]:
        kv, keys, given, outs, wait = self._kv, self._keys, self._given, self._given_outs, self._wait

        def push() -> None:
            kv.push(keys, given)
            wait()

        def push_pull() -> None:
            kv.push(keys, given)
            kv.pull(keys, out=outs)
            wait()

        def pushpull() -> None:
            kv.pushpull(keys, given, out=outs)
            wait()

        return {"push": push, "push+pull": push_pull, "pushpull": pushpull}

    def renew(self) -> None:
        super().renew()
        self._wait()

    def check(self) -> None:
        check(self.work, self.steps, self.scale, lambda key: self.outs[key].asnumpy())


class PlainTorch(Contender):
    """PyTorch, written the obvious way: ``+``, ``copy_``, and ``torch.optim.SGD``."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        import torch

        self._given = [[torch.from_numpy(part) for part in group] for group in self.parts]
        self._out_tensors = [torch.from_numpy(out) for out in self.outs]
        self._values = [torch.tensor(value) for value in first_values(work)]
        self._optimizer = torch.optim.SGD(self._values, lr=LR, momentum=MOMENTUM) if work.rule == "sgd" else None

    def calls(self) -> dict[Verb, Callable[[], None]]:
        given, values, outs, optimizer = self._given, self._values, self._out_tensors, self._optimizer

        def push() -> None:
            for parts, value in zip(given, values, strict=True):
                total = parts[0]
                for part in parts[1:]:
                    total = total + part
                if optimizer is None:
                    value.copy_(total)
                else:
                    value.grad = total
            if optimizer is not None:
                optimizer.step()
                # Else the sums would be held until the next call.
                optimizer.zero_grad(set_to_none=True)

        def push_pull() -> None:
            push()
            for value, out in zip(values, outs, strict=True):
                out.copy_(value)

        return {"push": push, "push+pull": push_pull, "pushpull": push_pull}


class PlainNumPy(Contender):
    """NumPy, written the obvious way."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self._values = [value.copy() for value in first_values(work)]
        self._momenta = [np.zeros_like(value) for value in self._values] if work.rule == "sgd" else None

    def calls(self) -> dict[Verb, Callable[[], None]]:
        given, values, momenta, outs = self.parts, self._values, self._momenta, self.outs

        def push() -> None:
            for index, (parts, value) in enumerate(zip(given, values, strict=True)):
                total = parts[0]
                for part in parts[1:]:
                    total = total + part
                if momenta is None:
                    value[...] = total
                else:
                    momentum = momenta[index]
                    momentum *= MOMENTUM
                    momentum += total
                    value -= LR * momentum

        def push_pull() -> None:
            push()
            for value, out in zip(values, outs, strict=True):
                out[...] = value

        return {"push": push, "push+pull": push_pull, "pushpull": push_pull}


def build(name: str, work: Work, arrays: str = "numpy") -> Contender:
    """Return a new contender by its name in ``NAMES``."""
    if name == "tensorkv":
        return TensorKV(work, arrays)
    classes: dict[str, type[Contender]] = {"mxnet": MXNet, "torch": PlainTorch, "numpy": PlainNumPy}
    return classes[name](work)
