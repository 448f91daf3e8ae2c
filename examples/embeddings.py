"""Train word vectors in sparse tables on parameter servers, with several workers; one server is killed meanwhile.

The text is Python's own language reference, which every Python has for ``help()``: ``pydoc_data.topics``, about
64,000 words, part of CPython and under its licence (PSF-2.0); nothing is downloaded. The method is skip-gram with
negative sampling (Mikolov et al., NeurIPS 2013): neighbouring words get similar vectors. The row of a word is a hash of
the word, so workers need no common vocabulary; of four billion rows the tables store only those of words that occur.

Every tenth pair of neighbouring words is held out. The quality is the share of held-out pairs that score higher than
the same word with a random word of the text. 0.5 is chance; the quality of scoring by word frequency is printed, too.

During the training a server is killed with SIGKILL. Ray restarts it, it recovers its values from its folder, and the
workers repeat their unanswered requests. At the end the number of updates must equal the number of pushes.

    python examples/embeddings.py

Needs the extra ray: pip install '.[ray]'
"""

from __future__ import annotations

import os
import pydoc_data.topics
import re
import signal
import sys
import tempfile
import time
import zlib

import numpy as np
import ray

import tensorkv

NAME = "word-vectors"
WORKERS, SERVERS = 3, 2
DIMENSION, WINDOW, NEGATIVES = 64, 2, 5
EPOCHS = 4
BATCH = 1024
ROWS = 1 << 32


def words() -> list[str]:
    """Return the text as lower-case words."""
    return re.findall(r"[a-z_]+", " ".join(pydoc_data.topics.topics.values()).lower())


def pairs(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of words at most WINDOW apart: those to learn from, and every tenth, held out."""
    both = [np.stack([ids[:-apart], ids[apart:]], axis=1) for apart in range(1, WINDOW + 1)]
    shuffled = np.random.default_rng(0).permutation(np.concatenate(both))
    return shuffled[len(shuffled) // 10 :], shuffled[: len(shuffled) // 10]


def row_of(word: str) -> int:
    """Return the row of a word in both tables; two words rarely share one."""
    return zlib.crc32(word.encode())


def learn(worker: int) -> int:
    """Train on this worker's share of the pairs; return the number of pushes."""
    ids = np.array([row_of(word) for word in words()])
    mine = pairs(ids)[0][worker::WORKERS]
    random = np.random.default_rng(worker + 1)
    pushes = 0
    with tensorkv.create("dist_async", name=NAME) as kv:
        for _ in range(EPOCHS):
            random.shuffle(mine)
            for start in range(0, len(mine), BATCH):
                words_, near = mine[start : start + BATCH].T
                far = random.choice(ids, (len(near), NEGATIVES))  # by frequency
                contexts = np.concatenate([near[:, None], far], axis=1)
                kv.push(["words", "contexts"], gradients(kv, words_, contexts))
                pushes += 1
    return pushes


def gradients(kv: tensorkv.KVStore, centres: np.ndarray, contexts: np.ndarray) -> list[tensorkv.Rows]:
    """Return the gradients of both tables, for words with one true and some random contexts each."""
    words_, contexts_ = kv.row_sparse_pull(["words", "contexts"], row_ids=[centres, contexts.ravel()])
    of_centre = np.searchsorted(words_.ids, centres)
    of_context = np.searchsorted(contexts_.ids, contexts)
    u, v = words_.values[of_centre], contexts_.values[of_context]
    truth = np.zeros(contexts.shape, np.float32)
    truth[:, 0] = 1
    error = 1 / (1 + np.exp(-np.einsum("nd,nkd->nk", u, v))) - truth
    for_words = np.einsum("nk,nkd->nd", error, v)
    for_contexts = (error[:, :, None] * u[:, None]).reshape(-1, DIMENSION)
    # Repeated ids are summed by the store.
    return [
        tensorkv.Rows(centres, for_words, ROWS),
        tensorkv.Rows(contexts.ravel(), for_contexts, ROWS),
    ]


def quality(score, held_out: np.ndarray, ids: np.ndarray) -> float:
    """Return the share of held-out pairs that score higher than the same word with a random word of the text."""
    other = np.random.default_rng(7).choice(ids, len(held_out))
    true, false = score(held_out[:, 0], held_out[:, 1]), score(held_out[:, 0], other)
    return float((true > false).mean() + (true == false).mean() / 2)


def vectors(kv: tensorkv.KVStore, ids: np.ndarray):
    """Pull both tables and return a function that scores pairs of words."""
    u, v = kv.row_sparse_pull(["words", "contexts"], row_ids=[ids, ids])

    def score(one: np.ndarray, two: np.ndarray) -> np.ndarray:
        return (u.values[np.searchsorted(u.ids, one)] * v.values[np.searchsorted(v.ids, two)]).sum(1)

    return score


def main(folder: str) -> int:
    """Train, kill a server meanwhile, and print the quality of the vectors."""
    text = words()
    ids = np.array([row_of(word) for word in text])
    vocabulary = np.unique(ids)
    held_out = pairs(ids)[1]
    start = np.random.default_rng(0).uniform(-0.5, 0.5, (len(vocabulary), DIMENSION)).astype(np.float32) / DIMENSION
    with tensorkv.create("dist_async", name=NAME, num_servers=SERVERS, num_workers=1, path=folder) as kv:
        kv.init("words", tensorkv.Rows(vocabulary, start, ROWS))
        kv.init("contexts", tensorkv.Rows(vocabulary, np.zeros_like(start), ROWS))
        kv.set_optimizer("adagrad", lr=0.1)
        print(f"{len(text)} words, {len(vocabulary)} different; tables of {ROWS} rows, in {folder}")
        begin = time.monotonic()
        # A task that Ray retried would push twice.
        task = ray.remote(num_cpus=0, max_retries=0)(learn)
        tasks = [task.remote(worker) for worker in range(WORKERS)]
        total = WORKERS * EPOCHS * -(-(len(pairs(ids)[0]) // WORKERS) // BATCH)
        killed = None
        while ray.wait(tasks, num_returns=WORKERS, timeout=1)[1]:
            done = kv.info("words").version
            share = quality(vectors(kv, vocabulary), held_out, ids)
            print(
                f"{time.monotonic() - begin:5.1f} s: {done} of about {total} updates, quality {share:.3f}", flush=True
            )
            if killed is None and done > total / 3:
                killed = kv.stats()["servers"][1]["pid"]
                os.kill(killed, signal.SIGKILL)
                print(f"server 1 (process {killed}) was killed", flush=True)
        try:
            pushes = sum(ray.get(tasks))
        except ray.exceptions.RayError as error:
            print(f"failed: a worker has ended: {str(error).partition(chr(10))[0]}", file=sys.stderr)
            return 1
        after = kv.stats()["servers"][1]["pid"]
        versions = [kv.info(key).version for key in ("words", "contexts")]
        share = quality(vectors(kv, vocabulary), held_out, ids)
        common = dict(zip(*np.unique(ids, return_counts=True), strict=True))
        baseline = quality(lambda _, two: np.array([common[each] for each in two]), held_out, ids)
        show_neighbours(kv, text)
    print(f"server 1 was restarted as process {after}; {pushes} pushes, versions {versions[0]} and {versions[1]}")
    print(f"quality on held-out pairs: {share:.3f} (by word frequency: {baseline:.3f})")
    problems = {
        "no server was killed: the workers finished before the first check": killed is None,
        "server 1 is the process that was killed": killed == after,
        f"{pushes} pushes were acknowledged, and the tables had {versions} updates": versions != [pushes, pushes],
        "the vectors are not better than word frequency": share <= baseline,
    }
    for problem in [each for each, holds in problems.items() if holds]:
        print(f"failed: {problem}", file=sys.stderr)
    return int(any(problems.values()))


def show_neighbours(kv: tensorkv.KVStore, text: list[str]) -> None:
    """Print the nearest words of some words."""
    names, counts = np.unique(text, return_counts=True)
    names = names[counts >= 20]
    rows = [row_of(name) for name in names]
    found = kv.row_sparse_pull("words", row_ids=rows)
    points = found.values[np.searchsorted(found.ids, rows)]
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    for name in ("tuple", "method", "integer", "await"):
        near = np.argsort(points @ points[list(names).index(name)])[::-1]
        print(f"near {name!r}: {', '.join(names[near[1:6]])}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as own:
        sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else own))
