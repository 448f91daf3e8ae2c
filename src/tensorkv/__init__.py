"""tensorkv: a key-value store for tensors, written to by summing and read by copying."""

from importlib.metadata import version

from tensorkv.runtime import early  # noqa: F401 - before anything that takes long

# isort: split
from tensorkv.arrays.rows import Rows
from tensorkv.shard.entry import KeyInfo
from tensorkv.shard.norm import PushResult
from tensorkv.trainer.embedding import Embedding, EmbeddingBag
from tensorkv.trainer.trainer import Trainer

from . import engines, errors
from .errors import (
    ArgumentError,
    ArrayTypeError,
    CheckpointError,
    EngineNotFoundError,
    ForkedStoreError,
    KeyExistsError,
    KeyNotFoundError,
    KeyTypeError,
    NonFiniteError,
    OptimizerError,
    PushOutcomeUnknownError,
    RankDeadError,
    ServerDeadError,
    SnapshotError,
    SparseOutWarning,
    StorageError,
    StoreClosedError,
    TensorKVError,
    UpdaterError,
    ValueMismatchError,
    WaitTimeoutError,
    WorkerError,
    WorkerMismatchError,
)
from .store import KVStore, Snapshot, create

__version__ = version("tensorkv")

__all__ = [
    "ArgumentError",
    "ArrayTypeError",
    "CheckpointError",
    "Embedding",
    "EmbeddingBag",
    "EngineNotFoundError",
    "ForkedStoreError",
    "KVStore",
    "KeyExistsError",
    "KeyInfo",
    "KeyNotFoundError",
    "KeyTypeError",
    "NonFiniteError",
    "OptimizerError",
    "PushOutcomeUnknownError",
    "PushResult",
    "RankDeadError",
    "Rows",
    "ServerDeadError",
    "Snapshot",
    "SnapshotError",
    "SparseOutWarning",
    "StorageError",
    "StoreClosedError",
    "TensorKVError",
    "Trainer",
    "UpdaterError",
    "ValueMismatchError",
    "WaitTimeoutError",
    "WorkerError",
    "WorkerMismatchError",
    "__version__",
    "create",
    "engines",
    "errors",
]


def __dir__() -> list[str]:
    return sorted({*__all__, "__doc__", "__file__", "__name__", "__path__"})
