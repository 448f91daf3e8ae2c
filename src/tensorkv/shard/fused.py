"""Fused kernels: the step of an optimizer as one fixed sequence of operations on each element.

Every operation is a single one of IEEE 754, rounded once, in the order of the table in docs/semantics.md, so the bits
depend on neither slices, threads, the keys beside, the processor nor the compiler. The compiled part does all of them
on a block that stays in cache, beginning with the sum of the parts; where it is missing, torch does one operation a
call, with the same bits. float16 and bfloat16 are stepped in float32 and rounded once.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tensorkv.arrays import interop

from .pool import Pool

DTYPES = interop.FLOATS
NAMES = ("sgd", "adam", "adagrad", "rmsprop")
_NUMBER_OF = {name: number for number, name in enumerate(NAMES)} | {"adamw": 1}
FUSED = frozenset(_NUMBER_OF)
AVERAGE = "ema"
"""The name of the state that is a moving average of a value; of float16 and bfloat16 values it is float32."""
# Elements of a block of states, which is let go when none of them is in use.
_FEW = 1 << 20


def number_in(dtype: torch.dtype, number: float) -> float:
    """Return a number as a dtype has it: infinite beyond the dtype's own, which torch refuses to clamp to or fill with.

    >>> number_in(torch.float16, 1e5), number_in(torch.float16, 0.5)
    (inf, 0.5)
    """
    if not number or abs(number) <= torch.finfo(dtype).max:
        return number
    return torch.tensor(number, dtype=torch.float64, device="cpu").to(dtype).item()


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """The steps of one optimizer with its numbers.

    Args:
        name: one of ``FUSED``.
        numbers: hyperparameters of the torch.optim class.
        rescale_grad, clip_gradient, ema: of the optimizer's description.
    """

    name: str
    numbers: Mapping[str, Any]
    rescale_grad: float = 1.0
    clip_gradient: float | None = None
    ema: float | None = None
    packed: bytes = field(init=False, repr=False)
    """All numbers, as the compiled part takes them."""
    compiled: tuple[bytes, tuple[str, ...], bool] = field(init=False, repr=False)
    """The numbers, the names of the states, and whether steps are counted, as ``native.look`` takes them."""

    def __post_init__(self) -> None:
        by = self.numbers
        beta1, beta2 = by.get("betas", (0.0, 0.0))
        packed = [
            _NUMBER_OF[self.name],
            by["lr"],
            by["weight_decay"],
            self.name == "adamw" or by.get("decoupled_weight_decay", False),
            by["maximize"],
            self.rescale_grad,
            self.clip_gradient or 0,
            by.get("momentum", 0),
            by.get("dampening", 0),
            by.get("nesterov", False),
            beta1,
            beta2,
            by.get("eps", 0),
            by.get("amsgrad", False),
            by.get("lr_decay", 0),
            by.get("alpha", 0),
            by.get("centered", False),
            -1 if self.ema is None else self.ema,
        ]
        object.__setattr__(self, "packed", array("d", map(float, packed)).tobytes())
        object.__setattr__(self, "compiled", (self.packed, tuple(self.columns), self.name != "sgd"))

    @property
    def columns(self) -> list[str]:
        """Names of the state tensors of the value's shape, in the order that ``step`` takes them."""
        return [*self._columns_of_optimizer(), *([] if self.ema is None else [AVERAGE])]

    def _columns_of_optimizer(self) -> list[str]:
        by = self.numbers
        if self.name == "sgd":
            return ["momentum_buffer"] if by["momentum"] else []
        if self.name == "adagrad":
            return ["sum"]
        if self.name == "rmsprop":
            used = {"momentum_buffer": by["momentum"] > 0, "grad_avg": by["centered"]}
            return ["square_avg", *(name for name, is_used in used.items() if is_used)]
        return ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if by["amsgrad"] else [])]

    def fresh(self, values: Sequence[torch.Tensor], pool: Pool | None = None) -> StateBlock:
        """Return the states of values of one dtype before their first step.

        Args:
            values: one after another in the block.
            pool: whose threads write the states (None: this one does).
        """
        dtype, numel = values[0].dtype, sum([value.numel() for value in values])
        # Of NumPy, which asks for huge pages. A step reads before it writes: of memory that nobody has written, two
        # threads would be given each page twice, and each would wait for the other.
        bits = [np.empty(numel, f"i{dtype.itemsize}") for _ in self._columns_of_optimizer()]

        def clear(start: int, stop: int) -> None:
            for own in bits:
                own[start:stop].fill(0)

        if pool is None:
            clear(0, numel)
        else:
            pool.share(numel, clear)
        columns = [torch.from_numpy(own).view(dtype) for own in bits]
        if fill := self.numbers.get("initial_accumulator_value", 0):
            columns = [column.fill_(number_in(dtype, fill)) for column in columns]
        if self.ema is not None:
            columns.append(torch.cat([average_of(value).view(-1) for value in values]))
        steps = None if self.name == "sgd" else torch.zeros(len(values), dtype=torch.float32, device="cpu")
        return StateBlock(self.compiled[1], tuple(columns), steps)

    def step(
        self, value: torch.Tensor, grad: torch.Tensor, columns: Sequence[torch.Tensor], count: float, *, is_first: bool
    ) -> None:
        """Step with torch, one operation a call.

        Args:
            value, columns: a value, or a slice of one, and its states; changed in place.
            grad: the sum of the parts, of the value's dtype; not changed.
            count: how many steps with this one.
            is_first: whether the state of sgd is new, whose momentum is then the gradient itself.
        """
        wide = interop.accumulator(value.dtype)
        if self.ema is not None:
            *columns, average = columns
        stepped = [tensor.to(wide) for tensor in (value, *columns)]
        new = self._stepped(grad.to(wide), *stepped, count=count, is_first=is_first)
        for held, tensor in zip((value, *columns), new, strict=True):
            held.copy_(tensor)
        if self.ema is not None:
            move_average(average, value, self.ema)

    def _stepped(
        self, grad: torch.Tensor, value: torch.Tensor, *states: torch.Tensor, count: float, is_first: bool
    ) -> list[torch.Tensor]:
        """Return the value and its states after a step."""
        by, decay = self.numbers, self.numbers["weight_decay"]
        if self.rescale_grad != 1:
            grad = grad * self.rescale_grad
        if self.clip_gradient is not None:
            bound = number_in(grad.dtype, self.clip_gradient)
            grad = grad.clamp(-bound, bound)
        if by["maximize"]:
            grad = -grad
        if decay and self.name != "adamw" and not by.get("decoupled_weight_decay", False):
            grad = grad + value * decay
        if self.name == "sgd":
            return _sgd(by, value, grad, states, is_first=is_first)
        if self.name == "adagrad":
            return _adagrad(by, value, grad, states[0], count)
        if self.name == "rmsprop":
            return _rmsprop(by, value, grad, states)
        if decay and (self.name == "adamw" or by["decoupled_weight_decay"]):
            value = value * (1 - by["lr"] * decay)
        return _adam(by, value, grad, states, int(count))


@dataclass(frozen=True, slots=True, eq=False)
class StateBlock:
    """The states of some values, one after another.

    Args:
        names: of the states.
        columns: of each of them, the elements of all values in a flat tensor.
        steps: how many steps each value has had, if its optimizer counts them.
    """

    names: tuple[str, ...]
    columns: tuple[torch.Tensor, ...]
    steps: torch.Tensor | None

    def state(self, value: torch.Tensor, place: int = 0, offset: int = 0) -> dict[str, torch.Tensor]:
        """Return the state of a value as tensors.

        Args:
            value: whose state.
            place, offset: of the value and of its first element.
        """
        state = {} if self.steps is None else {"step": self.steps[place]}
        for name, column in zip(self.names, self.columns, strict=True):
            state[name] = column[offset : offset + value.numel()].view(value.shape)
        return state


def average_of(value: torch.Tensor) -> torch.Tensor:
    """Return the moving average of a value before its first step: a copy, at least in float32."""
    return value.to(interop.accumulator(value.dtype), copy=True, memory_format=torch.contiguous_format)


def move_average(average: torch.Tensor, value: torch.Tensor, keep: float) -> None:
    """Move an average towards a value: ``e = e + {1 - keep} * (p - e)``."""
    average.copy_(average + (value.to(average.dtype) - average) * (1 - keep))


def runs(values: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Return runs of values that together have few elements, or one many."""
    found, start, total = [], 0, 0
    for index, value in enumerate(values):
        count = value.numel()
        if index > start and total + count > _FEW:
            found.append((start, index))
            start, total = index, 0
        total += count
    return [*found, (start, len(values))] if values else []


def _sgd(
    by: Mapping[str, Any], value: torch.Tensor, grad: torch.Tensor, states: Sequence[torch.Tensor], *, is_first: bool
) -> list[torch.Tensor]:
    if not by["momentum"]:
        return [value - grad * by["lr"]]
    buffer = grad if is_first else states[0] * by["momentum"] + grad * (1 - by["dampening"])
    grad = grad + buffer * by["momentum"] if by["nesterov"] else buffer
    return [value - grad * by["lr"], buffer]


def _adam(
    by: Mapping[str, Any], value: torch.Tensor, grad: torch.Tensor, states: Sequence[torch.Tensor], count: int
) -> list[torch.Tensor]:
    beta1, beta2 = by["betas"]
    first = states[0] + (grad - states[0]) * (1 - beta1)
    second = states[1] * beta2 + (grad * (1 - beta2)) * grad
    # Of 0.0 and -0.0 torch.maximum returns one or the other, as it vectorizes.
    largest = [torch.where((states[2] >= second) | states[2].isnan(), states[2], second)] if by["amsgrad"] else []
    root = _sqrt((largest or [second])[0]) / math.sqrt(1 - power(beta2, count)) + by["eps"]
    return [value - (first * (by["lr"] / (1 - power(beta1, count)))) / root, first, second, *largest]


def _adagrad(
    by: Mapping[str, Any], value: torch.Tensor, grad: torch.Tensor, total: torch.Tensor, count: float
) -> list[torch.Tensor]:
    total = total + grad * grad
    size = by["lr"] / (1 + (count - 1) * by["lr_decay"])
    return [value - (grad * size) / (_sqrt(total) + by["eps"]), total]


def _rmsprop(
    by: Mapping[str, Any], value: torch.Tensor, grad: torch.Tensor, states: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    square = states[0] * by["alpha"] + (grad * (1 - by["alpha"])) * grad
    mean = [states[-1] + (grad - states[-1]) * (1 - by["alpha"])] if by["centered"] else []
    root = _sqrt(square - mean[0] * mean[0] if mean else square) + by["eps"]
    if by["momentum"] <= 0:
        return [value - (grad * by["lr"]) / root, square, *mean]
    buffer = states[1] * by["momentum"] + grad / root
    return [value - buffer * by["lr"], square, buffer, *mean]


def _sqrt(tensor: torch.Tensor) -> torch.Tensor:
    """Return the square root by NumPy, which rounds it as IEEE 754 asks; torch's may come from MKL, which does not."""
    with np.errstate(invalid="ignore"):
        # Of a 0-d array NumPy makes a number.
        return torch.from_numpy(np.asarray(np.sqrt(tensor.numpy())))


def power(base: float, exponent: int) -> float:
    """Return a power by squaring, in pairs of floats: a fixed sequence of operations, the same on every machine.

    It is rounded to the nearest float but for rare cases.

    >>> power(0.5, 3)
    0.125
    """
    high, low, square, rest = 1.0, 0.0, base, 0.0
    while exponent:
        if exponent & 1:
            product, error = _product(high, square)
            error += high * rest + low * square
            high = product + error
            low = error - (high - product)
        product, error = _product(square, square)
        error += 2 * (square * rest)
        square = product + error
        rest = error - (square - product)
        exponent >>= 1
    return high


def _product(a: float, b: float) -> tuple[float, float]:
    """Return a product as the sum of two floats, exactly (Dekker, 1971)."""
    wide_a, wide_b = 134217729.0 * a, 134217729.0 * b
    high_a, high_b = wide_a - (wide_a - a), wide_b - (wide_b - b)
    low_a, low_b = a - high_a, b - high_b
    product = a * b
    return product, ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b
