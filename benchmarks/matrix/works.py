"""Cells: one form of a call with one array library, rule and size, on one engine.

Needs NumPy alone, so that the process of a peer with an old NumPy can import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.common.work import RULES, Rule, Work

Engine = Literal["local", "dist_sync", "dist_async"]
Arrays = Literal["numpy", "torch", "mixed", "jax"]
Form = Literal["single", "list", "nested", "mapping", "no out", "several outs"]

ENGINES: tuple[Engine, ...] = ("local", "dist_sync", "dist_async")
ARRAYS: tuple[Arrays, ...] = ("numpy", "torch", "mixed", "jax")
FORMS: tuple[Form, ...] = ("single", "list", "nested", "mapping", "no out", "several outs")
# How many processes push, each one part of each key or two.
PUSHERS: dict[Engine, int] = {"local": 1, "dist_sync": 2, "dist_async": 1}


def _resnet50() -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []

    def convolution(to: int, of: int, size: int) -> None:
        shapes.extend([(to, of, size, size), (to,), (to,)])

    convolution(64, 3, 7)
    channels = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            convolution(width, channels, 1)
            convolution(width, width, 3)
            convolution(4 * width, width, 1)
            if block == 0:
                convolution(4 * width, channels, 1)
            channels = 4 * width
    return [*shapes, (1000, channels), (1000,)]


def _gpt2() -> list[tuple[int, ...]]:
    width = 768
    layers = {"attention": 3 * width, "projection": width, "wide": 4 * width}
    block: list[tuple[int, ...]] = [(width,), (width,)]
    block += [(width, layers["attention"]), (layers["attention"],), (width, width), (width,), (width,), (width,)]
    block += [(width, layers["wide"]), (layers["wide"],), (layers["wide"], width), (width,)]
    return [(50_257, width), (1024, width), *12 * block, (width,), (width,)]


# The shapes of each size, and how many calls are timed together as one repetition, in one process and in several.
SIZES: dict[str, tuple[Sequence[tuple[int, ...]], int, int]] = {
    "2×3": ([(2, 3)], 1000, 100),
    "1000 × 1000": ([(1000,)] * 1000, 10, 10),
    "20,000 × 100": ([(100,)] * 20_000, 1, 1),
    "160 × 160k": ([(160_000,)] * 160, 1, 1),
    "1 × 25M": ([(25_000_000,)], 1, 1),
    "ResNet-50": (_resnet50(), 1, 1),
    "GPT-2 small": (_gpt2(), 1, 1),
}
QUICK_SIZES: dict[str, tuple[Sequence[tuple[int, ...]], int, int]] = {
    "tiny": ([(2, 3)], 2, 2),
    "5 odd shapes": ([(100,), (3, 50), (1,), (7, 2, 5), (200,)], 1, 1),
}


@dataclass(frozen=True)
class Cell(Work):
    """A form of a call with all keys of a size.

    Args:
        engine: the type of the store.
        size: of ``SIZES`` or ``QUICK_SIZES``.
        arrays: of parts and outs.
        form: ``single``: a call for each key. ``list``: a part and an out for each key. ``nested``: two parts for
            each. ``mapping``: parts and outs by key. ``no out``: new arrays are returned. ``several outs``: two for
            each key.
    """

    engine: Engine = "local"
    size: str = ""
    arrays: Arrays = "numpy"
    form: Form = "list"

    @property
    def name(self) -> str:
        """What tables and ``--only`` call it.

        >>> cell("local", "2×3", "torch", "mapping", "adamw").name
        'local: 2×3, torch, mapping, AdamW'
        """
        return f"{self.engine}: {self.size}, {self.arrays}, {self.form}, {RULES[self.rule][0]}"

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        return (SIZES | QUICK_SIZES)[self.size][0]

    @property
    def outs(self) -> int:
        """How many results of each key are written."""
        return 2 if self.form == "several outs" else 1

    @property
    def moved_nbytes(self) -> int:
        return super().moved_nbytes + (self.outs - 1) * self.value_nbytes

    def own_parts(self, rank: int) -> range:
        """Return which parts of each key a process pushes."""
        own = self.parts // PUSHERS[self.engine]
        return range(rank * own, (rank + 1) * own)


def cell(engine: Engine, size: str, arrays: Arrays, form: Form, rule: Rule) -> Cell:
    """Return a cell.

    >>> resnet, gpt = (cell("local", size, "numpy", "list", "sgd") for size in ("ResNet-50", "GPT-2 small"))
    >>> resnet.keys, resnet.value_nbytes // 4, gpt.keys, gpt.value_nbytes // 4
    (161, 25557032, 148, 124439808)
    """
    shapes, alone, together = (SIZES | QUICK_SIZES)[size]
    # A call for each of many keys takes long enough.
    calls = 1 if form == "single" and len(shapes) > 1 else alone if engine == "local" else together
    parts = PUSHERS[engine] * (2 if form == "nested" else 1)
    return Cell(len(shapes), (), parts, rule, calls, warm_up=2, engine=engine, size=size, arrays=arrays, form=form)


def cells(engines: Sequence[Engine], *, quick: bool) -> list[Cell]:
    """Return the cells of the matrix."""
    return [
        cell(engine, size, arrays, form, rule)
        for engine in engines
        for size in (QUICK_SIZES if quick else SIZES)
        for rule in RULES
        for arrays in ARRAYS
        for form in FORMS
    ]
