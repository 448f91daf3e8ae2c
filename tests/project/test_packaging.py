"""What is distributed: a source archive whose tests find what they read, and a wheel that says what is in it."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import tensorkv
from tensorkv import compiled
from tensorkv.compiled.sources import PARTS

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "docs", "examples", "src/tensorkv", "tests")
IGNORED = {"__pycache__", "out"}
COMPILED = (".so", ".pyc")


def read_tree():
    """Return the files of this checkout that are its source: of the root those with a name, of folders all."""
    files = {path.name for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".")}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and not IGNORED & set(path.parts) and path.suffix not in COMPILED:
                files.add(path.relative_to(ROOT).as_posix())
    return files - {"PKG-INFO", "setup.cfg"}  # made by an sdist


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the source: builds write beside it."""
    folder = tmp_path_factory.mktemp("tree")
    for name in read_tree():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def build(tree, what, **environment):
    code = f"from setuptools import build_meta; print(build_meta.build_{what}('dist'))"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return tree / "dist" / ended.stdout.splitlines()[-1]


def test_the_source_archive_has_every_file_that_its_tests_read(tree):
    with tarfile.open(build(tree, "sdist")) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    assert sorted(read_tree() - found) == []


@pytest.mark.parametrize("compiler", ["cc", "none"])
def test_a_wheel_is_of_a_platform_only_with_compiled_parts(tree, tmp_path, compiler):
    shutil.copytree(tree, tmp_path / "tree", ignore=shutil.ignore_patterns("dist", "build"))
    if compiler == "cc":
        # Optimizing takes most of the time of a compiler, and is not looked at.
        real = os.environ.get("CC") or sysconfig.get_config_var("CC")
        (tmp_path / "cc").write_text(f'#!/bin/sh\nexec {real} "$@" -O0\n')
        (tmp_path / "cc").chmod(0o700)
    wheel = build(tmp_path / "tree", "wheel", CC=str(tmp_path / compiler))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (tags,) = (name for name in names if name.endswith(".dist-info/WHEEL"))
        told = Parser().parsestr(archive.read(tags).decode())
    built = {name for name in names if name.endswith(".so")}
    assert {"tensorkv/store.py", *(f"tensorkv/compiled/{part}.c" for part in PARTS)} <= set(names)
    if compiler == "none":
        assert not built
        assert wheel.name.endswith("-py3-none-any.whl")
        assert (told["Root-Is-Purelib"], told["Tag"]) == ("true", "py3-none-any")
    else:
        assert built == {f"tensorkv/compiled/{name}.abi3.so" for name in PARTS}
        assert "-cp311-abi3-linux" in wheel.name
        assert told["Root-Is-Purelib"] == "false"


# Run in a copy of the package without its compiled parts.
UNCOMPILED = """
import json, logging, sys
import numpy as np
import tensorkv
from tensorkv import compiled
from tensorkv.cli import main as cli
from tensorkv.engines.transport import segment

told = []
class Handler(logging.Handler):
    def emit(self, record):
        told.append(record.getMessage())
logging.getLogger("tensorkv").addHandler(Handler())
for _ in range(2):
    with tensorkv.create() as kv:
        kv.init("w", np.zeros(3, np.float32))
        kv.push("w", [np.ones(3, np.float32)] * 2)
        value, compiled = kv.pull("w").tolist(), kv.stats()["compiled"]
print(json.dumps([tensorkv.__file__, told, value, compiled, segment.why_not_shared()]))
cli.main(["--version"])
"""


def test_an_installation_without_compiled_parts_says_so(tree, tmp_path):
    pytest.importorskip("rich")
    shutil.copytree(tree / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.egg-info"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
    command = [sys.executable, "-c", UNCOMPILED]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    report, version = ended.stdout.splitlines()
    file, told, value, has, shared = json.loads(report)
    assert Path(file).is_relative_to(tmp_path)
    parts = ", ".join(PARTS)
    what = f"installed without its compiled parts {parts}, since no C compiler was found"
    assert told == [f"tensorkv is {what}: results are the same, calls slower; see docs/dependencies.md"]
    assert shared == f"tensorkv is {what}"
    assert value == [2.0] * 3
    assert has == dict.fromkeys(PARTS, False)
    assert version == f"tensorkv {tensorkv.__version__} ({what})"


def spoil_nothing(folder):
    pass


def change_headers(folder):
    with (folder / "_reduce.h").open("a") as file:
        file.write("/* newer */")


def change_one_source(folder):
    with (folder / "_tables.c").open("a") as file:
        file.write("/* newer */")


def leave_out_sources(folder):
    for path in [*folder.glob("*.c"), *folder.glob("*.h")]:
        path.unlink()


def name_another_part(folder):
    shutil.copy(folder / "_shared.abi3.so", folder / "_native.abi3.so")


def cut_short(folder):
    (folder / "_native.abi3.so").write_bytes(b"\x7fELF")


OTHER_SOURCES = r"they were built from other C sources \(remove the files and install tensorkv again\)"


@pytest.mark.parametrize(
    ("spoil", "missing", "said"),
    [
        (spoil_nothing, [], ""),
        (leave_out_sources, [], ""),
        (change_headers, PARTS, f"installed without its compiled parts {', '.join(PARTS)}, since {OTHER_SOURCES}"),
        (change_one_source, ["_tables"], f"installed without its compiled parts _tables, since {OTHER_SOURCES}"),
        (name_another_part, ["_native"], "installed without its compiled parts _native, since .*PyInit__native.*"),
        (cut_short, ["_native"], "installed without its compiled parts _native, since .*file too short"),
    ],
)
def test_a_part_that_is_not_of_these_sources_is_not_used(spoil, missing, said, tmp_path):
    """The package of the parts is imported by itself, since it needs neither torch nor the rest."""
    shutil.copytree(Path(compiled.__file__).parent, tmp_path / "parts", ignore=shutil.ignore_patterns("__pycache__"))
    spoil(tmp_path / "parts")
    code = (
        "import json, parts\n"
        "print(json.dumps([[getattr(parts, each) is None for each in parts.PARTS], parts.describe()]))"
    )
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    none, description = json.loads(told)
    assert none == [part in missing for part in PARTS]
    assert re.fullmatch(said, description)


def test_a_full_installation_says_that_it_has_its_parts(capsys):
    main = pytest.importorskip("tensorkv.cli.main", exc_type=ModuleNotFoundError)
    with tensorkv.create() as kv:
        assert kv.stats()["compiled"] == dict.fromkeys(PARTS, True)
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tensorkv {tensorkv.__version__}\n"
