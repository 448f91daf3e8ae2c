"""The messages between clients and servers: a dataclass for each verb, checked when it is decoded; no pickle.

A request is a head, which is JSON, a layout and a payload of tensors. The head has the verb, the sender and the fields
of the message. A reply is a head and a payload.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from types import UnionType
from typing import Any, Generic, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch

from tensorkv.arrays import interop
from tensorkv.arrays.arguments import Key, check_keys
from tensorkv.arrays.packing import COMPACT, Item, join_layout, split_layout, unpack
from tensorkv.arrays.rows import Rows
from tensorkv.arrays.slices import Slices
from tensorkv.arrays.spec import KeySpec
from tensorkv.compression import COMPRESSED_DTYPES, Codec, Words, decoded
from tensorkv.errors import ArgumentError, ValueMismatchError, quote, show
from tensorkv.runtime.recent import Recent
from tensorkv.shard.entry import Part

# Bytes of the head and of the layout, before both.
_SIZES = struct.Struct("<II")
_ALIGN = 16

# The dtypes in which values of float32 and float64 may be pulled.
PULL_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

# ---------------------------------------------------------------- verbs


@dataclass(kw_only=True)
class Message:
    """What a client asks of a server."""


@dataclass(kw_only=True)
class Push(Message):
    """Update keys with the sums in the payload; the layout names them.

    Args:
        pulls: reply with the new values.
        checksum: of the layout that the client expects of the reply.
        pull_dtype: a name in ``PULL_DTYPES`` in which the reply has them (None: as they are).
        round: in mode sync, the name of the list of keys, the number of the round, and the first round to which this
            worker may still push.
        counts: in mode sync, for means, of how many parts the part of each key is the sum (None: of one).
        scale: of all gradients, if the client has decided on it (None: the server does, if it is to be decided).
        codec: of those parts that are compressed (None: none is).
        late: apply the push alone, since other servers have applied it in a round that was closed here without it.
        must_complete: refuse slices that leave a value incomplete.
    """

    pulls: bool = False
    checksum: int | None = None
    pull_dtype: str | None = None
    round: list[Any] | None = None
    counts: list[Any] | None = None
    scale: float | None = None
    codec: dict[str, Any] | None = None
    late: bool = False
    must_complete: bool = False


@dataclass(kw_only=True)
class CheckSlices(Message):
    """Refuse what a push of slices would be refused for; the payload has the bounds of those of each key.

    Args:
        must_complete: as of ``Push``.
    """

    must_complete: bool = False


@dataclass(kw_only=True)
class Pull(Message):
    """Reply with the values of the keys that the layout lists.

    Args:
        checksum: of the layout that the client expects of the reply.
        pull_dtype: as of ``Push``.
        snapshot: to read (None: the present values).
        regions: of each key, the bounds of the part of what the server holds (None: all).
        in_place: reply with where the values are, in memory of this host, if they can be read there; they stay as they
            are until ``EndRead``, or the next such pull of this session.
    """

    checksum: int | None = None
    pull_dtype: str | None = None
    snapshot: str | None = None
    regions: list[Any] | None = None
    in_place: bool = False


@dataclass(kw_only=True)
class EndRead(Message):
    """Reply whether the values that this session has read in place were held until now.

    Args:
        snapshot: that was read, and is held for longer (None: the present values).
    """

    snapshot: str | None = None


@dataclass(kw_only=True)
class WaitForVersion(Message):
    """Reply when the keys that the layout lists have a version."""

    min_version: int = 0


@dataclass(kw_only=True)
class PullRows(Message):
    """Reply with the rows whose ids are in the payload.

    Args:
        pull_dtype: as of ``Push``.
        snapshot: to read (None: the present values).
    """

    pull_dtype: str | None = None
    snapshot: str | None = None


@dataclass(kw_only=True)
class Init(Message):
    """Add keys with the values in the payload; reply with the ``changes`` of a listing before and after it.

    The layout is that of a push.

    Args:
        kinds: metadata that several keys share.
        keys: those of the layout.
        indices: of each key's kind.
        orders: of each key's init.
    """

    kinds: list[Any]
    keys: list[Any]
    indices: list[Any]
    orders: list[Any]


@dataclass(kw_only=True)
class Restore(Message):
    """Replace everything by the contents of a checkpoint.

    Args:
        body: its manifest.
        metadata: of the keys, by the JSON of each; other checkpoints than those of a store leave it as it is.
    """

    body: Any
    metadata: dict[str, Any]


@dataclass(kw_only=True)
class Delete(Message):
    """Delete keys; reply as to ``Init``."""

    keys: list[Any]


@dataclass(kw_only=True)
class SetRule(Message):
    """Set an optimizer; None sets assignment.

    Args:
        optimizer: as plain data.
        number: how often this client has set the rule in calls that all workers make, with this time (0: it is none).
    """

    optimizer: dict[str, Any] | None = None
    number: int


@dataclass(kw_only=True)
class SetHyperparameters(Message):
    """Change numbers of the optimizer, for some keys or all (None)."""

    numbers: dict[str, Any]
    keys: list[Any] | None = None


@dataclass(kw_only=True)
class WaitForRule(Message):
    """Reply when rank 0 has set the rule so often, with how often it has by then and its last optimizer's name."""

    number: int


@dataclass(kw_only=True)
class ListKeys(Message):
    """Reply with the optimizer, and with every key and its metadata unless the client knows them.

    Args:
        known: the ``changes`` of the listing that the client has (None: it has none).
    """

    known: list[Any] | None = None


@dataclass(kw_only=True)
class Info(Message):
    """Reply with the versions and sizes of keys."""

    keys: list[Any]


@dataclass(kw_only=True)
class Stats(Message):
    """Reply with counters."""


@dataclass(kw_only=True)
class Connect(Message):
    """Reply with a rank: the one that is asked for, or a free one.

    Args:
        wanted_rank: the one that is asked for.
        reader: whether a free one is to be above those of workers.
    """

    wanted_rank: int | None = None
    reader: bool = False


@dataclass(kw_only=True)
class Disconnect(Message):
    """Remove this client.

    Args:
        broken: another server of the store is dead, so that this one is of no more use.
    """

    broken: bool = False


@dataclass(kw_only=True)
class Heartbeat(Message):
    """Say that this client is alive; reply with what tells whether keys have changed.

    Args:
        given_up: requests to several servers that are not sent again though one may not have got them: the number of
            each, with the client that has sent it.
    """

    given_up: list[Any] | None = None


@dataclass(kw_only=True)
class Claim(Message):
    """Reply when this client alone may create and delete keys; claims are numbered."""

    number: int


@dataclass(kw_only=True)
class Unclaim(Message):
    """Give a claim back."""

    number: int


@dataclass(kw_only=True)
class Leave(Message):
    """Count this worker as left; reply when all have left for the ``number``th time."""

    number: int


@dataclass(kw_only=True)
class Barrier(Message):
    """Reply when every live worker has reached barrier ``number``."""

    number: int


@dataclass(kw_only=True)
class Broadcast(Message):
    """Reply with rank 0's text ``number``, which the others leave out."""

    number: int
    text: str | None = None


@dataclass(kw_only=True)
class KeepOwed(Message):
    """Keep what a worker owes of compressed gradients, which is in the payload, until it was taken.

    Args:
        token: of a save or load; "" drops what is kept for any.
        worker: its rank; what was kept for it before is dropped.
    """

    token: str
    worker: int


@dataclass(kw_only=True)
class TakeOwed(Message):
    """Reply with what was kept for a worker.

    Args:
        token, worker: as of ``KeepOwed``.
        waits: reply when that worker has sent it, or is dead or has left.
    """

    token: str
    worker: int
    waits: bool = False


@dataclass(kw_only=True)
class Prepare(Message):
    """Begin a snapshot: hold new requests, and reply with each client's last request to several servers.

    Args:
        release: if it is to be a release, its name; the reply has a number for it.
    """

    release: str | None = None


@dataclass(kw_only=True)
class Commit(Message):
    """Take the snapshot that was prepared.

    Args:
        wanted: by client, its last request and the servers of that request, which are to be applied first.
        snapshot: the name under which the values are held (None: reply with everything instead).
        releases: whether to reply with the releases, too.
        release: hold them as a release of this name instead, which readers do not see yet.
        number: of the release.
        keys: of the release (None: all).
        attempt: of the client to publish it.
    """

    wanted: dict[str, Any]
    snapshot: str | None = None
    releases: bool = False
    release: str | None = None
    number: int = 0
    keys: list[Any] | None = None
    attempt: str = ""


@dataclass(kw_only=True)
class Abort(Message):
    """End the snapshot that was prepared."""


@dataclass(kw_only=True)
class DropSnapshot(Message):
    """Release a snapshot."""

    snapshot: str


@dataclass(kw_only=True)
class Publish(Message):
    """Hold the present values as a release, which readers see at once; for a store of one server.

    Args:
        release: its name.
        keys: of the values (None: all).
        keep: how many of the newest releases stay (None: all).
    """

    release: str
    keys: list[Any] | None = None
    keep: int | None = None


@dataclass(kw_only=True)
class ShowRelease(Message):
    """Let readers see a release; reply with the names of all that stay, and its number and generation. To server 0.

    Args:
        release: its name.
        keep: how many of the newest releases stay (None: all).
    """

    release: str
    keep: int | None = None


@dataclass(kw_only=True)
class Unpublish(Message):
    """Drop a release; reply as for ``ShowRelease``.

    Args:
        release: its name.
        missing_ok: drop one that this client has begun and readers do not see, if there is one.
    """

    release: str
    missing_ok: bool = False


@dataclass(kw_only=True)
class KeepReleases(Message):
    """Drop all releases up to a number but those of some names, which server 0 has.

    Args:
        number: of the newest that may be dropped.
        releases: the names.
        generation: of the releases on server 0; where others have been loaded meanwhile, nothing is dropped.
    """

    number: int
    releases: list[Any]
    generation: str


@dataclass(kw_only=True)
class ListReleases(Message):
    """Reply with the names and numbers of the releases that readers see."""


@dataclass(kw_only=True)
class WaitForRelease(Message):
    """Reply with the newest release when it is newer than another one.

    Args:
        after: the name of the other one (None: any release will do).
    """

    after: str | None = None


@dataclass(kw_only=True)
class OpenRelease(Message):
    """Hold a release for this client, and reply with its number and generation, its keys, versions and metadata.

    Args:
        release: its name.
        snapshot: the name under which it is held and read.
        lease_s: how long it stays after it was last read.
        known: the ``changes`` of an earlier reply; if they are the same, the keys and their metadata are left out.
        generation: that the release has to be of, as an earlier reply has told (None: any).
    """

    release: str
    snapshot: str
    lease_s: float
    known: str | None = None
    generation: str | None = None


@dataclass(kw_only=True)
class FindChanges(Message):
    """Reply with what has changed in one release since another one; with all values if that is not held.

    Server 0 refuses a release that was never published, or is newer.

    Args:
        release: the newer one.
        since: the older one (None: reply with all values).
        snapshot: under which this client holds the newer one.
    """

    release: str
    snapshot: str
    since: str | None = None


@dataclass(kw_only=True)
class Digests(Message):
    """Reply with the digest of each key of a release.

    Args:
        release: its name.
        snapshot: under which this client holds it.
    """

    release: str
    snapshot: str


VERBS = {re.sub(r"\B([A-Z])", r"_\1", kind.__name__).lower(): kind for kind in Message.__subclasses__()}
"""The class of each verb, which is its name in snake case."""
# What a user has called that sends a message of another name.
CALLS = {
    "wait_for_version": "pull",
    "end_read": "pull",
    "pull_rows": "row_sparse_pull",
    "restore": "load",
    "set_rule": "set_optimizer or set_updater",
    "wait_for_rule": "set_optimizer or set_updater",
    "list_keys": "keys",
    "connect": "create",
    "disconnect": "close",
    "claim": "init or delete",
    "unclaim": "init or delete",
    "keep_owed": "save or load",
    "take_owed": "save or load",
    "prepare": "snapshot",
    "commit": "snapshot",
    "abort": "snapshot",
    "drop_snapshot": "snapshot",
    "show_release": "publish",
    "keep_releases": "publish",
    "list_releases": "releases",
    "wait_for_release": "wait_release",
    "find_changes": "changes",
    "digests": "digest",
}
_NAMES = {message: verb for verb, message in VERBS.items()}


# ---------------------------------------------------------------- heads

M_co = TypeVar("M_co", bound=Message, covariant=True)


@dataclass(slots=True, kw_only=True)
class Sender:
    """Who sends a request, and its id.

    Args:
        owner: the process (None: an observer, which does not count as a client).
        client: the session, which numbers its requests and sends one at a time.
        seq: the number of the request.
        rank: of the worker (None: a reader).
        servers: to which the request goes, if it goes to several (None: to this one).
        poll_timeout_s: how long the request may wait for others before it is answered (None: the default).
    """

    owner: str | None
    client: str
    seq: int
    rank: int | None = None
    servers: list[Any] | None = None
    poll_timeout_s: float | None = None


@dataclass(slots=True)
class Request(Generic[M_co]):
    """A decoded request.

    Args:
        verb: its name.
        sender: of the request.
        message: of the verb.
        layout: of the payload; for a pull, the keys.
        payload: its bytes.
        out: memory in which the payload of the reply is put if it fits.
    """

    verb: str
    sender: Sender
    message: M_co
    layout: bytes = b"[]"
    payload: Any = b""
    out: torch.Tensor | None = None


def encode(message: Message, sender: dict[str, Any]) -> dict[str, Any]:
    """Return the head of a request as plain data.

    >>> encode(Barrier(number=3), {"owner": "p", "client": "p.0", "seq": 7})
    {'verb': 'barrier', 'owner': 'p', 'client': 'p.0', 'seq': 7, 'number': 3}
    """
    kind = type(message)
    defaults = _DEFAULTS[kind]
    own = {name: each for name, each in vars(message).items() if each is not defaults[name]}
    return {"verb": _NAMES[kind], **sender, **own}


def decode(
    head: dict[str, Any], layout: bytes = b"[]", payload: Any = b"", out: torch.Tensor | None = None
) -> Request[Message]:
    """Check the head of a request, and return it with its message typed.

    Raises:
        ArgumentError: an unknown verb, or a field that is unknown, missing or of another type.

    >>> decode({"verb": "barrier", "owner": "p", "client": "p.0", "seq": 7, "number": 3}).message
    Barrier(number=3)
    >>> decode({"verb": "barrier", "owner": "p", "client": "p.0", "seq": 7})
    Traceback (most recent call last):
        ...
    tensorkv.errors.ArgumentError: malformed request barrier: the field 'number' is missing
    """
    verb = head.get("verb")
    kind = VERBS.get(verb) if isinstance(verb, str) else None
    if kind is None or verb is None:
        raise ArgumentError(f"unknown request {verb!r}; client and server may be of different versions of tensorkv")
    own = dict(head)
    del own["verb"]
    sender = {name: own.pop(name) for name in _TYPES[Sender] if name in own}
    return Request(verb, _build(Sender, verb, sender), _build(kind, verb, own), layout, payload, out)


T = TypeVar("T")


def _build(kind: type[T], verb: str, values: dict[str, Any]) -> T:
    """Return a dataclass of values that are checked."""
    types = _TYPES[kind]
    for name, each in values.items():
        allowed = types.get(name)
        if allowed is None:
            raise ArgumentError(f"malformed request {verb}: unknown field {name!r}")
        if allowed and type(each) not in allowed:
            expected = " or ".join(each.__name__ for each in allowed)
            raise ArgumentError(
                f"malformed request {verb}: the field {name!r} is {type(each).__name__}, expected {expected}"
            )
    try:
        return kind(**values)
    except TypeError:
        missing = next(name for name, each in _DEFAULTS[kind].items() if each is MISSING and name not in values)
        raise ArgumentError(f"malformed request {verb}: the field {missing!r} is missing") from None


def _json_types(hint: Any) -> tuple[type, ...]:
    """Return the types that a value of this annotation has in JSON, () for any."""
    if hint is Any:
        return ()
    if isinstance(hint, UnionType):
        return tuple(each for part in get_args(hint) for each in _json_types(part))
    return (float, int) if hint is float else (get_origin(hint) or hint,)


_KINDS: list[type] = [Sender, *VERBS.values()]
_TYPES = {kind: {name: _json_types(hint) for name, hint in get_type_hints(kind).items()} for kind in _KINDS}
_DEFAULTS = {kind: {each.name: each.default for each in fields(kind)} for kind in _KINDS}


class Reply(NamedTuple):
    """What a server answers: plain data, and the bytes of tensors."""

    head: dict[str, Any]
    payload: torch.Tensor | None = None


# ---------------------------------------------------------------- bytes


def join(head: Mapping[str, Any], layout: bytes = b"[]", payload: Any = b"") -> bytes:
    """Return head, layout and a small payload as one message.

    >>> split(join({"verb": "pull"}, b'["w"]'))[:2]
    ({'verb': 'pull'}, b'["w"]')
    """
    text = COMPACT.encode(head).encode()
    if len(payload):
        # The payload is to begin where every dtype may.
        text += b" " * (-(_SIZES.size + len(text) + len(layout)) % _ALIGN)
    return b"".join([_SIZES.pack(len(text), len(layout)), text, layout, payload])


def split(message: bytes | bytearray) -> tuple[dict[str, Any], bytes, memoryview]:
    """Return what ``join`` has joined; the payload shares the message's memory."""
    words, layout = _SIZES.unpack_from(message)
    start = _SIZES.size + words
    view = memoryview(message)
    head = json.loads(str(view[_SIZES.size : start], "utf-8"))
    return head, bytes(view[start : start + layout]), view[start + layout :]


def room_for(nbytes: int, out: torch.Tensor | None) -> torch.Tensor:
    """Return memory for a payload: the beginning of ``out`` if that is large enough, else new memory."""
    if out is not None and len(out) >= nbytes:
        return out[:nbytes]
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


# ---------------------------------------------------------------- layouts


def pulled_dtype(dtype: torch.dtype, pull_dtype: str | None) -> torch.dtype:
    """Return the dtype in which values are pulled.

    Raises:
        ArgumentError: there is no such ``pull_dtype``.
    """
    if pull_dtype is None:
        return dtype
    if pull_dtype not in PULL_DTYPES:
        raise ArgumentError(f"malformed pull_dtype {show(pull_dtype)}; expected one of {', '.join(PULL_DTYPES)}")
    return PULL_DTYPES[pull_dtype] if dtype in (torch.float32, torch.float64) else dtype


@dataclass(frozen=True, slots=True)
class PushLayout:
    """The keys of a push, and how their parts lie in its payload.

    Args:
        keys: in order, each once.
        has_sums: whether all parts are sums, neither Rows nor slices nor words of a codec.
        has_slices: whether some are slices.
        layout: of the request.
    """

    keys: tuple[Key, ...]
    has_sums: bool
    has_slices: bool
    layout: bytes

    def parts(self, payload: Any, specs: Sequence[KeySpec], codec: Codec | None) -> list[Part]:
        """Return one part for each key; they share the payload's memory where they are not compressed.

        Args:
            payload: of the request.
            specs: of the keys.
            codec: of the parts that are compressed.

        Raises:
            LayoutError, ValueMismatchError: the payload does not fit the layout, the rows or the values.
        """
        items = iter(unpack(self.layout, payload))
        found: list[Any] = []
        coded: list[tuple[int, Item, KeySpec]] = []
        for item, spec in zip(items, specs, strict=False):
            if item.role == "ids":
                found.append(Rows(ids_of(item), next(items).tensor, (*spec.shape, 0)[0]))
            elif item.role == "bounds":
                found.append(Slices.from_tensors(item.tensor, next(items).tensor))
            elif item.role == "words":
                coded.append((len(found), item, spec))
                found.append(None)
            else:
                found.append(item.tensor)
        if coded:
            words = [_words_of(item, spec, codec) for _, item, spec in coded]
            known: Any = codec
            for (place, _, _), part in zip(
                coded, decoded(known, words, [spec.shape for _, _, spec in coded]), strict=True
            ):
                found[place] = part
        return found


def ids_of(item: Item) -> torch.Tensor:
    """Return what a payload has as the ids of rows, as compiled code and a log take them.

    Raises:
        ValueMismatchError: they are not one-dimensional int64.
    """
    ids = item.tensor
    if ids.dtype is not torch.int64 or ids.ndim != 1:
        raise ValueMismatchError(
            f"{quote(item.key)}: the ids of rows are {interop.dtype_name(ids.dtype)} {tuple(ids.shape)}; expected one "
            "dimension of int64"
        )
    return ids


def words_item(key: Key, words: Words) -> Item:
    """Return what a payload has of the words of a key, as numbers that begin where every dtype may."""
    return Item(key, "words", interop.take(words.view(np.int64)))


def words_text(keys: Sequence[Key], places: Sequence[slice]) -> bytes:
    """Return the layout of a payload that has nothing but the words of keys, one after another.

    Args:
        keys: in order.
        places: the bytes of each.

    >>> words_text(["w"], [slice(8, 24)])
    b'[["w","words","int64",[2]]]'
    """
    sizes = [(place.stop - place.start) // 8 for place in places]
    numbers = {size: number for number, size in enumerate(dict.fromkeys(sizes))}
    return join_layout(keys, [("words", torch.int64, [size]) for size in numbers], [numbers[size] for size in sizes])


def can_code(specs: Iterable[KeySpec]) -> bool:
    """Return whether gradients of keys are compressed."""
    return all(not spec.is_table and spec.dtype in COMPRESSED_DTYPES for spec in specs)


def _words_of(item: Item, spec: KeySpec, codec: Codec | None) -> Words:
    """Return the words that a payload has of a key."""
    if codec is None or not can_code([spec]) or item.tensor.dtype is not torch.int64:
        raise ValueMismatchError(f"malformed push: {quote(item.key)} has no gradient that is compressed")
    words, nbytes = item.tensor.numpy().view(np.uint8), codec.nbytes(spec.shape)
    if len(words) != -(-nbytes // 8) * 8:
        raise ValueMismatchError(
            f"push({quote(item.key)}): got {len(words)} bytes of {codec.name}, for {tuple(spec.shape)} it has {nbytes}"
        )
    return words


# Items that come in pairs, by the role of the first.
_PAIRS = {"ids": "rows", "bounds": "slices"}
_SECONDS = frozenset(_PAIRS.values())


def push_layout(layout: bytes) -> PushLayout:
    """Decode the layout of a push; dtypes and shapes are checked when its parts are taken, or compared with values'.

    Raises:
        LayoutError, ArgumentError: the layout is malformed.
    """
    found = _pushed.get(layout)
    if found is None:
        found = _push_layout(layout)
        _pushed.keep(layout, found, len(found.keys))
    return found


_pushed: Recent[bytes, PushLayout] = Recent(256)


def _push_layout(layout: bytes) -> PushLayout:
    keys, kinds, numbers = split_layout(layout)
    roles = {role for role, _, _ in kinds}
    has_sums = roles == {"sum"}
    if not has_sums:
        each = [kinds[number][0] for number in numbers]
        fits = all(
            _PAIRS.get(role) == (after if after in _SECONDS else None) and (after not in _SECONDS or key == next_key)
            for (key, role), (next_key, after) in pairwise(zip(keys, each, strict=True))
        )
        is_whole = bool(keys) and each[0] not in _SECONDS and _PAIRS.get(each[-1]) is None
        if not fits or not is_whole or roles - {"sum", "words", *_PAIRS, *_SECONDS}:
            raise ArgumentError(
                "malformed push layout; expected sums, words, pairs of ids and rows, or pairs of bounds and slices"
            )
        keys = tuple(key for key, role in zip(keys, each, strict=True) if role not in _SECONDS)
    if len(set(keys)) < len(keys):
        raise ArgumentError("duplicate key in a push layout")
    return PushLayout(keys, has_sums, "bounds" in roles, layout)


def keys_of(text: bytes) -> tuple[Key, ...]:
    """Decode the list of keys of a pull.

    >>> keys_of(b'["w", "b"]')
    ('w', 'b')
    """
    found = _pulled.get(text)
    if found is None:
        try:
            found = tuple(check_keys("pull", json.loads(text)))
        except (ValueError, TypeError, RecursionError) as error:
            raise ArgumentError(f"invalid key list: {error}") from None
        _pulled.keep(text, found, len(found))
    return found


_pulled: Recent[bytes, tuple[Key, ...]] = Recent(256)
