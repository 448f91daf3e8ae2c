"""Report on a running store on parameter servers, for ``tensorkv top``: rates are between two readings of its stats."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tensorkv.errors import EngineNotFoundError, install_hint

from .inspect import printable, size

_PUSHES = ("push", "pushpull")
_PULLS = ("pull", "pushpull", "pull_rows")
_COLOURS = {"up": "green", "alive": "green", "down": "red", "dead": "red"}


def run(
    name: str,
    address: str | None,
    every_s: float,
    *,
    once: bool = False,
    as_json: bool = False,
    timeout_s: float = 10.0,
) -> None:
    """Show a store until it ends, or until Ctrl-C, without disturbing it.

    Args:
        name: of the store.
        address: of its Ray cluster (None: ``RAY_ADDRESS``, else the cluster on this machine that has the store).
        every_s: seconds between two readings, over which rates are computed.
        once: print one report.
        as_json: print each report as a line of JSON (see ``report``).
        timeout_s: how long servers may take to answer, in seconds.

    Raises:
        EngineNotFoundError: Ray is not installed.
        ServerDeadError: there is no such store, or it has ended.
    """
    try:
        from tensorkv.engines.ps.ray.observer import observe
    except ImportError as error:
        raise EngineNotFoundError(f"top needs Ray ({error}); {install_hint('ray')}") from error
    observer = observe(name, address, timeout_s)
    console = Console()
    is_live = console.is_terminal and not once and not as_json
    with Live(console=console, screen=True, auto_refresh=False) if is_live else nullcontext() as live:
        for found in _reports(observer, every_s):
            if live is not None:
                live.update(draw(found), refresh=True)
            elif as_json:
                print(json.dumps(found), flush=True)
            else:
                console.print(draw(found))
            if once:
                return


def _reports(observer: Any, every_s: float) -> Iterator[dict[str, Any]]:
    before, start = observer.stats(), time.monotonic()
    while True:
        time.sleep(every_s)
        after, now = observer.stats(), time.monotonic()
        yield report(observer.settings, before, after, now - start)
        before, start = after, now


def report(settings: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any], seconds: float) -> Any:
    """Return what two readings of a store's stats say, as plain data.

    Args:
        settings: of the store.
        before, after: its stats.
        seconds: between them.

    Returns:
        A dict. Rates are per second and count requests at servers: a push to two servers counts at each. ``log_nbytes``
        is None without a folder; the values of a server are None while it does not answer. ``compression`` has the
        bytes of compressed gradients and pulls since the servers started, and those that they have without it.

    >>> stats = {"ahead": 1, "most_ahead": 3, "waits": 0, "waited_s": 0.0, "num_keys": 0, "nbytes": 0, "clients": 1}
    >>> stats |= {"snapshots": 0, "server_compression": {}, "servers": [None]}
    >>> found = report({"name": "a"}, stats, stats, 1.0)
    >>> found["ahead"], found["servers"][0]["state"]
    (1, 'down')
    """
    pairs = list(zip(before["servers"], after["servers"], strict=True))
    servers = [_server(index, old, new, seconds) for index, (old, new) in enumerate(pairs)]
    plain = ("num_keys", "nbytes", "clients", "ahead", "most_ahead", "waits", "waited_s", "snapshots")
    return {
        "store": dict(settings),
        "seconds": round(seconds, 3),
        **{word: after[word] for word in plain},
        **{word: _sum(servers, word) for word in ("pushes_per_s", "pulls_per_s", "nbytes_per_s", "log_nbytes")},
        "compression": dict(after["server_compression"]),
        "servers": servers,
        "workers": _workers([new for _, new in pairs if new is not None]),
    }


def _sum(servers: list[dict[str, Any]], word: str) -> Any:
    found = [each[word] for each in servers if each[word] is not None]
    return round(sum(found), 3) if found else None


def _server(index: int, old: Mapping[str, Any] | None, new: Mapping[str, Any] | None, seconds: float) -> dict[str, Any]:
    words = ("host", "pid", "keys", "nbytes", "pushes_per_s", "pulls_per_s", "nbytes_per_s", "waits", "log_nbytes")
    found: dict[str, Any] = {"index": index, "state": "down", **dict.fromkeys(words)}
    if new is None:
        return found
    found |= {"state": "up", **{word: new[word] for word in ("host", "pid", "keys", "nbytes", "waits")}}
    found["log_nbytes"] = new.get("wal", {}).get("log_nbytes")
    # A server that was restarted counts from 0.
    verbs = old["verbs"] if old is not None and old["pid"] == new["pid"] else {}
    for word, names, what in (
        ("pushes_per_s", _PUSHES, "calls"),
        ("pulls_per_s", _PULLS, "calls"),
        ("nbytes_per_s", {*_PUSHES, *_PULLS}, "nbytes"),
    ):
        more = sum(_count(new["verbs"], name, what) - _count(verbs, name, what) for name in names)
        found[word] = round(more / seconds, 3)
    return found


def _count(verbs: Mapping[str, Any], name: str, what: str) -> int:
    return int(verbs[name][what]) if name in verbs else 0


def _workers(told: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the state of each worker, and the highest round in which a server has seen it."""
    if not told:
        return []
    rounds: dict[int, int] = {}
    for each in told:
        for rank, count in each["rounds"]:
            rounds[rank] = max(rounds.get(rank, 0), count)
    first = max(rounds.values(), default=0)
    one = told[0]
    return [
        {"rank": rank, "state": _state(rank, one), "round": count, "behind": first - count}
        for rank, count in sorted(rounds.items())
    ]


def _state(rank: int, told: Mapping[str, Any]) -> str:
    if rank in told["connected"]:
        return "alive"
    if rank in told["dead"]:
        return "dead"
    return "expected" if rank in told["live"] else "left"


# ---------------------------------------------------------------- drawing


def draw(found: Mapping[str, Any]) -> Group:
    """Return a report for a terminal."""
    store = found["store"]
    limit = "" if store["staleness"] is None else f", staleness {store['staleness']}"
    kept = "in memory" if store["path"] is None else f"{printable(store['path'])} ({store['durability']})"
    lines = [
        f"store {printable(store['name'])}: {store['mode']}{limit}, {kept}",
        f"keys: {found['num_keys']}, {size(found['nbytes'])}; clients: {found['clients']}; "
        f"snapshots: {found['snapshots']}",
        f"{found['pushes_per_s'] or 0:.0f} pushes/s, {found['pulls_per_s'] or 0:.0f} pulls/s, "
        f"{size(int(found['nbytes_per_s'] or 0))}/s",
        f"staleness: {found['ahead']} rounds now, {found['most_ahead']} at most; "
        f"{found['waits']} waits, {found['waited_s']:.1f} s",
    ]
    traffic = found["compression"]
    for what, way in (("gradients", "received"), ("pulls", "sent")):
        raw_nbytes = traffic[f"{way}_raw_nbytes"]
        if raw_nbytes:
            lines.append(f"compressed {what}: {size(traffic[f'{way}_nbytes'])} for {size(raw_nbytes)}")
    return Group(Text("\n".join(lines)), _servers_table(found["servers"]), _workers_table(found["workers"]))


def _servers_table(servers: list[dict[str, Any]]) -> Table:
    drawn = _table("server", "state", "host", "pid", "keys", "size", "push/s", "pull/s", "waits", "log")
    for each in servers:
        if each["state"] == "down":
            drawn.add_row(str(each["index"]), _coloured("down"))
            continue
        log = "" if each["log_nbytes"] is None else size(each["log_nbytes"])
        rates = [f"{each[word]:.0f}" for word in ("pushes_per_s", "pulls_per_s")]
        cells = [
            printable(each["host"]),
            str(each["pid"]),
            str(each["keys"]),
            size(each["nbytes"]),
            *rates,
            str(each["waits"]),
            log,
        ]
        drawn.add_row(str(each["index"]), _coloured(each["state"]), *cells)
    return drawn


def _workers_table(workers: list[dict[str, Any]]) -> Table:
    drawn = _table("worker", "state", "round", "behind")
    for each in workers:
        drawn.add_row(str(each["rank"]), _coloured(each["state"]), str(each["round"]), str(each["behind"]))
    return drawn


def _table(*names: str) -> Table:
    drawn = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for name in names:
        drawn.add_column(name, justify="left" if name in ("state", "host") else "right", no_wrap=True)
    return drawn


def _coloured(state: str) -> Text:
    return Text(state, style=_COLOURS.get(state, "yellow"))
