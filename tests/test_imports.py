"""`import tensorkv` imports nothing heavy, and few modules know JAX or CuPy."""

import ast
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "tensorkv"

HEAVY = {"ray", "jax", "cupy", "matplotlib", "sklearn"}


def _name(file):
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {_name(file): file for file in SOURCE.rglob("*.py") if _name(file)}


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


def test_importing_tensorkv_brings_nothing_heavy():
    code = f"import sys, tensorkv; print(sorted({HEAVY} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout == "[]\n"


def test_only_arrays_and_the_tutorial_name_jax_or_cupy():
    for name in set(MODULES) - {"arrays.interop", "cli.tutorial"}:
        assert not {imported.partition(".")[0] for imported in _imports(name)} & {"jax", "cupy"}, name
