"""Optimizers by name and hyperparameters, run by torch.optim for the keys of a push alone.

An optimizer is data: a name from the list below and numbers that JSON can carry, so that it can travel
to a server or lie in a checkpoint without anything being unpickled.
"""

from __future__ import annotations

import inspect
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from tensorkv.arrays import interop
from tensorkv.arrays.arguments import Key, plain_number
from tensorkv.arrays.rows import Rows
from tensorkv.errors import OptimizerError, quote, show, suggestion
from tensorkv.runtime import _compat

from . import native
from .fused import AVERAGE, FUSED, Kernel, average_of, move_average, number_in, runs
from .fused import DTYPES as FUSED_DTYPES
from .pool import Pool
from .table import Columns, Table, address_rows, fill_with

if TYPE_CHECKING:
    from .entry import Entry

State = dict[str, torch.Tensor]

# LBFGS calls the model again and SparseAdam takes no dense gradients: they cannot run in a store.
CLASSES: dict[str, str] = {
    name.lower(): name
    for name in [
        "SGD",
        "Adam",
        "AdamW",
        "Adagrad",
        "Adadelta",
        "Adafactor",
        "Adamax",
        "ASGD",
        "Muon",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
    ]
    if hasattr(torch.optim, name)
}
# Those that treat each element alone, and so can update some rows and leave the others. The rest take
# no complex numbers either, and divide by the number of elements.
ROWWISE = frozenset(CLASSES) - {"adafactor", "muon"}
# Of those with a fused kernel here, every version of torch has one for GPUs.
_FUSED_BY_TORCH = FUSED - {"adagrad", "rmsprop"}
HOW = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Arguments of torch.optim that say how a step is computed, which is the store's business and no hyperparameter."""
_NOT_NUMBERS = HOW | {"self", "params"}
_OTHER_WORDS = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "beta1": "betas",
    "beta2": "betas",
    "epsilon": "eps",
    "rho": "alpha",
    "gamma1": "alpha",
    "gamma2": "momentum",
}
# Words of MXNet's optimizers that are no hyperparameters here.
_ELSEWHERE = {
    "lr_scheduler": "set lr with set_hyperparameters, or give Trainer.optimizer to a torch.optim.lr_scheduler",
    "lr_mult": "set lr of single keys with set_hyperparameters",
    "wd_mult": "set weight_decay of single keys with set_hyperparameters",
    "param_idx2name": "keys may be names",
}


OF_STORE = ("rescale_grad", "clip_gradient", "max_grad_norm", "ema")
"""Numbers that hold for every key, and are not torch.optim's."""


@dataclass(slots=True)
class OptimizerSpec:
    """What ``set_optimizer`` was told, as plain data.

    Args:
        name: such as ``"sgd"``.
        numbers: every hyperparameter of the torch.optim class, defaults filled in.
        rescale_grad: factor on the summed gradient, before clipping.
        clip_gradient: bound on each element's absolute value after rescaling (None: no bound).
        max_grad_norm: bound on the norm of all gradients of a push after rescaling (None: no bound).
        ema: the share of a moving average of each value that a step keeps (None: there are no averages).
        overrides: hyperparameters of single keys, set while running. Keys that were set together share a dict, which
            nothing changes.
    """

    name: str
    numbers: dict[str, Any]
    rescale_grad: float = 1.0
    clip_gradient: float | None = None
    max_grad_norm: float | None = None
    ema: float | None = None
    overrides: dict[Key, dict[str, Any]] = field(default_factory=dict)

    def to_numbers(self) -> dict[str, Any]:
        """Return everything that ``spec`` takes as numbers."""
        return {**self.numbers, **{word: getattr(self, word) for word in OF_STORE}}

    def to_json(self) -> dict[str, Any]:
        """Return what ``from_json`` reads; overrides become pairs, since JSON has no int keys."""
        data = {**asdict(self), "overrides": [[key, numbers] for key, numbers in self.overrides.items()]}
        # Among the numbers, where versions before it refuse it, and not without it.
        later = {word: data.pop(word) for word in ("max_grad_norm", "ema")}
        return {**data, "numbers": {**self.numbers, **{w: number for w, number in later.items() if number is not None}}}

    @classmethod
    def from_json(cls, data: Any) -> OptimizerSpec:
        """Check and read what ``to_json`` made.

        Raises:
            OptimizerError: not such data, or names and numbers that ``spec`` refuses.
        """
        if not isinstance(data, dict) or not isinstance(data.get("numbers"), dict):
            raise OptimizerError("the optimizer's description has no hyperparameters")
        made = spec(
            data.get("name"),
            {**data["numbers"], **{word: data.get(word) for word in ("rescale_grad", "clip_gradient")}},
        )
        overrides = data.get("overrides")
        if not isinstance(overrides, list) or any(not isinstance(x, list) or len(x) != 2 for x in overrides):
            raise OptimizerError("the optimizer's overrides: expected a list of pairs")
        shared: dict[str, dict[str, Any]] = {}
        for key, numbers in overrides:
            if type(key) not in (str, int) or not isinstance(numbers, dict):
                raise OptimizerError("an optimizer's override: expected a pair of key and hyperparameters")
            own = check_numbers(made.name, numbers)
            made.overrides[key] = shared.setdefault(repr(own), own)
        return made


def spec(optimizer: Any, numbers: Mapping[str, Any]) -> OptimizerSpec:
    """Check an optimizer's name or class and its numbers.

    Args:
        optimizer: ``"sgd"`` or ``torch.optim.SGD``.
        numbers: hyperparameters by their torch.optim names, and those of ``OF_STORE``.

    Raises:
        OptimizerError: unknown name, unknown number, or a number out of range.

    >>> spec("sgd", {"lr": 0.1, "momentum": 0.9}).numbers["momentum"]
    0.9
    """
    name = _name(optimizer)
    numbers = dict(numbers)
    rescale = plain_number(numbers.pop("rescale_grad", 1.0))
    bounds = {word: plain_number(numbers.pop(word, None)) for word in ("clip_gradient", "max_grad_norm")}
    ema = plain_number(numbers.pop("ema", None))
    if not _is_finite(rescale):
        raise OptimizerError(f"rescale_grad is {show(rescale)}; expected a finite number, such as 1 / batch_size")
    for word, bound in bounds.items():
        if bound is not None and not (_is_finite(bound) and bound > 0):
            raise OptimizerError(f"{word} is {show(bound)}; expected a number above 0, or None for no bound")
    if ema is not None and not (_is_finite(ema) and 0 <= ema < 1):
        raise OptimizerError(f"ema is {show(ema)}; expected a number from 0 to below 1, such as 0.999, or None")
    whole = {**_defaults(name), **check_numbers(name, numbers)}
    initial_state(name, tuple(whole.items()))
    clip, norm, keep = (None if each is None else float(each) for each in (*bounds.values(), ema))
    return OptimizerSpec(name, whole, float(rescale), clip, norm, keep)


def check_numbers(name: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers as plain Python values, or raise OptimizerError.

    Each is checked for itself; ``Optimizer`` checks that they are in range and go together.
    """
    known = _defaults(name)
    plain: dict[str, Any] = {}
    for word, number in numbers.items():
        if word in _ELSEWHERE:
            raise OptimizerError(f"{name} has no {quote(word)}; {_ELSEWHERE[word]}")
        if word in HOW:
            raise OptimizerError(f"{name}: leave {word} out; how a step is computed is no hyperparameter")
        if word not in known:
            near = f' (did you mean "{_OTHER_WORDS[word]}"?)' if _OTHER_WORDS.get(word) in known else ""
            raise OptimizerError(
                f"{name} has no {quote(word)}{near or suggestion(word, known)}; it has {', '.join(known)}"
            )
        try:
            plain[word] = _plain(number, known[word])
        except ValueError as error:
            raise OptimizerError(f"{name}: {word} is {show(number)}; expected {error}") from None
    return plain


@lru_cache(maxsize=1024)
def initial_state(name: str, numbers: tuple[tuple[str, Any], ...]) -> dict[str, float]:
    """Return what the state of an element holds before its first gradient: the state after one of zero.

    Raises:
        OptimizerError: numbers out of range, or that do not go together.
    """
    probe = torch.zeros((2, 1) if name == "muon" else (2,), dtype=torch.float64, device="cpu")
    try:
        with _usual_torch():
            optimizer = _new(name, [probe], dict(numbers))
            probe.grad = torch.zeros_like(probe)
            optimizer.step()
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise OptimizerError(f"{name}: {error}") from None
    state = {word: tensor for word, tensor in optimizer.state[probe].items() if tensor is not None}
    return {word: float(tensor.flatten()[0]) for word, tensor in state.items() if tensor.shape == probe.shape}


def _name(optimizer: Any) -> str:
    if isinstance(optimizer, str) and optimizer.lower() in CLASSES:
        return optimizer.lower()
    if (name := name_of_class(optimizer)) is not None:
        return name
    if isinstance(optimizer, torch.optim.Optimizer):
        what = f"an instance of {type(optimizer).__name__}; give its name and hyperparameters instead"
    elif isinstance(optimizer, type):
        what = f"the class {optimizer.__qualname__}{suggestion(optimizer.__name__.lower(), CLASSES)}"
    else:
        what = f"{show(optimizer)}{suggestion(str(optimizer).lower(), CLASSES)}"
    raise OptimizerError(f"no optimizer for a store: {what}; the names are {', '.join(CLASSES)}")


def name_of_class(optimizer: Any) -> str | None:
    """Return the name of a class of torch.optim; None if this is none of those that a store runs."""
    return next((name for name, kind in CLASSES.items() if optimizer is getattr(torch.optim, kind)), None)


def _defaults(name: str) -> dict[str, Any]:
    parameters = inspect.signature(getattr(torch.optim, CLASSES[name]).__init__).parameters
    return {word: p.default for word, p in parameters.items() if word not in _NOT_NUMBERS}


def _is_finite(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and abs(number) <= sys.float_info.max


def _plain(number: Any, default: Any) -> Any:
    """Return a number as Python's own if it is like the default; else raise ValueError with what is expected."""
    number = plain_number(number)
    if isinstance(default, tuple):
        if not isinstance(number, list | tuple) or len(number) != len(default):
            raise ValueError(f"{len(default)} numbers")
        return tuple(_plain(each, own) for each, own in zip(number, default, strict=True))
    if isinstance(default, bool):
        if not isinstance(number, bool):
            raise ValueError("True or False")
    elif not _is_finite(number) and (default is not None or not isinstance(number, str | None)):
        raise ValueError("a finite number")
    return number


def check_written_by(name: str, options: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise OptimizerError if the parameter group of a state_dict is not of an optimizer of this name.

    Args:
        options: of the group.
        own: options of the group that it replaces, which may have words that no optimizer of this name has.
    """
    known = _defaults(name)
    others = {word for each in CLASSES for word in _defaults(each)} - known.keys() - own.keys()
    if name == "adamw":
        # Those of AdamW are Adam's with True.
        decay = {"decoupled_weight_decay"}
        others = others - decay if options.get("decoupled_weight_decay", True) else others | decay
    # What older versions of torch did not write.
    later = {"maximize", "decoupled_weight_decay"} if name in ("adam", "nadam") else {"maximize"}
    foreign, lacking = others & options.keys(), known.keys() - options.keys() - later
    if foreign or lacking:
        which = f"has {quote(min(foreign))}" if foreign else f"lacks {quote(min(lacking))}"
        raise OptimizerError(f"a parameter group is of another optimizer than {name}: it {which}")


# With these torch.optim makes the numbers that count a parameter's steps.
_MAKES_NUMBERS = frozenset({torch.as_tensor, torch.ones, torch.scalar_tensor, torch.tensor, torch.zeros})


class _OwnNumbers(TorchFunctionMode):
    """Let torch.optim make its counters in float32 and, where it says nothing, on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _MAKES_NUMBERS:
            device = kwargs.get("device")
            kwargs = {**kwargs, "dtype": torch.float32, "device": "cpu" if device is None else device}
        return func(*args, **kwargs)


def _usual_torch() -> AbstractContextManager[None]:
    """Return a block where torch.optim works as in a program without autocast and without defaults of its own."""
    made = torch.empty(0)
    cast = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    return nullcontext() if made.is_cpu and made.dtype is torch.float32 and not cast else _made_usual(cast)


@contextmanager
def _made_usual(cast: Sequence[str]) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(_OwnNumbers())
        for device in cast:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@lru_cache
def _class(name: str) -> type[torch.optim.Optimizer]:
    """Return an optimizer's class with the methods that are called here as they were before torch decorated them.

    The decorators import torch's compiler, which takes longer than importing torch. And without what asks a GPU for
    graphs: a store on the CPU is not to take memory there, and cannot ask in a forked child.
    """
    base = getattr(torch.optim, CLASSES[name])
    step = torch.no_grad()(inspect.unwrap(base.step))
    methods = {"add_param_group": inspect.unwrap(base.add_param_group), "step": step}
    return type(base.__name__, (base,), {**methods, **dict.fromkeys(_compat.GRAPH_CHECKS, lambda _: None)})


def _new(name: str, params: list[torch.Tensor], numbers: Mapping[str, Any], **how: Any) -> torch.optim.Optimizer:
    return _class(name)(params, **numbers, **how)


# A multiple of what torch's vector loops take at a time, for every dtype and instruction set.
_ALIGN = 64


def _in_vectors(rows: torch.Tensor) -> torch.Tensor:
    """Return the elements of some rows, with as many more as make every one part of a vector.

    torch computes most of a tensor in vectors and the last few elements one by one, and the two may round differently.
    How a row is rounded must not depend on which others are stepped with it: of one push, different servers or
    workers step different rows.
    """
    return torch.constant_pad_nd(rows.reshape(-1), (0, -rows.numel() % _ALIGN))


def _out_of_vectors(elements: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return elements[: shape.numel()].view(shape)


def _take_from_vectors(value: torch.Tensor, state: State, elements: torch.Tensor, held: State) -> None:
    """Set a value and its state to what was made of copies in vectors."""
    value.copy_(_out_of_vectors(elements, value.shape))
    state.clear()
    for name, tensor in held.items():
        state[name] = _out_of_vectors(tensor, value.shape) if tensor.shape == elements.shape else tensor


def scale_gradient(grad: torch.Tensor, spec: OptimizerSpec) -> None:
    """Rescale and clip a summed gradient in place."""
    if spec.rescale_grad != 1.0:
        grad.mul_(spec.rescale_grad)
    if spec.clip_gradient is not None:
        real = torch.view_as_real(grad) if grad.is_complex() else grad
        bound = number_in(real.dtype, spec.clip_gradient)
        real.clamp_(-bound, bound)


def finish(state: State, count: float) -> None:
    """Count a step in the state of a key, if its optimizer counts them."""
    if "step" in state:
        state["step"].fill_(count)


def _within(dtype: torch.dtype, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Return hyperparameters that a dtype holds: its largest number in place of those beyond it."""
    most = torch.finfo(dtype).max

    def held(number: Any) -> Any:
        if isinstance(number, tuple):
            return tuple(map(held, number))
        return max(-most, min(number, most)) if isinstance(number, int | float) else number

    return {word: held(number) for word, number in numbers.items()}


# Numbers with which optimizers keep all the state that they can have.
_WITH_STATE = {"amsgrad": True, "centered": True, "momentum": 0.9}


class Optimizer:
    """One torch.optim optimizer, stepped with the parameters of a push as its only ones.

    The state of a key lives with the key (``State``: name to tensor); this class holds none.
    A step costs O(keys pushed), however many the store holds.
    """

    def __init__(self, spec: OptimizerSpec) -> None:
        self.spec = spec
        self._kernels: dict[Key | None, Kernel] = {}
        self._runners: dict[bool, torch.optim.Optimizer] = {}
        # Of values of two elements, by their dtype.
        self._probed: dict[torch.dtype, dict[str, tuple[torch.Size, torch.dtype]]] = {}
        # For each key with numbers of its own, the first key that has the same; what is made for that one serves all.
        first: dict[int, Key] = {}
        self._like = {key: first.setdefault(id(own), key) for key, own in spec.overrides.items()}
        # Why keys with the numbers of the first one, and of a dtype, cannot be stepped.
        self._faults: dict[tuple[Key | None, torch.dtype], str | None] = {}
        self._fills = initial_state(spec.name, tuple(spec.numbers.items()))
        self._own_fills = {key: initial_state(spec.name, tuple(self._numbers(key).items())) for key in first.values()}

    def scaled(self, scale: float) -> Optimizer:
        """Return an optimizer that multiplies gradients by a number more than this one."""
        scaled = copy(self)
        scaled.spec, scaled._kernels = replace(self.spec, rescale_grad=self.spec.rescale_grad * scale), {}
        return scaled

    def check(self, key: Key, value: torch.Tensor | Table, *, by_rows: bool) -> None:
        """Raise OptimizerError if this optimizer cannot update such a value."""
        name = self.spec.name
        if interop.family(value.dtype) not in ("float", "complex"):
            raise OptimizerError(
                f"{quote(key)} is {interop.dtype_name(value.dtype)}, and {name} updates floating-point values only; "
                "keep counters in a store without an optimizer"
            )
        if value.dtype in interop.FLOAT8:
            raise OptimizerError(
                f"{quote(key)} is {interop.dtype_name(value.dtype)}, which {name} does not update; keep weights in at "
                "least 16 bits, and float8 copies of them in a store without an optimizer"
            )
        if value.dtype.is_complex and name not in ROWWISE:
            raise OptimizerError(
                f"{quote(key)} is {interop.dtype_name(value.dtype)}, and {name} updates real values only"
            )
        if self.spec.ema is not None and isinstance(value, Table) and value.dtype in interop.LOW_PRECISION:
            raise OptimizerError(
                f"{quote(key)} is a sparse table of {interop.dtype_name(value.dtype)}, and ema averages tables of "
                "float32 and float64 only"
            )
        if by_rows and name not in ROWWISE:
            raise OptimizerError(f"{name} needs whole gradients, and {quote(key)} was pushed as Rows")
        if name == "muon" and isinstance(value, torch.Tensor) and value.ndim != 2:
            raise OptimizerError(
                f"muon updates matrices, and {quote(key)} has shape {tuple(value.shape)}; keep such keys in another "
                "store, with another optimizer"
            )

    def check_numbers(self, key: Key, value: torch.Tensor | Table) -> None:
        """Raise OptimizerError where torch would in the middle of a step, for numbers that a dtype does not hold.

        Kernels take them for infinite.
        """
        if not self._has_kernel(value) and (why := self._fault_of(self._like.get(key), value.dtype)) is not None:
            raise OptimizerError(
                f"{quote(key)} is {interop.dtype_name(value.dtype)}, which {self.spec.name} cannot step: {why}"
            )

    def _fault_of(self, own: Key | None, dtype: torch.dtype) -> str | None:
        """Return why torch cannot step values of a dtype with numbers that it does not hold; None if it can."""
        if (own, dtype) not in self._faults:
            self._faults[own, dtype] = self._find_fault(self._numbers(own), dtype)
        return self._faults[own, dtype]

    def _find_fault(self, numbers: dict[str, Any], dtype: torch.dtype) -> str | None:
        if _within(dtype, numbers) == numbers:
            return None
        value, state = torch.zeros((2, 1), dtype=dtype, device="cpu"), State()
        try:
            for _ in range(2):
                self._run(numbers, [value], [torch.zeros_like(value)], [state], fused=False)
        except RuntimeError as error:
            return str(error)
        return None

    def _numbers(self, own: Key | None) -> dict[str, Any]:
        """Return the numbers of a key that is the first with its own, or of all without numbers of their own."""
        return self.spec.numbers if own is None else {**self.spec.numbers, **self.spec.overrides[own]}

    def _has_kernel(self, value: torch.Tensor | Table) -> bool:
        is_on_cpu = isinstance(value, Table) or value.is_cpu
        return self.spec.name in FUSED and value.dtype in FUSED_DTYPES and is_on_cpu

    def step(
        self,
        keys: Sequence[Key],
        values: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
        states: Sequence[State],
    ) -> None:
        """Update values and states in place from the summed gradients (see ``changes_grads``).

        Args:
            keys, values, grads, states: of equal length; a grad has its value's shape and dtype.
        """
        groups: dict[tuple[Any, ...], list[int]] = {}
        averages: dict[int, torch.Tensor] = {}
        for index, (key, value, state) in enumerate(zip(keys, values, states, strict=True)):
            if not value.numel() and self.spec.name not in ROWWISE:
                continue
            kernel = self.kernel(key, value)
            if kernel is not None:
                count, is_first = self.begin(kernel, key, value, state)
                columns = [state[name] for name in kernel.columns]
                native.step(kernel, value, grads[index], columns, count, is_first=is_first)
                finish(state, count)
                continue
            if self.spec.ema is not None:
                # torch.optim takes a state that is not empty for its own.
                found = state.pop(AVERAGE, None)
                averages[index] = average_of(value) if found is None else found
            if state:
                self._complete(key, state, value)
            own = self._like.get(key)
            fused = self.spec.name in _FUSED_BY_TORCH and value.is_cuda and value.dtype in FUSED_DTYPES[2:]
            # What needs whole gradients may carry numbers from one parameter to the next, as Adafactor does its eps.
            alone = None if self.spec.name in ROWWISE else index
            # torch's fused kernels take either all new or no new parameters.
            groups.setdefault((own, fused, bool(state), alone), []).append(index)
        try:
            self._run_groups(groups, keys, values, grads, states)
        finally:
            for index, average in averages.items():
                states[index][AVERAGE] = average
        for index, average in averages.items():
            move_average(average, values[index], self.spec.ema)  # type: ignore[arg-type]

    def _run_groups(
        self,
        groups: Mapping[tuple[Any, ...], Sequence[int]],
        keys: Sequence[Key],
        values: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
        states: Sequence[State],
    ) -> None:
        """Step by torch.optim the members of each group together."""
        for (own, fused, _, _), members in groups.items():
            padded = {i: each for i in members if (each := self._padded(keys[i], values[i], states[i])) is not None}
            self._run(
                self._numbers(own),
                [padded[i][0] if i in padded else values[i] for i in members],
                [self._prepare(_in_vectors(grads[i]) if i in padded else grads[i]) for i in members],
                [padded[i][1] if i in padded else states[i] for i in members],
                fused,
            )
            for i, (elements, held) in padded.items():
                _take_from_vectors(values[i], states[i], elements, held)

    def _padded(self, key: Key, value: torch.Tensor, state: State) -> tuple[torch.Tensor, State] | None:
        """Return copies that torch computes in vectors alone; None where it rounds alike, or has to see the value."""
        if self.spec.name not in ROWWISE or value.dtype not in interop.LOW_PRECISION or not value.is_cpu:
            return None
        if value.numel() % _ALIGN == 0:
            return None
        fills = self._fills_of(key)
        held = {name: _in_vectors(each) if name in fills else each for name, each in state.items()}
        return _in_vectors(value), held

    def kernel(self, key: Key, value: torch.Tensor) -> Kernel | None:
        """Return the step of a key as a kernel for slices, None where torch.optim has to see the whole value."""
        return self._kernel_of(self._like.get(key)) if self._has_kernel(value) else None

    def _kernel_of(self, own: Key | None) -> Kernel:
        """Return the kernel of a key that is the first with its numbers, or of all without numbers of their own."""
        if own not in self._kernels:
            spec = self.spec
            self._kernels[own] = Kernel(spec.name, self._numbers(own), spec.rescale_grad, spec.clip_gradient, spec.ema)
        return self._kernels[own]

    def plain_steps(self) -> tuple[Any, Any] | None:
        """Return the steps of all keys, and of those with numbers of their own, as ``native.look`` takes them."""
        if self.spec.name not in FUSED:
            return None
        own = {key: self._kernel_of(first).compiled for key, first in self._like.items()}
        return self._kernel_of(None).compiled, own or None

    def begin_all(self, entries: Sequence[Entry], pool: Pool) -> None:
        """Do ``begin`` for many keys of plain values; new states are marked, for the step that comes next."""
        fresh: dict[tuple[Key | None, torch.dtype], list[Entry]] = {}
        for entry in entries:
            own = self._like.get(entry.key)
            if entry.is_blank:
                fresh.setdefault((own, entry.value.dtype), []).append(entry)
            else:
                _, is_first = self.begin(self._kernel_of(own), entry.key, entry.tensor, entry.state)
                entry.is_new |= is_first
        for (own, _), members in fresh.items():
            values = [entry.tensor for entry in members]
            for start, stop in runs(values):
                block = self._kernel_of(own).fresh(values[start:stop], pool)
                native.place_states(members[start:stop], block.names, block.columns, block.steps, block.state)

    def begin(self, kernel: Kernel, key: Key, value: torch.Tensor, state: State) -> tuple[float, bool]:
        """Add to a state what its next step as a kernel asks for; return its count, and whether sgd's is new."""
        is_first = "momentum_buffer" not in state
        average = state.pop(AVERAGE, None)
        if state:
            self._complete(key, state, value)
        else:
            state.update(kernel.fresh([value]).state(value))
        if kernel.ema is not None:
            state[AVERAGE] = average if average is not None else average_of(value)
        return float(state["step"]) + 1 if "step" in state else 1.0, is_first

    def step_rows(self, key: Key, value: torch.Tensor | Table, rows: Rows, state: State) -> None:
        """Update only the rows that ``rows`` (merged) names, and their state; the others do not move.

        Counters in the state, such as Adam's step, are the key's, as in torch.optim.SparseAdam.
        """
        ids = rows.ids
        columns, fills = Columns(value, state), self._fills_of(key)
        if self.spec.ema is not None:
            columns.add_average()
        kernel = self._kernel_of_rows(key, value, rows)
        if kernel is not None:
            self._step_rows_in_place(kernel, columns, rows, state, fills)
            return
        shape = rows.values.shape
        picked = _in_vectors(columns.read_value(ids))
        held: State = {name: _in_vectors(columns.read(name, ids)) for name in columns.names()}
        by_row = set(held)
        held.update({name: tensor for name, tensor in state.items() if name not in held})
        self.step([key], [picked], [_in_vectors(rows.values)], [held])
        for name, tensor in held.items():
            if name in by_row or (tensor.shape == picked.shape and name in fills):
                columns.write(name, ids, _out_of_vectors(tensor, shape), fills.get(name, 0.0))
            else:
                state[name] = tensor
        columns.write_value(ids, _out_of_vectors(picked, shape))

    def _kernel_of_rows(self, key: Key, value: torch.Tensor | Table, rows: Rows) -> Kernel | None:
        """Return the kernel that steps rows where they lie, None if the compiled part cannot."""
        held = rows.values.new_empty(0) if isinstance(value, Table) else value
        if value.device.type != "cpu" or not native.is_plain([held, rows.values]):
            return None
        if self.spec.ema is not None and held.dtype in interop.LOW_PRECISION:
            return None
        return self.kernel(key, held)

    def _step_rows_in_place(
        self, kernel: Kernel, columns: Columns, rows: Rows, state: State, fills: Mapping[str, float]
    ) -> None:
        is_first = "momentum_buffer" not in columns.names()
        if kernel.name != "sgd" and "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        count = float(state["step"]) + 1 if "step" in state else 1.0
        ids, values = rows.ids.contiguous(), rows.values
        at = columns.addresses(ids, {name: fills[name] for name in kernel.columns if name != AVERAGE})
        if values.numel():
            held = [at[name] for name in ("", *kernel.columns)]
            grads = address_rows(values, np.arange(len(ids), dtype=np.uint64))
            step = native.Step(kernel, count, is_first, held)
            counts = array("q", [values[0].numel()]) * len(ids)
            native.Pass([], [grads], counts, values.dtype, step).jobs(1)[0]()
        finish(state, count)

    @property
    def changes_grads(self) -> bool:
        """Whether ``step`` overwrites the gradients that it is given."""
        return self.spec.rescale_grad != 1.0 or self.spec.clip_gradient is not None

    def _prepare(self, grad: torch.Tensor) -> torch.Tensor:
        """Rescale and clip a summed gradient in place; return it with its elements in order in memory."""
        scale_gradient(grad, self.spec)
        # torch's fused CPU kernels read memory in order, whatever the strides.
        return grad.contiguous()

    def _run(
        self,
        numbers: dict[str, Any],
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        states: list[State],
        fused: bool,
    ) -> None:
        if not states[0]:
            # Adagrad and its kind make their state when they are constructed.
            with _usual_torch():
                fresh = _new(self.spec.name, params, numbers).state
            for param, state in zip(params, states, strict=True):
                state.update(fresh.get(param, {}))
        for param, state in zip(params, states, strict=True) if fused else ():
            if "step" in state:
                # The kernel reads it on the GPU; a count that was loaded, or of steps on the CPU, is not there.
                state["step"] = state["step"].to(param.device)
        runner = self._runner(fused)
        group = runner.param_groups[0]
        group.update(numbers)
        group["params"] = params
        runner.state = dict(zip(params, states, strict=True))  # type: ignore[assignment]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        try:
            with _usual_torch():
                runner.step()
        finally:
            for param, state in zip(params, states, strict=True):
                param.grad = None
                for name in [name for name, tensor in state.items() if tensor is None]:
                    del state[name]
            group["params"], runner.state = [], {}  # type: ignore[assignment]

    def _runner(self, fused: bool) -> torch.optim.Optimizer:
        if fused not in self._runners:
            how = {"fused": True} if fused else {"foreach": False} if self.spec.name != "muon" else {}
            anything = torch.zeros((2, 1), dtype=torch.float32, device="cpu")
            # Those of each step come with it.
            numbers = _within(anything.dtype, self.spec.numbers)
            with _usual_torch():
                self._runners[fused] = _new(self.spec.name, [anything], numbers, **how)
        return self._runners[fused]

    def check_state(self, key: Key, value: torch.Tensor | Table, state: State) -> None:
        """Raise OptimizerError if a state from outside is not one that ``step`` could go on from."""
        columns = value.columns if isinstance(value, Table) else []
        if not state and not columns:
            return
        shape = torch.Size((2,)) if isinstance(value, Table) else value.shape
        expected = self._state_like(shape, value.dtype)
        for name in expected:
            can_be_made = name in self._fills_of(key) and self.spec.name in ROWWISE
            if name not in state and name not in columns and not can_be_made:
                raise OptimizerError(f"{quote(key)}: the state of {self.spec.name} lacks {quote(name)}")
        # What is missing begins at the value.
        expected[AVERAGE] = (shape, interop.accumulator(value.dtype))
        possible = {**dict.fromkeys(self._possible, (shape, value.dtype)), **expected}
        for name in [*state, *columns]:
            if name not in possible:
                raise OptimizerError(
                    f"{quote(key)}: {self.spec.name} has no state {quote(name)}; it has "
                    f"{', '.join(each for each in possible if each != AVERAGE)}"
                )
        for name, tensor in state.items():
            wanted, dtype = possible[name]
            if tensor.shape != wanted or tensor.dtype is not dtype:
                raise OptimizerError(
                    f"{quote(key)}: {quote(name)} of {self.spec.name} is {interop.dtype_name(tensor.dtype)} "
                    f"{tuple(tensor.shape)}, expected {interop.dtype_name(dtype)} {tuple(wanted)}"
                )

    def _state_like(self, shape: torch.Size, dtype: torch.dtype) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Return the names, shapes and dtypes of the state of a value."""
        if self.spec.name not in ROWWISE:
            return self._probe(shape, dtype) if shape.numel() else {}
        probed = torch.Size((2,))
        if dtype not in self._probed:
            self._probed[dtype] = self._probe(probed, dtype)
        return {name: (shape if each == probed else each, kind) for name, (each, kind) in self._probed[dtype].items()}

    @cached_property
    def _possible(self) -> list[str]:
        """The names of the state of a value with any numbers, which may have changed since it was made."""
        if self.spec.name not in ROWWISE:
            return []
        on = {word: number for word, number in _WITH_STATE.items() if word in self.spec.numbers}
        full = Optimizer(spec(self.spec.name, {**self.spec.numbers, **on}))
        return list(full._probe(torch.Size((2,)), torch.float64))

    def _probe(self, shape: torch.Size, dtype: torch.dtype) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Return what torch.optim makes of the state of a value."""
        value, state = torch.zeros(shape, dtype=dtype, device="cpu"), State()
        self._run(_within(dtype, self.spec.numbers), [value], [torch.zeros_like(value)], [state], fused=False)
        return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}

    def _fills_of(self, key: Key) -> dict[str, float]:
        # Numbers of a key that was deleted are forgotten, and with them what its state began with.
        return self._own_fills[self._like[key]] if key in self._like else self._fills

    def _complete(self, key: Key, state: State, value: torch.Tensor) -> None:
        """Add what a change of numbers (amsgrad, centered, momentum) newly asks of an old state."""
        if self.spec.name in ROWWISE:
            for name, fill in self._fills_of(key).items():
                if name not in state:
                    state[name] = fill_with(torch.empty_like(value), fill)
