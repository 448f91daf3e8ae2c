"""Hooks of MkDocs: pages that are files outside of ``docs/``, links to them, and examples in docstrings."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from textwrap import indent
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Where a file of the checkout is in the site; other files keep their path.
_PAGES = {"README.md": "index.md"}
_SHOWN = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "benchmarks/results/*")
_STATES = re.compile(r"^\| State \| Becomes \| When \|\n\|[-|]+\|\n((?:\|.*\|\n)+)", re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add files of the checkout that pages link to."""
    for pattern in _SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            place = _PAGES.get(name, name)
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make links between files of the checkout links between pages of the site."""
    source = next((name for name, place in _PAGES.items() if place == page.file.src_uri), page.file.src_uri)
    generated = page.file.generated_by is not None
    here = posixpath.dirname(source if generated else f"docs/{source}")

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, match[1]))
        place = _PAGES.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or ".")

    return _STATES.sub(_with_diagram, _LINK.sub(moved, markdown))


def _with_diagram(table: re.Match[str]) -> str:
    """Return a table of states and the diagram that it describes."""
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table[1].splitlines()]
    arrows = "\n".join(f"    {state} --> {becomes}: {when.replace('`', '')}" for state, becomes, when in rows)
    return f"{table[0]}\n```mermaid\nstateDiagram-v2\n    [*] --> {rows[0][0]}\n{arrows}\n```\n"


class Examples(griffe.Extension):
    """Give the examples at the end of a docstring a heading, without which they would not be shown as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Insert the heading."""
        if obj.docstring is not None:
            text, prompt, examples = obj.docstring.value.partition("\n>>> ")
            if prompt:
                obj.docstring.value = f"{text}\nExamples:\n{indent(prompt.lstrip() + examples, '    ')}"
