"""Training over a slow link: a Trainer whose store compresses, and DDP with PyTorch's own communication hooks."""

from __future__ import annotations

from typing import Any, ClassVar

from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from benchmarks.compression.works import LinkTraining
from benchmarks.sync import training


class Trained(training.Trained):
    """One rank of a training with a Trainer over a store with a codec."""

    WORK = LinkTraining

    def open(self, port: int, **options: Any) -> None:
        super().open(port)
        if options:
            self._kv.set_gradient_compression(options["params"])


class DDP(training.DDP):
    """One rank of a training with DistributedDataParallel."""

    WORK = LinkTraining

    def open(self, port: int, **options: Any) -> None:
        super().open(port)


class Fp16DDP(DDP):
    """With torch's hook that sends float16."""

    def open(self, port: int, **options: Any) -> None:
        super().open(port)
        model: Any = self._model
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)


class PowerSGDDDP(DDP):
    """With torch's hook for PowerSGD, of our rank, as soon as it allows.

    It exchanges several times for each bucket. Gloo aborts where buckets overtake each other, so there is only one.
    """

    DDP_OPTIONS: ClassVar[dict[str, Any]] = {"bucket_cap_mb": 1000}

    def open(self, port: int, **options: Any) -> None:
        super().open(port)
        model: Any = self._model
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
