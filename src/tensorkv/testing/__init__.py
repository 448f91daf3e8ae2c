"""The contract of stores as a pytest suite: subclass ``Contract`` to show that an engine of your own keeps it."""

import pytest

# Before the modules with the tests: a failed assert then shows its values.
_TOPICS = (
    "arguments",
    "arrays",
    "averages",
    "life",
    "reads",
    "regions",
    "releases",
    "slices",
    "trees",
    "updaters",
    "writes",
)
pytest.register_assert_rewrite(*(f"{__name__}.{topic}" for topic in _TOPICS))

# isort: split
from .contract import BaseContract, Contract  # noqa: E402

__all__ = ["BaseContract", "Contract"]
