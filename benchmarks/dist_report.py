"""The report of processes in step, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dist_contenders import NAMES, PEERS
from report import conditions, ms_text, nbytes_text, ratio_text, table, times_text

_GIVEN = "NumPy arrays, each rank pushes one part; one OpenMP thread a process (as torchrun sets it)"
# Of smaller values, other memory of a process is the larger part.
_LEAST_NBYTES = 50e6


def markdown(result: Mapping[str, Any]) -> str:
    """Return the whole report of one run."""
    lines = ["# Processes in step: tensorkv and its peers", "", *conditions(result, _GIVEN, NAMES), ""]
    near = [work for work in result["works"] if work["hosts"] == 1]
    far = [work for work in result["works"] if work["hosts"] > 1]
    if near:
        lines += [*_near(near), ""]
    if far:
        lines += [*_far(far), ""]
    if result["training"]:
        lines += [*_training(result["training"]), ""]
    if held := _memory(result["works"]):
        lines += [*held, ""]
    return "\n".join([*lines, *_spreads([*result["works"], *result["training"]]), ""])


def _near(works: Sequence[Mapping[str, Any]]) -> list[str]:
    heads = ["work", "tensorkv, ms", *(f"{NAMES[peer]} ÷ tensorkv" for peer in PEERS)]
    rows = [[work["name"], _ours(work), *_ratios(work, PEERS)] for work in works]
    return [
        "## On one host",
        "",
        "One exchange of all keys, from a common start to the end of the last rank. Median of the peer ÷ median of "
        "tensorkv; in brackets the least and the largest ratio of one repetition. Above 1, tensorkv is faster. "
        "All-reduce has no optimizer, so that it has no rows with SGD.",
        "",
        *table(heads, rows),
    ]


def _far(works: Sequence[Mapping[str, Any]]) -> list[str]:
    heads = ["work", "tensorkv, ms", "Gloo all_reduce ÷ tensorkv", "tensorkv sent", "Gloo all_reduce sent"]
    rows = []
    for work in works:
        sent = [_sent(work, name) for name in ("tensorkv", "gloo")]
        rows.append([work["name"], _ours(work), *_ratios(work, ("gloo",)), *sent])
    return [
        "## Between hosts",
        "",
        "The hosts are network namespaces of one machine, joined by a pair of virtual interfaces: such a cable costs "
        "time of the same cores, and has no bandwidth of its own. Sent: bytes on it in one call, both ways together.",
        "",
        *table(heads, rows),
    ]


def _training(works: Sequence[Mapping[str, Any]]) -> list[str]:
    heads = ["work", "tensorkv, ms", "tensorkv with overlap, ms", "DDP, ms", "DDP ÷ tensorkv", "DDP ÷ overlap", "loss"]
    rows = []
    for work in works:
        cells = [_p50(work, name) for name in ("tensorkv", "overlap", "ddp")]
        cells += [ratio_text(work["summary"][ratios].get("ddp")) for ratios in ("ratios", "overlap_ratios")]
        losses = next(iter(work["losses"].values()), [[]])[0]
        rows.append([work["name"], *cells, f"{losses[0]:.3g} → {losses[-1]:.3g}" if losses else "–"])
    return [
        "## A step of training",
        "",
        "zero_grad, forward, backward and step, with SGD and momentum: `tensorkv.Trainer`, whose store steps, beside "
        "`DistributedDataParallel` and `torch.optim.SGD` with their defaults. All have the same losses (checked).",
        "",
        *table(heads, rows),
    ]


def _memory(works: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for work in works:
        if work["keys"] > 1 or work["value_nbytes"] < _LEAST_NBYTES or work["hosts"] > 1:
            continue
        for name, found in work["memory_nbytes"].items():
            added = added_nbytes(found)
            per_rank = added["ranks"] / work["ranks"]
            cells = [nbytes_text(per_rank), times_text(per_rank / work["value_nbytes"])]
            rows.append([work["name"], NAMES[name], *cells, times_text(added["helpers"] / work["value_nbytes"])])
    if not rows:
        return []
    return [
        "## Memory",
        "",
        "What an exchange takes beyond the arrays that it is given: the most at a time, less what was there before "
        "the store was made. Memory that processes share counts once; files such as libraries do not count. "
        "Servers: all of them together.",
        "",
        *table(["work", "who", "a rank", "a rank ÷ values", "servers ÷ values"], rows),
    ]


def added_nbytes(found: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Return what was added at the most, to ranks and to helpers.

    >>> added_nbytes({"before": {"ranks": 10, "helpers": 1}, "most": {"ranks": 15, "helpers": 1}})
    {'ranks': 5, 'helpers': 0}
    """
    return {whose: found["most"][whose] - found["before"][whose] for whose in ("ranks", "helpers")}


def _spreads(works: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for work in works:
        for name, found in work["summary"]["spread"].items():
            rows.append([work["name"], NAMES[name], *(ms_text(found[each]) for each in ("p50_ms", "p90_ms", "max_ms"))])
    heads = ["work", "who", "p50, ms", "p90, ms", "max, ms"]
    return ["## Spread", "", "Milliseconds of one call with all keys, or of one step.", "", *table(heads, rows)]


def _ours(work: Mapping[str, Any]) -> str:
    return _p50(work, "tensorkv")


def _p50(work: Mapping[str, Any], name: str) -> str:
    found = work["summary"]["spread"].get(name)
    return ms_text(found["p50_ms"]) if found else "–"


def _ratios(work: Mapping[str, Any], peers: Sequence[str]) -> list[str]:
    return [ratio_text(work["summary"]["ratios"].get(peer)) for peer in peers]


def _sent(work: Mapping[str, Any], name: str) -> str:
    found = work["sent_nbytes"].get(name)
    return nbytes_text(found) if found is not None else "–"
