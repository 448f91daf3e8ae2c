"""Use what torch has no public interface for; another version may change it. tests/runtime/test_compat.py names each.

The operators of torch.optim, ``torch._foreach_…`` and ``torch._fused_…``, are called where they are needed.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch.utils import _python_dispatch

# Counts the modes, such as FakeTensorMode, that are enabled in this thread.
num_dispatch_modes = torch._C._len_torch_dispatch_stack
# Raises the versions of tensors, as torch.autograd.graph.increment_version does, in one call of C.
increment_version = torch._C._increment_version
# Returns a block without them.
without_dispatch_modes = _python_dispatch._disable_current_modes
# Returns whether a tensor stands for others inside of a function that torch.func or torch.vmap transforms.
is_inside_transform = torch._C._functorch.is_functorch_wrapped_tensor
# Methods by which optimizers ask whether a graph is being captured, in newer and older versions: it initializes CUDA.
GRAPH_CHECKS = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")


def default_rendezvous_store() -> Any:
    """Return the store in which the processes of torch.distributed's default group have met."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def gloo_group(store: Any, rank: int, size: int, device: Any, timeout_s: float) -> Any:
    """Return a Gloo process group that is not registered with torch.distributed.

    Args:
        store: in which the processes meet.
        rank, size: of the group.
        device: as ``ProcessGroupGloo.create_device`` returns it.
        timeout_s: of each operation.
    """
    from torch.distributed import ProcessGroupGloo

    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=timeout_s)
    options._devices = [device]
    return ProcessGroupGloo(store, rank, size, options)
