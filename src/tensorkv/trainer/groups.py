"""Parameters of replicas by name, and parameter groups as callers write them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tensorkv.arrays import interop
from tensorkv.arrays.keytable import select
from tensorkv.arrays.trees import plain_name
from tensorkv.errors import ArgumentError, ValueMismatchError, quote, show, suggestion
from tensorkv.shard.optimizers import HOW, OF_STORE

# The parameter of every replica, by key or by name.
Params = dict[str, list[nn.Parameter]]


@dataclass
class Group:
    """A parameter group.

    Args:
        keys: of its parameters.
        options: what else it has: hyperparameters, and whatever schedulers keep in it.
    """

    keys: list[str]
    options: dict[str, Any]


def parameters(replicas: Sequence[nn.Module]) -> Params:
    """Return every parameter of each replica, by name.

    Raises:
        ArgumentError, ValueMismatchError: replicas whose parameters differ, or that share one.
    """
    first, *others = [{plain_name(name): param for name, param in replica.named_parameters()} for replica in replicas]
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
    return {name: [first[name], *(other[name] for other in others)] for name in first}


def trained(params: Params) -> Params:
    """Return the parameters that require a gradient.

    Raises:
        ArgumentError: one has no shape yet.
    """
    found = {name: replicas for name, replicas in params.items() if replicas[0].requires_grad}
    for name, replicas in found.items():
        if nn.parameter.is_lazy(replicas[0]):
            raise ArgumentError(f"Trainer: {quote(name)} has no shape yet; run the lazy module once first")
    return found


def _describe(param: nn.Parameter) -> str:
    shape = "without shape" if nn.parameter.is_lazy(param) else str(tuple(param.shape))
    return f"{interop.dtype_name(param.dtype)} {shape}, {'trained' if param.requires_grad else 'frozen'}"


def groups_of(given: Any, params: Params, prefix: str) -> list[Group]:
    """Return parameter groups of all trained parameters.

    Args:
        given: what a ``torch.optim.Optimizer`` takes as params: parameters, or dicts with these as ``"params"``. In
            place of parameters, their names, patterns of names and functions of a name.
        params: of the model, by name.
        prefix: of the keys.

    Raises:
        ArgumentError: not such groups, or a trained parameter that is in none or in two of them.
        KeyNotFoundError: a pattern that matches no name.
    """
    if isinstance(given, torch.Tensor | Mapping | set | frozenset) or not isinstance(given, Iterable):
        raise ArgumentError(f"Trainer: param_groups is {show(given)}; expected a list of dicts, or of parameters")
    listed = list(given)
    if not isinstance(next(iter(listed), None), dict):
        listed = [{"params": listed}]
    groups: list[Group] = []
    for each in listed:
        groups.append(group_of("Trainer", each, params, prefix, groups))
    named = {key for group in groups for key in group.keys}
    for name in trained(params):
        if prefix + name not in named:
            raise ArgumentError(
                f"Trainer: {quote(name)} requires a gradient and is in no parameter group; add it to one, or freeze it "
                "with requires_grad_(False)"
            )
    return groups


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a parameter group has beside its parameters."""
    return {word: option for word, option in group.items() if word not in ("params", "param_names")}


def group_of(verb: str, given: Any, params: Params, prefix: str, others: Sequence[Group]) -> Group:
    """Return one parameter group; ``others`` are those that stand before it."""
    if not isinstance(given, dict) or "params" not in given:
        raise ArgumentError(
            f'{verb}: a parameter group is {show(given)}; expected a dict such as {{"params": [...], "lr": 0.1}}'
        )
    chosen, taken = _names(verb, given["params"], params), {key for group in others for key in group.keys}
    # As for torch.optim: frozen parameters may be in a group, and have no gradient.
    keys = [prefix + name for name in chosen if params[name][0].requires_grad]
    for key in keys:
        if key in taken:
            raise ArgumentError(f"{verb}: {quote(key.removeprefix(prefix))} is in two parameter groups")
    return Group(keys, options_of(given))


def _names(verb: str, chosen: Any, params: Params) -> list[str]:
    """Return the names that the ``"params"`` of a group choose."""
    if isinstance(chosen, set | frozenset):
        raise ArgumentError(f"{verb}: the params of a group are a set, which has no order; give a list")
    if isinstance(chosen, str | torch.Tensor) or not isinstance(chosen, Iterable):
        chosen = [chosen]
    name_of = {id(param): name for name, replicas in params.items() for param in replicas}
    wanted: list[Any] = []
    for each in chosen:
        if isinstance(each, tuple) and len(each) == 2 and isinstance(each[1], torch.Tensor):
            each = each[1]  # of named_parameters()
        if isinstance(each, torch.Tensor):
            if id(each) not in name_of:
                raise ArgumentError(
                    f"{verb}: a parameter group has {show(each)}, which is not a parameter of the model"
                )
            wanted.append(name_of[id(each)])
        else:
            wanted.append(each)
    names = [str(name) for name in select(f"{verb}: params", wanted, lambda: list(params))]
    for name in names:
        if name not in params:
            raise ArgumentError(f"{verb}: the model has no parameter {quote(name)}{suggestion(name, params)}")
    return names


def check_options(name: str, known: Iterable[str], options: Mapping[str, Any]) -> None:
    """Raise ArgumentError for an option of a group that holds for the whole store, or is a misspelled hyperparameter.

    torch.optim keeps what it does not know in a group, and so does a Trainer: some schedulers want it.
    """
    known = list(known)
    for word in options.keys() - HOW:
        if word in OF_STORE:
            raise ArgumentError(f"Trainer: {word} holds for all parameters; give it to the Trainer, not to a group")
        if word not in known and (near := suggestion(word, known)):
            raise ArgumentError(f"Trainer: a parameter group has {quote(word)}{near}; {name} has {', '.join(known)}")
