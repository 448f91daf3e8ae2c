"""tensorkv: a key-value store for tensors, written to by summing and read by copying."""

from importlib.metadata import version

from tensorkv.runtime import early  # noqa: F401 - before anything that takes long

# isort: split
from tensorkv.arrays.blocks import dequantize_blocks, quantize_blocks
from tensorkv.arrays.rows import Rows
from tensorkv.arrays.slices import TensorSlice
from tensorkv.releases.changes import Changes, KeyChange, Patch, apply_changes
from tensorkv.releases.file import load_changes, save_changes
from tensorkv.shard.entry import KeyInfo
from tensorkv.shard.norm import PushResult
from tensorkv.trainer.embedding import Embedding, EmbeddingBag
from tensorkv.trainer.local_trainer import LocalTrainer
from tensorkv.trainer.trainer import Trainer

from . import engines, errors
from .errors import (
    ArgumentError,
    ArrayTypeError,
    CheckpointError,
    EngineNotFoundError,
    ForkedStoreError,
    IncompleteValueError,
    KeyExistsError,
    KeyNotFoundError,
    KeyTypeError,
    NonFiniteError,
    OptimizerError,
    PushOutcomeUnknownError,
    RankDeadError,
    ReleaseExistsError,
    ReleaseMismatchError,
    ReleaseNotFoundError,
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
from .store import KVStore, Release, ReleaseInfo, Snapshot, create

__version__ = version("tensorkv")

__all__ = [
    "ArgumentError",
    "ArrayTypeError",
    "Changes",
    "CheckpointError",
    "Embedding",
    "EmbeddingBag",
    "EngineNotFoundError",
    "ForkedStoreError",
    "IncompleteValueError",
    "KVStore",
    "KeyChange",
    "KeyExistsError",
    "KeyInfo",
    "KeyNotFoundError",
    "KeyTypeError",
    "LocalTrainer",
    "NonFiniteError",
    "OptimizerError",
    "Patch",
    "PushOutcomeUnknownError",
    "PushResult",
    "RankDeadError",
    "Release",
    "ReleaseExistsError",
    "ReleaseInfo",
    "ReleaseMismatchError",
    "ReleaseNotFoundError",
    "Rows",
    "ServerDeadError",
    "Snapshot",
    "SnapshotError",
    "SparseOutWarning",
    "StorageError",
    "StoreClosedError",
    "TensorKVError",
    "TensorSlice",
    "Trainer",
    "UpdaterError",
    "ValueMismatchError",
    "WaitTimeoutError",
    "WorkerError",
    "WorkerMismatchError",
    "__version__",
    "apply_changes",
    "create",
    "dequantize_blocks",
    "engines",
    "errors",
    "load_changes",
    "quantize_blocks",
    "save_changes",
]


def __dir__() -> list[str]:
    return sorted({*__all__, "__doc__", "__file__", "__name__", "__path__"})
