"""Train a JAX network on handwritten digits, in one process or in several.

Each batch is divided into four parts. Every worker computes the gradients of its parts, the store sums them over parts
and workers and steps the optimizer, and every worker gets the new parameters. So the loss is the same with one to
four workers, up to rounding. The digits are scikit-learn's; nothing is downloaded.

    python examples/jax_digits.py
    torchrun --nproc-per-node 2 examples/jax_digits.py

Needs the extras jax and examples: pip install '.[jax,examples]'
"""

from __future__ import annotations

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tensorkv

EPOCHS = 10
BATCH = 64
PARTS = 4
WIDTHS = (64, 64, 10)
LEARNING_RATE = 0.01


def initial_parameters(seed: int) -> dict:
    """Return the parameters of a network of dense layers."""
    keys = jax.random.split(jax.random.key(seed), len(WIDTHS) - 1)
    return {
        "layers": [
            {"weight": jax.random.normal(key, (rows, columns)) / rows**0.5, "bias": jnp.zeros(columns)}
            for key, rows, columns in zip(keys, WIDTHS, WIDTHS[1:], strict=False)
        ]
    }


def logits(params: dict, images: jax.Array) -> jax.Array:
    """Return the unnormalised log-probabilities of the digits."""
    *hidden, last = params["layers"]
    for layer in hidden:
        images = jax.nn.gelu(images @ layer["weight"] + layer["bias"])
    return images @ last["weight"] + last["bias"]


def loss(params: dict, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the sum of the cross-entropies."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits(params, images)), labels[:, None], axis=1).sum()


@jax.jit
def gradients(params: dict, images: jax.Array, labels: jax.Array) -> dict:
    """Return the gradients of one part of a batch; those of all parts add up to the mean's over the batch."""
    return jax.grad(lambda params: loss(params, images, labels) / BATCH)(params)


@jax.jit
def evaluate(params: dict, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the mean loss, and the share of images that are classified correctly."""
    right = logits(params, images).argmax(1) == labels
    return loss(params, images, labels) / len(labels), right.mean()


def main() -> int:
    """Train, and print the loss and the accuracy after each epoch."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(
        (images / 16).astype(np.float32), labels.astype(np.int32), test_size=0.25, stratify=labels, random_state=0
    )
    images, test_images, labels, test_labels = split
    shuffler = np.random.default_rng(0)
    with tensorkv.create("dist_sync" if "WORLD_SIZE" in os.environ else "local") as kv:
        params = kv.broadcast_tree(initial_parameters(seed=0))
        kv.set_optimizer("adam", lr=LEARNING_RATE)
        for epoch in range(EPOCHS):
            kv.set_hyperparameters(lr=LEARNING_RATE * (1 - epoch / EPOCHS))
            order = shuffler.permutation(len(labels))
            for batch in order[: len(order) // BATCH * BATCH].reshape(-1, PARTS, BATCH // PARTS):
                mine = np.array_split(batch, kv.num_workers)[kv.rank]
                params = kv.pushpull_tree(*(gradients(params, images[part], labels[part]) for part in mine))
            mean_loss, _ = evaluate(params, images, labels)
            _, accuracy = evaluate(params, test_images, test_labels)
            if kv.rank == 0:
                print(f"epoch {epoch + 1}: loss {mean_loss:.6f}, accuracy on test images {accuracy:.4f}", flush=True)
    return int(accuracy < 0.9)


if __name__ == "__main__":
    sys.exit(main())
