"""Imports go down the house only, and `import tensorkv` brings nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "tensorkv"

# From the ground up: a file imports only from floors below its own.
FLOORS = [
    {"errors", "compiled", "early", "shield"},
    {"keys", "forks"},
    {"arrays", "metrics", "checksum"},
    {"rows"},
    {"table", "arguments"},
    {"pool"},
    {"native", "kernels"},
    {"columns"},
    {"optim", "reduce"},
    {"entry"},
    {"rules", "plan", "cuda", "quick", "finite"},
    {"checks"},
    {"manifest", "shard", "clients", "folder", "record"},
    {"checkpoint", "record_file", "changes", "folder_lock", "spares"},
    {"log_file"},
    {"journal"},
    {"durable"},
    {"server.waits", "server.rounds", "server.call", "server.wire", "server.views"},
    {"server.memory", "server.cut", "server.gathering"},
    {"server.attendance", "server.holding"},
    {"server"},
    {"engines.local", "engines.segment", "engines.ray_fork"},
    {"engines.bell"},
    {"engines.group", "placement", "engines.mailbox", "engines.copies", "engines.server_stats", "engines.ray_metrics"},
    {"engines.spread", "engines.ray_actor", "engines.ray_safety"},
    {"engines.directory", "engines.ray_cluster", "engines.ray_link"},
    {"engines.ray_lane", "engines.ray_observer"},
    {"engines.traffic"},
    {"engines.moments"},
    {"engines.servers_archive"},
    {"engines.ray"},
    {"engines.ray_store"},
    {"engines.meeting"},
    {"engines.route", "engines.chain", "engines.finite"},
    {"engines.message"},
    {"engines.exchange", "engines.calls", "engines.sparse", "engines.archive"},
    {"engines.background"},
    {"engines.pushes"},
    {"engines.leaving"},
    {"engines.dist"},
    {"engines"},
    {"outs", "control", "versions", "snapshot"},
    {"store"},
    {"updates", "overlap"},
    {"trainer"},
    {"demo", "tutorial", "inspection"},
    {"demo_servers", "top"},
    {"cli"},
    {"__main__"},
]
HEAVY = {"ray", "jax", "cupy", "matplotlib", "sklearn"}


def _name(file):
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {_name(file): file for file in SOURCE.rglob("*.py") if _name(file)}
LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}


def _imports(name):
    file = MODULES[name]
    package = ["tensorkv", *name.split(".")] if file.name == "__init__.py" else ["tensorkv", *name.split(".")[:-1]]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _target(imported):
    rest = imported.removeprefix("tensorkv.")
    return next((name for name in sorted(MODULES, key=len, reverse=True) if f"{rest}.".startswith(f"{name}.")), None)


def test_every_file_has_a_floor():
    assert sorted(MODULES) == sorted(LEVEL)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down(name):
    for imported in _imports(name):
        if imported.startswith("tensorkv.") and (target := _target(imported)) not in (None, name):
            assert LEVEL[target] < LEVEL[name], f"{name} imports {target}"


def test_importing_tensorkv_brings_nothing_heavy():
    code = f"import sys, tensorkv; print(sorted({HEAVY} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout == "[]\n"


def test_only_arrays_and_the_tutorial_name_jax_or_cupy():
    for name in set(MODULES) - {"arrays", "tutorial"}:
        assert not {imported.partition(".")[0] for imported in _imports(name)} & {"jax", "cupy"}, name
