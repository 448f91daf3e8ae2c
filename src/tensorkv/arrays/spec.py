"""KeySpec: what callers need to know of a key to make an array for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import interop


@dataclass(frozen=True, slots=True)
class KeySpec:
    """What callers need to know of a key to make an array for it."""

    shape: torch.Size
    dtype: torch.dtype
    origin: interop.Origin
    is_table: bool
