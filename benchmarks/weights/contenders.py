"""Contenders that publish weights: what the publisher does, and what each reader does.

Rank 0 publishes, the others follow. A library is imported only by the contender that uses it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, ClassVar

import numpy as np

from benchmarks.common import redis_client
from benchmarks.common.process import forget_peak, peak_nbytes, resident_nbytes
from benchmarks.common.work import Verb
from benchmarks.weights.works import Publishing

NAMES = {
    "pull": "tensorkv, pull",
    "changes": "tensorkv, changes",
    "torch": "torch.save, /dev/shm",
    "safetensors": "safetensors, /dev/shm",
    "ray": "ray.put, ray.get",
    "redis": "Redis",
    "copy": "a plain copy",
}
_TIMEOUT_S = 60
# How often a reader looks for a new file, and how many versions there are at a time.
_POLL_S = 0.001
_KEEP = 2


class Member:
    """One process of a contender.

    Args:
        work: what is published.
        rank: 0 for the publisher.
    """

    WORK: ClassVar[type[Any]] = Publishing

    def __init__(self, work: Publishing, rank: int) -> None:
        self.work, self.rank = work, rank
        self.names = [f"layer-{number}" for number in range(work.keys)]
        self.values: list[Any] = work.first()
        self.version = 0
        self._stamps: list[list[float]] = []

    @staticmethod
    def start() -> dict[str, str]:
        """Import the library; return versions."""
        return {}

    def open(self, port: int, **options: Any) -> None:
        """Publish the first version, or open what has it; memory counts from here on.

        Args:
            port: a number that no other work has.
            **options: of the team.
        """
        forget_peak()
        self._before = resident_nbytes()
        if self.rank == 0:
            self.serve(port, **options)
        else:
            self.join(port, **options)

    def prepare(self, verb: Verb, calls: int) -> None:
        """Make the next version."""
        if self.rank == 0:
            self.work.change(self.values, self.version + 1)

    def time(self, verb: Verb, calls: int = 1) -> float:
        """Publish a version, or wait for one and take it over."""
        start = perf_counter()
        self.version += 1
        if self.rank == 0:
            self.push()
            pushed = perf_counter()
            self.publish()
            self._stamps.append([start, pushed, perf_counter()])
        else:
            self.wait()
            seen = perf_counter()
            self.fetch()
            fetched = perf_counter()
            self.load()
            self._stamps.append([seen, fetched, perf_counter()])
            self.let_go()
        return perf_counter() - start

    def renew(self) -> None:
        """Forget times."""
        self._stamps.clear()

    def check(self) -> None:
        """Raise ``WrongResultError`` unless the values are those of the version."""
        self.work.check(self.values, self.version)

    def found(self) -> dict[str, Any]:
        """Return times of each version on the clock that processes share, and bytes.

        Times are: of the publisher when it has begun, pushed and published, of a reader when it has seen a version,
        fetched what it can fetch before it pauses, and taken the version over.
        """
        return {
            "stamps_s": self._stamps,
            "received_nbytes": self.received_nbytes(),
            "peak_nbytes": peak_nbytes() - self._before,
            "kept_nbytes": self.kept_nbytes() if self.rank == 0 else 0,
        }

    # ------------------------------------------------------------ to be implemented

    def serve(self, port: int, **options: Any) -> None:
        """Publish the first version."""
        raise NotImplementedError

    def join(self, port: int, **options: Any) -> None:
        """Open what has the first version."""
        raise NotImplementedError

    def push(self) -> None:
        """Hand the values over, where that is not part of publishing."""

    def publish(self) -> None:
        """Let readers see the version."""
        raise NotImplementedError

    def wait(self) -> None:
        """Return when there is the version."""
        raise NotImplementedError

    def fetch(self) -> None:
        """Fetch of the version what leaves the values as they are."""

    def load(self) -> None:
        """Make the values those of the version."""
        raise NotImplementedError

    def let_go(self) -> None:
        """Release what the version is no longer needed for."""

    def received_nbytes(self) -> int:
        """Return the bytes of the last version that have come to a reader."""
        return self.work.value_nbytes

    def kept_nbytes(self) -> int:
        """Return the bytes that are in memory outside of the publisher and the readers."""
        raise NotImplementedError

    def close(self) -> None:
        """Release everything."""


class Pulling(Member):
    """The store of this project; readers pull every value of a release."""

    @staticmethod
    def start() -> dict[str, str]:
        import ray

        import tensorkv  # noqa: F401 - takes a while, and is not to be measured

        return {"ray": ray.__version__}

    def serve(self, port: int, **options: Any) -> None:
        self._create(port)
        self._kv.init(self.names, self.values)
        self._kv.publish("0")

    def join(self, port: int, **options: Any) -> None:
        self._create(port)
        self._release = self._kv.wait_release(timeout_s=_TIMEOUT_S)

    def _create(self, port: int) -> None:
        import tensorkv

        self._kv = tensorkv.create(
            "dist_async", name=f"bench{port}", num_servers=1, num_workers=1, timeout_s=_TIMEOUT_S
        )

    def push(self) -> None:
        self._kv.push(self.names, self.values)

    def publish(self) -> None:
        self._kv.publish(str(self.version), keep=_KEEP)

    def wait(self) -> None:
        before = self._release
        self._release = self._kv.wait_release(after=before.name, timeout_s=_TIMEOUT_S)
        before.close()

    def load(self) -> None:
        self._release.pull(self.names, out=self.values)

    def kept_nbytes(self) -> int:
        return resident_nbytes(self._kv.stats()["servers"][0]["pid"])

    def close(self) -> None:
        self._kv.close()


class Changes(Pulling):
    """The store of this project; readers fetch what has changed before they pause, and apply it."""

    def join(self, port: int, **options: Any) -> None:
        super().join(port, **options)
        self._weights = dict(zip(self.names, self.values, strict=True))
        self._digest = self._release.digest

    def wait(self) -> None:
        self._held = self._release
        self._release = self._kv.wait_release(after=self._held.name, timeout_s=_TIMEOUT_S)

    def fetch(self) -> None:
        self._changes = self._release.changes(since=self._held)

    def load(self) -> None:
        import tensorkv

        tensorkv.apply_changes(self._weights, self._changes, base=self._digest)
        self._digest = self._changes.digest

    def let_go(self) -> None:
        self._held.close()

    def received_nbytes(self) -> int:
        return self._changes.nbytes if self.rank else 0


class _Files(Member):
    """A file for each version in memory, and a link to the newest, which readers look at again and again."""

    def serve(self, port: int, **options: Any) -> None:
        self._find_folder(port)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        self.publish()

    def join(self, port: int, **options: Any) -> None:
        self._find_folder(port)
        self.wait()

    def _find_folder(self, port: int) -> None:
        shared = Path("/dev/shm")  # noqa: S108 - files in memory are what is measured
        self._folder = (shared if shared.is_dir() else Path(tempfile.gettempdir())) / f"bench-weights-{port}"

    def publish(self) -> None:
        path = self._folder / str(self.version)
        self.save(path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
        link = self._folder / "link"
        link.symlink_to(path.name)
        os.replace(link, self._folder / "newest")
        with suppress(FileNotFoundError):
            (self._folder / str(self.version - _KEEP)).unlink()

    def wait(self) -> None:
        until = perf_counter() + _TIMEOUT_S
        while perf_counter() < until:
            with suppress(FileNotFoundError):
                if os.readlink(self._folder / "newest") == str(self.version):
                    return
            sleep(_POLL_S)
        raise TimeoutError(f"there is no version {self.version}")

    def load(self) -> None:
        self.read(self._folder / str(self.version))

    def save(self, path: Path) -> None:
        """Write the values."""
        raise NotImplementedError

    def read(self, path: Path) -> None:
        """Take the values over."""
        raise NotImplementedError

    def kept_nbytes(self) -> int:
        return sum(path.stat().st_size for path in self._folder.iterdir() if not path.is_symlink())

    def close(self) -> None:
        if self.rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)


class TorchFiles(_Files):
    """``torch.save``, and ``torch.load`` of a file that is mapped into memory."""

    def __init__(self, work: Publishing, rank: int) -> None:
        super().__init__(work, rank)
        import torch

        self._torch = torch
        self._tensors = {name: torch.from_numpy(v) for name, v in zip(self.names, self.values, strict=True)}

    @staticmethod
    def start() -> dict[str, str]:
        import torch  # noqa: F401 - takes a while, and is not to be measured

        return {}

    def save(self, path: Path) -> None:
        self._torch.save(self._tensors, path)

    def read(self, path: Path) -> None:
        for name, value in self._torch.load(path, mmap=True, weights_only=True).items():
            self._tensors[name].copy_(value)


class Safetensors(TorchFiles):
    """``safetensors.torch.save_file``, and ``safe_open``, which maps a file."""

    @staticmethod
    def start() -> dict[str, str]:
        import safetensors.torch

        return {"safetensors": safetensors.__version__}

    def save(self, path: Path) -> None:
        from safetensors.torch import save_file

        save_file(self._tensors, path)

    def read(self, path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, "pt") as opened:
            for name, tensor in self._tensors.items():
                tensor.copy_(opened.get_tensor(name))


class RayObjects(Member):
    """An object of Ray for each version, and an actor that tells readers of the newest."""

    @staticmethod
    def start() -> dict[str, str]:
        import ray

        ray.init(address=os.environ["RAY_ADDRESS"], namespace="bench", log_to_driver=False)
        return {"ray": ray.__version__}

    def serve(self, port: int, **options: Any) -> None:
        import ray

        self._ray = ray
        self._before_nbytes = ray.available_resources()["object_store_memory"]
        self._actor = ray.remote(_Newest).options(name=f"newest{port}", num_cpus=0).remote()
        self.publish()

    def join(self, port: int, **options: Any) -> None:
        import ray

        self._ray = ray
        until = perf_counter() + _TIMEOUT_S
        while True:
            try:
                self._actor = ray.get_actor(f"newest{port}")
                break
            except ValueError:
                # The publisher has not made it yet.
                if perf_counter() > until:
                    raise
                sleep(0.05)
        self.wait()

    def publish(self) -> None:
        ref = self._ray.put(dict(zip(self.names, self.values, strict=True)))
        # In a list, so that the actor is given the reference and not the object.
        self._ray.get(self._actor.announce.remote(self.version, [ref]))

    def wait(self) -> None:
        [self._ref] = self._ray.get(self._actor.wait_for.remote(self.version), timeout=_TIMEOUT_S)

    def load(self) -> None:
        found = self._ray.get(self._ref)
        for name, value in zip(self.names, self.values, strict=True):
            value[...] = found[name]

    def let_go(self) -> None:
        self._ref = None

    def kept_nbytes(self) -> int:
        return int(self._before_nbytes - self._ray.available_resources()["object_store_memory"])

    def close(self) -> None:
        if self.rank == 0:
            self._ray.kill(self._actor)


class _Newest:
    """Holds the newest versions; methods that wait let others run."""

    def __init__(self) -> None:
        import asyncio

        self._refs: dict[int, Any] = {}
        self._changed = asyncio.Condition()

    async def announce(self, version: int, ref: list[Any]) -> None:
        """Tell of a version."""
        async with self._changed:
            self._refs[version] = ref
            self._refs.pop(version - _KEEP, None)
            self._changed.notify_all()

    async def wait_for(self, version: int) -> list[Any]:
        """Return a version when it is there."""
        async with self._changed:
            await self._changed.wait_for(lambda: version in self._refs)
            return self._refs[version]  # type: ignore[no-any-return]


class Redis(Member):
    """A string of Redis for each value of a version, and a channel that tells of the newest."""

    @staticmethod
    def start() -> dict[str, str]:
        return redis_client.versions()

    def serve(self, port: int, **options: Any) -> None:
        self._redis = redis_client.connect()
        self.push()
        self._redis.set("newest", 0)

    def join(self, port: int, **options: Any) -> None:
        self._redis = redis_client.connect()
        self._channel = self._redis.pubsub(ignore_subscribe_messages=True)
        self._channel.subscribe("versions")
        until = perf_counter() + _TIMEOUT_S
        while self._redis.get("newest") is None or self._channel.subscribed is False:
            if perf_counter() > until:
                raise TimeoutError("there is no first version")
            sleep(0.01)
        # The confirmation of the subscription, after which no message is missed.
        self._channel.get_message(timeout=1)

    def _strings(self, version: int) -> list[str]:
        return [f"{version}/{name}" for name in self.names]

    def push(self) -> None:
        strings = self._strings(self.version)
        self._redis.mset({name: memoryview(v).cast("B") for name, v in zip(strings, self.values, strict=True)})

    def publish(self) -> None:
        self._redis.publish("versions", self.version)
        if self.version >= _KEEP:
            self._redis.unlink(*self._strings(self.version - _KEEP))

    def wait(self) -> None:
        until = perf_counter() + _TIMEOUT_S
        while perf_counter() < until:
            message = self._channel.get_message(timeout=1)
            if message is not None and int(message["data"]) == self.version:
                return
        raise TimeoutError(f"there is no version {self.version}")

    def load(self) -> None:
        for value, found in zip(self.values, self._redis.mget(self._strings(self.version)), strict=True):
            value[...] = np.frombuffer(found, np.float32).reshape(value.shape)

    def kept_nbytes(self) -> int:
        return int(self._redis.info()["used_memory_rss"])

    def close(self) -> None:
        if self.rank == 0:
            self._redis.flushall()
        else:
            self._channel.close()
        self._redis.close()
