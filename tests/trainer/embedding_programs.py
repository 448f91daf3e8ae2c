"""What workers run for test_embedding."""

import copy
import os

import torch
from torch import nn

import tensorkv

RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
ROWS, COLUMNS = 30, 4


def learn_together():
    """Learn on each rank with its part of each batch, and alone in a local store with all of it: the same table."""
    with tensorkv.create("dist_sync") as together, tensorkv.create() as alone:
        # Rank 0's rule counts.
        layers = [
            tensorkv.Embedding(kv, "t", ROWS, COLUMNS, seed=5 + (RANK if kv is together else 0))
            for kv in (together, alone)
        ]
        for layer in layers:
            layer.kv.set_optimizer("adam", lr=0.1)
        generator = torch.Generator().manual_seed(0)
        for step in range(4):
            parts = [torch.randint(0, ROWS, (3 * rank,), generator=generator) for rank in range(SIZE)]
            if step == 2:
                parts[1:] = [part[:0] for part in parts[1:]]
            for layer, own in zip(layers, ([parts[RANK]], parts), strict=True):
                for ids in own:
                    if len(ids):
                        layer(ids).square().sum().backward()
                layer.step()
        mine, expected = (
            torch.as_tensor(kv.row_sparse_pull("t", row_ids=range(ROWS)).values) for kv in (together, alone)
        )
        torch.testing.assert_close(mine, expected)
        assert together.info("t").version == 4
        assert together.info("t").nbytes == alone.info("t").nbytes < ROWS * COLUMNS * 4


def clip(kv, batches):
    """Train a table and a layer, with a replica for each number in a batch; return norms and what was learned."""
    torch.manual_seed(0)
    model = nn.Sequential(tensorkv.Embedding(kv, "t", ROWS, COLUMNS, seed=5), nn.Linear(COLUMNS, 3))
    replicas = [model, *(copy.deepcopy(model) for _ in batches[0][1:])]
    trainer = tensorkv.Trainer(replicas, kv, "adam", lr=0.1, max_grad_norm=0.5)
    results = []
    for step, seeds in enumerate(batches):
        trainer.zero_grad()
        for replica, seed in zip(replicas, seeds, strict=True):
            ids = torch.randint(0, ROWS, (5,), generator=torch.Generator().manual_seed(100 * step + seed))
            replica(ids).square().sum().backward()
        results.append(tuple(trainer.step()))
        assert results[-1][1] > 0.5, "nothing was clipped"
    table = torch.as_tensor(kv.row_sparse_pull("t", row_ids=range(ROWS)).values)
    return results, [table, *(param.detach() for param in model.parameters())]


def clip_together():
    """Train on each rank with its part of each batch, and alone in a local store with all of it: the same bits."""
    with tensorkv.create("dist_sync") as together, tensorkv.create() as alone:
        mine, learned = clip(together, [[RANK]] * 4)
        others, expected = clip(alone, [list(range(SIZE))] * 4)
        assert mine == others
        assert all(map(torch.equal, learned, expected))
