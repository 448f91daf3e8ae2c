"""The message of workers that did not make the same call: which ranks called what, and where the calls differ first."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from tensorkv.errors import WorkerMismatchError


def mismatch(number: int, calls: dict[str, list[int]]) -> WorkerMismatchError:
    """Return the error that names which ranks made which call, and where two calls differ first.

    Args:
        number: of the call, from 0 on.
        calls: the ranks that made each call, by its text.
    """
    first = _first_difference(calls)
    # Other workers are told the beginning of the message.
    most = 100 if first else 300
    parts = [f"{name_ranks(ranks)}: {shorten(text, most)}" for text, ranks in calls.items()]
    return WorkerMismatchError(
        f"the workers' calls differ at collective call {number + 1}{first}: {'; '.join(parts)}. "
        f"Every worker must make the same calls with the same keys in the same order{_hint(calls)}"
    )


def name_ranks(ranks: Sequence[int]) -> str:
    """Return ascending ranks for a message, of any length.

    >>> name_ranks([1]), name_ranks([0, 2])
    ('rank 1', 'ranks 0, 2')
    >>> name_ranks([0, 2, 3, 4, 5]), name_ranks(range(1, 64, 2))
    ('ranks 0, 2-5', 'ranks 1, 3, 5, 7, 9, 11, 13, 15 and 24 more')
    """
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs[:8])
    rest = sum(map(len, runs[8:]))
    return f"rank{'s' if len(ranks) > 1 else ''} {text}" + (f" and {rest} more" if rest else "")


def _hint(calls: Iterable[str]) -> str:
    """Return what to do about the usual difference, workers with fewer batches."""
    verbs = {text.partition(" ")[0] for text in calls}
    return "; a worker that has fewer batches calls leave() before close()" if verbs > {"close"} else ""


def _first_difference(calls: Mapping[str, Sequence[int]]) -> str:
    """Return where two calls of one verb differ first, and what each has there; nothing if that says no more."""
    if len(calls) == 1:
        return f" after the first {len(next(iter(calls)))} characters"
    (left, left_ranks), (right, right_ranks), *_ = calls.items()
    (verb, _, mine), (other_verb, _, theirs) = left.partition(" "), right.partition(" ")
    if verb != other_verb or not mine.startswith("{") or not theirs.startswith("{"):
        return ""
    try:
        pair = json.loads(mine), json.loads(theirs)
        if any("rows" in call for call in pair):
            for call in pair:
                call.setdefault("rows", [False] * len(call["keys"]))
        where, *values = _walk("", *pair)
        # What differs for one key is named with the key.
        place = re.match(r"(?:values|rows)\[(\d+)\]", where)
        where += f" of {json.dumps(pair[0]['keys'][int(place[1])])}" if place else ""
        found = ["nothing" if value is None else shorten(json.dumps(value), 80) for value in values]
    except ValueError:
        # The ends of long texts are missing.
        at = next(at for at, (one, other) in enumerate(zip_longest(left, right)) if one != other)
        where, found = f"character {at}", [text[max(0, at - 40) : at + 40] for text in (left, right)]
    return f", first at {where} (rank {left_ranks[0]}: {found[0]}, rank {right_ranks[0]}: {found[1]})"


def _walk(where: str, left: Any, right: Any) -> tuple[str, Any, Any]:
    """Return the innermost place where two values differ first, and what each has there."""
    inner: Iterable[tuple[str, Any, Any]] = ()
    if isinstance(left, dict) and isinstance(right, dict):
        names = dict.fromkeys([*left, *right])
        inner = ((f"{where}.{name}" if where else name, left.get(name), right.get(name)) for name in names)
    elif isinstance(left, list) and isinstance(right, list):
        inner = ((f"{where}[{at}]", *pair) for at, pair in enumerate(zip_longest(left, right)))
    for place, one, other in inner:
        if one != other:
            return _walk(place, one, other)
    return where, left, right


def shorten(text: str, most: int) -> str:
    """Return a text for a message, without its middle if it is long."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
