"""How the words of compressed gradients lie over servers."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch

from tensorkv.compression import Codec, PlainGradients, Source, words_layout

from ..messages import words_text
from .layout import Layout


class ServerWords(NamedTuple):
    """The words that one server gets of a call.

    Args:
        server: its index.
        indices: the places in the call of the keys of which it holds a piece.
        layout: of the payload, as ``words_item`` makes it of each.
        place: in all words of the call.
    """

    server: int
    indices: Any
    layout: bytes
    place: slice


class CodedLayout:
    """How the words of a list of keys are divided over servers: those of one server lie side by side.

    Args:
        layout: of the keys.
        codec: of the words.
    """

    def __init__(self, layout: Layout, codec: Codec) -> None:
        self.sources: list[Source] = []
        """Of each piece, its key and its server."""
        shapes: list[tuple[int, ...]] = []
        places: list[int] = []
        firsts: list[int] = []
        counts = []
        for pushed in layout.pushed:
            indices = pushed.indices.tolist()
            for index in indices:
                placement = layout.placements[index]
                start, stop = placement.piece_of(pushed.server) or (0, 0)
                self.sources.append((layout.keys[index], pushed.server))
                shapes.append(tuple(placement.shape(start, stop)))
                firsts.append(start * prod(placement.spec.shape[1:]))
            places += indices
            counts.append(len(indices))
        self.words = words_layout(codec, tuple(shapes))
        self.gradients = PlainGradients(
            self.words,
            places,
            firsts,
            is_float32=all(each.spec.dtype is torch.float32 for each in set(layout.placements)),
        )
        self.servers: list[ServerWords] = []
        begin = 0
        for pushed, count in zip(layout.pushed, counts, strict=True):
            own = self.words.places[begin : begin + count]
            described = words_text([key for key, _ in self.sources[begin : begin + count]], own)
            where = slice(own[0].start, own[-1].stop)
            self.servers.append(ServerWords(pushed.server, pushed.indices, described, where))
            begin += count
