"""Train with DiLoCo and synchronously, and compare the loss after so many bytes.

Each worker has its own share of scikit-learn's handwritten digits, and a network with the same first weights. Trained
synchronously, workers push a gradient for every batch, and the store steps AdamW with their mean. With DiLoCo each
worker makes many steps of its own AdamW, and then pushes once what these have changed; the store steps SGD with
Nesterov momentum with the mean of that (Douillard et al., 2023).

    python examples/diloco.py                                     two workers; the plot is diloco.png
    torchrun --standalone --nproc-per-node 2 examples/diloco.py   the workers alone

Needs the extras cli and examples: pip install '.[cli,examples]'
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import tensorkv
from tensorkv.cli import demo

WORKERS = 2
STEPS = 600
BATCH = 32
LR = 1e-3
# A gradient for every batch, and so many steps of a worker's own before it pushes.
WAYS = {"synchronous": 0, "DiLoCo, every 10": 10, "DiLoCo, every 50": 50}
# Of the outer steps. The paper's 0.9, for language models, overshoots here: weights move far in the first of them.
MOMENTUM = 0.5
# How often the loss is looked at; all numbers of steps above divide it.
LOOK = 50
PLOT = "diloco.png"


def train(kv: tensorkv.KVStore, every: int) -> list[tuple[float, float]]:
    """Train one way; return the megabytes that this worker has pushed, and the held-out loss, again and again."""
    digits = demo.load_digits()
    mine = slice(kv.rank, None, kv.num_workers)
    images, labels = digits.images[mine], digits.labels[mine]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 10))
    inner = torch.optim.AdamW(model.parameters(), lr=LR)
    trainer: Any
    if every:
        trainer = tensorkv.LocalTrainer(model, kv, inner, every=every, momentum=MOMENTUM)
    else:
        trainer = tensorkv.Trainer(model, kv, "adamw", lr=LR)
    nbytes = sum(param.nbytes for param in model.parameters())
    chance = torch.Generator().manual_seed(kv.rank)
    told = []
    for step in range(1, STEPS + 1):
        chosen = torch.randint(len(labels), (BATCH,), generator=chance)
        model.zero_grad()
        functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        trainer.step()
        if step % LOOK == 0:
            # With DiLoCo, all workers have the common weights now.
            with torch.no_grad():
                loss = functional.cross_entropy(model(digits.test_images), digits.test_labels).item()
            told.append((step // max(1, every) * nbytes / 1e6, loss))
    return told


def work() -> None:
    """Train each way as one worker; rank 0 prints what it has found."""
    for way, every in WAYS.items():
        with tensorkv.create("dist_sync", reduce="mean") as kv:
            told = train(kv, every)
            if kv.rank == 0:
                print(json.dumps([way, told]), flush=True)


def main() -> int:
    """Start the workers, draw what they tell, and compare the losses at the end."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORKERS)]
    ended = subprocess.run([sys.executable, *launcher, __file__], stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603 - this file
    if ended.returncode:
        return ended.returncode
    found = dict(json.loads(line) for line in ended.stdout.splitlines() if line.startswith("["))
    for way, told in found.items():
        megabytes, loss = told[-1]
        print(f"{way}: each worker has pushed {megabytes:.3f} MB, held-out loss {told[0][1]:.3f} to {loss:.3f}")
    plot(found)
    print(f"curves: {PLOT}")
    return 0


def plot(found: dict[str, list[list[float]]]) -> None:
    """Draw the loss over steps and over bytes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, sharey=True, figsize=(10, 4.5), layout="constrained")
    for way, told in found.items():
        left.plot([LOOK * (place + 1) for place in range(len(told))], [loss for _, loss in told], ".-", label=way)
        right.plot([megabytes for megabytes, _ in told], [loss for _, loss in told], ".-", label=way)
    left.set_xlabel("steps of each worker")
    right.set_xlabel("megabytes that each worker has pushed (log scale)")
    right.set_xscale("log")
    left.set_ylabel("loss of held-out digits")
    left.legend()
    figure.suptitle(f"Handwritten digits, {WORKERS} workers")
    figure.savefig(PLOT, dpi=120)


if __name__ == "__main__":
    if "RANK" in os.environ:
        work()
    else:
        sys.exit(main())
