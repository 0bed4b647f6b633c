"""Code that LLVM makes for a processor that is not this one, run here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import llvmlite.binding
import pytest

ROOT = Path(__file__).parents[2]
NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi2")
# Compiled once, then read from the cache: both are code of their own.
FEW_ROWS = """
from apr.backends.cpu import kernels, start
from guard_pages import few

found = [pair for pair in kernels._kernels + kernels.low if pair[0].py_func.__name__.startswith("linear_few")]
start._stamp(found)
for kernel, signature in found:
    kernel.compile(signature)
few()
print(len(found), "kernels")
"""


@pytest.mark.skipif(
    not all(llvmlite.binding.get_host_cpu_features().get(name) for name in NEEDED),
    reason="this processor has not the instructions of the other one",
)
def test_few_rows_on_emeraldrapids(tmp_path: Path) -> None:
    """One row, one term and a bias: LLVM once left out the check of the number of rows, and the loop ran on."""
    env = os.environ | {
        "APR_COMPILES_KERNELS": "none 0 1",  # no other kernel is compiled
        "NUMBA_CPU_NAME": "emeraldrapids",
        "NUMBA_CACHE_DIR": str(tmp_path),
        "NUMBA_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", FEW_ROWS], env=env, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "3 kernels\n"), done.stderr
