"""Trees have the same names and structure with JAX's registry and without it, and what is registered is a tree."""

import dataclasses
import enum
import subprocess
import sys
from collections import OrderedDict, defaultdict, namedtuple

import numpy as np
import pytest

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

import tensorkv
from tensorkv.arrays import trees
from tensorkv.arrays.trees import flatten
from tensorkv.runtime.recent import Recent

Pair = namedtuple("Pair", "one two")
words = st.text("ab.0", max_size=3)


def containers(below):
    return st.one_of(
        st.lists(below, max_size=3),
        st.lists(below, max_size=3).map(tuple),
        st.builds(Pair, below, below),
        st.dictionaries(words, below, max_size=3),
        st.dictionaries(words, below, max_size=3).map(lambda found: OrderedDict(reversed(found.items()))),
        st.dictionaries(words, below, max_size=3).map(lambda found: defaultdict(list, found)),
        st.dictionaries(st.integers(0, 12), below, max_size=3),
    )


def outcome(tree, prefix):
    """What flattening a tree gives, and the tree made of its leaves plus one."""
    try:
        flat = flatten("push", tree, prefix)
    except tensorkv.ArgumentError as error:
        return str(error)
    return flat.names, flat.leaves, repr(flat.rebuild([leaf + 1 for leaf in flat.leaves]))


@given(st.recursive(st.none() | st.integers(0, 9), containers, max_leaves=8), st.sampled_from(["", "net", "net."]))
def test_with_and_without_jax(tree, prefix):
    pytest.importorskip("jax")
    found = outcome(tree, prefix)
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "jax")
        assert outcome(tree, prefix) == found


def without_jax(monkeypatch):
    monkeypatch.delitem(sys.modules, "jax", raising=False)


@pytest.mark.parametrize("has_jax", [True, False])
def test_a_str_that_is_an_enum_is_its_value(has_jax, monkeypatch):
    if has_jax:
        pytest.importorskip("jax")
    else:
        without_jax(monkeypatch)

    class Name(str, enum.Enum):  # noqa: UP042 - str(Name.W) is not its value
        W = "w"

    for tree in ({Name.W: [1]}, {"w": [1]}, {Name.W: [1]}):
        assert flatten("push", tree, "net").names == ["net.w.0"]
    assert flatten("push", {"a": 1}, "net", lambda path: Name.W).names == ["net.w"]


@pytest.mark.parametrize("has_jax", [True, False])
def test_structures_are_compared(has_jax, monkeypatch):
    if has_jax:
        pytest.importorskip("jax")
    else:
        without_jax(monkeypatch)
    several = [
        [1],
        (1,),
        {"0": 1},
        {0: 1},
        OrderedDict({"0": 1}),
        defaultdict(list, {"0": 1}),
        [[1]],
        [None],
        Pair(1, None),
    ]
    found = [flatten("push", tree, "").structure for tree in several]
    assert [[one == two for two in found] for one in found] == np.eye(len(found)).astype(bool).tolist()
    assert flatten("push", [3], "").structure == found[0]


@pytest.mark.parametrize("has_jax", [True, False])
def test_trees_that_are_refused(has_jax, monkeypatch):
    if has_jax:
        pytest.importorskip("jax")
    else:
        without_jax(monkeypatch)
    deep, inside = [1], {}
    for _ in range(100_000):
        deep = [deep]
    inside["a"] = inside
    for tree in (deep, inside):
        with pytest.raises(tensorkv.ArgumentError, match="push: the tree contains itself, or is nested too deeply"):
            flatten("push", tree, "")
    while deep != 1:
        deep = deep[0]
    with pytest.raises(tensorkv.ArgumentError, match=r'two leaves of the tree have the path "a\.b"'):
        flatten("push", {"a": {"b": 1}, "a.b": 2}, "")
    with pytest.raises(tensorkv.ArgumentError, match="cannot be flattened"):
        flatten("push", {"a": 1, 2: 3}, "")
    # The types of nodes alone decide what a tree is.
    assert flatten("push", [type("Own", (dict,), {})()], "").names == ["0"]


def test_registered_nodes(library):
    """Dataclasses and modules as Flax and Equinox register them, with fields that are no arrays."""
    jax = pytest.importorskip("jax")

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Linear:
        kernel: object
        bias: object
        name: str = dataclasses.field(default="linear", metadata={"static": True})

    class Module:
        def __init__(self, **fields):
            self.__dict__.update(fields)

    def with_keys(module):
        return [(jax.tree_util.GetAttrKey(name), each) for name, each in sorted(vars(module).items())], tuple(
            sorted(vars(module))
        )

    jax.tree_util.register_pytree_with_keys(
        Module, with_keys, lambda names, below: Module(**dict(zip(names, below, strict=True)))
    )
    tree = Module(body=[Linear(library.make([1]), library.make([2]), "a")], head=Linear(library.make([3]), None, "b"))
    with tensorkv.create() as kv:
        kv.init_tree(tree, prefix="net")
        assert kv.keys() == ["net.body.0.kernel", "net.body.0.bias", "net.head.kernel"]
        new = kv.pushpull_tree(tree, tree, prefix="net")
        assert (type(new), type(new.head), new.head.name, new.body[0].name) == (Module, Linear, "b", "a")
        assert library.read(new.body[0].bias).tolist() == [4]
        with pytest.raises(tensorkv.ArrayTypeError, match=r'init\("net.act"\): the value is .*, not an array'):
            kv.init_tree(Module(act=max), prefix="net")


def test_names_are_cached_and_the_cache_is_bounded(monkeypatch):
    jax = pytest.importorskip("jax")
    monkeypatch.setattr(trees, "_names", Recent(8))
    walked = []
    walk = jax.tree_util.tree_flatten_with_path
    monkeypatch.setattr(jax.tree_util, "tree_flatten_with_path", lambda tree: walked.append(tree) or walk(tree))
    first = flatten("push", {"a": [1, 2]}, "")
    assert flatten("push", {"a": [3, 4]}, "").names is first.names
    assert len(walked) == 1
    assert flatten("push", {"a": [3, 4]}, "net").names == ["net.a.0", "net.a.1"]
    for count in range(24):
        flatten("push", [0] * count, "x")
    assert len(trees._names) <= 8


EQUAL = [0, False, np.int64(0), 0.0, "0", (1, 2)]


@pytest.mark.parametrize("first", EQUAL, ids=repr)
@pytest.mark.parametrize("second", EQUAL, ids=repr)
def test_keys_that_are_equal_do_not_share_names(first, second):
    pytest.importorskip("jax")
    trees._names.clear()
    for key in (first, second, first):
        assert flatten("push", {key: 1}, "").names == [str(key)]


def test_trees_do_not_import_jax():
    code = "import sys, numpy as np, tensorkv; kv = tensorkv.create(); kv.init_tree({'a': [np.ones(1)]})"
    code += "; print(kv.pushpull_tree({'a': [np.ones(1)]}), 'jax' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stdout == "{'a': [array([1.])]} False\n", ended.stderr
