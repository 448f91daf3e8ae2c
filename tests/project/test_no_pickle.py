"""No source file can unpickle or run what it reads."""

import ast
from pathlib import Path

import pytest

import tensorkv

HOUSE = Path(tensorkv.__file__).parent
SOURCES = sorted(HOUSE.rglob("*.py"))
MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "copyreg"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
# The tutorial shows and runs statements that stand in its own source.
ALLOWED = {"tutorial.py": {"exec"}}
LOADERS = {("torch", "load"), ("np", "load"), ("numpy", "load")}


def forbidden(source):
    """Return what a source does that could run code from its input."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Name) and node.id in BUILTINS:
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"{node.value.id}.{node.attr}"]
        for name in names:
            first, _, rest = name.partition(".")
            if first in MODULES or (first, rest) in LOADERS or (first == "builtins" and rest in BUILTINS):
                found.add(name)
            if name.startswith(("torch.serialization", "torch.package", "multiprocessing.reduction")):
                found.add(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(HOUSE)) for path in SOURCES])
def test_no_source_unpickles_or_evaluates(path):
    assert forbidden(path.read_text()) <= ALLOWED.get(path.name, set())


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as json",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "def f():\n    import cloudpickle",
        "eval('1')",
        "run = exec",
        "import torch.serialization",
    ],
)
def test_the_check_finds_what_it_looks_for(source):
    assert forbidden(source)


def test_the_check_sees_every_source():
    assert {"checkpoint.py", "manifest.py", "shard.py", "local.py"} <= {path.name for path in SOURCES}
    assert forbidden("import torch\nmodel.eval()\nsafetensors.torch.load(data)\njson.loads(text)") == set()
