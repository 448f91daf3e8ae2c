"""`import tensorkv` imports nothing heavy."""

import subprocess
import sys

HEAVY = {"ray", "jax", "cupy", "matplotlib", "sklearn"}


def test_importing_tensorkv_brings_nothing_heavy():
    code = f"import sys, tensorkv; print(sorted({HEAVY} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout == "[]\n"
