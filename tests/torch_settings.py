"""Settings of torch that others may have made around what is tested, each for the time of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["default_device", "default_dtype", "matmul_precision"]


@contextmanager
def default_device(name: str) -> Iterator[None]:
    """New tensors are on the device ``name``; afterwards they are where they were at the start of the process."""
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)
        # PyTorch 2.5.0 fails from here on where it is asked for the device (get_default_device), as torchmetrics does.
        local: Any = torch._GLOBAL_DEVICE_CONTEXT
        if getattr(local, "device_context", local) is None:
            del local.device_context


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors are of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Products in float32 have this precision, and it is left as it is."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        found = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(before)
        assert found == name, "another value was put in its place"
