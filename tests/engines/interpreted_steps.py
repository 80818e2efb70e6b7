"""Steps by the kernels in Triton's interpreter and by torch, side by side: what differs.

For ``interpreted.py``, a process of its own: TRITON_INTERPRET must be set before Triton is imported for the first time.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import Parameter

from distro_optim import DisTrO
from distro_optim.compress import CompressedUpdate
from distro_optim.compress.tiling import Tiling
from distro_optim.optim.rules import PUBLISHED

LR: Final = 1e-2


@dataclass(frozen=True)
class Case:
    """A model, settings, and how many contributors."""

    shapes: tuple[tuple[int, ...], ...]
    contributors: int = 1
    dtype: str = "float32"
    k: int = 8
    quantize: bool = True
    overlap: bool = True
    tiling: Tiling = "padded"
    chunk: int = 64


CASES: Final = {
    "signs, ragged": Case(((70, 40), (64, 64), (70,)), contributors=3),
    "signs, 64 contributors": Case(((64, 64),), contributors=64),
    "signs, without overlap": Case(((86, 43),), contributors=2, k=64, tiling="divisor", overlap=False),
    "values of bfloat16": Case(((40, 70),), contributors=4, dtype="bfloat16", k=32, quantize=False),
    "values, as coefficients": Case(((64, 64),), contributors=5, k=32, quantize=False, overlap=False),
    "values of float16, a convolution": Case(((33, 3, 3, 3),), dtype="float16", k=3, quantize=False, overlap=False),
    "tiles too large for the kernels": Case(((128, 128),), contributors=2, chunk=128),
}


@dataclass
class Found:
    """What came out otherwise.

    Attributes:
        picks: tiles with other coefficients.
        unordered: tiles whose coefficients do not stand in ascending order.
        sent: the largest difference of signs or values that were sent, over their largest.
        momentum: the largest difference of momenta, over their largest.
        presence: tensors of which only one says that they are present.
        quarantined: gradients that were left out for not being finite.
        weights: weights with other bits, after a step that merged all contributors.
        permuted: and with other bits after a step that took them in another order.
        shifted: weights that look ahead to elsewhere.
        warnings: texts.
    """

    picks: int = 0
    tiles: int = 0
    unordered: int = 0
    sent: float = 0.0
    momentum: float = 0.0
    presence: int = 0
    quarantined: int = 0
    weights: int = 0
    permuted: int = 0
    shifted: int = 0
    warnings: tuple[str, ...] = ()


def _optimizer(case: Case, engine: str) -> tuple[list[Parameter], DisTrO]:
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    params = [Parameter((torch.randn(shape) * 0.02).to(dtype)) for shape in case.shapes]
    return params, DisTrO(
        params,
        lr=LR,
        compression_topk=case.k,
        compression_chunk=case.chunk,
        quantize_1bit=case.quantize,
        overlap=case.overlap,
        tiling=case.tiling,
        engine=engine,  # type: ignore[arg-type]
        **PUBLISHED,
    )


def _gradients(case: Case, step: int) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(step)
    dtype = getattr(torch, case.dtype)
    grads: list[Tensor | None] = [torch.randn(s, generator=generator).to(dtype) for s in case.shapes]
    if step == 1:
        grads[0] = None if len(grads) > 1 else torch.zeros_like(torch.empty(case.shapes[0], dtype=dtype))
        if len(grads) > 2 and grads[1] is not None:
            grads[1][3, 3] = torch.inf
    return grads


def _in_order(index: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    ordered = index.sort(dim=1)
    return ordered.values, value.float().gather(1, ordered.indices)


def _compare_updates(found: Found, ours: CompressedUpdate, other: CompressedUpdate) -> None:
    found.presence += sum(a != b for a, b in zip(ours.present, other.present, strict=True))
    for number, batch in enumerate(ours.plan.batches):
        rows = [t for n, (a, z) in batch.ranges.items() if other.present[n] for t in range(a, z)]
        index, value = _in_order(ours.index[number][rows], ours.value[number][rows])
        found.unordered += int((index != ours.index[number][rows]).any(1).sum())
        index_too, value_too = _in_order(other.index[number][rows], other.value[number][rows])
        same = (index == index_too).all(1)
        found.tiles += len(rows)
        found.picks += int((~same).sum())
        if len(rows):
            far = (value - value_too)[same].abs().max() if bool(same.any()) else torch.tensor(0.0)
            found.sent = max(found.sent, float(far / value_too.abs().max().clamp(min=1e-30)))


def _run(case: Case) -> Found:
    found = Found()
    params, ours = _optimizer(case, "triton")
    params_too, other = _optimizer(case, "torch")
    updates: list[CompressedUpdate] = []
    for step in range(2):
        for mine, theirs, grad in zip(params, params_too, _gradients(case, step), strict=True):
            mine.grad, theirs.grad = grad, grad
        update, update_too = ours.generate(), other.generate()
        _compare_updates(found, update, update_too)
        updates.append(update_too)
        for mine, theirs in zip(params, params_too, strict=True):
            far, most = (ours.delta(mine) - other.delta(theirs)).abs().max(), other.delta(theirs).abs().max()
            found.momentum = max(found.momentum, float(far / most.clamp(min=1e-30)))
    found.quarantined = ours.quarantined
    # Contributors that name the same positions, and such that do not.
    everybody = [_turned(updates[n % 2], n) for n in range(case.contributors)]
    ours.apply(everybody)
    other.apply(everybody)
    found.weights = _others(params, params_too)
    ours.apply(everybody[::-1])
    other.apply(everybody)
    found.permuted = _others(params, params_too)
    if case.overlap:
        for mine, theirs in zip(params, params_too, strict=True):
            ours.state[mine]["delta"].copy_(other.state[theirs]["delta"])
        ours.lookahead(LR)
        other.lookahead(LR)
        found.shifted = _others(params, params_too)
        ours.undo_lookahead()
        other.undo_lookahead()
        found.shifted += _others(params, params_too)
    return found


def _turned(update: CompressedUpdate, number: int) -> CompressedUpdate:
    """An update in which every third tile names other positions, with other signs."""
    index, value = [], []
    for batch, i, v in zip(update.plan.batches, update.index, update.value, strict=True):
        turned = (torch.arange(batch.tiles) % 3 == number % 3)[:, None]
        index.append(torch.where(turned, (i + 7 * number) % batch.tile_size, i))
        value.append(torch.where(turned, ~v if v.dtype == torch.bool else -v * (number + 1), v))
    return CompressedUpdate(update.plan, tuple(index), tuple(value), update.present)


def _others(params: list[Parameter], others: list[Parameter]) -> int:
    def bits(tensor: Tensor) -> Tensor:
        return tensor.detach().view(torch.int16 if tensor.element_size() == 2 else torch.int32)

    return sum(int((bits(a) != bits(b)).sum()) for a, b in zip(params, others, strict=True))


def steps() -> dict[str, dict[str, Any]]:
    """What was found, by case; see :class:`Found`."""
    results = {}
    for name in CASES:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = _run(CASES[name])
        found.warnings = tuple(str(w.message) for w in caught if "engine=" in str(w.message))
        results[name] = asdict(found)
    return results
