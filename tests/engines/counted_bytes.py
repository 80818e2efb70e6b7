"""Bytes that a step by the kernels moves between a GPU and its memory, for each parameter.

Counted in Triton's interpreter, load by load and store by store. Bases are left out: all programs read the same 32 KiB,
which stay in the cache. For ``interpreted.py``, as the last thing that its process does: from then on all is counted.
"""

# mypy: disable-error-code="import-untyped,import-not-found"

from __future__ import annotations

from collections import Counter
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter
from typing_extensions import override

from distro_optim import DisTrO
from distro_optim.compress import OwnPart, ParamSpec, make_plan
from distro_optim.compress.engine import Intake
from distro_optim.compress.engine.triton import launching, tables
from distro_optim.compress.engine.triton.engine import TritonEngine
from distro_optim.compress.merging import Ahead
from distro_optim.optim.rules import PUBLISHED

SHAPE: Final = (64, 64)
"""One whole tile: all of them cost the same."""

CPU: Final = torch.device("cpu")


def counting(moved: Counter[str], cached: list[Tensor]) -> None:
    """From now on ``moved`` counts bytes by "load" and "store"."""
    builder = interpreter.interpreter_builder
    ranges = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in cached]

    def count(kind: str, pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)].astype(np.int64)
        for start, stop in ranges:
            addresses = addresses[(addresses < start) | (addresses >= stop)]
        moved[kind] += size * addresses.size

    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        count("load", ptrs, mask)
        return load(ptrs, mask, *rest, **options)

    def counted_store(ptrs: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        count("store", ptrs, mask)
        return store(ptrs, value, mask, *rest, **options)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store


def step(dtype: torch.dtype, contributors: int) -> dict[str, float]:
    """Bytes for each parameter of the parts of a step with overlap and lookahead, k=8, signs."""
    plan = make_plan([ParamSpec(SHAPE, dtype, CPU, 0, 64, 8)], "padded", arithmetic="exact")
    engine = TritonEngine(plan, "dct")
    grads, weights, shifted = ([torch.randn(SHAPE).to(dtype)] for _ in range(3))
    own = [OwnPart(torch.zeros(1, 8, dtype=torch.int32), torch.zeros(1, 8))]
    intake = Intake(grads, [torch.randn(SHAPE)], [False], [1e-3], [0.999], True, own)
    basis = [tables.encoding_basis(64, CPU, torch.float32, whole=False), tables.integer_digits(64, CPU)]
    moved: Counter[str] = Counter()
    counting(moved, basis)
    answer = {}

    def since(name: str) -> None:
        answer[name] = moved.total() / torch.Size(SHAPE).numel()
        moved.clear()

    usable = engine.usable(grads)
    since("check")
    update = engine.room(quantize=True)
    spoken = engine.extract_into(update, intake, usable)
    since("extract")
    flags = {n: torch.stack([spoken[n]] * contributors) for n in spoken}
    engine.merge_into([update] * contributors, flags, weights, [1e-3], ahead=Ahead(shifted, [1e-3]))
    since("merge")
    return answer


class ByTorch(TorchDispatchMode):
    """While it is open, ``moved`` counts what operations of torch read and write, and only what these do.

    Views are counted as if they were read.
    """

    def __init__(self, moved: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._moved = moved

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "empty" not in str(func):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self._moved["torch"] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def without_counting_torch(launch: Any) -> Any:
    """A launch, in which the interpreter uses torch for its own purposes."""

    def launched(*args: Any, **options: Any) -> None:
        with _disable_current_modes():
            launch(*args, **options)

    return launched


def step_of_an_optimizer() -> dict[str, float]:
    """Bytes for each parameter of ``DisTrO.step()``, by kernels and by torch, of a peer that is alone."""
    side = 2 * SHAPE[0]  # four tiles
    param = Parameter(torch.randn(side, side))
    optimizer = DisTrO([param], lr=1e-3, engine="triton", **PUBLISHED)
    basis = [tables.encoding_basis(64, CPU, torch.float32, whole=False), tables.integer_digits(64, CPU)]
    for _ in range(2):  # the first shifts weights, the second compares kernels with torch
        param.grad = torch.randn(side, side)
        optimizer.step()
    moved: Counter[str] = Counter()
    counting(moved, basis)
    for name in ("check", "extract", "merge", "shift", "put_back"):
        setattr(launching, name, without_counting_torch(getattr(launching, name)))
    with ByTorch(moved):
        optimizer.step()
    return {kind: count / param.numel() for kind, count in moved.items()}


def moved_bytes() -> dict[str, dict[str, float]]:
    """For each parameter, by the part of a step that moves them, of four kinds of steps."""
    torch.manual_seed(0)
    cases = {"alone": (torch.float32, 1), "in bfloat16": (torch.bfloat16, 1), "with 15 others": (torch.float32, 16)}
    counted = {name: step(*case) for name, case in cases.items()}
    return {**counted, "by an optimizer": step_of_an_optimizer()}
