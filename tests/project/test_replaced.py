"""Tests replace only what the package has: after a rename a plain assignment would set a new name, and test nothing.

``monkeypatch.setattr`` and ``mock.patch.object`` refuse a name that is not there.
"""

import ast
import pkgutil
from pathlib import Path

import pytest

from tensorkv.engines.sync import push

TESTS = Path(__file__).parents[1]


def set_attributes(tree):
    """Return the attributes that a tree assigns to, by the name at their beginning."""
    return {
        node: ast.unparse(node.value).split(".")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }


def is_bound(function, name):
    """Whether a function has an argument or a variable of a name, so that an imported one is not meant."""
    for node in ast.walk(function):
        if isinstance(node, ast.arg) and node.arg == name:
            return True
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id == name:
            return True
    return False


def replaced(source):
    """Return what a source replaces in the package: for each attribute, the module or class, and its name."""
    tree, imported = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                imported |= {alias.asname: alias.name} if alias.asname else {first: first}
    found = set_attributes(tree)
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.Lambda)):
            inner = set_attributes(function)
            found = {node: path for node, path in found.items() if node not in inner or not is_bound(function, path[0])}
    named = {node: [imported.get(first, ""), *rest] for node, (first, *rest) in found.items()}
    return [
        (pkgutil.resolve_name(".".join(path)), node.attr)
        for node, path in named.items()
        if path[0].split(".")[0] == "tensorkv"
    ]


def unknown(source):
    """Return the names that a source assigns to in the package, and that are not there."""
    return [name for owner, name in replaced(source) if not hasattr(owner, name)]


def test_what_tests_replace_is_there():
    found = {str(path.relative_to(TESTS)): unknown(path.read_text()) for path in TESTS.rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "from tensorkv.engines.sync import push\npush.RENAMED = 1",
        "def test():\n    from tensorkv.engines.sync import push as push_module\n    push_module.RENAMED += 1",
        "from tensorkv.engines.sync import push\npush.RING = push.RENAMED = 1",
        "from tensorkv.engines.sync.push import Pushes\nPushes.RENAMED = print",
        "import tensorkv.engines.sync.push as push\npush.RENAMED, other = 1, 2",
        "import tensorkv.cli\ntensorkv.engines.sync.push.RENAMED = 1",
        "from tensorkv.engines.sync import push\ndef test(push): push.ids = 1\npush.RENAMED = 1",
    ],
)
def test_a_name_that_is_not_there_is_found(source):
    assert unknown(source) == ["RENAMED"]


def test_programs_are_seen():
    source = (TESTS / "sync" / "dist_programs.py").read_text()
    assert (push, "SLOT_NBYTES") in replaced(source)
