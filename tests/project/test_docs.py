"""The documentation is true: its examples run, its links lead somewhere, and it names everything public."""

from __future__ import annotations

import doctest
import json
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tensorkv
from tests.support.amount import amount

ROOT = Path(__file__).resolve().parents[2]
FILES = [path for name in ("*.md", "docs/**/*.md") for path in sorted(ROOT.glob(name))]
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]
# Taken at import, before other tests can register types of their own.
TYPES = tensorkv.engines.names()

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\S*)\s*$")
_LINK = re.compile(r"(?<!!)\[[^\]]+\]\((?P<target>[^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(?P<title>.+?) *$")
_FILE = re.compile(r"# ([\w.-]+\.py)\n")
# Commands that no test here runs, and why.
# What pages import or run, apart from the core.
USED = ("jax", "matplotlib", "optax", "ray", "rich", "sklearn")

NOT_RUN = {
    r"(pip|python -m venv|\. |make|ruff|mypy|pytest|(sudo )?\.venv/bin/python) ?": "for a checkout, not a new folder",
    r"RAY_AUTH_MODE=token ray start --head$": "a Ray of one's own, on a port of the machine that all tests share",
    r"RAY_AUTH_MODE=token RAY_ADDRESS=HOST:6379 python worker\.py$": "on that Ray",
    r"python examples/": "tests/project/test_examples.py runs them",
    r"torchrun --nnodes=2 ": "two hosts",
    r"tensorkv demo --replicas": "tests/cli/test_demo.py trains with replicas",
    r"tensorkv demo --store dist_async": "tests/cli/test_demo_servers.py runs it, in a new folder and home",
    r"tensorkv demo --store dist_sync": "tests/sync/test_engine.py runs it",
    r"tensorkv top ": "beside another command, from a second terminal",
}
# What the pages make, and which one.
_made: dict[str, str] = {}
_LANGUAGES = {"python", "console", "text", "json", "toml", "yaml", "mermaid"}
_OPTIONS = doctest.ELLIPSIS


@dataclass(frozen=True)
class Block:
    """A fenced block of a Markdown file; ``line`` is the number of its first line of content."""

    language: str
    line: int
    text: str


def read_blocks(text: str) -> list[Block]:
    r"""Return the fenced blocks of a Markdown text.

    >>> read_blocks("a\n```python\nx = 1\n```")
    [Block(language='python', line=3, text='x = 1')]
    """
    blocks: list[Block] = []
    start, language, indent, lines = 0, "", "", list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        fence = _FENCE.match(line)
        if not start and fence:
            start, language, indent, lines = number + 1, fence["language"], fence["indent"], []
        elif start and line == f"{indent}```":
            blocks.append(Block(language, start, textwrap.dedent("\n".join(lines))))
            start = 0
        elif start:
            lines.append(line)
    assert not start, f"line {start - 1}: a fence that never ends"
    return blocks


def prose(text: str) -> str:
    """Return a Markdown text with its fenced blocks blanked out, line for line."""
    lines, inside = list[str](), False
    for line in text.splitlines():
        fence = _FENCE.match(line)
        lines.append("" if inside or fence else line)
        inside = inside != bool(fence)
    return "\n".join(lines)


def anchors(text: str) -> set[str]:
    r"""Return the anchors that the headings of a Markdown text get.

    >>> sorted(anchors("# A `b`: c\n## A `b`: c"))
    ['a-b-c', 'a-b-c-1']
    """
    found: set[str] = set()
    for line in prose(text).splitlines():
        heading = _HEADING.match(line)
        if not heading:
            continue
        slug = re.sub(r"[^\w\- ]", "", heading["title"].lower()).replace(" ", "-")
        count = 0
        while (f"{slug}-{count}" if count else slug) in found:
            count += 1
        found.add(f"{slug}-{count}" if count else slug)
    return found


def run_block(block: Block, file: str, namespace: dict[str, Any]) -> None:
    """Run one Python block: as a doctest where it has prompts, else as a script."""
    if not block.text.lstrip().startswith(">>>"):
        # Blank lines in front make line numbers in tracebacks those of the Markdown file.
        exec(compile("\n" * (block.line - 1) + block.text, file, "exec", dont_inherit=True), namespace)
        return
    test = doctest.DocTestParser().get_doctest(block.text, namespace, file, file, block.line - 1)
    report: list[str] = []
    doctest.DocTestRunner(optionflags=_OPTIONS).run(test, out=report.append, clear_globs=False)
    namespace.update(test.globs)
    assert not report, "".join(report)


def files_in(text: str) -> dict[str, str]:
    r"""Return the files that a page shows whole: Python blocks that begin with a comment of their name.

    >>> files_in("Saved as `a.py`:\n```python\n# a.py\nx = 1\n```\n```python\ny = 2\n```")
    {'a.py': '# a.py\nx = 1\n'}
    """
    blocks = [block for block in read_blocks(text) if block.language == "python"]
    return {named[1]: f"{block.text}\n" for block in blocks if (named := _FILE.match(block.text))}


def commands_in(block: Block) -> list[str]:
    r"""Return the commands of a console block.

    >>> commands_in(Block("console", 1, "$ make demo\ncurves: out/demo.png\n$ make test"))
    ['make demo', 'make test']
    """
    return [line.removeprefix("$ ") for line in block.text.splitlines() if line.startswith("$ ")]


def is_run(command: str) -> bool:
    """Tell whether the tests run a command of the documentation."""
    return not any(re.match(pattern, command) for pattern in NOT_RUN)


def run_command(command: str, folder: Path, home: Path) -> None:
    """Run a command as a reader does who has nothing but the package: in a folder, and with a home, that are new."""
    ours = ("PYTHONPATH", "RAY", "RANK", "WORLD", "MASTER")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment = {**kept, "HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if command.startswith("tensorkv demo"):
        command += " --epochs 1"
    elif command.startswith("python -m pytest"):
        # Of the contract, which tests/engines runs over each engine.
        command += amount(" -k 'init or push or delete'", "")
    ended = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, f"$ {command}\n{ended.stdout}{ended.stderr}"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_page_runs_from_top_to_bottom(
    path: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in USED:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tensorkv.engines, "_factories", dict(tensorkv.engines._factories))
    home = tmp_path_factory.mktemp("home")
    namespace: dict[str, Any] = {"__name__": "example"}
    text = path.read_text()
    for name, content in files_in(text).items():
        (tmp_path / name).write_text(content)
    for block in read_blocks(text):
        if block.language == "python":
            run_block(block, str(path), namespace)
        elif block.language == "console":
            for command in filter(is_run, commands_in(block)):
                run_command(command, tmp_path, home)
    # Who tries several pages in one folder is not to find the files of another one.
    for made in tmp_path.iterdir():
        other = _made.setdefault(made.name, path.name)
        assert other == path.name or made.name == "__pycache__", f"{made.name} is made by {other}, too"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_file_that_a_page_names_is_there(path: Path) -> None:
    text = path.read_text()
    files = files_in(text)
    said = re.findall(r"(?:[Ss]aved as|[Tt]his is) `([\w.-]+\.py)`", prose(text))
    assert set(said) == set(files), "a block that is a file begins with a comment of its name, and the text names it"
    for block in read_blocks(text):
        for command in commands_in(block) if block.language == "console" else []:
            for name in re.findall(r"\S+\.py\b", command):
                assert name in files or (ROOT / name).exists() or "HOST" in command, f"{command}: no {name}"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_blocks_are_of_a_known_kind(path: Path) -> None:
    for block in read_blocks(path.read_text()):
        assert block.language in _LANGUAGES, f"line {block.line - 1}: a block of {block.language or 'no language'}"
        if block.language == "json":
            json.loads(block.text)
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "yaml":
            pytest.importorskip("yaml").safe_load(block.text)
        elif block.language in ("console", "text"):
            assert ">>>" not in block.text, f"line {block.line}: Python in a block that is not run"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    for link in _LINK.finditer(prose(text)):
        target, _, anchor = link["target"].partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        file = (path.parent / target).resolve() if target else path
        assert file.is_relative_to(ROOT), f"{link[0]} leads out of the project"
        assert file.exists(), f"{link[0]}: there is no {target}"
        assert not anchor or anchor in anchors(file.read_text()), f"{link[0]}: {file.name} has no #{anchor}"


def test_readme_convinces_within_a_page() -> None:
    text = (ROOT / "README.md").read_text()
    blocks = read_blocks(text)
    first = next(block for block in blocks if block.language == "python")
    assert first.line <= 25, "an example stands in the first 25 lines"
    assert "mermaid" in {block.language for block in blocks}, "a picture shows how it works"
    assert "limits" in anchors(text)


def test_every_document_is_reached_from_the_readme() -> None:
    linked = {link["target"].partition("#")[0] for link in _LINK.finditer((ROOT / "README.md").read_text())}
    # Pages of the reference are made from docstrings, and are empty outside of the site.
    pages = [name for name in NAMES if name.startswith("docs/") and not name.startswith("docs/reference/")]
    assert linked.issuperset(pages)
    assert all(f": {name.removeprefix('docs/')}\n" in (ROOT / "mkdocs.yml").read_text() for name in pages)


@pytest.mark.parametrize("name", tensorkv.__all__)
def test_docs_name_everything_public(name: str) -> None:
    whole = "\n".join(path.read_text() for path in FILES if path.name != "CHANGELOG.md")
    assert re.search(rf"\b{re.escape(name)}\b", whole), f"no document mentions {name}"


@pytest.mark.parametrize("name", TYPES)
def test_docs_name_every_type(name: str) -> None:
    whole = "\n".join(path.read_text() for path in FILES if path.name != "CHANGELOG.md")
    assert re.search(rf"\b{re.escape(name)}\b", whole), f"no document mentions the type {name}"


def test_docs_name_every_method_of_the_store() -> None:
    semantics = (ROOT / "docs" / "semantics.md").read_text()
    methods = [name for name in dir(tensorkv.KVStore) if not name.startswith("_")]
    assert [name for name in methods if not re.search(rf"`(kv\.)?{name}\b", semantics)] == []


def test_docs_name_every_error() -> None:
    semantics = (ROOT / "docs" / "semantics.md").read_text()
    errors = [name for name in vars(tensorkv.errors) if name.endswith(("Error", "Warning"))]
    assert [name for name in errors if not re.search(rf"\b{name}\b", semantics)] == []


def test_every_package_is_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    source = ROOT / "src" / "tensorkv"
    packages = [path.parent.relative_to(source).as_posix() for path in source.rglob("*/__init__.py")]
    assert [name for name in packages if name != "." and f"`{name}`" not in text] == []
    rows = re.findall(r"^\| `([\w/]+)` \|.*\| `(\w+\.py)` \|$", text, re.MULTILINE)
    assert [f"{package}/{file}" for package, file in rows if not (source / package / file).exists()] == []
    assert len(rows) == len(packages)


def commands(program: str) -> set[str]:
    """Return the first arguments with which the console blocks call a program."""
    console = [block.text for path in FILES for block in read_blocks(path.read_text()) if block.language == "console"]
    return set(re.findall(rf"^\$ {program} ([a-z-]+)", "\n".join(console), re.MULTILINE))


def test_make_targets_in_the_docs_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= commands("make") <= targets


def test_commands_in_the_docs_exist(capsys: pytest.CaptureFixture[str]) -> None:
    main = pytest.importorskip("tensorkv.cli.main", exc_type=ModuleNotFoundError)
    for command in sorted(commands("tensorkv")):
        assert main.main([command, "--help"]) == 0
        assert f"tensorkv {command}" in capsys.readouterr().out
