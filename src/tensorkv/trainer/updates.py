"""The update in a Trainer's step: by the store's optimizer, or by optimizers of the worker."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tensorkv.arrays.keytable import KeyTable
from tensorkv.errors import CheckpointError, OptimizerError, show
from tensorkv.shard import optimizers
from tensorkv.shard.entry import Entry
from tensorkv.shard.optimizers import OptimizerSpec
from tensorkv.shard.rules import StepOptimizer
from tensorkv.storage.manifest import Contents
from tensorkv.store import KVStore

# The parameter of every replica, by key.
Params = dict[str, list[nn.Parameter]]


def broadcast(kv: KVStore, params: Params, weights: Mapping[str, torch.Tensor]) -> None:
    """Create the store's keys from weights, and copy them to every replica."""
    # On the parameter's device, where a "device" store is to hold the value.
    values = [weights[key].to(replicas[0].device) for key, replicas in params.items()]
    kv.broadcast(list(params), values, out=list(params.values()))


class StoreUpdate:
    """The store's optimizer steps; replicas pull the weights."""

    on_store = True
    optimizers: tuple[torch.optim.Optimizer, ...] = ()

    def __init__(self, kv: KVStore, optimizer: Any, numbers: dict[str, Any], params: Params) -> None:
        self._kv, self._params = kv, params
        spec = optimizers.spec(optimizer, numbers)
        self._wanted = {"name": spec.name, **spec.to_numbers()}
        held = kv.optimizer or self._wanted
        words = [word for word in {**held, **self._wanted} if held.get(word) != self._wanted.get(word)]
        if words:
            differ = ", ".join(f"{word} {held.get(word)!r} (here {self._wanted.get(word)!r})" for word in words)
            raise OptimizerError(
                f"Trainer: the store's optimizer has {differ}; a store has one optimizer: give the same, "
                "or use another store"
            )

    def start(self) -> None:
        """Set the update rule, after the keys were created."""
        # Setting an equal optimizer again would reset the hyperparameters of single keys.
        if self._kv.optimizer is None:
            numbers = dict(self._wanted)
            self._kv.set_optimizer(numbers.pop("name"), **numbers)

    def step(self, params: Params, *, is_pushed: bool) -> None:
        if is_pushed:
            self._kv.pull(list(params), out=list(params.values()))
            return
        grads = [[p.grad for p in replicas if p.grad is not None] for replicas in params.values()]
        self._kv.pushpull(list(params), grads, out=list(params.values()))

    @property
    def learning_rate(self) -> float:
        held = self._kv.optimizer
        if held is None:
            raise self._lacks_optimizer("learning_rate")
        return float(held["lr"])

    @learning_rate.setter
    def learning_rate(self, lr: float) -> None:
        self._kv.set_hyperparameters(lr=lr)

    def state(self) -> dict[str, Any]:
        return self._kv._state_dict(self._read)

    def _read(self, contents: Contents) -> dict[str, Any]:
        table = KeyTable({entry.key: entry for entry in contents.entries})
        held = {key: table.find("state_dict", key) for key in self._params}
        if not isinstance(contents.rule, StepOptimizer):
            raise self._lacks_optimizer("state_dict")
        spec = contents.rule.optimizer.spec
        return {
            "weights": {key: each.tensor.to(self._params[key][0].device, copy=True) for key, each in held.items()},
            "state": {
                key: {name: t.to("cpu", copy=True) for name, t in each.state.items()} for key, each in held.items()
            },
            "overrides": {key: own for key, own in spec.overrides.items() if key in self._params},
            "optimizer": {
                "name": spec.name,
                "numbers": dict(spec.numbers),
                "rescale_grad": spec.rescale_grad,
                "clip_gradient": spec.clip_gradient,
            },
        }

    def load(self, state: dict[str, Any]) -> None:
        # One change puts all of it in force, on every worker and server.
        self._kv._load_state_dict(self._contents(state))
        with torch.no_grad():
            self._kv.pull(list(self._params), out=list(self._params.values()))

    def _contents(self, state: dict[str, Any]) -> Contents:
        spec = self._kv._engine.optimizer
        if spec is None:
            raise self._lacks_optimizer("load_state_dict")
        others = {key: own for key, own in spec.overrides.items() if key not in self._params}
        try:
            overrides = [[key, dict(own)] for key, own in {**others, **state["overrides"]}.items()]
            loaded = OptimizerSpec.from_json({**state["optimizer"], "overrides": overrides})
            states = {
                key: {name: torch.clone(each) for name, each in state["state"].get(key, {}).items()}
                for key in self._params
            }
        except (AttributeError, OptimizerError, TypeError, ValueError) as error:
            raise CheckpointError(f"load_state_dict: {error}") from error
        if loaded.name != spec.name:
            raise CheckpointError(f"load_state_dict: the state is of {loaded.name}, the store has {spec.name}")
        entries = []
        for key in self._params:
            weight = state["weights"][key].detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            entries.append(Entry(key, self._kv._engine.spec("load_state_dict", key), weight, 0, states[key]))
        return Contents("keys", entries, StepOptimizer(loaded))

    @staticmethod
    def _lacks_optimizer(verb: str) -> OptimizerError:
        return OptimizerError(f"{verb}: the store has no optimizer any more; call kv.set_optimizer")


class WorkerUpdate:
    """The store sums; each replica's own optimizer steps."""

    on_store = False

    def __init__(self, kv: KVStore, optimizer: Any, numbers: dict[str, Any], params: Params) -> None:
        self._kv, self._params = kv, params
        self._refuse_optimizer()
        numbers = dict(numbers)
        rescale, clip = numbers.pop("rescale_grad", 1.0), numbers.pop("clip_gradient", None)
        self._scaling = optimizers.spec("sgd", {"rescale_grad": rescale, "clip_gradient": clip})
        if isinstance(optimizer, str):
            optimizer = getattr(torch.optim, optimizers.CLASSES[optimizers.spec(optimizer, numbers).name])
        if not callable(optimizer):
            raise OptimizerError(
                f"Trainer: optimizer is {show(optimizer)}; with update_on_store=False expected a name, "
                "a class, or a function that returns a torch.optim.Optimizer for a list of parameters"
            )
        self.optimizers: list[torch.optim.Optimizer] = []
        for replica in zip(*params.values(), strict=True):
            try:
                made = optimizer(list(replica), **numbers)
            except (TypeError, ValueError) as error:
                raise OptimizerError(f"Trainer: the optimizer cannot be created: {error}") from error
            if not isinstance(made, torch.optim.Optimizer) or isinstance(made, torch.optim.LBFGS):
                raise OptimizerError(
                    f"Trainer: optimizer returned {show(made)}; expected a torch.optim.Optimizer "
                    "that steps from gradients alone"
                )
            self.optimizers.append(made)

    def start(self) -> None:
        pass

    def step(self, params: Params, *, is_pushed: bool) -> None:
        self._refuse_optimizer()
        # Sparse gradients are summed as dense ones, since a worker does not know which rows the others push.
        grads = [[_dense(p.grad) for p in replicas if p.grad is not None] for replicas in params.values()]
        sums = [[_sum_buffer(p) for p in replicas] for replicas in params.values()]
        if is_pushed:
            self._kv.pull(list(params), out=sums)
        else:
            self._kv.pushpull(list(params), grads, out=sums)
        for replicas, totals in zip(params.values(), sums, strict=True):
            sparse = all(p.grad is None or p.grad.is_sparse for p in replicas)
            for param, total in zip(replicas, totals, strict=True):
                self._scale(total)
                param.grad = total.to_sparse(1) if sparse else total
        for each in self.optimizers:
            each.step()

    @property
    def learning_rate(self) -> float:
        return float(self.optimizers[0].param_groups[0]["lr"])

    @learning_rate.setter
    def learning_rate(self, lr: float) -> None:
        for each in self.optimizers:
            for group in each.param_groups:
                group["lr"] = lr

    def state(self) -> dict[str, Any]:
        weights = {key: replicas[0].detach().clone() for key, replicas in self._params.items()}
        own = copy.deepcopy(self.optimizers[0].state_dict())
        return {"weights": weights, "state": {}, "overrides": {}, "optimizer": own}

    def load(self, state: dict[str, Any]) -> None:
        try:
            # A copy, since an optimizer keeps the tensors that it is given.
            for each in self.optimizers:
                each.load_state_dict(copy.deepcopy(state["optimizer"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"load_state_dict: not the state of such an optimizer: {error}") from error
        for key, replicas in self._params.items():
            for param in replicas:
                param.detach().copy_(state["weights"][key])

    def _scale(self, total: torch.Tensor) -> None:
        total.mul_(self._scaling.rescale_grad)
        if (bound := self._scaling.clip_gradient) is not None:
            (torch.view_as_real(total) if total.is_complex() else total).clamp_(-bound, bound)

    def _refuse_optimizer(self) -> None:
        held = self._kv.optimizer
        if held is not None:
            raise OptimizerError(
                f"Trainer: the store has the optimizer {held['name']}, and with update_on_store=False it is to sum "
                "only; use another store, or kv.set_updater(None)"
            )


def _dense(grad: torch.Tensor) -> torch.Tensor:
    return grad.to_dense() if grad.is_sparse else grad


def _sum_buffer(param: nn.Parameter) -> torch.Tensor:
    grad = param.grad
    return torch.empty_like(param) if grad is None or grad.is_sparse or 0 in grad.stride() else grad.detach()
