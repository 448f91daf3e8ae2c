"""Arguments of every wrong kind, in every place of the public API: one typed error, in one line, and nothing changed.

A message begins with the name of the verb or class that was called, and shows what came. No class that users do not
know, no address and no dump of an array is in it.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv import Rows, Trainer, create
from tensorkv.testing.values import state

A = np.ones((2, 3), np.float32)
IDS = np.array([1])
LINEAR = torch.nn.Linear(2, 2)
INTERNAL = re.compile(r"StoreControl|Engine\b|NoneType|builtins|numpy\.dtypes| at 0x|\n")


def rows():
    return Rows(IDS, np.ones((1, 3), np.float32), 4)


# Made for each call: a generator can be read once.
WRONG = {
    "None": lambda: None,
    "a bool": lambda: True,
    "a float": lambda: 3.5,
    "NaN": lambda: float("nan"),
    "a negative int": lambda: -1,
    "a complex number": lambda: 1j,
    "an unknown str": lambda: "nokey",
    "an empty str": lambda: "",
    "bytes": lambda: b"w",
    "an object": object,
    "a function": lambda: print,
    "a class": lambda: np.ndarray,
    "a torch.dtype": lambda: torch.float32,
    "a numpy.dtype": lambda: np.dtype("float32"),
    "a path": lambda: Path("nowhere"),
    "an empty list": list,
    "an empty dict": dict,
    "a tuple": lambda: (2, 3),
    "a list of lists": lambda: [[1, 2], [3, 4]],
    "a ragged list": lambda: [[1, 2], [3]],
    "a long list": lambda: [[0.5] * 1000] * 3,
    "a list of None": lambda: [None],
    "str and int": lambda: ["w", 3],
    "a set": lambda: {"w"},
    "a dict of None": lambda: {"w": None},
    "a dict of generators": lambda: {"w": (A for _ in range(2))},
    "a generator": lambda: (key for key in "w"),
    "named parameters": LINEAR.named_parameters,
    "a module": lambda: LINEAR,
    "a 2-D array of floats": lambda: np.ones((2, 2)),
    "a 2-D array of ids": lambda: np.array([[1, 2], [3, 4]]),
    "an array of 100 x 100": lambda: np.ones((100, 100)),
    "an array of objects": lambda: np.array([None]),
    "an array of str": lambda: np.array(["a"]),
    "a meta tensor": lambda: torch.empty(2, device="meta"),
    "a sparse tensor": lambda: torch.eye(2).to_sparse(),
    "Rows": rows,
}

# What is called with the wrong thing x; the name begins with what the message has to begin with.
CALLS = {
    "create": lambda kv, x: create(x),
    "create nonfinite": lambda kv, x: create("local", nonfinite=x),
    "create threads": lambda kv, x: create("local", threads=x),
    "create path": lambda kv, x: create("device", path=x),
    "create durability": lambda kv, x: create("local", path="store", durability=x),
    "create log_nbytes": lambda kv, x: create("local", path="store", log_nbytes=x),
    "create timeout_s": lambda kv, x: create("dist_sync", timeout_s=x),
    "create shared_memory": lambda kv, x: create("dist_sync", shared_memory=x),
    "create an option": lambda kv, x: create("local", treads=x),
    "KVStore": lambda kv, x: tensorkv.KVStore(x),
    "KVStore and type": lambda kv, x: tensorkv.KVStore(x, "local"),
    "init key": lambda kv, x: kv.init(x, A),
    "init keys": lambda kv, x: kv.init(x),
    "init value": lambda kv, x: kv.init("n", x),
    "init values": lambda kv, x: kv.init(["n"], x),
    "init a value of a list": lambda kv, x: kv.init(["n"], [x]),
    "push key": lambda kv, x: kv.push(x, A),
    "push keys": lambda kv, x: kv.push(x),
    "push value": lambda kv, x: kv.push("w", x),
    "push second part": lambda kv, x: kv.push("w", [A, x]),
    "push values": lambda kv, x: kv.push(["w"], x),
    "push to a table": lambda kv, x: kv.push("t", x),
    "push priority": lambda kv, x: kv.push("w", A, x),
    "pushpull keys": lambda kv, x: kv.pushpull(x),
    "pushpull value": lambda kv, x: kv.pushpull("w", x),
    "pushpull out": lambda kv, x: kv.pushpull("w", A, x),
    "pull key": lambda kv, x: kv.pull(x),
    "pull out": lambda kv, x: kv.pull("w", x),
    "pull outs": lambda kv, x: kv.pull(["w"], x),
    "pull like": lambda kv, x: kv.pull("w", like=x),
    "pull min_version": lambda kv, x: kv.pull("w", min_version=x, timeout_s=0.01),
    "pull timeout_s": lambda kv, x: kv.pull("w", min_version=0, timeout_s=x),
    "broadcast value": lambda kv, x: kv.broadcast("n", x),
    "broadcast out": lambda kv, x: kv.broadcast("n", A, x),
    "row_sparse_pull key": lambda kv, x: kv.row_sparse_pull(x, row_ids=[1]),
    "row_sparse_pull ids": lambda kv, x: kv.row_sparse_pull("t", row_ids=x),
    "row_sparse_pull lists of ids": lambda kv, x: kv.row_sparse_pull(["t"], row_ids=x),
    "row_sparse_pull ids by position": lambda kv, x: kv.row_sparse_pull("t", x),
    "row_sparse_pull out": lambda kv, x: kv.row_sparse_pull("t", x, row_ids=[1]),
    "row_sparse_pull outs": lambda kv, x: kv.row_sparse_pull(["t"], x, row_ids=[[1]]),
    "Rows ids": lambda kv, x: Rows(x, np.ones((1, 3)), 4),
    "Rows values": lambda kv, x: Rows(IDS, x, 4),
    "Rows num_rows": lambda kv, x: Rows(IDS, np.ones((1, 3)), x),
    "Rows.to": lambda kv, x: rows().to(x),
    "Rows.to_dense": lambda kv, x: rows().to_dense(x),
    "set_updater": lambda kv, x: kv.set_updater(x),
    "set_optimizer name": lambda kv, x: kv.set_optimizer(x),
    "set_optimizer by position": lambda kv, x: kv.set_optimizer("sgd", x),
    "set_optimizer lr": lambda kv, x: kv.set_optimizer("sgd", lr=x),
    "set_optimizer betas": lambda kv, x: kv.set_optimizer("adam", betas=x),
    "set_optimizer clip_gradient": lambda kv, x: kv.set_optimizer("adam", clip_gradient=x),
    "set_hyperparameters keys": lambda kv, x: kv.set_hyperparameters(x, lr=0.5),
    "set_hyperparameters by position": lambda kv, x: kv.set_hyperparameters("w", x),
    "set_hyperparameters lr": lambda kv, x: kv.set_hyperparameters(lr=x),
    "set_hyperparameters lr of a key": lambda kv, x: kv.set_hyperparameters("w", lr=x),
    "save": lambda kv, x: kv.save(x),
    "load": lambda kv, x: kv.load(x),
    "save_optimizer_states": lambda kv, x: kv.save_optimizer_states(x),
    "load_optimizer_states": lambda kv, x: kv.load_optimizer_states(x),
    "info": lambda kv, x: kv.info(x),
    "delete": lambda kv, x: kv.delete(x),
    "is_capable": lambda kv, x: kv.is_capable(x),
    "Trainer module": lambda kv, x: Trainer(x, create(), lr=0.1),
    "Trainer replicas": lambda kv, x: Trainer([x], create(), lr=0.1),
    "Trainer kv": lambda kv, x: Trainer(LINEAR, x),
    "Trainer optimizer": lambda kv, x: Trainer(LINEAR, create(), x),
    "Trainer own optimizer": lambda kv, x: Trainer(LINEAR, create(), x, update_on_store=False),
    "Trainer prefix": lambda kv, x: Trainer(LINEAR, create(), prefix=x),
    "Trainer update_on_store": lambda kv, x: Trainer(LINEAR, create(), update_on_store=x),
    "Trainer overlap": lambda kv, x: Trainer(LINEAR, create(), overlap=x),
    "Trainer unused": lambda kv, x: Trainer(LINEAR, create(), unused=x),
    "Trainer buffers": lambda kv, x: Trainer(LINEAR, create(), buffers=x),
    "Trainer param_groups": lambda kv, x: Trainer(LINEAR, create(), param_groups=x),
    "Trainer a group": lambda kv, x: Trainer(LINEAR, create(), param_groups=[{"params": "*"}, x]),
    "Trainer params of a group": lambda kv, x: Trainer(LINEAR, create(), param_groups=[{"params": x}]),
    "Trainer lr of a group": lambda kv, x: Trainer(LINEAR, create(), param_groups=[{"params": "*", "lr": x}]),
    "add_param_group": lambda kv, x: Trainer(LINEAR, create()).optimizer.add_param_group(x),
    "load_state_dict of an optimizer": lambda kv, x: Trainer(LINEAR, create()).optimizer.load_state_dict(x),
    "load_state_dict of groups": lambda kv, x: Trainer(LINEAR, create()).optimizer.load_state_dict(
        {"state": {}, "param_groups": [x]}
    ),
    "learning_rate": lambda kv, x: setattr(Trainer(LINEAR, create()), "learning_rate", x),
    "load_state_dict": lambda kv, x: Trainer(LINEAR, create()).load_state_dict(x),
    "register": lambda kv, x: tensorkv.engines.register(x, "no factory"),
    "register factory": lambda kv, x: tensorkv.engines.register("message", x),
    "pull of a snapshot": lambda kv, x: kv.snapshot().pull(x),
    "row_sparse_pull of a snapshot": lambda kv, x: kv.snapshot().row_sparse_pull("t", row_ids=x),
}
ARRAYS = {"a 2-D array of floats", "a 2-D array of ids", "an array of 100 x 100"}
PATH = {"an unknown str", "a path"}
NO_KEYS = {"an empty list", "an empty dict"}
# What is nothing wrong for a call; all else is refused. Of a mapping, the keys count.
TAKEN = {
    "create threads": {"None"},
    "create path": {"None"},
    "create log_nbytes": {"None"},
    "create timeout_s": {"a float"},
    "create shared_memory": {"a bool"},
    "init key": {"an unknown str"},
    "init keys": {"an empty dict"},
    "init value": {*ARRAYS, "Rows"},
    "init a value of a list": {*ARRAYS, "Rows"},
    "push keys": {"an empty dict"},
    "push to a table": {"Rows"},
    "push priority": {"a negative int"},
    "pushpull keys": {"an empty dict"},
    "pushpull out": {"None", "an empty list"},
    "pull key": NO_KEYS,
    "pull out": {"None", "a sparse tensor", "Rows"},
    "pull outs": {"None"},
    # Its library and device count, and not what it has.
    "pull like": {*ARRAYS, "None", "an array of objects", "an array of str", "a sparse tensor"},
    # Of a worker that may be so many rounds behind, in its first rounds.
    "pull min_version": {"a negative int"},
    "pull timeout_s": {"None", "a float"},
    "broadcast value": ARRAYS,
    "broadcast out": {"None"},
    "row_sparse_pull ids": {"an empty list", "a tuple"},
    "row_sparse_pull out": {"None", "Rows"},
    "row_sparse_pull outs": {"None"},
    "Rows.to_dense": {"None", "a torch.dtype"},
    "set_updater": {"None", "a function", "a class", "a module"},
    "set_optimizer lr": {"a float"},
    "set_optimizer clip_gradient": {"None", "a float"},
    "set_hyperparameters keys": {*NO_KEYS, "None", "a dict of None", "a dict of generators"},
    "set_hyperparameters lr": {"a float"},
    "set_hyperparameters lr of a key": {"a float"},
    "save": PATH,
    "save_optimizer_states": PATH,
    "info": {*NO_KEYS, "a dict of None", "a dict of generators"},
    "delete": {*NO_KEYS, "a dict of None", "a dict of generators"},
    "Trainer module": {"a module"},
    "Trainer replicas": {"a module"},
    "Trainer prefix": {"an unknown str", "an empty str"},
    "Trainer update_on_store": {"a bool"},
    "Trainer overlap": {"a bool"},
    "Trainer param_groups": {"None", "named parameters"},
    "Trainer params of a group": {"named parameters"},
    "Trainer lr of a group": {"a float"},
    "learning_rate": {"a float"},
    "register factory": {"a function"},
    "pull of a snapshot": NO_KEYS,
    "row_sparse_pull of a snapshot": {"an empty list", "a tuple"},
}
# A checkpoint's messages begin with its path, which the caller gave.
PATHS = {"save", "load", "save_optimizer_states", "load_optimizer_states"}


def make_store():
    kv = create()
    kv.init({"w": np.zeros((2, 3), np.float32), "s": np.array(1.5)})
    kv.init("t", rows())
    kv.set_optimizer("sgd", lr=0.1)
    return kv


@pytest.mark.filterwarnings("ignore::tensorkv.SparseOutWarning")
@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_argument_is_one_typed_line_and_changes_nothing(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tensorkv.engines, "_factories", dict(tensorkv.engines._factories))
    taken = set()
    kv = make_store()
    before = state(kv), kv.optimizer
    for name, make in WRONG.items():
        wrong = make()
        try:
            made = CALLS[call](kv, wrong)
        except tensorkv.TensorKVError as error:
            message = str(error)
            where = f"{call} with {name}: {message}"
            begins = call.split()[0]
            assert message.startswith((f"{begins}:", f"{begins}(", f"{begins} is ")) or (
                call in PATHS and message.startswith(f"{Path(wrong).absolute()}:")
            ), where
            # The bound leaves room for a sentence and the names of all types or optimizers.
            assert len(message) < 400, where
            assert not INTERNAL.search(message), where
            assert (state(kv), kv.optimizer) == before, where
        else:
            taken.add(name)
            if isinstance(made, tensorkv.KVStore):
                made.close()
            kv.close()
            kv = make_store()
    assert taken == TAKEN.get(call, set())
    kv.close()


@pytest.mark.parametrize(
    ("call", "says"),
    {
        "one dimension too many": (
            lambda kv: kv.row_sparse_pull("t", row_ids=[[1, 2], [3]]),
            'row_sparse_pull("t"): row_ids is [[1, 2], [3]]; expected integers, in an array or a list',
        ),
        "a dtype as like": (
            lambda kv: kv.pull("w", like=torch.float32),
            "pull: like is torch.float32, not an array; give an array of the library and device to return",
        ),
        "a store by its class": (
            lambda kv: tensorkv.KVStore("local"),
            "KVStore: got 'local' and None; create stores with tensorkv.create(type, **options), "
            'such as tensorkv.create("local")',
        ),
        "a rate by position": (
            lambda kv: kv.set_optimizer("sgd", 0.1),
            "set_optimizer: got 0.1 without a name; expected hyperparameters by name, such as lr=0.1",
        ),
        "a generator of pairs": (
            lambda kv: kv.init(LINEAR.named_parameters()),
            "init: invalid key a generator; expected a str, an int, or a list or mapping of them, "
            "such as list(...) or dict(...) of it",
        ),
        "a shape as value": (
            lambda kv: kv.init("n", (2, 3)),
            'init("n"): got (2, 3); expected one array, the value that all devices share',
        ),
        "ids by position": (
            lambda kv: kv.row_sparse_pull("t", [1]),
            "row_sparse_pull: row_ids= is missing, and the second argument, out, is [1]; "
            "give ids by name: row_ids=[0, 2]",
        ),
    }.values(),
)
def test_a_frequent_mistake_is_told_what_to_do(call, says):
    with make_store() as kv, pytest.raises(tensorkv.TensorKVError) as caught:
        call(kv)
    assert str(caught.value) == says


def test_ids_may_be_lists_and_of_any_shape():
    with make_store() as kv:
        for ids in ([[3, 1], [1, 0]], np.array([[3, 1], [1, 0]]), torch.tensor([[3, 1], [1, 0]]), ((3, 1), (1, 0))):
            assert kv.row_sparse_pull("t", row_ids=ids).ids.tolist() == [0, 1, 3]
        kv.push("t", Rows([1, 3], np.ones((2, 3), np.float32), 4))
        assert kv.row_sparse_pull("t", row_ids=[3]).values[0, 0] == pytest.approx(-0.1)


@pytest.mark.parametrize("name", [name for name in dir(tensorkv.KVStore) if not name.startswith("_")])
def test_pythons_own_messages_name_the_class_that_users_know(name):
    method = getattr(tensorkv.KVStore, name)
    if callable(method):
        # Of trees any number are parts.
        wrong = {"nonsense": 1} if name in ("push_tree", "pushpull_tree") else {}
        with make_store() as kv, pytest.raises((TypeError, tensorkv.ArgumentError)) as caught:
            method(kv, *(() if wrong else range(20)), **wrong)
        says = ("() takes", "() got an unexpected keyword argument")
        assert str(caught.value).startswith((*(f"KVStore.{name}{each}" for each in says), f"{name}: got 1 without"))


@pytest.mark.parametrize("name", ["num_dead_node", "_barrier", "_set_updater"])
def test_a_name_of_mxnet_says_what_there_is_instead(name):
    with make_store() as kv:
        assert not hasattr(kv, name)
        with pytest.raises(AttributeError, match=rf"'KVStore' object has no attribute '{name}'; \w+"):
            getattr(kv, name)
        with pytest.raises(AttributeError, match=r"'KVStore' object has no attribute 'pul'$"):
            kv.pul()
