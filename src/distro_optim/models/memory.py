"""Does a model fit? Asked before anything is allocated."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from ..compress import compute_dtype
from ..errors import ModelTooLargeError

__all__ = ["available_memory", "check_memory", "share_of", "too_large", "training_memory"]

_GIB: Final = 1 << 30
_MEMINFO: Final = Path("/proc/meminfo")
_CGROUPS: Final = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Limit and use of a container: cgroup v2, then v1 (docs.kernel.org, admin-guide/cgroup-v2 and cgroup-v1/memory)."""


def training_memory(parameters: Iterable[Tensor], *, accumulation: bool = False) -> dict[str, int]:
    """Bytes that training takes beside the activations, by what they are for.

    Args:
        parameters: on the meta device is enough.
        accumulation: whether gradients of micro-batches are added in float32.
    """
    need = {"weights": 0, "gradients": 0, "momentum": 0, "lookahead": 0}
    for tensor in parameters:
        own = tensor.numel() * tensor.element_size()
        need["weights"] += own
        need["gradients"] += own + (tensor.numel() * torch.float32.itemsize if accumulation else 0)
        need["momentum"] += tensor.numel() * compute_dtype(tensor.dtype).itemsize
        need["lookahead"] += own
    return need


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on ``device``; None where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    found = [value for value in (_free_of_machine(), *map(_free_of_group, _CGROUPS)) if value is not None]
    return min(found, default=None)


def check_memory(
    parameters: Iterable[Tensor],
    device: torch.device,
    *,
    buffers: Iterable[Tensor] = (),
    training: bool = True,
    accumulation: bool = False,
    available: Callable[[torch.device], int | None] = available_memory,
) -> None:
    """Raises ModelTooLargeError unless a model with these parameters fits on ``device``.

    What the activations take depends on the batch and comes on top.
    """
    parameters = list(parameters)
    need = training_memory(parameters, accumulation=accumulation)
    if not training:
        need = {"weights": need["weights"]}
    need["weights"] += sum(buffer.numel() * buffer.element_size() for buffer in buffers)
    total, free = sum(need.values()), available(device)
    if free is None or total <= free:
        return
    parts = ", ".join(f"{_in_gib(size)} {name}" for name, size in need.items())
    count = sum(p.numel() for p in parameters) / 1e9
    raise ModelTooLargeError(
        f"the model does not fit: {count:.3g} billion parameters take {_in_gib(total)} GiB ({parts}), and "
        f"{device} has {_in_gib(free)} GiB left: use a device with more memory, or join a run with a smaller model",
        needed=total,
        available=free,
    )


def share_of(parameters: Iterable[Tensor], count: int) -> list[Tensor]:
    """What is on each of ``count`` devices that hold a model together: vectors without memory."""
    return [torch.empty(-(-p.numel() // count), dtype=p.dtype, device="meta") for p in parameters]


def too_large(parameters: Iterable[Tensor], device: torch.device) -> ModelTooLargeError:
    """What to raise where the memory was gone although it had seemed to be there, or was not asked for."""
    needed = sum(p.numel() * p.element_size() for p in parameters)
    return ModelTooLargeError(
        f"the model does not fit: its weights take {_in_gib(needed)} GiB, and {device} ran out of memory while they "
        "were loaded: use a device with more memory, or end what else runs on it",
        needed=needed,
    )


def _in_gib(size: int) -> str:
    return f"{size / _GIB:.3g}"


def _free_of_machine() -> int | None:
    try:
        for line in _MEMINFO.read_text("ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        # No more than all of it: what is free is not told everywhere.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _free_of_group(files: tuple[str, str]) -> int | None:
    try:
        limit, used = (Path(name).read_text("ascii").strip() for name in files)
        return max(0, int(limit) - int(used)) if limit != "max" else None
    except (OSError, ValueError):
        return None
