"""Trees: nested containers of arrays as named arrays, and back.

The name of an array is the keys on its path, joined with dots. Where the process has imported JAX, its registry says
what a container is, so dataclasses and modules that are registered as pytrees are trees as well. Without JAX, the
containers are those that JAX knows itself, with the same names in the same order.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from tensorkv.errors import ArgumentError, ArrayTypeError, NonFiniteError, TensorKVError, quote, show
from tensorkv.runtime.recent import Recent

from . import blocks, interop
from .rows import is_rows
from .slices import local_part

Rename = Mapping[str, str] | Callable[[str], str]
"""Names by path, or a function that returns the name of a path."""

# Names of the trees seen last, by structure, prefix and, where keys are not all str, the structure's text.
_names: Recent[tuple[Any, str, str | None], list[str]] = Recent(64)


@dataclass(frozen=True, slots=True)
class Flat:
    """The leaves of a tree.

    Args:
        names: of the leaves; other trees of this structure have the same list, so it must not be changed.
        leaves: in the order of the names.
        structure: equal for trees of equal structure.
        rebuild: makes a tree of this structure from other leaves.
    """

    names: list[str]
    leaves: list[Any]
    structure: Any
    rebuild: Callable[[Sequence[Any]], Any]


def flatten(verb: str, tree: Any, prefix: str, rename: Rename | None = None, *, all_names: bool = False) -> Flat:
    """Return the leaves of a tree with their names.

    Args:
        verb: for messages.
        tree: nested dicts, lists, tuples, NamedTuples and None, or any pytree if JAX was imported. Modules of torch
            are dicts of their parameters and buffers.
        prefix: put before each name, joined with a dot; it may end with that dot.
        rename: other names, by path; or a function that returns the name of a path.
        all_names: give tied tensors of modules inside of the tree all of their names, not the first one alone.

    Raises:
        ArgumentError: two leaves of one name, a leaf without a name, a tree that contains itself, an invalid prefix,
            names that are not str.

    >>> flat = flatten("push", {"layers": [{"w": 1}, {"w": 2, "b": None}]}, "net")
    >>> flat.names, flat.leaves
    (['net.layers.0.w', 'net.layers.1.w'], [1, 2])
    >>> flat.rebuild([3, 4])
    {'layers': [{'w': 3}, {'b': None, 'w': 4}]}
    """
    base = check_prefix(verb, prefix)
    if isinstance(tree, torch.nn.Module):
        tree = state_of(tree)
    if rename is not None:
        return _renamed(verb, flatten(verb, tree, ""), base, rename)
    jax = sys.modules.get("jax")
    try:
        flat = _flatten(verb, tree, base) if jax is None else _flatten_pytree(verb, jax.tree_util, tree, base)
    except (RecursionError, SystemError):  # the latter from JAX's compiled code
        raise ArgumentError(f"{verb}: the tree contains itself, or is nested too deeply") from None
    except (TypeError, ValueError) as error:
        if isinstance(error, TensorKVError):
            raise
        raise ArgumentError(f"{verb}: the tree cannot be flattened: {error}") from error
    if any(issubclass(kind, torch.nn.Module) for kind in set(map(type, flat.leaves))):
        return flatten(verb, _with_states(flat, all_names=all_names), prefix)
    return flat


def _with_states(flat: Flat, *, all_names: bool) -> Any:
    """Return a tree with the states of modules in their place; of tied tensors, also of two modules, the first name."""
    seen: set[Any] = set()

    def state(leaf: Any) -> Any:
        if not isinstance(leaf, torch.nn.Module):
            return leaf
        return module_state(leaf) if all_names else state_of(leaf, seen)

    return flat.rebuild(list(map(state, flat.leaves)))


def flatten_as(dtype: Any, verb: str, tree: Any, prefix: str, rename: Rename | None = None) -> Flat:
    """Return the leaves of a tree, those of floating-point numbers in another dtype (None: in their own).

    In float8_e4m3fn these are two leaves each, values and the scales of their blocks, if they have two axes.

    Args:
        dtype: a dtype of floating-point numbers, or its name.
        verb, tree, prefix, rename: as for ``flatten``.

    Raises:
        ArgumentError: as ``flatten``, or another dtype.
        ArrayTypeError: the library of an array does not have the dtype.

    >>> import numpy as np
    >>> flatten_as("float16", "init_tree", [np.ones(2), np.ones(2, int)], "net").leaves
    [array([1., 1.], dtype=float16), array([1, 1])]
    """
    flat = flatten(verb, tree, prefix, rename)
    if dtype is None:
        return flat
    wanted = interop.take_dtype(verb, dtype, (*interop.FLOATS, blocks.DTYPE))
    if wanted is blocks.DTYPE:
        return _in_blocks(verb, flat)
    return replace(flat, leaves=[_cast(verb, *each, wanted) for each in zip(flat.names, flat.leaves, strict=True)])


def _cast(verb: str, name: str, leaf: Any, dtype: torch.dtype) -> Any:
    if is_rows(leaf):
        return leaf
    tensor = _taken(verb, name, leaf)
    is_other = tensor.is_floating_point() and tensor.dtype is not dtype and tensor.dtype not in interop.FLOAT8
    try:
        return interop.give(tensor.detach().to(dtype), interop.origin(leaf)) if is_other else leaf
    except ArrayTypeError as error:
        raise ArrayTypeError(f"{verb}({quote(name)}): the value {error}") from None


def _taken(verb: str, name: str, leaf: Any) -> torch.Tensor:
    try:
        return interop.take(leaf)
    except ArrayTypeError as error:
        raise ArrayTypeError(f"{verb}({quote(name)}): the value {error}") from None


def _in_blocks(verb: str, flat: Flat) -> Flat:
    names, leaves = [], []
    for name, leaf in zip(flat.names, flat.leaves, strict=True):
        names.append(name)
        tensor = None if is_rows(leaf) else _taken(verb, name, leaf)
        if tensor is None or not tensor.is_floating_point() or tensor.ndim < 2 or tensor.dtype in interop.FLOAT8:
            leaves.append(leaf)
            continue
        try:
            leaves += blocks.quantize_blocks(leaf)
        except NonFiniteError as error:
            raise NonFiniteError(f"{verb}({quote(name)}): {error}") from None
        names.append(name + blocks.SUFFIX)
    return replace(flat, names=check_names(verb, names), leaves=leaves)


def state_of(module: torch.nn.Module, seen: set[Any] | None = None) -> OrderedDict[str, Any]:
    """Return the parameters and buffers of a module that a state_dict has; tied tensors once, by their first name.

    Args:
        module: of torch.
        seen: places of tensors to leave out, to which those of this module are added.

    >>> module = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    >>> module[1].weight = module[0].weight
    >>> list(state_of(module))
    ['0.weight']
    """
    found: OrderedDict[str, Any] = OrderedDict()
    seen = set() if seen is None else seen
    for name, value in module_state(module).items():
        place = place_of(value)
        if place is None or place not in seen:
            found[name] = value
            seen.add(place)
    return found


def module_state(module: torch.nn.Module) -> dict[str, Any]:
    """Return the ``state_dict`` of a module with plain names."""
    return {plain_name(name): value for name, value in module.state_dict().items()}


def plain_name(name: str) -> str:
    """Return the name of a tensor of a module as it is without ``torch.compile``, which wraps modules.

    >>> plain_name("_orig_mod.0.weight"), plain_name("layers.1._orig_mod.bias")
    ('0.weight', 'layers.1.bias')
    """
    return ".".join(word for word in name.split(".") if word != "_orig_mod")


def place_of(array: Any) -> Any:
    """Return what tied tensors have in common: their memory, and how they see it; None for what is tied to nothing."""
    if not isinstance(array, torch.Tensor) or torch.nn.parameter.is_lazy(array) or array.is_meta:
        return None
    with suppress(ArrayTypeError):
        # A DTensor itself has no memory.
        array, _ = local_part(array)
    if array.layout is not torch.strided or not array.numel():
        return None
    return array.device, array.data_ptr(), array.dtype, array.shape, array.stride()


def _renamed(verb: str, flat: Flat, base: str, rename: Rename) -> Flat:
    if callable(rename):
        names = [rename(name) for name in flat.names]
    elif isinstance(rename, Mapping):
        names = [rename.get(name, name) for name in flat.names]
    else:
        raise ArgumentError(f"{verb}: rename is {show(rename)}; expected a mapping from path to name, or a function")
    for path, name in zip(flat.names, names, strict=True):
        if not isinstance(name, str):
            raise ArgumentError(f"{verb}: rename gives {quote(path)} the name {show(name)}; expected a str")
    return replace(
        flat,
        names=check_names(verb, [f"{base}.{name}" if base and name else base or name for name in map(_word, names)]),
    )


def check_prefix(verb: str, prefix: Any) -> str:
    """Return a prefix of names without its last dot.

    Raises:
        ArgumentError: it is not a str.
    """
    if not isinstance(prefix, str):
        raise ArgumentError(f"{verb}: prefix is {show(prefix)}; expected a str")
    return prefix.removesuffix(".")


def flatten_parts(verb: str, trees: Sequence[Any], prefix: str, rename: Rename | None = None) -> tuple[Flat, list[Any]]:
    """Return the first of several trees of one structure, and what a push of its names takes.

    Args:
        verb, prefix, rename: as for ``flatten``.
        trees: at least one.

    Returns:
        The first tree, and its leaves; if there are several trees, a list of parts for each leaf.

    Raises:
        ArgumentError: no tree, trees of different structure, or as ``flatten``.

    >>> flatten_parts("push", [{"w": 1, "b": 2}, {"w": 3, "b": 4}], "")[1]
    [[2, 4], [1, 3]]
    """
    if not trees:
        raise ArgumentError(f"{verb}: got no tree; expected at least one")
    flats = [flatten(verb, tree, prefix, rename) for tree in trees]
    first = flats[0]
    if len(flats) == 1:
        return first, first.leaves
    for index, other in enumerate(flats):
        if other.structure != first.structure:
            lone = sorted(set(first.names) ^ set(other.names))
            where = f"only one has {quote(lone[0])}" if lone else "the types of their containers differ"
            raise ArgumentError(f"{verb}: trees 0 and {index} differ in structure: {where}")
    return first, [list(parts) for parts in zip(*(flat.leaves for flat in flats), strict=True)]


def nest(verb: str, arrays: dict[str, Any], prefix: str) -> Any:
    """Return named arrays as nested dicts, by the parts of their names between dots.

    Args:
        verb: for messages.
        arrays: by names that begin with the prefix.
        prefix: what to leave out of the names, without its last dot.

    Raises:
        ArgumentError: a name that another one continues.

    >>> nest("pull_tree", {"net.layers.0": 1, "net.bias": 2}, "net")
    {'layers': {'0': 1}, 'bias': 2}
    """
    if list(arrays) == [prefix]:
        return arrays[prefix]
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *path, last = (name[len(prefix) + 1 :] if prefix else name).split(".")
        inner = tree
        for key in path:
            inner = inner.setdefault(key, {})
            if type(inner) is not dict:
                break
        if type(inner) is not dict or last in inner or name == prefix:
            raise ArgumentError(f"{verb}: {quote(name)} is an array and part of another name; give like= or into=")
        inner[last] = array
    return tree


def is_below(name: str, prefix: str) -> bool:
    """Return whether a prefix without its last dot is one of a name.

    >>> [is_below(name, "net") for name in ("net.w", "net", "network.w")]
    [True, True, False]
    """
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def check_names(verb: str, names: list[str]) -> list[str]:
    """Return the names of arrays; raise ArgumentError if two are equal."""
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ArgumentError(
            f"{verb}: two leaves of the tree have the path {quote(twice)}; paths are joined with dots, so rename a key"
        )
    if "" in names:
        raise ArgumentError(
            f"{verb}: a leaf of the tree has no name; give a prefix, or a name in place of an empty one. Trees are "
            "made of dicts, lists, tuples and modules, and all else is a leaf"
        )
    return names


def _word(key: Any) -> str:
    """Return a key of a mapping, or an index, as a part of a path; of a str that is an Enum its value."""
    return str.__str__(key) if isinstance(key, str) else str(key)


# ---------------------------------------------------------------- with JAX


def _flatten_pytree(verb: str, tree_util: Any, tree: Any, base: str) -> Flat:
    leaves, structure = tree_util.tree_flatten(tree)
    names = _names.get((structure, base, None))
    if names is None:
        # Structures are equal if their keys are, as 0 and False are.
        text = str(structure)
        names = _names.get((structure, base, text))
    if names is None:
        paths = [path for path, _ in tree_util.tree_flatten_with_path(tree)[0]]
        words = [
            [
                _word(key.key) if isinstance(key, tree_util.DictKey) else tree_util.keystr((key,), simple=True)
                for key in path
            ]
            for path in paths
        ]
        names = check_names(verb, [".".join([base, *path] if base else path) for path in words])
        keys = {type(key.key) for path in paths for key in path if isinstance(key, tree_util.DictKey)}
        if keys <= {str, int}:
            _names.keep((structure, base, text if int in keys else None), names, len(names))
    return Flat(names, leaves, structure, structure.unflatten)


# ---------------------------------------------------------------- without JAX

_LEAF = object()
_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, list, tuple, type(None)})


def _flatten(verb: str, tree: Any, base: str) -> Flat:
    names: list[str] = []
    leaves: list[Any] = []
    # The tree is the only child of a list.
    (structure,) = _walk_all([tree], [base or None], names, leaves)
    return Flat(check_names(verb, names), leaves, structure, lambda given: _rebuild_all([structure], iter(given))[0])


def _walk_all(below: Iterable[Any], paths: Iterable[str | None], names: list[str], leaves: list[Any]) -> list[Any]:
    """Append the leaves of some trees and their names; return the trees' structures, for ``_rebuild_all``."""
    structures = []
    for tree, path in zip(below, paths, strict=True):
        kind = type(tree)
        if kind not in _CONTAINERS and not (isinstance(tree, tuple) and hasattr(kind, "_fields")):
            names.append(path or "")
            leaves.append(tree)
            structures.append(_LEAF)
        elif tree is None:
            structures.append(None)
        else:
            words, inner = _children(tree)
            start = "" if path is None else f"{path}."
            found = _walk_all(
                inner,
                [f"{start}{word if type(word) is str or type(word) is int else _word(word)}" for word in words],
                names,
                leaves,
            )
            structures.append((kind, getattr(tree, "default_factory", None), words, found))
    return structures


def _children(tree: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return the keys of a container, in the order of JAX, and what it has there."""
    kind = type(tree)
    if kind in (list, tuple):
        return range(len(tree)), tree
    if isinstance(tree, tuple):
        return tree._fields, tree  # type: ignore[attr-defined]
    words = list(tree) if kind is OrderedDict else sorted(tree)
    return words, [tree[word] for word in words]


def _rebuild_all(structures: list[Any], leaves: Iterator[Any]) -> list[Any]:
    trees = []
    for structure in structures:
        if structure is _LEAF:
            trees.append(next(leaves))
        elif structure is None:
            trees.append(None)
        else:
            kind, factory, words, inner = structure
            trees.append(_container(kind, factory, words, _rebuild_all(inner, leaves)))
    return trees


def _container(kind: type, factory: Any, words: Sequence[Any], below: list[Any]) -> Any:
    if kind is defaultdict:
        return defaultdict(factory, zip(words, below, strict=True))
    if kind in (dict, OrderedDict):
        return kind(zip(words, below, strict=True))
    return kind(below) if kind in (list, tuple) else kind(*below)
