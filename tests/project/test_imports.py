"""Neither `import tensorkv` nor an optimizer imports anything heavy."""

import subprocess
import sys

HEAVY = {"ray", "jax", "cupy", "matplotlib", "sklearn", "torch._dynamo", "sympy"}


def test_importing_tensorkv_and_stepping_every_optimizer_bring_nothing_heavy():
    code = f"""
import sys
import torch
import tensorkv
from tensorkv.shard.optimizers import CLASSES

for name in CLASSES:
    with tensorkv.create() as kv:
        kv.set_optimizer(name, lr=0.1)
        for dtype in (torch.float32, torch.bfloat16):
            kv.init(str(dtype), torch.zeros(2, 2, dtype=dtype))
            kv.push(str(dtype), torch.ones(2, 2, dtype=dtype))
print(sorted({HEAVY} & set(sys.modules)))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"
