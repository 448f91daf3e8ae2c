"""Random programs of training, checkpoints and odd values, run by a store beside a local one that has to agree.

Every engine runs them: one that several workers make up calls ``train`` on each, with its rank and their number.
"""

import random

import torch

import tensorkv
from tensorkv import Rows
from tensorkv.shard.optimizers import CLASSES, ROWWISE, spec
from tests.support.amount import amount
from tests.support.checkpoints import snapshot

# Owners and servers divide values of so many elements, and a call takes several chunks of so many bytes.
DIVIDED, CHUNK_NBYTES = 256, 1 << 12
STEPS = amount(8, 20)
SHAPES = [(), (3,), (0,), (0, 2), (2, 0), (7, 5), (130,), (40, 70), (2, 3, 4), (1501,), (9, 7, 11)]
DTYPES = ["float32", "float32", "float64", "float16", "bfloat16", "complex64"]
# Of single keys and of all: numbers that change what a step does, and what state it needs.
NUMBERS = {
    "lr": [0.0, 0.01, 0.5, 1],
    "momentum": [0, 0.5, 0.9],
    "dampening": [0.5],
    "nesterov": [True],
    "weight_decay": [0.0, 0.1],
    "maximize": [True],
    "amsgrad": [True],
    "betas": [(0.5, 0.75)],
    "eps": [1e-4],
    "rho": [0.5],
    "alpha": [0.5],
    "centered": [True],
    "lambd": [0.01],
    "t0": [2],
    "lr_decay": [0.1],
    "initial_accumulator_value": [0.25],
    "decoupled_weight_decay": [True],
    "momentum_decay": [0.01],
    "etas": [(0.25, 1.5)],
    "step_sizes": [(1e-4, 3)],
    "ns_steps": [3],
}


def tensor(rng, shape, dtype):
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    return torch.randn(shape, dtype=getattr(torch, dtype), generator=generator)


def rows(rng, count, shape, dtype):
    ids = torch.tensor([rng.randrange(shape[0]) for _ in range(count)], dtype=torch.int64)
    return Rows(ids, tensor(rng, (count, *shape[1:]), dtype), shape[0])


def numbers(rng, name, count):
    """Some numbers of an optimizer that go together."""
    others = {"sgd": ["nesterov"], "adafactor": ["eps"]}.get(name, [])
    known = [word for word in NUMBERS if word in spec(name, {}).numbers and word not in others]
    found = {word: rng.choice(NUMBERS[word]) for word in rng.sample(known, min(count, len(known)))}
    if name == "sgd" and rng.random() < 0.3:
        found |= {"momentum": 0.9, "dampening": 0, "nesterov": True}
    elif name == "sgd":
        found |= {"nesterov": False}
    return found


class Program:
    """One store and the local store that it has to agree with.

    Args:
        seed: of everything that is drawn.
        kv: the store.
        rank, workers: this worker's number and how many make up the store.
    """

    def __init__(self, seed, kv, rank=0, workers=1):
        self.rng = random.Random(seed)
        self.kv, self.local = kv, tensorkv.create("local")
        self.rank, self.workers = rank, workers
        self.keys = {}

    def both(self, do):
        do(self.kv)
        do(self.local)

    def prepare(self, name):
        """Set an optimizer and init keys, some with numbers of their own."""
        rng = self.rng
        first = numbers(rng, name, rng.randint(0, 3))
        if rng.random() < 0.3:
            first |= {"rescale_grad": 0.5, "clip_gradient": 1.5}
        if rng.random() < 0.4:
            first |= {"max_grad_norm": rng.choice([0.5, 40.0])}
        self.both(lambda store: store.set_optimizer(name, **first))
        for number in range(rng.randint(1, 6)):
            is_table = name in ROWWISE and rng.random() < 0.3
            dtype = rng.choice(DTYPES if name in ROWWISE - {"rmsprop", "rprop", "nadam"} else DTYPES[:-1])
            shape = rng.choice([shape for shape in SHAPES if len(shape) == 2] if name == "muon" else SHAPES)
            if is_table:
                shape = (rng.choice([5, 300, 10**12]), rng.choice([1, 3]))
            value = rows(rng, rng.choice([0, 3]), shape, dtype) if is_table else tensor(rng, shape, dtype)
            key = f"k{number}"
            self.keys[key] = (shape, dtype, is_table)
            self.both(lambda store, key=key, value=value: store.init(key, value))
        for key in self.keys:
            if rng.random() < 0.5:
                own = numbers(rng, name, rng.randint(1, 3))
                self.both(lambda store, key=key, own=own: store.set_hyperparameters(key, **own))

    def step(self):
        """Push one part of each worker for some keys, dense or Rows, and compare every value."""
        rng = self.rng
        # The first key is hardly ever pushed.
        chosen = [key for key in self.keys if rng.random() < (0.8 if key != "k0" else 0.1)] or ["k0"]
        parts = {key: self.parts(key) for key in chosen}
        mine = [own[self.rank] for own in parts.values()]
        if rng.random() < 0.5 or any(self.keys[key][2] for key in chosen):
            self.kv.push(chosen, mine, priority=rng.randint(-1, 1))
            self.local.push(parts)
        else:
            shapes = [(self.keys[key][0], getattr(torch, self.keys[key][1])) for key in chosen]
            outs = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
            self.kv.pushpull(chosen, mine, out=outs)
            for key, out, right in zip(chosen, outs, self.local.pushpull(parts).values(), strict=True):
                check(f"the out of {key}", out, right)
        assert self.kv.last_push == self.local.last_push
        self.compare()

    def parts(self, key):
        """One part of each worker for a key."""
        rng = self.rng
        shape, dtype, is_table = self.keys[key]
        takes_rows = is_table or (shape and shape[0] and self.local.optimizer["name"] in ROWWISE)
        if is_table or (takes_rows and rng.random() < 0.4):
            return [rows(rng, rng.choice([0, 1, 5, 90]), shape, dtype) for _ in range(self.workers)]
        return [tensor(rng, shape, dtype) for _ in range(self.workers)]

    def compare(self):
        for key in self.keys:
            assert self.kv.info(key) == self.local.info(key), key
        self.compare_values(self.kv, self.local)
        if self.kv.is_capable("snapshot") and self.rng.random() < 0.1:
            with self.kv.snapshot() as held:
                self.compare_values(held, self.local)

    def compare_values(self, kv, local):
        for key, (shape, dtype, is_table) in self.keys.items():
            if is_table:
                ids = [*range(min(shape[0], 50)), shape[0] - 1]
                got, right = (store.row_sparse_pull(key, row_ids=ids).values for store in (kv, local))
            else:
                got, right = kv.pull(key), local.pull(key)
            check(f"{key}, {dtype} {shape}", got, right)

    def reload(self, folder):
        """Save and load: everything or states, each store its own, or what the other has saved."""
        rng = self.rng
        states, crosswise = rng.random() < 0.3, rng.random() < 0.5
        save, load = ("save_optimizer_states", "load_optimizer_states") if states else ("save", "load")
        getattr(self.kv, save)(f"{folder}/kv")
        mine = f"{folder}/local{self.rank}"
        getattr(self.local, save)(mine)
        # What is loaded replaces whatever is there.
        if not states and rng.random() < 0.5:
            self.both(lambda store: store.delete(list(self.keys)))
            self.both(lambda store: store.set_updater(None))
        getattr(self.local, load)(f"{folder}/kv" if crosswise else mine)
        getattr(self.kv, load)(f"{folder}/local0" if crosswise else f"{folder}/kv")
        self.compare()

    def compare_saved(self, folder):
        """Everything of the two stores, state and numbers of keys included, is the same."""
        self.kv.save(f"{folder}/last")
        with tensorkv.create("local") as other:
            other.load(f"{folder}/last")
            got, right = (self.known(store) for store in (other, self.local))
            assert got == right, differences(got, right)

    def known(self, store):
        entries, rule, optimizer = snapshot(store)
        # What an optimizer keeps of a value without elements changes nothing.
        entries = [each if (each[4].get("") or each[4].get("ids"))[2] else (*each[:-1], {}) for each in entries]
        # Numbers of single keys are in the order in which they were set, or in that of servers.
        return entries, rule, {**optimizer, "overrides": sorted(optimizer["overrides"])}


def check(name, got, right):
    """Raise if two arrays differ in a bit."""
    if got.numel() != right.numel() or not torch.equal(
        *[torch.atleast_1d(x).contiguous().view(torch.uint8) for x in (got, right)]
    ):
        raise AssertionError(f"{name}: {differing(got, right)}")


def differing(got, right):
    unlike = [torch.atleast_1d(each).contiguous().view(torch.uint8).view(each.numel(), -1) for each in (got, right)]
    places = (unlike[0] != unlike[1]).any(1).nonzero().flatten()
    pairs = [(got.flatten()[place].item(), right.flatten()[place].item()) for place in places[:3]]
    return f"{len(places)} of {got.numel()} elements differ, from {int(places[0])} to {int(places[-1])}: {pairs}"


def differences(got, right):
    """Say which parts of what ``known`` returns differ, without their bits."""
    found = [f"{len(got[0])} and {len(right[0])} keys", f"{got[1:]} {right[1:]}"]
    for mine, other in zip(got[0], right[0], strict=False):
        found += [f"{mine[1]}: {a} is not {b}"[:500] for a, b in zip(mine[:4], other[:4], strict=True) if a != b]
        for a, b in zip(mine[4:], other[4:], strict=True):
            found += [
                f"{mine[1]}: {name} differs" for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)
            ]
    return "; ".join(found)


def train(seed, kv, folder, *, rank=0, workers=1, reopen=None, steps=STEPS):
    """Train, save and load, and train on.

    Args:
        seed: of everything that is drawn; another optimizer for each of so many.
        kv, rank, workers: as for ``Program``.
        folder: for checkpoints, seen by all workers.
        reopen: closes a store and returns it as it is when it is opened again.
        steps: after the load.
    """
    program = Program(seed, kv, rank, workers)
    name = sorted(CLASSES)[seed % len(CLASSES)]
    try:
        with program.local:
            program.prepare(name)
            for _ in range(program.rng.choice([0, 1, 3])):
                program.step()
            program.reload(folder)
            if reopen is not None:
                program.kv = reopen(program.kv)
            for _ in range(steps):
                program.step()
            program.compare_saved(folder)
    except Exception as error:
        error.add_note(f"seed {seed}, {name}, rank {rank}, keys {program.keys}")
        raise


def train_on_nothing(kv, folder, *, rank=0, workers=1):
    """Save and load when the only state there is, or the only value, has no elements."""
    shapes = {"w": (3,), "e": (0,), "f": (0, 2), "g": (2, 0)}
    with tensorkv.create("local") as local:
        for name, some in [("sgd", {}), ("sgd", {"momentum": 0.9}), ("nadam", {}), ("adagrad", {})]:
            for dtype in ("float16", "float32"):
                place = f"{folder}/{name}{len(some)}{dtype}"
                program = Program(0, kv, rank, workers)
                program.local = local
                program.keys = {key: (shape, dtype, False) for key, shape in shapes.items()}
                program.keys["t"] = ((10**12, 2), dtype, True)
                nothing = Rows(torch.empty(0, dtype=torch.int64), tensor(program.rng, (0, 2), dtype), 10**12)
                values = {key: tensor(program.rng, shape, dtype) for key, shape in shapes.items()} | {"t": nothing}
                for store in (kv, local):
                    store.set_updater(None)
                    store.set_optimizer(name, lr=0.5, **some)
                    store.init(values)
                    for key in "efgt":
                        store.push(key, values[key])
                for what in ("", "_optimizer_states"):
                    for store, at in ((kv, place + what), (local, f"{place}{what}{rank}")):
                        getattr(store, f"save{what}")(at)
                    getattr(kv, f"load{what}")(f"{place}{what}0")
                    getattr(local, f"load{what}")(place + what)
                    program.compare()
                    for _ in range(2):
                        parts = {key: program.parts(key) for key in program.keys}
                        kv.push({key: own[rank] for key, own in parts.items()})
                        local.push(parts)
                        program.compare()
                for store in (kv, local):
                    store.delete([*program.keys])
                    # Nothing at all, too.
                    store.save(f"{place} nothing{rank if store is local else ''}")
                kv.load(f"{place} nothing")
                assert kv.keys() == []
