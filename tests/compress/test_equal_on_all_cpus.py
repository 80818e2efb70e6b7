"""Processes that compute as different processors do take the same steps, bit for bit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from .exact_cases import LARGE, SMALL

pytestmark = [pytest.mark.waiting, pytest.mark.slow]

ROOT = Path(__file__).parents[2]

# Kernels of OpenBLAS, which numpy brings, of MKL and of PyTorch; threads; the order of contributors.
MACHINES = [
    ("Prescott", "COMPATIBLE", "default", "1", "forwards"),
    ("Nehalem", "AUTO,STRICT", "default", "2", "backwards"),
    ("Sandybridge", "AVX", "avx2", "1", "backwards"),
    ("Haswell", "AVX2", "avx2", "2", "forwards"),
]


def test_one_hash_for_each_step_on_every_machine() -> None:
    # All at the same time: each has one core's work.
    processes = []
    for blas, mkl, capability, threads, order in MACHINES:
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}",
            "OPENBLAS_CORETYPE": blas,
            "MKL_CBWR": mkl,
            "ATEN_CPU_CAPABILITY": capability,
            "OMP_NUM_THREADS": threads,
        }
        command = [sys.executable, "-m", "compress.exact_process", threads, order]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    results = [json.loads(output) for output in outputs]
    for number, case in enumerate((*SMALL, *LARGE)):
        assert len({result["hashes"][number] for result in results}) == 1, case
    if platform.machine() in ("x86_64", "AMD64"):
        assert len({result["kernel"] for result in results}) > 1, "the environment had no effect"
        assert len({result["capability"] for result in results}) > 1, "the environment had no effect"
