"""The compiled parts touch no memory that is not theirs, and do nothing that C leaves undefined."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tensorkv.compiled.sources import PARTS, checksum

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    "arrays/test_rowinit.py",
    "compression/test_codecs.py",
    "compression/test_compressor.py",
    "shard/test_fused.py",
    "shard/test_index.py",
    "shard/test_native.py",
    "shard/test_compiled_path.py",
    "runtime/test_shield.py",
)


@pytest.mark.release
def test_the_tests_of_compiled_parts_pass_under_sanitizers(tmp_path):
    for folder in ("src", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    compiled = tmp_path / "src" / "tensorkv" / "compiled"
    flags = ["-shared", "-fPIC", "-O1", "-g", "-std=c11", "-D_GNU_SOURCE", "-ffp-contract=off", "-fno-math-errno"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{sysconfig.get_paths()['include']}"]
    for part in PARTS:
        define = f'-DSOURCES="{checksum(part)}"'
        command = ["gcc", *flags, define, compiled / f"{part}.c", "-o", compiled / f"{part}.abi3.so"]
        subprocess.run(command, check=True)
    libraries = [
        subprocess.run(["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        # The interpreter itself leaves memory to the end of the process.
        "ASAN_OPTIONS": "detect_leaks=0",
        # Else the sanitizer sees the pools of the interpreter, and not what is in them.
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": f"{tmp_path / 'src'}:{tmp_path}",
        "TENSORKV_TESTS": "few",
    }
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in TESTS)]
    ended = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[:4000]
