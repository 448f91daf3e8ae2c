"""What is set in torch and NumPy around a call changes nothing: neither the call nor those after it."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._device import _device_constructors

import tensorkv
from tensorkv.shard.optimizers import CLASSES
from tensorkv.testing.surroundings import SURROUNDINGS, expected, run

SOURCE = Path(tensorkv.__file__).parent


def optimize(around, folder):
    """Step with every optimizer, with a checkpoint in between; return the values."""
    generator = torch.Generator().manual_seed(3)
    kinds = [((6, 4), torch.float32), ((6, 4), torch.bfloat16), ((70, 3), torch.float32)]
    values, *grads = [[torch.randn(shape, generator=generator).to(dtype) for shape, dtype in kinds] for _ in range(3)]
    keys = ["a", "b", "c"]
    found = []
    for optimizer in CLASSES:
        with tensorkv.create("local") as kv:
            with around():
                kv.init(keys, values)
                kv.set_optimizer(optimizer, lr=0.01)
                kv.push("a", grads[0][0])
                kv.push(keys, grads[0])
                kv.save(folder)
            kv.push(keys, grads[1])
            kv.load(folder)
            kv.push(keys, grads[1])
            found.append([optimizer, *(value.double().tolist() for value in kv.pull(keys))])
    return found


@pytest.fixture(scope="module")
def optimized(tmp_path_factory):
    return optimize(torch.enable_grad, tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_every_optimizer(name, optimized, tmp_path):
    """State that is made and saved there is the state that would have been made elsewhere."""
    assert optimize(SURROUNDINGS[name], tmp_path) == optimized


@pytest.mark.parametrize("type", ["local", "device"])
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_every_verb(name, type, tmp_path):
    with tensorkv.create(type) as kv:
        assert run(kv, tmp_path, "nadam", SURROUNDINGS[name]) == expected("nadam", True)


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_store_in_a_folder(name, tmp_path):
    around = SURROUNDINGS[name]
    with around():
        kv = tensorkv.create("local", path=tmp_path / "kept")
    with kv:
        assert run(kv, tmp_path, "nadam", around) == expected("nadam", True)
        before = kv.pull("float16").tolist()
    with around():
        again = tensorkv.create("local", path=tmp_path / "kept")
    with again:
        assert again.pull("float16").tolist() == before
        again.push("float16", torch.ones(5, 3, dtype=torch.float16))


def test_an_updater_runs_in_what_surrounds_the_push():
    """A function of the caller makes its tensors where the caller's other functions make theirs."""
    seen = []
    with tensorkv.create() as kv:
        kv.init("w", torch.ones(2))
        kv.set_updater(lambda key, received, stored: seen.append(torch.empty(1)))
        with torch.device("meta"):
            kv.push("w", torch.ones(2, device="cpu"))
        kv.push("w", torch.ones(2))
    assert [each.device.type for each in seen] == ["meta", "cpu"]


def test_outs_that_torch_would_not_write():
    with torch.inference_mode():
        outs = [
            torch.zeros(3),
            torch.zeros(3, dtype=torch.bfloat16),
            torch.zeros(3, 2)[:, 1],
            torch.zeros(200_000)[::2],
        ]
    with tensorkv.create() as kv:
        for out in outs:
            kv.init("w", torch.ones(out.shape, dtype=out.dtype))
            for _ in range(2):
                kv.pull("w", out=out)
                assert set(out.tolist()) == {1}
                kv.pushpull("w", torch.full(out.shape, 2, dtype=out.dtype), out=[out, torch.zeros(out.shape)])
                assert set(out.tolist()) == {2}
                kv.push("w", torch.ones(out.shape, dtype=out.dtype))
            kv.delete("w")
        many = [f"k{n}" for n in range(10)]
        with torch.inference_mode():
            given = {dtype: [torch.zeros(3, dtype=dtype) for _ in many] for dtype in (torch.float32, torch.float16)}
        for dtype, outs in given.items():
            kv.init(many, [torch.ones(3, dtype=dtype)] * 10)
            for number in range(4):
                kv.pushpull(many, [torch.full((3,), number, dtype=dtype)] * 10, out=outs)
                assert [out.tolist() for out in outs] == [[number] * 3] * 10
            kv.delete(many)


@pytest.mark.parametrize("type", ["local", "device"])
def test_fake_tensors(type, tmp_path):
    """In a mode that makes tensors without memory, a store of NumPy arrays works as elsewhere, and so do later ones."""
    keys = [f"k{n}" for n in range(9)]
    found = []
    for around in (torch.enable_grad, FakeTensorMode):
        with tensorkv.create(type) as kv:
            with around():
                kv.init([*keys, "half", "large"], [np.ones(3)] * 9 + [np.ones(4, np.float16), np.ones(100_000)])
                for optimizer in (None, "adam"):
                    if optimizer:
                        kv.set_optimizer(optimizer, lr=0.1)
                    for _ in range(4):
                        kv.pushpull(keys, [np.full(3, 2.0)] * 9, out=[np.zeros(3) for _ in keys])
                    kv.push(["half", "large"], [[np.ones(4, np.float16)] * 2, [np.ones(100_000)] * 2])
                kv.save(tmp_path)
                kv.load(tmp_path)
            kv.push(["half", "large"], [[np.ones(4, np.float16)] * 2, [np.ones(100_000)] * 2])
            found.append([value.tolist() for value in kv.pull([*keys, "half", "large"])])
    assert found[0] == found[1]


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("around", [FakeTensorMode, torch.inference_mode])
def test_trees_and_releases(library, around, tmp_path):
    """What trees of another dtype, changes of releases and blocks of float8 compute does not depend on modes either."""
    pytest.importorskip("ml_dtypes")
    numbers = np.random.default_rng(0).standard_normal((3, 130, 3)).astype(np.float32)
    first, second, start = numbers if library == "numpy" else map(torch.from_numpy, numbers)

    def plain(array):
        # As torch's, which has no shape of its own in FakeTensorMode.
        return np.asarray(array.float() if isinstance(array, torch.Tensor) else array, np.float32).tolist()

    def run(surroundings):
        found = []
        with tensorkv.create() as kv:
            with surroundings():
                kv.init_tree({"w": first}, prefix="half", dtype="bfloat16")
                kv.init_tree({"w": first}, prefix="blocks", dtype="float8_e4m3fn")
                kv.init_tree({"w": start}, prefix="same")
                kv.publish("a")
                kv.push_tree({"w": second}, {"w": first}, prefix="blocks")
                kv.push_tree({"w": second}, prefix="half")
                into = {"w": np.zeros((130, 3), np.float32)}
                kv.pull_tree(into=into, prefix="blocks")
                like = kv.pull_tree({"w": first}, prefix="half")
                kv.publish("b")
                with kv.open_release("a") as release:
                    held = release.pull_tree()
                with kv.open_release("b") as release:
                    digest, changes = release.digest, release.changes(since="a")
                    given = [(each.indices, each.values) for each in changes]
                tensorkv.save_changes(tmp_path / "changes", changes)
                tensorkv.apply_changes(held, tensorkv.load_changes(tmp_path / "changes"))
                whole = tensorkv.dequantize_blocks(*tensorkv.quantize_blocks(first))
            found += [into["w"].tolist(), plain(like["w"]), plain(whole), digest]
            found += [[None if part is None else plain(part) for part in pair] for pair in given]
            found += [plain(array) for array in (held["half"]["w"], held["blocks"]["w"], held["same"]["w"])]
        return found

    assert run(around) == run(torch.enable_grad)


@pytest.mark.parametrize(("count", "numel"), [(1, 3), (12, 3), (1, 300_000), (2, 100_000)])
@pytest.mark.parametrize("verb", ["pull", "pushpull"])
@pytest.mark.parametrize("nested", [False, True])
def test_autograd_notices_outs_that_it_has_saved(verb, count, numel, nested):
    keys = [f"k{n}" for n in range(count)]
    outs = [torch.nn.Parameter(torch.ones(numel)) for _ in keys]
    value = (torch.ones(numel),) if verb == "pull" else ([torch.ones(numel)] * count,)
    with tensorkv.create() as kv:
        kv.init(keys, [torch.ones(numel)] * count)
        for _ in range(4):
            loss = sum((out * out).sum() for out in outs)
            getattr(kv, verb)(keys, *value[verb == "pull" :], out=[[out] for out in outs] if nested else outs)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


# ---------------------------------------------------------------- the source

# Functions of torch whose result is on the default device unless they are told another.
MAKERS = {function.__name__ for function in _device_constructors()} | {"as_tensor"}
# Those of them that take the default dtype, too.
OF_ANY_DTYPE = {"empty", "full", "ones", "rand", "randn", "scalar_tensor", "tensor", "zeros"}


class Careless(ast.NodeVisitor):
    """Finds calls that make a tensor and leave the device or the dtype to what the caller has set."""

    def __init__(self):
        self.lines = []

    def visit_FunctionDef(self, node):
        # Here torch is asked what has been set.
        if node.name != "_usual_torch":
            self.generic_visit(node)

    def visit_Call(self, node):
        self.generic_visit(node)
        if ast.unparse(node.func).startswith("torch.") and isinstance(node.func, ast.Attribute):
            wanted = {"device"} if node.func.attr in MAKERS else set()
            wanted |= {"dtype"} if node.func.attr in OF_ANY_DTYPE else set()
            if not wanted <= {each.arg for each in node.keywords}:
                self.lines.append(f"{node.lineno}: {ast.unparse(node)}")


def careless(source):
    visitor = Careless()
    visitor.visit(ast.parse(source))
    return visitor.lines


# The contract makes tensors as users do, within surroundings that it chooses.
FILES = sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("testing/")])
def test_every_tensor_is_made_where_and_as_the_source_says(file):
    assert careless((SOURCE / file).read_text()) == []


def test_careless_lines_are_found():
    source = "a = torch.empty(3)\nb = torch.zeros(3, dtype=x, device=y)\nc = torch.empty_like(b)\n"
    source += "def f():\n    return torch.tensor([1], device='cpu').sum(), torch.eye(3)\n"
    assert [line.partition(":")[0] for line in careless(source)] == ["1", "5", "5"]
