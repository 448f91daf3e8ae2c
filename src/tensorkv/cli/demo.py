"""The demo: data-parallel training on handwritten digits, with the weights and the optimizer in the store.

Read ``train``: each replica computes gradients on its share of a batch, the store sums them and steps the optimizer,
and every replica pulls the new weights. ``Trainer`` does the pushing and pulling.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from torch.nn.functional import cross_entropy

from tensorkv.engines.transport.rendezvous import launched
from tensorkv.errors import CheckpointError
from tensorkv.store import KVStore, create
from tensorkv.trainer.trainer import Trainer

# Other optimizers use the default of torch.optim.
LEARNING_RATES = {"adam": 0.005, "adamw": 0.005, "sgd": 0.2}
# Gradients are multiplied by this where they are compressed, so that their elements are of about the size that 1bit and
# 2bit send.
COMPRESSED_SCALE = 100


@dataclass(frozen=True)
class Settings:
    """What to train; the defaults are the demo's."""

    replicas: int = 4
    epochs: int = 20
    batch_size: int = 64
    optimizer: str = "adam"
    lr: float | None = None
    seed: int = 0
    store: str = "local"
    checkpoint: Path | None = None
    compression: str | None = None


@dataclass(frozen=True)
class Digits:
    """8 × 8 images as float32 rows of 64 numbers from 0 to 1, and their digits as int64 labels."""

    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


@dataclass(frozen=True)
class Curves:
    """For each epoch, the mean training loss, the accuracy on the test images at its end, and the bytes sent so far.

    Args:
        losses, accuracies: by epoch.
        sent_nbytes: of compressed gradients, of all replicas together.
        raw_nbytes: of the same gradients without compression.
    """

    losses: list[float]
    accuracies: list[float]
    sent_nbytes: list[int] = field(default_factory=list)
    raw_nbytes: list[int] = field(default_factory=list)


def load_digits() -> Digits:
    """Return scikit-learn's 1797 handwritten digits, with a quarter of each digit held out for testing."""
    from sklearn import datasets, model_selection

    images, labels = datasets.load_digits(return_X_y=True)
    images = (images / 16).astype("float32")
    split = model_selection.train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    images, test_images, labels, test_labels = map(torch.from_numpy, split)
    return Digits(images, labels, test_images, test_labels)


def network(seed: int) -> nn.Module:
    """Return a small convolutional network whose initial weights depend only on the seed."""
    # GELU is smooth. With ReLU, the last bits of a sum near 0 would decide, and the curves would diverge.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 10),
        )


def train(digits: Digits, settings: Settings, on_epoch: Callable[[float, float], None] | None = None) -> Curves:
    """Train ``settings.replicas`` copies of one network in lock step and return the curves.

    With several workers each trains one copy on its share of every batch, and all return the same.

    Args:
        digits: the data set.
        settings: number of replicas and epochs, learning rate, and so on; the checkpoint to resume from.
        on_epoch: called after each epoch with its loss and accuracy.
    """
    first = network(settings.seed)
    shuffler = torch.Generator().manual_seed(settings.seed)

    with one_thread(), _create(settings) as kv, create(settings.store) as sums:
        copies = settings.replicas if kv.num_workers == 1 else 1
        replicas = [first, *(copy.deepcopy(first) for _ in range(copies - 1))]
        shares = slice(kv.rank * copies, (kv.rank + 1) * copies)
        scale = 1 if settings.compression is None else COMPRESSED_SCALE
        trainer = Trainer(replicas, kv, settings.optimizer, rescale_grad=1 / scale, **learning_rate(settings))
        if settings.compression is not None:
            kv.set_gradient_compression({"type": settings.compression}, simulate=kv.num_workers == 1)
        first_rate = trainer.learning_rate
        sums.init("loss", torch.zeros(1, dtype=torch.float64, device="cpu"))
        curves = _resume(settings, kv, trainer, steps=-(-len(digits.labels) // settings.batch_size))

        for epoch in range(settings.epochs):
            order = torch.randperm(len(digits.labels), generator=shuffler, dtype=torch.int64, device="cpu")
            if epoch < len(curves.losses):
                continue
            trainer.learning_rate = first_rate * (1 - epoch / settings.epochs)
            epoch_loss = 0.0
            for start in range(0, len(order), settings.batch_size):
                batch = order[start : start + settings.batch_size]

                trainer.zero_grad()
                parts = batch.tensor_split(copies * kv.num_workers)[shares]
                for replica, share in zip(replicas, parts, strict=True):
                    loss = cross_entropy(replica(digits.images[share]), digits.labels[share], reduction="sum")
                    # Divided by the length of the whole batch, so that the gradients add up to that of its mean loss.
                    (scale * loss / len(batch)).backward()  # type: ignore[no-untyped-call]
                    epoch_loss += loss.item()
                trainer.step()  # push every replica's gradients, update in the store, pull the weights

            total = sums.pushpull("loss", torch.tensor([epoch_loss], dtype=torch.float64, device="cpu")).item()
            curves.losses.append(total / len(digits.labels))
            curves.accuracies.append(accuracy(first, digits))
            if settings.compression is not None:
                counts = kv.stats()["compression"]
                curves.sent_nbytes.append(counts["sent_nbytes"] + counts["received_nbytes"])
                curves.raw_nbytes.append(counts["sent_raw_nbytes"] + counts["received_raw_nbytes"])
            _save_checkpoint(settings, kv, curves)
            if on_epoch is not None:
                on_epoch(curves.losses[-1], curves.accuracies[-1])
    return curves


def _create(settings: Settings) -> KVStore:
    """Return the store to train with; workers who share memory send nothing that could be compressed."""
    options = {} if settings.compression is None or settings.store in ("local", "device") else {"shared_memory": False}
    return create(settings.store, **options)


def _resume(settings: Settings, kv: KVStore, trainer: Trainer, steps: int) -> Curves:
    """Load the checkpoint, if there is one, and return the curves up to it.

    Args:
        settings: name the checkpoint.
        kv: the store, which loads it.
        trainer: whose replicas pull the weights.
        steps: the number of steps in an epoch.

    Raises:
        CheckpointError: damaged, of a training with other settings, or with more epochs than these settings have.
    """
    folder = settings.checkpoint
    if folder is None or not (folder / "store" / "manifest.json").exists():
        return Curves([], [])
    curves = _read_curves(folder, settings)
    kv.load(folder / "store")
    trainer.refresh()
    # The curves are written before the checkpoint, so they may have one more epoch.
    done = kv.info(trainer.keys[0]).version // steps
    if done > settings.epochs:
        raise CheckpointError(
            f"--checkpoint {folder}: has {done} epochs; expected at most --epochs {settings.epochs}. "
            "Give more epochs or another directory"
        )
    if done > min(len(curves.losses), len(curves.accuracies)):
        raise _damaged(folder, f"the checkpoint has {done} epochs, the curves have fewer")
    return Curves(curves.losses[:done], curves.accuracies[:done])


def _read_curves(folder: Path, settings: Settings) -> Curves:
    """Return the curves beside a checkpoint.

    Raises:
        CheckpointError: damaged, or of a training with other settings.
    """
    try:
        found = json.loads((folder / "curves.json").read_text())
        saved = {name: found["settings"][name] for name in _resumable(settings)}
        curves = Curves([float(each) for each in found["losses"]], [float(each) for each in found["accuracies"]])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(folder, repr(error)) from None
    for name, expected in _resumable(settings).items():
        if saved[name] != expected:
            option = f"--{name.replace('_', '-')}"
            raise CheckpointError(
                f"--checkpoint {folder}: was trained with {option} {saved[name]}; expected {expected}. "
                "Give the same value or another directory"
            )
    return curves


def _damaged(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{folder / 'curves.json'}: damaged, or not written by this demo: {why}. Give another directory"
    )


def _resumable(settings: Settings) -> dict[str, Any]:
    """Return the settings that cannot change when a training is resumed."""
    names = ("replicas", "batch_size", "optimizer", "seed")
    return {**{name: getattr(settings, name) for name in names}, "lr": learning_rate(settings).get("lr")}


def _save_checkpoint(settings: Settings, kv: KVStore, curves: Curves) -> None:
    if settings.checkpoint is None:
        return
    if kv.rank == 0:
        settings.checkpoint.mkdir(parents=True, exist_ok=True)
        written = settings.checkpoint / "curves.tmp"
        content = {"settings": _resumable(settings), "losses": curves.losses, "accuracies": curves.accuracies}
        written.write_text(json.dumps(content))
        os.replace(written, settings.checkpoint / "curves.json")
    kv.barrier()
    kv.save(settings.checkpoint / "store")


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch compute in one thread."""
    # The network is so small that several threads would spend more time on synchronization than on computation.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def learning_rate(settings: Settings) -> dict[str, Any]:
    """Return the initial learning rate as keyword arguments for an optimizer; none for the optimizer's default."""
    lr = LEARNING_RATES.get(settings.optimizer) if settings.lr is None else settings.lr
    return {} if lr is None else {"lr": lr}


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Return the share of the test images that the model classifies correctly."""
    right = model(digits.test_images).argmax(1) == digits.test_labels
    return float(right.float().mean())


def figure(many: Curves, one: Curves, settings: Settings) -> Any:
    """Return a matplotlib figure of the curves of many replicas over those of one."""
    from matplotlib.ticker import MaxNLocator

    if settings.compression is not None:
        return _compression_figure(many, one, settings)
    label = f"{_count(settings.replicas)}, gradients summed in the store"
    epochs = range(1, len(many.losses) + 1)
    drawn, loss_axes, accuracy_axes = _panels(
        f"Handwritten digits, {settings.optimizer} in the store: final test accuracy {many.accuracies[-1]:.1%} "
        f"with {_count(settings.replicas)}, {one.accuracies[-1]:.1%} with {_count(1)}"
    )
    for axes, below, above in (
        (loss_axes, one.losses, many.losses),
        (accuracy_axes, one.accuracies, many.accuracies),
    ):
        # A wide pale line under a thin dark dashed one, so that both are visible where the curves coincide.
        axes.plot(epochs, below, color="#f5b041", linewidth=7, alpha=0.75, label="1 replica, whole batches")
        axes.plot(epochs, above, color="#1b2a6b", linewidth=1.8, linestyle="--", marker="o", markersize=4, label=label)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    return drawn


def _compression_figure(many: Curves, one: Curves, settings: Settings) -> Any:
    """Return a matplotlib figure of the curves with compression beside those without it, over the bytes sent."""
    drawn, loss_axes, accuracy_axes = _panels(
        f"Handwritten digits, {_count(settings.replicas)}: final test accuracy {many.accuracies[-1]:.1%} with "
        f"{settings.compression}, {one.accuracies[-1]:.1%} without"
    )
    for axes, plain, compressed in (
        (loss_axes, one.losses, many.losses),
        (accuracy_axes, one.accuracies, many.accuracies),
    ):
        for values, nbytes, colour, label in (
            (plain, many.raw_nbytes, "#f5b041", "no compression"),
            (compressed, many.sent_nbytes, "#1b2a6b", settings.compression),
        ):
            megabytes = [each / 1e6 for each in nbytes]
            axes.plot(megabytes, values, color=colour, linewidth=2, marker="o", markersize=4, label=label)
        axes.set_xlabel("megabytes of gradients sent (log scale)")
        axes.set_xscale("log")
        axes.legend()
    return drawn


def _panels(title: str) -> tuple[Any, Any, Any]:
    """Return a matplotlib figure, and its axes for a loss and for an accuracy."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11, 4.8), layout="constrained")
    loss_axes, accuracy_axes = drawn.subplots(1, 2)
    loss_axes.set_title("Training loss")
    loss_axes.set_ylabel("mean cross-entropy (log scale)")
    loss_axes.set_yscale("log")
    accuracy_axes.set_title("Test accuracy")
    accuracy_axes.set_ylabel("share of test images classified correctly")
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
    drawn.suptitle(title, fontsize=13, fontweight="bold")
    return drawn, loss_axes, accuracy_axes


def save(drawn: Any, out: Path) -> None:
    """Write a figure as a PNG.

    Raises:
        OSError: it cannot be written; the message names the file.
    """
    try:
        drawn.savefig(out, format="png", dpi=120)
    except OSError as error:
        raise OSError(f"{out}: cannot be written: {error.strerror or error}") from error


def run(settings: Settings, out: Path, *, quiet: bool = False) -> Curves:
    """Train with several replicas and with one, save the curves of both as a PNG and print a summary.

    Args:
        settings: number of replicas and epochs, learning rate, and so on.
        out: path of the PNG.
        quiet: show no progress bar, and print only the line that names the PNG.

    Returns:
        The curves of the several replicas.

    Raises:
        CheckpointError: the checkpoint is damaged, or not one of this training.
        ModuleNotFoundError: scikit-learn or matplotlib is not installed.
        OSError: the PNG cannot be written.
    """
    import matplotlib.figure  # noqa: F401 - so that a missing library is reported before the training

    digits = load_digits()
    rank, workers = launched() if settings.store.startswith("dist") else (0, 1)
    leads = rank == 0
    if workers > 1:
        settings = replace(settings, replicas=workers)
    many = _train_with_progress(digits, settings, quiet or not leads)
    if not leads:
        return many
    alone = replace(settings, replicas=1, store="local", checkpoint=None, compression=None)
    one = _train_with_progress(digits, alone, quiet)
    save(figure(many, one, settings), out)
    if not quiet:
        apart = max(abs(a - b) for a, b in zip(many.losses, one.losses, strict=True))
        print(
            f"{len(digits.labels)} training images, {len(digits.test_labels)} test images, "
            f"{_count(settings.epochs, 'epoch')}, {settings.optimizer} in a store of type {settings.store}"
        )
        print(f"{_count(settings.replicas)}: test accuracy {many.accuracies[-1]:.4f}, loss {many.losses[-1]:.4f}")
        print(f"{_count(1)}: test accuracy {one.accuracies[-1]:.4f}, loss {one.losses[-1]:.4f}")
        if settings.compression is None:
            print(f"the two loss curves are at most {apart:.1e} apart")
        else:
            sent, raw = many.sent_nbytes[-1], many.raw_nbytes[-1]
            print(f"gradients: {sent / 1e6:.2f} MB sent with {settings.compression}, {raw / 1e6:.2f} MB without")
    print(f"curves: {out}")
    return many


def _train_with_progress(digits: Digits, settings: Settings, quiet: bool) -> Curves:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[news]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        task = progress.add_task(f"{_count(settings.replicas):>11}", total=settings.epochs, news="")

        def show(loss: float, share: float) -> None:
            progress.update(task, advance=1, news=f"loss {loss:.3f}, accuracy {share:.3f}")

        return train(digits, settings, show)


def _count(number: int, what: str = "replica") -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
