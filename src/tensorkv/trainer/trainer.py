"""Trainer: push the gradients of PyTorch modules to a store, and pull new weights.

This module has the public class and the checks of its arguments; ``updates`` has the step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tensorkv.arrays import interop
from tensorkv.arrays.arguments import check_flag
from tensorkv.errors import (
    ArgumentError,
    CheckpointError,
    KeyExistsError,
    KeyNotFoundError,
    OptimizerError,
    ValueMismatchError,
    naming,
    quote,
    show,
)
from tensorkv.store import KVStore

from .overlap import Overlap
from .updates import Params, StoreUpdate, WorkerUpdate, broadcast

# The parts of a state dict that are by key; ``overrides`` has the hyperparameters of single keys.
_BY_KEY = ("weights", "state", "overrides")


class Trainer:
    """Train one module, or replicas of it on several devices, through a store.

    Args:
        model_or_replicas: an ``nn.Module``, or a list of replicas with equal parameters (such as
            ``copy.deepcopy`` makes). All start from the first one's weights; buffers stay each replica's own.
        kv: a store with str keys. The keys are ``prefix`` + the parameter's name, in the order of
            ``named_parameters()``; tied parameters have one key, frozen ones (``requires_grad=False``) none.
        optimizer: the name or class of an optimizer, as ``KVStore.set_optimizer`` takes it. With
            ``update_on_store=False`` also any function or class that makes a ``torch.optim.Optimizer``
            when called as ``optimizer(params, **numbers)``; each replica gets one.
        prefix: put before each name, so that several models can share a store.
        update_on_store: True: the store updates and replicas pull weights. False: the store only sums,
            replicas pull the sum into ``.grad`` and step their own optimizers.
        overlap: push each gradient as soon as backward has computed it, so that communication overlaps with
            backward. Call ``step`` after each ``backward``. This helps where ``push`` does not wait.
        **numbers: hyperparameters such as ``lr=0.1``; also ``rescale_grad`` (factor on the sum, default
            1) and ``clip_gradient`` (bound on each element after rescaling).

    Raises:
        ArgumentError: not modules, nothing to train, or replicas whose parameters differ in name.
        ValueMismatchError: replicas whose parameters differ in shape or dtype.
        KeyExistsError: the store has a parameter's key; load after this, or give another ``prefix``.
        OptimizerError: unknown optimizer or number; or the store has another optimizer, or other numbers:
            a store has one optimizer for all its keys.

    The gradient is the **sum** over replicas and workers. Where each replica's loss is the mean over its
    part of the batch, a store with ``reduce="mean"`` gives the mean over the batch.
    Sparse gradients (``nn.Embedding(sparse=True)``) update only their rows if the store updates.

    >>> import torch, tensorkv
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> trainer = Trainer(model, tensorkv.create(), "sgd", lr=0.5)
    >>> before = model.weight.tolist()[0]
    >>> model(torch.tensor([[1.0, 2.0]])).sum().backward()
    >>> trainer.step()
    >>> [round(b - a, 3) for a, b in zip(model.weight.tolist()[0], before)]
    [0.5, 1.0]
    """

    def __init__(
        self,
        model_or_replicas: Any,
        kv: KVStore,
        optimizer: Any = "sgd",
        *,
        prefix: str = "",
        update_on_store: bool = True,
        overlap: bool = False,
        **numbers: Any,
    ) -> None:
        if not isinstance(kv, KVStore):
            raise ArgumentError(f"Trainer: kv is {show(kv)}; expected a KVStore, from tensorkv.create()")
        if not isinstance(prefix, str):
            raise ArgumentError(f"Trainer: prefix is {show(prefix)}; expected a str")
        self._kv = kv
        self._prefix = prefix
        self._params = _parameters_by_key(_replicas(model_or_replicas), prefix)
        self._update: StoreUpdate | WorkerUpdate
        with naming("Trainer"):
            kind = StoreUpdate if check_flag("update_on_store", update_on_store) else WorkerUpdate
            overlaps = check_flag("overlap", overlap)
            self._update = kind(kv, optimizer, numbers, self._params)
        try:
            broadcast(kv, self._params, {key: params[0].detach() for key, params in self._params.items()})
        except KeyExistsError as error:
            raise KeyExistsError(
                f"Trainer: {error}. To resume from a checkpoint, create the Trainer first, then kv.load(...) and "
                "trainer.refresh(); for a second model, give a prefix"
            ) from None
        self._update.start()
        self._overlap = Overlap(kv, self._params) if overlaps else None

    def step(self) -> None:
        """Push each parameter's gradients, summed over replicas, and update every replica.

        Call it after ``backward`` on every replica. A parameter without a gradient in any replica is not
        pushed and does not move; where only some replicas have one, the others count as nothing.
        Gradients stay until ``zero_grad``.

        Raises:
            TensorKVError: as ``KVStore.pushpull``; no parameter has changed.

        Limits: all workers of a synchronous store must have gradients for the same parameters.
        """
        if self._overlap is not None:
            self._overlap.finish()
        pushed = {k: params for k, params in self._params.items() if any(p.grad is not None for p in params)}
        self._update.step(pushed, is_pushed=self._overlap is not None)

    def refresh(self) -> None:
        """Pull the weights from the store into every replica, as after ``kv.load``.

        Raises:
            TensorKVError: as ``KVStore.pull``.
        """
        outs = [[param.detach() for param in params] for params in self._params.values()]
        try:
            with torch.no_grad():
                self._kv.pull(list(self._params), out=outs)
        except KeyNotFoundError as error:
            raise KeyNotFoundError(
                f"Trainer.refresh: {error}. A load replaces all keys by those of the checkpoint; load one of this model"
            ) from None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of every replica's trained parameters.

        Args:
            set_to_none: False fills gradients with zeros, which the next ``step`` pushes like any other.
        """
        for params in self._params.values():
            for param in params:
                if set_to_none:
                    param.grad = None
                elif param.grad is not None:
                    param.grad = param.grad.detach_().zero_()

    @property
    def keys(self) -> list[str]:
        """The store's keys of the trained parameters, in the order they are pushed.

        >>> import torch, tensorkv
        >>> kv = tensorkv.create()
        >>> trainer = Trainer(torch.nn.Linear(2, 1), kv, lr=0.1, prefix="net.")
        >>> trainer.keys
        ['net.weight', 'net.bias']
        >>> kv.set_hyperparameters("net.bias", lr=0.2)  # for this parameter alone
        """
        return list(self._params)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Each replica's optimizer; empty if the store updates."""
        return list(self._update.optimizers)

    @property
    def learning_rate(self) -> float:
        """The optimizer's ``lr``. Setting it counts for every key of the store, or every parameter group.

        Raises:
            OptimizerError: set to something else than a finite number of at least 0.

        >>> import torch, tensorkv
        >>> trainer = Trainer(torch.nn.Linear(2, 1), tensorkv.create(), lr=0.1)
        >>> trainer.learning_rate /= 10
        >>> trainer.learning_rate
        0.01
        """
        return self._update.learning_rate

    @learning_rate.setter
    def learning_rate(self, lr: float) -> None:
        if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 <= lr < math.inf:
            raise OptimizerError(f"learning_rate is {show(lr)}; expected a finite number of at least 0")
        self._update.learning_rate = lr

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the trained weights, the optimizer's numbers and its state.

        Returns:
            Plain tensors, numbers and str in dicts, under the parameters' names without prefix;
            ``torch.load(weights_only=True)`` reads what ``torch.save`` made of it.

        Limits: frozen parameters and buffers are in ``model.state_dict()``. If the store updates, all workers of
        ``dist_sync`` call this together.

        >>> import torch, tensorkv
        >>> trainer = Trainer(torch.nn.Linear(2, 1), tensorkv.create(), "adam", lr=0.1)
        >>> sorted(trainer.state_dict())
        ['optimizer', 'overrides', 'state', 'update_on_store', 'weights']
        """
        state: dict[str, Any] = {"update_on_store": self._update.on_store, **self._update.state()}
        for part in _BY_KEY:
            state[part] = {key.removeprefix(self._prefix): each for key, each in state[part].items()}
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; training that continues from it gives the same bits.

        Args:
            state_dict: of a trainer with the same parameter names, shapes, dtypes and optimizer; its
                prefix, number of replicas and devices may differ.

        Raises:
            CheckpointError: not such a state, or one of other parameters or of another optimizer; nothing has changed.

        Limits: if the store updates, the versions of the trainer's keys start at 0 again, and the optimizer's
        numbers count for the whole store. With several workers all call this together, and rank 0's state counts.
        """
        if not isinstance(state_dict, Mapping) or state_dict.get("update_on_store") is not self._update.on_store:
            raise CheckpointError(
                f"load_state_dict: not the state of a Trainer with update_on_store={self._update.on_store}"
            )
        state: dict[str, Any] = {part: state_dict.get(part) for part in (*_BY_KEY, "optimizer")}
        for part, held in state.items():
            if not isinstance(held, Mapping):
                raise CheckpointError(f"load_state_dict: {part} is {show(held)}; expected a mapping")
        for part in _BY_KEY:
            state[part] = {f"{self._prefix}{name}": each for name, each in state[part].items()}
        _check_weights(self._params, state["weights"], state["overrides"])
        self._update.load(state)

    def __repr__(self) -> str:
        count = len(next(iter(self._params.values())))
        where = "" if self._update.on_store else ", update_on_store=False"
        return f"Trainer({len(self._params)} keys, {count} replica{'' if count == 1 else 's'}{where})"


def _replicas(given: Any) -> list[nn.Module]:
    replicas = list(given) if isinstance(given, list | tuple) else [given]
    if not replicas:
        raise ArgumentError("Trainer: got an empty list; expected an nn.Module or a list of replicas")
    for index, replica in enumerate(replicas):
        if not isinstance(replica, nn.Module):
            raise ArgumentError(f"Trainer: replica {index} is {show(replica)}; expected an nn.Module")
    return replicas


def _parameters_by_key(replicas: list[nn.Module], prefix: str) -> Params:
    """Return the trained parameter of every replica, by key; raise if replicas differ."""
    first, *others = [dict(replica.named_parameters()) for replica in replicas]
    seen = {id(param) for param in first.values()}
    for index, other in enumerate(others, start=1):
        for name in [*first, *other]:
            if name not in first or name not in other:
                has, lacks = (0, index) if name in first else (index, 0)
                raise ArgumentError(
                    f"Trainer: replica {has} has a parameter {quote(name)}, replica {lacks} does not; "
                    "make replicas with copy.deepcopy"
                )
            if id(other[name]) in seen:
                raise ArgumentError(
                    f"Trainer: {quote(name)} of replica {index} is the parameter of another replica; "
                    "make replicas with copy.deepcopy"
                )
            if _describe(other[name]) != _describe(first[name]):
                raise ValueMismatchError(
                    f"Trainer: {quote(name)} is {_describe(other[name])} in replica {index}, "
                    f"in replica 0 it is {_describe(first[name])}"
                )
        seen.update(map(id, other.values()))
    trained = [name for name, param in first.items() if param.requires_grad]
    if not trained:
        raise ArgumentError("Trainer: no parameter requires a gradient; there is nothing to train")
    for name in trained:
        if nn.parameter.is_lazy(first[name]):
            raise ArgumentError(f"Trainer: {quote(name)} has no shape yet; run the lazy module once first")
    return {prefix + name: [first[name], *(other[name] for other in others)] for name in trained}


def _describe(param: nn.Parameter) -> str:
    shape = "without shape" if nn.parameter.is_lazy(param) else str(tuple(param.shape))
    return f"{interop.dtype_name(param.dtype)} {shape}, {'trained' if param.requires_grad else 'frozen'}"


def _check_weights(params: Params, weights: dict[str, Any], overrides: dict[str, Any]) -> None:
    for key in [*params, *weights, *overrides]:
        if key not in weights or key not in params:
            where = "this trainer" if key in params else "the state"
            raise CheckpointError(f"load_state_dict: only {where} has a parameter for the key {quote(key)}")
        weight, param = weights[key], params[key][0]
        if not isinstance(weight, torch.Tensor) or weight.shape != param.shape or weight.dtype is not param.dtype:
            came = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, torch.Tensor) else repr(weight)
            raise CheckpointError(
                f"load_state_dict: the weight of {quote(key)} is {came}, expected {param.dtype} {tuple(param.shape)}"
            )
