"""Train on handwritten digits with each codec: how accurate a network is after so many bytes of gradients.

Four replicas of a network push their gradients to one store, which compresses each as if it had come over a network.
The plot has a curve for each codec: the accuracy on held-out images over the bytes that all replicas have sent. The
optimizer is SGD without momentum: one that remembers gradients takes those that come late for new ones.

    python examples/compression.py

It writes compression.png. Needs scikit-learn and matplotlib: pip install '.[examples]'
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn import datasets, model_selection
from torch import nn

import tensorkv

REPLICAS = 4
EPOCHS = 30
BATCH = 64
# Gradients are multiplied by this before they are pushed, so that 1bit has what it needs: elements of about one.
SCALE = 100
CODECS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "fp16": {"type": "fp16"},
    "bf16": {"type": "bf16"},
    "int8": {"type": "int8"},
    "2bit": {"type": "2bit", "threshold": 0.5},
    "1bit": {"type": "1bit"},
    "topk": {"type": "topk", "ratio": 0.01},
    "powersgd": {"type": "powersgd", "rank": 2},
}


def digits() -> list[torch.Tensor]:
    """Return images and labels: those to train with, and a quarter that is held out."""
    images, labels = datasets.load_digits(return_X_y=True)
    split = model_selection.train_test_split(images / 16, labels, test_size=0.25, stratify=labels, random_state=0)
    train, held_out, labels, held_out_labels = map(torch.from_numpy, split)
    return [train.float(), labels, held_out.float(), held_out_labels]


def train(params: dict[str, Any] | None) -> tuple[list[float], list[float]]:
    """Return the megabytes that were sent after each epoch, and the accuracy then."""
    images, labels, held_out, held_out_labels = digits()
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 10))
    replicas = [first, *(copy.deepcopy(first) for _ in range(REPLICAS - 1))]
    sent, accuracies = [], []
    with tensorkv.create(reduce="mean") as kv:
        trainer = tensorkv.Trainer(replicas, kv, "sgd", lr=0.5, rescale_grad=1 / SCALE)
        kv.set_gradient_compression(params, simulate=True)
        raw_nbytes = sum(each.nbytes for each in first.parameters()) * REPLICAS
        steps = 0
        for epoch in range(EPOCHS):
            trainer.learning_rate = 0.5 * (1 - epoch / EPOCHS)
            for batch in torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch)).split(BATCH):
                trainer.zero_grad()
                for replica, share in zip(replicas, batch.tensor_split(REPLICAS), strict=True):
                    (SCALE * nn.functional.cross_entropy(replica(images[share]), labels[share])).backward()
                trainer.step()
                steps += 1
            counts = kv.stats().get("compression", {"sent_nbytes": raw_nbytes * steps})
            sent.append(counts["sent_nbytes"] / 1e6)
            with torch.no_grad():
                accuracies.append((first(held_out).argmax(1) == held_out_labels).float().mean().item())
    return sent, accuracies


def main() -> int:
    """Train with each codec, draw the curves, and compare the accuracies at the end."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    last = {}
    for name, params in CODECS.items():
        sent, accuracies = train(params)
        # The mean of some epochs, since one image more or less is 0.002.
        last[name] = sum(accuracies[-5:]) / 5
        print(f"{name:8}: {sent[-1]:8.2f} MB, accuracy {last[name]:.3f}")
        axes.plot(sent, accuracies, marker=".", label=f"{name}: {last[name]:.3f}")
    axes.set_xscale("log")
    axes.set_ylim(0.8, 1)
    axes.set_xlabel("megabytes of gradients that all replicas have sent (log scale)")
    axes.set_ylabel("share of held-out digits classified correctly")
    axes.set_title(f"Handwritten digits, {REPLICAS} replicas, {EPOCHS} epochs: accuracy over bytes, and at the end")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig("compression.png", dpi=120)
    print("curves: compression.png")
    if min(last.values()) < last["none"] - 0.01:
        print("failed: a codec costs more than 0.01 of accuracy", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
