"""Train a recommender whose tables of users and items are in a store: of this process, or on parameter servers.

A rating is predicted from a user's and an item's row: the product of two vectors, and a bias of each (matrix
factorisation: Koren, Bell and Volinsky, "Matrix Factorization Techniques for Recommender Systems", Computer 42, 2009).
The ratings are generated from such vectors, with noise. Ids are any 40-bit numbers: a row starts with random values
that depend on its id alone, and takes memory once it is trained, so nobody counts or registers users and items.

The same training runs in this process, and in two workers that push to two servers independently:

    python examples/recommender.py
    python examples/recommender.py dist_async

At the end the predictions of held-out ratings are compared with the best constant. dist_async needs the extra ray:
pip install '.[ray]'
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import nn

import tensorkv

NAME = "recommender"
WORKERS, SERVERS = 2, 2
USERS, ITEMS, RATINGS = 1000, 300, 40_000
DIMENSION = 8
EPOCHS = 10
BATCH = 512
ROWS = 1 << 40


def ratings() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the user's id, the item's id and the rating of each pair, in random order."""
    random = np.random.default_rng(0)
    ids = [random.choice(ROWS, count, replace=False) for count in (USERS, ITEMS)]
    vectors = [random.normal(0, 0.7, (count, DIMENSION)) for count in (USERS, ITEMS)]
    biases = [random.normal(0, 0.5, count) for count in (USERS, ITEMS)]
    # Some users rate more, and some items are more popular.
    users, items = (random.integers(0, count, RATINGS) * random.random(RATINGS) for count in (USERS, ITEMS))
    u, i = users.astype(int), items.astype(int)
    rating = 3 + biases[0][u] + biases[1][i] + (vectors[0][u] * vectors[1][i]).sum(1) + random.normal(0, 0.3, RATINGS)
    return torch.from_numpy(ids[0][u]), torch.from_numpy(ids[1][i]), torch.from_numpy(rating.astype(np.float32))


class Recommender(nn.Module):
    """Predicts ratings; the last column of each table is a bias."""

    def __init__(self, kv: tensorkv.KVStore, mean: float) -> None:
        super().__init__()
        self.users, self.items = (
            tensorkv.Embedding(kv, key, ROWS, DIMENSION + 1, std=0.1, seed=1) for key in ("users", "items")
        )
        self.mean = mean

    def forward(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        u, i = self.users(users), self.items(items)
        return self.mean + u[:, -1] + i[:, -1] + (u[:, :-1] * i[:, :-1]).sum(1)

    def step(self) -> None:
        """Push the gradients of both tables."""
        self.users.step()
        self.items.step()


def learn(kv: tensorkv.KVStore, worker: int = 0, workers: int = 1) -> None:
    """Train with one worker's share of the ratings; every tenth rating is held out."""
    *ids, rating = (each[len(each) // 10 :][worker::workers] for each in ratings())
    model = Recommender(kv, rating.mean().item())
    for epoch in range(EPOCHS):
        order = torch.randperm(len(rating), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(BATCH):
            error = model(*(each[batch] for each in ids)) - rating[batch]
            # The sum, since a row's gradient is to be that of its ratings, however many others the batch has.
            error.square().sum().backward()
            model.step()


def learn_on_servers(worker: int) -> None:
    """Train as one of several workers."""
    with tensorkv.create("dist_async", name=NAME) as kv:
        learn(kv, worker, WORKERS)


def run_workers() -> None:
    """Train in several processes, which this one waits for."""
    import ray

    # A task that Ray retried would push twice.
    task = ray.remote(num_cpus=0, max_retries=0)(learn_on_servers)
    ray.get([task.remote(worker) for worker in range(WORKERS)])


def main(kind: str) -> int:
    """Train, and print how far predictions of held-out ratings are from them."""
    options = {"name": NAME, "num_servers": SERVERS, "num_workers": 1} if kind == "dist_async" else {}
    with tensorkv.create(kind, **options) as kv:
        users, items, rating = (each[: RATINGS // 10] for each in ratings())
        model = Recommender(kv, ratings()[2][RATINGS // 10 :].mean().item())
        kv.set_optimizer("adagrad", lr=0.1)
        if kind == "dist_async":
            run_workers()
        else:
            learn(kv)
        with torch.no_grad():
            error = (model(users, items) - rating).square().mean().sqrt().item()
        held = {key: kv.info(key) for key in ("users", "items")}
    constant = rating.std().item()
    for key, info in held.items():
        print(f"{key}: {info.nbytes // 4 // (DIMENSION + 1)} of {ROWS} rows, {info.version} updates")
    print(f"error on held-out ratings: {error:.3f} (of the best constant: {constant:.3f})")
    if error > constant / 2:
        print("failed: the predictions are not much better than a constant", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "local"))
