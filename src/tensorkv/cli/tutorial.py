"""The tutorial: the store's verbs step by step, with arrays of NumPy, PyTorch or JAX.

Each statement is printed and then executed, so the output is that of the statement. The statements are the same for
every library, and print the same numbers.
"""

from __future__ import annotations

import ast
import importlib
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

MODULES = {"numpy": "numpy", "torch": "torch", "jax": "jax.numpy"}
NUM_DEVICES = 4


@dataclass(frozen=True)
class Step:
    """A title, an explanation, and the statements to run."""

    title: str
    text: str
    code: str


STEPS = (
    Step(
        "Initialise and pull",
        "A store maps keys to arrays. init puts a first value in; pull fills an array with a copy of it.",
        """
import numpy as np
import tensorkv
kv = tensorkv.create("local")
shape = (2, 3)
kv.init(3, xp.ones(shape) * 2)
a = buffer(shape)
kv.pull(3, out=a)
print(np.asarray(a))
""",
    ),
    Step(
        "Push",
        "push writes to a key. Unless the store is told otherwise, what is pushed replaces the value.",
        """
kv.push(3, xp.ones(shape) * 8)
kv.pull(3, out=a)
print(np.asarray(a))
""",
    ),
    Step(
        "Push from several devices",
        "A list is one part from each device. The store sums the parts before it updates the value.",
        """
parts = [xp.ones(shape, device=device) for device in devices]
print(len(parts))
kv.push(3, parts)
kv.pull(3, out=a)
print(np.asarray(a))
""",
    ),
    Step(
        "Update with a function",
        "An updater decides what a push does: it gets the sum and changes the stored value in place.",
        """
def update(key, received, stored):
    print(f"update on key: {key}")
    stored += received * 2
kv.set_updater(update)
kv.pull(3, out=a)
print(np.asarray(a))
kv.push(3, xp.ones(shape))
kv.pull(3, out=a)
print(np.asarray(a))
""",
    ),
    Step(
        "Pull to several devices",
        "A list of arrays is filled in one call. like= returns a new array of another's library, on its device.",
        """
outs = [buffer(shape) for device in devices]
kv.pull(3, out=outs)
print(np.asarray(outs[1]))
copies = [kv.pull(3, like=part) for part in parts]
print(np.asarray(copies[1]))
print([copy.device == part.device for copy, part in zip(copies, parts)])
""",
    ),
    Step(
        "Lists of keys",
        "Every verb takes a list of keys, with as many values.",
        """
keys = [5, 7, 9]
kv.init(keys, [xp.ones(shape)] * len(keys))
kv.push(keys, [xp.ones(shape)] * len(keys))
outs = [buffer(shape) for key in keys]
kv.pull(keys, out=outs)
print(np.asarray(outs[1]))
""",
    ),
    Step(
        "Lists of keys from several devices",
        "With several devices, each key has a list of parts, and is pulled into a list of arrays.",
        """
kv.push(keys, [parts] * len(keys))
outs = [[buffer(shape) for device in devices] for key in keys]
kv.pull(keys, out=outs)
print(np.asarray(outs[1][1]))
kv.close()
""",
    ),
)


def run(library: str) -> None:
    """Print every step with its result.

    Args:
        library: ``"numpy"``, ``"torch"`` or ``"jax"``; its arrays are pushed and pulled.

    Raises:
        ModuleNotFoundError: the library is not installed.

    JAX gets four CPU devices, unless it has been used in this process before; then it keeps the devices it has.
    """
    devices = _jax_devices() if library == "jax" else ["cpu"] * NUM_DEVICES
    # JAX arrays are immutable, so NumPy arrays are filled instead.
    fillable = "numpy" if library == "jax" else library
    names = {
        "xp": importlib.import_module(MODULES[library]),
        "buffer": importlib.import_module(fillable).zeros,
        "devices": devices,
    }
    print(
        f"tensorkv with {library} arrays: xp is {MODULES[library]}, buffer is {fillable}.zeros, "
        f"devices are {', '.join(map(str, devices))}"
    )
    for number, step in enumerate(STEPS, 1):
        print(f"\n{number}. {step.title}\n{step.text}\n")
        for statement in ast.parse(step.code).body:
            source = ast.get_source_segment(step.code, statement) or ""
            print(_prompted(source, compound=hasattr(statement, "body")), flush=True)
            # The text comes from this module.
            exec(source, names)  # noqa: S102


def _jax_devices() -> list[Any]:
    import jax

    config: Any = jax.config
    # Raises if JAX has been used before, which fixes the number of devices.
    with suppress(RuntimeError):
        config.update("jax_num_cpu_devices", NUM_DEVICES)
    found = jax.devices("cpu")
    return [found[index % len(found)] for index in range(NUM_DEVICES)]


def _prompted(source: str, *, compound: bool) -> str:
    first, *more = source.splitlines()
    return "\n".join([f">>> {first}", *(f"... {line}" for line in more), *(["..."] if compound else [])])
