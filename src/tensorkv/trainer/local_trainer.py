"""LocalTrainer: many steps of a worker's own optimizer between two steps of one in the store."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tensorkv.arrays.arguments import check_int
from tensorkv.errors import ArgumentError, KeyNotFoundError, KeyTypeError, OptimizerError, naming, quote, show
from tensorkv.shard import optimizers
from tensorkv.store import KVStore

from .groups import parameters, trained
from .updates import broadcast, check_rule, check_values


class LocalTrainer:
    """Train a module with DiLoCo: workers train by themselves, and seldom take a common step.

    Each worker makes ``every`` steps of its inner optimizer. Then it pushes the outer gradient of each parameter, the
    common value before these steps minus its own. The store takes the mean over workers and steps the outer optimizer
    with it, and all workers go on from the new common values. So workers send parameters once in ``every`` steps. The
    method and the defaults of the outer optimizer are those of Douillard et al., "DiLoCo: Distributed Low-Communication
    Training of Language Models", 2023 (https://arxiv.org/abs/2311.08105), Algorithm 1.

    With ``lr=1`` and no momentum, ``"sgd"`` would make the common parameters the mean of the local ones. Then the
    workers push these, and the store takes their mean itself, which is exact: federated averaging (McMahan et al.,
    2017).

    Args:
        model: whose trained parameters are common; its buffers stay this worker's own.
        kv: a store with str keys, created with ``reduce="mean"`` if it has several workers in lock step. In mode
            ``async`` of ``dist_async`` the outer step is made with each worker's gradient by itself.
        inner: the worker's optimizer of these parameters, which keeps its state from one outer step to the next.
        every: how many inner steps come before an outer step.
        outer: the name or class of an optimizer, as ``KVStore.set_optimizer`` takes it.
        prefix: put before the name of each parameter, which makes its key.
        **hyperparameters: of the outer optimizer. For ``"sgd"`` the defaults are ``lr=0.7``, ``momentum=0.9`` and
            ``nesterov=True``.

    Raises:
        ArgumentError: not a module or an optimizer, nothing to train, ``inner`` without a parameter of the model,
            ``every`` below 1, or a store that would take the sum over workers.
        KeyExistsError: the store has a key of this name.
        OptimizerError: an unknown outer optimizer or hyperparameter, one that cannot step a parameter, or the store has
            another optimizer.

    All workers create it together, and step as often: one with fewer batches calls ``kv.leave()`` after its last step,
    and the others go on with the mean of those that are there.

    >>> import torch, tensorkv
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    >>> trainer = LocalTrainer(model, tensorkv.create(), inner, every=2)
    >>> for _ in range(4):
    ...     inner.zero_grad()
    ...     model(torch.ones(1, 2)).square().sum().backward()
    ...     trainer.step()
    False
    True
    False
    True
    """

    def __init__(
        self,
        model: nn.Module,
        kv: KVStore,
        inner: torch.optim.Optimizer,
        *,
        every: int,
        outer: Any = "sgd",
        prefix: str = "",
        **hyperparameters: Any,
    ) -> None:
        if not isinstance(kv, KVStore):
            raise ArgumentError(f"LocalTrainer: kv is {show(kv)}; expected a KVStore, from tensorkv.create()")
        with kv._engine.collective("LocalTrainer"):
            _check(model, inner, prefix)
            every = check_int("LocalTrainer: every", every, 1)
            if kv.num_workers > 1 and kv._engine.joins_workers == "sum":
                raise ArgumentError(
                    'LocalTrainer: the store takes sums over workers; create it with reduce="mean", since the outer '
                    "step takes the mean of what workers have learned"
                )
            self._kv, self._every, self._inner = kv, every, inner
            with naming("LocalTrainer"):
                found = trained(parameters([model]))
            if not found:
                raise ArgumentError("LocalTrainer: no parameter requires a gradient; there is nothing to train")
            stepped = {id(param) for group in inner.param_groups for param in group["params"]}
            if not any(id(own[0]) in stepped for own in found.values()):
                raise ArgumentError(
                    "LocalTrainer: inner has no parameter of the model; create it with model.parameters()"
                )
            self._params = {prefix + name: own[0] for name, own in found.items()}
            if outer == "sgd":
                hyperparameters = _with_defaults(hyperparameters)
            averages = outer == "sgd" and hyperparameters == {"lr": 1, "momentum": 0, "nesterov": False}
            self._averages = averages and kv._engine.joins_workers != "alone"
            if not self._averages:
                with naming("LocalTrainer"):
                    spec = optimizers.spec(outer, hyperparameters)
                    check_values(spec, self._params)
                    check_rule(kv, spec)
            elif not kv._engine.assigns:
                raise OptimizerError("LocalTrainer: the store has an update rule, and parameters are to be averaged")
            broadcast(kv, {key: [param] for key, param in self._params.items()})
            # Setting an equal optimizer again would reset the hyperparameters of single keys.
            if not self._averages:
                kv._start_optimizer(spec)
        self._common = {key: param.detach().clone() for key, param in self._params.items()}
        self.steps = 0
        """Inner steps that were made."""

    def step(self) -> bool:
        """Make an inner step, and an outer step after each ``every`` of them; call it after ``backward``.

        Returns:
            Whether an outer step was made.

        Raises:
            TensorKVError: as ``KVStore.pushpull``; the inner step was made.
        """
        self._inner.step()
        self.steps += 1
        if self.steps % self._every:
            return False
        self.synchronize()
        return True

    @torch.no_grad()
    def synchronize(self) -> None:
        """Make an outer step now, as after the last batch; all workers in lock step do it together.

        Raises:
            TensorKVError: as ``KVStore.pushpull``.
        """
        keys, own = list(self._params), [param.detach() for param in self._params.values()]
        common = self._common.values()
        given = own if self._averages else [theirs - mine for theirs, mine in zip(common, own, strict=True)]
        self._kv.pushpull(keys, given, out=own)
        torch._foreach_copy_(list(common), own)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the common parameters from the store, as after ``kv.load``.

        Raises:
            KeyNotFoundError: the checkpoint that was loaded lacks a parameter.
        """
        own = [param.detach() for param in self._params.values()]
        try:
            self._kv.pull(list(self._params), out=own)
        except (KeyNotFoundError, KeyTypeError) as error:
            key = next((key for key in self._params if key not in self._kv), "")
            raise KeyNotFoundError(f"refresh: the store has no parameter {quote(key)} of this module") from error
        torch._foreach_copy_(list(self._common.values()), own)


def _check(model: Any, inner: Any, prefix: Any) -> None:
    """Raise ArgumentError if an argument of a LocalTrainer is not what it has to be."""
    for name, given, kind, what in (
        ("model", model, nn.Module, "an nn.Module"),
        ("inner", inner, torch.optim.Optimizer, "an optimizer of torch"),
        ("prefix", prefix, str, "a str"),
    ):
        if not isinstance(given, kind):
            raise ArgumentError(f"LocalTrainer: {name} is {show(given)}; expected {what}")


def _with_defaults(hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """Return hyperparameters of sgd with the paper's defaults; there is no Nesterov step without momentum."""
    found = {"lr": 0.7, "momentum": 0.9, **hyperparameters}
    return {"nesterov": bool(found["momentum"]), **found}
