"""Reports: from raw times to numbers, and from numbers to Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any


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


def ratios(times: Mapping[str, Sequence[float]], pairs: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Return for each pair that was measured the times of the one ÷ the other: of medians, the least, the largest.

    >>> ratios({"tensorkv": [1, 2], "numpy": [3, 3]}, {"numpy": ("numpy", "tensorkv"), "torch": ("torch", "tensorkv")})
    {'numpy': {'median': 2.0, 'min': 1.5, 'max': 3.0}}
    """
    found = {}
    for name, (above, below) in pairs.items():
        if above in times and below in times:
            each = [over / under for over, under in zip(times[above], times[below], strict=True)]
            found[name] = {"median": median(times[above]) / median(times[below]), "min": min(each), "max": max(each)}
    return found


def section(
    title: str, text: str, heads: Sequence[str], rows: Sequence[Sequence[str]]
) -> list[str]:  # fmt: skip
    """Return the lines of a section with one table; none without rows."""
    return [f"## {title}", "", text, "", *table(heads, rows)] if rows else []


def spreads(works: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[str]:
    """Return the section that has the spread of every contender at every work."""
    verbs = len({verb for work in works for verb in work["summary"]}) > 1
    rows = []
    for work in works:
        for verb, summary in work["summary"].items():
            for name, found in summary["spread"].items():
                if name in names:
                    cells = [work["name"], *([f"`{verb}`"] if verbs else []), names[name]]
                    rows.append([*cells, *(ms_text(found[each]) for each in ("p50_ms", "p90_ms", "max_ms"))])
    heads = ["work", *(["call"] if verbs else []), "who", "p50, ms", "p90, ms", "max, ms"]
    return section("Spread", "Milliseconds of one call with all keys, or of one step of training.", heads, rows)


def p50_text(work: Mapping[str, Any], name: str, verb: str = "pushpull") -> str:
    """Return a contender's median in milliseconds; a dash if it was not measured."""
    found = work["summary"][verb]["spread"].get(name)
    return ms_text(found["p50_ms"]) if found else "–"


def ratio_texts(work: Mapping[str, Any], names: Sequence[str], verb: str = "pushpull") -> list[str]:
    """Return ratios with their ranges; dashes where there are none."""
    return [ratio_text(work["summary"][verb]["ratios"].get(name)) for name in names]


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
