"""The tutorial prints the same statements and numbers for every array library."""

import ast
import os
import subprocess
import sys

import pytest

pytest.importorskip("rich")
from tensorkv.cli import main, tutorial

HEADERS = {
    "numpy": "tensorkv with numpy arrays: xp is numpy, buffer is numpy.zeros, devices are cpu, cpu, cpu, cpu",
    "torch": "tensorkv with torch arrays: xp is torch, buffer is torch.zeros, devices are cpu, cpu, cpu, cpu",
    "jax": "tensorkv with jax arrays: xp is jax.numpy, buffer is numpy.zeros, devices are cpu:0, cpu:1, cpu:2, cpu:3",
}

GOLDEN = """\

1. Initialise and pull
A store maps keys to arrays. init puts a first value in; pull fills an array with a copy of it.

>>> import numpy as np
>>> import tensorkv
>>> kv = tensorkv.create("local")
>>> shape = (2, 3)
>>> kv.init(3, xp.ones(shape) * 2)
>>> a = buffer(shape)
>>> kv.pull(3, out=a)
>>> print(np.asarray(a))
[[2. 2. 2.]
 [2. 2. 2.]]

2. Push
push writes to a key. Unless the store is told otherwise, what is pushed replaces the value.

>>> kv.push(3, xp.ones(shape) * 8)
>>> kv.pull(3, out=a)
>>> print(np.asarray(a))
[[8. 8. 8.]
 [8. 8. 8.]]

3. Push from several devices
A list is one part from each device. The store sums the parts before it updates the value.

>>> parts = [xp.ones(shape, device=device) for device in devices]
>>> print(len(parts))
4
>>> kv.push(3, parts)
>>> kv.pull(3, out=a)
>>> print(np.asarray(a))
[[4. 4. 4.]
 [4. 4. 4.]]

4. Update with a function
An updater decides what a push does: it gets the sum and changes the stored value in place.

>>> def update(key, received, stored):
...     print(f"update on key: {key}")
...     stored += received * 2
...
>>> kv.set_updater(update)
>>> kv.pull(3, out=a)
>>> print(np.asarray(a))
[[4. 4. 4.]
 [4. 4. 4.]]
>>> kv.push(3, xp.ones(shape))
update on key: 3
>>> kv.pull(3, out=a)
>>> print(np.asarray(a))
[[6. 6. 6.]
 [6. 6. 6.]]

5. Pull to several devices
A list of arrays is filled in one call. like= returns a new array of another's library, on its device.

>>> outs = [buffer(shape) for device in devices]
>>> kv.pull(3, out=outs)
>>> print(np.asarray(outs[1]))
[[6. 6. 6.]
 [6. 6. 6.]]
>>> copies = [kv.pull(3, like=part) for part in parts]
>>> print(np.asarray(copies[1]))
[[6. 6. 6.]
 [6. 6. 6.]]
>>> print([copy.device == part.device for copy, part in zip(copies, parts)])
[True, True, True, True]

6. Lists of keys
Every verb takes a list of keys, with as many values.

>>> keys = [5, 7, 9]
>>> kv.init(keys, [xp.ones(shape)] * len(keys))
>>> kv.push(keys, [xp.ones(shape)] * len(keys))
update on key: 5
update on key: 7
update on key: 9
>>> outs = [buffer(shape) for key in keys]
>>> kv.pull(keys, out=outs)
>>> print(np.asarray(outs[1]))
[[3. 3. 3.]
 [3. 3. 3.]]

7. Lists of keys from several devices
With several devices, each key has a list of parts, and is pulled into a list of arrays.

>>> kv.push(keys, [parts] * len(keys))
update on key: 5
update on key: 7
update on key: 9
>>> outs = [[buffer(shape) for device in devices] for key in keys]
>>> kv.pull(keys, out=outs)
>>> print(np.asarray(outs[1][1]))
[[11. 11. 11.]
 [11. 11. 11.]]
>>> kv.close()
"""


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_tutorial_prints_exactly_this(library, capsys):
    assert main.main(["tutorial", "--arrays", library]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{HEADERS[library]}\n{GOLDEN}"
    assert shown.err == ""


def test_tutorial_prints_exactly_this_with_jax_on_four_devices():
    # In a process of its own: JAX settles its devices once.
    pytest.importorskip("jax")
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    command = [sys.executable, "-W", "error", "-m", "tensorkv", "tutorial", "--arrays", "jax"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout == f"{HEADERS['jax']}\n{GOLDEN}"


def test_tutorial_takes_the_devices_that_a_running_jax_has(capsys):
    jax = pytest.importorskip("jax")
    jax.numpy.zeros(1).block_until_ready()
    tutorial.run("jax")
    header, body = capsys.readouterr().out.split("\n", 1)
    assert header.startswith("tensorkv with jax arrays: xp is jax.numpy, buffer is numpy.zeros, devices are cpu:0")
    assert body == GOLDEN


def test_numpy_is_the_default(capsys):
    assert main.main(["tutorial"]) == 0
    assert capsys.readouterr().out.startswith(HEADERS["numpy"])


@pytest.mark.parametrize("library", sorted(tutorial.MODULES))
def test_statements_name_no_library_but_the_one_of_the_outs(library):
    # What differs between the libraries is behind xp, buffer and devices; else the shown text would lie.
    names = {
        node.id
        for step in tutorial.STEPS
        for node in ast.walk(ast.parse(step.code))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    assert {"xp", "buffer", "devices"} <= names
    assert library not in names


def test_what_is_shown_is_what_ran(capsys, monkeypatch):
    step = tutorial.Step("Title", "Text.", "\nfor number in devices[:2]:\n    print(number, 7 * 6)\n")
    monkeypatch.setattr(tutorial, "STEPS", (step,))
    tutorial.run("numpy")
    assert capsys.readouterr().out.split("\n", 1)[1] == (
        "\n1. Title\nText.\n\n>>> for number in devices[:2]:\n...     print(number, 7 * 6)\n...\ncpu 42\ncpu 42\n"
    )
