"""RegionReader: a pull of parts of values, as a pull of whole values of their shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, TypeVar

from tensorkv.arrays.arguments import Key
from tensorkv.arrays.regions import Region
from tensorkv.arrays.spec import KeySpec

from .base import Outs, Reader

T = TypeVar("T")


class RegionReader(Reader):
    """Reads the same part of each value whenever it is asked for the value.

    Args:
        source: that has the values.
        wanted: the part of each key, as the caller has named it.
    """

    def __init__(self, source: Reader, wanted: Mapping[Key, Any]) -> None:
        self._source, self._wanted = source, wanted

    def spec(self, verb: str, key: Key) -> KeySpec:
        whole = self._source.spec(verb, key)
        region = Region.take(verb, key, self._wanted[key], whole)
        return replace(whole, shape=region.shape, origin=whole.origin.for_parts())

    def keys(self) -> list[Key]:
        return list(self._wanted)

    def together(self) -> AbstractContextManager[Any]:
        return self._source.together()

    def transfer(self, work: Callable[..., T], *args: Any) -> T:
        return self._source.transfer(work, *args)

    def pull_into(self, keys: Sequence[Key], outs: Outs) -> None:
        regions = [Region.take("pull", key, self._wanted[key], self._source.spec("pull", key)) for key in keys]
        self._source.pull_regions(keys, regions, outs)
