"""StoreOptimizer: what steps in a Trainer, as PyTorch's schedulers, scalers and frameworks know optimizers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import nn

from tensorkv.arrays.arguments import Key, plain_number
from tensorkv.errors import ArgumentError, CheckpointError, OptimizerError, naming, show
from tensorkv.store import KVStore

from . import embedding
from .buffers import Buffers
from .gradients import Gradients, cannot_agree
from .groups import Group, Params, group_of, options_of, parameters
from .overlap import Overlap
from .updates import StoreUpdate, WorkerUpdate, collective


class StoreOptimizer(torch.optim.Optimizer):
    """The optimizer of a Trainer: pushes gradients and pulls the results into the replicas.

    ``Trainer.optimizer`` is one. It is a ``torch.optim.Optimizer``, so learning-rate schedulers, ``GradScaler`` and
    training frameworks take it. Its ``param_groups`` show the hyperparameters that are in force in the store. What is
    written into them and differs reaches the store with the next step, ``state_dict`` or ``KVStore.save``.
    With ``update_on_store=False`` they show those of the replicas' own optimizers.

    Each group has the parameters of all replicas: of the first, then of the others. After ``backward`` the first group
    also has a parameter for each gradient of a table, of which ``grad`` may be changed in place.

    Args:
        kv: the store.
        replicas: modules with equal parameters.
        prefix: of the keys.
        params: the trained parameters of every replica, by key; ``add_param_group`` adds to it.
        update: applies the step, in the store or in the replicas.
        overlaps: whether gradients are pushed during backward.
        unused: as of ``Trainer``.
        buffers: None where each replica keeps its own.

    >>> import torch, tensorkv
    >>> model = torch.nn.Linear(2, 1)
    >>> trainer = tensorkv.Trainer(model, tensorkv.create(), "sgd", lr=0.5)
    >>> scheduler = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, gamma=0.5)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> trainer.optimizer.step()
    >>> scheduler.step()
    >>> trainer.learning_rate
    0.25
    """

    # GradScaler then calls ``step`` whether it has found Inf or not, so that workers can agree on what they do.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        kv: KVStore,
        replicas: Sequence[nn.Module],
        prefix: str,
        params: Params,
        update: StoreUpdate | WorkerUpdate,
        *,
        overlaps: bool,
        unused: str,
        buffers: Buffers | None,
    ) -> None:
        self._kv, self._replicas, self._prefix = kv, replicas, prefix
        self._params, self._update = params, update
        numbers = self._seen = update.read()
        self._groups = [self._shown(*pair) for pair in zip(update.groups, numbers, strict=True)]
        self._unused = unused
        self._collect(overlaps=overlaps)
        self._buffers = buffers
        kv._attach(self)
        # Torch's constructor would add groups, and import torch's compiler for that. This is how it unpickles.
        super().__setstate__({"defaults": dict(update.defaults)})

    def _collect(self, *, overlaps: bool) -> None:
        """Get ready to collect the gradients of the present parameters and tables."""
        self._tables_of = [
            embedding.layers_of([replica]) if self._update.on_store else [] for replica in self._replicas
        ]
        self._tables = list(dict.fromkeys(layer for layers in self._tables_of for layer in layers))
        self._update.tables = embedding.tables_of(self._tables, self._kv)
        self._gradients = Gradients(self._kv, self._replicas, self._params, self._unused)
        self._overlap: Overlap | None = None
        if overlaps:
            self._overlap = Overlap(self._kv, self._params, self._gradients, self._update.parts, self._begin_pushes)

    def _begin_pushes(self) -> None:
        """Get ready to push gradients in buckets."""
        self.flush()
        self._update.check_buckets()

    def _shown(self, group: Group, numbers: Mapping[str, Any]) -> dict[str, Any]:
        """Return a group as torch has it."""
        replicas = zip(*(self._params[key] for key in group.keys), strict=True)
        return {"params": [param for replica in replicas for param in replica], **group.options, **numbers}

    # ------------------------------------------------------------ numbers

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The parameter groups, as ``torch.optim`` has them, with the hyperparameters that are in force."""
        self._read()
        if self._tables:
            # What unscales or clips gradients finds them through the parameters of groups.
            params = self._groups[0]["params"]
            del params[len(self._update.groups[0].keys) * len(self._replicas) :]
            params += embedding.parameters(self._tables)
        return self._groups

    def _read(self) -> None:
        """Take over what has changed in the store since the last time."""
        now = self._update.read()
        for group, seen, numbers in zip(self._groups, self._seen, now, strict=True):
            group.update({word: number for word, number in numbers.items() if seen.get(word) != number})
        self._seen = now

    def _changes(self) -> list[dict[str, Any]]:
        """Return, for each group, the hyperparameters that were written into it and are not in force yet."""
        changes = []
        for group, seen in zip(self._groups, self._seen, strict=True):
            # Most are the very objects that were read.
            numbers = {word: plain_number(group[word]) for word, number in seen.items() if group[word] is not number}
            changes.append({word: number for word, number in numbers.items() if number != seen[word]})
        return changes

    def _of_all(self, changes: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the numbers among some changes that all groups have now, and the tables, too."""
        alike = {}
        for word in (word for change in changes for word in change):
            first, *others = [plain_number(group[word]) for group in self._groups]
            if all(other == first for other in others):
                alike[word] = first
        return alike

    @collective("Trainer.step")
    def flush(self) -> None:
        """Put hyperparameters that were written into ``param_groups`` in force now, rather than with the next step.

        Raises:
            OptimizerError: a number is out of range; none has changed.
            WorkerMismatchError: of ``dist_sync``: workers have set different hyperparameters.
        """
        if not any(self._changes()):
            return
        self._read()
        changes = self._changes()
        if any(changes):
            with naming("Trainer"):
                self._update.write(changes, self._of_all(changes))
            self._seen = self._update.read()
            for group, numbers in zip(self._groups, self._seen, strict=True):
                group.update(numbers)

    def replace_pending(self, words: Collection[str] | None, keys: Collection[Key] | None) -> None:
        """Give up hyperparameters that are not in force yet, after others were set in the store.

        Args:
            words: their names; None stands for all.
            keys: of which they were set. A group counts if all of its keys are among them; None stands for all keys.
        """
        if self._update.on_store:
            self.drop_pending(words, keys)

    def drop_pending(self, words: Collection[str] | None = None, keys: Collection[Key] | None = None) -> None:
        """Give up hyperparameters that were written into ``param_groups`` and are not in force yet."""
        chosen = None if keys is None else set(keys)
        # A group that is being added is not shown yet.
        for group, shown, seen in zip(self._update.groups, self._groups, self._seen, strict=False):
            if chosen is None or chosen.issuperset(group.keys):
                shown.update({word: number for word, number in seen.items() if words is None or word in words})

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of all groups at once."""
        self._update.set_everywhere(lr)
        self.drop_pending({"lr"})
        self._read()

    @collective("Trainer.add_param_group")
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose parameters may be new to the Trainer: of frozen layers that are to be trained now.

        ``Embedding`` layers that were added to the model since the Trainer was created take part from now on.

        Args:
            param_group: a dict with ``"params"``, which are parameters of the model, their names or patterns of names,
                and hyperparameters. All workers of a store add the same group.

        Raises:
            ArgumentError: parameters of another model, or that are in a group already; with ``overlap=True`` a call
                between ``backward`` and ``step``.
            KeyExistsError: the store has a key of such a name.
            OptimizerError: the optimizer cannot step a parameter or a table.
        """
        if self._overlap is not None and self._overlap.has_pushed:
            raise ArgumentError(
                "add_param_group: backward has pushed gradients of the next step, which overlap=True allows; "
                "add groups after step() or trainer.zero_grad()"
            )
        with naming("add_param_group"):
            named = parameters(self._replicas)
            group = group_of("add_param_group", param_group, named, self._prefix, self._update.groups)
            self._update.check_values((), embedding.tables_of(embedding.layers_of(self._replicas), self._kv))
        created = {key: named[key.removeprefix(self._prefix)] for key in group.keys}
        self._params.update(created)
        try:
            self._update.add(group, list(created))
        except BaseException:
            for key in created:
                del self._params[key]
            raise
        now = self._update.read()
        self._groups.append(self._shown(group, now[-1]))
        self._seen.append(now[-1])
        if self._overlap is not None:
            self._overlap.close()
        self._collect(overlaps=self._overlap is not None)

    # ------------------------------------------------------------ the step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Push each parameter's gradients, summed over replicas, and update every replica.

        Args:
            closure: recomputes the gradients and returns the loss.

        Returns:
            The loss, None without a closure.

        Raises:
            TensorKVError: as ``Trainer.step``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            with self._kv._engine.collective("Trainer.step"), self._unscaled() as steps:
                if steps:
                    self._push_and_pull()
                if self._buffers is not None:
                    self._buffers.synchronise()
            if self._overlap is not None:
                self._overlap.begin()
        except BaseException:
            # GradScaler takes them away after a step alone.
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise
        return loss

    def _push_and_pull(self) -> None:
        embedding.check(self._tables)
        pushed = None
        if self._overlap is not None:
            pushed = self._overlap.finish()
        else:
            self.flush()
        with embedding.taken(self._tables_of, self._kv) as rows:
            self._update.step(self._gradients.all(), rows, pushed)
        embedding.step(self._tables_of, pushed=self._kv)

    @contextmanager
    def _unscaled(self) -> Iterator[bool]:
        """Do what a GradScaler that calls ``step`` asks for; tell the block whether to step.

        It gives ``found_inf``, and ``grad_scale`` if gradients are still scaled. Every worker divides by its own scale.
        If the block raises, gradients are scaled again, since a step that is repeated divides them again.
        """
        found_inf: torch.Tensor | None = getattr(self, "found_inf", None)
        if found_inf is None:
            yield True
            return
        if self._overlap is not None:
            self._overlap.begin()
            raise OptimizerError(
                "Trainer: a GradScaler needs overlap=False, since gradients are unscaled after they are computed"
            )
        told = self._kv._gather("Trainer.step", bytes([bool(found_inf)]))
        if cannot_agree(self._kv, told):
            raise OptimizerError(
                "Trainer: a GradScaler needs workers that can tell each other which steps they leave out, as those of "
                '"dist_sync", or workers that do not wait for each other; autocast to bfloat16 needs no GradScaler'
            )
        if any(map(any, told)):
            for layer in self._tables:
                layer.zero_grad()
            yield False
            return
        scale: torch.Tensor | None = getattr(self, "grad_scale", None)
        if scale is None:
            yield True
            return
        factor = scale.double().item()
        try:
            self._kv._engine.protect(self._scale, 1 / factor)
            yield True
        except BaseException:
            self._kv._engine.protect(self._scale, factor)
            raise

    def _scale(self, factor: float) -> None:
        """Multiply the gradients that a step pushes."""
        for replicas in self._params.values():
            for param in replicas:
                if param.grad is not None:
                    param.grad.mul_(factor)
        embedding.scale(self._tables, factor)

    def no_sync(self) -> AbstractContextManager[None]:
        """Return a block in which backward adds to the gradients and pushes nothing, as ``Trainer.no_sync``."""
        return nullcontext() if self._overlap is None else self._overlap.accumulate()

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
        for layer in self._tables:
            layer.zero_grad(set_to_none)
        if self._overlap is not None:
            # Backward may have raised when it had computed some gradients, or a push within it.
            self._overlap.begin()

    # ------------------------------------------------------------ state

    @property
    def state(self) -> defaultdict[torch.Tensor, Any]:  # type: ignore[override]
        """A copy of the optimizer's state, by parameter of the first replica.

        All workers of ``dist_sync`` ask for it together.
        """
        found: defaultdict[torch.Tensor, Any] = defaultdict(dict)
        for key, own in self._update.optimizer_state().items():
            if own:
                found[self._params[key][0]] = own
        return found

    @collective("Trainer.state_dict")
    def state_dict(self) -> dict[str, Any]:
        """Return copies of the hyperparameters and the state, in the form of ``torch.optim``: without the weights.

        All workers of ``dist_sync`` call this together.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self.flush()
        index = {key: number for number, key in enumerate(self._keys())}
        packed: dict[str, Any] = {
            "state": {index[key]: own for key, own in self._update.optimizer_state().items() if own},
            "param_groups": [
                {**shown, **self._update.written, "params": [index[key] for key in group.keys]}
                for group, shown in zip(self._update.groups, self.param_groups, strict=True)
            ],
        }
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            packed = post_hook(self, packed) or packed
        return packed

    @collective("Trainer.load_state_dict")
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned here, or in an optimizer of ``torch.optim`` with the same groups.

        The weights stay. With several workers all call this together.

        Raises:
            CheckpointError: not such a state, or one of other groups or of another optimizer; nothing has changed.
        """
        given = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            given = hook(self, given) or given
        mine, loaded = self._update.groups, _loaded_groups(given)
        counts, expected = [len(group["params"]) for group in loaded], [len(group.keys) for group in mine]
        if counts != expected:
            raise CheckpointError(
                f"load_state_dict: the state has parameter groups of {counts} parameters; expected {expected}"
            )
        key_of = dict(zip((number for group in loaded for number in group["params"]), self._keys(), strict=True))
        state = {key_of[number]: _tensors(own) for number, own in given["state"].items() if number in key_of}
        groups = [Group(group.keys, options_of(other)) for group, other in zip(mine, loaded, strict=True)]
        self._update.load_optimizer_state(state, groups)
        self._seen = self._update.read()
        for shown, group, numbers in zip(self._groups, groups, self._seen, strict=True):
            shown.update({**group.options, **numbers})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _keys(self) -> list[str]:
        return [key for group in self._update.groups for key in group.keys]

    def __reduce__(self) -> NoReturn:
        raise TypeError("a StoreOptimizer cannot be pickled or copied; use state_dict() and load_state_dict()")


def _loaded_groups(state: Any) -> list[dict[str, Any]]:
    """Return the groups of a state dict, or raise CheckpointError if it has not the form of one."""
    if not isinstance(state, dict) or not isinstance(state.get("state"), dict):
        raise CheckpointError(f"load_state_dict: got {show(state)}; expected what state_dict() returns")
    groups = state.get("param_groups")
    if not isinstance(groups, list):
        raise CheckpointError(f"load_state_dict: param_groups is {show(groups)}; expected a list of dicts")
    for group in groups:
        numbers = group.get("params") if isinstance(group, dict) else None
        if not isinstance(numbers, list) or not all(isinstance(number, int) for number in numbers):
            raise CheckpointError(f"load_state_dict: a group is {show(group)}; expected a dict with a list of params")
    return groups


def _tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a parameter without what torch.optim only has room for."""
    if not isinstance(state, Mapping):
        raise CheckpointError(f"load_state_dict: the state of a parameter is {show(state)}; expected a dict")
    return {name: each for name, each in state.items() if each is not None}
