"""Embedding and EmbeddingBag: tables of a store as layers, which pull the rows of a batch and push their gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional

from tensorkv.arrays import interop
from tensorkv.arrays.arguments import check_int, plain_number
from tensorkv.arrays.rows import Rows, merge
from tensorkv.errors import (
    ArgumentError,
    ArrayTypeError,
    KeyExistsError,
    OptimizerError,
    TensorKVError,
    ValueMismatchError,
    naming,
    quote,
    show,
)
from tensorkv.store import KVStore

# The numbers of ``init``.
_NUMBERS = ("mean", "std", "a", "b", "seed")


class TableLayer(nn.Module):
    """What both layers have in common."""

    def __init__(
        self,
        kv: KVStore,
        key: str | int,
        num_embeddings: int,
        embedding_dim: int,
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        init: Any = "normal",
        **numbers: Any,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(kv, KVStore):
            raise ArgumentError(f"{name}: kv is {show(kv)}; expected a KVStore, from tensorkv.create()")
        num_embeddings = check_int(f"{name}: num_embeddings", num_embeddings, 1)
        embedding_dim = check_int(f"{name}: embedding_dim", embedding_dim, 1)
        if dtype not in interop.FLOATS:
            raise ArgumentError(f"{name}: dtype is {show(dtype)}; expected a floating-point torch.dtype")
        self.kv, self.key, self.dtype = kv, key, dtype
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        with naming(name):
            self.padding_idx = _check_padding(padding_idx, num_embeddings)
        # The sum of what backward has computed since the last step. A list, as copies of nn.DataParallel add to it.
        self._gradients: list[Rows] = []
        self._is_trained = True
        self._create(init, numbers)

    def _create(self, init: Any, numbers: dict[str, Any]) -> None:
        """Create the table if the store does not have it; raise if it has another one."""
        name, key, kv = type(self).__name__, self.key, self.kv
        expected = (self.num_embeddings, self.embedding_dim), interop.dtype_name(self.dtype)
        for word in numbers:
            if word not in _NUMBERS:
                raise ArgumentError(
                    f"{name}: got an unexpected argument {word!r}; expected padding_idx, dtype, init, or a number of "
                    f"init: {', '.join(_NUMBERS)}"
                )
        try:
            rows = Rows(*_no_rows(self.embedding_dim, self.dtype), self.num_embeddings, init=init, **numbers)
        except TensorKVError as error:
            raise type(error)(f"{name}: {error}") from None
        with naming(name):
            if key not in kv:
                # Another process may create it meanwhile.
                with suppress(KeyExistsError):
                    kv.init(key, rows)
            info = kv.info(key)
            if (info.shape, info.dtype) != expected:
                raise ValueMismatchError(
                    f"{quote(key)} has shape {info.shape} and dtype {info.dtype} in the store; expected {expected[0]} "
                    f"and {expected[1]}, or give another key"
                )

    def _pull(self, ids: Any) -> tuple[torch.Tensor, torch.Tensor, int | None]:
        """Return rows, the place of each id in them, and the place of the padding row if it is there."""
        name = type(self).__name__
        if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32):
            raise ArrayTypeError(f"{name}({quote(self.key)}): got {show(ids)}; expected a tensor of int64 or int32 ids")
        unique, places = torch.unique(ids, return_inverse=True)
        with torch.no_grad():
            pulled = self.kv.row_sparse_pull(self.key, row_ids=unique)
            # In float32 at least, so that the gradients of repeated ids are added before they are rounded.
            rows = interop.take(pulled.values).to(ids.device, interop.accumulator(self.dtype))
            found = None
            if self.padding_idx is not None and bool((at := unique == self.padding_idx).any()):
                found = int(at.nonzero())
                # Not in place: the arrays of some libraries cannot be written.
                rows = rows.index_fill(0, at.nonzero()[:, 0], 0)
        if torch.is_grad_enabled() and self._is_trained:
            rows.requires_grad_()
            rows.register_post_accumulate_grad_hook(self._keep(unique, found))  # type: ignore[no-untyped-call]
        return rows, places, found

    def _keep(self, ids: torch.Tensor, padding: int | None) -> Any:
        # Not the rows themselves: those of a forward pass without a backward pass are to be freed.
        gradients = self._gradients

        def hook(rows: torch.Tensor) -> None:
            grad, rows.grad = rows.grad, None
            kept = slice(None) if padding is None else torch.arange(len(ids), device=ids.device) != padding
            _add(gradients, Rows(ids[kept].long(), grad.detach()[kept], self.num_embeddings))  # type: ignore[union-attr]

        return hook

    def step(self) -> None:
        """Push the sum of the gradients of all backward passes since the last step: one update of the rows they used.

        Without any, no rows are pushed, which counts as an update all the same: workers that push together have to
        make the same calls.

        Raises:
            OptimizerError: the store has no optimizer: gradients would replace rows, or reach an updater.
            TensorKVError: as ``KVStore.push``; the gradients are kept.
        """
        step([[self]])

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze the table with False: later passes compute no gradients of it.

        ``requires_grad_`` of a model that has this layer does not, since PyTorch freezes parameters there.
        """
        self._is_trained = requires_grad
        return super().requires_grad_(requires_grad)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients since the last step.

        ``zero_grad`` of a model that has this layer does not: PyTorch clears the gradients of parameters there. Call
        ``Trainer.zero_grad``, or this for each layer.
        """
        super().zero_grad(set_to_none)
        self._gradients.clear()

    # A store cannot be copied: a replica shares the table, and has gradients of its own.

    def __copy__(self) -> Self:
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__, _gradients=[])
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = memo[id(self)] = type(self).__new__(type(self))
        memo[id(self.kv)] = self.kv
        memo[id(self._gradients)] = []
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{quote(self.key)}, {self.num_embeddings}, {self.embedding_dim}{padding}"


class Embedding(TableLayer):
    """A table of embeddings in a store, as ``torch.nn.Embedding`` of which a process holds only a batch's rows.

    ``forward`` pulls the rows of its ids; ``step`` pushes the gradients of all backward passes since the last step, and
    the store's optimizer updates those rows. A ``Trainer`` calls ``step`` for the layers of its model.

    Args:
        kv: the store; give it an optimizer with ``set_optimizer``.
        key: of the table. One that the store has is used as it is; else it is created. Workers of a store create the
            layer together, and rank 0's ``init`` is used.
        num_embeddings: rows of the table.
        embedding_dim: elements of a row.
        padding_idx: an id whose vector is zero and which is never updated.
        dtype: of the table and of the vectors: float32, float64, float16 or bfloat16.
        init: how rows start, as for ``Rows``: ``"normal"``, ``"uniform"`` or a number.
        **numbers: of ``init``: ``mean``, ``std``, ``a``, ``b``, ``seed``.

    Raises:
        ArgumentError: an argument is invalid.
        ValueMismatchError: the store has the key with another shape or dtype.

    Limits: the rows are in the store and its checkpoints, not in ``parameters()`` or ``state_dict()``. Copies that
    ``copy.deepcopy`` makes share the table.

    >>> import torch, tensorkv
    >>> kv = tensorkv.create()
    >>> items = tensorkv.Embedding(kv, "items", 1_000_000_000, 4, std=0.01, seed=7)
    >>> kv.set_optimizer("adagrad", lr=0.1)
    >>> vectors = items(torch.tensor([[3, 999_999_999], [3, 0]]))
    >>> vectors.shape
    torch.Size([2, 2, 4])
    >>> vectors.sum().backward()
    >>> items.step()
    >>> kv.info("items").nbytes  # three rows of four float32
    48
    """

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the vectors of ids.

        Args:
            ids: int64 or int32, of any shape.

        Returns:
            A tensor of shape ``(*ids.shape, embedding_dim)`` on the device of ``ids``.

        Raises:
            ArrayTypeError: not such a tensor.
            ValueMismatchError: an id is out of range.
            TensorKVError: as ``KVStore.row_sparse_pull``.
        """
        rows, places, _ = self._pull(ids)
        if rows.is_cpu:
            # The same, with a gradient that takes a third of the time; on CUDA that would be added in no fixed order.
            vectors = rows.index_select(0, places.reshape(-1)).reshape(*places.shape, rows.shape[1])
        else:
            vectors = functional.embedding(places, rows)
        return vectors.to(self.dtype)


class EmbeddingBag(TableLayer):
    """Sums, means or maxima of bags of embeddings in a store, as ``torch.nn.EmbeddingBag``.

    Args:
        kv, key, num_embeddings, embedding_dim, padding_idx, dtype, init, **numbers: as for ``Embedding``; ids that are
            ``padding_idx`` are left out of their bags.
        mode: ``"mean"``, ``"sum"`` or ``"max"``.

    >>> import torch, tensorkv
    >>> kv = tensorkv.create()
    >>> words = tensorkv.EmbeddingBag(kv, "words", 1000, 2, mode="sum", init=0.5)
    >>> words(torch.tensor([4, 2, 4]), offsets=torch.tensor([0, 1])).tolist()
    [[0.5, 0.5], [1.0, 1.0]]
    """

    def __init__(self, *args: Any, mode: str = "mean", **options: Any) -> None:
        if mode not in ("mean", "sum", "max"):
            raise ArgumentError(f'EmbeddingBag: mode is {show(mode)}; expected "mean", "sum" or "max"')
        super().__init__(*args, **options)
        self.mode = mode

    def forward(
        self,
        ids: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return one vector for each bag, of shape ``(bags, embedding_dim)``.

        Args:
            ids: int64 or int32: of shape ``(bags, n)``, or ``(n,)`` with offsets.
            offsets: where each bag begins in one-dimensional ids.
            per_sample_weights: factors on the vectors, of the shape of ``ids`` (mode ``"sum"`` only).

        Raises:
            TensorKVError: as ``Embedding.forward``.
            ValueError: shapes that ``torch.nn.functional.embedding_bag`` refuses.
        """
        rows, places, padding = self._pull(ids)
        weights = None if per_sample_weights is None else per_sample_weights.to(rows.dtype)
        found = functional.embedding_bag(
            places, rows, offsets, mode=self.mode, per_sample_weights=weights, padding_idx=padding
        )
        return found.to(self.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode!r}"


def layers_of(modules: Iterable[nn.Module]) -> list[TableLayer]:
    """Return the layers of modules whose tables are in a store, each once."""
    return list({each: None for module in modules for each in module.modules() if isinstance(each, TableLayer)})


def tables_of(layers: Iterable[TableLayer], kv: KVStore) -> list[str | int]:
    """Return the keys in one store of the tables of layers."""
    return list(dict.fromkeys(layer.key for layer in layers if layer.kv is kv))


def parameters(layers: Iterable[TableLayer]) -> list[nn.Parameter]:
    """Return parameters whose ``grad`` is what layers are going to push: to scale or clip it in place."""
    found = []
    for layer in layers:
        for rows in layer._gradients:
            param = nn.Parameter(rows.values.detach())
            param.grad = param.detach()
            found.append(param)
    return found


def scale(layers: Iterable[TableLayer], factor: float) -> None:
    """Multiply the gradients that layers are going to push."""
    for layer in layers:
        for rows in layer._gradients:
            rows.values.mul_(factor)


def check(layers: Iterable[TableLayer]) -> None:
    """Raise OptimizerError if the store of a layer has no optimizer."""
    for kv, key in {layer.kv: layer.key for layer in layers}.items():
        if kv._engine.has_optimizer:
            continue
        # Servers are asked where this process knows of none. Another worker may set one meanwhile: what is read second
        # has it then.
        assigns = kv._engine.assigns
        if kv.optimizer is None:
            lacks, has = "no optimizer, and gradients would replace rows", "an updater, and tables need an optimizer"
            reason = lacks if assigns else has
            raise OptimizerError(f"{quote(key)}: the store has {reason}; call kv.set_optimizer first")


def step(replicas: Sequence[Sequence[TableLayer]], pushed: KVStore | None = None) -> None:
    """Push the gradients of layers to their stores, those of one store in one call.

    Args:
        replicas: the layers of each, as for ``taken``.
        pushed: a store that has got its gradients.

    Raises:
        OptimizerError: a store has no optimizer.
        TensorKVError: as ``KVStore.push``; the gradients that were not pushed are kept.
    """
    every = [layer for layers in replicas for layer in layers if layer.kv is not pushed]
    check(every)
    for kv in dict.fromkeys(layer.kv for layer in every):
        with taken(replicas, kv) as gradients:
            kv.push(list(gradients), list(gradients.values()))


@contextmanager
def taken(replicas: Sequence[Sequence[TableLayer]], kv: KVStore) -> Iterator[dict[str | int, list[Rows]]]:
    """Take the gradients of the tables in a store for a block that pushes them; if it raises, layers keep them.

    Args:
        replicas: the layers of each. Those of one replica that have one table make one part, the sum of their
            gradients, as tied parameters do.
        kv: the store.
    """
    tables: dict[str | int, dict[int, list[TableLayer]]] = {}
    for number, layers in enumerate(replicas):
        for layer in layers:
            if layer.kv is kv:
                tables.setdefault(layer.key, {}).setdefault(number, []).append(layer)
    own: list[tuple[TableLayer, Rows]] = []
    try:
        # Before the push, during which other threads may compute more.
        yield {key: [_take_part(same, own) for same in table.values()] for key, table in tables.items()}
    except BaseException:
        for layer, rows in own:
            _add(layer._gradients, rows)
        raise


def _take_part(layers: list[TableLayer], taken: list[tuple[TableLayer, Rows]]) -> Rows:
    """Take away the sum of the gradients of layers of one table, no rows if there are none; note what was taken."""
    own = [(layer, rows) for layer in layers if (rows := _take(layer._gradients)) is not None]
    taken += own
    if own:
        return merge([rows for _, rows in own], may_share=True)
    first = layers[0]
    return Rows(*_no_rows(first.embedding_dim, interop.accumulator(first.dtype)), first.num_embeddings)


def _add(gradients: list[Rows], rows: Rows) -> None:
    """Add rows to the sum of gradients that a list has, which is empty if there are none."""
    before = _take(gradients)
    gradients.append(rows if before is None else merge([before, rows]))


def _take(gradients: list[Rows]) -> Rows | None:
    """Take the sum of gradients out of a list, None if there are none."""
    found = []
    # Of threads that take at once, pop gives each gradient to one.
    with suppress(IndexError):
        while True:
            found.append(gradients.pop())
    return merge(found[::-1], may_share=True) if found else None


def _no_rows(columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(0, dtype=torch.int64, device="cpu"), torch.empty((0, columns), dtype=dtype, device="cpu")


def _check_padding(padding_idx: Any, rows: int) -> int | None:
    """Return an id that may count from the end, as one that does not."""
    if padding_idx is None:
        return None
    found = plain_number(padding_idx)
    if type(found) is not int or not -rows <= found < rows:
        raise ArgumentError(f"padding_idx is {show(padding_idx)}; expected an int in [-{rows}, {rows})")
    return found % rows
