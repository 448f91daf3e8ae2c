"""Publish weights from one training process to several readers, each of which takes the newest release.

The trainer fits a network to scikit-learn's handwritten digits. After every epoch it pushes its weights, which replace
the values since there is no optimizer in the store, and publishes a release. Each reader is a process that waits for a
release newer than its last one, pulls it and measures its accuracy. A checksum is pushed with the weights, so a reader
can tell that it has all weights of one release and none of another.

    python examples/publish_weights.py

Needs the extras cli, examples and ray: pip install '.[cli,examples,ray]'
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import ray
from sklearn.neural_network import MLPClassifier

import tensorkv
from tensorkv.cli import demo

READERS = 3
EPOCHS = 20
NAME = "published-weights"
LAYERS = {"weights0": (64, 64), "bias0": (64,), "weights1": (64, 10), "bias1": (10,)}


def checksum(layers: dict[str, np.ndarray]) -> np.ndarray:
    """Return the sum of all weights, which differs between releases."""
    return np.array(sum(float(layers[name].sum()) for name in LAYERS))


def train() -> int:
    """Publish the weights of every epoch; return 0 if all readers succeeded."""
    digits = demo.load_digits()
    model = MLPClassifier((64,), random_state=0)
    # The trainer is the only worker, so nothing waits for readers.
    with tensorkv.create("dist_async", name=NAME, num_servers=2, num_workers=1) as kv:
        kv.init({name: np.zeros(shape) for name, shape in LAYERS.items()} | {"checksum": np.zeros(())})
        environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        command = [sys.executable, __file__, "reader"]
        readers = [subprocess.Popen([*command, str(number)], env=environment) for number in range(READERS)]  # noqa: S603 - this file
        try:
            wait_for(kv, readers)
            for epoch in range(1, EPOCHS + 1):
                model.partial_fit(digits.images.numpy(), digits.labels.numpy(), classes=np.arange(10))
                arrays = [model.coefs_[0], model.intercepts_[0], model.coefs_[1], model.intercepts_[1]]
                layers = dict(zip(LAYERS, map(np.float64, arrays), strict=True))
                kv.push(layers | {"checksum": checksum(layers)})
                kv.publish(f"epoch-{epoch}", keep=2)
            failed = [number for number, reader in enumerate(readers) if reader.wait() != 0]
        finally:
            for reader in readers:
                reader.kill()
                reader.wait()
    if failed:
        print(f"readers {failed} did not see consistent releases, each newer than the last")
        return 1
    print(f"all {READERS} readers saw consistent releases, each newer than the last, up to epoch-{EPOCHS}")
    return 0


def wait_for(kv: tensorkv.KVStore, readers: list[subprocess.Popen[bytes]]) -> None:
    """Wait until all readers have opened the store, or one of them has ended."""
    while kv.stats()["clients"] <= len(readers) and all(reader.poll() is None for reader in readers):
        time.sleep(0.05)


def read(number: int) -> int:
    """Measure releases until the last; return 0 if each was newer than the one before, and consistent."""
    digits = demo.load_digits()
    images, labels = digits.test_images.numpy(), digits.test_labels.numpy()
    seen, consistent = [0], True
    with tensorkv.create("dist_async", name=NAME) as kv:
        last = None
        while seen[-1] < EPOCHS:
            with kv.wait_release(after=last, timeout_s=300) as release:
                layers = {name: release.pull(name) for name in LAYERS}
                consistent &= bool(release.pull("checksum") == checksum(layers))
            last = release.name
            seen.append(int(last.removeprefix("epoch-")))
            hidden = np.maximum(images @ layers["weights0"] + layers["bias0"], 0)
            right = (hidden @ layers["weights1"] + layers["bias1"]).argmax(1) == labels
            say(f"reader {number}: {last}, test accuracy {right.mean():.3f}")
    increasing = all(a < b for a, b in pairwise(seen))
    how = f"{'' if increasing else 'NOT '}increasing, {'' if consistent else 'NOT '}consistent"
    say(f"reader {number}: {len(seen) - 1} releases, {how}: {' '.join(map(str, seen[1:]))}")
    return 0 if increasing and consistent else 1


def say(line: str) -> None:
    """Print a whole line at once, since several processes share the terminal."""
    print(f"{line}\n", end="", flush=True)


if __name__ == "__main__":
    sys.exit(read(int(sys.argv[2])) if sys.argv[1:2] == ["reader"] else train())
