"""The update in a Trainer's step: by the store's optimizer, or by optimizers of the worker."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from tensorkv.arrays.arguments import Key, plain_number
from tensorkv.arrays.keytable import KeyTable
from tensorkv.arrays.rows import Rows
from tensorkv.errors import ArgumentError, CheckpointError, OptimizerError, naming, quote, show
from tensorkv.shard import optimizers
from tensorkv.shard.entry import Entry
from tensorkv.shard.nonfinite import clip
from tensorkv.shard.norm import PushResult, SquareSum
from tensorkv.shard.optimizers import OptimizerSpec
from tensorkv.shard.rules import StepOptimizer
from tensorkv.storage.manifest import Contents
from tensorkv.store import KVStore

from .gradients import Grads
from .groups import Group, Params, check_options, options_of

P = ParamSpec("P")
R = TypeVar("R")
Groups = list[Group]
# The gradients that a step pushes to tables, by key.
TableGradients = Mapping[Key, list[Rows]]


def collective(verb: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a method of an object with a store a call that all workers make together, as are those of the store."""

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        @wraps(method)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            owner: Any = args[0]
            with owner._kv._engine.collective(verb):
                return method(*args, **kwargs)

        return call

    return decorate


def broadcast(kv: KVStore, params: Params) -> None:
    """Create the store's keys from the weights of the first replica, and copy them to every replica."""
    kv.broadcast(list(params), [replicas[0].detach() for replicas in params.values()], out=list(params.values()))


def check_rule(kv: KVStore, spec: OptimizerSpec) -> None:
    """Raise OptimizerError if a store has another update rule than an optimizer that is wanted."""
    # Another worker may set the optimizer meanwhile, on servers: what is read second has it then.
    if kv._engine.assigns:
        return
    held, wanted = kv.optimizer, {"name": spec.name, **spec.to_numbers()}
    if held is None:
        raise OptimizerError("the store has an updater; call set_updater(None) first, or use another store")
    words = [word for word in {**held, **wanted} if held.get(word) != wanted.get(word)]
    if words:
        differ = ", ".join(f"{word} {held.get(word)!r} (here {wanted.get(word)!r})" for word in words)
        raise OptimizerError(
            f"the store's optimizer has {differ}; a store has one optimizer: give the same, or use another store"
        )


def check_values(spec: OptimizerSpec, params: Mapping[str, nn.Parameter], tables: Sequence[Key] = ()) -> None:
    """Raise OptimizerError if an optimizer cannot step parameters, or the tables of layers."""
    optimizer = optimizers.Optimizer(spec)
    for key, param in params.items():
        optimizer.check(key, param.detach(), by_rows=False)
    if tables and spec.name not in optimizers.ROWWISE:
        raise OptimizerError(
            f"{spec.name} needs whole gradients, and those of the table {quote(tables[0])} are Rows; use another "
            "optimizer, or a torch.nn.Embedding"
        )


class StoreUpdate:
    """The store's optimizer steps; replicas pull the weights."""

    on_store = True
    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    # Keys of the tables in the store that the Trainer steps. They are in no group.
    tables: Sequence[Key] = ()

    def __init__(
        self,
        kv: KVStore,
        optimizer: Any,
        numbers: dict[str, Any],
        params: Params,
        groups: Groups,
        *,
        overlaps: bool,
    ) -> None:
        self._kv, self._params = kv, params
        spec = self._spec = optimizers.spec(optimizer, numbers)
        self.defaults = dict(spec.numbers)
        # What torch writes into a group beside the numbers; by it Adam goes on from AdamW's.
        self.written = {"decoupled_weight_decay": True} if spec.name == "adamw" else {}
        self.last_push = PushResult()
        """What was found out about the gradients of the last step."""
        if overlaps:
            self._check_buckets(spec)
        self.groups = groups or [Group(list(params), {})]
        for group in self.groups:
            _check(spec, group.options)
        with naming("Trainer"):
            check_rule(kv, spec)

    def check_values(self, keys: Sequence[str], tables: Sequence[Key]) -> None:
        """Raise OptimizerError if the optimizer cannot step some parameters and tables."""
        check_values(self._spec, {key: self._params[key][0] for key in keys}, tables)

    def start(self) -> None:
        """Set the update rule, after the keys were created."""
        # Setting an equal optimizer again would reset the hyperparameters of single keys.
        own = [self._own(group) for group in self.groups]
        if not self._kv._start_optimizer(replace(self._spec, overrides=self._overrides(self._spec, own))):
            self.write(own)

    def add(self, group: Group, created: Sequence[str]) -> None:
        """Take in one more group, of which these keys are new; their parameters are in ``params`` already."""
        _check(self._held("add_param_group"), group.options)
        self.check_values(created, ())
        broadcast(self._kv, {key: self._params[key] for key in created})
        self.groups.append(group)
        numbers = {**self.defaults, **self._own(group)}
        held = self.read()[-1]
        changed = {word: number for word, number in numbers.items() if number != held[word]}
        self.write([{} for _ in self.groups[:-1]] + [changed])

    def check_buckets(self) -> None:
        """Raise if gradients that are pushed in buckets cannot be stepped one bucket after the other."""
        self._check_buckets(self._held("step"))

    def _check_buckets(self, spec: OptimizerSpec) -> None:
        word = "max_grad_norm" if spec.max_grad_norm is not None else 'nonfinite="skip_step"'
        if spec.max_grad_norm is not None or self._kv._engine.skips_steps:
            raise ArgumentError(
                f"Trainer: {word} decides by the gradients of a whole step, and with overlap=True the store steps with "
                "some before it has the others; use overlap=False, or update_on_store=False"
            )

    def step(self, grads: Grads, rows: TableGradients, pushed: PushResult | None) -> None:
        """Push the gradients of some keys and tables in one call, and take the weights to every replica.

        Args:
            grads: of parameters.
            rows: the gradients of tables, by key.
            pushed: what was found out about ``grads``, if they are pushed already.
        """
        outs: list[Any] = [self._params[key] for key in grads]
        if pushed is None:
            self._kv.pushpull([*grads, *rows], [*self.parts(grads), *rows.values()], out=[*outs, *([] for _ in rows)])
            self.last_push = self._kv.last_push
            return
        # Before the rows, which a step that is repeated after an error of this pull pushes again.
        self._kv.pull(list(grads), out=outs)
        if rows:
            self._kv.push(list(rows), list(rows.values()))
            pushed = PushResult(pushed.found_inf or self._kv.last_push.found_inf)
        self.last_push = pushed

    @staticmethod
    def parts(grads: Grads) -> list[list[torch.Tensor]]:
        """Return what is pushed of some gradients, for each key."""
        return list(grads.values())

    # ------------------------------------------------------------ numbers

    def read(self) -> list[dict[str, Any]]:
        """Return each group's numbers in the store, which are not to be changed.

        A number that was set for single keys of a group is not the group's.
        """
        spec = self._held("param_groups")
        return [_numbers_of(spec, group.keys) for group in self.groups]

    def write(self, changes: Sequence[dict[str, Any]], of_all: Mapping[str, Any] | None = None) -> None:
        """Set numbers in the store, in one call; with servers, those of rank 0 count.

        Args:
            changes: of each group.
            of_all: those that all groups have then, for the tables (None: those that are in all changes).
        """
        spec = self._held("param_groups")
        for change, numbers in zip(changes, self.read(), strict=True):
            _check(spec, {**numbers, **change})
        if not self._kv._engine.decides:
            return
        everywhere, of_groups, of_tables = self._split(changes)
        if of_all is not None:
            of_tables = {word: number for word, number in of_all.items() if word not in everywhere}
        wanted: list[tuple[dict[str, Any], Sequence[Key] | None]] = [(everywhere, None)]
        wanted += [(own, group.keys) for group, own in zip(self.groups, of_groups, strict=True) if group.keys]
        wanted += [(of_tables, self.tables)] if self.tables else []
        calls = [(numbers, keys) for numbers, keys in wanted if numbers]
        if len(calls) == 1:
            self._kv.set_hyperparameters(calls[0][1], **calls[0][0])
        elif calls:
            rule = StepOptimizer(spec)
            for numbers, keys in calls:
                rule = rule.changed(numbers, keys)
            self._kv._change_optimizer(rule.optimizer.spec)

    def _split(self, changes: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
        """Return the numbers for every key of the store, for each group alone, and for the tables alone.

        A number that all groups get is for the tables too.
        """
        first, *others = changes
        alike = {word: n for word, n in first.items() if all(word in own and own[word] == n for own in others)}
        if sum(len(group.keys) for group in self.groups) + len(self.tables) < len(self._kv):
            return {}, list(changes), alike
        return alike, [{word: n for word, n in own.items() if word not in alike} for own in changes], {}

    def set_everywhere(self, lr: float) -> None:
        """Set the learning rate of every key of the store; with servers, that of rank 0 counts."""
        if self._kv._engine.decides:
            self._kv.set_hyperparameters(lr=lr)

    def _own(self, group: Group) -> dict[str, Any]:
        """Return the hyperparameters among a group's options."""
        return {word: plain_number(number) for word, number in group.options.items() if word in self.defaults}

    def _overrides(self, spec: OptimizerSpec, numbers: Sequence[dict[str, Any]]) -> dict[Key, dict[str, Any]]:
        """Return, from the numbers of each group, those of single keys that are not those of all keys."""
        found: dict[Key, dict[str, Any]] = {}
        for group, own in zip(self.groups, numbers, strict=True):
            checked = optimizers.check_numbers(spec.name, own).items()
            differs = {word: number for word, number in checked if number != spec.numbers[word]}
            found.update(dict.fromkeys(group.keys, differs) if differs else {})
        return found

    def _held(self, verb: str) -> OptimizerSpec:
        spec = self._kv._engine.optimizer
        if spec is None:
            raise self._lacks_optimizer(verb)
        return spec

    # ------------------------------------------------------------ state

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """Return copies of the optimizer's state, by key."""
        state: dict[str, dict[str, Any]] = self.state()["state"]
        return state

    def load_optimizer_state(self, state: dict[str, dict[str, Any]], groups: Groups) -> None:
        """Replace the numbers of all groups, and the optimizer's state; the weights stay.

        Args:
            state: by key, tensors by name.
            groups: with all their options.
        """
        spec, keys = self._held("load_state_dict"), list(self._params)
        with _as_checkpoint_errors():
            for group, own in zip(groups, self.groups, strict=True):
                optimizers.check_written_by(spec.name, group.options, own.options)
            everywhere, of_groups, of_tables = self._split([self._own(group) for group in groups])
            spec = replace(spec, numbers={**spec.numbers, **everywhere})
            overrides = self._overrides(spec, of_groups)
        weights = [torch.empty_like(replicas[0], requires_grad=False) for replicas in self._params.values()]
        self._kv.pull(keys, out=weights)
        self.load(
            {
                "weights": dict(zip(keys, weights, strict=True)),
                "state": state,
                "overrides": overrides,
                "optimizer": _without_overrides(spec),
            }
        )
        if of_tables and self.tables and self._kv._engine.decides:
            self._kv.set_hyperparameters(self.tables, **of_tables)

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
            "optimizer": _without_overrides(spec),
        }

    def load(self, state: dict[str, Any]) -> None:
        # One change puts all of it in force, on every worker and server.
        self._kv._load_state_dict(self._contents(state))
        with torch.no_grad():
            self._kv.pull(list(self._params), out=list(self._params.values()))

    def _contents(self, state: dict[str, Any]) -> Contents:
        spec = self._held("load_state_dict")
        others = {key: own for key, own in spec.overrides.items() if key not in self._params}
        with _as_checkpoint_errors():
            overrides = [[key, dict(own)] for key, own in {**others, **state["overrides"]}.items()]
            loaded = OptimizerSpec.from_json({**state["optimizer"], "overrides": overrides})
            rule = StepOptimizer(loaded)
            states = {
                key: {name: _tensor(each) for name, each in state["state"].get(key, {}).items()} for key in self._params
            }
        if loaded.name != spec.name:
            raise CheckpointError(f"load_state_dict: the state is of {loaded.name}, the store has {spec.name}")
        entries = []
        for key in self._params:
            weight = _contiguous(state["weights"][key])
            entries.append(Entry(key, self._kv._engine.spec("load_state_dict", key), weight, 0, states[key]))
        return Contents("keys", entries, rule)

    @staticmethod
    def _lacks_optimizer(verb: str) -> OptimizerError:
        return OptimizerError(f"{verb}: the store has no optimizer any more; call kv.set_optimizer")


class WorkerUpdate:
    """The store sums; each replica's own optimizer steps."""

    on_store = False
    tables: Sequence[Key] = ()
    written: Mapping[str, Any] = {}

    def __init__(
        self,
        kv: KVStore,
        optimizer: Any,
        numbers: dict[str, Any],
        params: Params,
        groups: Groups,
        *,
        overlaps: bool,
    ) -> None:
        self._kv, self._params = kv, params
        if kv.num_workers > 1 and kv._engine.joins_workers == "alone":
            raise ArgumentError(
                "Trainer: update_on_store=False needs a store that sums over workers, and this one takes each worker's "
                'push by itself; use update_on_store=True, or "dist_sync", or "dist_async" with mode="sync"'
            )
        self._refuse_optimizer()
        self._refuse_sums()
        numbers = dict(numbers)
        if numbers.pop("ema", None) is not None:
            raise ArgumentError(
                "Trainer: ema needs update_on_store=True, which averages in the store; where replicas step their own "
                "optimizers, use torch.optim.swa_utils.AveragedModel"
            )
        own = ("rescale_grad", "clip_gradient", "max_grad_norm")
        self._scaling = optimizers.spec("sgd", {word: numbers.pop(word) for word in own if word in numbers})
        self.last_push = PushResult()
        # None for optimizers that were not given by name, of whose numbers nothing is known.
        self._spec: OptimizerSpec | None = None
        if isinstance(optimizer, str):
            spec = self._spec = optimizers.spec(optimizer, numbers)
            optimizer = getattr(torch.optim, optimizers.CLASSES[spec.name])
            for group in groups:
                _check(spec, group.options)
        # None for optimizers that are not torch's.
        self._name = optimizers.name_of_class(optimizer)
        if not callable(optimizer):
            raise OptimizerError(
                f"Trainer: optimizer is {show(optimizer)}; with update_on_store=False expected a name, "
                "a class, or a function that returns a torch.optim.Optimizer for a list of parameters"
            )
        self.optimizers: list[torch.optim.Optimizer] = []
        for index, replica in enumerate(zip(*params.values(), strict=True)):
            try:
                made = optimizer([self._of(group, index) for group in groups] or list(replica), **numbers)
            except (TypeError, ValueError) as error:
                raise OptimizerError(f"Trainer: the optimizer cannot be created: {error}") from error
            if not isinstance(made, torch.optim.Optimizer) or isinstance(made, torch.optim.LBFGS):
                raise OptimizerError(
                    f"Trainer: optimizer returned {show(made)}; expected a torch.optim.Optimizer "
                    "that steps from gradients alone"
                )
            self.optimizers.append(made)
        key_of = {id(replicas[0]): key for key, replicas in params.items()}
        self.defaults = self.optimizers[0].defaults
        self.groups = [
            Group([key_of[id(param)] for param in group["params"]], options_of(group))
            for group in self.optimizers[0].param_groups
        ]

    def start(self) -> None:
        pass

    def add(self, group: Group, created: Sequence[str]) -> None:
        if self._spec is not None:
            _check(self._spec, group.options)
        count = len(self.groups)
        try:
            for index, each in enumerate(self.optimizers):
                each.add_param_group(self._of(group, index))
            broadcast(self._kv, {key: self._params[key] for key in created})
        except BaseException:
            for each in self.optimizers:
                del each.param_groups[count:]
            raise
        self.groups.append(group)

    def _of(self, group: Group, replica: int) -> dict[str, Any]:
        return {"params": [self._params[key][replica] for key in group.keys], **group.options}

    def check_values(self, keys: Sequence[str], tables: Sequence[Key]) -> None:
        """Do nothing: torch.optim checks its parameters."""

    def check_buckets(self) -> None:
        """Do nothing: sums do not step."""

    def step(self, grads: Grads, rows: TableGradients, pushed: PushResult | None) -> None:
        """Step every replica; there are no tables."""
        self._refuse_optimizer()
        keys = list(grads)
        sums = [[_sum_buffer(p) for p in self._params[key]] for key in keys]
        if pushed is None:
            self._kv.pushpull(keys, self.parts(grads), out=sums)
        else:
            self._kv.pull(keys, out=sums)
        rule, self.last_push = StepOptimizer(self._scaling), pushed or self._kv.last_push
        if self.last_push.found_inf:
            # The store has left sums out, and what was pulled over gradients are those of an earlier step, or weights.
            for param in (param for key in keys for param in self._params[key]):
                param.grad = None
            return
        if rule.clipping is not None:
            squares = sum((SquareSum.of(totals[0], rule.clipping.rescale) for totals in sums), SquareSum())
            scale, self.last_push = clip(squares, rule.clipping, self.last_push.found_inf)
            rule = rule.scaled(scale)
        for key, totals in zip(keys, sums, strict=True):
            sparse = all(grad.is_sparse for grad in grads[key])
            for param, total in zip(self._params[key], totals, strict=True):
                optimizers.scale_gradient(total, rule.optimizer.spec)
                param.grad = total.to_sparse(1) if sparse else total
        for each in self.optimizers:
            each.step()

    @staticmethod
    def parts(grads: Grads) -> list[list[torch.Tensor]]:
        # Sparse gradients are summed as dense ones, since a worker does not know which rows the others push.
        return [[_dense(grad) for grad in own] for own in grads.values()]

    def read(self) -> list[dict[str, Any]]:
        return [options_of(group) for group in self.optimizers[0].param_groups]

    def write(self, changes: Sequence[dict[str, Any]], of_all: Mapping[str, Any] | None = None) -> None:
        if self._spec is not None:
            known = self._spec.numbers
            for change, numbers in zip(changes, self.read(), strict=True):
                optimizers.spec(self._spec.name, {word: {**numbers, **change}[word] for word in known})
        self._kv._agree("set_hyperparameters", changes)
        for each in self.optimizers:
            for group, change in zip(each.param_groups, changes, strict=True):
                group.update(change)

    def set_everywhere(self, lr: float) -> None:
        self.write([{"lr": lr}] * len(self.groups))

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        state = self.optimizers[0].state
        return {key: copy.deepcopy(state[p[0]]) for key, p in self._params.items() if p[0] in state}

    def load_optimizer_state(self, state: dict[str, dict[str, Any]], groups: Groups) -> None:
        keys = [key for group in groups for key in group.keys]
        index = {key: number for number, key in enumerate(keys)}
        packed = {
            "state": {index[key]: own for key, own in state.items()},
            "param_groups": [{**group.options, "params": [index[key] for key in group.keys]} for group in groups],
        }
        self._load(packed)

    def state(self) -> dict[str, Any]:
        weights = {key: replicas[0].detach().clone() for key, replicas in self._params.items()}
        own = copy.deepcopy(self.optimizers[0].state_dict())
        return {"weights": weights, "state": {}, "overrides": {}, "optimizer": own}

    def _load(self, packed: dict[str, Any]) -> None:
        try:
            if self._name is not None:
                # torch counts the groups.
                for group, own in zip(packed["param_groups"], self.optimizers[0].param_groups, strict=False):
                    optimizers.check_written_by(self._name, group, own)
            # A copy, since an optimizer keeps the tensors that it is given.
            for each in self.optimizers:
                each.load_state_dict(copy.deepcopy(packed))
        except (AttributeError, KeyError, OptimizerError, TypeError, ValueError) as error:
            raise CheckpointError(f"load_state_dict: not the state of such an optimizer: {error}") from error

    def load(self, state: dict[str, Any]) -> None:
        self._load(state["optimizer"])
        for key, replicas in self._params.items():
            for param in replicas:
                param.detach().copy_(state["weights"][key])

    def _refuse_optimizer(self) -> None:
        held = self._kv.optimizer
        if held is not None:
            raise OptimizerError(
                f"Trainer: the store has the optimizer {held['name']}, and with update_on_store=False it is to sum "
                "only; use another store, or kv.set_updater(None)"
            )

    def _refuse_sums(self) -> None:
        """Raise ArgumentError if a worker would take sums for weights: one that comes when others have pushed."""
        if self._kv._engine.decides:
            # It creates the keys, or gets a KeyExistsError.
            return
        # Asked once: servers are asked anew for each key that is missing.
        held = set(self._kv.keys())
        keys = [key for key in self._params if key in held]
        pushed = next((key for key, info in zip(keys, self._kv.info(keys), strict=True) if info.version), None)
        if pushed is not None:
            raise ArgumentError(
                f"Trainer: the store holds sums of gradients, not weights, as of {quote(pushed)}, so a worker that "
                "comes late or in place of another cannot start from it; end the store, start all workers and have "
                "each load a state_dict(), or use update_on_store=True"
            )


@contextmanager
def _as_checkpoint_errors() -> Iterator[None]:
    """Raise CheckpointError for what is wrong with a state that is loaded."""
    try:
        yield
    except (AttributeError, OptimizerError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"load_state_dict: {error}") from error


def _dense(grad: torch.Tensor) -> torch.Tensor:
    return grad.to_dense() if grad.is_sparse else grad


def _sum_buffer(param: nn.Parameter) -> torch.Tensor:
    grad = param.grad
    return torch.empty_like(param) if grad is None or grad.is_sparse or 0 in grad.stride() else grad.detach()


def _check(spec: OptimizerSpec, options: Mapping[str, Any]) -> None:
    """Raise if a group cannot have such options."""
    check_options(spec.name, spec.numbers, options)
    optimizers.spec(spec.name, {**spec.numbers, **{w: n for w, n in options.items() if w in spec.numbers}})


def _without_overrides(spec: OptimizerSpec) -> dict[str, Any]:
    return {word: each for word, each in spec.to_json().items() if word != "overrides"}


# Of a key without numbers of its own.
_NONE: dict[str, Any] = {}


def _numbers_of(spec: OptimizerSpec, keys: Sequence[str]) -> dict[str, Any]:
    """Return the numbers of a group of keys: of the first key, but for what only some keys have of their own."""
    if not spec.overrides:
        return spec.numbers
    # Keys that were set together share their dict.
    owns = list({id(own): own for own in (spec.overrides.get(key, _NONE) for key in keys)}.values())
    common = {word: number for word, number in owns[0].items() if all(word in own for own in owns)} if owns else {}
    return {**spec.numbers, **common}


def _tensor(state: Any) -> torch.Tensor:
    """Return a copy of an optimizer's state, which may be a number."""
    if isinstance(state, torch.Tensor):
        return _contiguous(state)
    return torch.tensor(state, dtype=torch.float32, device="cpu")


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy as stores hold values, whatever the layout and device of a model."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
