"""The contract that every engine passes, as test classes to be subclassed."""

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

import tensorkv

from .arguments import ArgumentContract
from .arrays import ArrayContract
from .averages import AverageContract
from .libraries import LIBRARIES
from .life import LifeContract
from .reads import ReadContract
from .regions import RegionContract
from .releases import ReleaseContract
from .slices import SliceContract
from .trees import TreeContract
from .updaters import UpdaterContract
from .writes import WriteContract


class BaseContract(
    ArgumentContract,
    WriteContract,
    ReadContract,
    RegionContract,
    SliceContract,
    ArrayContract,
    TreeContract,
    AverageContract,
    ReleaseContract,
    LifeContract,
):
    """The contract without update functions, for an engine that cannot run functions of the caller.

    Subclass it as ``Contract``.
    """

    TYPE: str
    """The type name that ``tensorkv.create`` takes."""
    OPTIONS: ClassVar[dict[str, Any]] = {}
    """Options of ``tensorkv.create`` for every store."""
    RUNS_UPDATERS: bool = True
    """Whether update functions run in this process."""
    TAKES_SLICES: bool = True
    """Whether pushes take slices of values; if not, they raise what ``Batch.refuse_slices`` does."""
    SLICES_TOGETHER: bool = False
    """Whether all slices of a value have to come in one push of all workers."""
    PLACE: tuple[int, int] = (0, 1)
    """Rank and number of workers of a store."""

    def create(self, **options: Any) -> tensorkv.KVStore:
        """Create a store without keys; override it where a type name and options are not enough.

        Args:
            options: options that a test needs, such as ``nonfinite``; they override ``OPTIONS``.
        """
        return tensorkv.create(self.TYPE, **{**self.OPTIONS, **options})

    @pytest.fixture
    def kv(self) -> Iterator[tensorkv.KVStore]:
        """Yield a store without keys and close it after the test."""
        with self.create() as store:
            yield store

    @pytest.fixture(params=list(LIBRARIES))
    def library(self, request: pytest.FixtureRequest) -> Any:
        """Return each array library in turn; without JAX its tests are skipped."""
        if request.param == "jax":
            pytest.importorskip("jax")
        return LIBRARIES[request.param]


class Contract(BaseContract, UpdaterContract):
    """The whole contract of stores, as tests of one engine.

    Subclass it in a test module, name the engine, and run pytest; ``docs/engines-of-your-own.md`` has an example.

    Example:
        >>> from tensorkv.testing import Contract
        >>> class TestLocal(Contract):
        ...     TYPE = "local"
    """
