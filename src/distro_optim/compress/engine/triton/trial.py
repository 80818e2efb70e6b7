"""One block by the kernels and by torch, before the first step: do they do here what they do elsewhere?

On copies, so that a compiler or a GPU that computes something else does no harm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ...dct import make_transform
from ...exact import ExactMerge
from ...extraction import Extraction, OwnPart
from ...plan import Block
from ...update import CompressedUpdate
from ..base import Intake
from .batches import KernelBatch

__all__ = ["extraction_differs", "merge_differs"]

_NEAR: Final = 1e-3
"""Of the sums of squares that both leave: where rounding decides, other coefficients may be picked. A transform that is
wrong is wrong by far more."""


_LOST: Final = 1e-6
"""Of the sum of squares that came in: two bfloat16 lose 2**-34 of it."""


def _came_in(intake: Intake, number: int, rate: float, keep: float) -> Tensor:
    """A bound on the sum of squares of a tensor's momentum before anything is sent."""
    size: Tensor = keep * intake.momenta[number].double().norm()
    grad = intake.grads[number]
    if grad is not None:
        size = size + rate * grad.double().norm()
    return size.square()


def _trial_block(ours: KernelBatch) -> Block:
    """The smallest, of which the tensors are copied."""
    sizes = {number: stop - start for number, (start, stop) in ours.batch.ranges.items()}
    return min(ours.batch.blocks, key=lambda block: sum(sizes[number] for number in _tensors_of(block)))


def _tensors_of(block: Block) -> list[int]:
    return sorted({piece.param for piece in block.pieces})


def _copies(tensors: Sequence[Any], numbers: Sequence[int]) -> list[Any]:
    """Copies of the tensors with these numbers, in a list of all."""
    copied = list(tensors)
    for number in numbers:
        copied[number] = tensors[number].detach().clone()
    return copied


def _scratch(ours: KernelBatch, block: Block) -> list[Tensor]:
    batch = ours.batch
    shape = (block.tiles, batch.h, batch.w)
    return [torch.empty(shape, dtype=batch.compute_dtype, device=batch.device) for _ in range(3)]


def merge_differs(
    ours: KernelBatch, updates: Sequence[CompressedUpdate], flags: Tensor, weights: Sequence[Tensor], rate: float
) -> str | None:
    """In how many weights a block comes out otherwise; None if it is the same to the last bit.

    Args:
        updates, flags, weights, rate: as for :meth:`~.batches.KernelBatch.merge`; nothing is changed.
    """
    batch, block = ours.batch, _trial_block(ours)
    numbers = _tensors_of(block)
    by_kernel, by_torch = (_copies(weights, numbers) for _ in range(2))
    ours.merge(updates, flags, by_kernel, rate, tiles=(block.start, block.stop))
    transform = make_transform("dct", batch.h, batch.w, batch.compute_dtype, batch.device, batch.profile)
    twin = ExactMerge(ours.number, batch, transform, 1)
    twin.check(updates)
    twin.merge_block(block, 0, _scratch(ours, block), updates, by_torch, rate)
    others = sum(int((by_kernel[n] != by_torch[n]).sum()) for n in numbers)
    return f"{others} weights of a block differ" if others else None


def extraction_differs(ours: KernelBatch, intake: Intake, flags: Tensor) -> str | None:
    """What is wrong about the momentum of a block, or about the coefficients that were picked; None if nothing is."""
    batch, block = ours.batch, _trial_block(ours)
    numbers = _tensors_of(block)
    as_coefficients = intake.in_coefficients[numbers[0]]
    rate, keep = intake.lr[batch.group], intake.decay[batch.group]
    transform = make_transform("dct", batch.h, batch.w, batch.compute_dtype, batch.device, batch.profile)
    left: list[Tensor] = []
    for by_kernel in (True, False):
        momenta = _copies(intake.momenta, numbers)
        own = None
        if intake.own is not None:
            own = list(intake.own)
            for n in numbers:
                own[n] = OwnPart(own[n].index.clone(), own[n].value.clone())
        index = torch.zeros(batch.tiles, batch.k, dtype=torch.int32, device=batch.device)
        kind = torch.bool if intake.quantize else batch.value_dtype
        value = torch.zeros(batch.tiles, batch.k, dtype=kind, device=batch.device)
        if by_kernel:
            ours.extract(
                ours.of_one_type(intake.grads), momenta, own, as_coefficients=as_coefficients, rate=rate, keep=keep,
                present=flags, index=index, value=value, spoken=torch.zeros_like(flags),
                tiles=(block.start, block.stop),
            )  # fmt: skip
        else:
            spoken = torch.zeros(batch.tiles, dtype=torch.bool, device=batch.device)
            Extraction(
                batch=batch, transform=transform, in_coefficients=as_coefficients, grads=intake.grads, momenta=momenta,
                rate=rate, keep=keep, own=own, step=None, index_out=index, value_out=value, spoken_out=spoken,
            ).extract(block, *_scratch(ours, block))  # fmt: skip
        sums = [momenta[n].double().square().sum() for n in numbers]
        if own is not None:
            sums += [own[n].value.double().square().sum() for n in numbers]
        left.append(torch.stack(sums))
    kernel, blocks = left
    # Where all of it is sent, what stays is rounding.
    came = torch.stack([_came_in(intake, n, rate, keep) for n in numbers])
    far = (kernel - blocks).abs() - _NEAR * blocks.abs() - _LOST * came.repeat(len(blocks) // len(came))
    if not bool((far > 0).any()):
        return None
    worst = int(far.argmax())
    return f"a sum of squares is {float(kernel[worst]):.6g} instead of {float(blocks[worst]):.6g}"
