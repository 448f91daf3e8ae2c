"""Trainer: push the gradients of PyTorch modules to a store, and pull new weights.

This module has the public class and the checks of its arguments; ``updates`` has the step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tensorkv.arrays.arguments import check_flag, plain_number
from tensorkv.arrays.trees import plain_name
from tensorkv.errors import (
    ArgumentError,
    CheckpointError,
    KeyExistsError,
    KeyNotFoundError,
    OptimizerError,
    naming,
    no_attribute,
    quote,
    show,
)
from tensorkv.shard.norm import PushResult
from tensorkv.store import KVStore

from .buffers import Buffers, check_buffers
from .embedding import layers_of, tables_of
from .gradients import check_unused
from .groups import Params, groups_of, parameters, trained
from .optimizer import StoreOptimizer
from .updates import StoreUpdate, WorkerUpdate, broadcast, collective

# The parts of a state dict that are by key; ``overrides`` has the hyperparameters of single keys.
_BY_KEY = ("weights", "state", "overrides")

# Methods of MXNet's gluon.Trainer, and what to use instead.
_FOREIGN_NAMES = {
    "allreduce_grads": "step() sums gradients and steps; for sums alone use kv.pushpull in a store without optimizer",
    "load_states": "use load_state_dict(torch.load(fname))",
    "save_states": "use torch.save(trainer.state_dict(), fname)",
    "update": "use step(); for gradients that are summed already, step an optimizer of torch",
}


class Trainer:
    """Train one module, or replicas of it on several devices, through a store.

    Args:
        model_or_replicas: an ``nn.Module``, or a list of replicas with equal parameters (such as
            ``copy.deepcopy`` makes). All start from the first one's weights.
        kv: a store with str keys. The keys are ``prefix`` + the parameter's name, in the order of
            ``named_parameters()``; tied parameters have one key, frozen ones (``requires_grad=False``) none.
        optimizer: the name or class of an optimizer, as ``KVStore.set_optimizer`` takes it. With
            ``update_on_store=False`` also any function or class that makes a ``torch.optim.Optimizer``
            when called as ``optimizer(params, **hyperparameters)``; each replica gets one.
        param_groups: parameter groups, as a ``torch.optim.Optimizer`` takes them: dicts with ``"params"`` and the
            hyperparameters that differ from those of all. In place of parameters also their names, patterns of names
            such as ``"*.bias"`` (as of ``fnmatch``), and functions of a name. Every trained parameter is in one group.
        prefix: put before each name, so that several models can share a store.
        update_on_store: True: the store updates and replicas pull weights. False: the store only sums,
            replicas pull the sum into ``.grad`` and step their own optimizers. Then the store, and ``kv.save``, have
            sums of gradients and no weights after the first step; ``state_dict`` has them.
        overlap: push each gradient as soon as backward has computed it, so that communication overlaps with
            backward. Call ``step`` after each ``backward`` that is not within ``no_sync``. This helps where ``push``
            does not wait. The first backward only finds the order in which gradients are computed.
        unused: what a step does with a parameter that has no gradient. ``"skip"``: it is not pushed and does not move;
            workers in lock step must have gradients of the same parameters. ``"agree"``: the same if no worker has one,
            otherwise those without push zeros; workers in lock step first tell each other, which costs a message,
            and those of ``dist_async`` with ``mode="sync"`` cannot.
            ``"zero"``: zeros are pushed, so weight decay and momentum move it.
        buffers: what happens to the modules' buffers, such as those of a batch norm. ``"local"``: each replica keeps
            its own. ``"broadcast"``: after each step all replicas and workers have those of rank 0's first replica.
            ``"mean"``: they have the mean over replicas and workers; of integers, those of rank 0's first replica.
        **hyperparameters: such as ``lr=0.1``; also ``rescale_grad`` (factor on the sum, default
            1), ``clip_gradient`` (bound on each element after rescaling), ``max_grad_norm`` (bound on the 2-norm
            of all gradients, over replicas and workers, as with ``torch.nn.utils.clip_grad_norm_``) and ``ema`` (see
            ``pull_ema``).

    Raises:
        ArgumentError: not modules, nothing to train, replicas whose parameters differ in name, or parameter groups that
            do not have every trained parameter once; with ``update_on_store=False``, several workers of
            ``dist_async`` without ``mode="sync"``, whose pushes are not summed, or a worker that comes late or in
            place of another, since the store has no weights for it.
        ValueMismatchError: replicas whose parameters differ in shape or dtype.
        KeyExistsError: the store has a parameter's key; load after this, or give another ``prefix``.
        OptimizerError: unknown optimizer or hyperparameter; an optimizer that cannot step a parameter or a table; or
            the store already has a different optimizer or different hyperparameters: one serves all keys of a store.

    The gradient is the **sum** over replicas and workers. Where each replica's loss is the mean over its
    part of the batch, a store with ``reduce="mean"`` gives the mean over the batch.
    With ``update_on_store=True``, sparse gradients (``nn.Embedding(sparse=True)``) update only their rows. Tables of
    ``tensorkv.Embedding`` layers are stepped with the parameters, and are in ``kv.save``, not in ``state_dict``.

    >>> import torch, tensorkv
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> trainer = Trainer(model, tensorkv.create(), "sgd", lr=0.5)
    >>> before = model.weight.tolist()[0]
    >>> model(torch.tensor([[1.0, 2.0]])).sum().backward()
    >>> _ = trainer.step()
    >>> [round(b - a, 3) for a, b in zip(model.weight.tolist()[0], before)]
    [0.5, 1.0]
    """

    def __init__(
        self,
        model_or_replicas: Any,
        kv: KVStore,
        optimizer: Any = "sgd",
        *,
        param_groups: Any = None,
        prefix: str = "",
        update_on_store: bool = True,
        overlap: bool = False,
        unused: str = "skip",
        buffers: str = "local",
        **hyperparameters: Any,
    ) -> None:
        if not isinstance(kv, KVStore):
            raise ArgumentError(f"Trainer: kv is {show(kv)}; expected a KVStore, from tensorkv.create()")
        with kv._engine.collective("Trainer"):
            if not isinstance(prefix, str):
                raise ArgumentError(f"Trainer: prefix is {show(prefix)}; expected a str")
            self._kv = kv
            self._prefix = prefix
            replicas = _replicas(model_or_replicas)
            self._num_replicas = len(replicas)
            named = parameters(replicas)
            self._params: Params = {prefix + name: each for name, each in trained(named).items()}
            layers = layers_of(replicas)
            if not self._params and not layers:
                raise ArgumentError("Trainer: no parameter requires a gradient; there is nothing to train")
            for layer in layers if hyperparameters.get("max_grad_norm") is not None else ():
                if layer.kv is not kv:
                    raise ArgumentError(
                        f"Trainer: the table {quote(layer.key)} is in another store, and its gradient would not be in "
                        "the norm that max_grad_norm bounds; create its layer with the store of the Trainer"
                    )
            if update_on_store is False and layers:
                raise ArgumentError("Trainer: a store updates the tables of Embedding layers; use update_on_store=True")
            groups = [] if param_groups is None else groups_of(param_groups, named, prefix)
            self._update: StoreUpdate | WorkerUpdate
            with naming("Trainer"):
                kind = StoreUpdate if check_flag("update_on_store", update_on_store) else WorkerUpdate
                overlaps = check_flag("overlap", overlap)
                check_unused(kv, unused, overlaps=overlaps)
                kept = None if check_buffers(buffers) == "local" else Buffers(kv, replicas, buffers)
                self._update = kind(kv, optimizer, hyperparameters, self._params, groups, overlaps=overlaps)
                self._update.tables = tables_of(layers, kv)
                self._update.check_values(list(self._params), self._update.tables)
            try:
                broadcast(kv, self._params)
            except KeyExistsError as error:
                load = "kv.load(...) and trainer.refresh()" if update_on_store else "trainer.load_state_dict(...)"
                raise KeyExistsError(
                    f"Trainer: {error}. To resume from a checkpoint, create the Trainer first, then {load}; for a "
                    "second model, give a prefix"
                ) from None
            self._update.start()
            if kept is not None:
                kept.start()
            self.optimizer = StoreOptimizer(
                kv, replicas, prefix, self._params, self._update, overlaps=overlaps, unused=unused, buffers=kept
            )
        """The ``torch.optim.Optimizer`` to give to schedulers, ``GradScaler`` and training frameworks."""

    if not TYPE_CHECKING:  # so that type checkers report unknown names

        def __getattr__(self, name: str) -> Any:
            raise no_attribute(self, name, _FOREIGN_NAMES)

    def step(self) -> PushResult:
        """Push each parameter's gradients, summed over replicas, and update every replica.

        Call it after ``backward`` on every replica. A parameter without a gradient in any replica is not
        pushed and does not move, unless ``unused`` says otherwise; where only some replicas have one, the others count
        as nothing. Gradients stay until ``zero_grad``. With ``update_on_store=False``, ``.grad`` then has the sum, and
        is None if the step was left out for NaN or Inf.

        Returns:
            ``found_inf``: whether a gradient had NaN or Inf (None: the store was created with ``nonfinite="pass"`` and
            has no ``max_grad_norm``; with ``"skip_step"``, and with ``update_on_store=False`` also with ``"skip"``,
            nothing has moved if so). ``grad_norm``: the norm of all gradients before clipping, None without
            ``max_grad_norm``.

        Raises:
            TensorKVError: as ``KVStore.pushpull``; no parameter has changed, unless it is about a table in another
                store or about ``buffers``, which come after the parameters. With ``update_on_store=False`` what the
                optimizer of a replica raises, after the replicas before it have stepped.
            WorkerMismatchError: with ``unused="skip"``: workers have gradients of different parameters.
        """
        self.optimizer.step()
        return self._update.last_push

    def no_sync(self) -> AbstractContextManager[None]:
        """Return a block in which backward adds to the gradients and pushes nothing, to accumulate over batches.

        Without ``overlap=True`` it changes nothing, since gradients are pushed by ``step`` alone.

        >>> import torch, tensorkv
        >>> model = torch.nn.Linear(2, 1)
        >>> trainer = Trainer(model, tensorkv.create(), lr=0.1, overlap=True)
        >>> with trainer.no_sync():
        ...     model(torch.ones(1, 2)).sum().backward()
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> result = trainer.step()
        """
        return self.optimizer.no_sync()

    def refresh(self) -> None:
        """Pull the weights from the store into every replica, as after ``kv.load``.

        Raises:
            ArgumentError: with ``update_on_store=False``, where the store holds sums of gradients and no weights.
            TensorKVError: as ``KVStore.pull``.
        """
        if not self._update.on_store:
            raise ArgumentError(
                "Trainer.refresh: with update_on_store=False the store holds sums of gradients, not weights; use "
                "state_dict() and load_state_dict()"
            )
        outs = [[param.detach() for param in params] for params in self._params.values()]
        try:
            with torch.no_grad():
                self._kv.pull(list(self._params), out=outs)
        except KeyNotFoundError as error:
            raise KeyNotFoundError(
                f"Trainer.refresh: {error}. A load replaces all keys by those of the checkpoint; load one of this model"
            ) from None

    @collective("Trainer.pull_ema")
    def pull_ema(self, model: nn.Module) -> None:
        """Fill a module with the moving averages of the trained weights, which the store keeps with ``ema=0.999``.

        Args:
            model: with the parameters of the trained one, such as ``copy.deepcopy`` makes; its frozen parameters and
                buffers stay its own.

        Raises:
            ArgumentError: not a module, or one without a trained parameter.
            TensorKVError: as ``KVStore.pull_ema``; no parameter has changed.

        Limits: all workers of ``dist_sync`` call this together; it gathers the whole state, so call it seldom.

        >>> import copy, torch, tensorkv
        >>> model = torch.nn.Linear(2, 1)
        >>> trainer = Trainer(model, tensorkv.create(), lr=0.1, ema=0.999)
        >>> averaged = copy.deepcopy(model)
        >>> trainer.pull_ema(averaged)
        """
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"Trainer.pull_ema: model is {show(model)}; expected an nn.Module")
        params = {self._prefix + plain_name(name): param.detach() for name, param in model.named_parameters()}
        lacking = [key for key in self._params if key not in params]
        if lacking:
            raise ArgumentError(f"Trainer.pull_ema: the model has no parameter for the key {quote(lacking[0])}")
        self._kv.pull_ema(list(self._params), out=[params[key] for key in self._params])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of every replica's trained parameters.

        Args:
            set_to_none: False fills gradients with zeros, which the next ``step`` pushes like any other.
        """
        self.optimizer.zero_grad(set_to_none)

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
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of ``optimizer``, with the hyperparameters that are in force.

        >>> import torch, tensorkv
        >>> groups = [{"params": "weight", "weight_decay": 0.1}, {"params": "bias"}]
        >>> trainer = Trainer(torch.nn.Linear(2, 1), tensorkv.create(), "adamw", lr=0.1, param_groups=groups)
        >>> [group["lr"] for group in trainer.param_groups]
        [0.1, 0.1]
        """
        return self.optimizer.param_groups

    @property
    def learning_rate(self) -> float:
        """The ``lr`` of the first parameter group. Setting it takes effect immediately, for every key of the store.

        In ``dist_async`` with several workers only what rank 0 sets takes effect. With
        ``update_on_store=False`` it takes effect for every group of the replicas' optimizers.

        Raises:
            OptimizerError: set to something else than a finite number of at least 0.

        >>> import torch, tensorkv
        >>> trainer = Trainer(torch.nn.Linear(2, 1), tensorkv.create(), lr=0.1)
        >>> trainer.learning_rate /= 10
        >>> trainer.learning_rate
        0.01
        """
        return float(self.param_groups[0]["lr"])

    @learning_rate.setter
    @collective("Trainer.learning_rate")
    def learning_rate(self, lr: float) -> None:
        rate = plain_number(lr)
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < math.inf:
            raise OptimizerError(f"learning_rate is {show(lr)}; expected a finite number of at least 0")
        self.optimizer.set_learning_rate(rate)

    def set_learning_rate(self, lr: float) -> None:
        """Set ``learning_rate``; the name of MXNet's ``gluon.Trainer``."""
        self.learning_rate = lr

    @collective("Trainer.state_dict")
    def state_dict(self) -> dict[str, Any]:
        """Return copies of the trained weights, the optimizer's hyperparameters and its state.

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
        self.optimizer.flush()
        state: dict[str, Any] = {"update_on_store": self._update.on_store, **self._update.state()}
        for part in _BY_KEY:
            state[part] = {key.removeprefix(self._prefix): each for key, each in state[part].items()}
        return state

    @collective("Trainer.load_state_dict")
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; training that continues from it gives the same bits.

        Args:
            state_dict: of a trainer with the same parameter names, shapes, dtypes and optimizer; its
                prefix, number of replicas and devices may differ.

        Raises:
            CheckpointError: not such a state, or one of other parameters or of another optimizer; nothing has changed.

        Limits: if the store updates, the versions of the trainer's keys start at 0 again, and the optimizer's
        numbers are those of the whole store. With several workers all call this together, and rank 0's state is used;
        with ``update_on_store=False`` each worker loads its own, which have to be the same.
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
        self.optimizer.drop_pending()

    def __repr__(self) -> str:
        count = self._num_replicas
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
