"""Contenders of one process: one way each of doing a work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.common.contender import Contender, one_or_list
from benchmarks.common.work import LR, MOMENTUM, RULES, Rule, Verb, Work, first_values

NAMES = {"tensorkv": "tensorkv", "mxnet": "MXNet", "torch": "plain torch", "numpy": "plain NumPy"}


def set_rule(kv: Any, rule: Rule) -> None:
    """Give a store of this project a rule."""
    _, optimizer, options = RULES[rule]
    if optimizer:
        kv.set_optimizer(optimizer, **options)


def set_mxnet_rule(kv: Any, rule: Rule) -> None:
    """Give a store of MXNet a rule."""
    from mxnet import optimizer

    kinds = {"sgd": optimizer.SGD, "momentum": optimizer.SGD, "adamw": optimizer.Adam, "adagrad": optimizer.AdaGrad}
    if rule in kinds:
        options = {"momentum": MOMENTUM} if rule == "momentum" else {}
        kv.set_optimizer(kinds[rule](learning_rate=LR, wd=0, **options))


class TensorKV(Contender):
    """The store of this project.

    Args:
        work: what to do.
        rank: as of a contender.
        arrays: pushed and pulled as ``"numpy"`` or as ``"torch"``.
    """

    def __init__(self, work: Work, rank: int | None = None, arrays: str = "numpy") -> None:
        super().__init__(work, rank)
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
        set_rule(self._kv, work.rule)

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

    @staticmethod
    def start() -> dict[str, str]:
        import mxnet

        return {"mxnet": mxnet.__version__, "numpy of mxnet": np.__version__}

    def __init__(self, work: Work, rank: int | None = None) -> None:
        super().__init__(work, rank)
        import mxnet as mx

        self._wait = mx.nd.waitall
        given = [[mx.nd.array(part, mx.cpu(index)) for index, part in enumerate(group)] for group in self.parts]
        self.parts = given
        self.outs = [mx.nd.zeros(shape) for shape in work.shapes]
        self._keys = one_or_list(work, list(range(work.keys)))
        self._given = one_or_list(work, given)
        self._given_outs = one_or_list(work, self.outs)
        self._kv = mx.kv.create("local")
        self._kv.init(list(range(work.keys)), [mx.nd.array(value) for value in first_values(work)])
        set_mxnet_rule(self._kv, work.rule)
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

    def out(self, key: int) -> Any:
        return self.outs[key].asnumpy()


class PlainTorch(Contender):
    """PyTorch, written the obvious way: ``+``, ``copy_``, and ``torch.optim.SGD``."""

    def __init__(self, work: Work, rank: int | None = None) -> None:
        super().__init__(work, rank)
        import torch

        self._given = [[torch.from_numpy(part) for part in group] for group in self.parts]
        self._out_tensors = [torch.from_numpy(out) for out in self.outs]
        self._values = [torch.tensor(value) for value in first_values(work)]
        self._optimizer = torch.optim.SGD(self._values, lr=LR, momentum=MOMENTUM) if work.rule == "momentum" else None

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

    def __init__(self, work: Work, rank: int | None = None) -> None:
        super().__init__(work, rank)
        self._values = [value.copy() for value in first_values(work)]
        self._momenta = [np.zeros_like(value) for value in self._values] if work.rule == "momentum" else None

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
