"""Listings: keys and their metadata as replies have them, which say once what many keys have in common."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tensorkv.arrays.arguments import Key


def listed(keys: Sequence[Key], metadata: Sequence[Any]) -> dict[str, Any]:
    """Return the metadata of keys, as ``messages.Init`` has them."""
    kinds: list[Any] = []
    known: dict[Any, int] = {}
    indices = []
    for data in metadata:
        names = (data["dtype"], data["library"], data["device"], data["table"], json.dumps(data.get("init")))
        kind = (*names, tuple(data["shape"]), tuple(map(tuple, data["pieces"])))
        index = known.setdefault(kind, len(kinds))
        if index == len(kinds):
            kinds.append({name: each for name, each in data.items() if name != "order"})
        indices.append(index)
    return {"kinds": kinds, "keys": list(keys), "indices": indices, "orders": [data["order"] for data in metadata]}
