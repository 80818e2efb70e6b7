"""The kernels as functions of tensors: what is compiled for a batch, and with which options.

Only here are constants of a batch turned into those of a kernel; ``tests/engines`` compiles the same combinations for
GPUs that are not there.
"""

# mypy: disable-error-code="import-untyped,import-not-found"

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan import Batch
from .checking import check_kernel
from .extracting import extract_kernel
from .merging import merge_kernel
from .shifting import put_back_kernel, shift_kernel
from .tables import encoding_basis, integer_digits, padded_side

__all__ = [
    "RUN",
    "WARPS",
    "Extracting",
    "Merging",
    "check",
    "device_type",
    "extract",
    "extract_constants",
    "interpreted",
    "merge",
    "merge_constants",
    "put_back",
    "shift",
]

WARPS: Final = 8
"""Of a program: with 4 of them the parts of a tile do not fit into the registers of a thread, with 16 there are too few
registers for each."""

RUN: Final = 4096
"""Elements of a program that shifts."""

_CHUNK: Final = 32
"""Entries of an update that are added up at a time: the inner side of the smallest product of 8-bit integers."""

_SHORTEST_SUM: Final = 16
"""Inner side of the smallest product of bfloat16."""

_TYPES: Final[dict[torch.dtype, Any]] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors in main memory: TRITON_INTERPRET=1 before its import."""
    return not isinstance(merge_kernel, triton.JITFunction)


def device_type() -> str:
    """Of tensors that kernels can work on: ``"cuda"``, which ROCm's are called too, or ``"cpu"`` when interpreted."""
    return "cpu" if interpreted() else "cuda"


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _sides(batch: Batch) -> dict[str, Any]:
    return {"H": batch.h, "W": batch.w, "BH": padded_side(batch.h), "BW": padded_side(batch.w)}


@dataclass(frozen=True)
class Extracting:
    """What an extraction is compiled for, beside its batch; see :func:`~.extracting.extract_kernel`."""

    own: bool
    as_coefficients: bool
    signs: bool
    grad: torch.dtype
    precision: str = "split"


def extract_constants(batch: Batch, how: Extracting, *, emulate: bool, aligned: bool) -> dict[str, Any]:
    """The constants of :func:`~.extracting.extract_kernel`."""
    return {
        **_sides(batch),
        "K": batch.k,
        "KP": max(_SHORTEST_SUM, 1 << (batch.k - 1).bit_length()),
        "OWN": how.own,
        "AS_COEFFICIENTS": how.as_coefficients,
        "SIGNS": how.signs,
        "GRAD": _TYPES[how.grad],
        "VALUE": _TYPES[batch.value_dtype],
        "LIMIT": torch.finfo(batch.value_dtype).max,
        "PRECISION": how.precision,
        "EMULATE": emulate,
        "ALIGNED": aligned,
    }


def extract(
    batch: Batch,
    how: Extracting,
    *,
    first: int,
    tiles: int,
    places: Tensor,
    addresses: Tensor,
    aligned: bool,
    present: Tensor,
    index: Tensor,
    value: Tensor,
    left: Tensor,
    spoken: Tensor,
    codes: Tensor,
    numbers: Tensor,
    warps: int = WARPS,
    **options: Any,
) -> None:
    """Takes gradients into the momentum of tiles ``first`` to ``first + tiles``, and the largest coefficients out.

    Args:
        batch, how: what to do.
        places, addresses, ...: see :func:`~.extracting.extract_kernel`.
        value: bool or ``batch.value_dtype``.
        warps, options: for measurements.
    """
    emulate = interpreted()
    whole = how.precision != "split"
    dtype = torch.float32 if emulate or whole else torch.bfloat16
    fh, fw = (encoding_basis(n, batch.device, dtype, whole=whole) for n in (batch.h, batch.w))
    with _on(batch.device):
        extract_kernel[(tiles,)](
            first, places, addresses, present, fh, fw, index, value.view(torch.uint8) if how.signs else value, left,
            spoken, codes, numbers, 1 if whole else 2,
            **extract_constants(batch, how, emulate=emulate, aligned=aligned), num_warps=warps, **options,
        )  # fmt: skip


@dataclass(frozen=True)
class Merging:
    """What a merge is compiled for, beside its batch; see :func:`~.merging.merge_kernel`.

    Attributes:
        value: of the updates: bool for signs.
    """

    value: torch.dtype
    ahead: bool


def merge_constants(batch: Batch, how: Merging, *, emulate: bool, aligned: bool) -> dict[str, Any]:
    """The constants of :func:`~.merging.merge_kernel`."""
    signs = how.value == torch.bool
    return {
        **_sides(batch),
        "K": batch.k,
        "CHUNK": _CHUNK,
        "SIGNS": signs,
        "VALUE": tl.float32 if signs else _TYPES[how.value],
        "PARAM": _TYPES[batch.value_dtype],
        "AHEAD": how.ahead,
        "EMULATE": emulate,
        "ALIGNED": aligned,
    }


def merge(
    batch: Batch,
    how: Merging,
    *,
    first: int,
    tiles: int,
    places: Tensor,
    addresses: Tensor,
    aligned: bool,
    said: Tensor,
    present: Tensor,
    codes: Tensor,
    numbers: Tensor,
    warps: int = WARPS,
    **options: Any,
) -> None:
    """Takes everybody's coefficients into the weights of tiles ``first`` to ``first + tiles``.

    Args:
        batch, how: what to do.
        said: ``(contributors, 2)`` int64.
        present: ``(contributors, tensors)`` int32.
        places, addresses, ...: see :func:`~.merging.merge_kernel`.
        warps, options: for measurements.
    """
    emulate = interpreted()
    bh, bw = (integer_digits(n, batch.device) for n in (batch.h, batch.w))
    contributors, tensors = present.shape
    with _on(batch.device):
        merge_kernel[(tiles,)](
            first, places, addresses, said, present, bh, bw, codes, numbers, contributors * batch.k, tensors,
            **merge_constants(batch, how, emulate=emulate, aligned=aligned), num_warps=warps, **options,
        )  # fmt: skip


def check(
    batch: Batch, grad: torch.dtype, *, places: Tensor, addresses: Tensor, aligned: bool, present: Tensor
) -> None:
    """Takes tensors out of ``present``, ``(tensors,)`` int32, whose gradients are not finite."""
    with _on(batch.device):
        check_kernel[(batch.tiles,)](
            0, places, addresses, present,
            **_sides(batch), GRAD=_TYPES[grad], ALIGNED=aligned, num_warps=WARPS,
        )  # fmt: skip


def shift(tensors: Tensor, runs: Tensor, rates: Tensor, param: torch.dtype, direction: torch.dtype) -> None:
    """The lookahead of all ``tensors``; arguments as for :func:`~.shifting.shift_kernel`, and types of elements."""
    with _on(tensors.device):
        shift_kernel[(len(runs),)](
            tensors, runs, rates,
            SIZE=RUN, PARAM=_TYPES[param], DIRECTION=_TYPES[direction], EMULATE=interpreted(), num_warps=WARPS,
        )  # fmt: skip


def put_back(tensors: Tensor, runs: Tensor, param: torch.dtype) -> None:
    """The true weights of all ``tensors``; arguments as for :func:`~.shifting.put_back_kernel`."""
    with _on(tensors.device):
        put_back_kernel[(len(runs),)](tensors, runs, SIZE=RUN, PARAM=_TYPES[param], num_warps=WARPS)
