"""The interface of a codec, and the look-up by name."""

from __future__ import annotations

import dataclasses
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from tensorkv.arrays.arguments import plain_number
from tensorkv.compiled import _codecs
from tensorkv.errors import ArgumentError, NonFiniteError, naming, quote, show, suggestion

Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint8]
# So many elements stay in a processor's cache; a multiple of all units.
RUN = 1 << 16
# What a codec remembers of a gradient from push to push, beside its residual.
Memory = dict[str, Floats]


class Codec(ABC):
    """How the gradient of a key is written in fewer bytes.

    A codec is a frozen dataclass; its fields are the parameters that ``set_gradient_compression`` takes, and raise
    ``ArgumentError`` from ``__post_init__`` where they are out of range. Bytes depend on the shape alone: worker and
    server know how many there are. The same words make the same bits everywhere.
    """

    name: ClassVar[str]
    """The ``"type"`` that ``set_gradient_compression`` takes."""

    unit: ClassVar[int] = 0
    """How many elements have words of eight bytes, which depend on nothing else; 0: an array is encoded as a whole."""

    @abstractmethod
    def nbytes(self, shape: Sequence[int]) -> int:
        """Return how many bytes the words of an array of a shape have."""

    @abstractmethod
    def encode(
        self, gradient: Floats, residual: Floats | None, new_residual: Floats, words: Words, memory: Memory
    ) -> None:
        """Write words for the sum of gradient and residual, and what they do not send as the new residual.

        Args:
            gradient: contiguous, as all arrays here.
            residual: what earlier words did not send (None: nothing).
            new_residual: to be written: ``add_residual`` writes the sum here; then subtract what is sent.
            words: to be written, of ``nbytes``.
            memory: of this gradient from push to push, changed in place; arrays in it are replaced, not written to.

        Raises:
            NonFiniteError: the sum has NaN or Inf, or makes it on the way.
        """

    @abstractmethod
    def decode(self, words: Words, out: Floats) -> None:
        """Write what words stand for into a contiguous array; words that nobody has encoded may make anything."""

    def to_json(self) -> dict[str, Any]:
        """Return what ``parse`` makes this codec of."""
        return {"type": self.name, **dataclasses.asdict(self)}  # type: ignore[call-overload]


def add_residual(gradient: Floats, residual: Floats | None, new_residual: Floats) -> None:
    """Write the sum of a gradient and its residual, from which a codec subtracts what it sends.

    Raises:
        NonFiniteError: it has NaN or Inf.
    """
    if _codecs is not None:
        check_finite(_codecs.add(gradient, residual, new_residual))
        return
    if residual is None:
        new_residual[...] = gradient
    else:
        np.add(gradient, residual, out=new_residual)
    check_finite(bool(np.isfinite(new_residual).all()))


def check_finite(is_finite: bool) -> None:
    """Raise NonFiniteError if a sum of gradient and residual was not finite."""
    if not is_finite:
        raise NonFiniteError("has NaN or Inf")


_factories: dict[str, Callable[..., Codec]] = {}


def register(name: str, factory: Callable[..., Codec]) -> None:
    """Have ``set_gradient_compression({"type": name, **parameters})`` use ``factory(**parameters)``.

    Args:
        name: that is not taken.
        factory: a subclass of ``Codec``, in every process that pushes or serves.

    Raises:
        ArgumentError: the name is taken or empty, or the factory cannot be called.

    >>> from tensorkv.compression.halves import BFloat16
    >>> register("doctest", BFloat16)
    >>> "doctest" in names()
    True
    """
    if not isinstance(name, str) or not name:
        raise ArgumentError(f"register: the name is {show(name)}; expected a non-empty str")
    if name in _factories:
        raise ArgumentError(f"register: there is a codec {quote(name)} already; choose another name")
    if not callable(factory):
        raise ArgumentError(f"register({quote(name)}): the factory is {show(factory)}; expected a class")
    _factories[name] = factory


def names() -> list[str]:
    """Return the names of all codecs.

    >>> names()[:3]
    ['1bit', '2bit', 'bf16']
    """
    return sorted(_factories)


def parse(params: Any) -> Codec | None:
    """Return the codec that parameters describe, None for ``None`` or the type ``"none"``.

    Raises:
        ArgumentError: the type or a parameter is unknown or out of range.

    >>> parse({"type": "2bit", "threshold": 0.25})
    TwoBit(threshold=0.25)
    >>> parse({"type": "2bits"})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    tensorkv.errors.ArgumentError: no codec '2bits' (did you mean "2bit"?); the codecs are ...
    """
    if params is None:
        return None
    if not isinstance(params, Mapping) or "type" not in params:
        raise ArgumentError(
            f'got {show(params)}; expected a dict such as {{"type": "2bit", "threshold": 0.5}}, or None'
        )
    # Python's numbers, as JSON has them.
    given = {word: plain_number(each) for word, each in params.items()}
    name = given.pop("type")
    if name == "none" and not given:
        return None
    factory = _factories.get(name) if isinstance(name, str) else None
    if factory is None:
        known = names()
        raise ArgumentError(f"no codec {show(name)}{suggestion(name, known)}; the codecs are {', '.join(known)}")
    if isinstance(factory, type) and dataclasses.is_dataclass(factory):
        taken = [field.name for field in dataclasses.fields(factory)]
        for parameter in given:
            if parameter not in taken:
                raise ArgumentError(
                    f"{name} has no parameter {show(parameter)}{suggestion(parameter, taken)}; it has "
                    f"{', '.join(taken) or 'none'}"
                )
    with naming(name):
        try:
            inspect.signature(factory).bind(**given)
        except TypeError as error:
            raise ArgumentError(f"wrong parameters: {error}") from None
        return factory(**given)


def check_number(name: str, value: Any, *, above: float = 0.0, most: float = float(np.finfo(np.float32).max)) -> None:
    """Raise ArgumentError if a parameter is not a number of float32 in a range.

    >>> check_number("threshold", 1e-60)
    Traceback (most recent call last):
        ...
    tensorkv.errors.ArgumentError: threshold is 1e-60; expected a number of float32 above 0
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and value <= most and float(np.float32(value)) > above:
        return
    bound = "" if most == np.finfo(np.float32).max else f", at most {most:g}"
    raise ArgumentError(f"{name} is {show(value)}; expected a number of float32 above {above:g}{bound}")
