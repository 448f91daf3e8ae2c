"""The demo on parameter servers: the same digits, in lock step, with bounded staleness, and fully asynchronously.

Read ``train``. Every worker is a process with one network; the last worker is slow.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch.nn.functional import cross_entropy

from tensorkv.store import KVStore, create
from tensorkv.trainer.trainer import Trainer

from .demo import Digits, Settings, accuracy, learning_rate, load_digits, network, one_thread, save

# How long the slow worker sleeps in every step: several times as long as a step takes.
SLEEP_S = 0.02
# How often the accuracy is measured while workers train.
_MEASURE_S = 0.1
_GOAL = 0.9
_COLOURS = ("#1b2a6b", "#f5b041", "#2e8b57")


@dataclass(frozen=True)
class Consistency:
    """How far workers may be apart.

    Args:
        mode, staleness: as for ``tensorkv.create("dist_async")``.

    >>> Consistency("sync").name, Consistency("async", 2).name, Consistency("async").name
    ('sync', 'staleness 2', 'async')
    """

    mode: str
    staleness: int | None = None

    @property
    def name(self) -> str:
        """Its name in the plot."""
        return self.mode if self.staleness is None else f"staleness {self.staleness}"


@dataclass
class AccuracyCurve:
    """The test accuracy over the seconds since the training began."""

    seconds: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)

    def seconds_to(self, goal: float) -> float | None:
        """Return when the accuracy first reached a goal; None if it never did.

        >>> AccuracyCurve([0.5, 1.0], [0.3, 0.95]).seconds_to(0.9)
        1.0
        """
        return next((at for at, share in zip(self.seconds, self.accuracies, strict=True) if share >= goal), None)


def consistency_models(mode: str | None, staleness: int | None) -> list[Consistency]:
    """Return the settings to train with, one after the other; ``run`` returns the accuracy of the last one.

    >>> [consistency.name for consistency in consistency_models(None, None)]
    ['sync', 'async', 'staleness 2']
    >>> [consistency.name for consistency in consistency_models("async", None)]
    ['async']
    """
    if mode is not None:
        return [Consistency(mode, staleness)]
    return [Consistency("sync"), Consistency("async"), Consistency("async", 2 if staleness is None else staleness)]


def train(digits: Digits, settings: Settings, kv: KVStore, *, averages: bool, progress: Any = None) -> AccuracyCurve:
    """Train this worker's network on its share of every batch; the weights are in the store.

    Args:
        digits: the data set.
        settings: number of epochs, learning rate, and so on.
        kv: the store, without keys; all workers call this together.
        averages: whether a step takes the pushes of all workers, in lock step, so that it averages over the batch.
        progress: called with the number of updates and the accuracy.

    Returns:
        At rank 0, the accuracy of the weights in the store over time; at other ranks nothing.
    """
    model = network(settings.seed)
    workers = kv.num_workers
    trainer = Trainer(model, kv, settings.optimizer, **learning_rate(settings))
    first_rate = trainer.learning_rate
    shuffler = torch.Generator().manual_seed(settings.seed)
    kv.barrier()  # the clock starts when every worker is ready

    with _measuring(kv, trainer, digits, settings, progress) as curve:
        for epoch in range(settings.epochs):
            if kv.rank == 0:
                trainer.learning_rate = first_rate * (1 - epoch / settings.epochs)
            order = torch.randperm(len(digits.labels), generator=shuffler, dtype=torch.int64, device="cpu")
            for start in range(0, len(order), settings.batch_size):
                batch = order[start : start + settings.batch_size]
                share = batch.tensor_split(workers)[kv.rank]
                if kv.rank == workers - 1:
                    time.sleep(SLEEP_S)
                trainer.zero_grad()
                loss = cross_entropy(model(digits.images[share]), digits.labels[share], reduction="sum")
                # A share without images has gradients of zero.
                averaged = len(batch) if averages else max(1, len(share))
                (loss / averaged).backward()  # type: ignore[no-untyped-call]
                trainer.step()  # push this worker's gradient, pull the present weights
        kv.barrier()
    return curve


@contextmanager
def _measuring(
    kv: KVStore, trainer: Trainer, digits: Digits, settings: Settings, progress: Any
) -> Iterator[AccuracyCurve]:
    """At rank 0, pull the weights and measure their accuracy while the workers train."""
    curve = AccuracyCurve()
    if kv.rank != 0:
        yield curve
        return
    model = network(settings.seed)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    start, ending = time.monotonic(), threading.Event()

    def measure() -> None:
        kv.pull(weights)
        at = time.monotonic() - start
        curve.seconds.append(at)
        curve.accuracies.append(accuracy(model, digits))
        if progress is not None:
            progress(kv.info(trainer.keys[0]).version, curve.accuracies[-1])

    def keep_measuring() -> None:
        while not ending.wait(_MEASURE_S):
            measure()

    thread = threading.Thread(target=keep_measuring, name="tensorkv-demo-accuracy")
    thread.start()
    try:
        yield curve
    finally:
        ending.set()
        thread.join()
    measure()


def run(
    settings: Settings,
    out: Path,
    *,
    servers: int = 1,
    mode: str | None = None,
    staleness: int | None = None,
    quiet: bool = False,
) -> float:
    """Train in every mode, save accuracy against time as a PNG and print a summary; all workers call this.

    Args:
        settings: what to train; its store is of a type with servers.
        out: path of the PNG.
        servers: number of servers.
        mode, staleness: train in this mode only (None: in lock step, with bounded staleness, and without a bound).
        quiet: show no progress bar, and print only the line that names the PNG.

    Returns:
        The final test accuracy in the chosen mode, or with bounded staleness; 1 at ranks other than 0.

    Raises:
        ModuleNotFoundError: scikit-learn, matplotlib or Ray is not installed.
        OSError: the PNG cannot be written.
    """
    import matplotlib.figure  # noqa: F401 - so that a missing library is reported before the training

    digits, chosen = load_digits(), consistency_models(mode, staleness)
    leads = os.environ.get("RANK", "0") == "0"
    curves: dict[str, AccuracyCurve] = {}
    with one_thread(), ExitStack() as stack:
        # All stores are open at the same time, since closing the last one shuts Ray down.
        stores = [
            stack.enter_context(
                create(
                    settings.store,
                    num_servers=servers,
                    mode=consistency.mode,
                    staleness=consistency.staleness,
                    name=f"tensorkv-demo-{index}",
                )
            )
            for index, consistency in enumerate(chosen)
        ]
        bar = stack.enter_context(_bar(quiet or not leads))
        for consistency, kv in zip(chosen, stores, strict=True):
            steps = settings.epochs * -(-len(digits.labels) // settings.batch_size)
            total = steps if consistency.mode == "sync" else steps * kv.num_workers
            task = bar.add_task(f"{consistency.name:>12}", total=total, news="")
            curves[consistency.name] = train(
                digits, settings, kv, averages=consistency.mode == "sync", progress=_progress_of(bar, task)
            )
        workers = stores[0].num_workers
    if not leads:
        return 1.0
    save(figure(curves, settings, workers, servers), out)
    if not quiet:
        print(
            f"{len(digits.labels)} training images, {len(digits.test_labels)} test images, {settings.epochs} epochs, "
            f"{settings.optimizer} on {servers} server{'' if servers == 1 else 's'}; {workers} workers, "
            f"the last sleeps {1000 * SLEEP_S:.0f} ms in every step"
        )
        for name, curve in curves.items():
            reached = curve.seconds_to(_GOAL)
            when = "never" if reached is None else f"after {reached:.1f} s"
            print(
                f"{name}: test accuracy {curve.accuracies[-1]:.4f} after {curve.seconds[-1]:.1f} s, {_GOAL:.0%} {when}"
            )
    print(f"accuracy against time: {out}")
    return curves[chosen[-1].name].accuracies[-1]


def figure(curves: Mapping[str, AccuracyCurve], settings: Settings, workers: int, servers: int) -> Any:
    """Return a matplotlib figure of accuracy against seconds, with a line for each mode."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 5), layout="constrained")
    axes = drawn.subplots()
    for (name, curve), colour in zip(curves.items(), _COLOURS, strict=False):
        axes.plot(curve.seconds, curve.accuracies, color=colour, linewidth=2, label=name)
    # The modes differ in the first second.
    axes.set_xscale("log")
    axes.set_xlabel("seconds (log scale)")
    axes.set_ylabel("share of test images classified correctly")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    axes.set_title(
        f"Handwritten digits, {settings.optimizer} on {servers} server{'' if servers == 1 else 's'}: "
        f"{workers} workers, one slowed by {1000 * SLEEP_S:.0f} ms a step"
    )
    return drawn


def _bar(disable: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("updates"))
    rest = (TimeElapsedColumn(), TextColumn("{task.fields[news]}"))
    return Progress(*columns, *rest, console=Console(stderr=True), disable=disable)


def _progress_of(bar: Progress, task: TaskID) -> Any:
    def show(updates: int, share: float) -> None:
        bar.update(task, completed=updates, news=f"accuracy {share:.3f}")

    return show
