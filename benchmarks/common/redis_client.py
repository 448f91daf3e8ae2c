"""A client of the Redis server that ``launch.redis`` has started."""

from __future__ import annotations

import os
from time import perf_counter, sleep
from typing import Any

_TIMEOUT_S = 40


def connect() -> Any:
    """Return a client."""
    import redis

    return redis.Redis(unix_socket_path=os.environ["REDIS_SOCKET"])


def versions() -> dict[str, str]:
    """Return versions, as soon as the server answers: it has been started with this process."""
    import redis

    until = perf_counter() + _TIMEOUT_S
    while True:
        try:
            with connect() as client:
                return {"redis": client.info()["redis_version"], "redis-py": redis.__version__}
        except redis.ConnectionError:
            if perf_counter() > until:
                raise
            sleep(0.05)
