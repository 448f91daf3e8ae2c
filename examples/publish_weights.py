"""Publish weights from one training process to several readers, which pull every version.

The trainer fits a network to scikit-learn's handwritten digits and pushes its weights after every epoch. There is no
optimizer in the store, so a push replaces the values. Each reader is a process that waits for a new version, takes a
snapshot and measures its accuracy. A checksum is pushed with the weights, so a reader can tell that it has all weights
of one version and none of another.

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
VERSIONS = 20
NAME = "published-weights"
LAYERS = {"weights0": (64, 64), "bias0": (64,), "weights1": (64, 10), "bias1": (10,)}


def checksum(layers: dict[str, np.ndarray]) -> np.ndarray:
    """Return the sum of all weights, which differs between versions."""
    return np.array(sum(float(layers[name].sum()) for name in LAYERS))


def train() -> int:
    """Publish the weights of every epoch; return 0 if all readers succeeded."""
    digits = demo.load_digits()
    model = MLPClassifier((64,), random_state=0)
    # The trainer is the only worker, so nothing waits for readers. Each of them may hold one snapshot.
    with tensorkv.create("dist_async", name=NAME, num_servers=2, num_workers=1, keep=READERS) as kv:
        kv.init({name: np.zeros(shape) for name, shape in LAYERS.items()} | {"checksum": np.zeros(())})
        environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        command = [sys.executable, __file__, "reader"]
        readers = [subprocess.Popen([*command, str(number)], env=environment) for number in range(READERS)]  # noqa: S603 - this file
        try:
            wait_for(kv, readers)
            for _ in range(VERSIONS):
                model.partial_fit(digits.images.numpy(), digits.labels.numpy(), classes=np.arange(10))
                arrays = [model.coefs_[0], model.intercepts_[0], model.coefs_[1], model.intercepts_[1]]
                layers = dict(zip(LAYERS, map(np.float64, arrays), strict=True))
                kv.push(layers | {"checksum": checksum(layers)})
            failed = [number for number, reader in enumerate(readers) if reader.wait() != 0]
        finally:
            for reader in readers:
                reader.kill()
                reader.wait()
    if failed:
        print(f"readers {failed} did not see increasing versions and consistent snapshots")
        return 1
    print(f"all {READERS} readers saw increasing versions and consistent snapshots, up to version {VERSIONS}")
    return 0


def wait_for(kv: tensorkv.KVStore, readers: list[subprocess.Popen[bytes]]) -> None:
    """Wait until all readers have opened the store, or one of them has ended."""
    while kv.stats()["clients"] <= len(readers) and all(reader.poll() is None for reader in readers):
        time.sleep(0.05)


def read(number: int) -> int:
    """Measure every new version until the last; return 0 if versions increased and every snapshot was consistent."""
    digits = demo.load_digits()
    images, labels = digits.test_images.numpy(), digits.test_labels.numpy()
    seen, consistent = [0], True
    with tensorkv.create("dist_async", name=NAME) as kv:
        while seen[-1] < VERSIONS:
            kv.pull("checksum", min_version=seen[-1] + 1, timeout_s=300)  # waits for a new version
            with kv.snapshot() as snapshot:
                layers = {name: snapshot.pull(name) for name in LAYERS}
                versions = set(snapshot.versions.values())
                consistent &= len(versions) == 1 and snapshot.pull("checksum") == checksum(layers)
            seen.append(max(versions))
            hidden = np.maximum(images @ layers["weights0"] + layers["bias0"], 0)
            right = (hidden @ layers["weights1"] + layers["bias1"]).argmax(1) == labels
            say(f"reader {number}: version {seen[-1]:2}, test accuracy {right.mean():.3f}")
    increasing = all(a < b for a, b in pairwise(seen))
    how = f"{'' if increasing else 'NOT '}increasing, {'' if consistent else 'NOT '}consistent"
    say(f"reader {number}: {len(seen) - 1} versions, {how}: {' '.join(map(str, seen[1:]))}")
    return 0 if increasing and consistent else 1


def say(line: str) -> None:
    """Print a whole line at once, since several processes share the terminal."""
    print(f"{line}\n", end="", flush=True)


if __name__ == "__main__":
    sys.exit(read(int(sys.argv[2])) if sys.argv[1:2] == ["reader"] else train())
