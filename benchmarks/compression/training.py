"""Training over a slow link: a Trainer whose store compresses, and DDP with PyTorch's own communication hooks."""

from __future__ import annotations

from typing import Any

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
    """One rank of a training with DistributedDataParallel, perhaps with a hook."""

    WORK = LinkTraining

    def open(self, port: int, **options: Any) -> None:
        super().open(port)
        model: Any = self._model
        if options.get("hook") == "fp16":
            model.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif options.get("hook") == "powersgd":
            # From the first step on that its default allows, and with its default rank of 1 raised to that of ours.
            state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)
            model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
