"""RowInit: what the rows of a table hold before their first push, as a rule instead of as data.

A row's first value depends on the rule, its seed, the key, the row's id and the column alone, so it has the same bits
on every server, on any processor, and whether or not the compiled part is there. docs/semantics.md has the steps.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from tensorkv.compiled import _tables
from tensorkv.errors import ArgumentError, show

from . import interop
from .arguments import Key, plain_number

# The numbers of each rule and their defaults, named as in torch.nn.init.
NUMBERS: dict[str, dict[str, float]] = {
    "constant": {"val": 0.0},
    "normal": {"mean": 0.0, "std": 1.0},
    "uniform": {"a": 0.0, "b": 1.0},
}
_MAX_SEED = (1 << 64) - 1
# Elements that are computed at a time, so that they stay in the processor's cache.
_BLOCK = 1 << 14

Words = np.ndarray[Any, np.dtype[np.uint32]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class RowInit:
    """A rule for first values.

    Args:
        name: ``"constant"``, ``"normal"`` or ``"uniform"``.
        numbers: of the rule, in the order of ``NUMBERS``.
        seed: of the random ones.
    """

    name: str
    numbers: tuple[float, ...]
    seed: int = 0

    @classmethod
    def of(cls, init: Any, numbers: dict[str, Any], seed: Any = None) -> RowInit:
        """Check what a caller wrote.

        Args:
            init: the name of a distribution, or a number.
            numbers: of the distribution by name, None where it was not given.
            seed: an int in ``[0, 2**64)`` (None: 0).

        Raises:
            ArgumentError: an unknown name, a number that the distribution does not have, or one out of range.

        >>> RowInit.of("normal", {"std": 0.01, "a": None})
        RowInit(name='normal', numbers=(0.0, 0.01), seed=0)
        """
        init = plain_number(init)
        given = {name: plain_number(number) for name, number in numbers.items() if number is not None}
        if _is_number(init):
            if given or seed is not None:
                raise ArgumentError(f"init is the number {init}; expected no {', '.join(given) or 'seed'} beside it")
            return cls("constant", (_plain(init),))
        if not isinstance(init, str) or init not in ("normal", "uniform"):
            raise ArgumentError(f'init is {show(init)}; expected "normal", "uniform", or a finite number')
        known = NUMBERS[init]
        for name, number in given.items():
            if name not in known:
                raise ArgumentError(f'init="{init}" has no {name}; it has {", ".join(known)} and seed')
            if not _is_number(number):
                raise ArgumentError(f"{name} is {show(number)}; expected a finite number")
        full = {**known, **{name: float(number) for name, number in given.items()}}
        if init == "normal" and full["std"] < 0:
            raise ArgumentError(f"std is {full['std']}; expected a number of at least 0")
        if init == "uniform" and not (full["a"] <= full["b"] and math.isfinite(full["b"] - full["a"])):
            raise ArgumentError(f"a is {full['a']} and b is {full['b']}; expected a <= b")
        return cls(init, tuple(full.values()), _check_seed(seed))

    def to_json(self) -> dict[str, Any]:
        """Return what ``from_json`` reads.

        >>> RowInit("uniform", (-0.5, 0.5), seed=7).to_json()
        {'name': 'uniform', 'a': -0.5, 'b': 0.5, 'seed': 7}
        """
        seed = {} if self.name == "constant" else {"seed": self.seed}
        return {"name": self.name, **dict(zip(NUMBERS[self.name], self.numbers, strict=True)), **seed}

    @classmethod
    def from_json(cls, data: Any) -> RowInit:
        """Check and read what ``to_json`` made.

        Raises:
            ArgumentError: anything else.
        """
        name = data.get("name") if isinstance(data, dict) else None
        numbers = NUMBERS.get(name, {}) if isinstance(name, str) else {}
        expected = {"name", *numbers, *(() if name == "constant" else ("seed",))}
        if not numbers or set(data) != expected or not all(_is_number(data[each]) for each in numbers):
            raise ArgumentError(f"malformed init of rows: {show(data)}")
        if name == "constant":
            return cls.of(data["val"], {})
        return cls.of(name, {each: data[each] for each in numbers}, data["seed"])

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raise ArgumentError if rows of a dtype cannot start so."""
        name = interop.dtype_name(dtype)
        if self.name != "constant":
            if not dtype.is_floating_point:
                raise ArgumentError(f'init="{self.name}" makes floating-point rows, and the values are {name}')
            return
        (number,) = self.numbers
        if interop.family(dtype) in ("float", "complex"):
            real = dtype.to_real() if dtype.is_complex else dtype
            fits = abs(number) <= torch.finfo(real).max
        elif dtype is torch.bool:
            fits = number in (0, 1)
        else:
            limits = torch.iinfo(dtype)
            fits = number == int(number) and limits.min <= number <= limits.max
        if not fits:
            raise ArgumentError(f"init is {number}, which the values' {name} cannot hold")

    def rows(self, key: Key, ids: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Return first values of rows.

        Args:
            key: of the table.
            ids: int64 on the CPU, shape ``(n,)``.
            shape: of one row.
            dtype: of the table, which ``check_dtype`` has taken.

        Returns:
            A new tensor on the CPU, shape ``(n, *shape)``.

        >>> RowInit("normal", (0.0, 1.0)).rows("t", torch.tensor([5]), torch.Size([3]), torch.float32)
        tensor([[-0.4179,  2.2135, -1.5793]])
        """
        if self.name == "constant":
            number: Any = bool(self.numbers[0]) if dtype is torch.bool else self.numbers[0]
            return torch.full((len(ids), *shape), number, dtype=dtype, device="cpu")
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        filled = torch.empty((len(ids), *shape), dtype=wide, device="cpu")
        if filled.numel():
            self._fill(stream(self.seed, key), ids.contiguous(), filled.view(len(ids), -1))
        return filled.to(dtype)

    def _fill(self, philox_key: int, ids: torch.Tensor, out: torch.Tensor) -> None:
        x, y = self.numbers
        if _tables is not None:
            is_double = out.dtype is torch.float64
            is_normal = self.name == "normal"
            place = ids.data_ptr(), len(ids), out.data_ptr(), out.shape[1]
            _tables.first_rows(is_normal, x, y, philox_key, *place, is_double)
            return
        columns, target = out.shape[1], out.numpy()
        listed, step = ids.numpy().view(np.uint64), max(1, _BLOCK // columns)
        for start in range(0, len(listed), step):
            uniform = (_random_words(listed[start : start + step], columns, philox_key) + 0.5) * 2.0**-32
            made = x + (y - x) * uniform if self.name == "uniform" else x + y * _normal(uniform)
            target[start : start + step] = made


@lru_cache(maxsize=1024)
def stream(seed: int, key: Key) -> int:
    """Return the 64-bit key of the generator: of two tables of one seed, each has first values of its own."""
    digest = hashlib.sha256(json.dumps([seed, key]).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _random_words(ids: np.ndarray[Any, np.dtype[np.uint64]], columns: int, key: int) -> Words:
    """Return 32 random bits for each column of each row, shape ``(len(ids), columns)``, by Philox4x32-10.

    The counter is the id and the number of the block of four columns, 64 bits each. Source: J. K. Salmon et al.,
    "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11.
    """
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    shape = len(ids), -(-columns // 4)
    counter = [np.broadcast_to(each, shape) for each in ((ids & low)[:, None], (ids >> half)[:, None])]
    counter += [np.broadcast_to(np.arange(shape[1], dtype=np.uint64), shape), np.zeros(shape, np.uint64)]
    keys = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        first, second = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        counter = [
            (second >> half) ^ counter[1] ^ np.uint64(keys[0]),
            second & low,
            (first >> half) ^ counter[3] ^ np.uint64(keys[1]),
            first & low,
        ]
        keys = (keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF
    words = np.stack(counter, axis=-1).reshape(len(ids), -1)[:, :columns]
    return words.astype(np.uint32)


def _normal(uniform: Floats) -> Floats:
    """Return the quantile of the standard normal distribution, to about seven digits.

    Source: M. J. Wichura, "Algorithm AS 241", Applied Statistics 37 (1988), PPND7. The branch for quantiles beyond
    1.39e-11 is not reached by numbers of 32 bits.
    """
    centred = uniform - 0.5
    r = 0.180625 - centred * centred
    above = ((59.10937472 * r + 159.29113202) * r + 50.434271938) * r + 3.3871327179
    below = ((67.1875636 * r + 78.757757664) * r + 17.895169469) * r + 1.0
    found: Floats = centred * above / below
    tails = np.abs(centred) > 0.425
    side = centred[tails]
    r = np.sqrt(-_log(0.5 - np.abs(side))) - 1.6
    above = ((0.17023821103 * r + 1.3067284816) * r + 2.75681539) * r + 1.4234372777
    below = (0.12021132975 * r + 0.7370016425) * r + 1.0
    found[tails] = np.copysign(above / below, side)
    return found


def _log(number: Floats) -> Floats:
    """Return natural logarithms by operations that IEEE 754 rounds, where log of a C library rounds in its own way."""
    mantissa, exponent = np.frexp(number)
    t = (mantissa - 0.75) / (mantissa + 0.75)
    s = t * t
    series = t * (2 + s * (2 / 3 + s * (2 / 5 + s * (2 / 7 + s * (2 / 9 + s * (2 / 11))))))
    logs: Floats = (exponent * 0.6931471805599453 - 0.2876820724517809) + series
    return logs


def _check_seed(seed: Any) -> int:
    """Return a seed as Python's own int; None is 0."""
    number = 0 if seed is None else plain_number(seed)
    if type(number) is not int or not 0 <= number <= _MAX_SEED:
        raise ArgumentError(f"seed is {show(seed)}; expected an int in [0, 2**64)")
    return number


def _is_number(number: Any) -> bool:
    is_real = isinstance(number, int | float | np.integer | np.floating) and not isinstance(number, bool)
    try:
        return is_real and math.isfinite(float(number))
    except OverflowError:
        return False


def _plain(number: Any) -> float:
    """Return a number as Python's own; an int stays one, since a float does not hold every int64."""
    return int(number) if isinstance(number, int | np.integer) else float(number)
