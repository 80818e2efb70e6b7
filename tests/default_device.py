"""``torch.set_default_device`` for the time of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["default_device"]


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
