"""Train a small GPT with a store and with DistributedDataParallel, and compare their losses step by step.

Three ways take the same batches and the same steps of AdamW, with weight decay on matrices only, a cosine schedule,
gradients accumulated over two batches and clipped by their global norm:

- ``local``: one process with a replica for each worker, and a store that sums and steps;
- ``dist_sync``: a process for each worker, and the same store over them;
- ``ddp``: a process for each worker, with DistributedDataParallel and torch.optim's fused AdamW.

The text is Python's own language reference, which every Python has for ``help()``: ``pydoc_data.topics``, part of
CPython and under its licence (PSF-2.0); nothing is downloaded. The model is a decoder-only transformer (Radford et al.,
"Language Models are Unsupervised Multitask Learners", 2019) over characters.

    python examples/gpt.py                                        all three with two workers; the plot is gpt.png
    torchrun --standalone --nproc-per-node 2 examples/gpt.py dist_sync

Needs the extra examples: pip install '.[examples]'
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import pydoc_data.topics
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

import tensorkv

WAYS = ("local", "dist_sync", "ddp")
WORKERS = 2
STEPS = 100
# Relative difference of losses that rounding may cause.
MOST_APART = 1e-5
LAYERS, HEADS, WIDTH, CONTEXT = 2, 4, 64, 64
BATCH, ACCUMULATION = 8, 2
LR, WARMUP, WEIGHT_DECAY, MAX_NORM = 3e-3, 10, 0.1, 1.0
BETAS = (0.9, 0.95)
AUTOCAST = False

TEXT = " ".join(pydoc_data.topics.topics.values()).encode("ascii", "replace")


class Block(nn.Module):
    """Attention, then a network for each position."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.projection = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        heads = self.attention(self.norm(x)).view(batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        mixed = (
            functional.scaled_dot_product_attention(*heads, is_causal=True)
            .transpose(1, 2)
            .reshape(batch, length, WIDTH)
        )
        x = x + self.projection(mixed)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Returns the mean loss of predicting each next character."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(128, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128, bias=False)
        # Tied: one parameter, and one key in a store.
        self.head.weight = self.token.weight
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        x = self.token(characters[:, :-1]) + self.position.weight
        logits = self.head(self.norm(self.blocks(x)))
        return functional.cross_entropy(logits.flatten(0, 1).float(), characters[:, 1:].flatten())


def new_model() -> GPT:
    """Return a model with the same weights every time."""
    torch.manual_seed(0)
    return GPT()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return parameter groups, as torch.optim and Trainer take them: only matrices decay."""
    parameters = list(model.parameters())
    return [
        {"params": [each for each in parameters if each.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [each for each in parameters if each.ndim < 2], "weight_decay": 0.0},
    ]


def lr_factor(step: int) -> float:
    """Return the schedule: a linear warm-up, then half a cosine."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def batch(number: int, worker: int, workers: int) -> torch.Tensor:
    """Return a worker's share of a batch: its characters, and the next one of each."""
    generator = torch.Generator().manual_seed(number)
    starts = torch.randint(len(TEXT) - CONTEXT - 1, (BATCH * workers,), generator=generator)
    lines = [list(TEXT[start : start + CONTEXT + 1]) for start in starts[worker::workers].tolist()]
    return torch.tensor(lines)


# ---------------------------------------------------------------- the loop that all ways share


def train(
    replicas: list[Any],
    optimizer: torch.optim.Optimizer,
    step: Callable[[], Any],
    mean: Callable[[list[torch.Tensor]], float],
    first: int,
    workers: int,
) -> Iterator[tuple[float, float]]:
    """Train, and yield the loss of each step and how many seconds it took.

    Args:
        replicas: of the model, in this process.
        optimizer: whose learning rates the schedule sets.
        step: takes a step from the gradients.
        mean: returns the mean of the losses of all replicas and workers.
        first: the worker whose share of the data the first replica has.
        workers: how many there are.
    """
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    for number in range(STEPS):
        start = time.perf_counter()
        optimizer.zero_grad()
        losses = [torch.zeros(()) for _ in replicas]
        for turn in range(ACCUMULATION):
            for index, replica in enumerate(replicas):
                waits = isinstance(replica, nn.parallel.DistributedDataParallel) and turn + 1 < ACCUMULATION
                with replica.no_sync() if waits else nullcontext():
                    with torch.autocast("cpu", torch.bfloat16, enabled=AUTOCAST):
                        loss = replica(batch(number * ACCUMULATION + turn, first + index, workers)) / ACCUMULATION
                    loss.backward()
                losses[index] += loss.detach()
        step()
        scheduler.step()
        seconds = time.perf_counter() - start
        yield mean(losses), seconds


def with_store(way: str) -> Iterator[tuple[float, float]]:
    """Train with a store, which takes the mean of the gradients, clips it and steps."""
    with tensorkv.create(way, reduce="mean") as kv, tensorkv.create(way, reduce="mean") as metrics:
        replicas = [new_model() for _ in range(1 if way == "dist_sync" else WORKERS)]
        numbers = {"lr": LR, "betas": BETAS, "max_grad_norm": MAX_NORM}
        trainer = tensorkv.Trainer(replicas, kv, "adamw", param_groups=groups(replicas[0]), **numbers)
        metrics.init("loss", torch.zeros(()))

        def mean(losses: list[torch.Tensor]) -> float:
            return float(metrics.pushpull("loss", losses))

        workers = kv.num_workers * len(replicas)
        yield from train(replicas, trainer.optimizer, trainer.step, mean, kv.rank, workers)


def with_ddp() -> Iterator[tuple[float, float]]:
    """Train with DistributedDataParallel, whose ranks all step."""
    dist.init_process_group("gloo")
    yield from in_process_group()
    # DDP refers to itself, and the threads of its process group would still run when Python ends, which then aborts.
    gc.collect()
    dist.destroy_process_group()


def in_process_group() -> Iterator[tuple[float, float]]:
    """Train with DistributedDataParallel in the process group that there is."""
    model = nn.parallel.DistributedDataParallel(new_model())
    optimizer = torch.optim.AdamW(groups(model), lr=LR, betas=BETAS, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()

    def mean(losses: list[torch.Tensor]) -> float:
        [loss] = losses
        dist.all_reduce(loss)
        return float(loss / dist.get_world_size())

    yield from train([model], optimizer, step, mean, dist.get_rank(), dist.get_world_size())


# ---------------------------------------------------------------- the three ways


def run_here(way: str) -> None:
    """Train one way in this process, and print its losses and the median time of a step."""
    torch.set_num_threads(1)
    losses, seconds = zip(*(with_ddp() if way == "ddp" else with_store(way)), strict=True)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"losses": losses, "step_ms": 1e3 * statistics.median(seconds)}))


def run(way: str) -> dict[str, Any]:
    """Train one way in processes of its own; return what it has printed."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORKERS)]
    command = [sys.executable, *([] if way == "local" else torchrun), __file__, way]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    shown = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout  # noqa: S603 - this file
    return json.loads(shown)


def plot(found: dict[str, dict[str, Any]], path: str) -> None:
    """Draw the losses, and below how far each way is from DDP."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=[2, 1])
    for (way, each), style in zip(found.items(), ("-", "--", ":"), strict=True):
        above.plot(each["losses"], style, label=f"{way}, {each['step_ms']:.0f} ms a step")
        if way != "ddp":
            below.plot(differences(each, found["ddp"]), style, label=way)
    above.set_ylabel("loss")
    above.legend()
    below.set(xlabel="step", ylabel="relative difference\nfrom DDP")
    figure.savefig(path, dpi=110)


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """Return the relative difference of two losses at each step."""
    return [abs(a - b) / b for a, b in zip(one["losses"], other["losses"], strict=True)]


def main() -> int:
    """Train all ways and compare them; return 1 if losses differ by more than rounding."""
    found = {way: run(way) for way in WAYS}
    for way, each in found.items():
        first, last = each["losses"][0], each["losses"][-1]
        print(f"{way}: loss {first:.4f} to {last:.4f}, {each['step_ms']:.1f} ms a step")
    plot(found, "gpt.png")
    most = max(max(differences(found[way], found["ddp"])) for way in WAYS)
    print(f"largest relative difference from DDP at any step: {most:.1e}; plot: gpt.png")
    return int(most > MOST_APART)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small GPT in three ways and compare their losses.")
    parser.add_argument("way", nargs="?", choices=WAYS, help="only this one, in the processes that have been started")
    way = parser.parse_args().way
    if way is None:
        sys.exit(main())
    else:
        run_here(way)
