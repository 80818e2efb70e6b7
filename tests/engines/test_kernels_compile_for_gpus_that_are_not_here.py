"""The Triton kernels compile for the GPUs that people train on, and fit into their registers and fast memory.

What the compiler said about the present kernels is written down beside these tests, and some of it is compiled again
to see whether that holds. Other kernels are compiled once, and what was found lies in pytest's cache.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any, Final

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install 'distro-optim[gpu]'"
    ),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1",
        reason="the interpreter compiles nothing: unset TRITON_INTERPRET",
    ),
]

TARGETS: Final = ("sm_80", "sm_89", "sm_90", "gfx942")

EXTRACTIONS: Final = {
    "as Psyche's runs, k=8": (torch.float32, 8, {"own": True, "as_coefficients": False, "signs": True}),
    "values of bfloat16, k=64": (torch.bfloat16, 64, {"own": True, "as_coefficients": False, "signs": False}),
    "as DeMo, k=32": (torch.float32, 32, {"own": False, "as_coefficients": True, "signs": False}),
    "without overlap, ragged, k=8": (torch.float32, 8, {"own": False, "as_coefficients": False, "signs": True}),
}

MERGES: Final = {
    "signs, k=8, ahead": (torch.float32, 8, torch.bool, True),
    "values of bfloat16, k=32": (torch.bfloat16, 32, torch.bfloat16, False),
}


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest) -> Path:
    """Where to remember what was compiled before."""
    assert request.config.cache is not None, "pytest runs without its cache: leave -p no:cacheprovider out"
    return request.config.cache.mkdir("kernels")


def needs_of(target: str, kind: str, cache: Path | None) -> Any:
    """Of a kernel with the settings of this name."""
    from distro_optim.compress.engine.triton.launching import Extracting, Merging
    from engines import ahead_of_time

    if kind in EXTRACTIONS:
        dtype, k, settings = EXTRACTIONS[kind]
        how = Extracting(**settings, grad=dtype)  # type: ignore[arg-type]
        return ahead_of_time.needs_of_extraction(target, ahead_of_time.batch_of(dtype, k), how, cache)
    dtype, k, value, ahead = MERGES[kind]
    return ahead_of_time.needs_of_merge(target, ahead_of_time.batch_of(dtype, k), Merging(value, ahead), cache)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", [*EXTRACTIONS, *MERGES])
def test_a_kernel_stays_in_registers_and_leaves_room_for_another(target: str, kind: str, cache: Path) -> None:
    from engines import ahead_of_time

    needs = needs_of(target, kind, cache)
    assert needs.spilled == 0
    assert needs.shared <= ahead_of_time.SHARED_OF_TWO_BLOCKS[target]


@pytest.mark.parametrize(
    ("target", "kind"), [("sm_90", "as Psyche's runs, k=8"), ("gfx942", "signs, k=8, ahead")], ids=["NVIDIA", "AMD"]
)
def test_what_is_written_down_is_what_the_compiler_says(target: str, kind: str, cache: Path) -> None:
    assert needs_of(target, kind, None) == needs_of(target, kind, cache)
