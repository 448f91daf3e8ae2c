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


def spread(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return the spread of each contender's times in seconds."""
    return {
        name: {"p50_ms": 1e3 * median(t), "p90_ms": 1e3 * quantile(t, 0.9), "max_ms": 1e3 * max(t)}
        for name, t in times.items()
    }


def ratios(times: Mapping[str, Sequence[float]], peers: Sequence[str], ours: str = "tensorkv") -> dict[str, Any]:
    """Return for each peer that was measured its times divided by ours: of the medians, the least, the largest.

    >>> ratios({"tensorkv": [1, 2], "numpy": [3, 3]}, ("numpy", "torch"))
    {'numpy': {'median': 2.0, 'min': 1.5, 'max': 3.0}}
    """
    found = {}
    for name in peers:
        if name in times and ours in times:
            each = [theirs / own for theirs, own in zip(times[name], times[ours], strict=True)]
            found[name] = {"median": median(times[name]) / median(times[ours]), "min": min(each), "max": max(each)}
    return found


def summarize(work: Mapping[str, Any]) -> dict[str, Any]:
    """Return the spread of each contender, the ratios of peers to tensorkv, and the distance to the limit."""
    summary: dict[str, Any] = {}
    for verb in VERBS:
        times = work["times_s"][verb]
        summary[verb] = {"spread": spread(times), "ratios": ratios(times, PEERS)}
    copies = [seconds for verb in VERBS for seconds in work["times_s"][verb]["copy"]]
    bandwidth = work["copy_nbytes"] / median(copies)
    limit_s = work["moved_nbytes"] / bandwidth
    summary["copy_gb_per_s"] = bandwidth / 1e9
    summary["limit_ms"] = 1e3 * limit_s
    summary["times_limit"] = {verb: median(work["times_s"][verb]["tensorkv"]) / limit_s for verb in VERBS}
    return summary


def markdown(result: Mapping[str, Any]) -> str:
    """Return the whole report of one run."""
    given = f"tensorkv is given {result['arguments']['arrays']} arrays"
    lines = ["# One machine: tensorkv, its peers and the memory's limit", "", *conditions(result, given, NAMES), ""]
    if result["works"]:
        lines += [*_ratios(result), "", *_limits(result), "", *_spreads(result), ""]
    if result.get("growth"):
        lines += [*_growth(result["growth"]), ""]
    if result.get("memory"):
        lines += [*_memory(result["memory"]), ""]
    return "\n".join(lines)


def conditions(result: Mapping[str, Any], given: str, names: Mapping[str, str]) -> list[str]:
    """Return the list of when, where and with what it was measured, and what was not.

    Args:
        result: of the run.
        given: what contenders work with.
        names: what contenders are called.
    """
    machine, versions = result["machine"], result["versions"]
    loads = [" ".join(f"{each:.2f}" for each in machine[when]) for when in ("load_before", "load_after")]
    reps = result["arguments"]["reps"]
    memory = f"{machine['memory_nbytes'] / 2**30:.0f} GiB"
    lines = [
        f"- {result['date']}, git revision {result['git'] or 'unknown'}",
        f"- {machine['cpu']}, {machine['cores']} cores, {memory}, {machine['kernel']}",
        f"- load average before: {loads[0]}; after: {loads[1]}",
        "- " + ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"- float32; {given}; {reps} repetitions in turns",
    ]
    if result["quick"]:
        lines.append("- **A quick run at toy sizes: it shows that the benchmark works, not how fast anything is.**")
    lines += [f"- {name} is {text}" for name, text in machine["environment"].items()]
    lines += [f"- **{names.get(name, name)} was not measured**: {text}" for name, text in result["missing"].items()]
    return lines


def _ratios(result: Mapping[str, Any]) -> list[str]:
    heads = ["work", "call", "tensorkv, ms", *(f"{NAMES[peer]} ÷ tensorkv" for peer in PEERS)]
    rows = []
    for work in result["works"]:
        for verb in VERBS:
            found = work["summary"][verb]
            cells = [ratio_text(found["ratios"].get(peer)) for peer in PEERS]
            rows.append([work["name"], f"`{verb}`", ms_text(found["spread"]["tensorkv"]["p50_ms"]), *cells])
    return [
        "## Beside the peers",
        "",
        "Median of the peer ÷ median of tensorkv; in brackets the least and the largest ratio of one repetition. "
        "Above 1, tensorkv is faster.",
        "",
        *table(heads, rows),
    ]


def _limits(result: Mapping[str, Any]) -> list[str]:
    heads = ["work", "bytes to move", "copy, GB/s", "limit, ms", "`pushpull`, ms", "`pushpull`, × limit"]
    rows = []
    for work in result["works"]:
        found = work["summary"]
        ours = found["pushpull"]["spread"]["tensorkv"]["p50_ms"]
        cells = [
            nbytes_text(work["moved_nbytes"]),
            f"{found['copy_gb_per_s']:.1f}",
            ms_text(found["limit_ms"]),
            ms_text(ours),
        ]
        rows.append([work["name"], *cells, times_text(found["times_limit"]["pushpull"])])
    return [
        "## Beside the limit of the memory",
        "",
        "limit = bytes to move ÷ copy bandwidth of the same minutes. Bytes to move: each part read once, the value "
        "written once (assign), or the value and the momentum read and written once (SGD), each out written once. "
        "What fits into the processor's cache can be below the limit; for tiny arrays the cost is that of a call.",
        "",
        *table(heads, rows),
    ]


def _spreads(result: Mapping[str, Any]) -> list[str]:
    heads = ["work", "call", "who", "p50, ms", "p90, ms", "max, ms"]
    rows = []
    for work in result["works"]:
        for verb in VERBS:
            for name, found in work["summary"][verb]["spread"].items():
                if name in NAMES:
                    cells = [ms_text(found[each]) for each in ("p50_ms", "p90_ms", "max_ms")]
                    rows.append([work["name"], f"`{verb}`", NAMES[name], *cells])
    return ["## Spread", "", "Milliseconds of one call with all keys.", "", *table(heads, rows)]


def _growth(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for line in lines:
        first, last = line["points"][0], line["points"][-1]
        cells = [
            f"{first['x']:,} → {last['x']:,}",
            f"{ms_text(first['ms'])} → {ms_text(last['ms'])}",
            f"{line['slope']:.2f}",
        ]
        rows.append([line["title"], line["rule"], *cells])
    return [
        "## How the cost grows",
        "",
        "Median of `pushpull`. The slope is that of the upper half in a log-log plot: 1 is proportional.",
        "",
        *table(["what grows", "rule", "from → to", "ms", "slope"], rows),
    ]


def _memory(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = []
    for row in rows:
        found = [nbytes_text(row[each]) for each in ("before_nbytes", "state_nbytes", "added_nbytes")]
        cells.append([row["work"], NAMES[row["who"]], *found, f"{row['added_nbytes'] / row['value_nbytes']:.2f}"])
    return [
        "## Memory of a push",
        "",
        "Of a process of its own. Before: what is resident before the first push, that is values, parts and the "
        "libraries. State: the optimizer's momentum. Added: the peak during some pushes, less the two.",
        "",
        *table(["work", "who", "before", "state", "added", "added ÷ values"], cells),
    ]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table; columns of numbers are aligned to the right."""
    texts = sum(head in ("work", "call", "who", "rule", "what grows") for head in heads)
    marks = ["---"] * texts + ["---:"] * (len(heads) - texts)
    return ["| " + " | ".join(row) + " |" for row in (heads, marks, *rows)]


def ratio_text(ratio: Mapping[str, float] | None) -> str:
    """Return a ratio and its range; a dash where there is none."""
    if ratio is None:
        return "–"
    return f"**{times_text(ratio['median'])}** ({times_text(ratio['min'])} – {times_text(ratio['max'])})"


def times_text(number: float) -> str:
    """Return a factor with as many digits as say something.

    >>> times_text(1.234), times_text(12.34), times_text(1234)
    ('1.23', '12.3', '1,234')
    """
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def ms_text(number: float) -> str:
    """Return milliseconds with as many digits as say something."""
    return f"{number:.1f}" if number >= 10 else f"{number:.2f}" if number >= 1 else f"{number:.3g}"


def nbytes_text(count: float) -> str:
    """Return a count of bytes with its unit."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
