"""Every error that tensorkv raises on purpose.

TensorKVError
├── KeyTypeError           (TypeError)     an invalid key, or keys of both types in one store
├── KeyNotFoundError       (KeyError)      a key that was never initialised, or was deleted
├── KeyExistsError         (ValueError)    init of a key that exists
├── ArgumentError          (ValueError)    invalid arguments: unequal lengths, unknown options
├── ArrayTypeError         (TypeError)     not an array, or one that a store cannot hold, read or fill
├── ValueMismatchError     (ValueError)    a shape or dtype that differs from the key's
├── IncompleteValueError   (RuntimeError)  a value of which some slices have been pushed and others are missing
├── NonFiniteError         (ValueError)    NaN or Inf pushed to a store with nonfinite="raise"
├── OptimizerError         (ValueError)    an unknown optimizer, an invalid hyperparameter, a value it cannot update
├── UpdaterError           (RuntimeError)  an updater that called its store, or returned an array
├── CheckpointError        (ValueError)    a checkpoint or file of changes: damaged, of other keys, or not written
├── StorageError           (RuntimeError)  a store's folder that could not be opened, read or written
├── SnapshotError          (RuntimeError)  a snapshot that was dropped, or one more than the store may hold
├── ReleaseNotFoundError   (KeyError)      a release that was never published, or was dropped
├── ReleaseExistsError     (ValueError)    a second release of one name
├── ReleaseMismatchError   (ValueError)    changes that are applied to other values than those they start from
├── EngineNotFoundError    (ValueError)    an unknown type of store, or one whose package is missing
├── WorkerMismatchError    (RuntimeError)  desync: workers that did not make the same call
├── RankDeadError          (RuntimeError)  a dist_sync worker that died, stalled or ended early
├── WorkerError            (RuntimeError)  a failure of another worker or of a server inside a call
├── ServerDeadError        (RuntimeError)  a parameter server that has ended, with the values that it held
├── PushOutcomeUnknownError (RuntimeError) a request without a reply: it was applied once or not at all
├── WaitTimeoutError       (TimeoutError)  a version, a round or a worker that was awaited for too long
├── StoreClosedError       (RuntimeError)  a verb after close()
└── ForkedStoreError       (RuntimeError)  a parent's store used in a forked child

SparseOutWarning (UserWarning)             a sparse `out` that a plain pull has skipped

Messages name the key, what was expected, what was given, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import islice
from reprlib import Repr
from typing import Any


class TensorKVError(Exception):
    """Base class of every error that tensorkv raises on purpose."""


class KeyTypeError(TensorKVError, TypeError):
    """A key is neither a non-empty str nor an int, or not of the type of the store's keys."""


class KeyNotFoundError(TensorKVError, KeyError):
    """A key was never initialised, or has been deleted."""

    # KeyError shows repr(message); people read messages, not reprs.
    __str__ = Exception.__str__


class KeyExistsError(TensorKVError, ValueError):
    """``init`` of a key that exists, or that is given twice in one call."""


class ArgumentError(TensorKVError, ValueError):
    """An argument is invalid, or the arguments of a call do not fit together."""


class ArrayTypeError(TensorKVError, TypeError):
    """An argument is not an array, or an array that a store cannot hold, read or fill."""


class ValueMismatchError(TensorKVError, ValueError):
    """An array's shape or dtype does not fit the key's value."""


class IncompleteValueError(TensorKVError, RuntimeError):
    """Some slices of a value were pushed and others are missing, or the slices of a push do not complete it."""


class NonFiniteError(TensorKVError, ValueError):
    """The sum of a push has NaN or Inf, and the store was created with ``nonfinite="raise"``."""


class OptimizerError(TensorKVError, ValueError):
    """The optimizer is unknown, a hyperparameter is out of range, or the optimizer cannot update a value."""


class UpdaterError(TensorKVError, RuntimeError):
    """An updater called the store that runs it, or returned an array instead of changing ``stored`` in place."""


class CheckpointError(TensorKVError, ValueError):
    """A checkpoint, or a file of changes, is damaged, not tensorkv's, does not fit, or cannot be written."""


class StorageError(TensorKVError, RuntimeError):
    """A store's folder could not be opened, read or written."""


class SnapshotError(TensorKVError, RuntimeError):
    """A snapshot was dropped or has expired, or the store holds the maximum number."""


class ReleaseNotFoundError(TensorKVError, KeyError):
    """A release was never published, or has been dropped."""

    __str__ = Exception.__str__


class ReleaseExistsError(TensorKVError, ValueError):
    """A release of this name was published before, even if it has been dropped since."""


class ReleaseMismatchError(TensorKVError, ValueError):
    """Arrays do not hold the release that changes start from."""


class EngineNotFoundError(TensorKVError, ValueError):
    """No engine is registered under this type name, or a package that it needs is not installed."""


class WorkerMismatchError(TensorKVError, RuntimeError):
    """Workers that must make the same calls in the same order did not; ``dist_sync`` refuses work from then on."""


class RankDeadError(TensorKVError, RuntimeError):
    """Another worker died, did not come in time, or ended early; the store refuses work from then on."""


class WorkerError(TensorKVError, RuntimeError):
    """Another worker failed inside a call that all workers made, or a server inside a request; the message says how."""


class ServerDeadError(TensorKVError, RuntimeError):
    """A parameter server has ended for good, came back without its values, or does not answer at ``create``."""


class PushOutcomeUnknownError(TensorKVError, RuntimeError):
    """A server did not reply to a request in time, however often it was retried: it was applied once or not at all."""


class WaitTimeoutError(TensorKVError, TimeoutError):
    """A version, a round or another worker was awaited for longer than the timeout; the store goes on."""

    applied = False
    """True if every server has applied the push; do not repeat it then."""


class StoreClosedError(TensorKVError, RuntimeError):
    """A verb was called after ``close``."""


class ForkedStoreError(TensorKVError, RuntimeError):
    """A store made by the parent process was used in a forked child."""


def encode(error: BaseException) -> list[str]:
    """Return an error as plain data, to be raised in another process.

    >>> decode(encode(ArgumentError("push: no keys")))
    ArgumentError('push: no keys')
    """
    return [type(error).__name__, str(error)]


def decode(data: Sequence[str]) -> TensorKVError:
    """Return the error that ``encode`` has encoded; a class that is unknown here becomes a ``TensorKVError``.

    >>> decode(["NewError", "of a later version"])
    TensorKVError('of a later version')
    """
    name, text = data
    kind = globals().get(name)
    is_known = isinstance(kind, type) and issubclass(kind, TensorKVError)
    return (kind if is_known else TensorKVError)(text)  # type: ignore[misc]


def message_of(error: BaseException) -> str:
    """Return the message of anybody's error; its ``__str__`` may raise.

    >>> message_of(ValueError("too long"))
    'too long'
    """
    try:
        return str(error)
    except Exception:
        return "its message cannot be shown"


class SparseOutWarning(UserWarning):
    """``pull`` skipped a sparse ``out``, which ``row_sparse_pull`` fills."""


# Choices that suggestion looks at.
_COMPARED = 500


def suggestion(word: object, choices: Iterable[object]) -> str:
    """Return ``' (did you mean "x"?)'`` for the choice nearest to ``word``, or ``''``."""
    text = str(word)
    named = ((str(choice), choice) for choice in choices)
    of_similar_length = (each for each in named if abs(len(each[0]) - len(text)) <= len(text) // 3 + 1)
    # Servers compare them while others wait.
    known = dict(islice(of_similar_length, _COMPARED))
    near = get_close_matches(text, list(known), n=1)
    return f" (did you mean {quote(known[near[0]])}?)" if near else ""


def quote(key: object) -> str:
    """Show a key as messages do: ``"w"`` for a str, ``3`` for an int."""
    return f'"{key}"' if isinstance(key, str) else repr(key)


# Longer values are shown by their type. Repr limits depth and length: arguments may be of any size.
_SHOWN = 60
_repr = Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = _SHOWN


def show(thing: Any) -> str:
    """Show an argument in one short line: plain values as they are, everything else by its type.

    >>> show(3.5), show((2, 3)), show(iter([1])), show(dict)
    ('3.5', '(2, 3)', 'a list_iterator', 'the class dict')
    >>> import torch
    >>> show(torch.float32), show(torch.zeros(2, 3)), show([["w" * 40] * 3])
    ('torch.float32', 'a Tensor of shape (2, 3) and dtype torch.float32', 'a list')
    """
    if isinstance(thing, type):
        return f"the class {thing.__name__}"
    name = type(thing).__name__
    article = f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"
    shape, dtype = getattr(thing, "shape", None), getattr(thing, "dtype", None)
    if isinstance(shape, tuple) and dtype is not None:
        return f"{article} of shape {tuple(shape)} and dtype {dtype}"
    shown = _repr.repr(thing)
    return shown if len(shown) <= _SHOWN and shown.isprintable() and " at 0x" not in shown else article


def install_hint(extra: str) -> str:
    """Say how to install an extra: from a checkout, since the name may be another package's on PyPI.

    >>> install_hint("ray")
    "in a checkout of tensorkv: pip install '.[ray]'"
    """
    return f"in a checkout of tensorkv: pip install '.[{extra}]'"


def no_attribute(owner: object, name: str, foreign: Mapping[str, str]) -> AttributeError:
    """Return the error about an attribute that an object does not have.

    Args:
        owner: the object.
        name: of the attribute.
        foreign: names that users of other packages may try, and what to use instead.

    >>> no_attribute(3, "add", {"add": "use +"})
    AttributeError("'int' object has no attribute 'add'; use +")
    """
    hint = f"; {foreign[name]}" if name in foreign else ""
    return AttributeError(f"{type(owner).__name__!r} object has no attribute {name!r}{hint}", name=name, obj=owner)


@contextmanager
def naming(call: str) -> Iterator[None]:
    """Put the call, such as ``push("w")``, in front of the messages of errors that do not begin with its verb."""
    try:
        yield
    except TensorKVError as error:
        if not str(error).startswith(call.partition("(")[0]):
            error.args = (f"{call}: {error}",)
        raise
