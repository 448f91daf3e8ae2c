"""Reports: from raw times to numbers, and from numbers to Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from contenders import NAMES
from works import VERBS

PEERS = ("mxnet", "torch", "numpy")


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile, between neighbours in proportion.

    >>> quantile([3, 1, 2], 0.5), quantile([0, 10], 0.9)
    (2.0, 9.0)
    """
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return float(ordered[below] + (place - below) * (ordered[above] - ordered[below]))


def summarize(work: Mapping[str, Any]) -> dict[str, Any]:
    """Return the spread of each contender, the ratios of peers to tensorkv, and the distance to the limit."""
    summary: dict[str, Any] = {}
    for verb in VERBS:
        times = work["times_s"][verb]
        spread = {
            name: {"p50_ms": 1e3 * median(t), "p90_ms": 1e3 * quantile(t, 0.9), "max_ms": 1e3 * max(t)}
            for name, t in times.items()
        }
        ours = times["tensorkv"]
        ratios = {}
        for name in PEERS:
            if name in times:
                each = [theirs / own for theirs, own in zip(times[name], ours, strict=True)]
                ratios[name] = {"median": median(times[name]) / median(ours), "min": min(each), "max": max(each)}
        summary[verb] = {"spread": spread, "ratios": ratios}
    copies = [seconds for verb in VERBS for seconds in work["times_s"][verb]["copy"]]
    bandwidth = work["copy_nbytes"] / median(copies)
    limit_s = work["moved_nbytes"] / bandwidth
    summary["copy_gb_per_s"] = bandwidth / 1e9
    summary["limit_ms"] = 1e3 * limit_s
    summary["times_limit"] = {verb: median(work["times_s"][verb]["tensorkv"]) / limit_s for verb in VERBS}
    return summary


def markdown(result: Mapping[str, Any]) -> str:
    """Return the whole report of one run."""
    lines = ["# One machine: tensorkv, its peers and the memory's limit", "", *_conditions(result), ""]
    if result["works"]:
        lines += [*_ratios(result), "", *_limits(result), "", *_spreads(result), ""]
    if result.get("growth"):
        lines += [*_growth(result["growth"]), ""]
    if result.get("memory"):
        lines += [*_memory(result["memory"]), ""]
    return "\n".join(lines)


def _conditions(result: Mapping[str, Any]) -> list[str]:
    machine, versions = result["machine"], result["versions"]
    loads = [" ".join(f"{each:.2f}" for each in machine[when]) for when in ("load_before", "load_after")]
    reps = result["arguments"]["reps"]
    memory = f"{machine['memory_nbytes'] / 2**30:.0f} GiB"
    lines = [
        f"- {result['date']}, git revision {result['git'] or 'unknown'}",
        f"- {machine['cpu']}, {machine['cores']} cores, {memory}, {machine['kernel']}",
        f"- load average before: {loads[0]}; after: {loads[1]}",
        "- " + ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"- float32; tensorkv is given {result['arguments']['arrays']} arrays; {reps} repetitions in turns",
    ]
    if result["quick"]:
        lines.append("- **A quick run at toy sizes: it shows that the benchmark works, not how fast anything is.**")
    lines += [f"- {name} is {text}" for name, text in machine["environment"].items()]
    lines += [f"- **{NAMES.get(name, name)} was not measured**: {text}" for name, text in result["missing"].items()]
    return lines


def _ratios(result: Mapping[str, Any]) -> list[str]:
    heads = ["work", "call", "tensorkv, ms", *(f"{NAMES[peer]} ÷ tensorkv" for peer in PEERS)]
    rows = []
    for work in result["works"]:
        for verb in VERBS:
            found = work["summary"][verb]
            cells = [_ratio(found["ratios"].get(peer)) for peer in PEERS]
            rows.append([work["name"], f"`{verb}`", _ms(found["spread"]["tensorkv"]["p50_ms"]), *cells])
    return [
        "## Beside the peers",
        "",
        "Median of the peer ÷ median of tensorkv; in brackets the least and the largest ratio of one repetition. "
        "Above 1, tensorkv is faster.",
        "",
        *_table(heads, rows),
    ]


def _limits(result: Mapping[str, Any]) -> list[str]:
    heads = ["work", "bytes to move", "copy, GB/s", "limit, ms", "`pushpull`, ms", "`pushpull`, × limit"]
    rows = []
    for work in result["works"]:
        found = work["summary"]
        ours = found["pushpull"]["spread"]["tensorkv"]["p50_ms"]
        cells = [_bytes(work["moved_nbytes"]), f"{found['copy_gb_per_s']:.1f}", _ms(found["limit_ms"]), _ms(ours)]
        rows.append([work["name"], *cells, _times(found["times_limit"]["pushpull"])])
    return [
        "## Beside the limit of the memory",
        "",
        "limit = bytes to move ÷ copy bandwidth of the same minutes. Bytes to move: each part read once, the value "
        "written once (assign), or the value and the momentum read and written once (SGD), each out written once. "
        "What fits into the processor's cache can be below the limit; for tiny arrays the cost is that of a call.",
        "",
        *_table(heads, rows),
    ]


def _spreads(result: Mapping[str, Any]) -> list[str]:
    heads = ["work", "call", "who", "p50, ms", "p90, ms", "max, ms"]
    rows = []
    for work in result["works"]:
        for verb in VERBS:
            for name, found in work["summary"][verb]["spread"].items():
                if name in NAMES:
                    cells = [_ms(found[each]) for each in ("p50_ms", "p90_ms", "max_ms")]
                    rows.append([work["name"], f"`{verb}`", NAMES[name], *cells])
    return ["## Spread", "", "Milliseconds of one call with all keys.", "", *_table(heads, rows)]


def _growth(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for line in lines:
        first, last = line["points"][0], line["points"][-1]
        cells = [f"{first['x']:,} → {last['x']:,}", f"{_ms(first['ms'])} → {_ms(last['ms'])}", f"{line['slope']:.2f}"]
        rows.append([line["title"], line["rule"], *cells])
    return [
        "## How the cost grows",
        "",
        "Median of `pushpull`. The slope is that of the upper half in a log-log plot: 1 is proportional.",
        "",
        *_table(["what grows", "rule", "from → to", "ms", "slope"], rows),
    ]


def _memory(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = []
    for row in rows:
        found = [_bytes(row[each]) for each in ("before_nbytes", "state_nbytes", "added_nbytes")]
        cells.append([row["work"], NAMES[row["who"]], *found, f"{row['added_nbytes'] / row['value_nbytes']:.2f}"])
    return [
        "## Memory of a push",
        "",
        "Of a process of its own. Before: what is resident before the first push, that is values, parts and the "
        "libraries. State: the optimizer's momentum. Added: the peak during some pushes, less the two.",
        "",
        *_table(["work", "who", "before", "state", "added", "added ÷ values"], cells),
    ]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    texts = sum(head in ("work", "call", "who", "rule", "what grows") for head in heads)
    marks = ["---"] * texts + ["---:"] * (len(heads) - texts)
    return ["| " + " | ".join(row) + " |" for row in (heads, marks, *rows)]


def _ratio(ratio: Mapping[str, float] | None) -> str:
    if ratio is None:
        return "–"
    return f"**{_times(ratio['median'])}** ({_times(ratio['min'])} – {_times(ratio['max'])})"


def _times(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def _ms(number: float) -> str:
    return f"{number:.1f}" if number >= 10 else f"{number:.2f}" if number >= 1 else f"{number:.3g}"


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
