"""Counts what a step would ask of a GPU, without one: on the meta device, where tensors have shapes and no memory.

Counted are kernels, as many as PyTorch launches on CUDA for an operation that is done in one pass (a reduction or a
sort may take a second one), and the times that the host waits for the device. Views and allocations launch nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

__all__ = ["Launches"]

_FREE: Final = frozenset(
    (
        *("alias", "as_strided", "chunk", "detach", "diagonal", "expand", "lift_fresh", "narrow", "permute", "select"),
        *("slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze"),
        *("view", "_unsafe_view", "view_as_real", "empty", "empty_like", "empty_strided", "new_empty", "resize_"),
    )
)
"""Operations that only make another view, or ask for memory."""

# ATen/native/cuda/ForeachUtils and MultiTensorApply.cuh: a launch takes so many lists of so many tensors, in pieces.
_TENSORS_OF_A_LAUNCH: Final = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_PIECE_ELEMENTS: Final = 65536
_PIECES_OF_A_LAUNCH: Final = 320


class Launches(TorchDispatchMode):
    """While it is open, what reaches tensors of ``device`` is counted.

    What a script reads from them is invented: numbers and tensors that come to the host hold ``reads``.

    Args:
        device: a type of device, ``"meta"``, or that of tensors that hold something.
        reads: what is read from tensors without memory.

    Attributes:
        kernels: launches, by the name of the operation.
        waits: how often the host waited, by what it asked for.
    """

    def __init__(self, device: str = "meta", *, reads: float = 1.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._reads = reads
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """Launches, of all kinds together."""
        return self.kernels.total()

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func).removeprefix("aten.").split(".")[0]
        inputs = self._there((args, kwargs))
        if inputs and name == "_local_scalar_dense":
            self.waits[name] += 1
            return self._number(inputs[0]) if inputs[0].is_meta else func(*args, **kwargs)
        if inputs and name in ("_to_copy", "copy_") and self._comes_here(name, args, kwargs):
            self.waits[name] += 1
            if name == "_to_copy" and inputs[0].is_meta:
                dtype = kwargs.get("dtype") or inputs[0].dtype
                return torch.full(inputs[0].shape, self._reads, dtype=dtype, device="cpu")
        out = func(*args, **kwargs)
        if name in _FREE or not (inputs or self._there(out)):
            return out
        if name.startswith("_foreach_"):
            self.kernels[name] += _of_lists(name, args)
        elif any(tensor.numel() for tensor in (*inputs, *self._there(out))):
            self.kernels[name] += 1
        return out

    def _there(self, values: Any) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.device.type == self._device]

    def _comes_here(self, name: str, args: Any, kwargs: Any) -> bool:
        if name == "copy_":
            return args[0].device.type == "cpu" and self._device != "cpu"
        device = kwargs.get("device")
        return device is not None and torch.device(device).type == "cpu" and self._device != "cpu"

    def _number(self, tensor: Tensor) -> float | int | bool:
        if tensor.dtype == torch.bool:
            return bool(self._reads)
        return float(self._reads) if tensor.dtype.is_floating_point else int(self._reads)


def _of_lists(name: str, args: Iterable[Any]) -> int:
    """Launches of one operation on lists of tensors."""
    lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor)]
    rows = [row for row in zip(*lists, strict=True) if row[0].numel()]
    alike = all(
        tensor.dtype == lists[0][0].dtype and tensor.stride() == row[0].stride() and _is_dense(tensor)
        for row in rows
        for tensor in row
    )
    if not alike:  # one by one, then
        return len(rows)
    in_place = name.endswith("_")
    tensors = _TENSORS_OF_A_LAUNCH[len(lists) + (not in_place and name != "_foreach_norm")]
    launches = filled = pieces = 0
    for row in rows:
        filled += 1
        for _ in range(-(-row[0].numel() // _PIECE_ELEMENTS)):
            pieces += 1
            if pieces == _PIECES_OF_A_LAUNCH:
                launches, filled, pieces = launches + 1, 1, 0
        if filled == tensors and pieces:
            launches, filled, pieces = launches + 1, 0, 0
    return launches + bool(pieces) + (name == "_foreach_norm")  # which adds up its pieces in another one


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
